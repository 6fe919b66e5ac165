"""`fused_kda_decode` by PyTorch operations, which is what serves a CPU; tests/gpu/test_decode_fused.py has the kernel."""

from __future__ import annotations

import pytest
import torch
from decode_inputs import shuffled_slots
from fused_decode_inputs import STATES, expected_step, fused_inputs
from kda_inputs import rel_rms

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64

# float32 arithmetic in another order; one rounding of the result to bfloat16 is 1.7e-3
TOLERANCE = {FP64: 1e-12, FP32: 1e-5, BF16: 2.5e-3}


def check(package, x: dict, indices=None, accepted=None) -> None:
    wanted = expected_step(x, indices, accepted)
    call = x | {name: x[name].clone() for name in STATES}
    out = package.fused_kda_decode(**call, ssm_state_indices=indices, num_accepted_tokens=accepted)
    for want, got in zip(wanted, (out, call["conv_state"], call["recurrent_state"])):
        assert got.shape == want.shape and torch.equal(got.isnan(), want.isnan())
        assert rel_rms(want.nan_to_num(), got.double().nan_to_num()) <= TOLERANCE[got.dtype]


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("state_v_first", [False, True], ids=["k-first", "v-first"])
def test_one_token_and_a_few(cpu_package, dtype, state_v_first):
    for T in (1, 5):
        check(
            cpu_package,
            fused_inputs("softplus-init", 2, T, dtype=dtype, state_v_first=state_v_first, bias=True),
        )


@pytest.mark.parametrize("width", [3, 4])
def test_pool_of_a_ragged_batch(cpu_package, width):
    x = fused_inputs("lower-weak", lengths=[2, 0, 1, 4], slots=6, width=width)
    check(cpu_package, x, torch.tensor([5, 2, 0, 3]))
    check(cpu_package, x, torch.tensor([5, 2, -1, 6]))


def test_states_per_token(cpu_package):
    x = fused_inputs("lower-weak", 4, 3, slots=14)
    slots = shuffled_slots(12, 14).view(4, 3)
    slots[3, 1] = -1
    check(cpu_package, x, slots, torch.tensor([1, 3, 4, 1]))


def test_continues_where_it_stopped(cpu_package):
    """Token by token, the states going from call to call, is the same as all tokens at once."""
    x = fused_inputs("lower-weak", 2, 6, dtype=FP32)
    want_out, *want = expected_step(x)
    outs = []
    for t in range(6):
        step = x | {name: x[name][:, t : t + 1] for name in ("q", "k", "v", "g", "beta", "gate")}
        outs.append(cpu_package.fused_kda_decode(**step))
    assert rel_rms(want_out, torch.cat(outs, dim=1).double()) <= TOLERANCE[FP32]
    assert all(rel_rms(a, x[name].double()) <= TOLERANCE[FP32] for a, name in zip(want, STATES))


def test_out(cpu_package):
    x = fused_inputs("lower-weak", 2, 1)
    want = cpu_package.fused_kda_decode(**x | {name: x[name].clone() for name in STATES})
    out = torch.full_like(x["v"], torch.nan)
    assert cpu_package.fused_kda_decode(**x, out=out) is out and torch.equal(out, want)


BAD = {
    "conv_state": lambda x: x[:, :, :2],
    "conv_weight": lambda x: x[1:],
    "norm_weight": lambda x: x[1:],
    "conv_bias": lambda x: x[1:],
    "gate": lambda x: x[:, :, :1],
    "k": lambda x: x[:, :, :1],
    "recurrent_state": lambda x: x[:, :, 1:],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(cpu_package, name):
    x = fused_inputs("lower-weak", 3, 1, bias=True)
    before = {state: x[state].clone() for state in STATES}
    with pytest.raises((ValueError, RuntimeError), match=f"{name}|initial_state"):
        cpu_package.fused_kda_decode(**x | {name: BAD[name](x[name])})
    assert all(torch.equal(x[state], before[state]) for state in STATES)


@pytest.mark.parametrize("name", ["q", "conv_weight", "norm_weight", "recurrent_state"])
def test_no_gradients(cpu_package, name):
    x = fused_inputs("lower-weak", 2, 1)
    x[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: expected a tensor that requires no gradient"):
        cpu_package.fused_kda_decode(**x)
    with torch.no_grad():
        assert cpu_package.fused_kda_decode(**x).isfinite().all()

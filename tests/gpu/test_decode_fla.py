"""flash-linear-attention's decoding beside ours, and on ours. FLA compiles its one kernel for some tests."""

from __future__ import annotations

import logging

import pytest
import torch
from decode_harness import BF16, FP32, TOLERANCE, errors, inputs_for, pool_for, reference
from decode_inputs import shuffled_slots
from harness import DEVICE
from kda_inputs import rel_rms, to_float64

pytest.importorskip("fla", reason="flash-linear-attention is not installed")

TOKENS = ("q", "k", "v", "g", "beta")


@pytest.fixture
def served(kernel_package, monkeypatch):
    """Registers our backends; the keyword arguments of the calls that reach `fused_recurrent_kda`."""
    import hf_layer.fla
    from hf_layer import load_kernel

    calls = []
    module = load_kernel().module
    assert module.fwd is kernel_package.fwd
    fused_recurrent_kda = module.fused_recurrent_kda

    def counting(*args, **kwargs):
        calls.append(kwargs)
        return fused_recurrent_kda(*args, **kwargs)

    monkeypatch.delenv("FLA_FLASH_KDA", raising=False)
    monkeypatch.setattr(module, "fused_recurrent_kda", counting)
    hf_layer.fla.register()
    yield calls
    hf_layer.fla.unregister()


CASES = {
    "lower-bound": ("lower-strong", dict(N=3, T=1)),
    "softplus-v-first": ("softplus-init", dict(N=3, T=4, state_v_first=True)),
    "pre-activated-grouped": ("lower-weak", dict(N=2, T=2, HV=4, preactivated=True)),
    "pack": ("lower-weak", dict(lengths=(1, 3, 2))),
    "no-states": ("softplus-init", dict(N=2, T=2, initial_state=False, output_final_state=False)),
}


@pytest.mark.parametrize("case", CASES)
def test_fla_runs_on_our_kernel(kernel_package, served, case, caplog):
    from fla.ops.kda import fused_recurrent_kda

    gate, options = CASES[case]
    x = inputs_for(gate, **options)
    with torch.inference_mode(), caplog.at_level(logging.INFO, logger="hf_layer.fla"):
        found = fused_recurrent_kda(**x)
    assert len(served) == 1 and "[FLA Backend] kda.fused_recurrent_kda_fwd -> flashkda" in caplog.messages
    with torch.inference_mode():
        direct = kernel_package.fused_recurrent_kda(**x)
    assert torch.equal(found[0], direct[0])
    assert found[1] is direct[1] is None or torch.equal(found[1], direct[1])


def test_fla_s_inner_function_on_a_pool(kernel_package, served):
    from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

    x = inputs_for("lower-weak", 4, 3, 2)
    pool, slots = pool_for(x, 20, gap=0), shuffled_slots(12, 20, device=DEVICE).view(4, 3)
    counts = torch.tensor([1, 3, 2, 1], dtype=torch.int32, device=DEVICE)
    want_o, want = reference(kernel_package, x, state=pool, indices=slots, accepted=counts, inplace=True)
    call = x | dict(initial_state=pool, ssm_state_indices=slots, num_accepted_tokens=counts)
    with torch.inference_mode():
        o, state = fused_recurrent_kda_fwd(**call)
    assert len(served) == 1 and state is pool
    assert rel_rms(want_o, o) <= TOLERANCE[BF16] and errors(want, pool)[0] <= TOLERANCE[FP32]


@pytest.mark.parametrize("state_v_first", [False, True], ids=["k-first", "v-first"])
@pytest.mark.parametrize("accepted", [1, 2, 3])
def test_drafts_mean_what_they_mean_to_fla(kernel_package, accepted, state_v_first):
    """Every state of the pool after FLA's own kernel is as after ours."""
    from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

    x = inputs_for("lower-weak", 4, 3, 2, 4, state_v_first=state_v_first)
    theirs = pool_for(x, 20, gap=0)
    ours, slots = theirs.clone(), shuffled_slots(12, 20, device=DEVICE).view(4, 3)
    counts = torch.full((4,), accepted, dtype=torch.int32, device=DEVICE)
    where = dict(ssm_state_indices=slots, num_accepted_tokens=counts, inplace_final_state=True)
    with torch.no_grad():
        their_o, _ = fused_recurrent_kda_fwd(**x | dict(initial_state=theirs), **where)
        our_o, _ = kernel_package.fused_recurrent_kda(**x | dict(initial_state=ours), **where)
    assert rel_rms(their_o, our_o) <= 2 * TOLERANCE[BF16]
    assert rel_rms(theirs, ours) <= 2 * TOLERANCE[FP32]


@pytest.mark.parametrize("gate", ["lower-weak", "softplus-init"])
def test_drift_is_no_larger_than_fla_s(kernel_package, gate):
    """Errors of the output and the state at the end of 4096 steps of one token, in float32 states."""
    from fla.ops.kda import fused_recurrent_kda

    T = 4096
    x = inputs_for(gate, 1, T, 2)
    want_o, want_state = kernel_package.reference.recurrent_kda(**to_float64(x))
    last = slice(T - 256, T)

    def drift(decode) -> tuple[float, float]:
        state, outputs = x["initial_state"], []
        with torch.no_grad():
            for t in range(T):
                o, state = decode(
                    **x | {name: x[name][:, t : t + 1] for name in TOKENS} | {"initial_state": state}
                )
                outputs.append(o)
        return rel_rms(want_o[:, last], torch.cat(outputs[last], 1)), rel_rms(want_state, state)

    ours, theirs = drift(kernel_package.fused_recurrent_kda), drift(fused_recurrent_kda)
    # Both outputs are one rounding to bfloat16, whose RMS varies by a per cent with what else is rounded; the
    # states, in float32, by what the order of sums makes of 1e-7.
    assert ours[0] <= 1.02 * theirs[0] and ours[1] <= max(theirs[1], 5e-7)

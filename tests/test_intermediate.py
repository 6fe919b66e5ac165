"""chunk_kda(return_intermediate_states=True): the states before every 64th token, on CPUs."""

from __future__ import annotations

import sys

import pytest
import torch
from kda_inputs import FLAGS, make_inputs, prefix_states, rel_rms

LENGTHS = (64, 0, 1, 63, 65, 128, 200)
K_FIRST = sum(FLAGS[f"USE_{name}_IN_KERNEL"] for name in ("GATE", "QK_L2NORM", "BETA_SIGMOID"))


def bounds_of(lengths) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


@pytest.mark.parametrize("v_first", [False, True], ids=["k-first", "v-first"])
@pytest.mark.parametrize("initial", [False, True], ids=["zeros", "initial"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("served", ["kernel", "reference"])
def test_states(cpu_package, served, packed, initial, v_first):
    reference = cpu_package.reference
    shape = dict(B=1, T=sum(LENGTHS), cu_seqlens=bounds_of(LENGTHS)) if packed else dict(B=2, T=150)
    shape.update(H=1, HV=2, initial_state=initial, state_v_first=v_first)
    if served == "reference":  # another head dimension
        shape.update(K=32, V=16)
    inputs = make_inputs("lower-weak", **shape, dtype=torch.float32)
    o, final_state, states = cpu_package.chunk_kda(**inputs, return_intermediate_states=True)
    plain = cpu_package.chunk_kda(**inputs)
    assert torch.equal(o, plain[0]) and torch.equal(final_state, plain[1])
    expected = prefix_states(reference, inputs)
    assert states.dtype == torch.bfloat16 and states.shape == expected.shape
    error = 0.0 if not expected.any() and not states.any() else rel_rms(expected, states.double())
    assert error <= 2.5e-3  # one rounding to bfloat16


def test_without_a_whole_sequence(cpu_package):
    for shape in (dict(B=2, T=0), dict(B=1, T=0, cu_seqlens=[0, 0, 0])):
        inputs = make_inputs("lower-weak", H=1, **shape)
        states = cpu_package.chunk_kda(**inputs, return_intermediate_states=True)[2]
        assert states.shape == (shape["B"], 0, 1, 128, 128)


def test_the_kernel_writes_no_more_than_there_is_room_for(cpu_package):
    """A pack's number of states is the caller's word: too small a tensor gets the first ones."""
    inputs = make_inputs("lower-weak", B=1, T=200, H=1, cu_seqlens=[0, 100, 200])
    all_states = cpu_package.chunk_kda(**inputs, return_intermediate_states=True)[2]
    assert all_states.shape[1] == 4
    buffer = torch.full((1, 4, 1, 128, 128), 7.0, dtype=torch.bfloat16)
    operator = sys.modules[cpu_package.chunk_kda.__module__].kda_prefill
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "cu_seqlens")
    operator(
        *(inputs[name] for name in names), torch.empty_like(inputs["v"]), None, 128**-0.5,
        inputs["lower_bound"], K_FIRST, buffer[:, :3],
    )  # fmt: skip
    assert torch.equal(buffer[:, :3], all_states[:, :3]) and (buffer[:, 3] == 7.0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda states: states.float(), "intermediate_states: expected"),
        (lambda states: states[0], "intermediate_states: expected 5 dimensions"),
        (lambda states: states[:, :1], r"intermediate_states: expected shape \[B, NT, HV, K, V\] = \[1, 2, "),
        (lambda states: states.transpose(3, 4), "intermediate_states: expected a contiguous"),
    ],
    ids=["dtype", "dimensions", "count", "strides"],
)
def test_bad_tensors(cpu_package, change, message):
    inputs = make_inputs("lower-weak", B=1, T=100, H=1)
    states = change(torch.zeros(1, 2, 1, 128, 128, dtype=torch.bfloat16))
    operator = sys.modules[cpu_package.chunk_kda.__module__].kda_prefill
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "cu_seqlens")
    with pytest.raises(RuntimeError, match=message):
        operator(
            *(inputs[name] for name in names), torch.empty_like(inputs["v"]), None, 128**-0.5,
            inputs["lower_bound"], K_FIRST, states,
        )  # fmt: skip

"""chunk_kda(return_intermediate_states=True) on a GPU: FLA's meaning and layout."""

from __future__ import annotations

import pytest
import torch
from harness import (
    assert_intermediate_states,
    inputs_for,
)
from kda_inputs import GATES

LENGTHS = (64, 0, 1, 63, 65, 128, 200, 31, 97)


@pytest.mark.parametrize("v_first", [False, True], ids=["k-first", "v-first"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("gate", sorted(GATES))
def test_states(kernel_package, gate, packed, v_first):
    shape = dict(lengths=LENGTHS) if packed else dict(B=2, T=200)
    inputs = inputs_for(gate, H=1, HV=2, state_v_first=v_first, **shape)
    states = assert_intermediate_states(kernel_package, inputs)
    assert states.dtype == torch.bfloat16


def test_bad_bounds_poison_the_states(kernel_package):
    inputs = inputs_for("lower-weak", lengths=(100, 100))
    bounds = inputs["cu_seqlens"].clone()
    inputs["cu_seqlens"][2] = 150
    o, final_state, states = kernel_package.chunk_kda(
        **inputs, return_intermediate_states=True, cu_seqlens_cpu=bounds.cpu()
    )
    assert o.isnan().all() and final_state.isnan().all() and states.isnan().all()
    assert states.shape[1] == 4

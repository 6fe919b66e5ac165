"""The decode kernel without a GPU: tests/gpu/test_decode_kernel.py's tests, by tests/emulator."""

from __future__ import annotations

import decode_harness
import pytest
import test_decode_kernel as on_gpu
from emulator_build import instead_of_a_gpu

DEVICES = [dict(cluster_ctas=ctas, seed=seed) for seed, ctas in enumerate((1, 4))]


@pytest.fixture
def kernel_package(emulated, one_thread, monkeypatch):
    return instead_of_a_gpu(emulated, DEVICES, monkeypatch, on_gpu, decode_harness)


test_gates = on_gpu.test_gates
test_what_is_activated_inside = on_gpu.test_what_is_activated_inside
test_optional_gate_parameters = on_gpu.test_optional_gate_parameters
test_ragged_batches = on_gpu.test_ragged_batches
test_wrong_cu_seqlens = on_gpu.test_wrong_cu_seqlens
test_no_tokens_and_no_sequences = on_gpu.test_no_tokens_and_no_sequences
test_one_misaligned_input = on_gpu.test_one_misaligned_input
test_pool = on_gpu.test_pool
test_slots_that_are_not_there = on_gpu.test_slots_that_are_not_there
test_a_graph_s_padding_rows = on_gpu.test_a_graph_s_padding_rows
test_states_after_every_token = on_gpu.test_states_after_every_token
test_wrong_rows_of_drafts = on_gpu.test_wrong_rows_of_drafts
test_indices_with_strides = on_gpu.test_indices_with_strides
test_nan_stays_in_its_sequence_and_head = on_gpu.test_nan_stays_in_its_sequence_and_head


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1), (5, 1, 2), (1, 64, 2), (33, 1, 2), (33, 2, 2)],
    ids=lambda s: "N{}-T{}-HV{}".format(*s),
)
def test_sizes(kernel_package, sizes):
    on_gpu.test_sizes(kernel_package, sizes)

"""The fused decode step without a GPU: tests/gpu/test_decode_fused.py's tests, by tests/emulator."""

from __future__ import annotations

import pytest
import test_decode_fused as on_gpu
from emulator_build import instead_of_a_gpu

# Without clusters, as before compute capability 9.0, and with them.
DEVICES = [dict(cluster_ctas=ctas, seed=seed) for seed, ctas in enumerate((1, 4, 4))]


@pytest.fixture
def kernel_package(emulated, one_thread, monkeypatch):
    return instead_of_a_gpu(emulated, DEVICES, monkeypatch, on_gpu)


test_gates_and_layouts = on_gpu.test_gates_and_layouts
test_convolution = on_gpu.test_convolution
test_options = on_gpu.test_options
test_channels_last_conv_state = on_gpu.test_channels_last_conv_state
test_strided_and_misaligned_inputs = on_gpu.test_strided_and_misaligned_inputs
test_slices_of_one_projection = on_gpu.test_slices_of_one_projection
test_pool_of_a_ragged_batch = on_gpu.test_pool_of_a_ragged_batch
test_states_per_token = on_gpu.test_states_per_token
test_token_by_token_is_the_same_bit_by_bit = on_gpu.test_token_by_token_is_the_same_bit_by_bit
test_wrong_cu_seqlens = on_gpu.test_wrong_cu_seqlens
test_nan_stays_in_its_sequence_and_head = on_gpu.test_nan_stays_in_its_sequence_and_head


@pytest.mark.parametrize("T", [1, 4, 33])
def test_sizes(kernel_package, T):
    on_gpu.test_sizes(kernel_package, 2, T, 3)

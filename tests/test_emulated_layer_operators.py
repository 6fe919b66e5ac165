"""The operators around the delta rule without a GPU: tests/gpu/test_layer_operators.py's tests, by tests/emulator."""

from __future__ import annotations

import pytest
import test_layer_operators as on_gpu
import torch
from emulator_build import instead_of_a_gpu

DEVICES = [dict(seed=seed) for seed in range(2)]


@pytest.fixture
def ops(emulated, one_thread, monkeypatch):
    return instead_of_a_gpu(emulated, DEVICES, monkeypatch, on_gpu).ops


test_conv_lengths = on_gpu.test_conv_lengths
test_conv_of_many_channels = on_gpu.test_conv_of_many_channels
test_conv_packed = on_gpu.test_conv_packed
test_conv_of_random_packs = on_gpu.test_conv_of_random_packs
test_conv_of_more_sequences_than_threads = on_gpu.test_conv_of_more_sequences_than_threads
test_conv_of_no_tokens = on_gpu.test_conv_of_no_tokens
test_conv_of_slices = on_gpu.test_conv_of_slices
test_conv_parameters_that_are_not_aligned = on_gpu.test_conv_parameters_that_are_not_aligned
test_conv_of_bad_bounds = on_gpu.test_conv_of_bad_bounds
test_conv_keeps_nan_to_its_sequence = on_gpu.test_conv_keeps_nan_to_its_sequence
test_norm_in_place = on_gpu.test_norm_in_place
test_norm_of_strided_rows = on_gpu.test_norm_of_strided_rows
test_norm_extremes = on_gpu.test_norm_extremes


# These two have a mark that asks for a GPU.
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("W", [2, 3, 4])
def test_conv(ops, W, bias, weight_dtype):
    on_gpu.test_conv(ops, W, bias, weight_dtype)


@pytest.mark.parametrize("shape", [(2, 37, 3), (1, 65, 1)], ids=str)
@pytest.mark.parametrize("silu", [False, True], ids=["sigmoid", "silu"])
def test_norm(ops, silu, shape):
    on_gpu.test_norm(ops, silu, shape)

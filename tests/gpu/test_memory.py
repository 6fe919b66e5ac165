"""What the prefill kernel reads and writes: strides, alignment, neighbours, poison, 64-bit offsets."""

from __future__ import annotations

import math

import pytest
import torch
from harness import (
    DEVICE,
    SENTINEL,
    TOKEN_INPUTS,
    TOLERANCE,
    assert_accurate,
    assert_nan_and_nothing_else,
    call_op,
    guarded_state,
    inputs_for,
    run_op,
)
from kda_inputs import conv_layout, rel_rms, to_float64

pytestmark = pytest.mark.usefixtures("each_kernel")

BF16 = torch.bfloat16
NAN = math.nan


def padded(
    x: torch.Tensor, tokens: int = 0, heads: int = 0, features: int = 0, shift: int = 0
) -> torch.Tensor:
    """The values of x [B, T, H(, D)] in a larger NaN tensor that begins `shift` elements into its storage."""
    sizes = [x.shape[0], x.shape[1] + tokens, x.shape[2] + heads]
    if x.dim() == 4:
        sizes.append(x.shape[3] + features)
    storage = torch.full((shift + math.prod(sizes),), NAN, dtype=x.dtype, device=x.device)
    view = storage[shift:].view(sizes)[tuple(slice(n) for n in x.shape)]
    view.copy_(x)
    return view


LAYOUTS = {
    "padded-heads": dict(heads=3),
    "padded-tokens": dict(tokens=5),
    "padded-features": dict(features=8),
    "odd-feature-stride": dict(features=1),
    "odd-offset": dict(shift=1),
    "offset-of-4": dict(shift=4),
    "all-of-it": dict(tokens=2, heads=1, features=24, shift=8),
}


@pytest.mark.parametrize("g_dtype", [torch.float32, BF16], ids=["fp32-g", "bf16-g"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(kernel_package, layout, g_dtype):
    """Views with padding are read in place; the padding holds NaN and must not be read into a result."""
    plain = inputs_for("softplus-init", B=2, T=83, H=2, HV=4, g_dtype=g_dtype)
    strided = {**plain, **{name: padded(plain[name], **LAYOUTS[layout]) for name in TOKEN_INPUTS}}
    assert_accurate(kernel_package, plain, run_op(kernel_package, strided))


@pytest.mark.parametrize("names", [("q", "k"), ("v",), ("g",), ("beta",)], ids=" ".join)
def test_heads_that_share_rows(kernel_package, names):
    """A stride of 0, as expand() makes it: nothing that a tensor copy (TMA) can describe."""
    inputs = inputs_for("softplus-init", B=2, T=83, H=4)
    shared = {**inputs, **{name: inputs[name][:, :, :1].expand_as(inputs[name]) for name in names}}
    copied = {name: x.contiguous() if name in names else x for name, x in shared.items()}
    assert_accurate(kernel_package, copied, run_op(kernel_package, shared))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_out(kernel_package, layout):
    """Only the elements of `out` are written, whatever its strides are."""
    inputs = inputs_for("lower-weak", B=2, T=83, H=2)
    out = padded(torch.zeros_like(inputs["v"]), **LAYOUTS[layout])
    storage = torch.empty(0, dtype=BF16, device=DEVICE).set_(out.untyped_storage())
    inside = torch.zeros(storage.shape, dtype=torch.bool, device=DEVICE)
    inside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
    storage.fill_(SENTINEL)
    _, final_state = guarded_state(inputs, torch.float32)
    call_op(kernel_package, inputs, out, final_state)
    assert_accurate(kernel_package, inputs, (out, final_state))
    assert (storage[~inside] == SENTINEL).all()


def test_slices_of_a_fused_projection(kernel_package):
    """q, k and v as three slices of one tensor [B, T, 3 H, D], g and beta as transposed views."""
    inputs = inputs_for("softplus-init", B=2, T=70, H=3)
    fused = torch.cat([inputs[name] for name in ("q", "k", "v")], dim=2)
    sliced = dict(zip(("q", "k", "v"), fused.split(3, dim=2)))
    for name in ("g", "beta"):
        sliced[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(sliced[name].is_contiguous() for name in sliced)
    found = run_op(kernel_package, {**inputs, **sliced})
    assert_accurate(kernel_package, inputs, found)


def test_broadcast_inputs(kernel_package):
    """Strides of zero: one key and one gate for all heads and batch rows."""
    inputs = inputs_for("lower-weak", B=2, T=70, H=4)
    for name in ("k", "g", "beta"):
        inputs[name] = inputs[name][:1, :, :1].expand_as(inputs[name])
    assert_accurate(kernel_package, inputs, run_op(kernel_package, inputs))


def test_layout_of_transformers_convolution(kernel_package):
    """chunk_kda takes q, k, v whose contiguous dimension is the token: the same bits as the plain layout."""
    inputs = inputs_for("softplus-init", B=2, T=70, preactivated=True)
    turned = {name: conv_layout(inputs[name]) for name in ("q", "k", "v")}
    assert turned["q"].stride(1) == 1
    expected = kernel_package.chunk_kda(**inputs)
    found = kernel_package.chunk_kda(**{**inputs, **turned})
    assert all(torch.equal(x, y) for x, y in zip(found, expected))


@pytest.mark.parametrize("gate", ["lower-weak", "softplus-init"])
@pytest.mark.parametrize("poisoned", [0, 1, 3], ids=lambda n: f"sequence-{n}")
def test_nan_stays_in_its_sequence(kernel_package, poisoned, gate):
    lengths = (37, 70, 0, 5, 64)
    inputs = inputs_for(gate, lengths=lengths, H=2)
    expected = run_op(kernel_package, inputs)
    begin = sum(lengths[:poisoned])
    tokens = slice(begin, begin + lengths[poisoned])
    for name in TOKEN_INPUTS:
        inputs[name][:, tokens] = NAN
    inputs["initial_state"][poisoned] = NAN
    o, final_state = run_op(kernel_package, inputs)
    others = torch.ones(o.shape[1], dtype=torch.bool, device=DEVICE)
    others[tokens] = False
    assert torch.equal(o[:, others], expected[0][:, others]) and o[:, tokens].isnan().all()
    for n in range(len(lengths)):
        assert final_state[n].isnan().all() if n == poisoned else torch.equal(final_state[n], expected[1][n])


@pytest.mark.parametrize("T", [1, 15, 17, 63, 65])
def test_rows_behind_the_end_are_never_used(kernel_package, T):
    """A tail that reads past its sequence would meet NaN (0 * NaN is NaN too)."""
    inputs = inputs_for("lower-weak", B=2, T=T, H=2)
    surrounded = {**inputs, **{name: padded(inputs[name], tokens=80) for name in TOKEN_INPUTS}}
    assert_accurate(kernel_package, inputs, run_op(kernel_package, surrounded))


def test_nan_in_one_head_stays_there(kernel_package):
    inputs = inputs_for("lower-weak", T=50, H=4)
    expected = run_op(kernel_package, inputs)
    inputs["v"][:, 10, 1] = NAN
    o, final_state = run_op(kernel_package, inputs)
    heads = [0, 2, 3]
    assert torch.equal(o[:, :, heads], expected[0][:, :, heads]) and o[:, 10:, 1].isnan().all()
    assert torch.equal(final_state[:, heads], expected[1][:, heads]) and final_state[:, 1].isnan().all()


def test_inputs_are_not_written(kernel_package):
    inputs = inputs_for("softplus-init", lengths=(40, 0, 30), H=2)
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    run_op(kernel_package, inputs)
    assert all(torch.equal(inputs[name], x) for name, x in before.items())


BAD_BOUNDS = {
    "starts-late": [1, 50, 100],
    "starts-negative": [-1, 50, 100],
    "decreases": [0, 60, 50, 100],
    "ends-early": [0, 50, 99],
    "ends-late": [0, 50, 101],
    "far-outside": [0, 2**30, 100],
    "far-negative": [0, -(2**30), 100],
    "all-zero": [0, 0, 0],
}


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("bounds", BAD_BOUNDS)
def test_bad_cu_seqlens_gives_nan_everywhere(kernel_package, bounds, index_dtype):
    """Checked on the device: results are all NaN, all around them is untouched, the next call is right."""
    values = BAD_BOUNDS[bounds]
    inputs = inputs_for("lower-weak", lengths=[100] + [0] * (len(values) - 2), H=2)
    good = inputs["cu_seqlens"]
    inputs["cu_seqlens"] = torch.tensor(values, dtype=index_dtype, device=DEVICE)
    assert_nan_and_nothing_else(kernel_package, inputs)
    inputs["cu_seqlens"] = good
    assert_accurate(kernel_package, inputs, run_op(kernel_package, inputs))


def test_bad_64_bit_cu_seqlens(kernel_package):
    """Bounds that are right in their lower 32 bits only."""
    inputs = inputs_for("lower-weak", lengths=(50, 50), H=2)
    inputs["cu_seqlens"] = inputs["cu_seqlens"] + torch.tensor([0, 2**32, 0], device=DEVICE)
    o, final_state = run_op(kernel_package, inputs)
    assert o.isnan().all() and final_state.isnan().all()


def random_bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=BF16, device=DEVICE)


@pytest.mark.parametrize("form", ["pack", "batch"])
def test_more_than_2_to_31_elements(kernel_package, form):
    """v, g, out (and q, k of the batch) hold over 2^31 elements; checked at both ends and around 2^31."""
    torch.cuda.empty_cache()
    T, sequences, HV = 4096, 260, 16
    H = HV if form == "batch" else 1
    total = T * sequences
    assert total * HV * 128 > 2**31
    shape = (sequences, T) if form == "batch" else (1, total)
    names = {"q": (H, 128), "k": (H, 128), "v": (HV, 128), "g": (HV, 128), "beta": (HV,)}
    inputs = inputs_for("lower-weak", T=1, H=H, HV=HV, initial_state=False)
    inputs.update({name: random_bf16(*shape, *tail) for name, tail in names.items()})
    inputs["cu_seqlens"] = None if form == "batch" else torch.arange(0, total + 1, T, device=DEVICE)
    out = torch.full_like(inputs["v"], NAN)
    final_state = torch.full((sequences, HV, 128, 128), NAN, device=DEVICE)
    call_op(kernel_package, inputs, out, final_state)
    for n in (0, 255, 256, sequences - 1):
        part = (slice(n, n + 1), slice(None)) if form == "batch" else (slice(None), slice(n * T, (n + 1) * T))
        alone = {**inputs, **{name: inputs[name][part] for name in names}, "cu_seqlens": None}
        expected = kernel_package.reference.chunk_kda(**to_float64(alone))
        assert rel_rms(expected[0], out[part]) <= TOLERANCE, f"o of sequence {n}"
        assert rel_rms(expected[1], final_state[n : n + 1]) <= TOLERANCE, f"final_state of sequence {n}"
    assert not out.isnan().any()
    del inputs, out, final_state
    torch.cuda.empty_cache()


def test_states_of_more_than_2_to_31_elements(kernel_package):
    """Zero-length sequences copy their state: N * HV * V * K passes 2^31."""
    torch.cuda.empty_cache()
    N, HV = 8200, 16
    assert N * HV * 128 * 128 > 2**31
    inputs = inputs_for("lower-weak", T=0, H=HV, initial_state=False)
    inputs["cu_seqlens"] = torch.zeros(N + 1, dtype=torch.int64, device=DEVICE)
    inputs["initial_state"] = random_bf16(N, HV, 128, 128)
    final_state = torch.full_like(inputs["initial_state"], NAN)
    call_op(kernel_package, inputs, torch.empty_like(inputs["v"]), final_state)
    assert torch.equal(final_state, inputs["initial_state"])
    del inputs, final_state
    torch.cuda.empty_cache()

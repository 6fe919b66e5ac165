"""The operators around the delta rule on a GPU: short convolution and gated RMS norm."""

from __future__ import annotations

import importlib
import random

import pytest
import torch
from harness import DEVICE, GUARD_TOKENS, SENTINEL, assert_guards
from layer_inputs import LENGTHS, Conv, conv_definition, make_conv, make_norm, norm_definition

BF16, FP32 = torch.bfloat16, torch.float32
NAN = float("nan")
CLOSE = {"rtol": 2**-8, "atol": 2e-6}  # one rounding to bfloat16; float32 inside


@pytest.fixture(scope="module")
def ops(kernel_package):
    return kernel_package.ops


@pytest.fixture(scope="module")
def layer_ops(kernel_package):
    return importlib.import_module(f"{kernel_package.__name__}.layer_ops")


def sequence_count(x: Conv) -> int:
    return len(x.q) if x.cu_seqlens is None else len(x.cu_seqlens) - 1


def run_conv(ops, x: Conv, columns: int | None = 4, in_place: bool = False):
    """(y of q|k|v, final state or None) of the bare operator, in poisoned results with guards around them."""
    B, T, C = len(x.q), x.q.shape[1], len(x.weight)
    buffer = torch.full((B, T + 2 * GUARD_TOKENS, C), SENTINEL, dtype=BF16, device=DEVICE)
    y = buffer[:, GUARD_TOKENS : GUARD_TOKENS + T]
    y.fill_(NAN)
    state = state_buffer = None
    if columns is not None:
        state_buffer = torch.full((sequence_count(x) + 2, C, columns), SENTINEL, dtype=BF16, device=DEVICE)
        state = state_buffer[1:-1]
        state.fill_(NAN)
    if in_place:
        state.copy_(x.initial_state)
        x = x._replace(initial_state=state)
    ops.kda_short_conv(*x, *y.split([part.shape[-1] for part in x[:3]], dim=-1), state)
    assert_guards(buffer, y, dim=1)
    if state is not None:
        assert_guards(state_buffer, state, dim=0)
    return y, state


def assert_conv(x: Conv, found, columns: int = 4) -> None:
    y, state = conv_definition(x, columns)
    torch.testing.assert_close(found[0].double(), y, **CLOSE)
    if found[1] is not None:
        assert torch.equal(found[1].double(), state)


# ------------------------------------------------------------------------------------- short convolution


@pytest.mark.kernels_ci
@pytest.mark.parametrize("weight_dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("W", [2, 3, 4])
def test_conv(ops, W, bias, weight_dtype):
    x = make_conv(B=3, T=37, W=W, bias=bias, weight_dtype=weight_dtype, device=DEVICE)
    assert_conv(x, run_conv(ops, x))


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 15, 16, 17, 18, 19, 20, 31, 32, 33, 64, 65])
def test_conv_lengths(ops, T):
    for columns in (None, 3, 4, 6):
        x = make_conv(B=2, T=T, columns=columns, device=DEVICE)
        for last in (1, 4, 7):
            assert_conv(x, run_conv(ops, x, last), last)


def test_conv_of_many_channels(ops):
    """More than a block of 2048 channels, with an edge inside a block; a layer of Kimi-Linear-48B has 12288."""
    for channels in ((4096, 4096, 4096), (1024, 1024, 2056), (8, 16, 24)):
        x = make_conv(B=1, T=40, channels=channels, device=DEVICE)
        assert_conv(x, run_conv(ops, x))


@pytest.mark.parametrize("cu_seqlens_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("columns", [None, 4])
@pytest.mark.parametrize("W", [2, 3, 4])
def test_conv_packed(ops, W, columns, cu_seqlens_dtype):
    x = make_conv(lengths=LENGTHS, W=W, columns=columns, cu_seqlens_dtype=cu_seqlens_dtype, device=DEVICE)
    assert_conv(x, run_conv(ops, x))


@pytest.mark.parametrize("seed", range(12))
def test_conv_of_random_packs(ops, seed):
    """Sequences that begin anywhere in a tile; in place, every one reads its own state before it is replaced."""
    choose = random.Random(seed)
    lengths = [choose.choice([0, 1, 1, 2, 3, 4, 7, 12, 13, 14, 15, 16, 17, 18, 30]) for _ in range(20)]
    x = make_conv(lengths=lengths, seed=seed, device=DEVICE)
    assert_conv(x, run_conv(ops, x))
    assert_conv(x, run_conv(ops, x, in_place=True))


def test_conv_of_more_sequences_than_threads(ops):
    choose = random.Random(0)
    lengths = [choose.choice([0, 0, 1, 2]) for _ in range(700)]
    x = make_conv(lengths=lengths, channels=(8, 8, 8), device=DEVICE)
    assert_conv(x, run_conv(ops, x, in_place=True))


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 16, 17, 100])
def test_conv_state_in_place(ops, T):
    x = make_conv(B=5, T=T, device=DEVICE)
    plain = run_conv(ops, x)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run_conv(ops, x, in_place=True), plain))


@pytest.mark.parametrize("lengths", [[0], [0, 0, 0], []], ids=str)
def test_conv_of_no_tokens(ops, lengths):
    x = make_conv(lengths=lengths, device=DEVICE)
    _, state = run_conv(ops, x)
    assert torch.equal(state, x.initial_state)


@pytest.mark.parametrize("offset", [0, 8, 1])
def test_conv_of_slices(ops, offset):
    """Rows of one joint tensor, also where they do not start at a multiple of 16 bytes; states with strides."""
    x = make_conv(B=2, T=20, joint=True, offset=offset, device=DEVICE)
    state = torch.full((4, 512, 2, 2), NAN, dtype=BF16, device=DEVICE).permute(2, 1, 0, 3)[..., 0]
    strided = x._replace(initial_state=x.initial_state.permute(2, 1, 0).contiguous().permute(2, 1, 0))
    results = [torch.full_like(part, NAN) for part in x[:3]]
    ops.kda_short_conv(*strided, *results, state)
    assert_conv(x, (torch.cat(results, dim=-1), state))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_conv_parameters_that_are_not_aligned(ops, name):
    x = make_conv(bias=True, device=DEVICE)
    parameter = getattr(x, name)
    shifted = torch.cat([parameter.new_zeros(1), parameter.flatten()])[1:].view(parameter.shape)
    assert_conv(x, run_conv(ops, x._replace(**{name: shifted})))


@pytest.mark.parametrize(
    "bounds",
    [[1, 20, 50], [0, 60, 50], [0, 20, 49], [0, 20, 51], [0, -5, 50], [0, 2**40, 50], [0, 0, 0]],
    ids=str,
)
def test_conv_of_bad_bounds(ops, bounds):
    """All of the results is NaN, and nothing else is written."""
    good = make_conv(lengths=[20, 30], device=DEVICE)
    x = good._replace(cu_seqlens=torch.tensor(bounds, device=DEVICE))
    for in_place in (False, True):
        y, state = run_conv(ops, x, in_place=in_place)
        assert y.isnan().all() and state.isnan().all()


def test_conv_keeps_nan_to_its_sequence(ops):
    x = make_conv(lengths=[10, 20, 30], device=DEVICE)
    x.q[0, 29] = NAN
    x.initial_state[0] = NAN
    y, state = run_conv(ops, x)
    assert y[0, :3].isnan().all() and not y[0, 3:29].isnan().any() and not y[0, 30:].isnan().any()
    assert not state[2].isnan().any()


def test_conv_of_large_tensors(ops):
    """Offsets past 2^31 elements, in the inputs and in the results."""
    T, stride = 90_000, 24_576
    wide = torch.empty(1, T, stride, dtype=BF16, device=DEVICE)
    wide[..., -512:] = torch.randn(1, T, 512, device=DEVICE)
    x = make_conv(T=20, device=DEVICE)
    x = x._replace(**dict(zip("qkv", wide[..., -512:].split((128, 128, 256), dim=-1))))
    results = wide[..., :512].split((128, 128, 256), dim=-1)
    ops.kda_short_conv(*x, *results, x.initial_state)
    tail = x._replace(q=x.q[:, -50:], k=x.k[:, -50:], v=x.v[:, -50:], initial_state=None)
    wanted, _ = conv_definition(tail, 4)
    torch.testing.assert_close(torch.cat(results, dim=-1)[:, -47:].double(), wanted[:, 3:], **CLOSE)
    assert torch.equal(x.initial_state, torch.cat(tail[:3], dim=-1)[:, -4:].mT)


def test_conv_in_a_graph(ops):
    """One captured step carries its state and serves every way to cut the tokens."""
    static = make_conv(lengths=[20, 20, 20], device=DEVICE)
    results, state = [torch.empty_like(part) for part in static[:3]], static.initial_state
    ops.kda_short_conv(*static, *results, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.kda_short_conv(*static, *results, state)
    for seed, lengths in enumerate([(1, 59, 0), (0, 0, 60), (16, 3, 41)]):
        fresh = make_conv(lengths=list(lengths), seed=seed, device=DEVICE)
        for target, source in zip(static, fresh):
            if target is not None:
                target.copy_(source)
        graph.replay()
        assert_conv(fresh, (torch.cat(results, dim=-1), state))


def test_conv_on_the_current_stream(ops):
    x = make_conv(B=2, T=300, device=DEVICE)
    wanted = run_conv(ops, x)
    late = x._replace(v=torch.zeros_like(x.v))
    delay, stream = torch.randn(4096, 4096, device=DEVICE), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.mm(delay, delay)
        late.v.copy_(x.v)
        found = run_conv(ops, late)
        late.v.zero_()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_operators_allocate_nothing(ops):
    x, norm = make_conv(B=2, T=300, device=DEVICE), make_norm(device=DEVICE)
    results, out = [torch.empty_like(part) for part in x[:3]], torch.empty_like(norm[0])
    torch.cuda.synchronize()
    calls = torch.cuda.memory_stats()["allocation.all.allocated"]
    ops.kda_short_conv(*x, *results, x.initial_state)
    ops.gated_rms_norm(*norm, out, 1e-5)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == calls


BAD_CONV = {
    "q-fp32": ("q", lambda t: t.float(), "q: expected dtype bfloat16, got float32"),
    "k-cpu": ("k", lambda t: t.cpu(), "k: expected a CUDA tensor"),
    "weight-cpu": ("weight", lambda t: t.cpu(), "weight: expected a CUDA tensor"),
    "weight-fp16": ("weight", lambda t: t.half(), "weight: expected dtype bfloat16 or float32, got float16"),
    "v-tokens": ("v", lambda t: t[:, 1:], r"v: expected shape \[B, T, C\]"),
    "state-cpu": ("initial_state", lambda t: t.cpu(), "initial_state: expected a CUDA tensor"),
    "state-fp32": ("initial_state", lambda t: t.float(), "initial_state: expected the dtype of q"),
    "bounds-cpu": ("cu_seqlens", lambda t: t.cpu(), "cu_seqlens: expected a CUDA tensor"),
    "bounds-int16": ("cu_seqlens", lambda t: t.short(), "cu_seqlens: expected dtype int32 or int64"),
}


@pytest.mark.parametrize("bad", BAD_CONV)
def test_bad_conv(ops, bad):
    name, change, message = BAD_CONV[bad]
    good = make_conv(lengths=[50], device=DEVICE)
    results = [torch.full_like(part, NAN) for part in good[:3]]
    with pytest.raises(RuntimeError, match=message):
        ops.kda_short_conv(*good._replace(**{name: change(getattr(good, name))}), *results, None)
    torch.cuda.synchronize()
    assert all(result.isnan().all() for result in results)


def test_conv_opcheck(ops):
    x = make_conv(lengths=[7, 0, 13], device=DEVICE)
    results = [torch.zeros_like(part) for part in x[:3]]
    torch.library.opcheck(ops.kda_short_conv, (*x, *results, torch.zeros_like(x.initial_state)))


def test_conv_elsewhere(layer_ops):
    """Float32 and float16 on the GPU run in PyTorch, as does what needs a gradient."""
    for dtype in (FP32, torch.float16):
        x = make_conv(lengths=[7, 0, 13], dtype=dtype, device=DEVICE)
        found = layer_ops.short_conv(*x[:6], None, x.cu_seqlens)
        wanted = conv_definition(x, 4)[0]
        limit = {"rtol": 2**-8, "atol": 2e-2 if dtype == torch.float16 else 5e-3}  # TF32 in cuDNN
        torch.testing.assert_close(torch.cat(found, dim=-1).double(), wanted, **limit)
    x = make_conv(device=DEVICE)
    x.q.requires_grad_()
    sum(part.float().sum() for part in layer_ops.short_conv(*x[:6])).backward()
    assert x.q.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------- gated RMS norm


@pytest.mark.kernels_ci
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 37, 3), (1, 64, 1), (1, 65, 1), (3, 1, 32)], ids=str)
@pytest.mark.parametrize("silu", [False, True], ids=["sigmoid", "silu"])
def test_norm(ops, silu, shape):
    x = make_norm(*shape, device=DEVICE)
    buffer = torch.full(
        (shape[0], shape[1] + 2 * GUARD_TOKENS, shape[2], 128), SENTINEL, dtype=BF16, device=DEVICE
    )
    out = buffer[:, GUARD_TOKENS : GUARD_TOKENS + shape[1]]
    for weight in (x[2], x[2].float()):
        out.fill_(NAN)
        ops.gated_rms_norm(x[0], x[1], weight, out, 1e-5, silu)
        torch.testing.assert_close(out.double(), norm_definition(*x, 1e-5, silu), **CLOSE)
        assert_guards(buffer, out, dim=1)


def test_norm_in_place(ops):
    x, gate, weight = make_norm(2, 300, 4, device=DEVICE)
    expected = torch.empty_like(x)
    ops.gated_rms_norm(x, gate, weight, expected, 1e-5)
    for place in (0, 1):
        tensors = [x.clone(), gate.clone()]
        ops.gated_rms_norm(*tensors, weight, tensors[place], 1e-5)
        assert torch.equal(tensors[place], expected)


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
def test_norm_of_strided_rows(ops, shift):
    x, gate, weight = make_norm(2, 5, 3, device=DEVICE)
    wide = torch.full((2, 5, 3, 304), NAN, dtype=BF16, device=DEVICE)
    views = wide[..., 8 + shift : 136 + shift], wide[..., 144 + shift : 272 + shift]
    for view, values in zip(views, (x, gate)):
        view.copy_(values)
    out = torch.full((5, 3, 2, 128), NAN, dtype=BF16, device=DEVICE).permute(2, 0, 1, 3)
    ops.gated_rms_norm(*views, weight, out, 1e-5)
    torch.testing.assert_close(out.double(), norm_definition(x, gate, weight, 1e-5, False), **CLOSE)


def test_norm_of_large_tensors(ops):
    """Offsets past 2^31 elements."""
    x = torch.empty(1, 530_000, 32, 128, dtype=BF16, device=DEVICE)
    x[:, -40:] = torch.randn(1, 40, 32, 128, device=DEVICE)
    tail = x[:, -40:].clone()
    _, _, weight = make_norm(device=DEVICE)
    gate = torch.randn(1, 1, 32, 128, device=DEVICE).to(BF16).expand(x.shape)
    ops.gated_rms_norm(x, gate, weight, x, 1e-5)
    wanted = norm_definition(tail, gate[:, -40:], weight, 1e-5, False)
    torch.testing.assert_close(x[:, -40:].double(), wanted, **CLOSE)


def test_norm_extremes(ops):
    """Zeros stay zeros; gates far out give 0 and x; a NaN stays in its row."""
    x, gate, weight = make_norm(1, 8, 1, device=DEVICE)
    x[0, 0], gate[0, 1], gate[0, 2], x[0, 3, 0, 5] = 0, -200, 200, NAN
    out = torch.full_like(x, 7)
    ops.gated_rms_norm(x, gate, weight, out, 1e-5)
    assert (out[0, :2] == 0).all() and out[0, 3].isnan().all() and not out[0, 4:].isnan().any()
    wanted = norm_definition(x, gate, weight, 1e-5, False)
    torch.testing.assert_close(out[0, 2].double(), wanted[0, 2], **CLOSE)


def test_norm_opcheck(ops):
    x = make_norm(device=DEVICE)
    torch.library.opcheck(ops.gated_rms_norm, (*x, torch.zeros_like(x[0]), 1e-5))
    with pytest.raises(RuntimeError, match="gate: expected a CUDA tensor"):
        ops.gated_rms_norm(x[0], x[1].cpu(), x[2], torch.zeros_like(x[0]), 1e-5)
    with pytest.raises(RuntimeError, match="x: expected dtype bfloat16, got float32"):
        ops.gated_rms_norm(x[0].float(), x[1], x[2], torch.zeros_like(x[0]), 1e-5)


def test_norm_elsewhere(layer_ops):
    x, gate, weight = (t[..., :64].float() for t in make_norm(device=DEVICE))
    found = layer_ops.gated_rms_norm(x, gate, weight, 1e-5)
    torch.testing.assert_close(
        found.double(), norm_definition(x, gate, weight, 1e-5, False), rtol=5e-6, atol=5e-6
    )

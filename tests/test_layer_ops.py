"""The operators around the delta rule on the CPU, and what replaces them where they do not serve."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from layer_inputs import LENGTHS, conv_definition, make_conv, make_norm, norm_definition

BF16, FP32 = torch.bfloat16, torch.float32
NAN = float("nan")
# Float32 arithmetic on sums of 4 products and of 128 squares; then one rounding to the result's dtype.
CLOSE = {FP32: {"rtol": 2e-6, "atol": 2e-6}, BF16: {"rtol": 2**-8, "atol": 2e-6}}


@pytest.fixture(scope="module")
def ops(cpu_package):
    return cpu_package.ops


@pytest.fixture(scope="module")
def layer_ops(cpu_package):
    return importlib.import_module(f"{cpu_package.__name__}.layer_ops")


def run_conv(op, x, columns: int | None = 4):
    """(y of q|k|v, final state or None) of the bare operator, in results full of NaN."""
    results = [torch.full_like(part, NAN, memory_format=torch.contiguous_format) for part in x[:3]]
    state = None
    if columns is not None:
        N = len(x.q) if x.cu_seqlens is None else len(x.cu_seqlens) - 1
        state = torch.full((N, len(x.weight), columns), NAN, dtype=x.q.dtype)
    op(*x, *results, state)
    return torch.cat(results, dim=-1), state


def assert_conv(x, found, columns: int = 4) -> None:
    y, state = conv_definition(x, columns)
    torch.testing.assert_close(found[0].double(), y, **CLOSE[x.q.dtype])
    assert torch.equal(found[1].double(), state)


# ------------------------------------------------------------------------------------- short convolution


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("columns", [None, 3, 4, 7])
@pytest.mark.parametrize("W", [2, 3, 4])
def test_conv(ops, W, columns, dtype):
    x = make_conv(B=2, T=20, W=W, columns=columns, bias=W == 3, dtype=dtype)
    assert_conv(x, run_conv(ops.kda_short_conv, x))


@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("columns", [1, 4, 6])
def test_conv_final_state(ops, T, columns):
    for initial in (None, 3, 6):
        x = make_conv(B=2, T=T, columns=initial, dtype=FP32)
        assert_conv(x, run_conv(ops.kda_short_conv, x, columns), columns)


@pytest.mark.parametrize("cu_seqlens_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("columns", [None, 4])
def test_conv_packed(ops, columns, cu_seqlens_dtype):
    x = make_conv(lengths=LENGTHS, columns=columns, cu_seqlens_dtype=cu_seqlens_dtype, dtype=FP32)
    assert_conv(x, run_conv(ops.kda_short_conv, x))


@pytest.mark.parametrize("lengths", [[0], [0, 0], []], ids=str)
def test_conv_of_no_tokens(ops, lengths):
    x = make_conv(lengths=lengths, dtype=FP32)
    y, state = run_conv(ops.kda_short_conv, x)
    assert y.shape == (1, 0, 512) and torch.equal(state, x.initial_state)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["batch", "pack"])
def test_conv_state_in_place(ops, lengths):
    for T in (1, 2, 3, 4, 30):
        x = make_conv(B=3, T=T, lengths=lengths)
        live = x.initial_state.clone()
        results = [torch.empty_like(part) for part in x[:3]]
        ops.kda_short_conv(*x._replace(initial_state=live), *results, live)
        assert_conv(x, (torch.cat(results, dim=-1), live))


@pytest.mark.parametrize("offset", [0, 8, 1])
def test_conv_of_slices(ops, offset):
    """Rows of one joint tensor, also where they do not start at a multiple of 16 bytes; a state with strides."""
    x = make_conv(B=2, T=20, joint=True, offset=offset)
    state = torch.full((4, 512, 2, 2), NAN, dtype=BF16).permute(2, 1, 0, 3)[..., 0]
    results = [torch.full_like(part, NAN) for part in x[:3]]
    strided = x._replace(initial_state=x.initial_state.permute(2, 1, 0).contiguous().permute(2, 1, 0))
    ops.kda_short_conv(*strided, *results, state)
    assert_conv(x, (torch.cat(results, dim=-1), state))


def test_conv_weights_of_another_dtype(ops):
    x = make_conv(weight_dtype=FP32, bias=True)
    assert_conv(x, run_conv(ops.kda_short_conv, x))
    x = make_conv(weight_dtype=BF16, bias=True, dtype=FP32)
    assert_conv(x, run_conv(ops.kda_short_conv, x))


def test_conv_extremes(ops):
    """SiLU of large inputs is the identity or 0; a NaN reaches three tokens further, in its own channel."""
    x = make_conv(T=12, columns=None, dtype=FP32, channels=(8, 8, 8))
    x.weight.fill_(1)
    x.q[0, 4, 0] = 1e4
    x.k[0, 4, 1] = -1e4
    x.v[0, 4, 2] = NAN
    y, _ = run_conv(ops.kda_short_conv, x)
    assert (y[0, 4:8, 0] > 9e3).all() and (y[0, 4:8, 9] == 0).all()
    expected = torch.zeros(12, 24, dtype=torch.bool)
    expected[4:8, 18] = True
    assert torch.equal(y[0].isnan(), expected)


def test_conv_threads_do_not_change_the_result(ops):
    x = make_conv(lengths=LENGTHS)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run_conv(ops.kda_short_conv, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


BAD_CONV = {
    "q-dim": ("q", lambda t: t[0], r"q: expected shape \[B, T, C\], got \[50, 128\]"),
    "q-dtype": ("q", lambda t: t.half(), "q: expected dtype bfloat16 or float32, got float16"),
    "k-dtype": ("k", lambda t: t.float(), "k: expected the dtype of q, bfloat16, got float32"),
    "k-tokens": ("k", lambda t: t[:, :-1], r"k: expected shape \[B, T, C\] = \[1, 50, 128\], got \[1, 49, 128\]"),
    "v-eights": ("v", lambda t: t[..., :250], "v: expected a number of channels divisible by 8, got 250"),
    "v-columns": ("v", lambda t: t.repeat(1, 1, 2)[..., ::2], r"v: expected a contiguous last dimension"),
    "weight": ("weight", lambda t: t[:-1], r"weight: expected shape \[C, W\] = \[512, 2 to 4\], got \[511, 4\]"),
    "taps": ("weight", lambda t: t.repeat(1, 2), r"weight: expected .* got \[512, 8\]"),
    "bias": ("bias", lambda t: t[:-1], r"bias: expected shape \[C\] = \[512\], got \[511\]"),
    "state": ("initial_state", lambda t: t[..., :2], r"initial_state: expected shape \[N, C, S\] = \[1, 512, at least 3\], got \[1, 512, 2\]"),
    "state-N": ("initial_state", lambda t: t.repeat(2, 1, 1), r"initial_state: expected .* got \[2, 512, 4\]"),
    "state-dtype": ("initial_state", lambda t: t.float(), "initial_state: expected the dtype of q, bfloat16, got float32"),
    "bounds-dtype": ("cu_seqlens", lambda t: t.float(), "cu_seqlens: expected dtype int32 or int64, got float32"),
    "bounds-start": ("cu_seqlens", lambda t: t + 1, "cu_seqlens: expected to start at 0, got 1"),
    "bounds-end": ("cu_seqlens", lambda t: t // 2, "cu_seqlens: expected to end at T = 50, got 25"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_CONV)
def test_bad_conv(ops, bad):
    """The message names the argument, and nothing has been written."""
    name, change, message = BAD_CONV[bad]
    good = make_conv(lengths=[50], bias=True)
    results = [torch.full_like(part, NAN) for part in good[:3]]
    state = torch.full((1, 512, 4), NAN, dtype=BF16)
    with pytest.raises(RuntimeError, match=message):
        ops.kda_short_conv(*good._replace(**{name: change(getattr(good, name))}), *results, state)
    assert all(result.isnan().all() for result in (*results, state))


def test_bad_conv_results(ops):
    x = make_conv(B=2)
    q, k, v = (torch.empty_like(part) for part in x[:3])
    for results, message in (
        (
            (q, k, v[:, :, :128], None),
            r"v_out: expected shape \[B, T, C\] = \[2, 50, 256\], got \[2, 50, 128\]",
        ),
        ((q.float(), k, v, None), "q_out: expected the dtype of q, bfloat16, got float32"),
        ((q, k[:1].expand(2, -1, -1), v, None), "k_out: expected an output without overlapping elements"),
        (
            (q, k, v, torch.empty(1, 512, 4, dtype=BF16)),
            r"final_state: expected shape \[N, C, S\] = \[2, 512",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.kda_short_conv(*x, *results)
    with pytest.raises(RuntimeError, match="cu_seqlens: expected packed sequences with B = 1, got B = 2"):
        ops.kda_short_conv(*x._replace(cu_seqlens=torch.tensor([0, 50])), q, k, v, None)


# ---------------------------------------------------------------------------------------- gated RMS norm


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("silu", [False, True], ids=["sigmoid", "silu"])
def test_norm(ops, silu, dtype):
    x = make_norm(dtype=dtype)
    out = torch.full_like(x[0], NAN)
    ops.gated_rms_norm(*x, out, 1e-5, silu)
    torch.testing.assert_close(out.double(), norm_definition(*x, 1e-5, silu), **CLOSE[dtype])


def test_norm_in_place(ops):
    x, gate, weight = make_norm()
    expected = torch.empty_like(x)
    ops.gated_rms_norm(x, gate, weight, expected, 1e-5)
    for out in (x, gate):
        tensors = {id(t): t.clone() for t in (x, gate)}
        target = tensors[id(out)]
        ops.gated_rms_norm(tensors[id(x)], tensors[id(gate)], weight, target, 1e-5)
        assert torch.equal(target, expected)


def test_norm_of_strided_rows(ops):
    x, gate, weight = make_norm(B=2, T=5, HV=3)
    wide = torch.full((2, 5, 3, 300), NAN, dtype=BF16)
    wide[..., 1:129], wide[..., 140:268] = x, gate
    out = torch.full((5, 3, 2, 128), NAN, dtype=BF16).permute(2, 0, 1, 3)
    ops.gated_rms_norm(wide[..., 1:129], wide[..., 140:268], weight.float(), out, 1e-5)
    torch.testing.assert_close(out.double(), norm_definition(x, gate, weight, 1e-5, False), **CLOSE[BF16])


def test_norm_of_zeros_and_of_nothing(ops):
    x, gate, weight = make_norm()
    out = torch.full_like(x, NAN)
    ops.gated_rms_norm(torch.zeros_like(x), gate, weight, out, 1e-5)
    assert (out == 0).all()
    empty = x[:, :0]
    ops.gated_rms_norm(empty, gate[:, :0], weight, torch.empty_like(empty), 1e-5)


BAD_NORM = {
    "x-dim": (0, lambda t: t[..., :64], r"x: expected shape \[B, T, HV, 128\], got \[2, 37, 3, 64\]"),
    "x-dtype": (0, lambda t: t.half(), "x: expected dtype bfloat16 or float32, got float16"),
    "gate-dtype": (1, lambda t: t.float(), "gate: expected the dtype of x, bfloat16, got float32"),
    "gate-shape": (
        1,
        lambda t: t[:1],
        r"gate: expected shape \[B, T, HV, 128\] = \[2, 37, 3, 128\], got \[1",
    ),
    "weight": (2, lambda t: t[:64], r"weight: expected shape \[128\] = \[128\], got \[64\]"),
    "out": (3, lambda t: t[:1].expand(2, -1, -1, -1), "out: expected an output without overlapping"),
    "eps": (4, lambda eps: -eps, "eps: expected a finite number, not negative, got -1e-05"),
}


@pytest.mark.parametrize("bad", BAD_NORM)
def test_bad_norm(ops, bad):
    place, change, message = BAD_NORM[bad]
    x = make_norm()
    out = torch.full_like(x[0], NAN)
    arguments = [*x, out, 1e-5]
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=message):
        ops.gated_rms_norm(*arguments)
    assert out.isnan().all()


# ------------------------------------------------------------------- the Python functions over the operators


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["batch", "pack"])
@pytest.mark.parametrize("columns", [None, 4])
@pytest.mark.parametrize("W", [4, 6])
def test_conv_without_the_operator(layer_ops, W, columns, lengths, monkeypatch):
    """Float64, six taps or channels that are no eights: PyTorch, with the same states."""
    monkeypatch.setattr(layer_ops, "kda_short_conv", None)
    for T in (1, 2, 20):
        options = dict(B=2, T=T, lengths=lengths, W=W, columns=columns, bias=True, dtype=torch.float64)
        x = make_conv(channels=(6, 10, 12), **options)
        N = 2 if lengths is None else len(lengths)
        state = torch.full((N, 28, 4), NAN, dtype=torch.float64)
        found = layer_ops.short_conv(*x[:6], state, x.cu_seqlens)
        assert all(part.is_contiguous() for part in found)
        y, wanted = conv_definition(x, 4)
        torch.testing.assert_close(torch.cat(found, dim=-1), y, rtol=0, atol=1e-6)  # weights are float32's
        assert torch.equal(state, wanted)


def test_conv_without_the_operator_in_place(layer_ops):
    x = make_conv(T=3, dtype=torch.float16)
    live = x.initial_state.clone()
    layer_ops.short_conv(*x[:5], live, live)
    assert torch.equal(live.double(), conv_definition(x, 4)[1])


def test_conv_goes_to_the_operator(layer_ops, monkeypatch):
    monkeypatch.setattr(layer_ops, "_short_conv_reference", None)
    x = make_conv(B=2, columns=None)
    found = layer_ops.short_conv(*(part.mT.contiguous().mT for part in x[:3]), x.weight)
    torch.testing.assert_close(torch.cat(found, dim=-1).double(), conv_definition(x, 4)[0], **CLOSE[BF16])


def test_gradients_of_the_conv(layer_ops):
    """Of the results and of the final state, into the inputs and the initial state."""

    def run(q, k, v, weight, bias, state):
        final_state = torch.zeros_like(state)
        return *layer_ops.short_conv(q, k, v, weight, bias, state, final_state), final_state

    x = make_conv(B=2, T=2, channels=(4, 4, 4), dtype=torch.float64, bias=True)
    assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in x[:6]])
    x = make_conv(T=6, channels=(8, 8, 8), dtype=FP32)  # what the operator would serve without them
    q = x.q.clone().requires_grad_()
    sum(part.sum() for part in layer_ops.short_conv(q, *x[1:6])).backward()
    assert q.grad.abs().sum() > 0


def test_norm_without_the_operator(layer_ops, monkeypatch):
    monkeypatch.setattr(layer_ops, "gated_rms_norm_op", None)
    x, gate, weight = make_norm(dtype=FP32)
    for arguments in (
        (x[..., :64], gate[..., :64], weight[:64]),
        (x.double(), gate.double(), weight.double()),
    ):
        for silu in (False, True):
            wanted = norm_definition(*arguments, 1e-5, silu)
            found = layer_ops.gated_rms_norm(*arguments, 1e-5, silu)
            assert found.dtype == arguments[0].dtype
            torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)
    target = torch.empty_like(x[..., :64])
    assert layer_ops.gated_rms_norm(x[..., :64], gate[..., :64], weight[:64], 1e-5, out=target) is target


def test_norm_goes_to_the_operator(layer_ops, monkeypatch):
    monkeypatch.setattr(layer_ops, "_gated_rms_norm_reference", None)
    x, gate, weight = make_norm()
    wanted = norm_definition(x, gate, weight, 1e-6, True)
    assert layer_ops.gated_rms_norm(x, gate, weight, 1e-6, True, out=x) is x
    torch.testing.assert_close(x.double(), wanted, **CLOSE[BF16])


def test_gradients_of_the_norm(layer_ops):
    x = [t[:1, :2].double() if t.dim() > 1 else t.double() for t in make_norm(dtype=FP32)]
    leaves = [t.requires_grad_() for t in x]
    weights = torch.randn(leaves[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((layer_ops.gated_rms_norm(*leaves, 1e-5) * weights).sum(), leaves)
    wanted = torch.autograd.grad((norm_definition(*leaves, 1e-5, False) * weights).sum(), leaves)
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_compiles_to_one_graph(layer_ops):
    def run(x, norm):
        state = torch.zeros_like(x.initial_state)
        y = layer_ops.short_conv(*x[:6], state, x.cu_seqlens)
        return *y, state, layer_ops.gated_rms_norm(*norm, 1e-5)

    x, norm = make_conv(lengths=[3, 0, 20]), make_norm()
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(x, norm)
    assert all(torch.equal(a, b) for a, b in zip(compiled, run(x, norm)))
    assert math.isfinite(compiled[0].float().sum())

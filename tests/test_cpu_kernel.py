"""The compiled CPU kernel against the float64 reference: every option, layout and length, bad input, speed."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kda_inputs import FLAGS, GATES, conv_layout, make_inputs, operator_flags, rel_rms, to_float64
from torch.multiprocessing.reductions import StorageWeakRef

ROOT = Path(__file__).resolve().parent.parent
BF16, FP32 = torch.bfloat16, torch.float32
NAN = float("nan")

# Relative RMS against float64. Float32 arithmetic in another order than the reference's leaves 1e-7 .. 2e-6, one
# rounding of the output to bfloat16 1.7e-3.
TOLERANCE = {FP32: 1e-5, BF16: 2e-3}


@pytest.fixture(scope="module")
def op(cpu_package):
    """The bare operator."""
    return cpu_package.ops.kda_prefill


def new_results(x: dict, state_dtype: torch.dtype = FP32) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`out` and `final_state` full of NaN, for the inputs of `make_inputs`."""
    if x["initial_state"] is not None:
        state_dtype = x["initial_state"].dtype
    N = len(x["q"]) if x["cu_seqlens"] is None else len(x["cu_seqlens"]) - 1
    final_state = torch.full((N, x["v"].shape[2], 128, 128), NAN, dtype=state_dtype)
    return torch.full_like(x["v"], NAN, memory_format=torch.contiguous_format), final_state


def call(op, x: dict, out: torch.Tensor, final_state: torch.Tensor | None, portable: bool = False) -> None:
    op(
        x["q"], x["k"], x["v"], x["g"], x["beta"], x["A_log"], x["dt_bias"], x["initial_state"],
        x["cu_seqlens"], out, final_state, 128**-0.5 if x["scale"] is None else x["scale"], x["lower_bound"],
        operator_flags(x, PORTABLE=portable),
    )  # fmt: skip


def run(op, x: dict, portable: bool = False, **options) -> tuple[torch.Tensor, torch.Tensor]:
    results = new_results(x, **options)
    call(op, x, *results, portable)
    return results


def assert_accurate(package, x: dict, found, tolerance: float | None = None) -> None:
    """Both results are within the tolerance of their dtype, in every sequence."""
    expected = package.reference.recurrent_kda(**to_float64(x))
    if x["cu_seqlens"] is None:
        tokens = [(b, slice(None)) for b in range(len(x["q"]))]
    else:
        tokens = [(0, slice(begin, end)) for begin, end in itertools.pairwise(x["cu_seqlens"].tolist())]
    for n, place in enumerate(tokens):
        for name, want, got in (
            ("o", expected[0][place], found[0][place]),
            ("final_state", expected[1][n], found[1][n]),
        ):
            error = rel_rms(want, got)
            assert error <= (tolerance or TOLERANCE[got.dtype]), f"{name} of sequence {n}: {error:.1e}"


# ---------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("portable", [False, True], ids=["fastest", "portable"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_gates(cpu_package, op, gate, dtype, portable):
    x = make_inputs(gate, 2, 200, 2, dtype=dtype, initial_state=True)
    assert_accurate(cpu_package, x, run(op, x, portable))


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000])
def test_lengths(cpu_package, op, T):
    x = make_inputs("softplus-init", 1, T, 2, dtype=FP32, initial_state=True)
    assert_accurate(cpu_package, x, run(op, x))


@pytest.mark.parametrize("initial_state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("cu_seqlens_dtype", [torch.int32, torch.int64], ids=str)
def test_packed_sequences(cpu_package, op, cu_seqlens_dtype, initial_state):
    lengths = [0, 5, 16, 0, 1, 130, 33, 0]
    x = make_inputs(
        "lower-weak", 1, sum(lengths), 3, dtype=FP32, initial_state=initial_state,
        cu_seqlens=[0, *itertools.accumulate(lengths)], cu_seqlens_dtype=cu_seqlens_dtype,
    )  # fmt: skip
    _, final_state = found = run(op, x)
    assert_accurate(cpu_package, x, found)
    for n in (n for n, length in enumerate(lengths) if length == 0):
        before = x["initial_state"][n] if initial_state else torch.zeros(3, 128, 128)
        assert torch.equal(final_state[n], before)


@pytest.mark.parametrize("heads", [(2, 4), (1, 3), (2, 2)], ids=str)
def test_value_heads(cpu_package, op, heads):
    x = make_inputs("lower-strong", 1, 50, *heads, dtype=FP32)
    assert_accurate(cpu_package, x, run(op, x))


@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("state_v_first", [False, True], ids=["k-first", "v-first"])
def test_states(cpu_package, op, state_v_first, state_dtype):
    x = make_inputs(
        "lower-weak", 2, 37, 2, dtype=FP32, initial_state=True, state_dtype=state_dtype,
        state_v_first=state_v_first,
    )  # fmt: skip
    assert_accurate(cpu_package, x, run(op, x))
    without = x | {"initial_state": None}
    assert_accurate(cpu_package, without, run(op, without, state_dtype=state_dtype))
    out = new_results(x)[0]
    call(op, x, out, None)
    assert torch.equal(out, run(op, x)[0])


def test_final_state_may_be_the_initial_state(cpu_package, op):
    x = make_inputs("lower-weak", 1, 37, 2, dtype=FP32, initial_state=True)
    expected = run(op, x)
    out, state = torch.empty_like(x["v"]), x["initial_state"]
    call(op, x, out, state)
    assert torch.equal(out, expected[0]) and torch.equal(state, expected[1])


@pytest.mark.parametrize("l2norm", [False, True], ids=["as-given", "l2norm"])
@pytest.mark.parametrize("beta", ["given", "sigmoid", "negative-eigenvalues"])
@pytest.mark.parametrize("preactivated", [False, True], ids=["raw-gate", "log-decay"])
def test_what_is_activated_inside(cpu_package, op, preactivated, beta, l2norm):
    x = make_inputs(
        "softplus-init", 1, 40, 2, dtype=FP32, preactivated=preactivated, l2norm=l2norm, scale=0.3,
        beta_sigmoid=beta != "given", allow_neg_eigval=beta == "negative-eigenvalues",
    )  # fmt: skip
    assert_accurate(cpu_package, x, run(op, x))


@pytest.mark.parametrize("missing", [["A_log"], ["dt_bias"], ["A_log", "dt_bias"]], ids="+".join)
def test_optional_gate_parameters(cpu_package, op, missing):
    x = make_inputs("lower-weak", 1, 40, 2, dtype=FP32) | dict.fromkeys(missing)
    assert_accurate(cpu_package, x, run(op, x))


@pytest.mark.parametrize("lower_bound", [-5.0, 0.0])
def test_lower_bounds(cpu_package, op, lower_bound):
    x = make_inputs("lower-strong", 1, 40, 2, dtype=FP32) | {"lower_bound": lower_bound}
    assert_accurate(cpu_package, x, run(op, x))


@pytest.mark.parametrize(
    "dtypes", list(itertools.product([FP32, BF16], repeat=5)), ids=lambda d: "".join(str(x)[6] for x in d)
)
def test_mixed_dtypes(cpu_package, op, dtypes):
    x = make_inputs("softplus-init", 1, 20, 1, dtype=FP32)
    x |= {name: x[name].to(dtype) for name, dtype in zip(("q", "k", "v", "g", "beta"), dtypes)}
    out, _ = found = run(op, x)
    assert out.dtype == x["v"].dtype
    assert_accurate(cpu_package, x, found)


def test_nearly_parallel_keys(cpu_package, op):
    """An ill-conditioned chunk: as accurate as float32 arithmetic of the definition, or within the tolerance."""
    x = make_inputs("zero", 1, 100, 1, dtype=FP32, keys="parallel", allow_neg_eigval=True)
    expected = cpu_package.reference.recurrent_kda(**to_float64(x))
    own = cpu_package.reference.recurrent_kda(**x)
    for want, plain, got in zip(expected, own, run(op, x)):
        assert rel_rms(want, got) <= max(TOLERANCE[FP32], 3 * rel_rms(want, plain))


def test_gates_beyond_what_makes_sense(cpu_package, op):
    """Log decays of minus infinity and -0.0, and logits at both ends: the limits, and no NaN."""
    x = make_inputs("zero", 1, 40, 1, dtype=FP32)
    x["g"][..., ::3], x["g"][..., 1::3] = -torch.inf, -0.0
    assert_accurate(cpu_package, x, run(op, x))
    for gate in ("softplus-init", "lower-strong"):
        x = make_inputs(gate, 1, 40, 1, dtype=FP32)
        x["g"][..., ::3], x["g"][..., 1::3] = 1e4, -1e4
        assert_accurate(cpu_package, x, run(op, x))


def test_bfloat16_rounds_to_nearest_even(op):
    """out = v + S q with S = 0 and one token: the float32 value of v times beta k q, all powers of two but v."""
    v = torch.cat([torch.randn(127, generator=torch.Generator().manual_seed(0)), torch.tensor([torch.inf])])
    x = make_inputs("zero", 1, 1, 1, l2norm=False, beta_sigmoid=False, scale=1.0)
    for name in ("q", "k"):
        x[name].zero_()
        x[name][..., 0] = 1.0
    x["beta"] = torch.tensor([1.0 + 2**-7]).bfloat16().view(1, 1, 1)  # v beta has up to 16 significant bits
    x["v"] = v.bfloat16().view(1, 1, 1, 128)
    expected = (x["v"].float() * x["beta"].float()).bfloat16()
    assert torch.equal(run(op, x)[0], expected)


# --------------------------------------------------------------------------------------- where tensors lie


def in_wider_rows(x: torch.Tensor) -> torch.Tensor:
    """The same values as a part of a larger tensor, every row misaligned to anything but its own dtype."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 9), NAN, dtype=x.dtype)
    return wide.narrow(-1, 3, x.shape[-1]).copy_(x)


def heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("layout", [in_wider_rows, heads_first], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_strides(op, layout, dtype):
    x = make_inputs("softplus-init", 2, 37, 2, 4, dtype=dtype)
    expected = run(op, x)
    strided = {name: layout(x[name]) for name in ("q", "k", "v", "g", "beta")}
    assert not any(y.is_contiguous() for y in strided.values())
    assert all(torch.equal(a, b) for a, b in zip(run(op, x | strided), expected))
    out = layout(torch.zeros_like(x["v"]))
    call(op, x, out, None)
    assert torch.equal(out, expected[0])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_nothing_outside_is_read_or_written(op, dtype):
    """Rows around the inputs are NaN, rows around the results keep what they held."""
    x = make_inputs("softplus-init", 1, 37, 2, dtype=dtype, initial_state=True)
    expected = run(op, x)

    def surrounded(t: torch.Tensor, dim: int, value: float) -> torch.Tensor:
        shape = [*t.shape]
        shape[dim] += 6
        return torch.full(shape, value, dtype=t.dtype).narrow(dim, 3, t.shape[dim])

    inside = {name: surrounded(x[name], 1, NAN).copy_(x[name]) for name in ("q", "k", "v", "g", "beta")}
    out, state = surrounded(x["v"], 1, 7.0), surrounded(x["initial_state"], 0, 7.0)
    call(op, x | inside, out, state)
    assert torch.equal(out, expected[0]) and torch.equal(state, expected[1])
    for inner, dim in ((out, 1), (state, 0)):
        whole = inner._base
        assert (whole.narrow(dim, 0, 3) == 7).all() and (whole.narrow(dim, -3, 3) == 7).all()


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
def test_nan_stays_where_the_recurrence_has_it(cpu_package, op, name):
    """A NaN in one token reaches what depends on it: later tokens of its sequence and head, no other."""
    x = make_inputs("lower-weak", 1, 90, 2, dtype=FP32, cu_seqlens=[0, 30, 60, 90])
    clean_o, clean_state = run(op, x)
    x[name] = x[name].clone()
    x[name][(0, 37, 1, 5)[: x[name].dim()]] = NAN
    o, state = run(op, x)
    expected_o, expected_state = cpu_package.reference.recurrent_kda(**x)
    assert torch.equal(o.isnan(), expected_o.isnan()) and o.isnan().any()
    assert torch.equal(state.isnan(), expected_state.isnan())
    assert torch.equal(o[~o.isnan()], clean_o[~o.isnan()])
    assert torch.equal(state[~state.isnan()], clean_state[~state.isnan()])


def test_no_tokens_and_no_sequences(op):
    x = make_inputs("lower-weak", 2, 0, 2, dtype=FP32, initial_state=True)
    assert torch.equal(run(op, x)[1], x["initial_state"])
    x = make_inputs("lower-weak", 0, 5, 2, dtype=FP32)
    assert run(op, x)[0].shape == (0, 5, 2, 128)
    x = make_inputs("lower-weak", 1, 0, 2, dtype=FP32, cu_seqlens=[0])
    assert run(op, x)[1].shape == (0, 2, 128, 128)


# ------------------------------------------------------------------------------------------- bad input


def good_call() -> dict:
    x = make_inputs("lower-weak", 1, 20, 2, dtype=FP32, initial_state=True, cu_seqlens=[0, 5, 20])
    x["out"], x["final_state"] = new_results(x)
    return x


BAD = {
    "q-3d": ("q", lambda x: x[0], r"q: expected shape \[B, T, H, 128\]"),
    "K": ("q", lambda x: x[..., :64], "q: expected K = 128, got K = 64"),
    "V": ("v", lambda x: x[..., :64], "v: expected V = 128, got V = 64"),
    "k-shape": ("k", lambda x: x[:, :19], r"k: expected shape \[B, T, H, K\] = \[1, 20, 2, 128\]"),
    "beta-shape": ("beta", lambda x: x[..., None], r"beta: expected shape \[B, T, HV\]"),
    "HV": ("v", lambda x: x[:, :, :1], "v: expected HV to be a positive multiple of H = 2, got HV = 1"),
    "q-dtype": ("q", torch.Tensor.double, "q: expected dtype bfloat16 or float32, got float64"),
    "g-dtype": ("g", torch.Tensor.half, "g: expected dtype bfloat16 or float32, got float16"),
    "out-dtype": ("out", torch.Tensor.bfloat16, "out: expected the dtype of v, float32, got bfloat16"),
    "A_log-dtype": ("A_log", torch.Tensor.double, "A_log: expected dtype float32, got float64"),
    "A_log-size": ("A_log", lambda x: x[:1], "A_log: expected HV = 2 elements"),
    "dt_bias-size": ("dt_bias", lambda x: x[:, :5].contiguous(), "dt_bias: expected HV \\* K = 256 elements"),
    "last-dim": ("v", conv_layout, r"v: expected a contiguous last dimension \(stride 1\)"),
    "out-overlap": ("out", lambda x: x[:, :1].expand(x.shape), "out: expected an output without overlap"),
    "state-shape": ("initial_state", lambda x: x[:1], r"initial_state: expected shape \[N, HV, K, V\] = \[2, 2"),
    "state-strides": ("final_state", lambda x: x.mT, "final_state: expected a contiguous tensor"),
    "state-dtypes": ("final_state", torch.Tensor.bfloat16, "final_state: expected the dtype of initial_state"),
    "scale": ("scale", lambda x: NAN, "scale: expected a finite number, got nan"),
    "lower_bound": ("lower_bound", lambda x: -5.5, r"lower_bound: expected a value in \[-5, 0\], got -5.5"),
    "cu_seqlens-dtype": ("cu_seqlens", torch.Tensor.float, "cu_seqlens: expected dtype int32 or int64, got f"),
    "cu_seqlens-2d": ("cu_seqlens", lambda x: x[None], r"cu_seqlens: expected shape \[N \+ 1\]"),
    "cu_seqlens-start": (
        "cu_seqlens", lambda x: torch.tensor([1, 5, 20]), "cu_seqlens: expected to start at 0, got 1",
    ),
    "cu_seqlens-decrease": (
        "cu_seqlens", lambda x: torch.tensor([0, 25, 20]),
        "cu_seqlens: expected no decrease, got 25 then 20 at entries 1 and 2",
    ),
    "cu_seqlens-end": (
        "cu_seqlens", lambda x: torch.tensor([0, 5, 19], dtype=torch.int32),
        "cu_seqlens: expected to end at T = 20, got 19",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(op, bad):
    """The message names the argument, and nothing has been written."""
    name, change, message = BAD[bad]
    x = good_call()
    results = x["out"], x["final_state"]
    x[name] = change(x[name])
    with pytest.raises(RuntimeError, match=message):
        call(op, x, x["out"], x["final_state"])
    assert all(y.isnan().all() for y in results)


@pytest.mark.parametrize(
    "flags", [-1, FLAGS["INPLACE"], 2 * FLAGS["PORTABLE"]], ids=["negative", "decode's", "unknown"]
)
def test_unknown_flags_are_refused(cpu_package, op, flags):
    x = good_call()
    tokens = [x[name] for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")]
    with pytest.raises(RuntimeError, match=rf"flags: expected a sum of .*, got {flags}$"):
        op(*tokens, x["cu_seqlens"], x["out"], x["final_state"], 0.1, None, flags)
    with pytest.raises(RuntimeError, match=r"flags: expected a sum of .*, got 64$"):
        cpu_package.ops.kda_decode(*tokens, FLAGS["PORTABLE"], None, x["out"])
    assert x["out"].isnan().all() and x["final_state"].isnan().all()


@pytest.mark.parametrize("fails", [False, True], ids=["good", "bad"])
def test_arguments_are_released(op, fails):
    """After a call, refused or not, nobody but the caller holds a tensor."""
    x = good_call()
    if fails:
        x["final_state"] = x["final_state"].bfloat16()  # what is looked at last
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        call(op, x, x["out"], x["final_state"])
    storages = [StorageWeakRef(y.untyped_storage()) for y in x.values() if isinstance(y, torch.Tensor)]
    assert len(storages) >= 10 and not any(storage.expired() for storage in storages)
    x.clear()
    assert all(storage.expired() for storage in storages)


def test_a_dimension_of_one_may_have_any_stride(op):
    x = make_inputs("softplus-init", 1, 20, 1, initial_state=True)
    expected = run(op, x)
    strides = (3, 5, 128, 1)
    x["initial_state"] = x["initial_state"].as_strided((1, 1, 128, 128), strides)
    x["cu_seqlens"] = torch.tensor([0, 20])
    assert all(torch.equal(a, b) for a, b in zip(run(op, x), expected))


def test_packed_sequences_need_one_row(op):
    x = make_inputs("lower-weak", 2, 20, 2, dtype=FP32) | {"cu_seqlens": torch.tensor([0, 20])}
    with pytest.raises(RuntimeError, match="cu_seqlens: expected packed sequences with B = 1, got B = 2"):
        call(op, x, torch.empty_like(x["v"]), None)


def test_softplus_gate_needs_a_rate(op):
    x = good_call() | {"lower_bound": None, "A_log": None}
    with pytest.raises(RuntimeError, match=r"A_log: expected a tensor \[HV\] for the softplus gate"):
        call(op, x, x["out"], x["final_state"])


# --------------------------------------------------------------------------------- through the public calls


def test_chunk_kda_runs_the_kernel(cpu_package, monkeypatch):
    """With the reference's chunk form out of reach CPU tensors are still served."""
    monkeypatch.delattr(cpu_package.reference, "chunk_kda")
    for options in (dict(dtype=FP32), dict(dtype=BF16), dict(cu_seqlens=[0, 7, 7, 40], initial_state=True)):
        x = make_inputs("softplus-resets", 1, 40, 2, 4, **options)
        assert_accurate(cpu_package, x, cpu_package.chunk_kda(**x))
    x = make_inputs("softplus-init", 1, 40, 2)
    x |= {name: conv_layout(x[name]) for name in ("q", "k", "v")}
    assert_accurate(cpu_package, x, cpu_package.chunk_kda(**x))


@pytest.mark.parametrize(
    "options", [dict(K=64, V=64), dict(dtype=torch.float16), dict(dtype=torch.float64), "gradient"], ids=str
)
def test_chunk_kda_leaves_the_rest_to_the_reference(cpu_package, options):
    x = make_inputs("softplus-init", 1, 20, 2, **(dict(dtype=FP32) if options == "gradient" else options))
    x["q"].requires_grad_(options == "gradient")
    expected = cpu_package.reference.chunk_kda(**x)
    assert all(torch.equal(a, b) for a, b in zip(cpu_package.chunk_kda(**x), expected))


def test_bad_input_of_chunk_kda_is_named(cpu_package):
    x = make_inputs("lower-weak", 1, 20, 2)
    for change, error, message in (
        (dict(k=None), TypeError, "k: expected a tensor, got NoneType"),
        (dict(g=x["g"].to("meta")), ValueError, "g: expected the device of q, cpu, got meta"),
        (dict(cu_seqlens=torch.tensor([0, 3])), RuntimeError, "cu_seqlens: expected to end at T = 20, got 3"),
    ):
        with pytest.raises(error, match=message):
            cpu_package.chunk_kda(**x | change)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_fwd(cpu_package, op, dtype):
    x = make_inputs("lower-strong", 1, 40, 2, dtype=dtype, initial_state=True, state_v_first=True)
    expected = run(op, x)
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound", "initial_state")
    out, final_state = new_results(x)
    cpu_package.fwd(**{name: x[name] for name in names}, scale=128**-0.5, out=out, final_state=final_state)
    assert torch.equal(out, expected[0]) and torch.equal(final_state, expected[1])


def test_fwd_refuses_other_devices(cpu_package):
    x = make_inputs("lower-strong", 1, 4, 1)
    q, k, v, g, beta = (x[name].to("meta") for name in ("q", "k", "v", "g", "beta"))
    with pytest.raises(ValueError, match="q: expected a CPU tensor, got one on meta"):
        cpu_package.fwd(q, k, v, g, beta, 1.0, v, None, None, -5.0)


def test_compiles_to_one_graph_and_runs(cpu_package):
    x = make_inputs("softplus-init", 1, 20, 2, cu_seqlens=[0, 5, 20], initial_state=True)
    expected = cpu_package.chunk_kda(**x)
    torch._dynamo.reset()
    compiled = torch.compile(cpu_package.chunk_kda, backend="aot_eager", fullgraph=True)(**x)
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected))


# ----------------------------------------------------------------------------- threads, builds and speed


@pytest.fixture
def threads():
    """Sets the number of torch's threads, for the test alone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("heads", [1, 3])
def test_threads_do_not_change_the_result(op, threads, heads):
    """One head is split over threads by columns of its state, several are dealt out whole."""
    x = make_inputs("lower-weak", 1, 500, heads, dtype=FP32, cu_seqlens=[0, 400, 400, 430, 500])
    results = []
    for count in (1, 2, 3, 4, 9):
        threads(count)
        results.append(run(op, x))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_builds_for_instruction_sets(cpu_variant_dir, capability):
    """ATEN_CPU_CAPABILITY picks the build; each is as accurate."""
    code = f"""
import sys
import torch
sys.path.insert(0, {str(ROOT / "tests")!r})
from kernels import get_local_kernel
from pathlib import Path
from kda_inputs import make_inputs, rel_rms, to_float64
package = get_local_kernel(Path({str(ROOT)!r}), backend="cpu")
for gate in ("softplus-init", "mixed-channels", "lower-strong"):
    x = make_inputs(gate, 1, 77, 2, dtype=torch.float32, initial_state=True)
    expected = package.reference.recurrent_kda(**to_float64(x))
    print(*(rel_rms(a, b) for a, b in zip(expected, package.chunk_kda(**x))))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = [[float(word) for word in line.split()] for line in result.stdout.splitlines()]
    assert len(lines) == 3
    assert max(error for line in lines for error in line) <= TOLERANCE[FP32]


def test_denormal_numbers_afterwards(op):
    """The kernel flushes denormal numbers to 0; once it is done torch's threads count with them as before."""
    run(op, make_inputs("lower-strong", 1, 200, 4, dtype=FP32))
    tiny = torch.full((1 << 16,), 1e-39)
    assert (tiny * 0.5 > 0).all()


def best_time(function, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def test_speed(cpu_package):
    """B = 1, T = 2048, H = 4 in float32: at least 20 times faster than the definition, token by token."""
    x = make_inputs("lower-weak", 1, 2048, 4, dtype=FP32)
    with torch.no_grad():
        kernel = best_time(lambda: cpu_package.chunk_kda(**x), 20)
        definition = best_time(lambda: cpu_package.reference.recurrent_kda(**x), 3)
    assert definition / kernel >= 20, f"{1e3 * definition:.1f} ms and {1e3 * kernel:.1f} ms"

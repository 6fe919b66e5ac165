"""`fused_recurrent_kda` as a call: its signature, bad input, what goes to the reference, torch.compile, and
how the kernel is called for CUDA tensors. tests/test_decode.py has the numbers."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from decode_inputs import decode_inputs, make_pool
from kda_inputs import conv_layout, operator_flags, rel_rms
from torch._subclasses.fake_tensor import FakeTensorMode

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
NAN = torch.nan

# flash-linear-attention 0.6.0's fused_recurrent_kda: its positional parameters with their defaults
FLA_DEFAULTS = {
    "A_log": None,
    "dt_bias": None,
    "scale": None,
    "initial_state": None,
    "output_final_state": False,
    "use_qk_l2norm_in_kernel": False,
    "use_gate_in_kernel": False,
    "use_beta_sigmoid_in_kernel": False,
    "allow_neg_eigval": False,
    "lower_bound": None,
    "state_v_first": False,
    "cu_seqlens": None,
}
OURS = {
    "inplace_final_state": False,
    "ssm_state_indices": None,
    "num_accepted_tokens": None,
    "out": None,
    "transpose_state_layout": None,
}


def test_signature(cpu_package):
    parameters = inspect.signature(cpu_package.fused_recurrent_kda).parameters
    positional = {p.name: p.default for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional) == ["q", "k", "v", "g", "beta", *FLA_DEFAULTS]
    assert {name: positional[name] for name in FLA_DEFAULTS} == FLA_DEFAULTS
    assert {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY} == OURS
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_positional_arguments_reach_the_reference(cpu_package):
    """All that stands before the keyword-only ones, in FLA's order; float64 goes to the reference."""
    x = decode_inputs("lower-strong", 2, 2, 1, dtype=FP64, initial_state=True, state_v_first=True, scale=0.3)
    want = cpu_package.reference.recurrent_kda(**x)
    got = cpu_package.fused_recurrent_kda(*(x[name] for name in ("q", "k", "v", "g", "beta", *FLA_DEFAULTS)))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_out(cpu_package):
    """`out` is written, and nothing around it; it is what is returned."""
    x = decode_inputs("softplus-init", 2, 3, 2, dtype=FP32)
    for run in (x, x | dict(v=x["v"].double(), initial_state=None)):
        want = cpu_package.fused_recurrent_kda(**run)[0]
        wide = torch.full((2, 9, 4, 137), 7.0, dtype=run["v"].dtype)
        out = wide[:, 3:6, 1:3, 5:133]
        assert cpu_package.fused_recurrent_kda(**run, out=out)[0] is out
        assert torch.equal(out, want)
        out.fill_(7.0)
        assert (wide == 7).all()


# --------------------------------------------------------------------------------------------- bad input


def good_call() -> dict:
    x = decode_inputs("lower-weak", 3, 2, 2, dtype=FP32)
    pool = make_pool(x, 8)
    return x | dict(
        initial_state=pool, inplace_final_state=True, ssm_state_indices=torch.arange(6).view(3, 2),
        num_accepted_tokens=torch.tensor([1, 2, 1]), out=torch.full_like(x["v"], NAN),
    )  # fmt: skip


def of(name, change):
    return lambda x: {name: change(x[name])}


BAD = {
    "q-3d": (of("q", lambda y: y[0]), "q"),
    "k-shape": (of("k", lambda y: y[:, :1]), "k"),
    "k-none": (lambda x: dict(k=None), "k"),
    "beta-headwise": (lambda x: dict(beta=x["v"]), "beta"),
    "g-shape": (of("g", lambda y: y[..., :64]), "g"),
    "HV": (lambda x: dict(v=x["v"][:, :, :1], out=None), "v"),
    "A_log-size": (of("A_log", lambda y: y[:1]), "A_log"),
    "dt_bias-size": (of("dt_bias", lambda y: y[:1]), "dt_bias"),
    "lower_bound": (lambda x: dict(lower_bound=-6.0), "lower_bound"),
    "neg-eigval": (
        lambda x: dict(allow_neg_eigval=True, use_beta_sigmoid_in_kernel=False),
        "allow_neg_eigval",
    ),
    "softplus-without-rate": (lambda x: dict(lower_bound=None, A_log=None), "A_log"),
    "out-shape": (of("out", lambda y: y[:, :1]), "out"),
    "out-dtype": (of("out", lambda y: y.bfloat16()), "out"),
    "pool-missing": (lambda x: dict(initial_state=None), "initial_state"),
    "pool-heads": (of("initial_state", lambda y: y[:, :1].contiguous()), "initial_state"),
    "pool-3d": (of("initial_state", lambda y: y[0]), "initial_state"),
    "pool-half": (of("initial_state", lambda y: y.half().int()), "initial_state"),
    "indices-dtype": (of("ssm_state_indices", lambda y: y.float()), "(ssm_)?state_indices"),
    "indices-int16": (of("ssm_state_indices", lambda y: y.short()), "(ssm_)?state_indices"),
    "indices-3d": (of("ssm_state_indices", lambda y: y[..., None]), "(ssm_)?state_indices"),
    "indices-rows": (of("ssm_state_indices", lambda y: y[:2]), "(ssm_)?state_indices"),
    "indices-no-columns": (of("ssm_state_indices", lambda y: y[:, :0]), "(ssm_)?state_indices"),
    "per-token-not-in-place": (lambda x: dict(inplace_final_state=False), "inplace(_final_state)?"),
    "counts-dtype": (of("num_accepted_tokens", lambda y: y.float()), "num_accepted_tokens"),
    "counts-rows": (of("num_accepted_tokens", lambda y: y[:2]), "num_accepted_tokens"),
    "counts-without-indices": (
        lambda x: dict(ssm_state_indices=None, initial_state=x["initial_state"][:3]),
        "num_accepted_tokens",
    ),
    "counts-with-one-slot": (of("ssm_state_indices", lambda y: y[:, 0]), "num_accepted_tokens"),
    "in-place-without-state": (
        lambda x: dict(initial_state=None, ssm_state_indices=None, num_accepted_tokens=None),
        "initial_state",
    ),
    "cu_seqlens-end": (
        lambda x: (
            {name: x[name][:1] for name in ("q", "k", "v", "g", "beta", "out")}
            | dict(cu_seqlens=torch.tensor([0, 1, 1, 1]))
        ),
        "cu_seqlens",
    ),
    "cu_seqlens-rows": (lambda x: dict(cu_seqlens=torch.tensor([0, 2, 4, 6])), "cu_seqlens"),
}


@pytest.mark.parametrize("through", ["kernel", "reference"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_input(cpu_package, monkeypatch, bad, through):
    """The message names the argument, and nothing has been written."""
    if through == "reference":
        monkeypatch.setattr(sys.modules[cpu_package.chunk_kda.__module__], "device_type", "cuda")
    change, name = BAD[bad]
    x = good_call()
    cpu_package.fused_recurrent_kda(**good_call())
    wrong = x | change(x)
    before = x["initial_state"].clone()
    with pytest.raises((TypeError, ValueError, RuntimeError), match=rf"(\A|, )({name}): expected "):
        cpu_package.fused_recurrent_kda(**wrong)
    assert x["out"].isnan().all() and torch.equal(x["initial_state"], before)


def test_states_of_the_wrong_strides_are_refused(cpu_package):
    """In place, where a copy would not be what the caller sees, and in a pool, which is too large to copy."""
    x = decode_inputs("lower-weak", 3, 2, 2, dtype=FP32)
    pool = make_pool(x, 8).mT
    for options in (dict(ssm_state_indices=torch.arange(3)), dict(inplace_final_state=True)):
        state = pool if "ssm_state_indices" in options else pool[:3]
        with pytest.raises(RuntimeError, match="initial_state: expected"):
            cpu_package.fused_recurrent_kda(**x | dict(initial_state=state), **options)


def test_overlapping_slots_are_refused(cpu_package):
    x = decode_inputs("lower-weak", 3, 2, 2, dtype=FP32)
    pool = make_pool(x, 1).expand(8, -1, -1, -1)
    with pytest.raises(RuntimeError, match="initial_state: expected"):
        cpu_package.fused_recurrent_kda(
            **x | dict(initial_state=pool), ssm_state_indices=torch.arange(3), inplace_final_state=True
        )


def test_unknown_keywords_are_refused(cpu_package):
    with pytest.raises(TypeError, match="head_first"):
        cpu_package.fused_recurrent_kda(**decode_inputs("lower-weak", 1, 1, 1), head_first=True)


def test_the_old_name_of_state_v_first(cpu_package):
    x = decode_inputs("lower-weak", 2, 1, 1, initial_state=True, state_v_first=True)
    want = cpu_package.fused_recurrent_kda(**x)
    x.pop("state_v_first")
    with pytest.warns(DeprecationWarning, match="state_v_first") as warned:
        got = cpu_package.fused_recurrent_kda(**x, transpose_state_layout=True)
    assert warned[0].filename == __file__
    assert all(torch.equal(a, b) for a, b in zip(want, got))
    with pytest.raises(ValueError, match="transpose_state_layout: expected state_v_first alone"):
        cpu_package.fused_recurrent_kda(**x, state_v_first=True, transpose_state_layout=True)


# --------------------------------------------------------------------------------- as a part of PyTorch


@pytest.mark.parametrize("options", [dict(K=64, V=32), dict(dtype=torch.float16), dict(dtype=FP64)], ids=str)
def test_the_rest_goes_to_the_reference(cpu_package, options):
    x = decode_inputs("softplus-init", 2, 3, 2, **(dict(initial_state=True) | options))
    want = cpu_package.reference.recurrent_kda(**x)
    assert all(torch.equal(a, b) for a, b in zip(cpu_package.fused_recurrent_kda(**x), want))


def test_gradients_come_from_the_reference(cpu_package):
    x = decode_inputs("softplus-init", 2, 2, 1, K=8, V=8, dtype=FP64, initial_state=True)
    names = ("q", "k", "v", "g", "beta", "initial_state")
    leaves = [x[name].requires_grad_() for name in names]
    want = torch.autograd.grad(
        sum(y.square().sum() for y in cpu_package.reference.recurrent_kda(**x)), leaves
    )
    pooled = x | dict(ssm_state_indices=torch.tensor([1, 0]))
    swapped = x | {"initial_state": x["initial_state"][[1, 0]]}
    want_swapped = torch.autograd.grad(
        sum(y.square().sum() for y in cpu_package.reference.recurrent_kda(**swapped)), leaves
    )
    for call, wanted in ((x, want), (pooled, want_swapped)):
        found = torch.autograd.grad(
            sum(y.square().sum() for y in cpu_package.fused_recurrent_kda(**call)), leaves
        )
        assert all(rel_rms(a, b) <= 1e-10 for a, b in zip(wanted, found))
    with pytest.raises(ValueError, match="inplace_final_state: expected False where a gradient is required"):
        cpu_package.fused_recurrent_kda(**x, inplace_final_state=True)


@pytest.mark.parametrize("written", [False, True], ids=["new", "out"])
@pytest.mark.parametrize("pooled", [False, True], ids=["states", "pool"])
def test_compiles_to_one_graph(cpu_package, pooled, written):
    x = decode_inputs("lower-weak", 3, 1, 2, initial_state=not pooled)

    def step(pool, indices, **x):
        if pooled:
            x |= dict(initial_state=pool, ssm_state_indices=indices, inplace_final_state=True)
        if written:
            x |= dict(out=torch.empty_like(x["v"]))
        o, state = cpu_package.fused_recurrent_kda(**x)
        return o + 1, state

    pool, indices = make_pool(x, 5), torch.tensor([4, -1, 2])
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        want_pool, pool = pool.clone(), pool.clone()
        want, got = step(want_pool, indices, **x), compiled(pool, indices, **x)
    assert all(torch.equal(a, b) for a, b in zip(want, got)) and torch.equal(want_pool, pool)


# ------------------------------------------------------------------------------- on a GPU that is not there


def recorder(operator, calls: list):
    """A function that notes an operator's arguments by name, with its defaults."""
    arguments = operator._schema.arguments

    def record(*args):
        defaults = {x.name: x.default_value for x in arguments[len(args) :]}
        results = operator(*args)
        calls.append({**dict(zip((x.name for x in arguments), args)), **defaults, "results": results})
        return results

    return record


@pytest.fixture
def fake_gpu(cpu_package, monkeypatch):
    """Inside, tensors are fake and may be "on" CUDA device 0, an SM90; the operators' calls are recorded."""
    decode = sys.modules[cpu_package.fused_recurrent_kda.__module__]
    api = sys.modules[cpu_package.chunk_kda.__module__]
    calls = []
    for name in ("kda_decode", "kda_decode_new"):
        monkeypatch.setattr(decode, name, recorder(getattr(decode, name), calls))
    monkeypatch.setattr(api, "device_type", "cuda")
    monkeypatch.setattr(api, "_sm_major", lambda device: 9)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield calls


def on_fake_gpu(x):
    return {
        name: torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device="cuda")
        if isinstance(y, torch.Tensor)
        else y
        for name, y in x.items()
    }


def test_kernel_call_in_place(cpu_package, fake_gpu):
    """What a serving engine hands over reaches the kernel untouched; only o is made."""
    x = decode_inputs("softplus-init", 3, 4, 2, 4, state_v_first=True)
    x |= dict(
        initial_state=make_pool(x, 20, dtype=BF16, gap=64),
        ssm_state_indices=torch.zeros(3, 4, dtype=torch.int32),
        num_accepted_tokens=torch.ones(3, dtype=torch.int32),
    )  # fmt: skip
    x = on_fake_gpu(x)
    o, state = cpu_package.fused_recurrent_kda(**x, inplace_final_state=True)
    (call,) = fake_gpu
    assert call["out"] is None and o is call["results"]
    assert o.shape == (3, 4, 4, 128) and o.dtype == BF16 and o.is_contiguous() and o.is_cuda
    assert state is x["initial_state"] and call["final_state"] is None
    assert call["state_indices"] is x["ssm_state_indices"]
    for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "num_accepted_tokens"):
        assert call[name] is x[name], f"{name} was copied"
    assert call["scale"] is None and call["lower_bound"] is None
    assert call["flags"] == operator_flags(x, INPLACE=True)


@pytest.mark.parametrize("pooled", [False, True], ids=["states", "pool"])
@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
def test_kernel_call_with_a_final_state(cpu_package, fake_gpu, state_dtype, pooled):
    x = decode_inputs("lower-weak", 0, 0, 2, lengths=[1, 0, 2], initial_state=True, state_dtype=state_dtype)
    if pooled:
        x |= dict(initial_state=make_pool(x, 20, dtype=state_dtype), ssm_state_indices=torch.arange(3))
    x = on_fake_gpu(x)
    o, final_state = cpu_package.fused_recurrent_kda(**x)
    (call,) = fake_gpu
    made = (call["results"], call["final_state"]) if pooled else call["results"]
    assert made == (o, final_state) and o.shape == x["v"].shape and o.dtype == BF16 and o.is_cuda
    assert final_state.shape == (3, 2, 128, 128) and final_state.is_cuda
    assert final_state.dtype == (state_dtype if pooled else FP32)
    assert call["flags"] == operator_flags(x)
    for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "cu_seqlens"):
        assert call[name] is x[name], f"{name} was copied"


def test_kernel_call_writes_into_out(cpu_package, fake_gpu):
    x = on_fake_gpu(decode_inputs("lower-weak", 2, 1, 1, initial_state=True, output_final_state=False))
    out = torch.empty_like(x["v"])
    assert cpu_package.fused_recurrent_kda(**x, out=out) == (out, None)
    o, state = cpu_package.fused_recurrent_kda(**x, out=out, inplace_final_state=True)
    assert o is out and state is x["initial_state"]
    for call in fake_gpu:
        assert call["out"] is out and call["final_state"] is None and call["results"] is None
    assert [call["flags"] for call in fake_gpu] == [operator_flags(x), operator_flags(x, INPLACE=True)]


@pytest.mark.parametrize("written", [False, True], ids=["new", "out"])
@pytest.mark.parametrize("inplace", [False, True], ids=["last-state", "in-place"])
def test_what_lies_otherwise_is_copied(cpu_package, inplace, written):
    """By the operator: q, k, v and g as the convolution leaves them, gate parameters in another dtype."""
    x = decode_inputs("softplus-init", 2, 3, 2, initial_state=True, output_final_state=False)
    x["dt_bias"] = x["dt_bias"].bfloat16().float()
    lies = {name: conv_layout(x[name]) for name in ("q", "k", "v", "g")}
    lies |= dict(A_log=x["A_log"].double(), dt_bias=x["dt_bias"].bfloat16().T.contiguous().T)
    results = []
    for inputs in (x, x | lies):
        out = torch.full_like(x["v"], float("nan")) if written else None
        inputs = inputs | dict(initial_state=x["initial_state"].clone(), inplace_final_state=inplace, out=out)
        with torch.inference_mode():
            o, state = cpu_package.fused_recurrent_kda(**inputs)
        assert o.is_contiguous() and (o is out if written else o.dtype == BF16)
        results.append((o, inputs["initial_state"]))
        assert state is (inputs["initial_state"] if inplace else None)
    assert all(torch.equal(y, z) for y, z in zip(*results))
    assert inplace != torch.equal(results[0][1], x["initial_state"])


@pytest.mark.parametrize("inplace", [False, True], ids=["final-state", "in-place"])
@pytest.mark.parametrize("written", [False, True], ids=["new", "out"])
def test_opcheck(cpu_package, inplace, written):
    """PyTorch's own check of the schema, its marks of mutation, and the fake implementation."""
    x = decode_inputs("lower-weak", 2, 2, 2, initial_state=True)
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
    out = torch.zeros_like(x["v"]) if written else None
    final_state = None if inplace else torch.zeros_like(x["initial_state"])
    torch.library.opcheck(
        cpu_package.ops.kda_decode,
        (*(x[name] for name in names), operator_flags(x, INPLACE=inplace), x["lower_bound"], out),
        dict(final_state=final_state),
    )


@pytest.mark.parametrize("written", [False, True], ids=["new", "out"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_the_operator_is_asked_first_in_place(cpu_package, monkeypatch, mode, written):
    """And what it refuses goes to the reference, with the state as it was."""
    api, decode = (sys.modules[f"{cpu_package.__name__}.{name}"] for name in ("api", "decode"))
    asked, reason = [], api.reference_reason

    def ask(*inputs):
        asked.append(inputs)
        return reason(*inputs)

    for module in (api, decode):
        monkeypatch.setattr(module, "reference_reason", ask)
    for dtype in (BF16, torch.float16):
        x = decode_inputs("softplus-init", 2, 3, 2, dtype=dtype, initial_state=True)
        want = cpu_package.reference.recurrent_kda(**x)
        out = torch.full_like(x["v"], float("nan")) if written else None
        with mode():
            o, state = cpu_package.fused_recurrent_kda(**x, out=out, inplace_final_state=True)
        assert state is x["initial_state"] and (out is None or o is out)
        assert rel_rms(o, want[0]) < 5e-3 and rel_rms(state, want[1]) < 1e-5
        assert len(asked) == (dtype != BF16)


def test_gate_parameters_act_only_with_the_gate(cpu_package, fake_gpu):
    x = on_fake_gpu(decode_inputs("zero", 1, 1, 2))
    cpu_package.fused_recurrent_kda(
        **x | dict(A_log=torch.ones(2, requires_grad=True), dt_bias=torch.ones(2, 128))
    )
    assert fake_gpu[0]["A_log"] is None and fake_gpu[0]["dt_bias"] is None

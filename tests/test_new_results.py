"""The operators that allocate their results, and the calls that ask them first: the CPU kernel's."""

from __future__ import annotations

import sys

import pytest
import torch
from kda_inputs import conv_layout, make_inputs, new_results_arguments
from torch.multiprocessing.reductions import StorageWeakRef

CALLS = ("chunk_kda", "fused_recurrent_kda")
OPERATORS = {"chunk_kda": "kda_prefill_new", "fused_recurrent_kda": "kda_decode_new"}


@pytest.fixture(params=CALLS)
def name(request) -> str:
    return request.param


@pytest.fixture
def call(cpu_package, name):
    return getattr(cpu_package, name)


@pytest.fixture
def operator(cpu_package, name):
    return getattr(cpu_package.ops, OPERATORS[name])


def apart(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, every second in memory."""
    return torch.stack([x, x], dim=-1)[..., 0]


LAYOUTS = {
    "dense": dict(),
    "convolution": dict.fromkeys("qkvg", conv_layout),
    "features": dict.fromkeys(("q", "k", "v", "g", "beta"), apart),
    "gate": dict(A_log=lambda x: x[:, None].expand(-1, 2)[:, 0].double(), dt_bias=torch.Tensor.bfloat16),
    "gate-strides": dict(A_log=apart, dt_bias=lambda x: x.T.contiguous().T),
    "state": dict(initial_state=lambda x: x.mT.contiguous().mT),
    "state-bf16": dict(initial_state=lambda x: apart(x.bfloat16())),
    "cu_seqlens": dict(cu_seqlens=lambda x: apart(x)),
    "no-state": dict(initial_state=lambda x: None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("state_v_first", [False, True], ids=["k-first", "v-first"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_results_are_those_of_the_operator_that_writes(call, operator, layout, state_v_first, scale):
    x = make_inputs(
        "softplus-init", 1, 9, 2, 4, cu_seqlens=[0, 4, 4, 9], initial_state=True, state_v_first=state_v_first
    )
    x["scale"], x["dt_bias"] = scale, x["dt_bias"].bfloat16().float()
    x["initial_state"] = x["initial_state"].bfloat16().float()
    want = call(**x, out=torch.empty_like(x["v"]))
    changed = x | {name: change(x[name]) for name, change in LAYOUTS[layout].items()}
    if changed["initial_state"] is None:
        zeros = torch.zeros_like(x["initial_state"])
        want = call(**x | dict(initial_state=zeros), out=torch.empty_like(x["v"]))
    with torch.inference_mode():
        for found in (operator(*new_results_arguments(changed)), call(**changed)):
            assert all(y.is_contiguous() and torch.equal(y, z) for y, z in zip(found, want))
            assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32


@pytest.mark.parametrize("B,T", [(0, 4), (2, 0)])
def test_without_sequences_or_tokens(call, B, T):
    x = make_inputs("lower-weak", B, T, 2, initial_state=True)
    with torch.inference_mode():
        o, state = call(**x)
    assert o.shape == (B, T, 2, 128) and o.is_contiguous() and o.stride() == torch.empty(o.shape).stride()
    assert torch.equal(state, x["initial_state"].float())


@pytest.mark.parametrize("cu_seqlens", [None, [0, 3, 3, 8]], ids=["batch", "pack"])
def test_opcheck(operator, cu_seqlens):
    """PyTorch's own check of the schema and the fake implementation."""
    x = make_inputs("softplus-init", 1, 8, 1, 2, cu_seqlens=cu_seqlens, initial_state=True)
    torch.library.opcheck(operator, new_results_arguments(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiles(call, mode):
    x = make_inputs("softplus-init", 2, 8, 1, 2, initial_state=True)

    def step(**x):
        o, state = call(**x)
        return o + 1, 2 * state

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with mode():
        assert all(torch.equal(y, z) for y, z in zip(compiled(**x), step(**x)))


@pytest.mark.parametrize(
    "options",
    [
        dict(dtype=torch.float16),
        dict(K=64),
        dict(V=64),
        dict(g_dtype=torch.float16),
        dict(beta_dtype=torch.float64),
        dict(initial_state=True, state_dtype=torch.float64),
        dict(initial_state=True, state_dtype=torch.float16),
    ],
    ids=str,
)
def test_what_the_operator_refuses_is_the_references(cpu_package, call, operator, options):
    """Without a derivative too, when `reference_reason` has not been asked before."""
    x = make_inputs("softplus-init", 1, 6, 1, **options)
    want = call(**x, out=torch.empty_like(x["v"]))
    with torch.inference_mode():
        with pytest.raises(RuntimeError):
            operator(*new_results_arguments(x))
        assert all(torch.equal(y, z) for y, z in zip(call(**x), want))


def test_the_operator_is_asked_first_where_there_is_no_derivative(cpu_package, call, monkeypatch):
    api = sys.modules[cpu_package.chunk_kda.__module__]
    asked = []
    monkeypatch.setattr(api, "reference_reason", lambda *inputs: asked.append(inputs))
    x = make_inputs("lower-weak", 1, 6, 1)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            call(**x)
    assert not asked
    call(**x | {"beta": x["beta"].requires_grad_()})
    assert not asked  # a derivative is reason enough


BAD = {
    "lower_bound": (lambda x: -6.0, r"lower_bound: expected a value in \[-5, 0\], got -6"),
    "A_log": (lambda x: x[:1], "A_log: expected HV = 2 elements"),
    "k": (lambda x: x[:, :5], "k: expected shape"),
    "v": (lambda x: x[0], "v: expected"),
    "cu_seqlens": (lambda x: torch.tensor([0, 7, 6]), "cu_seqlens: expected"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_bad_input_is_named(call, operator, bad, mode):
    x = make_inputs("lower-weak", 1, 6, 2, cu_seqlens=[0, 2, 6], initial_state=True)
    change, message = BAD[bad]
    x[bad] = change(x[bad])
    with mode():
        with pytest.raises((RuntimeError, ValueError), match=message):
            call(**x)
        with pytest.raises(RuntimeError, match=message):
            operator(*new_results_arguments(x))


@pytest.mark.parametrize("argument", ["k", "v", "g", "beta", "A_log", "dt_bias", "initial_state"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_a_tensor_without_memory_is_refused(call, name, mode, argument):
    """One on "meta" takes the dispatcher to the fake, which must not make results of it."""
    x = make_inputs("lower-weak", 1, 6, 2, initial_state=True)
    out = torch.zeros_like(x["v"])
    kinds = [dict(), dict(out=out)]
    if name == "fused_recurrent_kda":
        kinds += [options | dict(inplace_final_state=True) for options in kinds]
    for options in kinds:
        with mode(), pytest.raises((RuntimeError, ValueError), match=f"({argument}|out): expected"):
            call(**x | {argument: x[argument].to("meta")}, **options)
    assert not out.any()


@pytest.mark.parametrize("fails", [False, True], ids=["good", "bad"])
def test_nothing_is_kept(operator, fails):
    """After a call, refused or not, nobody but the caller holds a tensor, copies and results included."""
    x = make_inputs("lower-weak", 1, 6, 2, initial_state=True) | LAYOUTS["dense"]
    x["q"] = apart(x["q"])
    if fails:
        x["initial_state"] = x["initial_state"][:, :1]
        with pytest.raises(RuntimeError, match="initial_state: expected shape"):
            operator(*new_results_arguments(x))
    else:
        x["o"], x["final_state"] = operator(*new_results_arguments(x))
    storages = [StorageWeakRef(y.untyped_storage()) for y in x.values() if isinstance(y, torch.Tensor)]
    assert len(storages) == (8 if fails else 10) and not any(storage.expired() for storage in storages)
    x.clear()
    assert all(storage.expired() for storage in storages)

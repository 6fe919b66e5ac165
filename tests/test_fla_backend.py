"""hf_layer.fla without a GPU: which calls our backend takes, which it hands back and why, and what it logs.

Tensors are fake CUDA tensors and the kernel is a recorder, so nothing is computed.
tests/gpu/test_fla_dispatch.py has the numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import sys
from types import SimpleNamespace

import fla_contract
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hf_layer
from hf_layer import api, decode
from hf_layer.loading import KernelLoad

H, D = 2, 128
FLA_IS_THERE = all(importlib.util.find_spec(name) for name in ("fla", "triton", "einops"))
needs_fla = pytest.mark.skipif(not FLA_IS_THERE, reason="flash-linear-attention is not installed")


@pytest.fixture(params=["contract", pytest.param("fla", marks=needs_fla)])
def fla(request, monkeypatch):
    """Our backends in front of a `fla.ops.kda.chunk_kda` and a `fused_recurrent_kda_fwd` that return "fla",
    in FLA or its stand-in.

    Attributes: module (hf_layer.fla), chunk_kda, decode and another (dispatched; the latter is a function of
    the operation "kda" that is not ours), taken (arguments by name of the calls that reached the kernel),
    load (what load_kernel gives).
    """
    if request.param == "contract":
        for name, module in fla_contract.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    # Imported anew, and forgotten afterwards: other tests import it with FLA itself.
    monkeypatch.setitem(sys.modules, "hf_layer.fla", None)
    del sys.modules["hf_layer.fla"]
    monkeypatch.setattr(hf_layer, "fla", None, raising=False)
    monkeypatch.delenv("FLA_FLASH_KDA", raising=False)
    monkeypatch.delenv("FLA_DISABLE_BACKEND_DISPATCH", raising=False)
    kda = importlib.import_module("fla.ops.kda")
    backends = importlib.import_module("fla.backends")

    def chunk_kda(*args, **kwargs):
        return "fla"

    def fused_recurrent_kda_fwd(*args, **kwargs):
        return "fla"

    def chunk_kda_fwd_intra(*args, **kwargs):
        return "fla"

    monkeypatch.setattr(kda, "chunk_kda", backends.dispatch(chunk_kda))
    taken = []

    def recorder(function):
        def kernel(*args, **kwargs):
            taken.append(dict(inspect.signature(function).bind(*args, **kwargs).arguments))
            return "kernel"

        return kernel

    module = importlib.import_module("hf_layer.fla")
    context = SimpleNamespace(
        module=module,
        chunk_kda=kda.chunk_kda,
        decode=backends.dispatch("kda")(fused_recurrent_kda_fwd),
        another=backends.dispatch("kda")(chunk_kda_fwd_intra),
        taken=taken,
        load=KernelLoad(
            kernel_of(recorder(api.chunk_kda), recorder(decode.fused_recurrent_kda)), "a test", None
        ),
    )
    monkeypatch.setattr(module, "load_kernel", lambda: context.load)
    monkeypatch.setattr(api, "_sm_major", lambda device: 9)
    with FakeTensorMode():
        yield context
    module.unregister()


def kernel_of(chunk_kda, fused_recurrent_kda=None) -> SimpleNamespace:
    return SimpleNamespace(chunk_kda=chunk_kda, fused_recurrent_kda=fused_recurrent_kda)


def call(**changes) -> dict:
    """Arguments of a call that FLA's own backend would take too; `shape` and `grad` change how it is made."""
    B, T, heads, value_heads, K = changes.pop("shape", (1, 100, H, H, D))
    dtype, grad = changes.pop("dtype", torch.bfloat16), changes.pop("grad", False)
    device = changes.pop("device", "cuda")

    def tensor(*size, dtype=dtype):
        return torch.zeros(size, dtype=dtype, device=device, requires_grad=grad)

    arguments = dict(
        q=tensor(B, T, heads, K),
        k=tensor(B, T, heads, K),
        v=tensor(B, T, value_heads, K),
        g=tensor(B, T, value_heads, K),
        beta=tensor(B, T, value_heads),
        A_log=tensor(value_heads, dtype=torch.float32),
        dt_bias=tensor(value_heads * K, dtype=torch.float32),
        initial_state=tensor(B, value_heads, K, K, dtype=torch.float32),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        safe_gate=True,
        lower_bound=-5.0,
        state_v_first=True,
    )
    arguments.update((name, value() if callable(value) else value) for name, value in changes.items())
    return arguments


def zeros(*size, dtype=torch.float32):
    """Made when the call is made, inside the fake mode."""
    return lambda: torch.zeros(size, dtype=dtype, device="cuda")


TAKEN = {
    "as-fla-s-own-backend": {},
    "softplus": dict(lower_bound=None, safe_gate=False),
    "lower-bound-without-safe-gate": dict(safe_gate=False),
    "lower-bound-0": dict(lower_bound=0.0),
    "no-A_log": dict(A_log=None),
    "no-dt_bias": dict(dt_bias=None),
    "pre-activated": dict(use_gate_in_kernel=False, A_log=None, dt_bias=None, lower_bound=None),
    "pre-activated-fp32-g": dict(use_gate_in_kernel=False, g=zeros(1, 100, H, D)),
    "activated-beta": dict(use_beta_sigmoid_in_kernel=False),
    "fp32-beta": dict(beta=zeros(1, 100, H)),
    "no-l2norm": dict(use_qk_l2norm_in_kernel=False),
    "k-first": dict(state_v_first=False),
    "old-keyword": dict(state_v_first=False, transpose_state_layout=True),
    "grouped-heads": dict(shape=(2, 100, 2, 8, D)),
    "negative-eigenvalues": dict(allow_neg_eigval=True),
    "no-states": dict(initial_state=None, output_final_state=False),
    "pack": dict(cu_seqlens=zeros(2, dtype=torch.int64)),
    "pack-int32": dict(cu_seqlens=zeros(2, dtype=torch.int32)),
    "strided-A_log": dict(A_log=lambda: torch.empty_strided((H,), (2,), device="cuda")),
    "chunk-size-32": dict(chunk_size=32),
    "disable-recompute": dict(disable_recompute=True),
}


@pytest.mark.parametrize("changes", TAKEN.values(), ids=TAKEN)
def test_takes(fla, changes):
    fla.module.register()
    arguments = call(**changes)
    with torch.inference_mode():
        assert fla.chunk_kda(**arguments) == "kernel"
    assert len(fla.taken) == 1 and fla.taken[0].keys() == arguments.keys()
    for name, value in arguments.items():
        assert fla.taken[0][name] is value


HANDED_BACK = {
    "context-parallel": (dict(cp_context=object()), "cp_context: context parallelism is not supported"),
    "intermediate-states": (
        dict(return_intermediate_states=True, chunk_size=32),
        "chunk_size: 32 with return_intermediate_states, which are kept every 64",
    ),
    "use-graph": (dict(use_graph=True), "use_graph: padding behind the last sequence is not supported"),
    "unknown": (dict(later=1, another=2), "unknown arguments: another, later"),
    "lower-bound": (dict(lower_bound=-10.0), "lower_bound: -10.0 is outside [-5, 0]"),
    "head-dim": (dict(shape=(1, 100, H, H, 64)), "K and V are not both 128"),
    "value-dim": (dict(v=zeros(1, 100, H, 256, dtype=torch.bfloat16)), "K and V are not both 128"),
    "fp32": (dict(dtype=torch.float32), "q, k and v are not all bfloat16"),
    "fp16": (dict(dtype=torch.float16), "q, k and v are not all bfloat16"),
    "fp16-g": (dict(g=zeros(1, 100, H, D, dtype=torch.float16)), "g or beta is neither bfloat16 nor float32"),
    "cpu": (dict(device="cpu"), "q is not a tensor on a CUDA device"),
}


@pytest.mark.parametrize(("changes", "reason"), HANDED_BACK.values(), ids=HANDED_BACK)
def test_hands_back(fla, caplog, changes, reason):
    fla.module.register()
    with caplog.at_level(logging.INFO), torch.inference_mode():
        assert fla.chunk_kda(**call(**changes)) == "fla"
    assert not fla.taken
    ours = [record.getMessage() for record in caplog.records if record.name == "hf_layer.fla"]
    assert ours == [f"[FLA Backend] kda.chunk_kda rejected: {reason}"]
    theirs = [record.getMessage() for record in caplog.records if record.name == "fla.backends"]
    assert any(line.endswith(f"flashkda rejected: {reason}") for line in theirs)


def test_hands_back_training(fla):
    fla.module.register()
    arguments = call(grad=True)
    assert fla.chunk_kda(**arguments) == "fla"
    assert fla.chunk_kda(**call()) == "kernel"  # gradients are on, but none is asked for
    with torch.no_grad():
        assert fla.chunk_kda(**arguments) == "kernel"


@pytest.mark.parametrize("changes", [dict(k=None), dict(g=1.0), dict(lower_bound="-5")], ids=str)
def test_what_is_wrong_with_other_types_fla_says(fla, changes):
    fla.module.register()
    with torch.inference_mode():
        assert fla.chunk_kda(**call(**changes)) == "fla"
    assert not fla.taken


def test_a_gate_parameter_that_does_not_act_is_no_training(fla):
    fla.module.register()
    A_log = torch.zeros(H, device="cuda", requires_grad=True)
    assert fla.chunk_kda(**call(A_log=A_log)) == "fla"
    assert fla.chunk_kda(**call(A_log=A_log, use_gate_in_kernel=False)) == "kernel"


def test_hands_back_old_gpus(fla, monkeypatch):
    monkeypatch.setattr(api, "_sm_major", lambda device: 7)
    fla.module.register()
    with torch.inference_mode():
        assert fla.chunk_kda(**call()) == "fla"


def test_without_a_kernel_everything_goes_back(fla, caplog):
    fla.load = KernelLoad(None, None, "no CUDA device")
    assert fla.module.register() is fla.load
    with caplog.at_level(logging.INFO, logger="hf_layer.fla"), torch.inference_mode():
        assert fla.chunk_kda(**call()) == "fla"
    assert caplog.messages[0] == "[FLA Backend] kda.chunk_kda rejected: no kernel: no CUDA device"


def test_positional_arguments(fla):
    fla.module.register()
    x = call()
    with torch.inference_mode():
        assert (
            fla.chunk_kda(x["q"], x["k"], x["v"], x["g"], x["beta"], 0.5, x["initial_state"], True)
            == "kernel"
        )
    assert fla.taken[0]["scale"] == 0.5 and fla.taken[0]["initial_state"] is x["initial_state"]


def test_environment_variable_turns_it_off_at_any_time(fla, monkeypatch):
    fla.module.register()
    with torch.inference_mode():
        for value, answer in (("0", "fla"), ("1", "kernel")):
            monkeypatch.setenv("FLA_FLASH_KDA", value)
            assert fla.chunk_kda(**call()) == answer


def test_unregister_and_register_again(fla):
    fla.module.unregister()  # harmless before
    with torch.inference_mode():
        assert fla.chunk_kda(**call()) == "fla"
        for answer, change in (("kernel", fla.module.register), ("fla", fla.module.unregister)):
            change()
            assert fla.chunk_kda(**call()) == answer
        fla.module.register()
        assert fla.module.register() is fla.load
        assert fla.chunk_kda(**call()) == "kernel"
    assert len(fla.taken) == 2


def test_each_line_is_logged_once(fla, caplog):
    fla.module.register()
    with caplog.at_level(logging.INFO, logger="hf_layer.fla"), torch.inference_mode():
        for _ in range(2):
            fla.chunk_kda(**call())
            fla.chunk_kda(**call(use_graph=True))
            fla.chunk_kda(**call(lower_bound=-10.0))
    ours = [record.getMessage() for record in caplog.records if record.name == "hf_layer.fla"]
    assert ours == [
        "[FLA Backend] kda.chunk_kda -> flashkda",
        "[FLA Backend] kda.chunk_kda rejected: use_graph: padding behind the last sequence is not supported",
        "[FLA Backend] kda.chunk_kda rejected: lower_bound: -10.0 is outside [-5, 0]",
    ]


def test_a_warning_where_fla_asks_no_backend(fla, monkeypatch, caplog):
    monkeypatch.setenv("FLA_DISABLE_BACKEND_DISPATCH", "1")
    fla.module.register()
    assert [record.levelname for record in caplog.records if record.name == "hf_layer.fla"] == ["WARNING"]
    assert "FLA_DISABLE_BACKEND_DISPATCH" in caplog.text


def test_the_kernel_s_errors_are_not_swallowed(fla):
    def kernel(*args, **kwargs):
        raise RuntimeError("k: expected shape")

    fla.load = KernelLoad(kernel_of(kernel), "a test", None)
    fla.module.register()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="k: expected shape"):
        fla.chunk_kda(**call())


# ------------------------------------------------------------------------------------------------ decoding


def decode_call(**changes) -> dict:
    """Keyword arguments of FLA's inner function, as `fused_recurrent_kda` hands them on."""
    arguments = call(shape=changes.pop("shape", (3, 1, H, H, D)), dtype=changes.pop("dtype", torch.bfloat16))
    arguments.pop("safe_gate")
    arguments |= dict(scale=0.5, inplace_final_state=False, cu_seqlens=None)
    arguments.update((name, value() if callable(value) else value) for name, value in changes.items())
    return arguments


def slots(*size, dtype=torch.int32):
    return dict(
        initial_state=zeros(10, H, D, D),
        ssm_state_indices=zeros(*size, dtype=dtype),
        inplace_final_state=True,
    )


DECODE_TAKEN = {
    "as-the-layer-calls": {},
    "four-tokens": dict(shape=(3, 4, H, H, D)),
    "softplus": dict(lower_bound=None),
    "pre-activated": dict(use_gate_in_kernel=False, A_log=None, dt_bias=None, lower_bound=None),
    "no-A_log": dict(A_log=None),
    "k-first": dict(state_v_first=False),
    "bf16-states": dict(initial_state=zeros(3, H, D, D, dtype=torch.bfloat16)),
    "pack": dict(
        shape=(1, 4, H, H, D), initial_state=zeros(2, H, D, D), cu_seqlens=zeros(3, dtype=torch.int64)
    ),
    "grouped-heads": dict(shape=(3, 1, 2, 8, D)),
    "in-place": dict(inplace_final_state=True),
    "pool": slots(3),
    "pool-of-a-pack": slots(3) | dict(shape=(1, 3, H, H, D), cu_seqlens=zeros(4, dtype=torch.int32)),
    "drafts": slots(3, 4) | dict(shape=(3, 4, H, H, D), num_accepted_tokens=zeros(3, dtype=torch.int32)),
    "drafts-from-the-first": slots(3, 4) | dict(shape=(3, 4, H, H, D)),
    "out": dict(out=zeros(3, 1, H, D, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("changes", DECODE_TAKEN.values(), ids=DECODE_TAKEN)
def test_decoding_takes(fla, changes):
    fla.module.register()
    arguments = decode_call(**changes)
    with torch.inference_mode():
        assert fla.decode(**arguments) == "kernel"
    assert len(fla.taken) == 1
    for name, value in arguments.items():
        assert fla.taken[0][name] is value, name


DECODE_HANDED_BACK = {
    "unknown": (dict(later=1), "unknown arguments: later"),
    "lower-bound": (dict(lower_bound=-6.0), "lower_bound: -6.0 is outside [-5, 0]"),
    "headwise-beta": (
        dict(beta=zeros(3, 1, H, D)),
        "beta: one number for each channel of v is not supported",
    ),
    "softplus-without-A_log": (dict(lower_bound=None, A_log=None), "A_log: the softplus gate has none"),
    "negative-eigenvalues": (
        dict(allow_neg_eigval=True, use_beta_sigmoid_in_kernel=False),
        "allow_neg_eigval: means nothing without use_beta_sigmoid_in_kernel",
    ),
    "no-state": (
        dict(inplace_final_state=True, initial_state=None),
        "initial_state: in place, and there is none",
    ),
    "pool-and-several-tokens": (
        slots(3) | dict(shape=(3, 2, H, H, D)),
        "ssm_state_indices: one slot for a sequence, and not one token",
    ),
    "counts-without-slots": (
        slots(3) | dict(num_accepted_tokens=zeros(3, dtype=torch.int32)),
        "num_accepted_tokens: without slots [N, T]",
    ),
    "pool-not-in-place": (
        slots(3) | dict(inplace_final_state=False),
        "inplace_final_state: states of a pool are updated in place",
    ),
    "head-dim": (dict(shape=(3, 1, H, H, 64)), "K and V are not both 128"),
    "fp32": (dict(dtype=torch.float32), "q, k and v are not all bfloat16"),
}


@pytest.mark.parametrize(("changes", "reason"), DECODE_HANDED_BACK.values(), ids=DECODE_HANDED_BACK)
def test_decoding_hands_back(fla, caplog, changes, reason):
    fla.module.register()
    with caplog.at_level(logging.INFO, logger="hf_layer.fla"), torch.inference_mode():
        assert fla.decode(**decode_call(**changes)) == "fla"
    assert not fla.taken
    assert caplog.messages == [f"[FLA Backend] kda.fused_recurrent_kda_fwd rejected: {reason}"]


def test_decoding_in_fla_s_order_and_with_its_defaults(fla, caplog):
    fla.module.register()
    x = decode_call()
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "scale")
    with caplog.at_level(logging.INFO, logger="hf_layer.fla"), torch.inference_mode():
        assert fla.decode(*(x[name] for name in names)) == "kernel"
    assert all(fla.taken[0][name] is x[name] for name in names)
    assert fla.taken[0]["inplace_final_state"] is True
    assert caplog.messages == ["[FLA Backend] kda.fused_recurrent_kda_fwd -> flashkda"]


def test_other_functions_of_the_operation_stay_with_fla(fla):
    fla.module.register()
    assert fla.another(1, later=2) == "fla"


def test_decoding_is_switched_with_the_rest(fla, monkeypatch):
    assert fla.decode(**decode_call()) == "fla"
    fla.module.register()
    with torch.inference_mode():
        assert fla.decode(**decode_call()) == "kernel"
        monkeypatch.setenv("FLA_FLASH_KDA", "0")
        assert fla.decode(**decode_call()) == "fla"
        monkeypatch.delenv("FLA_FLASH_KDA")
        fla.module.unregister()
        assert fla.decode(**decode_call()) == "fla"


@needs_fla
def test_the_signature_of_fla_s_inner_function_is_what_we_think():
    from fla.ops.kda.fused_recurrent import fused_recurrent_kda, fused_recurrent_kda_fwd

    from hf_layer.fla import DecodeBackend

    theirs = inspect.signature(inspect.unwrap(fused_recurrent_kda_fwd)).parameters
    ours = inspect.signature(DecodeBackend.fused_recurrent_kda_fwd_verifier).parameters
    names = [name for name, parameter in theirs.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert list(ours)[1:-1] == names
    assert all(theirs[name].default == ours[name].default for name in names)
    handed_on = list(inspect.signature(DecodeBackend.fused_recurrent_kda_fwd).parameters)[1:-1]
    assert handed_on == names[: len(handed_on)]
    public = inspect.signature(inspect.unwrap(fused_recurrent_kda)).parameters
    kernel = inspect.signature(decode.fused_recurrent_kda).parameters
    names = [name for name, parameter in public.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert list(kernel)[: len(names)] == names
    assert all(public[name].default == kernel[name].default for name in names if name != "initial_state")


@needs_fla
def test_fla_s_signature_and_priority_are_what_we_think():
    """Arguments of FLA's function that the verifier does not know would make every call go back."""
    from fla.ops.kda import chunk_kda
    from fla.ops.kda.backends.flash_kda import FlashKDABackend

    from hf_layer.fla import Backend

    theirs = inspect.signature(inspect.unwrap(chunk_kda)).parameters
    ours = inspect.signature(Backend.chunk_kda_verifier).parameters
    kernel = inspect.signature(api.chunk_kda).parameters
    names = [name for name, parameter in theirs.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert list(ours)[1 : len(names) + 1] == names == list(kernel)[: len(names)]
    for name in names:
        assert theirs[name].default == ours[name].default == kernel[name].default, name
    assert Backend.priority < FlashKDABackend.priority
    assert Backend.env_var == FlashKDABackend.env_var

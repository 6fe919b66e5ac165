"""What the kernel refuses: the error names the argument, and nothing has been written."""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, inputs_for

BF16, FP32 = torch.bfloat16, torch.float32


def fwd_arguments(**shape) -> dict:
    """Arguments of a `fwd` call that works (a batch of two unless `shape` says otherwise)."""
    inputs = inputs_for("lower-weak", **{"H": 2, "state_v_first": True, **(shape or dict(B=2, T=20))})
    v = inputs["v"]
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound", "initial_state", "cu_seqlens")
    return {
        **{name: inputs[name] for name in names},
        "scale": 128**-0.5,
        "out": torch.zeros_like(v),
        "final_state": torch.zeros_like(inputs["initial_state"]),
    }


def every_other_feature(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def wrong_head_dim(x: torch.Tensor) -> torch.Tensor:
    return x[..., :64].contiguous()


def one_more(dim: int):
    return lambda x: torch.cat([x, x.narrow(dim, 0, 1)], dim=dim)


def to(dtype_or_device):
    return lambda x: x.to(dtype_or_device)


# argument, what is done to it
BAD = {
    "K-64": ("q", wrong_head_dim),
    "V-64": ("v", wrong_head_dim),
    "k-shape": ("k", wrong_head_dim),
    "g-shape": ("g", wrong_head_dim),
    "q-3d": ("q", lambda x: x[0]),
    "v-3d": ("v", lambda x: x[0]),
    "beta-4d": ("beta", lambda x: x[..., None]),
    "k-more-tokens": ("k", one_more(1)),
    "v-more-tokens": ("v", one_more(1)),
    "g-more-heads": ("g", one_more(2)),
    "beta-more-heads": ("beta", one_more(2)),
    "v-heads-not-a-multiple": ("v", one_more(2)),
    "out-more-tokens": ("out", one_more(1)),
    "out-fewer-heads": ("out", lambda x: x[:, :, :1]),
    "A_log-more-heads": ("A_log", one_more(0)),
    "dt_bias-more-heads": ("dt_bias", one_more(0)),
    "initial_state-more": ("initial_state", one_more(0)),
    "initial_state-3d": ("initial_state", lambda x: x[0]),
    "final_state-more": ("final_state", one_more(0)),
    "q-fp32": ("q", to(FP32)),
    "k-fp16": ("k", to(torch.float16)),
    "v-fp32": ("v", to(FP32)),
    "g-fp16": ("g", to(torch.float16)),
    "beta-fp64": ("beta", to(torch.float64)),
    "out-fp32": ("out", to(FP32)),
    "A_log-bf16": ("A_log", to(BF16)),
    "dt_bias-bf16": ("dt_bias", to(BF16)),
    "initial_state-fp16": ("initial_state", to(torch.float16)),
    "final_state-fp16": ("final_state", to(torch.float16)),
    "states-of-two-dtypes": ("final_state", to(BF16)),
    "states-of-two-dtypes-the-other-way": ("initial_state", to(BF16)),
    "q-cpu": ("q", to("cpu")),
    "k-cpu": ("k", to("cpu")),
    "g-cpu": ("g", to("cpu")),
    "beta-cpu": ("beta", to("cpu")),
    "A_log-cpu": ("A_log", to("cpu")),
    "initial_state-cpu": ("initial_state", to("cpu")),
    "q-strided-features": ("q", every_other_feature),
    "k-strided-features": ("k", every_other_feature),
    "v-strided-features": ("v", every_other_feature),
    "g-strided-features": ("g", every_other_feature),
    "out-strided-features": ("out", every_other_feature),
    "initial_state-transposed": ("initial_state", lambda x: x.mT),
    "final_state-transposed": ("final_state", lambda x: x.mT),
    "A_log-none-with-softplus": ("A_log", lambda x: None),
    "lower_bound-below": ("lower_bound", lambda x: -5.01),
    "lower_bound-positive": ("lower_bound", lambda x: 0.5),
    "lower_bound-nan": ("lower_bound", lambda x: float("nan")),
    "scale-infinite": ("scale", lambda x: float("inf")),
    "out-overlaps-itself": ("out", lambda x: x[:, :1].expand_as(x)),
    "v-none": ("v", lambda x: None),
    "out-none": ("out", lambda x: None),
    "scale-a-word": ("scale", lambda x: "big"),
}


@pytest.mark.parametrize("case", BAD)
def test_fwd_refuses(kernel_package, case):
    argument, spoil = BAD[case]
    arguments = fwd_arguments()
    results = {name: arguments[name] for name in ("out", "final_state")}
    if case == "A_log-none-with-softplus":
        arguments["lower_bound"] = None
    arguments[argument] = spoil(arguments[argument])
    # Two arguments that contradict each other: the message may name either one.
    named = {
        "V-64": "v|out|g",
        "q-3d": "q",
        "v-more-tokens": "v|out",
        "states-of-two-dtypes-the-other-way": "initial_state|final_state",
    }.get(case, argument)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=rf"\b({named})\b"):
        kernel_package.fwd(**arguments)
    torch.cuda.synchronize()
    for name, x in results.items():
        assert not x.any(), f"{name} was written"


BAD_PACK = {
    "B-2": dict(cu_seqlens=lambda x: torch.tensor([0, 20], device=DEVICE)),
    "fp32": dict(cu_seqlens=lambda x: x.float()),
    "int16": dict(cu_seqlens=lambda x: x.to(torch.int16)),
    "cpu": dict(cu_seqlens=lambda x: x.cpu()),
    "2d": dict(cu_seqlens=lambda x: x[None]),
    "empty": dict(cu_seqlens=lambda x: x[:0]),
    "strided": dict(cu_seqlens=lambda x: x.repeat_interleave(2)[::2]),
}


@pytest.mark.parametrize("case", BAD_PACK)
def test_fwd_refuses_cu_seqlens(kernel_package, case):
    shape = dict(B=2, T=20) if case == "B-2" else dict(lengths=(9, 11))
    arguments = fwd_arguments(**shape)
    for name, spoil in BAD_PACK[case].items():
        arguments[name] = spoil(arguments[name])
    with pytest.raises((RuntimeError, ValueError, TypeError), match="cu_seqlens"):
        kernel_package.fwd(**arguments)
    torch.cuda.synchronize()
    assert not arguments["out"].any() and not arguments["final_state"].any()


def test_fwd_refuses_a_gradient(kernel_package):
    arguments = fwd_arguments()
    arguments["q"].requires_grad_()
    with pytest.raises(ValueError, match="requires no gradient"):
        kernel_package.fwd(**arguments)
    with torch.no_grad():
        kernel_package.fwd(**arguments)
    assert arguments["out"].any()


def test_the_unspoilt_call_works(kernel_package):
    for shape in (dict(B=2, T=20), dict(lengths=(9, 11))):
        arguments = fwd_arguments(**shape)
        kernel_package.fwd(**arguments)
        assert arguments["out"].any() and arguments["final_state"].any()


@pytest.mark.parametrize("change", [{"mask": None}, {"state_vfirst": True}, {"head_first": False}], ids=str)
def test_chunk_kda_refuses_unknown_keywords(kernel_package, change):
    inputs = inputs_for("lower-weak", T=20)
    with pytest.raises(TypeError, match=next(iter(change))):
        kernel_package.chunk_kda(**inputs, **change)


@pytest.mark.parametrize(
    "name, value",
    [("out", "wrong-shape"), ("out", "wrong-dtype"), ("chunk_size", 48), ("lower_bound", -6.0)],
    ids=["out-shape", "out-dtype", "chunk_size", "lower_bound"],
)
def test_chunk_kda_names_the_argument(kernel_package, name, value):
    inputs = inputs_for("lower-weak", T=20)
    if value == "wrong-shape":
        value = inputs["v"][:, :-1].clone()
    elif value == "wrong-dtype":
        value = inputs["v"].float()
    with pytest.raises((RuntimeError, ValueError, TypeError), match=name):
        kernel_package.chunk_kda(**{**inputs, name: value})

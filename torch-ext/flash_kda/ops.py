"""The compiled operators, and their fakes for torch.compile and FakeTensor."""

from __future__ import annotations

import torch

from ._ops import add_op_namespace_prefix, ops
from .flags import FWD_FLAGS

# The overloads themselves: no overload resolution on the host path.
kda_prefill = ops.kda_prefill.default
kda_decode = ops.kda_decode.default
kda_prefill_new = ops.kda_prefill_new.default
kda_decode_new = ops.kda_decode_new.default
kda_short_conv = ops.kda_short_conv.default
gated_rms_norm = ops.gated_rms_norm.default

# The devices that they were compiled for, "cuda" or "cpu": a variant of this package has one of the two.
device_type = (
    "cpu"
    if torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix("kda_prefill"), "CPU")
    else "cuda"
)


def _check_devices(q: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raises RuntimeError where a tensor is not on q's device. If its own is "meta", a fake is what torch calls,
    whatever the rest of the tensors are."""
    for name, x in others.items():
        if x is not None and x.device != q.device:
            raise RuntimeError(f"{name}: expected the device of q, {q.device}, got {x.device}")


@torch.library.register_fake(add_op_namespace_prefix("kda_prefill"))
def _kda_prefill_fake(
    q,
    k,
    v,
    g,
    beta,
    A_log,
    dt_bias,
    initial_state,
    cu_seqlens,
    out,
    final_state,
    scale,
    lower_bound,
    flags=FWD_FLAGS,
    intermediate_states=None,
) -> None:
    """The operator writes into out, final_state and intermediate_states and returns nothing."""
    _check_devices(
        q, k=k, v=v, g=g, beta=beta, A_log=A_log, dt_bias=dt_bias, initial_state=initial_state,
        cu_seqlens=cu_seqlens, out=out, final_state=final_state, intermediate_states=intermediate_states,
    )  # fmt: skip


@torch.library.register_fake(add_op_namespace_prefix("kda_short_conv"))
def _kda_short_conv_fake(
    q, k, v, weight, bias, initial_state, cu_seqlens, q_out, k_out, v_out, final_state
) -> None:
    """The operator writes into q_out, k_out, v_out and final_state and returns nothing."""


@torch.library.register_fake(add_op_namespace_prefix("gated_rms_norm"))
def _gated_rms_norm_fake(x, gate, weight, out, eps, silu=False) -> None:
    """The operator writes into out and returns nothing."""


@torch.library.register_fake(add_op_namespace_prefix("kda_decode"))
def _kda_decode_fake(
    q,
    k,
    v,
    g,
    beta,
    A_log,
    dt_bias,
    initial_state,
    flags,
    lower_bound=None,
    out=None,
    state_indices=None,
    scale=None,
    num_accepted_tokens=None,
    cu_seqlens=None,
    final_state=None,
) -> torch.Tensor | None:
    """o, or None where it is written into out; the operator also writes into initial_state and final_state."""
    _check_devices(
        q, k=k, v=v, g=g, beta=beta, A_log=A_log, dt_bias=dt_bias, initial_state=initial_state, out=out,
        state_indices=state_indices, num_accepted_tokens=num_accepted_tokens, cu_seqlens=cu_seqlens,
        final_state=final_state,
    )  # fmt: skip
    return v.new_empty(v.shape) if out is None else None


@torch.library.register_fake(add_op_namespace_prefix("kda_prefill_new"))
@torch.library.register_fake(add_op_namespace_prefix("kda_decode_new"))
def _new_fake(
    q,
    k,
    v,
    g,
    beta,
    A_log,
    dt_bias,
    initial_state,
    flags,
    lower_bound=None,
    scale=None,
    cu_seqlens=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o and the final state."""
    _check_devices(
        q, k=k, v=v, g=g, beta=beta, A_log=A_log, dt_bias=dt_bias, initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(v.shape), v.new_empty((N, v.shape[2], 128, 128), dtype=torch.float32)


# A variant for GPUs has the layer's whole decode step as one kernel.
kda_fused_decode = None if device_type == "cpu" else ops.kda_fused_decode.default


def _kda_fused_decode_fake(
    q,
    k,
    v,
    g,
    beta,
    gate,
    A_log,
    dt_bias,
    conv_state,
    recurrent_state,
    conv_weight,
    conv_bias,
    norm_weight,
    out,
    scale,
    norm_eps,
    lower_bound,
    flags,
    state_indices=None,
    num_accepted_tokens=None,
    cu_seqlens=None,
) -> None:
    """The operator writes into conv_state, recurrent_state and out and returns nothing."""


if kda_fused_decode is not None:
    torch.library.register_fake(add_op_namespace_prefix("kda_fused_decode"))(_kda_fused_decode_fake)

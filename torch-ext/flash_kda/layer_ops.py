"""What stands around the delta rule in a KDA layer: the short convolution and the gated RMS norm.

Each runs as one compiled operator where that serves the tensors, else in PyTorch, which can be differentiated.
Both formulas are those of "Kimi Linear: An Expressive, Efficient Attention Architecture" (arXiv 2510.26692).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .api import HEAD_DIM, MIN_SM_MAJOR, QKV_DTYPES, _needs_grad, _sm_major
from .ops import device_type, kda_short_conv
from .ops import gated_rms_norm as gated_rms_norm_op
from .reference import _check_cu_seqlens

__all__ = ["gated_rms_norm", "short_conv"]

CHANNEL_VECTOR = 8  # the operator takes channels by eights
MIN_WIDTH, MAX_WIDTH = 2, 4
PARAMETER_DTYPES = (torch.bfloat16, torch.float32)


def short_conv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal depthwise convolution and SiLU, over the C channels of q|k|v:

        y_t = SiLU(bias + sum_j weight[:, j] x_{t - (W - 1) + j})

    The operator serves bfloat16 on GPUs of SM80 and newer, and bfloat16 and float32 on CPUs, for W from 2 to 4
    and channels in eights.

    Args:
        q, k, v: [B, T, C_q], [B, T, C_k], [B, T, C_v], the inputs; rows may have any stride.
        weight: [C, W], W taps a channel, with C = C_q + C_k + C_v.
        bias: [C] or None.
        initial_state: [N, C, S], S >= W - 1, in q's dtype: the inputs before the first token, the oldest
            first; None for zeros. N is B without cu_seqlens. This is transformers' conv state, with S = W.
        final_state: [N, C, S] in q's dtype, written: the last S inputs of each sequence. May be initial_state,
            which is then updated in place; otherwise the two must not overlap.
        cu_seqlens: int32 or int64 [N + 1], with B = 1: N sequences packed along T, which do not mix. Checked
            as in `chunk_kda`.

    Returns:
        y of q, k and v, each contiguous, in q's dtype.

    Raises:
        RuntimeError: a tensor is not as above; the message names it, what was expected and what came.
    """
    if not _conv_serves(q, k, v, weight, bias, initial_state, final_state):
        return _short_conv_reference(q, k, v, weight, bias, initial_state, final_state, cu_seqlens)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    kda_short_conv(q, k, v, weight.contiguous(), bias, initial_state, cu_seqlens, *out, final_state)
    return out


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    silu: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight * sigmoid(gate), or with SiLU in the sigmoid's place, in float32.

    The operator serves D = 128 in bfloat16 on GPUs of SM80 and newer, and in bfloat16 and float32 on CPUs.

    Args:
        x, gate: [B, T, HV, D]; the mean is over D.
        weight: [D].
        eps: added to the mean of the squares.
        out: [B, T, HV, D] in x's dtype, written and returned; may be x or gate. Allocated by default.

    Returns:
        [B, T, HV, D] in x's dtype.
    """
    if not (
        _serves(x, gate, weight, out) and x.dim() == 4 and x.shape[-1] == HEAD_DIM and x.dtype == gate.dtype
    ):
        y = _gated_rms_norm_reference(x, gate, weight, eps, silu)
        return y if out is None else out.copy_(y)
    x, gate = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, gate))
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    gated_rms_norm_op(x, gate, weight.contiguous(), out, eps, silu)
    return out


def _serves(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the operators take x in its place and dtype, with parameters of theirs and without a gradient."""
    return (
        x.device.type == device_type
        and x.dtype in QKV_DTYPES[device_type]
        and all(t is None or (t.device == x.device and t.dtype in PARAMETER_DTYPES) for t in others)
        and not _needs_grad(x, *others)
        and (device_type == "cpu" or _sm_major(x.get_device()) >= MIN_SM_MAJOR)
    )


def _conv_serves(q, k, v, weight, bias, initial_state, final_state) -> bool:
    width = weight.shape[-1]
    return (
        _serves(q, k, v, weight, bias, initial_state, final_state)
        and MIN_WIDTH <= width <= MAX_WIDTH
        and all(x.dtype == q.dtype and x.shape[-1] % CHANNEL_VECTOR == 0 for x in (q, k, v))
        and (
            initial_state is None or (initial_state.dtype == q.dtype and initial_state.shape[-1] >= width - 1)
        )
        and (final_state is None or final_state.dtype == q.dtype)
    )


def _short_conv_reference(q, k, v, weight, bias, initial_state, final_state, cu_seqlens):
    """As transformers computes it: the convolution in the weight's dtype."""
    if cu_seqlens is not None:
        bounds = _check_cu_seqlens(cu_seqlens, *q.shape[:2])
        rows = [
            _short_conv_reference(
                *(x[:, start:end] for x in (q, k, v)), weight, bias,
                *(None if state is None else state[n : n + 1] for state in (initial_state, final_state)), None,
            )
            for n, (start, end) in enumerate(zip(bounds, bounds[1:]))
        ]  # fmt: skip
        return tuple(torch.cat(parts, dim=1) for parts in zip(*rows)) if rows else (q, k, v)
    channels, width = weight.shape
    T = q.shape[1]
    x = torch.cat([q, k, v], dim=-1).transpose(1, 2)
    if initial_state is not None:
        x = torch.cat([initial_state, x], dim=-1)
    columns = width - 1 if final_state is None else max(width - 1, final_state.shape[-1])
    x = F.pad(x, (max(0, T + columns - x.shape[-1]), 0))  # zeros before what is known
    y = x[..., x.shape[-1] - T :]
    if T > 0:
        window = x[..., x.shape[-1] - T - (width - 1) :].to(weight.dtype)
        y = F.silu(F.conv1d(window, weight.unsqueeze(1), bias, groups=channels)).to(q.dtype)
    if final_state is not None:
        final_state.copy_(x[..., x.shape[-1] - final_state.shape[-1] :])
    return tuple(
        part.contiguous() for part in y.transpose(1, 2).split([t.shape[-1] for t in (q, k, v)], dim=-1)
    )


def _gated_rms_norm_reference(x, gate, weight, eps, silu):
    dtype = torch.promote_types(x.dtype, torch.float32)
    y, gate = x.to(dtype), gate.to(dtype)
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps) * weight.to(dtype)
    return (y * (F.silu(gate) if silu else torch.sigmoid(gate))).to(x.dtype)

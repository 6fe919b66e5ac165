"""`fused_kda_decode`: one decode step of a KDA layer between its projections, as one kernel where that serves."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .api import DEFAULT_SCALE, check_out, dense_fp32, reference_reason
from .decode import fused_recurrent_kda
from .flags import attention_flags
from .ops import kda_fused_decode
from .reference_decode import PADDING, _start

TAPS = 4


def fused_kda_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    gate: torch.Tensor,
    conv_state: torch.Tensor,
    recurrent_state: torch.Tensor,
    conv_weight: torch.Tensor,
    norm_weight: torch.Tensor,
    *,
    conv_bias: torch.Tensor | None = None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
    norm_eps: float = 1e-5,
    use_qk_l2norm_in_kernel: bool = True,
    use_gate_in_kernel: bool = True,
    use_beta_sigmoid_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Short convolution, delta rule and gated RMSNorm of one token or a few of each sequence, in one launch.

        x_t = SiLU(conv_bias + sum over j of conv_weight[:, j] * input_(t - 3 + j))    for q, k and v
        o_t = the recurrence at the top of reference.py, on these
        out = o_t * rsqrt(mean(o_t ** 2) + norm_eps) * norm_weight * sigmoid(gate_t)

    all in float32: nothing is rounded between the projections and out but the states where they are stored. The
    layer is that of "Kimi Linear: An Expressive, Efficient Attention Architecture" (arXiv:2510.26692). Both
    states are updated in place. A token costs what its recurrent state costs to read and to write.

    The CUDA kernel serves bfloat16 q, k, v and gate with D = 128 on SM80 and newer, and can be captured in a CUDA
    graph. All else runs as PyTorch operations around `fused_recurrent_kda`.

    Args:
        q, k, v: [B, T, H, D], the projections' results. As many value heads as heads: a channel of the
            convolution's state belongs to one head.
        g: [B, T, H, D] and
        beta: [B, T, H] as in `fused_recurrent_kda`; by default raw, with the activations here.
        gate: [B, T, H, D], the logits of the norm's gate.
        conv_state: [N, 3 * H * D, W], W = 3 or 4, bfloat16 or float32, any strides: the channels' last inputs,
            the newest last, channels in the order q, k, v. transformers' cache has W = 4. Zeros at the start.
        recurrent_state: [N, H, K, V], or [N, H, V, K] with state_v_first, float32 or bfloat16, each sequence's
            part contiguous. Zeros at the start.
        conv_weight: [3 * H * D, 4] or, as a convolution has it, [3 * H * D, 1, 4], contiguous.
        norm_weight: [D].
        conv_bias: [3 * H * D].
        A_log, dt_bias, lower_bound, scale, use_qk_l2norm_in_kernel, use_gate_in_kernel,
            use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens: as in `fused_recurrent_kda`.
        norm_eps: epsilon of the norm, >= 0.
        ssm_state_indices, num_accepted_tokens: as in `fused_recurrent_kda`, in place. conv_state
            [slots, 3 * H * D, W] and recurrent_state are pools then, and a slot is one of both.
        out: [B, T, H, D] in v's dtype, written and returned; allocated by default.

    Returns:
        out: [B, T, H, D] in v's dtype.

    Raises:
        TypeError, ValueError, RuntimeError (from the kernel): an argument is not as above, or requires a
            gradient; the message names it, what was expected and what came, and nothing has been written.
    """
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval: expected use_beta_sigmoid_in_kernel=True with it, got False")
    if torch.is_grad_enabled():
        _check_no_gradient(
            q=q, k=k, v=v, g=g, beta=beta, gate=gate, conv_state=conv_state, recurrent_state=recurrent_state,
            conv_weight=conv_weight, norm_weight=norm_weight, conv_bias=conv_bias, A_log=A_log,
            dt_bias=dt_bias,
        )  # fmt: skip
    if not use_gate_in_kernel:
        A_log = dt_bias = None
    kernel_serves = (
        kda_fused_decode is not None
        and reference_reason(q, k, v, g, beta, A_log, dt_bias, recurrent_state) is None
        and gate.dtype == torch.bfloat16
    )
    if not kernel_serves:
        y = _composed(
            q, k, v, g, beta, gate, conv_state, recurrent_state, conv_weight, conv_bias, norm_weight, norm_eps,
            A_log=A_log, dt_bias=dt_bias, scale=scale, lower_bound=lower_bound,
            use_gate_in_kernel=use_gate_in_kernel, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
            state_v_first=state_v_first, cu_seqlens=cu_seqlens, ssm_state_indices=ssm_state_indices,
            num_accepted_tokens=num_accepted_tokens,
        )  # fmt: skip
        if out is None:
            return y
        check_out(out, v)
        return out.copy_(y)

    if not q.is_contiguous() and q.stride(-1) != 1:
        q = q.contiguous()
    if not k.is_contiguous() and k.stride(-1) != 1:
        k = k.contiguous()
    if not v.is_contiguous() and v.stride(-1) != 1:
        v = v.contiguous()
    if not g.is_contiguous() and g.stride(-1) != 1:
        g = g.contiguous()
    if not gate.is_contiguous() and gate.stride(-1) != 1:
        gate = gate.contiguous()
    if A_log is not None:
        A_log = dense_fp32(A_log)
    if dt_bias is not None:
        dt_bias = dense_fp32(dt_bias)
    if out is None:
        out = torch.empty_like(v)
    flags = attention_flags(
        use_gate_in_kernel, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first
    )
    rare = ()  # as in fused_recurrent_kda
    if ssm_state_indices is not None or num_accepted_tokens is not None or cu_seqlens is not None:
        rare = (ssm_state_indices, num_accepted_tokens, cu_seqlens)
    kda_fused_decode(
        q, k, v, g, beta, gate, A_log, dt_bias, conv_state, recurrent_state, conv_weight, conv_bias, norm_weight,
        out, DEFAULT_SCALE if scale is None else scale, norm_eps, lower_bound, flags, *rare,
    )  # fmt: skip
    return out


def _check_no_gradient(**tensors: torch.Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor that requires no gradient (or torch.no_grad()), got one that does: "
                "states that are overwritten have none"
            )


def _check_shape(name: str, x: torch.Tensor, *shapes: tuple[int, ...]) -> None:
    if tuple(x.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: expected shape {expected}, got {list(x.shape)}")


def _composed(
    q, k, v, g, beta, gate, conv_state, recurrent_state, conv_weight, conv_bias, norm_weight, norm_eps, *,
    cu_seqlens, ssm_state_indices, num_accepted_tokens, **options,
) -> torch.Tensor:  # fmt: skip
    """The same by PyTorch operations around fused_recurrent_kda; indices are read on the host."""
    B, T, H, D = q.shape
    for name, x in (("k", k), ("v", v), ("gate", gate)):
        _check_shape(name, x, (B, T, H, D))
    C, slots = 3 * H * D, len(recurrent_state)
    _check_shape("conv_state", conv_state, (slots, C, TAPS - 1), (slots, C, TAPS))
    _check_shape("conv_weight", conv_weight, (C, TAPS), (C, 1, TAPS))
    _check_shape("norm_weight", norm_weight, (D,))
    if conv_bias is not None:
        _check_shape("conv_bias", conv_bias, (C,))

    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    raw = torch.cat([x.flatten(2).flatten(0, 1).to(dtype) for x in (q, k, v)], dim=-1)
    mixed, kept = _convolve(
        raw, conv_state.to(dtype), conv_weight.reshape(C, TAPS).to(dtype), conv_bias,
        _sequences(B, T, cu_seqlens, slots, ssm_state_indices, num_accepted_tokens),
    )  # fmt: skip
    o, _ = fused_recurrent_kda(
        *(x.view(B, T, H, D) for x in mixed.split(H * D, dim=-1)), g, beta, initial_state=recurrent_state,
        inplace_final_state=True, cu_seqlens=cu_seqlens, ssm_state_indices=ssm_state_indices,
        num_accepted_tokens=num_accepted_tokens, **options,
    )  # fmt: skip
    for slot, window in kept:
        conv_state[slot] = window[:, TAPS - conv_state.shape[2] :]
    normed = F.rms_norm(o, (D,), norm_weight.to(dtype), norm_eps)
    return (normed * torch.sigmoid(gate.to(dtype))).to(v.dtype)


def _sequences(B, T, cu_seqlens, slots, ssm_state_indices, num_accepted_tokens):
    """Of each sequence with tokens that is neither padding nor wrong: its first token, its start slot, each token's slot."""
    bounds = [n * T for n in range(B + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    N = len(bounds) - 1
    per_token = ssm_state_indices is not None and ssm_state_indices.dim() == 2
    rows = [[n] for n in range(N)] if ssm_state_indices is None else ssm_state_indices.reshape(N, -1).tolist()
    accepted = [1] * N if num_accepted_tokens is None else num_accepted_tokens.tolist()
    for n, row in enumerate(rows):
        length = bounds[n + 1] - bounds[n]
        start = _start(row, accepted[n], length, slots, per_token)
        if length > 0 and start not in (None, PADDING):
            yield bounds[n], start, row[:length] if per_token else [PADDING] * (length - 1) + [start]


def _convolve(raw, state, weight, bias, sequences):
    """[tokens, C] after convolution and SiLU, zeros outside the sequences; (slot, last inputs [C, 4]) to keep."""
    mixed, kept = torch.zeros_like(raw), []
    for begin, start, token_slots in sequences:
        end = begin + len(token_slots)
        inputs = torch.cat([state[start, :, 1 - TAPS :], raw[begin:end].T], dim=1)
        windows = inputs.unfold(1, TAPS, 1)  # [C, tokens, 4]
        y = torch.einsum("ctj,cj->tc", windows, weight)
        mixed[begin:end] = F.silu(y if bias is None else y + bias.to(y.dtype))
        kept += [(slot, windows[:, t]) for t, slot in enumerate(token_slots) if slot != PADDING]
    return mixed, kept

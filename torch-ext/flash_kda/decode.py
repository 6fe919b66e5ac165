"""`fused_recurrent_kda`, the call for a token or a few of each sequence: the kernel or the reference."""

from __future__ import annotations

import torch

from . import reference_decode
from .api import HEAD_DIM, check_out, dense_fp32, reference_reason, state_layout, try_kernel
from .flags import INPLACE, attention_flags
from .ops import kda_decode, kda_decode_new


def fused_recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    inplace_final_state: bool = False,
    ssm_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    transpose_state_layout: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kimi Delta Attention token by token, in one launch, with flash-linear-attention 0.6.0's signature.

    The formula is at the top of reference.py. For decoding: one token of each sequence, or a few (drafts).
    Any number is right, but many are faster through `chunk_kda`. The keyword-only arguments are those of
    FLA's inner function and of vLLM's: states can stay in a pool of the caller, and be updated there.

    The kernel serves what it serves in `chunk_kda`: on a CUDA device of SM80 or newer bfloat16 q, k, v, in
    the package's CPU variant bfloat16 and float32 on CPUs, with K = V = 128 and no gradient. All else runs in
    reference_decode.py. The CUDA kernel does not synchronise, its results alone are allocated, and it can be
    captured in a CUDA graph: a replay reads indices, num_accepted_tokens and cu_seqlens anew.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V], HV a multiple of H.
        g: [B, T, HV, K], the log decay, <= 0; the raw gate with use_gate_in_kernel.
        beta: [B, T, HV], in (0, 1); logits with use_beta_sigmoid_in_kernel.
        A_log, dt_bias, lower_bound, use_gate_in_kernel, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel,
            allow_neg_eigval: as in `chunk_kda`.
        scale: factor on q; K ** -0.5 by default.
        initial_state: [N, HV, K, V], or [N, HV, V, K] with state_v_first; zeros by default. N is B without
            cu_seqlens. With ssm_state_indices the pool [slots, HV, K, V] (or [slots, HV, V, K]), float32 or
            bfloat16, each slot contiguous, any distance from slot to slot.
        output_final_state: return the state after each sequence's last token. In place it is returned anyway.
        state_v_first: all states are [.., HV, V, K].
        cu_seqlens: int32 or int64 [N + 1], with B = 1: N sequences packed along T, as in `chunk_kda`.
        inplace_final_state: write the states into initial_state, which is returned; no other is made.
        ssm_state_indices: int32 or int64, any strides, the slots of the pool.
            [N]: sequence n starts from slot i_n, and in place its last state goes back there.
            [N, T_max]: in place only; the state after token t of sequence n goes to slot i_nt, and sequence
            n starts from slot i_n(a - 1), a = num_accepted_tokens[n], read before anything is written.
            A sequence whose start is -1 is padding: o and final_state are zeros, nothing is stored. Another
            -1 among the slots after tokens keeps that state from being stored. Two sequences that name one
            slot are undefined.
        num_accepted_tokens: int32 or int64 [N], in [1, T_max]; 1 by default. How many tokens of the previous
            call were right, its first included: with that call's indices this one goes on behind them.
        out: [B, T, HV, V] in v's dtype, written and returned as o; allocated by default.
        transpose_state_layout: deprecated name of state_v_first.

    Returns:
        o: [B, T, HV, V] in v's dtype.
        final_state: initial_state if in place; else in its layout and float32 (float64 if q, k or v is; from
            a pool that the kernel serves in the pool's dtype), or None if not asked for.

    Wrong indices are known on the device only. Where a slot is outside [0, slots) and not -1, or
    num_accepted_tokens outside [1, T_max], or a sequence longer than T_max, o (and a final_state that is not
    in place) is NaN for that sequence, and no slot is read or written. A cu_seqlens that does not go from 0
    to T without decrease makes all of them NaN and leaves the pool alone; on a CPU, and by the reference, it
    raises.

    Raises:
        TypeError, ValueError, RuntimeError (from the kernel): an argument is not as above; the message names
            it, what was expected and what came, and nothing has been written.
    """
    if transpose_state_layout is not None:
        state_v_first = state_layout(state_v_first, transpose_state_layout)
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval: expected use_beta_sigmoid_in_kernel=True with it, got False")
    if not use_gate_in_kernel:
        A_log = dt_bias = None

    # From here on every line counts: a step of a few sequences takes the host longer than the GPU.
    flags = attention_flags(
        use_gate_in_kernel, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        state_v_first,
    )  # fmt: skip
    inputs = (q, k, v, g, beta, A_log, dt_bias, initial_state)
    if inplace_final_state:
        # the operator's last arguments are None by default; each one that is given takes the dispatcher 0.1 us
        if scale is None and num_accepted_tokens is None and cu_seqlens is None:
            rare = () if ssm_state_indices is None else (ssm_state_indices,)
        else:
            rare = (ssm_state_indices, scale, num_accepted_tokens, cu_seqlens)
        o = try_kernel(kda_decode, inputs, (flags | INPLACE, lower_bound, out, *rare))
        if o is not NotImplemented:
            return o if out is None else out, initial_state
    elif output_final_state and out is None and ssm_state_indices is None and num_accepted_tokens is None:
        rare = () if scale is None and cu_seqlens is None else (scale, cu_seqlens)
        results = try_kernel(kda_decode_new, inputs, (flags, lower_bound, *rare))
        if results is not NotImplemented:
            return results
    elif reference_reason(*inputs) is None:
        if initial_state is not None and ssm_state_indices is None:
            initial_state = dense_fp32(initial_state)
        final_state = None
        if output_final_state:
            N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            dtype = torch.float32 if initial_state is None else initial_state.dtype
            final_state = v.new_empty(N, v.shape[2], HEAD_DIM, HEAD_DIM, dtype=dtype)
        o = kda_decode(
            q, k, v, g, beta, A_log, dt_bias, initial_state, flags, lower_bound, out, ssm_state_indices, scale,
            num_accepted_tokens, cu_seqlens, final_state,
        )  # fmt: skip
        return o if out is None else out, final_state
    return _by_reference(
        q, k, v, g, beta, A_log, dt_bias, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        lower_bound, state_v_first, cu_seqlens, inplace_final_state, ssm_state_indices,
        num_accepted_tokens, out=out,
    )  # fmt: skip


def _by_reference(*arguments, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """reference_decode.fused_recurrent_kda, with `out`."""
    if out is not None:
        check_out(out, arguments[2])
    o, final_state = reference_decode.fused_recurrent_kda(*arguments)
    return (o if out is None else out.copy_(o)), final_state

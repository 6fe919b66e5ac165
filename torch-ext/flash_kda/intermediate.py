"""The states inside sequences: before tokens 0, 64, 128 ... of each, one sequence after another, in bfloat16."""

from __future__ import annotations

import torch

from . import reference

STEP = 64


def new_states(
    like: torch.Tensor, q: torch.Tensor, state_v_first: bool, bounds: torch.Tensor | None
) -> torch.Tensor:
    """Room for them, [B, NT, HV, K, V], or [B, NT, HV, V, K] with `state_v_first`; `like` is v. With `bounds`
    (cu_seqlens) B = 1 and NT counts those of all sequences: on a GPU reading them synchronises.

    Raises:
        ValueError: `bounds` decrease. (That they start at 0 and end at T is for the kernel to check.)
    """
    B, T, HV, V = like.shape
    layout = (V, q.shape[3]) if state_v_first else (q.shape[3], V)
    if bounds is None:
        count = -(-T // STEP)
    else:
        values = bounds.tolist()
        lengths = [end - begin for begin, end in zip(values, values[1:])]
        if min(lengths, default=0) < 0:
            raise ValueError(f"cu_seqlens: expected no decrease, got {values}")
        count = sum(-(-length // STEP) for length in lengths)
    return like.new_empty((B, count, HV, *layout), dtype=torch.bfloat16)


def reference_states(
    q, k, v, g, beta, A_log, dt_bias, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
    use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound, state_v_first, cu_seqlens,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:  # fmt: skip
    """`reference.chunk_kda`, 64 tokens at a time, and the states between: (o, final_state, states)."""
    options = (
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound,
        state_v_first,
    )  # fmt: skip
    # The whole call checks all arguments, gives o and the last states; the pieces below give those between.
    o, final_state = reference.chunk_kda(
        q, k, v, g, beta, A_log, dt_bias, scale, initial_state, output_final_state, *options, cu_seqlens
    )
    states = new_states(v, q, state_v_first, cu_seqlens)
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    at = 0
    for n, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        # A padded batch goes on together, a packed sequence alone.
        state = initial_state
        if cu_seqlens is not None and initial_state is not None:
            state = initial_state[n : n + 1]
        for start in range(begin, end, STEP):
            states[:, at] = 0 if state is None else state
            at += 1
            piece = slice(start, min(start + STEP, end))
            parts = (x[:, piece] for x in (q, k, v, g, beta))
            state = reference.chunk_kda(*parts, A_log, dt_bias, scale, state, True, *options)[1]
    return o, final_state, states

"""Decoding in plain PyTorch: `recurrent_kda` on states that stay where a serving engine keeps them.

Only where a state comes from and where it goes is defined here; the recurrence is that of reference.py. One
sequence of L tokens, with its row of `ssm_state_indices`:

    [N]         S from slot i; after token L - 1, in place, back to slot i
    [N, T_max]  S from slot i[a - 1], where a is num_accepted_tokens (1 by default);
                after token t, always in place, to slot i[t]

The second form is speculative decoding as FLA and vLLM have it: T_max - 1 drafts follow a known token. Of
these T_max the verifier keeps the first a, the state after the last of them lies in slot i[a - 1], and the
next call starts there. Nothing is replayed.

    start slot -1                       padding: o is 0, final_state is 0, nothing is stored
    another i[t] = -1                   the state after token t is not kept
    any other slot outside [0, slots),  o and final_state are NaN, nothing is stored
    a outside [1, T_max], L > T_max

Two live rows that name one slot are undefined. The order of these checks: a, the start slot, the rest.
"""

from __future__ import annotations

import torch

from .reference import check_inputs, check_tensor, recurrent_kda

__all__ = ["fused_recurrent_kda"]

PADDING = -1


def _check_indices(name: str, x: object, q: torch.Tensor, layout: str, shapes: tuple[tuple, ...]) -> None:
    """x must be an int32 or int64 tensor on q's device of one of these shapes, None being any size."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected dtype int32 or int64, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    fits = any(
        len(shape) == x.dim() and all(size in (None, got) for size, got in zip(shape, x.shape))
        for shape in shapes
    )
    if not fits:
        raise ValueError(f"{name}: expected shape {layout}, got {list(x.shape)}")


def _check_pool(
    q, v, N, initial_state, ssm_state_indices, num_accepted_tokens, state_v_first, inplace, differentiable
) -> None:
    """Raises on anything that fused_recurrent_kda's docstring rules out about states."""
    K, HV, V = q.shape[3], *v.shape[2:]
    if inplace and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable):
        raise ValueError(
            "inplace_final_state: expected False where a gradient is required: overwritten states have none"
        )
    if inplace and initial_state is None:
        raise ValueError("initial_state: expected a tensor with inplace_final_state=True, got None")
    if ssm_state_indices is None:
        if num_accepted_tokens is not None:
            raise ValueError(
                "num_accepted_tokens: expected ssm_state_indices [N, T_max] with it, got None for these"
            )
        return
    _check_indices(
        "ssm_state_indices", ssm_state_indices, q, f"[N] or [N, T_max] with N = {N}", ((N,), (N, None))
    )
    if initial_state is None:
        raise ValueError("initial_state: expected the pool of states with ssm_state_indices, got None")
    slots = len(initial_state) if isinstance(initial_state, torch.Tensor) and initial_state.dim() else 0
    layout, sizes = ("[slots, HV, V, K]", [V, K]) if state_v_first else ("[slots, HV, K, V]", [K, V])
    check_tensor("initial_state", initial_state, q, layout, [slots, HV, *sizes])
    if ssm_state_indices.dim() == 2:
        if not inplace:
            raise ValueError(
                "inplace_final_state: expected True with ssm_state_indices [N, T_max], got False: "
                "the state after every token goes to a slot"
            )
        if ssm_state_indices.shape[1] == 0:
            raise ValueError("ssm_state_indices: expected T_max of at least 1, got shape [N, 0]")
    if num_accepted_tokens is not None:
        if ssm_state_indices.dim() != 2:
            raise ValueError(
                "num_accepted_tokens: expected ssm_state_indices [N, T_max] with it, got [N]: "
                "the states after earlier tokens are not there to start from"
            )
        _check_indices("num_accepted_tokens", num_accepted_tokens, q, f"[N] = [{N}]", ((N,),))


def _start(row: list[int], accepted: int, length: int, slots: int, per_token: bool) -> int | None:
    """The slot that a sequence of `length` tokens starts from: PADDING, or None if its row is wrong."""
    if not 1 <= accepted <= len(row):
        return None
    start = row[accepted - 1]
    if start == PADDING:
        return PADDING
    used = [start, *row[:length]] if per_token else [start]
    if per_token and length > len(row):
        return None
    return start if all(slot == PADDING or 0 <= slot < slots for slot in used) else None


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
    inplace_final_state: bool = False,
    ssm_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kimi Delta Attention token by token, from and to states in a pool; see the top of this file.

    Args: as in `decode.fused_recurrent_kda`; any floating dtypes, any K and V, any strides. Indices and
        cu_seqlens are read on the host.
    Returns: as there. A final state that is not in place is float32, or float64 if q, k or v is.
    Raises: TypeError, ValueError, with the argument's name; cu_seqlens that are wrong raise, too.
    """
    pooled = ssm_state_indices is not None
    gates = dict(A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound, use_gate_in_kernel=use_gate_in_kernel)
    gates |= dict(
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
    )
    bounds = check_inputs(
        q, k, v, g, beta, initial_state=None if pooled else initial_state, cu_seqlens=cu_seqlens, **gates
    )
    N, (HV, V) = len(bounds) - 1, v.shape[2:]
    _check_pool(
        q, v, N, initial_state, ssm_state_indices, num_accepted_tokens, state_v_first, inplace_final_state,
        (q, k, v, g, beta, A_log, dt_bias, initial_state),
    )  # fmt: skip
    gates |= dict(scale=scale, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)
    if not pooled:
        o, state = recurrent_kda(
            q, k, v, g, beta, initial_state=initial_state, cu_seqlens=cu_seqlens,
            output_final_state=output_final_state or inplace_final_state, **gates,
        )  # fmt: skip
        if inplace_final_state:
            state = initial_state.copy_(state)
        return o, state

    pool, slots, per_token = initial_state, len(initial_state), ssm_state_indices.dim() == 2
    rows = ssm_state_indices.reshape(N, -1).tolist()
    accepted = [1] * N if num_accepted_tokens is None else num_accepted_tokens.tolist()
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:])]
    starts = [_start(*each, slots, per_token) for each in zip(rows, accepted, lengths)]

    tokens = [x.flatten(0, 1) for x in (q, k, v, g, beta)]
    o = v.new_zeros(len(tokens[2]), HV, V)
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    state = pool.new_zeros(N, *pool.shape[1:], dtype=dtype)
    for n, start in enumerate(starts):
        if start is None:
            o[bounds[n] : bounds[n + 1]] = state[n] = torch.nan
        elif start != PADDING:
            state[n] = pool[start]

    live = [n for n, start in enumerate(starts) if start not in (None, PADDING)]
    for t in range(max((lengths[n] for n in live), default=0)):
        running = [n for n in live if lengths[n] > t]
        at = [bounds[n] + t for n in running]
        o_t, S = recurrent_kda(
            *(x[at].unsqueeze(1) for x in tokens),
            initial_state=state[running],
            output_final_state=True,
            **gates,
        )
        o[at], state[running] = o_t.squeeze(1), S
        if inplace_final_state:
            kept = [
                (n, rows[n][t] if per_token else rows[n][0])
                for n in running
                if per_token or lengths[n] == t + 1
            ]
            for n, slot in kept:
                if slot != PADDING:
                    pool[slot] = state[n].to(pool.dtype)
    o = o.unflatten(0, q.shape[:2])
    if inplace_final_state:
        return o, pool
    return o, state if output_final_state else None

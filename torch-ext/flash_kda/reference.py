"""Kimi Delta Attention in plain PyTorch: the definition, and a chunk form fast enough to fall back on.

One head of one sequence, with the state S as [K, V] and a_t = exp(g_t) in [0, 1]^K per key channel:

    S   <- diag(a_t) S
    u_t  = beta_t (v_t - S^T k_t)
    S   <- S + k_t u_t^T
    o_t  = scale * S^T q_t

Source of the formulas: "Kimi Linear: An Expressive, Efficient Attention Architecture" (arXiv 2510.26692);
argument names and defaults follow flash-linear-attention. `recurrent_kda` runs the lines above; `chunk_kda`
computes the same with matrix products over chunks of tokens. Neither shares code with the CUDA kernel, which
is tested against them.

Everything runs on any device, for any K and V, in float32, or in float64 when q, k or v is float64, and can
be differentiated. Decays are products of a_t and never quotients: a log decay of -2600 (a hard reset) gives
an exact 0 with a finite gradient, where exp(-G) of the usual chunk form would overflow.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch.nn.functional import pad

__all__ = ["chunk_kda", "recurrent_kda"]

L2_EPS = 1e-6
LOWER_BOUND_MIN = -5.0


class _Packing(NamedTuple):
    """Where the tokens of N sequences go when all sequences advance together, one block of C tokens a step.

    Sequences are sorted by their number of blocks, longest first, so that the ones still running at a step
    are always a prefix: no masks in the state pass, and a finished sequence is simply left behind.
    """

    token: torch.Tensor  # [blocks, C] index of the token in the pack; the number of tokens stands for padding
    place: torch.Tensor  # [tokens] where in token.flatten() each token went
    steps: list[int]  # how many sequences run at each step; sums to the number of blocks
    order: torch.Tensor  # [N] the sequences, longest first
    rank: torch.Tensor  # [N] inverse of order


def _pack(bounds: list[int], C: int, device: torch.device) -> _Packing:
    tokens, N = bounds[-1], len(bounds) - 1
    blocks = [-(-(end - start) // C) for start, end in zip(bounds, bounds[1:])]
    order = sorted(range(N), key=lambda n: -blocks[n])
    first, last, steps = [], [], []
    running = N
    for step in range(max(blocks, default=0)):
        while blocks[order[running - 1]] <= step:
            running -= 1
        steps.append(running)
        first += [bounds[n] + step * C for n in order[:running]]
        last += [bounds[n + 1] for n in order[:running]]

    token = torch.tensor(first, dtype=torch.long)[:, None] + torch.arange(C)
    inside = token < torch.tensor(last, dtype=torch.long)[:, None]
    place = torch.empty(tokens, dtype=torch.long)
    place[token[inside]] = inside.flatten().nonzero().flatten()
    order = torch.tensor(order, dtype=torch.long)
    token = token.masked_fill(~inside, tokens)
    return _Packing(token.to(device), place.to(device), steps, order.to(device), order.argsort().to(device))


def _gather(x: torch.Tensor, packing: _Packing) -> torch.Tensor:
    """[tokens, HV, D] -> [blocks, HV, C, D]. Padding is zeros: a log decay and a beta of 0 change nothing."""
    blocks, C = packing.token.shape
    x = pad(x, (0, 0, 0, 0, 0, 1)).index_select(0, packing.token.flatten())
    return x.unflatten(0, (blocks, C)).transpose(1, 2).contiguous()


def _scatter(o: list[torch.Tensor], like: torch.Tensor, packing: _Packing) -> torch.Tensor:
    """Per-step outputs [sequences running, HV, C, V] -> [tokens, HV, V]."""
    if not o:
        return torch.zeros_like(like)
    return torch.cat(o).transpose(1, 2).flatten(0, 1).index_select(0, packing.place)


def _activate_gate(
    g: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None, lower_bound: float | None
) -> torch.Tensor:
    """Raw gate [..., HV, K] -> log decay: the lower-bound gate if there is a bound, else the softplus gate."""
    if dt_bias is not None:
        g = g + dt_bias.to(g.dtype).reshape(g.shape[-2:])
    rate = 1.0 if A_log is None else A_log.to(g.dtype).exp().reshape(-1, 1)
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(rate * g)
    softplus = torch.logaddexp(g, g.new_zeros(()))  # F.softplus turns linear at 20, too early for float64
    return -rate * softplus


def _l2norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def _recurrent_steps(q, k, v, a, beta, S, steps):
    """The definition. q, k, a [blocks, HV, 1, K], v [blocks, HV, 1, V], beta [blocks, HV, 1, 1], a block being
    one token; S [N, HV, K, V]. Returns the outputs step by step and the final states, sorted as S is.
    """
    o, finished = [], []
    for q_t, k_t, v_t, a_t, beta_t in zip(*(x.split(steps) for x in (q, k, v, a, beta))):
        S, left = S[: len(q_t)], S[len(q_t) :]
        finished.append(left)
        S = a_t.mT * S
        u = beta_t * (v_t - k_t @ S)
        S = S + k_t.mT @ u
        o.append(q_t @ S)
    return o, torch.cat([S, *reversed(finished)])


def _decay_tree(q: torch.Tensor, k: torch.Tensor, a: torch.Tensor):
    """All decayed products inside the chunks, with every decay built as a product of factors <= 1.

    Tokens form groups that double from one token to the chunk. When two groups of L tokens merge, a row i of
    the later one and a column j of the earlier one are joined by the decay from j to i, which splits at the
    boundary:

        pre_i = product of a over the start of its group .. i       (rows)
        suf_j = product of a over j + 1 .. the end of its group     (columns)
        block = (rows * pre) (k * suf)^T

    Args: q, k, a [..., C, K] with C a power of two and a the decay (not its logarithm).
    Returns: Aqk, Akk [..., C, C] (Akk's diagonal has no meaning), and the decay from the chunk's start through
        each token, pre [..., C, K], after it to the chunk's end, suf [..., C, K], and over the chunk, total
        [..., 1, K].
    """
    C = a.shape[-2]
    rows = torch.stack((q, k))
    A = (rows * k).sum(-1)[..., None, None]  # [2, ..., groups, L, L], here the diagonal: no decay
    pre = total = a.unsqueeze(-2)
    suf = torch.ones_like(pre)
    L = 1
    while L < C:
        halves = (C // (2 * L), 2)
        A_early, A_late = A.unflatten(-3, halves).unbind(-3)
        pre_early, pre_late = pre.unflatten(-3, halves).unbind(-3)
        suf_early, suf_late = suf.unflatten(-3, halves).unbind(-3)
        total_early, total_late = total.unflatten(-3, halves).unbind(-3)
        rows_late = rows.unflatten(-2, (*halves, L)).select(-3, 1)
        k_early = k.unflatten(-2, (*halves, L)).select(-3, 0)

        block = (rows_late * pre_late) @ (k_early * suf_early).mT
        A = torch.cat((torch.cat((A_early, torch.zeros_like(block)), -1), torch.cat((block, A_late), -1)), -2)
        pre = torch.cat((pre_early, total_early * pre_late), -2)
        suf = torch.cat((suf_early * total_late, suf_late), -2)
        total = total_early * total_late
        L *= 2
    A, pre, suf, total = A.squeeze(-3), pre.squeeze(-3), suf.squeeze(-3), total.squeeze(-3)
    return A[0], A[1], pre, suf, total


def _chunk_steps(q, k, v, a, beta, S, steps):
    """The chunk form. q, k, a [blocks, HV, C, K], v [blocks, HV, C, V], beta [blocks, HV, C, 1], a block being
    a chunk; S [N, HV, K, V]. Returns as `_recurrent_steps`.

        U  = (I + diag(beta) Akk)^-1 diag(beta) (V - (K * pre) S)
        O  = (Q * pre) S + Aqk U
        S' = diag(total) S + (K * suf)^T U

    All but the three products with S and U is done for every chunk at once.
    """
    Aqk, Akk, pre, suf, total = _decay_tree(q, k, a)
    rhs = beta * torch.cat((v, k * pre), -1)
    uw = torch.linalg.solve_triangular(beta * Akk, rhs, upper=False, unitriangular=True)
    u, w = uw.split((v.shape[-1], k.shape[-1]), -1)
    o, finished = [], []
    chunks = (u, w, q * pre, Aqk, k * suf, total)
    for u_c, w_c, q_c, Aqk_c, k_c, total_c in zip(*(x.split(steps) for x in chunks)):
        S, left = S[: len(u_c)], S[len(u_c) :]
        finished.append(left)
        U = u_c - w_c @ S
        o.append(q_c @ S + Aqk_c @ U)
        S = total_c.mT * S + k_c.mT @ U
    return o, torch.cat([S, *reversed(finished)])


def _run(
    advance,
    C,
    q,
    k,
    v,
    g,
    beta,
    A_log,
    dt_bias,
    scale,
    initial_state,
    output_final_state,
    use_qk_l2norm_in_kernel,
    use_gate_in_kernel,
    use_beta_sigmoid_in_kernel,
    allow_neg_eigval,
    lower_bound,
    state_v_first,
    cu_seqlens,
):
    """What both forms share: checks, activations, packing. `advance` is one of the two *_steps."""
    bounds = check_inputs(
        q, k, v, g, beta, A_log, dt_bias, initial_state, use_gate_in_kernel, use_beta_sigmoid_in_kernel,
        allow_neg_eigval, lower_bound, state_v_first, cu_seqlens,
    )  # fmt: skip
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = len(bounds) - 1
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    out_dtype = v.dtype
    packing = _pack(bounds, C, q.device)

    kind = q.device.type
    can_autocast = torch.amp.is_autocast_available(kind)
    with torch.autocast(kind, enabled=False) if can_autocast else nullcontext():
        q, k, v, g, beta = (x.to(dtype).flatten(0, 1) for x in (q, k, v, g, beta.unsqueeze(-1)))
        if use_qk_l2norm_in_kernel:
            q, k = _l2norm(q), _l2norm(k)
        if use_gate_in_kernel:
            g = _activate_gate(g, A_log, dt_bias, lower_bound)
        if use_beta_sigmoid_in_kernel:
            beta = torch.sigmoid(beta) * (2.0 if allow_neg_eigval else 1.0)
        q = q * (K**-0.5 if scale is None else scale)
        q, k = (x.repeat_interleave(HV // H, dim=1) for x in (q, k))

        if initial_state is None:
            S = q.new_zeros(N, HV, K, V)
        else:
            S = initial_state.mT if state_v_first else initial_state
            S = S.to(dtype).index_select(0, packing.order)
        a = _gather(g, packing).exp()
        o, S = advance(*(_gather(x, packing) for x in (q, k, v)), a, _gather(beta, packing), S, packing.steps)
        o = _scatter(o, v, packing).unflatten(0, (B, T)).to(out_dtype)
        if not output_final_state:
            return o, None
        S = S.index_select(0, packing.rank)
        return o, (S.mT if state_v_first else S).contiguous()


def recurrent_kda(
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kimi Delta Attention token by token: the definition at the top of this file.

    Args: as in `chunk_kda`, without chunk_size.
    Returns: as in `chunk_kda`.
    Raises: as in `chunk_kda`.
    """
    return _run(
        _recurrent_steps, 1, q, k, v, g, beta, A_log, dt_bias, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        lower_bound, state_v_first, cu_seqlens,
    )  # fmt: skip


def chunk_kda(
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
    chunk_size: int = 32,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kimi Delta Attention in chunks: equal to `recurrent_kda` up to rounding, for every gate.

    Tensors may have any floating dtype and any strides. B sequences of T tokens, or with cu_seqlens N
    sequences packed into B = 1; H query/key heads serve HV value heads, HV a multiple of H (head h of v uses
    head h // (HV/H)).

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V].
        g: [B, T, HV, K], the log decay of each token, <= 0; the raw gate with use_gate_in_kernel.
        beta: [B, T, HV], the writing strength; logits with use_beta_sigmoid_in_kernel.
        A_log: HV elements, logarithm of the gate's rate. Required by the softplus gate, a rate of 1 if left
            out of the lower-bound gate, not used without use_gate_in_kernel.
        dt_bias: HV * K elements, [HV, K] or flat, added to the raw gate; not used without use_gate_in_kernel.
        scale: factor on q; K ** -0.5 by default.
        initial_state: [N, HV, K, V], or [N, HV, V, K] with state_v_first; zeros by default. N is B without
            cu_seqlens.
        output_final_state: return the state after each sequence's last token.
        use_qk_l2norm_in_kernel: replace q and k by x / sqrt(sum(x^2) + 1e-6).
        use_gate_in_kernel: log decay = lower_bound * sigmoid(exp(A_log) * (g + dt_bias)) with a lower_bound,
            -exp(A_log) * softplus(g + dt_bias) without.
        use_beta_sigmoid_in_kernel: apply the sigmoid to beta.
        allow_neg_eigval: beta = 2 * sigmoid(logits); needs use_beta_sigmoid_in_kernel.
        lower_bound: in [-5, 0], the least log decay of a token; selects the gate, see use_gate_in_kernel.
        state_v_first: both states are [N, HV, V, K].
        cu_seqlens: int32 or int64 [N + 1], where sequences begin and end: 0 first, T last, never decreasing;
            two equal entries are a sequence of no tokens, whose final state is its initial state. Read on the
            host.
        chunk_size: tokens in a chunk, a power of two; changes speed and rounding only.

    Returns:
        o: [B, T, HV, V] in v's dtype.
        final_state: in initial_state's layout, float32 (float64 if q, k or v is), or None if not asked for.

    Raises:
        TypeError: an argument is no tensor or has a dtype of the wrong kind.
        ValueError: a shape, device or value is wrong. The message names the argument, what was expected and
            what came.
    """
    if not isinstance(chunk_size, int) or chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size: expected a power of two, got {chunk_size!r}")
    return _run(
        _chunk_steps, chunk_size, q, k, v, g, beta, A_log, dt_bias, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        lower_bound, state_v_first, cu_seqlens,
    )  # fmt: skip


def check_tensor(name: str, x: object, q: torch.Tensor, layout: str, sizes: list[int] | int) -> None:
    """x must be a floating-point tensor on q's device of these sizes, or in any shape of so many elements."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    if isinstance(sizes, int):
        if x.numel() != sizes:
            raise ValueError(f"{name}: expected {layout} = {sizes} elements, got shape {list(x.shape)}")
    elif list(x.shape) != sizes:
        raise ValueError(f"{name}: expected shape {layout} = {sizes}, got {list(x.shape)}")


def _check_cu_seqlens(cu_seqlens: object, B: int, T: int) -> list[int]:
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"cu_seqlens: expected a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected dtype int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens: expected shape [N + 1], got {list(cu_seqlens.shape)}")
    if B != 1:
        raise ValueError(
            f"cu_seqlens: expected a batch of B = 1 that holds the packed sequences, got B = {B}"
        )
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, got {bounds[0]}")
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        if end < start:
            raise ValueError(
                f"cu_seqlens: expected no decrease, got {start} then {end} at entries {n} and {n + 1}"
            )
    if bounds[-1] != T:
        raise ValueError(f"cu_seqlens: expected to end at T = {T}, got {bounds[-1]}")
    return bounds


def check_inputs(
    q,
    k,
    v,
    g,
    beta,
    A_log,
    dt_bias,
    initial_state,
    use_gate_in_kernel,
    use_beta_sigmoid_in_kernel,
    allow_neg_eigval,
    lower_bound,
    state_v_first,
    cu_seqlens,
) -> list[int]:
    """Raises on anything that chunk_kda's docstring rules out; returns where the sequences begin and end."""
    for name, x, letters in (("q", q, "[B, T, H, K]"), ("v", v, "[B, T, HV, V]")):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name}: expected shape {letters}, got {list(x.shape)}")
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if HV == 0 or H == 0 or HV % H != 0:
        raise ValueError(
            f"v: expected HV, the number of value heads, to be a multiple of H = {H}, got HV = {HV}"
        )
    check_tensor("q", q, q, "[B, T, H, K]", [B, T, H, K])
    check_tensor("k", k, q, "[B, T, H, K]", [B, T, H, K])
    check_tensor("v", v, q, "[B, T, HV, V]", [B, T, HV, V])
    check_tensor("g", g, q, "[B, T, HV, K]", [B, T, HV, K])
    check_tensor("beta", beta, q, "[B, T, HV]", [B, T, HV])

    if lower_bound is not None and not LOWER_BOUND_MIN <= lower_bound <= 0:
        raise ValueError(f"lower_bound: expected a value in [{LOWER_BOUND_MIN:g}, 0], got {lower_bound}")
    if use_gate_in_kernel:
        if A_log is not None:
            check_tensor("A_log", A_log, q, "HV", HV)
        elif lower_bound is None:
            raise ValueError("A_log: expected HV elements for the softplus gate (no lower_bound), got None")
        if dt_bias is not None:
            check_tensor("dt_bias", dt_bias, q, "HV * K", HV * K)
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval: expected use_beta_sigmoid_in_kernel=True with it, got False")

    if cu_seqlens is None:
        bounds = list(range(0, B * T + 1, T)) if T else [0] * (B + 1)
    else:
        bounds = _check_cu_seqlens(cu_seqlens, B, T)
    N = len(bounds) - 1
    if initial_state is not None:
        layout = ("[N, HV, V, K]", [N, HV, V, K]) if state_v_first else ("[N, HV, K, V]", [N, HV, K, V])
        check_tensor("initial_state", initial_state, q, *layout)
    return bounds

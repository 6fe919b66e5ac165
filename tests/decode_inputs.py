"""What the tests of decoding share: inputs, pools of states, and the recurrence once more, in float64.

Nothing here calls the package. `expected` is slow and plain: one sequence, one token at a time.
"""

from __future__ import annotations

import itertools

import torch
from kda_inputs import activate, make_inputs, to_float64

__all__ = ["decode_inputs", "expected", "lengths_of", "make_pool", "recurrence", "shuffled_slots"]


def decode_inputs(gate: str, N: int, T: int, H: int, HV: int | None = None, **options) -> dict:
    """Keyword arguments of `fused_recurrent_kda`: N sequences of T tokens, or packed with `lengths`."""
    lengths = options.pop("lengths", None)
    if lengths is None:
        return make_inputs(gate, N, T, H, HV, **options)
    bounds = [0, *itertools.accumulate(lengths)]
    return make_inputs(gate, 1, bounds[-1], H, HV, cu_seqlens=bounds, **options)


def lengths_of(x: dict) -> list[int]:
    """Tokens of each sequence of a call."""
    if x["cu_seqlens"] is None:
        return [x["q"].shape[1]] * len(x["q"])
    return x["cu_seqlens"].diff().tolist()


def shuffled_slots(N: int, slots: int, *, seed: int = 0, device="cpu", dtype=torch.int32) -> torch.Tensor:
    """N different slots of `slots`, in no order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(slots, generator=generator)[:N].to(device, dtype)


def make_pool(x: dict, slots: int, *, dtype=torch.float32, gap: int = 0, seed: int = 1) -> torch.Tensor:
    """A pool [slots, HV, K, V] (or [slots, HV, V, K]) of normal numbers times 0.1 for a call's inputs x.

    gap: so many elements that belong to nobody lie between two slots, and hold NaN.
    """
    HV, V, K = *x["v"].shape[2:], x["q"].shape[3]
    device = x["v"].device
    generator = torch.Generator(device).manual_seed(seed)
    shape = (HV, V, K) if x["state_v_first"] else (HV, K, V)
    row = HV * V * K
    storage = torch.full((slots, row + gap), torch.nan, dtype=dtype, device=device)
    storage[:, :row] = (0.1 * torch.randn(slots, row, generator=generator, device=device)).to(dtype)
    return storage[:, :row].unflatten(1, shape)


def recurrence(x: dict, n: int, S: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Sequence n in float64 from the state S [HV, K, V]: o [L, HV, V], and the states after 0 .. L tokens."""
    x = to_float64(x)
    if x["cu_seqlens"] is None:
        q, k, v, g, beta = (x[name][n] for name in ("q", "k", "v", "g", "beta"))
    else:
        begin, end = x["cu_seqlens"][n : n + 2].tolist()
        q, k, v, g, beta = (x[name][0, begin:end] for name in ("q", "k", "v", "g", "beta"))
    HV, K, V = S.shape
    if x["use_gate_in_kernel"]:
        g = activate(g[None], x["A_log"], x["dt_bias"], x["lower_bound"])[0]
    if x["use_qk_l2norm_in_kernel"]:
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    if x["use_beta_sigmoid_in_kernel"]:
        beta = (2 if x["allow_neg_eigval"] else 1) / (1 + torch.exp(-beta))
    scale = K**-0.5 if x["scale"] is None else x["scale"]
    group = [head // (HV // q.shape[1]) for head in range(HV)]
    o, states = q.new_zeros(len(q), HV, V), [S.double()]
    for t in range(len(q)):
        k_t, q_t = k[t, group], q[t, group]
        S = states[-1] * g[t].exp()[:, :, None]
        u = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", S, k_t))
        S = S + k_t[:, :, None] * u[:, None, :]
        o[t] = scale * torch.einsum("hkv,hk->hv", S, q_t)
        states.append(S)
    return o, states


def expected(x: dict, pool: torch.Tensor | None = None, indices=None, accepted=None, inplace: bool = False):
    """(o, states) of a call in float64: the final states [N, ...], or in place what the pool then holds.

    pool None stands for x["initial_state"] without indices.
    """
    state = x["initial_state"] if pool is None else pool
    v_first, lengths = x["state_v_first"], lengths_of(x)
    HV, V, K = *x["v"].shape[2:], x["q"].shape[3]
    tokens = x["v"].double().flatten(0, 1)
    o, begin = torch.zeros_like(tokens), 0
    after = None if state is None else state.double().clone()
    final = tokens.new_zeros(len(lengths), HV, *((V, K) if v_first else (K, V)))
    slots = 0 if state is None else len(state)
    rows = (
        [[n] for n in range(len(lengths))] if indices is None else indices.reshape(len(lengths), -1).tolist()
    )
    per_token = indices is not None and indices.dim() == 2
    for n, length in enumerate(lengths):
        a = 1 if accepted is None else int(accepted[n])
        out = o[begin : begin + length]
        begin += length
        start = rows[n][a - 1] if 1 <= a <= len(rows[n]) else None
        if start == -1:
            continue
        touched = [start] + (rows[n][:length] if per_token else [])
        if start is None or (per_token and length > len(rows[n])):
            wrong = True
        else:
            wrong = state is not None and any(slot != -1 and not 0 <= slot < slots for slot in touched)
        if wrong:
            out.fill_(torch.nan)
            final[n] = torch.nan
            continue
        S = final.new_zeros(HV, K, V)
        if state is not None:
            S = state[start].double().mT if v_first else state[start].double()
        out[:], states = recurrence(x, n, S)
        states = [y.mT if v_first else y for y in states]
        final[n] = states[-1]
        if inplace and per_token:
            for slot, y in zip(rows[n], states[1:]):
                if slot != -1:
                    after[slot] = y
        elif inplace and length:
            after[start] = states[-1]
    return o.unflatten(0, x["v"].shape[:2]), after if inplace else final

"""Inputs of `fused_kda_decode`, and what it must give, in float64 and token by token.

Nothing here calls the package; the recurrence is that of decode_inputs.py.
"""

from __future__ import annotations

import torch
from decode_inputs import decode_inputs, expected, lengths_of, make_pool

__all__ = ["STATES", "expected_step", "fused_inputs", "tokens_of"]

STATES = ("conv_state", "recurrent_state")


def fused_inputs(
    gate: str,
    N: int = 0,
    T: int = 0,
    H: int = 2,
    *,
    slots: int | None = None,
    width: int = 4,
    bias: bool = False,
    state_dtype: torch.dtype = torch.float32,
    conv_dtype: torch.dtype | None = None,
    seed: int = 0,
    **options,
) -> dict:
    """Keyword arguments of `fused_kda_decode` for decode_inputs' sequences, with pools of `slots` states (N).

    width: how many inputs the convolution's state holds. conv_dtype: of that state, its weight and its bias;
    by default that of q, k and v.
    """
    x = decode_inputs(gate, N, T, H, seed=seed, **options)
    sequences = len(lengths_of(x))
    slots = sequences if slots is None else slots
    B, T, H, D = x["v"].shape
    dtype, device = x["v"].dtype, x["v"].device
    conv_dtype = dtype if conv_dtype is None else conv_dtype
    C = 3 * H * D
    generator = torch.Generator(device).manual_seed(seed + 77)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    names = (
        "q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound", "use_gate_in_kernel",
        "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "state_v_first", "scale",
        "cu_seqlens",
    )  # fmt: skip
    return {name: x[name] for name in names} | dict(
        gate=normal(B, T, H, D).to(dtype),
        conv_state=normal(slots, C, width).to(conv_dtype),
        recurrent_state=make_pool(x, slots, dtype=state_dtype, seed=seed + 1),
        conv_weight=(0.5 * normal(C, 1, 4)).to(conv_dtype),
        conv_bias=(0.3 * normal(C)).to(conv_dtype) if bias else None,
        norm_weight=(1 + 0.2 * normal(D)).to(dtype),
        norm_eps=1e-5,
    )


def tokens_of(x: dict, name: str) -> torch.Tensor:
    """[tokens, ...] of a token tensor, its batches one behind the other."""
    return x[name].flatten(0, 1)


def expected_step(x: dict, indices=None, accepted=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, conv_state, recurrent_state) after a call in float64; x is not changed."""
    C, W = x["conv_state"].shape[1:]
    slots = len(x["conv_state"])
    weight, conv_after = x["conv_weight"].double().reshape(C, 4), x["conv_state"].double().clone()
    bias = 0.0 if x["conv_bias"] is None else x["conv_bias"].double()
    raw = torch.cat([tokens_of(x, name).double().flatten(1) for name in ("q", "k", "v")], dim=1)
    mixed, begin = torch.zeros_like(raw), 0
    for n, length in enumerate(lengths_of(x)):
        row = [n] if indices is None else indices[n].reshape(-1).tolist()
        a = 1 if accepted is None else int(accepted[n])
        per_token = indices is not None and indices.dim() == 2
        used = row[:length] if per_token else []
        wrong = not 1 <= a <= len(row) or (per_token and length > len(row))
        wrong = wrong or any(slot != -1 and not 0 <= slot < slots for slot in [row[a - 1], *used])
        if not wrong and row[a - 1] != -1:
            window = x["conv_state"][row[a - 1]].double()[:, W - 3 :]
            for t in range(length):
                window = torch.cat([window, raw[begin + t][:, None]], dim=1)[:, -4:]
                y = (weight * window).sum(1) + bias
                mixed[begin + t] = y / (1 + torch.exp(-y))
                slot = row[t] if per_token else (row[0] if t + 1 == length else -1)
                if slot != -1:
                    conv_after[slot] = window[:, 4 - W :]
        begin += length

    q, k, v = (y.view(x["q"].shape) for y in mixed.split(C // 3, dim=1))
    call = x | dict(q=q, k=k, v=v, initial_state=x["recurrent_state"])
    o, recurrent_after = expected(call, None, indices, accepted, inplace=True)
    o = o * (o.square().mean(-1, keepdim=True) + x["norm_eps"]).rsqrt() * x["norm_weight"].double()
    return o / (1 + torch.exp(-x["gate"].double())), conv_after, recurrent_after

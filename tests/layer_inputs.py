"""Inputs and definitions for the tests of the operators around the delta rule: short convolution, gated RMS norm."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

# Lengths that begin and end at, before and behind the GPU kernel's tiles of 16 tokens, with empty sequences in
# front, between and at the end.
LENGTHS = [0, 1, 2, 3, 13, 16, 0, 0, 17, 14, 31, 5, 1, 1, 1, 40, 0]


class Conv(NamedTuple):
    """Arguments of the short convolution; the inputs' channels are split as `channels`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    initial_state: torch.Tensor | None
    cu_seqlens: torch.Tensor | None


def make_conv(
    B: int = 1,
    T: int = 50,
    channels: tuple[int, int, int] = (128, 128, 256),
    W: int = 4,
    *,
    lengths: list[int] | None = None,
    cu_seqlens_dtype: torch.dtype = torch.int64,
    bias: bool = False,
    columns: int | None = 4,
    joint: bool = False,
    offset: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Conv:
    """Random arguments. `lengths` packs sequences; `columns` is the initial state's, None for no state; `joint`
    makes q, k, v slices of one tensor, from `offset` on (an odd one gives rows that are not aligned)."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, to: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(to)

    cu_seqlens, N, C = None, B, sum(channels)
    if lengths is not None:
        B, T, N = 1, sum(lengths), len(lengths)
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=cu_seqlens_dtype, device=device)
    if joint or offset:
        x = normal(B, T, C + offset)[..., offset:].split(channels, dim=-1)
    else:
        x = [normal(B, T, size) for size in channels]
    state = None if columns is None else normal(N, C, columns)
    return Conv(
        *x,
        normal(C, W, to=weight_dtype or dtype),
        normal(C, to=weight_dtype or dtype) if bias else None,
        state,
        cu_seqlens,
    )


def conv_definition(x: Conv, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(SiLU of the convolution of q|k|v, the last `columns` inputs of each sequence), token by token in float64."""
    inputs = torch.cat([x.q, x.k, x.v], dim=-1).double()
    weight = x.weight.double()
    W = weight.shape[1]
    if x.cu_seqlens is None:
        places = [(b, 0, inputs.shape[1]) for b in range(len(inputs))]
    else:
        places = [(0, start, end) for start, end in itertools.pairwise(x.cu_seqlens.tolist())]
    y, states = torch.full_like(inputs, float("nan")), []
    for n, (b, start, end) in enumerate(places):
        before = inputs.new_zeros(max(W, columns), inputs.shape[-1])
        if x.initial_state is not None:
            before = torch.cat([before, x.initial_state[n].double().T])
        history = torch.cat([before, inputs[b, start:end]])
        for t in range(start, end):
            last = len(before) + t - start + 1
            z = (weight.T * history[last - W : last]).sum(dim=0) + (0 if x.bias is None else x.bias.double())
            y[b, t] = z / (1 + torch.exp(-z))
        states.append(history[len(history) - columns :].T)
    return y, torch.stack(states) if states else inputs.new_empty(0, inputs.shape[-1], columns)


def make_norm(
    B: int = 2,
    T: int = 37,
    HV: int = 3,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x and gate [B, T, HV, 128], weight [128]. Rows of x differ in size by factors up to 1000."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    scale = torch.pow(10, 3 * torch.rand(B, T, HV, 1, generator=generator, device=device) - 2)
    return (
        (scale * normal(B, T, HV, 128)).to(dtype),
        (3 * normal(B, T, HV, 128)).to(dtype),
        (1 + 0.3 * normal(128)).to(dtype),
    )


def norm_definition(x, gate, weight, eps: float, silu: bool) -> torch.Tensor:
    """In float64."""
    x, gate, weight = (t.double() for t in (x, gate, weight))
    act = (gate if silu else 1) / (1 + torch.exp(-gate))
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight * act

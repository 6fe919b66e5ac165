"""The shared words of the tests: gates at their extremes, inputs for every kind of call, the error measure.

`make_inputs` gives keyword arguments that go unchanged into the kernel package's `chunk_kda` and into the
reference; `to_float64` upcasts the same (already rounded) numbers for the float64 reference.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Callable

import torch

__all__ = [
    "FLAGS", "GATES", "activate", "conv_layout", "make_inputs", "operator_flags", "prefix_states", "rel_rms",
    "to_float64",
]  # fmt: skip

# The operators' flags, as the compiler sees them.
FLAGS_H = Path(__file__).resolve().parent.parent / "kda_kernel" / "flags.h"
FLAGS = {
    name: int(number)
    for name, number in re.findall(r"^  ([A-Z0-9_]+) = (\d+),", FLAGS_H.read_text(), re.MULTILINE)
}


def operator_flags(inputs: dict, **others: bool) -> int:
    """An operator's `flags` for the inputs of `make_inputs`, and those of `others` that are true."""
    given = {name.upper(): value for name, value in inputs.items()} | others
    return sum(number for name, number in FLAGS.items() if given.get(name))


def new_results_arguments(inputs: dict) -> tuple:
    """The arguments of kda_prefill_new and kda_decode_new for the inputs of `make_inputs`."""
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
    tensors = (inputs[name] for name in names)
    return *tensors, operator_flags(inputs), inputs["lower_bound"], inputs["scale"], inputs["cu_seqlens"]


class _Random:
    """Random float32 numbers on one device from one seed."""

    def __init__(self, device: str | torch.device, seed: int):
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator, device=self.device)


# A gate takes random numbers and the shape [B, T, HV, K] of g, and returns the arguments that make up the
# gate: raw g in float32 with A_log [HV], dt_bias [HV, K] and lower_bound, or for a pre-activated gate the log
# decay itself.


def _raw(g: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, lower_bound: float | None) -> dict:
    return dict(g=g, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound, use_gate_in_kernel=True)


def _preactivated(g: torch.Tensor) -> dict:
    return dict(g=g, A_log=None, dt_bias=None, lower_bound=None, use_gate_in_kernel=False)


def _lower_strong(random: _Random, B: int, T: int, HV: int, K: int) -> dict:
    """Log decay about -3 a token: little survives a chunk."""
    return _raw(random.normal(B, T, HV, K), random.uniform(0, 1, HV), random.uniform(0, 1, HV, K), -5.0)


def _lower_weak(random: _Random, B: int, T: int, HV: int, K: int) -> dict:
    """Log decay about -0.007 a token: nearly everything survives."""
    dt_bias = random.uniform(-0.1, 0.1, HV, K) - 7.0
    return _raw(random.normal(B, T, HV, K), random.uniform(-0.05, 0.05, HV), dt_bias, -5.0)


def _softplus_init(random: _Random, B: int, T: int, HV: int, K: int) -> dict:
    """Kimi-Linear's initialisation: exp(A_log) in 1..16, softplus(dt_bias) log-uniform in 1e-3..1e-1."""
    A_log = random.uniform(1, 16, HV).log()
    dt = random.uniform(math.log(1e-3), math.log(1e-1), HV, K).exp()
    return _raw(0.5 * random.normal(B, T, HV, K), A_log, dt + torch.log(-torch.expm1(-dt)), None)


def _softplus_resets(random: _Random, B: int, T: int, HV: int, K: int) -> dict:
    """Weak decay, but 5 % of all log decays are -2600 (exp(A_log) = 200, like the largest in checkpoints)."""
    reset = random.uniform(0, 1, B, T, HV, K) < 0.05
    g = random.uniform(-11, -9, B, T, HV, K).masked_fill(reset, 13.0)
    A_log = torch.full((HV,), math.log(200.0), device=random.device)
    return _raw(g, A_log, torch.zeros(HV, K, device=random.device), None)


def _mixed_channels(random: _Random, B: int, T: int, HV: int, K: int) -> dict:
    """Every other channel forgets all at each token, the rest forget almost nothing."""
    g = torch.full((B, T, HV, K), -1e-4, device=random.device)
    g[..., ::2] = -2600.0
    return _preactivated(g)


def _zero(random: _Random, B: int, T: int, HV: int, K: int) -> dict:
    """No decay at all."""
    return _preactivated(torch.zeros(B, T, HV, K, device=random.device))


GATES: dict[str, Callable[..., dict]] = {
    "lower-strong": _lower_strong,
    "lower-weak": _lower_weak,
    "softplus-init": _softplus_init,
    "softplus-resets": _softplus_resets,
    "mixed-channels": _mixed_channels,
    "zero": _zero,
}


def activate(
    g: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None, lower_bound: float | None
) -> torch.Tensor:
    """The log decay of a raw gate g [B, T, HV, K], in g's dtype."""
    x = g if dt_bias is None else g + dt_bias.view(g.shape[-2:])
    rate = 1.0 if A_log is None else A_log.exp().unsqueeze(-1)
    if lower_bound is not None:
        return lower_bound / (1.0 + torch.exp(-rate * x))
    return -rate * (x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())))


def conv_layout(x: torch.Tensor) -> torch.Tensor:
    """The same values with T as the contiguous dimension, as transformers' short convolution leaves q, k, v."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def make_inputs(
    gate: str,
    B: int,
    T: int,
    H: int,
    HV: int | None = None,
    K: int = 128,
    V: int = 128,
    *,
    cu_seqlens: list[int] | None = None,
    cu_seqlens_dtype: torch.dtype = torch.int64,
    initial_state: bool = False,
    output_final_state: bool = True,
    state_v_first: bool = False,
    state_dtype: torch.dtype = torch.float32,
    g_dtype: torch.dtype | None = None,
    beta_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.bfloat16,
    preactivated: bool = False,
    l2norm: bool = True,
    beta_sigmoid: bool = True,
    allow_neg_eigval: bool = False,
    scale: float | None = None,
    keys: str = "random",
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> dict:
    """Keyword arguments of one KDA call.

    Args:
        gate: a name in GATES.
        B, T, H, HV, K, V: sizes; HV is H by default.
        cu_seqlens: where packed sequences begin and end, from 0 to T, with B = 1.
        initial_state: pass one, normal numbers times 0.1 in state_dtype, in the layout of state_v_first.
        g_dtype, beta_dtype: by default dtype, but float32 for a pre-activated g.
        preactivated: hand over the log decay of the gate instead of its raw inputs.
        l2norm, beta_sigmoid: leave these two to the call, or do them here.
        keys: "random", or "parallel" for keys that nearly point the same way (an ill-conditioned chunk).

    Returns: q, k, v, g, beta, A_log, dt_bias, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        lower_bound, state_v_first, cu_seqlens.
    """
    HV = H if HV is None else HV
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    random = _Random(device, seed)
    q, k, v = random.normal(B, T, H, K), random.normal(B, T, H, K), random.normal(B, T, HV, V)
    if keys == "parallel":
        k = random.normal(H, K) + 0.05 * k
    elif keys != "random":
        raise ValueError(f'keys: expected "random" or "parallel", got {keys!r}')
    beta = random.normal(B, T, HV)
    if not l2norm:
        q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    if not beta_sigmoid:
        beta = torch.sigmoid(beta)
    gate_inputs = GATES[gate](random, B, T, HV, K)
    if preactivated and gate_inputs["use_gate_in_kernel"]:
        gate_inputs.pop("use_gate_in_kernel")
        gate_inputs = _preactivated(activate(**gate_inputs))
    if g_dtype is None:
        g_dtype = dtype if gate_inputs["use_gate_in_kernel"] else torch.float32
    gate_inputs["g"] = gate_inputs["g"].to(g_dtype)
    state, offsets = None, None
    if initial_state:
        state = (0.1 * random.normal(N, HV, *((V, K) if state_v_first else (K, V)))).to(state_dtype)
    if cu_seqlens is not None:
        offsets = torch.tensor(cu_seqlens, dtype=cu_seqlens_dtype, device=device)
    return dict(
        q=q.to(dtype),
        k=k.to(dtype),
        v=v.to(dtype),
        beta=beta.to(dtype if beta_dtype is None else beta_dtype),
        **gate_inputs,
        scale=scale,
        initial_state=state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=l2norm,
        use_beta_sigmoid_in_kernel=beta_sigmoid,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens=offsets,
    )


def to_float64(kwargs: dict) -> dict:
    """The same arguments with every floating-point tensor in float64."""
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in kwargs.items()
    }


def prefix_states(reference, inputs: dict) -> torch.Tensor:
    """The states before tokens 0, 64, 128 ... of each sequence, [B, NT, HV, ...], by definition: the final
    states of runs, in float64, that end there."""
    inputs = to_float64(inputs)
    packed, state = inputs["cu_seqlens"] is not None, inputs["initial_state"]
    bounds = inputs["cu_seqlens"].tolist() if packed else [0, inputs["q"].shape[1]]
    states = []
    for n, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        first = state[n : n + 1] if packed and state is not None else state
        for stop in range(begin, end, 64):
            part = {name: inputs[name][:, begin:stop] for name in ("q", "k", "v", "g", "beta")}
            run = {**inputs, **part, "initial_state": first, "cu_seqlens": None, "output_final_state": True}
            states.append(reference.recurrent_kda(**run)[1])
    return torch.stack(states, dim=1)


def rel_rms(ref: torch.Tensor, x: torch.Tensor) -> float:
    """RMS of x - ref over RMS of ref, in float64. Anything not finite on either side is an error of inf."""
    if ref.shape != x.shape:
        raise ValueError(f"x: expected the shape of ref, {list(ref.shape)}, got {list(x.shape)}")
    ref, x = ref.detach().double(), x.detach().double().to(ref.device)
    if ref.numel() == 0 or torch.equal(ref, x):
        return 0.0 if torch.isfinite(ref).all() else math.inf
    error = ((x - ref).square().mean().sqrt() / ref.square().mean().sqrt()).item()
    return error if math.isfinite(error) else math.inf

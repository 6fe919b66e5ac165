"""The benchmark's shapes, gates and random inputs.

D = 128. q, k, v, g and the beta logits are N(0, 1) in bf16, states N(0, 1) in fp32 and V-first [N, HV, V, K].

| gate | formula | parameters | mean log decay a token |
| --- | --- | --- | --- |
| strong | lower bound -5 | A_log ~ U(0, 1), dt_bias ~ U(0, 1) | about -3.2 |
| weak | lower bound -5 | the same with dt_bias lower by 7 | about -0.002 |
| softplus | softplus | Kimi-Linear's start: A ~ U(1, 16), dt log-uniform in 1e-3 .. 1e-1 | about -0.3 |
| token-resets | softplus | the same, but 5 % of a head's tokens have -2600 in all channels | about -130 |
| channel-resets | softplus | the same, but 5 % of all log decays are -2600 | about -130 |
| bf16-g | none | the log decays of softplus, handed over in bf16 | about -0.3 |
| fp32-g | none | the log decays of softplus, handed over in fp32 | about -0.3 |

Decoding takes the softplus gate, and states V-first [N, HV, V, K] that are updated in place.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

D = 128  # K = V, the kernel's head dimension
LOWER_BOUND = -5.0
BOUNDED = ("strong", "weak")
GATES = (*BOUNDED, "softplus", "token-resets", "channel-resets", "bf16-g", "fp32-g")
RESET = -2600.0  # log decay, after which nothing is left of a state; its raw gate is rounded to bf16
RESET_SHARE = 0.05
MIXED = (1300, 547, 2048, 963, 271, 3063)


@dataclass(frozen=True)
class Case:
    """Sequence lengths, query/key heads H and value heads HV of one measurement."""

    name: str
    lengths: tuple[int, ...]
    H: int
    HV: int

    @property
    def T(self) -> int:
        return sum(self.lengths)

    @property
    def N(self) -> int:
        return len(self.lengths)

    def floor_bytes(self, gate: str = "strong") -> int:
        """q, k, v, out and g, in bf16 but for the g of fp32-g, and both states in fp32, each moved once."""
        tokens = 2 * self.T * D * (2 * self.H + (4 if gate == "fp32-g" else 3) * self.HV)
        states = 2 * 4 * self.N * self.HV * D * D
        return tokens + states


def case(lengths: tuple[int, ...], H: int, label: str | None = None) -> Case:
    label = label or "+".join(map(str, lengths))
    return Case(f"{label}/H{H}", lengths, H, H)


CASES = (
    *(
        made
        for H in (96, 64)
        for made in (
            case((8192,), H),
            case(MIXED, H, "mixed6"),
            case((1024,) * 8, H, "8x1024"),
        )
    ),
    case((8192,), 32),
    case((1024,) * 8, 32, "8x1024"),
    case((128,) * 64, 32, "64x128"),
    case((2048,), 32),
    case((512,), 32),
    case((8192,), 16),
    case((8192,), 8),
    case((32768,), 4),
    case((131072,), 8),
)
QUICK = ("8192/H96", "mixed6/H96", "8192/H64", "8192/H32", "8x1024/H32", "512/H32")
ALL_GATES = ("8192/H96", "8192/H64", "8192/H32", "8x1024/H32")  # cases that are measured with every gate


def gates_of(name: str) -> tuple[str, ...]:
    """The gates that the case of this name is measured with."""
    return GATES if name in ALL_GATES else BOUNDED


def random_numbers(seed: int, device: str):
    """normal(*size, dtype) and uniform(low, high, *size) from one seed."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size, dtype=torch.bfloat16):
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    def uniform(low, high, *size):
        return low + (high - low) * torch.rand(size, generator=generator, device=device)

    return normal, uniform


def softplus_parameters(uniform, HV: int) -> dict:
    """A_log [HV] and dt_bias [HV, D] of Kimi-Linear's start."""
    dt = uniform(math.log(1e-3), math.log(1e-1), HV, D).exp()
    A_log = uniform(1, 16, HV).log()
    return {"A_log": A_log, "dt_bias": dt + torch.log(-torch.expm1(-dt))}  # softplus(dt_bias) = dt


def add_resets(inputs: dict, uniform, channels: int) -> None:
    """Makes log decays RESET at random: of whole tokens and heads with 1 channel, of single ones with D."""
    g = inputs["g"]
    reset = uniform(0, 1, *g.shape[:3], channels) < RESET_SHARE
    raw = -RESET * torch.exp(-inputs["A_log"]).unsqueeze(-1) - inputs["dt_bias"]  # softplus(x) = x out there
    inputs["g"] = torch.where(reset, raw.to(g.dtype), g)


def hand_over_log_decay(inputs: dict, dtype: torch.dtype) -> None:
    """Activates the gate here, so that the call has none of it to do."""
    x = inputs["g"] + inputs.pop("dt_bias")
    rate = inputs.pop("A_log").exp().unsqueeze(-1)
    inputs.update(g=(-rate * F.softplus(x)).to(dtype), use_gate_in_kernel=False)


def make_inputs(shape: Case, gate: str, seed: int, device: str = "cuda", cu_seqlens=None) -> dict:
    """Keyword arguments of `chunk_kda` for one input set.

    One sequence is a batch of one; several are packed, with int64 `cu_seqlens` (given, or made here).
    """
    normal, uniform = random_numbers(seed, device)
    T, H, HV = shape.T, shape.H, shape.HV
    inputs = {
        "q": normal(1, T, H, D),
        "k": normal(1, T, H, D),
        "v": normal(1, T, HV, D),
        "g": normal(1, T, HV, D),
        "beta": normal(1, T, HV),
        "initial_state": normal(shape.N, HV, D, D, dtype=torch.float32),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "state_v_first": True,
    }
    if gate in ("strong", "weak"):
        shift = 0.0 if gate == "strong" else 7.0
        inputs["A_log"] = uniform(0, 1, HV)
        inputs["dt_bias"] = uniform(0, 1, HV, D) - shift
        inputs.update(lower_bound=LOWER_BOUND, safe_gate=True)
    elif gate in GATES:
        inputs.update(softplus_parameters(uniform, HV), lower_bound=None, safe_gate=False)
        if gate.endswith("resets"):
            add_resets(inputs, uniform, 1 if gate == "token-resets" else D)
        elif gate.endswith("-g"):
            hand_over_log_decay(inputs, torch.float32 if gate == "fp32-g" else torch.bfloat16)
    else:
        raise ValueError(f"gate: expected one of {', '.join(GATES)}, got {gate!r}")
    if shape.N > 1:
        inputs["cu_seqlens"] = cumulative(shape.lengths, device) if cu_seqlens is None else cu_seqlens
    return inputs


def cumulative(lengths: tuple[int, ...], device: str = "cuda") -> torch.Tensor:
    """int64 [N + 1]: where each packed sequence begins, and the end of the last."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64, device=device)


def input_sets(shape: Case, gate: str, count: int, device: str = "cuda") -> list[dict]:
    """`count` random input sets that share one `cu_seqlens` tensor, as the layers of a model do."""
    shared = cumulative(shape.lengths, device) if shape.N > 1 else None
    return [make_inputs(shape, gate, seed, device, shared) for seed in range(count)]


@dataclass(frozen=True)
class DecodeCase:
    """Sequences N and heads H of a step."""

    N: int
    H: int

    @property
    def name(self) -> str:
        return f"{self.N}x{self.H}"

    def state_bytes(self, state_dtype: torch.dtype) -> int:
        return self.N * self.H * D * D * state_dtype.itemsize

    def floor_bytes(self, T: int, state_dtype: torch.dtype) -> int:
        """The states read and written, and q, k, v, g and out of T tokens in bf16, each moved once."""
        return 2 * self.state_bytes(state_dtype) + 5 * 2 * self.N * T * self.H * D


DECODE_CASES = tuple(DecodeCase(N, H) for N, H in ((1, 32), (32, 32), (128, 32), (256, 32), (64, 64)))
DECODE_QUICK = ("1x32", "32x32", "256x32")


def decode_sets(
    shape: DecodeCase, T: int, state_dtype: torch.dtype, count: int, device: str = "cuda"
) -> list[dict]:
    """`count` sets of keyword arguments of `fused_recurrent_kda`, in place, and of FLA's inner function.

    They share the gate's parameters.
    """
    N, H = shape.N, shape.H
    normal, uniform = random_numbers(0, device)
    shared = {
        **softplus_parameters(uniform, H),
        "lower_bound": None,
        "inplace_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "state_v_first": True,
    }
    return [
        {
            **{name: normal(N, T, H, D) for name in ("q", "k", "v", "g")},
            "beta": normal(N, T, H),
            "initial_state": normal(N, H, D, D, dtype=state_dtype),
            "out": torch.empty(N, T, H, D, dtype=torch.bfloat16, device=device),
            **shared,
        }
        for _ in range(count)
    ]


def fused_sets(
    shape: DecodeCase, T: int, state_dtype: torch.dtype, count: int, device: str = "cuda"
) -> list[dict]:
    """`count` sets of keyword arguments of `fused_kda_decode`, whose recurrent_state is called initial_state.

    The convolution's states are bf16 [N, 3 * H * D, 4], as transformers' cache has them.
    """
    normal, _ = random_numbers(1, device)
    channels = 3 * shape.H * D
    shared = {"conv_weight": normal(channels, 4), "norm_weight": normal(D)}
    sets = decode_sets(shape, T, state_dtype, count, device)
    for x in sets:
        x.pop("inplace_final_state")
        x.update(gate=normal(shape.N, T, shape.H, D), conv_state=normal(shape.N, channels, 4), **shared)
    return sets

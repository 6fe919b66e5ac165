"""Resets and decays at the bounds between the prefill kernel's three ways to the factors, in every number.

The ways (docs/kernel.md, "The factors") are chosen for 16 tokens and 64 channels by the data: bounded, in segments
between resets, which are log decays below -150 ln 2, and the decay tree. The patterns here lie on both sides of
each condition, at the edges of tiles, in single channels, and in long rows of resets.
"""

from __future__ import annotations

import math
from typing import Callable

import pytest
import torch
from harness import DEVICE, assert_accurate, inputs_for, run_op

pytestmark = pytest.mark.usefixtures("each_kernel")

BF16, FP32 = torch.bfloat16, torch.float32
T, TILE = 100, 16
RESET = -2600.0
THRESHOLD = -150 * math.log(2)  # a decay below it is a reset: -103.97
BOUND = -116 * math.log(2)  # of a tile's or a segment's sum, with normalised keys: -80.4


def uniform(low: float, high: float, shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=generator, device=DEVICE)


def scattered(share: float, low: float, high: float | None = None) -> Callable:
    """That share of all (token, channel) is `low`, or between the two, and the rest weak."""

    def pattern(shape):
        chosen = low if high is None else uniform(low, high, shape)
        return torch.where(uniform(0, 1, shape, seed=2) < share, chosen, uniform(-0.3, 0, shape))

    return pattern


def where(condition: Callable, value: float, others: float = -0.01) -> Callable:
    """`value` at the tokens t and channels c of `condition(t, c, head)`."""

    def pattern(shape):
        _, T, HV, K = shape
        t = torch.arange(T, device=DEVICE).view(-1, 1, 1)
        head = torch.arange(HV, device=DEVICE).view(-1, 1)
        chosen = condition(t, torch.arange(K, device=DEVICE), head)
        return torch.where(chosen, value, others).float().expand(shape).contiguous()

    return pattern


# Log decays of a shape [B, T, HV, K].
PATTERNS = {
    "channels": scattered(0.05, RESET),
    "many-channels": scattered(0.3, -110.0),
    "tokens": where(lambda t, c, head: (5 * t + head) % 18 == 7, RESET),
    "tokens-in-one-half": where(lambda t, c, head: (t % 7 == 3) & (c < 64), RESET),
    "one-channel": where(lambda t, c, head: (t % 7 == 3) & (c == 64 + head % 64), RESET),
    "tile-edges": where(lambda t, c, head: (t % TILE == c % 3 * 15) & (c % 3 < 2), RESET),
    "one-after-another": where(lambda t, c, head: (t % TILE >= c % 14) & (t % TILE < c % 14 + 3), RESET),
    "every-token": where(lambda t, c, head: t >= 0, -110.0),
    "all-but-the-first-of-a-tile": where(lambda t, c, head: t % TILE > 0, -110.0),
    "every-other-channel": where(lambda t, c, head: c % 2 == 0, -110.0),
    "at-the-threshold": scattered(0.1, THRESHOLD - 0.5, THRESHOLD + 0.5),
    "bounded-at-the-bound": where(lambda t, c, head: c % 5 == head % 5, BOUND / TILE * 0.995, -0.2),
    "segments-at-the-bound": lambda shape: (
        where(lambda t, c, head: t % TILE == 8, RESET, 0.0)(shape)
        + uniform(BOUND / 7 * 1.02, BOUND / 7 * 0.9, shape)
        * where(lambda t, c, head: c % 9 == 4, 1.0, 0.01)(shape)
    ),
    "middling": scattered(1.0, -60.0, 0.0),
    "where-decays-are-cut-off": scattered(0.2, -160 * math.log(2) - 1, -160 * math.log(2) + 1),
    "far": scattered(0.2, -2e4, -1e4),
    "farthest": scattered(0.05, -1e30),
    "minus-infinity": scattered(0.05, -math.inf),
    "weak-after-many": where(lambda t, c, head: t % TILE < 5, RESET, -7e-4),
}

OPTIONS = {
    "fp32-g": dict(g_dtype=FP32),
    "bf16-g": dict(g_dtype=BF16),
    "raw-keys": dict(g_dtype=FP32, l2norm=False, beta_sigmoid=False),
}


def inputs_with(pattern: str, HV: int, option: str) -> dict:
    inputs = inputs_for("zero", T=T, H=HV, **OPTIONS[option])
    inputs["g"] = PATTERNS[pattern](tuple(inputs["g"].shape)).to(inputs["g"].dtype)
    if option == "raw-keys":  # long ones, of which beta takes the square back
        inputs["k"], inputs["beta"] = inputs["k"] * 64, inputs["beta"] / 64**2
    return inputs


# On an H100 eight CTAs for a head, and one.
@pytest.mark.parametrize("HV", [2, 72], ids=["cluster", "single"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern(kernel_package, pattern, option, HV):
    inputs = inputs_with(pattern, HV, option)
    assert_accurate(kernel_package, inputs, run_op(kernel_package, inputs))


@pytest.mark.parametrize("HV", [2, 72], ids=["cluster", "single"])
@pytest.mark.parametrize("token", [16, 32, 37, 47, 63])
@pytest.mark.parametrize("value", [THRESHOLD - 1, RESET, -1e30, -math.inf], ids=lambda x: f"{x:.0f}")
def test_nothing_passes_a_reset(kernel_package, value, token, HV):
    """What was before a token that resets all channels changes no bit of what follows, however large it was."""
    inputs = inputs_for("zero", T=T, H=HV, g_dtype=FP32)
    inputs["g"] = -0.3 * uniform(0, 1, tuple(inputs["g"].shape))
    inputs["g"][:, token] = value
    expected = run_op(kernel_package, inputs)
    inputs["v"] = inputs["v"].clone()
    inputs["v"][:, :token] *= 2.0**60
    inputs["initial_state"] = inputs["initial_state"] * 2.0**60
    found = run_op(kernel_package, inputs)
    assert not torch.equal(found[0][:, :token], expected[0][:, :token])
    assert torch.equal(found[0][:, token:], expected[0][:, token:])
    assert torch.equal(found[1], expected[1])


def test_not_a_number_is_not_a_reset(kernel_package):
    """A NaN among the gates reaches its head's output from there on, as in the reference, and no other head."""
    inputs = inputs_with("channels", 4, "fp32-g")
    clean, _ = run_op(kernel_package, inputs)
    inputs["g"] = inputs["g"].clone()
    inputs["g"][0, 40, 1, 70] = math.nan
    found, state = run_op(kernel_package, inputs)
    others = [0, 2, 3]
    assert found[0, 40:, 1].isnan().all() and state[0, 1].isnan().any()
    assert torch.equal(found[:, :, others], clean[:, :, others])


@pytest.mark.parametrize("gate", ["softplus-init", "softplus-resets"])
@pytest.mark.parametrize("HV", [2, 72], ids=["cluster", "single"])
def test_softplus_with_resets_of_whole_tokens(kernel_package, gate, HV):
    """The benchmark's token-resets, in the kernel's own activation."""
    inputs = inputs_for(gate, T=130, H=HV)
    g = inputs["g"].float()
    inputs["g"] = torch.where(uniform(0, 1, tuple(g.shape[:3])).unsqueeze(-1) < 0.05, 400.0, g).to(BF16)
    assert_accurate(kernel_package, inputs, run_op(kernel_package, inputs))

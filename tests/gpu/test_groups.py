"""Short sequences, several of which a CTA takes one after another.

How many follows from the shapes and the number of SMs; the numbers here do so on an H100 with 132 SMs, as the first test
checks. On other devices they are more shapes. On Hopper and with the portable kernel.
"""

from __future__ import annotations

import math

import pytest
import torch
from harness import (
    DEVICE,
    TOKEN_INPUTS,
    TOLERANCE,
    assert_intermediate_states,
    assert_nan_and_nothing_else,
    assert_same_at_odd_addresses,
    inputs_for,
    launches,
    reference,
    run_op,
    sequences,
)
from kda_inputs import rel_rms

BF16, FP32 = torch.bfloat16, torch.float32

pytestmark = pytest.mark.usefixtures("each_kernel")

# More sequences than are put in order by length, and fewer: of no tokens, of some, of whole chunks.
PACKS = {
    "90-mixed": [37 * n % 97 if n % 5 else 0 for n in range(90)],
    "32-mixed": [53 * n % 131 if n % 4 else 0 for n in range(32)],
    "150-alike": [64] * 150,
    "one-long": [700, *[20] * 99],
}
H = 8

OPTIONS = {
    "lower-strong, bf16 g": ("lower-strong", dict(g_dtype=BF16)),
    "lower-weak, fp32 g": ("lower-weak", dict(g_dtype=FP32, state_v_first=True, state_dtype=BF16)),
    "softplus-init, bf16 g": ("softplus-init", dict(g_dtype=BF16, state_v_first=True)),
    "softplus-resets, fp32 g": ("softplus-resets", dict(g_dtype=FP32, initial_state=False)),
    "preactivated, bf16 g": ("lower-strong", dict(g_dtype=BF16, preactivated=True, beta_dtype=FP32)),
}


def accurate(kernel, inputs: dict, found) -> None:
    """Over all sequences: one of a few tokens alone may be off by more than so many tokens are."""
    expected = reference(kernel, inputs)
    assert max(rel_rms(want, got) for want, got in zip(expected, found)) <= TOLERANCE


def part(inputs: dict, n: int) -> dict:
    """Sequence n alone."""
    _, tokens = sequences(inputs)[n]
    alone = {name: inputs[name][:, tokens] for name in TOKEN_INPUTS}
    if inputs["initial_state"] is not None:
        alone["initial_state"] = inputs["initial_state"][n : n + 1]
    return inputs | alone | {"cu_seqlens": None}


def test_number_of_ctas(kernel_package, tmp_path):
    """Fewer than sequences and heads, where sequences are short; as many, where they are long or few."""
    shapes = {
        "64 x 128": (dict(lengths=[128] * 64, H=32), 8 * 32),
        "64 x 128, padded": (dict(B=64, T=128, H=32), 4 * 32),
        "8 x 1024": (dict(lengths=[1024] * 8, H=32), 8 * 32),
        "4 x 32": (dict(lengths=[32] * 4, H=32), 4 * 32),
    }
    calls = [inputs_for("lower-weak", **shape) for shape, _ in shapes.values()]
    found = [grid for grid, _ in launches(kernel_package, calls, tmp_path)]
    assert len(found) == len(calls)
    items = [math.prod((len(sequences(x)), x["v"].shape[2])) for x in calls]
    assert all(grid <= most for grid, most in zip(found, items))
    if torch.cuda.get_device_properties(DEVICE).multi_processor_count == 132:
        assert found == [expected for _, expected in shapes.values()]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pack", PACKS)
def test_accuracy(kernel_package, pack, options):
    gate, chosen = OPTIONS[options]
    inputs = inputs_for(gate, lengths=PACKS[pack], H=H, **chosen)
    found = run_op(kernel_package, inputs, chosen.get("state_dtype"))
    accurate(kernel_package, inputs, found)
    again = run_op(kernel_package, inputs, chosen.get("state_dtype"))
    assert all(torch.equal(x, y) for x, y in zip(found, again))


@pytest.mark.parametrize("pack", PACKS)
def test_a_sequence_does_not_depend_on_the_others(kernel_package, pack):
    """With a CTA to itself it gets the same bits."""
    inputs = inputs_for("softplus-init", lengths=PACKS[pack], H=H)
    o, final_state = run_op(kernel_package, inputs)
    for n in range(0, len(PACKS[pack]), 7):
        alone = run_op(kernel_package, part(inputs, n))
        _, tokens = sequences(inputs)[n]
        assert torch.equal(alone[0], o[:, tokens]) and torch.equal(alone[1][0], final_state[n]), n


@pytest.mark.parametrize("B, T", [(64, 33), (40, 128), (150, 1), (70, 64)])
def test_padded_batch(kernel_package, B, T):
    inputs = inputs_for("lower-weak", B=B, T=T, H=H)
    found = run_op(kernel_package, inputs)
    accurate(kernel_package, inputs, found)
    last = {name: inputs[name][-1:] for name in (*TOKEN_INPUTS, "initial_state")}
    alone = run_op(kernel_package, inputs | last)
    assert torch.equal(alone[0], found[0][-1:]) and torch.equal(alone[1], found[1][-1:])


def test_rows_at_odd_addresses(kernel_package):
    inputs = inputs_for("softplus-init", lengths=PACKS["90-mixed"], H=H)
    assert_same_at_odd_addresses(kernel_package, inputs)


def test_intermediate_states(kernel_package):
    inputs = inputs_for("lower-weak", lengths=PACKS["32-mixed"], H=H)
    assert_intermediate_states(kernel_package, inputs)


def test_nan_stays_in_its_sequence(kernel_package):
    inputs = inputs_for("softplus-init", lengths=[40] * 100, H=H)
    expected = run_op(kernel_package, inputs)
    dirty = {name: inputs[name].clone() for name in TOKEN_INPUTS}
    for x in dirty.values():
        x[:, 400:440] = float("nan")
    found = run_op(kernel_package, inputs | dirty)
    assert found[0][:, 400:440].isnan().all() and found[1][10].isnan().all()
    for n in (0, 9, 11, 12, 60, 99):
        tokens = slice(40 * n, 40 * n + 40)
        assert torch.equal(expected[0][:, tokens], found[0][:, tokens]), n
        assert torch.equal(expected[1][n], found[1][n]), n


def test_bad_cu_seqlens(kernel_package):
    inputs = inputs_for("lower-weak", lengths=[40] * 100, H=H)
    inputs["cu_seqlens"][50] += 41
    assert_nan_and_nothing_else(kernel_package, inputs)

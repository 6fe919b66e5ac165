"""The prefill kernel with every number of CTAs that a head can get on Hopper: clusters of 8, 5, 4, 3, 2, and one.

The number follows from N * HV and the device. The numbers here reach all of them on an H100 with 132 SMs, as the
first test checks; on other devices they are more shapes for the one kernel there is.
"""

from __future__ import annotations

import pytest
import torch
from harness import (
    DEVICE,
    TOKEN_INPUTS,
    assert_accurate,
    assert_intermediate_states,
    assert_nan_and_nothing_else,
    assert_same_at_odd_addresses,
    inputs_for,
    launches,
    run_op,
    sequences,
)
from kda_inputs import rel_rms

BF16, FP32 = torch.bfloat16, torch.float32

# Both kernels round the same factors and differ in the order of sums, so that here and there a number is
# rounded to bf16 the other way. One rounding of everything is 1.7e-3.
ROUNDING = 1.7e-3

# Items of work, N * HV: shapes of a padded batch.
SHAPES = {
    2: dict(B=1, H=2),
    18: dict(B=2, H=9),
    30: dict(B=2, H=15),
    40: dict(B=1, H=40),
    60: dict(B=3, H=10, HV=20),
    72: dict(B=2, H=36),
}
# Of a head; how many clusters run at once is not the same on every H100.
CTAS = {2: {8}, 18: {4, 5}, 30: {3, 4}, 40: {2, 3}, 60: {2}, 72: {1}}
THREADS = {True: 640, False: 512}  # in a cluster, alone

every_size = pytest.mark.parametrize("items", SHAPES)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="clusters are Hopper's"
)
@pytest.mark.parametrize("g_dtype", [BF16, FP32], ids=["bf16-g", "fp32-g"])
def test_number_of_ctas(kernel_package, g_dtype, tmp_path):
    calls = [inputs_for("lower-weak", T=33, g_dtype=g_dtype, **shape) for shape in SHAPES.values()]
    sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    found = launches(kernel_package, calls, tmp_path)
    assert len(found) == len(calls)
    sizes = []
    for items, (grid, threads) in zip(SHAPES, found):
        ctas, rest = divmod(grid, items)
        assert rest == 0 and ctas in (1, 2, 3, 4, 5, 8) and threads == THREADS[ctas > 1], (
            f"{items}: {grid} CTAs"
        )
        assert ctas == 1 or grid <= sms, f"{items}: {grid} CTAs on {sms} SMs"
        sizes.append(ctas)
    assert sizes == sorted(sizes, reverse=True)
    if sms == 132:
        assert all(ctas in CTAS[items] for items, ctas in zip(SHAPES, sizes)), sizes


def check(kernel, inputs: dict, state_dtype: torch.dtype | None = None) -> None:
    """Accurate, the same bits twice, and what the portable kernel gives but for rounding."""
    found = run_op(kernel, inputs, state_dtype)
    assert_accurate(kernel, inputs, found)
    again = run_op(kernel, inputs, state_dtype)
    assert all(torch.equal(x, y) for x, y in zip(found, again))
    portable = run_op(kernel, inputs, state_dtype, portable=True)
    for b, tokens in sequences(inputs):
        assert rel_rms(portable[0][b, tokens], found[0][b, tokens]) <= ROUNDING
    assert rel_rms(portable[1], found[1]) <= ROUNDING


# Each gate in both dtypes and each layout of the state in both gates' ways (bounded and decay tree).
OPTIONS = {
    "lower-strong, bf16 g": ("lower-strong", dict(g_dtype=BF16)),
    "lower-strong, fp32 g": ("lower-strong", dict(g_dtype=FP32, state_v_first=True, state_dtype=BF16)),
    "softplus-init, bf16 g": ("softplus-init", dict(g_dtype=BF16, state_v_first=True)),
    "softplus-resets, fp32 g": ("softplus-resets", dict(g_dtype=FP32, initial_state=False)),
    "preactivated, bf16 g": ("lower-strong", dict(g_dtype=BF16, preactivated=True, beta_dtype=FP32)),
    "preactivated, fp32 g": ("softplus-init", dict(g_dtype=FP32, preactivated=True, l2norm=False)),
    "mixed-channels, bf16 g": ("mixed-channels", dict(g_dtype=BF16, state_v_first=True)),
}


@pytest.mark.parametrize("options", OPTIONS)
@every_size
def test_every_size(kernel_package, items, options):
    """49 chunks, more than twice the slots of all CTAs of any cluster, the last of 13 tokens."""
    gate, chosen = OPTIONS[options]
    check(kernel_package, inputs_for(gate, T=1549, **SHAPES[items], **chosen), chosen.get("state_dtype"))


@pytest.mark.parametrize("gate", ["lower-strong", "softplus-init"])
def test_a_head_does_not_depend_on_how_many_there_are(kernel_package, gate):
    """By one CTA or by a cluster of any size, a head gets the same bits."""
    every = inputs_for(gate, T=301, H=72)
    o, final_state = run_op(kernel_package, every)
    for heads in (60, 40, 30, 18, 2):
        few = {name: x[:, :, :heads] for name, x in every.items() if name in TOKEN_INPUTS}
        few |= {name: every[name][:heads] for name in ("A_log", "dt_bias")}
        few["initial_state"] = every["initial_state"][:, :heads].contiguous()
        found = run_op(kernel_package, every | few)
        assert torch.equal(found[0], o[:, :, :heads]) and torch.equal(found[1], final_state[:, :heads])


@pytest.mark.parametrize("g_dtype", [BF16, FP32], ids=["bf16-g", "fp32-g"])
@pytest.mark.parametrize("T", [1, 31, 32, 33, 3 * 32, 24 * 32 + 1, 2 * 24 * 32 + 1])
def test_length_with_one_head(kernel_package, T, g_dtype):
    """Eight CTAs with three own slots each: the last two have all of them once and twice, and come to the first again."""
    check(kernel_package, inputs_for("lower-weak", T=T, H=1, g_dtype=g_dtype))


PACKS = {
    "40-mixed": [37 * n % 211 if n % 4 else 0 for n in range(40)],  # more than are put in order by length
    "32-mixed": [53 * n % 131 if n % 5 else 0 for n in range(32)],
    "33-rising": list(range(33)),
    "ties": [50, 120, 50, 0, 120],
    "all-alike": [64] * 5,
}


@pytest.mark.parametrize("H", [1, 2, 16])
@pytest.mark.parametrize("pack", PACKS)
def test_pack(kernel_package, pack, H):
    check(kernel_package, inputs_for("lower-weak" if H % 2 else "softplus-init", lengths=PACKS[pack], H=H))


def test_order_of_the_sequences_changes_nothing(kernel_package):
    """The kernel takes them by length; each has its own tokens and states, wherever it stands."""
    lengths = [200, 33, 33, 0, 65]
    inputs = inputs_for("lower-weak", lengths=lengths, H=2)
    o, final_state = run_op(kernel_package, inputs)
    order = [3, 2, 4, 0, 1]
    parts = [tokens for _, tokens in sequences(inputs)]
    turned = {name: torch.cat([inputs[name][:, parts[n]] for n in order], dim=1) for name in TOKEN_INPUTS}
    turned["initial_state"] = inputs["initial_state"][order]
    turned["cu_seqlens"] = torch.tensor([0, *(lengths[n] for n in order)], device=DEVICE).cumsum(0)
    turned_o, turned_state = run_op(kernel_package, {**inputs, **turned})
    assert torch.equal(turned_o, torch.cat([o[:, parts[n]] for n in order], dim=1))
    assert torch.equal(turned_state, final_state[order])


@every_size
def test_rows_at_odd_addresses(kernel_package, items):
    """Loaded element by element, for the same bits."""
    inputs = inputs_for("softplus-init", T=301, **SHAPES[items])
    assert_same_at_odd_addresses(kernel_package, inputs)


@pytest.mark.parametrize("H", [1, 9, 15, 20, 30, 36])
def test_bad_cu_seqlens(kernel_package, H):
    """Two sequences: every CTA of a cluster leaves at once, and between them all is NaN and nothing else."""
    inputs = inputs_for("lower-weak", lengths=(50, 50), H=H)
    inputs["cu_seqlens"] += torch.tensor([0, 51, 0], device=DEVICE)
    assert_nan_and_nothing_else(kernel_package, inputs)


@pytest.mark.parametrize("H", [1, 9, 15, 20, 30, 36])
def test_intermediate_states(kernel_package, H):
    """Two sequences of eight chunks; where they meet, states of 64 tokens have their own places."""
    inputs = inputs_for("lower-weak", lengths=(193, 63), H=H, state_v_first=H % 2 == 0)
    assert_intermediate_states(kernel_package, inputs)

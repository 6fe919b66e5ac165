"""The prefill kernels for GPUs, without one: their sources, compiled as C++ and run by tests/emulator.

What is wrong in how lanes, warps and CTAs work together shows here: the emulator runs them in an order that a seed
chooses. What it can't show is what the compiler makes of the sources for a GPU, and any speed.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from emulator_build import SHARED, Emulated
from harness import TOLERANCE, guarded_out, misaligned, op_arguments, run_op, worst_errors
from kda_inputs import GATES, make_inputs, prefix_states, rel_rms, to_float64

pytestmark = pytest.mark.usefixtures("one_thread")

BF16, FP32 = torch.bfloat16, torch.float32

SIZES = (1, 2, 3, 4)  # of clusters
SEEDS = range(3)
# Sequences of one token, none, a chunk and a token, and of more chunks than any cluster has slots.
LENGTHS = (1, 0, 33, 720)


def inputs_of(gate: str, lengths=LENGTHS, **options) -> dict:
    bounds = [0, *itertools.accumulate(lengths)]
    options = {"H": 1, "HV": 2, "initial_state": True, **options}
    return make_inputs(gate, B=1, T=bounds[-1], cu_seqlens=bounds, **options)


def check(
    emulated: Emulated, inputs: dict, devices: list[dict], state_dtype=None, portable: bool = False
) -> None:
    """Accurate, and the same bits on every device, in any order."""
    expected = emulated.reference.chunk_kda(**to_float64(inputs))
    first = None
    for device in devices:
        emulated.use(**device)
        found = run_op(emulated, inputs, state_dtype, portable)
        errors = worst_errors(inputs, found, expected)
        assert max(errors) <= TOLERANCE, f"{device}: relative RMS errors of o and the state {errors}"
        first = first or found
        assert all(torch.equal(x, y) for x, y in zip(first, found)), f"{device}: not the bits of {devices[0]}"


# Each gate in both dtypes, both layouts of the state, and every way to the factors.
OPTIONS = {
    "lower-strong, bf16 g": ("lower-strong", dict(g_dtype=BF16)),
    "lower-weak, fp32 g": ("lower-weak", dict(g_dtype=FP32, state_v_first=True, state_dtype=BF16)),
    "softplus-init, bf16 g": ("softplus-init", dict(g_dtype=BF16, state_v_first=True)),
    "softplus-resets, fp32 g": ("softplus-resets", dict(g_dtype=FP32, initial_state=False)),
    "softplus-resets, bf16 g": ("softplus-resets", dict(g_dtype=BF16, beta_sigmoid=False)),
    "preactivated, bf16 g": ("lower-strong", dict(g_dtype=BF16, preactivated=True, beta_dtype=FP32)),
    "preactivated, fp32 g": ("softplus-init", dict(g_dtype=FP32, preactivated=True, l2norm=False)),
    "mixed-channels, bf16 g": (
        "mixed-channels",
        dict(g_dtype=BF16, state_v_first=True, allow_neg_eigval=True),
    ),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_hopper_kernel(emulated, options):
    """Whatever the cluster's size and the order, a head gets the same bits."""
    gate, chosen = OPTIONS[options]
    devices = [dict(cluster_ctas=ctas, seed=seed) for ctas, seed in itertools.product(SIZES, SEEDS)]
    check(emulated, inputs_of(gate, **chosen), devices, chosen.get("state_dtype"))


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("options", OPTIONS)
def test_portable_kernel(emulated, options, capability):
    gate, chosen = OPTIONS[options]
    devices = [dict(shared_bytes=SHARED[capability], seed=seed) for seed in SEEDS]
    check(emulated, inputs_of(gate, **chosen), devices, chosen.get("state_dtype"), portable=True)


@pytest.mark.parametrize("ctas", SIZES)
def test_every_length(emulated, ctas):
    """Of up to 300 tokens, that a ring starts, wraps around and ends in all its slots."""
    lengths = [*range(0, 70, 3), *range(95, 300, 32)]
    inputs = inputs_of("lower-weak", lengths, HV=1)
    check(emulated, inputs, [dict(cluster_ctas=ctas, seed=seed) for seed in (10, 11)])


@pytest.mark.parametrize("ctas", SIZES)
@pytest.mark.parametrize("v_first", [False, True], ids=["k-first", "v-first"])
def test_intermediate_states(emulated, ctas, v_first):
    lengths = (64, 0, 1, 63, 65, 330)
    inputs = inputs_of("softplus-init", lengths, state_v_first=v_first)
    states = torch.full((1, sum(-(-n // 64) for n in lengths), 2, 128, 128), float("nan"), dtype=BF16)
    emulated.use(ctas, seed=ctas)
    emulated.ops.kda_prefill(*op_arguments(inputs, guarded_out(inputs)[1], None), states)
    assert rel_rms(prefix_states(emulated.reference, inputs), states) <= TOLERANCE


@pytest.mark.parametrize("ctas", SIZES)
def test_misaligned_rows(emulated, ctas):
    inputs = inputs_of("lower-strong", (97, 40))
    inputs.update((name, misaligned(inputs[name])) for name in ("q", "k", "v", "g"))
    check(emulated, inputs, [dict(cluster_ctas=ctas)])


@pytest.mark.parametrize("ctas", SIZES)
def test_misaligned_out(emulated, ctas):
    inputs = inputs_of("lower-strong", (97, 40))
    expected = emulated.reference.chunk_kda(**to_float64(inputs))[0]
    out = misaligned(torch.full_like(inputs["v"], float("nan")))
    emulated.use(ctas)
    emulated.ops.kda_prefill(*op_arguments(inputs, out, None))
    assert rel_rms(expected, out) <= TOLERANCE


@pytest.mark.parametrize("ctas", SIZES)
@pytest.mark.parametrize("names", [("q", "k"), ("v",), ("g",)], ids=" ".join)
def test_expanded_heads(emulated, names, ctas):
    """Heads that share their rows, one tensor of which no tensor copy can be."""
    inputs = inputs_of("softplus-init", (97, 40), H=2)
    inputs.update((name, inputs[name][:, :, :1].expand_as(inputs[name])) for name in names)
    check(emulated, inputs, [dict(cluster_ctas=ctas)])


@pytest.mark.parametrize("ctas", SIZES)
@pytest.mark.parametrize("batch, length", [(3, 70), (2, 32), (1, 33)])
def test_padded_batches(emulated, batch, length, ctas):
    """Whose last chunk's rows are followed by the next sequence's, or by none."""
    inputs = make_inputs("lower-weak", B=batch, T=length, H=1, HV=2, initial_state=True)
    check(emulated, inputs, [dict(cluster_ctas=ctas)])


@pytest.mark.parametrize("ctas", SIZES)
def test_nan_stays_in_its_sequence(emulated, ctas):
    clean, dirty = (inputs_of("softplus-init", (40, 33, 70)) for _ in range(2))
    for name in ("q", "k", "v", "g", "beta"):
        dirty[name][:, 40:73] = float("nan")
    emulated.use(ctas)
    expected, found = run_op(emulated, clean), run_op(emulated, dirty)
    for tokens, n in ((slice(0, 40), 0), (slice(73, None), 2)):
        assert torch.equal(expected[0][:, tokens], found[0][:, tokens]) and torch.equal(
            expected[1][n], found[1][n]
        )
    assert found[0][:, 40:73].isnan().all()


@pytest.mark.parametrize("ctas", SIZES)
def test_bad_bounds_poison_the_results(emulated, ctas):
    inputs = inputs_of("lower-weak", (50, 50))
    inputs["cu_seqlens"][1] = 150
    emulated.use(ctas)
    out, final_state = run_op(emulated, inputs)
    assert out.isnan().all() and final_state.isnan().all()


def test_number_of_gates():
    """Each gate of the tests' inputs stands in OPTIONS, but the one that does nothing."""
    assert {gate for gate, _ in OPTIONS.values()} == set(GATES) - {"zero"}


# What is said of the kernels of tests/emulator/faults.cpp, one after another.
FAULTS = (
    "all threads wait",
    "more arrivals at a barrier than a phase has",
    "the lanes of a warp are in different collectives",
    "all threads wait .*__syncwarp",
    "an address that a copy is writing to",
    "a thread ends with copies that no barrier waits for",
    "a misaligned address",
    "an address behind shared memory",
    "another CTA's shared memory",
    "no barrier there",
    "a barrier of a CTA that has ended",
    "the address of what is not in shared memory",
    "a misaligned address",
    "shared memory that is declared in more than one piece",
    "an address that a copy is writing to",
    "a thread ends with copies that shared memory has to outlive",
    "a swizzled box at an odd address",
    "two threads at one place in shared memory",
    "two threads at one place in shared memory",
    "a place that a copy is on its way to",
    "^$",
)


def test_emulator_finds_faults(emulated):
    emulated.use(cluster_ctas=2)
    assert emulated.library.emulator_faults() == len(FAULTS)
    for index, expected in enumerate(FAULTS):
        said = emulated.library.emulator_fault(index).decode()
        assert re.search(expected, said), f"{index}: {said!r}"


def test_emulator_runs_in_many_orders(emulated):
    """What is read too early is there or not: another's store, an own copy, another CTA's store, a copy's source."""
    for race in range(emulated.library.emulator_races()):
        found = set()
        for seed in range(20):
            emulated.use(cluster_ctas=2, seed=seed)
            found.add(emulated.library.emulator_race(race))
        assert found == {0, 1}, f"race {race}"

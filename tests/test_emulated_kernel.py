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

SIZES = (1, 2, 3, 4, 5, 8)  # of clusters
SEEDS = range(3)
# Sequences of one token, none, a chunk and a token, and of more chunks than any cluster's CTAs have slots of their own.
LENGTHS = (1, 0, 33, 800)


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


# More sequences than are put in order by length, and fewer: of no tokens, of some, of whole chunks.
SHORT = {
    "40": [37 * n % 71 if n % 4 else 0 for n in range(40)],
    "14": [0, 64, 1, 33, 0, 0, 96, 5, 5, 128, 40, 64, 31, 0],
}
ORDERS = SEEDS[:2]


def check_sharing(
    emulated: Emulated, inputs: dict, num_sequences: int, state_dtype=None, portable: bool = False, **device
) -> None:
    """Accurate, and whatever a CTA does before and after, a sequence gets the bits that a CTA of its own gives."""
    emulated.use(**device)
    alone = run_op(emulated, inputs, state_dtype, portable)
    assert emulated.library.emulator_ctas() == 2 * num_sequences
    expected = emulated.reference.chunk_kda(**to_float64(inputs))
    assert max(rel_rms(want, got) for want, got in zip(expected, alone)) <= TOLERANCE
    for seed in ORDERS:
        emulated.use(sms=1, seed=seed, **device)
        found = run_op(emulated, inputs, state_dtype, portable)
        assert emulated.library.emulator_ctas() < 2 * num_sequences
        assert all(torch.equal(x, y) for x, y in zip(alone, found))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", SHORT)
def test_short_sequences_share_a_cta(emulated, lengths, options):
    gate, chosen = OPTIONS[options]
    inputs = inputs_of(gate, SHORT[lengths], **chosen)
    check_sharing(emulated, inputs, len(SHORT[lengths]), chosen.get("state_dtype"))


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("options", ["lower-strong, bf16 g", "softplus-resets, fp32 g"])
def test_short_sequences_share_a_portable_cta(emulated, options, capability):
    gate, chosen = OPTIONS[options]
    inputs = inputs_of(gate, SHORT["14"], **chosen)
    check_sharing(emulated, inputs, len(SHORT["14"]), portable=True, shared_bytes=SHARED[capability])


@pytest.mark.parametrize("batch, length", [(20, 33), (9, 64), (3, 1)])
def test_short_sequences_of_a_padded_batch_share_a_cta(emulated, batch, length):
    inputs = make_inputs("lower-weak", B=batch, T=length, H=1, HV=2, initial_state=True)
    check_sharing(emulated, inputs, batch)


@pytest.mark.parametrize("misaligned_names", [("q", "k", "v", "g"), ()], ids=["misaligned", "aligned"])
def test_intermediate_states_of_sequences_that_share_a_cta(emulated, misaligned_names):
    lengths = SHORT["14"]
    inputs = inputs_of("softplus-init", lengths)
    inputs.update((name, misaligned(inputs[name])) for name in misaligned_names)
    states = torch.full((1, sum(-(-n // 64) for n in lengths), 2, 128, 128), float("nan"), dtype=BF16)
    emulated.use(sms=1)
    emulated.ops.kda_prefill(*op_arguments(inputs, guarded_out(inputs)[1], None), states)
    assert emulated.library.emulator_ctas() < 2 * len(lengths)
    assert rel_rms(prefix_states(emulated.reference, inputs), states) <= TOLERANCE


def test_nan_stays_in_its_sequence_among_those_that_share_a_cta(emulated):
    clean, dirty = (inputs_of("softplus-init", [40, 33, 70] * 4) for _ in range(2))
    for name in ("q", "k", "v", "g", "beta"):
        dirty[name][:, 40:73] = float("nan")
    emulated.use(sms=1)
    expected, found = run_op(emulated, clean), run_op(emulated, dirty)
    assert emulated.library.emulator_ctas() < 2 * 12
    assert torch.equal(expected[0][:, :40], found[0][:, :40]) and torch.equal(
        expected[0][:, 73:], found[0][:, 73:]
    )
    assert torch.equal(expected[1][0], found[1][0]) and torch.equal(expected[1][2:], found[1][2:])
    assert found[0][:, 40:73].isnan().all()


@pytest.mark.parametrize("ends", [[50] * 12, range(60, 0, -5)], ids=["too few tokens", "falling"])
def test_bad_bounds_of_sequences_that_share_a_cta(emulated, ends):
    inputs = inputs_of("lower-weak", [5] * 12)
    inputs["cu_seqlens"][1:] = torch.tensor(list(ends))
    emulated.use(sms=1)
    out, final_state = run_op(emulated, inputs)
    assert emulated.library.emulator_ctas() < 2 * 12
    assert out.isnan().all() and final_state.isnan().all()


# Sequences by their lengths, SMs, and how many CTAs each of two heads gets.
GROUPS = [
    ([40] * 16, 132, 16),  # an SM for each
    ([40] * 16, 2, 1),
    ([40] * 17, 2, 2),  # more than a CTA takes
    ([520] * 4, 1, 4),  # two may be long and short ones
    ([2080] + [0] * 3, 1, 4),
]


@pytest.mark.parametrize("lengths, sms, groups", GROUPS)
def test_number_of_ctas_of_packed_sequences(emulated, lengths, sms, groups):
    emulated.use(sms=sms)
    run_op(emulated, inputs_of("lower-weak", lengths))
    assert emulated.library.emulator_ctas() == 2 * groups


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

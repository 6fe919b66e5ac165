"""The decode kernel against the float64 reference: sizes, options, layouts, pools, drafts, long decoding."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from decode_harness import BF16, FP32, TOLERANCE, check, inputs_for, pool_for, run
from decode_inputs import shuffled_slots
from harness import DEVICE
from harness import TOLERANCE as PREFILL_TOLERANCE
from kda_inputs import GATES, conv_layout, make_inputs, rel_rms, to_float64

NAN = float("nan")
TOKENS = ("q", "k", "v", "g", "beta")


def some_options(seed: str) -> dict:
    """One choice of everything but sizes, the same for the same seed."""
    pick = random.Random(seed).choice
    sigmoid = pick([True, True, False])
    return dict(
        gate=pick(list(GATES)), g_dtype=pick([BF16, FP32]), beta_dtype=pick([BF16, FP32]),
        state_dtype=pick([BF16, FP32]), state_v_first=pick([False, True]), l2norm=pick([True, True, False]),
        beta_sigmoid=sigmoid, allow_neg_eigval=sigmoid and pick([False, True]),
        preactivated=pick([False, True]), scale=pick([None, 0.25]),
        initial_state=pick([True, True, True, False]),
    )  # fmt: skip


SIZES = [
    (N, T, HV)
    for N, T, HV in itertools.product((1, 5, 32, 300), (1, 2, 4, 16, 64), (1, 2, 32, 128))
    if N * T * HV <= 9600
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"N{s[0]}-T{s[1]}-HV{s[2]}")
def test_sizes(kernel_package, sizes):
    """Sizes of all kinds, each with some of the options; in place where there is a state."""
    N, T, HV = sizes
    options = some_options(str(sizes))
    group = random.Random(str(sizes)).choice([g for g in (1, 2, 4) if HV % g == 0])
    x = inputs_for(options.pop("gate"), N, T, HV // group, HV, **options)
    check(kernel_package, x)
    if x["initial_state"] is not None:
        check(kernel_package, x, inplace=True)


@pytest.mark.parametrize("state_v_first", [False, True], ids=["k-first", "v-first"])
@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("beta_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("g_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_gates(kernel_package, gate, g_dtype, beta_dtype, state_dtype, state_v_first):
    x = inputs_for(
        gate, 3, 3, 2, 4, g_dtype=g_dtype, beta_dtype=beta_dtype, state_dtype=state_dtype,
        state_v_first=state_v_first,
    )  # fmt: skip
    check(kernel_package, x)


@pytest.mark.parametrize("l2norm", [False, True], ids=["as-given", "l2norm"])
@pytest.mark.parametrize("beta", ["given", "sigmoid", "negative-eigenvalues"])
@pytest.mark.parametrize("preactivated", [False, True], ids=["raw-gate", "log-decay"])
def test_what_is_activated_inside(kernel_package, preactivated, beta, l2norm):
    x = inputs_for(
        "softplus-init", 3, 2, 2, preactivated=preactivated, l2norm=l2norm, scale=0.3,
        beta_sigmoid=beta != "given", allow_neg_eigval=beta == "negative-eigenvalues",
    )  # fmt: skip
    check(kernel_package, x)


@pytest.mark.parametrize("missing", [["A_log"], ["dt_bias"], ["A_log", "dt_bias"]], ids="+".join)
def test_optional_gate_parameters(kernel_package, missing):
    check(kernel_package, inputs_for("lower-weak", 2, 2, 2) | dict.fromkeys(missing))


@pytest.mark.parametrize("initial_state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lengths", [[0, 3, 1, 0, 20, 0], [1] * 40, [0, 0], [65]], ids=str)
def test_ragged_batches(kernel_package, lengths, dtype, initial_state):
    x = inputs_for("lower-weak", lengths=lengths, cu_seqlens_dtype=dtype, initial_state=initial_state)
    check(kernel_package, x)
    if initial_state:
        check(kernel_package, x, inplace=True)


@pytest.mark.parametrize(
    "bounds", [[1, 5, 20], [0, 25, 20], [0, 5, 19], [0, -3, 20], [0, 5, 2**31 - 1]], ids=str
)
@pytest.mark.parametrize("pooled", [False, True], ids=["states", "pool"])
def test_wrong_cu_seqlens(kernel_package, bounds, pooled):
    """All outputs and final states are NaN, and no state of the caller is touched."""
    x = inputs_for("lower-weak", lengths=[5, 15])
    x["cu_seqlens"] = torch.tensor(bounds, device=DEVICE)
    where = dict(state=pool_for(x, 6), indices=torch.tensor([4, 1], device=DEVICE)) if pooled else {}
    given = where.get("state", x["initial_state"])
    before = given.clone()
    o, final_state = run(kernel_package, x, **where)
    assert o.isnan().all() and final_state.isnan().all() and torch.equal(given, before)
    o, state = run(kernel_package, x, inplace=True, **where)
    assert o.isnan().all() and torch.equal(state, before)


def test_no_tokens_and_no_sequences(kernel_package):
    check(kernel_package, inputs_for("lower-weak", 3, 0))
    check(kernel_package, inputs_for("lower-weak", 0, 3))
    x = inputs_for("lower-weak", 2, 0)
    slots = torch.tensor([3, 1], device=DEVICE)
    for inplace in (False, True):
        check(kernel_package, x, state=pool_for(x, 5), indices=slots, inplace=inplace)


# ------------------------------------------------------------------------------------------------ layouts


def in_wider_rows(x: torch.Tensor) -> torch.Tensor:
    """The same values as a part of a larger tensor, every row misaligned to anything but its own dtype."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 9), NAN, dtype=x.dtype, device=x.device)
    return wide.narrow(-1, 3, x.shape[-1]).copy_(x)


def heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def behind_others(x: torch.Tensor) -> torch.Tensor:
    """One of four tensors side by side, as a fused projection gives q, k and v: aligned rows, far apart."""
    wide = torch.full((*x.shape[:2], 4, *x.shape[2:]), NAN, dtype=x.dtype, device=x.device)
    wide[:, :, 2] = x
    return wide[:, :, 2]


@pytest.mark.parametrize("layout", [in_wider_rows, heads_first, behind_others], ids=lambda f: f.__name__)
@pytest.mark.parametrize("g_dtype", [FP32, BF16], ids=str)
def test_strides(kernel_package, layout, g_dtype):
    x = inputs_for("softplus-init", 5, 3, 2, 4, g_dtype=g_dtype)
    want = run(kernel_package, x)
    strided = {name: layout(x[name]) for name in TOKENS}
    assert not any(y.is_contiguous() for y in strided.values())
    assert all(torch.equal(a, b) for a, b in zip(want, run(kernel_package, x | strided)))
    out = layout(torch.full_like(x["v"], NAN))
    kernel_package.fused_recurrent_kda(**x | strided, out=out)
    assert torch.equal(out, want[0])


@pytest.mark.parametrize("name", TOKENS)
def test_one_misaligned_input(kernel_package, name):
    x = inputs_for("lower-weak", 3, 2, 2)
    want = run(kernel_package, x)
    found = run(kernel_package, x | {name: in_wider_rows(x[name])})
    assert all(torch.equal(a, b) for a, b in zip(want, found))


def test_convolution_layout_through_the_public_call(kernel_package):
    x = inputs_for("softplus-init", 3, 4, 2)
    strided = {name: conv_layout(x[name]) for name in ("q", "k", "v")}
    found = kernel_package.fused_recurrent_kda(**x | strided)
    assert all(torch.equal(a, b) for a, b in zip(run(kernel_package, x), found))


# -------------------------------------------------------------------------------------------------- pools


@pytest.mark.parametrize("inplace", [False, True], ids=["final-state", "in-place"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("state_v_first", [False, True], ids=["k-first", "v-first"])
def test_pool(kernel_package, state_v_first, state_dtype, index_dtype, inplace):
    x = inputs_for("lower-weak", 37, 1, 2, 4, state_v_first=state_v_first)
    pool = pool_for(x, 50, dtype=state_dtype)
    slots = shuffled_slots(37, 50, device=DEVICE, dtype=index_dtype)
    slots[::5] = -1
    check(kernel_package, x, state=pool, indices=slots, inplace=inplace)


@pytest.mark.parametrize("slot", [-2, 6, 7, -(2**31), 2**31 - 1, 2**32 + 1, 2**40, -(2**62)])
@pytest.mark.parametrize("inplace", [False, True], ids=["final-state", "in-place"])
def test_slots_that_are_not_there(kernel_package, inplace, slot):
    x = inputs_for("lower-weak", 4, 2, 2)
    dtype = torch.int32 if -(2**31) <= slot < 2**31 else torch.int64
    slots = torch.tensor([5, slot, 0, -1], device=DEVICE, dtype=torch.int64).to(dtype)
    check(kernel_package, x, state=pool_for(x, 6), indices=slots, inplace=inplace)


def test_a_graph_s_padding_rows(kernel_package):
    """A batch of which all but a few rows are padding, ragged too."""
    x = inputs_for("lower-weak", 64, 1, 4)
    slots = torch.full((64,), -1, device=DEVICE, dtype=torch.int32)
    slots[7] = 2
    check(kernel_package, x, state=pool_for(x, 3), indices=slots, inplace=True)
    x = inputs_for("lower-weak", lengths=[2, 0, 3, 1, 0])
    slots = torch.tensor([-1, -1, 1, 2, 0], device=DEVICE)
    check(kernel_package, x, state=pool_for(x, 3), indices=slots, inplace=True)


@pytest.mark.parametrize("accepted", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("state_v_first", [False, True], ids=["k-first", "v-first"])
def test_states_after_every_token(kernel_package, state_v_first, state_dtype, accepted):
    x = inputs_for("lower-weak", 6, 4, 2, 4, state_v_first=state_v_first)
    slots = shuffled_slots(24, 40, device=DEVICE).view(6, 4)
    slots[1, 2] = -1  # a state that is not kept
    counts = None
    if accepted is not None:
        counts = torch.tensor([accepted, 1, 5 - accepted, 4, 2, 3], device=DEVICE, dtype=torch.int32)
    check(
        kernel_package, x, state=pool_for(x, 40, dtype=state_dtype), indices=slots, accepted=counts,
        inplace=True,
    )  # fmt: skip


def test_wrong_rows_of_drafts(kernel_package):
    """A wrong slot behind any token, a count outside [1, T_max], more tokens than slots: NaN, nothing stored.
    Slots behind the last token are not looked at."""
    x = inputs_for("lower-weak", lengths=[3, 2, 3, 0, 4, 1, 2, 2])
    slots = torch.tensor(
        [
            [0, 1, 99],
            [2, 3, 99],
            [4, -7, 5],
            [99, 99, 99],
            [6, 7, 8],
            [9, 99, 99],
            [10, 11, 12],
            [13, 14, 15],
        ],
        device=DEVICE,
    )
    for counts in ([1] * 8, [1, 0, 1, 1, 1, -1, 4, 2], [1, 2**31 - 1, 1, 1, 1, 1, 2, 3]):
        counts = torch.tensor(counts, device=DEVICE)
        check(kernel_package, x, state=pool_for(x, 17), indices=slots, accepted=counts, inplace=True)


def test_indices_with_strides(kernel_package):
    x = inputs_for("lower-weak", 4, 2, 1)
    table = torch.tensor([[0, 9, 1], [2, 9, 3], [5, 9, 4], [6, 9, 7]], device=DEVICE)
    counts = torch.tensor([[1, 9], [2, 9], [1, 9], [2, 9]], device=DEVICE)[:, 0]
    for slots, accepted in (
        (table[:, 0], None),
        (table[:, ::2], counts),
        (table[:, ::2].mT.contiguous().mT, counts),
    ):
        check(kernel_package, x, state=pool_for(x, 8), indices=slots, accepted=accepted, inplace=True)


def test_offsets_beyond_32_bits(kernel_package):
    """A pool of more than 2^31 elements in which the live slots lie at both ends."""
    x = inputs_for("lower-weak", 4, 2, 32)
    slots = 2**31 // (32 * 128 * 128) + 64
    if torch.cuda.mem_get_info()[0] < 3 * slots * 32 * 128 * 128:
        pytest.skip("too little memory for a pool of 2^31 elements")
    small = pool_for(x, 8, dtype=BF16)
    pool = torch.zeros(slots, 32, 128, 128, dtype=BF16, device=DEVICE)
    assert pool.numel() > 2**31
    live = [slots - 1, 0, slots - 60, 1, slots - 2, 2, slots - 3, 3]
    pool[live] = small
    near = torch.arange(8, device=DEVICE).view(4, 2)
    far = torch.tensor(live, device=DEVICE).view(4, 2)
    want_o, want = run(kernel_package, x, state=small, indices=near, inplace=True)
    o, _ = run(kernel_package, x, state=pool, indices=far, inplace=True)
    assert torch.equal(o, want_o) and torch.equal(pool[live], want)
    norms = torch.linalg.vector_norm(pool.flatten(1), ord=float("inf"), dim=1, dtype=FP32)
    norms[live] = 0
    assert not norms.any(), "another slot was written"


# ------------------------------------------------------------------------------ isolation, repetition, length


@pytest.mark.parametrize("name", [*TOKENS, "state"])
def test_nan_stays_in_its_sequence_and_head(kernel_package, name):
    x = inputs_for("lower-weak", 5, 2, 3)
    slots = shuffled_slots(5, 9, device=DEVICE)
    pool = pool_for(x, 9)
    clean_o, clean = run(kernel_package, x, state=pool.clone(), indices=slots, inplace=True)
    if name == "state":
        pool[slots[3].item(), 1, 5, 7] = NAN
    else:
        x[name] = x[name].clone()
        x[name][(3, 0, 1, 5)[: x[name].dim()]] = NAN
    o, state = run(kernel_package, x, state=pool, indices=slots, inplace=True)
    mine = torch.zeros(5, 3, dtype=torch.bool, device=DEVICE)
    mine[3, 1] = True
    o, clean_o = (y.transpose(1, 2) for y in (o, clean_o))
    assert o[mine].isnan().any() and torch.equal(o[~mine], clean_o[~mine])
    assert torch.equal(state[slots.long()][~mine], clean[slots.long()][~mine])


@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
def test_the_same_bits_every_time(kernel_package, state_dtype):
    """And a row has the same result alone, at another place and in another batch."""
    x = inputs_for("softplus-init", 33, 2, 4, state_dtype=state_dtype)
    want = run(kernel_package, x)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(want, run(kernel_package, x)))
    order = shuffled_slots(33, 33, device=DEVICE, dtype=torch.int64)
    batched = (*TOKENS, "initial_state")
    found = run(kernel_package, x | {name: x[name][order] for name in batched})
    assert all(torch.equal(a[order], b) for a, b in zip(want, found))
    alone = run(kernel_package, x | {name: x[name][7:8] for name in batched})
    assert all(torch.equal(a[7:8], b) for a, b in zip(want, alone))


@pytest.mark.parametrize("gate", ["softplus-init", "lower-weak"])
@pytest.mark.parametrize("split", [0, 1, 5, 16, 33, 63, 64])
def test_prefill_then_decode_is_one_prefill(kernel_package, gate, split):
    """Token by token and all at once, from whichever token decoding takes over."""
    x = make_inputs(gate, 2, 64, 2, initial_state=True, device=DEVICE)

    def part(begin, end, state):
        return x | {name: x[name][:, begin:end] for name in TOKENS} | {"initial_state": state}

    want = kernel_package.reference.recurrent_kda(**to_float64(x))
    for step in (1, 64):
        first, state = kernel_package.chunk_kda(**part(0, split, x["initial_state"]))
        outputs = [first]
        for begin in range(split, 64, step):
            o, state = kernel_package.fused_recurrent_kda(**part(begin, begin + step, state))
            outputs.append(o)
        for wanted, found in zip(want, (torch.cat(outputs, 1), state)):
            assert rel_rms(wanted, found) <= (PREFILL_TOLERANCE if split else TOLERANCE[BF16])


# A bfloat16 state takes a rounding of 1.7e-3 at each step, of which some 70 are remembered with a decay of
# -0.007 a token; they add up like a random walk.
DRIFT = {FP32: 2e-5, BF16: 2e-2}


@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
def test_drift_over_4096_steps(kernel_package, state_dtype):
    T = 4096
    x = inputs_for("lower-weak", 1, T, 2, state_dtype=state_dtype)
    want_o, want_state = kernel_package.reference.recurrent_kda(**to_float64(x))
    state, out = x["initial_state"].clone(), torch.empty_like(x["v"])
    for t in range(T):
        step = {name: x[name][:, t : t + 1] for name in TOKENS} | {"initial_state": state}
        kernel_package.fused_recurrent_kda(**x | step, inplace_final_state=True, out=out[:, t : t + 1])
    last = slice(T - 256, T)
    assert rel_rms(want_o[:, last], out[:, last]) <= max(DRIFT[state_dtype], TOLERANCE[BF16])
    assert rel_rms(want_state, state) <= DRIFT[state_dtype]

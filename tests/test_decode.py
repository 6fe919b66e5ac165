"""Decoding on the CPU: the reference, in float64 and in float32, and the compiled kernel, against the loop in
float64 of decode_inputs.py. Every option, pools of states, drafts, and how a prompt and its decoding meet.
tests/test_decode_calls.py has bad input and the rest of the call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decode_inputs import decode_inputs, expected, make_pool, shuffled_slots
from kda_inputs import GATES, conv_layout, make_inputs, rel_rms, to_float64

ROOT = Path(__file__).resolve().parent.parent
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
NAN = torch.nan

# Relative RMS against float64: float32 arithmetic in another order leaves 1e-7 .. 2e-6, one rounding to
# bfloat16 1.7e-3.
TOLERANCE = {FP64: 1e-12, FP32: 1e-5, BF16: 2e-3}


@pytest.fixture(params=["float64", "reference", "kernel"])
def decode(request, cpu_package):
    """`fused_recurrent_kda` by the reference, in float64 or as the inputs come, or by the CPU kernel."""
    reference = cpu_package.reference_decode.fused_recurrent_kda
    if request.param == "float64":
        return lambda **x: reference(**to_float64(x))
    if request.param == "reference":
        return reference

    def kernel(**x):
        def refuse(*arguments):
            raise AssertionError("the call went to the reference")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_package.reference_decode, "fused_recurrent_kda", refuse)
            return cpu_package.fused_recurrent_kda(**x)

    return kernel


def assert_close(want: torch.Tensor, got: torch.Tensor, what: str) -> None:
    """NaN and zero stand where they should, and each row along dim 0 is within its dtype's tolerance."""
    assert got.shape == want.shape, what
    assert torch.equal(want.isnan(), got.isnan()), f"{what}: NaN elsewhere"
    assert torch.equal(want == 0, got == 0), f"{what}: zeros elsewhere"
    for i, (a, b) in enumerate(zip(want, got)):
        live = ~a.isnan()
        error = rel_rms(a[live], b[live])
        assert error <= TOLERANCE[got.dtype], f"{what} {i}: relative RMS error {error:.1e}"


def check(decode, x: dict, pool=None, indices=None, accepted=None, inplace=False) -> None:
    """One call against the float64 loop: outputs, states, and in place every slot of the pool."""
    want_o, want_state = expected(x, pool, indices, accepted, inplace)
    calls = dict(x, initial_state=x["initial_state"] if pool is None else pool, inplace_final_state=inplace)
    calls |= dict(ssm_state_indices=indices, num_accepted_tokens=accepted)
    o, state = decode(**calls)
    assert_close(want_o.flatten(0, 1), o.flatten(0, 1), "token")
    assert_close(want_state, state, "state")
    if inplace and state.dtype == calls["initial_state"].dtype:
        assert state is calls["initial_state"]


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("state_v_first", [False, True], ids=["k-first", "v-first"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_gates(decode, gate, dtype, state_v_first):
    x = decode_inputs(gate, 2, 3, 2, dtype=dtype, initial_state=True, state_v_first=state_v_first)
    check(decode, x)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (1, 1, 5), (5, 1, 2), (3, 17, 1), (1, 64, 2), (2, 70, 1)], ids=str
)
def test_sizes(decode, sizes):
    check(decode, decode_inputs("softplus-init", *sizes, dtype=FP32, initial_state=True))


@pytest.mark.parametrize("heads", [(2, 4), (1, 3)], ids=str)
def test_value_heads(decode, heads):
    check(decode, decode_inputs("lower-strong", 2, 2, *heads, dtype=FP32, initial_state=True))


@pytest.mark.parametrize("l2norm", [False, True], ids=["as-given", "l2norm"])
@pytest.mark.parametrize("beta", ["given", "sigmoid", "negative-eigenvalues"])
@pytest.mark.parametrize("preactivated", [False, True], ids=["raw-gate", "log-decay"])
def test_what_is_activated_inside(decode, preactivated, beta, l2norm):
    x = decode_inputs(
        "softplus-init", 2, 2, 2, dtype=FP32, preactivated=preactivated, l2norm=l2norm, scale=0.3,
        initial_state=True, beta_sigmoid=beta != "given", allow_neg_eigval=beta == "negative-eigenvalues",
    )  # fmt: skip
    check(decode, x)


@pytest.mark.parametrize("missing", [["A_log"], ["dt_bias"], ["A_log", "dt_bias"]], ids="+".join)
def test_optional_gate_parameters(decode, missing):
    check(
        decode, decode_inputs("lower-weak", 2, 2, 2, dtype=FP32, initial_state=True) | dict.fromkeys(missing)
    )


def test_gate_parameters_of_any_dtype_and_strides(decode):
    x = decode_inputs("softplus-init", 2, 2, 2, dtype=FP32)
    x["dt_bias"] = x["dt_bias"].bfloat16().mT.contiguous().mT
    x["A_log"] = x["A_log"].double()
    check(decode, x)


@pytest.mark.parametrize("g_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("beta_dtype", [FP32, BF16], ids=str)
def test_dtypes_of_gate_and_beta(decode, g_dtype, beta_dtype):
    x = decode_inputs("softplus-init", 2, 2, 1, g_dtype=g_dtype, beta_dtype=beta_dtype, initial_state=True)
    check(decode, x)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("initial_state", [False, True], ids=["zeros", "state"])
def test_ragged_batches(decode, initial_state, dtype):
    x = decode_inputs(
        "lower-weak", 0, 0, 2, lengths=[0, 3, 1, 0, 20, 0], dtype=FP32, initial_state=initial_state,
        cu_seqlens_dtype=dtype,
    )  # fmt: skip
    check(decode, x)


def test_no_tokens_and_no_sequences(decode):
    check(decode, decode_inputs("lower-weak", 2, 0, 2, dtype=FP32, initial_state=True))
    check(decode, decode_inputs("lower-weak", 0, 3, 2, dtype=FP32))
    x = decode_inputs("lower-weak", 2, 0, 2, dtype=FP32)
    pool = make_pool(x, 3)
    check(decode, x, pool, torch.tensor([2, 0]), inplace=True)
    check(decode, x, pool, torch.tensor([2, 0]))


@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
def test_in_place(decode, state_dtype):
    x = decode_inputs("lower-weak", 2, 2, 2, dtype=FP32, initial_state=True, state_dtype=state_dtype)
    check(decode, x, inplace=True)


def test_no_state_unless_asked_for(decode):
    x = decode_inputs("lower-weak", 2, 2, 1, dtype=FP32, initial_state=True, output_final_state=False)
    before = x["initial_state"].clone()
    assert decode(**x)[1] is None
    assert torch.equal(x["initial_state"], before)


def test_a_bfloat16_state_that_is_not_in_place_comes_back_in_float32(cpu_package):
    x = decode_inputs("lower-weak", 2, 2, 1, dtype=FP32, initial_state=True, state_dtype=BF16)
    for run in (cpu_package.fused_recurrent_kda, cpu_package.reference_decode.fused_recurrent_kda):
        assert run(**x)[1].dtype == FP32


# ------------------------------------------------------------------------------------------------ pools


@pytest.mark.parametrize("inplace", [False, True], ids=["final-state", "in-place"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("state_v_first", [False, True], ids=["k-first", "v-first"])
def test_pool(decode, state_v_first, state_dtype, index_dtype, inplace):
    x = decode_inputs("lower-weak", 5, 2, 2, dtype=FP32, state_v_first=state_v_first)
    pool = make_pool(x, 9, dtype=state_dtype, gap=40)
    check(decode, x, pool, shuffled_slots(5, 9, dtype=index_dtype), inplace=inplace)
    assert pool._base is None or pool._base[:, -40:].isnan().all()


@pytest.mark.parametrize("inplace", [False, True], ids=["final-state", "in-place"])
def test_padding_rows(decode, inplace):
    x = decode_inputs("lower-weak", 6, 2, 2, dtype=FP32)
    pool = make_pool(x, 4)
    check(decode, x, pool, torch.tensor([3, -1, 0, -1, -1, 2]), inplace=inplace)
    check(decode, x, pool, torch.full((6,), -1), inplace=inplace)
    x = decode_inputs("lower-weak", 0, 0, 2, dtype=FP32, lengths=[2, 0, 3, 1])
    check(decode, x, pool, torch.tensor([-1, -1, 1, -1]), inplace=inplace)


@pytest.mark.parametrize("slot", [-2, 4, 5, -(2**31), 2**31 - 1, 2**40, -(2**62)])
@pytest.mark.parametrize("inplace", [False, True], ids=["final-state", "in-place"])
def test_slots_that_are_not_there(decode, inplace, slot):
    x = decode_inputs("lower-weak", 3, 2, 2, dtype=FP32)
    dtype = torch.int32 if abs(slot) <= 2**31 and slot != 2**31 else torch.int64
    check(decode, x, make_pool(x, 4), torch.tensor([3, slot, 0]).to(dtype), inplace=inplace)


def test_indices_with_strides(decode):
    x = decode_inputs("lower-weak", 4, 2, 1, dtype=FP32)
    table = torch.tensor([[0, 9, 1], [2, 9, 3], [5, 9, 4], [6, 9, 7]])
    check(decode, x, make_pool(x, 8), table[:, 0], inplace=True)
    check(decode, x, make_pool(x, 8), table[:, ::2], inplace=True)
    check(decode, x, make_pool(x, 8), table[:, ::2].mT.contiguous().mT, inplace=True)


def test_a_nan_in_another_slot_or_sequence_stays_there(decode):
    x = decode_inputs("lower-weak", 3, 2, 2, dtype=FP32)
    pool = make_pool(x, 5)
    slots = torch.tensor([4, 1, 0])
    pool[2] = NAN
    check(decode, x, pool, slots, inplace=True)
    x["k"][1, 0, 0, 3] = NAN  # sequence 1, head 0
    check(decode, x, make_pool(x, 5), slots, inplace=True)


# ----------------------------------------------------------------------------------------------- drafts


@pytest.mark.parametrize("accepted", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
def test_states_after_every_token(decode, state_dtype, accepted):
    x = decode_inputs("lower-weak", 3, 4, 2, dtype=FP32)
    indices = shuffled_slots(12, 20).view(3, 4)
    counts = None if accepted is None else torch.tensor([accepted, 1, 5 - accepted], dtype=torch.int32)
    check(decode, x, make_pool(x, 20, dtype=state_dtype), indices, counts, inplace=True)


def test_states_that_are_not_kept(decode):
    x = decode_inputs("lower-weak", 3, 3, 1, dtype=FP32)
    indices = torch.tensor([[0, -1, 1], [-1, 2, 3], [4, -1, -1]])
    check(decode, x, make_pool(x, 6), indices, torch.tensor([1, 2, 1]), inplace=True)
    check(decode, x, make_pool(x, 6), indices, torch.tensor([2, 1, 3]), inplace=True)  # all three are padding


@pytest.mark.parametrize("counts", [[0, 1, 2], [1, -1, 1], [2, 5, 1], [1, 1, 2**31 - 1]], ids=str)
def test_counts_that_make_no_sense(decode, counts):
    x = decode_inputs("lower-weak", 3, 2, 1, dtype=FP32)
    indices = torch.arange(12).view(3, 4)
    check(decode, x, make_pool(x, 12), indices, torch.tensor(counts, dtype=torch.int32), inplace=True)


def test_a_wrong_slot_after_any_token_stops_the_whole_sequence(decode):
    x = decode_inputs("lower-weak", 0, 0, 1, dtype=FP32, lengths=[3, 2, 3, 0])
    indices = torch.tensor([[0, 1, 99], [2, 3, 99], [4, -7, 5], [99, 99, 99]])
    check(decode, x, make_pool(x, 8), indices, inplace=True)


def test_more_tokens_than_slots(decode):
    x = decode_inputs("lower-weak", 0, 0, 1, dtype=FP32, lengths=[3, 2, 0, 1])
    check(decode, x, make_pool(x, 8), torch.arange(8).view(4, 2), inplace=True)


def draft_and_verify(decode, x: dict, accept: list[int], T_max: int, state_dtype) -> tuple:
    """Decodes x token by token through calls of T_max tokens, of which `accept` (in turn) turn out right.

    Behind the right ones stand wrong ones. Returns the outputs of the right tokens and the last right states.
    """
    N, T = x["q"].shape[:2]
    names = ("q", "k", "v", "g", "beta")
    pool = make_pool(x, N * T_max, dtype=state_dtype)
    indices = shuffled_slots(N * T_max, N * T_max).view(N, T_max)
    pool[indices[:, 0].long()] = x["initial_state"].to(state_dtype)
    outputs, at, count, turn = [], 0, 1, 0
    while at < T:
        right = min(accept[turn % len(accept)], T - at)
        turn += 1
        wrong = decode_inputs("lower-strong", N, T_max, 2, dtype=FP32, seed=100 + turn)
        tokens = {name: torch.cat([x[name][:, at : at + right], wrong[name][:, right:]], 1) for name in names}
        o, pool = decode(
            **x | tokens | dict(initial_state=pool), inplace_final_state=True, ssm_state_indices=indices,
            num_accepted_tokens=torch.full((N,), count),
        )  # fmt: skip
        outputs.append(o[:, :right])
        at, count = at + right, right
    return torch.cat(outputs, 1), pool[indices[:, count - 1].long()]


@pytest.mark.parametrize("accept", [[1], [2], [3], [4], [1, 4, 2, 3]], ids=str)
def test_drafts_of_which_some_are_right(decode, accept):
    """The outputs of the right tokens, and the states behind them, are those of decoding without drafts."""
    x = decode_inputs("lower-weak", 2, 10, 2, dtype=FP32, initial_state=True)
    want_o, want_state = expected(x)
    o, state = draft_and_verify(decode, x, accept, 4, FP32)
    assert_close(want_o.flatten(0, 1), o.flatten(0, 1), "token")
    assert_close(want_state, state, "state")


# ------------------------------------------------------------------------------- prompts and long decoding


@pytest.mark.parametrize("gate", ["softplus-resets", "lower-weak"])
@pytest.mark.parametrize("split", [0, 1, 5, 16, 33, 63, 64])
def test_prefill_then_decode_is_one_prefill(cpu_package, gate, split):
    """Whichever the token at which decoding takes over, and whether it goes token by token or at once."""
    x = make_inputs(gate, 2, 64, 2, dtype=FP32, initial_state=True)
    names = ("q", "k", "v", "g", "beta")

    def part(begin, end, state):
        return x | {name: x[name][:, begin:end] for name in names} | dict(initial_state=state)

    whole = cpu_package.chunk_kda(**x)
    for step in (1, 64):
        first, state = cpu_package.chunk_kda(**part(0, split, x["initial_state"]))
        outputs = [first]
        for begin in range(split, 64, step):
            o, state = cpu_package.fused_recurrent_kda(**part(begin, begin + step, state))
            outputs.append(o)
        assert rel_rms(whole[0].double(), torch.cat(outputs, 1)) <= TOLERANCE[FP32]
        assert rel_rms(whole[1].double(), state) <= TOLERANCE[FP32]


@pytest.fixture
def one_thread():
    """For steps so short that threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
def test_drift_over_4096_steps(cpu_package, one_thread, state_dtype):
    """One token at a time, in place: rounding does not pile up. A bfloat16 state is rounded at every step."""
    T = 4096
    x = decode_inputs("lower-weak", 1, T, 1, dtype=FP32, initial_state=True, state_dtype=state_dtype)
    names = ("q", "k", "v", "g", "beta")
    want_o, want_state = cpu_package.reference.recurrent_kda(**to_float64(x))
    state, out = x["initial_state"].clone(), torch.empty_like(x["v"])
    for t in range(T):
        step = {name: x[name][:, t : t + 1] for name in names}
        cpu_package.fused_recurrent_kda(
            **x | step | dict(initial_state=state), inplace_final_state=True, out=out[:, t : t + 1]
        )
    limit = DRIFT[state_dtype]
    last = slice(T - 256, T)
    assert rel_rms(want_o[:, last], out[:, last]) <= limit
    assert rel_rms(want_state, state) <= limit


# At the end of 4096 steps with a decay of -0.007 a token. A state in bfloat16 takes a rounding of 1.7e-3 a
# step, of which some 1 / (2 * 0.007) are remembered; they add up like a random walk: 1.7e-3 * sqrt(70) or
# 1.4e-2.
DRIFT = {FP32: 1e-5, BF16: 2e-2}


# ----------------------------------------------------------------------------------------- where tensors lie


def in_wider_rows(x: torch.Tensor) -> torch.Tensor:
    """The same values as a part of a larger tensor, every row misaligned to anything but its own dtype."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 9), NAN, dtype=x.dtype)
    return wide.narrow(-1, 3, x.shape[-1]).copy_(x)


@pytest.mark.parametrize("layout", [in_wider_rows, conv_layout], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_strides(decode, layout, dtype):
    x = decode_inputs("softplus-init", 2, 3, 2, 4, dtype=dtype, initial_state=True)
    strided = {name: layout(x[name]) for name in ("q", "k", "v", "g")} | dict(beta=in_wider_rows(x["beta"]))
    assert all(torch.equal(a, b) for a, b in zip(decode(**x | strided), decode(**x)))


# ------------------------------------------------------------------------------------- threads and builds


def test_threads_do_not_change_the_result(cpu_package):
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            for N in (1, 7):
                x = decode_inputs("softplus-init", N, 3, 3, dtype=FP32, initial_state=True)
                results.append(cpu_package.fused_recurrent_kda(**x))
    finally:
        torch.set_num_threads(before)
    for n, result in enumerate(results):
        assert all(torch.equal(a, b) for a, b in zip(result, results[n % 2]))


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_builds_for_instruction_sets(cpu_variant_dir, capability):
    """ATEN_CPU_CAPABILITY picks the build; each is as accurate."""
    code = f"""
import sys
import torch
sys.path.insert(0, {str(ROOT / "tests")!r})
from kernels import get_local_kernel
from pathlib import Path
from decode_inputs import decode_inputs, expected
from kda_inputs import rel_rms
package = get_local_kernel(Path({str(ROOT)!r}), backend="cpu")
for gate in ("softplus-init", "mixed-channels", "lower-strong"):
    for v_first in (False, True):
        x = decode_inputs(gate, 2, 3, 2, dtype=torch.float32, initial_state=True, state_v_first=v_first)
        print(*(rel_rms(a, b) for a, b in zip(expected(x), package.fused_recurrent_kda(**x))))
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    errors = [float(word) for word in result.stdout.split()]
    assert len(errors) == 12 and max(errors) <= TOLERANCE[FP32]

"""The prefill kernel against the float64 reference: every gate, length, pack, head count and option."""

from __future__ import annotations

import math

import pytest
import torch
from bf16_model import activated, bf16_chunk_kda
from harness import (
    DEVICE,
    TOLERANCE,
    assert_accurate,
    inputs_for,
    reference,
    run_op,
    sequences,
    worst_errors,
)
from kda_inputs import GATES, make_inputs, rel_rms

pytestmark = pytest.mark.usefixtures("each_kernel")

BF16, FP32 = torch.bfloat16, torch.float32
RAW_GATES = ("lower-strong", "lower-weak", "softplus-init", "softplus-resets")
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 1000)


def check(kernel, gate: str, **options) -> None:
    inputs = inputs_for(gate, **options)
    found = run_op(kernel, inputs, options.get("state_dtype"))
    assert_accurate(kernel, inputs, found)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("gate", GATES)
def test_gate(kernel_package, gate):
    check(kernel_package, gate, B=2, T=1000)


@pytest.mark.parametrize("g_dtype", [FP32, BF16], ids=["fp32-g", "bf16-g"])
@pytest.mark.parametrize("gate", RAW_GATES)
def test_preactivated_gate(kernel_package, gate, g_dtype):
    check(kernel_package, gate, T=300, preactivated=True, g_dtype=g_dtype)


@pytest.mark.parametrize("gate", RAW_GATES)
def test_raw_gate_in_fp32(kernel_package, gate):
    check(kernel_package, gate, T=300, g_dtype=FP32)


@pytest.mark.parametrize("gate", ["lower-weak", "softplus-resets", "zero"])
@pytest.mark.parametrize("T", LENGTHS)
def test_length(kernel_package, T, gate):
    check(kernel_package, gate, T=T, H=2)


@pytest.mark.parametrize("gate", ["lower-strong", "lower-weak", "softplus-init", "mixed-channels"])
def test_long(kernel_package, gate):
    check(kernel_package, gate, T=8192, H=4)


def test_long_with_many_heads(kernel_package):
    check(kernel_package, "lower-weak", T=8192, H=96, initial_state=False)


@pytest.mark.parametrize("T", [16, 17, 200])
def test_whole_state_forgotten_by_minus_infinity(kernel_package, T):
    """A log decay of -inf is a factor of exactly 0, and must not meet an infinity on its way."""
    inputs = inputs_for("zero", T=T, H=2)
    inputs["g"] = torch.where(torch.rand(inputs["g"].shape, device=DEVICE) < 0.1, -math.inf, -0.01)
    inputs["g"][:, T // 2] = -math.inf
    assert_accurate(kernel_package, inputs, run_op(kernel_package, inputs))


@pytest.mark.parametrize("raw", [100.0, -100.0, math.inf, -math.inf], ids=lambda x: f"g={x:g}")
@pytest.mark.parametrize("gate", ["lower-strong", "softplus-init"])
def test_saturated_raw_gate(kernel_package, gate, raw):
    """A tenth of the raw gates at the ends of their range: the activation must not make a NaN of them."""
    inputs = inputs_for(gate, T=200, H=2)
    chosen = torch.rand(inputs["g"].shape, device=DEVICE) < 0.1
    inputs["g"] = torch.where(chosen, raw, inputs["g"].float()).to(BF16)
    assert_accurate(kernel_package, inputs, run_op(kernel_package, inputs))


@pytest.mark.parametrize(
    "H, HV",
    [(1, 1), (4, 4), (32, 32), (96, 96), (2, 4), (1, 4), (32, 64), (3, 9)],
    ids=lambda n: str(n),
)
def test_heads(kernel_package, H, HV):
    check(kernel_package, "lower-weak" if H % 2 else "softplus-init", T=130, H=H, HV=HV)


PACKS = {
    "mixed": (300, 17, 64, 1, 200),
    "mixed-long": (1300, 547, 2048, 963, 271, 3063),
    "zero-first": (0, 65, 16),
    "zero-between": (64, 0, 0, 33),
    "zero-last": (15, 80, 0),
    "all-zero": (0, 0, 0),
    "one": (100,),
    "one-zero": (0,),
    "many-tiny": tuple(n % 6 for n in range(150)),
    "tile-ends": (16, 64, 32, 128, 48),
}


@pytest.mark.kernels_ci
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("pack", PACKS)
def test_pack(kernel_package, pack, index_dtype):
    gate = "softplus-init" if index_dtype == torch.int32 else "lower-weak"
    check(kernel_package, gate, lengths=PACKS[pack], H=2, cu_seqlens_dtype=index_dtype)


@pytest.mark.parametrize("initial_state", [True, False], ids=["state", "no-state"])
def test_no_token_copies_the_state(kernel_package, initial_state):
    for options in ({"B": 3, "T": 0}, {"lengths": (0, 0)}):
        inputs = inputs_for("lower-weak", H=2, initial_state=initial_state, **options)
        _, final_state = run_op(kernel_package, inputs)
        expected = inputs["initial_state"] if initial_state else torch.zeros_like(final_state)
        assert torch.equal(final_state, expected)


def test_no_sequence_launches_nothing(kernel_package):
    inputs = inputs_for("lower-weak", B=0, T=10, H=2)
    out, final_state = run_op(kernel_package, inputs)
    assert out.shape == (0, 10, 2, 128) and final_state.shape == (0, 2, 128, 128)


# Options that act on the same part of the kernel meet here in every combination of their values.
OPTIONS = {
    "v-first": dict(state_v_first=True),
    "bf16-state": dict(state_dtype=BF16),
    "bf16-state-v-first": dict(state_dtype=BF16, state_v_first=True, g_dtype=FP32),
    "bf16-final-only": dict(state_dtype=BF16, initial_state=False),
    "bf16-final-only-v-first": dict(
        state_dtype=BF16, initial_state=False, state_v_first=True, beta_dtype=FP32
    ),
    "fp32-final-only": dict(initial_state=False, beta_sigmoid=False),
    "fp32-final-only-v-first": dict(initial_state=False, state_v_first=True, g_dtype=FP32, l2norm=False),
    "initial-only": dict(output_final_state=False),
    "initial-only-bf16-v-first": dict(
        output_final_state=False, state_dtype=BF16, state_v_first=True, l2norm=False
    ),
    "no-state-at-all": dict(output_final_state=False, initial_state=False),
    "no-l2norm": dict(l2norm=False),
    "no-sigmoid": dict(beta_sigmoid=False),
    "no-sigmoid-fp32-beta": dict(beta_sigmoid=False, beta_dtype=FP32, l2norm=False, state_v_first=True),
    "fp32-beta": dict(beta_dtype=FP32),
    "fp32-g-fp32-beta": dict(g_dtype=FP32, beta_dtype=FP32, state_dtype=BF16),
    "neg-eigval": dict(allow_neg_eigval=True),
    "neg-eigval-fp32-beta-v-first": dict(allow_neg_eigval=True, beta_dtype=FP32, state_v_first=True, HV=4),
    "scale-1": dict(scale=1.0),
    "scale-small": dict(scale=0.003, state_v_first=True, allow_neg_eigval=True, g_dtype=FP32),
    "preactivated-v-first-bf16-state": dict(preactivated=True, state_v_first=True, state_dtype=BF16),
    "preactivated-no-l2norm-no-sigmoid": dict(preactivated=True, l2norm=False, beta_sigmoid=False),
}


@pytest.mark.parametrize("gate", ["lower-weak", "softplus-init"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(kernel_package, options, gate):
    check(kernel_package, gate, **{"lengths": (70, 0, 131, 16), "H": 2, **OPTIONS[options]})


@pytest.mark.parametrize("lower_bound", [-5.0, -1.0, -1e-3, 0.0])
@pytest.mark.parametrize("A_log", [True, False], ids=["A_log", "no-A_log"])
def test_lower_bound(kernel_package, lower_bound, A_log):
    inputs = inputs_for("lower-strong", T=150, H=2)
    inputs["lower_bound"] = lower_bound
    if not A_log:
        inputs["A_log"] = None
    assert_accurate(kernel_package, inputs, run_op(kernel_package, inputs))


@pytest.mark.parametrize("dt_bias", ["none", "flat"])
@pytest.mark.parametrize("gate", ["lower-strong", "softplus-init"])
def test_dt_bias(kernel_package, gate, dt_bias):
    inputs = inputs_for(gate, T=150, H=2)
    inputs["dt_bias"] = None if dt_bias == "none" else inputs["dt_bias"].flatten()
    assert_accurate(kernel_package, inputs, run_op(kernel_package, inputs))


@pytest.mark.parametrize("gate", ["lower-strong", "lower-weak", "softplus-init", "zero", "mixed-channels"])
def test_near_parallel_keys(kernel_package, gate):
    """Ill-conditioned chunks: held to 1.5 times the error of the chunk form with bf16 operands."""
    inputs = inputs_for(gate, T=1024, keys="parallel", state_v_first=True)
    expected = reference(kernel_package, inputs)
    model = worst_errors(inputs, bf16_chunk_kda(*activated(inputs)), expected)
    found = worst_errors(inputs, run_op(kernel_package, inputs), expected)
    for name, ours, allowed in zip(("o", "final_state"), found, model):
        assert ours <= 1.5 * allowed, f"{name}: error {ours:.2e}, the bf16 model's {allowed:.2e}"


@pytest.mark.parametrize("gate", ["lower-weak", "softplus-resets"])
def test_bit_identical_from_run_to_run(kernel_package, gate):
    inputs = inputs_for(gate, lengths=(1000, 77, 0, 300, 2000), H=8)
    first = run_op(kernel_package, inputs)
    for _ in range(5):
        again = run_op(kernel_package, inputs)
        assert all(torch.equal(x, y) for x, y in zip(first, again))


@pytest.mark.parametrize(
    "pieces", [(64,) * 8, (100, 1, 1, 15, 395), (1,) * 20 + (492,)], ids=["64s", "mixed", "ones"]
)
@pytest.mark.parametrize("state_v_first", [False, True], ids=["k-first", "v-first"])
def test_pieces_with_the_state_passed_on(kernel_package, pieces, state_v_first):
    """512 tokens in pieces are as accurate as in one call."""
    whole = inputs_for("lower-weak", T=512, H=2, state_v_first=state_v_first)
    outputs, state, begin = [], whole["initial_state"], 0
    for length in pieces:
        tokens = {name: whole[name][:, begin : begin + length] for name in ("q", "k", "v", "g", "beta")}
        o, state = run_op(kernel_package, {**whole, **tokens, "initial_state": state})
        outputs.append(o)
        begin += length
    assert begin == 512
    assert_accurate(kernel_package, whole, (torch.cat(outputs, dim=1), state))


def test_a_sequence_does_not_depend_on_its_place(kernel_package):
    """Alone, in a batch and in a pack, a sequence gives the same bits."""
    inputs = inputs_for("softplus-init", B=3, T=100, H=2)
    batch = run_op(kernel_package, inputs)
    names = ("q", "k", "v", "g", "beta")
    packed = {name: inputs[name].flatten(0, 1).unsqueeze(0) for name in names}
    packed["cu_seqlens"] = torch.tensor([0, 100, 200, 300], device=DEVICE)
    pack = run_op(kernel_package, {**inputs, **packed})
    assert torch.equal(pack[0].view_as(batch[0]), batch[0]) and torch.equal(pack[1], batch[1])
    alone = {name: inputs[name][1:2] for name in (*names, "initial_state")}
    one = run_op(kernel_package, {**inputs, **alone})
    assert torch.equal(one[0], batch[0][1:2]) and torch.equal(one[1], batch[1][1:2])


@pytest.mark.parametrize("preset", ["batch", "pack"])
def test_chunk_kda_and_fwd_are_the_operator(kernel_package, preset):
    """The two public calls give the bits of the operator's default kernel."""
    shape = dict(B=2, T=100) if preset == "batch" else dict(lengths=(40, 0, 61))
    inputs = inputs_for("lower-weak", state_v_first=True, **shape)
    o, final_state = run_op(kernel_package, inputs, portable=False)

    found_o, found_state = kernel_package.chunk_kda(**inputs)
    assert torch.equal(found_o, o) and torch.equal(found_state, final_state)

    given = torch.full_like(o, math.nan)
    returned, _ = kernel_package.chunk_kda(**inputs, out=given)
    assert returned is given and torch.equal(given, o)

    out, state = torch.full_like(o, math.nan), torch.full_like(final_state, math.nan)
    arguments = (inputs[name] for name in ("q", "k", "v", "g", "beta"))
    result = kernel_package.fwd(
        *arguments, 128**-0.5, out, inputs["A_log"], inputs["dt_bias"], inputs["lower_bound"],
        initial_state=inputs["initial_state"], final_state=state, cu_seqlens=inputs["cu_seqlens"],
    )  # fmt: skip
    assert result is None and torch.equal(out, o) and torch.equal(state, final_state)


def test_chunk_kda_without_final_state(kernel_package):
    inputs = inputs_for("softplus-init", T=50, output_final_state=False)
    o, final_state = kernel_package.chunk_kda(**inputs)
    assert final_state is None
    assert_accurate(kernel_package, inputs, (o, None))


@pytest.mark.parametrize("keys", ["random", "parallel"])
def test_the_tolerance_notices_one_missing_token(kernel_package, keys):
    """The measure is sharp enough: a result that leaves out one token inside a sequence is refused."""
    inputs = make_inputs("lower-weak", 1, 200, 2, initial_state=True, keys=keys, device=DEVICE)
    expected = reference(kernel_package, inputs)
    inputs["beta"][:, 100] = -30.0
    found = reference(kernel_package, inputs)
    (b, tokens), *_ = sequences(inputs)
    assert rel_rms(expected[0][b, tokens], found[0][b, tokens]) > 2 * TOLERANCE

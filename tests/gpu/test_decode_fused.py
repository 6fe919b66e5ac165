"""The fused decode step against float64, and against the kernels it stands for."""

from __future__ import annotations

import pytest
import torch
from decode_inputs import shuffled_slots
from fused_decode_inputs import STATES, expected_step, fused_inputs
from harness import DEVICE, SENTINEL
from kda_inputs import GATES, operator_flags

BF16, FP32 = torch.bfloat16, torch.float32

# Relative RMS against float64, in the worst token or slot. Everything is float32 but for one rounding of the output,
# and of a bfloat16 state, to bfloat16: 1.7e-3 for many numbers, at most 2^-8 for a few. Float32 arithmetic, its
# exponentials and sums in another order, leaves 1e-7 .. 5e-6.
TOLERANCE = {FP32: 2e-5, BF16: 2**-8}

NAN = float("nan")
TOKENS = ("q", "k", "v", "g", "beta", "gate")


def inputs_for(gate: str, N: int = 0, T: int = 0, H: int = 2, **options) -> dict:
    return fused_inputs(gate, N, T, H, device=DEVICE, **options)


def worst_error(want: torch.Tensor, got: torch.Tensor) -> float:
    """The largest relative RMS error of a row along dim 0; NaN and rows of zeros must stand where they should."""
    assert got.shape == want.shape and torch.equal(got.isnan(), want.isnan()), "NaN elsewhere"
    want, got = (y.double().nan_to_num().flatten(1) for y in (want, got))
    size = want.square().mean(1)
    error = (got - want).square().mean(1)
    assert (error[size == 0] == 0).all(), "a row of zeros is none"
    return (error / size.where(size > 0, 1.0)).max().sqrt().item()


def copied(x: dict) -> dict:
    return x | {name: x[name].clone() for name in STATES}


def op_arguments(x: dict, out: torch.Tensor, indices=None, accepted=None) -> tuple:
    """Positional arguments of the operator `kda_fused_decode`."""
    return (
        x["q"], x["k"], x["v"], x["g"], x["beta"], x["gate"], x["A_log"], x["dt_bias"], x["conv_state"],
        x["recurrent_state"], x["conv_weight"], x["conv_bias"], x["norm_weight"], out,
        128**-0.5 if x["scale"] is None else x["scale"], x["norm_eps"], x["lower_bound"], operator_flags(x),
        indices, accepted, x["cu_seqlens"],
    )  # fmt: skip


def run(kernel, x: dict, indices=None, accepted=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, conv_state, recurrent_state) of the operator on copies of the states; out lies between guards."""
    x = copied(x)
    B, T = x["v"].shape[:2]
    guarded = torch.full((B, T + 2, *x["v"].shape[2:]), SENTINEL, dtype=x["v"].dtype, device=DEVICE)
    out = guarded[:, 1:-1].fill_(NAN)
    kernel.ops.kda_fused_decode(*op_arguments(x, out, indices, accepted))
    assert (guarded[:, 0] == SENTINEL).all() and (guarded[:, -1] == SENTINEL).all(), "written around out"
    return out, x["conv_state"], x["recurrent_state"]


def check(kernel, x: dict, indices=None, accepted=None) -> None:
    found = run(kernel, x, indices, accepted)
    wanted = expected_step(x, indices, accepted)
    for name, want, got in zip(("out", *STATES), wanted, found):
        rows = (y.flatten(0, 1) if name == "out" else y for y in (want, got))
        # the convolution's state keeps its inputs: exact in their dtype
        limit = 0.0 if name == "conv_state" else TOLERANCE[got.dtype]
        error = worst_error(*rows)
        assert error <= limit, f"{name}: relative RMS error {error:.2e}"
    for name, want, got in zip(STATES, wanted[1:], found[1:]):
        stays = (want == x[name].double()).flatten(1).all(1)
        assert torch.equal(got[stays], x[name][stays]), f"{name}: a slot was touched"


@pytest.mark.parametrize("H", [1, 3, 32])
@pytest.mark.parametrize("N, T", [(1, 1), (5, 1), (33, 1), (2, 4), (3, 9), (1, 64)])
def test_sizes(kernel_package, N, T, H):
    check(kernel_package, inputs_for("lower-weak", N, T, H))


@pytest.mark.parametrize("state_v_first", [False, True], ids=["k-first", "v-first"])
@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("g_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_gates_and_layouts(kernel_package, gate, g_dtype, state_dtype, state_v_first):
    check(
        kernel_package,
        inputs_for(gate, 3, 2, g_dtype=g_dtype, beta_dtype=g_dtype, state_dtype=state_dtype,
                   state_v_first=state_v_first),
    )  # fmt: skip


@pytest.mark.parametrize("conv_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("width", [3, 4])
@pytest.mark.parametrize("T", [1, 2, 12])
def test_convolution(kernel_package, T, width, bias, conv_dtype):
    check(kernel_package, inputs_for("lower-weak", 3, T, width=width, bias=bias, conv_dtype=conv_dtype))


@pytest.mark.parametrize("options", [
    dict(l2norm=False), dict(beta_sigmoid=False), dict(allow_neg_eigval=True), dict(preactivated=True), dict(scale=0.3)
], ids=lambda o: next(iter(o)))  # fmt: skip
def test_options(kernel_package, options):
    check(kernel_package, inputs_for("softplus-init", 4, 3, **options))


def test_channels_last_conv_state(kernel_package):
    """[slots, width, channels] in memory, as vLLM has it: any strides."""
    x = inputs_for("lower-weak", 3, 2, width=3)
    want = run(kernel_package, x)
    x["conv_state"] = x["conv_state"].mT.contiguous().mT
    assert not x["conv_state"].is_contiguous()
    found = run(kernel_package, x)
    assert all(torch.equal(a, b) for a, b in zip(want, found))


@pytest.mark.parametrize("name", TOKENS)
def test_strided_and_misaligned_inputs(kernel_package, name):
    x = inputs_for("lower-weak", 3, 2)
    want = run(kernel_package, x)
    wide = torch.full((*x[name].shape[:-1], x[name].shape[-1] + 9), NAN, dtype=x[name].dtype, device=DEVICE)
    x[name] = wide.narrow(-1, 3, x[name].shape[-1]).copy_(x[name])
    assert all(torch.equal(a, b) for a, b in zip(want, run(kernel_package, x)))


def test_slices_of_one_projection(kernel_package):
    """q, k and v side by side in one tensor, as a fused projection gives them."""
    x = inputs_for("lower-weak", 4, 1)
    want = run(kernel_package, x)
    joint = torch.cat([x[name].flatten(2) for name in ("q", "k", "v")], dim=-1)
    x |= zip(("q", "k", "v"), (y.unflatten(-1, (2, 128)) for y in joint.chunk(3, dim=-1)))
    assert all(torch.equal(a, b) for a, b in zip(want, run(kernel_package, x)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lengths", [[0, 3, 1, 0, 11], [1] * 9], ids=str)
def test_pool_of_a_ragged_batch(kernel_package, lengths, dtype):
    x = inputs_for("softplus-init", lengths=lengths, slots=20)
    slots = shuffled_slots(len(lengths), 20, device=DEVICE, dtype=dtype)
    check(kernel_package, x, slots)
    slots[1], slots[2] = -1, 20
    check(kernel_package, x, slots)


def test_states_per_token(kernel_package):
    """Drafts: both states after every token go to its slot, and the next call starts from the accepted one."""
    x = inputs_for("lower-weak", 6, 3, slots=40)
    slots = shuffled_slots(18, 40, device=DEVICE).view(6, 3)
    accepted = torch.tensor([1, 3, 2, 0, 4, 1], device=DEVICE)
    slots[5, 1] = -1
    check(kernel_package, x, slots, accepted)
    slots[0, 0], slots[1, 1] = -1, 40
    check(kernel_package, x, slots, accepted)


def test_token_by_token_is_the_same_bit_by_bit(kernel_package):
    x = inputs_for("lower-weak", 3, 12)
    want_out, *want = run(kernel_package, x)
    outs = []
    for t in range(12):
        step = x | {name: x[name][:, t : t + 1] for name in TOKENS}
        out, *states = run(kernel_package, step)
        x |= zip(STATES, states)
        outs.append(out)
    assert torch.equal(torch.cat(outs, dim=1), want_out)
    assert all(torch.equal(a, b) for a, b in zip(want, states))


def test_wrong_cu_seqlens(kernel_package):
    x = inputs_for("lower-weak", lengths=[3, 2])
    x["cu_seqlens"] = torch.tensor([0, 4, 4], device=DEVICE)
    out, *states = run(kernel_package, x)
    assert out.isnan().all()
    assert all(torch.equal(a, x[name]) for a, name in zip(states, STATES))


def test_nan_stays_in_its_sequence_and_head(kernel_package):
    x = inputs_for("lower-weak", 3, 2)
    want = run(kernel_package, x)
    x["k"][1, 0, 1] = NAN
    found = run(kernel_package, x)
    clean = torch.ones(3, 2, dtype=torch.bool, device=DEVICE)
    clean[1, 1] = False
    assert found[0].transpose(1, 2)[1, 1].isnan().all() and found[2][1, 1].isnan().any()
    assert torch.equal(found[0].transpose(1, 2)[clean], want[0].transpose(1, 2)[clean])
    assert torch.equal(found[2][clean], want[2][clean])


def test_graph_replay_with_changing_slots(kernel_package):
    x = inputs_for("lower-weak", 4, 1, slots=12)
    slots = shuffled_slots(4, 12, device=DEVICE)
    captured = copied(x) | dict(ssm_state_indices=slots, out=torch.empty_like(x["v"]))
    kernel_package.fused_kda_decode(**captured)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel_package.fused_kda_decode(**captured)
    for seed in range(1, 4):
        slots.copy_(shuffled_slots(4, 12, seed=seed, device=DEVICE))
        slots[seed] = -1
        before = {name: captured[name].clone() for name in STATES}
        want = run(kernel_package, x | before, slots)
        graph.replay()
        torch.cuda.synchronize()
        found = (captured["out"], captured["conv_state"], captured["recurrent_state"])
        assert all(torch.equal(a, b) for a, b in zip(want, found))


def test_is_the_step_of_the_separate_kernels(kernel_package):
    """The convolution by PyTorch, then `fused_recurrent_kda`, then the norm: equal up to their roundings."""
    x = inputs_for("softplus-init", 8, 1, 4)
    out, conv_state, _ = run(kernel_package, x)
    state = torch.cat(
        [x["conv_state"][:, :, 1:], torch.cat([x[n].flatten(2) for n in ("q", "k", "v")], -1).mT], -1
    )
    assert torch.equal(conv_state, state)
    mixed = torch.nn.functional.silu((state.float() * x["conv_weight"].float().squeeze(1)).sum(-1))
    q, k, v = (y.view(8, 1, 4, 128).bfloat16() for y in mixed.chunk(3, dim=-1))
    names = ("g", "beta", "A_log", "dt_bias", "lower_bound", "use_gate_in_kernel", "use_qk_l2norm_in_kernel",
             "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "state_v_first")  # fmt: skip
    o, _ = kernel_package.fused_recurrent_kda(
        q=q, k=k, v=v, initial_state=x["recurrent_state"], **{name: x[name] for name in names}
    )
    normed = torch.nn.functional.rms_norm(o.float(), (128,), x["norm_weight"].float(), x["norm_eps"])
    # more roundings to bfloat16: of q, k, v and of o
    assert worst_error(normed * torch.sigmoid(x["gate"].float()), out) <= 4 * TOLERANCE[BF16]


BAD = {
    "conv_state-channels": ("conv_state", lambda x: x[:, :-1]),
    "conv_state-width": ("conv_state", lambda x: x[:, :, :2]),
    "conv_state-dtype": ("conv_state", lambda x: x.half()),
    "conv_state-overlaps-itself": ("conv_state", lambda x: x[:, :, :1].expand(-1, -1, 4)),
    "conv_weight-channels": ("conv_weight", lambda x: x[:-1]),
    "conv_weight-strides": ("conv_weight", lambda x: x.squeeze(1).T.contiguous().T),
    "conv_bias-size": ("conv_bias", lambda x: torch.zeros(7, device=DEVICE)),
    "norm_weight-size": ("norm_weight", lambda x: x[:64]),
    "norm_weight-device": ("norm_weight", lambda x: x.cpu()),
    "norm_eps-negative": ("norm_eps", lambda x: -1.0),
    "gate-heads": ("gate", lambda x: x[:, :, :1]),
    "recurrent_state-shape": ("recurrent_state", lambda x: x[:, :, 1:]),
    "recurrent_state-not-16-byte": ("recurrent_state", lambda x: misplaced(x)),
}


def misplaced(x: torch.Tensor) -> torch.Tensor:
    """The same values in slots that start one element behind a multiple of 16 bytes."""
    storage = torch.zeros(len(x), x[0].numel() + 4, dtype=x.dtype, device=x.device)
    return storage[:, 1 : 1 + x[0].numel()].copy_(x.flatten(1)).unflatten(1, x.shape[1:])


@pytest.mark.parametrize("name, change", BAD.values(), ids=BAD)
def test_bad_input(kernel_package, name, change):
    x = inputs_for("lower-weak", 3, 1)
    before = copied(x)
    with pytest.raises((RuntimeError, ValueError), match=name):
        kernel_package.fused_kda_decode(**x | {name: change(x[name])})
    torch.cuda.synchronize()
    assert all(torch.equal(x[state], before[state]) for state in STATES)


def test_value_heads_in_groups_are_refused(kernel_package):
    x = inputs_for("lower-weak", 2, 1, 2)
    with pytest.raises((RuntimeError, ValueError), match="H = 1, HV = 2"):
        kernel_package.fused_kda_decode(**x | {"q": x["q"][:, :, :1], "k": x["k"][:, :, :1]})


def test_the_call(kernel_package):
    """The Python call updates the states that it is given, returns `out`, and gives what the operator gives."""
    x = inputs_for("lower-weak", 4, 2, slots=9)
    slots, accepted = (
        shuffled_slots(8, 9, device=DEVICE).view(4, 2),
        torch.tensor([1, 2, 2, 1], device=DEVICE),
    )
    want = run(kernel_package, x, slots, accepted)
    call = copied(x) | dict(ssm_state_indices=slots, num_accepted_tokens=accepted)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        out = kernel_package.fused_kda_decode(**call)
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(want, (out, call["conv_state"], call["recurrent_state"])))
    launched = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Mem", "Activity"))
    ]
    assert len(launched) == 1 and "kda_decode_kernel" in launched[0], launched


def test_what_the_kernel_does_not_serve(kernel_package):
    x = inputs_for("lower-weak", 3, 2, dtype=FP32)
    out = kernel_package.fused_kda_decode(**(call := copied(x)))
    wanted = expected_step(x)
    for want, got in zip(wanted, (out, call["conv_state"], call["recurrent_state"])):
        assert worst_error(want, got) <= TOLERANCE[FP32]


def test_opcheck(kernel_package):
    x = inputs_for("lower-weak", 2, 1)
    torch.library.opcheck(kernel_package.ops.kda_fused_decode, op_arguments(x, torch.zeros_like(x["v"])))

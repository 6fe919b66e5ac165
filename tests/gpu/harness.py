"""How the GPU tests call the kernel, what they compare with, and the tolerance."""

from __future__ import annotations

import itertools
import json
import math

import torch
from kda_inputs import make_inputs, operator_flags, prefix_states, rel_rms, to_float64

DEVICE = "cuda"

# Relative RMS against float64, for random keys and every gate. The chunk form with bf16 operands and fp32
# accumulation reaches 3.5e-3 .. 4.6e-3 on the output and 2.5e-3 .. 3.7e-3 on the state (bf16_model.py), one
# rounding to bf16 alone is 1.7e-3; a wrong decay, a stale row or a missing token is far over 1e-2.
TOLERANCE = 5e-3

SENTINEL = 768.0  # exact in bf16; no result of these tests comes near it
GUARD_TOKENS = 16  # untouched rows in front of and behind `out`

TOKEN_INPUTS = ("q", "k", "v", "g", "beta")

DEFINITION_LENGTH = 130  # up to here the token-by-token definition is the reference, beyond it the chunk form


def inputs_for(gate: str, **options) -> dict:
    """`make_inputs` on the device; `lengths` packs sequences, otherwise B (1) sequences of T tokens."""
    lengths = options.pop("lengths", None)
    if lengths is not None:
        options.update(B=1, T=sum(lengths), cu_seqlens=[0, *itertools.accumulate(lengths)])
    options = {"B": 1, "H": 4, "initial_state": True, "device": DEVICE, **options}
    return make_inputs(gate, **options)


def sequence_count(inputs: dict) -> int:
    cu_seqlens = inputs["cu_seqlens"]
    return len(inputs["q"]) if cu_seqlens is None else len(cu_seqlens) - 1


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The values of x behind an odd element offset, in an allocation that ends with x."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def guarded_out(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(buffer full of SENTINEL, its part `out` full of NaN): rows of tokens surround `out` on both sides."""
    v = inputs["v"]
    B, T, HV, V = v.shape
    buffer = torch.full((B, T + 2 * GUARD_TOKENS, HV, V), SENTINEL, dtype=v.dtype, device=v.device)
    out = buffer[:, GUARD_TOKENS : GUARD_TOKENS + T]
    out.fill_(float("nan"))
    return buffer, out


def guarded_state(inputs: dict, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(buffer full of SENTINEL, its part `final_state` full of NaN): one state more on both sides."""
    v = inputs["v"]
    N, HV, D = sequence_count(inputs), v.shape[2], v.shape[3]
    buffer = torch.full((N + 2, HV, D, D), SENTINEL, dtype=dtype, device=v.device)
    buffer[1:-1] = float("nan")
    return buffer, buffer[1:-1]


def assert_guards(buffer: torch.Tensor, inside: torch.Tensor, dim: int) -> None:
    """Everything of `buffer` in front of and behind `inside` along `dim` still holds SENTINEL."""
    margin = (buffer.shape[dim] - inside.shape[dim]) // 2
    for name, start in (("in front of", 0), ("behind", buffer.shape[dim] - margin)):
        guard = buffer.narrow(dim, start, margin)
        assert (guard == SENTINEL).all(), (
            f"written {name} the result: {(guard != SENTINEL).sum().item()} elements"
        )


def run_op(kernel, inputs: dict, state_dtype: torch.dtype | None = None, portable: bool | None = None):
    """The bare operator on guarded, poisoned results; returns (out, final_state or None).

    `state_dtype` is final_state's dtype without an initial state (fp32 by default), `portable` as in call_op.
    """
    initial_state = inputs["initial_state"]
    if initial_state is not None:
        state_dtype = initial_state.dtype
    buffer, out = guarded_out(inputs)
    state_buffer = final_state = None
    if inputs["output_final_state"]:
        state_buffer, final_state = guarded_state(inputs, state_dtype or torch.float32)
    call_op(kernel, inputs, out, final_state, portable)
    assert_guards(buffer, out, dim=1)
    if final_state is not None:
        assert_guards(state_buffer, final_state, dim=0)
    return out, final_state


# Hopper has two kernels; the fixture `each_kernel` of conftest.py runs a test with both.
force_portable = False


def op_arguments(
    inputs: dict, out: torch.Tensor, final_state: torch.Tensor | None, portable: bool = False
) -> tuple:
    """Positional arguments of the operator `kda_prefill`."""
    x = inputs
    scale = x["q"].shape[-1] ** -0.5 if x["scale"] is None else x["scale"]
    return (
        x["q"], x["k"], x["v"], x["g"], x["beta"], x["A_log"], x["dt_bias"], x["initial_state"],
        x["cu_seqlens"], out, final_state, scale, x["lower_bound"], operator_flags(x, PORTABLE=portable),
    )  # fmt: skip


def call_op(
    kernel, inputs: dict, out: torch.Tensor, final_state: torch.Tensor | None, portable: bool | None = None
) -> None:
    """`portable`: the portable kernel, on Hopper too; by default what `each_kernel` says."""
    portable = force_portable if portable is None else portable
    kernel.ops.kda_prefill(*op_arguments(inputs, out, final_state, portable))


def reference(kernel, inputs: dict):
    """(o, final_state) in float64, by the definition for short inputs and by its chunk form for long ones."""
    short = inputs["q"].shape[1] <= DEFINITION_LENGTH
    function = kernel.reference.recurrent_kda if short else kernel.reference.chunk_kda
    with torch.no_grad():
        return function(**to_float64(inputs))


def sequences(inputs: dict) -> list[tuple[int, slice]]:
    """For every sequence its row of the batch and its tokens."""
    if inputs["cu_seqlens"] is None:
        return [(b, slice(None)) for b in range(len(inputs["q"]))]
    bounds = inputs["cu_seqlens"].tolist()
    return [(0, slice(begin, end)) for begin, end in zip(bounds, bounds[1:])]


def worst_errors(inputs: dict, found, expected) -> tuple[float, float]:
    """Relative RMS errors of o and of the final state (0 without one), each in its worst sequence."""
    parts = sequences(inputs)
    o_error = max((rel_rms(expected[0][b, tokens], found[0][b, tokens]) for b, tokens in parts), default=0.0)
    if not inputs["output_final_state"]:
        return o_error, 0.0
    assert found[1].shape == expected[1].shape
    return o_error, max((rel_rms(want, got) for want, got in zip(expected[1], found[1])), default=0.0)


def assert_accurate(kernel, inputs: dict, found, tolerance: float = TOLERANCE) -> None:
    """`found` = (o, final_state) is within the tolerance of the float64 reference in every sequence."""
    o_error, state_error = worst_errors(inputs, found, reference(kernel, inputs))
    assert o_error <= tolerance, f"o: relative RMS error {o_error:.2e} > {tolerance:.1e}"
    assert state_error <= tolerance, f"final_state: relative RMS error {state_error:.2e} > {tolerance:.1e}"


def assert_nan_and_nothing_else(kernel, inputs: dict) -> None:
    """A call with bad cu_seqlens fills its results with NaN, and leaves alone what surrounds them."""
    out_buffer, out = guarded_out(inputs)
    state_buffer, final_state = guarded_state(inputs, torch.float32)
    out.zero_()
    final_state.zero_()
    call_op(kernel, inputs, out, final_state)
    assert out.isnan().all() and final_state.isnan().all()
    assert out_buffer.isnan().sum() == out.numel() and state_buffer.isnan().sum() == final_state.numel()


def assert_same_at_odd_addresses(kernel, inputs: dict) -> None:
    """Rows that are loaded element by element give the same bits."""
    shifted = {name: misaligned(inputs[name]) for name in TOKEN_INPUTS}
    found, expected = run_op(kernel, {**inputs, **shifted}), run_op(kernel, inputs)
    assert all(torch.equal(x, y) for x, y in zip(found, expected))


def assert_intermediate_states(kernel, inputs: dict) -> torch.Tensor:
    """They are accurate, and asking for them changes no other result; returns them."""
    o, final_state, states = kernel.chunk_kda(**inputs, return_intermediate_states=True)
    plain = kernel.chunk_kda(**inputs)
    assert torch.equal(o, plain[0]) and torch.equal(final_state, plain[1])
    assert rel_rms(prefix_states(kernel.reference, inputs), states.double()) <= TOLERANCE
    return states


def launches(kernel, calls: list[dict], folder) -> list[tuple[int, int]]:
    """CTAs, and threads of a CTA, of each kernel that these calls of the operator launch."""
    outs = [guarded_out(inputs)[1] for inputs in calls]
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        for inputs, out in zip(calls, outs):
            call_op(kernel, inputs, out, None)
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    kernels = sorted(
        (event for event in events if event.get("cat") == "kernel"), key=lambda event: event["ts"]
    )
    return [(math.prod(event["args"]["grid"]), math.prod(event["args"]["block"])) for event in kernels]

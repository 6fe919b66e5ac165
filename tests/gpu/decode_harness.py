"""How the GPU tests call the decode kernel: guarded results, the float64 reference, the tolerance."""

from __future__ import annotations

import torch
from decode_inputs import decode_inputs, make_pool
from harness import DEVICE, assert_guards, guarded_out, guarded_state
from kda_inputs import operator_flags, to_float64

BF16, FP32 = torch.bfloat16, torch.float32

# Relative RMS against float64. Everything is float32 but for one rounding of the output, and of a bfloat16
# state, to bfloat16: 1.7e-3. Float32 arithmetic, its exponentials and sums in another order, leaves
# 1e-7 .. 5e-6. This holds for every state; a token's output is a few numbers, whose roundings may be all near
# the largest, 2^-8.
TOLERANCE = {FP32: 2e-5, BF16: 2e-3}
TOKEN_TOLERANCE = {FP32: 2e-5, BF16: 2**-8}
FEW = 4096  # numbers of which the roundings' RMS is not yet what it is of many


def inputs_for(gate: str, N: int = 0, T: int = 0, H: int = 2, HV: int | None = None, **options) -> dict:
    """`decode_inputs` on the device, with an initial state unless told otherwise."""
    return decode_inputs(gate, N, T, H, HV, **{"initial_state": True, "device": DEVICE, **options})


def pool_for(x: dict, slots: int, **options) -> torch.Tensor:
    """`make_pool` with gaps between the slots."""
    return make_pool(x, slots, **{"gap": 64, **options})


def op_arguments(
    x: dict, out, final_state=None, *, state=None, indices=None, accepted=None, inplace=False
) -> tuple:
    """Positional arguments of the operator `kda_decode`."""
    return (
        x["q"], x["k"], x["v"], x["g"], x["beta"], x["A_log"], x["dt_bias"],
        x["initial_state"] if state is None else state, operator_flags(x, INPLACE=inplace), x["lower_bound"],
        out, indices, x["scale"], accepted, x["cu_seqlens"], final_state,
    )  # fmt: skip


def run(kernel, x: dict, **where) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator on results full of NaN between guards: (out, final_state or what was updated)."""
    buffer, out = guarded_out(x)
    if where.get("inplace"):
        kernel.ops.kda_decode(*op_arguments(x, out, **where))
        state = x["initial_state"] if where.get("state") is None else where["state"]
    else:
        given = x["initial_state"] if where.get("state") is None else where["state"]
        state_buffer, state = guarded_state(x, FP32 if given is None else given.dtype)
        kernel.ops.kda_decode(*op_arguments(x, out, state, **where))
        assert_guards(state_buffer, state, dim=0)
    assert_guards(buffer, out, dim=1)
    return out, state


def reference(kernel, x: dict, *, state=None, indices=None, accepted=None, inplace=False):
    """(o, states) in float64; a pool is copied first."""
    call = to_float64(x | ({} if state is None else {"initial_state": state}))
    with torch.no_grad():
        return kernel.reference_decode.fused_recurrent_kda(
            **call, inplace_final_state=inplace, ssm_state_indices=indices, num_accepted_tokens=accepted
        )


def errors(want: torch.Tensor, got: torch.Tensor) -> tuple[float, float]:
    """Relative RMS errors of the worst row along dim 0, and of all. NaN must stand where it stands in `want`,
    and a row of zeros must be one."""
    assert got.shape == want.shape
    assert torch.equal(want.isnan(), got.isnan()), "NaN elsewhere"
    want, got = (y.flatten(1).double().nan_to_num(0.0) for y in (want, got))
    size = want.square().mean(1)
    error = (got - want).square().mean(1)
    assert (error[size == 0] == 0).all(), "a row of zeros is none"
    if not size.any():
        return 0.0, 0.0
    return (error / size.where(size > 0, 1.0)).max().sqrt().item(), (error.sum() / size.sum()).sqrt().item()


def check(kernel, x: dict, **where) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the operator and compares outputs and states with the reference; other slots must stay as is."""
    want_o, want_state = reference(kernel, x, **where)
    given = x["initial_state"] if where.get("state") is None else where["state"]
    before = None if given is None else given.clone()
    o, state = run(kernel, x, **where)
    token, tokens = errors(want_o.flatten(0, 1), o.flatten(0, 1))
    assert token <= TOKEN_TOLERANCE[o.dtype], f"o: relative RMS error {token:.2e} of a token"
    assert tokens <= (TOKEN_TOLERANCE if o.numel() < FEW else TOLERANCE)[o.dtype], f"o: {tokens:.2e} of all"
    state_error, _ = errors(want_state, state)
    assert state_error <= TOLERANCE[state.dtype], f"state: relative RMS error {state_error:.2e}"
    if where.get("inplace"):
        stays = (want_state == before.double()).flatten(1).all(1)
        assert torch.equal(state[stays], before[stays]), "a slot was touched"
        if state._base is not None and state._base.dim() == 2:
            assert state._base[:, state[0].numel() :].isnan().all(), "written between two slots"
    elif given is not None:
        assert torch.equal(given, before), "the initial state was written"
    return o, state

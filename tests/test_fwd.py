"""`flash_kda.fwd` against the float64 reference, and beside flash-linear-attention's Triton `chunk_kda`.

tests/gpu holds the kernel to much more. The comparison with FLA compiles its Triton kernels, which takes some
ten seconds for each case the first time, and runs with FLASH_KDA_TEST_FLA=1 only.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from kda_inputs import make_inputs, rel_rms, to_float64

NO_GPU = not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NO_GPU, reason="needs a CUDA device of compute capability 8.0 or newer"),
]
with_fla = pytest.mark.skipif(
    os.environ.get("FLASH_KDA_TEST_FLA") != "1", reason="FLASH_KDA_TEST_FLA=1 lets FLA compile its kernels"
)

TOLERANCE = 5e-3  # relative RMS for random keys: bf16 operands give 3.5e-3 to 4.6e-3
FLA_TOLERANCE = 1e-2  # FLA keeps more intermediates in bf16

CASES = {
    "seed": ("lower-strong", dict(B=2, T=2048, H=16)),
    "slow-decay": ("lower-weak", dict(B=1, T=1000, H=8)),
    "softplus": ("softplus-init", dict(B=1, T=1000, H=8)),
    "grouped-heads": ("lower-strong", dict(B=1, T=300, H=2, HV=8)),
    "bf16-states": ("lower-strong", dict(B=2, T=300, H=4, state_dtype=torch.bfloat16)),
    "no-initial-state": ("lower-strong", dict(B=2, T=300, H=4, initial_state=False)),
    "pack": ("lower-strong", dict(lengths=(512, 0, 1, 768, 63), H=4)),
}
# Heads and gates as in tests/gpu/test_fla.py: FLA's kernels are compiled anew for others.
FLA_CASES = {
    "batch": ("lower-strong", dict(B=2, T=2048, H=4)),
    "softplus-grouped-heads": ("softplus-init", dict(B=1, T=1000, H=2, HV=4)),
    "pack": CASES["pack"],
}


def inputs_for(gate: str, options: dict) -> dict:
    options = {"initial_state": True, **options}
    if lengths := options.pop("lengths", None):
        options.update(B=1, T=sum(lengths), cu_seqlens=[0, *itertools.accumulate(lengths)])
    return make_inputs(gate, state_v_first=True, device="cuda", **options)


def run_fwd(x: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, final_state) of `flash_kda.fwd`, which writes over NaN."""
    import flash_kda

    N = len(x["q"]) if x["cu_seqlens"] is None else len(x["cu_seqlens"]) - 1
    state_dtype = torch.float32 if x["initial_state"] is None else x["initial_state"].dtype
    out = torch.full_like(x["v"], float("nan"))
    final_state = torch.full(
        (N, x["v"].shape[2], 128, 128), float("nan"), dtype=state_dtype, device=x["v"].device
    )
    with torch.inference_mode():
        flash_kda.fwd(
            x["q"], x["k"], x["v"], x["g"], x["beta"], 128**-0.5, out, x["A_log"], x["dt_bias"],
            x["lower_bound"], initial_state=x["initial_state"], final_state=final_state,
            cu_seqlens=x["cu_seqlens"],
        )  # fmt: skip
    return out, final_state


@pytest.mark.parametrize("case", CASES)
def test_fwd_is_the_reference(kernel_package, case):
    inputs = inputs_for(*CASES[case])
    out, final_state = run_fwd(inputs)
    with torch.no_grad():
        o, state = kernel_package.reference.chunk_kda(**to_float64(inputs))
    assert rel_rms(o, out) <= TOLERANCE
    assert rel_rms(state, final_state) <= TOLERANCE


@with_fla
@pytest.mark.parametrize("case", FLA_CASES)
def test_fwd_beside_fla(kernel_package, case, monkeypatch):
    """The same arguments mean the same to both: each is close to the reference, and ours is no further."""
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    monkeypatch.setenv("FLA_FLASH_KDA", "0")
    from fla.ops.kda import chunk_kda

    inputs = inputs_for(*FLA_CASES[case])
    ours = run_fwd(inputs)
    with torch.inference_mode():
        theirs = chunk_kda(**inputs, safe_gate=inputs["lower_bound"] is not None)
    with torch.no_grad():
        expected = kernel_package.reference.chunk_kda(**to_float64(inputs))
    for want, our, their in zip(expected, ours, theirs):
        assert rel_rms(want, their) <= FLA_TOLERANCE
        assert rel_rms(want, our) <= TOLERANCE

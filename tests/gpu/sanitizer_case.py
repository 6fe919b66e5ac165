"""Small calls of the kernel for compute-sanitizer; test_sanitizer.py runs this file under each tool.

Results get allocations of their exact size, so run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]

from harness import inputs_for, op_arguments

BF16, FP32 = torch.bfloat16, torch.float32

CASES = {
    "lower-strong": ("lower-strong", dict(B=2, T=33)),
    "lower-weak, packs, v-first": ("lower-weak", dict(lengths=(1, 0, 64, 17), state_v_first=True)),
    "softplus-init, grouped heads": ("softplus-init", dict(T=65, HV=4)),
    "softplus-resets, fp32 g and beta": ("softplus-resets", dict(T=31, g_dtype=FP32, beta_dtype=FP32)),
    "mixed-channels, int32 packs": (
        "mixed-channels",
        dict(lengths=(15, 0, 16), cu_seqlens_dtype=torch.int32),
    ),
    "zero, no states": ("zero", dict(T=49, initial_state=False, output_final_state=False, l2norm=False)),
    "bf16 g, negative eigenvalues": (
        "zero",
        dict(T=16, g_dtype=BF16, allow_neg_eigval=True, state_v_first=True),
    ),
    "no token": ("lower-weak", dict(lengths=(0, 0))),
}


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The values of x behind an odd element offset, in an allocation that ends with x."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def main() -> None:
    from kernels import get_local_kernel

    kernel = get_local_kernel(ROOT)
    for name, (gate, options) in CASES.items():
        inputs = inputs_for(gate, **{"H": 2, **options})
        o, final_state = kernel.chunk_kda(**inputs)
        shifted = {name: misaligned(inputs[name]) for name in ("q", "k", "v", "g", "beta")}
        o_shifted, _ = kernel.chunk_kda(**{**inputs, **shifted})
        o_portable = torch.empty_like(o)
        kernel.ops.kda_prefill(*op_arguments(inputs, o_portable, None), portable=True)
        torch.cuda.synchronize()
        for result in (o, o_shifted, o_portable, final_state):
            if result is not None and not result.isfinite().all():
                raise SystemExit(f"{name}: the result is not finite")

    inputs = inputs_for("lower-weak", lengths=(20, 20), H=2)
    inputs["cu_seqlens"] += torch.tensor([0, 1000, 0], device="cuda")
    o, final_state = kernel.chunk_kda(**inputs)
    if not (o.isnan().all() and final_state.isnan().all()):
        raise SystemExit("bad cu_seqlens: the result is not NaN")
    print(f"{len(CASES)} cases done")


if __name__ == "__main__":
    main()

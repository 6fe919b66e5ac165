"""Small calls of the kernels for compute-sanitizer; test_sanitizer.py runs this file under each tool.

With names of PARTS as arguments, only those.

Results get allocations of their exact size, so run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]

import decode_harness as decoding
from decode_inputs import shuffled_slots
from fused_decode_inputs import fused_inputs
from harness import TOKEN_INPUTS, inputs_for, misaligned, op_arguments
from layer_inputs import LENGTHS, make_conv, make_norm

BF16, FP32 = torch.bfloat16, torch.float32

CASES = {
    # On Hopper in clusters.
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
    # The cases above use no slot twice. These do, in clusters of 8, of 5 (18 items of work), of 4 or 3 (30) and of 2 (60); but
    # for one sequence they have no tokens, and cost little.
    "one head, all slots twice": ("lower-weak", dict(T=49 * 32 + 1, H=1)),
    "one head, all slots twice, fp32 g": ("softplus-resets", dict(T=49 * 32 + 1, H=1, g_dtype=FP32)),
    "18 items": ("lower-strong", dict(lengths=(31 * 32 + 1, *(0,) * 8))),
    "30 items": ("lower-strong", dict(lengths=(25 * 32 + 1, *(0,) * 14))),
    "60 items": ("softplus-resets", dict(lengths=(17 * 32 + 1, *(0,) * 29))),
    # Without any, or without a token. Single CTAs use all slots twice; of the shared ones, with 144 items, each has
    # several sequences.
    "no token": ("lower-weak", dict(lengths=(0, 0))),
    "single CTAs": ("lower-strong", dict(lengths=(13 * 32 + 1, *(0,) * 35))),
    "single CTAs, fp32 g": (
        "mixed-channels",
        dict(lengths=(11 * 32 + 1, *(0,) * 35), state_v_first=True),
    ),
    "shared CTAs": ("lower-strong", dict(lengths=(33, 0, 5, 64) * 18)),
    "shared CTAs, fp32 g": ("softplus-init", dict(lengths=(33, 0, 5, 64) * 18, g_dtype=FP32)),
}

DECODE_CASES = {
    "one token": ("lower-weak", dict(N=3, T=1)),
    "four tokens, v-first, grouped heads": ("softplus-init", dict(N=3, T=4, HV=4, state_v_first=True)),
    "bf16 states, fp32 g": ("softplus-resets", dict(N=2, T=3, state_dtype=BF16, g_dtype=FP32)),
    "bf16 states, v-first": ("zero", dict(N=2, T=17, state_dtype=BF16, state_v_first=True, l2norm=False)),
    "packs": ("lower-strong", dict(lengths=(1, 0, 5), beta_dtype=FP32)),
    "no states": ("mixed-channels", dict(N=2, T=1, initial_state=False, allow_neg_eigval=True)),
    "no token": ("lower-weak", dict(lengths=(0, 0))),
}


def decode(kernel) -> None:
    """The decode kernel: states given and in place, odd addresses, slots of a pool, padding, wrong slots."""
    for name, (gate, options) in DECODE_CASES.items():
        x = decoding.inputs_for(gate, **options)
        results = [*kernel.fused_recurrent_kda(**x)]
        shifted = {name: misaligned(x[name]) for name in TOKEN_INPUTS}
        results += kernel.fused_recurrent_kda(**x | shifted)
        if x["initial_state"] is not None:
            results += kernel.fused_recurrent_kda(**x, inplace_final_state=True)
        torch.cuda.synchronize()
        if not all(result.isfinite().all() for result in results):
            raise SystemExit(f"decode, {name}: the result is not finite")

    for dtype in (FP32, BF16):
        x = decoding.inputs_for("lower-weak", 5, 3)
        slots = shuffled_slots(15, 20, device="cuda").view(5, 3)
        slots[0], slots[1, 1], slots[2, 2], slots[3, 0] = -1, -1, 20, -(2**31)
        counts = torch.tensor([1, 3, 1, 1, 3], device="cuda")
        pool = decoding.pool_for(x, 20, dtype=dtype, gap=0)
        for indices, accepted in ((slots, counts), (slots, None), (slots[:, 2], None)):
            o, _ = kernel.fused_recurrent_kda(
                **x | dict(initial_state=pool), ssm_state_indices=indices, num_accepted_tokens=accepted,
                inplace_final_state=True,
            )  # fmt: skip
            torch.cuda.synchronize()
            if not o[2].isnan().all() or not o[4].isfinite().all() or not pool.isfinite().all():
                raise SystemExit("decode, slots: NaN in the wrong places")


def fused_step(kernel) -> None:
    """The fused decode step: the plain call, odd addresses, a bias, slots of a pool, one of them padding."""
    for options in (dict(N=3, T=1), dict(N=2, T=3, bias=True, state_v_first=True), dict(N=2, T=1, width=3)):
        x = fused_inputs("lower-weak", device="cuda", **options)
        shifted = {name: misaligned(x[name]) for name in ("q", "k", "v", "g", "beta", "gate")}
        for call in (x, x | shifted):
            if not kernel.fused_kda_decode(**call).isfinite().all():
                raise SystemExit(f"fused step, {options}: the result is not finite")
    x = fused_inputs("softplus-init", 3, 2, slots=5, device="cuda")
    indices = torch.tensor([4, -1, 0], dtype=torch.int32, device="cuda")
    out = kernel.fused_kda_decode(**x, ssm_state_indices=indices)
    if not out.isfinite().all() or out[1].any():
        raise SystemExit("fused step, slots: wrong results")


def run_layer_operators(kernel) -> None:
    """The operators around the delta rule: aligned and not, the convolution's state in place."""
    for offset, channels in ((0, (8, 16, 24)), (1, (1024, 1024, 2056))):
        x = make_conv(lengths=LENGTHS, channels=channels, offset=offset, device="cuda")
        results = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in x[:3]]
        kernel.ops.kda_short_conv(*x, *results, x.initial_state)
        x.cu_seqlens[1] = 10_000
        kernel.ops.kda_short_conv(*x, *(torch.empty_like(part) for part in results), x.initial_state)
        if not all(part.isfinite().all() for part in results) or not x.initial_state.isnan().all():
            raise SystemExit("short convolution: wrong results")
    for x, gate, weight in (make_norm(device="cuda"), map(misaligned, make_norm(device="cuda"))):
        out = torch.empty_like(x)
        kernel.ops.gated_rms_norm(x, gate, weight, out, 1e-5)
        if not out.isfinite().all():
            raise SystemExit("gated RMS norm: the result is not finite")


def prefill(kernel, name: str) -> None:
    gate, options = CASES[name]
    inputs = inputs_for(gate, **{"H": 2, **options})
    o, final_state = kernel.chunk_kda(**inputs)
    shifted = {name: misaligned(inputs[name]) for name in TOKEN_INPUTS}
    o_shifted, _ = kernel.chunk_kda(**{**inputs, **shifted})
    o_portable = torch.empty_like(o)
    kernel.ops.kda_prefill(*op_arguments(inputs, o_portable, None, portable=True))
    torch.cuda.synchronize()
    for result in (o, o_shifted, o_portable, final_state):
        if result is not None and not result.isfinite().all():
            raise SystemExit(f"{name}: the result is not finite")


def bad_cu_seqlens(kernel) -> None:
    for H in (2, 36):
        inputs = inputs_for("lower-weak", lengths=(20, 20), H=H)
        inputs["cu_seqlens"] += torch.tensor([0, 1000, 0], device="cuda")
        o, final_state = kernel.chunk_kda(**inputs)
        if not (o.isnan().all() and final_state.isnan().all()):
            raise SystemExit(f"bad cu_seqlens, {H} heads: the result is not NaN")


PARTS = {
    "decode": decode,
    "fused step": fused_step,
    **{name: partial(prefill, name=name) for name in CASES},
    "bad cu_seqlens": bad_cu_seqlens,
    "layer operators": run_layer_operators,
}


def main(chosen: list[str]) -> None:
    from kernels import get_local_kernel

    kernel = get_local_kernel(ROOT)
    for number, name in enumerate(chosen, 1):
        start = time.monotonic()
        PARTS[name](kernel)
        torch.cuda.synchronize()
        print(f"{number} of {len(chosen)}: {name}, {time.monotonic() - start:.1f} s", flush=True)
    print(f"{len(chosen)} cases done")


if __name__ == "__main__":
    main(sys.argv[1:] or list(PARTS))

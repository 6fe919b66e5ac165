#!/usr/bin/env python3
"""Run the cases of flash-linear-attention's own KDA tests through its `chunk_kda`, on our backend.

    python scripts/fla_cases.py               both sets, FLA's Triton kernels are never started
    python scripts/fla_cases.py --set bf16    one set
    python scripts/fla_cases.py --with-fla    also run what we hand back on FLA's kernels, not tuned

Set "published" has dtype and head dim as FLA's tests have them, mostly fp16 and 64. Set "bf16" has every
case in bfloat16 with D = 128, once with and once without states. A case that our backend takes must reach
our kernel and stay within FLA's own tolerance of the recurrence in float64, on the same rounded inputs; for
FLA's measure of error see `error`. Shapes, distributions and tolerances are those of tests/ops/test_kda.py
of FLA 0.6; the random numbers are not. Left out are gradients, `fused_recurrent_kda`, and cases that only
repeat another with positional arguments.

Prints a line a case, then for each set how many cases ran on our kernel, were handed back (with the
reasons) and failed. The exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
SETS = ("published", "bf16")
FP16, BF16 = torch.float16, torch.bfloat16
TOLERANCE = 0.005  # FLA: chunk_kda against the naive recurrence
FLASH_TOLERANCE = 0.006  # FLA: its FlashKDA backend against the recurrence in float64
PAIR_TOLERANCE = 1e-4  # FLA: two calls that mean the same


@dataclass(frozen=True)
class Case:
    """One case of FLA's tests: a call of chunk_kda, or a pair of calls that must agree.

    Attributes:
        test: FLA's name of the test, without "test_".
        lengths: tokens of each sequence; packed if `packed`, else a batch of equal lengths.
        gate: "" for a pre-activated g, "softplus" or "lower" for one that the kernel activates.
        normalizer, mask_p: g = logsigmoid(N(0, 1)) / normalizer; a share mask_p of it is 0 or, in packs,
            -1000, a hard reset.
        bounded: a pre-activated g is clamped to [-5, 0] (FLA's safe_gate).
        keys: "uniform" in [0, 1], all of them alike, or "normal".
        pair: "" or what the second call has differently: "v-first" states, or the "sigmoid" of beta inside.
        flags: further arguments.
    """

    test: str
    lengths: tuple[int, ...]
    H: int
    HV: int
    D: int
    dtype: torch.dtype
    packed: bool = False
    scale: float | None = None
    gate: str = ""
    normalizer: float = 1.0
    mask_p: float = 0.0
    bounded: bool = False
    keys: str = "uniform"
    l2norm: bool = False
    beta_logits: bool = False
    neg_eigval: bool = False
    has_A_log: bool = True
    has_dt_bias: bool = True
    v_first: bool = False
    states: bool = True
    pair: str = ""
    tolerance: float = TOLERANCE
    flags: tuple[tuple[str, object], ...] = ()

    @property
    def label(self) -> str:
        shape = "+".join(map(str, self.lengths)) if self.packed else f"{len(self.lengths)}x{self.lengths[0]}"
        heads = f"H{self.H}" if self.H == self.HV else f"H{self.H}/{self.HV}"
        parts = [shape, heads, f"D{self.D}", str(self.dtype).split(".")[1], self.gate or "log-decay"]
        options = {
            "l2norm": self.l2norm,
            "neg-eigval": self.neg_eigval,
            "no-A_log": not self.has_A_log,
            "no-dt_bias": not self.has_dt_bias,
            f"/{self.normalizer:g}": self.normalizer != 1,
            f"mask{self.mask_p:g}": self.mask_p > 0,
            "stateless": not self.states,
            self.pair: bool(self.pair),
            "intermediate": "return_intermediate_states" in dict(self.flags),
        }
        return " ".join(parts + [word for word, present in options.items() if present])


def published() -> list[Case]:
    """The forward cases of FLA's tests that call chunk_kda."""
    cases = []
    # B, T, H, HV, D, scale, normalizer, mask_p, l2norm, gate in kernel, dtype, safe_gate, chunk_size
    for B, T, H, HV, D, scale, normalizer, mask_p, l2norm, gate, dtype, safe, chunk in (
        (1, 63, 1, 1, 64, 1, 1, 0, False, False, FP16, True, 64),
        (2, 500, 3, 3, 60, 1, 1, 0, False, False, FP16, True, 64),
        (2, 1000, 3, 3, 64, 0.1, 1, 0.5, False, False, FP16, False, 64),
        (3, 1024, 4, 4, 100, 1, 0.1, 0, False, False, FP16, False, 64),
        (4, 1024, 4, 4, 128, 0.1, 1, 0, False, False, FP16, True, 64),
        (4, 1024, 4, 4, 128, 0.1, 1, 0, True, False, FP16, True, 64),
        (2, 1500, 4, 4, 128, 0.1, 10, 0, False, True, FP16, False, 64),
        (4, 2048, 8, 8, 64, 0.1, 1, 0, False, True, FP16, True, 64),
        (2, 1024, 2, 4, 64, 0.1, 1, 0, False, False, FP16, False, 64),
        (2, 1024, 2, 8, 64, 0.1, 1, 0, False, True, FP16, False, 64),
        (2, 1024, 4, 8, 128, 0.1, 1, 0, True, True, FP16, False, 64),
        (2, 160, 2, 4, 64, 0.1, 1, 0, False, True, FP16, True, 32),
        (2, 1024, 2, 4, 64, 0.1, 1, 0, True, True, BF16, True, 64),
        (2, 1024, 2, 4, 64, 0.1, 1, 0, False, True, BF16, False, 64),
        (2, 160, 2, 4, 64, 0.1, 1, 0, False, True, BF16, True, 32),
        (2, 1024, 2, 8, 128, 0.1, 1, 0, True, True, BF16, False, 64),
    ):
        kind = ("lower" if safe else "softplus") if gate else ""
        options = dict(scale=scale, gate=kind, normalizer=normalizer, mask_p=mask_p, bounded=safe)
        options.update(l2norm=l2norm, flags=(("chunk_size", chunk),))
        cases.append(Case("chunk", (T,) * B, H, HV, D, dtype, **options))
    for B, T, H, D, scale in (
        (1, 63, 1, 64, 1),
        (2, 500, 3, 60, 1),
        (3, 1024, 4, 128, 0.1),
        (4, 2048, 8, 64, 0.1),
    ):
        cases.append(Case("chunk_state_v_first", (T,) * B, H, H, D, FP16, scale=scale, pair="v-first"))
    for B, T, H, D, neg_eigval, dtype in (
        (1, 8192, 96, 128, False, BF16),
        (1, 8192, 96, 128, True, BF16),
        (2, 96, 2, 64, True, FP16),
    ):
        test = "chunk_use_beta_sigmoid_in_kernel"
        cases.append(Case(test, (T,) * B, H, H, D, dtype, neg_eigval=neg_eigval, pair="sigmoid"))
    varlen = (
        (60, 0.1, (15,), "softplus", False, 64),
        (64, 0.9, (256, 244, 500), "softplus", False, 64),
        (128, 0.5, (256, 244, 500), "", False, 64),
        (100, 0, (15, 85, 200, 900, 800), "softplus", False, 64),
        (256, 0, (100, 200, 900, 1800, 1096), "", True, 64),
    )
    for test, table in (
        ("chunk_varlen", (*varlen, (60, 0.1, (31, 65, 64), "softplus", False, 32))),
        ("chunk_varlen_prefill", ((60, 0.1, (8192,), "softplus", False, 64), *varlen[1:])),
    ):
        for D, mask_p, lengths, gate, bounded, chunk in table:
            options = dict(gate=gate, mask_p=mask_p, bounded=bounded, flags=(("chunk_size", chunk),))
            cases.append(Case(test, lengths, 4, 4, D, FP16, packed=True, keys="normal", **options))
    intermediate = (("return_intermediate_states", True),)
    for packed in (False, True):
        lengths = (512, 512) if packed else (1024, 1024)
        test = "chunk_return_intermediate_states"
        cases.append(Case(test, lengths, 4, 4, 128, BF16, packed, keys="normal", flags=intermediate))
    return cases + flash_kda_cases()


def flash_kda_cases() -> list[Case]:
    """FLA's tests of its FlashKDA backend: everything in the kernel, V-first states, scale by default."""
    everything = dict(
        gate="lower",
        l2norm=True,
        beta_logits=True,
        v_first=True,
        tolerance=FLASH_TOLERANCE,
        D=128,
        dtype=BF16,
    )
    variants = (dict(neg_eigval=True), dict(has_A_log=False), dict(has_dt_bias=False))
    cases = []
    for lengths, H in (((1024,), 4), ((2048, 2048), 8), ((4096,), 16)):
        cases.append(Case("flash_kda_chunk", lengths, H, H, **everything))
    cases += [Case("flash_kda_chunk", (1024,), 4, 4, **everything, **variant) for variant in variants]
    packs = (((256, 244, 500), 4), ((100, 200, 900, 800), 8), ((101, 202, 902, 1802, 1089), 16))
    everything.update(packed=True, keys="normal")
    for lengths, H in packs:
        cases.append(Case("flash_kda_chunk_varlen", lengths, H, H, **everything))
    lengths, H = packs[0]
    cases += [Case("flash_kda_chunk_varlen", lengths, H, H, **everything, **variant) for variant in variants]
    return cases


def in_bf16(cases: list[Case]) -> list[Case]:
    """Every case in bfloat16 with D = 128, and those that are no pair without states too; no case twice."""
    made = []
    for case in cases:
        case = replace(case, dtype=BF16, D=128)
        made += [case] if case.pair else [case, replace(case, states=False)]
    return list(dict.fromkeys(made))


def calls_of(case: Case, device: str = "cuda") -> list[dict]:
    """Keyword arguments of chunk_kda: of one call, or of the two of a pair."""
    random = torch.Generator(device).manual_seed(42)
    B, T = (1, sum(case.lengths)) if case.packed else (len(case.lengths), case.lengths[0])
    H, HV, D = case.H, case.HV, case.D

    def normal(*size, dtype=torch.float32):
        return torch.randn(size, generator=random, device=device).to(dtype)

    def uniform(*size, dtype=torch.float32):
        return torch.rand(size, generator=random, device=device).to(dtype)

    draw = normal if case.keys == "normal" else uniform
    q, k = draw(B, T, H, D, dtype=case.dtype), draw(B, T, H, D, dtype=case.dtype)
    if not case.l2norm:
        q, k = (F.normalize(x, p=2, dim=-1) for x in (q, k))
    g = normal(B, T, HV, D, dtype=case.dtype if case.gate else torch.float32)
    if not case.gate:
        g = F.logsigmoid(g) / case.normalizer
    if case.mask_p:
        g = g.masked_fill(uniform(*g.shape) < case.mask_p, -1000.0 if case.packed else 0.0)
    beta = normal(B, T, HV, dtype=case.dtype)
    arguments = dict(
        q=q,
        k=k,
        v=draw(B, T, HV, D, dtype=case.dtype),
        g=g.clamp(-5, 0) if case.bounded and not case.gate else g,
        beta=beta if case.beta_logits else beta.sigmoid(),
        scale=case.scale,
        initial_state=normal(len(case.lengths), HV, D, D) if case.states else None,
        output_final_state=case.states,
        use_gate_in_kernel=bool(case.gate),
        use_qk_l2norm_in_kernel=case.l2norm,
        use_beta_sigmoid_in_kernel=case.beta_logits,
        allow_neg_eigval=case.neg_eigval and case.beta_logits,
        safe_gate=case.bounded or case.gate == "lower",
        lower_bound=-5.0 if case.bounded or case.gate == "lower" else None,
        state_v_first=case.v_first,
        **dict(case.flags),
    )
    if case.gate:
        A_log = normal(HV) if case.test == "chunk" else (1 + 15 * uniform(HV)).log()
        arguments["A_log"] = A_log if case.has_A_log else None
        arguments["dt_bias"] = normal(HV * D) if case.has_dt_bias else None
    if case.packed:
        ends = torch.tensor(case.lengths).cumsum(0).tolist()
        arguments["cu_seqlens"] = torch.tensor([0, *ends], device=device)
    if case.pair == "v-first":
        state = arguments["initial_state"].mT.contiguous()
        return [arguments, {**arguments, "state_v_first": True, "initial_state": state}]
    if case.pair == "sigmoid":
        in_kernel = dict(use_beta_sigmoid_in_kernel=True, allow_neg_eigval=case.neg_eigval)
        activated = beta.float().sigmoid() * (2 if case.neg_eigval else 1)
        return [{**arguments, "beta": activated}, {**arguments, **in_kernel, "beta": beta}]
    return [arguments]


def error(expected: torch.Tensor, found: torch.Tensor) -> float:
    """FLA's measure: RMS of the difference over RMS of what is expected, of the whole tensor. NaN is inf."""
    expected, found = expected.double(), found.double()
    difference = expected - found
    if not torch.isfinite(difference).all():
        return float("inf")
    if difference.abs().max() <= 1e-6:
        return 0.0
    return (difference.square().mean().sqrt() / (expected.square().mean().sqrt() + 1e-8)).item()


def recurrence(reference, arguments: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The definition, token by token, in float64."""
    fla_s_own = ("safe_gate", "chunk_size", "return_intermediate_states")
    upcast = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
        if name not in fla_s_own
    }
    return reference.recurrent_kda(**upcast)


class Runner:
    """FLA's chunk_kda with our backend registered, and a count of the calls that reach our kernel."""

    def __init__(self, with_fla: bool):
        sys.path.insert(0, str(ROOT))
        import hf_layer.fla
        from hf_layer import load_kernel, reference

        load = load_kernel()
        if load.module is None:
            sys.exit(f"error: no kernel: {load.reason}")
        self.calls = 0
        self.kernel_function = load.module.chunk_kda
        load.module.chunk_kda = self._counted  # what register() takes
        hf_layer.fla.register()
        from fla.ops.kda import chunk_kda

        self.chunk_kda, self.reference, self.with_fla = chunk_kda, reference, with_fla
        self.verifier = hf_layer.fla.Backend().chunk_kda_verifier

    def _counted(self, *args, **kwargs):
        self.calls += 1
        return self.kernel_function(*args, **kwargs)

    def run(self, case: Case) -> tuple[str, str]:
        """("ours" | "handed back" | "failed", the errors or the reason)."""
        calls = calls_of(case)
        accepted, reason = self.verifier(**calls[-1])
        if not accepted and not self.with_fla:
            return "handed back", reason
        before = self.calls
        results = [self.chunk_kda(**call) for call in calls]
        reached = self.calls - before
        if reached != (len(calls) if accepted else 0):
            return "failed", f"{reached} of {len(calls)} calls reached our kernel, reason: {reason}"
        if case.pair:
            (o, state), found, limit = *results, PAIR_TOLERANCE
            expected = (o, state.mT if case.pair == "v-first" else state)
        else:
            expected, found, limit = recurrence(self.reference, calls[0]), results[0], case.tolerance
        errors = [error(*pair) for pair in zip(expected, found) if pair[0] is not None]
        text = " ".join(f"{name} {value:.1e}" for name, value in zip(("o", "state"), errors))
        text += f" (limit {limit:g})"
        if max(errors) >= limit:
            return "failed", text
        return ("ours", text) if accepted else ("handed back", f"{reason}; FLA: {text}")


def run_set(runner: Runner, name: str, cases: list[Case]) -> int:
    """Prints every case and the counts; returns how many failed."""
    outcomes, reasons = Counter(), Counter()
    for case in cases:
        outcome, text = runner.run(case)
        outcomes[outcome] += 1
        reasons[text.partition(";")[0]] += outcome == "handed back"
        print(f"{outcome:<12}{case.test:<34}{case.label:<68}{text}", flush=True)
        torch.cuda.empty_cache()
    counts = (outcomes[outcome] for outcome in ("ours", "handed back", "failed"))
    print("== {}: {} cases: {} on our kernel, {} handed back, {} failed".format(name, len(cases), *counts))
    for reason, count in reasons.most_common():
        if count:
            print(f"   handed back {count}: {reason}")
    return outcomes["failed"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=SETS, action="append", help="only this one")
    parser.add_argument("--with-fla", action="store_true", help="run what we hand back on FLA's kernels")
    options = parser.parse_args()
    os.environ.pop("FLA_FLASH_KDA", None)
    runner = Runner(options.with_fla)
    sets = {"published": published(), "bf16": in_bf16(published())}
    tuning = contextlib.nullcontext()
    if options.with_fla:
        sys.path.append(str(ROOT / "benchmarks"))
        from fla_tuning import untuned

        tuning = untuned()
    with torch.inference_mode(), tuning:
        failed = sum(run_set(runner, name, sets[name]) for name in options.set or SETS)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""Host time of an eager call: how long the caller's thread is busy, whatever the device does meanwhile.

    python benchmarks/host.py                       with the kernel for this machine's GPU, or else for CPUs
    python benchmarks/host.py --grad                with gradients enabled, as outside inference_mode
    python benchmarks/host.py --backend cpu         the package's variant for CPUs

On a GPU calls are of one sequence of SHORT tokens and 4 heads, which a GPU computes sooner than the host
asks, and each round of them starts on an idle device. On a CPU the kernel's own time would count, so calls of
no sequence are measured, for which no kernel runs and nothing is launched.

For scale, torch.empty, an addition and the package's operators by themselves stand beside the calls. The last
column is what a call adds to its operator in Python; the operators whose names end in "new" allocate their
results. Rounds of the rows alternate, so that a clock that changes touches all of them. Writes
host-<device>.json into --out.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import environment as env
from timing import Timing

D, HEADS, SHORT = 128, 4, 16
CALLS, ROUNDS, WARMUP_ROUNDS = 200, 15, 3


def make_inputs(device: str) -> dict:
    """Of one short sequence, on a CPU of none: q, k, v, g [1, T, H, D], states [N, H, V, K], the outputs."""
    T, N = (0, 0) if device == "cpu" else (SHORT, 1)

    def bf16(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    x = {name: bf16(1, T, HEADS, D) for name in ("q", "k", "v", "g")} | {"beta": bf16(1, T, HEADS)}
    x["A_log"], x["dt_bias"] = torch.zeros(HEADS, device=device), torch.zeros(HEADS, D, device=device)
    x["initial_state"] = torch.zeros(N, HEADS, D, D, device=device)
    x["cu_seqlens"] = torch.zeros(1, dtype=torch.int32) if N == 0 else None
    x["out"], x["final_state"] = torch.empty_like(x["v"]), torch.empty_like(x["initial_state"])
    return x


def make_calls(kernel, x: dict) -> dict:
    """The rows: name -> (call, the name of the operator in it or None).

    Keywords are written out, as callers do: to merge dictionaries of them takes Python a microsecond.
    """
    ops, flags = (sys.modules[f"{kernel.__name__}.{name}"] for name in ("ops", "flags"))
    q, k, v, g, beta = (x[name] for name in ("q", "k", "v", "g", "beta"))
    A_log, dt_bias, state, cu_seqlens = (
        x[name] for name in ("A_log", "dt_bias", "initial_state", "cu_seqlens")
    )
    out, final_state, row = x["out"], x["final_state"], torch.ones(D, device=v.device)
    prefill_flags = flags.attention_flags(True, True, True, False, True)
    decode_flags = prefill_flags | flags.INPLACE
    # the operators' rarer arguments, which only calls of no sequence need
    bounds = () if cu_seqlens is None else (None, None, None, cu_seqlens)
    new_bounds = () if cu_seqlens is None else (None, cu_seqlens)

    def prefill():
        ops.kda_prefill(
            q, k, v, g, beta, A_log, dt_bias, state, cu_seqlens, out, final_state, D**-0.5, -5.0, prefill_flags
        )  # fmt: skip

    def decode():
        ops.kda_decode(q, k, v, g, beta, A_log, dt_bias, state, decode_flags, -5.0, None, *bounds)

    def decode_into_out():
        ops.kda_decode(q, k, v, g, beta, A_log, dt_bias, state, decode_flags, -5.0, out, *bounds)

    def prefill_new():
        ops.kda_prefill_new(q, k, v, g, beta, A_log, dt_bias, state, prefill_flags, -5.0, *new_bounds)

    def decode_new():
        ops.kda_decode_new(q, k, v, g, beta, A_log, dt_bias, state, prefill_flags, -5.0, *new_bounds)

    def fwd():
        kernel.fwd(q, k, v, g, beta, D**-0.5, out, A_log, dt_bias, -5.0, state, final_state, cu_seqlens)

    def chunk():
        kernel.chunk_kda(
            q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, initial_state=state, cu_seqlens=cu_seqlens,
            lower_bound=-5.0, use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, output_final_state=True, state_v_first=True,
        )  # fmt: skip

    def recurrent():
        kernel.fused_recurrent_kda(
            q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, initial_state=state, cu_seqlens=cu_seqlens,
            lower_bound=-5.0, use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, output_final_state=True, state_v_first=True,
        )  # fmt: skip

    def recurrent_in_place():
        kernel.fused_recurrent_kda(
            q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, initial_state=state, cu_seqlens=cu_seqlens,
            lower_bound=-5.0, use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, inplace_final_state=True, state_v_first=True,
        )  # fmt: skip

    def recurrent_into_out():
        kernel.fused_recurrent_kda(
            q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, initial_state=state, cu_seqlens=cu_seqlens,
            lower_bound=-5.0, use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, inplace_final_state=True, state_v_first=True, out=out,
        )  # fmt: skip

    return {
        "torch.empty": (lambda: torch.empty(D, device=row.device), None),
        "add": (lambda: torch.add(row, row), None),
        "operator kda_prefill": (prefill, None),
        "fwd": (fwd, "operator kda_prefill"),
        "operator kda_prefill_new": (prefill_new, None),
        "chunk_kda": (chunk, "operator kda_prefill_new"),
        "operator kda_decode": (decode, None),
        "fused_recurrent_kda, in place": (recurrent_in_place, "operator kda_decode"),
        "operator kda_decode into out": (decode_into_out, None),
        "fused_recurrent_kda into out": (recurrent_into_out, "operator kda_decode into out"),
        "operator kda_decode_new": (decode_new, None),
        "fused_recurrent_kda": (recurrent, "operator kda_decode_new"),
    }


def measure(calls: dict, synchronize) -> list[dict]:
    """Microseconds of a call, a row for each; a sample is the mean of CALLS calls after an idle moment."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for round in range(WARMUP_ROUNDS + ROUNDS):
        for name, (call, _) in calls.items():
            synchronize()
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            passed_us = 1e6 * (time.perf_counter() - begin) / CALLS
            if round >= WARMUP_ROUNDS:
                samples[name].append(passed_us)
    synchronize()
    rows = []
    for name, (_, operator) in calls.items():
        timing = Timing.of(samples[name])
        row = {"name": name, "us": timing.median_ms, "p10_us": timing.p10_ms, "p90_us": timing.p90_ms}
        if operator is not None:
            row["over_operator_us"] = row["us"] - next(r["us"] for r in rows if r["name"] == operator)
        rows.append(row)
    return rows


HEADER = ("call", "us", "p10..p90", "over its operator")


def cells(row: dict) -> tuple[str, ...]:
    over = f"{row['over_operator_us']:.1f}" if "over_operator_us" in row else ""
    return row["name"], f"{row['us']:.1f}", f"{row['p10_us']:.1f}..{row['p90_us']:.1f}", over


def print_rows(rows: list[dict], title: str) -> None:
    """As a table where `rich` is installed, else as lines."""
    if importlib.util.find_spec("rich") is None:
        print(title)
        for row in ([*HEADER], *map(cells, rows)):
            print(f"{row[0]:<32}{row[1]:>8}{row[2]:>16}{row[3]:>20}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in HEADER:
        table.add_column(name, justify="left" if name == "call" else "right")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(*cells(row), end_section=after is not None and after["name"].startswith("operator"))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def describe(kernel, device: str) -> dict:
    """As environment.describe, which needs a GPU."""
    if device == "cuda":
        return env.describe(kernel)
    metadata = env.metadata_of(kernel)
    return {
        "device": f"cpu {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernel_id": metadata["id"],
        "commit": env.commit_of(metadata),
    }


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--backend", choices=("cuda", "cpu"), default=default, help=f"(default: {default})")
    parser.add_argument("--grad", action="store_true", help="measure with gradients enabled")
    parser.add_argument("--out", type=Path, default=env.RESULTS, help="folder for the JSON file")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    device = options.backend
    kernel = env.load_kernel(device)
    environment = describe(kernel, device)
    mode = torch.enable_grad if options.grad else torch.inference_mode
    with mode():
        calls = make_calls(kernel, make_inputs(device))
        rows = measure(calls, torch.cuda.synchronize if device == "cuda" else lambda: None)
    versions = f"torch {environment['torch']}, Python {environment['python']}, commit {environment['commit']}"
    print_rows(rows, f"{environment['device']}, {mode.__name__}, microseconds of host time\n{versions}")
    result = env.Section(options.out, "host", environment, name=mode.__name__)
    result.save(calls=CALLS, rows=rows)
    result.finish()


if __name__ == "__main__":
    main()

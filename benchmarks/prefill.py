"""Prefill: `chunk_kda` against the memory floor and against FLA's Triton kernels, in one run.

    python benchmarks/prefill.py                              every case, every gate
    python benchmarks/prefill.py --quick                      six cases
    python benchmarks/prefill.py --cases 8192/H96 512/H32 --gates strong weak --no-fla

Columns: median time between two events around an eager call, p10..p90, the floor (`Case.floor_bytes` over the
copy bandwidth of this run), ours over the floor, FLA's median and FLA over ours. Calls under 0.2 ms are also
timed without host time: queued behind other work (both) and in a CUDA graph (ours).
Writes prefill-<device>.json and the plots into --out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import environment as env
import timing
from cases import CASES, GATES, QUICK, case, input_sets

SHORT_MS = 0.2  # below this an eager call may wait for the host


def measure(chunk_kda, sets, is_ours: bool) -> dict:
    """Timings of one implementation on one case, as JSON."""

    def call(inputs):
        chunk_kda(**inputs)

    eager = timing.time_eager(call, sets)
    row = {"eager": eager.to_json()}
    if eager.median_ms < SHORT_MS or (not is_ours and sets[0]["q"].shape[1] <= 2048):
        row["queued"] = timing.time_queued(call, sets).to_json()
    if eager.median_ms < SHORT_MS and is_ours:
        row["graph"] = timing.time_graph(call, sets).to_json()
    return row


def sets_for(shape, gate: str, cache_bytes: int) -> list[dict]:
    return input_sets(shape, gate, timing.sets_to_outgrow_cache(shape.floor_bytes(), cache_bytes))


def measure_ours(shape, gate: str, chunk_kda, bandwidth: float, cache_bytes: int) -> dict:
    """One row of the result: the case, its floor and our timings."""
    sets = sets_for(shape, gate, cache_bytes)
    floor_ms = 1e3 * shape.floor_bytes() / bandwidth
    row = {
        "case": shape.name,
        "lengths": list(shape.lengths),
        "H": shape.H,
        "HV": shape.HV,
        "gate": gate,
        "input_sets": len(sets),
        "floor_bytes": shape.floor_bytes(),
        "floor_ms": floor_ms,
        "ours": measure(chunk_kda, sets, is_ours=True),
    }
    row["over_floor"] = row["ours"]["eager"]["median_ms"] / floor_ms
    return row


def add_fla(row: dict, shape, fla, cache_bytes: int) -> None:
    """FLA's timings of the same case on the same inputs, into its row."""
    row["fla"] = measure(fla, sets_for(shape, row["gate"], cache_bytes), is_ours=False)
    row["speedup_over_fla"] = row["fla"]["eager"]["median_ms"] / row["ours"]["eager"]["median_ms"]


def measure_host(kernel) -> dict:
    """Host milliseconds of an eager call, on a shape that takes the device less time than the host."""
    sets = input_sets(case((64,), 4), "strong", 2)
    buffers = [(x, torch.empty_like(x["v"]), torch.empty_like(x["initial_state"])) for x in sets]

    def chunk_kda(inputs):
        kernel.chunk_kda(**inputs)

    def fwd(buffer):
        x, out, final_state = buffer
        kernel.fwd(
            x["q"], x["k"], x["v"], x["g"], x["beta"], 128**-0.5, out, x["A_log"], x["dt_bias"],
            x["lower_bound"], initial_state=x["initial_state"], final_state=final_state,
        )  # fmt: skip

    return {
        "chunk_kda": timing.time_host(chunk_kda, sets).to_json(),
        "fwd": timing.time_host(fwd, buffers).to_json(),
    }


HEADER = f"{'case':<15}{'gate':<10}{'ms':>9}{'p10..p90':>17}"
HEADER += f"{'floor':>8}{'x floor':>9}{'FLA ms':>9}{'FLA/ours':>10}"


def line(row: dict) -> str:
    """One line of the table; device-only times follow where they were taken."""
    eager = row["ours"]["eager"]
    spread = f"{eager['p10_ms']:.3f}..{eager['p90_ms']:.3f}"
    text = f"{row['case']:<15}{row['gate']:<10}{eager['median_ms']:>9.4f}{spread:>17}"
    text += f"{row['floor_ms']:>8.3f}{row['over_floor']:>9.2f}"
    if "fla" in row:
        text += f"{row['fla']['eager']['median_ms']:>9.3f}{row['speedup_over_fla']:>10.2f}"
    for name, label in (("ours", "ours"), ("fla", "FLA")):
        for kind in ("queued", "graph"):
            if kind in row.get(name, {}):
                text += f"  {label} {kind} {row[name][kind]['median_ms']:.4f}"
    return text


def parse_arguments(arguments=None) -> argparse.Namespace:
    names = [shape.name for shape in CASES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=names, metavar="CASE", help=f"of {', '.join(names)}")
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES), metavar="GATE")
    parser.add_argument("--quick", action="store_true", help=f"the cases {', '.join(QUICK)}")
    parser.add_argument("--no-fla", action="store_true", help="do not measure FLA")
    parser.add_argument("--no-plots", action="store_true", help="do not draw")
    parser.add_argument(
        "--out", type=Path, default=env.RESULTS, help="folder for the JSON file and the plots"
    )
    chosen = parser.parse_args(arguments)
    wanted = chosen.cases or (QUICK if chosen.quick else names)
    chosen.cases = [shape for shape in CASES if shape.name in wanted]
    return chosen


def main() -> None:
    options = parse_arguments()
    kernel = env.load_kernel()
    fla = None if options.no_fla else env.load_fla()
    environment = env.describe(kernel)
    env.print_environment(environment)
    bandwidth = timing.copy_bandwidth()
    print(f"device-to-device copy: {bandwidth / 1e9:.0f} GB/s (bytes read and written)", flush=True)

    path = env.result_path(options.out, "prefill", environment)
    cache_bytes = environment["l2_bytes"]
    rows, shapes = [], []

    def save():
        section = {"environment": environment, "copy_bytes_per_s": bandwidth, "host": host, "rows": rows}
        env.update_result(path, "prefill", section)

    with torch.inference_mode():
        host = measure_host(kernel)
        print("host time a call: " + ", ".join(f"{n} {1e3 * t['median_ms']:.1f} us" for n, t in host.items()))
        print(HEADER, flush=True)
        for shape in options.cases:
            for gate in options.gates:
                rows.append(measure_ours(shape, gate, kernel.chunk_kda, bandwidth, cache_bytes))
                shapes.append(shape)
                torch.cuda.empty_cache()
                print(line(rows[-1]), flush=True)
                save()
        # FLA last: it compiles and tunes its kernels anew for every H, which takes minutes.
        if fla is not None:
            print("with FLA's Triton kernels:", flush=True)
            for row, shape in zip(rows, shapes, strict=True):
                add_fla(row, shape, fla, cache_bytes)
                torch.cuda.empty_cache()
                print(line(row), flush=True)
                save()
    print(f"wrote {path}")
    if not options.no_plots:
        import plots

        for figure in plots.draw(path, options.out):
            print(f"wrote {figure}")


if __name__ == "__main__":
    main()

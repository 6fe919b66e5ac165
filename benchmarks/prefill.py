"""Prefill: `chunk_kda` against the memory floor and against FLA's Triton kernels, in one run.

    python benchmarks/prefill.py                              every case; four cases with every gate
    python benchmarks/prefill.py --quick --no-fla             six cases, without FLA
    python benchmarks/prefill.py --fla 8192/H96 512/H32       every case, FLA for these two
    python benchmarks/prefill.py --cases 8192/H96 512/H32 --gates strong weak

Columns: median time between two events around an eager call, p10..p90, the floor (`Case.floor_bytes` over the
copy bandwidth of this run), ours over the floor, FLA's median and FLA over ours. The gates of a case take turns,
call by call. Calls under 0.2 ms are also timed without host time: queued behind other work (both) and in a CUDA
graph (ours). "+N MiB" behind a row is the most memory that a call held at one time beyond its results
(`timing.peak_extra_bytes`). The summary says which targets of targets.py are met.

FLA's turn comes after all of ours, case by case. Its kernels are compiled first by several processes at once
(fla_tuning.py); its autotuner then times them here, for 10 to 20 seconds for every H, packed or not.
prefill-<device>.json in --out is written after every row, with "complete" false until the last one.
The plots come last; --no-plots leaves them to `plots.py`, on a machine with matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import environment as env
import fla_tuning
import host
import targets
import timing
from cases import CASES, GATES, QUICK, Case, gates_of, input_sets

SHORT_MS = 0.2  # below this an eager call may wait for the host


def of_inputs(chunk_kda):
    """`chunk_kda` as a function of one input set, as timing.py calls it."""
    return lambda inputs: chunk_kda(**inputs)


def measure(call, eager: timing.Timing, sets, is_ours: bool) -> dict:
    """All timings of one implementation on one case, as JSON, given those of eager calls."""
    extra_bytes = timing.peak_extra_bytes(lambda: call(sets[0]))
    row = {"eager": eager.to_json(), "peak_extra_bytes": extra_bytes}
    if eager.median_ms < SHORT_MS or (not is_ours and sets[0]["q"].shape[1] <= 2048):
        row["queued"] = timing.time_queued(call, sets).to_json()
    if eager.median_ms < SHORT_MS and is_ours:
        row["graph"] = timing.time_graph(call, sets).to_json()
    return row


def sets_for(shape: Case, gate: str, cache_bytes: int) -> list[dict]:
    count = timing.sets_to_outgrow_cache(shape.floor_bytes(gate), cache_bytes)
    return input_sets(shape, gate, count)


def measure_ours(shape: Case, gates, chunk_kda, bandwidth: float, cache_bytes: int) -> Iterator[dict]:
    """Rows of the result, one for each gate: the case, its floor and our timings. The gates' eager calls take turns."""
    call = of_inputs(chunk_kda)
    groups = [sets_for(shape, gate, cache_bytes) for gate in gates]
    timings = timing.time_eager_in_turn(call, groups)
    for gate, sets, eager in zip(gates, groups, timings, strict=True):
        floor_bytes = shape.floor_bytes(gate)
        row = {
            "case": shape.name,
            "lengths": list(shape.lengths),
            "H": shape.H,
            "HV": shape.HV,
            "gate": gate,
            "input_sets": len(sets),
            "floor_bytes": floor_bytes,
            "floor_ms": 1e3 * floor_bytes / bandwidth,
            "ours": measure(call, eager, sets, is_ours=True),
        }
        row["over_floor"] = row["ours"]["eager"]["median_ms"] / row["floor_ms"]
        yield row


def add_fla(row: dict, shape: Case, fla, cache_bytes: int) -> None:
    """FLA's timings of the same case on the same inputs, into its row."""
    call = of_inputs(fla)
    sets = sets_for(shape, row["gate"], cache_bytes)
    row["fla"] = measure(call, timing.time_eager(call, sets), sets, is_ours=False)
    row["speedup_over_fla"] = row["fla"]["eager"]["median_ms"] / row["ours"]["eager"]["median_ms"]


def measure_host(kernel) -> dict:
    """Host milliseconds of an eager call, as host.py measures them."""
    rows = host.measure(host.make_calls(kernel, host.make_inputs("cuda")), torch.cuda.synchronize)
    columns = {"median_ms": "us", "p10_ms": "p10_us", "p90_ms": "p90_us"}
    return {
        row["name"]: {ms: 1e-3 * row[us] for ms, us in columns.items()}
        for row in rows
        if row["name"] in targets.HOST_US
    }


HEADER = f"{'case':<12}{'gate':<16}{'ms':>9}{'p10..p90':>17}"
HEADER += f"{'floor':>8}{'x floor':>9}{'FLA ms':>9}{'FLA/ours':>10}"


def line(row: dict) -> str:
    """One line of the table; device-only times follow where they were taken."""
    eager = row["ours"]["eager"]
    spread = f"{eager['p10_ms']:.3f}..{eager['p90_ms']:.3f}"
    text = f"{row['case']:<12}{row['gate']:<16}{eager['median_ms']:>9.4f}{spread:>17}"
    text += f"{row['floor_ms']:>8.3f}{row['over_floor']:>9.2f}"
    if "fla" in row:
        text += f"{row['fla']['eager']['median_ms']:>9.3f}{row['speedup_over_fla']:>10.2f}"
    for name, label in (("ours", "ours"), ("fla", "FLA")):
        for kind in ("queued", "graph"):
            if kind in row.get(name, {}):
                text += f"  {label} {kind} {row[name][kind]['median_ms']:.4f}"
        if extra_bytes := row.get(name, {}).get("peak_extra_bytes"):
            text += f"  {label} +{extra_bytes / 2**20:.1f} MiB"
    return text


def parse_arguments(arguments=None) -> argparse.Namespace:
    """`plan`: every case and its gates; `fla`: the names of the cases that FLA is measured with."""
    names = [shape.name for shape in CASES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=names, metavar="CASE", help=f"of {', '.join(names)}")
    parser.add_argument("--gates", nargs="+", choices=GATES, metavar="GATE", help=f"of {', '.join(GATES)}")
    parser.add_argument("--quick", action="store_true", help=f"the cases {', '.join(QUICK)}")
    fla = parser.add_mutually_exclusive_group()
    fla.add_argument(
        "--fla", nargs="+", choices=names, metavar="CASE", help="measure FLA with these cases only"
    )
    fla.add_argument("--no-fla", action="store_true", help="do not measure FLA")
    parser.add_argument("--no-plots", action="store_true", help="do not draw")
    parser.add_argument(
        "--out", type=Path, default=env.RESULTS, help="folder for the JSON file and the plots"
    )
    chosen = parser.parse_args(arguments)
    wanted = chosen.cases or (QUICK if chosen.quick else names)
    shapes = [shape for shape in CASES if shape.name in wanted]
    chosen.plan = [(shape, chosen.gates or gates_of(shape.name)) for shape in shapes]
    if chosen.fla and not set(chosen.fla) <= set(wanted):
        parser.error(f"--fla: expected some of the cases {', '.join(wanted)}, got {', '.join(chosen.fla)}")
    chosen.fla = [] if chosen.no_fla else chosen.fla or [shape.name for shape in shapes]
    return chosen


def main() -> None:
    options = parse_arguments()
    kernel = env.load_kernel()
    fla = env.load_fla() if options.fla else None
    environment = env.describe(kernel)
    env.print_environment(environment)
    bandwidth = timing.copy_bandwidth()
    print(f"device-to-device copy: {bandwidth / 1e9:.0f} GB/s (bytes read and written)", flush=True)

    result = env.Section(options.out, "prefill", environment)
    cache_bytes = environment["l2_bytes"]
    rows, shapes = [], []
    with torch.inference_mode():
        host_times = measure_host(kernel)
        result.save(copy_bytes_per_s=bandwidth, host=host_times, rows=rows)
        shown = (f"{name} {1e3 * times['median_ms']:.1f} us" for name, times in host_times.items())
        print(f"host time a call: {', '.join(shown)}")
        print(HEADER, flush=True)
        for shape, gates in options.plan:
            for row in measure_ours(shape, gates, kernel.chunk_kda, bandwidth, cache_bytes):
                rows.append(row)
                shapes.append(shape)
                print(line(row), flush=True)
                result.save()
            torch.cuda.empty_cache()
        items = targets.summary(result.content)
        result.save(summary=items)
        print("\n".join(targets.summary_lines(items)), flush=True)
        if fla is not None:
            chosen = [
                (row, shape) for row, shape in zip(rows, shapes, strict=True) if shape.name in options.fla
            ]
            wanted = [(row["case"], row["gate"]) for row, _ in chosen]
            fla_tuning.compile_ahead(fla_tuning.command_for_cases(wanted))
            print("with FLA's Triton kernels:", flush=True)
            for row, shape in chosen:
                add_fla(row, shape, fla, cache_bytes)
                torch.cuda.empty_cache()
                print(line(row), flush=True)
                result.save()
    result.finish()
    if not options.no_plots:
        import plots

        for figure in plots.draw(result.path, options.out):
            print(f"wrote {figure}")


if __name__ == "__main__":
    main()

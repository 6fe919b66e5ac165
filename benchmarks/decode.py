"""Decoding: `fused_recurrent_kda` in place, the memory floor, FLA's Triton kernel, and the fused step.

    python benchmarks/decode.py                              every case, in float32 and bfloat16 states
    python benchmarks/decode.py --quick                      three cases
    python benchmarks/decode.py --cases 32x32 --states fp32 --tokens 1 --no-fla

A case is sequences x heads, with HV = H and D = 128; T tokens of each sequence in a call. Times are of a call
in a CUDA graph of many, each on other tensors, so that a state never lies in the L2 cache: the median of the
replays, p10..p90, the floor (`DecodeCase.floor_bytes` over the copy bandwidth of this run), ours over the
floor, FLA's median and FLA over ours. FLA's is its inner function, which updates states in place as ours
does, without the checks around it. Host time is that of an eager call. The fused step is `fused_kda_decode`,
beside the bare `fused_recurrent_kda` of the same case. Writes decode-<device>.json, row by row, and the
plot into --out.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import environment as env
import timing
from cases import DECODE_CASES, DECODE_QUICK, D, DecodeCase, decode_sets, fused_sets

STATES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = (1, 4)
MOST_SETS = 160  # the smallest case has 1 MB of states
FUSED_CASE = "32x32"


def time_calls(call, sets: list[dict]) -> dict:
    """Device time of a call in a CUDA graph of all sets, at least three times each."""
    measured = timing.time_graph(lambda x: call(**x), sets, calls=max(32, 3 * len(sets)))
    if not all(x["out"].isfinite().all() and x["initial_state"].isfinite().all() for x in sets):
        raise SystemExit("decode.py: a result is not finite")
    return measured.to_json()


def sets_for(
    shape: DecodeCase, T: int, state_dtype: torch.dtype, cache_bytes: int, make=decode_sets
) -> list[dict]:
    count = timing.sets_to_outgrow_cache(shape.state_bytes(state_dtype), cache_bytes, MOST_SETS)
    return make(shape, T, state_dtype, count)


def measure(shape: DecodeCase, T: int, state: str, kernel, fla, bandwidth: float, cache_bytes: int) -> dict:
    """One row of the result: the case, its floor, our time and FLA's on the same tensors."""
    sets = sets_for(shape, T, STATES[state], cache_bytes)
    floor_bytes = shape.floor_bytes(T, STATES[state])
    row = {
        "case": shape.name,
        "N": shape.N,
        "H": shape.H,
        "T": T,
        "state": state,
        "input_sets": len(sets),
        "floor_bytes": floor_bytes,
        "floor_ms": 1e3 * floor_bytes / bandwidth,
        "ours": {"graph": time_calls(kernel.fused_recurrent_kda, sets)},
    }
    row["over_floor"] = row["ours"]["graph"]["median_ms"] / row["floor_ms"]
    if fla is not None:
        row["fla"] = {"graph": time_calls(fla, sets)}
        row["speedup_over_fla"] = row["fla"]["graph"]["median_ms"] / row["ours"]["graph"]["median_ms"]
    return row


def measure_host(kernel, fla) -> dict:
    """Host milliseconds of an eager call of each, on a shape that takes the device less time than that."""
    sets = decode_sets(DecodeCase(1, 4), 1, torch.float32, 2)
    without_out = [{name: y for name, y in x.items() if name != "out"} for x in sets]
    new = [x | {"inplace_final_state": False, "output_final_state": True} for x in without_out]
    decode = kernel.fused_recurrent_kda
    times = {
        "fused_recurrent_kda with new results": timing.time_host(lambda x: decode(**x), new),
        "in place": timing.time_host(lambda x: decode(**x), without_out),
        "in place into out": timing.time_host(lambda x: decode(**x), sets),
    }
    if hasattr(kernel, "fused_kda_decode"):
        fused = fused_sets(DecodeCase(1, 4), 1, torch.float32, 2)
        times["fused_kda_decode"] = timing.time_host(lambda x: step(kernel, **x), fused)
    if fla is not None:
        times["FLA"] = timing.time_host(lambda x: fla(**x), sets)
    return {name: measured.to_json() for name, measured in times.items()}


def step(kernel, initial_state, **arguments) -> None:
    """The fused step with the state by the name that it has in the bare call."""
    kernel.fused_kda_decode(recurrent_state=initial_state, **arguments)


def measure_fused(kernel, cache_bytes: int) -> dict:
    """The fused step and the bare one, one token, float32 states."""
    shape = next(case for case in DECODE_CASES if case.name == FUSED_CASE)
    bare = time_calls(kernel.fused_recurrent_kda, sets_for(shape, 1, torch.float32, cache_bytes))
    torch.cuda.empty_cache()
    sets = sets_for(shape, 1, torch.float32, cache_bytes, fused_sets)
    fused = time_calls(lambda **x: step(kernel, **x), sets)
    return {
        "case": FUSED_CASE,
        "fused": fused,
        "bare": bare,
        "over_bare": fused["median_ms"] / bare["median_ms"],
    }


HEADER = ("case", "T", "state", "ms", "p10..p90", "floor", "x floor", "FLA ms", "FLA/ours")


def cells(row: dict) -> tuple[str, ...]:
    """One line of the table, for HEADER."""
    graph = row["ours"]["graph"]
    fla = ("", "")
    if "fla" in row:
        fla = (f"{row['fla']['graph']['median_ms']:.4f}", f"{row['speedup_over_fla']:.2f}")
    return (
        row["case"],
        str(row["T"]),
        row["state"],
        f"{graph['median_ms']:.4f}",
        f"{graph['p10_ms']:.4f}..{graph['p90_ms']:.4f}",
        f"{row['floor_ms']:.4f}",
        f"{row['over_floor']:.2f}",
        *fla,
    )


def line(words: tuple[str, ...]) -> str:
    widths = (8, 3, 6, 9, 17, 9, 9, 9, 10)
    return "".join(f"{word:>{width}}" for word, width in zip(words, widths, strict=True))


def print_table(rows: list[dict], title: str) -> None:
    """All rows as one table, where `rich` is installed; the lines printed before have the same numbers."""
    if importlib.util.find_spec("rich") is None:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in HEADER:
        table.add_column(name, justify="left" if name == "case" else "right")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(*cells(row), end_section=after is None or after["case"] != row["case"])
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def parse_arguments(arguments=None) -> argparse.Namespace:
    names = [shape.name for shape in DECODE_CASES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=names, metavar="CASE", help=f"of {', '.join(names)}")
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES), metavar="DTYPE")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="T")
    parser.add_argument("--quick", action="store_true", help=f"the cases {', '.join(DECODE_QUICK)}")
    parser.add_argument("--no-fla", action="store_true", help="do not measure FLA")
    parser.add_argument("--no-plots", action="store_true", help="do not draw")
    parser.add_argument("--out", type=Path, default=env.RESULTS, help="folder for the JSON file and the plot")
    chosen = parser.parse_args(arguments)
    wanted = chosen.cases or (DECODE_QUICK if chosen.quick else names)
    chosen.cases = [shape for shape in DECODE_CASES if shape.name in wanted]
    return chosen


@torch.inference_mode()
def main() -> None:
    options = parse_arguments()
    kernel = env.load_kernel()
    fla = None if options.no_fla else env.load_fla_decode()
    environment = env.describe(kernel)
    env.print_environment(environment)
    bandwidth = timing.copy_bandwidth()
    print(f"device-to-device copy: {bandwidth / 1e9:.0f} GB/s (bytes read and written)", flush=True)

    result = env.Section(options.out, "decode", environment)
    cache_bytes = environment["l2_bytes"]
    rows, host = [], measure_host(kernel, fla)
    result.save(copy_bytes_per_s=bandwidth, D=D, rows=rows, host=host)
    for name, measured in host.items():
        print(f"host time of a call, {name}: {1e3 * measured['median_ms']:.1f} us")
    if hasattr(kernel, "fused_kda_decode"):
        fused = measure_fused(kernel, cache_bytes)
        result.save(fused=fused)
        text = f"fused step, {fused['case']}: {fused['fused']['median_ms']:.4f} ms"
        print(
            f"{text}, {fused['over_bare']:.3f} of the bare one's {fused['bare']['median_ms']:.4f} ms",
            flush=True,
        )

    print(line(HEADER), flush=True)
    for shape in options.cases:
        for state in options.states:
            for T in options.tokens:
                torch.cuda.empty_cache()
                row = measure(shape, T, state, kernel, fla, bandwidth, cache_bytes)
                rows.append(row)
                print(line(cells(row)), flush=True)
                result.save()
    print_table(rows, f"decoding on {environment['device']}, D = {D}, milliseconds in a CUDA graph")
    result.finish()
    if not options.no_plots:
        import plots

        for figure in plots.draw(result.path, options.out):
            print(f"wrote {figure}")


if __name__ == "__main__":
    main()

"""FLA's `chunk_kda` on our backend: what the dispatch costs on the host, and whole calls.

    python benchmarks/fla_dispatch.py                         host time; six cases, beside FLA's Triton kernels
    python benchmarks/fla_dispatch.py --no-fla                without these, which take half a minute and more
    python benchmarks/fla_dispatch.py --cases 512/H32 --gates strong

Host times are of one call on a shape that takes the device less time than the host: the kernel package's
own `chunk_kda`, `fla.ops.kda.chunk_kda` with the backend of `hf_layer.fla`, and with FLA's own backend for
the module `flash_kda`. The exit status is 1 if our dispatch adds LIMIT_US or more to the direct call.

Times of whole calls are between two events around an eager call: direct, through FLA with our backend, and
through FLA with FLA_FLASH_KDA=0, which leaves FLA's Triton kernels. fla_dispatch-<device>.json in --out is
written after every row, with "complete" false until the last one.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import environment as env
import fla_tuning
import host
import timing
from cases import CASES, GATES, QUICK, case, input_sets

LIMIT_US = 10.0
HOST_SHAPE = case((64,), 4)
SWITCH = "FLA_FLASH_KDA"


def measure_host(direct, through_fla, backend) -> dict:
    """Microseconds of a call by name: direct, through FLA with our backend, with FLA's own; and what ours adds.

    `backend` is hf_layer.fla.
    """
    sets = input_sets(HOST_SHAPE, "strong", 2)

    def rows_of(functions: dict) -> dict:
        calls = {name: (lambda f=f: f(**sets[0]), None) for name, f in functions.items()}
        return {row["name"]: row for row in host.measure(calls, torch.cuda.synchronize)}

    backend.register()
    found = rows_of({"direct": direct, "our backend": through_fla})
    backend.unregister()
    found |= rows_of({"FLA's backend": through_fla})
    backend.register()
    return {"rows": list(found.values()), "added_us": found["our backend"]["us"] - found["direct"]["us"]}


def sets_for(shape, gate: str, cache_bytes: int) -> list[dict]:
    return input_sets(shape, gate, timing.sets_to_outgrow_cache(shape.floor_bytes(gate), cache_bytes))


def time_call(chunk_kda, sets: list[dict]) -> dict:
    return timing.time_eager(lambda x: chunk_kda(**x), sets).to_json()


def measure_ours(row: dict, sets: list[dict], direct, through_fla) -> None:
    """Direct calls and those through FLA, whose results must be the same bits, into a row."""
    same = torch.equal(direct(**sets[0])[0], through_fla(**sets[0])[0])
    if not same:
        raise SystemExit(
            f"fla_dispatch.py: {row['case']} {row['gate']} did not run on our kernel through FLA"
        )
    row["direct"] = time_call(direct, sets)
    row["our_backend"] = time_call(through_fla, sets)


def measure_triton(row: dict, sets: list[dict], through_fla) -> None:
    row["triton"] = time_call(through_fla, sets)
    row["triton_over_ours"] = row["triton"]["median_ms"] / row["our_backend"]["median_ms"]


def parse_arguments(arguments=None) -> argparse.Namespace:
    names = [shape.name for shape in CASES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=names, metavar="CASE", help=f"of {', '.join(names)}")
    parser.add_argument("--gates", nargs="+", choices=GATES, default=["strong", "softplus"], metavar="GATE")
    parser.add_argument("--no-fla", action="store_true", help="do not measure FLA's Triton kernels")
    parser.add_argument("--out", type=Path, default=env.RESULTS, help="folder for the JSON file")
    chosen = parser.parse_args(arguments)
    wanted = chosen.cases or QUICK
    chosen.cases = [shape for shape in CASES if shape.name in wanted]
    return chosen


HEADER = f"{'case':<12}{'gate':<16}{'direct ms':>11}{'our backend ms':>16}{'p10..p90':>17}{'Triton ms':>11}{'ratio':>8}"


def line(row: dict) -> str:
    ours = row["our_backend"]
    spread = f"{ours['p10_ms']:.3f}..{ours['p90_ms']:.3f}"
    text = f"{row['case']:<12}{row['gate']:<16}{row['direct']['median_ms']:>11.4f}{ours['median_ms']:>16.4f}"
    text += f"{spread:>17}"
    if "triton" in row:
        text += f"{row['triton']['median_ms']:>11.4f}{row['triton_over_ours']:>8.2f}"
    return text


@torch.inference_mode()
def main() -> None:
    options = parse_arguments()
    os.environ.pop(SWITCH, None)
    from fla.ops.kda import chunk_kda

    import hf_layer.fla

    kernel = env.load_kernel()
    environment = env.describe(kernel)
    env.print_environment(environment)
    result = env.Section(options.out, "fla_dispatch", environment)

    host_times = measure_host(kernel.chunk_kda, chunk_kda, hf_layer.fla)
    rows = [{"case": shape.name, "gate": gate} for shape in options.cases for gate in options.gates]
    for found in host_times["rows"]:
        print(f"host time of a call, {found['name']}: {found['us']:.1f} us")
    added_us = host_times["added_us"]
    print(f"our dispatch adds {added_us:.1f} us (limit {LIMIT_US:g})", flush=True)
    done = []
    result.save(host=host_times, limit_us=LIMIT_US, rows=done)

    shapes = {shape.name: shape for shape in options.cases}
    cache_bytes = environment["l2_bytes"]
    print(HEADER, flush=True)
    for row in rows:
        measure_ours(
            row, sets_for(shapes[row["case"]], row["gate"], cache_bytes), kernel.chunk_kda, chunk_kda
        )
        torch.cuda.empty_cache()
        done.append(row)
        print(line(row), flush=True)
        result.save()
    if not options.no_fla:
        fla_tuning.compile_ahead(fla_tuning.command_for_cases([(row["case"], row["gate"]) for row in rows]))
        os.environ[SWITCH] = "0"  # asked for at every call
        for row in rows:
            measure_triton(row, sets_for(shapes[row["case"]], row["gate"], cache_bytes), chunk_kda)
            torch.cuda.empty_cache()
            print(line(row), flush=True)
            result.save()
    result.finish()
    sys.exit(1 if added_us >= LIMIT_US else 0)


if __name__ == "__main__":
    main()

"""Relative RMS error of output and final state against float64, every gate, random keys, ours and FLA's.

    python benchmarks/errors.py [--lengths 1024 8192] [--heads 8] [--no-fla] [--out DIR]

Inputs are those of the tests (tests/kda_inputs.py, where the gates are described). The reference is
reference.py in float64 on the same rounded inputs. Writes the section "errors" of
prefill-<device>.json in --out, row by row.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import environment as env
from kda_inputs import GATES, make_inputs, rel_rms, to_float64


def errors_of(found, expected) -> dict:
    """Errors as JSON numbers; None stands for a result that is not finite."""
    numbers = {name: rel_rms(want, got) for name, want, got in zip(("o", "final_state"), expected, found)}
    return {name: error if math.isfinite(error) else None for name, error in numbers.items()}


def measure(kernel, fla, gate: str, T: int, H: int) -> dict:
    """One row: the errors of both implementations for one gate and length."""
    inputs = make_inputs(gate, 1, T, H, initial_state=True, device="cuda")
    expected = kernel.reference.chunk_kda(**to_float64(inputs))
    row = {"gate": gate, "T": T, "H": H, "ours": errors_of(kernel.chunk_kda(**inputs), expected)}
    if fla is not None:
        bounded = inputs["use_gate_in_kernel"] and inputs["lower_bound"] is not None
        row["fla"] = errors_of(fla(**inputs, safe_gate=bounded), expected)
    return row


def shown(errors: dict | None) -> str:
    if errors is None:
        return ""
    return " / ".join("not finite" if error is None else f"{error:.1e}" for error in errors.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 8192], metavar="T")
    parser.add_argument("--heads", type=int, default=8, metavar="H")
    parser.add_argument("--no-fla", action="store_true", help="do not measure FLA")
    parser.add_argument("--out", type=Path, default=env.RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    kernel = env.load_kernel()
    fla = None if options.no_fla else env.load_fla()
    environment = env.describe(kernel)
    env.print_environment(environment)
    print(f"relative RMS error against float64, output / final state, H = {options.heads}")
    print(f"{'gate':<18}{'T':>6}  {'flash-kda':<20}{'FLA Triton':<20}", flush=True)
    result = env.Section(options.out, "prefill", environment, name="errors")
    rows = []
    with torch.inference_mode():
        for gate in GATES:
            for T in options.lengths:
                rows.append(measure(kernel, fla, gate, T, options.heads))
                print(
                    f"{gate:<18}{T:>6}  {shown(rows[-1]['ours']):<20}{shown(rows[-1].get('fla')):<20}",
                    flush=True,
                )
                result.save(rows=rows)
    result.finish()


if __name__ == "__main__":
    main()

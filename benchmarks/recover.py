"""A result file rebuilt from what prefill.py and errors.py printed, where only their output was kept.

    python benchmarks/recover.py LOG [LOG ...] [--out DIR]

Reads the environment lines and the tables, and writes prefill-<device>.json with what they hold: numbers as
they were printed, without the fields that were not. The file names the logs under "recovered_from".
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import environment as env
from cases import CASES

NUMBER = r"\d+\.\d+"
SPREAD = re.compile(rf"({NUMBER})\.\.({NUMBER})$")
EXTRA = re.compile(rf"(ours|FLA) (queued|graph) ({NUMBER})")


def read_environment(lines: list[str]) -> dict:
    """Device, versions and commit from the two lines that env.print_environment writes."""
    for first, second in zip(lines, lines[1:]):
        device = re.fullmatch(r"(.+), (\d+) multiprocessors", first)
        if device is None:
            continue
        pairs = dict(part.split(" ", 1) for part in second.split(", "))
        return {"device": device[1], "multiprocessors": int(device[2]), **pairs}
    raise SystemExit("no line with the device and the versions")


def prefill_row(line: str) -> dict | None:
    """One row of prefill.py's table; None for other lines."""
    shapes = {shape.name: shape for shape in CASES}
    main, *extras = re.split(r" {2}(?=(?:ours|FLA) )", line)
    words = main.split()
    if len(words) not in (6, 8) or words[0] not in shapes or SPREAD.match(words[3]) is None:
        return None
    shape = shapes[words[0]]
    p10, p90 = map(float, SPREAD.match(words[3]).groups())
    row = {
        "case": shape.name,
        "lengths": list(shape.lengths),
        "H": shape.H,
        "HV": shape.HV,
        "gate": words[1],
        "floor_bytes": shape.floor_bytes(),
        "ours": {"eager": {"median_ms": float(words[2]), "p10_ms": p10, "p90_ms": p90}},
    }
    if len(words) == 8:
        row["fla"] = {"eager": {"median_ms": float(words[6])}}
        row["speedup_over_fla"] = float(words[7])
    for who, kind, median in EXTRA.findall(" ".join(extras)):
        row[who.lower()][kind] = {"median_ms": float(median)}
    return row


def read_prefill(lines: list[str]) -> dict | None:
    """The section "prefill", or None. A later line of a case and gate replaces an earlier one."""
    bandwidth = host = None
    rows = {}
    for line in lines:
        if copied := re.match(r"device-to-device copy: (\d+) GB/s", line):
            bandwidth = 1e9 * float(copied[1])
        elif line.startswith("host time a call: "):
            host = {
                name: {"median_ms": float(us) / 1e3} for name, us in re.findall(rf"(\w+) ({NUMBER}) us", line)
            }
        elif row := prefill_row(line):
            rows[row["case"], row["gate"]] = row
    if not rows:
        return None
    for row in rows.values():  # the printed floor has fewer digits than the bandwidth
        row["floor_ms"] = 1e3 * row["floor_bytes"] / bandwidth
        row["over_floor"] = row["ours"]["eager"]["median_ms"] / row["floor_ms"]
    return {"copy_bytes_per_s": bandwidth, "host": host, "rows": list(rows.values())}


def read_errors(lines: list[str]) -> dict | None:
    """The section "errors", or None."""
    heads = next((int(found[1]) for line in lines if (found := re.search(r"final state, H = (\d+)", line))), None)
    error = r"(\d\.\de-\d\d) / (\d\.\de-\d\d)"
    rows = []
    for line in lines:
        if found := re.fullmatch(rf"(\S+) +(\d+) +{error}(?: +{error})? *", line):
            gate, T, *values = found.groups()
            row = {"gate": gate, "T": int(T), "H": heads}
            row["ours"] = {"o": float(values[0]), "final_state": float(values[1])}
            if values[2]:
                row["fla"] = {"o": float(values[2]), "final_state": float(values[3])}
            rows.append(row)
    return {"rows": rows} if rows else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    parser.add_argument("--out", type=Path, default=env.RESULTS, help="folder for the JSON file")
    options = parser.parse_args()
    for log in options.logs:
        lines = log.read_text().splitlines()
        environment = read_environment(lines)
        path = env.result_path(options.out, "prefill", environment)
        sections = {"prefill": read_prefill(lines), "errors": read_errors(lines)}
        if not any(sections.values()):
            raise SystemExit(f"{log}: no row of prefill.py or errors.py")
        for name, section in sections.items():
            if section is not None:
                value = {"recovered_from": log.name, "environment": environment, **section}
                env.update_result(path, name, value)
                print(f"{path}: {len(section['rows'])} rows of {name} from {log}")


if __name__ == "__main__":
    main()

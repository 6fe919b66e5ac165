"""What prefill is to reach on one H100, and how far a result file is from it.

    python benchmarks/targets.py benchmarks/results/prefill-<device>.json

The constants are targets, given before anything was measured; no result is among them. Times are of eager
calls (those of GRAPH_CASES of calls in a CUDA graph). Where two times are compared, both are in a CUDA graph
if both rows have such a time: an eager call under 0.2 ms may wait for the host.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cases import ALL_GATES, BOUNDED, CASES, Case

MOST_MS = {
    "8192/H96": 0.60,
    "mixed6/H96": 0.65,
    "8x1024/H96": 0.60,
    "8192/H64": 0.40,
    "mixed6/H64": 0.45,
    "8x1024/H64": 0.40,
    "8192/H32": 0.28,
    "8x1024/H32": 0.22,
    "64x128/H32": 0.32,
    "2048/H32": 0.08,
    "512/H32": 0.03,
    "8192/H16": 0.25,
    "8192/H8": 0.22,
}
GRAPH_CASES = ("512/H32",)
BOUNDED_RATIO = 1.05  # the slower of the strong and the weak gate over the faster
GATE_RATIOS = {"softplus": 1.30, "token-resets": 1.60, "channel-resets": 1.60}  # over the strong gate
GROWTH = ("8192/H8", "131072/H8")
GROWTH_RATIO = 1.05  # time a token of the second over that of the first; linear is 1, 5 % are the clock's
HOST_US = {"chunk_kda": 25.0, "fwd": 15.0}
EXTRA_BYTES = 0  # beyond the results
AIM_OVER_FLOOR = 1.5  # where to go on after the times above
AIM_N_TIMES_H = 64  # from here on


class Run:
    """The section "prefill" of a result file, by case and gate."""

    def __init__(self, section: dict):
        self.section = section
        self.rows = {(row["case"], row["gate"]): row for row in section["rows"]}

    def ms(self, case: str, gate: str, kind: str) -> float | None:
        timing = self.rows.get((case, gate), {}).get("ours", {}).get(kind)
        return None if timing is None else timing["median_ms"]

    def ratio(self, one: tuple[str, str], other: tuple[str, str]) -> float | None:
        """Time of (case, gate) `one` over that of `other`."""
        for kind in ("graph", "eager"):
            times = self.ms(*one, kind), self.ms(*other, kind)
            if None not in times:
                return times[0] / times[1]
        return None


def item(requirement: str, what: str, figure: float | None, most: float, unit: str = "") -> dict:
    """One line of the summary; a figure of None has not been measured, and `met` is None then."""
    met = None if figure is None else figure <= most
    return {
        "requirement": requirement,
        "what": what,
        "figure": figure,
        "at_most": most,
        "unit": unit,
        "met": met,
    }


def time_items(run: Run) -> list[dict]:
    return [
        item("time", f"{case} {gate}", run.ms(case, gate, "graph" if case in GRAPH_CASES else "eager"), most, "ms")
        for case, most in MOST_MS.items()
        for gate in BOUNDED
    ]  # fmt: skip


def ratio_items(run: Run) -> list[dict]:
    found = []
    for shape in CASES:
        ratio = run.ratio(*((shape.name, gate) for gate in BOUNDED))
        worst = None if ratio is None else max(ratio, 1 / ratio)
        found.append(item("strong and weak gate apart", shape.name, worst, BOUNDED_RATIO))
    for gate, most in GATE_RATIOS.items():
        for name in ALL_GATES:
            found.append(item(f"{gate} over strong", name, run.ratio((name, gate), (name, "strong")), most))
    small, large = ({shape.name: shape for shape in CASES}[name] for name in GROWTH)
    for gate in BOUNDED:
        ratio = run.ratio((large.name, gate), (small.name, gate))
        a_token = None if ratio is None else ratio * small.T / large.T
        title = f"time a token, {large.T} over {small.T} tokens"
        found.append(item(title, f"H{small.H} {gate}", a_token, GROWTH_RATIO))
    return found


def fp32_items(run: Run) -> list[dict]:
    """What an fp32 g adds to the time, against its bytes over the copy bandwidth."""
    found = []
    for shape in (case for case in CASES if case.name in ALL_GATES):
        times = [run.ms(shape.name, gate, "eager") for gate in ("fp32-g", "bf16-g")]
        added = None if None in times else times[0] - times[1]
        extra_bytes = shape.floor_bytes("fp32-g") - shape.floor_bytes("bf16-g")
        most = 1e3 * extra_bytes / run.section["copy_bytes_per_s"]
        found.append(item("fp32 g over bf16 g", shape.name, added, most, "ms more"))
    return found


def memory_items(run: Run) -> list[dict]:
    return [
        item("memory beyond the results", f"{case} {gate}", row["ours"].get("peak_extra_bytes"), EXTRA_BYTES, "bytes")
        for (case, gate), row in run.rows.items()
    ]  # fmt: skip


def host_items(run: Run) -> list[dict]:
    found = []
    for name, most in HOST_US.items():
        timing = run.section["host"].get(name)
        found.append(
            item(
                "host time of a call", name, None if timing is None else 1e3 * timing["median_ms"], most, "us"
            )
        )
    return found


def counts_for_aim(shape: Case) -> bool:
    return shape.N * shape.H >= AIM_N_TIMES_H


def aim_items(run: Run) -> list[dict]:
    title = f"aim: times the floor, N * H >= {AIM_N_TIMES_H}"
    return [
        item(title, f"{shape.name} {gate}", run.rows.get((shape.name, gate), {}).get("over_floor"), AIM_OVER_FLOOR)
        for shape in filter(counts_for_aim, CASES)
        for gate in BOUNDED
    ]  # fmt: skip


def summary(section: dict) -> list[dict]:
    """Every requirement with its figure, target and whether it is met, of the section "prefill"."""
    run = Run(section)
    parts = (time_items, ratio_items, fp32_items, memory_items, host_items, aim_items)
    return [found for part in parts for found in part(run)]


def shown(found: dict) -> str:
    """One item's figure beside its target."""
    digits = {"ms": 4, "ms more": 4, "bytes": 0, "us": 1}.get(found["unit"], 2)
    unit = f" {found['unit']}" * bool(found["unit"])
    return f"{found['what']} {found['figure']:.{digits}f} (at most {found['at_most']:.{digits}f}{unit})"


def share(found: dict) -> float:
    """The figure over its target, to find the closest; a target of 0 has the figure itself."""
    return found["figure"] / found["at_most"] if found["at_most"] else found["figure"]


def summary_lines(items: list[dict]) -> list[str]:
    """A line for each requirement: met, with the figure that is closest to the target, or MISSED, and then all
    that miss it."""
    lines = []
    for requirement in dict.fromkeys(found["requirement"] for found in items):
        group = [found for found in items if found["requirement"] == requirement]
        measured = [found for found in group if found["met"] is not None]
        missed = [found for found in measured if not found["met"]]
        absent = f", {len(group) - len(measured)} not measured" * (len(measured) < len(group))
        if not measured:
            lines.append(f"  -     {requirement}: not measured")
        elif missed:
            lines.append(f"MISSED  {requirement}: {len(missed)} of {len(measured)}{absent}")
            lines += [f"          {shown(found)}" for found in missed]
        else:
            closest = shown(max(measured, key=share))
            lines.append(
                f"met     {requirement}: {len(measured)} of {len(measured)}{absent}; closest {closest}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    section = json.loads(parser.parse_args().result.read_text())["prefill"]
    print("\n".join(summary_lines(summary(section))))


if __name__ == "__main__":
    main()

"""Figures from the JSON files that the benchmarks write.

python benchmarks/plots.py benchmarks/results/prefill-<device>.json [--out DIR]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

FLOOR, OURS, FLA = "#8a8f98", "#1f6fb4", "#d98032"
GATE_MARKS = {"strong": "o", "weak": "s", "softplus": "^"}


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "kda"}
    )
    return plt


def save(figure, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    return path


def draw_prefill(result: Path, directory: Path) -> list[Path]:
    """Every figure of one prefill result; returns the files written into `directory`."""
    content = json.loads(result.read_text())["prefill"]
    drawn = [draw_cases(content, directory / f"{result.stem}-cases.svg")]
    for axis, fixed, label in (("T", "H", "tokens T"), ("H", "T", "heads H")):
        series = single_sequence_series(content["rows"], axis, fixed)
        if series:
            path = directory / f"{result.stem}-over-{axis}.svg"
            drawn.append(draw_series(content, series, axis, fixed, label, path))
    return drawn


def draw_cases(content: dict, path: Path) -> Path:
    """Time of every case and gate: the floor, ours and FLA as marks on one logarithmic line."""
    plt = pyplot()
    rows = content["rows"]
    labels = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(labels) + 1.4))
    for place, label in enumerate(labels):
        group = [row for row in rows if row["case"] == label]
        for i, row in enumerate(group):
            y = place + (i - (len(group) - 1) / 2) * 0.24
            marks = [
                (row["floor_ms"], FLOOR, "|"),
                (row["ours"]["eager"]["median_ms"], OURS, GATE_MARKS[row["gate"]]),
            ]
            if "fla" in row:
                marks.append((row["fla"]["eager"]["median_ms"], FLA, GATE_MARKS[row["gate"]]))
            axes.plot([marks[0][0], marks[-1][0]], [y, y], color="#dddddd", linewidth=1, zorder=1)
            for x, color, mark in marks:
                axes.scatter(x, y, color=color, marker=mark, s=16 if mark != "|" else 40, zorder=2)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.set_xlabel("milliseconds an eager call, median")
    gates = [gate for gate in GATE_MARKS if any(row["gate"] == gate for row in rows)]
    entries = [("memory floor", FLOOR, "|")]
    entries += [(f"flash-kda, {gate}", OURS, GATE_MARKS[gate]) for gate in gates]
    if any("fla" in row for row in rows):
        entries += [(f"FLA Triton, {gate}", FLA, GATE_MARKS[gate]) for gate in gates]
    handles = [
        axes.scatter([], [], color=color, marker=mark, s=24, label=name) for name, color, mark in entries
    ]
    axes.legend(handles=handles, frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title(f"{content['environment']['device']}, prefill, D = 128")
    saved = save(figure, path)
    plt.close(figure)
    return saved


def single_sequence_series(rows: list[dict], axis: str, fixed: str) -> dict:
    """Rows of one sequence by (value of `fixed`, gate), along `axis`, where there are two points or more."""
    series: dict[tuple, list[dict]] = {}
    for row in rows:
        if len(row["lengths"]) == 1:
            point = dict(row, T=row["lengths"][0])
            series.setdefault((point[fixed], row["gate"]), []).append(point)
    return {key: sorted(points, key=lambda p: p[axis]) for key, points in series.items() if len(points) > 1}


def draw_series(content: dict, series: dict, axis: str, fixed: str, label: str, path: Path) -> Path:
    """Time of one sequence against `axis`, one line for every gate and value of `fixed`, beside the floor."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 4))
    for (value, gate), points in series.items():
        x = [point[axis] for point in points]
        name = f"{fixed}={value}, {gate}"
        (drawn,) = axes.plot(
            x, [point["ours"]["eager"]["median_ms"] for point in points], marker="o", label=name
        )
        floors = [point["floor_ms"] for point in points]
        axes.plot(x, floors, color=drawn.get_color(), linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("milliseconds an eager call (dotted: floor)")
    axes.legend(frameon=False, fontsize=7)
    axes.set_title(content["environment"]["device"])
    saved = save(figure, path)
    plt.close(figure)
    return saved


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the figures; the result's own without it")
    options = parser.parse_args()
    for figure in draw_prefill(options.result, options.out or options.result.parent):
        print(f"wrote {figure}")


if __name__ == "__main__":
    main()

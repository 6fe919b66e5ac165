"""Figures from the JSON files that the benchmarks write.

    python benchmarks/plots.py benchmarks/results/prefill-<device>.json [--out DIR]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

FLOOR, OURS, FLA = "#8a8f98", "#1f6fb4", "#d98032"
GATE_SHADES = {"strong": 1.0, "weak": 0.75, "softplus": 0.5}


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "kda"})
    return plt


def save(figure, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    return path


def draw_prefill(result: Path, directory: Path) -> list[Path]:
    """Every figure of one prefill result; returns the files written into `directory`."""
    content = json.loads(result.read_text())
    drawn = [draw_cases(content, directory / f"{result.stem}-cases.svg")]
    for axis, fixed, label in (("T", "H", "tokens T"), ("H", "T", "heads H")):
        series = single_sequence_series(content["prefill"], axis, fixed)
        if series:
            path = directory / f"{result.stem}-over-{axis}.svg"
            drawn.append(draw_series(content, series, axis, fixed, label, path))
    return drawn


def draw_cases(content: dict, path: Path) -> Path:
    """Time of every case and gate as bars: the floor, ours, FLA (logarithmic)."""
    plt = pyplot()
    rows = content["prefill"]
    labels = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(labels) + 1.6))
    for place, label in enumerate(labels):
        group = [row for row in rows if row["case"] == label]
        height = 0.8 / len(group)
        for i, row in enumerate(group):
            y = place - 0.4 + (i + 0.5) * height
            shade = GATE_SHADES[row["gate"]]
            ours = row["ours"]["eager"]["median_ms"]
            if "fla" in row:
                axes.barh(y, row["fla"]["eager"]["median_ms"], height * 0.9, color=FLA, alpha=0.35 * shade + 0.15)
            axes.barh(y, ours, height * 0.9, color=OURS, alpha=shade)
            axes.barh(y, row["floor_ms"], height * 0.9, color=FLOOR)
            axes.text(ours, y, f" {row['gate']} {ours:.3f}", va="center", fontsize=6)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds an eager call, median")
    bars = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (FLOOR, OURS, FLA)]
    axes.legend(bars, ["memory floor", "flash-kda", "FLA Triton"], loc="upper right", frameon=False)
    axes.set_title(f"{content['environment']['device']}, prefill, D = 128")
    saved = save(figure, path)
    plt.close(figure)
    return saved


def single_sequence_series(rows: list[dict], axis: str, fixed: str) -> dict:
    """Rows of one sequence, keyed (value of `fixed`, gate) and sorted by `axis`, where there are two or more points."""
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
        (drawn,) = axes.plot(x, [point["ours"]["eager"]["median_ms"] for point in points], marker="o", label=name)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the figures; the result's own without it")
    options = parser.parse_args()
    for figure in draw_prefill(options.result, options.out or options.result.parent):
        print(f"wrote {figure}")


if __name__ == "__main__":
    main()

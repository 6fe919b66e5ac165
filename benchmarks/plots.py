"""Figures from the JSON files that the benchmarks write.

python benchmarks/plots.py benchmarks/results/prefill-<device>.json [--out DIR]
python benchmarks/plots.py benchmarks/results/decode-<device>.json [--out DIR]
python benchmarks/plots.py benchmarks/results/layer-<device>.json [--out DIR]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

FLOOR, OURS, FLA = "#8a8f98", "#1f6fb4", "#d98032"
GATE_MARKS = {
    "strong": "o", "weak": "s", "softplus": "^", "token-resets": "v", "channel-resets": "<", "bf16-g": "d",
    "fp32-g": "D",
}  # fmt: skip
SERIES_GATES = ("strong", "weak", "softplus")  # the others are measured with few shapes
DECODE_MARKS = {"fp32, T = 1": "o", "fp32, T = 4": "D", "bf16, T = 1": "s", "bf16, T = 4": "^"}
OTHER_MARK = "X"


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


def draw(result: Path, directory: Path) -> list[Path]:
    """Every figure of one result file; returns the files written into `directory`."""
    content = json.loads(result.read_text())
    drawn = []
    if "prefill" in content:
        drawn += draw_prefill(content["prefill"], result.stem, directory)
    if "decode" in content:
        drawn.append(draw_decode(content["decode"], directory / f"{result.stem}-cases.svg"))
    if parts := layer_parts(content.get("layer", {})):
        drawn.append(draw_layer(content["layer"], parts, directory / f"{result.stem}.svg"))
    return drawn


def draw_decode(content: dict, path: Path) -> Path:
    return draw_cases(
        content, path, lambda row: f"{row['state']}, T = {row['T']}", DECODE_MARKS, "graph",
        "milliseconds a call in a CUDA graph, median", "decoding, sequences x heads, D = 128",
    )  # fmt: skip


def draw_prefill(content: dict, stem: str, directory: Path) -> list[Path]:
    drawn = [
        draw_cases(
            content,
            directory / f"{stem}-cases.svg",
            lambda row: row["gate"],
            GATE_MARKS,
            "eager",
            "milliseconds an eager call, median",
            "prefill, D = 128",
        )  # fmt: skip
    ]
    for axis, fixed, label in (("T", "H", "tokens T"), ("H", "T", "heads H")):
        series = single_sequence_series(content["rows"], axis, fixed)
        if series:
            path = directory / f"{stem}-over-{axis}.svg"
            drawn.append(draw_series(content, series, axis, fixed, label, path))
    return drawn


def draw_cases(content: dict, path: Path, kind_of, marks: dict, time: str, label: str, title: str) -> Path:
    """Time of every case and kind of row: the floor, ours and FLA as marks on one logarithmic line.

    kind_of gives a row's kind, marks its mark; time is the kind of timing that is drawn.
    """
    plt = pyplot()
    rows = content["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    groups = [[row for row in rows if row["case"] == case] for case in cases]
    height = max([0.5, *(0.09 * len(group) for group in groups)])
    figure, axes = plt.subplots(figsize=(8, height * len(cases) + 1.4))
    for place, group in enumerate(groups):
        for i, row in enumerate(group):
            y = place + (i - (len(group) - 1) / 2) * (0.72 / max(3, len(group)))
            mark = marks.get(kind_of(row), OTHER_MARK)
            points = [(row["floor_ms"], FLOOR, "|"), (row["ours"][time]["median_ms"], OURS, mark)]
            if "fla" in row:
                points.append((row["fla"][time]["median_ms"], FLA, mark))
            axes.plot([points[0][0], points[-1][0]], [y, y], color="#dddddd", linewidth=1, zorder=1)
            for x, color, mark in points:
                axes.scatter(x, y, color=color, marker=mark, s=16 if mark != "|" else 40, zorder=2)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.set_xlabel(label)
    found = list(dict.fromkeys(kind_of(row) for row in rows))
    kinds = sorted(found, key=lambda kind: list(marks).index(kind) if kind in marks else len(marks))
    entries = [("memory floor", FLOOR, "|")]
    entries += [(f"flash-kda, {kind}", OURS, marks.get(kind, OTHER_MARK)) for kind in kinds]
    if any("fla" in row for row in rows):
        entries += [(f"FLA Triton, {kind}", FLA, marks.get(kind, OTHER_MARK)) for kind in kinds]
    handles = [
        axes.scatter([], [], color=color, marker=mark, s=24, label=name) for name, color, mark in entries
    ]
    axes.legend(handles=handles, frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title(f"{content['environment']['device']}, {title}")
    saved = save(figure, path)
    plt.close(figure)
    return saved


def single_sequence_series(rows: list[dict], axis: str, fixed: str) -> dict:
    """Rows of one sequence by (value of `fixed`, gate of SERIES_GATES), along `axis`, where there are two points
    or more."""
    series: dict[tuple, list[dict]] = {}
    for row in rows:
        if len(row["lengths"]) == 1 and row["gate"] in SERIES_GATES:
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


def layer_parts(content: dict) -> list[dict]:
    """Prefill and decode of a whole layer, as far as the run came to time ours."""
    parts = (content[name] for name in ("prefill", "decode") if name in content)
    return [part for part in parts if any(row["name"] == "ours" and "time" in row for row in part["rows"])]


def draw_layer(content: dict, parts: list[dict], path: Path) -> Path:
    """Time of a whole layer, prefill and decode: the matrix products, the rest, and the memory floor."""
    plt = pyplot()
    names = {"ours": "flash-kda", "fla": "transformers\nwith FLA", "torch": "transformers\nPyTorch"}
    figure, every = plt.subplots(1, len(parts), figsize=(4 * len(parts), 2.4), squeeze=False)
    for axes, section in zip(every[0], parts, strict=True):
        rows = [row for row in section["rows"] if "time" in row][::-1]
        times = {row["name"]: row["time"]["median_ms"] for row in rows}
        products = section["products"]["median_ms"]
        # PyTorch's bar leaves the figure where it would make the others too small to see.
        end = 1.25 * max(times.get("fla", 0.0), 2 * times["ours"])
        for place, (name, total) in enumerate(times.items()):
            color = OURS if name == "ours" else FLA
            axes.barh(place, products, color=FLOOR, height=0.6)
            axes.barh(place, total - products, left=products, color=color, height=0.6)
            axes.annotate(f" {total:.3f}", (min(total, end), place), va="center", fontsize=7)
        axes.axvline(section["floor_ms"], color="black", linewidth=0.8, linestyle=":")
        axes.set_xlim(0, end)
        axes.set_yticks(range(len(rows)), [names[name] for name in times])
        axes.set_title(section["title"])
        axes.set_xlabel("ms (grey: matrix products; dotted: floor)")
    figure.suptitle(f"{content['environment']['device']}, one layer of Kimi-Linear-48B", y=1.05)
    figure.tight_layout()
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
    for figure in draw(options.result, options.out or options.result.parent):
        print(f"wrote {figure}")


if __name__ == "__main__":
    main()

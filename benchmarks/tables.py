"""The result tables of README.md, from the JSON files that the benchmarks write.

    python benchmarks/tables.py              rewrite the marked sections of README.md
    python benchmarks/tables.py --check      only say whether they are what the JSON files say
    (--readme FILE and --results DIR name other places)

A section is what stands between the lines `<!-- results:NAME -->` and `<!-- /results -->`. NAME is "errors",
"prefill", "decode" or "layer", a part of prefill-, decode- or layer-<device>.json with that name; there is
one table for every device.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from cases import CASES, DECODE_CASES, DECODE_QUICK, QUICK, gates_of
from layer import LABELS, SEQUENCES, TOKENS

SECTION = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
NO_RESULTS = "No results are recorded. `bash scripts/gpu_check.sh` on a machine with a GPU records some."
VERSIONS = ("torch", "cuda", "triton", "kernels", "flash-linear-attention")


class TablesError(Exception):
    """README or a result file can't be used; the text is one line."""


def milliseconds(x: float) -> str:
    return f"{x:.3f}" if x >= 0.1 else f"{x:.4f}"


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table whose first column is text and whose other columns are numbers."""
    rule = [":--"] + ["--:"] * (len(header) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def distinct(values) -> list:
    return list(dict.fromkeys(values))


def measured_on(section: dict) -> str:
    environment = section["environment"]
    versions = [f"{name} {environment[name]}" for name in VERSIONS if environment.get(name)]
    commit = re.sub(r"^([0-9a-f]{12})[0-9a-f]{28}", r"\1", environment["commit"])
    return f"{environment['device']}; {', '.join(versions)}; commit `{commit}`."


def with_fla(rows: list[dict]) -> bool:
    return any("fla" in row for row in rows)


def ended_early(section: dict) -> str:
    """A sentence for a run that was killed; files from before there was such a mark are complete."""
    return "" if section.get("complete", True) else " The run was ended before its last measurement."


def errors_command(rows: list[dict]) -> str:
    """The call of errors.py that measures these rows."""
    words = ["python benchmarks/errors.py"]
    lengths, heads = distinct(row["T"] for row in rows), distinct(row["H"] for row in rows)
    words.append(f"--lengths {' '.join(map(str, lengths))} --heads {' '.join(map(str, heads))}")
    return " ".join(words + ["--no-fla"] * (not with_fla(rows)))


def prefill_command(rows: list[dict]) -> str:
    """The call of prefill.py that measures these rows."""
    words = ["python benchmarks/prefill.py"]
    cases, gates = distinct(row["case"] for row in rows), distinct(row["gate"] for row in rows)
    if set(cases) == set(QUICK):
        words.append("--quick")
    elif cases != [shape.name for shape in CASES]:
        words.append(f"--cases {' '.join(cases)}")
    usual = [(case, gate) for case in cases for gate in gates_of(case)]
    if [(row["case"], row["gate"]) for row in rows] != usual:
        words.append(f"--gates {' '.join(gates)}")
    beside_fla = distinct(row["case"] for row in rows if "fla" in row)
    if not beside_fla:
        words.append("--no-fla")
    elif beside_fla != cases:
        words.append(f"--fla {' '.join(beside_fla)}")
    return " ".join(words)


def errors_table(content: dict) -> list[str]:
    def shown(errors: dict | None) -> list[str]:
        if errors is None:
            return ["", ""]
        return ["not finite" if x is None else f"{x:.1e}" for x in (errors["o"], errors["final_state"])]

    rows, fla = content["rows"], with_fla(content["rows"])
    header = ["gate", "T", "H", "output", "final state"] + ["FLA output", "FLA final state"] * fla
    body = []
    for row in rows:
        body.append([row["gate"], str(row["T"]), str(row["H"]), *shown(row["ours"])])
        if fla:
            body[-1] += shown(row.get("fla"))
    return [
        f"{measured_on(content)} `{errors_command(rows)}`{ended_early(content)}",
        "",
        *markdown(header, body),
    ]


def prefill_table(content: dict) -> list[str]:
    rows, fla = content["rows"], with_fla(content["rows"])
    graph = any("graph" in row["ours"] for row in rows)
    header = ["case", "gate", "median ms", "p10..p90", "floor ms", "ms / floor"]
    header += ["FLA ms", "FLA / ours"] * fla + ["in a CUDA graph, ms"] * graph
    body = []
    for row in rows:
        eager = row["ours"]["eager"]
        cells = [row["case"], row["gate"], milliseconds(eager["median_ms"])]
        cells.append(f"{milliseconds(eager['p10_ms'])}..{milliseconds(eager['p90_ms'])}")
        cells += [milliseconds(row["floor_ms"]), f"{row['over_floor']:.2f}"]
        if fla and "fla" in row:
            cells += [milliseconds(row["fla"]["eager"]["median_ms"]), f"{row['speedup_over_fla']:.2f}"]
        elif fla:
            cells += ["", ""]
        if graph:
            in_graph = row["ours"].get("graph")
            cells.append("" if in_graph is None else milliseconds(in_graph["median_ms"]))
        body.append(cells)
    host = ", ".join(f"`{name}` {1e3 * timing['median_ms']:.0f}" for name, timing in content["host"].items())
    about = f"Copy bandwidth {content['copy_bytes_per_s'] / 1e12:.2f} TB/s; "
    about += f"host time of a call, microseconds: {host}."
    extra_bytes = [row["ours"].get("peak_extra_bytes") for row in rows]
    if rows and None not in extra_bytes:
        about += f" Peak of memory beyond the results, bytes: {max(extra_bytes)}."
    return [
        f"{measured_on(content)} `{prefill_command(rows)}`{ended_early(content)}",
        about,
        "",
        *markdown(header, body),
    ]


def decode_command(rows: list[dict]) -> str:
    """The call of decode.py that measures these rows."""
    words = ["python benchmarks/decode.py"]
    cases = distinct(row["case"] for row in rows)
    if set(cases) == set(DECODE_QUICK):
        words.append("--quick")
    elif cases != [shape.name for shape in DECODE_CASES]:
        words.append(f"--cases {' '.join(cases)}")
    for option, name, usual in (("--states", "state", ["fp32", "bf16"]), ("--tokens", "T", [1, 4])):
        values = distinct(row[name] for row in rows)
        if values != usual:
            words.append(f"{option} {' '.join(map(str, values))}")
    return " ".join(words + ["--no-fla"] * (not with_fla(rows)))


def decode_table(content: dict) -> list[str]:
    rows, fla = content["rows"], with_fla(content["rows"])
    header = ["sequences x heads", "T", "state", "ms", "p10..p90", "floor ms", "ms / floor"]
    header += ["FLA ms", "FLA / ours"] * fla
    body = []
    for row in rows:
        graph = row["ours"]["graph"]
        cells = [row["case"], str(row["T"]), row["state"], milliseconds(graph["median_ms"])]
        cells.append(f"{milliseconds(graph['p10_ms'])}..{milliseconds(graph['p90_ms'])}")
        cells += [milliseconds(row["floor_ms"]), f"{row['over_floor']:.2f}"]
        if fla and "fla" in row:
            cells += [milliseconds(row["fla"]["graph"]["median_ms"]), f"{row['speedup_over_fla']:.2f}"]
        elif fla:
            cells += ["", ""]
        body.append(cells)
    host = ", ".join(f"{name} {1e3 * timing['median_ms']:.0f}" for name, timing in content["host"].items())
    about = f"Copy bandwidth {content['copy_bytes_per_s'] / 1e12:.2f} TB/s; "
    about += f"host time of a call, microseconds: {host}."
    if "fused" in content:
        fused = content["fused"]
        about += (
            f" Fused step at {fused['case']}, fp32 state: {milliseconds(fused['fused']['median_ms'])} ms,"
        )
        about += f" {fused['over_bare']:.2f} of the bare one's {milliseconds(fused['bare']['median_ms'])}."
    command = f"`{decode_command(rows)}`{ended_early(content)}"
    return [f"{measured_on(content)} {command}", about, "", *markdown(header, body)]


def layer_command(content: dict, names: set[str]) -> str:
    """The call of layer.py that measures these implementations."""
    words = ["python benchmarks/layer.py"]
    for option, usual in (("tokens", TOKENS), ("sequences", SEQUENCES)):
        if content[option] != usual:
            words.append(f"--{option} {content[option]}")
    return " ".join(words + [f"--no-{name}" for name in ("fla", "torch") if name not in names])


def layer_table(content: dict) -> list[str]:
    header = ["", "ms", "p10..p90", "products' share", "ms / floor", "launches", "peak MiB", "times ours"]
    parts = [content[name] for name in ("prefill", "decode") if name in content]
    body = []
    for part in parts:
        ours_ms = None
        for row in part["rows"]:
            name = f"{part['title']}: {LABELS[row['name']]}"
            if "time" not in row:
                body.append([name, "out of memory", *[""] * (len(header) - 2)])
                continue
            time = row["time"]
            ours_ms = time["median_ms"] if row["name"] == "ours" else ours_ms
            body.append([
                name, milliseconds(time["median_ms"]),
                f"{milliseconds(time['p10_ms'])}..{milliseconds(time['p90_ms'])}",
                f"{100 * row['product_share']:.0f} %", f"{row['over_floor']:.2f}", str(row["launches"]),
                f"{row['peak_bytes'] / 2**20:.0f}", f"{time['median_ms'] / ours_ms:.2f}" if ours_ms else "",
            ])  # fmt: skip
    names = {row["name"] for part in parts for row in part["rows"]}
    products = ", ".join(f"{part['title']} {milliseconds(part['products']['median_ms'])}" for part in parts)
    errors = ", ".join(f"{LABELS[name]} {error:.1e}" for name, error in content.get("errors", {}).items())
    about = f"Copy bandwidth {content['copy_bytes_per_s'] / 1e12:.2f} TB/s; matrix products alone, ms: {products}."
    about += f" Relative RMS error of the output against float32: {errors}."
    operators = [
        [
            row["name"],
            *map(milliseconds, (row["time"]["median_ms"], row["floor_ms"])),
            f"{row['over_floor']:.2f}",
        ]
        for row in content["operators"]
    ]
    command = f"`{layer_command(content, names)}`{ended_early(content)}"
    return [
        f"{measured_on(content)} {command}", about, "", *markdown(header, body), "",
        *markdown([f"our operators, {content['tokens']} tokens", "ms", "floor ms", "ms / floor"], operators),
    ]  # fmt: skip


TABLES = {"errors": errors_table, "prefill": prefill_table, "decode": decode_table, "layer": layer_table}
RESULTS = ("prefill-*.json", "decode-*.json", "layer-*.json")


def read_results(directory: Path) -> list[tuple[Path, dict]]:
    """The result files of `directory`, by name."""
    found = []
    for path in sorted(path for pattern in RESULTS for path in directory.glob(pattern)):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise TablesError(f"{path} can't be read: {error}") from error
        if not isinstance(content, dict):
            raise TablesError(f"{path}: expected a JSON object, got {type(content).__name__}")
        found.append((path, content))
    return found


def section_text(name: str, results: list[tuple[Path, dict]]) -> str:
    """What stands between the markers of section `name`."""
    if name not in TABLES:
        raise TablesError(f"README section results:{name}: expected one of {', '.join(TABLES)}")
    tables = []
    for path, content in results:
        if name not in content:
            continue
        try:
            tables.append("\n".join(TABLES[name](content[name])))
        except (KeyError, TypeError, AttributeError) as error:
            raise TablesError(f"{path}: {name} is not as the benchmark writes it: {error!r}") from error
    text = "\n\n".join(tables) or NO_RESULTS
    return f"\n{text}\n\n"


def filled(readme: str, results: list[tuple[Path, dict]]) -> str:
    """README's text with every marked section as the results have it."""
    names = [match[2] for match in SECTION.finditer(readme)]
    if sorted(names) != sorted(TABLES) or readme.count("<!-- results:") != len(TABLES):
        raise TablesError(
            f"README: expected the sections {', '.join(TABLES)}, each closed by <!-- /results -->, "
            f"got {', '.join(names) or 'none'}"
        )
    return SECTION.sub(lambda match: match[1] + section_text(match[2], results) + match[3], readme)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if README differs")
    options = parser.parse_args(words)
    try:
        before = options.readme.read_text()
        after = filled(before, read_results(options.results))
        if options.check and before != after:
            raise TablesError(f"{options.readme} is not what the results say; run benchmarks/tables.py")
        if before != after:
            options.readme.write_text(after)
    except (TablesError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

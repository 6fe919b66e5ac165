#!/usr/bin/env python3
"""Build every variant that this machine can, from nothing, and write their table into docs/building.md.

Each one is compiled in a new folder: no object is reused, and build/ stays as it is. Variants whose compiler
is not here are left out; `scripts/fetch_toolkit.py` gets the CUDA compilers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import resource
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import build_kernel
from kernel_build import BuildError
from kernel_build.commands import MANYLINUX, PYTHON_ABI
from kernel_build.config import open_project
from kernel_build.toolkits import WHEELS, nvcc_of, short_name

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "building.md"
BEGIN, END = "<!-- variants -->", "<!-- /variants -->"


@dataclass(frozen=True)
class Row:
    """One built variant.

    Attributes:
        variant: name of its folder.
        compilers: their versions.
        archs: what it has machine code for.
        size: bytes of all its files.
        seconds: CPU time of the compilers, all processes together.
        violations: symbols beyond the ABIs that the Hub asks for.
    """

    variant: str
    compilers: str
    archs: list[str]
    size: int
    seconds: float
    violations: list[str]


def choices() -> dict[str, list[str]]:
    """Short name -> options of build_kernel.py, for what build.toml asks for and this machine has."""
    from kernels._rust import Build

    found = {}
    if "cpu" in {str(backend).lower() for backend in Build.open(ROOT).general.backends}:
        found["cpu"] = ["--backend", "cpu"]
    for cuda in WHEELS:
        with contextlib.suppress(BuildError):
            nvcc_of(cuda, ROOT)
            found[short_name(cuda)] = ["--variant", short_name(cuda)]
    return found


def measure(options: list[str]) -> Row:
    """Build one variant in a new folder.

    Raises:
        BuildError: it can't be built.
    """
    from kernel_abi_check import ObjectFile
    from kernels._rust import Metadata

    with tempfile.TemporaryDirectory() as folder:
        said, before = io.StringIO(), _cpu_seconds()
        with contextlib.redirect_stdout(said):
            code = build_kernel.main([*options, "--output", folder])
        seconds = _cpu_seconds() - before
        if code != 0:
            raise BuildError(f"build_kernel.py {' '.join(options)} failed")
        (metadata_file,) = Path(folder).glob("torch*/metadata.json")
        variant = metadata_file.parent
        metadata = Metadata.read_from_file(metadata_file)
        binary = ObjectFile(str(variant / f"{metadata.id}.abi3.so"))
        return Row(
            variant=variant.name,
            compilers=re.search(rf"{re.escape(variant.name)} for .* with (.+), torch", said.getvalue()).group(
                1
            ),
            archs=metadata.backend.archs or [],
            size=sum(path.stat().st_size for path in variant.rglob("*") if path.is_file()),
            seconds=seconds,
            violations=[
                *map(str, binary.check_manylinux(MANYLINUX)),
                *map(str, binary.check_python_abi(PYTHON_ABI)),
            ],
        )


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def table(rows: list[Row]) -> str:
    """The rows in Markdown, with the machine below."""
    lines = [
        f"| Variant | Compilers | Machine code for | Size | CPU time | {MANYLINUX}, abi3 {PYTHON_ABI} |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        archs = ", ".join(row.archs) or row.variant.split("-")[-2]
        abi = "kept" if not row.violations else f"broken: {', '.join(row.violations)}"
        size, seconds = f"{row.size / 2**20:.1f} MiB", f"{row.seconds:.0f} s"
        lines.append(f"| `{row.variant}` | {row.compilers} | {archs} | {size} | {seconds} | {abi} |")
    note = "Compiled from nothing by `scripts/variant_table.py`. CPU time is that of all compiler processes."
    return "\n".join([*lines, "", note])


def read_page() -> tuple[str, str, str]:
    """docs/building.md before, between and after the marks."""
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    between, end, after = rest.partition(END)
    if not begin or not end:
        raise BuildError(f"{PAGE} has no {BEGIN} ... {END}")
    return before, between, after


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    known = choices()
    parser.add_argument(
        "variants", nargs="*", metavar="VARIANT", help=f"of {', '.join(known)} (default: all)"
    )
    arguments = parser.parse_args(words)
    try:
        unknown = [name for name in arguments.variants if name not in known]
        if unknown:
            raise BuildError(f"variant: expected some of {', '.join(known)}, got {', '.join(unknown)}")
        open_project(ROOT)
        before, _, after = read_page()
        rows = []
        for name in arguments.variants or known:
            rows.append(measure(known[name]))
            print(rows[-1])
        PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}")
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if any(row.violations for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

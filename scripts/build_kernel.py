#!/usr/bin/env python3
"""Build the kernel package into build/<variant>/: for this machine's CUDA toolkit, and for CPUs.

Without nvcc that is the CPU's variant alone. A folder is what kernel-builder makes of the same build.toml:
`kernels.get_local_kernel` loads it from the repository root, and `LOCAL_KERNELS="org/flash-kda=<repository>"`
puts it in the Hub's place. A torch without CUDA is enough to build, the GPU may be elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from kernel_build import BuildError
from kernel_build import variant as variants
from kernel_build.commands import MANYLINUX, PYTHON_ABI, Plan
from kernel_build.config import BACKENDS, Project, open_project, select_archs
from kernel_build.steps import Step
from kernel_build.toolchain import Toolchain, find_nvcc, find_toolchain, variant_name
from kernel_build.toolkits import nvcc_of, parse_variant

ROOT = Path(__file__).resolve().parent.parent
WORK_FOLDERS = (".objects", "logs")


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Exit code: 0 built (or current), 1 not."
    )
    parser.add_argument(
        "--archs", metavar="LIST", help="architectures, e.g. 8.0,9.0; or native (default: build.toml's)"
    )
    parser.add_argument(
        "--backend",
        choices=("all", *BACKENDS),
        default="all",
        help="what to build for (default: all that this machine has compilers for)",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="for another CUDA release, e.g. cu132 (default: the first nvcc found)",
    )
    parser.add_argument("--debug", action="store_true", help="keep line information and symbols")
    parser.add_argument("--clean", action="store_true", help="remove the variant, its objects and logs first")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="parallel compilations"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to put <variant>/ (default: ROOT/build)"
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT, metavar="DIR", help="folder of build.toml (default: this one)"
    )
    parser.add_argument(
        "--check", action="store_true", help="only say whether a whole build of these sources is there"
    )
    arguments = parser.parse_args(words)
    if arguments.backend == "cpu" and (arguments.archs or arguments.variant):
        parser.error("--archs, --variant: expected --backend cuda with them, got cpu")
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected a number from 1 on, got {arguments.jobs}")
    arguments.root = arguments.root.resolve()
    arguments.output = (arguments.output or arguments.root / "build").resolve()
    return arguments


def pick_backends(project: Project, arguments: argparse.Namespace, say) -> list[str]:
    """The backends to build for: the one asked for, else all of build.toml, but for CUDA without an nvcc.

    Raises:
        BuildError: build.toml has not what is asked for, or CUDA_HOME has no nvcc.
    """
    if arguments.backend != "all":
        if arguments.backend not in project.backends:
            known = ", ".join(project.backends)
            raise BuildError(f"--backend: build.toml has {known}, got {arguments.backend}")
        return [arguments.backend]
    if arguments.variant or arguments.archs:
        return ["cuda"]
    if len(project.backends) > 1 and not os.environ.get("CUDA_HOME"):
        try:
            find_nvcc()
        except BuildError as error:
            say(f"note: for CPUs alone: {error}")
            return [backend for backend in project.backends if backend != "cuda"]
    return list(project.backends)


def check(project: Project, output: Path, backends: list[str]) -> bool:
    """Print the state of every variant in `output`; True when there is a whole build of the present sources
    for each of `backends`."""
    found = sorted(output.glob("*/metadata.json"))
    statuses = {path.parent: variants.check(project, path.parent) for path in found}
    for status in statuses.values() or [variants.Status(False, f"{output} holds no variant")]:
        print(status.reason)
    current = {variants.backend_of(path) for path, status in statuses.items() if status.current}
    return current >= set(backends)


@contextlib.contextmanager
def exclusive(output: Path):
    """Make `output`, keep other builds out of it, and remove what an interrupted one left.

    Raises:
        BuildError: it can't be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
    except OSError as error:
        raise BuildError(f"{output} can't be written: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in output.glob(f"{variants.STAGING_PREFIX}*"):
            shutil.rmtree(leftover)
        yield


def pick_archs(project: Project, toolchain: Toolchain, asked: list[str] | None, say) -> dict[str, list[str]]:
    """CUDA section name -> capabilities it is compiled for.

    Raises:
        BuildError: nvcc does not know one that was asked for by name, or none of a section's.
    """
    picked = {}
    for section in project.sections:
        if section.backend != "cuda":
            continue
        archs = section.pick(asked) if asked else list(section.capabilities)
        unknown = [arch for arch in archs if not toolchain.knows(arch)]
        known = [arch for arch in archs if toolchain.knows(arch)]
        if unknown and (asked or not known):
            raise BuildError(f"{toolchain.nvcc} does not know {', '.join(unknown)} ({toolchain.description})")
        if unknown:
            say(f"note: {', '.join(unknown)} left out of {section.name}: unknown to {toolchain.description}")
        picked[section.name] = known
    return picked


def run_steps(steps: list[Step], jobs: int, console) -> int:
    """Run the steps that are not current, `jobs` at a time, with progress. Returns how many ran.

    Raises:
        BuildError: the first failure; steps that run already are waited for, the others are not started.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    due = [step for step in steps if not step.is_current()]
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(
            *columns, console=console, transient=True, disable=not (due and console.is_terminal)
        ) as progress,
        ThreadPoolExecutor(jobs) as pool,
    ):
        task = progress.add_task("compiling", total=len(due))
        started = time.monotonic()
        futures = {pool.submit(step.run): step for step in due}
        for count, future in enumerate(as_completed(futures), 1):
            try:
                future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            progress.advance(task)
            seconds = time.monotonic() - started
            console.print(
                f"[{count}/{len(due)}] {futures[future].name} ({seconds:.0f} s)",
                markup=False,
                highlight=False,
            )
    return len(due)


def report_abi(extension: Path, say) -> None:
    """Say whether the extension keeps to the ABIs that the Hub asks for, if kernel-abi-check is installed."""
    try:
        from kernel_abi_check import ObjectFile
    except ImportError:
        say("note: kernel-abi-check is not installed, the extension's ABI was not checked")
        return
    binary = ObjectFile(str(extension))
    violations = [*binary.check_manylinux(MANYLINUX), *binary.check_python_abi(PYTHON_ABI)]
    if violations:
        say(f"warning: fit for this machine, not for the Hub ({MANYLINUX}, abi3 {PYTHON_ABI}): {violations}")
    else:
        say(f"ABI: {MANYLINUX}, abi3 {PYTHON_ABI}")


def build(project: Project, backend: str, arguments: argparse.Namespace, console, say) -> Path:
    """Build one variant and return its folder."""
    started = time.monotonic()
    asked = select_archs(project, arguments.archs)
    nvcc = nvcc_of(parse_variant(project, arguments.variant), ROOT) if arguments.variant else None
    toolchain = find_toolchain(project, nvcc, backend)
    archs = pick_archs(project, toolchain, asked, say) if backend == "cuda" else {}
    all_archs = [arch for arch in project.capabilities if any(arch in picked for picked in archs.values())]
    kernel_id = project.kernel_id(all_archs, arguments.debug)
    variant = arguments.output / variant_name(project, toolchain)
    options = "-".join([*(all_archs or ["cpu"]), *(["debug"] if arguments.debug else [])])
    say(f"{variant.name} for {', '.join(all_archs) or platform.machine()} with {toolchain.description}")

    with exclusive(arguments.output):
        if arguments.clean:
            for folder in (*(arguments.output / name / variant.name for name in WORK_FOLDERS), variant):
                shutil.rmtree(folder, ignore_errors=True)
        objects, logs = (arguments.output / name / variant.name / options for name in WORK_FOLDERS)
        plan = Plan(project, toolchain, archs, kernel_id, arguments.debug, arguments.jobs, objects, logs)
        plan.write_generated()
        steps = plan.compile_steps()
        compiled = run_steps(steps, arguments.jobs, console)
        link = plan.link_step([step.output for step in steps])
        linked = run_steps([link], 1, console)
        if project.kernel_id(all_archs, arguments.debug) != kernel_id:
            raise BuildError("a source changed during the build; run it again")
        if linked:
            report_abi(link.output, say)
        builder = (
            f"{project.name}/scripts/build_kernel.py with kernels {importlib.metadata.version('kernels')}"
        )
        changed = variants.install(project, variant, link.output, kernel_id, all_archs, builder)

    git = variants.git_status(project.root)
    if git and git["dirty"]:
        say(
            "note: tracked files have uncommitted changes; the metadata says so, and `kernels` warns about it"
        )
    size = link.output.stat().st_size / 2**20
    what = "is current" if not changed else f"built, {size:.1f} MiB"
    say(f"{variant} {what}; {compiled} of {len(steps)} objects compiled, {time.monotonic() - started:.0f} s")
    return variant


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    try:
        try:
            import kernels._rust  # noqa: F401
            from rich.console import Console
        except ImportError as error:
            raise BuildError(f"{error.name} is not installed: pip install 'flash-kda[build]'") from error
        console = Console()

        def say(text: str) -> None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        project = open_project(arguments.root)
        backends = pick_backends(project, arguments, say)
        if arguments.check:
            return 0 if check(project, arguments.output, backends) else 1
        for backend in backends:
            build(project, backend, arguments, console, say)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or arguments.output}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the variant is as it was before", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

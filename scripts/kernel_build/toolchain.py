"""The compilers and headers of this machine: nvcc, the host compiler, torch, Python and CUTLASS."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from . import BuildError
from .config import Project, base_capability


@dataclass(frozen=True)
class Toolchain:
    """Where the tools are and which versions they have. Without nvcc it compiles the CPU's variant."""

    nvcc: Path | None
    host_compiler: Path
    cuda_home: Path | None
    cuda_version: tuple[int, int] | None
    gpu_codes: frozenset[str]
    torch_dir: Path
    python_include: Path
    cutlass_include: Path | None
    description: str

    @property
    def cudart(self) -> Path:
        """The CUDA runtime library. Toolkits made of wheels have it in lib/ and under its full name alone."""
        name = f"libcudart.so.{self.cuda_version[0]}"
        found = [path for folder in ("lib64", "lib") if (path := self.cuda_home / folder / name).is_file()]
        if not found:
            raise BuildError(f"no CUDA runtime: {self.cuda_home} has no lib64/{name} or lib/{name}")
        return found[0]

    def knows(self, capability: str) -> bool:
        """Whether nvcc has the target sm_XY of a capability X.Y; 9.0a is taken to come with 9.0."""
        return "sm_" + base_capability(capability).replace(".", "") in self.gpu_codes


def find_nvcc() -> Path:
    """nvcc from CUDA_HOME, else from PATH, else from /usr/local/cuda.

    Raises:
        BuildError: there is none; also when CUDA_HOME is set and has none, for then another is not what was
            meant.
    """
    if home := os.environ.get("CUDA_HOME"):
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.is_file():
            raise BuildError(f"no nvcc: CUDA_HOME={home} has no bin/nvcc")
        return nvcc
    for nvcc in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if nvcc and Path(nvcc).is_file():
            return Path(nvcc)
    raise BuildError(
        "no nvcc: not in CUDA_HOME, PATH or /usr/local/cuda; install the CUDA toolkit (12.6 or newer)"
    )


def find_toolchain(project: Project, nvcc: Path | None = None, backend: str = "cuda") -> Toolchain:
    """Everything that compiling `project` for `backend` needs, with this `nvcc` or the first one found.

    Raises:
        BuildError: a part is missing, does not run, or is too old for the stable ABI version asked for.
    """
    cuda = _find_cuda(nvcc or find_nvcc()) if backend == "cuda" else {}
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise BuildError(
            f"no C++ compiler: {os.environ.get('CXX') or 'g++'} is not in PATH (CXX names another)"
        )
    compiler_version = f"{Path(compiler).name} {_output(compiler, '-dumpfullversion').strip()}"

    python_include = Path(sysconfig.get_path("include"))
    if not (python_include / "Python.h").is_file():
        raise BuildError(
            f"no Python headers: {python_include}/Python.h is missing (package python3-dev or python3-devel)"
        )

    torch_dir, torch_version = _find_torch(project)
    needs_cutlass = any(
        name.startswith("cutlass") for section in project.sections_of(backend) for name in section.depends
    )
    return Toolchain(
        nvcc=cuda.get("nvcc"),
        host_compiler=Path(compiler),
        cuda_home=cuda.get("home"),
        cuda_version=cuda.get("version"),
        gpu_codes=cuda.get("gpu_codes", frozenset()),
        torch_dir=torch_dir,
        python_include=python_include,
        cutlass_include=_find_cutlass() if needs_cutlass else None,
        description=", ".join([*cuda.get("names", ()), compiler_version, f"torch {torch_version}"]),
    )


def _find_cuda(nvcc: Path) -> dict:
    """The toolkit around nvcc: its home, version, GPU targets and name."""
    banner = _output(nvcc, "--version")
    release = re.search(r"release (\d+)\.(\d+), V([\d.]+)", banner)
    if release is None:
        raise BuildError(f"{nvcc} --version names no release: {banner.strip()!r}")
    # Through the compiler's own word: nvcc may be a script or a link that lies far from the toolkit.
    top = re.search(r"^#\$ TOP=(.+)$", _output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull), re.MULTILINE)
    return {
        "nvcc": nvcc,
        "home": Path(top.group(1)).resolve() if top else nvcc.resolve().parent.parent,
        "version": (int(release.group(1)), int(release.group(2))),
        "gpu_codes": frozenset(_output(nvcc, "--list-gpu-code").split()),
        "names": [f"nvcc {release.group(3)}"],
    }


def variant_name(project: Project, toolchain: Toolchain) -> str:
    """kernel-builder's name of the variant, e.g. torch-stable-abi211-cu130-x86_64-linux, or with cpu in the
    CUDA version's place."""
    abi, cuda = ("".join(map(str, version or ())) for version in (project.stable_abi, toolchain.cuda_version))
    computer = f"cu{cuda}" if cuda else "cpu"
    return f"torch-stable-abi{abi}-{computer}-{platform.machine()}-{platform.system().lower()}"


def _output(*command: object) -> str:
    try:
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if result.returncode != 0:
        text = " ".join((result.stderr or result.stdout).split())[-200:]
        raise BuildError(f"{command[0]} {command[1]} failed with exit code {result.returncode}: {text}")
    return result.stdout + result.stderr


def _find_torch(project: Project) -> tuple[Path, str]:
    spec = importlib.util.find_spec("torch")
    needed = ".".join(map(str, project.stable_abi))
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(f"no torch: this Python has no torch >= {needed}")
    torch_dir = Path(spec.submodule_search_locations[0])
    version = runpy.run_path(str(torch_dir / "version.py"))["__version__"]  # `import torch` takes seconds
    if tuple(int(part) for part in version.split(".")[:2]) < project.stable_abi:
        raise BuildError(f"torch {version} is too old for the stable ABI {needed} of build.toml")
    if not (torch_dir / "include/torch/csrc/stable/library.h").is_file():
        raise BuildError(f"torch {version} in {torch_dir} has no stable ABI headers")
    return torch_dir, version


def _find_cutlass() -> Path:
    """include/ of CUTLASS: CUTLASS_SRC_DIR (as for kernel-builder), else the nvidia-cutlass wheel."""
    if source := os.environ.get("CUTLASS_SRC_DIR"):
        candidates = [Path(source)]
    else:
        spec = importlib.util.find_spec("cutlass_library")
        candidates = [
            Path(place) / "source" for place in (spec.submodule_search_locations if spec else None) or ()
        ]
    for candidate in candidates:
        if (candidate / "include/cute/tensor.hpp").is_file():
            return candidate / "include"
    where = (
        f"CUTLASS_SRC_DIR={source}"
        if source
        else "the nvidia-cutlass wheel (pip install nvidia-cutlass==4.2.0.0)"
    )
    raise BuildError(f"no CUTLASS headers: looked in {where}")

"""The CUDA toolkit that a variant asks for: found on this machine, or made of NVIDIA's wheels."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import BuildError
from .config import Project

# The parts of a toolkit that compiling needs, from the first release whose wheels hold a whole compiler.
# (Wheels of CUDA 12 carry ptxas alone.) They unpack into one folder, nvidia/cu13.
WHEELS = {
    "13.0": {
        "nvidia-cuda-nvcc": "13.0.88",
        "nvidia-nvvm": "13.0.88",
        "nvidia-cuda-crt": "13.0.88",
        "nvidia-cuda-cccl": "13.0.85",
        "nvidia-cuda-runtime": "13.0.96",
    },
    "13.2": {
        "nvidia-cuda-nvcc": "13.2.86",
        "nvidia-nvvm": "13.2.86",
        "nvidia-cuda-crt": "13.2.86",
        "nvidia-cuda-cccl": "13.2.86",
        "nvidia-cuda-runtime": "13.2.86",
    },
}
INSIDE_WHEELS = Path("nvidia/cu13")
ENV_HOME = "FLASH_KDA_TOOLKITS"


def toolkits_home(root: Path) -> Path:
    """Where toolkits made of wheels are kept, one folder for each version: FLASH_KDA_TOOLKITS, else below
    build/."""
    return Path(os.environ.get(ENV_HOME) or root / "build" / ".toolkits").resolve()


def parse_variant(project: Project, name: str) -> str:
    """The CUDA version, like "13.0", of a variant called "cu130" or by its folder's whole name.

    Raises:
        BuildError: it is no variant that this script builds on this machine.
    """
    abi = "".join(map(str, project.stable_abi))
    place = f"{platform.machine()}-{platform.system().lower()}"
    match = re.fullmatch(rf"cu(\d\d)(\d)|torch-stable-abi{abi}-cu(\d\d)(\d)-{place}", name)
    if match is None:
        raise BuildError(
            f"--variant: expected a name like cu130 or torch-stable-abi{abi}-cu130-{place}, got {name!r}"
        )
    return ".".join(part for part in match.groups() if part)


def nvcc_of(cuda: str, root: Path) -> Path:
    """The nvcc of one CUDA version: in CUDA_HOME, PATH, /usr/local/cuda*, or made of wheels.

    Raises:
        BuildError: this machine has none.
    """
    homes = [os.environ.get("CUDA_HOME"), f"/usr/local/cuda-{cuda}", "/usr/local/cuda"]
    candidates = [Path(home) / "bin/nvcc" for home in homes if home]
    if found := shutil.which("nvcc"):
        candidates.append(Path(found))
    candidates.append(_from_wheels(cuda, root) / "bin/nvcc")
    for nvcc in candidates:
        if nvcc.is_file() and _release(nvcc) == cuda:
            return nvcc
    if cuda in WHEELS:
        hint = f"`python scripts/fetch_toolkit.py {short_name(cuda)}` makes one of NVIDIA's wheels"
    else:
        hint = f"wheels with a compiler exist for {', '.join(WHEELS)}; others need the toolkit, or Nix"
    raise BuildError(
        f"no nvcc of CUDA {cuda} in CUDA_HOME, PATH, /usr/local or {toolkits_home(root)}: {hint}"
    )


def short_name(cuda: str) -> str:
    """ "cu130" for "13.0"."""
    return "cu" + cuda.replace(".", "")


def fetch(cuda: str, root: Path) -> Path:
    """Make the toolkit of one CUDA version from its wheels, with pip, unless it is there. Returns its folder.

    The folder appears whole or not at all.

    Raises:
        BuildError: there are no such wheels, or pip can't get them.
    """
    if cuda not in WHEELS:
        raise BuildError(f"wheels with a compiler exist for CUDA {', '.join(WHEELS)}, not for {cuda}")
    target = _from_wheels(cuda, root)
    if (target / "bin/nvcc").is_file():
        return target
    home = toolkits_home(root)
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=home) as staging:
        new = Path(staging) / short_name(cuda)
        wheels = [f"{name}=={version}" for name, version in WHEELS[cuda].items()]
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
        command += ["--quiet", "--no-deps", "--target", str(new), *wheels]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            raise BuildError(f"pip can't install CUDA {cuda}: {(lines or ['no reason given'])[-1]}")
        if _release(new / INSIDE_WHEELS / "bin/nvcc") != cuda:
            raise BuildError(f"the wheels of CUDA {cuda} hold no nvcc that runs here")
        new.rename(home / new.name)
    return target


def _from_wheels(cuda: str, root: Path) -> Path:
    return toolkits_home(root) / short_name(cuda) / INSIDE_WHEELS


def _release(nvcc: Path) -> str | None:
    """ "13.0", from what nvcc says of itself; None when it says nothing of the kind."""
    try:
        result = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"release (\d+\.\d+)", result.stdout)
    return match.group(1) if match else None

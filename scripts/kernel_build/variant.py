"""build/<variant>/, the folder that the `kernels` package loads: laid out as by kernel-builder."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import BuildError
from .config import Project

STAGING_PREFIX = ".staging-"

# What kernel-builder writes for a kernel that depends on no other kernel.
KERNELS_MINVER = "0.14.0"

_OPS = '''\
import torch

from . import {id}

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str):
    """Prefix the operator's name with the namespace of this build."""
    return f"{id}::{{op_name}}"
'''

_SHIM = '''\
"""The package one level up under its plain name, for `kernels` releases that look for it here."""

import importlib.util
import sys
from pathlib import Path

_ID = "{id}"
_package = sys.modules.get(_ID)
if _package is None:
    _file = Path(__file__).resolve().parent.parent / "__init__.py"
    _spec = importlib.util.spec_from_file_location(_ID, _file)
    _package = importlib.util.module_from_spec(_spec)
    sys.modules[_ID] = _package
    _spec.loader.exec_module(_package)

globals().update({{name: value for name, value in vars(_package).items() if not name.startswith("_")}})
__all__ = _package.__all__
'''


@dataclass(frozen=True)
class Status:
    """What stands in a variant's folder: `current` and, in words, why or why not."""

    current: bool
    reason: str


def check(project: Project, variant: Path) -> Status:
    """Whether `variant` is a whole build of the present sources. Needs no compiler, and torch neither."""
    from kernels._rust import Digest, DigestAlgorithm, DigestValidationError, Metadata

    path = variant / "metadata.json"
    if not path.is_file():
        return Status(False, f"{variant} is not built")
    try:
        metadata = Metadata.read_from_file(path)
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    except (ValueError, AttributeError, DigestValidationError) as error:
        return Status(False, f"{variant} is damaged: {' '.join(str(error).split())}")
    expected = project.kernel_id(metadata.backend.archs or [], debug=metadata.id.endswith("_debug"))
    if metadata.id != expected:
        return Status(
            False, f"{variant} was built from other sources: it is {metadata.id}, the sources are {expected}"
        )
    return Status(True, f"{variant} is {metadata.id} for {', '.join(metadata.backend.archs or ['the CPU'])}")


def backend_of(variant: Path) -> str:
    """"cuda" or "cpu", from a variant's metadata."""
    return json.loads((variant / "metadata.json").read_text())["backend"]["type"]


def install(
    project: Project, variant: Path, extension: Path, kernel_id: str, archs: list[str], builder: str
) -> bool:
    """Lay out a variant from the package's Python files and the linked `extension`, and put it in place.

    It is assembled in a folder beside `variant`, whose name the `kernels` package does not read as a variant,
    and renamed when whole: whatever interrupts this, no half-written variant can be loaded.

    Returns:
        False when `variant` already was exactly that.
    """
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=variant.parent))
    try:
        new, old = staging / "new", staging / "old"
        package = project.root / "torch-ext" / project.python_name
        for source in project.python_files:
            target = new / source.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        if not (new / "__init__.py").is_file():
            raise BuildError(f"{package}/__init__.py does not exist")
        (new / "_ops.py").write_text(_OPS.format(id=kernel_id))
        shim = new / project.python_name / "__init__.py"
        shim.parent.mkdir(exist_ok=True)
        shim.write_text(_SHIM.format(id=kernel_id))
        shutil.copyfile(extension, new / f"{kernel_id}.abi3.so")
        metadata = _metadata(project, new, kernel_id, archs, builder)
        (new / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")

        if _same_files(new, variant):
            return False
        if variant.exists():
            variant.rename(old)
        new.rename(variant)
        return True
    finally:
        shutil.rmtree(staging)


def _metadata(project: Project, variant: Path, kernel_id: str, archs: list[str], builder: str) -> dict:
    from kernels._rust import Digest, DigestAlgorithm

    backend = {"type": "cuda", "archs": archs} if archs else {"type": "cpu"}
    provenance: dict = {"kernel-builder": {"version": builder}}
    if (git := git_status(project.root)) is not None:
        provenance["kernel"] = git
    return {
        "name": project.name,
        "id": kernel_id,
        "version": project.version,
        "kernels-minver": KERNELS_MINVER,
        "license": project.license,
        "python-depends": list(project.python_depends[backend["type"]]),
        "kernel-depends": [],
        "backend": backend,
        "digest": {
            "algorithm": "sha256",
            "files": Digest.hash_variant(DigestAlgorithm.SHA256, variant).files,
        },
        "provenance": provenance,
    }


def git_status(root: Path) -> dict | None:
    """HEAD, and whether tracked files differ from it; None outside git and before the first commit."""
    try:
        head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": head.strip(), "dirty": bool(dirty.strip())}


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout


def _same_files(left: Path, right: Path) -> bool:
    """Whether two folders hold the same files with the same content, byte code left aside."""

    def listing(root: Path) -> dict[Path, bytes]:
        files = (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {path.relative_to(root): path.read_bytes() for path in files}

    return right.is_dir() and listing(left) == listing(right)

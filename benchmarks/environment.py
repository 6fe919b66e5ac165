"""What a measurement ran on, where the two implementations come from, and where results go."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load_kernel(backend: str | None = None):
    """The kernel package built under build/, loaded as `get_kernel` loads it; by default of torch's backend."""
    from kernels import get_local_kernel

    return get_local_kernel(ROOT, backend=backend)


def metadata_of(kernel) -> dict:
    return json.loads((Path(kernel.__file__).parent / "metadata.json").read_text())


def load_fla():
    """FLA's own Triton `chunk_kda`: its dispatch to a `flash_kda` module is switched off first."""
    os.environ["FLA_FLASH_KDA"] = "0"
    from fla.ops.kda import chunk_kda

    return chunk_kda


def load_fla_decode():
    """FLA's own Triton kernel for decoding, without the checks around it; it updates states in place."""
    os.environ["FLA_FLASH_KDA"] = "0"
    from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

    return fused_recurrent_kda_fwd


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(kernel) -> dict:
    """Device, versions and the commit the kernel was built from."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    metadata = metadata_of(kernel)
    return {
        "device": device.name,
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        "memory_bytes": device.total_memory,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version_of(name) for name in ("triton", "kernels", "flash-linear-attention")},
        "kernel_id": metadata["id"],
        "commit": commit_of(metadata),
    }


def commit_of(metadata: dict) -> str:
    """FLASH_KDA_COMMIT, or the built variant's commit ("-dirty" where files differed), or "unknown"."""
    given = os.environ.get("FLASH_KDA_COMMIT")
    if given:
        return given
    built_from = metadata.get("provenance", {}).get("kernel") or {}
    return built_from.get("commit", "unknown") + ("-dirty" if built_from.get("dirty") else "")


def print_environment(environment: dict) -> None:
    keys = ("torch", "cuda", "triton", "kernels", "flash-linear-attention", "commit", "kernel_id")
    print(f"{environment['device']}, {environment['multiprocessors']} multiprocessors")
    print(", ".join(f"{key} {environment[key]}" for key in keys), flush=True)


def result_path(directory: Path, benchmark: str, environment: dict) -> Path:
    """<directory>/<benchmark>-<device>.json"""
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    return directory / f"{benchmark}-{device}.json"


def update_result(path: Path, section: str, value: dict) -> None:
    """Sets one section of the JSON object at `path`; its other sections stay as they are.

    The file is replaced as a whole: who is killed in here leaves the one before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {}
    content[section] = value
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    part.replace(path)


class Section:
    """A section of <directory>/<benchmark>-<device>.json that is written again after every measurement.

    `content` is the section; its "complete" is False until `finish`, so that a run that was killed leaves a
    valid file that says so.
    """

    def __init__(self, directory: Path, benchmark: str, environment: dict, name: str | None = None):
        self.path = result_path(directory, benchmark, environment)
        self.name = name or benchmark
        self.content: dict = {"environment": environment, "complete": False}

    def save(self, **changes) -> None:
        """Sets parts of the section and writes it."""
        self.content.update(changes)
        update_result(self.path, self.name, self.content)

    def finish(self) -> None:
        """The last measurement is in."""
        self.save(complete=True)
        print(f"wrote {self.path}", flush=True)

"""Clients of the loopback Hub in processes of their own, and what is put on it.

Clients set HF_ENDPOINT before they import anything. Without CUDA `kernels` picks no CUDA variant: what is
loaded then is the CPU variant of build/, or, where there is none, a stand-in (`stand_in`): the package's own
Python files and operators without a kernel. Its id ends in "_standin".
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from kernel_build import variant as variants
from kernel_build.config import open_project
from loopback import Files, LoopbackHub, read_files

ROOT = Path(__file__).resolve().parent.parent.parent
NAME = "org/flash-kda"

# What a compiled extension does when it is imported: the operators get their schemas. Here none has a kernel.
STAND_IN_OPS = """
import torch

ops = torch.ops.{id}
_library = torch.library.Library("{id}", "DEF")
for _schema in {schemas}:
    _library.define(_schema)


def add_op_namespace_prefix(op_name: str):
    return f"{id}::{{op_name}}"
"""


def operator_schemas() -> list[str]:
    """The schemas of torch_binding.cpp: string literals that C++ joins."""
    source = (ROOT / "torch-ext/torch_binding.cpp").read_text()
    literals = re.findall(r'ops\.def\(\s*((?:"[^"]*"\s*)+)\)', source)
    return ["".join(re.findall(r'"([^"]*)"', text)) for text in literals]


def stand_in(version: int) -> Files:
    """build/torch-<backend>/, a variant without compiled code that any machine loads."""
    backend = "cpu" if torch.version.cuda is None else "cuda"
    kernel_id = f"_flash_kda_{backend}_v{version}_standin"
    files = read_files(ROOT / "torch-ext/flash_kda")
    files["_ops.py"] = STAND_IN_OPS.format(id=kernel_id, schemas=operator_schemas()).encode()
    hashes = {
        path: base64.b64encode(hashlib.sha256(content).digest()).decode() for path, content in files.items()
    }
    metadata = {
        "id": kernel_id,
        "name": "flash-kda",
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    files["metadata.json"] = json.dumps(metadata).encode()
    return {f"build/torch-{backend}/{path}": content for path, content in files.items()}


def current_variants() -> list[Path]:
    """The variants in build/ that were made from the present sources."""
    project = open_project(ROOT)
    found = [path.parent for path in sorted((ROOT / "build").glob("torch*/metadata.json"))]
    return [path for path in found if variants.check(project, path).current]


def backend_of(variant: Path) -> str:
    return json.loads((variant / "metadata.json").read_text())["backend"]["type"]


@dataclass
class Client:
    """Runs code in new Python processes that know the Hub under test and one cache folder."""

    hub: LoopbackHub
    home: Path

    def run(self, code: str, **environment: str) -> subprocess.CompletedProcess:
        """Run `code`. The environment has no settings of the Hub but ours."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "KERNELS_"))
        }
        inherited.pop("LOCAL_KERNELS", None)
        settings = {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **environment,
        }
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=inherited | settings,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def output(self, code: str, **environment: str) -> dict:
        """What `code` prints on its last line, as JSON. The process must succeed."""
        result = self.run(code, **environment)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    def error(self, code: str, **environment: str) -> str:
        """The last line of the traceback of `code`, which must fail."""
        result = self.run(code, **environment)
        assert result.returncode == 1, result.stdout + result.stderr
        return next(
            line for line in reversed(result.stderr.splitlines()) if line and not line.startswith(" ")
        )

"""flake.nix and flake.lock: pinned, consistent, and what our outputs function asks kernel-builder to build.

kernel-builder itself needs the open internet. A stub that takes the same arguments and records them stands in
for it; everything here is evaluated by Nix, offline. Debian's `nix-bin` is enough.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from kernel_build.config import open_project

ROOT = Path(__file__).resolve().parent.parent

# The arguments of kernel-builder's genKernelFlakeOutputs; another one is an error, as it is there. It reads
# build.toml from `path` and compiles what that lists and no more.
STUB = """
{
  lib.genKernelFlakeOutputs =
    { self
    , path
    , doGetKernelCheck ? true
    , pythonCheckInputs ? pkgs: [ ]
    , pythonNativeCheckInputs ? pkgs: [ ]
    }@given:
    let
      config = builtins.fromTOML (builtins.readFile (path + "/build.toml"));
      sections = [ config.torch ] ++ builtins.attrValues config.kernel;
      sources = builtins.concatMap (section: section.src) sections;
    in
    {
      asked = {
        arguments = builtins.attrNames given;
        revision = self.shortRev or self.dirtyShortRev or self.narHash;
        general = config.general;
        stable-abi = config.torch.stable-abi;
        kernels = builtins.mapAttrs (name: kernel: kernel.cuda-capabilities or [ ]) config.kernel;
        inherit doGetKernelCheck sources;
        missing = builtins.filter (source: !builtins.pathExists (path + ("/" + source))) sources;
      };
    };
}
"""


def nix(program: str, *words: object, folder: Path, check: bool = True) -> subprocess.CompletedProcess:
    """Run a program of Nix with a store, a home and a configuration of its own below `folder`."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"no {program} in PATH (Debian and Ubuntu: apt-get install nix-bin)")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "NIX_CONFIG": "experimental-features = nix-command flakes\nsandbox = false",
    }
    command = [path, *map(str, words), "--store", str(folder / "store")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=check)


def evaluate(expression: str, folder: Path):
    """Value of a Nix expression; `flake` in it is our flake.nix and `stub` the recording kernel-builder."""
    (folder / "stub.nix").write_text(STUB)
    text = f"let flake = import {ROOT}/flake.nix; stub = import {folder}/stub.nix; in {expression}"
    result = nix(
        "nix-instantiate", "--eval", "--strict", "--json", "--expr", text, folder=folder, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# ---------------------------------------------------------------------------------- the lock file


@pytest.fixture(scope="module")
def lock() -> dict:
    return json.loads((ROOT / "flake.lock").read_text())


def test_lock_pins_kernel_builder(lock):
    assert lock["version"] == 7 and lock["root"] == "root"
    assert lock["nodes"]["root"]["inputs"] == {"kernel-builder": "kernel-builder"}
    locked = lock["nodes"]["kernel-builder"]["locked"]
    assert (locked["type"], locked["owner"], locked["repo"]) == ("github", "huggingface", "kernels")


def test_lock_is_complete(lock):
    """Every node but the root is one commit with one content hash, and every input leads to a node."""
    for name, node in lock["nodes"].items():
        for target in node.get("inputs", {}).values():
            assert isinstance(target, list) or target in lock["nodes"], f"{name} -> {target}"
        if name == "root":
            continue
        assert re.fullmatch(r"[0-9a-f]{40}", node["locked"]["rev"]), name
        kind, _, digest = node["locked"]["narHash"].partition("-")
        assert kind == "sha256" and len(base64.b64decode(digest, validate=True)) == 32, name


def test_lock_fits_the_flake(tmp_path):
    """Nix itself finds nothing to update; it does once flake.nix asks for another input."""
    for name in ("flake.nix", "flake.lock"):
        shutil.copy(ROOT / name, tmp_path)
    command = ("nix", "flake", "metadata", "--json", f"path:{tmp_path}", "--offline", "--no-update-lock-file")
    (tmp_path.parent / "home").mkdir(exist_ok=True)
    result = nix(*command, folder=tmp_path.parent / "home")
    assert json.loads(result.stdout)["locks"] == json.loads((ROOT / "flake.lock").read_text())

    text = (tmp_path / "flake.nix").read_text()
    (tmp_path / "flake.nix").write_text(text.replace("huggingface/kernels", "someone/kernels"))
    result = nix(*command, folder=tmp_path.parent / "home", check=False)
    assert result.returncode != 0


# ------------------------------------------------------------------------------------ the outputs


def test_flake_parses(tmp_path):
    result = nix("nix-instantiate", "--parse", ROOT / "flake.nix", folder=tmp_path)
    assert "genKernelFlakeOutputs" in result.stdout


def test_the_only_input_is_kernel_builder(tmp_path):
    assert evaluate("flake.inputs", tmp_path) == {"kernel-builder": {"url": "github:huggingface/kernels"}}


def test_what_kernel_builder_is_asked_to_build(tmp_path):
    """Name, backends, architectures and sources are build.toml's, and its checks stay on."""
    asked = evaluate(
        '(flake.outputs { self = { shortRev = "abc1234"; }; kernel-builder = stub; }).asked', tmp_path
    )
    project = open_project(ROOT)
    assert asked["arguments"] == ["path", "self"]
    assert asked["revision"] == "abc1234"
    assert asked["doGetKernelCheck"] is True
    assert asked["general"]["name"] == project.name and asked["general"]["version"] == project.version
    assert asked["general"]["edition"] == 5 and "cuda" in asked["general"]["backends"]
    assert asked["stable-abi"]["cuda"] == ".".join(map(str, project.stable_abi))
    capabilities = {arch for archs in asked["kernels"].values() for arch in archs}
    assert capabilities == set(project.capabilities)
    assert {"8.0", "9.0", "9.0a", "10.0", "12.0"} <= capabilities
    assert asked["missing"] == [] and len(asked["sources"]) == len(set(asked["sources"]))


def test_outputs_need_self(tmp_path):
    """kernel-builder names the build after the flake's revision: without `self` it refuses."""
    (tmp_path / "stub.nix").write_text(STUB)
    text = f"((import {tmp_path}/stub.nix).lib.genKernelFlakeOutputs {{ path = {ROOT}; }}).asked.revision"
    result = nix("nix-instantiate", "--eval", "--expr", text, folder=tmp_path, check=False)
    assert result.returncode != 0 and "self" in result.stderr


def test_the_flake_evaluates_as_a_flake(tmp_path):
    """The same through `nix eval`, on a copy in a store of its own."""
    project = open_project(ROOT)
    copy, stub, home = (tmp_path / name for name in ("copy", "stub", "home"))
    for folder in (copy, stub, home):
        folder.mkdir()
    for name in ("flake.nix", "flake.lock", "build.toml"):
        shutil.copy(ROOT / name, copy)
    for name in ("kda_kernel", "torch-ext"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (stub / "flake.nix").write_text(f"{{ outputs = {{ self }}: {STUB}; }}")
    override = ("--override-input", "kernel-builder", f"path:{stub}", "--no-write-lock-file", "--offline")
    result = nix("nix", "eval", "--json", f"path:{copy}#asked", *override, folder=home, check=False)
    assert result.returncode == 0, result.stderr
    asked = json.loads(result.stdout)
    assert asked["missing"] == [] and asked["general"]["name"] == project.name
    assert asked["revision"].startswith("sha256-")

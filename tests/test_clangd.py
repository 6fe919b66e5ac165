"""setup_clangd.sh: the .clangd that it writes makes clang understand our sources."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEWEST, OLDEST, OLDEST_FOR_CUDA = 40, 14, 17  # versions of clang; CUDA 12 and 13 are beyond 16


def newest(program: str, oldest: int) -> str:
    """The newest installed `program` from version `oldest` on; skips where there is none."""
    found = [name for n in range(NEWEST, oldest - 1, -1) if (name := shutil.which(f"{program}-{n}"))]
    if not found and (plain := shutil.which(program)):
        banner = subprocess.run([plain, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"version (\d+)", banner)
        found = [plain] if version and int(version[1]) >= oldest else []
    return found[0] if found else pytest.skip(f"no {program} of version {oldest} or newer is installed")


@pytest.fixture
def repository(tmp_path, toolchain):
    """A folder with our sources and the .clangd that setup_clangd.sh writes there."""
    for name in ("build.toml", "kda_kernel", "torch-ext", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "setup_clangd.sh", tmp_path)
    done = subprocess.run(
        ["bash", "setup_clangd.sh"],
        cwd=tmp_path,
        env={**os.environ, "FLASH_KDA_PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return tmp_path


def flags_for(repository: Path, suffix: str) -> list[str]:
    """What the .clangd adds to the command of a file with this suffix."""
    for document in (repository / ".clangd").read_text().split("---\n"):
        pattern = re.search(r"PathMatch: (.*)", document)[1]
        if re.fullmatch(pattern, f"file.{suffix}"):
            return json.loads(re.search(r"Add: (.*)", document)[1])
    raise AssertionError(f".clangd says nothing of .{suffix} files")


@pytest.mark.parametrize("suffix", ["cpp", "h", "cu", "cuh"])
def test_every_include_folder_is_there(repository, suffix):
    flags = flags_for(repository, suffix)
    folders = [flag[2:] for flag in flags if flag.startswith("-I")]
    folders += [folder for option, folder in zip(flags, flags[1:]) if option == "-isystem"]
    headers = ("cuda_runtime_api.h", "cute/tensor.hpp", "torch/csrc/stable/tensor.h", "Python.h", "params.h")
    for header in headers:
        assert any((Path(folder) / header).is_file() for folder in folders), f"no folder has {header}"


@pytest.mark.parametrize("source", ["kda_kernel/api.cpp", "torch-ext/torch_binding.cpp"])
def test_clang_takes_our_cpp_files(repository, source):
    clang = newest("clang", OLDEST)
    command = [clang, "-fsyntax-only", *flags_for(repository, "cpp"), source]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_clang_finds_an_error(repository):
    """The test above can fail: a wrong name is found."""
    clang = newest("clang", OLDEST)
    wrong = repository / "wrong.cpp"
    wrong.write_text('#include "api.h"\nint n = kda::no_such_name;\n')
    command = [clang, "-fsyntax-only", *flags_for(repository, "cpp"), str(wrong)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode != 0 and "no_such_name" in done.stderr


@pytest.mark.parametrize("source", ["prefill/sm90.cu", "prefill/portable.cu"])
def test_clang_takes_our_cuda_files(repository, source):
    clang = newest("clang", OLDEST_FOR_CUDA)
    command = [clang, "-fsyntax-only", *flags_for(repository, "cu"), f"kda_kernel/{source}"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_clangd_reads_the_file(repository):
    """clangd itself, with the .clangd where it looks for it: no diagnostic of ours is an error."""
    clangd = newest("clangd", OLDEST)
    source = repository / "kda_kernel_copy.cpp"  # not a link, whose target lies beside another .clangd
    source.write_text((ROOT / "kda_kernel/api.cpp").read_text())
    done = subprocess.run([clangd, f"--check={source}"], cwd=repository, capture_output=True, text=True)
    # Diagnostics look like `E[time] [name] Line 7: ...`; a refactoring that clangd tries in vain does not.
    errors = [line for line in done.stderr.splitlines() if re.match(r"E\[[^]]*\] \[", line)]
    assert "Building AST" in done.stderr and not errors, "\n".join(errors)

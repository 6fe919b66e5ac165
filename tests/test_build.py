"""scripts/build_kernel.py: build.toml, bad input, incremental and interrupted builds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import build_kernel
import pytest
from kernel_build import BuildError
from kernel_build.config import open_project, select_archs
from kernel_build.steps import read_depfile
from kernels._rust import Backend, Build, Metadata

ROOT = Path(__file__).resolve().parent.parent
SOURCE_SUFFIXES = {".cu", ".cuh", ".cpp", ".h"}

STUB_TOML = """
[general]
name = "stub-kernel"
version = 3
edition = 5
license = "Apache-2.0"
backends = ["cuda"]

[torch]
include = ["src"]
src = ["torch-ext/torch_binding.cpp", "src/add.h"]

[torch.stable-abi]
cuda = "2.11"

[kernel.add]
backend = "cuda"
depends = ["torch"]
cuda-capabilities = ["8.0", "9.0"]
include = ["src"]
src = ["src/add.cu", "src/one.cuh"]
"""

STUB_BINDING = """
#include <torch/csrc/stable/library.h>

#include "registration.h"
#include "add.h"

void add(torch::stable::Tensor x) { launch_add(static_cast<float*>(x.mutable_data_ptr())); }

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) { ops.def("add(Tensor(a!) x) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) { ops.impl("add", TORCH_BOX(&add)); }
REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
"""

STUB_CUDA = """
#include "add.h"
#include "one.cuh"

__global__ void add_kernel(float* x) { x[threadIdx.x] += kOne; }

void launch_add(float* x) { add_kernel<<<1, 32>>>(x); }
"""

# The same with a kernel for CPUs beside the one for GPUs.
STUB_TOML_BOTH = """
[general]
name = "stub-kernel"
version = 3
edition = 5
license = "Apache-2.0"
backends = ["cuda", "cpu"]

[torch]
include = ["src"]
src = ["torch-ext/torch_binding.cpp", "src/add.h"]

[torch.stable-abi]
cuda = "2.11"
cpu = "2.11"

[kernel.add]
backend = "cuda"
depends = ["torch"]
cuda-capabilities = ["8.0", "9.0"]
include = ["src"]
src = ["src/add.cu", "src/one.cuh"]

[kernel.add_cpu]
backend = "cpu"
depends = ["torch"]
include = ["src"]
src = ["src/add.cpp"]
"""

STUB_FILES = {
    "build.toml": STUB_TOML,
    "torch-ext/torch_binding.cpp": STUB_BINDING,
    "torch-ext/stub_kernel/__init__.py": "from ._ops import ops\n\n__all__ = ['ops']\n",
    "src/add.h": "#pragma once\n#include <torch/csrc/stable/tensor.h>\nvoid launch_add(float* x);\n",
    "src/add.cu": STUB_CUDA.replace('#include "add.h"', "void launch_add(float* x);"),
    "src/one.cuh": "#pragma once\nconstexpr float kOne = 1.0f;\n",
}


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A kernel repository with one tiny kernel."""
    root = tmp_path / "stub kernel"  # with a blank: paths must survive it
    for name, text in STUB_FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def run(root: Path, *options: str, capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a build of `root`."""
    code = build_kernel.main(["--root", str(root), *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refusal(root: Path, *options: str, capsys: pytest.CaptureFixture) -> str:
    """The message of a build that must fail: one line on standard error."""
    code, _, errors = run(root, *options, capsys=capsys)
    assert code == 1
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors


def object_times(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in root.glob("build/.objects/*/*/*.o")}


@pytest.fixture
def stub_both(stub: Path) -> Path:
    """A kernel repository with a tiny kernel for GPUs and one for CPUs."""
    (stub / "build.toml").write_text(STUB_TOML_BOTH)
    (stub / "src/add.cpp").write_text('#include "add.h"\nvoid launch_add(float* x) { ++*x; }\n')
    binding = stub / "torch-ext/torch_binding.cpp"
    key = "#if defined(CPU_KERNEL)\n#define KEY CPU\n#else\n#define KEY CUDA\n#endif\n"
    binding.write_text(key + binding.read_text().replace("CUDA, ops", "KEY, ops"))
    return stub


# ----------------------------------------------------------------------------------------------------
# build.toml


def test_build_toml_is_valid():
    assert Build.open(ROOT).general.backends == [Backend.CUDA, Backend.CPU]
    project = open_project(ROOT)
    assert (project.name, project.version, project.license) == ("flash-kda", 1, "Apache-2.0")
    assert project.stable_abi == (2, 11)
    assert {"8.0", "9.0", "10.0", "12.0"} <= set(project.capabilities)


def test_build_toml_lists_every_source():
    """kernel-builder's sandbox holds what is listed and no more, headers included."""
    folders = (ROOT / "kda_kernel", ROOT / "torch-ext")
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for top in folders
        for path in top.rglob("*")
        if path.suffix in SOURCE_SUFFIXES
    }
    listed = [source for section in open_project(ROOT).sections for source in section.sources]
    assert sorted(listed) == sorted(set(listed)), "a source stands in build.toml twice"
    assert set(listed) == on_disk


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "stub-kernel"', 'name = "stub_kernel"', "name"),
        ("edition = 5", "edition = 5\ncolour = 1", "colour"),
        ('license = "Apache-2.0"', "", "license"),
        ('depends = ["torch"]', 'depends = ["cutlass_4_6"]', "cutlass_4_6"),
        (
            'cuda-capabilities = ["8.0", "9.0"]',
            'cuda-capabilities = ["sm_90"]',
            "'sm_90' is no CUDA capability",
        ),
        ('"src/one.cuh"]', '"src/two.cuh"]', "source src/two.cuh does not exist"),
        ('[torch.stable-abi]\ncuda = "2.11"', "", "expected the backend"),
        ('backends = ["cuda"]', 'backends = ["cuda", "cpu"]', "one version X.Y for both"),
        ('cuda-capabilities = ["8.0", "9.0"]', "", "add: expected cuda-capabilities, got none"),
        ("[general]", "[general", "build.toml"),
    ],
    ids=[
        "name",
        "unknown key",
        "no license",
        "dependency",
        "capability",
        "missing source",
        "no stable ABI",
        "no stable ABI for one backend",
        "no capabilities",
        "syntax",
    ],
)
def test_bad_build_toml(stub, capsys, old, new, message):
    assert old in STUB_TOML
    (stub / "build.toml").write_text(STUB_TOML.replace(old, new))
    assert message in refusal(stub, capsys=capsys)


def test_no_build_toml(tmp_path, capsys):
    assert "build.toml: no such file" in refusal(tmp_path, capsys=capsys)


# ------------------------------------------------------------------------------------------------------ bad
# input


@pytest.mark.parametrize("archs", ["9.1", "sm_90", "9.0,7.5", ",", "Native"])
def test_unknown_architecture(stub, capsys, archs):
    message = refusal(stub, "--archs", archs, capsys=capsys)
    assert "--archs" in message and "8.0, 9.0" in message


def test_native_without_a_gpu(stub, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BuildError, match="--archs native: this machine has no CUDA device"):
        select_archs(open_project(stub), "native")


@pytest.mark.parametrize(
    ("capability", "archs"),
    [((8, 0), ["8.0"]), ((8, 9), ["8.0"]), ((9, 0), ["9.0"]), ((12, 1), ["12.0"])],
    ids=str,
)
def test_native_picks_what_serves_the_device(monkeypatch, capability, archs):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    assert select_archs(open_project(ROOT), "native") == archs


def test_native_on_a_device_that_is_too_old(stub, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    with pytest.raises(BuildError, match="serves a device of 7.5"):
        select_archs(open_project(stub), "native")


def test_no_nvcc(stub, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert f"no nvcc: CUDA_HOME={tmp_path} has no bin/nvcc" in refusal(stub, capsys=capsys)


def test_broken_nvcc(stub, capsys, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho out of order >&2\nexit 7\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    message = refusal(stub, capsys=capsys)
    assert "nvcc --version failed with exit code 7" in message and "out of order" in message


def test_no_host_compiler(stub, capsys, monkeypatch, toolchain):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler is not in PATH" in refusal(stub, capsys=capsys)


def test_no_cutlass(stub, capsys, monkeypatch, toolchain, tmp_path):
    (stub / "build.toml").write_text(STUB_TOML.replace('["torch"]', '["torch", "cutlass_4_4"]'))
    monkeypatch.setenv("CUTLASS_SRC_DIR", str(tmp_path))
    assert "no CUTLASS headers" in refusal(stub, capsys=capsys)


@pytest.mark.parametrize("place", ["below a file", "read-only file system"])
def test_output_that_cannot_be_written(stub, capsys, toolchain, place):
    output = {
        "below a file": stub / "build.toml" / "build",
        "read-only file system": Path("/sys/flash-kda-build"),
    }[place]
    message = refusal(stub, "--output", str(output), capsys=capsys)
    assert f"{output} can't be written" in message


def test_compile_error_names_the_file_and_the_line(stub, capsys, toolchain):
    (stub / "src/one.cuh").write_text("constexpr float kOne = none;\n")
    message = refusal(stub, "--archs", "9.0", capsys=capsys)
    assert "src/add.cu" in message and "one.cuh(1)" in message and '"none" is undefined' in message
    assert not list(stub.glob("build/*/metadata.json"))


def test_usage_error(stub, capsys):
    with pytest.raises(SystemExit, match="2"):
        build_kernel.main(["--root", str(stub), "--jobs", "0"])
    assert "--jobs: expected a number from 1 on, got 0" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- builds of the
# stub


def metadata_of(root: Path) -> dict[str, Metadata]:
    """Metadata of every variant, by "cuda" or "cpu"."""
    paths = list(root.glob("build/*/metadata.json"))
    return {json.loads(path.read_text())["backend"]["type"]: Metadata.read_from_file(path) for path in paths}


def test_a_variant_for_each_backend(stub_both, capsys, toolchain):
    code, output, _ = run(stub_both, capsys=capsys)
    assert code == 0 and output.count("built, ") == 2
    names = {path.parent.name.split("-")[3] for path in stub_both.glob("build/*/metadata.json")}
    assert names == {"cpu", "cu" + "".join(map(str, toolchain.cuda_version))}
    found = metadata_of(stub_both)
    assert re.fullmatch(r"_stub_kernel_cpu_[0-9a-f]{12}", found["cpu"].id)
    assert found["cpu"].backend.archs is None
    assert re.fullmatch(r"_stub_kernel_cuda_[0-9a-f]{12}", found["cuda"].id)

    (stub_both / "src/add.cpp").write_text('#include "add.h"\nvoid launch_add(float* x) { *x += 2; }\n')
    for backend, code in (("cuda", 0), ("cpu", 1), ("all", 1)):
        assert build_kernel.main(["--root", str(stub_both), "--backend", backend, "--check"]) == code
    code, output, _ = run(stub_both, "--backend", "cpu", capsys=capsys)
    assert code == 0 and "2 of 3 objects compiled" in output
    after = metadata_of(stub_both)
    assert after["cpu"].id != found["cpu"].id and after["cuda"].id == found["cuda"].id


def test_without_nvcc_the_cpu_alone(stub_both, capsys, monkeypatch, cpu_toolchain):
    monkeypatch.delenv("CUDA_HOME", raising=False)

    def no_nvcc():
        raise BuildError("no nvcc: it rains")

    monkeypatch.setattr(build_kernel, "find_nvcc", no_nvcc)
    code, output, errors = run(stub_both, capsys=capsys)
    assert code == 0, errors
    assert "note: for CPUs alone: no nvcc: it rains" in output
    assert list(metadata_of(stub_both)) == ["cpu"]
    assert build_kernel.main(["--root", str(stub_both), "--check"]) == 0


def test_a_backend_that_build_toml_has_not(stub, capsys):
    assert "--backend: build.toml has cuda, got cpu" in refusal(stub, "--backend", "cpu", capsys=capsys)


def test_architectures_are_for_cuda(stub_both, capsys):
    with pytest.raises(SystemExit, match="2"):
        build_kernel.main(["--root", str(stub_both), "--backend", "cpu", "--archs", "9.0"])
    assert "--archs, --variant: expected --backend cuda with them, got cpu" in capsys.readouterr().err


def test_incremental_builds(stub, capsys, toolchain):
    """Only what a change reaches is made again; the variant always fits the sources."""
    code, output, _ = run(stub, "--archs", "9.0", capsys=capsys)
    assert code == 0 and "3 of 3 objects compiled" in output
    (variant,) = (path.parent for path in stub.glob("build/*/metadata.json"))
    first, first_id = object_times(stub), Metadata.read_from_file(variant / "metadata.json").id
    assert build_kernel.main(["--root", str(stub), "--check"]) == 0

    code, output, _ = run(stub, "--archs", "9.0", capsys=capsys)
    assert code == 0 and "0 of 3 objects compiled" in output and "is current" in output
    assert object_times(stub) == first

    os.utime(stub / "src/add.cu")  # a new time and the same content
    code, output, _ = run(stub, "--archs", "9.0", capsys=capsys)
    assert code == 0 and "0 of 3 objects compiled" in output

    (stub / "torch-ext/stub_kernel/__init__.py").write_text("__all__ = []\n")
    assert build_kernel.main(["--root", str(stub), "--check"]) == 1
    run(stub, "--archs", "9.0", capsys=capsys)
    changed = {name for name, mtime in object_times(stub).items() if mtime != first[name]}
    assert changed == {"torch-ext-torch_binding.cpp.o"}, "a Python file changes the namespace, no kernel"
    assert Metadata.read_from_file(variant / "metadata.json").id != first_id

    second = object_times(stub)
    (stub / "src/one.cuh").write_text("#pragma once\nconstexpr float kOne = 2.0f;\n")
    run(stub, "--archs", "9.0", capsys=capsys)
    changed = {name for name, mtime in object_times(stub).items() if mtime != second[name]}
    assert changed == {"torch-ext-torch_binding.cpp.o", "src-add.cu.o"}
    assert build_kernel.main(["--root", str(stub), "--check"]) == 0


def test_a_failed_build_leaves_the_variant_as_it_was(stub, capsys, toolchain):
    run(stub, "--archs", "9.0", capsys=capsys)
    before = {path: path.read_bytes() for path in stub.glob("build/torch*/**/*") if path.is_file()}
    (stub / "src/add.cu").write_text("not C++")
    refusal(stub, "--archs", "9.0", capsys=capsys)
    assert {path: path.read_bytes() for path in stub.glob("build/torch*/**/*") if path.is_file()} == before
    assert not list(stub.glob("build/.staging-*"))


def test_a_killed_build_leaves_nothing_to_load_and_the_next_one_recovers(stub, capsys, toolchain):
    command = [sys.executable, str(ROOT / "scripts/build_kernel.py"), "--root", str(stub), "--archs", "9.0"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(stub.glob("build/.objects/*/*/generated/exports.map")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(stub.glob("build/*/metadata.json"))

    leftover = stub / "build" / ".staging-of-the-killed-one"
    (leftover / "new").mkdir(parents=True)
    code, _, errors = run(stub, "--archs", "9.0", capsys=capsys)
    assert code == 0, errors
    assert len(list(stub.glob("build/*/metadata.json"))) == 1 and not leftover.exists()


def test_two_builds_are_byte_identical(stub, capsys, toolchain):
    contents = []
    for _ in range(2):
        assert run(stub, "--archs", "8.0", "--clean", capsys=capsys)[0] == 0
        contents.append(
            {path: path.read_bytes() for path in stub.glob("build/torch*/**/*") if path.is_file()}
        )
    assert contents[0] == contents[1]


def test_debug_build_has_line_information(stub, capsys, toolchain):
    assert run(stub, "--archs", "9.0", "--debug", capsys=capsys)[0] == 0
    (variant,) = (path.parent for path in stub.glob("build/*/metadata.json"))
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert metadata.id.endswith("_debug") and metadata.version == 3
    assert b"add.cu" in (variant / f"{metadata.id}.abi3.so").read_bytes()


def test_the_compilers_report_is_kept(stub, capsys, toolchain):
    assert run(stub, "--archs", "8.0,9.0", capsys=capsys)[0] == 0
    (log,) = stub.glob("build/logs/*/*/src-add.cu.log")
    text = log.read_text()
    assert "for 'sm_80'" in text and "for 'sm_90'" in text and re.search(r"Used \d+ registers", text)


def test_depfile_with_blanks(tmp_path):
    depfile = tmp_path / "x.d"
    depfile.write_text("out\\ put.o : /a\\ b/c.h \\\n  /d/e.h \\\n  /f.h\n")
    assert read_depfile(depfile) == [Path("/a b/c.h"), Path("/d/e.h"), Path("/f.h")]

"""The variants of scripts/build_kernel.py: real compiles for each CUDA release, the same bytes each time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import build_kernel
import fetch_toolkit
import pytest
from kernel_build import BuildError, toolkits
from kernel_build import variant as variants
from kernel_build.config import open_project
from kernel_build.toolchain import find_toolchain, variant_name
from kernels._rust import Digest, DigestAlgorithm, Metadata
from test_binary import ALLOWED_LIBRARIES, SIZE_BUDGET, embedded_code
from test_build import STUB_CUDA, STUB_FILES, refusal, run

ROOT = Path(__file__).resolve().parent.parent
RELEASES = sorted(toolkits.WHEELS)

# Names that nvcc makes of the source's path unless told otherwise: a function and a table local to the file.
LOCAL_CUDA = STUB_CUDA.replace('#include "add.h"', "void launch_add(float* x);").replace(
    "__global__ void add_kernel(float* x) { x[threadIdx.x] += kOne; }",
    "static __device__ float table[32];\n"
    "namespace { __global__ void add_kernel(float* x) { x[threadIdx.x] += table[threadIdx.x] + kOne; } }",
)


def make_stub(root: Path) -> Path:
    for name, text in {**STUB_FILES, "src/add.cu": LOCAL_CUDA}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def variant_files(root: Path) -> dict[str, bytes]:
    build = root / "build"
    return {
        path.relative_to(build).as_posix(): path.read_bytes()
        for path in build.glob("torch*/**/*")
        if path.is_file()
    }


# ------------------------------------------------------------------------------- names and toolkits


@pytest.mark.parametrize(
    ("name", "cuda"), [("cu126", "12.6"), ("cu130", "13.0"), ("cu132", "13.2")], ids=lambda value: value
)
def test_variant_names(name, cuda):
    assert toolkits.parse_variant(open_project(ROOT), name) == cuda
    assert toolkits.short_name(cuda) == name


def test_whole_variant_name(toolchain):
    project = open_project(ROOT)
    cuda = ".".join(map(str, toolchain.cuda_version))
    assert toolkits.parse_variant(project, variant_name(project, toolchain)) == cuda


@pytest.mark.parametrize(
    "name",
    ["", "cuda", "cu13", "13.0", "torch212-cxx11-cu130-x86_64-linux", "torch-stable-abi211-cu130-mips-linux"],
)
def test_unknown_variant(tmp_path, capsys, name):
    root = make_stub(tmp_path)
    if name == "":
        with pytest.raises(BuildError, match="--variant: expected a name like cu130"):
            toolkits.parse_variant(open_project(root), name)
    else:
        message = refusal(root, "--variant", name, capsys=capsys)
        assert "--variant: expected a name like cu130" in message and repr(name) in message


@pytest.fixture
def no_toolkit(monkeypatch, tmp_path):
    """No nvcc anywhere but, maybe, among the toolkits made of wheels."""
    monkeypatch.setenv(toolkits.ENV_HOME, str(tmp_path / "toolkits"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(toolkits, "_release", lambda nvcc: "0.0")


def test_missing_toolkit_says_how_to_get_one(tmp_path, capsys, no_toolkit):
    message = refusal(make_stub(tmp_path / "stub"), "--variant", "cu132", capsys=capsys)
    assert "no nvcc of CUDA 13.2" in message and "scripts/fetch_toolkit.py cu132" in message


def test_cuda_12_has_no_wheels(tmp_path, capsys, no_toolkit):
    message = refusal(make_stub(tmp_path / "stub"), "--variant", "cu126", capsys=capsys)
    assert "no nvcc of CUDA 12.6" in message and "wheels with a compiler exist for 13.0, 13.2" in message
    with pytest.raises(SystemExit, match="2"):
        fetch_toolkit.main(["cu126"])


def test_failed_download_leaves_nothing(monkeypatch, capsys, no_toolkit, tmp_path):
    def no_index(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found\n")

    monkeypatch.setattr(toolkits.subprocess, "run", no_index)
    assert fetch_toolkit.main(["cu132"]) == 1
    assert capsys.readouterr().err == (
        "error: pip can't install CUDA 13.2: ERROR: No matching distribution found\n"
    )
    assert list((tmp_path / "toolkits").iterdir()) == []


# -------------------------------------------------------------------------------- the same bytes


def test_builds_in_two_folders_are_byte_identical(tmp_path, capsys, toolchain):
    """The same state gives the same variant, wherever it lies: nothing of the path is in it, and no time."""
    contents = []
    for folder in ("here", "some where/else"):
        root = make_stub(tmp_path / folder)
        code, _, errors = run(root, "--archs", "8.0,9.0", capsys=capsys)
        assert code == 0, errors
        contents.append(variant_files(root))
    assert len(contents[0]) >= 5
    assert contents[0] == contents[1]


def test_id_follows_the_state_of_the_sources(tmp_path):
    """Another state, another operator namespace; the same state in another folder, the same."""
    one, two = (open_project(make_stub(tmp_path / name)) for name in ("one", "two"))
    archs = one.capabilities
    assert one.kernel_id(archs, False) == two.kernel_id(archs, False)
    ids = {one.kernel_id(archs, False), one.kernel_id(archs, True), one.kernel_id(archs[:1], False)}
    for name in ("src/one.cuh", "torch-ext/stub_kernel/__init__.py", "build.toml"):
        path = two.root / name
        path.write_text(path.read_text() + "\n")
        ids.add(two.kernel_id(archs, False))
    assert len(ids) == 6
    assert all(name.isidentifier() for name in ids)


# ------------------------------------------------------------- a dirty tree, an interrupted build


@pytest.fixture
def committed_stub(tmp_path) -> Path:
    """The stub in a git checkout of its own, committed."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root = make_stub(tmp_path / "stub")
    (root / ".gitignore").write_text("build/\n")
    identity = ("-c", "user.name=Tests", "-c", "user.email=tests@example.org")
    for words in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "A state")):
        subprocess.run(["git", "-C", str(root), *words], check=True)
    return root


def test_dirty_tree(committed_stub, capsys, toolchain):
    """A build of uncommitted changes is a build, and says what it is: to the builder and to who loads it."""
    for text, dirty in ((None, False), ("#pragma once\nconstexpr float kOne = 2.0f;\n", True)):
        if text is not None:
            (committed_stub / "src/one.cuh").write_text(text)
        code, output, _ = run(committed_stub, "--archs", "9.0", capsys=capsys)
        assert code == 0 and ("uncommitted changes" in output) == dirty
        (path,) = committed_stub.glob("build/*/metadata.json")
        metadata = Metadata.read_from_file(path)
        assert metadata.provenance.dirty == dirty
    assert re.fullmatch(r"[0-9a-f]{40}", metadata.provenance.kernel.commit)


def test_interrupted_by_the_keyboard(tmp_path, capsys, toolchain, monkeypatch):
    """Ctrl-C while the variant is put together: one line, exit code 130, nothing to load, nothing left."""

    def interrupt(*arguments):
        raise KeyboardInterrupt

    root = make_stub(tmp_path)
    monkeypatch.setattr(variants, "_metadata", interrupt)
    code, _, errors = run(root, "--archs", "9.0", capsys=capsys)
    assert code == 130 and errors == "error: interrupted; the variant is as it was before\n"
    assert not list(root.glob("build/*/metadata.json")) and not list(root.glob("build/.staging-*"))


# ------------------------------------------------------------------- the real sources, each release


@pytest.fixture(scope="module", params=RELEASES)
def built(request) -> Path:
    """build/<variant>/ of the present sources for one CUDA release: there already, or built now."""
    project = open_project(ROOT)
    try:
        toolchain = find_toolchain(project, toolkits.nvcc_of(request.param, ROOT))
    except BuildError as error:
        pytest.skip(str(error))
    path = ROOT / "build" / variant_name(project, toolchain)
    if not variants.check(project, path).current:
        if os.environ.get("FLASH_KDA_NO_BUILD") == "1":
            pytest.skip(f"FLASH_KDA_NO_BUILD=1, and {path.name} is missing or stale")
        assert build_kernel.main(["--variant", toolkits.short_name(request.param)]) == 0
    return path


@pytest.fixture
def extension(built) -> Path:
    (path,) = built.glob("*.abi3.so")
    return path


def readelf(*options: object) -> str:
    path = shutil.which("readelf")
    if path is None:
        pytest.skip("no readelf in PATH")
    return subprocess.run([path, *map(str, options)], capture_output=True, text=True, check=True).stdout


def test_whole(built):
    """`--check` calls it current: metadata, digest and id belong to the present sources."""
    assert variants.check(open_project(ROOT), built).current
    metadata = Metadata.read_from_file(built / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, built))
    assert [path.name for path in built.glob("*.so")] == [f"{metadata.id}.abi3.so"]


def test_code_for_every_capability_of_build_toml(built, extension):
    capabilities = open_project(ROOT).capabilities
    assert Metadata.read_from_file(built / "metadata.json").backend.archs == capabilities
    numbers = {int(capability.rstrip("af").replace(".", "")) for capability in capabilities}
    assert embedded_code(extension.read_bytes()) == {("sass", number) for number in numbers}


def test_abi(extension):
    binary = pytest.importorskip("kernel_abi_check").ObjectFile(str(extension))
    assert binary.check_manylinux("manylinux_2_28") == []
    assert binary.check_python_abi("3.9") == []


def test_needs_only_torch_cuda_and_the_c_libraries(built, extension):
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("-dW", extension))
    assert [library for library in needed if not re.fullmatch(ALLOWED_LIBRARIES, library)] == []
    major = re.search(r"-cu(\d\d)\d-", built.name).group(1)
    assert {"libtorch.so", f"libcudart.so.{major}"} <= set(needed)


def test_stripped_and_small(built, extension):
    sections = set(re.findall(r"\]\s+(\.[\w.-]+)", readelf("-SW", extension)))
    assert ".text" in sections and not sections & {".symtab", ".strtab", ".debug_info", ".debug_line"}
    assert sum(path.stat().st_size for path in built.rglob("*") if path.is_file()) < SIZE_BUDGET


def test_no_path_of_this_machine(extension):
    content = extension.read_bytes()
    for folder in (ROOT, sys.prefix, toolkits.toolkits_home(ROOT)):
        assert str(folder).encode() not in content


def test_table_of_variants():
    """docs/building.md has a row for each CUDA release, with the architectures of build.toml."""
    page = (ROOT / "docs/building.md").read_text()
    found = {}
    for variant, rest in re.findall(r"^\| `(torch-\S+)` \| (.+) \|$", page, re.MULTILINE):
        _, archs, size, _, abi = rest.split(" | ")
        assert abi == "kept" and float(size.removesuffix(" MiB")) * 2**20 < SIZE_BUDGET
        if cuda := re.search(r"-cu(\d\d)(\d)-", variant):
            found[".".join(cuda.groups())] = archs.split(", ")
    assert found == {release: open_project(ROOT).capabilities for release in RELEASES}

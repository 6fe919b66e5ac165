"""The built variants' binaries: machine code, ABI, libraries, symbols, size."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from kernels._rust import Metadata

ROOT = Path(__file__).resolve().parent.parent
SIZE_BUDGET = 40 * 2**20  # bytes, one variant
ALLOWED_LIBRARIES = (
    r"(libtorch|libc10|libcudart|libc|libm|libstdc\+\+|libgcc_s)\.so(\.\d+)*|ld-linux-[\w-]+\.so\.\d"
)


@pytest.fixture(scope="module", params=["cuda", "cpu"])
def variant_dir(request) -> Path:
    """Here both variants."""
    return request.getfixturevalue(f"{request.param}_variant_dir")


@pytest.fixture(scope="module")
def extension(variant_dir) -> Path:
    (path,) = variant_dir.glob("*.abi3.so")
    return path


def embedded_code(binary: bytes) -> set[tuple[str, int]]:
    """("sass" or "ptx", architecture number) of everything in a binary's fat binaries.

    A fat binary starts with its magic number, version, header size and size; each entry with its kind,
    attributes, header size and size, and the architecture 28 bytes in.
    """
    magic, found = struct.pack("<I", 0xBA55ED50), set()
    start = binary.find(magic)
    while start >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", binary, start)
        entry, end = start + header, start + header + size
        while entry < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", binary, entry)
            found.add(({1: "ptx", 2: "sass"}[kind], struct.unpack_from("<I", binary, entry + 28)[0]))
            entry += entry_header + entry_size
        start = binary.find(magic, end)
    return found


def test_machine_code_for_every_architecture(extension, variant_dir):
    archs = Metadata.read_from_file(variant_dir / "metadata.json").backend.archs or []
    assert embedded_code(extension.read_bytes()) == {
        ("sass", int(arch.rstrip("af").replace(".", ""))) for arch in archs
    }


@pytest.mark.skipif(shutil.which("cuobjdump") is None, reason="no cuobjdump in PATH")
def test_cuobjdump_finds_the_same_machine_code(extension):
    listing = subprocess.run(
        ["cuobjdump", "--list-elf", extension], capture_output=True, text=True, check=True
    ).stdout
    assert {("sass", int(number)) for number in re.findall(r"sm_(\d+)", listing)} == embedded_code(
        extension.read_bytes()
    )


def test_abi(extension):
    """The Hub's promise: glibc 2.28, libstdc++ of GCC 8, Python 3.9."""
    kernel_abi_check = pytest.importorskip("kernel_abi_check")
    binary = kernel_abi_check.ObjectFile(str(extension))
    assert binary.check_manylinux("manylinux_2_28") == []
    assert binary.check_python_abi("3.9") == []


@pytest.fixture(scope="module")
def readelf():
    path = shutil.which("readelf")
    if path is None:
        pytest.skip("no readelf in PATH")
    return lambda *options: (
        subprocess.run([path, *options], capture_output=True, text=True, check=True).stdout
    )


def test_needed_libraries(extension, readelf):
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("-dW", str(extension)))
    assert "libtorch.so" in needed
    assert [library for library in needed if not re.fullmatch(ALLOWED_LIBRARIES, library)] == []


def test_only_the_module_is_exported(extension, readelf):
    """Two versions in one process must not see each other's symbols."""
    symbols = (line.split() for line in readelf("--dyn-syms", "-W", str(extension)).splitlines())
    exported = [
        words[7]
        for words in symbols
        if len(words) == 8 and words[4] in ("GLOBAL", "WEAK") and words[6] != "UND"
    ]
    assert exported == [f"PyInit_{extension.name.removesuffix('.abi3.so')}"]


def test_size_and_paths(extension, variant_dir):
    total = sum(path.stat().st_size for path in variant_dir.rglob("*") if path.is_file())
    assert total < SIZE_BUDGET
    content = extension.read_bytes()
    assert str(ROOT).encode() not in content and sys.prefix.encode() not in content


def test_stamps_hold_hashes_of_system_headers(cuda_variant_dir, toolchain):
    """A new torch or CUTLASS recompiles: their headers are inputs of the objects."""
    stamps = list((ROOT / "build/.objects" / cuda_variant_dir.name).glob("*/*.o.json"))
    if not stamps:
        pytest.skip("the variant was not built in this checkout")
    inputs = {path for stamp in stamps for path in json.loads(stamp.read_text())["inputs"]}
    assert any(path.endswith("torch/csrc/stable/library.h") for path in inputs)
    assert any("/cute/" in path for path in inputs)

"""The built package: layout and metadata as kernel-builder has them, loaded by the real `kernels`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import kernels
import pytest
import torch
from kernel_build.config import open_project
from kernel_build.variant import git_status
from kernels._rust import Backend, Digest, DigestAlgorithm, DigestValidationError, Metadata

ROOT = Path(__file__).resolve().parent.parent
TORCH_BACKEND = "cpu" if torch.version.cuda is None else "cuda"  # what torch is made for
EXPORTS = ["chunk_kda", "fused_kda_decode", "fused_recurrent_kda", "fwd", "layers", "reference"]
SCHEMA = (
    "kda_prefill(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
    "Tensor? initial_state, Tensor? cu_seqlens, Tensor(a!) out, Tensor(b!)? final_state, float scale, "
    "float? lower_bound, int flags=23, Tensor(c!)? intermediate_states=None) -> ()"
)


@pytest.fixture(scope="module", params=["cuda", "cpu"])
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def variant_dir(request, backend) -> Path:
    """Here both variants."""
    return request.getfixturevalue(f"{backend}_variant_dir")


@pytest.fixture(scope="module")
def kernel_package(variant_dir, load_variant):
    """The variant's package; a CUDA variant under a torch without CUDA for everything but a launch."""
    return load_variant(variant_dir)


@pytest.fixture(scope="module")
def metadata(variant_dir: Path) -> Metadata:
    return Metadata.read_from_file(variant_dir / "metadata.json")


def load_in_new_process(code: str, **environment: str) -> str:
    """Run `code` after loading flags that a torch without CUDA needs; its standard output."""
    lines = ["import os, sys", "sys.setdlopenflags(os.RTLD_LAZY)", code]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_variant_name(variant_dir, backend):
    computer = {"cuda": r"cu\d\d\d", "cpu": "cpu"}[backend]
    assert re.fullmatch(rf"torch-stable-abi211-{computer}-(x86_64|aarch64)-linux", variant_dir.name)


def test_layout(variant_dir, metadata):
    """Every Python file of torch-ext, the generated ones, the extension, and nothing else."""
    package = ROOT / "torch-ext/flash_kda"
    python = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    generated = {"_ops.py", "flash_kda/__init__.py", f"{metadata.id}.abi3.so", "metadata.json"}
    found = (path for path in variant_dir.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert {str(path.relative_to(variant_dir)) for path in found} == python | generated


def test_python_files_are_the_sources(variant_dir):
    for source in (ROOT / "torch-ext/flash_kda").rglob("*.py"):
        built = variant_dir / source.relative_to(ROOT / "torch-ext/flash_kda")
        assert built.read_bytes() == source.read_bytes()


def test_metadata(metadata, backend):
    assert str(metadata.name) == "flash-kda"
    assert metadata.version == 1
    assert metadata.license == "Apache-2.0"
    assert metadata.python_depends == []
    assert metadata.backend.backend_type == Backend.from_str(backend)
    if backend == "cuda":
        assert metadata.backend.archs and set(metadata.backend.archs) <= set(open_project(ROOT).capabilities)
    else:
        assert metadata.backend.archs is None
    assert re.fullmatch(rf"_flash_kda_{backend}_[0-9a-f]{{12}}(_debug)?", metadata.id)
    assert metadata.id.isidentifier()


def test_digest_covers_every_file(variant_dir, metadata):
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant_dir))
    assert f"{metadata.id}.abi3.so" in metadata.digest.files


def test_digest_tells_a_changed_file(variant_dir, metadata, tmp_path):
    for path in variant_dir.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "__init__.py").write_text("print('changed')\n")
    with pytest.raises(DigestValidationError, match="__init__.py"):
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, tmp_path))


def test_provenance(variant_dir):
    """The builder is named; in a git checkout so is a commit of it, and whether files differed from that."""
    provenance = json.loads((variant_dir / "metadata.json").read_text())["provenance"]
    assert provenance["kernel-builder"]["version"].startswith("flash-kda/scripts/build_kernel.py")
    if "kernel" in provenance:
        assert re.fullmatch(r"[0-9a-f]{40}", provenance["kernel"]["commit"])
        assert isinstance(provenance["kernel"]["dirty"], bool)
    else:
        assert git_status(ROOT) is None, "built in a git checkout, but without its commit"


def test_loaded_by_get_local_kernel(kernel_package, variant_dir, metadata):
    assert Path(kernel_package.__file__) == variant_dir / "__init__.py"
    assert kernel_package.__name__ == metadata.id


def test_exports(kernel_package):
    assert sorted(kernel_package.__all__) == EXPORTS
    assert all(hasattr(kernel_package, name) for name in EXPORTS)


def test_operator_schema(kernel_package, metadata):
    """Mutated arguments are marked: torch.compile and functionalization rely on it."""
    operator = getattr(torch.ops, metadata.id).kda_prefill.default
    assert str(operator._schema) == f"{metadata.id}::{SCHEMA}"


def test_operator_fake(kernel_package, metadata):
    """Under FakeTensorMode the operator returns None and touches nothing; without a fake it would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v, g, out = (torch.empty(1, 64, 2, 128, dtype=torch.bfloat16, device="cuda") for _ in range(5))
        beta = torch.empty(1, 64, 2, dtype=torch.bfloat16, device="cuda")
        state = torch.empty(1, 2, 128, 128, device="cuda")
        inputs = (
            q,
            k,
            v,
            g,
            beta,
            None,
            None,
            None,
            None,
            out,
            state,
            0.1,
            -5.0,
            23,
        )
        assert getattr(torch.ops, metadata.id).kda_prefill(*inputs) is None


def test_operator_serves_the_devices_of_its_variant(kernel_package, metadata, backend):
    """CPU tensors are refused by the dispatcher, or reach our own checks."""
    tensor = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16)
    inputs = (*[tensor] * 5, None, None, None, None, tensor, None, 0.1, None)
    error, message = {
        "cuda": (NotImplementedError, "CPU"),
        "cpu": (RuntimeError, r"beta: expected shape \[B, T, HV\]"),
    }[backend]
    with pytest.raises(error, match=message):
        getattr(torch.ops, metadata.id).kda_prefill(*inputs)
    assert sys.modules[f"{metadata.id}.ops"].device_type == backend


@pytest.mark.parametrize("folder", ["repository", "build", "variant"])
def test_local_kernels_override(variant_dir, backend, folder):
    """LOCAL_KERNELS stands in for the Hub repository, without a network."""
    path = {"repository": ROOT, "build": ROOT / "build", "variant": variant_dir}[folder]
    if backend != TORCH_BACKEND and folder != "variant":
        pytest.skip(f"kernels picks the variant for {TORCH_BACKEND}")
    code = (
        "from kernels import get_kernel\n"
        "package = get_kernel('org/flash-kda', revision='v1', trust_remote_code=True)\n"
        "print(package.__file__, *sorted(package.__all__))"
    )
    output = load_in_new_process(code, LOCAL_KERNELS=f"org/flash-kda={path}")
    assert output == " ".join([str(variant_dir / "__init__.py"), *EXPORTS])


def test_every_torch_gets_its_variant(variant_dir, backend):
    """From the repository's root: for GPUs with a torch that is made for them, for CPUs with every torch."""
    if backend == "cpu" or TORCH_BACKEND == "cuda":
        assert Path(kernels.get_local_kernel(ROOT, backend=backend).__file__).parent == variant_dir
    else:
        with pytest.raises(ValueError, match="Invalid backend 'cuda'"):
            kernels.get_local_kernel(ROOT, backend=backend)


def test_compatibility_shim(variant_dir, metadata):
    """`import flash_kda` with the variant on the path: older `kernels` do that. It is the same module, loaded
    once."""
    code = (
        f"sys.path.insert(0, {str(variant_dir)!r})\n"
        "import flash_kda\n"
        f"package = sys.modules[{metadata.id!r}]\n"
        "assert all(getattr(flash_kda, name) is getattr(package, name) for name in package.__all__)\n"
        "print(*sorted(flash_kda.__all__))"
    )
    assert load_in_new_process(code).split() == EXPORTS


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of hf_layer and flash_kda, made in a copy: setuptools writes beside the sources."""
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml needs setuptools 77 or newer")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "flash_kda.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("hf_layer", "torch-ext"):
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return next((folder / "dist").glob("*.whl"))


def test_wheel_holds_real_files(wheel):
    """The symbolic links of hf_layer become files: an installed hf_layer has its reference without this
    checkout."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        expected = {"flash_kda.py", *(f"hf_layer/{path.name}" for path in (ROOT / "hf_layer").glob("*.py"))}
        assert names == expected
        source = ROOT / "torch-ext/flash_kda/reference.py"
        assert archive.read("hf_layer/reference.py") == source.read_bytes()


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    fields = text.partition("\n\n")[0].splitlines()
    assert "Name: flash-kda" in fields and "License-Expression: Apache-2.0" in fields
    assert "Requires-Python: >=3.10" in fields
    assert "Requires-Dist: kernels<0.18,>=0.17.2" in fields

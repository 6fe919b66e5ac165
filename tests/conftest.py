"""What all tests share: no network, the compilers, and the built kernel package."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import emulator_build  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from kernel_build import BuildError  # noqa: E402
from kernel_build import variant as variants  # noqa: E402
from kernel_build.config import open_project  # noqa: E402
from kernel_build.toolchain import find_toolchain, variant_name  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NO_BUILD = os.environ.get("FLASH_KDA_NO_BUILD") == "1"
TORCH_BACKEND = "cpu" if torch.version.cuda is None else "cuda"  # what torch is made for


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/gpu is marked `gpu`. (Its own conftest.py skips it where no GPU is.)"""
    for item in items:
        if (ROOT / "tests" / "gpu") in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def compilers(backend: str):
    if NO_BUILD:
        pytest.skip("FLASH_KDA_NO_BUILD=1")
    try:
        return find_toolchain(open_project(ROOT), backend=backend)
    except BuildError as error:
        pytest.skip(f"can't compile for {backend} here: {error}")


@pytest.fixture(scope="session")
def toolchain():
    """The compilers of this machine; skips where there are none, or FLASH_KDA_NO_BUILD=1 forbids them."""
    return compilers("cuda")


@pytest.fixture(scope="session")
def cpu_toolchain():
    """The same without CUDA's."""
    return compilers("cpu")


def built_variant(backend: str) -> Path:
    """build/<variant>/ for "cuda" or "cpu", made from the present sources.

    One that is there and current is used as it is. Otherwise it is built, for all architectures; the test is
    skipped if this machine has not the compilers. FLASH_KDA_NO_BUILD=1 forbids to build, and then a variant
    that is stale is a failure, and one that is missing too if torch is made for that backend.
    """
    project = open_project(ROOT)
    found = [path.parent for path in sorted((ROOT / "build").glob("*/metadata.json"))]
    statuses = {path: variants.check(project, path) for path in found if variants.backend_of(path) == backend}
    for path, status in statuses.items():
        if status.current:
            return path
    if NO_BUILD:
        if not statuses and backend != TORCH_BACKEND:
            pytest.skip(f"FLASH_KDA_NO_BUILD=1, and there is no variant for {backend}")
        reasons = [status.reason for status in statuses.values()] or [f"build/ holds none for {backend}"]
        pytest.fail(f"FLASH_KDA_NO_BUILD=1, but {'; '.join(reasons)}", pytrace=False)
    name = variant_name(project, compilers(backend))
    command = [sys.executable, ROOT / "scripts/build_kernel.py", "--backend", backend]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ROOT / "build" / name


@pytest.fixture(scope="session")
def cuda_variant_dir() -> Path:
    """build/<variant>/ for GPUs; see built_variant."""
    return built_variant("cuda")


@pytest.fixture(scope="session")
def cpu_variant_dir() -> Path:
    """build/<variant>/ for CPUs; see built_variant."""
    return built_variant("cpu")


@pytest.fixture(scope="session")
def variant_dir(request: pytest.FixtureRequest) -> Path:
    """The variant for GPUs; for CPUs where that can't be made."""
    try:
        return request.getfixturevalue("cuda_variant_dir")
    except pytest.skip.Exception:
        return request.getfixturevalue("cpu_variant_dir")


def load_lazily(variant: Path):
    """A variant's package, whatever torch there is: with RTLD_LAZY, for a torch without CUDA lacks functions
    that only a launch needs."""
    from kernels import get_local_kernel

    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        return get_local_kernel(variant)
    finally:
        sys.setdlopenflags(flags)


@pytest.fixture(scope="session")
def load_variant():
    """`load_lazily`, for tests."""
    return load_lazily


@pytest.fixture(scope="session")
def kernel_package(variant_dir: Path):
    """The kernel package as users get it, through `kernels.get_local_kernel`.

    With a CUDA torch the repository root is given, and `kernels` picks the variant. Without, no CUDA variant
    would be picked: its folder is named, which is enough for everything but a launch.
    """
    from kernels import get_local_kernel

    if variants.backend_of(variant_dir) == TORCH_BACKEND:
        return get_local_kernel(ROOT)
    return load_lazily(variant_dir)


@pytest.fixture(scope="session")
def cpu_package(cpu_variant_dir: Path):
    """The kernel package's CPU variant, which every torch can load."""
    from kernels import get_local_kernel

    return get_local_kernel(ROOT, backend="cpu")


@pytest.fixture(scope="session")
def emulated(toolchain, cpu_package, tmp_path_factory) -> emulator_build.Emulated:
    """The GPU's operators on CPU tensors, by tests/emulator."""
    if platform.machine() != "x86_64":
        pytest.skip("the emulator switches threads on x86-64 alone")
    library = emulator_build.build(toolchain, tmp_path_factory.mktemp("emulator"))
    return emulator_build.load(library, cpu_package)


@pytest.fixture
def one_thread():
    """For tests of small tensors: torch's threads wait for each other actively, and where others want the
    processors, for longer than the work takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def fla_untuned():
    """FLA's Triton kernels run with the first of their configurations that runs: to find the fastest takes
    minutes, and no test asks for it."""
    if importlib.util.find_spec("fla") is None or importlib.util.find_spec("triton") is None:
        yield
        return
    sys.path.append(str(ROOT / "benchmarks"))
    from fla_tuning import untuned

    with untuned():
        yield


@pytest.fixture
def cpu_kernel(cpu_package, cpu_variant_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """The same, and `hf_layer.load_kernel()` finds it on every machine, with a GPU or without."""
    monkeypatch.setenv("LOCAL_KERNELS", f"org/flash-kda={cpu_variant_dir}")
    return cpu_package


@pytest.fixture
def hooks():
    """A test may register, and kernelize transformers' models. Mappings, class names and function layers
    belong to the process, and are as before when it ends."""
    from tiny_models import clean_hooks

    with clean_hooks():
        yield

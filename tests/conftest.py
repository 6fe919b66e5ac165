"""What all tests share: no network, the compilers, and the built kernel package."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from kernel_build import BuildError  # noqa: E402
from kernel_build import variant as variants  # noqa: E402
from kernel_build.config import open_project  # noqa: E402
from kernel_build.toolchain import find_toolchain, variant_name  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NO_BUILD = os.environ.get("FLASH_KDA_NO_BUILD") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/gpu is marked `gpu`. (Its own conftest.py skips it where no GPU is.)"""
    for item in items:
        if (ROOT / "tests" / "gpu") in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def toolchain():
    """The compilers of this machine; skips where there are none, or FLASH_KDA_NO_BUILD=1 forbids them."""
    if NO_BUILD:
        pytest.skip("FLASH_KDA_NO_BUILD=1")
    try:
        return find_toolchain(open_project(ROOT))
    except BuildError as error:
        pytest.skip(f"can't compile here: {error}")


@pytest.fixture(scope="session")
def variant_dir(request: pytest.FixtureRequest) -> Path:
    """build/<variant>/ made from the present sources.

    One that is there and current is used as it is. Otherwise it is built, for all architectures, if this
    machine has the compilers; FLASH_KDA_NO_BUILD=1 forbids that, and then a variant that is missing or stale
    is a failure.
    """
    project = open_project(ROOT)
    found = [path.parent for path in sorted((ROOT / "build").glob("*/metadata.json"))]
    statuses = [variants.check(project, path) for path in found]
    for path, status in zip(found, statuses, strict=True):
        if status.current:
            return path
    if NO_BUILD:
        reasons = [status.reason for status in statuses] or [f"{ROOT / 'build'} holds no variant"]
        pytest.fail(f"FLASH_KDA_NO_BUILD=1, but {'; '.join(reasons)}", pytrace=False)
    name = variant_name(project, request.getfixturevalue("toolchain"))
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/build_kernel.py"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return ROOT / "build" / name


@contextlib.contextmanager
def lazy_symbols():
    """Load extensions with RTLD_LAZY: a torch without CUDA lacks functions that only a launch needs."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        yield
    finally:
        sys.setdlopenflags(flags)


@pytest.fixture(scope="session")
def kernel_package(variant_dir: Path):
    """The kernel package as users get it, through `kernels.get_local_kernel`.

    With a CUDA torch the repository root is given, and `kernels` picks the variant. Without, no CUDA variant
    would be picked: its folder is named, which is enough for everything but a launch.
    """
    from kernels import get_local_kernel

    if torch.version.cuda is not None:
        return get_local_kernel(ROOT)
    with lazy_symbols():
        return get_local_kernel(variant_dir)

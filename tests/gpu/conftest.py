"""Every test of this folder needs a CUDA device of compute capability 8.0 or newer and the built kernel."""

from __future__ import annotations

from pathlib import Path

import harness
import pytest
import torch

HERE = Path(__file__).resolve().parent


def reason_to_skip() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is False"
    major, minor = torch.cuda.get_device_capability()
    return f"compute capability {major}.{minor} is under 8.0" if (major, minor) < (8, 0) else None


def pytest_collection_modifyitems(items):
    reason = reason_to_skip()
    for item in items:
        if reason is not None and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["default", "portable"])
def each_kernel(request, monkeypatch):
    """Runs a test with the kernel that the device gets and with the portable one; they differ on Hopper alone."""
    portable = request.param == "portable"
    if portable and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the portable kernel is this device's default")
    monkeypatch.setattr(harness, "force_portable", portable)


@pytest.fixture(autouse=True)
def lost_device_ends_the_run(request):
    """An error that only a synchronisation shows belongs to this test; after it the rest means nothing."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the CUDA context was lost in {request.node.nodeid}: {error}", returncode=3)

"""compute-sanitizer finds nothing in the kernel's small calls (sanitizer_case.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import inputs_for
from sanitizer_case import PARTS

CASE = Path(__file__).with_name("sanitizer_case.py")
KERNEL_NAME = "kda"  # a part of every one of our kernels' names: only these are instrumented
TIMEOUT_S = 400


def sanitizer() -> str | None:
    candidates = (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer")
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def test_the_name_filter_catches_our_kernels(kernel_package):
    inputs = inputs_for("lower-weak", T=20)
    kernel_package.chunk_kda(**inputs)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        kernel_package.chunk_kda(**inputs)
        torch.cuda.synchronize()
    names = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Mem", "Activity"))  # copies, and the profiler's own
    ]
    assert names and all(KERNEL_NAME in name for name in names), names


@pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer_finds_nothing(kernel_package, tool):
    command = [
        sanitizer(), "--tool", tool, "--kernel-name", f"kns={KERNEL_NAME}", "--report-api-errors", "no",
        "--error-exitcode", "86", sys.executable, str(CASE), *PARTS,
    ]  # fmt: skip
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    report = run.stdout[-6000:] + run.stderr[-2000:]
    assert run.returncode == 0, report
    assert "cases done" in run.stdout and ("0 errors" in run.stdout or "0 hazards" in run.stdout), report

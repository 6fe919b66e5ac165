"""`kernels benchmark`: the runner finds benchmarks/benchmark_kda.py, and its verification passes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_client import ROOT

WORKLOADS = {"one_2048", "packed_8x512", "one_8192"}


@pytest.fixture
def repository(loadable_files, tmp_path) -> Path:
    """A repository folder as the Hub has it."""
    for name, content in loadable_files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks/benchmark_kda.py", tmp_path / "benchmarks")
    return tmp_path


@pytest.mark.skipif(importlib.util.find_spec("tabulate") is None, reason="`kernels benchmark` needs tabulate")
def test_kernels_benchmark(repository):
    code = "import os, sys; sys.setdlopenflags(os.RTLD_LAZY); from kernels.cli import main; main()"
    result_file = repository / "result.json"
    options = ["benchmark", "./", "--iterations", "2", "--warmup", "1", "--output", str(result_file)]
    result = subprocess.run(
        [sys.executable, "-c", code, *options], cwd=repository, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-2000:]
    text = json.dumps(json.loads(result_file.read_text()))
    for gate in ("LowerBoundGate", "SoftplusGate"):
        for name in WORKLOADS:
            assert f"{gate}.{name}" in text
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert f"LowerBoundGate on {device}" in result.stderr


def test_only_the_gates_are_benchmarks():
    """The runner would time every subclass of Benchmark in the file, and each benchmark_* of it."""
    from kernels.cli.benchmark import discover_benchmark_classes

    classes = discover_benchmark_classes(ROOT / "benchmarks/benchmark_kda.py", ROOT)
    assert {cls.__name__ for cls in classes} == {"LowerBoundGate", "SoftplusGate"}
    for cls in classes:
        names = {name.removeprefix("benchmark_") for name in dir(cls) if name.startswith("benchmark_")}
        assert names == WORKLOADS and all(hasattr(cls, f"setup_{name}") for name in names)

"""Each script of examples/ runs as people start it, with its tiny random model, on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.20.2")
pytest.importorskip("rich")

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("load_kimi_linear.py", "packed_prompts.py", "stream_tokens.py")


def run(script: str, *words: str) -> str:
    """What a script prints, on a machine without a GPU and without a network."""
    keep = {name: value for name, value in os.environ.items() if name != "LOCAL_KERNELS"}
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / script, *words],
        env={**keep, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_script_is_run_by_a_test():
    assert sorted(path.name for path in (ROOT / "examples").glob("*.py")) == sorted((*SCRIPTS, "tiny.py"))


def test_load_kimi_linear(cpu_variant_dir):
    output = run("load_kimi_linear.py", "--new-tokens", "3")
    assert output.count("whole layer, flash-kda kernel") == 2 * 3  # prefill and decode of three KDA layers
    assert output.count(cpu_variant_dir.name) == 3
    tokens = re.findall(r"\d+", output.splitlines()[-1])
    assert output.splitlines()[-1].startswith("[") and len(tokens) == 12 + 3


def test_packed_prompts(cpu_variant_dir):
    """Every prompt scores in the row what it scores alone."""
    rows = [line.split() for line in run("packed_prompts.py").splitlines()[-4:]]
    assert [int(tokens) for tokens, _, _ in rows] == [40, 3, 130, 17]
    for _, packed, alone in rows:
        assert float(alone) < 0
        assert float(packed) == pytest.approx(float(alone), rel=1e-4)  # printed to four places


def test_stream_tokens(cpu_variant_dir):
    *_, tokens, summary = run("stream_tokens.py", "--new-tokens", "5").splitlines()
    assert all(0 <= int(token) < 512 for token in tokens.split())
    assert re.fullmatch(rf"{len(tokens.split())} tokens, \d+\.\d a second .*", summary)

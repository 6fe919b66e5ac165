"""benchmarks/recover.py gives back what prefill.py and errors.py printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import environment as env  # noqa: E402
import recover  # noqa: E402
from prefill import line as printed  # noqa: E402

ENVIRONMENT = """NVIDIA H100 80GB HBM3, 132 multiprocessors
torch 2.11.0+cu130, cuda 13.0, triton 3.6.0, kernels 0.17.2, flash-linear-attention 0.6.0, commit abc, kernel_id _x
"""


def row(fla: bool) -> dict:
    made = {
        "case": "512/H32",
        "gate": "weak",
        "floor_ms": 0.008,
        "over_floor": 8.75,
        "ours": {
            "eager": {"median_ms": 0.0728, "p10_ms": 0.07, "p90_ms": 0.093},
            "queued": {"median_ms": 0.0554},
            "graph": {"median_ms": 0.0542},
        },
    }
    if fla:
        made["fla"] = {"eager": {"median_ms": 1.229}, "queued": {"median_ms": 0.1134}}
        made["speedup_over_fla"] = 16.88
    return made


@pytest.mark.parametrize("fla", [False, True], ids=["ours", "with-fla"])
def test_a_printed_row_comes_back(fla):
    made = row(fla)
    found = recover.prefill_row(printed(made))
    assert {name: found[name] for name in made if name not in ("floor_ms", "over_floor")} == {
        name: value for name, value in made.items() if name not in ("floor_ms", "over_floor")
    }
    assert found["lengths"] == [512] and found["H"] == 32


def test_other_lines_are_no_rows():
    header = "case           gate             ms         p10..p90   floor  x floor   FLA ms  FLA/ours"
    assert recover.prefill_row(header) is None
    assert recover.prefill_row("") is None
    assert recover.prefill_row("with FLA's Triton kernels:") is None


def test_command_line(tmp_path):
    prefill = tmp_path / "prefill.log"
    copied = "device-to-device copy: 3000 GB/s (bytes read and written)\n"
    host = "host time a call: chunk_kda 46.4 us, fwd 23.0 us\n"
    prefill.write_text(ENVIRONMENT + copied + host + printed(row(False)) + "\n" + printed(row(True)) + "\n")
    errors = tmp_path / "errors.log"
    errors.write_text(
        ENVIRONMENT
        + "relative RMS error against float64, output / final state, H = 8\n"
        + "lower-weak          8192  3.9e-03 / 2.7e-03                       \n"
    )
    command = [sys.executable, ROOT / "benchmarks/recover.py", prefill, errors, "--out", tmp_path]
    assert subprocess.run(command, capture_output=True).returncode == 0
    content = json.loads((tmp_path / "prefill-nvidia-h100-80gb-hbm3.json").read_text())
    (found,) = content["prefill"]["rows"]  # the later line of a case and gate holds both measurements
    assert found["fla"]["eager"]["median_ms"] == 1.229
    assert found["floor_ms"] == pytest.approx(1e3 * found["floor_bytes"] / 3e12)
    assert content["prefill"]["host"]["fwd"]["median_ms"] == pytest.approx(0.023)
    assert content["prefill"]["environment"]["commit"] == "abc"
    assert content["errors"]["rows"] == [
        {"gate": "lower-weak", "T": 8192, "H": 8, "ours": {"o": 0.0039, "final_state": 0.0027}}
    ]
    assert content["errors"]["recovered_from"] == "errors.log"


def test_a_log_without_rows_is_refused(tmp_path):
    (tmp_path / "empty.log").write_text(ENVIRONMENT)
    command = [sys.executable, ROOT / "benchmarks/recover.py", tmp_path / "empty.log", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "no row" in done.stderr
    assert not list(tmp_path.glob("*.json"))


def test_the_recorded_file_is_what_its_logs_say(tmp_path):
    """Results that carry the mark `recovered_from` hold exactly what the logs beside them hold."""
    recorded = [
        (path, section)
        for path in env.RESULTS.glob("prefill-*.json")
        for section in json.loads(path.read_text()).values()
        if "recovered_from" in section
    ]
    if not recorded:
        pytest.skip("no recorded result was recovered from a log")
    for path, section in recorded:
        log = env.RESULTS / section["recovered_from"]
        command = [sys.executable, ROOT / "benchmarks/recover.py", log, "--out", tmp_path]
        assert subprocess.run(command, capture_output=True).returncode == 0
        assert section in json.loads((tmp_path / path.name).read_text()).values()

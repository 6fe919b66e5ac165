"""benchmarks/fla_dispatch.py with a made-up clock and a stand-in for FLA."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import fla_dispatch  # noqa: E402
from timing import Timing  # noqa: E402

WORDS = ("--cases", "8192/H96", "512/H32", "--gates", "strong")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*words): (the section that fla_dispatch.main() leaves, its exit status)."""
    environment = {"device": "A Device", "multiprocessors": 1, "l2_bytes": 1, "commit": "0" * 40}
    keys = ("torch", "cuda", "triton", "kernels", "flash-linear-attention", "kernel_id")
    backend = ModuleType("hf_layer.fla")
    state = SimpleNamespace(registered=False, took=[], dies_at=None, added_us=3.0, compiled=[], lost=False)
    backend.register = lambda: setattr(state, "registered", True)
    backend.unregister = lambda: setattr(state, "registered", False)

    class Kernel:
        @staticmethod
        def chunk_kda(**x):
            state.took.append("kernel")
            return torch.zeros(1), None

    def chunk_kda(**x):
        if os.environ.get("FLA_FLASH_KDA") == "0" or not state.registered or state.lost:
            state.took.append("Triton")
            return torch.ones(1), None
        return Kernel.chunk_kda(**x)

    clocked = []

    def time_eager(call, sets):
        state.took.clear()
        call(sets[0])
        clocked.append(state.took[-1])
        if len(clocked) == state.dies_at:
            raise KeyboardInterrupt
        return Timing(*3 * [1.0 if state.took[-1] == "kernel" else 4.0], 20)

    def measure(calls, synchronize):
        us = {"direct": 20.0, "our backend": 20.0 + state.added_us, "FLA's backend": 40.0}
        found = []
        for name, (call, _) in calls.items():
            call()
            found.append({"name": name, "us": us[name], "took": state.took[-1]})
        return found

    fla, ops, kda = (ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.kda"))
    kda.chunk_kda = chunk_kda
    for module in (fla, ops, kda, backend):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    import hf_layer

    monkeypatch.setattr(hf_layer, "fla", backend, raising=False)
    monkeypatch.setattr(fla_dispatch.env, "load_kernel", Kernel)
    monkeypatch.setattr(fla_dispatch.env, "describe", lambda _: environment | dict.fromkeys(keys))
    monkeypatch.setattr(fla_dispatch.host, "measure", measure)
    monkeypatch.setattr(fla_dispatch.timing, "time_eager", time_eager)
    monkeypatch.setattr(fla_dispatch, "input_sets", lambda *_: [{}])
    monkeypatch.setattr(fla_dispatch.fla_tuning, "compile_ahead", state.compiled.append)
    monkeypatch.setenv("FLA_FLASH_KDA", "0")  # as the caller may have it

    def run(*words) -> tuple[dict, int | None]:
        monkeypatch.setattr(sys, "argv", ["fla_dispatch.py", "--out", str(tmp_path), *words])
        status = None
        try:
            fla_dispatch.main()
        except SystemExit as end:
            status = end.code
        except KeyboardInterrupt:
            assert len(clocked) == state.dies_at
        return json.loads((tmp_path / "fla_dispatch-a-device.json").read_text())["fla_dispatch"], status

    run.state = state
    return run


@pytest.mark.parametrize(("added_us", "status"), [(9.9, 0), (10.0, 1)])
def test_host_times_and_the_limit(run, added_us, status):
    run.state.added_us = added_us
    section, found = run(*WORDS, "--no-fla")
    assert found == status and section["complete"] is True
    assert section["host"]["added_us"] == pytest.approx(added_us)
    assert {row["name"]: row["took"] for row in section["host"]["rows"]} == {
        "direct": "kernel", "our backend": "kernel", "FLA's backend": "Triton"
    }  # fmt: skip


def test_whole_calls(run, capsys):
    section, status = run(*WORDS)
    assert status == 0 and len(section["rows"]) == 2
    for row in section["rows"]:
        times = [row[name]["median_ms"] for name in ("direct", "our_backend", "triton")]
        assert times == [1, 1, 4] and row["triton_over_ours"] == 4
    assert run.state.compiled[0][1:] == ["8192/H96", "strong", "512/H32", "strong"]
    assert "8192/H96    strong               1.0000" in capsys.readouterr().out


@pytest.mark.parametrize(("dies_at", "rows", "beside_triton"), [(1, 0, 0), (3, 1, 0), (6, 2, 1)])
def test_a_killed_run_leaves_what_it_has(run, dies_at, rows, beside_triton):
    run.state.dies_at = dies_at
    section, _ = run(*WORDS)
    assert section["complete"] is False and len(section["rows"]) == rows and section["host"]
    assert sum("triton" in row for row in section["rows"]) == beside_triton


def test_calls_that_do_not_reach_our_kernel_are_not_reported(run):
    run.state.lost = True
    section, status = run(*WORDS)
    assert "did not run on our kernel" in status and not section["rows"]

"""benchmarks/host.py on a CPU: its calls run, and its rows say what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import host  # noqa: E402


def test_the_calls_write_their_results(cpu_package):
    """On tensors with tokens, as on a GPU: each call writes every output."""
    x = host.make_inputs("cpu")
    shapes = {"out": (1, 5, 4, 128), "final_state": (1, 4, 128, 128)}
    for name in ("q", "k", "v", "g"):
        x[name] = torch.randn(1, 5, 4, 128).bfloat16()
    x["beta"], x["initial_state"] = torch.randn(1, 5, 4).bfloat16(), torch.zeros(1, 4, 128, 128)
    x["cu_seqlens"] = torch.tensor([0, 5])
    for name, outputs in {
        "operator kda_prefill": ("out", "final_state"),
        "fwd": ("out", "final_state"),
        "operator kda_decode into out": ("out",),
        "fused_recurrent_kda into out": ("out",),
    }.items():
        x |= {output: torch.full(shape, float("nan")) for output, shape in shapes.items()}
        x["out"] = x["out"].bfloat16()
        call, _ = host.make_calls(cpu_package, x)[name]
        with torch.inference_mode():
            call()
        assert not any(x[output].isnan().any() for output in outputs), name


def test_rows(cpu_package, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(host, "CALLS", 2)
    monkeypatch.setattr(host, "ROUNDS", 3)
    monkeypatch.setattr(sys, "argv", ["host.py", "--backend", "cpu", "--out", str(tmp_path)])
    host.main()
    (path,) = tmp_path.glob("host-*.json")
    section = json.loads(path.read_text())["inference_mode"]
    assert section["environment"]["kernel_id"] in cpu_package.ops.kda_prefill.name()
    rows = {row["name"]: row for row in section["rows"]}
    shown = capsys.readouterr().out
    for name, row in rows.items():
        assert 0 < row["p10_us"] <= row["us"] <= row["p90_us"] and name in shown
    for name, operator in {
        "fwd": "operator kda_prefill",
        "chunk_kda": "operator kda_prefill_new",
        "fused_recurrent_kda": "operator kda_decode_new",
        "fused_recurrent_kda, in place": "operator kda_decode",
        "fused_recurrent_kda into out": "operator kda_decode into out",
    }.items():
        assert rows[name]["over_operator_us"] == pytest.approx(rows[name]["us"] - rows[operator]["us"])

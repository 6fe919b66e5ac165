"""python -m hf_layer.demo on the CPU: what it says, and that its checks can fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")
from hf_layer import KimiDeltaAttention, demo, reference  # noqa: E402

ROOT = Path(demo.__file__).resolve().parent.parent


def run_main(capsys, *options: str) -> tuple[int, str]:
    status = demo.main(["--device", "cpu", "--new-tokens", "4", *options])
    return status, " ".join(capsys.readouterr().out.split())


def test_command():
    """The command as people type it, on a machine without a GPU."""
    env = {name: value for name, value in os.environ.items() if name != "LOCAL_KERNELS"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_layer.demo", "--new-tokens", "3"],
        cwd=ROOT,
        env={**env, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cpu_kernel = r"flash-kda kernel torch-stable-abi211-cpu-\S+ loaded from the checkout's build/"
    assert re.search(rf"^backend: (reference: no CUDA device|{cpu_kernel})$", done.stdout, re.MULTILINE)
    assert "same tokens" in done.stdout
    for gate in ("lower bound -5", "softplus", "pre-activated, 5 % hard resets"):
        assert gate in done.stdout
    assert done.stdout.splitlines()[-1] == "all checks passed"


def test_models_share_weights_but_not_modules():
    theirs, ours = demo.build_models(torch.device("cpu"))
    kinds = [type(layer.self_attn) for layer in ours.model.layers]
    assert kinds[:3] == [KimiDeltaAttention] * 3 and kinds[3] is type(theirs.model.layers[3].self_attn)
    mine, original = ours.state_dict(), theirs.state_dict()
    assert sorted(mine) == sorted(original)
    assert all(torch.equal(mine[name], value) for name, value in original.items())


def test_other_tokens_are_a_failure(capsys, monkeypatch):
    replace = demo.replace_kda_layers

    def replace_and_spoil(model):
        model = replace(model)
        with torch.no_grad():
            model.model.layers[0].self_attn.forget_gate.dt_bias += 5.0
        return model

    monkeypatch.setattr(demo, "replace_kda_layers", replace_and_spoil)
    status, output = run_main(capsys)
    assert status == 1
    assert "OTHER TOKENS" in output
    assert "FAILED: the tokens of our layers differ" in output
    assert "all checks passed" not in output


def test_an_error_over_the_limit_is_a_failure(capsys, monkeypatch):
    def off_by_a_little(*args, **options):
        o, state = reference.chunk_kda(*args, **options)
        return o * (1 + 1e-4), state

    monkeypatch.setattr(demo, "compare_models", lambda *args: [])
    spoiled = types.SimpleNamespace(chunk_kda=off_by_a_little, recurrent_kda=reference.recurrent_kda)
    monkeypatch.setattr(demo, "reference", spoiled)
    status, output = run_main(capsys)
    assert status == 1
    assert output.count("exceeds 1e-05") == 3  # one for each gate


def test_nan_is_a_failure(capsys, monkeypatch):
    monkeypatch.setattr(demo, "compare_models", lambda *args: [])
    monkeypatch.setattr(demo, "relative_rms", lambda expected, found: float("nan"))
    assert run_main(capsys)[0] == 1


def test_bad_options(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--new-tokens", "0"])
    assert "--new-tokens: expected at least 1, got 0" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            demo.main(["--device", "cuda"])
        assert "--device: expected a CUDA device" in capsys.readouterr().err

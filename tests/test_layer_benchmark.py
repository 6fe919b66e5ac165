"""benchmarks/layer.py with a made-up clock: what a run writes, and what a killed one leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.20.2")
pytest.importorskip("rich")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import layer  # noqa: E402
import plots  # noqa: E402
from timing import Timing  # noqa: E402

MS = {"ours": 1.0, "fla": 2.0, "torch": 30.0}
KINDS = [(name, part) for name in MS for part in ("decode", "prefill")]  # in the order of measurement


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*words): the section that layer.main() leaves, whether it ends or dies at row `run.dies_at`."""
    environment = {"device": "A Device", "multiprocessors": 1, "commit": "0" * 40}
    keys = ("torch", "cuda", "triton", "kernels", "flash-linear-attention", "kernel_id")

    def layers(names):
        return {name: [lambda x, cache_params, name=name: name] * 2 for name in names}

    def clock(call, sets):
        name = call(sets[0]) or "products"
        if name != "products":
            run.calls.append(name)
            if len(run.calls) == run.dies_at:
                raise KeyboardInterrupt
        return Timing(*3 * [MS.get(name, 0.5)], 20)

    def run(*words) -> dict:
        monkeypatch.setattr(sys, "argv", ["layer.py", "--no-plots", "--out", str(tmp_path), *words])
        try:
            layer.main()
        except KeyboardInterrupt:
            assert len(run.calls) == run.dies_at
        return json.loads((tmp_path / "layer-a-device.json").read_text())["layer"]

    run.dies_at, run.calls, run.compiled, run.folder = None, [], [], tmp_path

    class Kernel:
        class layers:
            KimiDeltaAttention = None

    operator = {
        "name": "chunk_kda",
        "floor_ms": 0.1,
        "time": Timing(0.2, 0.2, 0.2, 3).to_json(),
        "over_floor": 2,
    }
    for name, value in {
        "env.load_kernel": Kernel,
        "env.describe": lambda _: environment | dict.fromkeys(keys),
        "timing.copy_bandwidth": lambda: 3e12,
        "timing.time_eager": clock,
        "timing.time_graph": clock,
        "fla_tuning.compile_ahead": run.compiled.append,
        "transformers_class": lambda with_fla: None,
        "make_layers": lambda classes, *_, **__: layers(classes),
        "measure_operators": lambda *_: [operator],
        "agreement_of": lambda *_: {"ours": 5e-3, "fla": 7e-3, "torch": 6e-3}.get,
        "hidden_states": lambda *_: None,
        "products": lambda *_: None,
        "prefill_floor_bytes": lambda *_: 3e8,
        "decode_floor_bytes": lambda *_: 3e8,
        "peak_memory": lambda _: 2**20,
        "count_launches": lambda _: 7,
    }.items():
        *module, name = name.split(".")
        monkeypatch.setattr(getattr(layer, module[0]) if module else layer, name, value)
    return run


def rows_of(section: dict) -> list[tuple[str, str]]:
    return [(row["name"], part) for part in ("decode", "prefill") for row in section[part]["rows"]]


def test_a_whole_run(run, capsys):
    section = run("--tokens", "512")
    assert section["complete"] is True and run.calls == [name for name, _ in KINDS]
    assert sorted(rows_of(section)) == sorted(KINDS) and section["tokens"] == 512
    row = section["prefill"]["rows"][1]
    assert row["name"] == "fla" and row["time"]["median_ms"] == 2.0 and row["product_share"] == 0.25
    assert row["over_floor"] == pytest.approx(20) and section["errors"]["torch"] == 6e-3
    assert run.compiled == [[layer.__file__, "--tokens", "512", "--sequences", "32"]]
    shown = capsys.readouterr().out
    assert (
        "prefill, 512 tokens, transformers + FLA: 2.0000 ms" in shown and "our operators, 512 tokens" in shown
    )


@pytest.mark.parametrize("dies_at", [1, 2, 4, 6])
def test_a_killed_run_leaves_what_it_has(run, dies_at):
    run.dies_at = dies_at
    section = run()
    assert section["complete"] is False and section["operators"]
    assert sorted(rows_of(section)) == sorted(KINDS[: dies_at - 1])


def test_without_baselines(run):
    section = run("--no-fla", "--no-torch")
    assert rows_of(section) == [("ours", "decode"), ("ours", "prefill")] and not run.compiled


@pytest.mark.parametrize("dies_at", [None, 1, 2, 4])
def test_the_plot_of_what_there_is(run, dies_at):
    pytest.importorskip("matplotlib")
    run.dies_at = dies_at
    run()
    drawn = plots.draw(run.folder / "layer-a-device.json", run.folder)
    assert [figure.name for figure in drawn] == ["layer-a-device.svg"] * (dies_at != 1)

"""benchmarks/prefill.py without a GPU: its inputs, its plan, its targets, and what a killed run leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from kda_inputs import activate, rel_rms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import cases  # noqa: E402
import environment as env  # noqa: E402
import plots  # noqa: E402
import prefill  # noqa: E402
import targets  # noqa: E402
import timing  # noqa: E402

SMALL = cases.case((1000, 30), 2)


# ----------------------------------------------------------------------------------------------------
# inputs


def log_decay(x: dict) -> torch.Tensor:
    if not x["use_gate_in_kernel"]:
        return x["g"]
    return activate(x["g"].float(), x["A_log"], x["dt_bias"], x["lower_bound"])


@pytest.mark.parametrize("gate", cases.GATES)
def test_mean_log_decay_is_as_the_table_says(gate):
    (row,) = (line for line in cases.__doc__.splitlines() if line.startswith(f"| {gate} |"))
    stated = float(row.rstrip(" |").rsplit("about ", 1)[1])
    mean = log_decay(cases.make_inputs(cases.case((4096,), 16), gate, 0, "cpu")).float().mean().item()
    assert stated == pytest.approx(mean, rel=0.35), mean


def test_softplus_is_kimi_linear_s_start():
    """A uniform in 1..16, softplus(dt_bias) log-uniform in 1e-3..1e-1."""
    x = cases.make_inputs(cases.case((1,), 4096), "softplus", 0, "cpu")
    A, dt = x["A_log"].exp(), torch.nn.functional.softplus(x["dt_bias"])
    for found, low, high in ((A, 1, 16), (dt.log(), -6.9078, -2.3026)):
        quarters = torch.quantile(found.flatten()[:4096], torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        uniform = torch.linspace(low, high, 5)
        torch.testing.assert_close(quarters, uniform, rtol=0, atol=0.03 * (high - low))
    assert x["lower_bound"] is None and x["g"].float().std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("gate", ["token-resets", "channel-resets"])
def test_resets(gate):
    x, usual = (cases.make_inputs(SMALL, name, 0, "cpu") for name in (gate, "softplus"))
    reset = log_decay(x) < -2000
    assert ((log_decay(x)[reset] / cases.RESET) - 1).abs().max() < 2**-8
    assert torch.equal(x["g"][~reset], usual["g"][~reset])
    assert reset.float().mean().item() == pytest.approx(0.05, abs=0.012)
    whole = reset.all(-1) | ~reset.any(-1)
    assert whole.all() == (gate == "token-resets")


def test_handed_over_log_decays_are_those_of_softplus(cpu_package):
    """The same numbers come out; bfloat16 rounds the log decays."""
    inputs = {gate: cases.make_inputs(SMALL, gate, 0, "cpu") for gate in ("softplus", "fp32-g", "bf16-g")}
    assert inputs["fp32-g"]["g"].dtype == torch.float32 and inputs["bf16-g"]["g"].dtype == torch.bfloat16
    with torch.inference_mode():
        found = {gate: cpu_package.chunk_kda(**x) for gate, x in inputs.items()}
    for i in range(2):
        assert rel_rms(found["softplus"][i], found["fp32-g"][i]) < 1e-3
        assert rel_rms(found["softplus"][i], found["bf16-g"][i]) < 2e-2


def test_floor():
    shape = cases.case((8192,), 96)
    states = 2 * 96 * 128 * 128 * 4
    assert shape.floor_bytes("weak") == 8192 * 96 * 128 * 5 * 2 + states
    assert shape.floor_bytes("fp32-g") - shape.floor_bytes("bf16-g") == 8192 * 96 * 2 * 128


def test_unknown_gate():
    with pytest.raises(ValueError, match="gate: expected one of strong, .*, got 'zero'"):
        cases.make_inputs(SMALL, "zero", 0, "cpu")


# ----------------------------------------------------------------------------------------------------
# the plan


def names(options) -> list[tuple[str, str]]:
    return [(shape.name, gate) for shape, gates in options.plan for gate in gates]


def test_every_case_has_the_bounded_gates_and_four_have_all():
    options = prefill.parse_arguments([])
    every = [shape.name for shape in cases.CASES]
    assert names(options) == [(name, gate) for name in every for gate in cases.gates_of(name)]
    assert {name for name, gate in names(options) if gate == "fp32-g"} == set(cases.ALL_GATES)
    assert options.fla == every
    assert prefill.parse_arguments(["--no-fla"]).fla == []


def test_chosen_rows():
    options = prefill.parse_arguments("--cases 8192/H96 512/H32 --gates weak fp32-g --fla 512/H32".split())
    assert names(options) == [(n, g) for n in ("8192/H96", "512/H32") for g in ("weak", "fp32-g")]
    assert options.fla == ["512/H32"]
    assert {name for name, _ in names(prefill.parse_arguments(["--quick"]))} == set(cases.QUICK)


@pytest.mark.parametrize("words", ["--cases 8192/H96 --fla 512/H32", "--fla 8192/H96 --no-fla", "--fla"])
def test_fla_needs_cases_that_are_measured(words, capsys):
    with pytest.raises(SystemExit):
        prefill.parse_arguments(words.split())
    assert "--fla" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# the clock


def test_gates_take_turns(monkeypatch):
    """Every second call is the other gate's, and each gate gets its own times, whatever the clock does meanwhile."""
    now, order = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return end.at - self.at

    def call(inputs):
        gate, number = inputs
        order.append((gate, number))
        now[0] += {"strong": 2.0, "weak": 3.0}[gate]

    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "warm_up", lambda call, sets: {"strong": 5.0, "weak": 10.0}[sets[0][0]])
    groups = [[("strong", 0), ("strong", 1)], [("weak", 0), ("weak", 1), ("weak", 2)]]
    strong, weak = timing.time_eager_in_turn(call, groups, budget_ms=300.0)
    assert (strong.median_ms, weak.median_ms) == (2.0, 3.0)
    assert strong.repeats == weak.repeats == 30  # what the slowest allows
    assert order == [(gate, i % count) for i in range(30) for gate, count in (("strong", 2), ("weak", 3))]


# ----------------------------------------------------------------------------------------------------
# targets


def a_timing(ms: float) -> dict:
    return timing.Timing(ms, 0.9 * ms, 1.1 * ms, 20).to_json()


def a_row(case: str, gate: str, ms: float, floor_ms: float = 0.1, **more) -> dict:
    shape = next(shape for shape in cases.CASES if shape.name == case)
    ours = {"eager": a_timing(ms), "peak_extra_bytes": 0, **more}
    row = {"case": case, "gate": gate, "lengths": list(shape.lengths), "H": shape.H, "floor_ms": floor_ms}
    return row | {"ours": ours, "over_floor": ms / floor_ms}


def a_section(*rows: dict) -> dict:
    host = {"chunk_kda": a_timing(0.020), "fwd": a_timing(0.016)}
    return {"copy_bytes_per_s": 3e12, "host": host, "rows": list(rows)}


def found(section: dict, requirement: str, what: str) -> dict:
    (item,) = (
        item
        for item in targets.summary(section)
        if item["requirement"].startswith(requirement) and item["what"] == what
    )
    return item


def test_targets_name_cases():
    every = {shape.name for shape in cases.CASES}
    assert {*targets.MOST_MS, *targets.GRAPH_CASES, *targets.GROWTH} <= every


@pytest.mark.parametrize(("ms", "met"), [(0.6, True), (0.601, False)])
def test_times(ms, met):
    item = found(a_section(a_row("8192/H96", "strong", ms)), "time", "8192/H96 strong")
    assert item["figure"] == ms and item["at_most"] == 0.6 and item["met"] is met
    assert found(a_section(), "time", "8192/H96 strong")["met"] is None


def test_a_short_case_counts_in_a_graph():
    rows = [a_row("512/H32", "strong", 0.06, graph=a_timing(0.028)), a_row("512/H32", "weak", 0.02)]
    assert found(a_section(*rows), "time", "512/H32 strong")["met"] is True
    assert found(a_section(*rows), "time", "512/H32 weak")["met"] is None


def test_gates_are_compared_by_the_same_kind_of_time():
    strong, weak = a_row("512/H32", "strong", 0.06, graph=a_timing(0.03)), a_row("512/H32", "weak", 0.05)
    assert found(a_section(strong, weak), "strong and weak", "512/H32")["figure"] == pytest.approx(1.2)
    weak["ours"]["graph"] = a_timing(0.031)
    item = found(a_section(strong, weak), "strong and weak", "512/H32")
    assert item["figure"] == pytest.approx(31 / 30) and item["met"] is True


@pytest.mark.parametrize(
    ("gate", "most"), [("softplus", 1.3), ("token-resets", 1.6), ("channel-resets", 1.6)]
)
def test_other_gates(gate, most):
    rows = [a_row("8192/H64", "strong", 0.5), a_row("8192/H64", gate, 0.5 * most + 1e-3)]
    item = found(a_section(*rows), f"{gate} over strong", "8192/H64")
    assert item["at_most"] == most and item["met"] is False
    rows[1] = a_row("8192/H64", gate, 0.5 * most - 1e-3)
    assert found(a_section(*rows), f"{gate} over strong", "8192/H64")["met"] is True


@pytest.mark.parametrize(("ms", "met"), [(16.0, True), (14.0, True), (17.0, False)])
def test_growth(ms, met):
    rows = [a_row("8192/H8", "weak", 1.0), a_row("131072/H8", "weak", ms)]
    item = found(a_section(*rows), "time a token", "H8 weak")
    assert item["figure"] == pytest.approx(ms / 16) and item["met"] is met


@pytest.mark.parametrize(("added", "met"), [(0.06, True), (0.07, False)])
def test_a_float32_gate_may_cost_its_bytes(added, met):
    rows = [a_row("8192/H96", "bf16-g", 0.5), a_row("8192/H96", "fp32-g", 0.5 + added)]
    item = found(a_section(*rows), "fp32 g over bf16 g", "8192/H96")
    assert item["at_most"] == pytest.approx(8192 * 96 * 256 / 3e9) and item["met"] is met


def test_memory_and_host_time():
    section = a_section(
        a_row("8192/H96", "strong", 0.5), a_row("8192/H96", "weak", 0.5, peak_extra_bytes=512)
    )
    assert found(section, "memory", "8192/H96 strong")["met"] is True
    assert found(section, "memory", "8192/H96 weak")["met"] is False
    assert found(section, "host", "chunk_kda")["figure"] == pytest.approx(20)
    assert found(section, "host", "fwd")["met"] is False


def test_the_summary_s_lines():
    section = a_section(
        a_row("8192/H96", "strong", 0.59), a_row("8192/H96", "weak", 0.61), a_row("8192/H96", "softplus", 0.7)
    )
    lines = targets.summary_lines(targets.summary(section))
    assert lines[:2] == [
        "MISSED  time: 1 of 2, 24 not measured",
        "          8192/H96 weak 0.6100 (at most 0.6000 ms)",
    ]
    assert (
        "met     softplus over strong: 1 of 1, 3 not measured; closest 8192/H96 1.19 (at most 1.30)" in lines
    )
    assert "  -     fp32 g over bf16 g: not measured" in lines
    assert "met     memory beyond the results: 3 of 3; closest 8192/H96 strong 0 (at most 0 bytes)" in lines
    json.dumps(targets.summary(section), allow_nan=False)


def test_a_file_s_summary(tmp_path, monkeypatch, capsys):
    path = tmp_path / "prefill-x.json"
    path.write_text(json.dumps({"prefill": a_section(a_row("8192/H96", "strong", 0.59))}))
    monkeypatch.setattr(sys, "argv", ["targets.py", str(path)])
    targets.main()
    assert capsys.readouterr().out.startswith(
        "met     time: 1 of 1, 25 not measured; closest 8192/H96 strong"
    )


# ----------------------------------------------------------------------------------------------------
# files


def test_a_section_is_complete_only_when_finished(tmp_path):
    result = env.Section(tmp_path, "x", {"device": "A Device"})
    result.save(rows=[1])
    path = tmp_path / "x-a-device.json"
    assert json.loads(path.read_text())["x"] == {
        "environment": {"device": "A Device"}, "complete": False, "rows": [1]
    }  # fmt: skip
    other = env.Section(tmp_path, "x", {"device": "A Device"}, name="errors")
    other.save(rows=[])
    result.finish()
    content = json.loads(path.read_text())
    assert content["x"]["complete"] is True and content["errors"]["complete"] is False
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    env.update_result(path, "x", {"rows": [1]})
    write = Path.write_text

    def killed(self, text):
        write(self, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        env.update_result(path, "x", {"rows": [1, 2]})
    assert json.loads(path.read_text()) == {"x": {"rows": [1]}}


@pytest.fixture
def no_gpu(tmp_path, monkeypatch):
    """prefill.main() with a made-up clock; `run(*words)` returns the section that it leaves."""
    environment = {"device": "A Device", "multiprocessors": 1, "l2_bytes": 1, "commit": "0" * 40}
    keys = ("torch", "cuda", "triton", "kernels", "flash-linear-attention", "kernel_id")
    measured = []

    def measure(call, eager, sets, is_ours):
        measured.append(is_ours)
        if len(measured) == run.dies_at:
            raise KeyboardInterrupt
        return {"eager": a_timing(1.0 if is_ours else 3.0), "peak_extra_bytes": 0 if is_ours else 3 * 2**20}

    def run(*words) -> dict:
        monkeypatch.setattr(sys, "argv", ["prefill.py", "--no-plots", "--out", str(tmp_path), *words])
        try:
            prefill.main()
        except KeyboardInterrupt:
            assert len(measured) == run.dies_at
        return json.loads((tmp_path / "prefill-a-device.json").read_text())["prefill"]

    run.dies_at, run.compiled = None, []
    monkeypatch.setattr(env, "load_kernel", lambda: None)
    monkeypatch.setattr(env, "load_fla", lambda: None if "--no-fla" in sys.argv else "fla")
    monkeypatch.setattr(env, "describe", lambda _: environment | dict.fromkeys(keys))
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 3e12)
    monkeypatch.setattr(
        prefill, "measure_host", lambda _: {"chunk_kda": a_timing(0.02), "fwd": a_timing(0.01)}
    )
    monkeypatch.setattr(prefill, "sets_for", lambda *_: [])
    monkeypatch.setattr(prefill, "measure", measure)
    monkeypatch.setattr(timing, "time_eager_in_turn", lambda call, groups: [None] * len(groups))
    monkeypatch.setattr(timing, "time_eager", lambda call, sets: None)
    monkeypatch.setattr(prefill.fla_tuning, "compile_ahead", lambda words: run.compiled.append(words[1:]))

    class Kernel:
        chunk_kda = None

    monkeypatch.setattr(env, "load_kernel", Kernel)
    return run


def test_a_whole_run(no_gpu, capsys):
    section = no_gpu("--cases", "8192/H96", "512/H32", "--gates", "strong", "weak", "--fla", "512/H32")
    assert section["complete"] is True and len(section["rows"]) == 4
    assert [row["case"] for row in section["rows"] if "fla" in row] == ["512/H32", "512/H32"]
    assert section["rows"][2]["speedup_over_fla"] == 3
    assert no_gpu.compiled == [["512/H32", "strong"]]  # the weak gate is the same kernels
    assert section["summary"] == targets.summary(section)
    shown = capsys.readouterr().out
    assert "MISSED  time: 2 of 2" in shown and "FLA +3.0 MiB" in shown and "ours +" not in shown


@pytest.mark.parametrize(("dies_at", "rows", "beside_fla"), [(3, 2, 0), (6, 4, 1)])
def test_a_killed_run_leaves_what_it_has(no_gpu, dies_at, rows, beside_fla):
    no_gpu.dies_at = dies_at
    section = no_gpu("--cases", "8192/H96", "512/H32", "--gates", "strong", "weak")
    assert section["complete"] is False and len(section["rows"]) == rows
    assert sum("fla" in row for row in section["rows"]) == beside_fla
    assert ("summary" in section) == (rows == 4)


def test_plots_of_every_gate_and_of_few_cases_beside_fla(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        a_row(name, gate, 0.1 * shape.T / 1000, graph=a_timing(0.1))
        for shape in cases.CASES
        for name in [shape.name]
        for gate in cases.gates_of(name)
    ]
    rows[1]["fla"] = {"eager": a_timing(3.0)}
    path = tmp_path / "prefill-x.json"
    path.write_text(json.dumps({"prefill": a_section(*rows) | {"environment": {"device": "A Device"}}}))
    assert {figure.name for figure in plots.draw(path, tmp_path)} == {
        "prefill-x-cases.svg", "prefill-x-over-T.svg", "prefill-x-over-H.svg"
    }  # fmt: skip
    path.write_text(json.dumps({"prefill": a_section(rows[0]) | {"environment": {"device": "A Device"}}}))
    assert [figure.name for figure in plots.draw(path, tmp_path)] == ["prefill-x-cases.svg"]

"""benchmarks/fla_tuning.py on Triton's autotuner, or on a stand-in for it where Triton is not installed."""

from __future__ import annotations

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import fla_tuning  # noqa: E402


class OutOfResources(Exception):
    pass


class Autotuner:
    """The part of Triton 3.6's that fla_tuning.py relies on."""

    cache_results = True

    def __init__(self, fn, names, configs, key, *_, **__):
        self.fn, self.configs, self.cache = fn, configs, {}

    def prune_configs(self, arguments):
        return self.configs

    def do_bench(self, call, quantiles):
        raise AssertionError("a stopwatch")

    def run(self, n):
        if n not in self.cache:
            timings = {config: self.bench(n, config) for config in self.prune_configs({})}
            assert not self.cache_results
            self.cache[n] = min(timings, key=timings.get)
        self.fn.run(n, **self.cache[n].all_kwargs())

    def bench(self, n, config):
        try:
            return self.do_bench(lambda: self.fn.run(n, **config.all_kwargs()), quantiles=(0.5, 0.2, 0.8))
        except OutOfResources:
            return [float("inf")] * 3


class Config(SimpleNamespace):
    __hash__ = object.__hash__

    def __init__(self, kwargs, num_warps, num_stages):
        super().__init__(kwargs=kwargs, num_warps=num_warps, num_stages=num_stages)

    def all_kwargs(self):
        return {**self.kwargs, "num_warps": self.num_warps, "num_stages": self.num_stages}


@pytest.fixture
def triton(monkeypatch):
    """Autotuner, Config and OutOfResources, of Triton if it is there."""
    if importlib.util.find_spec("triton") is not None:
        from triton import Config as TritonConfig
        from triton.runtime import autotuner

        return SimpleNamespace(
            Autotuner=autotuner.Autotuner,
            Config=TritonConfig,
            full=lambda: autotuner.OutOfResources(2, 1, "shared memory"),
        )
    for name in ("triton", "triton.runtime", "triton.runtime.autotuner"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["triton.runtime.autotuner"].Autotuner = Autotuner
    return SimpleNamespace(Autotuner=Autotuner, Config=Config, full=OutOfResources)


@pytest.fixture
def kernel(triton):
    """An autotuned kernel: `.run(n)`, and `.runs`, the configurations that were run."""

    def kernel(n, BLOCK, num_warps, num_stages):
        pass

    class Function:
        fn = staticmethod(kernel)
        runs, too_large = [], ()

        def run(self, n, **options):
            found = (options["BLOCK"], options["num_warps"], options["num_stages"])
            if found in self.too_large:
                raise triton.full()
            self.runs.append(found)

    function = Function()
    configs = [
        triton.Config({"BLOCK": block}, num_warps=warps, num_stages=stages)
        for block in (32, 64)
        for warps in (1, 2, 4)
        for stages in (2, 3)
    ]
    tuner = triton.Autotuner(function, ["n", "BLOCK"], configs, ["n"], None, None, cache_results=True)
    return SimpleNamespace(run=tuner.run, runs=function.runs, function=function, tuner=tuner)


def test_untuned_takes_one_configuration(kernel):
    with fla_tuning.untuned():
        kernel.run(7)
        kernel.run(7)
        assert kernel.runs == 3 * [(32, 2, 2)]  # tried, and then each call
        kernel.run(8)
        assert kernel.runs == 5 * [(32, 2, 2)]


def test_untuned_goes_on_after_one_that_does_not_fit(kernel):
    kernel.function.too_large = [(32, 2, 2), (64, 2, 2)]
    with fla_tuning.untuned():
        kernel.run(7)
    assert kernel.runs == 2 * [(32, 2, 3)]


def test_the_autotuner_is_as_before_afterwards(kernel):
    before = dict(vars(type(kernel.tuner)))
    with fla_tuning.untuned():
        assert vars(type(kernel.tuner))["prune_configs"] is not before["prune_configs"]
    assert dict(vars(type(kernel.tuner))) == before


def test_shares_make_up_the_whole(kernel, monkeypatch):
    """Each part runs its own configurations of every kernel, once."""
    import cases
    import environment

    monkeypatch.setattr(cases, "make_inputs", lambda shape, gate, seed: {"n": shape.T})
    monkeypatch.setattr(environment, "load_fla", lambda: kernel.run)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    seen = []
    for part in range(5):
        kernel.tuner.cache.clear()
        kernel.runs.clear()
        with fla_tuning.share(f"{part}/5"):
            fla_tuning.compile_cases([("8192/H8", "strong")])
        seen += kernel.runs[:-1]  # the last is the call itself
    everything = [
        (config.kwargs["BLOCK"], config.num_warps, config.num_stages) for config in kernel.tuner.configs
    ]
    assert sorted(seen) == sorted(everything)
    kernel.tuner.cache.clear()
    kernel.runs.clear()
    with fla_tuning.share("30/31"):  # more parts than configurations
        fla_tuning.compile_cases([("8192/H8", "strong")])
    assert len(kernel.runs) == 2


def test_what_is_compiled_anew():
    rows = [("8192/H96", "strong"), ("8192/H96", "weak"), ("8192/H96", "softplus"), ("8x1024/H96", "weak")]
    rows += [
        ("8192/H96", "token-resets"),
        ("8192/H96", "fp32-g"),
        ("8192/H96", "bf16-g"),
        ("8192/H64", "strong"),
    ]
    found = fla_tuning.distinct(rows)
    assert found == [rows[i] for i in (0, 2, 3, 5, 6, 7)]


@pytest.mark.parametrize("fails", [False, True])
def test_compile_ahead_gives_every_process_its_share(monkeypatch, capsys, fails):
    started = []

    class Popen:
        def __init__(self, words, stdout):
            started.append(words[1:])

        def wait(self, seconds=None):
            if fails and len(started) == 3 and seconds is not None:
                raise subprocess.TimeoutExpired("python", seconds)
            return int(fails)

        def kill(self):
            assert fails

    monkeypatch.setattr(fla_tuning.subprocess, "Popen", Popen)
    fla_tuning.compile_ahead(
        fla_tuning.command_for_cases([("8192/H96", "weak"), ("8192/H96", "strong")]), processes=3
    )
    shares = [["--share", f"{part}/3"] for part in range(3)]
    assert started == [[fla_tuning.__file__, "8192/H96", "weak", *words] for words in shares]
    assert ("3 of 3 processes failed" in capsys.readouterr().out) == fails


def test_the_program_that_compiles(monkeypatch, kernel):
    """As compile_ahead starts it."""
    import cases
    import environment

    monkeypatch.setattr(cases, "make_inputs", lambda shape, gate, seed: {"n": f"{shape.name} {gate}"})
    monkeypatch.setattr(environment, "load_fla", lambda: kernel.run)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    words = ["8192/H96", "weak", "512/H32", "softplus", "--share", "0/12"]
    monkeypatch.setattr(sys, "argv", [fla_tuning.__file__, *words])
    runpy.run_path(fla_tuning.__file__, run_name="__main__")
    assert list(kernel.tuner.cache) in (
        [("8192/H96 weak",), ("512/H32 softplus",)],
        ["8192/H96 weak", "512/H32 softplus"],
    )
    assert len(kernel.runs) == 4  # one configuration tried, and then the call

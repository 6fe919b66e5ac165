"""FLA's Triton kernels without the minutes that their autotuner takes.

For each shape FLA's autotuner compiles some hundred kernels, one after the other, and times them.

`compile_ahead` fills Triton's cache on disk with these kernels by several processes at once, each with its
share of the configurations and none with a stopwatch. Who measures afterwards tunes as ever, alone on the
device, and finds everything compiled.

`untuned` is for tests, where any of the configurations will do.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from unittest import mock

PROCESSES = 10  # each holds one call of the largest case, about 5 GB
LIMIT_S = 200
NO_TIME = [0.0, 0.0, 0.0]  # quantiles, as the autotuner asks for them
NEVER = [1.0, 1.0, 1.0]


@contextlib.contextmanager
def replaced(choose, bench):
    """In here Triton's autotuners try the configurations that choose(configurations) returns, and
    bench(call) stands for timing one. Nothing of this gets into the cache of tuning results."""
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def prune_configs(tuner, arguments):
        tuner.cache_results = False
        return choose(prune(tuner, arguments))

    def do_bench(call, quantiles=None):
        return bench(call)

    with (
        mock.patch.object(Autotuner, "prune_configs", prune_configs),
        mock.patch.object(Autotuner, "do_bench", staticmethod(do_bench), create=True),
    ):
        yield


@contextlib.contextmanager
def untuned():
    """In here every kernel takes the first of its configurations that runs, and compiles no other.

    Those of two warps come first: they need no wgmma, of which Triton 3.6 is known to make wrong code for one
    of FLA's kernels, and keep fewer registers a thread than one warp.
    """
    done = False

    def choose(configurations: list) -> list:
        nonlocal done
        done = False
        return sorted(configurations, key=lambda x: (abs(x.num_warps - 2), x.num_stages))

    def bench(call) -> list[float]:
        nonlocal done
        if done:
            return NEVER
        call()  # the autotuner takes what is raised here for a configuration that doesn't fit
        done = True
        return NO_TIME

    with replaced(choose, bench):
        yield


@contextlib.contextmanager
def share(text: str):
    """In here every kernel compiles only its share of the configurations, "part/parts", and runs each once."""
    part, parts = map(int, text.split("/"))

    def choose(configurations: list) -> list:
        return configurations[part::parts] or configurations[:1]

    def bench(call) -> list[float]:
        call()
        return NO_TIME

    with replaced(choose, bench):
        yield


def compile_cases(rows: list[tuple[str, str]]) -> None:
    """Calls FLA once for each (case, gate) of prefill.py."""
    import environment as env
    import torch
    from cases import CASES, make_inputs

    fla = env.load_fla()
    shapes = {shape.name: shape for shape in CASES}
    with torch.inference_mode():
        for name, gate in rows:
            fla(**make_inputs(shapes[name], gate, seed=0))
            torch.cuda.synchronize()


def distinct(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """One (case, gate) for each set of FLA's kernels, which differ by tokens and heads, by whether sequences
    are packed, and by the kind of gate."""
    from cases import BOUNDED, CASES

    shapes = {shape.name: shape for shape in CASES}
    found = {}
    for name, gate in rows:
        shape = shapes[name]
        kind = gate if gate.endswith("-g") else gate in BOUNDED
        found.setdefault((shape.T, shape.H, shape.N > 1, kind), (name, gate))
    return list(found.values())


def command_for_cases(rows: list[tuple[str, str]]) -> list[str]:
    """What `compile_ahead` needs for these (case, gate)."""
    return [__file__, *(word for row in distinct(rows) for word in row)]


def compile_ahead(command: list[str], processes: int = PROCESSES) -> None:
    """Runs a Python program that calls FLA, several times at once with `--share PART/PARTS` behind it, and says
    how long that took.

    A process that fails, or is not done after LIMIT_S, costs time later and nothing else: FLA compiles what is
    missing.
    """
    begin = time.monotonic()
    started = [
        subprocess.Popen(
            [sys.executable, *command, "--share", f"{part}/{processes}"], stdout=subprocess.DEVNULL
        )
        for part in range(processes)
    ]
    failed = 0
    for process in started:
        try:
            failed += process.wait(max(1.0, LIMIT_S - (time.monotonic() - begin))) != 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            failed += 1
    text = f"FLA's kernels compiled ahead in {time.monotonic() - begin:.0f} s"
    print(text + f"; {failed} of {processes} processes failed" * bool(failed), flush=True)


if __name__ == "__main__":
    *words, _, own_share = sys.argv[1:]
    with share(own_share):
        compile_cases(list(zip(words[::2], words[1::2], strict=True)))

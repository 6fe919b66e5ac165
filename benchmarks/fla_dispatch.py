"""FLA's `chunk_kda` on our backend: what the dispatch costs on the host, and whole calls.

    python benchmarks/fla_dispatch.py                 host time, and calls through FLA with our backend
    python benchmarks/fla_dispatch.py --with-fla      beside FLA's Triton kernels, which compile for minutes
    python benchmarks/fla_dispatch.py --cases 512/H32 --gates strong

Host times are of one call on a shape that takes the device less time than the host: the kernel package's
own `chunk_kda`, `fla.ops.kda.chunk_kda` with the backend of `hf_layer.fla`, and with FLA's own backend for
the module `flash_kda`. The exit status is 1 if our dispatch adds LIMIT_US or more to the direct call. FLA's
Triton kernels are timed by a second process with FLA_FLASH_KDA=0, after the first has ended its
measurements. Writes fla_dispatch-<device>.json into --out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import environment as env  # noqa: E402
import timing  # noqa: E402
from cases import CASES, GATES, QUICK, case, input_sets  # noqa: E402

LIMIT_US = 10.0
HOST_SHAPE = case((64,), 4)
HOST_LABELS = {
    "direct": "direct",
    "our_backend": "through FLA, our backend",
    "fla_s_backend": "through FLA, its own backend",
}


def measure_host(kernel) -> dict:
    """Host milliseconds of a call: direct, through FLA with our backend, through FLA with its own."""
    from fla.ops.kda import chunk_kda

    import hf_layer.fla

    sets = input_sets(HOST_SHAPE, "strong", 2)

    def direct(inputs):
        kernel.chunk_kda(**inputs)

    def through_fla(inputs):
        chunk_kda(**inputs)

    times = {"direct": timing.time_host(direct, sets).to_json()}
    hf_layer.fla.register()
    times["our_backend"] = timing.time_host(through_fla, sets).to_json()
    hf_layer.fla.unregister()
    times["fla_s_backend"] = timing.time_host(through_fla, sets).to_json()
    times["added_us"] = 1e3 * (times["our_backend"]["median_ms"] - times["direct"]["median_ms"])
    return times


def measure_calls(chunk_kda, shapes, gates, cache_bytes: int) -> dict[str, dict]:
    """Eager timings by "case gate"."""
    times = {}
    for shape in shapes:
        for gate in gates:
            count = timing.sets_to_outgrow_cache(shape.floor_bytes(), cache_bytes)
            sets = input_sets(shape, gate, count)
            times[f"{shape.name} {gate}"] = timing.time_eager(lambda x: chunk_kda(**x), sets).to_json()
            del sets
            torch.cuda.empty_cache()
    return times


def measure_triton(options) -> dict[str, dict]:
    """The same calls in a process of their own, where FLA_FLASH_KDA=0 leaves FLA's Triton kernels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "triton.json"
        command = [sys.executable, __file__, "--triton-only", str(path), "--gates", *options.gates]
        command += ["--cases", *(shape.name for shape in options.cases)]
        subprocess.run(command, check=True, env={**os.environ, "FLA_FLASH_KDA": "0"})
        return json.loads(path.read_text())


def parse_arguments(arguments=None) -> argparse.Namespace:
    names = [shape.name for shape in CASES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=names, metavar="CASE", help=f"of {', '.join(names)}")
    parser.add_argument("--gates", nargs="+", choices=GATES, default=["strong", "softplus"], metavar="GATE")
    parser.add_argument("--with-fla", action="store_true", help="measure FLA's Triton kernels too")
    parser.add_argument("--out", type=Path, default=env.RESULTS, help="folder for the JSON file")
    parser.add_argument("--triton-only", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    wanted = chosen.cases or QUICK
    chosen.cases = [shape for shape in CASES if shape.name in wanted]
    return chosen


def print_calls(ours: dict, triton: dict | None) -> None:
    header = f"{'case':<28}{'our backend ms':>16}{'p10..p90':>18}"
    print(header + (f"{'Triton ms':>12}{'ratio':>8}" if triton else ""))
    for name, found in ours.items():
        spread = f"{found['p10_ms']:.3f}..{found['p90_ms']:.3f}"
        line = f"{name:<28}{found['median_ms']:>16.4f}{spread:>18}"
        if triton:
            theirs = triton[name]["median_ms"]
            line += f"{theirs:>12.4f}{theirs / found['median_ms']:>8.2f}"
        print(line)


def main() -> None:
    options = parse_arguments()
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    if options.triton_only:
        with torch.inference_mode():
            times = measure_calls(env.load_fla(), options.cases, options.gates, cache_bytes)
        options.triton_only.write_text(json.dumps(times))
        return

    os.environ.pop("FLA_FLASH_KDA", None)
    from fla.ops.kda import chunk_kda

    import hf_layer.fla

    kernel = env.load_kernel()
    environment = env.describe(kernel)
    env.print_environment(environment)
    with torch.inference_mode():
        host = measure_host(kernel)
        for name, label in HOST_LABELS.items():
            print(f"host time a call, {label}: {1e3 * host[name]['median_ms']:.1f} us")
        print(f"our dispatch adds {host['added_us']:.1f} us (limit {LIMIT_US:g})", flush=True)
        hf_layer.fla.register()
        ours = measure_calls(chunk_kda, options.cases, options.gates, cache_bytes)
    triton = measure_triton(options) if options.with_fla else None
    print_calls(ours, triton)
    section = {"environment": environment, "host": host, "our_backend": ours, "triton": triton}
    path = env.result_path(options.out, "fla_dispatch", environment)
    env.update_result(path, "fla_dispatch", section)
    print(f"wrote {path}")
    sys.exit(1 if host["added_us"] >= LIMIT_US else 0)


if __name__ == "__main__":
    main()

"""A whole KDA layer of Kimi-Linear-48B (hidden 2304, 32 heads, D = 128, convolution over 4 tokens), in bf16.

    python benchmarks/layer.py                                prefill of 8192 tokens, decode of 32 sequences
    python benchmarks/layer.py --tokens 2048 --sequences 8
    python benchmarks/layer.py --no-fla --no-torch

Three ways with the same weights, in one run: this package's `KimiDeltaAttention`, transformers' own module with
flash-linear-attention as its fast path, and transformers' own module in PyTorch alone. A prefill is an eager
call that fills a new cache; a decode step is one token of every sequence, its cache updated, in a CUDA graph.

Columns: median and p10..p90 of a call, the time of its matrix products alone and their share, the floor (bytes
that any implementation moves: weights, hidden states, output, states, over the copy bandwidth of this run) and
the call over it, launches, and the peak of memory over what is there before the call. Below it our operators
by themselves. FLA's kernels are compiled by several processes at once before its turn (fla_tuning.py).

layer-<device>.json in --out is written after every row, with "complete" false until the last one. The plot
comes last; --no-plots leaves it to `plots.py`, on a machine with matplotlib.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import sys
from pathlib import Path
from types import MethodType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import environment as env
import fla_tuning
import timing

HIDDEN, HEADS, D, TAPS = 2304, 32, 128, 4
TOKENS, SEQUENCES = 8192, 32
MODELING = "transformers.models.kimi_linear.modeling_kimi_linear"
FAST_PATHS = ("fla", "causal_conv1d")  # packages that transformers' model files take functions from
LABELS = {"ours": "flash-kda", "fla": "transformers + FLA", "torch": "transformers, PyTorch"}
BASELINES = ("fla", "torch")


# ------------------------------------------------------------------------------------------------- layers


@contextlib.contextmanager
def hidden_packages(names: tuple[str, ...]):
    """In here an import of these packages fails."""
    found = {name: sys.modules.pop(name, None) for name in names}
    sys.modules.update(dict.fromkeys(names))
    try:
        yield
    finally:
        for name, module in found.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def transformers_class(with_fla: bool) -> type:
    """transformers' module class; its file takes FLA's functions, or its own, when it is imported."""
    os.environ["FLA_FLASH_KDA"] = "0"  # FLA's own kernels, not ours through its dispatch
    sys.modules.pop(MODELING, None)
    with contextlib.nullcontext() if with_fla else hidden_packages(FAST_PATHS):
        return importlib.import_module(MODELING).KimiLinearDeltaAttention


def make_config():
    import transformers

    return transformers.KimiLinearConfig(
        hidden_size=HIDDEN, linear_num_heads=HEADS, linear_head_dim=D, linear_conv_kernel_dim=TAPS,
        num_hidden_layers=1, layer_types=["linear_attention"], mlp_layer_types=["dense"],
    )  # fmt: skip


def make_weights(shapes: dict[str, torch.Size], seed: int) -> dict[str, torch.Tensor]:
    """As transformers initialises them, in bf16 like the published checkpoint when it is loaded."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def uniform(low: float, high: float, shape) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, device="cuda")

    weights = {}
    for name, shape in shapes.items():
        x = 0.02 * torch.randn(shape, generator=generator, device="cuda")
        if name.endswith("A_log"):
            x = uniform(1, 16, shape).log()
        elif name.endswith("dt_bias"):
            dt = uniform(math.log(1e-3), math.log(1e-1), shape).exp()
            x = dt + torch.log(-torch.expm1(-dt))
        elif name == "o_norm.weight":
            x = torch.ones(shape, device="cuda")
        elif name == "conv1d.weight":
            x = uniform(-(TAPS**-0.5), TAPS**-0.5, shape)
        weights[name] = x.to(torch.bfloat16)
    return weights


def make_layers(classes: dict[str, type], ours, config, count: int) -> dict[str, list]:
    """`count` layers of every kind; layer i has the same weights, in the same memory, whatever its kind."""
    layers = {name: [] for name in classes}
    for seed in range(count):
        weights = None
        for name, layer_class in classes.items():
            with torch.device("meta"):
                layer = layer_class(config, 0).eval().requires_grad_(False)
            if weights is None:
                weights = make_weights({key: x.shape for key, x in layer.state_dict().items()}, seed)
            layer.load_state_dict(weights, assign=True)
            if name == "ours":
                layer.forward = MethodType(ours.forward, layer)  # as `kernels` puts it there
            layers[name].append(layer)
    return layers


def products(layer, x: torch.Tensor) -> None:
    """The layer's matrix products, and nothing else."""
    q = layer.q_proj(x)
    layer.k_proj(x)
    layer.v_proj(x)
    layer.forget_gate.f_b_proj(layer.forget_gate.f_a_proj(x))
    layer.b_proj(x)
    layer.g_b_proj(layer.g_a_proj(x))
    layer.o_proj(q)


# ------------------------------------------------------------------------------------------ measurements


def weight_bytes(layer) -> int:
    return sum(parameter.nbytes for parameter in layer.parameters())


def prefill_floor_bytes(layer, tokens: int) -> int:
    states = HEADS * D * (4 * D + 2 * 3 * TAPS)
    return weight_bytes(layer) + 2 * 2 * tokens * HIDDEN + states


def decode_floor_bytes(layer, sequences: int) -> int:
    states = HEADS * D * (4 * D + 2 * 3 * TAPS)  # recurrent in fp32, convolution in bf16; read and written
    return weight_bytes(layer) + sequences * (2 * states + 2 * 2 * HIDDEN)


def count_launches(call) -> int:
    """Kernels, copies and fills of one call."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == device and "Activity" not in event.name for event in profile.events())


def peak_memory(call) -> int:
    """Bytes that a call needs at most, results included, beside what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def relative_error(reference: torch.Tensor, x: torch.Tensor) -> float:
    reference, x = reference.double(), x.double()
    return ((x - reference).square().mean() / reference.square().mean()).sqrt().item()


class Measurement:
    """One table: what a call is, its products and its floor, and a row for every implementation.

    make_call(name) is a function of the input set, 0 .. sets - 1, that calls the implementation `name`.
    """

    def __init__(self, title: str, time, sets: int, floor_bytes: int, bandwidth: float, make_call, products):
        self.time, self.sets, self.make_call = time, list(range(sets)), make_call
        self.floor_ms = 1e3 * floor_bytes / bandwidth
        self.section = {"title": title, "floor_bytes": floor_bytes, "floor_ms": self.floor_ms, "rows": []}
        self.section["products"] = self.time(products, self.sets).to_json()

    def add(self, name: str) -> None:
        products_ms, call = self.section["products"]["median_ms"], self.make_call(name)
        row = {"name": name}
        try:
            call(0)  # compiles what compiles at the first call
            row["peak_bytes"] = peak_memory(lambda: call(0))
            row["launches"] = count_launches(lambda: call(0))
            row["time"] = self.time(call, self.sets).to_json()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            row["out_of_memory"] = True
        else:
            row["product_share"] = products_ms / row["time"]["median_ms"]
            row["over_floor"] = row["time"]["median_ms"] / self.floor_ms
        self.section["rows"].append(row)
        shown = f"{row['time']['median_ms']:.4f} ms" if "time" in row else "out of memory"
        print(f"{self.section['title']}, {LABELS[name]}: {shown}", flush=True)


def hidden_states(sequences: int, T: int) -> torch.Tensor:
    return torch.randn(sequences, T, HIDDEN, device="cuda", dtype=torch.bfloat16)


def prefill_of(layers, tokens: int, new_cache, bandwidth: float) -> Measurement:
    ours = layers["ours"]
    inputs = [hidden_states(1, tokens) for _ in ours]

    def make_call(name: str):
        return lambda i: layers[name][i](inputs[i], cache_params=new_cache())

    return Measurement(
        f"prefill, {tokens} tokens", timing.time_eager, len(ours), prefill_floor_bytes(ours[0], tokens), bandwidth,
        make_call, lambda i: products(ours[i], inputs[i]),
    )  # fmt: skip


def decode_of(layers, sequences: int, new_cache, bandwidth: float) -> Measurement:
    ours = layers["ours"]
    inputs = [hidden_states(sequences, 1) for _ in ours]

    def make_call(name: str):
        caches = [new_cache() for _ in ours]
        for layer, cache in zip(layers[name], caches, strict=True):
            layer(hidden_states(sequences, 8), cache_params=cache)
        return lambda i: layers[name][i](inputs[i], cache_params=caches[i])

    return Measurement(
        f"decode, {sequences} sequences", timing.time_graph, len(ours), decode_floor_bytes(ours[0], sequences),
        bandwidth, make_call, lambda i: products(ours[i], inputs[i]),
    )  # fmt: skip


def measure_operators(kernel, tokens: int, bandwidth: float) -> list[dict]:
    """The operators between the products of a prefill, each over what it must move."""
    layer_ops = importlib.import_module(f"{kernel.__name__}.layer_ops")
    width = HEADS * D

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    x = [normal(1, tokens, width) for _ in range(3)]
    weight, norm_weight = normal(3 * width, TAPS), normal(D)
    heads = [t.view(1, tokens, HEADS, D) for t in x]
    o, beta, A_log = normal(1, tokens, HEADS, D), normal(1, tokens, HEADS), torch.zeros(HEADS, device="cuda")
    unit, state = x[0].nbytes, 4 * HEADS * D * D

    def delta_rule(_):
        kernel.chunk_kda(
            *heads, o, beta, A_log=A_log, use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, output_final_state=True,
        )  # fmt: skip

    calls = {
        "kda_short_conv": (6 * unit, lambda _: layer_ops.short_conv(*x, weight)),
        "chunk_kda": (5 * unit + state, delta_rule),
        "gated_rms_norm": (
            3 * unit,
            lambda _: layer_ops.gated_rms_norm(o, x[0].view(o.shape), norm_weight, 1e-5),
        ),
    }
    rows = []
    for name, (floor_bytes, call) in calls.items():
        row = {"name": name, "floor_bytes": floor_bytes, "floor_ms": 1e3 * floor_bytes / bandwidth}
        row["time"] = timing.time_eager(call, [0, 1]).to_json()
        rows.append(row | {"over_floor": row["time"]["median_ms"] / row["floor_ms"]})
    return rows


def agreement_of(layers, config, new_cache):
    """error(name): relative RMS of a kind's output on 500 tokens and a step, against PyTorch in float32."""
    x = hidden_states(2, 501)

    def run(layer, x: torch.Tensor) -> torch.Tensor:
        cache = new_cache()
        return torch.cat([layer(part, cache_params=cache) for part in x.split((500, 1), dim=1)], dim=1)

    exact = transformers_class(with_fla=False)(config, 0).cuda().eval().requires_grad_(False)
    exact.load_state_dict(layers["ours"][0].state_dict())
    wanted = run(exact, x.float())
    return lambda name: relative_error(wanted, run(layers[name][0], x))


def call_fla(tokens: int, sequences: int) -> None:
    """Every kind of call that is measured with FLA, once, to compile its kernels."""
    import transformers

    config = make_config()
    layer = transformers_class(with_fla=True)(config, 0).cuda().bfloat16().eval()
    for count, lengths in ((1, (tokens,)), (2, (500, 1)), (sequences, (8, 1))):
        cache = transformers.DynamicCache(config=config)
        for T in lengths:
            layer(hidden_states(count, T), cache_params=cache)
    torch.cuda.synchronize()


# --------------------------------------------------------------------------------------------- reporting


def print_tables(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    for part in ("prefill", "decode"):
        section = result[part]
        title = f"{section['title']}: products {section['products']['median_ms']:.4f} ms, floor {section['floor_ms']:.4f} ms"
        table = Table(title=title, title_justify="left")
        columns = (
            "",
            "ms",
            "p10..p90",
            "products' share",
            "over floor",
            "launches",
            "peak MiB",
            "times ours",
        )
        for place, column in enumerate(columns):
            table.add_column(column, justify="right" if place else "left")
        ours_ms = section["rows"][0]["time"]["median_ms"]
        for row in section["rows"]:
            if "time" not in row:
                table.add_row(LABELS[row["name"]], "out of memory")
                continue
            time = row["time"]
            table.add_row(
                LABELS[row["name"]], f"{time['median_ms']:.4f}", f"{time['p10_ms']:.4f}..{time['p90_ms']:.4f}",
                f"{100 * row['product_share']:.0f} %", f"{row['over_floor']:.2f}", str(row["launches"]),
                f"{row['peak_bytes'] / 2**20:.0f}", f"{time['median_ms'] / ours_ms:.2f}",
            )  # fmt: skip
        console.print(table)
    table = Table(title=f"our operators, {result['tokens']} tokens", title_justify="left")
    for place, column in enumerate(("", "ms", "floor ms", "over floor")):
        table.add_column(column, justify="right" if place else "left")
    for row in result["operators"]:
        numbers = (row["time"]["median_ms"], row["floor_ms"])
        table.add_row(row["name"], *(f"{ms:.4f}" for ms in numbers), f"{row['over_floor']:.2f}")
    console.print(table)
    errors = ", ".join(f"{LABELS[name]} {error:.1e}" for name, error in result["errors"].items())
    console.print(f"relative RMS error of the output against float32: {errors}")


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the prefill")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="of the decode step")
    parser.add_argument("--no-fla", action="store_true", help="do not measure transformers with FLA")
    parser.add_argument("--no-torch", action="store_true", help="do not measure transformers without FLA")
    parser.add_argument("--no-plots", action="store_true", help="do not draw")
    parser.add_argument("--out", type=Path, default=env.RESULTS, help="folder for the JSON file and the plot")
    parser.add_argument("--share", help=argparse.SUPPRESS)  # fla_tuning.compile_ahead
    return parser.parse_args(arguments)


@torch.inference_mode()
def main() -> None:
    options = parse_arguments()
    if options.share:
        with fla_tuning.share(options.share):
            call_fla(options.tokens, options.sequences)
        return
    kernel = env.load_kernel()
    environment = env.describe(kernel)
    environment |= {name: env.version_of(name) for name in ("transformers", "causal-conv1d")}
    env.print_environment(environment)
    bandwidth = timing.copy_bandwidth()
    torch.cuda.empty_cache()
    print(f"device-to-device copy: {bandwidth / 1e9:.0f} GB/s (bytes read and written)", flush=True)
    result = env.Section(options.out, "layer", environment)
    result.save(
        copy_bytes_per_s=bandwidth, tokens=options.tokens, sequences=options.sequences,
        operators=measure_operators(kernel, options.tokens, bandwidth),
    )  # fmt: skip

    import transformers

    config = make_config()
    classes = {"ours": transformers_class(with_fla=False)}
    if not options.no_fla:
        classes["fla"] = transformers_class(with_fla=True)
    if not options.no_torch:
        classes["torch"] = transformers_class(with_fla=False)

    def new_cache():
        return transformers.DynamicCache(config=config)

    layers = make_layers(classes, kernel.layers.KimiDeltaAttention, config, count=2)
    error_of, errors = agreement_of(layers, config, new_cache), {}
    tables = {
        "decode": decode_of(layers, options.sequences, new_cache, bandwidth),
        "prefill": prefill_of(layers, options.tokens, new_cache, bandwidth),
    }
    result.save(errors=errors, **{name: table.section for name, table in tables.items()})
    for name in layers:
        if name == "fla":
            words = ["--tokens", str(options.tokens), "--sequences", str(options.sequences)]
            fla_tuning.compile_ahead([__file__, *words])
        errors[name] = error_of(name)
        for table in tables.values():
            table.add(name)
            result.save()
    print_tables(result.content)
    result.finish()
    if not options.no_plots:
        import plots

        for figure in plots.draw(result.path, options.out):
            print(f"wrote {figure}")


if __name__ == "__main__":
    main()

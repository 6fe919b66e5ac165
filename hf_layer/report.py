"""What runs the KDA layers of a model, layer by layer, and why.

    print(hf_layer.report(model))

    python -m hf_layer.report org/model                    # what would run on this machine
    python -m hf_layer.report org/model --device cuda --dtype bfloat16

The command reads the model's configuration and no weights: it builds the model without memory, registers our
kernel as `hf_layer.register()` does, and kernelizes.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from .loading import load_kernel, reference_reason
from .models import FAMILIES, FUNCTIONS, functions_of, hooks_reason, kda_modules, package_of, registration

COLUMNS = ("layer", "class", "prefill", "decode", "variant", "why")
RENEW = "kernelized before register() or on another device; model.set_use_kernels(True) does it again"


@dataclass(frozen=True)
class LayerReport:
    """One KDA layer.

    Attributes:
        layer: the module's name in the model.
        kind: its class.
        prefill, decode: what runs a prompt and a single token that follows: "flash-kda kernel", "flash-kda
            reference", or whose code else. "whole layer" in front: convolution and norm are ours, too.
        variant: of our package, where that is loaded; else "".
        why: where the kernel does not run, the reason; else "".
    """

    layer: str
    kind: str
    prefill: str
    decode: str
    variant: str
    why: str


@dataclass(frozen=True)
class Report:
    """All KDA layers of a model. `print` shows a table.

    Attributes:
        title: the model's class, device and dtype.
        layers: in the model's order.
    """

    title: str
    layers: tuple[LayerReport, ...]

    @property
    def kernel_runs(self) -> bool:
        """Whether every KDA layer runs on the kernel; False for a model without any."""
        return bool(self.layers) and not any(layer.why for layer in self.layers)

    def __rich__(self):
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        for column in COLUMNS:
            table.add_column(column, overflow="fold")
        for layer in self.layers:
            table.add_row(layer.layer, layer.kind, layer.prefill, layer.decode, layer.variant, layer.why)
        if not self.layers:
            table.add_row("none", "", "", "", "", f"no layer of {', '.join(FAMILIES.values())}")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=200, color_system=None)
        with console.capture() as capture:
            console.print(self, markup=False)
        return capture.get().rstrip("\n")


def report(
    model: nn.Module, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Report:
    """What runs the KDA layers of a model: without gradients, or with them while the model is training.

    Args:
        model: any module. Layers of transformers' three families and `hf_layer.KimiDeltaAttention` are found.
        device, dtype: those of the layers' inputs; by default those of their weights.

    Returns:
        A `Report`; `print` it. (Printing needs the package rich.)
    """
    rows, places = [], set()
    for name, module in _layers(model):
        weight = module.o_proj.weight
        place = torch.device(device or weight.device), dtype or weight.dtype
        places.add(place)
        rows.append(_row(model, name, module, *place))
    where = ", ".join(sorted(f"{kind} in {str(dtype).removeprefix('torch.')}" for kind, dtype in places))
    return Report(type(model).__name__ + (f" on {where}" if where else ""), tuple(rows))


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from .layer import KimiDeltaAttention

    theirs = dict(kda_modules(model))
    for name, module in model.named_modules():
        if name in theirs or isinstance(module, KimiDeltaAttention):
            yield name, module


def _row(
    model: nn.Module, name: str, module: nn.Module, device: torch.device, dtype: torch.dtype
) -> LayerReport:
    """What runs one KDA layer: a whole layer of ours, or the two functions that it calls."""
    kind, head_dim, training = type(module).__name__, module.head_dim, module.training
    package, functions = package_of(module), functions_of(module)
    if hasattr(module, "delta_rule_backend"):  # hf_layer.KimiDeltaAttention
        load = load_kernel()
        reason = load.reason or reference_reason(load.module, head_dim, device, dtype, training)
        found = [(f"hf_layer, {_ours(reason)}", load.module, reason)]
    elif package is not None:
        reason = reference_reason(package, head_dim, device, dtype, training)
        found = [(f"whole layer, {_ours(reason)}", package, reason)]
    else:
        found = []
        for function in map(functions.get, FUNCTIONS):
            package = None if function is None else package_of(function)
            if package is None:
                found.append((_theirs(function), None, _why_not(model, module, device)))
            else:
                reason = reference_reason(package, head_dim, device, dtype, training)
                found.append((_ours(reason), package, reason))
    variants = dict.fromkeys(
        Path(package.__file__).parent.name for _, package, _ in found if package is not None
    )
    reasons = dict.fromkeys(reason for _, _, reason in found if reason is not None)
    return LayerReport(name, kind, found[0][0], found[-1][0], ", ".join(variants), "; ".join(reasons))


def _ours(reason: str | None) -> str:
    return "flash-kda kernel" if reason is None else "flash-kda reference"


def _theirs(function: nn.Module | None) -> str:
    """Whose code one of transformers' function layers runs, when it is not ours."""
    forward = None if function is None else vars(function).get("forward")
    home = getattr(getattr(forward, "__func__", None), "__module__", "")
    if forward is None or home.startswith("kernels."):  # the function itself
        found = function
        for step in ("func", "implementation"):  # what kernels wraps, and what transformers wraps in that
            call = getattr(type(found), "forward", found)
            found = inspect.getclosurevars(call).nonlocals.get(step) if inspect.isfunction(call) else None
        fla = (getattr(found, "__module__", None) or "").startswith("fla.")
        return "flash-linear-attention" if fla else "transformers' PyTorch code"
    return f"kernel package {home.partition('.')[0]}"


def _why_not(model: nn.Module, module: nn.Module, device: torch.device) -> str:
    """Why a KDA layer does not run our code."""
    registered = registration()
    if not functions_of(module) and (reason := hooks_reason([type(module)])) is not None:
        return reason
    if module.training:
        return "in training mode transformers' own functions run"
    if registered is None:
        return "hf_layer.register() has not been called"
    if not getattr(model, "use_kernels", False):
        return "the model was loaded without use_kernels=True"
    if device.type not in registered.devices:
        return f"registered for {' and '.join(registered.devices)}, and this layer is on {device.type}"
    if device.type == "cuda":
        low, high = registered.capability
        major, minor = torch.cuda.get_device_capability()
        if not low <= major * 10 + minor <= high:
            return (
                f"registered for compute capabilities {low} to {high}, and this GPU has {major * 10 + minor}"
            )
    load = registered.source.load()
    if load.module is None:
        return f"no kernel could be loaded: {load.reason}"
    return RENEW


def main(words: list[str] | None = None) -> int:
    """Exit code: 0 every KDA layer would run on the kernel, 1 one would not, 2 the model can't be read."""
    parser = argparse.ArgumentParser(prog="python -m hf_layer.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="a model on the Hub, or a folder with its config.json")
    on = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=on, help="default here: %(default)s")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    arguments = parser.parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a CUDA device, and there is none on this machine")
    try:
        from rich.console import Console

        found = of_configuration(
            arguments.model, arguments.revision, arguments.device, getattr(torch, arguments.dtype)
        )
    except Exception as error:  # whatever a download, a file or transformers throws is the answer
        print(f"error: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    Console().print(found, markup=False)
    return 0 if found.kernel_runs else 1


def of_configuration(name: str, revision: str | None, device: str, dtype: torch.dtype) -> Report:
    """The report of the model that `from_pretrained(name, use_kernels=True)` would load; without weights."""
    import transformers
    from kernels import Mode
    from kernels import kernelize as kernelize_for

    from .models import register

    register(devices=("cuda", "cpu"))
    config = transformers.AutoConfig.from_pretrained(name, revision=revision)
    auto = transformers.AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        auto = transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype).eval()
    model.set_use_kernels(True)  # on the device "meta" nothing has a kernel, but the model now uses them
    kernelize_for(model, mode=Mode.INFERENCE, device=device)
    return report(model, device=device, dtype=dtype)


class _Callable(ModuleType):
    """`hf_layer.report` is this module once somebody has imported it, and a call of it is to work still."""

    def __call__(self, *args, **kwargs) -> Report:
        return report(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())

"""Our kernel inside transformers' own models: Kimi-Linear, GLM-5-next and Bailing.

    import hf_layer

    hf_layer.register()
    model = AutoModelForCausalLM.from_pretrained(..., use_kernels=True)   # every later one

    hf_layer.kernelize(model)     # or a model that is there already
    print(hf_layer.report(model))

`register` uses the hooks of the `kernels` package that transformers has in these models. It names our layers
for CUDA devices of a range of compute capabilities. That is the narrower rule beside transformers' own for
all CUDA devices, so `set_use_kernels`, which renews transformers' own, leaves it alone. Training, other
devices and other capabilities stay as transformers has them.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MethodType, ModuleType

from torch import nn

from .loading import VERSION, KernelLoad, load_kernel

__all__ = ["kernelize", "register", "unkernelize", "unregister"]

# transformers.models.<family>.modeling_<family>, and the KDA layer in it.
FAMILIES = {
    "kimi_linear": "KimiLinearDeltaAttention",
    "glm5_next": "Glm5NextTextLinearAttention",
    "bailing_hybrid": "BailingHybridDeltaAttention",
}
# transformers' function layers, each with the layer of our package that takes its place.
FUNCTIONS = {"chunk_kda": "FlashKDAChunk", "fused_recurrent_kda": "FlashKDARecurrent"}
# The layer of our package for a whole KDA layer, and the name that transformers' classes get for `kernels`.
MODULE = "KimiDeltaAttention"
DEVICES = ("cuda", "cpu")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelSource:
    """Where the kernel comes from: arguments of `load_kernel`, kept."""

    repo_id: str | None = None
    version: int | None = VERSION
    revision: str | None = None
    trust_remote_code: bool | tuple[str, ...] | None = None
    path: str | None = None

    @classmethod
    def of(cls, repo_id, version, revision, trust_remote_code, path) -> KernelSource:
        """Checks what can be checked without loading anything.

        Raises:
            FileNotFoundError: `path` is no folder.
            ValueError: `path` together with `repo_id` or `revision`.
        """
        if path is not None:
            if repo_id is not None or revision is not None:
                raise ValueError(
                    f"path: expected no repo_id and no revision with it, got {repo_id!r}, {revision!r}"
                )
            if not Path(path).is_dir():
                raise FileNotFoundError(f"path: expected a folder, got {os.fspath(path)!r}")
            path = str(Path(path).resolve())
        if isinstance(trust_remote_code, list):
            trust_remote_code = tuple(trust_remote_code)
        return cls(repo_id, version, revision, trust_remote_code, path)

    def load(self) -> KernelLoad:
        return load_kernel(**asdict(self))


@dataclass(frozen=True)
class KernelLayer:
    """One layer of the package, as the `kernels` package asks for it: loaded when a model first needs it."""

    source: KernelSource
    layer_name: str

    def load(self) -> type[nn.Module]:
        """The layer's class.

        Raises:
            FileNotFoundError: there is no kernel, or it has no such layer. transformers then leaves the
                model's own function in place, and says so at level INFO only; hence the warning here.
        """
        load = self.source.load()
        if load.module is None:
            _warn_once(f"transformers' own KDA functions run, no kernel could be loaded: {load.reason}")
            raise FileNotFoundError(load.reason)
        layer = getattr(load.module.layers, self.layer_name, None)
        if layer is None:
            raise FileNotFoundError(f"{load.status}: it has no layer {self.layer_name}")
        return layer


@dataclass(frozen=True)
class Registration:
    """What `register` did last: its arguments, and the classes that got a name for `kernels` from it."""

    source: KernelSource
    devices: tuple[str, ...]
    capability: tuple[int, int]
    classes: tuple[type, ...]


_registration: Registration | None = None


def registration() -> Registration | None:
    """What `register` did last, None if nothing or after `unregister`."""
    return _registration


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def register(
    *,
    repo_id: str | None = None,
    version: int | None = VERSION,
    revision: str | None = None,
    trust_remote_code: bool | list[str] | None = None,
    path: str | os.PathLike | None = None,
    capability: tuple[int, int] = (90, 90),
    devices: Iterable[str] = ("cuda",),
) -> None:
    """Let every model of the three families that is kernelized from now on run its KDA layers on our kernel.

    A model is kernelized by `from_pretrained(..., use_kernels=True)` and by `model.set_use_kernels(True)`,
    and again when `model.train()` or `model.eval()` changes the mode. For training it gets what transformers
    has. Nothing is loaded or asked for before a model needs it; if no kernel can be loaded then, the model
    keeps transformers' functions, the logger `hf_layer.models` warns, and `hf_layer.report(model)` has the
    reason. A second call replaces the first. Models on other devices keep what they have.

    Args:
        repo_id, version, revision, trust_remote_code, path: where the kernel comes from, as in `load_kernel`.
            Without any: LOCAL_KERNELS, the checkout's build/, the Hub.
        capability: least and greatest compute capability of the current CUDA device, major * 10 + minor, that
            ours is meant for. The default is Hopper, which the kernel is tested and measured on; (80, 129)
            takes in all that it is compiled for.
        devices: "cuda", "cpu" or both. On a CPU the kernel's CPU variant runs, or the package's reference.

    Raises:
        ImportError: transformers is not installed, or has none of the three families.
        RuntimeError: transformers' hooks are turned off, for instance because it does not accept the
            installed `kernels`. The message has the versions.
        ValueError, FileNotFoundError: an argument is not as above.
    """
    global _registration
    source = KernelSource.of(repo_id, version, revision, trust_remote_code, path)
    devices = (devices,) if isinstance(devices, str) else tuple(devices)
    if not devices or not set(devices) <= set(DEVICES):
        raise ValueError(f"devices: expected some of {DEVICES}, got {devices}")
    low, high = capability
    if not 0 <= low <= high:
        raise ValueError(f"capability: expected (least, greatest), like (90, 90), got {capability}")
    classes = import_families()
    if (reason := hooks_reason(classes)) is not None:
        raise RuntimeError(f"hf_layer.register: {reason}")

    from kernels import register_kernel_mapping, replace_kernel_forward_from_hub

    unregister()
    named = tuple(cls for cls in classes if not hasattr(cls, "kernel_layer_name"))
    for cls in named:
        replace_kernel_forward_from_hub(cls, MODULE)
    _registration = Registration(source, devices, (low, high), named)
    register_kernel_mapping(_mapping(_registration, ours=True))


def unregister() -> None:
    """Undo `register`: models that are kernelized from now on get what transformers has.

    Harmless without a `register`. Models that have our layers keep them until `unkernelize(model)`; but the
    functions of a family belong to all its models, and the next one that is kernelized changes them for all.
    """
    global _registration
    if _registration is None:
        return
    from kernels import register_kernel_mapping

    register_kernel_mapping(_mapping(_registration, ours=False))
    for cls in _registration.classes:
        del cls.kernel_layer_name, cls.kernel_condition
    _registration = None


def _mapping(registered: Registration, ours: bool) -> dict:
    """A mapping for `kernels` that puts our layers in place, or, for the same devices, transformers' own."""
    from kernels import CUDAProperties, Device, Mode
    from transformers.integrations.hub_kernels import get_kernel_mapping_transformers

    # Serves INFERENCE alone as well: that is how `kernels` falls back.
    inference = Mode.INFERENCE | Mode.TORCH_COMPILE
    mapping: dict = {}
    for name, layer_name in {**FUNCTIONS, MODULE: MODULE}.items():
        theirs = get_kernel_mapping_transformers().get(name, {}).get("cuda", {})
        if not isinstance(theirs, dict):  # one for all modes
            theirs = {Mode.FALLBACK: theirs}
        on_cuda, on_cpu = theirs, {}
        if ours:
            layer = KernelLayer(registered.source, layer_name)
            on_cuda = {mode: repo for mode, repo in theirs.items() if Mode.INFERENCE not in mode}
            on_cuda[inference] = layer
            on_cpu = {inference: layer}
        mapping[name] = {}
        if "cuda" in registered.devices:
            # `kernels` forgets no range and takes the narrowest: an entry for each capability, which a later
            # registration or its end overwrites, leaves no range behind that would win over a wider one.
            low, high = registered.capability
            for capability in range(low, high + 1):
                one = CUDAProperties(min_capability=capability, max_capability=capability)
                mapping[name][Device("cuda", one)] = on_cuda
        if "cpu" in registered.devices:
            mapping[name]["cpu"] = on_cpu
    return mapping


def import_families() -> list[type]:
    """The KDA layers' classes of the families that the installed transformers has. Imports their files.

    Raises:
        ImportError: transformers is not installed, or has none of them.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "hf_layer.register needs transformers: pip install 'flash-kda[transformers]'"
        ) from error
    classes = []
    for family, name in FAMILIES.items():
        try:
            modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith(f"transformers.models.{family}"):
                raise
            continue
        classes.append(getattr(modeling, name))
    if not classes:
        raise ImportError(
            f"transformers {transformers.__version__} has none of the models {', '.join(FAMILIES)}, "
            "which came with 5.20"
        )
    return classes


def hooks_reason(classes: Iterable[type]) -> str | None:
    """Why transformers' hooks for kernels are off in the files of these classes, or None: they are on."""
    import transformers
    from transformers.utils import import_utils

    off = [cls for cls in classes if not _functions_of_file(cls)]
    if not import_utils.is_kernels_available():
        least = getattr(import_utils, "KERNELS_MIN_VERSION", "?")
        below = getattr(import_utils, "KERNELS_MAX_VERSION", "?")
        return (
            f"transformers {transformers.__version__} accepts the package kernels from {least} to below "
            f"{below} and turned its hooks off, {_kernels_version()}; install versions of both that fit each "
            "other"
        )
    if os.environ.get("DISABLE_KERNEL_MAPPING", "0") not in ("", "0"):
        return "the environment variable DISABLE_KERNEL_MAPPING turns the package kernels off"
    if off:
        setting = os.environ.get("USE_HUB_KERNELS")
        cause = "for a reason unknown" if setting is None else f"USE_HUB_KERNELS={setting}"
        return (
            f"transformers {transformers.__version__} turned its hooks off in {off[0].__module__} ({cause})"
        )
    return None


def _kernels_version() -> str:
    try:
        import kernels
    except ImportError:
        return "and none is installed"
    return f"and {kernels.__version__} is installed"


def _functions_of_file(cls: type) -> list[nn.Module]:
    """The function layers in the file of a KDA class; none if transformers' hooks are off."""
    names = vars(sys.modules[cls.__module__]).values()
    return [
        x for x in names if isinstance(x, nn.Module) and getattr(x, "kernel_layer_name", None) in FUNCTIONS
    ]


def kda_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every KDA layer of transformers in a model."""
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in FAMILIES.values() and cls.__module__.startswith("transformers.models."):
                yield name, module
                break


def functions_of(module: nn.Module) -> dict[str, nn.Module]:
    """The function layers that a KDA layer calls, by their names in FUNCTIONS; empty without hooks."""
    functions = vars(module).get("_kernel_funcs", {}).values()
    named = {type(function).kernel_layer_name: function for function in functions}
    return {name: named[name] for name in FUNCTIONS if name in named}


def package_of(module: nn.Module) -> ModuleType | None:
    """The kernel package whose layer's forward a module runs, or None if that is not one of ours."""
    forward = vars(module).get("forward")
    home = getattr(getattr(forward, "__func__", None), "__module__", None) or ""
    name, _, file = home.rpartition(".")
    return sys.modules.get(name) if name.startswith("_flash_kda_") and file == "layers" else None


def kernelize(
    model: nn.Module,
    *,
    repo_id: str | None = None,
    version: int | None = VERSION,
    revision: str | None = None,
    trust_remote_code: bool | list[str] | None = None,
    path: str | os.PathLike | None = None,
) -> nn.Module:
    """Put our layers into a model of the three families that is there already; returns the model.

    It works on any device and with any version of the package kernels, `register` or not. Where the kernel
    does not serve a call (dtype, head dimension, gradients, device) the same layer runs its reference.
    `unkernelize(model)` undoes it. A model with `use_kernels=True` forgets it at the next `train()` or
    `eval()` that changes the mode.

    Args:
        model: a model with KDA layers of transformers somewhere in it.
        repo_id, version, revision, trust_remote_code, path: where the kernel comes from, as in `load_kernel`.

    Raises:
        ValueError: the model has no such layer.
        RuntimeError: no kernel can be loaded; the message says why.
    """
    load = KernelSource.of(repo_id, version, revision, trust_remote_code, path).load()
    if load.module is None:
        raise RuntimeError(f"hf_layer.kernelize: no kernel could be loaded: {load.reason}")
    modules = [module for _, module in kda_modules(model)]
    if not modules:
        raise ValueError(
            f"model: expected one with KDA layers ({', '.join(FAMILIES.values())}), "
            f"got {type(model).__name__}"
        )
    whole = getattr(load.module.layers, MODULE, None)
    for module in modules:
        if whole is not None:
            module.forward = MethodType(whole.forward, module)
            continue
        functions = functions_of(module)
        if not functions:
            raise RuntimeError(f"hf_layer.kernelize: {hooks_reason([type(module)])}")
        for name, function in functions.items():
            function.forward = MethodType(getattr(load.module.layers, FUNCTIONS[name]).forward, function)
    return model


def unkernelize(model: nn.Module) -> nn.Module:
    """Take our layers out of a model again, however they came there; returns it.

    Its KDA layers then run transformers' own code. The two functions that its KDA layers call belong to all
    models of its family in the process, so ours leave those, too.
    """
    for _, module in kda_modules(model):
        for one in (module, *functions_of(module).values()):
            if package_of(one) is not None:
                del one.forward
    return model

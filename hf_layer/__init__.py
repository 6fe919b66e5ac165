"""KDA layers for PyTorch models on top of the flash-kda kernel.

    from hf_layer import KimiDeltaAttention, kernel_status, load_kernel
    from hf_layer import kernelize, register, report, unkernelize, unregister   # transformers' own models

Importing this package touches neither the network nor the kernel; names are resolved on first use.
"""

from __future__ import annotations

import importlib

_HOME = {
    "KDACache": "cache",
    "KernelLoad": "loading",
    "KimiDeltaAttention": "layer",
    "kernel_status": "loading",
    "kernelize": "models",
    "load_kernel": "loading",
    "register": "models",
    "report": "report",
    "unkernelize": "models",
    "unregister": "models",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

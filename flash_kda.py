"""The importable front of the flash-kda kernel: `import flash_kda` and use it as a module.

Every public name is handed on to the kernel package that `hf_layer.load_kernel()` finds, at the first use of
a name; importing this module loads nothing and asks nobody. flash-linear-attention finds it by its name and
calls `flash_kda.fwd` from its own `chunk_kda` (FLA_FLASH_KDA=0 turns that off).

Without a kernel, on a machine without a GPU for instance, `chunk_kda`, `fused_recurrent_kda`,
`fused_kda_decode`, `layers` and `reference` are still there: the same calls with the same signatures, which run the reference. bfloat16 CUDA tensors, which only the
kernel serves at speed, are then a RuntimeError, and `fwd`, which is the kernel, an ImportError; both say why
nothing could be loaded.
"""

from __future__ import annotations

__all__ = ["chunk_kda", "fused_kda_decode", "fused_recurrent_kda", "fwd", "layers", "reference"]


def __getattr__(name: str):
    if name.startswith("_"):  # what introspection asks for is never a reason to load a kernel
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hf_layer.loading import load_kernel

    load = load_kernel()
    if load.module is not None:
        return getattr(load.module, name)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "fwd":
        raise ImportError(
            f"flash_kda.fwd needs the kernel, and none could be loaded: {load.reason}", name=__name__
        )
    from hf_layer import api, decode, fused_decode, hub_layers, reference

    return {
        "chunk_kda": api.chunk_kda,
        "fused_kda_decode": fused_decode.fused_kda_decode,
        "fused_recurrent_kda": decode.fused_recurrent_kda,
        "layers": hub_layers,
        "reference": reference,
    }[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

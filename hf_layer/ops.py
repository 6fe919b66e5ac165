"""The compiled operator's place in this package, which has none.

`hf_layer/api.py` is the kernel package's own `api.py`: the same `chunk_kda`, with the same signature, for
machines without a kernel. There it serves whatever goes to the reference; what only the kernel could serve
ends up here.
"""

from __future__ import annotations

from .loading import load_kernel

device_type = "cuda"  # whose bfloat16 tensors are sent here rather than to a reference that is slow on a GPU


def kda_prefill(*args) -> None:
    """Raises RuntimeError with the reason why no kernel could be loaded."""
    raise RuntimeError(
        f"flash_kda: this call needs the kernel, and none could be loaded: {load_kernel().reason}"
    )

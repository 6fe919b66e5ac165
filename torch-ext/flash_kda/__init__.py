"""Kimi Delta Attention: a prefill kernel for GPUs and CPUs, and a PyTorch reference for all that it does not
serve.

chunk_kda   flash-linear-attention's call, by the kernel where it can, else by the reference
fwd         the kernel itself, writing into tensors of the caller
layers      layers for the `kernels` package
reference   the definition and the chunk form in plain PyTorch
"""

from .api import chunk_kda, fwd

from . import layers, reference  # isort: skip  (layers uses chunk_kda from above)

__all__ = ["chunk_kda", "fwd", "layers", "reference"]

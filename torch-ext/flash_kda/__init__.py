"""Kimi Delta Attention: kernels for prefill and decoding on GPUs and CPUs, and a PyTorch reference for all
that they do not serve.

chunk_kda            flash-linear-attention's call for prompts, by the kernel where it can, else the reference
fused_recurrent_kda  the same for decoding: a token or a few of each sequence, states in place or in a pool
fused_kda_decode     a layer's decode step between its projections: convolution, recurrence, gated norm
fwd                  the prefill kernel itself, writing into tensors of the caller
layers               layers for the `kernels` package
reference            the definition and the chunk form in plain PyTorch
"""

from .api import chunk_kda, fwd
from .decode import fused_recurrent_kda
from .fused_decode import fused_kda_decode

from . import layers, reference  # isort: skip  (layers uses the calls from above)

__all__ = ["chunk_kda", "fused_kda_decode", "fused_recurrent_kda", "fwd", "layers", "reference"]

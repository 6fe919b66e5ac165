"""The compiled operators' place in this package, which has none.

`hf_layer/api.py` and `hf_layer/decode.py` are the kernel package's own: the same `chunk_kda` and
`fused_recurrent_kda`, with the same signatures, for machines without a kernel. There they serve whatever goes
to the reference; what only the kernel could serve ends up here.
"""

from __future__ import annotations

from .loading import load_kernel

device_type = "cuda"  # whose bfloat16 tensors are sent here rather than to a reference that is slow on a GPU


def _no_kernel(*args) -> None:
    """Raises RuntimeError with the reason why no kernel could be loaded."""
    raise RuntimeError(
        f"flash_kda: this call needs the kernel, and none could be loaded: {load_kernel().reason}"
    )


kda_prefill = kda_decode = kda_prefill_new = kda_decode_new = kda_short_conv = gated_rms_norm = _no_kernel
kda_fused_decode = None  # fused_kda_decode is then made of other calls, which are sent here if need be

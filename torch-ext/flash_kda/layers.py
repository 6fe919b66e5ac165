"""Layers that the `kernels` package puts in place of transformers' KDA functions and modules.

    FlashKDAChunk        for the function layer "chunk_kda" (prefill, also continued)
    FlashKDARecurrent    for the function layer "fused_recurrent_kda" (decode)
    KimiDeltaAttention   for the forward of the whole module

of Kimi-Linear, GLM-5-next and Bailing models. A function layer is one object per modeling file, so what is
put there serves every model of that family in the process: CPU tensors, other dtypes, other head dims and
grad mode are served too, by the reference. The state that comes in is the model's live cache tensor; it is
read and never written.
"""

from __future__ import annotations

import torch
from torch import nn

from .api import chunk_kda
from .decode import fused_recurrent_kda
from .module import kimi_delta_attention

__all__ = ["FlashKDAChunk", "FlashKDARecurrent", "KimiDeltaAttention"]


def packed_boundaries(kwargs: dict) -> torch.Tensor | None:
    """Where packed sequences begin and end, [N + 1], from the keywords transformers hands to every layer, or
    None.

    Raises:
        ValueError: sequences are marked by `seq_idx` alone; ignoring that would mix them.
    """
    for name in ("cu_seq_lens_q", "cu_seqlens"):  # flash attention's name (the data collator's), then FLA's
        if kwargs.get(name) is not None:
            return kwargs[name]
    if kwargs.get("seq_idx") is not None:
        raise ValueError(
            "seq_idx: expected cu_seq_lens_q (or cu_seqlens) with it to keep packed sequences apart, got None"
        )
    return None


class FlashKDAChunk(nn.Module):
    """Kimi Delta Attention over a prompt or the next part of one; see `chunk_kda` for the formula."""

    has_backward = False
    can_torch_compile = True

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        chunk_size: int = 64,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Args:
            query, key: [B, T, H, K], any strides.
            value: [B, T, HV, V], any strides.
            g: [B, T, HV, K], log decay (already activated), unbounded below.
            beta: [B, T, HV], after the sigmoid.
            chunk_size: taken for the signature's sake; the result does not depend on it.
            initial_state: [N, HV, K, V] or None for zeros. N is B, or the number of packed sequences.
            output_final_state: also return the state after the last token.
            use_qk_l2norm_in_kernel: L2-normalise query and key first.
            **kwargs: `cu_seq_lens_q` or `cu_seqlens` [N + 1], int32 or int64, marks sequences packed in one
                row (B = 1). Other names, which transformers hands to every layer, are not looked at.

        Returns:
            (o, final_state): [B, T, HV, V] in value's dtype; [N, HV, K, V] float32, or None if not asked for.

        Raises:
            TypeError, ValueError, RuntimeError: as `chunk_kda`, with the argument's name.
        """
        return chunk_kda(
            query,
            key,
            value,
            g,
            beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            cu_seqlens=packed_boundaries(kwargs),
        )


class FlashKDARecurrent(nn.Module):
    """Kimi Delta Attention over one token (or a few) from a state; otherwise as `FlashKDAChunk`."""

    has_backward = False
    can_torch_compile = True

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor | None,
        output_final_state: bool,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `FlashKDAChunk.forward`, token by token; the state that comes in is not written."""
        return fused_recurrent_kda(
            query,
            key,
            value,
            g,
            beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            cu_seqlens=packed_boundaries(kwargs),
        )


class KimiDeltaAttention(nn.Module):
    """The forward of KimiLinearDeltaAttention, Glm5NextTextLinearAttention and BailingHybridDeltaAttention.

    `kernels` binds `forward` to transformers' module: `self` is that module, with its parameters. What the
    kernels do not serve (other devices, dtypes, head dimensions, gradients) runs in PyTorch.
    """

    has_backward = False
    can_torch_compile = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params=None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Args:
            hidden_states: [B, T, hidden_size].
            cache_params: transformers' cache or None; read and updated, in its own layout.
            attention_mask: [B, T], 0 at padding tokens, whose hidden states count as zeros.
            **kwargs: `cu_seq_lens_q` or `cu_seqlens` [N + 1], int32 or int64, marks sequences packed in one
                row (B = 1), which do not mix; a cache has N rows then. Other names are not looked at.

        Returns:
            [B, T, hidden_size] in the dtype of `hidden_states`.

        Raises:
            TypeError, ValueError, RuntimeError: as `chunk_kda`, with the argument's name.
        """
        if self.activation not in (
            "silu",
            "swish",
        ):  # of the short convolution; no published model has another
            return type(self).forward(self, hidden_states, cache_params, attention_mask, **kwargs)
        return kimi_delta_attention(
            self, hidden_states, cache_params, attention_mask, packed_boundaries(kwargs)
        )

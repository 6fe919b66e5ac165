"""A small cache for `KimiDeltaAttention`, for use without transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class KDACache:
    """Convolution and recurrent states of KDA layers, with the methods of transformers' `DynamicCache` that
    they use.

    Per layer it holds the last `conv_kernel_size` inputs of the short convolution, [B, 3 * H * D,
    conv_kernel_size] in the model's dtype, and the recurrent state, [B, H, K, V] in float32. States are
    replaced, never written in place, so what a getter returned stays as it was.
    """

    def __init__(self) -> None:
        self.conv_states: dict[int, torch.Tensor] = {}
        self.recurrent_states: dict[int, torch.Tensor] = {}

    def get_conv_state(self, layer_idx: int) -> torch.Tensor | None:
        """Convolution state of a layer, or None before its first token."""
        return self.conv_states.get(layer_idx)

    def get_recurrent_state(self, layer_idx: int) -> torch.Tensor | None:
        """Recurrent state of a layer, [B, H, K, V] float32, or None before its first token."""
        return self.recurrent_states.get(layer_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, conv_kernel_size: int
    ) -> torch.Tensor:
        """Append the new inputs [B, C, T]; return them behind those that the convolution must also see."""
        before = self.conv_states.get(layer_idx)
        if before is not None:
            conv_states = torch.cat([before, conv_states], dim=-1)
        missing = conv_kernel_size - conv_states.shape[-1]
        if missing > 0:
            conv_states = F.pad(conv_states, (missing, 0))
        self.conv_states[layer_idx] = conv_states[..., -conv_kernel_size:].clone()
        return conv_states

    def update_recurrent_state(self, recurrent_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Replace the recurrent state of a layer."""
        self.recurrent_states[layer_idx] = recurrent_states
        return recurrent_states

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select batch rows by index, [B'] int64, as beam search does."""
        for states in (self.conv_states, self.recurrent_states):
            for layer_idx, state in states.items():
                states[layer_idx] = state.index_select(0, beam_idx.to(state.device))

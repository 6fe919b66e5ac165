"""The whole KDA layer of transformers' Kimi-Linear, GLM-5-next and Bailing models, from hidden states to output.

`kimi_delta_attention` computes what their modules compute, from their own parameters and in their own cache:

    q, k, v   one product each, read by one operator for the short convolution and SiLU
    g, beta   the gate's and beta's logits, activated inside the delta rule
    o         the delta rule, `chunk_kda`, or `fused_recurrent_kda` for one token from a state
    output    gated RMS norm in one operator, in place, and the output projection

In a decode step on a GPU, one token of every sequence with both states in the cache, `fused_kda_decode` is all
that stands between the projections, one kernel that updates both states in place.

The products stay apart. One for q, k and v would need their weights in one piece: a copy in every call, or a
second copy of nearly all the layer's weights in memory, which would go stale when somebody writes to `.data`.
Modules are called, weights are not read past them, so adapters and quantised layers work.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from .api import HEAD_DIM, chunk_kda
from .decode import fused_recurrent_kda
from .fused_decode import TAPS, fused_kda_decode
from .layer_ops import gated_rms_norm, short_conv
from .ops import kda_fused_decode

__all__ = ["kimi_delta_attention"]

LOWER_BOUND_MIN = -5.0  # of the kernel's gate


def kimi_delta_attention(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    cache_params,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """Attend over the new tokens, continuing from the cache if it holds earlier ones.

    Args:
        layer: a KimiLinearDeltaAttention, Glm5NextTextLinearAttention or BailingHybridDeltaAttention.
        hidden_states: [B, T, hidden_size].
        cache_params: transformers' cache, or None. It holds the last inputs of the convolution, [N, C, W] in the
            dtype of `hidden_states`, and the recurrent state, [N, HV, K, V] float32; both are updated.
        attention_mask: [B, T], 0 at padding tokens, whose hidden states count as zeros; or None.
        cu_seqlens: int32 or int64 [N + 1], with B = 1: N sequences packed along T, which do not mix; the cache
            then has N rows. None: N = B.

    Returns:
        [B, T, hidden_size] in the dtype of `hidden_states`.

    Raises:
        ValueError: `cu_seqlens` with B != 1, or with a cache of another number of sequences.
    """
    if attention_mask is not None:
        hidden_states = (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
    B, T = hidden_states.shape[:2]
    heads = (B, T, -1, layer.head_dim)
    conv_state = recurrent_state = None
    if cache_params is not None:
        conv_state = cache_params.get_conv_state(layer.layer_idx)
        recurrent_state = cache_params.get_recurrent_state(layer.layer_idx)
    if cu_seqlens is not None:
        _check_packing(B, cu_seqlens.shape[0] - 1, conv_state)

    with _offloaded_parameters(layer.conv1d, layer.forget_gate, layer.o_norm):
        if T == 1 and cu_seqlens is None and _can_fuse(layer, hidden_states, conv_state, recurrent_state):
            return layer.o_proj(_decode_step(layer, hidden_states, heads, conv_state, recurrent_state))
        q, k, v = _convolve(layer, hidden_states, cache_params, conv_state, cu_seqlens)
        g, gate_options = _forget_gate(layer.forget_gate, hidden_states)
        delta_rule = chunk_kda if recurrent_state is None or T > 1 else fused_recurrent_kda
        o, final_state = delta_rule(
            *(x.view(heads) for x in (q, k, v, g)),
            layer.b_proj(hidden_states),
            initial_state=recurrent_state,
            output_final_state=cache_params is not None,
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            cu_seqlens=cu_seqlens,
            **gate_options,
        )
        del q, k, v, g  # before the next large tensors
        if cache_params is not None:
            cache_params.update_recurrent_state(final_state.float(), layer.layer_idx)
        return layer.o_proj(_normalise(layer, o, hidden_states).flatten(-2))


def _check_packing(B: int, N: int, conv_state: torch.Tensor | None) -> None:
    if B != 1:
        raise ValueError(f"hidden_states: expected B = 1 with packed sequences, got B = {B}")
    if conv_state is not None and len(conv_state) != N:
        raise ValueError(
            f"cache_params: expected states of the N = {N} packed sequences, got {len(conv_state)}"
        )


def _can_fuse(layer, hidden_states, conv_state, recurrent_state) -> bool:
    """Whether the fused kernel serves a token of every sequence. It has no gradient: it works in place."""
    return (
        kda_fused_decode is not None
        and hidden_states.is_cuda
        and hidden_states.dtype == torch.bfloat16
        and layer.head_dim == HEAD_DIM
        and conv_state is not None
        and recurrent_state is not None
        and layer.conv_kernel_size == conv_state.shape[-1] == TAPS
        and not torch.is_grad_enabled()
    )


def _decode_step(layer, hidden_states, heads, conv_state, recurrent_state) -> torch.Tensor:
    """One token of every sequence: [B, 1, HV * D] before the output projection."""
    g, gate_options = _forget_gate(layer.forget_gate, hidden_states)
    out = fused_kda_decode(
        *(project(hidden_states).view(heads) for project in (layer.q_proj, layer.k_proj, layer.v_proj)),
        g.view(heads),
        layer.b_proj(hidden_states),
        _output_gate(layer, hidden_states).view(heads),
        conv_state,
        recurrent_state,
        layer.conv1d.weight,
        layer.o_norm.weight,
        conv_bias=layer.conv1d.bias,
        norm_eps=layer.o_norm.variance_epsilon,
        **gate_options,
    )
    return out.flatten(-2)


def _convolve(layer, hidden_states, cache, conv_state, cu_seqlens):
    """q, k, v [B, T, channels] after the short convolution and SiLU; the cache's conv state moves on."""
    q, k, v = (project(hidden_states) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    conv, width = layer.conv1d, layer.conv_kernel_size
    # transformers' cache holds the last inputs. One that can be cropped keeps them all from its next update on,
    # except in a step of one token.
    keeps_all = (
        cache is not None
        and hidden_states.shape[1] > 1
        and getattr(cache.layers[layer.layer_idx], "record_past", False)
    )
    if cache is None or keeps_all:
        final_state = None
    elif conv_state is not None:
        final_state = conv_state  # in place
    else:
        N = len(q) if cu_seqlens is None else cu_seqlens.shape[0] - 1
        final_state = q.new_empty(N, conv.weight.shape[0], width)
    out = short_conv(q, k, v, conv.weight.squeeze(1), conv.bias, conv_state, final_state, cu_seqlens)
    if keeps_all:
        inputs = torch.cat([q, k, v], dim=-1).transpose(1, 2)
        cache.update_conv_state(inputs, layer.layer_idx, conv_kernel_size=width)
    elif final_state is not conv_state:
        cache.update_conv_state(final_state, layer.layer_idx, conv_kernel_size=width)
    return out


def _forget_gate(gate: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """The gate's logits and `chunk_kda`'s arguments for them; the log decay itself where the kernel's gates do
    not fit."""
    if hasattr(gate, "f_b_proj"):  # Kimi-Linear and GLM-5-next
        lower_bound = getattr(gate, "safe_gate_lower_bound", None)
    else:  # Bailing
        lower_bound = gate.lower_bound if gate.safe_gate else None
    if lower_bound is not None and not LOWER_BOUND_MIN <= lower_bound <= 0.0:
        return gate(hidden_states), {"use_gate_in_kernel": False}
    logits = (
        gate.f_b_proj(gate.f_a_proj(hidden_states))
        if hasattr(gate, "f_b_proj")
        else gate.f_proj(hidden_states)
    )
    return logits, dict(
        use_gate_in_kernel=True, A_log=gate.A_log.flatten(), dt_bias=gate.dt_bias, lower_bound=lower_bound
    )


def _output_gate(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    if hasattr(layer, "g_proj"):  # Bailing
        return layer.g_proj(hidden_states)
    return layer.g_b_proj(layer.g_a_proj(hidden_states))


def _normalise(layer: nn.Module, o: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """The gated RMS norm of o [B, T, HV, D], written over o where no gradient needs it."""
    norm = layer.o_norm
    gate = _output_gate(layer, hidden_states).view(o.shape)
    return gated_rms_norm(
        o, gate, norm.weight, norm.variance_epsilon, out=None if torch.is_grad_enabled() else o
    )


@contextlib.contextmanager
def _offloaded_parameters(*modules: nn.Module):
    """Parameters that accelerate keeps elsewhere are here while this lives: they are read without a call of
    their module, which would fetch them."""
    hooked = [(module, module._hf_hook) for module in modules if hasattr(module, "_hf_hook")]
    for module, hook in hooked:
        hook.pre_forward(module)
    yield
    for module, hook in reversed(hooked):
        hook.post_forward(module, ())

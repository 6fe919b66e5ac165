"""Kimi Delta Attention as a PyTorch module, with transformers' parameter names.

The layer of "Kimi Linear: An Expressive, Efficient Attention Architecture" (arXiv:2510.26692): projections, a
short causal convolution with SiLU, the gated delta rule with one decay per key channel, and an RMS norm with
a sigmoid gate. A state dict of transformers' KimiLinearDeltaAttention or Glm5NextTextLinearAttention loads
strictly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from . import reference
from .hub_layers import packed_boundaries
from .loading import load_kernel, reference_reason

GATES = ("softplus", "lower_bound")


def kernel_for(x: torch.Tensor) -> ModuleType | None:
    """The kernel package for inputs like x [B, T, H, K], or None. CPU tensors have one where no GPU is."""
    on_cpu = x.device.type == "cpu" and x.shape[-1] == 128 and not torch.cuda.is_available()
    return load_kernel().module if x.is_cuda or on_cpu else None


def fla_for_training(q: torch.Tensor, lower_bound: float | None) -> Callable | None:
    """flash-linear-attention's `chunk_kda`, which has a backward kernel, where it is installed and made for
    the inputs; None where the differentiable reference is to run: on other devices, and in float32, which
    FLA's matrix products round to TF32."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or lower_bound == 0:
        return None
    try:
        from fla.ops.kda import chunk_kda
    except ImportError:
        return None
    return chunk_kda


class ForgetGate(nn.Module):
    """Low-rank projection to the gate logits, and the parameters that turn logits into a log decay.

    The activation itself runs inside the delta rule, in float32:

        softplus:     -exp(A_log) * softplus(logits + dt_bias)
        lower_bound:  lower_bound * sigmoid(exp(A_log) * (logits + dt_bias))

    Parameters: dt_bias [H * D]; A_log [1, 1, H, 1], which also loads from any other shape with H elements.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, lower_bound: float | None):
        super().__init__()
        self.lower_bound = lower_bound
        self.f_a_proj = nn.Linear(hidden_size, head_dim, bias=False)
        self.f_b_proj = nn.Linear(head_dim, num_heads * head_dim, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(num_heads * head_dim))
        self.A_log = nn.Parameter(torch.empty(1, 1, num_heads, 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """FLA's initialisation: A in [1, 16], or 1 with a lower bound; softplus(dt_bias) in [1e-3, 1e-1]."""
        if self.lower_bound is None:
            self.A_log.uniform_(1.0, 16.0).log_()
        else:
            self.A_log.zero_()
        dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> raw gate logits [..., H * D]."""
        return self.f_b_proj(self.f_a_proj(hidden_states))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        key = prefix + "A_log"
        if key in state_dict and state_dict[key].numel() == self.A_log.numel():
            state_dict[key] = state_dict[key].reshape(self.A_log.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class GatedRMSNorm(nn.Module):
    """weight * x / rms(x) * sigmoid(gate), computed in float32; x, gate and result [..., D], in x's dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return (normed * torch.sigmoid(gate.float())).to(x.dtype)


class KimiDeltaAttention(nn.Module):
    """One KDA layer. The delta rule runs on the flash-kda kernel where that serves the call, else on the
    reference; for training on a GPU in 16 bits, on flash-linear-attention's kernels if they are installed.

    Args:
        hidden_size: width of the model.
        num_heads: heads H.
        head_dim: key and value width D of a head. The kernel serves 128.
        conv_kernel_size: taps of the short convolution.
        gate: "softplus" (Kimi-Linear) or "lower_bound" (GLM-5-next).
        lower_bound: least log decay of a token with the "lower_bound" gate, in [-5, 0].
        norm_eps: epsilon of the output norm.
        layer_idx: which entry of the cache belongs to this layer.

    Raises:
        ValueError: for an unknown gate or a lower_bound out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int = 128,
        conv_kernel_size: int = 4,
        gate: str = "softplus",
        lower_bound: float = -5.0,
        norm_eps: float = 1e-5,
        layer_idx: int = 0,
    ):
        super().__init__()
        if gate not in GATES:
            raise ValueError(f"gate: expected one of {GATES}, got {gate!r}")
        if not -5.0 <= lower_bound <= 0.0:
            raise ValueError(f"lower_bound: expected a value in [-5, 0], got {lower_bound}")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.conv_kernel_size = conv_kernel_size
        self.layer_idx = layer_idx

        width = num_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.conv1d = nn.Conv1d(
            3 * width, 3 * width, conv_kernel_size, groups=3 * width, padding=conv_kernel_size - 1, bias=False
        )
        self.forget_gate = ForgetGate(
            hidden_size, num_heads, head_dim, lower_bound if gate == "lower_bound" else None
        )
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.g_a_proj = nn.Linear(hidden_size, head_dim, bias=False)
        self.g_b_proj = nn.Linear(head_dim, width, bias=False)
        self.o_norm = GatedRMSNorm(head_dim, norm_eps)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)

    @classmethod
    def from_config(cls, config, layer_idx: int) -> KimiDeltaAttention:
        """The layer that transformers' KimiLinearConfig or Glm5NextTextConfig describes.

        Raises:
            ValueError: if the config asks for another activation of the short convolution than SiLU.
        """
        if config.hidden_act not in ("silu", "swish"):
            raise ValueError(f"config.hidden_act: expected 'silu', got {config.hidden_act!r}")
        lower_bound = getattr(config, "linear_lower_bound", None)
        gate = {} if lower_bound is None else {"gate": "lower_bound", "lower_bound": lower_bound}
        return cls(
            hidden_size=config.hidden_size,
            num_heads=config.linear_num_heads,
            head_dim=config.linear_head_dim,
            conv_kernel_size=config.linear_conv_kernel_dim,
            norm_eps=config.rms_norm_eps,
            layer_idx=layer_idx,
            **gate,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params=None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Attend over the new tokens, continuing from the cache if it holds earlier ones.

        Args:
            hidden_states: [B, T, hidden_size].
            cache_params: transformers' cache or `KDACache`; read and updated. Recurrent states in it are
                [B, H, K, V] float32.
            attention_mask: [B, T], 0 at padding tokens, which then leave the states alone but for the decay.
            **kwargs: `cu_seq_lens_q` or `cu_seqlens` [N + 1], int32 or int64, marks N sequences packed in one
                row (B = 1); the cache must be empty then, and holds N rows afterwards. Other names, which
                transformers hands to every layer, are not looked at.

        Returns:
            [B, T, hidden_size] in the dtype of `hidden_states`.

        Raises:
            ValueError: for a packed input with B != 1, with a cache that already holds tokens, or marked by
                `seq_idx` alone.
        """
        if attention_mask is not None:
            hidden_states = (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
        cu_seqlens = packed_boundaries(kwargs)
        state = None if cache_params is None else cache_params.get_recurrent_state(self.layer_idx)
        if cu_seqlens is not None and hidden_states.shape[0] != 1:
            raise ValueError(
                f"hidden_states: expected B = 1 with packed sequences, got B = {hidden_states.shape[0]}"
            )
        if cu_seqlens is not None and state is not None:
            raise ValueError(
                "cache_params: expected an empty cache with packed sequences, got one that holds tokens"
            )

        mixed = torch.cat(
            [self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)], dim=-1
        )
        if cu_seqlens is None:
            mixed = self._short_conv(mixed, cache_params)
        else:
            mixed = self._packed_short_conv(mixed, cu_seqlens, cache_params)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in F.silu(mixed).chunk(3, dim=-1))

        g = self.forget_gate(hidden_states).unflatten(-1, (self.num_heads, self.head_dim))
        o, state = self._delta_rule(
            q, k, v, g, self.b_proj(hidden_states), state, cache_params is not None, cu_seqlens
        )
        if cache_params is not None:
            cache_params.update_recurrent_state(state.float(), self.layer_idx)

        gate = self.g_b_proj(self.g_a_proj(hidden_states)).unflatten(-1, (self.num_heads, self.head_dim))
        return self.o_proj(self.o_norm(o, gate).flatten(-2))

    def delta_rule_backend(self, device: torch.device, dtype: torch.dtype) -> str:
        """One line: what runs the delta rule of inputs on `device` in `dtype` (without grad), and why."""
        load = load_kernel()
        if load.module is None:
            return load.status
        reason = reference_reason(load.module, self.head_dim, device, dtype)
        return load.status if reason is None else f"reference: {reason}"

    def _delta_rule(self, q, k, v, g, beta, state, output_final_state, cu_seqlens):
        """Raw gate and beta logits in, (o, final state) out. The kernel's calls fall back by themselves."""
        A_log, dt_bias = self.forget_gate.A_log.flatten().float(), self.forget_gate.dt_bias.float()
        lower_bound = self.forget_gate.lower_bound
        more = {}
        kernel, one_token = kernel_for(q), q.shape[1] == 1
        if kernel is not None:
            run = kernel.fused_recurrent_kda if one_token else kernel.chunk_kda
        else:
            run = reference.recurrent_kda if one_token else reference.chunk_kda
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, beta, A_log, dt_bias)):
            if (fla := fla_for_training(q, lower_bound)) is not None:
                run, more = fla, {"safe_gate": lower_bound is not None}
                cu_seqlens = None if cu_seqlens is None else cu_seqlens.long()
        return run(
            q,
            k,
            v,
            g,
            beta,
            A_log=A_log,
            dt_bias=dt_bias,
            lower_bound=lower_bound,
            initial_state=state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            cu_seqlens=cu_seqlens,
            **more,
        )

    def _short_conv(self, x: torch.Tensor, cache) -> torch.Tensor:
        """Causal depthwise convolution of [B, T, C]; the cache supplies the inputs before the first token."""
        tokens = x.shape[1]
        x = x.transpose(1, 2)
        if cache is not None:
            x = cache.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        end = x.shape[-1]
        return self.conv1d(x)[..., end - tokens : end].transpose(1, 2)

    def _packed_short_conv(self, x: torch.Tensor, cu_seqlens: torch.Tensor, cache) -> torch.Tensor:
        """The same for N sequences in one row [1, T, C]: no tap reaches over the start of its sequence."""
        token = torch.arange(x.shape[1], device=x.device)
        start = cu_seqlens[torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)]
        taps = self.conv1d.weight[:, 0].flip(-1)  # taps[:, j] weighs the input j tokens back
        out = x * taps[:, 0]
        for back in range(1, self.conv_kernel_size):
            shifted = F.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
            out = out + torch.where((token - back >= start)[:, None], shifted, 0) * taps[:, back]
        if cache is not None:
            window = torch.arange(-self.conv_kernel_size, 0, device=x.device)
            last = cu_seqlens[1:, None] + window
            inside = last >= cu_seqlens[:-1, None]
            rows = torch.where(inside[..., None], x[0, last.clamp(0, x.shape[1] - 1)], 0)
            cache.update_conv_state(
                rows.transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv_kernel_size
            )
        return out

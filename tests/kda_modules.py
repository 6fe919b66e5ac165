"""The KDA modules of transformers' three model families, small and random, for the tests of the whole layer."""

from __future__ import annotations

import itertools
import math

import torch
import transformers

from hf_layer.demo import own_functions

with own_functions():
    from transformers.models.bailing_hybrid.modeling_bailing_hybrid import BailingHybridDeltaAttention
    from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
    from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextLinearAttention
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

# Name: class, config class, what its config says of the gate. The softplus gates have no lower bound.
FAMILIES = {
    "kimi": (KimiLinearDeltaAttention, transformers.KimiLinearConfig, {}),
    "glm": (Glm5NextTextLinearAttention, Glm5NextTextConfig, {"linear_lower_bound": -5.0}),
    "glm-softplus": (Glm5NextTextLinearAttention, Glm5NextTextConfig, {"linear_lower_bound": None}),
    "bailing": (BailingHybridDeltaAttention, transformers.BailingHybridConfig, {"kda_safe_gate": True}),
    "bailing-softplus": (
        BailingHybridDeltaAttention,
        transformers.BailingHybridConfig,
        {"kda_safe_gate": False},
    ),
}


def make_config(family: str, D: int = 128, H: int = 2, hidden_size: int = 64):
    _, config_class, gate = FAMILIES[family]
    shape = dict(linear_head_dim=D, linear_num_heads=H)
    if family.startswith("bailing"):
        shape = dict(head_dim=D, num_attention_heads=H)
    return config_class(
        vocab_size=64, hidden_size=hidden_size, num_hidden_layers=1, layer_types=["linear_attention"],
        mlp_layer_types=["dense"], pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape, **gate,
    )  # fmt: skip


@torch.no_grad()
def make_module(
    family: str, D: int = 128, H: int = 2, hidden_size: int = 64, seed: int = 0
) -> torch.nn.Module:
    """transformers' module in float32, with outputs of about 1 and gates as in a trained model: dt_bias as at
    initialisation, logits that move the decay of a token over orders of magnitude."""
    config = make_config(family, D, H, hidden_size)
    module = FAMILIES[family][0](config, layer_idx=0).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        x = torch.randn(parameter.shape, generator=generator)
        if name.endswith("A_log"):
            x = x.abs()
        elif name.endswith("dt_bias"):
            dt = torch.exp(math.log(1e-3) + math.log(100) * torch.rand(parameter.shape, generator=generator))
            x = dt + torch.log(-torch.expm1(-dt))
        elif name == "conv1d.weight":
            x = 0.5 * x
        elif name == "o_norm.weight":
            x = 1 + 0.2 * x
        else:  # a projection
            x = x * (2.0 if "f_" in name else 1.0) / math.sqrt(parameter.shape[-1])
        parameter.copy_(x)
    module.test_config = config
    return module


def bfloat16_pair(family: str, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(the module in float32, the same in bfloat16), with equal parameters. What transformers keeps in float32
    when it loads the family in bfloat16 is float32 in both."""
    exact, rounded = make_module(family, **options), make_module(family, **options).to(torch.bfloat16)
    kept = () if family == "kimi" else ("conv1d.weight", "forget_gate.A_log", "forget_gate.dt_bias")
    parameters = dict(rounded.named_parameters())
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            if name in kept:
                parameters[name].data = parameter.clone()
            else:
                parameter.copy_(parameters[name])
    return exact, rounded


def make_cache(module: torch.nn.Module) -> transformers.DynamicCache:
    return transformers.DynamicCache(config=module.test_config)


def states(cache) -> tuple[torch.Tensor, torch.Tensor]:
    """The cache's (conv state, recurrent state) of the only layer."""
    return cache.get_conv_state(0), cache.get_recurrent_state(0)


def hidden(module: torch.nn.Module, B: int, T: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """Hidden states [B, T, hidden_size] in float32."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(B, T, module.hidden_size, generator=generator, device=device)


def run_parts(forward, module, x: torch.Tensor, parts: tuple[int, ...], cache, **options):
    """[(output, conv state, recurrent state)] after each part of a prompt x, one call after the other."""
    results = []
    for part in x.split(parts, dim=1):
        out = forward(module, part, cache_params=cache, **options)
        results.append((out, *(state.clone() for state in states(cache))))
    return results


def run_separately(module, x: torch.Tensor, lengths: list[int], caches: list | None = None):
    """(outputs of the packed sequences in x [1, T, ...] side by side, conv states, recurrent states), each
    sequence by transformers' own forward alone. Sequences of no tokens have no row."""
    bounds = [0, *itertools.accumulate(lengths)]
    caches = [make_cache(module) for _ in lengths] if caches is None else caches
    outs = [
        module(x[:, start:end], cache_params=cache)
        for cache, start, end in zip(caches, bounds, bounds[1:])
        if end > start
    ]
    live = [states(cache) for cache, length in zip(caches, lengths) if length > 0]
    return torch.cat(outs, dim=1), *(torch.cat(parts) for parts in zip(*live))

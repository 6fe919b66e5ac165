"""A tiny random Kimi-Linear model, so that the examples run anywhere. It writes nonsense."""

from __future__ import annotations

import tempfile

import torch
import transformers


def save_tiny_model() -> str:
    """Save the model, without a tokenizer, into a temporary folder; returns the folder."""
    config = transformers.KimiLinearConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32,
        num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, linear_head_dim=128,
        linear_num_heads=2, layer_types=["linear_attention"] * 3 + ["full_attention"],
        mlp_layer_types=["dense"] * 4, initializer_range=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tempfile.mkdtemp(prefix="tiny-kimi-linear-")
    transformers.KimiLinearForCausalLM(config).save_pretrained(folder)
    return folder

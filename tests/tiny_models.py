"""Tiny random models of transformers' three KDA families, whose own code is the measure for ours.

Their weights are large enough for greedy tokens to be far apart. Head dimension 128, so the kernel serves
them.
"""

from __future__ import annotations

import contextlib

import kernels
import pytest
import torch
import transformers

from hf_layer import models
from hf_layer.demo import own_functions

with own_functions():
    models.import_families()

VOCABULARY, FIRST_TOKEN, LAST_TOKEN = 64, 3, 49  # below are pad, bos and eos, above GLM's image tokens
COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=2, kv_lora_rank=16, num_experts_per_tok=2, moe_intermediate_size=32,
    initializer_range=0.2, v_head_dim=16, qk_nope_head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    layer_types=["linear_attention", "full_attention", "linear_attention"], mlp_layer_types=["dense"] * 3,
)  # fmt: skip


def kimi_linear(head_dim: int = 128, **options):
    config = transformers.KimiLinearConfig(
        **{**COMMON, **options}, qk_rope_head_dim=8, num_local_experts=4, linear_head_dim=head_dim,
        linear_num_heads=2,
    )  # fmt: skip
    return transformers.KimiLinearForCausalLM(config)


def glm5_next(head_dim: int = 128, **options):
    from transformers.models.glm5_next import configuration_glm5_next as configuration
    from transformers.models.glm5_next.modeling_glm5_next import Glm5NextForConditionalGeneration

    text = configuration.Glm5NextTextConfig(
        **{**COMMON, **options}, n_routed_experts=4, q_lora_rank=16, qk_rope_head_dim=0,
        linear_head_dim=head_dim, linear_num_heads=2, index_topk=2048, index_head_dim=16, index_n_heads=2,
        hc_mult=2, indexer_types=["full"] * 3,
    )  # fmt: skip
    vision = configuration.Glm5NextVisionConfig(
        depth=1, hidden_size=32, num_heads=2, image_size=28, out_hidden_size=64, intermediate_size=32,
        projection_intermediate_size=32,
    )  # fmt: skip
    names = ("image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id",
             "video_start_token_id", "video_end_token_id")  # fmt: skip
    tokens = {name: 50 + i for i, name in enumerate(names)}
    return Glm5NextForConditionalGeneration(
        configuration.Glm5NextConfig(text_config=text, vision_config=vision, **tokens)
    )


def bailing_hybrid(head_dim: int = 128, **options):
    config = transformers.BailingHybridConfig(
        **{**COMMON, "num_mtp_layers": 0, **options}, head_dim=head_dim, qk_rope_head_dim=8,
        num_local_experts=4, n_group=2, topk_group=1,
    )  # fmt: skip
    return transformers.BailingHybridForCausalLM(config)


BUILDERS = {"kimi_linear": kimi_linear, "glm5_next": glm5_next, "bailing_hybrid": bailing_hybrid}
FAMILIES = list(BUILDERS)


def build(family: str, seed: int = 0, **options) -> torch.nn.Module:
    """A model in eval mode, float32, on the CPU, the same for the same arguments."""
    torch.manual_seed(seed)
    model = BUILDERS[family](**options).eval()
    assert len(list(models.kda_modules(model))) == 2  # of three layers, or of two
    return model


def prompts(rows: int = 2, tokens: int = 9, seed: int = 0) -> torch.Tensor:
    """[rows, tokens] int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TOKEN, LAST_TOKEN + 1, (rows, tokens), generator=generator)


@contextlib.contextmanager
def clean_hooks():
    """Mappings, class names and function layers belong to the process: on leaving, all are as on entering. So
    does what the package kernels has loaded, which here begins with nothing."""
    from kernels.layer import layer

    loaded, layer._CACHED_LAYER = layer._CACHED_LAYER, {}
    with kernels.use_kernel_mapping({}, inherit_mapping=True):
        try:
            yield
        finally:
            layer._CACHED_LAYER = loaded
            models.unregister()
            for cls in models.import_families():
                for function in models._functions_of_file(cls):
                    vars(function).pop("forward", None)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors are not worth several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""The Hub layers on the CPU: called directly, and by transformers' models through the `kernels` hooks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

kernels = pytest.importorskip("kernels")
transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
from hf_layer import reference  # noqa: E402
from hf_layer.demo import own_functions  # noqa: E402

with own_functions():
    from transformers.models.kimi_linear import modeling_kimi_linear

TOLERANCE = {"rtol": 0, "atol": 2e-6}  # float32, values up to about 1, sums in another order
FUNCTIONS = {"chunk_kda": "FlashKDAChunk", "fused_recurrent_kda": "FlashKDARecurrent"}


def kda_inputs(B: int, T: int, H: int = 2, D: int = 32, seed: int = 0):
    """q, k, v, g, beta as transformers passes them: views into the convolution's channel-first output."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(B, 3 * H * D, T, generator=generator).transpose(1, 2)
    q, k, v = (x.unflatten(-1, (H, D)) for x in mixed.chunk(3, dim=-1))
    g = -torch.rand(B, T, H, D, generator=generator)
    g[torch.rand(g.shape, generator=generator) < 0.05] = -2600.0
    return q, k, v, g, torch.rand(B, T, H, generator=generator)


def expected(q, k, v, g, beta, state=None):
    """The recurrence in float64."""
    o, final = reference.recurrent_kda(
        *(x.double() for x in (q, k, v, g, beta)),
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return o, final


def assert_close(found, wanted, **tolerance):
    torch.testing.assert_close(found.double(), wanted, **(tolerance or TOLERANCE))


@pytest.fixture(params=["chunk", "recurrent"])
def layer(request, kernel_package):
    name = {"chunk": "FlashKDAChunk", "recurrent": "FlashKDARecurrent"}[request.param]
    return getattr(kernel_package.layers, name)()


@pytest.mark.parametrize("T", [1, 2, 70])
def test_prefill_from_a_convolution(layer, T):
    q, k, v, g, beta = kda_inputs(2, T)
    assert T == 1 or not q.is_contiguous()
    o, state = layer(
        q, k, v, g=g, beta=beta, initial_state=None, output_final_state=True, use_qk_l2norm_in_kernel=True,
        position_embeddings=None, max_length_q=T,
    )  # fmt: skip
    wanted = expected(q, k, v, g, beta)
    assert state.dtype == torch.float32
    assert_close(o, wanted[0])
    assert_close(state, wanted[1])


@pytest.mark.parametrize("T", [1, 20])
def test_continuing_from_a_live_cache(layer, T):
    q, k, v, g, beta = kda_inputs(2, T)
    live = torch.randn(2, 2, 32, 32)
    before = live.clone()
    o, state = layer(
        q, k, v, g=g, beta=beta, initial_state=live, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    wanted = expected(q, k, v, g, beta, before)
    assert_close(o, wanted[0])
    assert_close(state, wanted[1])
    assert torch.equal(live, before) and state.data_ptr() != live.data_ptr()


def test_no_state_unless_asked_for(layer):
    q, k, v, g, beta = kda_inputs(1, 3)
    assert layer(q, k, v, g=g, beta=beta, initial_state=None, output_final_state=False)[1] is None


@pytest.mark.parametrize("g_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bfloat16_model(layer, g_dtype):
    q, k, v, g, beta = (x.bfloat16() for x in kda_inputs(2, 20))
    g = g.to(g_dtype)
    o, state = layer(
        q, k, v, g=g, beta=beta, initial_state=None, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    wanted = expected(q, k, v, g, beta)
    assert_close(o, wanted[0], rtol=2**-8, atol=1e-5)  # the one rounding of o to bfloat16
    assert_close(state, wanted[1])


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seqlens"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed_sequences_do_not_mix(layer, name, dtype):
    lengths = (5, 0, 1, 34)
    inputs = kda_inputs(1, sum(lengths))
    states = torch.randn(len(lengths), 2, 32, 32)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    q, k, v, g, beta = inputs
    o, final = layer(
        q, k, v, g=g, beta=beta, initial_state=states, output_final_state=True, use_qk_l2norm_in_kernel=True,
        **{name: bounds}, seq_idx=None,
    )  # fmt: skip
    alone = [
        expected(*part, states[n : n + 1])
        for n, part in enumerate(zip(*(x.split(lengths, 1) for x in inputs)))
    ]
    assert_close(o, torch.cat([one for one, _ in alone], dim=1))
    assert_close(final, torch.cat([state for _, state in alone]))


def test_packing_that_cannot_be_followed_is_refused(layer):
    q, k, v, g, beta = kda_inputs(1, 4)
    with pytest.raises(ValueError, match="seq_idx: expected cu_seq_lens_q"):
        layer(
            q,
            k,
            v,
            g,
            beta,
            initial_state=None,
            output_final_state=False,
            seq_idx=torch.tensor([[0, 0, 1, 1]]),
        )
    q, k, v, g, beta = kda_inputs(2, 4)
    with pytest.raises(ValueError, match="B = 2"):
        layer(
            q,
            k,
            v,
            g,
            beta,
            initial_state=None,
            output_final_state=False,
            cu_seq_lens_q=torch.tensor([0, 2, 4]),
        )


def test_gradients_reach_the_inputs(layer):
    inputs = [x.detach().requires_grad_() for x in kda_inputs(1, 6)]
    o, _ = layer(*inputs, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=True)
    weight = torch.randn(o.shape)
    found = torch.autograd.grad((o * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected(*inputs)[0] * weight).sum(), inputs)
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_compiles_without_graph_breaks(layer):
    inputs = kda_inputs(2, 5)
    options = dict(
        initial_state=torch.randn(2, 2, 32, 32), output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for one, other in zip(compiled(*inputs, **options), layer(*inputs, **options)):
        torch.testing.assert_close(one, other, **TOLERANCE)


def tiny_model(head_dim: int = 128):
    """A random Kimi-Linear model whose logits are far enough apart for greedy tokens to be meaningful."""
    torch.manual_seed(0)
    config = transformers.KimiLinearConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
        num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, linear_head_dim=head_dim,
        linear_num_heads=2, layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense"] * 2,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.KimiLinearForCausalLM(config).eval()


def prompts() -> torch.Tensor:
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def generate(model, **options) -> torch.Tensor:
    return model.generate(prompts(), max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)


@pytest.fixture
def calls(kernel_package, monkeypatch):
    """Registers the layers for CPU inference; the list of ("chunk" or "recurrent", tokens) of their calls.

    Function layers and the mapping belong to the process: both are as before when the test ends.
    """
    noted = []

    def noting(name, function):
        def wrapper(q, *args, **kwargs):
            noted.append((name, q.shape[1]))
            return function(q, *args, **kwargs)

        return wrapper

    layers = kernel_package.layers
    monkeypatch.setattr(layers, "chunk_kda", noting("chunk", layers.chunk_kda))
    monkeypatch.setattr(layers, "fused_recurrent_kda", noting("recurrent", layers.fused_recurrent_kda))
    folder = Path(kernel_package.__file__).parent
    with kernels.use_kernel_mapping({}, inherit_mapping=True):
        kernels.register_kernel_mapping(
            {
                function: {
                    "cpu": {kernels.Mode.INFERENCE: kernels.LocalLayerRepository(folder, layer_name=layer)},
                }
                for function, layer in FUNCTIONS.items()
            }
        )
        yield noted
    for function in (
        modeling_kimi_linear.chunk_kimi_delta_attention,
        modeling_kimi_linear.recurrent_kimi_delta_attention,
    ):
        function.__dict__.pop("forward", None)


def test_model_writes_the_same_tokens(calls):
    model = tiny_model()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    options = [{}, {"attention_mask": mask}, {"num_beams": 3}, {"use_cache": False}]
    wanted = [generate(model, **option) for option in options]
    assert calls == []
    model.set_use_kernels(True)
    for option, tokens in zip(options, wanted):
        calls.clear()
        assert torch.equal(generate(model, **option), tokens)
        assert calls[0] == ("chunk", 9)
        if option.get("use_cache", True):
            assert set(calls[1:]) == {("recurrent", 1)}


@torch.no_grad()
def test_model_continues_a_prompt(calls):
    model = tiny_model()
    ids = prompts()

    def logits():
        cache = transformers.DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split((1, 5, 1, 2), dim=1)]
        return torch.cat(parts, dim=1)

    wanted = logits()
    model.set_use_kernels(True)
    torch.testing.assert_close(logits(), wanted, rtol=1e-5, atol=1e-5)
    assert calls == [("chunk", 1), ("chunk", 5), ("recurrent", 1), ("chunk", 2)]


def test_other_models_of_the_class_keep_working(calls):
    """The function layers are shared: a second model, with another head dim, runs and trains through ours."""
    other = tiny_model(head_dim=32)
    wanted = generate(other)
    model = tiny_model()
    model.set_use_kernels(True)
    assert torch.equal(generate(other), wanted)
    assert ("chunk", 9) in calls

    other.train()(prompts(), labels=prompts()).loss.backward()
    gradients = [p.grad for p in other.model.layers[0].self_attn.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_training_mode_leaves_our_layers(calls):
    model = tiny_model()
    model.set_use_kernels(True)
    model.train()
    calls.clear()
    model(prompts(), labels=prompts()).loss.backward()
    assert calls == []  # has_backward is False: transformers' own function runs
    model.eval()
    generate(model)
    assert calls[0] == ("chunk", 9)

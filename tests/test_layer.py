"""KimiDeltaAttention against transformers' own modules, in float32 on the CPU."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path

import pytest
import torch

from hf_layer import KDACache, KernelLoad, KimiDeltaAttention, load_kernel
from hf_layer import layer as layer_module

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
from hf_layer.demo import own_functions  # noqa: E402

with own_functions():
    from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
    from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextLinearAttention
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

HIDDEN, HEADS = 48, 2
THEIRS = {
    "softplus": (transformers.KimiLinearConfig, KimiLinearDeltaAttention),
    "lower_bound": (Glm5NextTextConfig, Glm5NextTextLinearAttention),
}
GATES = list(THEIRS)


def make_config(gate: str, head_dim: int = 128, **options):
    return THEIRS[gate][0](
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        mlp_layer_types=["dense"],
        hidden_size=HIDDEN,
        linear_num_heads=HEADS,
        linear_head_dim=head_dim,
        **options,
    )


def make_pair(gate: str, head_dim: int = 128):
    """(config, transformers' module, ours) with equal weights that make every part of the layer matter."""
    torch.manual_seed(0)
    config = make_config(gate, head_dim)
    theirs = THEIRS[gate][1](config, 0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-1.0, 2.0)
            elif name.endswith("dt_bias"):
                parameter.uniform_(-5.0, 1.0)
            elif name.endswith("o_norm.weight"):
                parameter.uniform_(0.5, 1.5)
    ours = KimiDeltaAttention.from_config(config, 0)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return config, theirs, ours


def tokens(B: int, T: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(B, T, HIDDEN, generator=torch.Generator().manual_seed(seed))


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for float32 rounding: the two sides add up in another order. 3e-6 of the largest value."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * expected.abs().max().item())


@pytest.mark.parametrize("gate", GATES)
def test_state_dict_loads_strictly(gate):
    _, theirs, ours = make_pair(gate)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(found[name].flatten(), value.flatten()), name


def test_own_state_dict_loads_into_transformers():
    _, theirs, ours = make_pair("softplus")
    theirs.load_state_dict(
        KimiDeltaAttention.from_config(make_config("softplus"), 0).state_dict(), strict=True
    )
    assert not torch.equal(theirs.q_proj.weight, ours.q_proj.weight)


def test_state_dict_of_another_head_count_is_refused():
    _, theirs, _ = make_pair("softplus")
    other = KimiDeltaAttention(HIDDEN, HEADS + 1)
    with pytest.raises(RuntimeError, match="A_log"):
        other.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("head_dim", [128, 32])
@pytest.mark.parametrize("T", [1, 3, 70])
@torch.no_grad()
def test_forward_without_cache(gate, head_dim, T):
    _, theirs, ours = make_pair(gate, head_dim)
    x = tokens(2, T)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("parts", [(70, 1, 1), (2, 1, 40, 1), (1, 1, 1), (5, 3, 64)], ids=str)
@torch.no_grad()
def test_prefill_continued_prefill_and_decode(gate, parts):
    config, theirs, ours = make_pair(gate, head_dim=32)
    their_cache, our_cache = (transformers.DynamicCache(config=config) for _ in range(2))
    for x in tokens(2, sum(parts)).split(parts, dim=1):
        expected = theirs(x, cache_params=their_cache)
        assert_same(ours(x, cache_params=our_cache), expected)
        assert_same(our_cache.get_conv_state(0), their_cache.get_conv_state(0))
        assert_same(our_cache.get_recurrent_state(0), their_cache.get_recurrent_state(0))


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_padding_mask(gate):
    config, theirs, ours = make_pair(gate, head_dim=32)
    x = tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    caches = [transformers.DynamicCache(config=config) for _ in range(2)]
    expected = theirs(x, cache_params=caches[0], attention_mask=mask)
    found = ours(x, cache_params=caches[1], attention_mask=mask)
    assert_same(found, expected)
    assert_same(caches[1].get_recurrent_state(0), caches[0].get_recurrent_state(0))
    assert_same(found[:1, 7:], ours(x[:1, 7:]))  # as if the padding were not there
    assert not torch.allclose(found, ours(x))


@pytest.mark.parametrize("gate", GATES)
def test_gradients(gate):
    _, theirs, ours = make_pair(gate, head_dim=32)
    weight = tokens(2, 9, seed=2)
    inputs = [tokens(2, 9).requires_grad_() for _ in range(2)]
    for module, x in zip((theirs, ours), inputs):
        (module.train()(x) * weight).sum().backward()
    assert_same(inputs[1].grad, inputs[0].grad)
    found = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        assert_same(found[name].grad.flatten(), parameter.grad.flatten())


@torch.no_grad()
def test_own_cache_works_like_transformers_cache():
    config, _, ours = make_pair("softplus", head_dim=32)
    theirs, own = transformers.DynamicCache(config=config), KDACache()
    parts = (2, 1, 30, 1)
    for x in tokens(3, sum(parts)).split(parts, dim=1):
        assert torch.equal(ours(x, cache_params=own), ours(x, cache_params=theirs))
        assert torch.equal(own.get_conv_state(0), theirs.get_conv_state(0))
        assert torch.equal(own.get_recurrent_state(0), theirs.get_recurrent_state(0))
    beams = torch.tensor([2, 0, 0])
    theirs.reorder_cache(beams)
    own.reorder_cache(beams)
    x = tokens(3, 1, seed=3)
    assert torch.equal(ours(x, cache_params=own), ours(x, cache_params=theirs))


@torch.no_grad()
def test_the_state_handed_out_by_the_cache_is_not_written():
    _, _, ours = make_pair("softplus", head_dim=32)
    cache = KDACache()
    ours(tokens(2, 5), cache_params=cache)
    states = cache.get_conv_state(0), cache.get_recurrent_state(0)
    before = [state.clone() for state in states]
    for T in (1, 4):
        ours(tokens(2, T), cache_params=cache)
    assert all(torch.equal(state, copied) for state, copied in zip(states, before))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("lengths", [(5, 1, 9), (2, 0, 40, 3), (0, 4), (6, 0), (7,)], ids=str)
@torch.no_grad()
def test_packed_sequences_do_not_mix(gate, lengths):
    _, _, ours = make_pair(gate, head_dim=32)
    x = tokens(1, sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packed_cache = KDACache()
    found = ours(x, cache_params=packed_cache, cu_seq_lens_q=cu_seqlens, max_length_q=max(lengths))

    caches = [KDACache() for _ in lengths]
    alone = [
        ours(part, cache_params=cache) for part, cache in zip(x.split(lengths, 1), caches) if part.shape[1]
    ]
    assert_same(found, torch.cat(alone, dim=1))
    for row, (length, cache) in enumerate(zip(lengths, caches)):
        conv, state = packed_cache.get_conv_state(0)[row], packed_cache.get_recurrent_state(0)[row]
        if length == 0:
            assert not conv.any() and not state.any()
        else:
            assert_same(conv, cache.get_conv_state(0)[0])
            assert_same(state, cache.get_recurrent_state(0)[0])

    if all(lengths):  # decoding goes on as a batch with one row per sequence
        x = tokens(len(lengths), 1, seed=3)
        expected = torch.cat([ours(x[n : n + 1], cache_params=cache) for n, cache in enumerate(caches)])
        assert_same(ours(x, cache_params=packed_cache), expected)


@torch.no_grad()
def test_packed_input_that_cannot_be_right_is_refused():
    _, _, ours = make_pair("softplus", head_dim=32)
    cu_seqlens = torch.tensor([0, 2, 6])
    with pytest.raises(ValueError, match="hidden_states: expected B = 1 with packed sequences, got B = 2"):
        ours(tokens(2, 6), cu_seq_lens_q=cu_seqlens)
    with pytest.raises(ValueError, match="seq_idx: expected cu_seq_lens_q"):
        ours(tokens(1, 6), seq_idx=torch.tensor([[0, 0, 1, 1, 1, 1]]))
    cache = KDACache()
    ours(tokens(1, 6), cache_params=cache)
    with pytest.raises(ValueError, match="cache_params: expected an empty cache"):
        ours(tokens(1, 6), cache_params=cache, cu_seq_lens_q=cu_seqlens)


def test_bad_arguments():
    with pytest.raises(ValueError, match="gate: expected one of .*, got 'sigmoid'"):
        KimiDeltaAttention(HIDDEN, HEADS, gate="sigmoid")
    for bound in (0.5, -5.5, float("nan")):
        with pytest.raises(ValueError, match=r"lower_bound: expected a value in \[-5, 0\], got"):
            KimiDeltaAttention(HIDDEN, HEADS, gate="lower_bound", lower_bound=bound)
    with pytest.raises(ValueError, match="config.hidden_act: expected 'silu', got 'gelu'"):
        KimiDeltaAttention.from_config(make_config("softplus", hidden_act="gelu"), 0)


def test_new_layers_forget_slowly_at_first():
    """Softplus gate at initialisation: log decay -A * dt with A in [1, 16] and dt in [1e-3, 1e-1]."""
    torch.manual_seed(0)
    gate = KimiDeltaAttention(HIDDEN, 8).forget_gate
    A, dt = gate.A_log.exp(), torch.nn.functional.softplus(gate.dt_bias)
    assert 1 <= A.min() and A.max() <= 16
    assert 0.99e-3 <= dt.min() and dt.max() <= 1.01e-1
    assert not KimiDeltaAttention(HIDDEN, 8, gate="lower_bound").forget_gate.A_log.any()


def stub_kernel(calls: list) -> types.ModuleType:
    """A kernel package whose calls note their arguments and answer with tensors of the right shapes."""
    module = types.ModuleType("stub_kernel")
    module.__file__ = "/somewhere/torch-stable-abi211-cu130-x86_64-linux/__init__.py"

    def noting(name):
        def kernel(q, k, v, g, beta, **options):
            calls.append(dict(name=name, q=q, k=k, v=v, g=g, beta=beta, **options))
            B, _, H, D = q.shape
            return torch.zeros_like(v), torch.zeros(B, H, D, D, device=q.device)

        return kernel

    module.chunk_kda, module.fused_recurrent_kda = noting("chunk_kda"), noting("fused_recurrent_kda")
    return module


@pytest.mark.parametrize("gpu", [False, True], ids=["no GPU", "GPU"])
def test_what_the_kernel_is_for(gpu, monkeypatch):
    """CUDA tensors; where there is no GPU also CPU tensors that the CPU's kernel serves."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kernel = stub_kernel([])
    monkeypatch.setattr(layer_module, "load_kernel", lambda: KernelLoad(kernel, "a test", None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert layer_module.kernel_for(torch.empty(1, 2, 3, 128)) is (None if gpu else kernel)
    assert layer_module.kernel_for(torch.empty(1, 2, 3, 64)) is None
    with FakeTensorMode():
        assert layer_module.kernel_for(torch.empty(1, 2, 3, 128, device="cuda")) is kernel


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_the_kernel_gets_raw_logits(gate, monkeypatch):
    """No activation of gate, beta, q or k runs in the layer; they come in the model's dtype."""
    calls = []
    kernel = stub_kernel(calls)
    monkeypatch.setattr(layer_module, "kernel_for", lambda x: kernel)
    _, _, ours = make_pair(gate)
    ours.bfloat16()
    cache = KDACache()
    for T in (70, 1):
        x = tokens(2, T).bfloat16()
        assert ours(x, cache_params=cache).shape == x.shape
        logits = ours.forget_gate.f_b_proj(ours.forget_gate.f_a_proj(x))
        assert torch.equal(calls[-1]["g"].flatten(-2), logits)
        assert torch.equal(calls[-1]["beta"], ours.b_proj(x))
    prefill, decode = calls
    assert (prefill["name"], decode["name"]) == ("chunk_kda", "fused_recurrent_kda")
    for call in calls:
        assert call["g"].dtype == call["beta"].dtype == torch.bfloat16
        assert call["A_log"].dtype == call["dt_bias"].dtype == torch.float32
        assert call["A_log"].shape == (HEADS,) and call["dt_bias"].shape == (HEADS * 128,)
        assert (
            call["use_gate_in_kernel"]
            and call["use_beta_sigmoid_in_kernel"]
            and call["use_qk_l2norm_in_kernel"]
        )
        assert call["lower_bound"] == (None if gate == "softplus" else -5.0)
        assert call["output_final_state"]
    assert prefill["initial_state"] is None
    assert decode["initial_state"].shape == (2, HEADS, 128, 128)
    assert decode["initial_state"].dtype == torch.float32


@torch.no_grad()
def test_compiles_without_graph_breaks_once_the_kernel_is_loaded(kernel_package, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", f"org/flash-kda={Path(kernel_package.__file__).parent}")
    monkeypatch.setattr(layer_module, "kernel_for", lambda x: load_kernel().module)  # on the CPU, too
    _, _, ours = make_pair("softplus", head_dim=32)
    x = tokens(2, 5)
    expected = ours(x)
    assert load_kernel().module is kernel_package
    assert_same(torch.compile(ours, backend="eager", fullgraph=True)(x), expected)


def test_backend_line(cpu_package, monkeypatch):
    """The kernel package is asked which inputs it serves; the line has its words."""
    ours, small = KimiDeltaAttention(HIDDEN, HEADS), KimiDeltaAttention(HIDDEN, HEADS, head_dim=64)
    cpu, cuda, bf16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(layer_module, "load_kernel", lambda: KernelLoad(None, None, "it rains"))
    assert ours.delta_rule_backend(cuda, bf16) == "reference: it rains"

    load = KernelLoad(cpu_package, "a test", None)
    monkeypatch.setattr(layer_module, "load_kernel", lambda: load)
    for dtype in (bf16, torch.float32):
        assert ours.delta_rule_backend(cpu, dtype) == load.status
    wanted = cpu_package.api.reference_reason(
        *(torch.empty(1, 1, 1, 128).half() for _ in range(5)), None, None, None
    )
    assert ours.delta_rule_backend(cpu, torch.float16) == f"reference: {wanted}"
    assert "K and V are not both 128" in small.delta_rule_backend(cpu, bf16)
    for device in (cuda, torch.device("meta")):
        assert ours.delta_rule_backend(device, bf16) == "reference: q is not a tensor on a CPU device"


@pytest.mark.parametrize(
    ("device", "dtype", "lower_bound", "taken"),
    [
        ("cuda", torch.bfloat16, None, True),
        ("cuda", torch.float16, -5.0, True),
        ("cuda", torch.bfloat16, 0.0, False),
        ("cuda", torch.float32, None, False),
        ("cpu", torch.bfloat16, None, False),
    ],
    ids=str,
)
def test_training_takes_flash_linear_attention_where_it_is_made_for(
    device, dtype, lower_bound, taken, monkeypatch
):
    from torch._subclasses.fake_tensor import FakeTensorMode

    fla = types.ModuleType("fla.ops.kda")
    fla.chunk_kda = object()
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.kda", fla)
    with FakeTensorMode():
        q = torch.empty(1, 2, 3, 128, device=device, dtype=dtype)
    assert layer_module.fla_for_training(q, lower_bound) is (fla.chunk_kda if taken else None)
    monkeypatch.setitem(sys.modules, "fla.ops.kda", None)  # not installed
    assert layer_module.fla_for_training(q, lower_bound) is None


@pytest.mark.parametrize("gate", GATES)
def test_only_training_calls_flash_linear_attention(gate, monkeypatch):
    """With a gradient FLA gets what the kernel gets, and its word that a bounded gate is bounded."""
    trained, served = [], []
    monkeypatch.setattr(layer_module, "kernel_for", lambda x: stub_kernel(served))
    monkeypatch.setattr(layer_module, "fla_for_training", lambda q, bound: stub_kernel(trained).chunk_kda)
    _, _, ours = make_pair(gate)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    with torch.no_grad():
        ours(tokens(1, 9), cu_seq_lens_q=bounds)
    assert not trained and len(served) == 1
    ours(tokens(1, 9), cu_seq_lens_q=bounds)
    assert len(trained) == len(served) == 1
    assert trained[0].pop("safe_gate") is (gate == "lower_bound")
    assert trained[0]["cu_seqlens"].dtype == torch.int64  # FLA takes no other
    assert trained[0]["A_log"].requires_grad and trained[0]["q"].requires_grad
    assert trained[0].keys() == served[0].keys()
    for name, value in served[0].items():
        same = (
            torch.equal(trained[0][name], value)
            if isinstance(value, torch.Tensor)
            else trained[0][name] == value
        )
        assert same, name


@torch.no_grad()
def test_layer_can_be_copied_and_run_in_bfloat16():
    _, theirs, ours = make_pair("softplus")
    x = tokens(2, 30)
    ours = copy.deepcopy(ours).bfloat16()
    expected = theirs(x)
    error = (ours(x.bfloat16()).float() - expected).norm() / expected.norm()
    own = (theirs.bfloat16()(x.bfloat16()).float() - expected).norm() / expected.norm()
    assert error < 1.5 * own  # as close to float32 as transformers' own bf16 module

"""The whole KDA layer on the CPU, against transformers' own modules: outputs and caches."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

kernels = pytest.importorskip("kernels")
transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
from kda_inputs import rel_rms  # noqa: E402
from kda_modules import (  # noqa: E402
    FAMILIES,
    bfloat16_pair,
    hidden,
    make_cache,
    make_module,
    run_parts,
    run_separately,
    states,
)

BF16, FP32 = torch.bfloat16, torch.float32
# Float32 in another order than transformers', over outputs and states of about 1, by a state of 128 x 128 and
# decays that are products here and exponentials of sums there.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
HEAD_DIMS = [128, 32]  # by the operators, and without them
PACKED = {"cu_seq_lens_k": None, "max_length_q": 7, "max_length_k": 7, "position_embeddings": None}


@pytest.fixture(scope="module")
def forward(cpu_package):
    """The layer's forward, as `kernels` binds it: forward(transformers' module, hidden_states, ...)."""
    return cpu_package.layers.KimiDeltaAttention.forward


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled("gradients" in request.node.name):
        yield


def assert_close(found, wanted) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def packing(lengths: list[int], dtype: torch.dtype = torch.int32) -> dict:
    return PACKED | {"cu_seq_lens_q": torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)}


# ------------------------------------------------------------------------------ as transformers' own modules


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_continued_and_decoded(forward, family, D):
    """A prompt in parts (long, short, single tokens, longer than a chunk): every output and every state."""
    module = make_module(family, D)
    parts = (5, 1, 1, 2, 70, 1)
    x = hidden(module, 2, sum(parts))
    wanted = run_parts(type(module).forward, module, x, parts, make_cache(module))
    found = run_parts(forward, module, x, parts, make_cache(module))
    assert wanted[0][0].abs().max() > 0.3
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_decode_step(cpu_package, forward, family, monkeypatch):
    """The step as a GPU has it, by PyTorch operations in the place of its one kernel. A lower bound that the kernel
    has not makes the module's own gate compute the log decay."""
    code = importlib.import_module(f"{cpu_package.__name__}.module")
    steps = []

    def noting(q, *args, run=code.fused_kda_decode, **kwargs):
        steps.append(q.shape)
        return run(q, *args, **kwargs)

    monkeypatch.setattr(code, "fused_kda_decode", noting)
    monkeypatch.setattr(
        code, "_can_fuse", lambda layer, x, conv_state, recurrent_state: conv_state is not None
    )
    for lower_bound in (None, -12.0):
        module = make_module(family)
        if lower_bound is not None:
            for name in ("safe_gate_lower_bound", "lower_bound"):
                if hasattr(module.forget_gate, name):
                    setattr(module.forget_gate, name, lower_bound)
        x, parts, cache = hidden(module, 2, 9), (6, 1, 1, 1), make_cache(module)
        wanted = run_parts(type(module).forward, module, x, parts, make_cache(module))
        found = run_parts(forward, module, x[:, :6], (6,), cache)
        places = [state.data_ptr() for state in states(cache)]
        found += run_parts(forward, module, x[:, 6:], parts[1:], cache)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)
        assert [state.data_ptr() for state in states(cache)] == places
    assert steps == [(2, 1, 2, 128)] * 6


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 40])
def test_first_call(forward, T, D):
    """Prompts shorter than the convolution; with and without a cache; a one-token prompt is no decode step."""
    module = make_module("kimi", D)
    x = hidden(module, 2, T)
    wanted, found = (
        run_parts(f, module, x, (T,), make_cache(module)) for f in (type(module).forward, forward)
    )
    assert_close(found[0], wanted[0])
    assert_close([forward(module, x)], [module(x)])


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, FP32], ids=str)
def test_padding(forward, family, D, dtype):
    module = make_module(family, D)
    x = hidden(module, 3, 12)
    mask = torch.ones(3, 12, dtype=dtype)
    mask[0, :5] = 0
    mask[1, 8:] = 0
    wanted, found = (
        run_parts(f, module, x, (12,), make_cache(module), attention_mask=mask)
        for f in (type(module).forward, forward)
    )
    assert_close(found[0], wanted[0])
    assert rel_rms(module(x), found[0][0]) > 0.1  # the mask does something


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_after_reset(forward, family):
    """The cache keeps its tensors, and starts from zeros."""
    module = make_module(family)
    x = hidden(module, 2, 9)
    cache = make_cache(module)
    first = run_parts(forward, module, x, (6, 3), cache)
    places = [state.data_ptr() for state in states(cache)]
    cache.reset()
    assert_close(run_parts(forward, module, x, (6, 3), cache)[1], first[1])
    assert [state.data_ptr() for state in states(cache)] == places


def test_cache_that_can_be_cropped(forward):
    """A cache that records its past keeps all inputs of the convolution until it is cropped."""
    module = make_module("kimi")
    x = hidden(module, 2, 15)
    results = []
    for f in (type(module).forward, forward):
        cache = make_cache(module)
        cache.layers[0].activate_past_recording()
        run = run_parts(f, module, x, (6, 5, 1, 3), cache)
        cache.layers[0].crop(-2)
        results.append([*itertools.chain(*run), cache.get_conv_state(0)])
    assert_close(*results)


def test_bias_of_the_convolution(forward):
    module = make_module("kimi")
    module.conv1d.bias = torch.nn.Parameter(0.5 * torch.randn(module.conv_dim))
    x = hidden(module, 2, 9)
    wanted, found = (
        run_parts(f, module, x, (6, 1, 2), make_cache(module)) for f in (type(module).forward, forward)
    )
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("family", ["glm", "bailing"])
def test_lower_bound_that_the_kernel_has_not(forward, family):
    module = make_module(family)
    setattr(module.forget_gate, "safe_gate_lower_bound" if family == "glm" else "lower_bound", -12.0)
    x = hidden(module, 2, 9)
    assert_close([forward(module, x)], [module(x)])


def test_other_activation(forward):
    """Transformers' own forward runs, with everything it was given."""
    module = make_module("kimi")
    module.activation = "gelu"
    x = hidden(module, 2, 9)
    wanted, found = (
        run_parts(f, module, x, (6, 1, 2), make_cache(module)) for f in (type(module).forward, forward)
    )
    assert all(torch.equal(a, b) for one, other in zip(found, wanted) for a, b in zip(one, other))


# --------------------------------------------------------------------------------------- packed sequences


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences(forward, family, D):
    """Each sequence as if it were alone, which transformers' own PyTorch path does not do."""
    module = make_module(family, D)
    lengths = [5, 1, 2, 17, 3]
    x = hidden(module, 1, sum(lengths))
    cache = make_cache(module)
    out = forward(module, x, cache_params=cache, **packing(lengths))
    assert_close((out, *states(cache)), run_separately(module, x, lengths))
    assert rel_rms(module(x), out) > 0.1


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seqlens"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed_sequences_continued(forward, name, dtype, D):
    module = make_module("kimi", D)
    cache, caches, seed = make_cache(module), [make_cache(module) for _ in range(3)], 0
    for lengths in ([5, 2, 9], [1, 1, 1], [3, 1, 20]):
        x = hidden(module, 1, sum(lengths), seed := seed + 1)
        bounds = packing(lengths, dtype)["cu_seq_lens_q"]
        out = forward(module, x, cache_params=cache, **{name: bounds})
        assert_close((out, *states(cache)), run_separately(module, x, lengths, caches))


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_packed_sequences_of_no_tokens(forward, D):
    module = make_module("kimi", D)
    lengths = [0, 4, 0, 0, 6, 0]
    x = hidden(module, 1, sum(lengths))
    cache = make_cache(module)
    out = forward(module, x, cache_params=cache, **packing(lengths))
    live = [n for n, length in enumerate(lengths) if length > 0]
    assert_close((out, *(state[live] for state in states(cache))), run_separately(module, x, lengths))
    empty = [n for n, length in enumerate(lengths) if length == 0]
    assert all((state[empty] == 0).all() for state in states(cache))


def test_packing_that_cannot_be_followed(forward):
    module = make_module("kimi")
    x = hidden(module, 2, 6)
    with pytest.raises(ValueError, match="hidden_states: expected B = 1 with packed sequences, got B = 2"):
        forward(module, x, **packing([2, 4]))
    with pytest.raises(ValueError, match="seq_idx: expected cu_seq_lens_q"):
        forward(module, x[:1], seq_idx=torch.zeros(1, 6, dtype=torch.int32))
    cache = make_cache(module)
    forward(module, x[:1], cache_params=cache)
    before = [state.clone() for state in states(cache)]
    with pytest.raises(
        ValueError, match="cache_params: expected states of the N = 2 packed sequences, got 1"
    ):
        forward(module, x[:1], cache_params=cache, **packing([2, 4]))
    assert all(torch.equal(a, b) for a, b in zip(states(cache), before))


# ------------------------------------------------------------------------- dtypes, gradients, who does what


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(forward, family):
    """No further from the float32 module of the same weights than transformers' bfloat16 module is, give or take how
    the error of single tokens scatters."""
    exact, module = bfloat16_pair(family)
    parts = (40, 1, 1, 3)
    x = hidden(module, 2, sum(parts)).to(BF16)
    wanted = run_parts(type(module).forward, exact, x.float(), parts, make_cache(module))
    theirs, ours = (
        run_parts(f, module, x, parts, make_cache(module)) for f in (type(module).forward, forward)
    )
    for mine, other, reference in zip(ours, theirs, wanted, strict=True):
        assert [t.dtype for t in mine] == [BF16, BF16, FP32]
        errors = [[rel_rms(want, got) for want, got in zip(reference, found)] for found in (mine, other)]
        assert all(one <= 1.15 * two for one, two in zip(*errors)), errors
        assert max(errors[0]) < 1e-2


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_float64(forward, D):
    """Served by PyTorch; transformers' own computes the delta rule in float32."""
    module = make_module("kimi", D).double()
    x = hidden(module, 2, 20).double()
    found = forward(module, x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, module(x), **CLOSE)


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(forward, family, D):
    """Those of transformers' module, of every parameter and of the hidden states, through padding too."""
    module = make_module(family, D)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :3] = 0
    gradients = []
    for f in (type(module).forward, forward):
        x = hidden(module, 2, 12).requires_grad_()
        out = f(module, x, attention_mask=mask)
        loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
        gradients.append(torch.autograd.grad(loss, [x, *module.parameters()]))
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0
        assert rel_rms(other, one) < 1e-4


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_gradients_through_the_cache(forward, D):
    """Those of one call over all tokens: both of the cache's states carry them on. (transformers' own modules
    raise here.)"""
    module = make_module("kimi", D)
    gradients = []
    for parts in ((9,), (4, 1, 2, 2)):
        x = hidden(module, 2, 9).requires_grad_()
        cache = make_cache(module)
        out = [forward(module, part, cache_params=cache) for part in x.split(parts, dim=1)]
        last = torch.cat(out, dim=1)[:, -2:]
        gradients.append(torch.autograd.grad(last.square().sum(), [x, *module.parameters()]))
    assert gradients[0][0][:, 0].abs().max() > 1e-3
    for one, other in zip(*gradients, strict=True):
        assert rel_rms(one, other) < 1e-4


def test_gradients_of_packed_sequences(forward):
    """One sequence's output has no gradient in another."""
    module = make_module("kimi")
    x = hidden(module, 1, 9).requires_grad_()
    out = forward(module, x, cache_params=make_cache(module), **packing([4, 5]))
    (gradient,) = torch.autograd.grad(out[:, :4].sum(), x)
    assert gradient[:, :4].abs().max() > 0 and (gradient[:, 4:] == 0).all()


def test_operators_do_the_work(cpu_package, forward, monkeypatch):
    """At D = 128 nothing is left to PyTorch but the projections."""
    name = cpu_package.__name__
    layer_ops = importlib.import_module(f"{name}.layer_ops")
    monkeypatch.setattr(layer_ops, "_short_conv_reference", None)
    monkeypatch.setattr(layer_ops, "_gated_rms_norm_reference", None)
    for function in ("chunk_kda", "recurrent_kda"):
        monkeypatch.setattr(cpu_package.reference, function, None)
    module = make_module("kimi").to(BF16)
    run_parts(forward, module, hidden(module, 2, 9).to(BF16), (5, 1, 3), make_cache(module))
    forward(module, hidden(module, 1, 9).to(BF16), **packing([4, 5]))


def test_hidden_states_and_parameters_stay(forward):
    module = make_module("kimi")
    x = hidden(module, 2, 9)
    before = [t.clone() for t in (x, *module.parameters())]
    run_parts(forward, module, x, (6, 1, 2), make_cache(module), attention_mask=None)
    assert all(torch.equal(a, b) for a, b in zip((x, *module.parameters()), before))


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_compiles_to_one_graph(forward, D):
    module = make_module("glm", D)
    x = hidden(module, 2, 7)
    cache = make_cache(module)
    forward(module, x, cache_params=cache)
    other = make_cache(module)
    forward(module, x, cache_params=other)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a, **k: forward(module, *a, **k), backend="aot_eager", fullgraph=True)
    if D == 128:  # the reference's chunk form is no single graph over a long prompt
        assert_close([compiled(x)], [forward(module, x)])
    step = hidden(module, 2, 1, seed=1)
    for _ in range(3):
        assert_close([compiled(step, cache_params=cache)], [forward(module, step, cache_params=other)])
        assert_close(states(cache), states(other))


class Offload:
    """A hook as accelerate's: the module's parameters are on the meta device but while the hook has fetched
    them."""

    def __init__(self, module):
        self.kept = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
        self.post_forward(module, ())

    def pre_forward(self, module):
        for name, x in self.kept.items():
            module.register_parameter(name, torch.nn.Parameter(x))

    def post_forward(self, module, output):
        for name, x in self.kept.items():
            module.register_parameter(name, torch.nn.Parameter(x.to("meta")))


def test_offloaded_parameters(forward):
    module = make_module("kimi")
    x = hidden(module, 2, 6)
    wanted = module(x)
    for part in (module.conv1d, module.forget_gate, module.o_norm):
        part._hf_hook = Offload(part)
    for _ in range(2):
        assert_close([forward(module, x)], [wanted])
        assert (
            module.conv1d.weight.is_meta and module.forget_gate.A_log.is_meta and module.o_norm.weight.is_meta
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_accepts_the_layer(cpu_package, family):
    """By the rules for Hub layers: a forward like the original's, and nothing beside it."""
    from kernels.layer.layer import _validate_layer

    layer = cpu_package.layers.KimiDeltaAttention
    _validate_layer(check_cls=FAMILIES[family][0], cls=layer, repo="flash-kda")
    assert layer.has_backward is False and layer.can_torch_compile is True

"""hf_layer.fla on a GPU: FLA's `chunk_kda`, layer and model on our kernel, where FLA's own backend says no.

The tests of FLA's layer and model run FLA's Triton kernels around ours, which it compiles first: they need
FLASH_KDA_TEST_FLA=1.
"""

from __future__ import annotations

import logging
import os

import pytest
import torch
from harness import assert_accurate, inputs_for
from kda_inputs import rel_rms, to_float64

pytest.importorskip("fla", reason="flash-linear-attention is not installed")

with_fla = pytest.mark.skipif(
    os.environ.get("FLASH_KDA_TEST_FLA") != "1", reason="FLASH_KDA_TEST_FLA=1 lets FLA compile its kernels"
)
LAYER_TOLERANCE = 1e-2  # the kernel's 5e-3, and as much from the norm and the projection behind it in bf16


@pytest.fixture
def served(kernel_package, monkeypatch):
    """Registers our backend; the keyword arguments of the calls that reach the kernel package, in order."""
    import hf_layer.fla
    from hf_layer import load_kernel

    calls = []
    module = load_kernel().module
    assert module.fwd is kernel_package.fwd
    chunk_kda = module.chunk_kda

    def counting(*args, **kwargs):
        calls.append(kwargs)
        return chunk_kda(*args, **kwargs)

    monkeypatch.delenv("FLA_FLASH_KDA", raising=False)
    monkeypatch.setattr(module, "chunk_kda", counting)
    hf_layer.fla.register()
    yield calls
    hf_layer.fla.unregister()


CASES = {
    "softplus": ("softplus-init", dict(T=300)),
    "softplus-hard-resets": ("softplus-resets", dict(T=300, state_v_first=True)),
    "pre-activated-fp32-g": ("lower-weak", dict(T=300, preactivated=True)),
    "pre-activated-bf16-g": ("softplus-init", dict(T=300, preactivated=True, g_dtype=torch.bfloat16)),
    "raw-fp32-g": ("lower-strong", dict(T=300, g_dtype=torch.float32, state_v_first=True)),
    "k-first": ("lower-strong", dict(B=2, T=300)),
    "activated-beta": ("lower-strong", dict(T=300, beta_sigmoid=False, state_v_first=True)),
    "activated-fp32-beta": ("lower-strong", dict(T=300, beta_sigmoid=False, beta_dtype=torch.float32)),
    "no-l2norm": ("lower-strong", dict(T=300, l2norm=False, state_v_first=True)),
    "grouped-heads": ("softplus-init", dict(T=300, H=2, HV=8, state_v_first=True)),
    "negative-eigenvalues": ("lower-strong", dict(T=300, allow_neg_eigval=True, state_v_first=True)),
    "no-states": ("softplus-init", dict(T=300, initial_state=False, output_final_state=False)),
    "pack": ("softplus-init", dict(lengths=(100, 0, 17, 183))),
    "pack-int32": ("softplus-init", dict(lengths=(100, 0, 17, 183), cu_seqlens_dtype=torch.int32)),
}


@pytest.mark.parametrize("case", CASES)
def test_fla_runs_on_our_kernel(kernel_package, served, case):
    from fla.ops.kda import chunk_kda

    gate, options = CASES[case]
    inputs = inputs_for(gate, **options)
    safe_gate = inputs["use_gate_in_kernel"] and inputs["lower_bound"] is not None
    with torch.inference_mode():
        found = chunk_kda(**inputs, safe_gate=safe_gate)
    assert len(served) == 1
    assert_accurate(kernel_package, inputs, found)
    with torch.inference_mode():
        direct = kernel_package.chunk_kda(**inputs)
    assert torch.equal(found[0], direct[0])
    assert (found[1] is None) == (direct[1] is None)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=lambda mode: mode.__name__)
def test_any_mode_without_a_gradient_to_compute(kernel_package, served, mode):
    from fla.ops.kda import chunk_kda

    inputs = inputs_for("softplus-init", T=100)
    with mode():
        found = chunk_kda(**inputs)
    assert len(served) == 1
    assert_accurate(kernel_package, inputs, found)


def test_old_keyword_and_log_line(kernel_package, served, caplog):
    from fla.ops.kda import chunk_kda

    inputs = inputs_for("lower-strong", T=100, state_v_first=True)
    keywords = {name: value for name, value in inputs.items() if name != "state_v_first"}
    with torch.inference_mode(), caplog.at_level(logging.INFO), pytest.warns(DeprecationWarning):
        found = chunk_kda(**keywords, transpose_state_layout=True, safe_gate=True)
    assert len(served) == 1 and "[FLA Backend] kda.chunk_kda -> flashkda" in caplog.messages
    assert_accurate(kernel_package, inputs, found)


def test_small_tensors_with_any_strides(kernel_package, served):
    """FLA takes them; what is small is made contiguous on the way."""
    from fla.ops.kda import chunk_kda

    inputs = inputs_for("softplus-init", lengths=(100, 17), H=4)
    strided = dict(inputs)
    for name in ("A_log", "dt_bias", "cu_seqlens"):
        strided[name] = torch.stack([inputs[name], inputs[name]], -1)[..., 0]
        assert not strided[name].is_contiguous()
    with torch.inference_mode():
        found = chunk_kda(**strided)
    assert len(served) == 1
    assert_accurate(kernel_package, inputs, found)


def test_a_wrong_argument_is_an_error_not_a_detour(served):
    from fla.ops.kda import chunk_kda

    inputs = inputs_for("lower-strong", T=100)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"\bk\b"):
        chunk_kda(**{**inputs, "k": inputs["k"][:, :50]})
    assert len(served) == 1


@with_fla
def test_what_goes_back_is_right_too(kernel_package, served):
    """fp16 is FLA's business: its Triton kernels answer, in fp16."""
    from fla.ops.kda import chunk_kda

    inputs = inputs_for("softplus-init", T=300, dtype=torch.float16)
    with torch.inference_mode():
        o, final_state = chunk_kda(**inputs)
    assert not served and o.dtype == torch.float16
    with torch.no_grad():
        want_o, want_state = kernel_package.reference.chunk_kda(**to_float64(inputs))
    assert rel_rms(want_o, o) <= 1e-2 and rel_rms(want_state, final_state) <= 1e-2


# ----------------------------------------------------------------------------------------------------
# FLA's layer and model


@pytest.fixture
def on_the_reference(kernel_package, monkeypatch):
    """A function that runs something with the float64 reference in the place of FLA's `chunk_kda`."""
    import fla.layers.kda as layers

    def chunk_kda(safe_gate, **arguments):
        o, state = kernel_package.reference.chunk_kda(**to_float64(arguments))
        return o.to(arguments["v"].dtype), None if state is None else state.float()

    def run(function):
        with monkeypatch.context() as patch, torch.inference_mode():
            patch.setattr(layers, "chunk_kda", chunk_kda)
            return function()

    return run


@with_fla
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("lower_bound", [None, -5.0], ids=["softplus", "lower-bound"])
def test_fla_s_layer(served, on_the_reference, lower_bound, padded):
    from fla.layers import KimiDeltaAttention

    torch.manual_seed(0)
    layer = KimiDeltaAttention(
        hidden_size=256, head_dim=128, num_heads=2, num_v_heads=4, layer_idx=0,
        safe_gate=lower_bound is not None, lower_bound=lower_bound,
    )  # fmt: skip
    layer = layer.to("cuda", torch.bfloat16).eval()
    x = torch.randn(2, 100, 256, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(2, 100, dtype=torch.int64, device="cuda")
    mask[0, :30] = not padded
    options = dict(attention_mask=mask if padded else None)
    with torch.inference_mode():
        found = layer(x, **options)[0]
    assert len(served) == 1 and (served[0]["cu_seqlens"] is not None) == padded
    expected = on_the_reference(lambda: layer(x, **options)[0])
    assert len(served) == 1
    assert rel_rms(expected, found) <= LAYER_TOLERANCE


@with_fla
def test_fla_s_model(served, on_the_reference):
    """Its bf16 logits on our kernel are as close to the float32 model as on the exact delta rule, and our
    final state is what its decode goes on from."""
    from fla.models import KDAConfig, KDAForCausalLM

    torch.manual_seed(0)
    config = KDAConfig(hidden_size=256, head_dim=128, num_heads=2, num_hidden_layers=2, vocab_size=64)
    model = KDAForCausalLM(config).cuda().eval()
    tokens = torch.randint(3, 64, (2, 100), device="cuda")
    exact = on_the_reference(lambda: model(tokens).logits)
    model.bfloat16()
    rounded = on_the_reference(lambda: model(tokens).logits)
    assert not served
    with torch.inference_mode():
        logits = model(tokens).logits
        assert len(served) == config.num_hidden_layers
        prompt = model(tokens[:, :99], use_cache=True)
        assert len(served) == 2 * config.num_hidden_layers
        step = model(tokens[:, 99:], past_key_values=prompt.past_key_values, use_cache=True).logits
    assert rel_rms(exact, logits) <= 1.5 * rel_rms(exact, rounded)
    # A state in the wrong layout is an error of order 1, bf16 one of order 1e-2.
    assert rel_rms(logits[:, 99:], step) <= 5e-2

"""hf_layer.report and `python -m hf_layer.report`: what they say runs is what runs."""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

kernels = pytest.importorskip("kernels")
transformers = pytest.importorskip("transformers", minversion="5.20.2")
pytest.importorskip("rich")
import hf_layer  # noqa: E402
from hf_layer import models  # noqa: E402
from hf_layer.demo import replace_kda_layers  # noqa: E402
from tiny_models import FAMILIES, build, one_thread, prompts  # noqa: E402, F401

reporting = importlib.import_module("hf_layer.report")
OWN = "transformers' PyTorch code"


def only(model, **options):
    """What the report says of a model's KDA layers, which is the same for all of them."""
    layers = hf_layer.report(model, **options).layers
    said = {(layer.prefill, layer.decode, layer.variant, layer.why) for layer in layers}
    assert len(layers) == 2 and len(said) == 1, said
    return said.pop()


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_by_name(family, hooks):
    model = build(family)
    report = hf_layer.report(model)
    for layer in report.layers:
        assert type(model.get_submodule(layer.layer)).__name__ == layer.kind == models.FAMILIES[family]
    assert report.title == f"{type(model).__name__} on cpu in float32"
    assert only(model) == (OWN, OWN, "", "hf_layer.register() has not been called")


def test_the_calls_that_count_as_ours_are_ours(hooks, cpu_kernel, cpu_variant_dir, monkeypatch):
    """The operator runs exactly where the report says that the kernel does."""
    calls = []

    def noting(operator, *arguments):
        results = operator(*arguments)
        calls.append(arguments[0].dtype)  # not of what it refuses
        return results

    for name in ("kda_prefill", "kda_prefill_new"):
        monkeypatch.setattr(cpu_kernel.api, name, functools.partial(noting, getattr(cpu_kernel.api, name)))
    model = build("kimi_linear")
    kernel, reference = "whole layer, flash-kda kernel", "whole layer, flash-kda reference"
    dtypes = "q, k and v are not all bfloat16 or float32"
    steps = [
        (lambda: model, (OWN, OWN, "", "hf_layer.register() has not been called")),
        (lambda: hf_layer.kernelize(model), (kernel, kernel, cpu_variant_dir.name, "")),
        (lambda: model.bfloat16(), (kernel, kernel, cpu_variant_dir.name, "")),
        (lambda: model.double(), (reference, reference, cpu_variant_dir.name, dtypes)),
        (
            lambda: model.float().train(),
            (reference, reference, cpu_variant_dir.name, "a gradient is required"),
        ),
        (
            lambda: hf_layer.unkernelize(model).eval(),
            (OWN, OWN, "", "hf_layer.register() has not been called"),
        ),
    ]
    for step, wanted in steps:
        step()
        assert only(model) == wanted
        calls.clear()
        with torch.set_grad_enabled(model.training):
            model(prompts())
        assert (len(calls) == 2) == (wanted[3] == "") and len(calls) in (0, 2)


def test_functions_alone(hooks, cpu_kernel, cpu_variant_dir):
    model = build("kimi_linear")
    hf_layer.register(devices="cpu")
    model.set_use_kernels(True)
    for _, module in models.kda_modules(model):
        del module.forward
    assert only(model) == ("flash-kda kernel", "flash-kda kernel", cpu_variant_dir.name, "")
    for _, module in models.kda_modules(model):
        models.functions_of(module)["fused_recurrent_kda"].__dict__.pop("forward", None)
    assert only(model) == ("flash-kda kernel", OWN, cpu_variant_dir.name, reporting.RENEW)


def test_a_head_dimension_that_the_kernel_does_not_serve(hooks, cpu_kernel):
    model = hf_layer.kernelize(build("kimi_linear", head_dim=32))
    assert only(model)[0] == "whole layer, flash-kda reference"
    assert only(model)[3] == "K and V are not both 128"
    assert not hf_layer.report(model).kernel_runs


def test_why_a_model_is_not_ours(hooks, cpu_kernel, monkeypatch):
    model = build("kimi_linear")
    hf_layer.register()
    assert only(model)[3] == "the model was loaded without use_kernels=True"
    model.set_use_kernels(True)
    assert only(model)[3] == "registered for cuda, and this layer is on cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    reason = "registered for compute capabilities 90 to 90, and this GPU has 80"
    assert only(model, device="cuda", dtype=torch.bfloat16)[3] == reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert only(model, device="cuda")[3] == reporting.RENEW  # it was kernelized for a CPU
    model.train()
    assert only(model)[3] == "in training mode transformers' own functions run"


def test_where_the_hooks_are_off(hooks, monkeypatch):
    from transformers.utils import import_utils

    model = build("kimi_linear")
    for _, module in models.kda_modules(model):
        del module._kernel_funcs
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: False)
    prefill, decode, _, why = only(model)
    assert prefill == decode == OWN
    assert re.fullmatch(r"transformers \S+ accepts the package kernels from .* and \S+ is installed; .*", why)


def test_flash_linear_attention_inside_transformers_is_named(hooks, monkeypatch):
    """Where FLA is installed, transformers takes its functions when it imports a model's file."""

    def chunk_kda():
        pass

    chunk_kda.__module__ = "fla.ops.kda.chunk"
    implementation = chunk_kda

    def wrapped():
        return implementation

    function = kernels.use_kernel_forward_from_hub("chunk_kda")(wrapped)
    module = types.SimpleNamespace(_kernel_funcs={"chunk": function})
    assert reporting._theirs(models.functions_of(module)["chunk_kda"]) == "flash-linear-attention"


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors run on the reference beside a GPU")
def test_our_own_layer(cpu_kernel, cpu_variant_dir):
    model = replace_kda_layers(build("kimi_linear"))
    assert only(model) == (
        "hf_layer, flash-kda kernel",
        "hf_layer, flash-kda kernel",
        cpu_variant_dir.name,
        "",
    )
    assert only(model, dtype=torch.float16)[0] == "hf_layer, flash-kda reference"


def test_a_model_without_kda_layers():
    report = hf_layer.report(torch.nn.Linear(2, 2))
    assert report.layers == () and not report.kernel_runs and report.title == "Linear"
    assert "KimiLinearDeltaAttention" in str(report)


def test_the_table_has_every_word(hooks):
    report = hf_layer.report(build("kimi_linear"))
    for layer in report.layers:
        words = str(report).replace("│", " ").split()
        assert layer.layer in words and layer.kind in words
    assert "register()" in str(report)


def test_the_name_is_a_call_before_and_after_the_module_is_imported(hooks):
    model = build("kimi_linear")
    import hf_layer.report  # noqa: F401

    assert hf_layer.report(model).layers == reporting.report(model).layers


# ------------------------------------------------------------------------------------------- the command


@pytest.fixture
def folder(tmp_path):
    """Makes a folder that holds a model's configuration and no weights."""

    def save(family, **options):
        build(family, **options).config.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


@pytest.mark.skipif(torch.cuda.is_available(), reason="the command would look at the GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_command(family, folder, hooks, cpu_kernel, cpu_variant_dir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    assert reporting.main([folder(family)]) == 0
    output = capsys.readouterr().out
    assert output.count(models.FAMILIES[family]) == 2
    assert output.count("flash-kda kernel") == 4 and output.count(cpu_variant_dir.name) == 2
    assert "on cpu in bfloat16" in output
    assert reporting.main([folder(family), "--dtype", "float16"]) == 1
    assert "q, k and v are not all bfloat16 or float32" in capsys.readouterr().out


def test_command_on_a_model_of_another_kind(tmp_path, hooks, cpu_kernel, capsys):
    transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    ).save_pretrained(tmp_path)
    assert reporting.main([str(tmp_path), "--device", "cpu"]) == 1
    assert "no layer of" in capsys.readouterr().out


def test_command_on_nothing(tmp_path, hooks, capsys):
    assert reporting.main([str(tmp_path / "nothing"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_command_in_a_process_of_its_own(folder, cpu_kernel):
    root = Path(models.__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "hf_layer.report", folder("kimi_linear"), "--device", "cpu"],
        cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "KimiLinearForCausalLM on cpu in bfloat16" in done.stdout

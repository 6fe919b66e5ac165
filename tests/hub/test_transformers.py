"""register and from_pretrained(..., use_kernels=True): kernel from a loopback Hub, model from a folder."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hub_client import NAME, stand_in

pytest.importorskip("transformers", minversion="5.20.2")
pytest.importorskip("rich")
from tiny_models import build  # noqa: E402

# Loads the model twice, as transformers has it and with use_kernels after {register}; prints what then runs.
CODE = """
import json, logging, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
import torch
torch.set_num_threads(1)
import hf_layer
from hf_layer import models
from transformers import AutoModelForCausalLM
from transformers.integrations import hub_kernels
if torch.cuda.is_available():  # transformers' other kernels are not on this Hub
    theirs = hub_kernels.get_kernel_mapping_transformers()
    hub_kernels._KERNEL_MAPPING_CACHE = {{name: theirs[name] for name in models.FUNCTIONS}}
warned = []
handler = logging.Handler()
handler.emit = lambda record: warned.append(record.getMessage())
logging.getLogger("hf_layer").addHandler(handler)

own = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="{dtype}").to("{device}")
torch.manual_seed(0)
ids = torch.randint(3, 50, (2, 70), device="{device}")
def generate(model):
    return model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False).tolist()
with torch.inference_mode():
    before, logits = generate(own), own(ids).logits.float()
hf_layer.register({register})
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="{dtype}", use_kernels=True)
if "{device}" != "cpu":  # kernels are chosen for the device that a model is on
    model.to("{device}").set_use_kernels(True)
report = hf_layer.report(model)
package = next((models.package_of(module) for _, module in models.kda_modules(model)), None)
with torch.inference_mode():
    off = (model(ids).logits.float() - logits).norm() / logits.norm()
    print(json.dumps(dict(
        same=generate(model) == before, off=off.item(), kernel_runs=report.kernel_runs, warned=warned,
        why=report.layers[0].why, prefill=report.layers[0].prefill, variant=report.layers[0].variant,
        file=None if package is None else os.path.relpath(package.__file__, os.environ["HF_HOME"]),
    )))
"""


on_a_cpu = pytest.mark.skipif(
    importlib.util.find_spec("fla") is not None,
    reason="flash-linear-attention is installed: transformers' own code runs on it, and it needs a GPU",
)


@pytest.fixture
def folder(tmp_path) -> str:
    """A tiny random Kimi-Linear model, saved."""
    build("kimi_linear").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def code(folder: str, register: str, device: str = "cpu", dtype: str = "float32") -> str:
    return CODE.format(folder=folder, register=register, device=device, dtype=dtype)


ON_CPU = f"repo_id={NAME!r}, trust_remote_code=True, devices='cpu'"


@on_a_cpu
def test_from_pretrained_takes_the_kernel_from_the_hub(hub, client, folder):
    """Cold, then warm; the tokens are those of transformers' own code."""
    output = client.output(code(folder, ON_CPU))
    assert output["same"] and output["off"] < 1e-5 and output["warned"] == []
    assert output["file"].startswith("hub/kernels--org--flash-kda/snapshots/")
    assert output["file"].split("/")[-2] == output["variant"]
    assert {path.split("/")[1] for path in hub.downloads()} == {output["variant"]}
    if "-cpu-" in output["variant"]:
        assert output["kernel_runs"] and output["prefill"] == "whole layer, flash-kda kernel"
    else:  # no variant for CPUs was built, or torch is made for GPUs
        assert output["prefill"] == "whole layer, flash-kda reference" and output["why"]

    hub.requests.clear()
    assert client.output(code(folder, ON_CPU)) == output
    assert hub.downloads() == []


@on_a_cpu
def test_a_revision(hub, client, folder):
    """A commit is loaded, whatever the branches say by now."""
    commit = hub.repositories[NAME].branches["v1"]
    hub.repositories[NAME].commit("v1", stand_in(1))
    output = client.output(code(folder, f"{ON_CPU}, revision={commit!r}"))
    assert output["same"] and f"/snapshots/{commit}/" in output["file"]


@on_a_cpu
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (f"repo_id={NAME!r}, devices='cpu'", "is not from a trusted publisher"),
        (ON_CPU + ", version=7", "Version 7 not found"),
        ("repo_id='org/nothing', trust_remote_code=True, devices='cpu'", "the Hub (org/nothing): "),
    ],
    ids=["no trust", "no such version", "no such repository"],
)
def test_without_a_kernel_the_model_is_transformers_own(hub, client, folder, options, reason):
    """It works, and the reason is in a warning and in the report."""
    output = client.output(code(folder, options))
    assert output["same"] and output["off"] == 0 and output["file"] is None
    assert output["prefill"] == "transformers' PyTorch code"
    assert reason in output["why"] and output["why"].startswith("no kernel could be loaded: the Hub (org/")
    (warning,) = output["warned"]
    assert reason in warning
    assert hub.downloads() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(hub, client, folder):
    """The CUDA variant, by the default rule on Hopper and by a wider one elsewhere."""
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        pytest.skip(f"compute capability {major}.{minor} is under 8.0")
    register = f"repo_id={NAME!r}, trust_remote_code=True, capability=({10 * major + minor},) * 2"
    output = client.output(code(folder, register, "cuda", "bfloat16"))
    assert output["kernel_runs"] and output["prefill"] == "whole layer, flash-kda kernel"
    assert f"-cu{torch.version.cuda.split('.')[0]}" in output["variant"]
    assert output["off"] < 0.05  # as tests/gpu/test_models.py

"""hf_layer.register, unregister, kernelize and unkernelize, on the CPU and with a pretended GPU."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

kernels = pytest.importorskip("kernels")
transformers = pytest.importorskip("transformers", minversion="5.20.2")
pytest.importorskip("rich")
import hf_layer  # noqa: E402
from hf_layer import models  # noqa: E402
from tiny_models import FAMILIES, build, one_thread, prompts  # noqa: E402, F401
from transformers.integrations import hub_kernels  # noqa: E402

ROOT = Path(hf_layer.__file__).resolve().parent.parent
Mode = kernels.Mode
COMPILED = Mode.INFERENCE | Mode.TORCH_COMPILE


def generate(model, **options):
    return model.generate(prompts(), max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)


def runs(model) -> tuple[str, ...]:
    """Whose code the KDA layers of a model run for a prompt, for a token, and around both: "ours",
    transformers' "own", or the name of another kernel's class. The same for all of them."""
    found = set()
    for _, module in models.kda_modules(model):
        names = []
        for one in (*models.functions_of(module).values(), module):
            home = one.forward.__func__
            own = home.__module__.startswith(("kernels.", "transformers."))
            name = "own" if own else home.__qualname__.partition(".")[0]
            names.append("ours" if models.package_of(one) else name)
        found.add(tuple(names))
    (names,) = found
    return names


# ---------------------------------------------------------------------------------------------------------
# which devices, which modes


class TheirChunk(torch.nn.Module):
    """Stands in for what transformers names for `chunk_kda` on any CUDA device."""

    def forward(
        self, query, key, value, g, beta, chunk_size=64, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, **kwargs,
    ):  # fmt: skip
        raise NotImplementedError


class TheirRecurrent(torch.nn.Module):
    has_backward = False

    def forward(
        self,
        query,
        key,
        value,
        g,
        beta,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel=False,
        **kwargs,
    ):
        raise NotImplementedError


@pytest.fixture
def gpu(hooks, monkeypatch):
    """`gpu(model, capability, mode)` kernelizes as transformers does on a GPU of that capability, and tells
    whose functions the model then calls. What transformers would load from the Hub for them is the classes
    above."""
    from kernels.layer import layer, repos

    classes = {"chunk_kimi_delta_attention": TheirChunk, "recurrent_kimi_delta_attention": TheirRecurrent}
    monkeypatch.setattr(kernels.LayerRepository, "load", lambda repo: classes[repo.layer_name])
    monkeypatch.setattr(kernels.LayerRepository, "_resolve_revision", lambda repo: "v1")

    def kernelize(model, capability, mode=Mode.INFERENCE):
        monkeypatch.setattr(repos, "_find_capability", lambda: capability)
        hub_kernels.register_kernel_mapping_transformers()  # what set_use_kernels does first
        for _, module in models.kda_modules(model):
            for one in (*models.functions_of(module).values(), module):
                if hasattr(one, "kernel_layer_name"):
                    layer.kernelize_layer(
                        one, mode=mode, device_type=kernels.Device("cuda"),
                        use_fallback=kernels.KernelizeFallback.ALL,
                    )  # fmt: skip
        return runs(model)

    return kernelize


THEIRS, OURS, OWN = ("TheirChunk", "TheirRecurrent", "own"), ("ours",) * 3, ("own",) * 3


@pytest.mark.parametrize("mode", [Mode.INFERENCE, COMPILED], ids=["inference", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hopper_runs_ours_and_other_gpus_do_not(gpu, kernel_package, family, mode):
    model = build(family)
    default = THEIRS if mode == Mode.INFERENCE else OWN
    assert gpu(model, 90, mode) == default
    hf_layer.register()
    assert gpu(model, 90, mode) == OURS
    for capability in (75, 80, 89, 100, 120):
        assert gpu(model, capability, mode) == default
    hf_layer.unregister()
    assert gpu(model, 90, mode) == default


def test_training_stays_with_transformers(gpu, kernel_package):
    model = build("kimi_linear")
    wanted = gpu(model, 90, Mode.TRAINING)
    assert wanted == ("TheirChunk", "own", "own")
    hf_layer.register()
    assert gpu(model, 90) == OURS
    assert gpu(model, 90, Mode.TRAINING) == wanted
    assert gpu(model, 90, Mode.TRAINING | Mode.TORCH_COMPILE) == OWN
    assert gpu(model, 90) == OURS


@pytest.mark.parametrize("ended", [False, True], ids=["replaced", "unregistered"])
@pytest.mark.parametrize("first", [(90, 90), (80, 100), (100, 129)], ids=str)
def test_an_earlier_range_leaves_nothing_behind(gpu, kernel_package, first, ended):
    """Narrower, overlapping from below and from above."""
    model = build("kimi_linear")
    hf_layer.register(capability=first)
    if ended:
        hf_layer.unregister()
    hf_layer.register(capability=(86, 120))
    assert {gpu(model, capability) for capability in (86, 90, 100, 120)} == {OURS}
    assert {gpu(model, capability) for capability in (80, 85, 121)} == {THEIRS}


def test_a_second_call_replaces_the_first(gpu, kernel_package):
    model = build("kimi_linear")
    hf_layer.register(capability=(80, 129))
    assert {gpu(model, capability) for capability in (80, 90, 120)} == {OURS}
    hf_layer.register()
    assert gpu(model, 80) == gpu(model, 120) == THEIRS
    assert gpu(model, 90) == OURS


# ---------------------------------------------------------------------------------------------------------
# models


@pytest.fixture
def saved(tmp_path):
    """`saved(family)`: (a model, the folder that it is saved in)."""

    def save(family):
        model = build(family)
        model.save_pretrained(tmp_path / family)
        return model, tmp_path / family

    return save


def load(model, folder):
    return type(model).from_pretrained(folder, use_kernels=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained(hooks, saved, cpu_kernel, family):
    """Every later model is ours, until `unregister`; and it writes the tokens that it writes without us."""
    model, folder = saved(family)
    wanted = generate(model)
    hf_layer.register(devices=("cuda", "cpu"))
    for _ in range(2):
        loaded = load(model, folder)
        report = hf_layer.report(loaded)
        assert report.kernel_runs and len(report.layers) == 2, str(report)
        assert torch.equal(generate(loaded), wanted)
    hf_layer.unregister()
    assert hf_layer.report(loaded).kernel_runs  # a model keeps what it has
    hf_layer.unkernelize(loaded)
    loaded = load(model, folder)
    assert runs(loaded) == OWN and not hf_layer.report(loaded).kernel_runs
    assert torch.equal(generate(loaded), wanted)


def test_set_use_kernels_train_and_eval(hooks, cpu_kernel):
    model = build("kimi_linear")
    wanted = generate(model)
    hf_layer.register(devices="cpu")
    assert not hf_layer.report(model).kernel_runs
    for _ in range(2):
        model.set_use_kernels(True)
        assert hf_layer.report(model).kernel_runs
    model.set_use_kernels(True, mode=COMPILED)
    assert hf_layer.report(model).kernel_runs
    model.train()
    assert runs(model) == OWN
    assert {layer.why for layer in hf_layer.report(model).layers} == {
        "in training mode transformers' own functions run"
    }
    model.eval()
    assert hf_layer.report(model).kernel_runs
    assert torch.equal(generate(model), wanted)


def test_other_devices_keep_what_they_have(hooks, saved):
    model, folder = saved("kimi_linear")
    hf_layer.register()
    loaded = load(model, folder)
    assert runs(loaded) == OWN
    assert torch.equal(generate(loaded), generate(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_there_already(hooks, cpu_kernel, family):
    model = build(family)
    wanted = generate(model)
    assert hf_layer.kernelize(model) is model
    assert hf_layer.report(model).kernel_runs
    assert torch.equal(generate(model), wanted)
    assert hf_layer.unkernelize(model) is model
    assert not hf_layer.report(model).kernel_runs
    assert torch.equal(generate(model), wanted)
    hf_layer.unkernelize(model)


def test_where_the_kernel_comes_from(hooks, cpu_kernel, cpu_variant_dir, tmp_path):
    """A folder, given to either call; a repository and a build/ count as well as a variant."""
    for path in (cpu_variant_dir, str(cpu_variant_dir), ROOT / "build", ROOT):
        model = build("kimi_linear")
        hf_layer.kernelize(model, path=path)
        assert {layer.variant for layer in hf_layer.report(model).layers} == {cpu_variant_dir.name}
        hf_layer.unkernelize(model)
    hf_layer.register(path=cpu_variant_dir, devices="cpu")
    model.set_use_kernels(True)
    assert {layer.variant for layer in hf_layer.report(model).layers} == {cpu_variant_dir.name}


# ---------------------------------------------------------------------------------------------------------
# what can be wrong


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(devices="rocm"), ValueError, r"devices: expected some of \('cuda', 'cpu'\), got \('rocm',\)"),
        (dict(devices=()), ValueError, r"devices: expected some of .*, got \(\)"),
        (
            dict(capability=(100, 90)),
            ValueError,
            r"capability: expected \(least, greatest\).*, got \(100, 90\)",
        ),
        (dict(path="/no/such/folder"), FileNotFoundError, "path: expected a folder, got '/no/such/folder'"),
        (
            dict(path="/", repo_id="me/fork"),
            ValueError,
            "path: expected no repo_id and no revision with it, got 'me",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(hooks, options, error, message):
    with pytest.raises(error, match=message):
        hf_layer.register(**options)
    assert models.registration() is None
    assert not hasattr(models.import_families()[0], "kernel_layer_name")


def test_a_kernel_that_cannot_be_loaded(hooks, saved, monkeypatch, caplog):
    """The model works as without us; a warning, once, and the report say why."""
    model, folder = saved("kimi_linear")
    monkeypatch.setenv("LOCAL_KERNELS", "org/flash-kda=/no/such/folder")
    models._warn_once.cache_clear()
    hf_layer.register(devices="cpu")
    with caplog.at_level(logging.WARNING, "hf_layer.models"):
        loaded = load(model, folder)
    (record,) = [record for record in caplog.records if record.name == "hf_layer.models"]
    assert "no kernel could be loaded: LOCAL_KERNELS: FileNotFoundError: " in record.getMessage()
    assert runs(loaded) == OWN
    assert torch.equal(generate(loaded), generate(model))
    for layer in hf_layer.report(loaded).layers:
        assert layer.why.startswith("no kernel could be loaded: LOCAL_KERNELS: FileNotFoundError: ")
    with pytest.raises(RuntimeError, match="hf_layer.kernelize: no kernel could be loaded: LOCAL_KERNELS: "):
        hf_layer.kernelize(loaded)
    assert runs(loaded) == OWN


def test_a_model_without_kda_layers(cpu_kernel):
    with pytest.raises(ValueError, match="model: expected one with KDA layers .*, got Linear"):
        hf_layer.kernelize(torch.nn.Linear(2, 2))


def test_versions_that_do_not_fit_are_named(hooks, monkeypatch):
    """transformers 5.23 asks for kernels 0.18.2, and with 0.17.2 quietly does without its hooks."""
    from transformers.utils import import_utils

    # not the module of the import above: transformers replaces it when a model's file is imported
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.23.0")
    monkeypatch.setattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")
    monkeypatch.setattr(import_utils, "KERNELS_MAX_VERSION", "0.19.0")
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: False)
    with pytest.raises(RuntimeError) as error:
        hf_layer.register()
    assert str(error.value) == (
        "hf_layer.register: transformers 5.23.0 accepts the package kernels from 0.18.2 to below 0.19.0 and "
        f"turned its hooks off, and {kernels.__version__} is installed; install versions of both that fit "
        "each other"
    )


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    """`code` in a new interpreter whose sockets raise, with build/ out of sight."""
    guard = """
        import socket
        def refuse(*args, **kwargs):
            raise AssertionError("the network was touched")
        socket.socket.connect = socket.socket.connect_ex = refuse
        socket.getaddrinfo = socket.create_connection = refuse
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(guard) + textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_hooks_that_are_turned_off_by_the_environment():
    done = run_python("import hf_layer.auto", USE_HUB_KERNELS="NO")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: hf_layer.register: transformers ") and "USE_HUB_KERNELS=NO" in last
    done = run_python("import hf_layer.auto", DISABLE_KERNEL_MAPPING="1")
    assert done.returncode == 1 and "DISABLE_KERNEL_MAPPING" in done.stderr.splitlines()[-1]


def test_without_transformers():
    done = run_python("import sys; sys.modules['transformers'] = None; import hf_layer.auto")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: hf_layer.register needs transformers: pip install"
    )


def test_auto_registers_and_loads_nothing():
    done = run_python(
        """
        import hf_layer.auto
        from hf_layer import loading, models
        print(models.registration().devices, models.registration().capability, loading._loads)
        print([cls.kernel_layer_name for cls in models.import_families()])
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["('cuda',) (90, 90) {}", str(["KimiDeltaAttention"] * 3)]

"""load_kernel: where it looks, what it keeps; and the flash_kda front module on top of it."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import kernels
import pytest
import torch

import flash_kda
from hf_layer import (
    api,
    decode,
    fused_decode,
    hub_layers,
    kernel_status,
    load_kernel,
    loading,
    ops,
    reference,
)

ROOT = Path(loading.__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No settings from outside and nothing loaded yet."""
    for name in ("LOCAL_KERNELS", loading.ENV_REPO, loading.ENV_TRUST):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(loading, "_loads", {})


@pytest.fixture
def gpu(monkeypatch):
    """As on a machine with a GPU, away from any checkout's build/."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "checkout_with_build", lambda: None)


@pytest.fixture
def hub(monkeypatch):
    """Stands in for kernels.get_kernel; the list of calls it got."""
    calls = []

    def get_kernel(repo_id, **options):
        calls.append((repo_id, options))
        return types.SimpleNamespace(
            __file__="/cache/build/torch-stable-abi211-cu130-x86_64-linux/__init__.py"
        )

    monkeypatch.setattr(kernels, "get_kernel", get_kernel)
    return calls


def write_variant(folder: Path, body: str) -> Path:
    """A build variant without compiled code, which `kernels` loads anywhere; `body` is its __init__.py."""
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(textwrap.dedent(body))
    metadata = {
        "id": f"_flash_kda_test_{abs(hash(str(folder)))}",
        "name": "flash-kda",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


def run_python(code: str, **env: str) -> str:
    """Output of `code` in a new interpreter without a GPU, whose sockets raise."""
    guard = """
        import socket
        def refuse(*args, **kwargs):
            raise AssertionError("the network was touched")
        socket.socket.connect = socket.socket.connect_ex = refuse
        socket.getaddrinfo = socket.create_connection = refuse
    """
    drop = ("LOCAL_KERNELS", "HF_HUB_OFFLINE", loading.ENV_REPO, loading.ENV_TRUST)
    keep = {name: value for name, value in os.environ.items() if name not in drop}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(guard) + textwrap.dedent(code)],
        env={**keep, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_and_a_machine_without_gpu_touch_nothing():
    output = run_python("""
        import sys
        import hf_layer, flash_kda
        assert "torch" not in sys.modules and "kernels" not in sys.modules
        import hf_layer.layer
        from hf_layer import loading
        loading.checkout_with_build = lambda: None
        print(hf_layer.kernel_status())
        print(callable(flash_kda.chunk_kda), flash_kda.reference.__name__)
        assert "kernels" not in sys.modules and "transformers" not in sys.modules
    """)
    assert output.splitlines() == ["reference: no CUDA device", "True hf_layer.reference"]


def test_local_kernels_is_honoured_without_a_network(tmp_path):
    variant = write_variant(tmp_path / "build" / "torch-cpu", "answer = 42")
    output = run_python(
        """
        import flash_kda, hf_layer
        print(hf_layer.kernel_status())
        print(hf_layer.load_kernel(revision="v1").module is hf_layer.load_kernel().module)
        print(flash_kda.answer)
        """,
        LOCAL_KERNELS=f"someone/else=/nowhere:org/flash-kda={variant}",
    )
    assert output.splitlines() == ["flash-kda kernel torch-cpu loaded from LOCAL_KERNELS", "True", "42"]


@pytest.mark.parametrize(
    "value, expected",
    [
        ("org/flash-kda=/no/such/folder", "LOCAL_KERNELS: FileNotFoundError: .*/no/such/folder"),
        ("org/flash-kda=/tmp:nonsense", "LOCAL_KERNELS: ValueError: Invalid LOCAL_KERNELS entry: nonsense"),
    ],
    ids=["missing folder", "malformed"],
)
def test_bad_local_kernels_is_a_reason(value, expected, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", value)
    load = load_kernel()
    assert load.module is None and load.source == "LOCAL_KERNELS"
    assert load.reason is not None and "\n" not in load.reason
    assert re.match(expected, load.reason)
    assert kernel_status() == f"reference: {load.reason}"


def test_a_package_that_fails_to_import_is_a_reason(tmp_path, monkeypatch):
    variant = write_variant(
        tmp_path / "torch-cpu", "raise OSError('libcudart.so.13: cannot open shared object file')"
    )
    monkeypatch.setenv("LOCAL_KERNELS", f"org/flash-kda={variant}")
    assert load_kernel().reason == "LOCAL_KERNELS: OSError: libcudart.so.13: cannot open shared object file"


def test_local_kernels_for_another_repository_says_nothing_about_ours(gpu, hub, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", "someone/else=/nowhere")
    assert load_kernel().source == "the Hub (org/flash-kda)"


def test_what_the_hub_is_asked_for(gpu, hub, monkeypatch):
    load = load_kernel()
    assert load.status == (
        "flash-kda kernel torch-stable-abi211-cu130-x86_64-linux loaded from the Hub (org/flash-kda)"
    )
    load_kernel(revision="v1", trust_remote_code=["org/flash-kda"])
    monkeypatch.setenv(loading.ENV_REPO, "me/fork")
    monkeypatch.setenv(loading.ENV_TRUST, "1")
    load_kernel(version=2)
    assert hub == [
        ("org/flash-kda", {"version": 1, "revision": None, "trust_remote_code": False}),
        ("org/flash-kda", {"version": None, "revision": "v1", "trust_remote_code": ["org/flash-kda"]}),
        ("me/fork", {"version": 2, "revision": None, "trust_remote_code": True}),
    ]


def test_each_set_of_arguments_is_tried_once(gpu, hub):
    assert load_kernel() is load_kernel(version=1)
    assert len(hub) == 1
    load_kernel(repo_id="me/fork")
    assert len(hub) == 2


def test_a_failure_is_kept_and_names_the_way_out(gpu, monkeypatch):
    tries = []

    def get_kernel(repo_id, **options):
        tries.append(repo_id)
        raise ValueError("publisher not trusted.\n  Set trust_remote_code=True")

    monkeypatch.setattr(kernels, "get_kernel", get_kernel)
    for _ in range(2):
        assert load_kernel().reason == (
            "the Hub (org/flash-kda): ValueError: publisher not trusted. Set trust_remote_code=True "
            "(FLASH_KDA_TRUST_REMOTE_CODE=1 trusts it)"
        )
    assert tries == ["org/flash-kda"]


def test_kernels_not_installed_is_a_reason(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)
    load = load_kernel()
    assert load.module is None and "ModuleNotFoundError" in load.reason and "kernels" in load.reason


def test_the_checkout_comes_after_local_kernels_and_before_the_hub(gpu, hub, tmp_path, monkeypatch):
    built = write_variant(tmp_path / "checkout" / "build" / "torch-cpu", "name = 'built'")
    monkeypatch.setattr(loading, "checkout_with_build", lambda: built)
    load = load_kernel()
    assert load.module.name == "built" and load.source == "the checkout's build/"
    assert hub == []

    monkeypatch.setenv("LOCAL_KERNELS", "org/flash-kda=/somewhere")
    assert load_kernel().source == "LOCAL_KERNELS"
    assert len(hub) == 1  # kernels.get_kernel, which reads LOCAL_KERNELS itself


@pytest.mark.parametrize(
    "name, gpu",
    [
        ("torch-cpu", False),
        ("torch-stable-abi211-cpu-x86_64-linux", False),
        ("torch-stable-abi211-cu130-x86_64-linux", True),
    ],
)
def test_a_checkout_counts_once_something_is_built(name, gpu, tmp_path, monkeypatch):
    """A variant for GPUs on a machine with one, a variant for CPUs on any other."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(loading, "__file__", str(tmp_path / "hf_layer" / "loading.py"))
    assert loading.checkout_with_build() is None
    variant = write_variant(tmp_path / "build" / name, "")
    assert loading.checkout_with_build() is None  # an installed package next to somebody's build/
    (tmp_path / "build.toml").touch()
    assert loading.checkout_with_build() == tmp_path
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not gpu)
    assert loading.checkout_with_build() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    (variant / "metadata.json").unlink()
    assert loading.checkout_with_build() is None


def test_without_a_gpu_the_checkout_gives_the_variant_for_cpus(hub, tmp_path, monkeypatch):
    """Whatever torch is made for; and without one nobody is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "build.toml").touch()
    monkeypatch.setattr(loading, "__file__", str(tmp_path / "hf_layer" / "loading.py"))
    write_variant(tmp_path / "build" / "torch-cuda", "name = 'for GPUs'")
    assert load_kernel().status == "reference: no CUDA device"
    loading._loads.clear()
    write_variant(tmp_path / "build" / "torch-cpu", "name = 'for CPUs'")
    load = load_kernel()
    assert load.module.name == "for CPUs"
    assert load.status == "flash-kda kernel torch-cpu loaded from the checkout's build/"
    assert hub == []


def test_a_folder_is_looked_at_and_nothing_else(hub, tmp_path, monkeypatch):
    variant = write_variant(tmp_path / "build" / "torch-cpu", "name = 'named'")
    monkeypatch.setenv("LOCAL_KERNELS", "org/flash-kda=/no/such/folder")
    monkeypatch.setattr(loading, "checkout_with_build", lambda: pytest.fail("the checkout was looked at"))
    for path in (variant, str(variant), tmp_path / "build", tmp_path):
        load = load_kernel(path=path)
        assert load.module.name == "named" and load.source == str(path)
    load = load_kernel(path=tmp_path / "nothing")
    assert load.module is None and load.reason.startswith(f"{tmp_path / 'nothing'}: ")
    assert hub == []
    with pytest.raises(
        ValueError, match="path: expected no repo_id and no revision with it, got 'me/fork', None"
    ):
        load_kernel(path=variant, repo_id="me/fork")
    with pytest.raises(ValueError, match="path: expected no repo_id and no revision with it, got None, 'v1'"):
        load_kernel(path=variant, revision="v1")


@pytest.mark.parametrize("named", [dict(repo_id="me/fork"), dict(revision="v1")], ids=str)
@pytest.mark.parametrize("has_gpu", [False, True], ids=["no GPU", "GPU"])
def test_a_repository_that_is_named_is_asked_for_with_or_without_a_gpu(has_gpu, named, hub, monkeypatch):
    """Rather than the checkout. Without a GPU it is the variant for CPUs, whatever torch is made for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(loading, "checkout_with_build", lambda: pytest.fail("the checkout was looked at"))
    load_kernel(**named, trust_remote_code=("me/fork",))
    ((repo_id, options),) = hub
    assert repo_id == named.get("repo_id", "org/flash-kda")
    wanted = dict(version=None if "revision" in named else 1, revision=named.get("revision"))
    wanted |= dict(trust_remote_code=["me/fork"]) | ({} if has_gpu else dict(backend="cpu"))
    assert options == wanted


def test_front_without_a_kernel(monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", "org/flash-kda=/no/such/folder")
    assert flash_kda.reference is reference
    assert flash_kda.chunk_kda is api.chunk_kda
    assert flash_kda.fused_recurrent_kda is decode.fused_recurrent_kda
    assert flash_kda.fused_kda_decode is fused_decode.fused_kda_decode
    assert flash_kda.layers is hub_layers
    with pytest.raises(ImportError, match="flash_kda.fwd needs the kernel, .*/no/such/folder"):
        flash_kda.fwd
    with pytest.raises(ImportError, match="/no/such/folder"):
        from flash_kda import fwd  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'forward'"):
        flash_kda.forward
    with pytest.raises(RuntimeError, match="this call needs the kernel, .*/no/such/folder"):
        ops.kda_prefill()
    with pytest.raises(RuntimeError, match="this call needs the kernel, .*/no/such/folder"):
        ops.kda_decode()


def test_front_hands_names_on_to_the_kernel(gpu, hub, monkeypatch):
    assert "fwd" in dir(flash_kda)
    assert not hasattr(flash_kda, "__wrapped__") and not hasattr(flash_kda, "_repr_html_")
    assert hub == []  # so far nobody needed the kernel

    monkeypatch.setattr(
        kernels, "get_kernel", lambda *a, **k: types.SimpleNamespace(fwd=print, extra=7, __file__="/v/m")
    )
    assert flash_kda.fwd is print and flash_kda.extra == 7
    with pytest.raises(AttributeError):
        flash_kda.missing


def test_front_names_are_those_of_the_package():
    tree = ast.parse((ROOT / "torch-ext" / "flash_kda" / "__init__.py").read_text())
    assigned = [n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"]
    assert sorted(flash_kda.__all__) == sorted(ast.literal_eval(assigned[0].value))


def test_fla_finds_the_front_by_name():
    assert importlib.util.find_spec("flash_kda") is not None


def test_front_runs_the_call_of_fla_on_the_cpu(monkeypatch):
    """chunk_kda has one signature, FLA's, whether a kernel is there or not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(2, 20, 2, 16, generator=generator) for _ in range(4))
    beta, h0 = torch.randn(2, 20, 2, generator=generator), torch.randn(2, 2, 16, 16, generator=generator)
    A_log, dt_bias = torch.randn(2, generator=generator), torch.randn(2, 16, generator=generator)
    options = dict(
        scale=0.3,
        initial_state=h0,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=-5.0,
        state_v_first=True,
    )
    expected = reference.recurrent_kda(q.double(), k, v, g, beta, **options)
    found = flash_kda.chunk_kda(q=q, k=k, v=v, g=g, beta=beta, safe_gate=True, **options)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=1e-5)

"""Every code block of the seed document (tests/seed/blocks.md) runs as it stands and gives the right numbers.

A name that a block uses and does not define is handed to it. An ellipsis in a call stands for arguments
that the document leaves out: the function that the block calls then fills them in. Results are compared
with the float64 reference.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from kda_inputs import rel_rms

ROOT = Path(__file__).resolve().parent.parent
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # of child processes
DOCUMENT = ROOT / "tests/seed/blocks.md"
DIGEST = "ef5aab806be02ba4564fe0ec0fcc71243a7470af144a95c51243a2d0dcb7ae64"
TOLERANCE = 5e-3  # relative RMS for random keys, as in tests/gpu: bf16 operands give 3.5e-3 to 4.6e-3


class Block(NamedTuple):
    language: str
    line: int  # of the first line of code
    code: str


def read_blocks() -> dict[str, Block]:
    text = DOCUMENT.read_text()
    pattern = re.compile(r"^<!-- (\S+) -->\n```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return {
        match[1]: Block(match[2], text.count("\n", 0, match.start(3)) + 1, match[3])
        for match in pattern.finditer(text)
    }


BLOCKS = read_blocks()


def capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def gpu(needed: tuple[int, int] = (8, 0)):
    """Marks a test that needs a CUDA device of this compute capability."""

    def mark(test):
        reason = f"needs a CUDA device of compute capability {needed[0]}.{needed[1]} or newer"
        return pytest.mark.gpu(pytest.mark.skipif(capability() < needed, reason=reason)(test))

    return mark


def run(name: str, namespace: dict | None = None, names=None) -> dict:
    """The names that a Python block leaves behind; tracebacks show blocks.md and its lines."""
    block = BLOCKS[name]
    code = compile("\n" * (block.line - 1) + block.code, str(DOCUMENT), "exec")
    namespace = {"__name__": "__main__", **(namespace or {})}
    exec(code, namespace, namespace if names is None else names)
    return namespace


def shell(name: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", BLOCKS[name].code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def fwd_calls(kernel_package, monkeypatch):
    """Arguments of all calls of `flash_kda.fwd`, by name, in order."""
    import flash_kda

    calls, fwd = [], flash_kda.fwd
    signature = inspect.signature(fwd)

    def recording(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        fwd(*args, **kwargs)
        calls.append(bound.arguments)

    monkeypatch.setattr(flash_kda, "fwd", recording, raising=False)
    return calls


def reference_of(kernel, call: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, final_state [N, HV, V, K]) of one call of `fwd`, in float64."""
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
    tensors = {name: None if call[name] is None else call[name].double() for name in names}
    with torch.no_grad():
        return kernel.reference.chunk_kda(
            **tensors,
            scale=call["scale"],
            lower_bound=call["lower_bound"],
            cu_seqlens=call["cu_seqlens"],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            state_v_first=True,
        )


def assert_right(kernel, call: dict) -> None:
    """`out` and `final_state` of a call of `fwd` hold what the reference says."""
    o, final_state = reference_of(kernel, call)
    assert rel_rms(o, call["out"]) <= TOLERANCE
    if call["final_state"] is not None:
        assert rel_rms(final_state, call["final_state"]) <= TOLERANCE


def fwd_arguments(B: int = 1, T: int = 512, H: int = 8, K: int = 128, **changes) -> dict:
    """Arguments of `fwd` that the document's short blocks do not name."""

    def normal(*size):
        return torch.randn(*size, dtype=torch.bfloat16, device="cuda")

    arguments = dict(
        q=normal(B, T, H, K),
        k=normal(B, T, H, K),
        v=normal(B, T, H, K),
        g=normal(B, T, H, K),
        beta=normal(B, T, H),
        scale=K**-0.5,
        out=torch.empty(B, T, H, K, dtype=torch.bfloat16, device="cuda"),
        A_log=torch.zeros(H, device="cuda"),
        dt_bias=torch.zeros(H, K, device="cuda"),
        lower_bound=-5.0,
    )
    return {**arguments, **changes}


@pytest.fixture
def fla_on_our_backend(kernel_package):
    """`fla.ops.kda.chunk_kda` with our backend registered."""
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    import fla.ops.kda

    import hf_layer.fla

    hf_layer.fla.register()
    yield fla.ops.kda.chunk_kda
    hf_layer.fla.unregister()


# ----------------------------------------------------------------------------------------------------
# the blocks themselves


def test_blocks_are_the_document_s():
    lines = [line.strip() for block in BLOCKS.values() for line in block.code.splitlines()]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == DIGEST


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_has_a_test_and_parses(name):
    assert callable(globals()[f"test_{name.replace('-', '_')}"])
    if BLOCKS[name].language == "python":
        compile(BLOCKS[name].code, name, "exec")
    else:
        subprocess.run(["bash", "-n"], input=BLOCKS[name].code, text=True, check=True)


# ----------------------------------------------------------------------------------------------------
# the low-level call


@gpu()
def test_core_api(kernel_package, fwd_calls):
    run("core-api", fwd_arguments())
    assert len(fwd_calls) == 1
    assert_right(kernel_package, fwd_calls[0])


@gpu()
def test_direct(kernel_package, fwd_calls, capsys):
    left = run("direct")
    assert capsys.readouterr().out.split("\n")[:2] == [
        "torch.Size([1, 4096, 8, 128])",
        "torch.Size([1, 8, 128, 128])",
    ]
    (call,) = fwd_calls
    assert call["out"] is left["out"] and call["final_state"] is left["state"]
    assert_right(kernel_package, call)


@gpu()
def test_packed(kernel_package, fwd_calls, capsys):
    left = run("packed")
    assert left["out"].shape == (1, 1280, 16, 128) and left["final_state"].shape == (2, 16, 128, 128)
    assert capsys.readouterr().out.count("torch.Size") == 2
    (call,) = fwd_calls
    assert_right(kernel_package, call)


@gpu()
def test_streaming(kernel_package, fwd_calls, capsys):
    run("streaming")
    shapes = "out=torch.Size([2, 256, 16, 128]), state=torch.Size([2, 16, 128, 128])"
    assert capsys.readouterr().out.splitlines() == [f"Chunk {n}: {shapes}" for n in range(4)]
    assert len(fwd_calls) == 4 and fwd_calls[0]["initial_state"] is None
    for call, before in zip(fwd_calls[1:], fwd_calls):
        assert call["initial_state"] is before["final_state"]
    for call in fwd_calls:
        assert_right(kernel_package, call)
    # and together they are one sequence of 1024 tokens
    whole = {name: torch.cat([call[name] for call in fwd_calls], 1) for name in ("q", "k", "v", "g", "beta")}
    o, final_state = reference_of(kernel_package, {**fwd_calls[0], **whole})
    assert rel_rms(o, torch.cat([call["out"] for call in fwd_calls], 1)) <= TOLERANCE
    assert rel_rms(final_state, fwd_calls[-1]["final_state"]) <= TOLERANCE


# ----------------------------------------------------------------------------------------------------
# through flash-linear-attention


def as_fwd_call(left: dict) -> dict:
    """What the block "fla" computed, in the words of `fwd`."""
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "scale", "lower_bound", "out", "final_state")
    return {**{name: left[name] for name in names}, "initial_state": left["h0"], "cu_seqlens": None}


@gpu()
def test_fla(kernel_package, fla_on_our_backend, caplog):
    with caplog.at_level(logging.INFO), pytest.warns(DeprecationWarning, match="state_v_first"):
        left = run("fla")
    assert "[FLA Backend] kda.chunk_kda -> flashkda" in caplog.messages
    assert left["out"].shape == (2, 2048, 16, 128) and left["final_state"].shape == (2, 16, 128, 128)
    assert_right(kernel_package, as_fwd_call(left))


def test_fla_s_own_backend_turns_the_old_keyword_away():
    """Without `register()` this block runs on Triton: FLA 0.6 asks for `state_v_first` by its new name."""
    pytest.importorskip("triton", reason="flash-linear-attention is not installed")
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    from fla.ops.kda.backends.flash_kda import FlashKDABackend

    x = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16)
    flags = ("use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "safe_gate")
    arguments = dict(A_log=x, dt_bias=x, lower_bound=-5.0, **dict.fromkeys(flags, True))
    with torch.inference_mode():
        ask = FlashKDABackend().chunk_kda_verifier
        assert ask(x, x, x, x, x, state_v_first=True, **arguments) == (True, None)
        taken, reason = ask(x, x, x, x, x, transpose_state_layout=True, **arguments)
    assert not taken and "state_v_first" in reason


@gpu()
def test_inference_mode(kernel_package, fla_on_our_backend, caplog):
    arguments = fwd_arguments(T=200)
    del arguments["out"]
    arguments.update(
        use_gate_in_kernel=True,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        output_final_state=True,
        state_v_first=True,
    )

    def chunk_kda(elided):
        assert elided is Ellipsis
        return fla_on_our_backend(**arguments)

    with caplog.at_level(logging.INFO):
        left = run("inference-mode", {"torch": torch, "chunk_kda": chunk_kda})
    assert "[FLA Backend] kda.chunk_kda -> flashkda" in caplog.messages
    found = {"out": left["out"], "final_state": left["state"], "initial_state": None, "cu_seqlens": None}
    assert_right(kernel_package, {**arguments, **found})
    with torch.no_grad():  # is as good
        assert torch.equal(fla_on_our_backend(**arguments)[0], left["out"])


@gpu()
def test_dispatch_logging(kernel_package, tmp_path):
    """A script that begins with this block writes the two lines that it promises."""
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    script = tmp_path / "script.py"
    script.write_text(
        BLOCKS["dispatch-logging"].code
        + "import hf_layer.fla\nhf_layer.fla.register()\n"
        + BLOCKS["fla"].code
        + "hf_layer.fla.Backend().chunk_kda_verifier(q, k, v, g, beta, use_graph=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("INFO:hf_layer.fla:")]
    assert said[0] == "INFO:hf_layer.fla:[FLA Backend] kda.chunk_kda -> flashkda"
    assert said[1].startswith("INFO:hf_layer.fla:[FLA Backend] kda.chunk_kda rejected: use_graph")


def test_environment(tmp_path):
    """FLA_FLASH_KDA=0 turns FLA's own backend and ours off: what is left is Triton."""
    pytest.importorskip("triton", reason="flash-linear-attention is not installed")
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    (tmp_path / "your_script.py").write_text(
        "import hf_layer.fla\n"
        "hf_layer.fla.register()\n"
        "from fla.ops.kda.backends.flash_kda import FlashKDABackend\n"
        "print([backend().is_enabled() for backend in (hf_layer.fla.Backend, FlashKDABackend)])\n"
    )
    python = tmp_path / "python"  # a link would lose the environment that this interpreter belongs to
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": PYTHONPATH}
    done = shell("environment", tmp_path, **environment)
    assert done.returncode == 0 and done.stdout.strip() == "[False, False]", done.stderr
    command = [sys.executable, "your_script.py"]
    environment = {**os.environ, **environment, "FLA_FLASH_KDA": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[True, True]", done.stderr


# ----------------------------------------------------------------------------------------------------
# constraints and troubleshooting


@gpu((9, 0))
def test_gpu_compatibility():
    assert run("gpu-compatibility")["cap"] == capability()


@gpu()
def test_head_dim(kernel_package, fwd_calls):
    import flash_kda

    made = []

    def randn(*size):
        assert size[-1] is Ellipsis
        made.append(torch.randn(*size[:-1], dtype=torch.bfloat16, device="cuda"))
        return made[-1]

    run("head-dim", {"torch": SimpleNamespace(randn=randn)})
    wrong, right = made
    with pytest.raises(RuntimeError, match="q: expected K = 128, got K = 64"):
        flash_kda.fwd(**fwd_arguments(K=64, q=wrong))
    flash_kda.fwd(**fwd_arguments(q=right))
    assert_right(kernel_package, fwd_calls[-1])


@gpu()
def test_state_dtype(kernel_package, fwd_calls):
    import flash_kda

    left = run("state-dtype", dict(torch=torch, B=1, H=8, V=128, K=128))
    states = dict(initial_state=left["initial"], final_state=left["final"])
    flash_kda.fwd(**fwd_arguments(T=100), **states)
    assert_right(kernel_package, fwd_calls[-1])
    states["initial_state"] = left["initial"].bfloat16()
    with pytest.raises(RuntimeError, match="final_state: expected the dtype of initial_state"):
        flash_kda.fwd(**fwd_arguments(T=100), **states)


@gpu()
def test_lower_bound(kernel_package, fwd_calls):
    import flash_kda

    class Assigned(dict):
        values = []

        def __setitem__(self, name, value):
            assert name == "lower_bound"
            self.values.append(value)

    run("lower-bound", names=Assigned())
    *valid, out_of_spec = Assigned.values
    assert valid == [-5.0, -2.5, 0.0] and out_of_spec == -10.0
    for value in valid:
        flash_kda.fwd(**fwd_arguments(T=200, lower_bound=value))
        assert_right(kernel_package, fwd_calls[-1])
    with pytest.raises(RuntimeError, match=r"lower_bound: expected a value in \[-5, 0\], got -10"):
        flash_kda.fwd(**fwd_arguments(T=200, lower_bound=out_of_spec))


# ----------------------------------------------------------------------------------------------------
# the commands


def test_run_tests():
    """`bash tests/test.sh` finds tests/test_fwd.py; here it only collects, lest this test run itself."""
    options = {"PYTEST_ADDOPTS": "--collect-only -q -p no:cacheprovider tests/test_fwd.py"}
    done = shell("run-tests", ROOT, FLASH_KDA_PYTHON=sys.executable, FLASH_KDA_NO_BUILD="1", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/test_fwd.py::test_fwd_is_the_reference" in done.stdout


def test_clangd(tmp_path, toolchain):
    """tests/test_clangd.py has clang's opinion of the file."""
    for name in ("build.toml", "kda_kernel", "torch-ext", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "setup_clangd.sh", tmp_path)
    done = shell("clangd", tmp_path, FLASH_KDA_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert str(toolchain.cuda_home) in (tmp_path / ".clangd").read_text()

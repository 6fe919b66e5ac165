"""flash-linear-attention beside our kernel: the same function, and its dispatch to the module `flash_kda`."""

from __future__ import annotations

import pytest
import torch
from harness import TOLERANCE, assert_accurate, inputs_for, reference, worst_errors
from kda_inputs import rel_rms

pytest.importorskip("fla", reason="flash-linear-attention is not installed")

FLA_TOLERANCE = 1e-2  # FLA keeps more intermediates in bf16 than our kernel does

CASES = {
    "lower-strong": ("lower-strong", dict(B=2, T=300)),
    "lower-weak-v-first-pack": ("lower-weak", dict(lengths=(100, 17, 183), state_v_first=True)),
    "softplus-grouped": ("softplus-init", dict(T=300, H=2, HV=4)),
    "preactivated-neg-eigval": ("lower-weak", dict(T=300, preactivated=True, allow_neg_eigval=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_same_function_as_fla(kernel_package, case, monkeypatch):
    """Both are close to the float64 reference, so every argument means the same to both."""
    monkeypatch.setenv("FLA_FLASH_KDA", "0")
    from fla.ops.kda import chunk_kda

    gate, options = CASES[case]
    inputs = inputs_for(gate, **options)
    arguments = {**inputs, "safe_gate": gate.startswith("lower")}
    if not inputs["use_gate_in_kernel"]:
        arguments.update(A_log=None, dt_bias=None, lower_bound=None)
    with torch.no_grad():
        theirs = chunk_kda(**arguments)
        ours = kernel_package.chunk_kda(**arguments)
    expected = reference(kernel_package, inputs)
    assert max(worst_errors(inputs, theirs, expected)) <= FLA_TOLERANCE
    assert max(worst_errors(inputs, ours, expected)) <= TOLERANCE


@pytest.fixture
def counted_fwd(kernel_package, monkeypatch):
    """The number of calls that reach `flash_kda.fwd`, as the length of a list."""
    import flash_kda

    calls = []
    fwd = flash_kda.fwd
    assert fwd is kernel_package.fwd

    def counting(*arguments, **keywords):
        calls.append((arguments, keywords))
        return fwd(*arguments, **keywords)

    monkeypatch.setattr(flash_kda, "fwd", counting, raising=False)
    monkeypatch.delenv("FLA_FLASH_KDA", raising=False)
    return calls


@pytest.mark.parametrize("shape", [dict(B=2, T=300), dict(lengths=(100, 0, 17, 183))], ids=["batch", "pack"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda mode: mode.__name__)
def test_fla_dispatches_to_us(kernel_package, counted_fwd, mode, shape):
    from fla.ops.kda import chunk_kda

    inputs = inputs_for("lower-strong", state_v_first=True, **shape)
    with mode():
        found = chunk_kda(**inputs, safe_gate=True)
    assert len(counted_fwd) == 1
    assert_accurate(kernel_package, inputs, found)
    ours = kernel_package.chunk_kda(**inputs)
    assert torch.equal(found[0], ours[0]) and rel_rms(ours[1], found[1]) == 0


def test_fla_keeps_what_fwd_does_not_serve(kernel_package, counted_fwd):
    """K-first states are not for `fwd`: FLA runs its own kernels, and ours gives the same by `chunk_kda`."""
    from fla.ops.kda import chunk_kda

    inputs = inputs_for("lower-strong", B=2, T=300)
    with torch.inference_mode():
        theirs = chunk_kda(**inputs, safe_gate=True)
    assert not counted_fwd
    assert max(worst_errors(inputs, theirs, reference(kernel_package, inputs))) <= FLA_TOLERANCE

"""Derivatives: whatever asks for one gets that of the recurrence, and never a silent zero or nothing.

The reference's own gradients are checked against finite differences in float64 in test_reference.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from kda_inputs import make_inputs, rel_rms
from torch.autograd import forward_ad

kernels = pytest.importorskip("kernels")
transformers = pytest.importorskip("transformers", minversion="5.20.2")
pytest.importorskip("rich")
import hf_layer  # noqa: E402
from hf_layer import models, reference  # noqa: E402
from tiny_models import FAMILIES, build, one_thread, prompts  # noqa: E402, F401

NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
LIMIT = 3e-6  # relative RMS of a float32 derivative against float64; the worst of these has 4e-7


def inputs(gate: str, preactivated: bool = False):
    """Arguments that the CPU's kernel would serve, 40 tokens packed as three sequences, and those that have a
    derivative."""
    kwargs = make_inputs(
        gate, 1, 40, 1, 2, dtype=torch.float32, initial_state=True, cu_seqlens=[0, 17, 17, 40],
        preactivated=preactivated,
    )  # fmt: skip
    return kwargs, [name for name in NAMES if kwargs[name] is not None]


def exact(kwargs: dict) -> dict:
    """The same in float64."""
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in kwargs.items()
    }


def weighted(o: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """A number that depends on every element of both results."""
    generator = torch.Generator().manual_seed(1)
    return sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in (o, state))


CALLS = ("chunk_kda", "fused_recurrent_kda")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("preactivated", [False, True], ids=["raw", "preactivated"])
@pytest.mark.parametrize("gate", ["lower-strong", "softplus-init", "softplus-resets"])
def test_one_input_that_asks_is_enough(cpu_kernel, gate, preactivated, call):
    kwargs, names = inputs(gate, preactivated)
    with torch.no_grad():
        assert cpu_kernel.api.reference_reason(*(kwargs[name] for name in NAMES)) is None
    for name in names:
        leaf = kwargs[name].clone().requires_grad_()
        (found,) = torch.autograd.grad(weighted(*getattr(cpu_kernel, call)(**kwargs | {name: leaf})), leaf)
        leaf = kwargs[name].double().requires_grad_()
        wanted = reference.recurrent_kda(**exact(kwargs) | {name: leaf})
        (wanted,) = torch.autograd.grad(weighted(*wanted), leaf)
        assert wanted.any(), name
        assert rel_rms(wanted, found) < LIMIT, name


@pytest.mark.parametrize("call", CALLS)
def test_a_gradient_through_out(cpu_kernel, call):
    kwargs, _ = inputs("lower-weak")
    leaf, out = kwargs["v"].clone().requires_grad_(), torch.empty_like(kwargs["v"])
    o, _ = getattr(cpu_kernel, call)(**kwargs | {"v": leaf}, out=out)
    assert o is out
    (found,) = torch.autograd.grad(o.sum(), leaf)
    leaf = kwargs["v"].double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference.recurrent_kda(**exact(kwargs) | {"v": leaf})[0].sum(), leaf)
    assert rel_rms(wanted, found) < LIMIT


def tangents(call, name: str, x: torch.Tensor, direction: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Directional derivatives of both results, by dual numbers and by torch.func.jvp."""
    with forward_ad.dual_level():
        results = call(**{name: forward_ad.make_dual(x, direction)})
        by_dual = tuple(forward_ad.unpack_dual(result).tangent for result in results)
    by_dual = tuple(torch.zeros_like(x) if y is None else y for x, y in zip(results, by_dual))
    _, by_jvp = torch.func.jvp(lambda x: call(**{name: x}), (x,), (direction,))
    return [by_dual, by_jvp]


@pytest.mark.parametrize("call", CALLS)
def test_derivatives_forward(cpu_kernel, call):
    """The operators have no such derivative either; torch would take that for a zero."""
    kwargs, names = inputs("softplus-init")
    ours = getattr(cpu_kernel, call)
    truth = exact(kwargs)
    for name in names:
        direction = torch.randn(kwargs[name].shape, generator=torch.Generator().manual_seed(2))
        found = tangents(lambda **x: ours(**kwargs | x), name, kwargs[name], direction)
        wanted = tangents(
            lambda **x: reference.recurrent_kda(**truth | x), name, truth[name], direction.double()
        )
        for results, expected in zip(found, wanted):
            for one, other in zip(results, expected):
                assert rel_rms(other, one) < LIMIT if other.any() else not one.any(), name
        assert found[0][0].any() and wanted[0][0].any(), name  # o depends on each, the state not on q


@pytest.mark.parametrize("call", CALLS)
def test_functional_gradients(cpu_kernel, call):
    kwargs, _ = inputs("softplus-init")
    ours = getattr(cpu_kernel, call)
    truth = exact(kwargs)
    found = torch.func.grad(lambda v: weighted(*ours(**kwargs | {"v": v})))(kwargs["v"])
    wanted = torch.func.grad(lambda v: weighted(*reference.recurrent_kda(**truth | {"v": v})))(truth["v"])
    assert rel_rms(wanted, found) < LIMIT


def test_the_bare_kernel_refuses(cpu_kernel):
    """fwd has no derivative, and says so for each kind of wish."""
    kwargs, _ = inputs("lower-weak")
    arguments = {name: kwargs[name] for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias")}
    rest = dict(scale=0.1, out=torch.empty_like(kwargs["v"]), lower_bound=-5.0)
    for name in arguments:
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor that requires no gradient"):
            cpu_kernel.fwd(**arguments | {name: arguments[name].clone().requires_grad_()}, **rest)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
            with pytest.raises(ValueError, match=f"^{name}: expected a tensor that requires no gradient"):
                cpu_kernel.fwd(**arguments | {name: dual}, **rest)


# ---------------------------------------------------------------------------------------------------------
# models


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(prompts(tokens=20), labels=prompts(tokens=20)).loss.backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def assert_same_gradients(found: dict, wanted: dict) -> None:
    """Relative RMS 1e-4: a gradient is a sum over tokens of both signs, in float32 on both sides."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert rel_rms(gradient, found[name]) < 1e-4, name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_models(family, training, hooks, cpu_kernel):
    """With our whole layer in a model, and with the registered one, in both modes."""
    model = build(family).train(training)
    wanted = gradients(model)
    kda = {
        f"{name}.{parameter}"
        for name, module in models.kda_modules(model)
        for parameter in module.state_dict()
    }
    assert kda and kda <= wanted.keys()
    assert_same_gradients(gradients(hf_layer.kernelize(model)), wanted)
    hf_layer.unkernelize(model)
    hf_layer.register(devices="cpu")
    model.set_use_kernels(True)
    assert hf_layer.report(model.eval()).kernel_runs
    assert_same_gradients(gradients(model.train(training)), wanted)


def test_a_gradient_for_one_parameter_alone(hooks, cpu_kernel):
    """Everything else may run on the kernels then, and what is asked for must not get lost."""
    model = hf_layer.kernelize(build("kimi_linear"))
    wanted = gradients(model)
    module, _ = next(iter(models.kda_modules(model)))
    model.requires_grad_(False)
    for name, parameter in model.get_submodule(module).named_parameters():
        parameter.requires_grad_()
        found = gradients(model)
        assert list(found) == [f"{module}.{name}"]
        assert rel_rms(wanted[f"{module}.{name}"], found[f"{module}.{name}"]) < 1e-4, name
        parameter.requires_grad_(False)


def test_training_steps(hooks, cpu_kernel):
    """A few steps of an optimiser come out as without us, with evaluation in between, and checkpointing."""
    start = build("kimi_linear")

    def train(model):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(3):
            model.train()
            loss = model(prompts(), labels=prompts()).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            model.eval()
            with torch.no_grad():
                losses += [loss.item(), model(prompts(), labels=prompts()).loss.item()]
        return torch.tensor(losses)

    wanted = train(copy.deepcopy(start))
    assert wanted[-1] < 0.9 * wanted[0]
    torch.testing.assert_close(train(hf_layer.kernelize(copy.deepcopy(start))), wanted, rtol=1e-4, atol=0)
    checkpointed = hf_layer.kernelize(copy.deepcopy(start))
    checkpointed.gradient_checkpointing_enable()
    torch.testing.assert_close(train(checkpointed), wanted, rtol=1e-4, atol=0)
    hf_layer.register(devices="cpu")
    registered = copy.deepcopy(start)
    registered.set_use_kernels(True)
    torch.testing.assert_close(train(registered), wanted, rtol=1e-4, atol=0)

"""The kernel package's public calls on a machine without a GPU: dispatch, signature, errors.

`kernel_package` is the built package, loaded as a user would. Where its kernel branch is followed, it is with
fake tensors, which take the CUDA path without a device.
"""

from __future__ import annotations

import functools
import inspect
import sys

import pytest
import torch
from kda_inputs import FLAGS, conv_layout, make_inputs, operator_flags
from torch._subclasses.fake_tensor import FakeTensorMode

# flash-linear-attention 0.6.0's chunk_kda: its positional parameters with their defaults, and its
# keyword-only ones
FLA_REQUIRED = ("q", "k", "v", "g", "beta")
FLA_DEFAULTS = {
    "scale": None,
    "initial_state": None,
    "output_final_state": False,
    "use_qk_l2norm_in_kernel": False,
    "use_gate_in_kernel": False,
    "use_beta_sigmoid_in_kernel": False,
    "allow_neg_eigval": False,
    "safe_gate": False,
    "lower_bound": None,
    "disable_recompute": False,
    "return_intermediate_states": False,
    "state_v_first": False,
    "cu_seqlens": None,
    "cu_seqlens_cpu": None,
    "cp_context": None,
    "use_graph": False,
    "max_num_seqs": None,
}
FLA_KEYWORD_ONLY = {"A_log": None, "dt_bias": None, "chunk_size": 64, "transpose_state_layout": None}


@pytest.fixture
def api(kernel_package):
    return sys.modules[kernel_package.chunk_kda.__module__]


@pytest.fixture
def cuda_variant(api, monkeypatch):
    """As in the package's variant for GPUs, which sends all CPU tensors to the reference."""
    monkeypatch.setattr(api, "device_type", "cuda")


def test_names(kernel_package):
    assert sorted(kernel_package.__all__) == [
        "chunk_kda",
        "fused_kda_decode",
        "fused_recurrent_kda",
        "fwd",
        "layers",
        "reference",
    ]
    for name in kernel_package.__all__:
        assert hasattr(kernel_package, name)


def test_chunk_kda_has_the_signature_of_fla(kernel_package):
    parameters = inspect.signature(kernel_package.chunk_kda).parameters
    positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword_only = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert tuple(p.name for p in positional) == FLA_REQUIRED + tuple(FLA_DEFAULTS)
    assert {p.name: p.default for p in positional if p.default is not p.empty} == FLA_DEFAULTS
    assert keyword_only == FLA_KEYWORD_ONLY | {"out": None}
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_chunk_kda_takes_every_argument_of_the_reference(kernel_package):
    of_reference = inspect.signature(kernel_package.reference.chunk_kda).parameters
    assert set(of_reference) <= set(inspect.signature(kernel_package.chunk_kda).parameters)


def test_fwd_has_the_documented_signature(kernel_package):
    parameters = inspect.signature(kernel_package.fwd).parameters.values()
    assert [p.name if p.default is p.empty else (p.name, p.default) for p in parameters] == [
        "q", "k", "v", "g", "beta", "scale", "out", "A_log", "dt_bias", "lower_bound",
        ("initial_state", None), ("final_state", None), ("cu_seqlens", None),
    ]  # fmt: skip
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


@pytest.mark.parametrize("name", ["unknown", "head_first", "position_embeddings"])
def test_unknown_keywords_are_refused(kernel_package, name):
    with pytest.raises(TypeError, match=name):
        kernel_package.chunk_kda(**make_inputs("lower-strong", 1, 8, 1), **{name: None})


@pytest.mark.parametrize(
    "options",
    [
        dict(gate="lower-strong"),
        dict(gate="softplus-resets", initial_state=True, state_v_first=True),
        dict(gate="softplus-init", HV=4, beta_sigmoid=False, l2norm=False, scale=0.5),
        dict(gate="zero", allow_neg_eigval=True),
        dict(gate="mixed-channels", cu_seqlens=[0, 7, 7, 70], initial_state=True),
        dict(gate="lower-weak", dtype=torch.float32, K=24, V=40),
        dict(gate="lower-weak", output_final_state=False),
    ],
    ids=lambda options: options["gate"],
)
def test_cpu_tensors_go_to_the_reference(kernel_package, cuda_variant, options):
    kwargs = make_inputs(B=1, T=70, H=2, **options)
    expected = kernel_package.reference.chunk_kda(**kwargs)
    out = torch.full_like(expected[0], torch.nan)
    for got in (kernel_package.chunk_kda(**kwargs), kernel_package.chunk_kda(**kwargs, out=out)):
        assert torch.equal(expected[0], got[0])
        assert got[1] is None if expected[1] is None else torch.equal(expected[1], got[1])
    assert got[0] is out


def test_gradients_come_through_chunk_kda(kernel_package):
    kwargs = make_inputs("softplus-init", 1, 20, 1, K=8, V=8, dtype=torch.float32)
    kwargs["g"].requires_grad_()
    o, _ = kernel_package.chunk_kda(**kwargs)
    o.sum().backward()
    assert kwargs["g"].grad.isfinite().all() and kwargs["g"].grad.any()


def test_arguments_that_change_no_result(kernel_package):
    kwargs = make_inputs("lower-strong", 1, 70, 1, cu_seqlens=[0, 30, 70])
    expected = kernel_package.chunk_kda(**kwargs)
    for options in (
        dict(chunk_size=32),
        dict(safe_gate=True),
        dict(disable_recompute=True),
        dict(cu_seqlens_cpu=kwargs["cu_seqlens"]),
        dict(max_num_seqs=2),
    ):
        for x, y in zip(expected, kernel_package.chunk_kda(**kwargs, **options)):
            assert torch.equal(x, y), options


def test_gate_parameters_act_only_with_the_gate(kernel_package):
    kwargs = make_inputs("lower-strong", 1, 20, 1, preactivated=True)
    with_parameters = kwargs | dict(A_log=torch.ones(1), dt_bias=torch.ones(1, 128), lower_bound=-5.0)
    for x, y in zip(kernel_package.chunk_kda(**kwargs), kernel_package.chunk_kda(**with_parameters)):
        assert torch.equal(x, y)


@pytest.mark.parametrize("v_first", [False, True])
def test_transpose_state_layout_is_the_old_name(kernel_package, v_first):
    kwargs = make_inputs("lower-weak", 1, 20, 1, K=8, V=16, initial_state=True, state_v_first=v_first)
    expected = kernel_package.chunk_kda(**kwargs)
    kwargs.pop("state_v_first")
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        got = kernel_package.chunk_kda(**kwargs, transpose_state_layout=v_first)
    assert torch.equal(expected[0], got[0]) and torch.equal(expected[1], got[1])


BAD = {
    "intermediate-states": (
        dict(return_intermediate_states=True, chunk_size=32),
        ValueError,
        "chunk_size: expected 64 with return_intermediate_states, got 32",
    ),
    "cp_context": (dict(cp_context=object()), NotImplementedError, "cp_context: "),
    "use_graph": (dict(use_graph=True), NotImplementedError, "use_graph: "),
    "chunk_size": (dict(chunk_size=16), ValueError, "chunk_size: expected 32 or 64, got 16"),
    "two-layouts": (
        dict(state_v_first=True, transpose_state_layout=True),
        ValueError,
        "transpose_state_layout: .*got both",
    ),
    "safe-gate": (dict(safe_gate=True, lower_bound=None), ValueError, r"lower_bound: .*\[-5, 0\] .*got None"),
    "lower_bound": (
        dict(lower_bound=-6.0),
        ValueError,
        r"lower_bound: expected a value in \[-5, 0\], got -6",
    ),
    "A_log-missing": (
        dict(lower_bound=None, A_log=None),
        ValueError,
        "A_log: expected HV elements .*got None",
    ),
    "neg-eigval": (
        dict(allow_neg_eigval=True, use_beta_sigmoid_in_kernel=False),
        ValueError,
        "allow_neg_eigval: expected use_beta_sigmoid_in_kernel=True",
    ),
    "only-cpu-lengths": (
        dict(cu_seqlens_cpu=torch.tensor([0, 8])),
        ValueError,
        "cu_seqlens_cpu: expected cu_seqlens",
    ),
    "q-none": (dict(q=None), TypeError, "q: expected a tensor, got NoneType"),
    "out-type": (dict(out=1), TypeError, "out: expected a tensor, got int"),
    "out-shape": (
        dict(out=torch.empty(1, 8, 2, 8)),
        ValueError,
        r"out: expected the shape of v, \[1, 8, 1, 8\], got",
    ),
    "out-dtype": (
        dict(out=torch.empty(1, 8, 1, 8)),
        ValueError,
        "out: expected the dtype of v, torch.bfloat16, got torch.float32",
    ),
    "out-device": (
        dict(out=torch.empty(1, 8, 1, 8, dtype=torch.bfloat16, device="meta")),
        ValueError,
        "out: expected the device of v, cpu, got meta",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(kernel_package, bad):
    change, error, message = BAD[bad]
    kwargs = make_inputs("lower-strong", 1, 8, 1, K=8, V=8)
    kwargs.pop("state_v_first")
    kernel_package.chunk_kda(**kwargs)
    with pytest.raises(error, match="^" + message):
        kernel_package.chunk_kda(**kwargs | change)


def fwd_inputs(**change):
    kwargs = make_inputs("lower-strong", 1, 8, 1) | change
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound")
    return {name: kwargs[name] for name in names} | dict(scale=1.0, out=torch.ones_like(kwargs["v"]))


def test_fwd_refuses_cpu_tensors(kernel_package, cuda_variant):
    kwargs = fwd_inputs()
    with pytest.raises(ValueError, match="^q: expected a CUDA tensor, got one on cpu"):
        kernel_package.fwd(**kwargs)
    assert torch.equal(kwargs["out"], torch.ones_like(kwargs["out"]))


@pytest.fixture
def fake_gpu(api, monkeypatch):
    """Inside, tensors are fake and may be "on" CUDA device 0, an SM90; the operators' calls are recorded."""
    calls = []

    def record(compiled, *args):
        arguments = compiled._schema.arguments
        defaults = {x.name: x.default_value for x in arguments[len(args) :]}
        results = compiled(*args)
        calls.append({**dict(zip((x.name for x in arguments), args)), **defaults, "results": results})
        return results

    for name in ("kda_prefill", "kda_prefill_new"):
        monkeypatch.setattr(api, name, functools.partial(record, getattr(api, name)))
    monkeypatch.setattr(api, "device_type", "cuda")
    monkeypatch.setattr(api, "_sm_major", lambda device: 9)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield calls


def on_fake_gpu(kwargs):
    return {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
        if isinstance(x, torch.Tensor)
        else x
        for name, x in kwargs.items()
    }


@pytest.mark.parametrize("state_v_first", [False, True], ids=["k-first", "v-first"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cu_seqlens", [None, [0, 3, 3, 20]], ids=["batch", "pack"])
def test_kernel_call(kernel_package, fake_gpu, cu_seqlens, state_dtype, state_v_first):
    options = dict(
        initial_state=True, state_dtype=state_dtype, state_v_first=state_v_first, cu_seqlens=cu_seqlens
    )
    kwargs = on_fake_gpu(make_inputs("softplus-init", 1, 20, 2, 4, **options))
    o, final_state = kernel_package.chunk_kda(**kwargs)
    assert o.shape == (1, 20, 4, 128) and o.dtype == torch.bfloat16 and o.is_contiguous() and o.is_cuda
    assert final_state.shape == (1 if cu_seqlens is None else 3, 4, 128, 128)
    assert final_state.dtype == torch.float32 and final_state.is_contiguous() and final_state.is_cuda
    (call,) = fake_gpu
    assert call["results"] == (o, final_state)
    assert call["scale"] is None and call["lower_bound"] is None
    for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "cu_seqlens"):
        assert call[name] is kwargs[name], f"{name} was copied"
    assert call["flags"] == operator_flags(kwargs) and kwargs["state_v_first"] is state_v_first


def test_flags_have_the_compilers_numbers(kernel_package, api):
    flags = sys.modules[f"{kernel_package.__name__}.flags"]
    numbers = {name: number for name, number in vars(flags).items() if name.isupper() and name != "FWD_FLAGS"}
    assert numbers == FLAGS and sorted(FLAGS.values()) == [2**i for i in range(len(FLAGS))]
    (default,) = (x.default_value for x in api.kda_prefill._schema.arguments if x.name == "flags")
    assert default == flags.FWD_FLAGS


@pytest.mark.parametrize("name", [name for name in FLAGS if name not in ("INPLACE", "PORTABLE")])
def test_each_option_has_its_flag(kernel_package, name):
    options = [x for x in FLAGS if x not in ("INPLACE", "PORTABLE")]
    given = {option.lower(): option == name for option in options}
    assert sys.modules[f"{kernel_package.__name__}.flags"].attention_flags(**given) == FLAGS[name]


def test_kernel_writes_into_out(kernel_package, fake_gpu):
    kwargs = on_fake_gpu(make_inputs("lower-weak", 2, 20, 1, output_final_state=False))
    out = torch.empty_like(kwargs["v"])
    o, final_state = kernel_package.chunk_kda(**kwargs, out=out)
    assert (
        o is out and fake_gpu[0]["out"] is out and final_state is None and fake_gpu[0]["final_state"] is None
    )


def test_convolution_layout_is_copied_once(kernel_package, api, monkeypatch):
    calls = []
    monkeypatch.setattr(api, "reference_reason", lambda *inputs: None)
    monkeypatch.setattr(api, "kda_prefill", lambda *args: calls.append(args))
    kwargs = make_inputs("zero", 1, 20, 2, output_final_state=False)
    strided = {name: conv_layout(kwargs[name]) for name in ("q", "k", "v")}
    o, _ = kernel_package.chunk_kda(**kwargs | strided)
    ((q, k, v, g, *_),) = calls
    for name, x in dict(q=q, k=k, v=v).items():
        assert x.is_contiguous() and torch.equal(x, kwargs[name]), name
    assert g is kwargs["g"]
    assert o.is_contiguous()


def test_out_is_contiguous_where_v_is_a_slice(kernel_package, api, monkeypatch):
    calls = []
    monkeypatch.setattr(api, "reference_reason", lambda *inputs: None)
    monkeypatch.setattr(api, "kda_prefill", lambda *args: calls.append(args))
    kwargs = make_inputs("zero", 2, 20, 2, output_final_state=False)
    kwargs["v"] = torch.cat([kwargs["v"]] * 2, dim=2)[:, :, 1:3]
    o, _ = kernel_package.chunk_kda(**kwargs)
    assert calls[0][2] is kwargs["v"]
    assert o.is_contiguous() and o.shape == kwargs["v"].shape and o.dtype == kwargs["v"].dtype


@pytest.mark.parametrize("eager_first", [False, True])
def test_asking_for_the_architecture_makes_one_graph(api, monkeypatch, eager_first):
    class Properties:
        major = 9

    graphs = []
    monkeypatch.setattr(api, "_sm_majors", {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def step(x):
        return x + api._sm_major(x.get_device())

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=keep, fullgraph=True)
    x = torch.zeros(3)
    order = (step, compiled, compiled) if eager_first else (compiled, step, compiled)
    assert [call(x).tolist() for call in order] == [[9.0] * 3] * 3
    assert len(graphs) == 1 and list(api._sm_majors.values()) == [9]


@pytest.mark.parametrize("name", ["kda_prefill", "kda_prefill_new"])
def test_kernel_call_compiles_to_one_graph(kernel_package, api, monkeypatch, name):
    # CPU tensors stand in for CUDA's: tracing needs the operator's fake, and the graph is never run
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return lambda *inputs: [torch.empty(0)] * len(graph.graph.output_node().args[0])

    monkeypatch.setattr(api, "reference_reason", lambda *inputs: None)
    kwargs = make_inputs("softplus-init", 1, 20, 2, cu_seqlens=[0, 5, 20], initial_state=True)
    kwargs["output_final_state"] = name == "kda_prefill_new"
    torch._dynamo.reset()
    torch.compile(kernel_package.chunk_kda, backend=keep, fullgraph=True)(**kwargs)
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes].count(getattr(api, name)) == 1


def test_scale_reaches_the_kernel(kernel_package, fake_gpu):
    kwargs = on_fake_gpu(make_inputs("zero", 1, 20, 1))
    kernel_package.chunk_kda(**kwargs | dict(scale=0.5))
    kernel_package.chunk_kda(**kwargs | dict(scale=0.5, output_final_state=False))
    kernel_package.chunk_kda(**kwargs | dict(output_final_state=False))
    assert [call["scale"] for call in fake_gpu] == [0.5, 0.5, 128**-0.5]


def test_fwd_call(kernel_package, fake_gpu):
    kwargs = on_fake_gpu(fwd_inputs())
    state = torch.empty(1, 1, 128, 128, device="cuda")
    assert kernel_package.fwd(**kwargs, initial_state=state, final_state=state) is None
    (call,) = fake_gpu
    assert all(call[name] is x for name, x in kwargs.items())
    assert call["initial_state"] is state and call["final_state"] is state and call["cu_seqlens"] is None
    names = ("USE_GATE", "USE_QK_L2NORM", "USE_BETA_SIGMOID")
    assert call["flags"] == FLAGS["STATE_V_FIRST"] + sum(FLAGS[f"{name}_IN_KERNEL"] for name in names)


@pytest.mark.parametrize("name", ["k", "v", "g", "beta", "out"])
def test_none_in_the_place_of_a_tensor_is_named(cpu_package, name):
    x = torch.zeros(1, 4, 1, 128, dtype=torch.bfloat16)
    tensors = dict(q=x, k=x, v=x, g=x, beta=x[..., 0], out=torch.empty_like(x))
    tensors[name] = None
    with pytest.raises(RuntimeError, match=f" {name}: expected a tensor, got None"):
        cpu_package.fwd(**tensors, scale=1.0, A_log=None, dt_bias=None, lower_bound=-5.0)


def test_fwd_refuses_gradients(kernel_package, fake_gpu):
    kwargs = on_fake_gpu(fwd_inputs())
    kwargs["A_log"].requires_grad_()
    with pytest.raises(ValueError, match="^A_log: expected a tensor that requires no gradient"):
        kernel_package.fwd(**kwargs)
    assert not fake_gpu
    with torch.no_grad():
        kernel_package.fwd(**kwargs)
    assert len(fake_gpu) == 1


@pytest.mark.parametrize(
    "options,reason",
    [
        (dict(), None),
        (dict(beta_dtype=torch.float32, g_dtype=torch.float32), None),
        (dict(dtype=torch.float16), "q, k and v are not all bfloat16"),
        (dict(K=64), "K and V are not both 128"),
        (dict(V=64), "K and V are not both 128"),
        (dict(g_dtype=torch.float16), "g or beta is neither bfloat16 nor float32"),
        (dict(beta_dtype=torch.float64), "g or beta is neither bfloat16 nor float32"),
        (
            dict(initial_state=True, state_dtype=torch.float64),
            "initial_state is neither bfloat16 nor float32",
        ),
    ],
    ids=str,
)
def test_what_the_kernel_serves(api, fake_gpu, options, reason):
    kwargs = on_fake_gpu(make_inputs("softplus-init", 1, 20, 1, **options))
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
    assert api.reference_reason(*(kwargs[name] for name in names)) == reason


def test_gradients_and_old_gpus_go_to_the_reference(api, fake_gpu, monkeypatch):
    tensors = [on_fake_gpu(make_inputs("zero", 1, 20, 1))[name] for name in ("q", "k", "v", "g", "beta")]
    for i in range(len(tensors)):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(tensors)]
        assert api.reference_reason(*leaves, None, None, None) == "a gradient is required"
        with torch.inference_mode():
            assert api.reference_reason(*leaves, None, None, None) is None
    leaf = [*tensors[:-1], tensors[-1].detach().requires_grad_()]
    call = (api.kda_prefill_new, (*leaf, None, None, None), (operator_flags({}),))
    assert api.try_kernel(*call) is NotImplemented and not fake_gpu
    with torch.inference_mode():
        assert api.try_kernel(*call) == fake_gpu[0]["results"]
    monkeypatch.setattr(api, "_sm_major", lambda device: 7)
    assert api.reference_reason(*tensors, None, None, None) == "the GPU is older than SM80"

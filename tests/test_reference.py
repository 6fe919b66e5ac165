"""The reference against an independent definition, its two forms against each other, and its boundary."""

from __future__ import annotations

import time

import pytest
import torch
from hf_layer.reference import chunk_kda, recurrent_kda
from kda_inputs import GATES, activate, conv_layout, make_inputs, rel_rms, to_float64

FORMS = pytest.mark.parametrize("form", [recurrent_kda, chunk_kda], ids=["recurrent", "chunk"])
SMALL = dict(K=24, V=40)  # neither equal nor a power of two: a mixed-up dimension can't hide
EXACT = 1e-12  # float64 against float64; measured 1e-15 to 1e-14
PACK = [0, 5, 5, 69, 70, 70, 103]  # lengths 5, 0, 64, 1, 0, 33


def definition(q, k, v, g, beta, A_log, dt_bias, scale, initial_state, cu_seqlens, lower_bound, **flags):
    """Loops over sequences, heads and tokens, one rank-one update each. float64 in, (o, final_state) out."""
    if flags["use_qk_l2norm_in_kernel"]:
        q, k = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if flags["use_gate_in_kernel"]:
        g = activate(g, A_log, dt_bias, lower_bound)
    if flags["use_beta_sigmoid_in_kernel"]:
        beta = (2 if flags["allow_neg_eigval"] else 1) / (1 + torch.exp(-beta))
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = 1 / K**0.5 if scale is None else scale
    if cu_seqlens is None:
        spans = [(b, 0, T) for b in range(B)]
    else:
        spans = [(0, int(start), int(end)) for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:])]
    o = torch.empty(B, T, HV, V, dtype=torch.float64)
    states = torch.zeros(len(spans), HV, V, K, dtype=torch.float64)
    for n, (b, start, end) in enumerate(spans):
        for h in range(HV):
            S = states[n, h]
            if initial_state is not None:
                S += initial_state[n, h] if flags["state_v_first"] else initial_state[n, h].T
            h_k = h // (HV // H)
            for t in range(start, end):
                S *= g[b, t, h].exp()
                u = beta[b, t, h] * (v[b, t, h] - S @ k[b, t, h_k])
                S += torch.outer(u, k[b, t, h_k])
                o[b, t, h] = S @ q[b, t, h_k] * scale
    return o, states if flags["state_v_first"] else states.mT


def assert_same(expected, got, tolerance=EXACT):
    for name, x, y in zip(("o", "final_state"), expected, got):
        assert rel_rms(x, y) <= tolerance, name


@FORMS
@pytest.mark.parametrize("preactivated", [False, True], ids=["raw", "preactivated"])
@pytest.mark.parametrize("gate", GATES)
def test_definition(form, gate, preactivated):
    kwargs = to_float64(
        make_inputs(gate, 2, 37, 2, 4, **SMALL, initial_state=True, preactivated=preactivated)
    )
    assert_same(definition(**kwargs), form(**kwargs))


@FORMS
@pytest.mark.parametrize(
    "options",
    [
        dict(HV=2),
        dict(HV=6),
        dict(initial_state=False),
        dict(state_v_first=True),
        dict(output_final_state=False),
        dict(l2norm=False),
        dict(beta_sigmoid=False),
        dict(allow_neg_eigval=True),
        dict(scale=0.3),
        dict(keys="parallel"),
        dict(keys="parallel", allow_neg_eigval=True),
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
@pytest.mark.parametrize("cu_seqlens", [None, PACK], ids=["batch", "pack"])
def test_options(form, options, cu_seqlens):
    B, T = (2, 35) if cu_seqlens is None else (1, PACK[-1])
    options = dict(initial_state=True, HV=4) | options
    kwargs = to_float64(make_inputs("softplus-init", B, T, 2, **SMALL, cu_seqlens=cu_seqlens, **options))
    o, final_state = form(**kwargs)
    expected = definition(**kwargs)
    if options.get("output_final_state", True):
        assert_same(expected, (o, final_state))
    else:
        assert final_state is None
        assert_same(expected[:1], (o,))


@pytest.mark.parametrize("lower_bound", [-5.0, -0.5, 0.0])
@pytest.mark.parametrize("without", ["A_log", "dt_bias"])
@FORMS
def test_gate_without_a_parameter(form, without, lower_bound):
    kwargs = to_float64(make_inputs("lower-strong", 1, 20, 2, **SMALL)) | {
        without: None,
        "lower_bound": lower_bound,
    }
    assert_same(definition(**kwargs), form(**kwargs))


def test_parameters_in_other_shapes():
    kwargs = make_inputs("softplus-init", 1, 20, 2, **SMALL)
    flat = kwargs | dict(dt_bias=kwargs["dt_bias"].flatten(), A_log=kwargs["A_log"].view(1, 1, 2, 1))
    for form in (recurrent_kda, chunk_kda):
        assert_same(form(**kwargs), form(**flat), 0)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("gate", GATES)
def test_chunk_borders(gate, T):
    kwargs = to_float64(make_inputs(gate, 1, T, 1, 2, **SMALL, initial_state=True))
    expected = recurrent_kda(**kwargs)
    for chunk_size in (1, 16, 32, 64):
        assert_same(expected, chunk_kda(**kwargs, chunk_size=chunk_size))


@pytest.mark.parametrize("gate", GATES)
def test_float32_stays_accurate_at_full_size(gate):
    # 128-wide heads over many chunks; measured at most 4e-7. Mixed channels have the same log decay of -1e-4
    # at every token, so that exp's one rounding to float32 (3e-8) adds up: measured 4e-6, and as much in
    # recurrent_kda.
    kwargs = make_inputs(gate, 1, 1000, 1, initial_state=True, dtype=torch.float32)
    assert_same(
        recurrent_kda(**to_float64(kwargs)), chunk_kda(**kwargs), 1e-5 if gate == "mixed-channels" else 1e-6
    )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@FORMS
def test_pack_is_its_sequences(form, gate, dtype):
    kwargs = make_inputs(
        gate, 1, PACK[-1], 1, 2, **SMALL, cu_seqlens=PACK, cu_seqlens_dtype=dtype, initial_state=True
    )
    kwargs = to_float64(kwargs)
    o, final_state = form(**kwargs)
    for n, (start, end) in enumerate(zip(PACK, PACK[1:])):
        alone = {name: kwargs[name][:, start:end] for name in ("q", "k", "v", "g", "beta")}
        alone |= dict(cu_seqlens=None, initial_state=kwargs["initial_state"][n : n + 1])
        assert_same(form(**kwargs | alone), (o[:, start:end], final_state[n : n + 1]))


@FORMS
@pytest.mark.parametrize("cut", [1, 31, 32, 64, 99])
@pytest.mark.parametrize("state_v_first", [False, True], ids=["k-first", "v-first"])
def test_streaming_is_one_shot(form, cut, state_v_first):
    kwargs = make_inputs(
        "softplus-init", 2, 100, 1, 2, **SMALL, initial_state=True, state_v_first=state_v_first
    )
    kwargs = to_float64(kwargs)
    head, tail = (
        {n: kwargs[n][:, part] for n in ("q", "k", "v", "g", "beta")}
        for part in (slice(cut), slice(cut, None))
    )
    o_head, state = form(**kwargs | head)
    o_tail, state = form(**kwargs | tail | dict(initial_state=state))
    assert_same(form(**kwargs), (torch.cat((o_head, o_tail), 1), state))


@FORMS
@pytest.mark.parametrize("initial_state", [False, True], ids=["zeros", "initial_state"])
@pytest.mark.parametrize(
    "B,T,cu_seqlens", [(2, 0, None), (0, 3, None), (0, 0, None), (1, 0, [0, 0, 0]), (1, 0, [0])]
)
def test_no_tokens(form, B, T, cu_seqlens, initial_state):
    kwargs = make_inputs(
        "lower-weak", B, T, 2, 4, **SMALL, cu_seqlens=cu_seqlens, initial_state=initial_state
    )
    o, final_state = form(**kwargs)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    assert o.shape == (B, T, 4, SMALL["V"]) and o.dtype == torch.bfloat16
    assert final_state.shape == (N, 4, SMALL["K"], SMALL["V"]) and final_state.dtype == torch.float32
    assert torch.equal(
        final_state, kwargs["initial_state"] if initial_state else torch.zeros_like(final_state)
    )


@FORMS
def test_final_state_is_a_copy(form):
    kwargs = make_inputs("lower-weak", 1, 0, 1, **SMALL, cu_seqlens=[0, 0], initial_state=True)
    before = kwargs["initial_state"].clone()
    form(**kwargs)[1].zero_()
    assert torch.equal(kwargs["initial_state"], before)


@FORMS
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state"])
def test_nan_stays_in_its_sequence(form, name):
    kwargs = make_inputs("lower-weak", 1, PACK[-1], 1, **SMALL, cu_seqlens=PACK, initial_state=True)
    clean_o, clean_state = form(**kwargs)
    poisoned = kwargs[name].clone()
    if name == "initial_state":
        poisoned[2] = torch.nan
    else:
        poisoned[:, PACK[2] + 3] = torch.nan
    o, state = form(**kwargs | {name: poisoned})
    hit = slice(PACK[2], PACK[3])
    assert o[:, hit].isnan().any()
    assert torch.equal(o[:, : hit.start], clean_o[:, : hit.start])
    assert torch.equal(o[:, hit.stop :], clean_o[:, hit.stop :])
    others = [0, 1, 3, 4, 5]
    assert torch.equal(state[others], clean_state[others])


@FORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(form, dtype):
    kwargs = make_inputs("softplus-init", 1, 40, 1, **SMALL, dtype=dtype, initial_state=True)
    o, final_state = form(**kwargs)
    assert o.dtype == dtype
    assert final_state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = form(**to_float64(kwargs))
    assert rel_rms(expected[0], o) <= {torch.float64: EXACT, torch.float32: 2e-6}.get(
        dtype, torch.finfo(dtype).eps
    )
    assert rel_rms(expected[1], final_state) <= (EXACT if dtype == torch.float64 else 2e-6)


@FORMS
def test_mixed_dtypes(form):
    # o follows v; one of q, k, v in float64 is enough to compute in float64
    kwargs = make_inputs("softplus-init", 1, 40, 1, **SMALL, initial_state=True, state_dtype=torch.bfloat16)
    kwargs |= dict(g=kwargs["g"].float(), beta=kwargs["beta"].half())
    expected = form(**to_float64(kwargs))
    o, final_state = form(**kwargs | dict(q=kwargs["q"].double()))
    assert o.dtype == torch.bfloat16 and final_state.dtype == torch.float64
    assert_same(expected[1:], (final_state,))


@FORMS
def test_strides_and_autocast_change_nothing(form):
    kwargs = make_inputs("softplus-init", 2, 40, 2, 4, **SMALL, dtype=torch.float32, initial_state=True)
    expected = form(**kwargs)
    strided = {name: conv_layout(kwargs[name]) for name in ("q", "k", "v", "g")}
    strided["beta"] = kwargs["beta"].mT.contiguous().mT
    strided["initial_state"] = kwargs["initial_state"].mT.contiguous().mT
    assert not any(x.is_contiguous() for x in strided.values())
    with torch.autocast("cpu", torch.bfloat16):
        got = form(**kwargs | strided)
    assert_same(expected, got, 1e-6)  # the order of a sum may follow the strides


DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")


def differentiable_inputs(gate, T, cu_seqlens=None, seed=0, **options):
    kwargs = make_inputs(
        gate, 1, T, 1, 2, K=3, V=2, cu_seqlens=cu_seqlens, initial_state=True, seed=seed, **options
    )
    kwargs = to_float64(kwargs)
    return kwargs, [name for name in DIFFERENTIABLE if kwargs[name] is not None]


@FORMS
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("cu_seqlens", [None, [0, 2, 2, 7]], ids=["one", "pack"])
def test_gradcheck(form, gate, cu_seqlens):
    kwargs, names = differentiable_inputs(gate, 7, cu_seqlens)
    options = dict(chunk_size=4) if form is chunk_kda else {}

    def call(*tensors):
        return form(**kwargs | dict(zip(names, tensors)), **options)

    assert torch.autograd.gradcheck(call, [kwargs[name].clone().requires_grad_() for name in names])


@pytest.mark.parametrize("preactivated", [False, True], ids=["raw", "preactivated"])
@pytest.mark.parametrize("gate", GATES)
def test_gradients_through_the_tree(gate, preactivated):
    # the decays of the reset gates underflow to exact zeros; gradients stay finite and those of the
    # definition
    kwargs, names = differentiable_inputs(gate, 75, seed=1, preactivated=preactivated)

    def gradients(form):
        leaves = {name: kwargs[name].clone().requires_grad_() for name in names}
        o, state = form(**kwargs | leaves)
        return torch.autograd.grad(o.sin().sum() + state.sin().sum(), list(leaves.values()))

    for name, expected, got in zip(names, gradients(recurrent_kda), gradients(chunk_kda)):
        assert torch.isfinite(got).all(), name
        assert rel_rms(expected, got) <= 1e-11, name


@pytest.mark.parametrize("extreme", [-2600.0, -1e30, -torch.inf])
def test_hard_reset_is_exact(extreme):
    # a reset at every channel of token 50 makes what follows independent of what came before
    kwargs = make_inputs(
        "lower-weak", 1, 100, 1, **SMALL, preactivated=True, initial_state=True, dtype=torch.float32
    )
    kwargs["g"][:, 50] = extreme
    after = {name: kwargs[name][:, 50:] for name in ("q", "k", "v", "g", "beta")} | dict(initial_state=None)
    o, state = chunk_kda(**kwargs)
    assert torch.isfinite(o).all()
    assert_same(recurrent_kda(**to_float64(kwargs | after)), (o[:, 50:], state), 2e-6)


def test_speed():
    # the fallback must stay usable: B = 1, T = 2048, H = 4, D = 128 in float32 in under 2 s on 2 cores
    kwargs = make_inputs("softplus-init", 1, 2048, 4, dtype=torch.float32)
    seconds = []
    with torch.inference_mode():
        for _ in range(3):
            start = time.perf_counter()
            chunk_kda(**kwargs)
            seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2.0


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


# Good inputs are q, k [1, 8, 2, 4], v [1, 8, 4, 6], so B = 1, T = 8, H = 2, HV = 4, K = 4, V = 6.
BAD = {
    "q-no-tensor": (dict(q=[1.0]), TypeError, r"q: expected a tensor, got list"),
    "q-integer": (
        dict(q=zeros(1, 8, 2, 4, dtype=torch.int32)),
        TypeError,
        r"q: expected a floating.*torch.int32",
    ),
    "q-3d": (dict(q=zeros(8, 2, 4)), ValueError, r"q: expected shape \[B, T, H, K\], got \[8, 2, 4\]"),
    "k-shape": (dict(k=zeros(1, 8, 2, 5)), ValueError, r"k: .*\[1, 8, 2, 4\], got \[1, 8, 2, 5\]"),
    "k-device": (
        dict(k=zeros(1, 8, 2, 4).to("meta")),
        ValueError,
        r"k: expected the device of q, cpu, got meta",
    ),
    "v-shape": (dict(v=zeros(1, 7, 4, 6)), ValueError, r"v: .*\[1, 8, 4, 6\], got \[1, 7, 4, 6\]"),
    "v-heads": (dict(v=zeros(1, 8, 3, 6)), ValueError, r"v: .*multiple of H = 2, got HV = 3"),
    "g-shape": (dict(g=zeros(1, 8, 2, 4)), ValueError, r"g: .*\[1, 8, 4, 4\], got \[1, 8, 2, 4\]"),
    "g-none": (dict(g=None), TypeError, r"g: expected a tensor, got NoneType"),
    "beta-shape": (dict(beta=zeros(1, 8, 4, 1)), ValueError, r"beta: .*\[1, 8, 4\], got \[1, 8, 4, 1\]"),
    "A_log-shape": (dict(A_log=zeros(2)), ValueError, r"A_log: expected HV = 4 elements, got shape \[2\]"),
    "A_log-missing": (dict(A_log=None, lower_bound=None), ValueError, r"A_log: .*softplus gate.*got None"),
    "dt_bias-shape": (
        dict(dt_bias=zeros(4)),
        ValueError,
        r"dt_bias: expected HV \* K = 16 elements, got shape \[4\]",
    ),
    "lower_bound-low": (dict(lower_bound=-5.1), ValueError, r"lower_bound: .*\[-5, 0\], got -5.1"),
    "lower_bound-high": (dict(lower_bound=0.1), ValueError, r"lower_bound: .*\[-5, 0\], got 0.1"),
    "lower_bound-nan": (dict(lower_bound=float("nan")), ValueError, r"lower_bound: .*\[-5, 0\], got nan"),
    "neg-eigval": (
        dict(allow_neg_eigval=True, use_beta_sigmoid_in_kernel=False),
        ValueError,
        r"allow_neg_eigval: expected use_beta_sigmoid_in_kernel=True",
    ),
    "state-shape": (
        dict(initial_state=zeros(1, 4, 6, 4)),
        ValueError,
        r"initial_state: .*\[N, HV, K, V\] = \[1, 4, 4, 6\]",
    ),
    "state-v-first": (
        dict(initial_state=zeros(1, 4, 4, 6), state_v_first=True),
        ValueError,
        r"initial_state: .*\[N, HV, V, K\] = \[1, 4, 6, 4\], got \[1, 4, 4, 6\]",
    ),
    "state-sequences": (
        dict(initial_state=zeros(1, 4, 4, 6), cu_seqlens=torch.tensor([0, 3, 8])),
        ValueError,
        r"initial_state: .*\[2, 4, 4, 6\], got \[1, 4, 4, 6\]",
    ),
    "cu_seqlens-list": (dict(cu_seqlens=[0, 8]), TypeError, r"cu_seqlens: expected a tensor, got list"),
    "cu_seqlens-dtype": (
        dict(cu_seqlens=zeros(2)),
        TypeError,
        r"cu_seqlens: expected dtype int32 or int64, got torch.float32",
    ),
    "cu_seqlens-shape": (
        dict(cu_seqlens=torch.tensor([[0, 8]])),
        ValueError,
        r"cu_seqlens: .*\[N \+ 1\], got \[1, 2\]",
    ),
    "cu_seqlens-start": (
        dict(cu_seqlens=torch.tensor([1, 8])),
        ValueError,
        r"cu_seqlens: expected to start at 0, got 1",
    ),
    "cu_seqlens-decrease": (
        dict(cu_seqlens=torch.tensor([0, 5, 4, 8])),
        ValueError,
        r"cu_seqlens: expected no decrease, got 5 then 4 at entries 1 and 2",
    ),
    "cu_seqlens-end": (
        dict(cu_seqlens=torch.tensor([0, 7])),
        ValueError,
        r"cu_seqlens: expected to end at T = 8, got 7",
    ),
}


def good_inputs(B=1):
    return make_inputs("lower-strong", B, 8, 2, 4, K=4, V=6)


@FORMS
@pytest.mark.parametrize("bad", BAD)
def test_bad_input(form, bad):
    change, error, message = BAD[bad]
    kwargs = good_inputs()
    form(**kwargs)
    with pytest.raises(error, match="^" + message):
        form(**kwargs | change)


@FORMS
def test_packed_batch_is_refused(form):
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected a batch of B = 1.*got B = 2"):
        form(**good_inputs(B=2) | dict(cu_seqlens=torch.tensor([0, 8])))


@pytest.mark.parametrize("chunk_size", [0, -1, 48, 2.0, None])
def test_bad_chunk_size(chunk_size):
    with pytest.raises(ValueError, match="^chunk_size: expected a power of two, got"):
        chunk_kda(**good_inputs(), chunk_size=chunk_size)


def test_error_measure_never_passes_nan():
    x = torch.ones(3)
    assert rel_rms(x, x) == 0.0
    assert rel_rms(x, 1.1 * x) == pytest.approx(0.1)
    for bad in (torch.nan, torch.inf):
        assert rel_rms(x, torch.tensor([1, 1, bad])) == torch.inf
        assert rel_rms(torch.tensor([1, 1, bad]), torch.tensor([1, 1, bad])) == torch.inf
    assert rel_rms(torch.zeros(3), torch.ones(3)) == torch.inf
    with pytest.raises(ValueError, match="^x: expected the shape of ref"):
        rel_rms(torch.ones(3, 1), torch.ones(3))

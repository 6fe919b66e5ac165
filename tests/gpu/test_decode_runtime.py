"""The decode kernel inside PyTorch: graphs, streams, threads, memory, compile, and what it refuses."""

from __future__ import annotations

import threading

import pytest
import torch
from decode_harness import BF16, FP32, check, inputs_for, op_arguments, pool_for, run
from decode_inputs import shuffled_slots
from harness import DEVICE
from kda_inputs import new_results_arguments

TOKENS = ("q", "k", "v", "g", "beta")


def same(found, expected) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected))


def step_of(x: dict, slots: torch.Tensor, accepted=None, **options) -> dict:
    """Arguments of a step in place on slots of a pool."""
    return x | dict(inplace_final_state=True, ssm_state_indices=slots, num_accepted_tokens=accepted) | options


def test_graph_replay_with_changing_indices(kernel_package):
    """One captured step serves whatever slots, padding and counts the next steps have."""
    x = inputs_for("lower-weak", 6, 3, 2)
    pool = pool_for(x, 40)
    slots = shuffled_slots(18, 40, device=DEVICE).view(6, 3)
    counts = torch.ones(6, dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(x["v"])
    static = step_of(x, slots, counts, initial_state=pool, out=out)
    warm = pool.clone()
    kernel_package.fused_recurrent_kda(**static | {"initial_state": warm})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel_package.fused_recurrent_kda(**static)
    for seed in range(1, 5):
        fresh = inputs_for("lower-weak", 6, 3, 2, seed=seed)
        for name in (*TOKENS, "A_log", "dt_bias"):
            x[name].copy_(fresh[name])
        slots.copy_(shuffled_slots(18, 40, seed=seed, device=DEVICE).view(6, 3))
        slots[seed % 6] = -1
        slots[(seed + 1) % 6, 2] = 1000
        counts.copy_(
            torch.randint(1, 4, (6,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
        )
        before = pool.clone()
        want_o, want = run(kernel_package, x, state=before, indices=slots, accepted=counts, inplace=True)
        out.fill_(7.0)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out.nan_to_num(99.0), want_o.nan_to_num(99.0)) and torch.equal(pool, want)


def test_graph_replay_with_new_cu_seqlens(kernel_package):
    x = inputs_for("softplus-init", lengths=(3, 3, 3))
    kernel_package.fused_recurrent_kda(**x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernel_package.fused_recurrent_kda(**x)
    for lengths in ((9, 0, 0), (0, 1, 8), (2, 2, 5)):
        x["cu_seqlens"].copy_(torch.tensor([0, *lengths]).cumsum(0))
        graph.replay()
        torch.cuda.synchronize()
        assert same(found, run(kernel_package, x))


def test_allocates_results_only(kernel_package):
    x = inputs_for("softplus-init", 16, 2, 8)
    slots, out = shuffled_slots(16, 16, device=DEVICE), torch.empty_like(x["v"])
    pooled = step_of(x, slots, initial_state=pool_for(x, 16))
    for call, results in (
        (x, 2),
        (x | {"output_final_state": False}, 1),
        (pooled, 1),
        (pooled | {"out": out}, 0),
    ):
        kernel_package.fused_recurrent_kda(**call)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        kept = kernel_package.fused_recurrent_kda(**call)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == results
        del kept
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    kernel_package.fused_recurrent_kda(**pooled | {"out": out})
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] == free  # nothing taken behind PyTorch's back


def test_does_not_synchronise(kernel_package):
    x = inputs_for("lower-weak", 4, 1, 4)
    call = step_of(x, shuffled_slots(4, 8, device=DEVICE), initial_state=pool_for(x, 8))
    kernel_package.fused_recurrent_kda(**call)
    busy = torch.randn(8192, 8192, device=DEVICE)
    torch.mm(busy, busy)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            torch.mm(busy, busy)
        kernel_package.fused_recurrent_kda(**call)
        done.record()
        assert not done.query(), "the call waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.synchronize()


def test_runs_on_the_current_stream(kernel_package):
    """Two streams at once, each with its own pool, behind work that delays its inputs."""
    xs = [inputs_for("lower-weak", 8, 2, 8, seed=seed) for seed in range(2)]
    expected = [run(kernel_package, x) for x in xs]
    late = [x | {"v": torch.zeros_like(x["v"])} for x in xs]
    delay = torch.randn(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(5):
        found = [None, None]
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                torch.mm(delay, delay)
                late[n]["v"].copy_(xs[n]["v"])
                found[n] = kernel_package.fused_recurrent_kda(**late[n])
                late[n]["v"].zero_()
        torch.cuda.synchronize()
        assert all(same(x, y) for x, y in zip(found, expected))


def test_several_threads(kernel_package):
    xs = [inputs_for("softplus-init", lengths=(1 + n, 0, 3), H=4, seed=n) for n in range(4)]
    expected = [run(kernel_package, x) for x in xs]
    torch.cuda.synchronize()
    failures = []

    def work(n: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    found = kernel_package.fused_recurrent_kda(**xs[n])
                    torch.cuda.current_stream().synchronize()
                    assert same(found, expected[n]), f"thread {n} got another result"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda mode: mode.__name__)
def test_compile_without_graph_breaks(kernel_package, mode):
    def step(pool, slots, **x):
        o, state = kernel_package.fused_recurrent_kda(
            **x | dict(initial_state=pool), ssm_state_indices=slots, inplace_final_state=True
        )
        return o + 1, 2 * state

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    for seed in range(2):
        x = inputs_for("lower-weak", 4, 1, 2, seed=seed, initial_state=False)
        pool, slots = pool_for(x, 6, gap=0), shuffled_slots(4, 6, seed=seed, device=DEVICE)
        want_pool = pool.clone()
        with mode():
            want, found = step(want_pool, slots, **x), compiled(pool, slots, **x)
        assert same(found, want) and torch.equal(pool, want_pool)


@pytest.mark.parametrize("inplace", [False, True], ids=["final-state", "in-place"])
def test_opcheck(kernel_package, inplace):
    """PyTorch's own check of the schema, its marks of mutation, and the fake implementation."""
    x = inputs_for("lower-weak", 3, 2, 2)
    out = torch.zeros_like(x["v"])
    final_state = None if inplace else torch.zeros_like(x["initial_state"])
    operator = kernel_package.ops.kda_decode
    torch.library.opcheck(operator, op_arguments(x, out, final_state, inplace=inplace))
    torch.library.opcheck(operator, op_arguments(x, None, final_state, inplace=inplace))


def test_opcheck_of_new_results(kernel_package):
    """The same for the operator that allocates its results."""
    x = inputs_for("lower-weak", 3, 2, 2)
    torch.library.opcheck(kernel_package.ops.kda_decode_new, new_results_arguments(x))


def test_gradients_come_from_the_reference(kernel_package):
    x = inputs_for("softplus-init", 2, 2, 2)
    x["k"].requires_grad_()
    o, final_state = kernel_package.fused_recurrent_kda(**x)
    (o.float().square().sum() + final_state.square().sum()).backward()
    assert o.dtype == BF16 and x["k"].grad.isfinite().all() and x["k"].grad.any()


@pytest.mark.parametrize(
    "options",
    [dict(K=64, V=64), dict(dtype=torch.float16), dict(dtype=FP32)],
    ids=lambda o: str(list(o.values())),
)
def test_the_rest_goes_to_the_reference(kernel_package, options):
    x = inputs_for("softplus-init", 3, 2, 2, **options)
    want = kernel_package.reference.recurrent_kda(**x)
    assert same(kernel_package.fused_recurrent_kda(**x), want)


# --------------------------------------------------------------------------------------------- bad input


def good() -> tuple[dict, dict]:
    x = inputs_for("lower-weak", 3, 2, 2)
    return x, dict(
        state=pool_for(x, 8), indices=torch.arange(6, device=DEVICE).view(3, 2),
        accepted=torch.tensor([1, 2, 1], device=DEVICE), inplace=True,
    )  # fmt: skip


def shifted(pool: torch.Tensor) -> torch.Tensor:
    """The pool's values one element further: no slot starts at a multiple of 16 bytes."""
    return torch.cat([pool.new_zeros(1), pool.flatten()])[1:].view(pool.shape)


BAD = {
    "k-shape": (lambda x, w: x.update(k=x["k"][:, :1]), "k: expected shape"),
    "k-on-the-cpu": (lambda x, w: x.update(k=x["k"].cpu()), "k: expected a CUDA tensor"),
    "q-dtype": (lambda x, w: x.update(q=x["q"].float()), "q: expected dtype bfloat16, got float32"),
    "state-dtype": (lambda x, w: w.update(state=w["state"].half()), "initial_state: expected dtype"),
    "state-rows": (
        lambda x, w: w.update(state=w["state"][:, :1]),
        r"initial_state: expected shape \[slots, HV, K",
    ),
    "state-transposed": (
        lambda x, w: w.update(state=w["state"].mT),
        "initial_state: expected contiguous slots",
    ),
    "state-overlapping": (
        lambda x, w: w.update(state=w["state"][:1].expand(8, -1, -1, -1)),
        "initial_state: expected slots that do not overlap",
    ),
    "state-misaligned": (
        lambda x, w: w.update(state=shifted(w["state"])),
        "initial_state: expected slots that",
    ),
    "state-missing": (
        lambda x, w: x.update(initial_state=None) or w.update(state=None),
        "initial_state: expected",
    ),
    "indices-on-the-cpu": (
        lambda x, w: w.update(indices=w["indices"].cpu()),
        "state_indices: expected a CUDA",
    ),
    "indices-dtype": (lambda x, w: w.update(indices=w["indices"].float()), "state_indices: expected dtype"),
    "indices-rows": (lambda x, w: w.update(indices=w["indices"][:2]), "state_indices: expected shape"),
    "indices-not-in-place": (lambda x, w: w.update(inplace=False), "inplace: expected"),
    "counts-without-columns": (
        lambda x, w: w.update(indices=w["indices"][:, 0]),
        "num_accepted_tokens: expected",
    ),
    "counts-rows": (lambda x, w: w.update(accepted=w["accepted"][:2]), "num_accepted_tokens: expected shape"),
    "lower_bound": (lambda x, w: x.update(lower_bound=-5.5), "lower_bound: expected a value in"),
    "scale": (lambda x, w: x.update(scale=float("inf")), "scale: expected a finite number"),
    "A_log": (lambda x, w: x.update(A_log=None, lower_bound=None), "A_log: expected a tensor"),
    "cu_seqlens": (
        lambda x, w: x.update(cu_seqlens=torch.tensor([0, 2, 4, 6], device=DEVICE)),
        "cu_seqlens: expected packed sequences with B = 1",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(kernel_package, bad):
    """The message names the argument, and nothing has been written."""
    x, where = good()
    before = where["state"].clone()
    pool, out = where["state"], torch.full_like(x["v"], float("nan"))
    change, message = BAD[bad]
    change(x, where)
    with pytest.raises(RuntimeError, match=message):
        kernel_package.ops.kda_decode(*op_arguments(x, out, **where))
    torch.cuda.synchronize()
    assert out.isnan().all() and torch.equal(pool, before)


@pytest.mark.parametrize("name", [*TOKENS, "initial_state"])
def test_overlapping_results_are_refused(kernel_package, name):
    x = inputs_for("lower-weak", 3, 2, 2, g_dtype=BF16, beta_dtype=BF16, state_dtype=BF16)
    buffer = x[name].flatten()
    if buffer.numel() < x["v"].numel():  # beta
        buffer = torch.zeros(x["v"].numel(), dtype=BF16, device=DEVICE)
        x[name] = buffer[: x[name].numel()].view(x[name].shape)
    out = buffer[: x["v"].numel()].view(x["v"].shape)
    with pytest.raises(RuntimeError, match=rf"out: expected memory apart from that of {name}"):
        kernel_package.ops.kda_decode(*op_arguments(x, out))


def test_a_final_state_in_the_place_of_the_initial_state_is_refused(kernel_package):
    x = inputs_for("lower-weak", 3, 2, 2)
    out = torch.empty_like(x["v"])
    with pytest.raises(RuntimeError, match="final_state: expected memory apart from that of initial_state"):
        kernel_package.ops.kda_decode(*op_arguments(x, out, x["initial_state"]))
    with pytest.raises(RuntimeError, match="final_state: expected None with an update in place"):
        kernel_package.ops.kda_decode(
            *op_arguments(x, out, torch.empty_like(x["initial_state"]), inplace=True)
        )


def test_more_rows_than_fit_one_wave(kernel_package):
    """4096 sequences of one token, the most that is promised to be tried."""
    x = inputs_for("lower-weak", 4096, 1, 1, initial_state=False)
    slots = shuffled_slots(4096, 4100, device=DEVICE)
    slots[::3] = -1
    check(kernel_package, x, state=pool_for(x, 4100), indices=slots, inplace=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_guard(kernel_package):
    x = inputs_for("lower-weak", 3, 1, 2, device="cuda:1")
    with torch.cuda.device(0):
        o, _ = kernel_package.fused_recurrent_kda(**x)
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert o.device == torch.device("cuda:1") and o.isfinite().all()

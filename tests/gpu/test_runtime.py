"""The kernel inside PyTorch: graphs, streams, threads, memory, synchronisation, compile, gradients."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from harness import (
    DEVICE,
    TOKEN_INPUTS,
    TOLERANCE,
    assert_accurate,
    inputs_for,
    op_arguments,
)
from kda_inputs import new_results_arguments, rel_rms, to_float64

ROOT = Path(__file__).resolve().parents[2]


def copy_into(static: dict, fresh: dict) -> None:
    """Overwrites every tensor of `static` with the one of `fresh`, in place."""
    for name, x in static.items():
        if isinstance(x, torch.Tensor):
            x.copy_(fresh[name])


def same(found, expected) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected))


@pytest.mark.parametrize("gate", ["lower-weak", "softplus-init"])
def test_graph_replay_with_new_inputs(kernel_package, gate):
    static = inputs_for(gate, B=2, T=130)
    kernel_package.chunk_kda(**static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernel_package.chunk_kda(**static)
    for seed in (1, 2):
        fresh = inputs_for(gate, B=2, T=130, seed=seed)
        copy_into(static, fresh)
        for x in found:
            x.fill_(float("nan"))
        graph.replay()
        assert same(found, kernel_package.chunk_kda(**fresh))


def test_graph_replay_with_new_cu_seqlens(kernel_package):
    """One captured call serves every way to cut its tokens into its number of sequences."""
    static = inputs_for("lower-weak", lengths=(100, 100, 100), H=4)
    graph = torch.cuda.CUDAGraph()
    kernel_package.chunk_kda(**static)
    with torch.cuda.graph(graph):
        found = kernel_package.chunk_kda(**static)
    for seed, lengths in enumerate([(1, 299, 0), (0, 0, 300), (17, 64, 219), (300, 0, 0)]):
        fresh = inputs_for("lower-weak", lengths=lengths, H=4, seed=seed)
        copy_into(static, fresh)
        graph.replay()
        assert same(found, kernel_package.chunk_kda(**fresh))
        assert_accurate(kernel_package, fresh, found)


def test_graph_of_fwd_carries_the_state(kernel_package):
    """A captured step whose final state is the next one's initial state, replayed over a stream of tokens."""
    stream = [inputs_for("lower-weak", T=48, H=2, seed=seed, state_v_first=True) for seed in range(4)]
    static = {name: x.clone() for name, x in stream[0].items() if isinstance(x, torch.Tensor)}
    for step in stream:  # one head's parameters for the whole stream
        step.update({name: stream[0][name] for name in ("A_log", "dt_bias")})
    state, out = static["initial_state"], torch.empty_like(static["v"])
    next_state = torch.empty_like(state)

    def step():
        tokens = (static[name] for name in TOKEN_INPUTS)
        kernel_package.fwd(
            *tokens, 128**-0.5, out, static["A_log"], static["dt_bias"], -5.0,
            initial_state=state, final_state=next_state,
        )  # fmt: skip
        state.copy_(next_state)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    state.copy_(stream[0]["initial_state"])
    outputs = []
    for inputs in stream:
        for name in TOKEN_INPUTS:
            static[name].copy_(inputs[name])
        graph.replay()
        outputs.append(out.clone())
    whole = {**stream[0], **{name: torch.cat([x[name] for x in stream], dim=1) for name in TOKEN_INPUTS}}
    assert_accurate(kernel_package, whole, (torch.cat(outputs, dim=1), state))


@pytest.mark.parametrize(
    "shape", [dict(B=2, T=1000, H=8), dict(lengths=(700, 0, 301), H=8)], ids=["batch", "pack"]
)
def test_allocates_results_only(kernel_package, shape):
    inputs = inputs_for("softplus-init", **shape)
    kernel_package.chunk_kda(**inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, calls = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]
    o, final_state = kernel_package.chunk_kda(**inputs)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - calls == 2
    results = sum(-(-x.nbytes // 512) * 512 for x in (o, final_state))  # the allocator rounds to 512 bytes
    assert torch.cuda.max_memory_allocated() - before <= results + 2**21  # and splits large blocks at 2 MiB


def test_fwd_allocates_nothing(kernel_package):
    inputs = inputs_for("lower-weak", B=2, T=1000, H=8, state_v_first=True)
    out, final_state = torch.empty_like(inputs["v"]), torch.empty_like(inputs["initial_state"])
    torch.cuda.synchronize()
    free = []
    for _ in range(3):
        calls = torch.cuda.memory_stats()["allocation.all.allocated"]
        kernel_package.fwd(
            *(inputs[name] for name in TOKEN_INPUTS), 128**-0.5, out, inputs["A_log"], inputs["dt_bias"],
            -5.0, initial_state=inputs["initial_state"], final_state=final_state,
        )  # fmt: skip
        torch.cuda.synchronize()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == calls
        free.append(torch.cuda.mem_get_info()[0])
    assert free[1] == free[2]  # nothing taken behind PyTorch's back once the kernel is loaded


@pytest.mark.parametrize("shape", [dict(B=2, T=100), dict(lengths=(70, 0, 30))], ids=["batch", "pack"])
def test_does_not_synchronise(kernel_package, shape):
    """The host returns while an earlier kernel still keeps the device busy."""
    inputs = inputs_for("softplus-init", **shape)
    kernel_package.chunk_kda(**inputs)
    torch.cuda.synchronize()
    busy = torch.randn(8192, 8192, device=DEVICE)
    torch.mm(busy, busy)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            torch.mm(busy, busy)
        kernel_package.chunk_kda(**inputs)
        done.record()
        assert not done.query(), "the call waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.synchronize()


def test_runs_on_the_current_stream(kernel_package):
    """Two streams at once, each with its own inputs, behind work that delays its inputs."""
    inputs = [inputs_for("lower-weak", T=777, H=8, seed=seed) for seed in range(2)]
    expected = [kernel_package.chunk_kda(**x) for x in inputs]
    late = [{**x, "v": torch.zeros_like(x["v"])} for x in inputs]
    delay = torch.randn(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(5):
        found = [None, None]
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                torch.mm(delay, delay)
                late[n]["v"].copy_(inputs[n]["v"])
                found[n] = kernel_package.chunk_kda(**late[n])
                late[n]["v"].zero_()
        torch.cuda.synchronize()
        assert all(same(x, y) for x, y in zip(found, expected))


def test_several_threads(kernel_package):
    inputs = [inputs_for("softplus-init", lengths=(50 + n, 0, 200), H=4, seed=n) for n in range(4)]
    expected = [kernel_package.chunk_kda(**x) for x in inputs]
    torch.cuda.synchronize()
    failures = []

    def work(n: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    found = kernel_package.chunk_kda(**inputs[n])
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


FIRST_CALLS = """
import sys, threading
from pathlib import Path
import torch
from kernels import get_local_kernel
root, threads = Path(sys.argv[1]), 8
sys.path[:0] = [str(root / "tests"), str(root / "tests" / "gpu")]
from harness import inputs_for
kernel = get_local_kernel(root)
x, found, together = inputs_for("lower-weak", T=50, H=2), {}, threading.Barrier(threads)
torch.cuda.synchronize()
def work(n):
    together.wait()
    found[n] = kernel.chunk_kda(**x)
    torch.cuda.synchronize()
workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
[worker.start() for worker in workers]
[worker.join() for worker in workers]
expected = kernel.chunk_kda(**x)
good = [n for n in found if all(torch.equal(a, b) for a, b in zip(found[n], expected))]
print("same results:", len(good))
"""


def test_first_calls_of_several_threads():
    """In a new process, where what is kept for each device is not known yet."""
    command = [sys.executable, "-c", FIRST_CALLS, str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0 and run.stdout.split("\n")[-2] == "same results: 8", (
        run.stdout + run.stderr[-3000:]
    )


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("shape", [dict(B=2, T=100), dict(lengths=(70, 0, 30))], ids=["batch", "pack"])
def test_compile_without_graph_breaks(kernel_package, mode, shape):
    def step(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens):
        o, final_state = kernel_package.chunk_kda(
            q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, lower_bound=-5.0, initial_state=initial_state,
            output_final_state=True, use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return o + 1, 2 * final_state

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    names = (*TOKEN_INPUTS, "A_log", "dt_bias", "initial_state", "cu_seqlens")
    for seed in range(2):
        inputs = inputs_for("lower-weak", seed=seed, **shape)
        arguments = [inputs[name] for name in names]
        with mode():
            assert same(compiled(*arguments), step(*arguments))


def test_compile_with_dynamic_lengths(kernel_package):
    def step(q, k, v, g, beta):
        return kernel_package.chunk_kda(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0] + 1

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for T in (40, 65, 129):
        inputs = inputs_for("zero", T=T, beta_sigmoid=False)
        arguments = [inputs[name] for name in TOKEN_INPUTS]
        with torch.no_grad():
            assert torch.equal(compiled(*arguments), step(*arguments))


@pytest.mark.parametrize("shape", [dict(B=2, T=20), dict(lengths=(7, 0, 13))], ids=["batch", "pack"])
def test_opcheck(kernel_package, shape):
    """PyTorch's own check of the schema, its marks of mutation, and the fake implementation."""
    inputs = inputs_for("lower-weak", H=2, **shape)
    out, final_state = torch.zeros_like(inputs["v"]), torch.zeros_like(inputs["initial_state"])
    torch.library.opcheck(kernel_package.ops.kda_prefill, op_arguments(inputs, out, final_state))


@pytest.mark.parametrize("shape", [dict(B=2, T=20), dict(lengths=(7, 0, 13))], ids=["batch", "pack"])
def test_opcheck_of_new_results(kernel_package, shape):
    """The same for the operator that allocates its results."""
    x = inputs_for("lower-weak", H=2, **shape)
    torch.library.opcheck(kernel_package.ops.kda_prefill_new, new_results_arguments(x))


def test_gradients_come_from_the_reference(kernel_package):
    inputs = inputs_for("softplus-init", B=1, T=50, H=2)
    exact = to_float64(inputs)
    names = (*TOKEN_INPUTS, "A_log", "dt_bias", "initial_state")
    for arguments in (inputs, exact):
        for name in names:
            arguments[name].requires_grad_()
    o, final_state = kernel_package.chunk_kda(**inputs)
    want_o, want_state = kernel_package.reference.chunk_kda(**exact)
    (o.float().square().sum() + final_state.square().sum()).backward()
    (want_o.square().sum() + want_state.square().sum()).backward()
    assert o.dtype == torch.bfloat16
    for name in names:
        # a gradient is rounded to its input's bf16 (1.7e-3), and starts from an o rounded likewise
        assert rel_rms(exact[name].grad, inputs[name].grad) <= TOLERANCE, name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_guard(kernel_package):
    """Tensors of another device than the current one: computed there, and the current device stays."""
    inputs = inputs_for("lower-weak", T=100, device="cuda:1")
    with torch.cuda.device(0):
        found = kernel_package.chunk_kda(**inputs)
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert found[0].device == torch.device("cuda:1")
    assert_accurate(kernel_package, inputs, found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_two_devices_are_refused(kernel_package):
    inputs = inputs_for("lower-weak", T=20, device="cuda:0")
    inputs["k"] = inputs["k"].to("cuda:1")
    with pytest.raises((RuntimeError, ValueError), match=r"\bk\b"):
        kernel_package.chunk_kda(**inputs)

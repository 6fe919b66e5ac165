"""Timing on a CUDA device: event timings, queued launches, graph replays, host time and the copy bandwidth.

Every function takes `call`, a function of one input set, and `sets`, a list of input sets that it visits in
turn. With enough sets (`sets_to_outgrow_cache`) a call never finds its inputs in the L2 cache.
All results are milliseconds a call unless the name says otherwise.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

import torch

WARMUP_MS = 60.0  # long enough for an H100 to leave its idle clock
CACHE_MULTIPLE = 4  # input sets together hold this many times the L2 cache


@dataclass(frozen=True)
class Timing:
    """Median and spread of repeated timings of one call, in milliseconds."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int

    @classmethod
    def of(cls, samples_ms: list[float]) -> Timing:
        """The summary of `samples_ms` (one number a repeat, at least one)."""
        ordered = sorted(samples_ms)
        return cls(quantile(ordered, 0.5), quantile(ordered, 0.1), quantile(ordered, 0.9), len(ordered))

    def to_json(self) -> dict:
        return asdict(self)


def quantile(ordered: list[float], fraction: float) -> float:
    """The `fraction` quantile of ascending numbers, linear between neighbours."""
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def sets_to_outgrow_cache(bytes_per_set: int, cache_bytes: int, most: int = 32) -> int:
    """How many input sets of `bytes_per_set` outgrow a cache of `cache_bytes`: at least 2, at most `most`."""
    return max(2, min(most, math.ceil(CACHE_MULTIPLE * cache_bytes / max(bytes_per_set, 1))))


def warm_up(call, sets) -> float:
    """Visits every set, then calls until `WARMUP_MS` have passed; returns a first estimate of ms a call."""
    for inputs in sets:
        call(inputs)
    torch.cuda.synchronize()
    calls, begin = 0, time.perf_counter()
    while True:
        for inputs in sets[:4]:
            call(inputs)
            calls += 1
        torch.cuda.synchronize()
        passed = 1e3 * (time.perf_counter() - begin)
        if passed > WARMUP_MS:
            return passed / calls


def clamp(value: float, low: int, high: int) -> int:
    return int(max(low, min(high, value)))


def time_eager(call, sets, budget_ms: float = 300.0) -> Timing:
    """Each call between two events, launched one after the other without waiting.

    What a program that just calls sees: where the device is faster than the host, host time counts.
    """
    return time_eager_in_turn(call, [sets], budget_ms)[0]


def time_eager_in_turn(call, groups, budget_ms: float = 300.0) -> list[Timing]:
    """`time_eager` of several lists of input sets, a call of each in turn.

    A device at its power limit lowers its clock as it goes; what is measured in turn is measured under the same.
    """
    repeats = clamp(budget_ms / max(warm_up(call, sets) for sets in groups), 20, 300)
    pairs = [
        [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in groups]
        for _ in range(repeats)
    ]
    for i, turn in enumerate(pairs):
        for sets, (begin, end) in zip(groups, turn, strict=True):
            begin.record()
            call(sets[i % len(sets)])
            end.record()
    torch.cuda.synchronize()
    return [
        Timing.of([begin.elapsed_time(end) for begin, end in of_group])
        for of_group in zip(*pairs, strict=True)
    ]


def time_queued(call, sets, calls: int = 10, repeats: int = 11) -> Timing:
    """Device time a call: `calls` calls are queued behind a filler that keeps the device busy meanwhile.

    Host time does not count, except for a function that waits for the device itself.
    `calls` times the launches of one call must stay well under the launch queue's 1024 entries.
    """
    warm_up(call, sets)
    filler = torch.empty(2, 2**28, dtype=torch.int8, device="cuda")
    begin = time.perf_counter()
    for i in range(calls):
        call(sets[i % len(sets)])
    host_s = time.perf_counter() - begin
    copies = 2 + math.ceil(2 * host_s / 1e-4)  # a 256 MiB copy takes over 0.1 ms on every card so far
    copies = min(copies, 256)
    samples = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        for _ in range(copies):
            filler[0].copy_(filler[1])
        start.record()
        for i in range(calls):
            call(sets[i % len(sets)])
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / calls)
    return Timing.of(samples)


def time_graph(call, sets, calls: int = 16, repeats: int = 15) -> Timing:
    """Device time a call inside one CUDA graph of `calls` calls (rounded up to whole rounds of the sets)."""
    warm_up(call, sets)
    rounds = math.ceil(calls / len(sets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for inputs in sets:
                call(inputs)
    captured = rounds * len(sets)
    samples = []
    for repeat in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 2:  # the first replays upload the graph
            samples.append(start.elapsed_time(end) / captured)
    return Timing.of(samples)


def time_host(call, sets, calls: int = 50, repeats: int = 15) -> Timing:
    """Host time a call in milliseconds: the wall clock around `calls` calls that nothing waits for.

    Use a shape whose device time is under its host time, else the launch queue fills and the device counts.
    """
    warm_up(call, sets)
    samples = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for i in range(calls):
            call(sets[i % len(sets)])
        samples.append(1e3 * (time.perf_counter() - begin) / calls)
    torch.cuda.synchronize()
    return Timing.of(samples)


def peak_extra_bytes(call) -> int:
    """The most memory that `call` held at one time beyond what it returns, in bytes of torch's allocator.

    It is torch.cuda.max_memory_allocated() after a call whose results are still alive, less memory_allocated().
    What a library takes from the driver by itself is not seen.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del results
    return extra


def copy_bandwidth(size: int = 2**31) -> float:
    """Bytes a second of a device-to-device copy of `size` bytes, counting bytes read and bytes written."""
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    timing = time_eager(lambda pair: pair[1].copy_(pair[0]), [(source, target)])
    return 2 * size / (1e-3 * timing.median_ms)

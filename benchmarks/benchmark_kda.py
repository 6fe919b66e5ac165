"""`kernels benchmark .`: chunk_kda of the built kernel, checked against the reference of the same package.

One class for each gate. The runner sets `kernel` and `device`, times benchmark_*, and compares `out` with
what verify_* returns (absolute tolerance 1e-2; outputs are about 0.1). Its times include the host's part of
a call. benchmarks/prefill.py measures against the memory floor and flash-linear-attention.
"""

from __future__ import annotations

import torch
from kernels.benchmark import Benchmark

D = 128


class Prefill:
    """What the gates below share: on a CPU sequences are 16 times shorter. (No Benchmark itself, or it would
    be run.)"""

    seed = 0
    lower_bound: float | None = None

    def _prepare(self, lengths: tuple[int, ...], H: int) -> None:
        """q, k, v, g [1, T, H, D] and beta logits [1, T, H], bfloat16; states are [N, H, V, K], float32."""
        lengths = lengths if self.device != "cpu" else tuple(length // 16 for length in lengths)
        T = sum(lengths)
        options = {"device": self.device, "dtype": torch.bfloat16}
        self.tensors = [torch.randn(1, T, H, D, **options) for _ in range(4)]
        self.tensors.append(torch.randn(1, T, H, **options))
        self.options = {
            "A_log": torch.rand(H, device=self.device),
            "dt_bias": torch.rand(H, D, device=self.device) - 2,
            "lower_bound": self.lower_bound,
            "initial_state": torch.randn(len(lengths), H, D, D, device=self.device),
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": True,
            "use_gate_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True,
            "state_v_first": True,
        }
        if len(lengths) > 1:
            ends = torch.tensor(lengths, device=self.device).cumsum(0)
            self.options["cu_seqlens"] = torch.cat([ends.new_zeros(1), ends])
        self.out = torch.empty_like(self.tensors[2])

    def _run(self) -> None:
        self.kernel.chunk_kda(*self.tensors, **self.options, out=self.out)

    def _reference(self) -> torch.Tensor:
        o, _ = self.kernel.reference.chunk_kda(*(x.float() for x in self.tensors), **self.options)
        return o.to(self.out.dtype)

    def setup_one_2048(self) -> None:
        self._prepare((2048,), 32)

    def benchmark_one_2048(self) -> None:
        self._run()

    def verify_one_2048(self) -> torch.Tensor:
        return self._reference()

    def setup_packed_8x512(self) -> None:
        self._prepare((512,) * 8, 32)

    def benchmark_packed_8x512(self) -> None:
        self._run()

    def verify_packed_8x512(self) -> torch.Tensor:
        return self._reference()

    def setup_one_8192(self) -> None:
        self._prepare((8192,), 32)

    def benchmark_one_8192(self) -> None:
        self._run()


class LowerBoundGate(Prefill, Benchmark):
    """log decay = lower_bound * sigmoid(exp(A_log) * (g + dt_bias))."""

    lower_bound = -5.0


class SoftplusGate(Prefill, Benchmark):
    """log decay = -exp(A_log) * softplus(g + dt_bias)."""

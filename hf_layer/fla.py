"""flash-linear-attention's `chunk_kda` on our kernel, for every call that the kernel serves.

    import hf_layer.fla

    hf_layer.fla.register()

FLA finds the module `flash_kda` by itself, and hands over what `flash_kda.fwd` serves. `register()` puts a
backend of our own in front of that one. It also takes the softplus gate, a gate that is already a log
decay, a beta after its sigmoid, q and k without the L2 norm, K-first states, the old keyword
`transpose_state_layout`, grouped value heads, negative eigenvalues, and a float32 g. What it does not take
goes back to FLA, with the reason in the log. `FLA_FLASH_KDA=0` turns both backends off, at any time.

At level INFO the logger `hf_layer.fla` writes, once for each line that it has to say,

    [FLA Backend] kda.chunk_kda -> flashkda
    [FLA Backend] kda.chunk_kda rejected: <reason>

beside the lines of FLA's own logger, which names only the first reason. Needs flash-linear-attention 0.6 or
newer, whose module `fla.backends` holds the contract that `Backend` fulfils.
"""

from __future__ import annotations

import logging
import os

import torch
from fla.backends import BaseBackend
from fla.backends import register as add_backend

from .api import reference_reason
from .loading import KernelLoad, load_kernel
from .reference import LOWER_BOUND_MIN

__all__ = ["Backend", "register", "unregister"]

TAKEN = "-> flashkda"

logger = logging.getLogger(__name__)


class Backend(BaseBackend):
    """What FLA's dispatcher asks about a call of `fla.ops.kda.chunk_kda`, and where it sends it.

    `chunk_kda_verifier` says whether the kernel serves a call. The attribute `chunk_kda` is the kernel
    package's own function, so a call that is taken passes through nothing else of ours.
    """

    backend_type = "flashkda"
    env_var = "FLA_FLASH_KDA"
    priority = 2  # before FLA's own backend for the module flash_kda, which has 3
    registered = False

    def __init__(self) -> None:
        super().__init__()
        load = load_kernel()
        self.no_kernel = load.reason
        self.chunk_kda = None if load.module is None else load.module.chunk_kda
        self.said: set[str] = set()

    def is_enabled(self) -> bool:
        """Asked at every call, so that the environment variable acts at any time."""
        return Backend.registered and os.environ.get(self.env_var) != "0"

    def chunk_kda_verifier(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        scale: float | None = None,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        use_gate_in_kernel: bool = False,
        use_beta_sigmoid_in_kernel: bool = False,
        allow_neg_eigval: bool = False,
        safe_gate: bool = False,
        lower_bound: float | None = None,
        disable_recompute: bool = False,
        return_intermediate_states: bool = False,
        state_v_first: bool = False,
        cu_seqlens: torch.Tensor | None = None,
        cu_seqlens_cpu: torch.Tensor | None = None,
        cp_context: object | None = None,
        use_graph: bool = False,
        max_num_seqs: int | None = None,
        *,
        A_log: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        chunk_size: int = 64,
        transpose_state_layout: bool | None = None,
        **unknown: object,
    ) -> tuple[bool, str | None]:
        """(True, None) for a call that the kernel serves, else (False, why not).

        Takes the arguments of `fla.ops.kda.chunk_kda`. Shapes are not looked at beyond K and V: the kernel's
        own checks name what is wrong with them.
        """
        if not use_gate_in_kernel:
            A_log = dt_bias = None
        if self.no_kernel is not None:
            reason = f"no kernel: {self.no_kernel}"
        elif cp_context is not None:
            reason = "cp_context: context parallelism is not supported"
        elif return_intermediate_states:
            reason = "return_intermediate_states: states inside a sequence are not kept"
        elif use_graph:
            reason = "use_graph: padding behind the last sequence is not supported"
        elif unknown:
            reason = f"unknown arguments: {', '.join(sorted(unknown))}"
        elif lower_bound is not None and not LOWER_BOUND_MIN <= lower_bound <= 0.0:
            reason = f"lower_bound: {lower_bound} is outside [-5, 0]"
        else:
            reason = reference_reason(q, k, v, g, beta, A_log, dt_bias, initial_state)
        line = TAKEN if reason is None else f"rejected: {reason}"
        if line not in self.said:
            self.said.add(line)
            logger.info("[FLA Backend] kda.chunk_kda %s", line)
        return reason is None, reason


def register() -> KernelLoad:
    """Let FLA's `chunk_kda` run on our kernel from now on, in this process. Loads the kernel.

    Returns:
        What `hf_layer.load_kernel()` found. Without a kernel every call goes back to FLA, and the log has the
        reason. A second call looks for the kernel again.
    """
    from fla.ops.kda import chunk_kda

    if os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1":
        logger.warning("FLA_DISABLE_BACKEND_DISPATCH=1: flash-linear-attention asks no backend, ours neither")
    add_backend(chunk_kda)(Backend)
    Backend.registered = True
    return load_kernel()


def unregister() -> None:
    """Leave FLA's `chunk_kda` as it is without `register()`; harmless if that was never called."""
    Backend.registered = False

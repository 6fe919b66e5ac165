"""flash-linear-attention's `chunk_kda` and `fused_recurrent_kda` on our kernels, for what these serve.

    import hf_layer.fla

    hf_layer.fla.register()

FLA finds the module `flash_kda` by itself, and hands over what `flash_kda.fwd` serves. `register()` puts a
backend of our own in front of that one. It also takes the softplus gate, a gate that is already a log
decay, a beta after its sigmoid, q and k without the L2 norm, K-first states, the old keyword
`transpose_state_layout`, grouped value heads, negative eigenvalues, and a float32 g. A second one takes
`fused_recurrent_kda`, for which FLA has no backend that runs on NVIDIA's GPUs: FLA dispatches its inner
function, `fused_recurrent_kda_fwd`, which knows of pools of states and of drafts too. What they do not take
goes back to FLA, with the reason in the log. `FLA_FLASH_KDA=0` turns all of these backends off, at any time.

At level INFO the logger `hf_layer.fla` writes, once for each line that it has to say,

    [FLA Backend] kda.chunk_kda -> flashkda
    [FLA Backend] kda.chunk_kda rejected: <reason>

(or kda.fused_recurrent_kda_fwd)
beside the lines of FLA's own logger, which names only the first reason. Needs flash-linear-attention 0.6 or
newer, whose module `fla.backends` holds the contract that `Backend` fulfils.
"""

from __future__ import annotations

import functools
import logging
import os

import torch
from fla.backends import BaseBackend
from fla.backends import register as add_backend

from . import intermediate
from .api import reference_reason
from .loading import KernelLoad, load_kernel
from .reference import LOWER_BOUND_MIN

__all__ = ["Backend", "DecodeBackend", "register", "unregister"]

TAKEN = "-> flashkda"

logger = logging.getLogger(__name__)


class _Switched(BaseBackend):
    """What both backends share: the switch, the kernel and the log."""

    backend_type = "flashkda"
    env_var = "FLA_FLASH_KDA"
    priority = 2  # before FLA's own backend for the module flash_kda, which has 3
    registered = False

    def __init__(self) -> None:
        super().__init__()
        self.load = load_kernel()
        self.said: set[str] = set()
        self.said_taken = False

    def is_enabled(self) -> bool:
        """Asked at every call, so that the environment variable acts at any time."""
        return _Switched.registered and os.environ.get(self.env_var) != "0"

    def answer(self, function: str, reason: str | None) -> tuple[bool, str | None]:
        """The verifier's answer, which is also written to the log, once."""
        if reason is None and self.said_taken:  # a backend takes calls of one function
            return True, None
        line = f"kda.{function} {TAKEN if reason is None else f'rejected: {reason}'}"
        if line not in self.said:
            self.said.add(line)
            self.said_taken |= reason is None
            logger.info("[FLA Backend] %s", line)
        return reason is None, reason


class Backend(_Switched):
    """What FLA's dispatcher asks about a call of `fla.ops.kda.chunk_kda`, and where it sends it.

    `verify` says whether the kernel serves a call. The attribute `chunk_kda` is the kernel package's own
    function, so a call that is taken passes through nothing else of ours.
    """

    def __init__(self) -> None:
        super().__init__()
        self.chunk_kda = None if self.load.module is None else self.load.module.chunk_kda

    def verify(
        self,
        function_name: str,
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

        Takes the arguments of `fla.ops.kda.chunk_kda` behind its name, by themselves: the inherited method
        packs them into a tuple and a dictionary and unpacks them again for `chunk_kda_verifier`, which takes
        a microsecond. Shapes are not looked at beyond K and V: the kernel's own checks name what is wrong
        with them.
        """
        if not use_gate_in_kernel:
            A_log = dt_bias = None
        try:
            if self.chunk_kda is None:
                reason = f"no kernel: {self.load.reason}"
            elif cp_context is not None:
                reason = "cp_context: context parallelism is not supported"
            elif return_intermediate_states and chunk_size != intermediate.STEP:
                reason = (
                    f"chunk_size: {chunk_size} with return_intermediate_states, "
                    f"which are kept every {intermediate.STEP}"
                )
            elif use_graph:
                reason = "use_graph: padding behind the last sequence is not supported"
            elif unknown:
                reason = f"unknown arguments: {', '.join(sorted(unknown))}"
            elif lower_bound is not None and not LOWER_BOUND_MIN <= lower_bound <= 0.0:
                reason = f"lower_bound: {lower_bound} is outside [-5, 0]"
            else:
                reason = reference_reason(q, k, v, g, beta, A_log, dt_bias, initial_state)
        except Exception as error:  # of arguments of other types: FLA's function has its own word for them
            return False, str(error)
        return self.answer("chunk_kda", reason)

    # the name under which the inherited method would look for it
    chunk_kda_verifier = functools.partialmethod(verify, "chunk_kda")


class DecodeBackend(_Switched):
    """The same for `fused_recurrent_kda_fwd`, the inner function of `fla.ops.kda.fused_recurrent_kda`.

    Registered for all functions that FLA dispatches as parts of "kda"; it has an implementation of this one
    alone, and FLA goes on with the others as if it were not there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernel = None if self.load.module is None else self.load.module.fused_recurrent_kda

    def fused_recurrent_kda_fwd_verifier(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        A_log: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        initial_state: torch.Tensor | None = None,
        scale: float | None = None,
        output_final_state: bool = False,
        inplace_final_state: bool = True,
        state_v_first: bool = False,
        cu_seqlens: torch.Tensor | None = None,
        ssm_state_indices: torch.Tensor | None = None,
        num_accepted_tokens: torch.Tensor | None = None,
        use_qk_l2norm_in_kernel: bool = False,
        use_gate_in_kernel: bool = False,
        use_beta_sigmoid_in_kernel: bool = False,
        allow_neg_eigval: bool = False,
        lower_bound: float | None = None,
        out: torch.Tensor | None = None,
        **unknown: object,
    ) -> tuple[bool, str | None]:
        """(True, None) for a call that the kernel serves, else (False, why not), as `Backend.verify`."""
        if not use_gate_in_kernel:
            A_log = dt_bias = None
        pooled = ssm_state_indices is not None
        one_slot = pooled and ssm_state_indices.ndim == 1
        if self.kernel is None:
            reason = f"no kernel: {self.load.reason}"
        elif unknown:
            reason = f"unknown arguments: {', '.join(sorted(unknown))}"
        elif beta.ndim == v.ndim:
            reason = "beta: one number for each channel of v is not supported"
        elif use_gate_in_kernel and A_log is None and lower_bound is None:
            reason = "A_log: the softplus gate has none"
        elif lower_bound is not None and not LOWER_BOUND_MIN <= lower_bound <= 0.0:
            reason = f"lower_bound: {lower_bound} is outside [-5, 0]"
        elif allow_neg_eigval and not use_beta_sigmoid_in_kernel:
            reason = "allow_neg_eigval: means nothing without use_beta_sigmoid_in_kernel"
        elif inplace_final_state and initial_state is None:
            reason = "initial_state: in place, and there is none"
        elif num_accepted_tokens is not None and (one_slot or not pooled):
            reason = "num_accepted_tokens: without slots [N, T]"
        elif one_slot and v.shape[0] * v.shape[1] != len(ssm_state_indices):
            reason = "ssm_state_indices: one slot for a sequence, and not one token"
        elif pooled and not inplace_final_state:
            reason = "inplace_final_state: states of a pool are updated in place"
        else:
            reason = reference_reason(q, k, v, g, beta, A_log, dt_bias, initial_state)
        return self.answer("fused_recurrent_kda_fwd", reason)

    def fused_recurrent_kda_fwd(
        self, q, k, v, g, beta, A_log=None, dt_bias=None, initial_state=None, scale=None,
        output_final_state=False, inplace_final_state=True, state_v_first=False, cu_seqlens=None,
        ssm_state_indices=None, num_accepted_tokens=None, use_qk_l2norm_in_kernel=False,
        use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, lower_bound=None,
        out=None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """FLA's order of arguments and its default, in place, handed on to the kernel package.

        All are written out: a dictionary of options would be made and taken apart at each call.
        """
        return self.kernel(
            q, k, v, g, beta, A_log, dt_bias, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
            use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound, state_v_first,
            cu_seqlens, inplace_final_state=inplace_final_state, ssm_state_indices=ssm_state_indices,
            num_accepted_tokens=num_accepted_tokens, out=out,
        )  # fmt: skip


def register() -> KernelLoad:
    """Let FLA's `chunk_kda` and `fused_recurrent_kda` run on our kernels from now on, in this process.

    Loads the kernel package.

    Returns:
        What `hf_layer.load_kernel()` found. Without a kernel every call goes back to FLA, and the log has the
        reason. A second call looks for the kernel again.
    """
    from fla.ops.kda import chunk_kda

    if os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1":
        logger.warning("FLA_DISABLE_BACKEND_DISPATCH=1: flash-linear-attention asks no backend, ours neither")
    add_backend(chunk_kda)(Backend)
    add_backend("kda")(DecodeBackend)
    _Switched.registered = True
    return load_kernel()


def unregister() -> None:
    """Leave FLA's functions as they are without `register()`; harmless if that was never called."""
    _Switched.registered = False

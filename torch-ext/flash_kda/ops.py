"""The compiled operator, and its fake for torch.compile and FakeTensor."""

from __future__ import annotations

import torch

from ._ops import add_op_namespace_prefix, ops

kda_prefill = ops.kda_prefill.default  # the overload itself: no overload resolution on the host path

# The devices that it was compiled for, "cuda" or "cpu": a variant of this package has one of the two.
device_type = (
    "cpu"
    if torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix("kda_prefill"), "CPU")
    else "cuda"
)


@torch.library.register_fake(add_op_namespace_prefix("kda_prefill"))
def _kda_prefill_fake(
    q,
    k,
    v,
    g,
    beta,
    A_log,
    dt_bias,
    initial_state,
    cu_seqlens,
    out,
    final_state,
    scale,
    lower_bound,
    use_gate_in_kernel,
    use_qk_l2norm_in_kernel,
    use_beta_sigmoid_in_kernel,
    allow_neg_eigval,
    state_v_first,
    portable=False,
) -> None:
    """The operator writes into out and final_state and returns nothing."""

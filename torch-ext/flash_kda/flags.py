"""The operators' `flags`: a sum of these. torch's dispatcher takes 0.2 us for every bool of its own.

kda_kernel/flags.h has the same names and numbers.
"""

from __future__ import annotations

USE_GATE_IN_KERNEL = 1
USE_QK_L2NORM_IN_KERNEL = 2
USE_BETA_SIGMOID_IN_KERNEL = 4
ALLOW_NEG_EIGVAL = 8
STATE_V_FIRST = 16
INPLACE = 32  # kda_decode
PORTABLE = 64  # kda_prefill: by the portable kernel, where a faster one exists


# kda_prefill's default: what `fwd` does
FWD_FLAGS = USE_GATE_IN_KERNEL | USE_QK_L2NORM_IN_KERNEL | USE_BETA_SIGMOID_IN_KERNEL | STATE_V_FIRST


def attention_flags(
    use_gate_in_kernel: bool,
    use_qk_l2norm_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
    state_v_first: bool,
) -> int:
    """What every operator of the delta rule is told."""
    return (
        (USE_GATE_IN_KERNEL if use_gate_in_kernel else 0)
        | (USE_QK_L2NORM_IN_KERNEL if use_qk_l2norm_in_kernel else 0)
        | (USE_BETA_SIGMOID_IN_KERNEL if use_beta_sigmoid_in_kernel else 0)
        | (ALLOW_NEG_EIGVAL if allow_neg_eigval else 0)
        | (STATE_V_FIRST if state_v_first else 0)
    )

"""The public calls: `fwd`, the bare kernel, and `chunk_kda`, which picks the kernel or the reference."""

from __future__ import annotations

import warnings

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import intermediate, reference
from .flags import attention_flags
from .ops import device_type, kda_prefill, kda_prefill_new

HEAD_DIM = 128
DEFAULT_SCALE = HEAD_DIM**-0.5
BF16_OR_FP32 = (torch.bfloat16, torch.float32)
QKV_DTYPES = {"cuda": (torch.bfloat16,), "cpu": BF16_OR_FP32}
MIN_SM_MAJOR = 8
_sm_majors: dict[int, int] = {}  # of the CUDA devices that were asked for


def fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    initial_state: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> None:
    """Kimi Delta Attention prefill by the kernel, written into `out` and `final_state`.

    The package has a variant for CUDA devices and one for CPUs, and serves tensors of its variant's kind.

    Raw inputs: q and k are L2-normalised here, g is the gate before its activation, beta the logit before its
    sigmoid. States are V-first. The formula is at the top of reference.py. The call does not synchronise and
    can be captured in a CUDA graph. Last dimensions must be contiguous, other strides are free (beta: all
    strides are free).

    Args:
        q, k: bfloat16 [B, T, H, 128]; on a CPU float32, too.
        v: bfloat16 [B, T, HV, 128], HV a multiple of H; on a CPU float32, too.
        g: bfloat16 or float32 [B, T, HV, 128].
        beta: bfloat16 or float32 [B, T, HV].
        scale: factor on q, usually 128 ** -0.5.
        out: [B, T, HV, 128] in v's dtype, written.
        A_log: float32, HV elements; None is a rate of 1, allowed with a lower_bound only.
        dt_bias: float32, HV * 128 elements, [HV, 128] or flat, or None.
        lower_bound: in [-5, 0], log decay = lower_bound * sigmoid(exp(A_log) * (g + dt_bias));
            None for -exp(A_log) * softplus(g + dt_bias).
        initial_state: float32 or bfloat16 [N, HV, V, K], contiguous; zeros by default. N is B without
            cu_seqlens.
        final_state: float32 or bfloat16 [N, HV, V, K], contiguous, in initial_state's dtype where both are
            given; written.
        cu_seqlens: int32 or int64 [N + 1], with B = 1: the N sequences packed along T. Must start at 0, never
            decrease and end at T. On a GPU this is checked on the device: if it does not hold, all of out
            and final_state becomes NaN. On a CPU it raises.

    Raises:
        ValueError: q is not on a device of the variant's kind, or an input requires a gradient.
        RuntimeError: any other tensor or value is not as above, or the GPU is older than SM80. The message
            names the argument, what was expected and what came; nothing has been written.
    """
    if not (q.is_cpu if device_type == "cpu" else q.is_cuda):
        raise ValueError(
            f"q: expected a {device_type.upper()} tensor, got one on {q.device} "
            "(chunk_kda serves other devices too)"
        )
    if _needs_grad(q, k, v, g, beta, A_log, dt_bias, initial_state):
        _refuse_gradient(
            q=q, k=k, v=v, g=g, beta=beta, A_log=A_log, dt_bias=dt_bias, initial_state=initial_state
        )
    # the operator's defaults are this call's flags
    kda_prefill(
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, out, final_state, scale, lower_bound
    )


def chunk_kda(
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
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None] | tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Kimi Delta Attention with the signature of flash-linear-attention 0.6.0. Formula: top of reference.py.

    The CUDA kernel serves bfloat16 q, k, v with K = V = 128 on SM80 and newer when no gradient is asked for,
    the kernel of the package's CPU variant the same in bfloat16 and float32 on CPUs; all else runs in
    reference.py, on the tensors' own device. In the kernel, a q, k, v or g whose last
    dimension is not contiguous (transformers hands over the layout of its convolution) is copied once; other
    strides cost nothing.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V], HV a multiple of H.
        g: [B, T, HV, K], the log decay, <= 0; the raw gate with use_gate_in_kernel.
        beta: [B, T, HV], in (0, 1); logits with use_beta_sigmoid_in_kernel.
        scale: factor on q; K ** -0.5 by default.
        initial_state: [N, HV, K, V], or [N, HV, V, K] with state_v_first; zeros by default. N is B without
            cu_seqlens.
        output_final_state: return the state after each sequence's last token.
        use_qk_l2norm_in_kernel: L2-normalise q and k.
        use_gate_in_kernel: log decay = lower_bound * sigmoid(exp(A_log) * (g + dt_bias)) with a lower_bound,
            -exp(A_log) * softplus(g + dt_bias) without. A_log, dt_bias and lower_bound act only with this
            flag.
        use_beta_sigmoid_in_kernel: apply the sigmoid to beta.
        allow_neg_eigval: beta = 2 * sigmoid(logits); needs use_beta_sigmoid_in_kernel.
        safe_gate: the caller's word that log decays stay within [-5, 0]. Not needed here, every gate is
            exact; with use_gate_in_kernel it asks for a lower_bound.
        lower_bound: in [-5, 0], the least log decay of a token.
        disable_recompute: how a backward pass would spend memory; the result does not depend on it.
        return_intermediate_states: also return the states before tokens 0, 64, 128 ... of each sequence, as
            prefix caches want them; needs chunk_size 64. With cu_seqlens their number depends on values:
            reading them synchronises, unless cu_seqlens_cpu has them.
        cp_context, use_graph: not supported. (A CUDA graph can capture the call as it is.)
        state_v_first: both states are [N, HV, V, K].
        cu_seqlens: int32 or int64 [N + 1], with B = 1: N sequences packed along T, from 0 to T without
            decrease. The CUDA kernel checks this on the device: if it does not hold, o and final_state are
            NaN. On a CPU, and by the reference, it raises.
        cu_seqlens_cpu: the same values on the host; spares the reference a synchronisation.
        max_num_seqs: means something with use_graph only.
        A_log: HV elements, required by the softplus gate.
        dt_bias: HV * K elements, [HV, K] or flat.
        chunk_size: 32 or 64. Checked for the sake of callers; both paths choose their own chunk, the result
            is the same.
        transpose_state_layout: deprecated name of state_v_first.
        out: [B, T, HV, V] in v's dtype, written and returned as o; allocated by default.

    Returns:
        o: [B, T, HV, V] in v's dtype.
        final_state: float32 (float64 if q, k or v is) in initial_state's layout, or None if not asked for.
        states: only with return_intermediate_states, bfloat16 [B, NT, HV, K, V], or [B, NT, HV, V, K] with
            state_v_first; NT is ceil(T / 64), with cu_seqlens the sum of the sequences' ceil(length / 64).

    Raises:
        TypeError, ValueError, RuntimeError (from the kernel): an argument is not as above; the message names
            it, what was expected and what came.
        NotImplementedError: cp_context or use_graph.
    """
    if (
        return_intermediate_states or cp_context is not None or use_graph or chunk_size != 64 or safe_gate
        or allow_neg_eigval or cu_seqlens_cpu is not None
    ):  # fmt: skip
        _check_options(
            return_intermediate_states, cp_context, use_graph, chunk_size, safe_gate, use_gate_in_kernel,
            lower_bound, allow_neg_eigval, use_beta_sigmoid_in_kernel, cu_seqlens, cu_seqlens_cpu,
        )  # fmt: skip
    if transpose_state_layout is not None:
        state_v_first = state_layout(state_v_first, transpose_state_layout)
    if not use_gate_in_kernel:
        A_log = dt_bias = None

    # From here on every line counts: a call takes the host about as long as a short prompt takes a GPU.
    flags = attention_flags(
        use_gate_in_kernel, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        state_v_first,
    )  # fmt: skip
    makes_both = output_final_state and out is None and not return_intermediate_states
    if makes_both:
        rare = () if scale is None and cu_seqlens is None else (scale, cu_seqlens)
        inputs = (q, k, v, g, beta, A_log, dt_bias, initial_state)
        results = try_kernel(kda_prefill_new, inputs, (flags, lower_bound, *rare))
        if results is not NotImplemented:
            return results
    if makes_both or reference_reason(q, k, v, g, beta, A_log, dt_bias, initial_state) is not None:
        if out is not None:
            check_out(out, v)
        run = intermediate.reference_states if return_intermediate_states else reference.chunk_kda
        o, *states = run(
            q, k, v, g, beta, A_log, dt_bias, scale, initial_state, output_final_state,
            use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
            lower_bound, state_v_first, cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu,
        )  # fmt: skip
        return (o if out is None else out.copy_(o)), *states

    # is_contiguous() takes half as long as stride().
    if not q.is_contiguous() and q.stride(-1) != 1:
        q = q.contiguous()
    if not k.is_contiguous() and k.stride(-1) != 1:
        k = k.contiguous()
    contiguous_v = v.is_contiguous()
    if not contiguous_v and v.stride(-1) != 1:
        v = v.contiguous()
    if not g.is_contiguous() and g.stride(-1) != 1:
        g = g.contiguous()
    if A_log is not None:
        A_log = dense_fp32(A_log)
    if dt_bias is not None:
        dt_bias = dense_fp32(dt_bias)
    if initial_state is not None:
        initial_state = dense_fp32(initial_state)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    if out is None:
        # to name a memory format takes 0.2 us
        out = torch.empty_like(v) if contiguous_v else v.new_empty(v.shape)
    final_state = None
    if output_final_state:
        if initial_state is not None:
            final_state = torch.empty_like(initial_state)
        else:
            N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            final_state = v.new_empty(N, v.shape[2], HEAD_DIM, HEAD_DIM, dtype=torch.float32)
    states = ()
    if return_intermediate_states:
        bounds = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
        states = (intermediate.new_states(v, q, state_v_first, bounds),)
    kda_prefill(
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, out, final_state,
        DEFAULT_SCALE if scale is None else scale, lower_bound, flags, *states,
    )  # fmt: skip
    return out, final_state, *states


def _check_options(
    return_intermediate_states, cp_context, use_graph, chunk_size, safe_gate, use_gate_in_kernel, lower_bound,
    allow_neg_eigval, use_beta_sigmoid_in_kernel, cu_seqlens, cu_seqlens_cpu,
) -> None:  # fmt: skip
    """What FLA's signature allows and this package does not have, and options that do not fit each other."""
    if cp_context is not None:
        raise NotImplementedError("cp_context: expected None, context parallelism is not supported")
    if use_graph:
        raise NotImplementedError(
            "use_graph: expected False; the call can be captured as it is, if cu_seqlens end at T in every replay"
        )
    if chunk_size not in (32, 64):
        raise ValueError(f"chunk_size: expected 32 or 64, got {chunk_size!r}")
    if return_intermediate_states and chunk_size != intermediate.STEP:
        raise ValueError(
            f"chunk_size: expected {intermediate.STEP} with return_intermediate_states, got {chunk_size}"
        )
    if safe_gate and use_gate_in_kernel and lower_bound is None:
        raise ValueError(
            "lower_bound: expected a value in [-5, 0] with safe_gate and use_gate_in_kernel, got None"
        )
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval: expected use_beta_sigmoid_in_kernel=True with it, got False")
    if cu_seqlens is None and cu_seqlens_cpu is not None:
        raise ValueError("cu_seqlens_cpu: expected cu_seqlens with it, got None")


def state_layout(state_v_first: bool, transpose_state_layout: bool) -> bool:
    """state_v_first, given by its deprecated name in the caller's caller."""
    if state_v_first:
        raise ValueError("transpose_state_layout: expected state_v_first alone, got both")
    warnings.warn("transpose_state_layout is now called state_v_first", DeprecationWarning, stacklevel=3)
    return transpose_state_layout


def reference_reason(q, k, v, g, beta, A_log, dt_bias, initial_state) -> str | None:
    """None when the compiled kernel serves these inputs, else why the reference does, in a line.

    Also sends ill-shaped inputs to the reference, whose checks then name what is wrong with them.
    """
    if not isinstance(q, torch.Tensor) or not (q.is_cpu if device_type == "cpu" else q.is_cuda):
        return f"q is not a tensor on a {device_type.upper()} device"
    if device_type == "cpu":
        for x in (k, v, g, beta):
            if not isinstance(x, torch.Tensor) or not x.is_cpu:
                return "k, v, g and beta are not all tensors on the CPU"
    # every look at a tensor's shape takes 0.15 us
    q_shape, v_shape = q.shape, v.shape
    if len(q_shape) != 4 or len(v_shape) != 4 or g.ndim != 4 or not q_shape[3] == v_shape[3] == HEAD_DIM:
        return f"K and V are not both {HEAD_DIM}"
    dtypes = QKV_DTYPES[device_type]
    if q.dtype not in dtypes or k.dtype not in dtypes or v.dtype not in dtypes:
        return "q, k and v are not all bfloat16" + (" or float32" if torch.float32 in dtypes else "")
    if g.dtype not in BF16_OR_FP32 or beta.dtype not in BF16_OR_FP32:
        return "g or beta is neither bfloat16 nor float32"
    if initial_state is not None and initial_state.dtype not in BF16_OR_FP32:
        return "initial_state is neither bfloat16 nor float32"
    asked = torch.is_grad_enabled() or forward_ad._current_level >= 0
    if asked and _needs_grad(q, k, v, g, beta, A_log, dt_bias, initial_state):
        return "a gradient is required"
    if device_type == "cuda" and _sm_major(q.get_device()) < MIN_SM_MAJOR:
        return f"the GPU is older than SM{MIN_SM_MAJOR}0"
    return None


def try_kernel(operator, inputs: tuple, options: tuple):
    """What `operator` returns, or NotImplemented when the reference serves the call.

    inputs: q, k, v, g, beta, A_log, dt_bias, initial_state. The operator takes what the kernels can't read as it
    lies. In eager mode it is asked itself: before it writes or launches anything it refuses whatever
    `reference_reason`, which takes 1.5 us, has a reason against. Of derivatives, of tensors of another device and
    in a graph that is being compiled it knows nothing.
    """
    if is_compiling():
        return operator(*inputs, *options) if reference_reason(*inputs) is None else NotImplemented
    q = inputs[0]
    if not isinstance(q, torch.Tensor) or not (q.is_cpu if device_type == "cpu" else q.is_cuda):
        return NotImplemented
    if (torch.is_grad_enabled() or forward_ad._current_level >= 0) and _needs_grad(*inputs):
        return NotImplemented
    try:
        # what an OpOverload's __call__ calls, without its 0.3 us
        return getattr(operator, "_op", operator)(*inputs, *options)
    except RuntimeError:
        if reference_reason(*inputs) is None:
            raise
    return NotImplemented


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a derivative is asked for, backward or forward (`torch.func.jvp`, dual numbers): the operator has
    neither, and would silently give none, or a zero."""
    if torch.is_grad_enabled():
        for x in tensors:
            if getattr(x, "requires_grad", False):  # of what is no tensor, others complain
                return True
    if forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _refuse_gradient(**inputs: torch.Tensor | None) -> None:
    name = next(name for name, x in inputs.items() if _needs_grad(x))
    raise ValueError(
        f"{name}: expected a tensor that requires no gradient (or torch.no_grad()), got one that does"
    )


def dense_fp32(x: torch.Tensor) -> torch.Tensor:
    """x as contiguous float32. (To ask first is faster than two calls to torch that find nothing to do.)"""
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()


def _sm_major(index: int) -> int:
    """Of CUDA device `index`."""
    # torch.compile makes a constant of the properties, and would compile anew for a dictionary that changes
    if is_compiling():
        return torch.cuda.get_device_properties(index).major
    major = _sm_majors.get(index)
    if major is None:
        major = _sm_majors[index] = torch.cuda.get_device_properties(index).major
    return major


def check_out(out: torch.Tensor, v: torch.Tensor) -> None:
    """out must be a tensor like v that a result can be copied into; the kernel has its own check."""
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out: expected a tensor, got {type(out).__name__}")
    for what, expected, got in (
        ("shape", list(v.shape), list(out.shape)),
        ("dtype", v.dtype, out.dtype),
        ("device", v.device, out.device),
    ):
        if expected != got:
            raise ValueError(f"out: expected the {what} of v, {expected}, got {got}")

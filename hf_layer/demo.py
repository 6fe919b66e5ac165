"""python -m hf_layer.demo: Kimi Delta Attention at work, and checked, in under a minute.

A small random Kimi-Linear model from transformers runs twice, once as transformers has it and once with every
KDA layer replaced by `KimiDeltaAttention` with the same weights. Both must write the same tokens. Then the
delta rule itself is compared with its definition in float64: the kernel on a GPU, the reference's chunk form
elsewhere. The exit status is 1 if tokens differ or an error exceeds its limit.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import sys
import time
from collections.abc import Callable

import torch

from . import reference
from .layer import KimiDeltaAttention
from .loading import kernel_status, load_kernel

try:
    import transformers
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise ImportError("hf_layer.demo needs transformers and rich: pip install transformers rich") from error


@contextlib.contextmanager
def own_functions():
    """Model files of transformers imported in here keep their own PyTorch functions, FLA installed or not.

    At import they take FLA's Triton functions where they find them, which need a GPU and use TF32 for
    float32: no measure for equal tokens.
    """
    found = {name: sys.modules.pop(name, None) for name in ("fla", "causal_conv1d")}
    sys.modules.update(dict.fromkeys(found))  # None: an import fails
    try:
        yield
    finally:
        for name, module in found.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


with own_functions():
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

KERNEL_LIMIT = 5e-3  # bf16 operands: every gate of a correct kernel stays near 4e-3
REFERENCE_LIMIT = 1e-5  # float32 chunk form against the definition in float64
BF16_RATIO_LIMIT = 2.0  # error of our bf16 model over that of transformers' bf16 model, both against float32


def build_models(device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(transformers' own, ours) with equal weights, float32."""
    config = transformers.KimiLinearConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        mlp_layer_types=["dense"] * 4,
        linear_head_dim=128,
        linear_num_heads=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    theirs = transformers.KimiLinearForCausalLM(config).eval()
    return theirs.to(device), replace_kda_layers(copy.deepcopy(theirs)).to(device)


def replace_kda_layers(model: torch.nn.Module) -> torch.nn.Module:
    """Put a `KimiDeltaAttention` with the same weights in place of each KDA layer of a Kimi-Linear model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, KimiLinearDeltaAttention):
            ours = KimiDeltaAttention.from_config(model.config, module.layer_idx)
            ours.load_state_dict(module.state_dict(), strict=True)
            model.set_submodule(name, ours.to(module.o_proj.weight).train(module.training))
    return model


def timed(
    function: Callable[[], torch.Tensor], device: torch.device, repeats: int = 1
) -> tuple[torch.Tensor, float]:
    """(result, seconds of one call), after one call to warm up."""
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, (time.perf_counter() - start) / repeats


def relative_rms(expected: torch.Tensor, found: torch.Tensor) -> float:
    """RMS of the difference over RMS of the expected values."""
    expected, found = expected.double(), found.double()
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()


def compare_models(console: Console, device: torch.device, new_tokens: int) -> list[str]:
    """Greedy generation by both models; returns what went wrong."""
    theirs, ours = build_models(device)
    prompt = torch.randint(3, theirs.config.vocab_size, (2, 48), device=device)

    def generate(model):
        return model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)

    failures = []
    table = Table(title=f"Greedy generation, 2 x ({prompt.shape[1]} prompt + {new_tokens} new tokens)")
    for column in ("KDA layers", "dtype", "delta rule runs on", "seconds", "result"):
        table.add_column(column)
    expected, seconds = timed(lambda: generate(theirs), device)
    table.add_row("transformers", "float32", "transformers' torch path", f"{seconds:.2f}", "-")
    tokens, seconds = timed(lambda: generate(ours), device)
    same = torch.equal(tokens, expected)
    if not same:
        failures.append("the tokens of our layers differ from transformers' own")
    backend = next(m for m in ours.modules() if isinstance(m, KimiDeltaAttention)).delta_rule_backend
    table.add_row(
        "hf_layer",
        "float32",
        backend(device, torch.float32),
        f"{seconds:.2f}",
        "same tokens" if same else "OTHER TOKENS",
    )

    if device.type == "cuda":
        truth = theirs(prompt).logits
        base = relative_rms(truth, theirs.bfloat16()(prompt).logits)
        error = relative_rms(truth, ours.bfloat16()(prompt).logits)
        _, seconds = timed(lambda: generate(ours), device)
        if not error <= BF16_RATIO_LIMIT * base:
            failures.append(f"bf16 logits: error {error:.1e}, transformers' own bf16 path has {base:.1e}")
        result = f"logits off by {error:.1e} (transformers' bf16: {base:.1e})"
        table.add_row("hf_layer", "bfloat16", backend(device, torch.bfloat16), f"{seconds:.2f}", result)
    console.print(table)
    console.print(f"first new tokens: {tokens[0, prompt.shape[1] :][:12].tolist()}")
    return failures


def gate_cases(T: int, H: int, device: torch.device) -> dict[str, tuple[torch.Tensor, dict]]:
    """Per gate: g [1, T, H, 128] and the keyword arguments that go with it."""
    raw = torch.randn(1, T, H, 128, device=device).bfloat16()
    dt = torch.empty(H, 128, device=device).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    softplus = {
        "A_log": torch.empty(H, device=device).uniform_(1.0, 16.0).log(),
        "dt_bias": dt + torch.log(-torch.expm1(-dt)),
        "use_gate_in_kernel": True,
    }
    lower_bound = {
        "A_log": torch.rand(H, device=device),
        "dt_bias": torch.rand(H, 128, device=device),
        "use_gate_in_kernel": True,
        "lower_bound": -5.0,
    }
    decay = -0.02 * torch.rand(1, T, H, 128, device=device)
    decay[torch.rand_like(decay) < 0.05] = -2600.0
    return {
        "lower bound -5": (raw, lower_bound),
        "softplus": (raw, softplus),
        "pre-activated, 5 % hard resets": (decay, {}),
    }


def compare_delta_rule(console: Console, device: torch.device) -> list[str]:
    """The kernel (or the reference's chunks) against the definition in float64; returns what went wrong."""
    kernel = load_kernel().module if device.type == "cuda" else None
    T, H = (1000, 4) if kernel is not None else (256, 2)
    if kernel is not None:
        name, run, limit, dtype = "kernel, bfloat16", kernel.chunk_kda, KERNEL_LIMIT, torch.bfloat16
    else:
        name, run, limit, dtype = (
            "reference chunk form, float32",
            reference.chunk_kda,
            REFERENCE_LIMIT,
            torch.float32,
        )

    q, k, v = (torch.randn(1, T, H, 128, device=device).to(dtype) for _ in range(3))
    beta = torch.randn(1, T, H, device=device).to(dtype)
    common = {
        "initial_state": 0.1 * torch.randn(1, H, 128, 128, device=device),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
    }
    failures = []
    table = Table(
        title=f"{name}, against the recurrence in float64: relative RMS error (B=1, T={T}, H={H}, D=128)"
    )
    for column in ("gate", "output", "final state", "limit"):
        table.add_column(column)
    for gate, (g, options) in gate_cases(T, H, device).items():
        expected = reference.recurrent_kda(q.double(), k.double(), v.double(), g, beta, **common, **options)
        found = run(q, k, v, g, beta, **common, **options)
        errors = [relative_rms(e, f) for e, f in zip(expected, found)]
        table.add_row(gate, *(f"{error:.1e}" for error in errors), f"{limit:.0e}")
        if not max(errors) <= limit:
            failures.append(f"{gate} gate: error {max(errors):.1e} exceeds {limit:.0e}")
    console.print(table)

    if kernel is not None:
        _, fast = timed(lambda: kernel.chunk_kda(q, k, v, g, beta, **common), device, repeats=20)
        _, slow = timed(lambda: reference.chunk_kda(q, k, v, g, beta, **common), device, repeats=3)
        console.print(
            f"T={T}, H={H}: kernel {fast * 1e3:.3f} ms, reference {slow * 1e3:.1f} ms ({slow / fast:.0f}x)"
        )
    return failures


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hf_layer.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.new_tokens < 1:
        parser.error(f"--new-tokens: expected at least 1, got {args.new_tokens}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a CUDA device, and there is none on this machine")
    device = torch.device(args.device)
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(args.seed)

    console = Console()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    console.print(
        f"{name}, torch {torch.__version__}, transformers {transformers.__version__}", highlight=False
    )
    console.print(f"backend: {kernel_status()}", highlight=False, markup=False)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        failures = compare_models(console, device, args.new_tokens) + compare_delta_rule(console, device)
    for failure in failures:
        console.print(f"FAILED: {failure}", style="bold red")
    if not failures:
        console.print("all checks passed", style="bold green")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

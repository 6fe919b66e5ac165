"""docs/migration.md: its Python blocks run, and what it says of FLA's own backend is so."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/migration.md"
TEXT = PAGE.read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
FLA_IS_THERE = all(importlib.util.find_spec(name) for name in ("fla", "triton", "einops"))
needs_fla = pytest.mark.skipif(not FLA_IS_THERE, reason="flash-linear-attention is not installed")


def block_with(words: str) -> str:
    (block,) = [block for block in BLOCKS if words in block]
    return block


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#\s]+)", TEXT):
        assert (PAGE.parent / target).exists(), f"{target} does not exist"


@needs_fla
def test_registering(capsys):
    exec(block_with("hf_layer.fla.register()"), {})
    assert re.match(r"(reference|flash-kda kernel)", capsys.readouterr().out)


def test_cudnn_s_call_is_the_recurrence(monkeypatch):
    """The adapter of the page, on its own inputs, against the definition for each sequence by itself."""
    from hf_layer import reference

    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    torch.manual_seed(0)
    names: dict = {}
    exec(block_with("def kimi_delta_attention"), names)
    for n, (begin, end) in enumerate(((0, 15), (15, 40))):
        q, k, v, g, beta = (names[name][None, begin:end] for name in ("q", "k", "v", "g", "beta"))
        o, state = reference.recurrent_kda(
            q, k, v, g, beta, A_log=torch.zeros(2), lower_bound=-5.0, use_gate_in_kernel=True,
            use_qk_l2norm_in_kernel=True, output_final_state=True, state_v_first=True,
        )  # fmt: skip
        torch.testing.assert_close(names["o"][begin:end], o[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(names["final_state"][n], state[0], rtol=0, atol=1e-5)


STOCK_SAYS_NO = {
    "softplus": dict(lower_bound=None, safe_gate=False),
    "no safe_gate": dict(safe_gate=False),
    "log decay": dict(use_gate_in_kernel=False),
    "activated beta": dict(use_beta_sigmoid_in_kernel=False),
    "no l2norm": dict(use_qk_l2norm_in_kernel=False),
    "negative eigenvalues": dict(allow_neg_eigval=True),
    "no A_log": dict(A_log=None),
    "no dt_bias": dict(dt_bias=None),
    "K-first": dict(state_v_first=False),
    "old keyword": dict(state_v_first=False, transpose_state_layout=True),
    "grouped heads": dict(v=torch.zeros(1, 4, 4, 128, dtype=torch.bfloat16)),
    "gradients on": {},
}


@needs_fla
@pytest.mark.parametrize("what", STOCK_SAYS_NO)
def test_what_fla_s_own_backend_leaves_to_triton(what):
    from fla.ops.kda.backends.flash_kda import FlashKDABackend

    x = torch.zeros(1, 4, 2, 128, dtype=torch.bfloat16)
    flags = ("use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "safe_gate")
    taken = dict(q=x, k=x, v=x, g=x, beta=x, A_log=x, dt_bias=x, lower_bound=-5.0, state_v_first=True)
    taken.update(dict.fromkeys(flags, True))
    ask = FlashKDABackend().chunk_kda_verifier
    with torch.no_grad():
        assert ask(**taken)[0]
    with torch.set_grad_enabled(what == "gradients on"):
        assert not ask(**{**taken, **STOCK_SAYS_NO[what]})[0]

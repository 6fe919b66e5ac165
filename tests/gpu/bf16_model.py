"""The chunk form with bf16 matrix operands: what an exact kernel on bf16 tensor cores can reach at best.

Chunks of 16 tokens, decays multiplied in fp32, every operand of a matrix product rounded to bf16 (rows * pre,
columns * suf, Aqk, T_inv, U0, U and the state that enters a product), fp32 accumulation and an fp32 state.
Where near-parallel keys make T_inv ill-conditioned, the kernel is held to this model's error.
"""

from __future__ import annotations

import torch
from kda_inputs import activate

CHUNK = 16


def bf16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).float()


def pair_products(q: torch.Tensor, k: torch.Tensor, a: torch.Tensor):
    """Aqk, Akk [..., C, C], pre, suf [..., C, D] and total [..., D] from q, k and decays a [..., C, D]."""
    C = a.shape[-2]
    index = torch.arange(C, device=a.device)
    Aqk = torch.diag_embed((bf16(q) * bf16(k)).sum(-1))
    Akk = torch.zeros_like(Aqk)
    pre, suf = a.clone(), torch.ones_like(a)
    half = 1
    while half < C:
        late = (index // half) % 2 == 1
        same_group = index[:, None] // (2 * half) == index[None, :] // (2 * half)
        block = same_group & late[:, None] & ~late[None, :]
        columns = bf16(k * suf).mT
        Aqk = torch.where(block, bf16(q * pre) @ columns, Aqk)
        Akk = torch.where(block, bf16(k * pre) @ columns, Akk)
        end = half * (index // half) + half - 1  # the last token of each token's half
        total = pre[..., end, :]
        partner = total[..., index ^ half, :]  # the total of the other half
        pre = torch.where(late[:, None], pre * partner, pre)
        suf = torch.where(late[:, None], suf, suf * partner)
        half *= 2
    return Aqk, Akk, pre, suf, pre[..., -1, :]


def activated(inputs: dict) -> tuple[torch.Tensor, ...]:
    """fp32 arguments of `bf16_chunk_kda`, the state [N, HV, V, K] included, from those of `make_inputs`."""
    q, k, v, g, beta = (inputs[name].float() for name in ("q", "k", "v", "g", "beta"))
    HV, D = v.shape[2:]
    if inputs["use_qk_l2norm_in_kernel"]:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * (D**-0.5 if inputs["scale"] is None else inputs["scale"])
    q, k = (x.repeat_interleave(HV // x.shape[2], dim=2) for x in (q, k))
    if inputs["use_gate_in_kernel"]:
        g = activate(g, inputs["A_log"], inputs["dt_bias"], inputs["lower_bound"])
    if inputs["use_beta_sigmoid_in_kernel"]:
        beta = torch.sigmoid(beta) * (2 if inputs["allow_neg_eigval"] else 1)
    S = inputs["initial_state"]
    if S is None:
        N = len(q) if inputs["cu_seqlens"] is None else len(inputs["cu_seqlens"]) - 1
        S = v.new_zeros(N, HV, D, D)
    return q, k, v, g, beta, S.float() if inputs["state_v_first"] else S.float().mT


def bf16_chunk_kda(q, k, v, g, beta, S):
    """Output and final state of one batch of equal-length sequences.

    Args: q (already times scale), k, v and the log decay g [B, T, H, D], beta [B, T, H], all activated and
        normalised, fp32; S [B, H, V, K] fp32. T is a multiple of 16.
    Returns: o [B, T, H, D] rounded to bf16 and the final state [B, H, V, K], both fp32.
    """
    B, T, H, D = q.shape

    def chunks(x):  # [B, T, H, D] -> [T / C, B, H, C, D]
        return x.unflatten(1, (T // CHUNK, CHUNK)).permute(1, 0, 3, 2, 4)

    q, k, v, g, beta = (chunks(x) for x in (q, k, v, g, beta.unsqueeze(-1)))
    Aqk, Akk, pre, suf, total = pair_products(q, k, g.exp())
    identity = torch.eye(CHUNK, device=q.device)
    T_inv = torch.linalg.solve_triangular(identity + beta * Akk, identity.expand_as(Akk), upper=False)
    q_pre, k_pre, k_suf, Aqk, T_inv = (bf16(x) for x in (q * pre, k * pre, k * suf, Aqk, T_inv))
    outputs = []
    for c in range(T // CHUNK):
        S_operand = bf16(S).mT
        U0 = bf16(beta[c] * (v[c] - k_pre[c] @ S_operand))
        U = bf16(T_inv[c] @ U0)
        outputs.append(q_pre[c] @ S_operand + Aqk[c] @ U)
        S = S * total[c].unsqueeze(-2) + U.mT @ k_suf[c]
    o = torch.stack(outputs).permute(1, 0, 3, 2, 4).reshape(B, T, H, D)
    return bf16(o), S

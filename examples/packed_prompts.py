"""Score several prompts in one row, without padding.

    pip install -e '.[demo]' && python scripts/build_kernel.py  # once
    python examples/packed_prompts.py  # a tiny random model, random prompts
    python examples/packed_prompts.py --model NAME "First prompt" "Another one"

The prompts lie one behind the other, and `cu_seq_lens_q` says where each begins. With our whole KDA layer
neither the short convolution nor the state crosses these borders; transformers' own KDA code runs over them.
Its other attention layers follow `position_ids`. What comes out is printed beside each prompt's own run.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_layer


def pack(prompts: list[torch.Tensor]) -> dict:
    """Arguments for the model: [T_0], [T_1], .. of token ids become one row [1, T_0 + T_1 + ..]."""
    lengths = [len(prompt) for prompt in prompts]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=prompts[0].device)
    positions = torch.cat([torch.arange(length, device=bounds.device) for length in lengths])
    return dict(
        input_ids=torch.cat(prompts)[None], position_ids=positions[None], use_cache=False,
        cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=max(lengths), max_length_k=max(lengths),
    )  # fmt: skip


def log_likelihood(logits: torch.Tensor, prompt: torch.Tensor) -> float:
    """Sum of log p(token | tokens before it), from the logits [T, vocabulary] of a prompt [T]."""
    log_p = logits[:-1].float().log_softmax(dim=-1)
    return log_p.gather(1, prompt[1:, None]).sum().item()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="on the Hub, or a folder (default: a tiny random model)")
    parser.add_argument("--trust-remote-code", action="store_true", help="of the model's tokenizer")
    parser.add_argument("prompts", nargs="*", default=["The sky is blue.", "The sky is made of cheese."])
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    if arguments.model is None:
        from tiny import save_tiny_model

        name, dtype = save_tiny_model(), torch.bfloat16 if device == "cuda" else torch.float32
        prompts = [torch.randint(3, 512, (length,), device=device) for length in (40, 3, 130, 17)]
    else:
        name, dtype = arguments.model, torch.bfloat16
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
        prompts = [torch.tensor(tokenizer(text).input_ids, device=device) for text in arguments.prompts]

    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    hf_layer.kernelize(model)
    print(hf_layer.report(model))

    row = model(**pack(prompts)).logits[0]
    print("tokens  log likelihood  alone")
    for prompt, logits in zip(prompts, row.split([len(prompt) for prompt in prompts])):
        alone = model(prompt[None], use_cache=False).logits[0]
        print(f"{len(prompt):6}  {log_likelihood(logits, prompt):14.4f}  {log_likelihood(alone, prompt):.4f}")


if __name__ == "__main__":
    main()

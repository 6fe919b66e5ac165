"""Print tokens as they come, from a model with our kernel.

    pip install -e '.[demo]' && python scripts/build_kernel.py  # once
    python examples/stream_tokens.py  # a tiny random model, numbers instead of words
    python examples/stream_tokens.py --model NAME --prompt "Tell me a story."

`hf_layer.kernelize(model)` puts the kernel into a model that is there already.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.generation.streamers import BaseStreamer

import hf_layer


class NumberStreamer(BaseStreamer):
    """Prints token ids; for models without a tokenizer."""

    def __init__(self) -> None:
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        """`generate` hands over the prompt first, then each token."""
        if not self.prompt:
            print(value.item(), end=" ", flush=True)
        self.prompt = False

    def end(self) -> None:
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="on the Hub, or a folder (default: a tiny random model)")
    parser.add_argument("--prompt", default="Tell me a story.")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--trust-remote-code", action="store_true", help="of the model's tokenizer")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    if arguments.model is None:
        from tiny import save_tiny_model

        name, streamer = save_tiny_model(), NumberStreamer()
        ids = torch.randint(3, 512, (1, 12))
    else:
        name = arguments.model
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
        chat = [{"role": "user", "content": arguments.prompt}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids, streamer = ids["input_ids"], TextStreamer(tokenizer, skip_prompt=True)

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(device)
    hf_layer.kernelize(model)

    start = time.perf_counter()
    tokens = model.generate(
        ids.to(device),
        max_new_tokens=arguments.new_tokens,
        do_sample=True,
        temperature=0.7,
        streamer=streamer,
    )
    new = tokens.shape[1] - ids.shape[1]
    print(
        f"{new} tokens, {new / (time.perf_counter() - start):.1f} a second with the prompt and the first call"
    )


if __name__ == "__main__":
    main()

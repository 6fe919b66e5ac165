"""Load a Kimi-Linear model with our kernel and let it write.

    pip install -e '.[demo]' && python scripts/build_kernel.py  # once
    python examples/load_kimi_linear.py  # a tiny random model
    python examples/load_kimi_linear.py --model NAME --prompt "Once upon a time"

One call of `hf_layer.register()` is all: every model that is loaded with `use_kernels=True` afterwards has
our kernel in its KDA layers. GLM-5-next and Bailing models are loaded in the same way.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="on the Hub, or a folder (default: a tiny random model)")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--trust-remote-code", action="store_true", help="of the model's tokenizer")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # On a GPU of compute capability 9.0; `capability=(80, 129)` takes in all that the kernel is compiled for.
    hf_layer.register(devices=("cuda", "cpu"))

    if arguments.model is None:
        from tiny import save_tiny_model

        name, tokenizer = save_tiny_model(), None
        ids = torch.randint(3, 512, (1, 12))
    else:
        name = arguments.model
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
        ids = tokenizer(arguments.prompt, return_tensors="pt").input_ids

    # device_map needs the package accelerate. Without it: from_pretrained(...).to(device), and then
    # model.set_use_kernels(True), for kernels are chosen for the device that the model is on.
    placement = {"device_map": device} if device == "cuda" else {}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, use_kernels=True, **placement)
    print(hf_layer.report(model))

    tokens = model.generate(ids.to(device), max_new_tokens=arguments.new_tokens, do_sample=False)
    print(tokens[0].tolist() if tokenizer is None else tokenizer.decode(tokens[0]))


if __name__ == "__main__":
    main()

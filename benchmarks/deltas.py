"""Decoding with a delta: tokens a second of a base with packed signs beside those of the fine-tuned model as dense weights.

`python -m benchmarks.deltas [--width 512] [--tokens 32]`: a Llama with random weights, and random prompts of 16 tokens.
"""

import argparse
import time
from typing import Any

from benchmarks.machine import peak_megabytes

SIZES = (1, 8, 32)
SEED, PROMPT, VOCABULARY = 0, 16, 4096


def model(width: int, layers: int) -> Any:
    import torch
    from transformers import LlamaConfig

    from posttrain.models.load import fresh
    from posttrain.models.source import ModelSource

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    return fresh(config, ModelSource(path="benchmark", device="cpu"))


def speed(lm: Any, rows: int, tokens: int, repeats: int) -> float:
    """The best tokens a second of a batch that grows by `tokens` tokens a row."""
    import torch

    from posttrain.sampling.engine import Engine, Request
    from posttrain.sampling.settings import Sampling

    draw = torch.Generator().manual_seed(SEED)
    prompts = torch.randint(1, VOCABULARY, (rows, PROMPT), generator=draw).tolist()
    found = 0.0
    for _ in range(repeats):
        engine = Engine(lm, Sampling(max_tokens=tokens), [], SEED)
        for index, prompt in enumerate(prompts):
            engine.add(Request(tuple(prompt), (index,)))
        began, count = time.perf_counter(), 0
        while (done := engine.next()) is not None:
            count += len(done.tokens)
        found = max(found, count / (time.perf_counter() - began))
    return found


def main() -> None:
    import torch

    from posttrain.models.delta import Delta, LowRank, Signs, add, switch

    parser = argparse.ArgumentParser(prog="python -m benchmarks.deltas", description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    lm, fine = (model(asked.width, asked.layers) for _ in range(2))
    with torch.no_grad():
        for parameter in fine.model.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape))
    for name, form in (("signs", Signs.of), ("low rank", LowRank.of)):
        add(lm.model, Delta.between(lm.model, fine.model, form), name)
    rows: dict[str, list[float]] = {"dense": [], "signs": [], "low rank": []}
    for size in SIZES:
        for name, found in rows.items():
            switch(lm.model, None if name == "dense" else name)
            found.append(speed(lm, size, asked.tokens, asked.repeats))
    about = f"Llama of width {asked.width}, {asked.layers} blocks, float32; {asked.threads} threads"
    print(f"{about}; peak {peak_megabytes():,.0f} MB\n")
    print("| | " + " | ".join(f"batch {size}" for size in SIZES) + " |\n|---|" + "---|" * len(SIZES))
    for name, found in rows.items():
        shares = [one / two for one, two in zip(found, rows["dense"], strict=True)]
        cells = [f"{each:,.0f} tokens/s, {part:.2f}x" for each, part in zip(found, shares, strict=True)]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

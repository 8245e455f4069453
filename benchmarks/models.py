"""What is measured on: small random Llama models, GSM8K rows and arithmetic prompts, made once into `runs/benchmarks`."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.data.dataset import Data
from posttrain.data.stream import Stream

HOME = Path("runs/benchmarks")
TOKENS = 4096  # of the tokenizer; a model's table may be larger, as if its other tokens did not occur
FORMAT = {"kind": "prompt_completion", "fields": {"completion": "{solution}\n#### {answer}"}}
PROBLEMS = {"path": "posttrain:data/arith_train.jsonl.gz"}
ROWS = 8  # of an update: TRL's default batch
SEED = 0


def gsm8k(updates: int | None = None) -> dict[str, Any]:
    """The `data:` of a recipe: as many rows as the updates take, by default all."""
    rows = {} if updates is None else {"rows": f"0:{updates * ROWS}"}
    return {"sources": {"path": "posttrain:data/gsm8k_train.jsonl.gz", **rows}, "format": FORMAT}


@dataclass(frozen=True)
class Shape:
    """A Llama model's sizes."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    feed_forward: int

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices."""
        head = self.hidden // self.heads
        attention = 2 * self.hidden * head * (self.heads + self.key_value_heads)
        return self.layers * (attention + 3 * self.hidden * self.feed_forward)

    def flops(self, tokens: int, trained: int, squares: int) -> float:
        """Useful operations of a training step, forward and backward: the layers on every token, the vocabulary projection on
        trained tokens only, causal attention on `squares` (the sum of squared lengths, halved by causality)."""
        attention = 2 * 2 * squares / 2 * self.hidden * self.layers
        return 3 * (2 * self.layer_weights * tokens + attention + 2 * self.hidden * self.vocabulary * trained)


SHAPES = {
    "4k": Shape(4096, 384, 6, 6, 2, 1024),
    "32k": Shape(32768, 512, 8, 8, 4, 1536),
    "128k": Shape(131072, 256, 6, 4, 2, 1024),
    "wide": Shape(4096, 1024, 8, 16, 8, 2816),
}


def model_folder(name: str) -> Path:
    """A transformers folder of SHAPES[name], random weights; `<name>-taught` has learned to answer arithmetic, and to end."""
    folder = HOME / f"model-{name}"
    if not (folder / "made.json").is_file():
        if name.endswith("-taught"):
            _teach(name.removesuffix("-taught"), folder)
        else:
            _make(SHAPES[name], folder)
        (folder / "made.json").write_text(json.dumps({"name": name}))
    return folder


def _teach(name: str, folder: Path) -> None:
    from posttrain import train

    made = train(
        HOME, "teach", model=str(model_folder(name)), objective="sft", steps=60, batch={"rows": 16},
        data={"sources": PROBLEMS, "format": {"kind": "prompt_completion", "fields": {"completion": "solution"}}},
        optim={"learning_rate": 2e-3, "schedule": "constant"}, seed=SEED,
    )  # fmt: skip
    shutil.copytree(made, folder, dirs_exist_ok=True)


def _make(shape: Shape, folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from posttrain.models.create import train_tokenizer
    from posttrain.models.load import save

    rows = Data.model_validate(gsm8k()).read().rows[0]
    tokenizer = train_tokenizer(["\n".join(each.content for each in row.messages) for row in rows], TOKENS)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(SEED)
    save(LlamaForCausalLM(config), tokenizer, folder)


def sft_rows(name: str, updates: int) -> list[tuple[list[int], list[bool]]]:
    """(tokens, trained) of the rows in the order in which posttrain's stage draws them: for other trainers."""
    from transformers import AutoTokenizer

    from posttrain.data.render import Template

    data = Data.model_validate(gsm8k(updates))
    rendered = data.render(data.read(), Template(AutoTokenizer.from_pretrained(model_folder(name))))
    stream = Stream([len(each) for each in rendered.rows], None, SEED)
    drawn = [rendered.rows[source][row] for source, row in stream.take(updates * ROWS)]
    return [(list(tokens), list(train)) for row in drawn for tokens, train in row.sequences]

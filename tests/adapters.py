"""A tiny base with a tokenizer, and adapter folders on it, for what is done with them after training."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import transformer
from tiny_tokenizers import make as tokenizer
from tuned_models import move

from posttrain.models.load import save
from posttrain.models.source import ModelSource
from posttrain.tuners import Tuner
from posttrain.tuners.folder import save_adapter
from posttrain.tuners.load import load

WORDS = 403  # of the tokenizer
IDS = torch.tensor([[5, 9, 40, 3, 301, 71, 8, 2, 66, 402, 31, 400]])


def base(folder: Path, name: str = "llama", shape: str = "chatml", seed: int = 0, **changes: Any) -> Path:
    """The folder of a tiny model; it has a few more embeddings than its tokenizer has tokens, as many models do."""
    model = transformer(name, seed=seed, vocab_size=WORDS + 5, **changes)
    save(model, tokenizer(shape), folder)
    return folder


def adapter(on: Path | str, folder: Path, seed: int = 1, kind: str = "lora", quantize: Any = None, **settings: Any) -> Path:
    """The folder of an adapter that has moved."""
    source = ModelSource(path=str(on), quantize=quantize)
    loaded = load(source)
    tuner = Tuner.lookup(kind)(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuner.install(loaded.lm.model)
    move(loaded.lm, seed)
    save_adapter(tuner, loaded.lm.model, folder, source)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits[0].double()
    return found

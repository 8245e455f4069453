"""What was written is read back: it has the same logits, tokens, chat template and stop tokens, or it is not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from posttrain import draws
from posttrain.batch import Sequences
from posttrain.data.render import Template
from posttrain.errors import ModelError, RunError, TemplateError
from posttrain.models.load import Loaded, LoadedScalar
from posttrain.models.scalar import ScalarLM

LIMIT = 1e-4  # of the largest logit, or of 1: between what was to be written and what is read back
TEXT = "It's 12 + 345 = 357.\n\n  Zoë's café:\t\"naïve\" – 日本語 🙂 don't\r\nend "


@dataclass(frozen=True)
class Written:
    """What was written, and what was measured when it was read back."""

    path: str
    format: str
    dtype: str
    bytes: int
    difference: float
    """The largest between its logits (of a reward model: scores) and those of the model as it was loaded, not merged."""
    divergence: float
    """KL(loaded || written), in nats a token; 0 for scores."""
    chat_template: bool
    """Whether it has the model's chat template. There is nothing to keep where the model has none."""
    stop_ids: list[int]
    """The tokens that end an answer, all of them in what was written."""
    cut: float = 0.0
    """The share of a mixed update's square that the rank of its adapter cuts off."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """What a person wants to know."""
        return [
            f"{self.path}: {self.format}, {self.dtype}, {self.bytes:,} bytes",
            f"from the model as loaded: logits differ by at most {self.difference:.2g}, KL {self.divergence:.2g} nats a token",
            f"chat template {'kept' if self.chat_template else 'none'}, stop tokens {self.stop_ids} kept",
            *([f"the adapter's rank cuts off {self.cut:.2%} of the square of the update"] if self.cut > 5e-5 else []),
        ]


@contextmanager
def staged(out: Path, file: bool = False) -> Iterator[Path]:
    """A folder beside `out` to write in. When all went well it becomes `out`; with `file`, the file of that name in it does."""
    stage = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        stage.mkdir(parents=True)
        yield stage
        if out.is_dir():
            out.rmdir()
        (stage / out.name if file else stage).rename(out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def rows_for(lm: Any) -> list[list[int]]:
    """Token sequences that a model is asked about: drawn from its whole vocabulary, the same for every form of the model."""
    rows = lm.model.get_input_embeddings().weight.shape[0]
    lengths = [min(length, lm.context or length) for length in (64, 17, 5)]
    pad = lm.model.config.get_text_config().pad_token_id if isinstance(lm, ScalarLM) else None
    draw = draws.generator(0, "export")
    return [
        [token if token != pad else (token + 1) % rows for token in draw.integers(rows, size=length).tolist()]
        for length in lengths
    ]


def said(lm: Any) -> Float[Tensor, " *rows"]:
    """The logits after each token of the rows but the last, [N, V]; a reward model's scores of the rows, [B]."""
    seqs = Sequences.of([(row, [False] + [True] * (len(row) - 1)) for row in rows_for(lm)])
    with torch.no_grad():
        return (lm.scores(seqs) if isinstance(lm, ScalarLM) else lm.project(lm.hidden(seqs))).cpu()


def measured(want: Tensor, got: Tensor) -> tuple[float, float]:
    """(the largest difference, the mean KL(want || got) a token; 0 of scores)."""
    far = float((want - got).abs().max())
    if want.ndim == 1:
        return far, 0.0
    p, q = (each.double().log_softmax(-1) for each in (want, got))
    return far, float((p.exp() * (p - q)).sum(-1).mean())


def refuse_far(want: Tensor, got: Tensor, out: Path) -> None:
    far = float((want - got).abs().max())
    if not far <= LIMIT * max(1.0, float(want.abs().max())):
        raise wrong(out, f"its logits are up to {far:.3g} from those that it should give")


def refuse_other_stops(wanted: list[int], found: list[int], out: Path) -> None:
    if not set(wanted) <= set(found):
        raise wrong(out, f"of the tokens {wanted} that end an answer it has {found}")


def refuse_other_text(wanted: PreTrainedTokenizerBase, found: PreTrainedTokenizerBase, out: Path) -> None:
    """Raises RunError where two tokenizers make other tokens of a text or a conversation, or end it otherwise."""
    texts = [TEXT]
    if wanted.chat_template != found.chat_template:
        raise wrong(out, "it has another chat template")
    if wanted.chat_template is not None:
        try:
            texts.append(wanted.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False))
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template cannot render a question: {error}") from None
    for text in texts:
        if wanted(text).input_ids != found(text).input_ids:
            raise wrong(out, "its tokenizer makes other tokens of the same text")
    if wanted.eos_token_id != found.eos_token_id:
        raise wrong(out, f"a text ends with token {found.eos_token_id} and not with {wanted.eos_token_id}")


def wrong(out: Path, what: str) -> RunError:
    return RunError(f"{out}: was read back, and {what}; nothing is left there; please report it")


def report(
    out: Path, stage: Path, form: str, dtype: str, want: Tensor, got: Tensor, tokenizer: PreTrainedTokenizerBase, stops: list[int]
) -> Written:
    """What is said of what was written to `stage`, and will be at `out`."""
    size = stage.stat().st_size if stage.is_file() else sum(each.stat().st_size for each in stage.rglob("*") if each.is_file())
    return Written(str(out), form, dtype, size, *measured(want, got), tokenizer.chat_template is not None, stops)


def stop_ids(loaded: Loaded | LoadedScalar) -> list[int]:
    """The tokens at which others stop: those of the model's folder, and those at which posttrain's sampler stops."""
    tokenizer = loaded.tokenizer
    generation = getattr(loaded.lm.model, "generation_config", None)
    own = ids_of(None if generation is None else generation.eos_token_id) + ids_of(tokenizer.eos_token_id)
    if tokenizer.chat_template is not None:
        with suppress(TemplateError):  # a template that cannot be trained with has only what is declared
            own += Template(tokenizer).stop_ids
    return sorted(set(own))


def ids_of(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]

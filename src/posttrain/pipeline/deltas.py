"""The work of the stage `delta` around its training: a delta as it begins, and what is measured of one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.batch import Sequences
from posttrain.compress.delta import distances, remaining, sizes
from posttrain.data.dataset import Data
from posttrain.data.render import Template
from posttrain.models import delta
from posttrain.models.delta_file import IN_FOLDER, add_file
from posttrain.models.load import refuse_other_tokenizer
from posttrain.models.source import ModelSource
from posttrain.tuners import DeltaScale
from posttrain.tuners.delta_scale import NAME
from posttrain.tuners.folder import save_adapter
from posttrain.tuners.load import load, load_tokenizer

STORED = "stored"  # the delta as the stage leaves it, beside that which it began with


def stored(tuner: DeltaScale, base: ModelSource, folder: Path) -> None:
    """The delta as it begins, as an adapter folder."""
    assert tuner.of is not None
    loaded = load(base)
    refuse_other_tokenizer("model", tuner.of, loaded.tokenizer)
    tuner.install(loaded.lm.model)
    save_adapter(tuner, loaded.lm.model, folder, base)


def speaks_as(fine: ModelSource, base: ModelSource, beside: Path) -> ModelSource:
    """The base with the fine-tuned model's chat template, kept in a file `beside`; as it is where it names one itself."""
    template = load_tokenizer(fine).chat_template
    if base.chat_template is not None or not isinstance(template, str):
        return base
    beside.write_text(template, encoding="utf-8")
    return base.model_copy(update={"chat_template": str(beside.resolve())})


def keep_tokenizer(fine: ModelSource, base: ModelSource, folder: Path) -> None:
    """Writes the tokenizer that a delta is used with: the fine-tuned model's, whose tokens are the base's, and its template."""
    tokenizer = load_tokenizer(fine)
    if base.chat_template is not None:
        tokenizer.chat_template = load_tokenizer(base).chat_template
    tokenizer.save_pretrained(folder)


def measured(
    tuner: DeltaScale, base: ModelSource, folder: Path, data: Data | None, distilled: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """What a stage's record says of the delta in a folder: its sizes, what remains of the difference, and on `data` the distances
    of it, of the base, and of the delta as it began."""
    assert tuner.of is not None
    loaded, fine = load(base), load(tuner.of).lm
    model = loaded.lm.model
    tuner.install(model)
    delta.switch(model, None)
    add_file(model, folder, STORED, base)
    began, now = delta.held(model).deltas[NAME], delta.held(model).deltas[STORED]
    left = [share for share in remaining(model, fine.model, began).values() if share is not None]
    found: dict[str, Any] = {
        "metrics": {},
        "sizes": {**sizes(model, now).as_dict(), "file_bytes": (folder / IN_FOLDER).stat().st_size},
        "remaining": {"mean": sum(left) / len(left), "least": min(left), "most": max(left)} if left else None,
    }
    if data is not None:
        read = data.read()
        rendered = data.render(read, Template(loaded.tokenizer, read.needs_chat))
        rendered.refuse_beyond(loaded.lm.context)
        for line in rendered.summary():
            say(line)
        names = {None: "base", NAME: "start", STORED: ""} if distilled else {None: "base", STORED: ""}
        for name, each in distances(loaded.lm, fine, list(names), Sequences.of(rendered.sequences)).items():
            beside = f"_{names[name]}" if names[name] else ""
            found["metrics"] |= {f"fine_kl{beside}": each.kl.as_dict(), f"logit_gap{beside}": each.logit_gap.as_dict()}
        gap, began_with = (found["metrics"].get(f"logit_gap{which}", {}).get("value") for which in ("", "_start"))
        if began_with is not None and gap > began_with:
            say(
                f"the distillation has moved the logits away: {began_with:.3g} as the delta began, {gap:.3g} now; lower "
                "optim.learning_rate, or leave `data` out"
            )
    return found

"""The Python API: what the command line does, as functions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import yaml
from posttrain.errors import InputError
from posttrain.evaluation import Evaluation
from posttrain.models.source import ModelSource
from posttrain.pipeline.recipe import Recipe, built
from posttrain.pipeline.run import Listener, Result
from posttrain.pipeline.run import run as run_recipe
from posttrain.tasks import Task
from posttrain.tuners.merge import codes_of
from posttrain.tuners.mix import Method, Mix

if TYPE_CHECKING:
    from posttrain.compress.readback import Written
    from posttrain.evaluation import Report
    from posttrain.models.load import Loaded

__all__ = ["Recipe", "evaluate", "export", "load", "merge", "run", "train"]


def run(recipe: Recipe | str | Path, *overrides: str, root: str | Path = "runs", listener: Listener | None = None) -> Result:
    """Runs a recipe (an object, or the path of a file) with `key=value` overrides; results go to `root`/<name>.

    Raises InputError for a wrong recipe or data, before anything heavy is loaded; RunError for a run that fails.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe, overrides)
    elif overrides:
        raise ValueError("overrides go with a recipe file; change a Recipe object with model_copy(update=...)")
    return run_recipe(recipe, root, listener)


def train(root: str | Path = "runs", name: str = "train", **settings: Any) -> Path:
    """Trains with the settings of one stage, given as plain values (`model="...", objective="sft", data={...}, epochs=3`).

    Returns the folder of the trained model. Raises InputError for wrong settings or data, RunError for a run that fails.
    """
    value = {"name": name, "seed": settings.pop("seed", 0), "stages": {"train": settings}}
    recipe = built(Recipe, value, yaml.Document({}, "posttrain.train"), single=True)
    return run_recipe(recipe, root).model("train")


def load(model: str | Path) -> "Loaded":
    """A model (`.lm`) and its tokenizer (`.tokenizer`) from a folder, a hub name, or `posttrain:tiny-base`."""
    from posttrain.tuners.load import load as load_model

    return load_model(model)


def merge(
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    method: Method = "linear",
    density: float | None = None,
    base: str | Path | None = None,
    chat_template: str | Path | None = None,
    adapter: bool = False,
    rank: int | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    seed: int = 0,
) -> "Written":
    """Folds an adapter folder, and those below it, into the model that they stand on; several LoRAs of one model by `weights`.

    Writes a transformers folder to `out`; of several, with `adapter`, an adapter folder of `rank`. What was learned on quantised
    weights is folded into those that the codes stand for (`dequantize`), or into those of `base`. The result is read back and
    compared; what is returned says what was measured. Raises InputError for what cannot be merged, RunError where a check
    fails; then nothing is at `out`.
    """
    names = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    settings = {"base": base, "chat_template": chat_template}
    known = {key: str(value) for key, value in settings.items() if value is not None}
    sources = [ModelSource(path=str(name), **known) for name in names]
    if len(sources) > 1 or weights is not None:
        if weights is None:
            raise InputError("several adapters are merged by weight: give one for each, such as 0.5 and 0.5")
        mix = Mix(sources, weights, method, density, seed)

        from posttrain.compress.export import merge_several

        return merge_several(mix, out, adapter, rank, dtype, codes_of(sources[0], dequantize, adapter))
    if (method, density, adapter, rank) != ("linear", None, False, None):
        raise InputError("method, density, adapter and rank are of several adapters; one is folded in as it is: remove them")
    if sources[0].below() is None:
        there = sources[0].folder() is not None
        why = "is no adapter folder, so there is nothing to merge; `posttrain export` writes models"
        raise InputError(f"{names[0]}: {why if there else 'no such folder, and an adapter is merged from its folder'}")

    from posttrain.compress.export import merge as merge_one

    return merge_one(sources[0], out, dtype, codes_of(sources[0], dequantize))


def export(
    model: str | Path, out: str | Path, format: str = "folder", dtype: str | None = None, base: str | Path | None = None,
    tokenizer: bool = True, dequantize: bool = False,
) -> "Written":  # fmt: skip
    """Writes a model for others: `folder` for transformers, adapters merged; `peft`, an adapter alone; `bitdelta`, a delta as one
    file; `gguf`, for llama.cpp.

    dtype: float32, bfloat16 or float16, by default as the model is stored; of gguf also q8_0, q5_1, q5_0, q4_1, q4_0. Returns
    what was measured when it was read back. Raises as `merge`.
    """
    from posttrain.compress.export import export as write

    source = ModelSource(path=str(model), base=None if base is None else str(base))
    return write(source, out, format, dtype, tokenizer, codes_of(source, dequantize, format == "peft"))


class Asked(Evaluation):
    """What `evaluate` is asked for."""

    task: Task


def evaluate(model: "str | Path | Loaded", task: Any, seed: int = 0, **evaluation: Any) -> "Report":
    """Answers a task's problems (`task="arithmetic"` or a mapping as in a recipe); `.figures` have 95% intervals.

    Raises InputError for wrong settings.
    """
    asked = built(Asked, {"task": task, **evaluation}, yaml.Document({}, "posttrain.evaluate"))

    from posttrain.data.render import Template
    from posttrain.evaluation import evaluate as evaluate_policy

    loaded = load(model) if isinstance(model, str | Path) else model
    return evaluate_policy(loaded.lm, Template(loaded.tokenizer), asked.task, asked, seed)

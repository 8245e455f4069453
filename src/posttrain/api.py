"""The Python API: what the command line does, as functions."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import yaml
from posttrain.evaluation import Evaluation
from posttrain.pipeline.recipe import Recipe, built
from posttrain.pipeline.run import Listener, Result
from posttrain.pipeline.run import run as run_recipe
from posttrain.tasks import Task

if TYPE_CHECKING:
    from posttrain.evaluation import Report
    from posttrain.models.load import Loaded

__all__ = ["Recipe", "evaluate", "load", "run", "train"]


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

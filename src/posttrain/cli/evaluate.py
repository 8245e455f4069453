"""posttrain eval"""

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name, or posttrain:tiny-base.")],
    task: Annotated[str, typer.Argument(help="The kind of task (see `posttrain kinds task`).")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the evaluate stage.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Answer a task's problems and print accuracies with 95% intervals.

    Example: posttrain eval posttrain:tiny-base arithmetic task.limit=100 evaluation.samples=4
    """
    from posttrain import yaml
    from posttrain.pipeline.recipe import Evaluate, Recipe, find_modules

    find_modules(Path.cwd())
    document = yaml.Document({"stages": {"eval": {"kind": "evaluate", "model": model, "task": {"kind": task}}}}, "command line")
    recipe = Recipe.of(document, [f"stages.eval.{setting}" for setting in settings or []], "eval")
    recipe.check()
    stage = recipe.stages["eval"]
    assert isinstance(stage, Evaluate)

    from posttrain.data.render import Template
    from posttrain.evaluation import evaluate as evaluate_policy
    from posttrain.pipeline.libraries import heavy_imports

    with heavy_imports():
        from posttrain.models.roles import Frozen
        from posttrain.tuners.load import load

    loaded = load(stage.model)
    reference = None if stage.kl_to is None else Frozen(load(stage.kl_to).lm)
    report = evaluate_policy(
        loaded.lm, Template(loaded.tokenizer), stage.task, stage.evaluation, recipe.seed, stage.sampler, reference
    )
    if as_json:
        print(json.dumps({"metrics": report.as_dict(), "failures": report.failures}))
        return
    for name, figure in report.figures.items():
        print(f"{name:10} {figure.value:8.4f}  ({figure.low:.4f} to {figure.high:.4f}, {figure.count} problems)")
    if report.failures:
        print(f"{report.failures} answers could not be graded")

"""posttrain quantize, posttrain prune"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="A model folder, a hub name, or posttrain:tiny-base.")]
Out = Annotated[Path, typer.Argument(help="The folder that the smaller model is written to; must not exist.")]
Given = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the stage.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def quantize(model: Model, out: Out, settings: Given = None, as_json: Json = False) -> None:
    """Round a model's matrices to few bits, and print what that saves and costs.

    Example: posttrain quantize posttrain:tiny-base small bits=4 group=64 method=gptq
    data=posttrain:data/text_stories.jsonl.gz data.sources.rows=0:8 measure=posttrain:data/text_stories.jsonl.gz
    measure.sources.rows=100:110
    """
    _make("quantize", model, out, settings or [], as_json)


def prune(model: Model, out: Out, settings: Given = None, as_json: Json = False) -> None:
    """Leave out weights of a model's blocks, and print what that saves and costs.

    Example: posttrain prune posttrain:tiny-base small method=magnitude pattern=2:4 measure=posttrain:data/text_stories.jsonl.gz
    measure.sources.rows=100:110
    """
    _make("prune", model, out, settings or [], as_json)


def _make(kind: str, model: str, out: Path, settings: list[str], as_json: bool) -> None:
    from posttrain import yaml
    from posttrain.paths import free_place
    from posttrain.pipeline.recipe import Recipe
    from posttrain.pipeline.smaller import Smaller

    document = yaml.Document({"stages": {kind: {"kind": kind, "model": model}}}, "command line")
    recipe = Recipe.of(document, [f"stages.{kind}.{setting}" for setting in settings], kind)
    recipe.check()
    free_place(out)
    stage = recipe.stages[kind]
    assert isinstance(stage, Smaller)
    record = stage.make(out, lambda line: typer.echo(line, err=True))
    print(json.dumps(record) if as_json else "\n".join(lines(record)))


def lines(record: dict[str, Any]) -> list[str]:
    """The table of sizes and distances, for people."""
    sizes = record["bytes"]
    said = [f"{'':10} {'before':>12} {'after':>12}"]
    for name, before, after in (
        ("model", sizes["before"], sizes["after"]),
        ("matrices", sizes["matrices_before"], sizes["matrices_after"]),
    ):
        said.append(f"{name:10} {megabytes(before):>12} {megabytes(after):>12}  {after / before:.1%}")
    said.append(f"{'its file':10} {'':>12} {megabytes(sizes['file']):>12}")
    metrics = record["metrics"]
    if metrics:
        said.append(f"{'nats/token':10} {metrics['nll_before']['value']:12.4f} {metrics['nll']['value']:12.4f}")
    said += [f"bits a weight of the matrices: {record['bits']:.3f}"] if "bits" in record else []
    said += [f"weights left out: {record['sparsity']:.2%} of the matrices'"] if "sparsity" in record else []
    for name, words in (("kl", "KL(before || after), nats a token"), ("logit_gap", "mean squared change of the logits")):
        if name in metrics:
            value, low, high = (metrics[name][each] for each in ("value", "low", "high"))
            said.append(f"{words}: {value:.5f}" + ("" if low is None else f" ({low:.5f} to {high:.5f})"))
    return said if metrics else [*said, "no rows to measure on: give measure=..., to see what it costs"]


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"

"""posttrain delta"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator


def delta(
    fine: Annotated[str, typer.Argument(help="The fine-tuned model: a folder or a hub name.")],
    base: Annotated[str, typer.Argument(help="The model that it was fine-tuned from.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the delta stage, such as data=rows.jsonl.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("fine.bitdelta"),
    runs: Annotated[Path, typer.Option("--runs", help="Where the stage's folder goes: RUNS/fine.bitdelta.")] = Path("runs"),
) -> None:
    """Make one bit a weight of what a fine-tuned model has beyond its base; print sizes and, with data, distances.

    Example: posttrain delta runs/quickstart/sft-*/model posttrain:tiny-base data=rows.jsonl steps=200 --out sft.bitdelta
    """
    import re

    from posttrain import yaml
    from posttrain.cli.console import listener
    from posttrain.errors import InputError
    from posttrain.models.source import ModelSource
    from posttrain.paths import free_place
    from posttrain.pipeline.libraries import heavy_imports
    from posttrain.pipeline.recipe import Recipe
    from posttrain.pipeline.run import run

    document = yaml.Document({"stages": {"delta": {"kind": "delta", "model": fine, "base": base}}}, "command line")
    if out.suffix != ".bitdelta":
        raise InputError(f"{out}: a delta is one file: name it with .bitdelta")
    free_place(out)
    name = re.sub(r"[^\w.-]", "_", out.name)  # a run of its own, beside those of recipes
    recipe = Recipe.of(document, [f"stages.delta.{setting}" for setting in settings or []], name)
    result = run(recipe, runs, listener())
    folder = result.model("delta")
    with heavy_imports():
        from posttrain.models.delta_file import write_alone
        from posttrain.tuners.load import load_tokenizer
    write_alone(folder, load_tokenizer(ModelSource(path=str(folder))), out)
    print("\n".join(said_of(result.stages["delta"])))
    print(f"\nwrote {out}; the same as a model folder: {folder}")


def said_of(record: dict[str, Any]) -> "Iterator[str]":
    """What a stage's record says of its delta, for people."""
    sizes = record["sizes"]
    for name, part in (("matrices of the blocks", "matrices_"), ("whole model", "")):
        before, after, ratio = (sizes[f"{part}{each}"] for each in ("bytes", "delta_bytes", "ratio"))
        yield f"{name:24} {before:>16,} bytes in 16 bits, {after:>14,} as a delta: {ratio:.2f} times smaller"
    if record["remaining"] is None:
        yield "the matrices of the two models do not differ"
    else:
        yield f"{'left of the difference':24} {record['remaining']['mean']:.3f} of its square, on average over matrices"
    metrics = record["metrics"]
    for name, title in (("fine_kl", "KL(fine-tuned || it)"), ("logit_gap", "squared logit difference")):
        shown = {
            "base": metrics.get(f"{name}_base"), "delta as it begins": metrics.get(f"{name}_start"), "delta": metrics.get(name),
        }  # fmt: skip
        if shown["delta"] is not None:
            yield f"{title:24} " + ", ".join(f"{which} {each['value']:.3g}" for which, each in shown.items() if each is not None)

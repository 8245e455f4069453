"""posttrain run, posttrain train"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from posttrain.pipeline.recipe import Recipe

Recipe_ = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file (.yaml).")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")]
Root = Annotated[Path, typer.Option("--runs", help="Where results go: RUNS/<recipe name>.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Say what would run and why, and stop.")]


def run(recipe: Recipe_, overrides: Overrides = None, runs: Root = Path("runs"), dry_run: Dry = False) -> None:
    """Run a recipe: each stage once; finished stages are reused, interrupted ones go on.

    Example: posttrain run recipes/quickstart.yaml stages.grpo.optim.learning_rate=2e-4
    """
    from posttrain.pipeline.recipe import Recipe

    execute(Recipe.load(recipe, overrides or []), runs, dry_run)


def train(recipe: Recipe_, overrides: Overrides = None, runs: Root = Path("runs"), dry_run: Dry = False) -> None:
    """Run a recipe of one training stage.

    Example: posttrain train my_sft.yaml objective=sft epochs=2
    """
    from posttrain.errors import RecipeError
    from posttrain.pipeline.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or [])
    if [stage.kind for stage in loaded.stages.values()] != ["train"]:
        raise RecipeError(f"{recipe}: holds the stages {', '.join(loaded.stages)}; use `posttrain run` for a pipeline")
    execute(loaded, runs, dry_run)


def execute(recipe: "Recipe", runs: Path, dry_run: bool) -> None:
    from posttrain.cli.console import VERBS, listener
    from posttrain.pipeline import run as pipeline

    if dry_run:
        for each in pipeline.plan(recipe, runs):
            print(f"{each.name}: {VERBS[each.action]} ({each.why}) -> {each.folder}")
        return
    result = pipeline.run(recipe, runs, listener())
    finish(result.folder)


def finish(folder: Path) -> None:
    """The table of evaluations, and where the report and the models are."""
    from posttrain.pipeline.report import write_report
    from posttrain.pipeline.table import summary_table

    report = write_report(folder)
    rows = summary_table(folder)
    if rows:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in rows[0]:
            table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row.values())
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 160
        console.print()
        console.print(table)
    print(f"\nreport: {report}\nsummary: {folder / 'summary.json'}")

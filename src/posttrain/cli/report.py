"""posttrain report"""

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/quickstart.")]) -> None:
    """Write a run's report anew: one HTML file that needs no network.

    Example: posttrain report runs/quickstart
    """
    from posttrain.cli.run import finish
    from posttrain.errors import InputError

    if not (run / "recipe.json").is_file():
        raise InputError(f"{run}: is no finished run: there is no recipe.json in it; name a folder such as runs/quickstart")
    finish(run)

"""posttrain report"""

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/quickstart.")]) -> None:
    """Write a run's report anew: one HTML file that needs no network.

    Example: posttrain report runs/quickstart
    """
    from posttrain.cli.run import finish

    finish(run)

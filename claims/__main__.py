"""`python -m claims [--only t2 t19] [--quick]`: measures the claims, and writes the table of docs/claims.md from the results.

In full, results go to claims/results, which is what the table shows; with --quick to runs/claims, and the table stays.
`--table` only writes the table anew.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from claims.claim import RESULTS, Claim, run

NAMES = ("t1", "t2", "t3", "t4", "t5", "t6", "t7", "t9", "t10", "t11", "t16", "t17", "t18", "t19", "t21")
PAGE = Path(__file__).parents[1] / "docs" / "claims.md"
BEGIN, FINISH = "<!-- from claims/results by `python -m claims --table` -->", "<!-- end of the table -->"


def table(folder: Path = RESULTS) -> str:
    """One line a claim, from its JSON file."""
    lines = ["| | claim | paper | measured | criterion | held | seconds |", "|---|---|---|---|---|---|---|"]
    for name in NAMES:
        path = folder / f"{name}.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            figure = f"[{found['name']}](../claims/results/{name}.svg)"
            cells = [
                figure,
                found["claim"],
                found["paper"],
                found["measured"],
                found["criterion"],
                verdict(found),
                f"{found['seconds']:.0f}",
            ]
        else:
            claim: Claim = importlib.import_module(f"claims.{name}").CLAIM
            cells = [claim.name, claim.claim, claim.paper, "", claim.criterion, "not run", ""]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def verdict(found: dict[str, Any]) -> str:
    missed = [check for check, held in found["checks"].items() if not held]
    return f"**in part**; not: {'; '.join(missed)}" if missed else "yes"


def page(text: str, folder: Path = RESULTS) -> str:
    """The page with its table written anew."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(FINISH)
    return f"{head}{BEGIN}\n{table(folder)}\n{FINISH}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m claims", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--quick", action="store_true", help="fewer seeds and steps, for seconds; says nothing about the claims")
    parser.add_argument("--table", action="store_true", help="only write the table of docs/claims.md anew")
    asked = parser.parse_args()
    folder = Path("runs/claims") if asked.quick else RESULTS
    for name in [] if asked.table else asked.only:
        found = run(importlib.import_module(f"claims.{name}"), asked.quick, folder)
        print(f"{found['name']}: {verdict(found)}. {found['measured']} ({found['seconds']:.0f} s)", flush=True)
    if asked.quick:
        print(table(folder))
    else:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote the table of {PAGE.name}", file=sys.stderr)


if __name__ == "__main__":
    main()

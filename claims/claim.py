"""How a claim is run: measured, judged by criteria that stand in its module, drawn, and written down as one JSON file.

A claim's module has `CLAIM`, `SETTINGS` and `QUICK` (the same code with fewer seeds and steps), `measure(settings)` which gives
numbers and curves, `judge(numbers)` which gives {criterion: held}, `say(numbers)`, one sentence for the table, and
`draw(figure, found)`.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

RESULTS = Path(__file__).parent / "results"
PROCESSES = 2


@dataclass(frozen=True)
class Claim:
    """What a paper says, and by what it is measured here."""

    name: str
    claim: str
    paper: str
    criterion: str


Number = dict[str, Any]


def number(values: Iterable[float]) -> Number:
    """The mean over seeds, its standard error, and the values themselves: {"value", "se", "seeds": [...]}."""
    found = [float(each) for each in values]
    error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
    return {"value": statistics.fmean(found), "se": error, "seeds": found}


def exact(value: float) -> Number:
    """A number that nothing random went into."""
    return {"value": float(value), "se": 0.0}


def exceeds(one: Number, other: float = 0.0) -> bool:
    """Whether a mean is above `other` by more than two standard errors."""
    return one["value"] - 2 * one["se"] > other


def shown(one: Number, digits: int = 3) -> str:
    """0.512 ± 0.003"""
    return f"{one['value']:.{digits}f}" + (f" ± {one['se']:.{digits}f}" if one["se"] else "")


def spread(work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], processes: int = PROCESSES) -> list[Any]:
    """work(*each) for each of the arguments, in order; by processes of one thread."""
    if processes == 1 or len(arguments) == 1:
        return [work(*each) for each in arguments]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _one_thread) as pool:
        return list(pool.map(work, *zip(*arguments, strict=True)))


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def machine() -> str:
    """The machine in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return (
        f"{os.cpu_count()} cores of {name}, {platform.system()}, Python {platform.python_version()}, "
        f"torch {metadata.version('torch')}, transformers {metadata.version('transformers')}"
    )


def run(module: ModuleType, quick: bool = False, folder: Path = RESULTS) -> dict[str, Any]:
    """Measures a claim and writes <name>.json and <name>.svg. Returns what is in the JSON file."""
    claim: Claim = module.CLAIM
    settings = module.QUICK if quick else module.SETTINGS
    began = time.perf_counter()
    found = module.measure(settings)
    checks = module.judge(found["numbers"])
    result = {
        "name": claim.name,
        "claim": claim.claim,
        "paper": claim.paper,
        "criterion": claim.criterion,
        "measured": module.say(found["numbers"]),
        "held": all(checks.values()),
        "checks": checks,
        "quick": quick,
        "settings": settings,
        "numbers": found["numbers"],
        "curves": found["curves"],
        "seconds": round(time.perf_counter() - began, 1),
        "machine": machine(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{claim.name.lower()}.json"
    path.write_text(json.dumps(rounded(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    picture(module, result, path.with_suffix(".svg"))
    return result


def rounded(value: Any) -> Any:
    """Floats with 7 digits, everywhere."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {str(name): rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def picture(module: ModuleType, found: dict[str, Any], path: Path) -> None:
    """Draws the claim's figure; the ending of `path` decides the format."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "claims"}):
        figure = pyplot.figure(layout="constrained")
        module.draw(figure, found)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def main(module: ModuleType) -> None:
    """`python -m claims.t2 [--quick]`: one claim, in full into claims/results, quickly into runs/claims."""
    parser = argparse.ArgumentParser(description=module.__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer seeds and steps, for seconds; says nothing about the claim")
    quick = parser.parse_args().quick
    result = run(module, quick, Path("runs/claims") if quick else RESULTS)
    print("\n".join(f"{'held    ' if held else 'NOT HELD'} {name}" for name, held in result["checks"].items()))
    print(f"{result['name']}: {result['measured']} ({result['seconds']:.0f} s)")

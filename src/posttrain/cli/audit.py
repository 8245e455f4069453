"""posttrain audit"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from posttrain.evaluation.audit import Audit
    from posttrain.text import Problem


def audit(
    task: Annotated[str, typer.Argument(help="The kind of task (see `posttrain kinds task`).")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the task.")] = None,
    form: Annotated[list[str] | None, typer.Option(help="How a right answer is written, {} for the answer; several.")] = None,
    labelled: Annotated[
        Path | None, typer.Option(help='JSONL of answers known to be right or wrong: {"id", "completion", "right"}.')
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Try to be paid by a task's grader without an answer. Exit status 1 where a probe is paid, or nothing can be known.

    Example: posttrain audit gsm8k limit=50
    """
    from posttrain import yaml
    from posttrain.errors import InputError
    from posttrain.evaluation.audit import FORMS
    from posttrain.evaluation.audit import audit as audited
    from posttrain.pipeline.recipe import Evaluate, Recipe, find_modules

    stage = {"kind": "evaluate", "model": "posttrain:tiny-base", "task": {"kind": task, "limit": 50}}
    find_modules(Path.cwd())
    document = yaml.Document({"stages": {"audit": stage}}, "command line")
    recipe = Recipe.of(document, [f"stages.audit.task.{each}" for each in settings or []], "audit")
    asked = recipe.stages["audit"]
    assert isinstance(asked, Evaluate)
    if asked.task.environment is not None or asked.task.grader.of_episodes:
        raise InputError(f"task {task}: it is graded by episodes, and an audit grades texts; look at its samples in a report")
    asked.task.check()
    for each in form or ():
        if "{}" not in each:
            raise InputError(f"--form {each!r}: has no place for the answer; put {{}} into it")
    problems = asked.task.problems()
    answers = [] if labelled is None else answers_of(labelled, {problem.id: problem for problem in problems})
    found = audited(problems, asked.task.grader, tuple(form or FORMS), answers)
    print(json.dumps(without_nan(asdict(found))) if as_json else "\n".join(lines(found)))
    unread = found.form is None and any(problem.answer for problem in problems)
    if found.holes or unread or (found.false_positives is not None and found.false_positives.value > 0):
        raise typer.Exit(1)


def without_nan(value: Any) -> Any:
    """With null for what is not a number, which JSON has not."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def answers_of(file: Path, problems: "dict[str, Problem]") -> "list[tuple[Problem, str, bool]]":
    """Raises DataError for a line that is none, or whose problem there is not."""
    from posttrain.data.source import Source
    from posttrain.errors import DataError

    found = []
    for raw in Source.model_validate(str(file)).read():
        value = raw.value
        if not isinstance(value.get("completion"), str) or not isinstance(value.get("right"), bool):
            raise DataError(f'{raw.where}: a labelled answer has "id", "completion" (text) and "right" (true, false); correct it')
        if str(value.get("id")) not in problems:
            raise DataError(f"{raw.where}: no problem {value.get('id')!r} among the {len(problems)} of the task; raise limit")
        found.append((problems[str(value["id"])], value["completion"], value["right"]))
    return found


def lines(found: "Audit") -> list[str]:
    """The table for people."""
    known = f"right answers are taken in the form {found.form!r}" if found.form else "no form of the answer is taken; give --form"
    said = [f"{found.problems} problems; {known}", f"{'probe':28} {'paid':>8} {'failures':>9} {'slowest':>9}"]
    for each in found.findings:
        why = "nothing could be graded" if math.isnan(each.paid.value) else "hole" if each.paid.value > 0 else "slow"
        mark = "" if each.holds else f"  <- {why}"
        share = "–" if math.isnan(each.paid.value) else f"{each.paid.value:.1%}"
        said.append(f"{each.probe:28} {share:>8} {each.failures:9} {each.slowest:8.3f}s{mark}")
    said += [f"  {each.probe}: {each.example}" for each in found.holes if each.example]
    for name, rate in (("wrong answers paid", found.false_positives), ("right answers not paid", found.false_negatives)):
        if rate is not None and rate.count:
            said.append(f"{name}: {rate.value:.1%} ({rate.low:.1%} to {rate.high:.1%}, {rate.count} labelled)")
    return said

"""Evaluation: what a policy does on a task, with intervals, and samples for people to read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt, PositiveInt, model_validator

from posttrain.component import Settings
from posttrain.errors import RunError
from posttrain.evaluation.intervals import Figure, average, pass_at, share
from posttrain.sampling import Sampler, Sampling, sample
from posttrain.tasks import Grader
from posttrain.text import Grade, Sample

if TYPE_CHECKING:
    from posttrain.data.render import Template
    from posttrain.models.lm import LM
    from posttrain.models.roles import Frozen
    from posttrain.models.source import ModelSource
    from posttrain.tasks import Task

RIGHT = 1.0 - 1e-9  # a score from which an answer counts as right


class BestOf(Settings):
    """Best-of-n sampling: of the n samples of a problem only the one that a grader likes best is evaluated.

    Its divergence from the policy that sampled is at most log n - (n - 1) / n nats an answer (arXiv 2401.01879), which is given
    as `kl`.
    """

    ranker: Grader
    """What chooses: a reward model, mostly."""


class Evaluation(Settings):
    """How a policy is evaluated."""

    samples: NonNegativeInt = 8
    """Samples of each problem, for pass@1 (their mean) and pass@k. 0: greedy only."""
    greedy: bool = True
    """Also the likeliest answer to each problem."""
    sampling: Sampling = Sampling()
    """How samples are drawn. With a temperature other than 1, or a truncation, no KL is given."""
    limit: PositiveInt | None = None
    """Only the first so many problems."""
    best_of: BestOf | None = None
    """Of each problem's samples, evaluate only the best."""

    def check(self, policy: "ModelSource") -> None:
        """What can be known to be wrong before any weight is loaded; raises an InputError."""
        if self.best_of is not None:
            self.best_of.ranker.check()
            self.best_of.ranker.check_policy(policy)

    @model_validator(mode="after")
    def _best_of_samples(self) -> "Evaluation":
        if self.best_of is not None and (self.samples < 2 or self.greedy):
            raise ValueError("best_of chooses among samples: set samples to how many, at least 2, and greedy: false")
        return self

    @model_validator(mode="after")
    def _asks_for_something(self) -> "Evaluation":
        if not self.samples and not self.greedy:
            raise ValueError("nothing is evaluated: set samples, greedy or both")
        return self


@dataclass(frozen=True)
class Report:
    """Figures by name, and answers to read."""

    figures: dict[str, Figure]
    answers: tuple[dict[str, Any], ...]
    failures: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON: a bound that is not known (one problem alone) is null."""
        return {name: figure.as_dict() for name, figure in self.figures.items()}


def evaluate(
    policy: "LM",
    template: "Template",
    task: "Task",
    plan: Evaluation,
    seed: int = 0,
    sampler: Sampler | None = None,
    reference: "Frozen | None" = None,
    address: tuple[int | str, ...] = ("evaluate",),
) -> Report:
    """Figures: pass@1 and score over samples, pass@k, greedy, length (tokens), ended (share that ended by itself), and
    kl (nats an answer, to `reference`, estimated from the samples). Raises RunError where nothing could be graded."""
    from posttrain.sampling import InProcess

    sampler = sampler or InProcess()
    problems = task.problems()[: plan.limit]
    task.grader.prepare(template)
    world = task.environment
    figures: dict[str, Figure] = {}
    graded: list[tuple[Sample, Grade]] = []
    greedy: list[tuple[Sample, Grade]] = []
    if plan.samples:
        drawn = sample(sampler, policy, template, problems, plan.samples, plan.sampling, seed, address, environment=world)
        if plan.best_of is not None:
            plan.best_of.ranker.prepare(template)
            drawn = best(drawn, plan.best_of.ranker.grades(drawn))
        graded = list(zip(drawn, task.grader.grades(drawn), strict=True))
        figures |= sampled_figures(graded, 1 if plan.best_of else plan.samples, task.grader.open_scale)
        if plan.best_of is not None:
            bound = math.log(plan.samples) - (plan.samples - 1) / plan.samples
            figures["kl"] = Figure(bound, bound, bound, len(problems))
        elif reference is not None and plan.sampling.temperature == 1.0 and not plan.sampling.truncates:
            figures["kl"] = divergence(drawn, reference)
    if plan.greedy:
        likeliest = plan.sampling.model_copy(update={"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0})
        drawn = sample(sampler, policy, template, problems, 1, likeliest, seed, (*address, "greedy"), environment=world)
        greedy = list(zip(drawn, task.grader.grades(drawn), strict=True))
        found = [grade.score for _, grade in greedy if grade.score is not None]
        right = [float(score >= RIGHT) for score in found]
        figures["greedy"] = average(found) if task.grader.open_scale else share(right)
    figures |= episode_figures([one for one, _ in graded or greedy])
    failures = [grade.failure for _, grade in (*graded, *greedy) if grade.score is None]
    if failures and len(failures) == len(graded) + len(greedy):
        raise RunError(f"no answer could be graded: {failures[0]}")
    return Report(figures, tuple(answer(*each) for each in greedy or graded), len(failures))


def best(drawn: Sequence[Sample], grades: Sequence[Grade]) -> list[Sample]:
    """The sample of each problem that was graded highest, the first of equals; RunError where none of a problem has a grade."""
    found = []
    for name, group in groupby(zip(drawn, grades, strict=True), key=lambda pair: pair[0].problem.id):
        scored = [(grade.score, -place, one) for place, (one, grade) in enumerate(group) if grade.score is not None]
        if not scored:
            raise RunError(f"no sample of problem {name} could be graded, so there is no best one")
        found.append(max(scored, key=lambda each: each[:2])[2])
    return found


def sampled_figures(graded: Sequence[tuple[Sample, Grade]], per_problem: int, open_scale: bool = False) -> dict[str, Figure]:
    """Problem by problem, so that the intervals know that samples of one problem hang together. Failures are left out."""
    right, scores, best, lengths, ended = [], [], [], [], []
    for _, group in groupby(graded, key=lambda pair: pair[0].problem.id):
        members = list(group)
        lengths.append(sum(len(one.logp) for one, _ in members) / len(members))
        ended.append(sum(one.stop == "end" for one, _ in members) / len(members))
        found = [grade.score for _, grade in members if grade.score is not None]
        if not found:
            continue
        hits = sum(score >= RIGHT for score in found)
        right.append(hits / len(found))
        scores.append(sum(found) / len(found))
        if len(found) == per_problem:
            best.append(pass_at(per_problem, hits, len(found)))
    figures = {"score": average(scores), "length": average(lengths), "ended": share(ended)}
    if open_scale:
        return figures
    figures = {"pass@1": share(right), **figures}
    if per_problem > 1:
        figures[f"pass@{per_problem}"] = share(best)
    return figures


def episode_figures(drawn: Sequence[Sample]) -> dict[str, Figure]:
    """Turns an episode, and what its environment counts (`tool_calls`); problem by problem. Nothing where there are none."""
    names = sorted({name for one in drawn if one.transcript for name in one.transcript.counts})
    found: dict[str, list[float]] = {"turns": [], **{name: [] for name in names}}
    for _, group in groupby(drawn, key=lambda one: one.problem.id):
        played = [one.transcript for one in group if one.transcript is not None]
        if played:
            found["turns"].append(sum(len(each.ends) for each in played) / len(played))
            for name in names:
                found[name].append(sum(each.counts.get(name, 0.0) for each in played) / len(played))
    return {name: average(values) for name, values in found.items() if values}


def divergence(drawn: Sequence[Sample], reference: "Frozen") -> Figure:
    """KL(policy || reference) in nats an answer: the mean over samples of log p - log p_reference, summed over their tokens."""
    from posttrain import losses
    from posttrain.batch import Sequences

    drawn = [one for one in drawn if one.logp]
    seqs = Sequences.of([(one.tokens, one.sampled) for one in drawn])
    other = losses.sequence_sums(reference.logprobs(seqs).cpu().double(), seqs.owner, seqs.count).tolist()
    gaps = [sum(one.logp) - value for one, value in zip(drawn, other, strict=True)]
    by_problem: dict[str, list[float]] = {}
    for one, gap in zip(drawn, gaps, strict=True):
        by_problem.setdefault(one.problem.id, []).append(gap)
    return average([sum(each) / len(each) for each in by_problem.values()])


def answer(one: Sample, grade: Grade) -> dict[str, Any]:
    """An answer as people read it."""
    asked = "\n".join(message.content for message in one.problem.prompt)
    return {
        "id": one.problem.id,
        "prompt": asked,
        "answer": one.problem.answer,
        "text": one.shown,
        "score": grade.score,
        "stop": one.stop,
    }

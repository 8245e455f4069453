"""Samplers: where tokens come from."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from posttrain.component import Component
from posttrain.errors import DataError
from posttrain.sampling.settings import Sampling

if TYPE_CHECKING:
    from posttrain.data.render import Template
    from posttrain.environments import Environment
    from posttrain.models.lm import LM
    from posttrain.sampling.engine import Engine
    from posttrain.text import Problem, Sample


class Sampler(Component):
    """Where tokens come from."""

    default_kind = "in_process"

    def open(self, policy: "LM", sampling: Sampling, stop_ids: "Sequence[int]", seed: int) -> "Engine":
        """An engine that samples from the policy as it is at each step."""
        raise NotImplementedError


class InProcess(Sampler, kind="in_process"):
    """Samples in the training process, from the very weights that are trained: no copy, no mismatch."""

    rows: PositiveInt = 256
    """The most samples that are decoded at once."""

    def open(self, policy: "LM", sampling: Sampling, stop_ids: "Sequence[int]", seed: int) -> "Engine":
        from posttrain.sampling.engine import Engine

        return Engine(policy, sampling, tuple(stop_ids), seed, self.rows)


class ProcessSampler(InProcess, kind="process"):
    """Samples for training in a process of its own, while the trainer learns: from weights that are `behind` rollouts old.

    Which weights a rollout is drawn with is known beforehand and does not depend on who was faster. Each sample has the
    log-probabilities that it was drawn with, so that ratios are right; `correction` of the objective weighs what has drifted.
    A process that is killed is started anew, and no rollout is lost. Evaluations are sampled in the trainer.
    """

    behind: PositiveInt = 1
    """How many rollouts are drawn ahead; the staleness of what is learned from."""
    threads: PositiveInt | None = None
    """Threads of the process; the trainer has the rest. null: half of them."""


def sample(
    sampler: Sampler,
    policy: "LM",
    template: "Template",
    problems: "Sequence[Problem]",
    per_problem: int,
    sampling: Sampling,
    seed: int,
    address: tuple[int | str, ...] = (),
    version: int = 0,
    progress: Callable[[], None] = lambda: None,
    environment: "Environment | None" = None,
) -> "list[Sample]":
    """per_problem samples of each problem, problem by problem. `address` tells these draws from others under the same seed.

    environment: what answers the policy; a sample is then an episode.
    """
    from posttrain.sampling.engine import Request
    from posttrain.text import Sample

    places = [(problem, index, (*address, problem.id, index)) for problem in problems for index in range(per_problem)]
    if environment is not None:
        from posttrain.sampling.episodes import Episodes, Play

        environment.prepare(template)
        engine = sampler.open(policy, sampling, sorted(template.stop_ids), seed)
        plays = [Play(*place) for place in places]
        played = Episodes(environment, template, engine, policy.context, seed).play(plays, progress)
        return [play.sample(version) for play in played]
    prompts = [tuple(template.prompt(problem.prompt)) for problem in problems]
    for problem, prompt in zip(problems, prompts, strict=True):
        if policy.context is not None and len(prompt) + sampling.max_tokens > policy.context:
            raise DataError(
                f"{problem.where or problem.id}: the prompt has {len(prompt)} tokens, and with sampling.max_tokens "
                f"{sampling.max_tokens} exceeds the model's context of {policy.context}; lower max_tokens, or leave this one out"
            )
    engine = sampler.open(policy, sampling, sorted(template.stop_ids), seed)
    wanted = {place: (problem, index) for problem, index, place in places}
    for place, prompt in zip(wanted, (prompt for prompt in prompts for _ in range(per_problem)), strict=True):
        engine.add(Request(prompt, place))
    found: dict[tuple[int | str, ...], Sample] = {}
    while (done := engine.next()) is not None:
        problem, index = wanted[done.request.address]
        written = done.tokens[:-1] if done.stop == "end" else done.tokens
        found[done.request.address] = Sample(
            problem=problem,
            index=index,
            tokens=(*done.request.tokens, *done.tokens),
            sampled=(False,) * len(done.request.tokens) + (True,) * len(done.tokens),
            logp=tuple(done.logp),
            stop=done.stop,
            text=template.tokenizer.decode(written, skip_special_tokens=True),
            version=version,
        )
        progress()
    return [found[place] for place in wanted]

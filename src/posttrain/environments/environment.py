"""Environments: what answers a policy, turn by turn. The policy writes, the world answers, until one of them has had enough."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from posttrain.component import Component
from posttrain.text import Message, Problem

if TYPE_CHECKING:
    from posttrain.data.render import Template


@dataclass(frozen=True, slots=True)
class Opening:
    """What a policy is told before its first turn: the last message is not its own. tools: schemas, for the chat template."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn of the policy led to: what it is told, what it has earned by it, and whether the episode is over.

    counts: what is worth counting, such as calls of tools; they are added up over an episode and logged.
    """

    messages: tuple[Message, ...] = ()
    reward: float = 0.0
    done: bool = False
    counts: Mapping[str, float] = field(default_factory=dict)


class Episode:
    """An episode under way. Only one thread at a time has to do with it."""

    opening: Opening

    def step(self, message: Message) -> Turn:
        """The answer to a turn of the policy. What it raises breaks the episode off: it is a failure, and never a score."""
        raise NotImplementedError

    def finish(self) -> float:
        """What the whole of it has earned beside its turns. Called once, also where it was cut off."""
        return 0.0

    def close(self) -> None:
        """Lets go of what it holds. Called once, also after a failure."""


ROLES = ("system", "developer", "user", "assistant", "tool")


def checked_episode(episode: Any, by: str) -> Episode:
    """What an environment has begun. Raises TypeError, naming `by`, where it is no episode with an opening."""
    if not isinstance(episode, Episode):
        raise TypeError(f"{by} gave {episode!r:.100}, not an Episode")
    opening = getattr(episode, "opening", None)
    if not isinstance(opening, Opening) or not opening.messages:
        raise TypeError(f"{by}: the episode's `opening` is {opening!r:.100}, not an Opening with messages")
    _check_messages(opening.messages, by)
    return episode


def checked_turn(turn: Any, by: str) -> Turn:
    """What an episode has answered. Raises TypeError, naming `by`, where it is no Turn of messages and a number."""
    if not isinstance(turn, Turn):
        raise TypeError(f"{by} gave {turn!r:.100}, not a Turn")
    if not _is_number(turn.reward):
        raise TypeError(f"{by}: the reward is {turn.reward!r:.100}, not a finite number")
    _check_messages(turn.messages, by)
    return turn


def _check_messages(messages: Any, by: str) -> None:
    if not isinstance(messages, tuple | list):
        raise TypeError(f"{by}: `messages` is {messages!r:.100}, not a tuple of Message(role, content)")
    for each in messages:
        if not isinstance(each, Message) or each.role not in ROLES or not isinstance(each.content, str):
            raise TypeError(f"{by}: {each!r:.100} is no Message of a role ({', '.join(ROLES)}) and a text")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class Environment(Component):
    """What answers a policy, turn by turn.

    A kind has `reset`, which begins an episode, and an `Episode` with `step`.
    """

    turns: PositiveInt = 8
    """The most turns of the policy; an episode that goes on is cut."""
    seconds: PositiveFloat = 30.0
    """The longest that one answer of the environment may take; then the episode has failed, and is no score."""
    workers: NonNegativeInt = 16
    """How many episodes are answered at a time, beside the sampler. 0: in turn, between its steps; then a run repeats bit for
    bit, and nothing ends an answer that takes too long."""

    @property
    def pays(self) -> bool:
        """Whether an episode can earn anything by itself, for the grader `returns`."""
        return True

    def check(self) -> None:
        """What can be known to be wrong before any weight is loaded; raises an InputError."""

    def prepare(self, template: "Template") -> None:
        """Called once before the first episode, with the tokenizer of the policy."""

    def reset(self, problem: Problem, seed: int) -> Episode:
        """A new episode. A problem has the same seed whenever it is played, so that all of a group play the same."""
        raise NotImplementedError

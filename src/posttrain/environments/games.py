"""Two small games in text: guessing a number, and finding a key and then a door."""

import re
from collections.abc import Iterator
from typing import Any

from pydantic import Field, PositiveInt

from posttrain.environments.environment import Environment, Episode, Opening, Turn
from posttrain.text import Message, Problem


class GuessNumber(Environment, kind="guess_number"):
    """The policy guesses a whole number and is told `higher` or `lower`; the right one earns 1.

    The number is the problem's answer; a guess is the first number of a turn.
    """

    workers: int = Field(default=0, ge=0)
    """How many episodes are answered at a time, beside the sampler. 0: in turn, and a run repeats bit for bit."""

    def reset(self, problem: Problem, seed: int) -> Episode:
        return _Guessing(problem)


class _Guessing(Episode):
    def __init__(self, problem: Problem) -> None:
        self.number = int(problem.answer or "")
        self.opening = Opening(problem.prompt)

    def step(self, message: Message) -> Turn:
        found = re.search(r"-?[0-9]{1,18}", message.content)
        if found is None:
            return Turn((Message("user", "Say a number."),), counts={"invalid": 1.0})
        guess = int(found[0])
        if guess == self.number:
            return Turn(reward=1.0, done=True)
        return Turn((Message("user", "higher" if guess < self.number else "lower"),))


def numbers_to_guess(count: int = 200, highest: int = 20, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Problems for guess_number."""
    from posttrain import draws

    for number in range(count):
        secret = int(draws.generator(seed, "guess", number).integers(1, highest + 1))
        yield {"id": f"guess-{number}", "prompt": f"Guess a number from 1 to {highest}.", "answer": str(secret)}


COMMANDS = ("left", "right", "take", "open")


class Rooms(Environment, kind="rooms"):
    """A row of rooms with a key in one and a door in another. Taking the key earns a part of 1, opening the door the rest.

    The problem has the columns `rooms`, `start`, `key` and `door`, rooms counted from 1. The last command of a turn counts.
    """

    workers: int = Field(default=0, ge=0)
    """How many episodes are answered at a time, beside the sampler. 0: in turn, and a run repeats bit for bit."""
    turns: PositiveInt = 12
    """The most turns of the policy; an episode that goes on is cut."""
    key_reward: float = Field(default=0.25, ge=0, le=1)
    """What taking the key earns; opening the door earns the rest of 1."""

    def reset(self, problem: Problem, seed: int) -> Episode:
        return _Walk(problem, self.key_reward)


class _Walk(Episode):
    def __init__(self, problem: Problem, key_reward: float) -> None:
        facts = problem.facts
        self.rooms, self.here, self.key, self.door = (int(facts[name]) for name in ("rooms", "start", "key", "door"))
        self.has_key, self.key_reward = False, key_reward
        *before, last = problem.prompt
        self.opening = Opening((*before, Message(last.role, f"{last.content}\n{self._seen()}")))

    def step(self, message: Message) -> Turn:
        said = [word for word in re.findall(r"[a-z]+", message.content.lower()) if word in COMMANDS]
        if not said:
            return Turn((Message("user", f"Say {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}."),), counts={"invalid": 1.0})
        reward = 0.0
        match said[-1]:
            case "left" | "right" as way:
                self.here = min(max(self.here + (1 if way == "right" else -1), 1), self.rooms)
            case "take" if self.here == self.key and not self.has_key:
                self.has_key, reward = True, self.key_reward
            case "open" if self.here == self.door and self.has_key:
                return Turn(reward=1 - self.key_reward, done=True)
        return Turn((Message("user", self._seen()),), reward)

    def _seen(self) -> str:
        things = ["a key"] * (self.here == self.key and not self.has_key) + ["a door"] * (self.here == self.door)
        seen = f" You see {' and '.join(things)}." if things else ""
        return f"Room {self.here} of {self.rooms}.{seen}{' You have the key.' if self.has_key else ''}"


def rooms_to_walk(count: int = 200, rooms: int = 5, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Problems for rooms: the start, the key and the door are in three of them."""
    from posttrain import draws

    prompt = f"Find the key, then open the door. Say {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}."
    for number in range(count):
        start, key, door = (int(each) for each in draws.generator(seed, "rooms", number).permutation(rooms)[:3] + 1)
        yield {"id": f"rooms-{number}", "prompt": prompt, "rooms": rooms, "start": start, "key": key, "door": door}

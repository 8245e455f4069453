"""Episodes: the policy and an environment take turns. All that are under way share the sampler's batch.

The tokens of every turn are kept as they were drawn; what the environment says is put between them, marked as not sampled.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from posttrain import draws
from posttrain.environments import Environment, Episode, Turn
from posttrain.environments.environment import checked_episode, checked_turn
from posttrain.errors import DataError, InputError, RecipeError, told
from posttrain.sampling.engine import Completion, Engine, Request
from posttrain.text import Message, Problem, Sample, Transcript

if TYPE_CHECKING:
    from posttrain.data.render import Template

Answer = Episode | Turn
POLL = 0.05  # seconds


@dataclass(slots=True)
class Play:
    """An episode under way, from the policy's side."""

    problem: Problem
    index: int
    place: tuple[int | str, ...]
    episode: Episode | None = None
    messages: list[Message] = field(default_factory=list)
    told: int = 0  # messages of the prompt
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    text: str = ""
    stop: Literal["end", "length", "turns"] = "end"
    failure: str | None = None
    over: bool = False

    def add(self, tokens: Sequence[int], sampled: bool) -> None:
        self.tokens += tokens
        self.sampled += [sampled] * len(tokens)

    def sample(self, version: int) -> Sample:
        transcript = Transcript(
            tuple(self.messages[self.told :]), tuple(self.ends), tuple(self.rewards), dict(self.counts), self.failure
        )
        return Sample(
            self.problem, self.index, tuple(self.tokens), tuple(self.sampled), tuple(self.logp), self.stop, self.text, version,
            transcript=transcript,
        )  # fmt: skip


class Episodes:
    """Plays episodes to their ends."""

    def __init__(self, environment: Environment, template: "Template", engine: Engine, context: int | None, seed: int) -> None:
        self.environment, self.template, self.engine, self.context, self.seed = environment, template, engine, context, seed
        self.answers = Answers(environment.workers, environment.seconds)
        self.running: dict[tuple[int | str, ...], Play] = {}
        self.finished: list[Play] = []

    def play(self, plays: Sequence[Play], progress: Callable[[], None]) -> list[Play]:
        """All of them, in the order in which they were given."""
        try:
            for play in plays:
                self.running[play.place] = play
                self.answers.ask(play.place, self._beginning(play))
            while self.running:
                for place, answer in self.answers.ready(wait=not self.engine.busy):
                    self._answered(self.running[place], answer)
                for done in self.engine.advance():
                    self._said(self.running[done.request.address], done)
                for _ in self.finished:
                    progress()
                self.finished.clear()
        finally:
            self.answers.close()
            for play in self.running.values():  # something has gone wrong
                if play.episode is not None:
                    closed(play.episode)
        return list(plays)

    def _beginning(self, play: Play) -> Callable[[], Episode]:
        seed = draws.key(self.seed, "environment", play.problem.id)
        return lambda: checked_episode(self.environment.reset(play.problem, seed), f"{type(self.environment).__name__}.reset")

    def _answered(self, play: Play, answer: Answer | Exception) -> None:
        """The environment has answered."""
        if isinstance(answer, InputError):
            raise answer
        if isinstance(answer, Exception):
            said = str(answer) if isinstance(answer, TooLong) else told(answer)
            play.failure = f"the environment: {said}"
            if play.over or isinstance(answer, TooLong):  # who has not answered can be asked nothing more
                self._done(play)
            else:
                self._end(play, "end")
        elif play.over:
            assert isinstance(answer, Turn)
            if play.rewards:
                play.rewards[-1] += answer.reward
            self._done(play)
        elif isinstance(answer, Episode):
            self._begun(play, answer)
        else:
            self._led_to(play, answer)

    def _begun(self, play: Play, episode: Episode) -> None:
        opening = episode.opening
        messages = [each if each in play.problem.prompt else self._plain(each) for each in opening.messages]
        play.episode, play.messages, play.told = episode, messages, len(messages)
        if opening.tools and self.template.ignores(opening.tools):
            raise RecipeError(
                "environment.describe: the chat template leaves the tools out, so the policy would not know of them; set "
                "describe: system, or none where the problem says what may be called"
            )
        play.add(self.template.prompt(play.messages, opening.tools), False)
        if self._room(play) <= 0:
            raise DataError(
                f"{play.problem.where or play.problem.id}: the prompt has {len(play.tokens)} tokens, and the model's context is "
                f"{self.context}; leave this one out"
            )
        self._ask_policy(play)

    def _led_to(self, play: Play, turn: Turn) -> None:
        play.rewards[-1] += turn.reward
        for name, count in turn.counts.items():
            play.counts[name] = play.counts.get(name, 0.0) + count
        if turn.done:
            play.messages += turn.messages
            self._end(play, "end")
        elif len(play.ends) >= self.environment.turns:
            self._end(play, "turns")
        else:
            assert play.episode is not None
            told = [self._plain(message) for message in turn.messages]
            ended = play.tokens[-1] == self.template.end_id
            following = self.template.following(play.messages, told, play.episode.opening.tools, ended)
            play.messages += told
            if self._room(play) <= len(following):
                self._end(play, "length")
            else:
                play.add(following, False)
                self._ask_policy(play)

    def _plain(self, message: Message) -> Message:
        """What an environment says, as text and nothing else: what spells a control token is broken up."""
        text = message.content.encode("utf-8", "replace").decode()
        while (found := self.template.control_in(text)) is not None:
            text = text.replace(found, f"{found[0]} {found[1:]}" if len(found) > 1 else "")
        return message if text == message.content else replace(message, content=text)

    def _room(self, play: Play) -> int:
        """How many more tokens there may be: of the policy's, and of all."""
        left = self.engine.sampling.max_tokens - len(play.logp)
        return 0 if left <= 0 else 2**31 if self.context is None else self.context - len(play.tokens)

    def _ask_policy(self, play: Play) -> None:
        most = None if self.context is None else self.context - len(play.tokens)
        self.engine.add(Request(tuple(play.tokens), play.place, len(play.logp), most))

    def _said(self, play: Play, done: Completion) -> None:
        """The policy has said something."""
        play.add(done.tokens, True)
        play.logp += done.logp
        play.ends.append(len(play.logp))
        play.rewards.append(0.0)
        written = done.tokens[:-1] if done.stop == "end" else done.tokens
        play.text = str(self.template.tokenizer.decode(written, skip_special_tokens=True))
        message = Message("assistant", self.template.decode(written))  # with control tokens, which may mark a call
        play.messages.append(message)
        episode = play.episode
        assert episode is not None
        if done.stop == "length":
            self._end(play, "length")
        else:
            asked = f"{type(episode).__name__}.step"
            self.answers.ask(play.place, lambda: checked_turn(episode.step(message), asked), episode)

    def _end(self, play: Play, stop: Literal["end", "length", "turns"]) -> None:
        """No further turn; what the whole has earned is asked for."""
        play.stop, play.over = stop, True
        episode, failed = play.episode, play.failure is not None
        if episode is None:
            self._done(play)
        else:
            self.answers.ask(play.place, lambda: ended(episode, failed), episode)

    def _done(self, play: Play) -> None:
        self.finished.append(self.running.pop(play.place))


def ended(episode: Episode, failed: bool) -> Turn:
    """What the whole has earned, as the last turn; the episode is closed."""
    try:
        last = Turn(reward=0.0 if failed else episode.finish(), done=True)
        return checked_turn(last, f"{type(episode).__name__}.finish")
    finally:
        episode.close()


def closed(episode: Episode) -> None:
    """Closes an episode that nobody wants any more, whatever that leads to."""
    with contextlib.suppress(Exception):
        episode.close()


class TooLong(Exception):
    """The environment has not answered in time."""


class Answers:
    """Asks environments, some at a time, each for no longer than `seconds`. Without workers, in turn and without that limit."""

    def __init__(self, workers: int, seconds: float) -> None:
        self.seconds = seconds
        self.alone = workers == 0
        self.begun: dict[tuple[int | str, ...], float] = {}
        self.over = False
        self.waiting: queue.Queue[tuple[Any, Callable[[], Answer], Episode | None] | None] = queue.Queue()
        self.found: queue.Queue[tuple[Any, Answer | Exception]] = queue.Queue()
        self.lost: set[Any] = set()
        self.workers, self.most = 0, workers

    def ask(self, place: tuple[int | str, ...], question: Callable[[], Answer], episode: Episode | None = None) -> None:
        """episode: what is closed, once it answers, where it is given up."""
        if self.alone:
            self.found.put((place, _asked(question)))
            return
        self.waiting.put((place, question, episode))
        if self.workers < self.most:
            self._hire()

    def ready(self, wait: bool) -> list[tuple[tuple[int | str, ...], Answer | Exception]]:
        """What has been answered; with `wait`, not before there is something."""
        found: list[Any] = []
        while not found:
            while not self.found.empty():
                found.append(self.found.get())
            found += self._too_late()
            if found or not wait:
                break
            try:
                found.append(self.found.get(timeout=POLL))
            except queue.Empty:
                continue
        return [each for each in found if each[0] not in self.lost or isinstance(each[1], TooLong)]

    def _too_late(self) -> list[Any]:
        """Those that have been asked for too long. Their threads cannot be ended; others take their places."""
        now = time.monotonic()
        late = [place for place, begun in list(self.begun.items()) if now - begun > self.seconds]
        for place in late:
            self.begun.pop(place, None)
            self.lost.add(place)
            self._hire()
        return [(place, TooLong(f"no answer after {self.seconds:g} s")) for place in late]

    def _hire(self) -> None:
        self.workers += 1
        threading.Thread(target=self._work, daemon=True, name="environment").start()

    def _work(self) -> None:
        while (asked := self.waiting.get()) is not None:
            place, question, episode = asked
            self.begun[place] = time.monotonic()
            answer = _asked(question)
            given_up = self.begun.pop(place, None) is None
            if given_up or self.over:
                if (late := answer if isinstance(answer, Episode) else episode) is not None:
                    closed(late)
                return
            self.found.put((place, answer))

    def close(self) -> None:
        self.over = True
        for _ in range(self.workers):
            self.waiting.put(None)


def _asked(question: Callable[[], Answer]) -> Answer | Exception:
    try:
        return question()
    except Exception as error:
        return error
    except SystemExit as error:
        return RuntimeError(f"it wants to exit ({error.code})")

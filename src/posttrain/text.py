"""The world before tensors: what data files hold, what a policy wrote, what a grader said of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from posttrain.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `tool_calls` (assistant turns only) holds {"name", "arguments"} mappings in the order they were made."""

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The form that chat templates read."""
        plain: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            plain["tool_calls"] = [{"type": "function", "function": dict(call)} for call in self.tool_calls]
        return plain


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages to learn from; `where` is the file and line they came from."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    where: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """Plain text and how it goes on, for a model without a chat template; only `completion` is learned from."""

    prompt: str
    completion: str
    where: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    """A raw document."""

    text: str
    where: str = ""


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt. `prefer` is the probability that `chosen` is the better one, `margin` by how much at least."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    prefer: float = 1.0
    margin: float = 0.0
    where: str = ""


@dataclass(frozen=True, slots=True)
class Labelled:
    """One answer to a prompt, and whether it is a good one."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    good: bool
    where: str = ""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Some answers to one prompt with a score for each: the higher, the better; equal ones are not compared."""

    prompt: tuple[Message, ...]
    completions: tuple[tuple[Message, ...], ...]
    scores: tuple[float, ...]
    where: str = ""


@dataclass(frozen=True, slots=True)
class Steps:
    """One answer in steps (its lines, mostly), and for each step the probability that it is right, 0 or 1 where it is known."""

    prompt: tuple[Message, ...]
    steps: tuple[str, ...]
    right: tuple[float, ...]
    where: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt and what is needed to grade an answer to it. `id` addresses its random draws; `facts` holds further columns."""

    id: str
    prompt: tuple[Message, ...]
    answer: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


Label = str | int | float | tuple[str, ...]  # a class, or a number; a tuple where any number of classes may be right


@dataclass(frozen=True, slots=True)
class Classified:
    """A text, or two that are judged together, or a conversation; and what it is."""

    text: str
    label: Label
    second: str | None = None
    messages: tuple[Message, ...] = ()
    where: str = ""


Row = Conversation | Completion | Text | Preference | Labelled | Ranking | Steps | Problem | Classified


@dataclass(frozen=True, slots=True)
class Classes:
    """What texts are told apart by. single: one of the labels is right; multi: any number of them; regression: a number, and no
    labels."""

    problem: Literal["single", "multi", "regression"]
    labels: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """How many numbers a model says of a text."""
        return len(self.labels) or 1

    def numbers(self, label: Label, where: str) -> tuple[float, ...]:
        """What a model is to say: the number of the class; 0 or 1 for each label; the number itself. Raises DataError."""
        if self.problem == "regression":
            number = None if isinstance(label, tuple) else as_number(label)
            if number is None:
                raise DataError(f"{where}: the label is {shown_label(label)}, and others are numbers; correct the row")
            return (number,)
        if (self.problem == "multi") != isinstance(label, tuple) or isinstance(label, float):
            wanted = "one label" if self.problem == "single" else "a list of labels"
            raise DataError(
                f"{where}: expected {wanted}, found {shown_label(label)}; correct the row, or set objective.problem "
                "(single: one label; multi: a list of them; regression: a number)"
            )
        names = label if isinstance(label, tuple) else (str(label),)
        places = {self._place(name, where) for name in names}
        return tuple(map(float, places)) if self.problem == "single" else tuple(float(i in places) for i in range(self.outputs))

    def _place(self, name: str, where: str) -> int:
        """Of a label among all; where a model has no names for them but LABEL_0, ..., a number is one."""
        for known in (name, f"LABEL_{name}"):
            if known in self.labels:
                return self.labels.index(known)
        raise DataError(
            f'{where}: the label "{name}" is not among those that are known ({", ".join(self.labels)}); correct the row, or name '
            "all labels where the model is trained (objective.labels)"
        )


def as_number(label: str | float) -> float | None:
    """A finite number, also where a file has it as text; None for anything else."""
    try:
        found = float(label)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def shown_label(label: Label) -> str:
    return f"[{', '.join(label)}]" if isinstance(label, tuple) else f'"{label}"' if isinstance(label, str) else str(label)


Rendering = tuple[list[int], list[bool]]  # the tokens of a sequence, and which of them are trained


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A row as a model sees it: its sequences (the two sides of a pair, say), and the numbers that go with them.

    label: of a text, as its file says it; which number that is, is known when all labels are.
    """

    sequences: tuple[Rendering, ...]
    numbers: tuple[float, ...] = ()
    label: Label | None = None


@dataclass(frozen=True, slots=True)
class Grade:
    """What a grader says: a score, or the reason why there is none. A failure is not a score.

    steps: where in the answer something was earned, as (sampled tokens up to there, how much), in order; they are parts of the
    score, and whoever takes no notice of them learns from the score alone. weights: of the parts that the score is a sum of.
    """

    score: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None
    steps: tuple[tuple[int, float], ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Transcript:
    """What went to and fro in an episode after its prompt.

    messages: the policy's, as decoded, and the environment's; ends: of each turn of the policy, how many tokens it had drawn by
    then; rewards: what each turn earned; counts: what the environment counts, such as calls of tools; failure: why the
    episode is worth nothing, where the environment broke it off.
    """

    messages: tuple[Message, ...]
    ends: tuple[int, ...] = ()
    rewards: tuple[float, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer as it was drawn: token ids verbatim, never re-tokenised.

    tokens: prompt and completion ids; sampled: True on every token the policy drew (its end tokens included);
    logp: the log-probability each sampled token was drawn with, in order; stop: "end" (an end token; an episode came to its
    end), "length" (cut off at the most tokens) or "turns" (at the most turns); text: the decoded completion, for graders and
    people, of an episode the policy's last turn; version: the update the policy had then; by: who wrote it (greedy: the policy,
    without drawing); transcript: of an episode, all its turns.
    """

    problem: Problem
    index: int
    tokens: tuple[int, ...]
    sampled: tuple[bool, ...]
    logp: tuple[float, ...]
    stop: Literal["end", "length", "turns"]
    text: str
    version: int = 0
    by: Literal["policy", "reference", "greedy"] = "policy"
    transcript: Transcript | None = None

    @property
    def shown(self) -> str:
        """All that the policy wrote, for people; in an episode with what it was told."""
        if self.transcript is None:
            return self.text
        said = self.transcript.messages
        return "\n".join(each.content if each.role == "assistant" else f"[{each.role}] {each.content}" for each in said)

"""A small example of every registered objective: settings, and a batch to learn from. A new kind adds one line to EXAMPLES.

Every batch has rows of unequal lengths, shared prefixes, a row with nothing trained and a row of one token.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from tiny_models import VOCABULARY

from posttrain.batch import Rollouts, Sequences
from posttrain.models.lm import LM


@dataclass(frozen=True)
class Example:
    """`batch(lm)` may ask the model for log-probs; it must have `rows` rows."""

    kind: str
    settings: dict[str, Any]
    batch: Callable[[LM], Any]

    @property
    def name(self) -> str:
        return "-".join([self.kind, *(f"{key}={value}" for key, value in self.settings.items())])


def draw(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def noise(count: int, seed: int, like: torch.Tensor, scale: float) -> torch.Tensor:
    return (scale * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(like.dtype)


def rows(seed: int = 0) -> list[tuple[list[int], list[bool]]]:
    """8 rows: two groups with prompts of 20 and 17 tokens, a row with nothing trained, and one of a single token."""
    found = []
    for group, prompt in enumerate((draw(20, seed + 1), draw(17, seed + 2))):
        for index, length in enumerate((3, 9, 5)):
            answer = draw(length, seed + 10 * group + index + 3)
            found.append((prompt + answer, [False] * len(prompt) + [True] * length))
    found.append((draw(14, seed + 30), [False] * 14))
    found.append((draw(1, seed + 31), [False]))
    return [found[index] for index in (0, 6, 3, 4, 1, 7, 5, 2)]


def sequences(_lm: LM) -> Sequences:
    return Sequences.of(rows())


def weighted(_lm: LM) -> Sequences:
    return Sequences.of(rows(), weight=[1.0, 2.0, 0.5, 3.0, 0.0, 1.0, 0.25, 1.0])


def rollouts(lm: LM) -> Rollouts:
    """Samples of a policy a few updates ago: some ratios lie outside of the clip range, on both sides; a row has no advantage."""
    seqs, temperature = Sequences.of(rows()), 0.7
    good = torch.tensor([1.3, -0.4, 0.8, -1.1, 0.0, 0.6, -0.7, 0.9])
    with torch.no_grad():
        logp = lm.logprobs(seqs, temperature=temperature)
    return Rollouts(
        seqs,
        sampled_logp=logp + noise(len(logp), 41, logp, 0.3),
        advantage=good.to(logp.dtype)[seqs.owner],
        version=torch.zeros(seqs.count, dtype=torch.long),
        ref_logp=logp + noise(len(logp), 43, logp, 0.5),
        temperature=temperature,
    )


EXAMPLES = [
    Example("sft", {}, sequences),
    Example("sft", {}, weighted),
    Example("pretrain", {}, sequences),
    Example("grpo", {"aggregate": "sequence"}, rollouts),
    Example("grpo", {"aggregate": "token", "clip_high": 0.28}, rollouts),
    Example("grpo", {"aggregate": "sequence", "kl": 0.3}, rollouts),
]


def only(value: Any, kept: list[int]) -> Any:
    """A batch of the given rows in the given order, whatever its type: `select` itself keeps the order of the batch."""
    return joined([value.select([row]) for row in kept])


def joined(parts: list[Any]) -> Any:
    changed: dict[str, Any] = {}
    for each in fields(parts[0]):
        values = [getattr(part, each.name) for part in parts]
        if each.name == "starts":
            changed["starts"] = torch.cat([torch.zeros(1, dtype=torch.long), *(value.diff() for value in values)]).cumsum(0)
        elif isinstance(values[0], torch.Tensor):
            changed[each.name] = torch.cat(values)
        elif is_dataclass(values[0]):
            changed[each.name] = joined(values)
    return replace(parts[0], **changed)

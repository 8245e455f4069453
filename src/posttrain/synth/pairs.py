"""Preference pairs from graded samples."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

from posttrain import draws
from posttrain.text import Grade, Sample

Choice = Literal["best_worst", "bradley_terry"]


def pairs_of(
    graded: Sequence[tuple[Sample, Grade]], choice: Choice, scale: float, seed: int
) -> Iterator[tuple[Sample, Sample, float, float]]:
    """(chosen, rejected, score of chosen, score of rejected) from the samples of each problem, which stand together.

    best_worst: the best against the worst, one pair a problem. bradley_terry: samples are paired in the order in which they were
    drawn, and each pair's winner is drawn with probability sigmoid(scale * (its score - the other's)): as noisy as people.
    Answers that were cut off or are the same as the other, and equal scores under best_worst, make no pair.
    """
    for name, group in groupby(graded, key=lambda each: each[0].problem.id):
        members = [(one, grade.score) for one, grade in group if grade.score is not None and one.stop == "end"]
        if choice == "best_worst":
            members.sort(key=lambda each: -each[1])
            couples = [(members[0], members[-1])] if len(members) > 1 and members[0][1] > members[-1][1] else []
        else:
            couples = list(zip(members[::2], members[1::2], strict=False))
        for number, (first, second) in enumerate(couples):
            if first[0].text == second[0].text:
                continue
            wins = 1 / (1 + math.exp(-max(-700.0, min(700.0, scale * (first[1] - second[1])))))
            if choice == "bradley_terry" and draws.generator(seed, "preference", name, number).random() >= wins:
                first, second = second, first
            yield first[0], second[0], first[1], second[1]


def pair_row(chosen: Sample, rejected: Sample, chosen_score: float, rejected_score: float, made_by: str) -> dict[str, Any]:
    """A row of format `preference`, with where it comes from."""
    return {
        "id": f"{chosen.problem.id}/{chosen.index}-{rejected.index}",
        "prompt": [message.as_dict() for message in chosen.problem.prompt],
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "chosen_score": chosen_score,
        "rejected_score": rejected_score,
        "made_by": made_by,
    }

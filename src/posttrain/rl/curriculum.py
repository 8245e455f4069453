"""Which problems come next: in random order, each once an epoch; or by how often they were solved so far."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from posttrain.rl.plan import Curriculum

if TYPE_CHECKING:
    from posttrain.text import Grade, Problem, Sample


class Deck:
    """Problems to be drawn, and what has been measured of them."""

    def __init__(self, problems: "Sequence[Problem]", curriculum: Curriculum | None, seed: int) -> None:
        from posttrain.data.stream import Stream

        self.problems, self.curriculum = problems, curriculum
        self.stream = Stream([len(problems)], None, seed)
        self.rates: dict[int, tuple[float, int]] = {}  # of the problems by their place: the rate, and when it was last measured
        self.places = {problem.id: place for place, problem in enumerate(problems)}
        self.turn = 0

    def take(self, count: int) -> "list[Problem]":
        """The next problems, each at most once; fewer where there are no more."""
        if self.curriculum is None:
            return [self.problems[place] for place in dict.fromkeys(place for _, place in self.stream.take(count))]
        again = self._again(count)
        fresh: dict[int, None] = {}
        passed_over = 0
        while len(again) + len(fresh) < min(count, len(self.problems)):
            ((_, place),) = self.stream.take(1)
            if place in again or place in fresh or (self._solved(place) and passed_over < len(self.problems)):
                passed_over += 1
                if passed_over > 2 * len(self.problems):
                    break
                continue
            fresh[place] = None
        return [self.problems[place] for place in (*again, *fresh)]

    def _again(self, count: int) -> list[int]:
        plan = self.curriculum
        assert plan is not None
        known = [(abs(rate - plan.target), turn, place) for place, (rate, turn) in self.rates.items() if rate < 1]
        return [place for _, _, place in sorted(known)[: int(plan.replay * count)]]

    def _solved(self, place: int) -> bool:
        return self.curriculum is not None and self.rates.get(place, (0.0, 0))[0] >= self.curriculum.skip

    def measured(self, drawn: "Sequence[tuple[Sample, Grade]]") -> None:
        """Takes note of what became of the problems that were drawn."""
        if self.curriculum is None:
            return
        self.turn += 1
        scores: dict[int, list[float]] = {}
        for one, grade in drawn:
            if grade.score is not None:
                scores.setdefault(self.places[one.problem.id], []).append(min(1.0, max(0.0, grade.score)))
        for place, found in scores.items():
            rate = sum(found) / len(found)
            if place in self.rates:
                rate = self.curriculum.memory * self.rates[place][0] + (1 - self.curriculum.memory) * rate
            self.rates[place] = (rate, self.turn)

    def state(self) -> dict[str, Any]:
        plain = self.stream.state()
        if self.curriculum is not None:
            plain |= {"turn": self.turn, "rates": [[place, *known] for place, known in self.rates.items()]}
        return plain

    def load(self, state: dict[str, Any]) -> None:
        self.stream.load(state)
        self.turn = state.get("turn", 0)
        self.rates = {place: (rate, turn) for place, rate, turn in state.get("rates", [])}

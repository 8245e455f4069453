"""The order in which rows are learned from: endless, seeded, and known by arithmetic, so that it resumes from a few numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain import draws


class Stream:
    """Draws (source, row) from several sources in proportion to their weights; each source is shuffled anew every epoch.

    sizes: rows per source. weights: share of each source in what is drawn; by default its size, so that every row is equally
    often seen. The next source is always the one that is furthest behind its share.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        self.sizes, self.seed = list(sizes), seed
        chosen = np.asarray(weights if weights is not None else sizes, dtype=np.float64)
        self.shares = chosen / chosen.sum()
        self.drawn = [0] * len(self.sizes)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def take(self, count: int) -> list[tuple[int, int]]:
        """The next `count` (source, row) pairs."""
        return [self._one() for _ in range(count)]

    def _one(self) -> tuple[int, int]:
        behind = self.shares * (sum(self.drawn) + 1) - np.asarray(self.drawn)
        source = int(behind.argmax())
        epoch, place = divmod(self.drawn[source], self.sizes[source])
        self.drawn[source] += 1
        return source, int(self._order(source, epoch)[place])

    def _order(self, source: int, epoch: int) -> np.ndarray:
        if self._orders.get(source, (-1,))[0] != epoch:
            order = draws.generator(self.seed, "shuffle", source, epoch).permutation(self.sizes[source])
            self._orders[source] = (epoch, order)
        return self._orders[source][1]

    def state(self) -> dict[str, Any]:
        return {"drawn": list(self.drawn)}

    def load(self, state: dict[str, Any]) -> None:
        self.drawn = list(state["drawn"])

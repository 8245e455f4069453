"""The only place where sequences become rows of a forward pass.

`tree` lays sequences out as a tree: a common prefix is laid down, and computed, once; what differs follows as its children, with
positions that go on from their parent. Everything lies in one flat row, in depth-first order, so that the descendants of a
segment are one contiguous range. `padded` is the plain layout for models that cannot take the tree.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from posttrain.batch import Batch, Sequences

MIN_SHARED = 16  # a shorter common prefix costs more to branch than to compute twice


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, end) of the row. Its descendants are [end, tree_end); `depth` is the position of its first token."""

    start: int
    end: int
    tree_end: int
    depth: int
    parent: int  # index into the segments, -1 for a root


@dataclass(frozen=True, slots=True)
class Tree:
    """T' row tokens with their positions, and for each sequence the row index of each of its tokens."""

    tokens: Int[Tensor, " T"]
    positions: Int[Tensor, " T"]
    segments: tuple[Segment, ...]
    paths: tuple[np.ndarray, ...]

    def ancestors(self, segment: Segment) -> list[Segment]:
        """From the root down, the segment itself last."""
        chain = [segment]
        while chain[-1].parent >= 0:
            chain.append(self.segments[chain[-1].parent])
        return chain[::-1]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """The length of the longest common prefix."""
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter


class _Planter:
    """Grows the tree from sequences in lexicographic order, where those that share a prefix are neighbours."""

    def __init__(self, rows: list[np.ndarray], min_shared: int) -> None:
        self.order = sorted(range(len(rows)), key=lambda index: rows[index].tolist())
        self.rows = [rows[index] for index in self.order]
        self.shared = [_common(a, b) for a, b in zip(self.rows, self.rows[1:], strict=False)]
        self.min_shared = min_shared
        self.tokens: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.size = 0
        self.trails: list[list[tuple[int, int]]] = [[] for _ in rows]  # row ranges of each sequence, root first

    def lay(self, low: int, high: int, depth: int, parent: int) -> None:
        """Lays rows[low:high], whose first `depth` tokens are laid already."""
        while low < high:
            stop = low + 1
            while stop < high and self.shared[stop - 1] >= depth + self.min_shared:
                stop += 1
            cut = min((len(self.rows[low]), *self.shared[low : stop - 1])) if stop - low > 1 else len(self.rows[low])
            self.branch(low, stop, depth, cut, parent)
            low = stop

    def branch(self, low: int, high: int, depth: int, cut: int, parent: int) -> None:
        if cut > depth:
            mine, start = len(self.segments), self.size
            self.tokens.append(self.rows[low][depth:cut])
            self.size += cut - depth
            self.segments.append(Segment(start, self.size, self.size, depth, parent))
            for index in range(low, high):
                self.trails[index].append((start, start + cut - depth))
        else:
            mine = parent
        if high - low > 1:
            longer = low + sum(len(row) == cut for row in self.rows[low:high])  # those that end here come first
            self.lay(longer, high, cut, mine)
            if mine >= 0 and mine != parent:
                whole = self.segments[mine]
                self.segments[mine] = Segment(whole.start, whole.end, self.size, whole.depth, whole.parent)


def tree(rows: Sequence[Sequence[int]], min_shared: int = MIN_SHARED) -> Tree:
    """Plans token sequences as a tree whose shared prefixes (of at least `min_shared` tokens) are laid once."""
    planter = _Planter([np.asarray(row, dtype=np.int64) for row in rows], min_shared)
    planter.lay(0, len(rows), 0, -1)
    paths: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(rows)
    for index, trail in zip(planter.order, planter.trails, strict=True):
        paths[index] = np.concatenate([np.arange(a, b) for a, b in trail]) if trail else np.empty(0, dtype=np.int64)
    positions = [np.arange(part.depth, part.depth + part.end - part.start) for part in planter.segments]
    flat = np.concatenate(planter.tokens) if planter.tokens else np.empty(0, dtype=np.int64)
    places = np.concatenate(positions) if positions else np.empty(0, dtype=np.int64)
    return Tree(torch.from_numpy(flat), torch.from_numpy(places), tuple(planter.segments), tuple(paths))


def micro_batches(batch: Batch, budget: int) -> list[list[int]]:
    """The batch's rows in the fewest groups of at most `budget` laid-out tokens, as equal as can be; a longer row goes alone.

    A prefix that neighbours share counts once, as it is laid; rows that share one are neighbours.
    """
    units = [tuple(np.asarray(row, dtype=np.int64) for row in rows) for rows in batch.row_tokens]
    order = sorted(range(len(units)), key=lambda index: [row.tolist() for row in units[index]])
    alone = [_added((), units[index]) for index in order]
    after = [0, *(_added(units[one], units[other]) for one, other in pairwise(order))][: len(order)]

    def groups(limit: int) -> list[list[int]]:
        found: list[list[int]] = []
        filled = 0
        for index, first, more in zip(order, alone, after, strict=True):
            if not found or filled + more > limit:
                found.append([])
                filled, more = 0, first
            found[-1].append(index)
            filled += more
        return found

    fewest = len(groups(budget))
    balanced = bisect_left(range(budget), -fewest, key=lambda limit: -len(groups(limit)))
    return [sorted(group) for group in groups(balanced)]


def _added(before: Sequence[np.ndarray], unit: Sequence[np.ndarray]) -> int:
    """The tokens that a unit of sequences adds to a layout that ends with `before`."""
    total, seen = 0, list(before)
    for row in unit:
        shared = max((_common(row, other) for other in seen), default=0)
        total += len(row) - (shared if shared >= MIN_SHARED else 0)
        seen.append(row)
    return total


Places = Callable[[Sequences], list[np.ndarray]]  # for each sequence, which of its tokens


def before_trained(seqs: Sequences) -> list[np.ndarray]:
    """The token before each trained one, whose state predicts it: the shift between states and tokens, which exists only here."""
    return [place - 1 for place in at_trained(seqs)]


def at_trained(seqs: Sequences) -> list[np.ndarray]:
    """Each trained token itself."""
    train, edges = seqs.train.cpu().numpy(), seqs.starts.tolist()
    return [np.flatnonzero(train[start:stop]) for start, stop in pairwise(edges)]


def at_last(seqs: Sequences) -> list[np.ndarray]:
    """The last token of each sequence."""
    return [np.array([length - 1]) for length in seqs.lengths.tolist()]


def indices(tree: Tree, batches: Sequence[Sequences], places: Places) -> list[Int[Tensor, " N"]]:
    """For each of `batches` (laid out together, in order), the row indices of the tokens that `places` names."""
    paths = iter(tree.paths)
    return [_flat([next(paths)[place] for place in places(seqs)]) for seqs in batches]


@dataclass(frozen=True, slots=True)
class Padded:
    """B rows of equal length, filled up at the end with token 0; `valid` marks the real tokens."""

    tokens: Int[Tensor, "B L"]
    valid: Bool[Tensor, "B L"]


def padded(batches: Sequence[Sequences]) -> Padded:
    """The plain layout: every sequence in a row of its own."""
    rows = [torch.tensor(row, dtype=torch.long) for seqs in batches for row in seqs.rows()]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return Padded(tokens, torch.arange(tokens.shape[1])[None] < lengths[:, None])


def cells(batches: Sequence[Sequences], places: Places) -> list[tuple[Int[Tensor, " N"], Int[Tensor, " N"]]]:
    """For each of `batches` (padded together, in order), the rows and columns of the tokens that `places` names."""
    found, first = [], 0
    for seqs in batches:
        columns = places(seqs)
        found.append((_flat([np.full(len(place), first + row) for row, place in enumerate(columns)]), _flat(columns)))
        first += seqs.count
    return found


def _flat(parts: list[np.ndarray]) -> Int[Tensor, " N"]:
    return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, dtype=np.int64))

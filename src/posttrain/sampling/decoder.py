"""What the engine asks for logits: rows that grow by one token a step, join in any step and leave in any step.

`CachedDecoder` keeps keys and values, and attends through the same registry as the trainer's layout: prompts are laid out as a
tree and prefilled once, then each row's next token is one token of a flat row. `ReplayDecoder` computes whole sequences again at
every step, for architectures that cannot take the tree.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from posttrain.batch import Sequences
from posttrain.models import layout
from posttrain.models.attention import Scoring, TreePlan, attending, weights
from posttrain.models.lm import LM
from posttrain.models.products import Linears, repeated, replaced, wide
from posttrain.sampling import lean

ROOM = 64  # caches grow in steps of this many tokens


class Decoder(Protocol):
    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int], budget: int) -> Tensor:
        """Appends copies[i] rows for prompts[i], with room for `budget` more tokens; returns their logits [sum(copies), V]."""
        ...

    def advance(self, tokens: Tensor) -> Tensor:
        """Appends one token [A] to each row and returns the logits [A, V] of the next."""
        ...

    def drop(self, rows: Sequence[int]) -> None:
        """Removes rows; for each, in descending order, the last row moves into its place."""
        ...


def decoder(lm: LM) -> Decoder:
    return CachedDecoder(lm) if lm.layout == "tree" else ReplayDecoder(lm)


class _Prefill(TreePlan):
    """The trainer's attention over prompts, keeping each layer's keys and values."""

    def __init__(self, tree: layout.Tree) -> None:
        super().__init__(tree)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.kept.append((key[0], value[0]))
        return super().attend(query, key, value, scoring)


class _Step:
    """Attention of one new token per row over the row's own cache."""

    def __init__(self, cache: "list[_Cache]", lengths: Tensor) -> None:
        self.cache, self.lengths = cache, lengths
        self.reach = int(lengths.max()) + 1
        self.layer = 0
        self.masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None) -> Tensor:
        """[A, 1, 1, reach]: 0 for the cached tokens that each row sees, its new one included; -inf for the others."""
        if window not in self.masks:
            place = torch.arange(self.reach, device=self.lengths.device)[None]
            unseen = place > self.lengths[:, None]
            if window is not None:
                unseen |= place <= self.lengths[:, None] - window
            added = torch.zeros_like(unseen, dtype=wide(self.cache[0].keys).dtype).masked_fill_(unseen, float("-inf"))
            self.masks[window] = added[:, None, None]
        return self.masks[window]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
        return self.of_rows(query, key, value, scoring)[None]

    def of_rows(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """query [A, H, D], key and value [A, K, D] of each row's new token -> [A, H, D]"""
        cache = self.cache[self.layer]
        self.layer += 1
        cache.append(key, value, self.lengths)
        keys, values = cache.seen(len(self.lengths), self.reach)
        with torch.autocast(query.device.type, enabled=False):
            grouped = query.to(keys.dtype).unflatten(1, (keys.shape[1], -1))  # the queries that share a key head stand together
            scores = torch.matmul(grouped, keys).flatten(1, 2)[:, :, None]  # [A, H, 1, reach]
            weight = weights(scores, self.mask(scoring.window), scoring).to(values.dtype)
            return torch.matmul(weight.reshape(*grouped.shape[:3], -1), values).flatten(1, 2).to(value.dtype)


class _Cache:
    """A layer's keys and values, in the order in which the products of one token read them: short rows, one after the other.

    keys [rows, K, D, length] and values [rows, K, length, D]: products of a few queries take 0.6 of fused attention's time on a
    CPU. Float32 there, where attention is float32.
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        """Empty, for keys and values as `key` and `value` [K, tokens, D]."""
        dtype = value.dtype if value.device.type != "cpu" else wide(value).dtype
        self.keys = key.new_zeros(0, key.shape[0], key.shape[2], 0, dtype=dtype)
        self.values = value.new_zeros(0, value.shape[0], 0, value.shape[2], dtype=dtype)

    @property
    def room(self) -> tuple[int, int]:
        """Rows and tokens."""
        return len(self.values), self.values.shape[2]

    def grow(self, rows: int, length: int) -> None:
        """Room for so many rows of so many tokens; what is there is kept."""
        had, reach = self.room
        keys, values = self.keys, self.values
        self.keys = keys.new_zeros(rows, *keys.shape[1:3], length)
        self.values = values.new_zeros(rows, values.shape[1], length, values.shape[3])
        self.keys[:had, ..., :reach] = keys
        self.values[:had, :, :reach] = values

    def fill(self, rows: slice, key: Tensor, value: Tensor) -> None:
        """The first tokens of rows, the same for each: key and value [K, tokens, D]."""
        self.keys[rows, ..., : key.shape[1]] = key.transpose(1, 2)
        self.values[rows, :, : value.shape[1]] = value

    def append(self, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """One token [A, K, D] to each of the first A rows, at its length."""
        at, rows = lengths[:, None, None, None], len(lengths)
        key, value = key.to(self.keys.dtype)[..., None], value.to(self.values.dtype)[:, :, None]
        self.keys[:rows].scatter_(3, at.expand_as(key), key)
        self.values[:rows].scatter_(2, at.expand_as(value), value)

    def seen(self, rows: int, reach: int) -> tuple[Tensor, Tensor]:
        return self.keys[:rows, ..., :reach], self.values[:rows, :, :reach]

    def move(self, to: Tensor, source: Tensor, reach: int) -> None:
        self.keys[to, ..., :reach] = self.keys[source, ..., :reach]
        self.values[to, :, :reach] = self.values[source, :, :reach]


class CachedDecoder:
    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.cache: list[_Cache] = []
        self.lengths = torch.zeros(0, dtype=torch.long, device=lm.device)
        self.step = lean.build(lm)
        self.checked = False
        self.linears = halved(lm) if self.step is None else []

    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int], budget: int) -> Tensor:
        tree = layout.tree(prompts)
        plan = _Prefill(tree)
        with replaced(self.linears):
            states = self.lm.states(tree, plan)
        first, rows = len(self.lengths), sum(copies)
        longest = max(len(prompt) for prompt in prompts)
        self.cache = self.cache or [_Cache(key, value) for key, value in plan.kept]
        self._reserve(first + rows, longest + budget)
        paths = [torch.from_numpy(path).to(self.lm.device) for path in tree.paths]
        for cache, (key, value) in zip(self.cache, plan.kept, strict=True):
            row = first
            for path, count in zip(paths, copies, strict=True):
                cache.fill(slice(row, row + count), key[:, path], value[:, path])
                row += count
        repeats = torch.tensor(list(copies), device=self.lm.device)
        sizes = torch.tensor([len(prompt) for prompt in prompts], device=self.lm.device)
        self.lengths = torch.cat([self.lengths, sizes.repeat_interleave(repeats)])
        last = torch.stack([path[-1] for path in paths])
        return self.lm.project(states[last]).repeat_interleave(repeats, 0)

    def _reserve(self, rows: int, length: int) -> None:
        have_rows, have_length = self.cache[0].room
        if have_rows < rows or have_length < length:
            for cache in self.cache:
                cache.grow(max(rows, have_rows), max(-(-length // ROOM) * ROOM, have_length))

    def advance(self, tokens: Tensor) -> Tensor:
        if self.step is None:
            states = self._by_model(tokens)
        else:
            states = self.step(tokens, self.lengths, _Step(self.cache, self.lengths).of_rows)
            if not self.checked:
                expected = self._by_model(tokens)
                self.checked = True
                if not _close(states, expected, 1e-1 if self.lm.mixed or states.dtype == torch.bfloat16 else 1e-4):
                    self.step, self.linears, states = None, halved(self.lm), expected
        self.lengths = self.lengths + 1
        return self.lm.project(states)

    def _by_model(self, tokens: Tensor) -> Tensor:
        """The states of one new token per row, by the model's own modules."""
        with attending(self.lm.model, _Step(self.cache, self.lengths)), self.lm.arithmetic(), replaced(self.linears):
            found = self.lm.backbone(input_ids=tokens[None], position_ids=self.lengths[None], use_cache=False)
        return found.last_hidden_state[0]

    def drop(self, rows: Sequence[int]) -> None:
        order = _after_drop(len(self.lengths), rows)
        moved = [(to, source) for to, source in enumerate(order) if to != source]
        if moved:
            to, source = (torch.tensor(each, device=self.lm.device) for each in zip(*moved, strict=True))
            reach = int(self.lengths.max())
            for cache in self.cache:
                cache.move(to, source, reach)
        self.lengths = self.lengths[torch.tensor(order, dtype=torch.long, device=self.lm.device)]


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one.float() - other.float()).norm() < tolerance * other.float().norm())


def halved(lm: LM) -> Linears:
    """For a mixed model: its linear layers with their weights rounded to bfloat16 once, where autocast would at every step."""
    if not lm.mixed:
        return []
    return [(module, _halved(module)) for module in lm.backbone.modules() if type(module) is nn.Linear]


def _halved(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = linear.weight.detach().bfloat16()
    bias = None if linear.bias is None else linear.bias.detach().bfloat16()
    return repeated(weight, bias)


class ReplayDecoder:
    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.rows: list[list[int]] = []

    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int], budget: int) -> Tensor:
        repeats = torch.tensor(list(copies), device=self.lm.device)
        self.rows += [list(prompt) for prompt, count in zip(prompts, copies, strict=True) for _ in range(count)]
        return self._logits([list(prompt) for prompt in prompts]).repeat_interleave(repeats, 0)

    def advance(self, tokens: Tensor) -> Tensor:
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        return self._logits(self.rows)

    def _logits(self, rows: list[list[int]]) -> Tensor:
        """Of the token after each row: a token that is only marked as trained, so that its predictor's state is asked for."""
        marked = Sequences.of([([*row, 0], [False] * len(row) + [True]) for row in rows])
        states = self.lm.hidden(marked)
        return self.lm.project(states)

    def drop(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[index] for index in _after_drop(len(self.rows), rows)]


def _after_drop(count: int, rows: Sequence[int]) -> list[int]:
    """Which old row stands in each new row."""
    order = list(range(count))
    for row in sorted(rows, reverse=True):
        order[row] = order[-1]
        order.pop()
    return order

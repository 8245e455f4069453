"""What the engine asks for logits: rows that grow by one token a step, join in any step and leave in any step.

`CachedDecoder` keeps keys and values, and attends through the same registry as the trainer's layout: prompts are laid out as a
tree and prefilled once, then each row's next token is one token of a flat row. `ReplayDecoder` computes whole sequences again at
every step, for architectures that cannot take the tree.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.batch import Sequences
from posttrain.models import layout
from posttrain.models.attention import Scoring, TreePlan, attending, weighted
from posttrain.models.lm import LM
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

    def __init__(self, cache: "list[tuple[Tensor, Tensor]]", lengths: Tensor) -> None:
        self.cache, self.lengths = cache, lengths
        self.reach = int(lengths.max()) + 1
        self.places = torch.arange(len(lengths), device=lengths.device) * cache[0][0].shape[1] + lengths
        self.layer = 0
        self.masks: dict[int | None, tuple[Tensor, Tensor]] = {}

    def mask(self, window: int | None) -> tuple[Tensor, Tensor]:
        """[A, 1, 1, reach]: which cached tokens each row sees, its new one included; and what that adds to a score (0, -inf)."""
        if window not in self.masks:
            place = torch.arange(self.reach, device=self.lengths.device)[None]
            seen = place <= self.lengths[:, None]
            if window is not None:
                seen &= place > self.lengths[:, None] - window
            added = torch.zeros_like(seen, dtype=self.cache[0][0].dtype).masked_fill_(~seen, float("-inf"))
            self.masks[window] = seen[:, None, None], added[:, None, None]
        return self.masks[window]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
        return self.of_rows(query, key, value, scoring)[None]

    def of_rows(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """query [A, H, D], key and value [A, K, D] of each row's new token -> [A, H, D]"""
        keys, values = self.cache[self.layer]
        self.layer += 1
        for kept, new in ((keys, key), (values, value)):  # one copy of a whole token per row
            kept.flatten(0, 1).flatten(1).index_copy_(0, self.places, new.flatten(1).to(kept.dtype))
        keys, values = (each[: len(self.lengths), : self.reach].transpose(1, 2) for each in (keys, values))
        seen, added = self.mask(scoring.window)
        query = query.to(keys.dtype)
        with torch.autocast(query.device.type, enabled=False):
            if scoring.softcap is None and scoring.sinks is None:
                grouped = query.unflatten(1, (keys.shape[1], -1))  # the queries that share a key head, as if they were positions
                out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=added, scale=scoring.scale).flatten(1, 2)
            else:
                out = weighted(query[:, :, None], keys, values, seen, scoring)[:, :, 0]
        return out.to(value.dtype)


class CachedDecoder:
    """Keys and values are kept as [rows, length, heads, head dimension], in float32 on a CPU, where attention is float32."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.cache: list[tuple[Tensor, Tensor]] = []
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
        self._reserve(plan.kept, first + rows, longest + budget)
        paths = [torch.from_numpy(path).to(self.lm.device) for path in tree.paths]
        for kept, found in zip(self.cache, plan.kept, strict=True):
            for each, new in zip(kept, found, strict=True):
                by_token, row = new.transpose(0, 1), first
                for path, count in zip(paths, copies, strict=True):
                    each[row : row + count, : len(path)] = by_token[path]
                    row += count
        repeats = torch.tensor(list(copies), device=self.lm.device)
        sizes = torch.tensor([len(prompt) for prompt in prompts], device=self.lm.device)
        self.lengths = torch.cat([self.lengths, sizes.repeat_interleave(repeats)])
        last = torch.stack([path[-1] for path in paths])
        return self.lm.project(states[last]).repeat_interleave(repeats, 0)

    def _reserve(self, like: list[tuple[Tensor, Tensor]], rows: int, length: int) -> None:
        """Room for `rows` rows of `length` tokens in every layer; what is there is kept."""
        length = -(-length // ROOM) * ROOM
        if not self.cache:
            self.cache = [(_empty(keys, values), _empty(values, values)) for keys, values in like]
        have_rows, have_length = self.cache[0][0].shape[:2]
        if have_rows >= rows and have_length >= length:
            return
        rows, length = max(rows, have_rows), max(length, have_length)
        self.cache = [(_grown(keys, rows, length), _grown(values, rows, length)) for keys, values in self.cache]

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
        with attending(self.lm.model, _Step(self.cache, self.lengths)), self.lm.precision(), replaced(self.linears):
            found = self.lm.backbone(input_ids=tokens[None], position_ids=self.lengths[None], use_cache=False)
        return found.last_hidden_state[0]

    def drop(self, rows: Sequence[int]) -> None:
        order = _after_drop(len(self.lengths), rows)
        moved = [(to, source) for to, source in enumerate(order) if to != source]
        if moved:
            to, source = (torch.tensor(each, device=self.lm.device) for each in zip(*moved, strict=True))
            reach = int(self.lengths.max())
            for keys, values in self.cache:
                keys[to, :reach] = keys[source, :reach]
                values[to, :reach] = values[source, :reach]
        self.lengths = self.lengths[torch.tensor(order, dtype=torch.long, device=self.lm.device)]


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one.float() - other.float()).norm() < tolerance * other.float().norm())


Linears = list[tuple[nn.Module, Callable[[Tensor], Tensor]]]


def halved(lm: LM) -> Linears:
    """For a mixed model: its linear layers with their weights rounded to bfloat16 once, where autocast would at every step."""
    if not lm.mixed:
        return []
    return [(module, _halved(module)) for module in lm.backbone.modules() if type(module) is nn.Linear]


def _halved(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = linear.weight.detach().bfloat16()
    bias = None if linear.bias is None else linear.bias.detach().bfloat16()
    return lambda tensor: F.linear(tensor.bfloat16(), weight, bias)


@contextmanager
def replaced(linears: Linears) -> Iterator[None]:
    """Within it, each module computes what stands beside it."""
    for module, forward in linears:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, _ in linears:
            module.__dict__.pop("forward", None)


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


def _empty(tensor: Tensor, values: Tensor) -> Tensor:
    """No rows of a cache for a layer's keys or values [heads, tokens, head dimension]; both are kept in one type."""
    wide = values.dtype if values.device.type != "cpu" or values.dtype == torch.float64 else torch.float32
    return tensor.new_zeros(0, 0, tensor.shape[0], tensor.shape[2], dtype=wide)


def _grown(tensor: Tensor, rows: int, length: int) -> Tensor:
    bigger = tensor.new_zeros(rows, length, *tensor.shape[2:])
    bigger[: tensor.shape[0], : tensor.shape[1]] = tensor
    return bigger


def _after_drop(count: int, rows: Sequence[int]) -> list[int]:
    """Which old row stands in each new row."""
    order = list(range(count))
    for row in sorted(rows, reverse=True):
        order[row] = order[-1]
        order.pop()
    return order

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
from posttrain.models import layout, soft
from posttrain.models.attention import KeepingPlan, Scoring, attending, weights
from posttrain.models.lm import LM
from posttrain.models.products import Linears, of_layers, repeated, replaced, wide
from posttrain.sampling import lean
from posttrain.sampling.cache import Stems, Store

SHARED = 4096  # tokens that a step need not read again, from which on shared prompts are worth keeping apart


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


class _Step:
    """Attention of one new token per row, over the row's own tokens and over its stem, which is read once for all its rows."""

    def __init__(self, own: list[Store], prompts: list[Store], stems: Stems, lengths: Tensor) -> None:
        self.own, self.prompts, self.stems, self.lengths = own, prompts, stems, lengths
        self.given: soft.Given | None = None
        self.own_lengths = lengths - stems.shared
        self.reach = int(self.own_lengths.max()) + 1
        self.layer = 0
        self.masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None) -> Tensor:
        """[A, 1, 1, stem's tokens + own]: 0 for the cached tokens that a row sees, its new one included; -inf for the others."""
        if window not in self.masks:
            shared, last = self.stems.shared[:, None], self.lengths[:, None]
            stem = torch.arange(self.stems.reach, device=self.lengths.device)[None].expand(len(last), -1)
            own = shared + torch.arange(self.reach, device=self.lengths.device)[None]
            unseen = torch.cat([stem >= shared, own > last], 1)
            if window is not None:
                unseen |= torch.cat([stem, own], 1) <= last - window
            added = torch.zeros_like(unseen, dtype=wide(self.own[0].keys).dtype).masked_fill_(unseen, float("-inf"))
            self.masks[window] = added[:, None, None]
        return self.masks[window]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
        return self.of_rows(query, key, value, scoring)[None]

    def of_rows(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """query [A, H, D], key and value [A, K, D] of each row's new token -> [A, H, D]"""
        own, stems = self.own[self.layer], self.stems
        own.append(key, value, self.own_lengths)
        keys, values = own.seen(len(self.lengths), self.reach)
        stem_keys, stem_values = self.prompts[self.layer].seen(stems.count, stems.reach)
        self.layer += 1
        with torch.autocast(query.device.type, enabled=False):
            grouped = query.to(keys.dtype).unflatten(1, (keys.shape[1], -1))  # the queries that share a key head stand together
            scores = _scores(grouped, keys)
            if stems.count:
                scores = torch.cat([stems.apart(_scores(stems.together(grouped), stem_keys)), scores], -1)
            weight = weights(scores.flatten(1, 2)[:, :, None], self.mask(scoring.window), scoring).to(values.dtype)
            of_stem, of_own = weight.reshape(scores.shape).split([stems.reach, self.reach], -1)
            out = torch.matmul(of_own, values)
            if stems.count:
                out += stems.apart(torch.matmul(stems.together(of_stem), stem_values))
            return out.flatten(1, 2).to(value.dtype)


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """[A, K, G, D] x [A, K, D, S] -> [A, K, G, S], float32 or wider, as fused attention has them. Never run on a GPU."""
    if keys.dtype in (torch.float32, torch.float64) or keys.device.type == "cpu":
        return torch.matmul(queries, keys)
    flat = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1), out_dtype=torch.float32)
    return flat.unflatten(0, keys.shape[:2])


class CachedDecoder:
    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.own: list[Store] = []  # of each layer: the tokens that are a row's own
        self.prompts: list[Store] = []  # and those of prompts that several rows continue
        self.stems = Stems(lm.device)
        self.lengths = torch.zeros(0, dtype=torch.long, device=lm.device)
        self.step = lean.build(lm)
        self.checked = False
        self.linears = linears(lm) if self.step is None else []

    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int], budget: int) -> Tensor:
        prompts = [soft.placed_prompt(self.lm.model, prompt) for prompt in prompts]
        tree = layout.tree(prompts)
        plan = KeepingPlan(tree)
        with replaced(self.linears if self.lm.mixed else []):
            states = self.lm.states(tree, plan)
        if not self.own:
            self.own, self.prompts = ([Store(key, value) for key, value in plan.kept] for _ in range(2))
        paths = [torch.from_numpy(path).to(self.lm.device) for path in tree.paths]
        places: list[tuple[list[Store], int, Tensor]] = []  # where each prompt goes
        share = sum((count - 1) * len(path) for path, count in zip(paths, copies, strict=True)) >= SHARED
        for path, count in zip(paths, copies, strict=True):
            if share and count > 1:
                places.append((self.prompts, self.stems.count, path))
                self.stems.of_row += [self.stems.count] * count
                self.stems.lengths.append(len(path))
            else:
                places += [(self.own, len(self.stems.of_row) + index, path) for index in range(count)]
                self.stems.of_row += [-1] * count
        self.stems.arrange()
        alone = max((len(path) for stores, _, path in places if stores is self.own), default=0)
        for layer, (key, value) in enumerate(plan.kept):
            self.own[layer].reserve(len(self.stems.of_row), alone + budget)
            self.prompts[layer].reserve(self.stems.count, self.stems.reach)
            for stores, row, path in places:
                stores[layer].fill(row, key[:, path], value[:, path])
        repeats = torch.tensor(list(copies), device=self.lm.device)
        sizes = torch.tensor([len(prompt) for prompt in prompts], device=self.lm.device)
        self.lengths = torch.cat([self.lengths, sizes.repeat_interleave(repeats)])
        last = torch.stack([path[-1] for path in paths])
        return self.lm.project(states[last]).repeat_interleave(repeats, 0)

    def _attention(self) -> _Step:
        return _Step(self.own, self.prompts, self.stems, self.lengths)

    def advance(self, tokens: Tensor) -> Tensor:
        if self.step is None:
            states = self._by_model(tokens)
        else:
            states = self.step(tokens, self.lengths, self._attention().of_rows)
            if not self.checked:
                expected = self._by_model(tokens)
                self.checked = True
                if not _close(states, expected, 1e-1 if self.lm.mixed or states.dtype == torch.bfloat16 else 1e-4):
                    self.step, self.linears, states = None, linears(self.lm), expected
        self.lengths = self.lengths + 1
        return self.lm.project(states)

    def _by_model(self, tokens: Tensor) -> Tensor:
        """The states of one new token per row, by the model's own modules."""
        with attending(self.lm.model, self._attention()), self.lm.precision(), replaced(self.linears):
            found = self.lm.backbone(input_ids=tokens[None], position_ids=self.lengths[None], use_cache=False)
        return found.last_hidden_state[0]

    def drop(self, rows: Sequence[int]) -> None:
        order = _after_drop(len(self.lengths), rows)
        moved = [(to, source) for to, source in enumerate(order) if to != source]
        if moved:
            to, source = (torch.tensor(each, device=self.lm.device) for each in zip(*moved, strict=True))
            reach = int((self.lengths - self.stems.shared).max())
            for store in self.own:
                store.move(to, source, reach)
        if (living := self.stems.reorder(order)) is not None:
            for store in self.prompts:
                store.keep(torch.tensor(living, dtype=torch.long, device=self.lm.device))
        self.lengths = self.lengths[torch.tensor(order, dtype=torch.long, device=self.lm.device)]


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one.float() - other.float()).norm() < tolerance * other.float().norm())


def linears(lm: LM) -> Linears:
    """A model's linear layers as decode steps take them; those of a mixed model with weights rounded once, not at every step."""
    if not lm.mixed:
        return of_layers(lm.backbone)
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

"""Soft tokens: learned vectors that stand where words could, and learned keys and values that stand before all words.

A soft token is an id beyond the vocabulary. It is put into a sequence when the sequence is laid out, and never trained as a
target; so packing, shared prefixes, sampling and every objective work with it as with any other token. The tokens of a prefix
(`PrefixTokens`) stand in the row as places only: at every layer, learned keys and values take the place of theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from posttrain.batch import Sequences
from posttrain.errors import DataError, ModelError

NAME = "soft_tokens"  # of the submodule that holds a model's, the oldest first


class SoftTokens(nn.Module):
    """`count` soft tokens, numbered from `first`, that go into every sequence in front of its tokens number `at`.

    encoder(indices [1, count]) -> [1, count, X] gives what is learned for each: its vector, X = D.
    """

    def __init__(self, encoder: nn.Module, count: int, first: int, at: Sequence[int] = (0,)) -> None:
        super().__init__()
        self.encoder, self.count, self.first, self.at = encoder, count, first, tuple(at)
        self.active = True

    def learned(self) -> Float[Tensor, "count X"]:
        """What is learned, in the precision that it is stored in."""
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):
            found: Tensor = self.encoder(torch.arange(self.count, device=device)[None])[0]
        return found

    def vectors(self, width: int) -> Float[Tensor, "count D"]:
        """What each is embedded as."""
        return self.learned()

    def keys_and_values(self) -> Float[Tensor, "layers 2 K count d"] | None:
        """What each layer attends to in their place; None where that follows from their vectors."""
        return None

    def put_into(self, tokens: Sequence[int], marks: Sequence[bool]) -> tuple[list[int], list[bool]]:
        """The sequence with these tokens in it, unmarked. Raises DataError for one that ends before a place."""
        if len(tokens) < self.at[-1]:
            raise DataError(
                f"a text of {len(tokens)} tokens ends before number {self.at[-1]}, where soft tokens stand: lower tuner.at, or "
                "leave out texts as short as that"
            )
        shares = [round(self.count * index / len(self.at)) for index in range(len(self.at) + 1)]
        ids, learned_from = list(tokens), list(marks)
        for place, (low, high) in reversed(list(zip(self.at, pairwise(shares), strict=True))):
            ids[place:place] = range(self.first + low, self.first + high)
            learned_from[place:place] = [False] * (high - low)
        return ids, learned_from


class PrefixTokens(SoftTokens):
    """Keys and values before the first token, at every layer; arXiv 2101.00190. X = layers * 2 * K * d, as peft lays it out."""

    def __init__(self, encoder: nn.Module, count: int, first: int, layers: int, heads: int) -> None:
        super().__init__(encoder, count, first)
        self.layers, self.heads = layers, heads

    def vectors(self, width: int) -> Float[Tensor, "count D"]:
        anchor = next(self.parameters())
        return torch.zeros(self.count, width, dtype=anchor.dtype, device=anchor.device)

    def keys_and_values(self) -> Float[Tensor, "layers 2 K count d"]:
        return self.learned().unflatten(1, (self.layers, 2, self.heads, -1)).movedim(0, 3)


def all_of(model: nn.Module) -> list[SoftTokens]:
    """A model's soft tokens, the oldest first."""
    return [each for each in getattr(model, NAME, ()) if isinstance(each, SoftTokens)]


def add(model: nn.Module, tokens: SoftTokens) -> None:
    """Puts soft tokens into a model; they stand before those that are there already."""
    if not hasattr(model, NAME):
        model.add_module(NAME, nn.ModuleList())
    model.get_submodule(NAME).append(tokens)  # type: ignore[operator]


def next_id(model: nn.Module) -> int:
    """The first id beyond the vocabulary, and beyond the soft tokens that there are."""
    vocabulary: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return vocabulary + sum(each.count for each in all_of(model))


def count(model: nn.Module) -> int:
    """How many soft tokens go into every sequence."""
    return sum(each.count for each in all_of(model) if each.active)


def placed(model: nn.Module, seqs: Sequences) -> Sequences:
    """The sequences with the model's soft tokens in them. Their trained tokens are the same, in the same order."""
    active = [each for each in all_of(model) if each.active]
    if not active:
        return seqs
    marks, edges = seqs.train.tolist(), seqs.starts.tolist()
    rows = [(row, marks[start:stop]) for row, (start, stop) in zip(seqs.rows(), pairwise(edges), strict=True)]
    for each in active:
        rows = [each.put_into(*row) for row in rows]
    return replace(Sequences.of(rows), weight=seqs.weight)


def placed_prompt(model: nn.Module, tokens: Sequence[int]) -> Sequence[int]:
    """`placed` of one prompt."""
    for each in all_of(model):
        if each.active:
            tokens, _ = each.put_into(tokens, [False] * len(tokens))
    return tokens


def refuse_prefixes(model: nn.Module) -> None:
    """Raises ModelError where a prefix would be passed over: attention that is the model's own does not ask for its keys."""
    if any(isinstance(each, PrefixTokens) and each.active for each in all_of(model)):
        raise ModelError("a prefix needs layout: tree, and this model has layout: padded; take tuner prompt")


@dataclass(frozen=True)
class Given:
    """Keys and values that some tokens of a row have in place of those that the model would compute for them."""

    rows: Int[Tensor, " n"]
    keys_and_values: Float[Tensor, "layers 2 K n d"]

    def put_into(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key and value [1, K, T, d] of a layer with the given ones in their places."""
        keys, values = self.keys_and_values[layer]
        return (
            key.index_copy(2, self.rows, keys[None].to(key.dtype)),
            value.index_copy(2, self.rows, values[None].to(value.dtype)),
        )


def embedded(model: nn.Module, tokens: Int[Tensor, "R T"]) -> Float[Tensor, "R T D"] | None:
    """The embeddings of rows that have soft tokens in them; None where there are none."""
    softs = all_of(model)
    table = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = table.weight.shape[0]
    if not softs or not bool((tokens >= vocabulary).any()):
        return None
    found: Tensor = table(tokens.clamp(max=vocabulary - 1))
    learned = torch.cat([each.vectors(found.shape[-1]) for each in softs]).to(found.dtype)
    rows, columns = (tokens >= vocabulary).nonzero(as_tuple=True)
    return found.index_put((rows, columns), learned.index_select(0, tokens[rows, columns] - vocabulary))


def given(model: nn.Module, tokens: Int[Tensor, " T"]) -> Given | None:
    """The keys and values that the prefixes of a model give to tokens of a flat row; None where it has none in it."""
    found = []
    for each in all_of(model):
        learned = each.keys_and_values()
        if learned is not None:
            rows = ((tokens >= each.first) & (tokens < each.first + each.count)).nonzero()[:, 0]
            found.append(Given(rows, learned.index_select(3, tokens[rows] - each.first)))
    if not sum(len(each.rows) for each in found):
        return None
    return Given(torch.cat([each.rows for each in found]), torch.cat([each.keys_and_values for each in found], 3))

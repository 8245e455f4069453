"""A fine-tuned model as its difference from a base model: one sign a weight and one scale a matrix; arXiv 2402.10193.

Each matrix of the blocks has a small module hung onto its layer, which adds scale * S x to what the layer gives; the base's
weights stay what they are. What else differs (embeddings, head, norms, biases) is held whole, in 16 bits, and stands in the place
of the base's while the difference is active. A model may hold several differences, of which one or none is active.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models.linears import below_head, matrix_of, put
from posttrain.models.products import product, wide

NAME = "delta"  # of the submodule that a layer has
WORD = 32  # signs an int32
AT_A_TIME = {"cpu": 1 << 20, "cuda": 1 << 24}  # signs that are unpacked at a time


def packed(signs: Float[Tensor, "O I"]) -> Int[Tensor, "O words"]:
    """Of each number one bit, 1 where it is not negative: bit k of word w is that of input 32 w + k. Bits beyond them are 0."""
    bits = nn.functional.pad((signs >= 0).int(), (0, -signs.shape[1] % WORD)).unflatten(1, (-1, WORD))
    places = torch.arange(WORD, dtype=torch.int32, device=signs.device)
    return (bits << places).sum(-1, dtype=torch.int32)


def unpacked(words: Int[Tensor, "O words"], inputs: int, dtype: torch.dtype) -> Float[Tensor, "O I"]:
    """1 for each bit that is set, -1 for the others. Read a byte at a time, from a table of what each byte stands for."""
    return nn.functional.embedding(words.view(torch.uint8).int(), _of_bytes(words.device, dtype)).flatten(1)[:, :inputs]


@cache
def _of_bytes(device: torch.device, dtype: torch.dtype) -> Float[Tensor, "256 8"]:
    """What each byte stands for."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (2 * bits - 1).to(dtype)


class _Signed(torch.autograd.Function):
    """scale * rows S^T. Signs are unpacked here and again in the backward, a part of the matrix at a time, and never kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, words: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(rows, words, scale)
        found = rows.new_empty(len(rows), len(words))
        for part, signs in _parts(words, rows):
            found[:, part] = product(rows, signs)
        return found.mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (rows, words, scale) = grads, ctx.saved_tensors
        back = torch.zeros_like(rows, dtype=wide(rows[:0]).dtype)
        for part, signs in _parts(words, rows):
            back += product(grad[:, part], signs.t())
        of_scale = (rows * back).sum().to(scale.dtype)  # sum (S x) dy = sum x (S^T dy), and the second is there already
        return (back * scale).to(rows.dtype) if ctx.needs_input_grad[0] else None, None, of_scale


def _parts(words: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(which outputs, their signs [outputs, I] as numbers of the rows' kind)."""
    inputs = rows.shape[1]
    step = max(1, AT_A_TIME.get(rows.device.type, AT_A_TIME["cuda"]) // inputs)
    for start in range(0, len(words), step):
        part = slice(start, start + step)
        yield part, unpacked(words[part], inputs, rows.dtype)


class Part(nn.Module):
    """What one matrix [O, I] of a fine-tuned model has beyond the base's. `scale`, one number, can be trained."""

    scale: nn.Parameter
    stored: tuple[str, ...]
    """The names of the tensors that a file holds."""
    handle: Any = None  # of the hook while it hangs on a layer

    def forward(self, states: Float[Tensor, "*n I"]) -> Float[Tensor, "*n O"]:
        raise NotImplementedError

    def dense(self) -> Float[Tensor, "O I"]:
        """The matrix itself, float32 or wider."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).detach() for name in self.stored}


class Signs(Part):
    """scale * S x, S of -1 and 1."""

    stored = ("scale", "signs")

    def __init__(self, signs: Int[Tensor, "O words"], scale: Float[Tensor, ""], inputs: int) -> None:
        super().__init__()
        self.register_buffer("signs", signs)
        self.scale, self.inputs = nn.Parameter(scale, requires_grad=False), inputs
        self.signs: Tensor

    @classmethod
    def of(cls, difference: Float[Tensor, "O I"]) -> "Signs":
        """The nearest such matrix: the mean of |difference| is the best scale. A sign of 0 is 1, as in the published code."""
        scale = difference.abs().sum(dtype=torch.float64) / difference.numel()
        return cls(packed(difference), scale.to(difference.dtype), difference.shape[1])

    @classmethod
    def shapes(cls, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        return {"scale": (), "signs": (outputs, -(-inputs // WORD))}

    def forward(self, states: Float[Tensor, "*n I"]) -> Float[Tensor, "*n O"]:
        rows = states.reshape(-1, self.inputs)
        return _Signed.apply(rows, self.signs, self.scale).reshape(*states.shape[:-1], -1)

    def dense(self) -> Float[Tensor, "O I"]:
        return self.scale.detach() * unpacked(self.signs, self.inputs, self.scale.dtype)


class LowRank(Part):
    """scale * U V x: what the same bits give when they are spent on the largest directions instead. U and V are in 16 bits."""

    stored = ("scale", "up", "down")

    def __init__(self, up: Float[Tensor, "O r"], down: Float[Tensor, "r I"], scale: Float[Tensor, ""]) -> None:
        super().__init__()
        self.register_buffer("up", up)
        self.register_buffer("down", down)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.up: Tensor
        self.down: Tensor

    @classmethod
    def of(cls, difference: Float[Tensor, "O I"], rank: int | None = None) -> "LowRank":
        """The nearest matrix of a rank, by default of the largest that takes no more bits than signs (at least 1)."""
        outputs, inputs = difference.shape
        rank = min(rank or max(1, outputs * inputs // (16 * (outputs + inputs))), outputs, inputs)
        left, sizes, right = torch.linalg.svd(difference, full_matrices=False)
        root = sizes[:rank].sqrt()
        up, down = in_16_bits(left[:, :rank] * root), in_16_bits(root[:, None] * right[:rank])
        return cls(up.contiguous(), down.contiguous(), difference.new_ones(()))

    def forward(self, states: Float[Tensor, "*n I"]) -> Float[Tensor, "*n O"]:
        inner = nn.functional.linear(states, self.down.to(states.dtype))
        return self.scale.to(states.dtype) * nn.functional.linear(inner, self.up.to(states.dtype))

    def dense(self) -> Float[Tensor, "O I"]:
        kind = self.scale.dtype
        return self.scale.detach() * (self.up.to(kind) @ self.down.to(kind))


def in_16_bits(values: Tensor) -> Tensor:
    """float16, which keeps three more digits (binary) than bfloat16; that only where a value is too large for it."""
    large = values.numel() > 0 and bool(values.abs().max() > torch.finfo(torch.float16).max)
    return values.to(torch.bfloat16 if large else torch.float16)


@dataclass(frozen=True)
class Delta:
    """A model's difference from a base: of its matrices by path, and whole parameters that differ otherwise, by name."""

    parts: dict[str, Part]
    whole: dict[str, Tensor]

    @classmethod
    def between(cls, base: PreTrainedModel, fine: PreTrainedModel, form: Callable[[Tensor], Part] = Signs.of) -> "Delta":
        """form: what stands for a difference [O, I], which it is given in float32 or wider. Raises ModelError for models of
        other shapes."""
        ours, theirs = parameters(base), parameters(fine)
        for name in sorted(set(ours) ^ set(theirs)):
            one, other = ("base", "fine-tuned model") if name in ours else ("fine-tuned model", "base")
            raise ModelError(f"the {one} has {name}, which the {other} lacks: it was made from another base")
        for name, value in ours.items():
            if theirs[name].shape != value.shape:
                raise ModelError(
                    f"{name} is {tuple(theirs[name].shape)} in the fine-tuned model and {tuple(value.shape)} in the base: it was "
                    "made from another base"
                )
        layers, made = below_head(base), below_head(fine)
        with torch.no_grad():
            parts = {path: form(difference(layers[path], made[path])) for path in layers}
            whole = {}
            for name, old in ours.items():
                new = theirs[name].detach().to(old.device)
                if name.removesuffix(".weight") not in layers and not torch.equal(old.to(new.dtype), new):
                    whole[name] = in_16_bits(new)
        return cls(parts, whole)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], base: PreTrainedModel) -> "Delta":
        """What `tensors` gave, for a base of the same shapes. Raises ModelError where it does not fit."""
        left, parts = dict(tensors), {}
        for path, layer in below_head(base).items():
            given = {name: left.pop(f"{path}.{NAME}.{name}", None) for name in ("scale", "signs", "up", "down")}
            here = {name: each.to(matrix_of(layer).device) for name, each in given.items() if each is not None}
            if not here:
                raise ModelError(f"the delta lacks {path}: it was made for another base, or its file is not whole")
            try:
                outputs, inputs = matrix_of(layer).shape
                parts[path] = _part(here, outputs, inputs, wide(matrix_of(layer)[:0]).dtype)
            except ModelError as error:
                raise ModelError(f"{path}: {error}") from None
        own = parameters(base)
        for name, value in left.items():
            if name not in own or name.removesuffix(".weight") in parts:
                raise ModelError(f"the delta holds {name}, which this base has no place for: it was made for another one")
            if value.shape != own[name].shape:
                shapes = f"{tuple(value.shape)} in the delta and {tuple(own[name].shape)} in the base"
                raise ModelError(f"{name} is {shapes}: it was made for another one")
        return cls(parts, left)

    @property
    def scales(self) -> dict[str, nn.Parameter]:
        """By the names that they have in the model while the difference is active."""
        return {f"{path}.{NAME}.scale": part.scale for path, part in self.parts.items()}

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds, by name; not copies."""
        found = {f"{path}.{NAME}.{name}": each for path, part in self.parts.items() for name, each in part.tensors().items()}
        return found | self.whole


def _part(given: Mapping[str, Tensor], outputs: int, inputs: int, kind: torch.dtype) -> Part:
    """From its tensors, for a matrix [outputs, inputs]. Raises ModelError where they are not those of one."""
    if set(given) == set(Signs.stored):
        fits = {name: tuple(each.shape) for name, each in given.items()} == Signs.shapes(outputs, inputs)
        if fits and given["signs"].dtype == torch.int32:
            return Signs(given["signs"], given["scale"].to(kind), inputs)
    elif set(given) == set(LowRank.stored):
        up, down = given["up"], given["down"]
        rank = up.shape[-1] if up.ndim else 0
        if (given["scale"].shape, up.shape, down.shape) == ((), (outputs, rank), (rank, inputs)):
            return LowRank(up, down, given["scale"].to(kind))
    else:
        raise ModelError(f"the delta holds {', '.join(sorted(given))} of it, which is no known form: its file is not whole")
    raise ModelError(f"is {outputs} x {inputs} in this base, and of another shape in the delta: it was made for another one")


def parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """A model's parameters, tied ones once; without scales of differences, and without a score head, which is trained beside any
    tuner and kept with it."""
    own = ((name.replace(".base_layer.", "."), each) for name, each in model.named_parameters())
    return {name: each for name, each in own if f".{NAME}." not in name and name != "score.weight"}


def difference(layer: nn.Module, fine: nn.Module) -> Float[Tensor, "O I"]:
    """What a fine-tuned layer's matrix has beyond another's, float32 or wider, on the other's device."""
    matrix = wide(matrix_of(layer))
    return wide(matrix_of(fine)).to(matrix.device) - matrix


# ---- in a model


@dataclass
class Held:
    """The differences that a model has, which of them is active, and of the base what that has taken the place of."""

    deltas: dict[str, Delta] = field(default_factory=dict)
    active: str | None = None
    base: dict[str, Tensor] = field(default_factory=dict)


def held(model: nn.Module) -> Held:
    """A model's own: a copied model has copies."""
    if "deltas" not in vars(model):
        vars(model)["deltas"] = Held()
    found: Held = vars(model)["deltas"]
    return found


def active(model: nn.Module) -> Delta | None:
    """The difference that the model computes with."""
    now = held(model)
    return None if now.active is None else now.deltas[now.active]


def add(model: PreTrainedModel, delta: Delta, name: str) -> None:
    """Gives a model one more difference from it, not yet active. Raises ModelError for a name that is taken."""
    if name in held(model).deltas:
        raise ModelError(f"this model has a delta {name!r} already; give the other one another name")
    held(model).deltas[name] = delta


def switch(model: PreTrainedModel, name: str | None) -> None:
    """From here on the model is the base with the named difference, and with no other; None: the base itself, bit for bit.

    No graph that reads its weights may be waiting for its backward.
    """
    now = held(model)
    if name is not None and name not in now.deltas:
        raise ModelError(f"this model has no delta {name!r}; it has {', '.join(now.deltas) or 'none'}")
    own = parameters(model)
    if (before := active(model)) is not None:
        for path, part in before.parts.items():
            part.handle.remove()
            part.handle = None
            delattr(_host(model, path), NAME)
        for key, value in now.base.items():
            own[key].data = value
        now.base = {}
    now.active = name
    if (delta := active(model)) is not None:
        for path, part in delta.parts.items():
            host = _host(model, path)
            host.add_module(NAME, part)
            part.handle = host.register_forward_hook(_with_delta, prepend=True)  # before adapters, which read what it gives
        for key, value in delta.whole.items():
            now.base[key], own[key].data = own[key].data, value.to(own[key].device, own[key].dtype, copy=True)


def _host(model: PreTrainedModel, path: str) -> Any:
    """The layer at a path, or that which one of peft's stands for."""
    layer = model.get_submodule(path)
    return getattr(layer, "base_layer", layer)


def _with_delta(host: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    part = host.get_submodule(NAME)
    found: Tensor = part(inputs[0].to(output.dtype))
    return output + found


@contextmanager
def switched(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Within it another difference is active, or none."""
    before = held(model).active
    switch(model, name)
    try:
        yield
    finally:
        switch(model, before)


def merge(model: PreTrainedModel) -> None:
    """Folds the active difference into the model's own weights, for good; rounded once, from float32. Others are let go of."""
    delta = active(model)
    assert delta is not None, "there is nothing to fold in"
    own = parameters(model)
    whole = {name: own[name].data for name in delta.whole}
    switch(model, None)
    with torch.no_grad():
        for path, part in delta.parts.items():
            layer = _host(model, path)
            matrix = matrix_of(layer)
            put(layer, (wide(matrix) + part.dense()).to(matrix.dtype))
        for name, value in whole.items():
            own[name].data = value
    del vars(model)["deltas"]

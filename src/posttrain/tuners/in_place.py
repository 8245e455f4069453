"""Tuners that move some of the model's own weights: a part of its layers, its head, its biases."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, PositiveInt, model_validator

from posttrain.component import did_you_mean
from posttrain.errors import RecipeError
from posttrain.tuners.injected import layers_of
from posttrain.tuners.places import BLOCK, linears
from posttrain.tuners.tuner import Tuner, tuned
from posttrain.tuners.zeros import hold_zeros, put_back

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class Full(Tuner, kind="full"):
    """Every parameter moves, but those of a multimodal model's towers, which text does not reach."""

    stores = False
    keep_zeros: bool = False
    """Weights of the blocks' linear layers that are 0 at the start stay 0: for a pruned model (docs/compress.md)."""

    @property
    def changes_weights(self) -> bool:
        return True

    def install(self, model: "PreTrainedModel") -> None:
        from posttrain.models.senses import of_text

        reads = of_text(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(reads(name))
        if self.keep_zeros:
            hold_zeros(model)

    def stepped(self, parameters: "Mapping[str, nn.Parameter]") -> None:
        put_back(parameters)

    def merge(self, model: "PreTrainedModel") -> None:
        """Nothing to fold: the weights are the model's own."""


class InPlace(Tuner):
    """Moves weights of the model's own, and nothing else."""

    def merge(self, model: "PreTrainedModel") -> None:
        """Nothing to fold: the weights are the model's own."""

    def state(self, model: "PreTrainedModel") -> "dict[str, Tensor]":
        from posttrain.models.heads import head_parameters

        kept = head_parameters(model)  # under any tuner
        return {name: each.detach() for name, each in tuned(model).items() if name not in kept}


def own_parameters(model: "PreTrainedModel") -> "dict[str, nn.Parameter]":
    """The parameters that text can move, without those of adapters that stand frozen below a tuner."""
    from posttrain.models import delta, soft
    from posttrain.models.senses import of_text
    from posttrain.tuners.bottleneck import bottlenecks

    added = [each for part in (*soft.all_of(model), *bottlenecks(model).values()) for each in part.parameters()]
    below = delta.active(model)
    added += [] if below is None else below.scales.values()
    for layer in layers_of(model).values():
        added += [each for name, each in layer.named_parameters() if not name.startswith("base_layer.")]
    foreign, reads = {id(each) for each in added}, of_text(model)
    return {name: each for name, each in model.named_parameters() if id(each) not in foreign and reads(name)}


class Layers(InPlace, kind="layers"):
    """Some of the model's own layers move, by depth or by name; the rest stays frozen.

    Blocks may learn the more slowly the deeper they lie, and be unfrozen one after another from the top; arXiv 1801.06146.
    """

    last: PositiveInt | None = None
    """The last so many blocks, and what stands above them. By default all."""
    train: list[str] = Field(default=["*"], min_length=1)
    """Of those, the parameters whose names match one of these patterns, such as `*.self_attn.*`."""
    freeze: list[str] = Field(default=[])
    """And match none of these, such as `*embed_tokens*`."""
    rate_decay: float = Field(default=1.0, gt=0, le=1)
    """A block's learning rate, as a share of that of the block above it; 0.95 is usual. Embeddings are the lowest block."""
    unfreeze: float = Field(default=0.0, ge=0, lt=1)
    """The share of the run over which blocks begin to move, one after another from the top; 0 moves all from the start."""

    keep_zeros: bool = False
    """Weights of the blocks' linear layers that are 0 at the start stay 0: for a pruned model (docs/compress.md)."""

    @model_validator(mode="after")
    def _chooses(self) -> Self:
        if (self.last, self.train, self.freeze, self.rate_decay, self.unfreeze) == (None, ["*"], [], 1.0, 0.0):
            raise ValueError("moves every layer, as it is set: give last, train or freeze, or take tuner full")
        return self

    @property
    def changes_weights(self) -> bool:
        return True

    def install(self, model: "PreTrainedModel") -> None:
        names = list(own_parameters(model))
        for field, patterns in (("train", self.train), ("freeze", self.freeze)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    tied = model.get_output_embeddings() is not None and fnmatchcase("lm_head.weight", pattern)
                    hint = "; the head shares its weights with the embeddings" if tied else did_you_mean(pattern, names)
                    raise RecipeError(f"tuner.{field}: no parameter matches {pattern!r}{hint}")
        heights, blocks = _heights(names)
        if self.last is not None and self.last > blocks:
            raise RecipeError(f"tuner.last: {self.last}: {type(model).__name__} has {blocks} blocks")
        lowest = 0 if self.last is None else blocks - self.last + 1
        chosen = {
            name
            for name in names
            if heights[name] >= lowest
            and any(fnmatchcase(name, pattern) for pattern in self.train)
            and not any(fnmatchcase(name, pattern) for pattern in self.freeze)
        }
        if not chosen:
            raise RecipeError("tuner: last, train and freeze together leave nothing to move")
        model.requires_grad_(False)
        for name, parameter in own_parameters(model).items():
            parameter.requires_grad_(name in chosen)
        if self.keep_zeros:
            hold_zeros(model)

    def stepped(self, parameters: "Mapping[str, nn.Parameter]") -> None:
        put_back(parameters)

    def paces(self, names: "list[str]") -> dict[str, tuple[float, float]]:
        heights, _ = _heights(names)
        top, bottom = max(heights.values()), min(heights.values())
        steps = max(1, top - bottom)
        return {
            name: (self.rate_decay ** (top - height), self.unfreeze * (top - height) / steps) for name, height in heights.items()
        }


def _heights(names: list[str]) -> tuple[dict[str, int], int]:
    """({name: 0 for embeddings, 1 for the first block, ..., blocks + 1 above the last}, the number of blocks)."""
    numbers = {name: int(found[1]) for name in names if (found := BLOCK.search(name))}
    blocks = max(numbers.values(), default=-1) + 1
    below = {name for name in names if name not in numbers and ("embed" in name or "wte" in name or "wpe" in name)}
    return {name: numbers[name] + 1 if name in numbers else 0 if name in below else blocks + 1 for name in names}, blocks


class Head(InPlace, kind="head"):
    """The output head alone moves: a linear probe of what the model knows already."""

    learning_rates = (1e-4, 1e-3, 1e-1)
    untie: bool = False
    """Give the vocabulary head weights of its own where it shares those of the embeddings."""

    def install(self, model: "PreTrainedModel") -> None:
        from torch import nn

        head = model.get_output_embeddings()
        model.requires_grad_(False)
        if head is None:  # a model that scores: its head is trained under every tuner
            return
        if head.weight is model.get_input_embeddings().weight:
            if not self.untie:
                raise RecipeError(
                    "tuner head: the vocabulary head shares its weights with the embeddings, which would move too; set "
                    "untie: true, or take tuner layers"
                )
            head.weight = nn.Parameter(head.weight.detach().clone())
            model.config.get_text_config().tie_word_embeddings = False
            model.config.tie_word_embeddings = False
        head.requires_grad_(True)


class BitFit(InPlace, kind="bitfit"):
    """Biases alone move, those of normalisations among them; arXiv 2106.10199. Most recent models have none: see `add`."""

    learning_rates = (1e-4, 1e-3, 1e-2)
    add: bool = False
    """Begin with zeros where a linear layer has no bias and the architecture knows one (Llama; Qwen 3 and Gemma in attention)."""

    def install(self, model: "PreTrainedModel") -> None:
        model.requires_grad_(False)
        if self.add:
            self._add(model)
        biases = {name: each for name, each in own_parameters(model).items() if name.endswith("bias")}
        if not biases:
            raise RecipeError(
                f"tuner bitfit: {type(model).__name__} has no biases; set add: true where the architecture knows them, "
                "or take another tuner, such as ia3"
            )
        for parameter in biases.values():
            parameter.requires_grad_(True)

    def _add(self, model: "PreTrainedModel") -> None:
        import torch
        from torch import nn

        config = model.config.get_text_config()
        switches = {switch for switch in ("attention_bias", "mlp_bias") if hasattr(config, switch)}
        if not switches and not any(name.endswith("bias") for name, _ in model.named_parameters()):
            raise RecipeError(f"tuner bitfit: add: {type(model).__name__} knows no further biases, and could not be loaded again")
        for switch in switches:
            setattr(config, switch, True)
        with torch.device("meta"):  # where the architecture has them, and nowhere else: it must find them in its file
            known = {name for name, _ in type(model)(model.config).named_parameters()}
        for path, layer in linears(model).items():
            host: Any = getattr(layer, "base_layer", layer)
            if isinstance(host, nn.Linear) and host.bias is None and f"{path}.bias" in known:
                host.bias = nn.Parameter(torch.zeros(host.out_features, dtype=host.weight.dtype, device=host.weight.device))

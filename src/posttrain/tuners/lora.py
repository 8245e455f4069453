"""LoRA: low-rank updates of linear layers; parameters and file format are peft's."""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from posttrain.component import did_you_mean
from posttrain.errors import RecipeError
from posttrain.tuners.injected import ADAPTER, Injected, layers_of, refuse_dora, task_of
from posttrain.tuners.places import linears
from posttrain.tuners.tuner import in_dtype_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig
    from torch import Tensor
    from transformers import PreTrainedModel

    from posttrain.batch import Sequences
    from posttrain.models.backbone import Backbone
    from posttrain.models.source import ModelSource

BEGINNINGS: dict[str, Any] = {
    "kaiming": True, "gaussian": "gaussian", "orthogonal": "orthogonal", "olora": "olora", "pissa": "pissa",
    "eva": True,  # until `begin`
}  # fmt: skip

OF_WEIGHTS = frozenset({"pissa", "olora", "orthogonal"})  # these ask for a layer's weights as they begin


class LoRA(Injected, kind="lora"):
    """y = W x + (alpha / rank) B A x with W frozen, B = 0 at the start. arXiv 2106.09685. rank x (inputs + outputs) parameters.

    peft's layers and files. Dropout is 0, so that ratios and references are exact. Learning rates are about 10 times those of
    full fine-tuning (1e-4 to 5e-4).
    """

    peft_type = "LORA"
    learning_rates = (1e-5, 2e-4, 2e-3)
    rank: PositiveInt = 16
    """r, the rank of the update."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(default="all-linear")
    """Names of linear layers (the last part, such as q_proj), or all of them but the vocabulary head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank): arXiv 2312.03732."""
    dora: bool = False
    """Learn the length of each row of the weights apart from its direction, which the update turns: arXiv 2402.09353."""
    init: Literal["kaiming", "gaussian", "orthogonal", "eva", "olora", "pissa"] = "kaiming"
    """How A begins (B with 0, but for orthogonal, where B A = 0). eva: with the directions in which a layer's inputs vary most on
    the stage's own rows; layers get from 1 to 2 x rank of them, rank on average (arXiv 2410.07170). pissa, olora: A and B with
    the weights' own largest directions (2404.02948, 2406.01775), which are taken out of the frozen part; the file is then a LoRA
    of twice the rank on the weights as they were."""
    b_rate: PositiveFloat = 1.0
    """B learns so many times as fast as A: LoRA+ takes 16 (arXiv 2402.12354)."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.dora and self.changes_weights:
            raise ValueError(f"dora keeps the lengths of the weights, and init: {self.init} changes the weights; take one")
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"init: orthogonal shares the rank out in two halves, and {self.rank} is odd; take an even rank")
        return self

    def check(self, model: "ModelSource") -> None:
        if model.dtype == "bfloat16" and self.init in OF_WEIGHTS:
            raise RecipeError(
                f"tuner.init: {self.init} begins with a change of the weights and takes it out again, for which bfloat16 has too "
                "few digits; set model.dtype: mixed, or init: kaiming"
            )
        if model.dtype == "float64" and self.changes_weights:
            raise RecipeError(f"tuner.init: peft makes {self.init} in float32 alone; set model.dtype: float32, or init: kaiming")

    @property
    def changes_weights(self) -> bool:
        return self.init in {"pissa", "olora"}

    @property
    def reversible(self) -> bool:
        return not self.changes_weights

    @property
    def reads_rows(self) -> bool:
        return self.init == "eva"

    def config(self, model: "PreTrainedModel") -> "LoraConfig":
        from peft import LoraConfig

        from posttrain.models.heads import head_parts
        from posttrain.models.senses import beyond_text
        from posttrain.tuners.low_rank import take_for

        self._check_targets(model)
        elsewhere = [rf"{re.escape(path)}(\..*)?" for path in (*beyond_text(model), *head_parts(model))]
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=self.targets, use_rslora=self.rslora, use_dora=self.dora,
            init_lora_weights=BEGINNINGS[self.init], task_type=task_of(model),
            exclude_modules="|".join(elsewhere) or None,
        )  # fmt: skip
        take_for(config)
        return config

    def install(self, model: "PreTrainedModel") -> None:
        from posttrain.models.linears import stacked

        if self.dora:
            refuse_dora(model)
        if self.init in OF_WEIGHTS and self.targets == "all-linear" and stacked(model):
            raise RecipeError(
                f"tuner.init: {self.init} begins with the weights of a layer, and a mixture's experts are in none; "
                "take init: kaiming, or name the layers of attention in `targets`"
            )
        super().install(model)
        if self.changes_weights:
            self._refuse_narrow(model)
            model.lora_before = {name: each.clone() for name, each in super().state(model).items()}

    def _refuse_narrow(self, model: "PreTrainedModel") -> None:
        """Raises RecipeError where a layer has fewer directions than it should begin with."""
        for path, layer in self._own_layers(model).items():
            if self.rank > (most := min(layer.in_features, layer.out_features)):
                raise RecipeError(
                    f"tuner.rank: {self.rank} is more than the {most} directions of {path}, with which init: {self.init} begins; "
                    f"take a rank of at most {most}, or init: kaiming"
                )

    def observe(self, lm: "Backbone", rows: "Sequences") -> "dict[str, Tensor]":
        """{layer: A as it begins, [its rank, inputs]}"""
        from posttrain.tuners.eva import directions

        return directions(lm, rows, self._own_layers(lm.model), self.rank)

    def begin(self, model: "PreTrainedModel", found: "Mapping[str, Tensor]") -> None:
        """A and B of the ranks that were found. Every layer's update is scaled as the recipe says, whatever its rank.

        A layer that no row has reached (an expert) stays as it is.
        """
        from torch import nn

        config: Any = model.peft_config[ADAPTER]
        layers = self._own_layers(model)
        for path, directions in found.items():
            layer, rank = layers[path], len(directions)
            a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            a.weight = nn.Parameter(directions.to(a.weight.device, in_dtype_of(model)))
            b.weight = nn.Parameter(a.weight.new_zeros(b.out_features, rank))
            layer.r[ADAPTER] = a.out_features = b.in_features = rank
            if rank != self.rank:
                share = rank / self.rank
                config.rank_pattern[path] = rank
                config.alpha_pattern[path] = self.alpha * (math.sqrt(share) if self.rslora else share)

    def _own_layers(self, model: "PreTrainedModel") -> dict[str, Any]:
        """Those that this tuner stands in, by path."""
        layers: dict[str, Any] = dict(layers_of(model))
        return {path: each for path, each in layers.items() if ADAPTER in getattr(each, "lora_A", {})}

    def _check_targets(self, model: "PreTrainedModel") -> None:
        """Raises RecipeError where a target names no linear layer of this model, or one that must not be."""
        from posttrain.models.heads import head_parts

        if self.targets == "all-linear":
            return
        head = model.get_output_embeddings()
        above = {path for part in head_parts(model) for path in linears(model) if path == part or path.startswith(f"{part}.")}
        if head is not None and head.weight is model.get_input_embeddings().weight:
            tied = next(path.rpartition(".")[2] for path, module in model.named_modules() if module is head)
            if tied in self.targets:
                raise RecipeError(
                    f"tuner.targets: {tied} shares its weights with the embeddings, so merging would change both; leave it out"
                )
        inside = linears(model).keys() - above
        names, heads = ({path.rpartition(".")[2] for path in paths} for paths in (inside, above))
        for target in self.targets:
            if target in heads - names:
                raise RecipeError(f"tuner.targets: {target} is trained in full beside any tuner; leave it out")
            if target not in names:
                raise RecipeError(f"tuner.targets: no linear layer is called {target!r}{did_you_mean(target, names)}")

    def paces(self, names: list[str]) -> dict[str, tuple[float, float]]:
        return {} if self.b_rate == 1 else {name: (self.b_rate, 0.0) for name in names if ".lora_B." in name}

    def state(self, model: "PreTrainedModel") -> "dict[str, Tensor]":
        """Where the beginning was taken out of the weights, the difference from it: (A, A0) and (B, -B0)."""
        import torch

        found = super().state(model)
        if not self.changes_weights:
            return found
        before = model.lora_before
        return {
            name: torch.cat([each, before[name]]) if ".lora_A." in name else torch.cat([each, -before[name]], 1)
            for name, each in found.items()
        }

    def peft_config(self, model: "PreTrainedModel") -> "PeftConfig":
        """With what the file holds: where the beginning was taken out of the weights, a LoRA of twice the rank."""
        from copy import copy

        config: Any = copy(super().peft_config(model))
        config.target_modules = sorted(config.target_modules)  # a set has another order in every process
        if self.changes_weights:
            config.r, config.init_lora_weights = 2 * self.rank, True
            config.lora_alpha = self.alpha * (math.sqrt(2) if self.rslora else 2)
        return config

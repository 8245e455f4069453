"""Several LoRAs of one model merged as one: by weight, TIES or DARE."""

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from posttrain.errors import InputError, ModelError
from posttrain.models.source import PEFT, ModelSource, about_adapter
from posttrain.tuners.below import folder_of, kind_of, refuse_unfoldable
from posttrain.tuners.lora import LoRA

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from posttrain.models.load import Loaded

Method = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class Mix:
    """Several LoRAs of one model, as one. D_i = scale_i B_i A_i is what adapter i adds to a layer's weights.

    linear: sum of w_i D_i. ties (arXiv 2306.01708), dare_linear, dare_ties (2311.03099) and magnitude_prune: as peft computes
    them of the D_i, of each of which a share `density` is kept: the largest, or with dare any, drawn and scaled up.
    """

    sources: Sequence[ModelSource]
    weights: Sequence[float]
    method: Method = "linear"
    density: float | None = None
    seed: int = 0

    def check_settings(self) -> None:
        """Raises InputError for settings that do not go together."""
        if len(self.weights) != len(self.sources):
            given = ", ".join(f"{each:g}" for each in self.weights)
            raise InputError(f"weights {given}: give one for each of the {len(self.sources)} adapters, in their order")
        if odd := [each for each in self.weights if not math.isfinite(each)]:
            raise InputError(f"weights: {odd[0]}: is no finite number")
        if self.method != "linear" and self.density is None:
            raise InputError(f"method {self.method} keeps a share of each update: give density, such as 0.5")
        if self.method == "linear" and self.density is not None:
            raise InputError(
                "density is the share of each update that is kept, and linear keeps all: remove it, or name a method"
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise InputError(f"density {self.density}: the share of each update that is kept is above 0, and at most 1")

    def check(self) -> None:
        """Raises InputError, from files alone, for adapters or settings of which no one adapter can be made."""
        self.check_settings()
        for source in self.sources:
            _refuse_no_sum(source)
        below = {source.path: source.below() for source in self.sources}
        bases = {each.weights(): path for path, each in below.items() if each is not None}
        if len(bases) > 1:
            one, other = list(bases.values())[:2]
            raise ModelError(
                f"{one} and {other} stand on different models, and an update means nothing on another's weights; where one was "
                "only moved or renamed, name the model with `base`"
            )
        if len({(each.is_quantized(), each.quantize, each.double) for each in below.values() if each is not None}) > 1:
            raise ModelError(
                "some of these adapters were learned on quantised weights and some on those before: merge the former with "
                "--dequantize or --base first, one by one"
            )
        if self.below.is_quantized() and self.below.below() is not None:
            raise ModelError(
                f"{self.below.path}: these adapters stand on one that stands on quantised weights; merge that one first, and "
                "name the result with `base`"
            )

    def load(self, codes: bool = True) -> "Loaded":
        """The model with all adapters in it, side by side; `codes` as for `tuners.load.load`."""
        from posttrain.models.load import Loaded
        from posttrain.tuners.folder import inject, read, refuse_other_base
        from posttrain.tuners.load import load, tokenizer_of

        self.check()
        below = self.below
        found = load(below, codes=codes)
        for name, source in zip(self.names, self.sources, strict=True):
            refuse_other_base(about_adapter(folder_of(source)), folder_of(source), below)
            inject(found.lm.model, folder_of(source), read(folder_of(source)), name)
        found.lm.model.requires_grad_(False)
        tokenizers = [tokenizer_of(source, found.tokenizer) for source in self.sources]
        if len({str(each.chat_template) for each in tokenizers}) > 1:
            raise ModelError("the adapters were learned with different chat templates; name the one to keep with chat_template")
        return Loaded(found.lm, tokenizers[0])

    @property
    def below(self) -> ModelSource:
        found = self.sources[0].below()
        assert found is not None
        return found

    @property
    def names(self) -> list[str]:
        return [f"mixed{index}" for index in range(len(self.sources))]

    @contextmanager
    def summed(self, model: "PreTrainedModel") -> Iterator[None]:
        """Within it the loaded model computes with the sum of w_i D_i, none of it folded in."""
        from posttrain.tuners.injected import activate, layers_of

        layers = layers_of(model).values()
        before = [dict(layer.scaling) for layer in layers]
        for layer in layers:
            layer.scaling.update({name: scale * self._weight(name) for name, scale in layer.scaling.items()})
        activate(model)
        yield
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)

    def _weight(self, name: str) -> float:
        return self.weights[self.names.index(name)]

    def update(self, path: str, layer: Any) -> "Tensor":
        """What all adapters together add to the weights of a layer."""
        from posttrain import draws  # and numpy with it

        held = [name for name in self.names if name in layer.r]
        deltas = [layer.get_delta_weight(name).detach() for name in held]
        return together(
            deltas, [self._weight(name) for name in held], self.method, self.density, draws.key(self.seed, "dare", path)
        )

    def fold(self, model: "PreTrainedModel") -> None:
        """Folds them into the weights of the loaded model, rounded once: of a quantised one, those that its codes stand for."""
        import torch
        from peft.tuners.lora import ParamWrapper

        from posttrain.tuners.injected import layers_of, remove
        from posttrain.tuners.merge import as_built, dequantize

        dequantize(model)
        for path, layer in layers_of(model).items():
            weight = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
            with torch.no_grad():
                weight.copy_(weight + self.update(path, layer))
        remove(model)
        as_built(model)

    def as_lora(self, model: "PreTrainedModel", rank: int | None = None) -> tuple[LoRA, float]:
        """(the tuner of one adapter in their place, now in the model; the share of the update's square that its rank cuts off).

        rank: by default the sum of theirs, which for linear cuts nothing off.
        """
        import torch
        from peft.tuners.lora import ParamWrapper

        from posttrain.tuners.injected import ADAPTER, layers_of, remove

        if any(isinstance(layer, ParamWrapper) for layer in layers_of(model).values()):
            raise ModelError("these change the experts of a mixture, and can be merged into weights alone: ask for no adapter")
        whole = self.method == "linear" and rank is None
        rank = rank or max(sum(layer.r.values()) for layer in layers_of(model).values())
        factors, kept, total = {}, 0.0, 0.0
        for path, layer in layers_of(model).items():
            if whole:
                factors[path] = self._side_by_side(layer)
                continue
            update = self.update(path, layer).T if getattr(layer, "fan_in_fan_out", False) else self.update(path, layer)
            left, sizes, right = torch.linalg.svd(update.float(), full_matrices=False)
            factors[path] = (left[:, :rank] * sizes[:rank], right[:rank])
            kept, total = kept + float(sizes[:rank].square().sum()), total + float(sizes.square().sum())
        remove(model)
        tuner = LoRA(rank=rank, alpha=float(rank), targets=sorted({path.rpartition(".")[2] for path in factors}))
        tuner.install(model)
        with torch.no_grad():
            for path, (left, right) in factors.items():
                place: Any = model.get_submodule(path)
                place.lora_B[ADAPTER].weight[:, : left.shape[1]].copy_(left)
                place.lora_A[ADAPTER].weight[: len(right)].copy_(right)
        return tuner, 1 - kept / total if total else 0.0

    def _side_by_side(self, layer: Any) -> "tuple[Tensor, Tensor]":
        """(B, A) of rank r_1 + r_2 + ..., whose product is the weighted sum of the updates."""
        import torch


        held = [name for name in self.names if name in layer.r]
        left = [layer.lora_B[name].weight * layer.scaling[name] * self._weight(name) for name in held]
        return torch.cat(left, 1), torch.cat([layer.lora_A[name].weight for name in held])


def _refuse_no_sum(source: ModelSource) -> None:
    """Raises ModelError for what cannot be one of several."""
    from posttrain.tuners.folder import has_score

    if source.below() is None:
        raise ModelError(
            f"{source.path}: is no adapter folder, and several adapters are to be merged; name adapter folders alone"
        )
    refuse_unfoldable(source)
    if has_score(folder_of(source)):
        raise ModelError(f"{source.path}: is the adapter of a model that scores, and scores are no sum of others; merge it alone")
    if kind_of(source) != "lora":
        raise ModelError(f"{source.path}: is of tuner {kind_of(source)}, and only what lora learns adds up; merge it alone")
    file = folder_of(source) / PEFT
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if config.get("use_dora"):
        raise ModelError(f"{source.path}: is a DoRA, whose lengths of rows are no sum of others; merge it alone")
    if (begun := str(config.get("init_lora_weights")).lower()).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ModelError(
            f"{source.path}: begins in the weights of the model below ({begun}), so that its B A is no difference from them; "
            "merge it alone, or have peft write the difference (path_initial_model_for_weight_conversion)"
        )


def together(deltas: "list[Tensor]", weights: list[float], method: Method, density: float | None, seed: int = 0) -> "Tensor":
    """One update of a layer's several."""
    import torch
    from peft.utils import merge_utils

    shares = torch.tensor(weights, dtype=deltas[0].dtype, device=deltas[0].device)
    if method == "linear":
        return merge_utils.task_arithmetic(deltas, shares)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.filterwarnings("ignore", message="The density")  # that 1 keeps all is known
        torch.manual_seed(seed % 2**63)
        found: Tensor = getattr(merge_utils, method)(deltas, shares, density)
    return found

"""Tuners whose layers are peft's, put in the place of the model's linear layers."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from posttrain.errors import ModelError, RecipeError
from posttrain.tuners.tuner import Tuner, in_dtype_of, tuned

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ADAPTER = "default"
PREFIX = "base_model.model."  # of every weight in peft's files: the model inside of a PeftModel


class Injected(Tuner):
    """What the kinds share."""

    @property
    def reversible(self) -> bool:
        return True

    def config(self, model: "PreTrainedModel") -> "PeftConfig":
        """What peft makes the layers from. Raises RecipeError where the model has no layers for it."""
        raise NotImplementedError

    def install(self, model: "PreTrainedModel") -> None:
        from peft import inject_adapter_in_model

        config = self.config(model)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft corrects it by itself (GPT-2's Conv1D)
                warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern")  # nested layers of experts
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # those that stand frozen below
                inject_adapter_in_model(config, model, ADAPTER)
        except ValueError as error:
            first = str(error).splitlines()[0]
            raise RecipeError(
                f"tuner.targets: this architecture does not take {self.kind} there: {first}; name other layers"
            ) from None
        for parameter in tuned(model).values():
            parameter.data = parameter.data.to(in_dtype_of(model))
        activate(model)

    def merge(self, model: "PreTrainedModel") -> None:
        fold(model)

    @contextmanager
    def switched_off(self, model: "PreTrainedModel") -> Iterator[None]:
        activate(model, ADAPTER)
        try:
            yield
        finally:
            activate(model)

    def state(self, model: "PreTrainedModel") -> "dict[str, Tensor]":

        return {f"{PREFIX}{name}": each.detach() for name, each in _state_of(model).items()}

    def peft_config(self, model: "PreTrainedModel") -> "PeftConfig | None":
        config: PeftConfig = model.peft_config[ADAPTER]
        return config


def _state_of(model: "PreTrainedModel") -> "dict[str, Tensor]":
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    return found


def activate(model: "PreTrainedModel", without: str | None = None) -> None:
    """Every layer computes with all adapters that it has, frozen ones among them, but for one."""
    for layer in layers_of(model).values():
        names = {name for kept in layer.adapter_layer_names for name in getattr(layer, kept)}
        layer._active_adapter = sorted(names - {without})
        layer._disable_adapters = not layer._active_adapter


def fold(model: "PreTrainedModel") -> None:
    """Folds all of a model's layers of peft's into the weights of those that they stand for; rounded once, from float32, but for
    a mixture's experts, whose updates peft rounds before it adds them."""
    from peft.tuners.lora import LoraLayer, ParamWrapper

    from posttrain.models.quantized import quantized

    if quantized(model):
        raise ModelError("the weights below this adapter are quantised: codes of a few bits cannot take a difference up")
    for layer in layers_of(model).values():
        if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper):
            _fold_lora(layer)
        else:
            layer.merge()
    remove(model)


def fold_all(model: "PreTrainedModel") -> None:
    """Folds whatever stands beside the weights of a model into them, several in one layer from below."""
    for layer in reversed(list(layers_of(model).values())):
        layer.merge(adapter_names=list(layer.active_adapters))
    remove(model)


def remove(model: "PreTrainedModel") -> None:
    """Takes all of a model's layers of peft's out; those that they stand for are there again."""
    layers = layers_of(model)
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        if parent in layers:  # inside of one that is gone
            continue
        setattr(model.get_submodule(parent), name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False


def _fold_lora(layer: Any) -> None:
    """W + (alpha / rank) B A; with DoRA its rows brought to their learned lengths."""
    import torch

    base = layer.get_base_layer()
    with torch.no_grad():
        delta = layer.get_delta_weight(ADAPTER)
        wide = torch.promote_types(base.weight.dtype, torch.float32)
        merged = base.weight.to(wide) + delta.to(wide)
        if layer.use_dora.get(ADAPTER):
            along = 0 if layer.fan_in_fan_out else 1
            lengths = layer.lora_magnitude_vector[ADAPTER].weight.to(wide).unsqueeze(along)
            merged = merged * (lengths / merged.norm(dim=along, keepdim=True))
        base.weight.copy_(merged.to(base.weight.dtype))


def layers_of(model: "nn.Module") -> "dict[str, BaseTunerLayer]":
    """A model's layers of peft's by path."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def refuse_dora(model: "PreTrainedModel") -> None:
    """Raises ModelError where a delta is part of the layers: DoRA would measure the lengths of the base's rows without it."""
    from posttrain.models import delta

    if delta.active(model) is not None:
        raise ModelError("dora learns the lengths of weights, and those below it are a base and a delta; set dora: false")


def task_of(model: "PreTrainedModel") -> str:
    """As peft calls it."""
    return "SEQ_CLS" if model.get_output_embeddings() is None else "CAUSAL_LM"

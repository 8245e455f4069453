"""How quantised layers come into a model while transformers loads it, one weight at a time, and how they are written.

A folder with NF4 is in bitsandbytes' format, one with integers in that of compressed-tensors, so that transformers reads both
with those packages. posttrain needs neither.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from posttrain.errors import ModelError
from posttrain.models.integers import Whole
from posttrain.models.linears import below_head
from posttrain.models.quantized import NF4, quantized, replace

METHOD = "posttrain"  # as transformers knows it while loading
STATE = "weight.quant_state.bitsandbytes__nf4"
PACKED = "weight_packed"
INTEGERS = [PACKED, "weight_scale", "weight_zero_point", "weight_shape", "weight"]
NAMES = [STATE, *(f"weight.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")), "weight"]


class Plan(QuantizationConfigMixin):
    """What is quantised, and how. stored: the folder holds the codes already. double: NF4's magnitudes in 8 bits. grid: bits and
    group of integers, where the codes are that."""

    def __init__(self, stored: bool = False, double: bool = False, grid: tuple[int, int] | None = None) -> None:
        self.quant_method, self.stored, self.double, self.grid = METHOD, stored, double, grid
        self.written: dict[str, Any] = {}  # what config.json says of it

    def to_dict(self) -> dict[str, Any]:
        return dict(self.written)


def plan_of(name: str, config: Any, wanted: str | None, double: bool) -> Plan | None:
    """How a model is loaded, by what its config.json says and what is wanted of it. Takes the former out of the config.

    Raises ModelError for formats that posttrain does not read, and for quantising what is quantised.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None if wanted is None else Plan(double=double)
    known = found if isinstance(found, dict) else found.to_dict()
    if wanted is not None:
        raise ModelError(f"{name}: is quantised already ({known.get('quant_method')}); remove `quantize`")
    del config.quantization_config
    if known.get("quant_method") == "bitsandbytes" and known.get("bnb_4bit_quant_type") == "nf4":
        return Plan(stored=True, double=bool(known.get("bnb_4bit_use_double_quant")))
    if known.get("quant_method") == "compressed-tensors" and (grid := Whole.grid_of(known)) is not None:
        return Plan(stored=True, grid=grid)
    raise ModelError(
        f"{name}: is quantised by {known.get('quant_method')} in a form that posttrain does not read (it reads NF4 of "
        "bitsandbytes, and integers of compressed-tensors' pack-quantized); take the model as it was before"
    )


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """Linear layers below the head become quantised ones as their weights are read."""

    def __init__(self, quantization_config: Plan, **_: Any) -> None:
        super().__init__(quantization_config, pre_quantized=quantization_config.stored)
        self.plan = quantization_config
        self.targets: set[str] = set()
        self.dtype = torch.float32
        self.serialized_names = {"weight": INTEGERS if self.plan.grid else NAMES} if self.plan.stored else {}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        self.targets = set(below_head(model))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for each in model.parameters():  # one view of the mapped file would keep all of its pages in memory
            each.data = each.data.clone()

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **more: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _Read}

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        layers = quantized(model)
        state = {key: each for key, each in model.state_dict().items() if key.rpartition(".")[0] not in layers}
        for path, layer in layers.items():
            state |= {f"{path}.{name}": each.cpu() for name, each in layer.stored().items()}
            if layer.bias is not None:
                state[f"{path}.bias"] = layer.bias
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """Makes an NF4 layer of a weight that has been read, in the place of the layer that was to hold it."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], model: PreTrainedModel, missing_keys: set[str], **_: Any
    ) -> dict[str, Tensor]:
        for name, found in input_dict.items():
            weight, path = found[0] if isinstance(found, list) else found, name.removesuffix(".weight")
            layer = model.get_submodule(path)
            weight = weight.t() if isinstance(layer, Conv1D) else weight
            replace(model, path, NF4.of(weight, layer.bias, self.quantizer.plan.double))
            missing_keys.discard(name)
        return {}


class _Read(ConversionOps):
    """Makes a layer of the tensors that a file holds for it. Weights that are none pass through."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer  # the name by which transformers leaves dtypes as they are

    def convert(
        self, input_dict: dict[str, Any], model: PreTrainedModel, full_layer_name: str, missing_keys: set[str], **_: Any
    ) -> dict[str, Tensor]:
        tensors = {name: each[0] if isinstance(each, list) else each for name, each in input_dict.items()}
        grid = self.hf_quantizer.plan.grid
        if STATE not in tensors and PACKED not in tensors:
            return {name: each.to(self.hf_quantizer.dtype) for name, each in tensors.items()}
        path = full_layer_name.removesuffix(".weight")
        bias = model.get_submodule(path).bias
        replace(model, path, NF4.read(tensors, bias) if grid is None else Whole(tensors, bias, *grid))
        missing_keys.discard(full_layer_name)
        return {}


def unmark(model: PreTrainedModel) -> None:
    """Lets a model whose quantised layers are plain ones again be saved as what it is now."""
    model.hf_quantizer = None
    del model.config.quantization_config
    conversions = getattr(model, "_weight_conversions", None) or []  # of reading, which transformers turns round to write
    model._weight_conversions = [
        each for each in conversions if not any(isinstance(one, _Read) for one in getattr(each, "operations", ()))
    ]


def mark(model: PreTrainedModel) -> None:
    """Lets a model with quantised layers be saved as what it is."""
    layers = quantized(model)
    plan = Plan(stored=True)
    left = sorted(path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path not in layers)
    plan.written = next(iter(layers.values())).configuration(left)
    model.hf_quantizer = Quantizer(plan)
    model.config.quantization_config = plan

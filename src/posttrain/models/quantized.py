"""Linear layers whose weights are kept as codes of a few bits, and made numbers again wherever they are read.

They are frozen. Gradients flow through them to what lies below, by the same numbers; nothing dense is kept for the backward.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posttrain.models import nf4
from posttrain.models.products import product


class Quantized(nn.Linear):
    """What the kinds share. `weight` [M, K] is computed at every reading, in the dtype of the layer's inputs or float32."""

    def __init__(self, inputs: int, outputs: int, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = inputs, outputs
        self.register_parameter("bias", bias)
        self._is_hf_initialized = True  # transformers draws no new weights for it

    def dense(self) -> Float[Tensor, "M K"]:
        """The weights as the codes have them, float32."""
        raise NotImplementedError

    def stored(self) -> dict[str, Tensor]:
        """{ending of a tensor's name in a file: tensor}, without the bias."""
        raise NotImplementedError

    def configuration(self, left: list[str]) -> dict[str, Any]:
        """What config.json says of a model with such layers; `left`: the linear layers that are not."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.dense()

    @property
    def nbytes(self) -> int:
        """Of what stands for the weights in memory."""
        return sum(each.nbytes for each in self.buffers(recurse=False))

    def forward(self, tensor: Float[Tensor, "*N K"]) -> Float[Tensor, "*N M"]:
        kind = tensor.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
        rows = tensor.to(dtype).reshape(-1, self.in_features)
        bias = None if self.bias is None else self.bias.to(dtype)
        found: Tensor = _Product.apply(rows, bias, self)
        return found.reshape(*tensor.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor | None, layer: Quantized) -> Tensor:
        ctx.layer = layer
        return product(rows, layer.dense().to(rows.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (to_rows, to_bias, _) = grads, ctx.needs_input_grad
        back = product(grad, ctx.layer.dense().to(grad.dtype).t()) if to_rows else None
        return back, grad.sum(0) if to_bias else None, None


class NF4(Quantized):
    """Four bits by the quantiles of a normal distribution, in blocks of 64; their magnitudes in float32, or (double) in 8 bits.

    4.5 bits a weight; 4.127 with double quantisation. arXiv 2305.14314.
    """

    codes: Tensor
    magnitudes: Tensor
    outer: Tensor | None
    mean: Tensor | None

    @classmethod
    def of(cls, weight: Float[Tensor, "M K"], bias: nn.Parameter | None, double: bool) -> "NF4":
        codes, magnitudes = nf4.quantize(weight)
        outer, mean = None, None
        if double:
            magnitudes, outer, mean = nf4.quantize_magnitudes(magnitudes)
        return cls(weight.shape[1], weight.shape[0], bias, codes, magnitudes, outer, mean)

    def __init__(
        self, inputs: int, outputs: int, bias: nn.Parameter | None, codes: Tensor, magnitudes: Tensor, outer: Tensor | None,
        mean: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__(inputs, outputs, bias)
        for name, each in {"codes": codes, "magnitudes": magnitudes, "outer": outer, "mean": mean}.items():
            self.register_buffer(name, each)

    def dense(self) -> Float[Tensor, "M K"]:
        magnitudes = self.magnitudes
        if self.outer is not None and self.mean is not None:
            magnitudes = nf4.dequantize_magnitudes(magnitudes, self.outer, self.mean)
        return nf4.dequantize(self.codes, magnitudes, torch.Size((self.out_features, self.in_features)))

    def stored(self) -> dict[str, Tensor]:
        return nf4.stored(self.codes, self.magnitudes, self.outer, self.mean, (self.out_features, self.in_features))

    def configuration(self, left: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": left,
            "bnb_4bit_use_double_quant": self.outer is not None, "bnb_4bit_compute_dtype": "float32",
        }  # fmt: skip

    @classmethod
    def read(cls, found: dict[str, Tensor], bias: nn.Parameter | None) -> "NF4":
        codes, magnitudes, outer, mean, (outputs, inputs) = nf4.read(found)
        return cls(inputs, outputs, bias, codes, magnitudes, outer, mean)


def quantized(model: nn.Module) -> dict[str, Quantized]:
    """A model's quantised layers by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Quantized)}


def replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Puts a layer where another was."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)

"""peft's layer of LoRA with a product of its own, which keeps the layer's input for the backward and nothing else.

peft's own makes three more tensors of the size of the outputs at every use, and three in the backward.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posttrain.models.products import product
from posttrain.models.quantized import Quantized


def take_for(config: LoraConfig) -> None:
    """Has peft make such layers by this configuration, wherever it would make its own for an `nn.Linear`."""
    config._register_custom_module({nn.Linear: LowRankLinear})


class LowRankLinear(Linear):
    """y = W x + b + sum of scale B A x over the adapters that are switched on. W and b are frozen; W may be codes.

    (peft knows by the word Linear in its name that it is one.)
    """

    def forward(self, x: Float[Tensor, "*N K"], *args: Any, **named: Any) -> Float[Tensor, "*N M"]:
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if args or named or not names or not self._is_plain(names):
            found: Tensor = super().forward(x, *args, **named)
            return found
        weights = [each for name in names for each in (self.lora_A[name].weight, self.lora_B[name].weight)]
        rows = x.reshape(-1, x.shape[-1])
        found = _Product.apply(rows, self.base_layer, [self.scaling[name] for name in names], *weights)
        return found.reshape(*x.shape[:-1], -1)

    def _is_plain(self, names: list[str]) -> bool:
        """Whether the gradient is the one that is written down here."""
        base = self.base_layer  # itself: another layer of peft's may stand between this one and the weights
        if self.merged or not (type(base) is nn.Linear or isinstance(base, Quantized)):
            return False
        if base._forward_hooks or base._forward_pre_hooks or any(each.requires_grad for each in base.parameters()):
            return False
        return not any(
            name in self.lora_variant or self.lora_B[name].bias is not None or type(self.lora_dropout[name]) is not nn.Identity
            for name in names
        )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, base: nn.Linear, scales: list[float], *weights: Tensor) -> Tensor:
        found: Tensor = base(rows)
        given = rows.to(found.dtype)
        for a, b, scale in _adapters(weights, scales):
            found.addmm_(product(given, a.to(found.dtype)), b.to(found.dtype).t(), alpha=scale)
        ctx.base, ctx.scales = base, scales
        ctx.save_for_backward(rows, *weights)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (rows, *weights) = grads, ctx.saved_tensors
        given = rows.to(grad.dtype)
        back = product(grad, ctx.base.weight.to(grad.dtype).t()) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        for index, (a, b, scale) in enumerate(_adapters(weights, ctx.scales)):
            to_a, to_b = ctx.needs_input_grad[3 + 2 * index : 5 + 2 * index]
            between = product(grad, b.to(grad.dtype).t()) * scale
            if back is not None:
                back.addmm_(between, a.to(grad.dtype))
            found.append(product(between.t(), given.t()).to(a.dtype) if to_a else None)
            found.append(product(grad.t(), product(given, a.to(grad.dtype)).t() * scale).to(b.dtype) if to_b else None)
        return (None if back is None else back.to(rows.dtype), None, None, *found)


def _adapters(weights: "list[Tensor] | tuple[Tensor, ...]", scales: list[float]) -> Iterator[tuple[Tensor, Tensor, float]]:
    """(A, B, scale) of each."""
    return zip(weights[::2], weights[1::2], scales, strict=True)

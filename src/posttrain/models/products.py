"""Products of float32 matrices on a CPU, and the linear layers made of them.

torch asks MKL for them, which gives an AMD processor with AVX-512 less than half of its speed (220 of 510 GFLOP/s on two cores);
oneDNN, which torch carries for its compiler, gives it all. Elsewhere, and for small products, torch's own are used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALLEST = 1 << 22  # multiplications: below, a kernel of oneDNN (0.3 ms for each new shape) costs more than it saves
FEW, BLOCK = 64, 4096  # rows: of a product too thin for the sum of two to pay; of a sum made at a time
LONG = 256  # terms of a sum that are added up apart

Linears = list[tuple[nn.Module, Callable[[Tensor], Tensor]]]
_taken: ContextVar[Linears | None] = ContextVar("taken", default=None)


@cache
def _has_onednn() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def bfloat16_is_slow() -> bool:
    """Whether this CPU has no instructions for bfloat16: a product of 1024 x 1024 takes 50 times as long as in float32."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return asked is not None and not asked()


@cache
def by_onednn() -> bool:
    """Whether this machine's float32 products are oneDNN's: an AMD processor with AVX-512."""
    if not _has_onednn():
        return False
    about = Path("/proc/cpuinfo")
    return about.exists() and "AuthenticAMD" in about.read_text().partition("\n\n")[0]


def _chosen(rows: Tensor, matrix: Tensor) -> bool:
    if rows.device.type != "cpu" or rows.dtype != torch.float32 or matrix.dtype != torch.float32:
        return False
    return rows.numel() * len(matrix) >= SMALLEST and by_onednn()


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def product(rows: Float[Tensor, "N K"], matrix: Float[Tensor, "M K"], bias: Float[Tensor, " M"] | None = None) -> Tensor:
    """[N, M]: rows @ matrix^T + bias. Outside of autograd; either may be a transposed view."""
    if not _chosen(rows, matrix):
        return F.linear(rows, matrix, bias)
    if matrix.is_contiguous() or not matrix.t().is_contiguous():
        return _by_onednn(rows, matrix.contiguous(), bias)  # anything else is left to a reference kernel, a thousand times slower
    found = _by_onednn(rows[:, :LONG], matrix[:, :LONG], bias)
    for start in range(LONG, rows.shape[1], LONG):  # one running sum over thousands of terms would lose a digit
        part = slice(start, start + LONG)
        found += _by_onednn(rows[:, part], matrix[:, part], None)
    return found


def _by_onednn(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, matrix, bias, "none", [], "")
    return found


def add_product(total: Float[Tensor, "M K"], left: Float[Tensor, "N M"], right: Float[Tensor, "N K"]) -> None:
    """total += left^T @ right, outside of autograd."""
    if len(left) < FEW or not _chosen(left.t(), right.t()):
        total.addmm_(left.t(), right)
        return
    for start in range(0, len(total), BLOCK):  # a block of the sum at a time stays in the cache until it is added
        part = slice(start, start + BLOCK)
        total[part] += product(left[:, part].t(), right.t())


def linear(tensor: Float[Tensor, "*N K"], weight: Float[Tensor, "M K"], bias: Float[Tensor, " M"] | None = None) -> Tensor:
    """[*N, M]: `torch.nn.functional.linear`."""
    if not _chosen(tensor, weight):
        return F.linear(tensor, weight, bias)
    return _Linear.apply(tensor.reshape(-1, tensor.shape[-1]), weight, bias).reshape(*tensor.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        to_rows, to_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if to_weight else None, weight if to_rows else None)  # no more than the backward reads
        return product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (rows, weight), (to_rows, to_weight, to_bias) = grads, ctx.saved_tensors, ctx.needs_input_grad
        return (
            product(grad, weight.t()) if to_rows else None,
            product(grad.t(), rows.t()) if to_weight else None,
            grad.sum(0) if to_bias else None,
        )


def repeated(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`linear` by a bfloat16 weight that many inputs will meet: laid out once as the product reads it, where that helps."""
    if weight.device.type != "cpu" or not _has_onednn():
        return lambda tensor: F.linear(tensor.to(weight.dtype), weight, bias)
    laid = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda tensor: torch.ops.mkldnn._linear_pointwise(tensor.to(weight.dtype), laid, bias, "none", [], "")


def of_layers(model: nn.Module) -> Linears:
    """The linear layers of a float32 model on a CPU by `linear`; none where torch's own products are as good."""
    if not by_onednn():
        return []
    return [(each, _of_layer(each)) for each in model.modules() if type(each) is nn.Linear and _is_replaceable(each)]


def _is_replaceable(layer: nn.Linear) -> bool:
    """Whether it computes in float32 on a CPU, and as its class does: not when someone gave it a forward of its own."""
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32 and "forward" not in vars(layer)


def _of_layer(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda tensor: linear(tensor, layer.weight, layer.bias)


def taken() -> Linears:
    """What is `replaced` at this moment."""
    return _taken.get() or []


@contextmanager
def replaced(linears: Linears) -> Iterator[None]:
    """Within it, each module computes what stands beside it."""
    token, before = _taken.set(linears), [vars(module).get("forward") for module, _ in linears]
    for module, forward in linears:
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        _taken.reset(token)
        for (module, _), own in zip(linears, before, strict=True):
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own

"""The vocabulary projection: the one place where logits meet labels.

It runs at trained positions only, a chunk of rows at a time: [N, V] never exists. Arithmetic is float32 (float64 for float64
models) whatever the model's dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from posttrain.models.products import add_product, product, wide

CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}  # logits held at a time


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model does to its raw logits: multiply, then soft-cap (cap * tanh(z / cap)); the temperature divides last."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "Shape":
        text = config.get_text_config()
        scale = getattr(text, "logit_scale", None) or 1.0
        scale /= getattr(text, "logits_scaling", None) or 1.0
        return cls(float(scale), getattr(text, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def rows_at_a_time(vocabulary: int, device: str) -> int:
    return max(16, CHUNK.get(device, CHUNK["cuda"]) // vocabulary)


def is_plain(head: nn.Module) -> bool:
    """A linear layer with nothing on or around it: its gradient can be written down."""
    return type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks


TokenLoss = Callable[[Tensor, slice], Tensor]  # (log-probs of some tokens, which of the N they are) -> a value for each


class _LinearLogProb(torch.autograd.Function):
    """logp[n] = log softmax(shape(hidden[n] W^T + b) / temperature)[target[n]], and their sum, or that of a function of them.

    With `fn` the gradients of its sum are formed here, in the forward, and no chunk is computed twice; without it each chunk's
    logits are computed again in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        target: Tensor,
        fn: TokenLoss | None,
        shape: Shape,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        wide_matrix, wide_bias = wide(matrix), None if bias is None else wide(bias)
        logp = torch.empty(len(hidden), dtype=wide_matrix.dtype, device=hidden.device)
        total = logp.new_zeros(())
        ctx.fused = fn is not None and any(ctx.needs_input_grad[:3])
        sums = _Gradients(hidden, wide_matrix, wide_bias, ctx.needs_input_grad) if ctx.fused else None
        step = rows_at_a_time(len(matrix), hidden.device.type)
        for start in range(0, len(hidden), step):
            part = slice(start, min(start + step, len(hidden)))
            rows = wide(hidden[part])
            logits = product(rows, wide_matrix, wide_bias)
            shaped = shape(logits) / temperature if temperature != 1.0 else shape(logits)
            logp[part], powers, total_power = _log_softmax(shaped, target[part])
            if fn is not None:
                value, slope = _with_slope(fn, logp[part], part)
                total += value
                if sums is not None:
                    sums.add(part, rows, _logit_grad(logits, powers, total_power, target[part], slope, shape, temperature))
        ctx.shape, ctx.temperature, ctx.matrix_dtype = shape, temperature, matrix.dtype
        if sums is not None:
            ctx.save_for_backward(*sums.found())
        else:
            ctx.save_for_backward(hidden, matrix, bias, target)
        if fn is not None:
            ctx.mark_non_differentiable(logp)
        return total if fn is not None else logp.sum(), logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_total, d_logp = grads
        if ctx.fused:
            return (*(None if g is None else g * d_total.to(g.dtype) for g in ctx.saved_tensors), None, None, None, None)
        hidden, matrix, bias, target = ctx.saved_tensors
        weight = d_logp + d_total
        wide_matrix, wide_bias = wide(matrix), None if bias is None else wide(bias)
        sums = _Gradients(hidden, wide_matrix, wide_bias, ctx.needs_input_grad)
        step = rows_at_a_time(len(matrix), hidden.device.type)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            rows = wide(hidden[part])
            logits = product(rows, wide_matrix, wide_bias)
            shaped = ctx.shape(logits) / ctx.temperature
            _, powers, total_power = _log_softmax(shaped, target[part])
            grad = _logit_grad(logits, powers, total_power, target[part], weight[part], ctx.shape, ctx.temperature)
            sums.add(part, rows, grad)
        return (*sums.found(), None, None, None, None)


def _with_slope(fn: TokenLoss, logp: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """The sum of fn over some tokens, and its derivative by each log-prob."""
    with torch.enable_grad():
        leaf = logp.detach().requires_grad_()
        value = fn(leaf, part).sum()
        (slope,) = torch.autograd.grad(value, leaf)
    return value.detach(), slope


def _log_softmax(shaped: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob of each row's target [n], exp(logit - largest) [n, V], its sum [n, 1]); the powers take the logits' place."""
    picked, top = shaped.gather(1, target[:, None]), shaped.amax(-1, keepdim=True)
    powers = shaped.sub_(top).exp_()
    total = powers.sum(-1, keepdim=True)
    return (picked - top - total.log())[:, 0], powers, total


def _logit_grad(
    logits: Tensor, powers: Tensor, total: Tensor, target: Tensor, weight: Tensor, shape: Shape, temperature: float
) -> Tensor:
    """The gradient of sum(weight * logp) with respect to the raw logits, in the place of the powers."""
    weight = weight.to(powers.dtype)[:, None]
    grad = powers.mul_(-weight / total)
    grad.scatter_add_(1, target[:, None], weight)
    if shape.cap is not None:
        grad.mul_(1 - (shape(logits) / shape.cap) ** 2)
    factor = shape.scale / temperature
    return grad if factor == 1.0 else grad.mul_(factor)


class _Gradients:
    """The gradients of hidden states, matrix and bias, added up chunk by chunk; None where none is needed."""

    def __init__(self, hidden: Tensor, matrix: Tensor, bias: Tensor | None, needed: tuple[bool, ...]) -> None:
        self.matrix = matrix
        self.d_hidden = torch.empty_like(hidden) if needed[0] else None
        self.d_matrix = torch.zeros_like(matrix) if needed[1] else None
        self.d_bias = torch.zeros_like(bias) if bias is not None and needed[2] else None

    def add(self, part: slice, rows: Tensor, d_logits: Tensor) -> None:
        if self.d_hidden is not None:
            self.d_hidden[part] = product(d_logits, self.matrix.t()).to(self.d_hidden.dtype)
        if self.d_matrix is not None:
            add_product(self.d_matrix, d_logits, rows)
        if self.d_bias is not None:
            self.d_bias += d_logits.sum(0)

    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.d_hidden, self.d_matrix, self.d_bias


def log_probs(
    head: nn.Module,
    project: Callable[[Tensor], Tensor],
    shape: Shape,
    hidden: Float[Tensor, "N D"],
    target: Int[Tensor, " N"],
    fn: TokenLoss | None = None,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
    """(sum of fn(logp), logp) of each row's target. With `fn`, logp carries no gradient; without it, the sum is that of logp."""
    if is_plain(head):
        with torch.autocast(hidden.device.type, enabled=False):
            return _LinearLogProb.apply(hidden, head.weight, head.bias, target, fn, shape, temperature)

    def pick(rows: Tensor, wanted: Tensor) -> Tensor:
        return (project(rows) / temperature).log_softmax(-1).gather(1, wanted[:, None])[:, 0]

    logp = over_rows(pick, vocabulary_of(head), hidden, target)
    return (logp.sum(), logp) if fn is None else (fn(logp, slice(0, len(logp))).sum(), logp.detach())


def vocabulary_of(head: nn.Module) -> int:
    return int(getattr(head, "out_features", 0) or head.get_parameter("weight").shape[0])


def over_rows(fn: Callable[..., Tensor], vocabulary: int, *tensors: Tensor) -> Tensor:
    """fn on chunks of rows of all `tensors`, recomputed in the backward, so that one chunk's logits exist at a time."""
    step = rows_at_a_time(vocabulary, tensors[0].device.type)
    parts = [
        checkpoint(fn, *(each[start : start + step] for each in tensors), use_reentrant=False)
        for start in range(0, max(1, len(tensors[0])), step)
    ]
    return torch.cat(parts)

"""Attention over a layout, for any transformers model, through its attention registry.

While a plan is active (`attending`), every attention layer of the model calls `plan.attend(...)` with its queries, keys and
values of one flat row. No mask is ever built by the model.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

from posttrain.models.layout import Segment, Tree
from posttrain.models.products import Linears, replaced, taken, wide
from posttrain.models.soft import Given

NAME = "posttrain"
BLOCK = 128  # tokens: FlexAttention decides what is seen in squares of this side
COMPILATIONS = 64  # at most, of FlexAttention in one process: one per model shape, dtype and scoring, with and without gradients
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer turns queries and keys into weights. sinks: one extra logit per head that takes weight but has no value."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@runtime_checkable
class Plan(Protocol):
    """Whom each token of a row sees. given: keys and values that some have in place of the model's own."""

    given: Given | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]"""
        ...


_plan: ContextVar[Plan | None] = ContextVar("plan", default=None)


@contextmanager
def attending(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Within it, the model's attention layers follow `plan`."""
    before = model.config._attn_implementation
    token = _plan.set(plan)
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        _plan.reset(token)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    plan = _plan.get()
    assert plan is not None, "this attention runs only inside `attending`"
    assert dropout == 0.0, "attention dropout is always off"
    if sliding_window is None and getattr(module, "is_sliding", False):
        sliding_window = getattr(module, "sliding_window", None)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    cap = None if softcap is None else float(softcap)
    if plan.given is not None:
        key, value = plan.given.put_into(module.layer_idx, key, value)  # type: ignore[arg-type]
    return plan.attend(query, key, value, Scoring(scale, sliding_window, cap, s_aux)), None


AttentionInterface.register(NAME, _attend)


def recompute_context(model: PreTrainedModel) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """For torch's checkpointing: the backward recomputes a layer under the plan, and by the products, that its forward had."""

    @contextmanager
    def again(plan: Plan | None, linears: Linears) -> Iterator[None]:
        with nullcontext() if plan is None else attending(model, plan), replaced(linears):
            yield

    return lambda: (nullcontext(), again(_plan.get(), taken()))


Kernel = Literal["flash", "flex", "segments"]


def kernel_for(device: str, dtype: torch.dtype, row: int, heads: tuple[int, int], plain: bool) -> Kernel:
    """What attends over a tree of `row` tokens. flash: CPU flash per segment; flex: FlexAttention; segments: masked SDPA.

    heads: the dimension of a head's keys and of its values. plain: no window that binds, no cap on the scores, no sinks.
    """
    if device == "cpu":
        return "flash" if plain and heads[0] == heads[1] else "segments"
    widest = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}.get(dtype, 0)  # what fits a GPU's shared memory
    takes = min(heads) >= 16 and max(heads) <= widest
    return "flex" if device == "cuda" and takes and row > BLOCK else "segments"  # a row of one block is not worth compiling for


class TreePlan:
    """Causal attention over a tree: each token sees its segment up to itself, and the whole of its ancestors."""

    def __init__(self, layout: Tree) -> None:
        self.layout = layout
        self.given: Given | None = None
        self.reach = max((part.depth + part.end - part.start for part in layout.segments), default=0)
        self._seen: dict[tuple[int | None, torch.device], BlockMask] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        plain = not self._binds(scoring.window) and scoring.softcap is None and scoring.sinks is None
        heads = (query.shape[-1], value.shape[-1])
        match kernel_for(query.device.type, _computed_in(value), query.shape[2], heads, plain):
            case "flash":
                return _TreeFlash.apply(query, key, value, self.layout.segments, scoring.scale)
            case "flex":
                return self._by_flex(query, key, value, scoring)
        return self._by_segment(query, key, value, scoring)

    def _binds(self, window: int | None) -> bool:
        return window is not None and self.reach > window

    def _by_flex(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """The whole row in one call of FlexAttention: a fused kernel on a GPU, dense and slow elsewhere. For any scoring."""
        window = scoring.window if self._binds(scoring.window) else None
        if (window, query.device) not in self._seen:
            self._seen[window, query.device] = block_mask(self.layout, window, query.device)
        dtype = _computed_in(value)
        attention: Any = _compiled_flex() if query.device.type == "cuda" else flex_attention
        # floats as constants of the kernel: left dynamic, the scale would be a symbol that its template cannot take
        constants = torch._dynamo.config.patch(specialize_float=True, recompile_limit=COMPILATIONS)
        with torch.autocast(query.device.type, enabled=False), constants:
            out, aux = attention(
                query.to(dtype), key.to(dtype), value.to(dtype), _capped(scoring.softcap), self._seen[window, query.device],
                scoring.scale, query.shape[1] != key.shape[1], return_aux=AuxRequest(lse=scoring.sinks is not None),
                # float32 tiles fit shared memory only when they are not loaded ahead
                kernel_options={"num_stages": 1} if dtype == torch.float32 else None,
            )  # fmt: skip
        if scoring.sinks is not None:
            kept = torch.sigmoid(aux.lse - scoring.sinks.reshape(1, -1, 1).to(aux.lse.dtype))  # the sink takes the rest
            out = out * kept.unsqueeze(-1).to(out.dtype)
        return out.transpose(1, 2)

    def _by_segment(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Every segment against its own path from the root, under a mask of positions. For any kind of scoring."""
        positions = self.layout.positions.to(query.device)
        outputs = []
        for part in self.layout.segments:
            path = [(each.start, each.end) for each in self.layout.ancestors(part)]
            keys = torch.cat([key[:, :, a:b] for a, b in path], 2)
            values = torch.cat([value[:, :, a:b] for a, b in path], 2)
            gap = positions[part.start : part.end, None] - torch.cat([positions[a:b] for a, b in path])[None]
            allowed = gap >= 0 if scoring.window is None else (gap >= 0) & (gap < scoring.window)
            outputs.append(weighted(query[:, :, part.start : part.end], keys, values, allowed, scoring))
        return torch.cat(outputs, 2).transpose(1, 2)


class KeepingPlan(TreePlan):
    """Attention over a tree that keeps each layer's keys and values [K, T, d]."""

    def __init__(self, layout: Tree) -> None:
        super().__init__(layout)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.kept.append((key[0], value[0]))
        return super().attend(query, key, value, scoring)


def block_mask(layout: Tree, window: int | None, device: torch.device) -> BlockMask:
    """What each token of the row sees: token k is seen by the tokens k <= q < until[k], those in the window alone.

    The squares that are seen in part are found from the extremes of each block, so that no mask of T x T is made.
    """
    row = len(layout.tokens)
    sizes = torch.tensor([(part.tree_end, part.end - part.start) for part in layout.segments])
    until = sizes[:, 0].repeat_interleave(sizes[:, 1])
    positions = layout.positions
    oldest = torch.zeros_like(positions) if window is None else positions - window + 1  # the first position that a token sees

    first = torch.arange(0, row, BLOCK)
    members = (first[:, None] + torch.arange(BLOCK)).clamp(max=row - 1)
    (until_low, until_high), (place_low, place_high), (oldest_low, oldest_high) = (
        each[members].aminmax(dim=1) for each in (until, positions, oldest)
    )
    start, whole = first[:, None], first[:, None] + BLOCK <= row  # of the queries; those of the keys are along the columns
    some = (first <= start) & (until_high > start) & (place_high >= oldest_low[:, None])
    every = whole & (first < start) & (until_low >= start + BLOCK) & (place_low >= oldest_high[:, None])

    def listed(squares: Tensor) -> tuple[Tensor, Tensor]:
        squares = squares.to(device).int()[None, None]
        return squares.sum(-1, dtype=torch.int32), squares.argsort(dim=-1, descending=True, stable=True).int()

    until, positions, oldest = (each.to(device, torch.int32) for each in (until, positions, oldest))
    return BlockMask.from_kv_blocks(
        *listed(some & ~every), *listed(every), BLOCK_SIZE=BLOCK, seq_lengths=(row, row), mask_mod=_sees(until, positions, oldest)
    )


def _sees(until: Tensor, positions: Tensor, oldest: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    return lambda batch, head, q, k: (k <= q) & (q < until[k]) & (oldest[q] <= positions[k])


def _capped(cap: float | None) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    return None if cap is None else lambda score, batch, head, q, k: cap * torch.tanh(score / cap)


@cache
def _compiled_flex() -> Callable[..., Any]:
    """One compilation serves rows of every length. fullgraph: uncompiled, it would make all T x T scores."""
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _computed_in(value: Tensor) -> torch.dtype:
    """The dtype of an attention over `value`: under autocast, autocast's own, as for torch's other attention."""
    kind = value.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype


def weighted(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scoring: Scoring) -> Tensor:
    """Attention under a boolean mask; query [B, H, Q, D], key and value [B, K, S, D], allowed broadcastable to [B, 1, Q, S]."""
    grouped = query.shape[1] != key.shape[1]
    if scoring.softcap is None and scoring.sinks is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scoring.scale, enable_gqa=grouped)
    if grouped:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    added = torch.zeros_like(allowed, dtype=wide(query).dtype).masked_fill_(~allowed, float("-inf"))
    return torch.matmul(weights(torch.matmul(query, key.transpose(2, 3)), added, scoring).to(value.dtype), value)


def weights(products: Tensor, added: Tensor, scoring: Scoring) -> Tensor:
    """Attention weights [..., H, Q, S], float32 or wider, from products of queries and keys. added: 0, and -inf where unseen."""
    if scoring.softcap is None:
        scores = torch.add(added, wide(products), alpha=scoring.scale)
    else:
        scores = scoring.softcap * torch.tanh(wide(products) * (scoring.scale / scoring.softcap)) + added
    if scoring.sinks is None:
        return scores.softmax(-1)
    sink = scoring.sinks.reshape(-1, 1, 1).expand(*scores.shape[:-1], 1).to(scores.dtype)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


class _TreeFlash(torch.autograd.Function):
    """Flash attention per segment, merged by log-sum-exp; a shared prefix is read once for all its descendants.

    Two kernel calls per segment: its own tokens, causally; and all its descendants against it, in one call.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], scale: float) -> Tensor:
        dtype, heads, repeat = value.dtype, query.shape[1], query.shape[1] // key.shape[1]
        # bfloat16 flash builds kernels for every new length on a CPU: slower than float32
        query, key, value = wide(query), wide(key), wide(value)
        keys, values = (x if repeat == 1 else x.repeat_interleave(repeat, 1) for x in (key, value))
        row = query.shape[2]
        out = query.new_empty(1, row, heads, query.shape[-1]).transpose(1, 2)
        lse = query.new_empty(1, row, heads).transpose(1, 2)
        for part in segments:  # parents come before their children
            own = slice(part.start, part.end)
            out[:, :, own], lse[:, :, own] = _flash(query[:, :, own], keys[:, :, own], values[:, :, own], 0.0, True, scale=scale)
        for part in segments:
            if part.tree_end > part.end:
                own, below = slice(part.start, part.end), slice(part.end, part.tree_end)
                seen, weight = _flash(query[:, :, below], keys[:, :, own], values[:, :, own], 0.0, False, scale=scale)
                before = lse[:, :, below]
                share = torch.sigmoid(weight - before).unsqueeze(-1).to(out.dtype)
                out[:, :, below] = torch.lerp(out[:, :, below], seen, share)
                lse[:, :, below] = torch.logaddexp(weight, before)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments, ctx.scale, ctx.repeat = segments, scale, repeat
        return out.transpose(1, 2).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        keys, values = (x if ctx.repeat == 1 else x.repeat_interleave(ctx.repeat, 1) for x in (key, value))
        grad = grads[0].to(query.dtype).transpose(1, 2).contiguous()
        d_query, d_key, d_value = torch.zeros_like(query), torch.zeros_like(keys), torch.zeros_like(values)

        def add(of: slice, to: slice, causal: bool) -> None:
            parts = _flash_backward(
                grad[:, :, of], query[:, :, of], keys[:, :, to], values[:, :, to], out[:, :, of], lse[:, :, of], 0.0, causal,
                scale=ctx.scale,
            )  # fmt: skip
            d_query[:, :, of] += parts[0]
            d_key[:, :, to] += parts[1]
            d_value[:, :, to] += parts[2]

        for part in ctx.segments:
            own = slice(part.start, part.end)
            add(own, own, True)
            if part.tree_end > part.end:
                add(slice(part.end, part.tree_end), own, False)
        if ctx.repeat > 1:
            d_key, d_value = (x.unflatten(1, (-1, ctx.repeat)).sum(2) for x in (d_key, d_value))
        return d_query, d_key, d_value, None, None

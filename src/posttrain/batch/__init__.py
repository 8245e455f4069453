"""The world of tensors. Legend: B sequences, T tokens laid end to end, N trained tokens.

Every per-token tensor is indexed by the token it is *about*: `train[i]`, `logp[i]` and `advantage[i]` all speak of "token i,
given the tokens before it in its sequence". Per-token results are flat over the N trained tokens, in order. Nothing predicts
the first token of a sequence, so it is never trained. There is no padding here.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from posttrain.batch.rollouts import Rollouts, Valued
from posttrain.batch.rows import Classified, Labelled, Pairs, Ranked, Stepped, Taught
from posttrain.batch.sequences import Answers, Batch, Sequences, moved

__all__ = [
    "Answers", "Batch", "Classified", "Labelled", "Pairs", "Ranked", "Rollouts", "Sequences", "Stepped", "Taught", "Valued",
    "flattened", "moved", "rebuilt",
]  # fmt: skip


def flattened(batch: Any, prefix: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A batch as (plain values, tensors) by dotted name, for a checkpoint; `rebuilt` makes it whole again."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for each in fields(batch):
        name, value = prefix + each.name, getattr(batch, each.name)
        if isinstance(value, Tensor):
            tensors[name] = value
        elif is_dataclass(value):
            inner, more = flattened(value, f"{name}.")
            plain |= inner
            tensors |= more
        elif value is not None:
            plain[name] = value
    return plain, tensors


def rebuilt(kind: str, plain: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str = "") -> Any:
    """The batch of a kind (the name of its type here) from what `flattened` gave."""
    cls = globals()[kind]
    values: dict[str, Any] = {}
    for each in fields(cls):
        name = prefix + each.name
        if name in tensors or name in plain:
            values[each.name] = tensors[name] if name in tensors else plain[name]
        elif any(key.startswith(f"{name}.") for key in tensors):
            values[each.name] = rebuilt(_class_name(each.type), plain, tensors, f"{name}.")
    return cls(**values)


def _class_name(annotation: Any) -> str:
    return getattr(annotation, "__name__", str(annotation))

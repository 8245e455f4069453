"""Losses as pure functions over tensors. Nothing here reduces (`aggregate` names its units), masks, or knows of a model.

The functions are imported on first use, so that `from posttrain import losses` costs nothing in a file that only defines kinds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.losses.aggregate import sequence_means, sequence_sums
    from posttrain.losses.credit import group_advantages
    from posttrain.losses.kl import kl_k1, kl_k2, kl_k3
    from posttrain.losses.policy_gradient import clipped_surrogate

_HOME = {
    "sequence_means": "aggregate",
    "sequence_sums": "aggregate",
    "group_advantages": "credit",
    "kl_k1": "kl",
    "kl_k2": "kl",
    "kl_k3": "kl",
    "clipped_surrogate": "policy_gradient",
}

__all__ = [
    "clipped_surrogate",
    "group_advantages",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "sequence_means",
    "sequence_sums",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"posttrain.losses has no {name!r}")
    return getattr(import_module(f"posttrain.losses.{_HOME[name]}"), name)

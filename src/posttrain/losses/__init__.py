"""Losses as pure functions over tensors. Nothing here reduces (`aggregate` names its units), masks, or knows of a model.

The functions are imported on first use, so that `from posttrain import losses` costs nothing in a file that only defines kinds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.losses.aggregate import sequence_means, sequence_sums
    from posttrain.losses.classes import binary_cross_entropy, cross_entropy, squared_error
    from posttrain.losses.credit import gae, group_advantages, whiten
    from posttrain.losses.distillation import logit_gap, vocabulary_kl
    from posttrain.losses.kl import adaptive_kl, kl_k1, kl_k2, kl_k3
    from posttrain.losses.policy_gradient import clipped_surrogate, clipped_value
    from posttrain.losses.preference import (
        aot,
        aot_unpaired,
        apo_down,
        apo_zero,
        bco,
        discopop,
        dpo,
        dpop,
        exo,
        f_alpha,
        f_forward_kl,
        f_js,
        f_reverse_kl,
        hinge,
        ipo,
        kto,
        log_odds_of_mean,
        nca,
        orpo,
        psi_identity,
        psi_log_odds,
        psi_po,
        robust_dpo,
        rpo,
        simpo,
        sppo,
        wpo_weight,
    )
    from posttrain.losses.reward import bradley_terry, centring, choice, labelled

_HOME = {
    "sequence_means": "aggregate",
    "sequence_sums": "aggregate",
    "binary_cross_entropy": "classes",
    "cross_entropy": "classes",
    "squared_error": "classes",
    "gae": "credit",
    "group_advantages": "credit",
    "whiten": "credit",
    "logit_gap": "distillation",
    "vocabulary_kl": "distillation",
    "adaptive_kl": "kl",
    "kl_k1": "kl",
    "kl_k2": "kl",
    "kl_k3": "kl",
    "clipped_surrogate": "policy_gradient",
    "clipped_value": "policy_gradient",
    "aot": "preference",
    "aot_unpaired": "preference",
    "apo_down": "preference",
    "apo_zero": "preference",
    "bco": "preference",
    "discopop": "preference",
    "dpo": "preference",
    "dpop": "preference",
    "exo": "preference",
    "f_alpha": "preference",
    "f_forward_kl": "preference",
    "f_js": "preference",
    "f_reverse_kl": "preference",
    "hinge": "preference",
    "ipo": "preference",
    "kto": "preference",
    "log_odds_of_mean": "preference",
    "nca": "preference",
    "orpo": "preference",
    "psi_identity": "preference",
    "psi_log_odds": "preference",
    "psi_po": "preference",
    "robust_dpo": "preference",
    "rpo": "preference",
    "simpo": "preference",
    "sppo": "preference",
    "wpo_weight": "preference",
    "bradley_terry": "reward",
    "centring": "reward",
    "choice": "reward",
    "labelled": "reward",
}

__all__ = [
    "adaptive_kl",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco",
    "binary_cross_entropy",
    "bradley_terry",
    "centring",
    "choice",
    "clipped_surrogate",
    "clipped_value",
    "cross_entropy",
    "discopop",
    "dpo",
    "dpop",
    "exo",
    "f_alpha",
    "f_forward_kl",
    "f_js",
    "f_reverse_kl",
    "gae",
    "group_advantages",
    "hinge",
    "ipo",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kto",
    "labelled",
    "log_odds_of_mean",
    "logit_gap",
    "nca",
    "orpo",
    "psi_identity",
    "psi_log_odds",
    "psi_po",
    "robust_dpo",
    "rpo",
    "sequence_means",
    "sequence_sums",
    "simpo",
    "sppo",
    "squared_error",
    "vocabulary_kl",
    "whiten",
    "wpo_weight",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"posttrain.losses has no {name!r}")
    return getattr(import_module(f"posttrain.losses.{_HOME[name]}"), name)

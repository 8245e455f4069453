"""The head of a transformers model that says something of whole sequences: which modules it is, and what its outputs mean."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from posttrain.models import soft
from posttrain.text import Classes

PROBLEMS = {"single": "single_label_classification", "multi": "multi_label_classification", "regression": "regression"}


def head_parts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """{path: module} of what stands above the model's body; of an encoder that came without its pooler, that too.

    They are trained in full under every tuner, and stored beside every adapter. Nothing of a language model.
    """
    if model.get_output_embeddings() is not None:
        return {}
    body = model.base_model_prefix
    above = {name: part for name, part in model.named_children() if name not in (body, soft.NAME)}
    own = {name: part for name, part in above.items() if next(part.parameters(), None) is not None}
    return own | ({f"{body}.pooler": model.base_model.pooler} if getattr(model, "new_pooler", False) else {})


def head_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters of `head_parts`, by their names in the model."""
    return {f"{path}.{name}": each for path, part in head_parts(model).items() for name, each in part.named_parameters()}


def is_encoder(model: PreTrainedModel) -> bool:
    """Whether it is read by a head of its own, at its first token or as a whole, and not by a linear layer at the last."""
    return model.get_output_embeddings() is None and not isinstance(getattr(model, "score", None), nn.Linear)


def in_config(classes: Classes) -> dict[str, Any]:
    """What a transformers config says of a classifier."""
    labels = classes.labels or ("LABEL_0",)
    return {
        "id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)},
        "num_labels": len(labels), "problem_type": PROBLEMS[classes.problem],
    }  # fmt: skip


def of_config(config: Any) -> Classes:
    """The same read back; where a config names no problem, one output is a number, and several are classes."""
    labels = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    named = {value: key for key, value in PROBLEMS.items()}.get(config.problem_type)
    problem: Any = named or ("regression" if len(labels) == 1 else "single")
    return Classes(problem, () if problem == "regression" else labels)

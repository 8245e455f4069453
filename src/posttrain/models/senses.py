"""Which part of a model reads text: of a multimodal one its language model, and no tower or projector of another sense."""

from collections.abc import Callable

from transformers import PreTrainedModel

from posttrain.models import soft
from posttrain.models.heads import head_parts


def beyond_text(model: PreTrainedModel) -> list[str]:
    """The paths of what a multimodal model has beside its language model and its heads. Text gives none of it a gradient."""
    if model.config.get_text_config() is model.config:
        return []
    text = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is text)
    kept = {id(model.get_output_embeddings()), *(id(part) for part in head_parts(model).values())}
    found, parents = [], path.split(".") if path else []
    for depth, own in enumerate(parents):
        parent = model.get_submodule(".".join(parents[:depth]))
        beside = [name for name, part in parent.named_children() if name not in (own, soft.NAME) and id(part) not in kept]
        beside += [name for name, _ in parent.named_parameters(recurse=False)]
        found += [".".join([*parents[:depth], name]) for name in beside]
    return found


def of_text(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether the module or parameter of a name takes part when the model reads text."""
    other = beyond_text(model)
    return lambda name: not any(name == path or name.startswith(f"{path}.") for path in other)

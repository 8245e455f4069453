"""The linear layers of a transformers model, and their weights the same way round."""

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def below_head(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers below a model's head by path, GPT-2's transposed ones among them; without a pooler, which belongs to a
    head."""
    inside = model.base_model.named_modules()
    ids = {id(each) for path, each in inside if isinstance(each, nn.Linear | Conv1D) and not path.startswith("pooler.")}
    head = model.get_output_embeddings()
    return {path: module for path, module in model.named_modules() if id(module) in ids and module is not head}


def stacked(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The weights of a mixture's experts by name, where they are one tensor of three dimensions and in no linear layer."""
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if "expert" in f"{path} {type(module).__name__}".lower():
            found |= {f"{path}.{name}": each for name, each in module.named_parameters(recurse=False) if each.dim() == 3}
    return found


def left_out(model: PreTrainedModel) -> list[str]:
    """What to say where a part of the matrices is in no linear layer; nothing for most models."""
    experts = sum(each.numel() for each in stacked(model).values())
    share = experts / sum(each.numel() for each in model.parameters())
    told = f"the experts of this mixture, {share:.0%} of its weights, stay as they are: they are in no linear layer"
    return [told] if experts else []


def matrix_of(layer: nn.Module) -> Float[Tensor, "M K"]:
    """The weight of a linear layer as [outputs, inputs]; GPT-2's Conv1D keeps it the other way round."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.t() if isinstance(layer, Conv1D) else weight


def put(layer: nn.Module, matrix: Float[Tensor, "M K"]) -> None:
    """Gives a linear layer the weight [outputs, inputs]."""
    layer.get_parameter("weight").data.copy_(matrix.t() if isinstance(layer, Conv1D) else matrix)

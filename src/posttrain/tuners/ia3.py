"""IA3: learned scales of keys, values and the feed-forward layer's inside; parameters and file format are peft's."""

from typing import TYPE_CHECKING, Any

from posttrain.errors import RecipeError
from posttrain.tuners.injected import Injected, layers_of, task_of
from posttrain.tuners.places import all_linears, linears, places

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class IA3(Injected, kind="ia3"):
    """softmax(Q (l_k K)^T / sqrt d)(l_v V) and W_down (l_ff h), the vectors l begin with ones; arXiv 2205.05638.

    layers x (key width + value width + feed-forward width) parameters. Learning rates are about 3e-3.
    """

    peft_type = "IA3"
    learning_rates = (5e-4, 3e-3, 3e-2)

    def config(self, model: "PreTrainedModel") -> "PeftConfig":
        from peft import IA3Config

        inner = places(model, ("feed_forward_out",), self.kind)["feed_forward_out"]
        fused = [path for path in linears(model) if path.endswith(".c_attn")]
        if not fused:
            try:
                apart = places(model, ("key", "value"), self.kind)
            except RecipeError as error:
                raise RecipeError(f"{error}; where one matrix gives queries, keys and values, ia3 knows GPT-2's alone") from None
            fused = [path for paths in apart.values() for path in paths]
        names, known = _suffixes([*fused, *inner], model), _suffixes(inner, model)
        return IA3Config(target_modules=names, feedforward_modules=known, task_type=task_of(model))

    def install(self, model: "PreTrainedModel") -> None:
        super().install(model)
        for path, layer in layers_of(model).items():
            if path.endswith(".c_attn"):
                layer.register_forward_pre_hook(_queries_stay)


def _queries_stay(layer: Any, _inputs: Any) -> None:
    """GPT-2 makes queries, keys and values with one matrix: the scales of queries get no gradient, and stay 1."""
    for vector in layer.ia3_l.values():
        if vector.requires_grad and not vector._backward_hooks:  # a copy of a model has none
            vector.register_hook(lambda grad: grad.clone().index_fill_(0, _rows(grad), 0.0))


def _rows(vector: Any) -> Any:
    import torch

    return torch.arange(len(vector) // 3, device=vector.device)


def _suffixes(paths: list[str], model: "PreTrainedModel") -> list[str]:
    """The shortest names that peft finds these layers by, and no others."""
    everything, found = list(all_linears(model)), set()
    for path in paths:
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[-length:])
            if {each for each in everything if each == name or each.endswith(f".{name}")} <= set(paths):
                found.add(name)
                break
    return sorted(found)

"""Adapters: small networks inside of every block, which stays as it is. They are in no library that is kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat, PositiveInt

from posttrain.errors import RecipeError
from posttrain.tuners.places import places
from posttrain.tuners.tuner import Tuner, in_dtype_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Adapter(Tuner, kind="adapter"):
    """Bottleneck adapters: h + W_up f(W_down h) on the outputs of attention and feed-forward; arXiv 1902.00751.

    2 x width x size + size + width parameters each. They cannot be folded into the weights, and cost a little time at every use.
    """

    merges = False
    learning_rates = (1e-5, 3e-4, 3e-3)
    size: PositiveInt = 64
    """Width of the bottleneck; a sixteenth of the model's is usual."""
    variant: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """houlsby: two a block, before each residual sum. pfeiffer: that of the feed-forward layer alone (arXiv 2005.00247).
    parallel: one a block, from the feed-forward layer's input to its output (arXiv 2110.04366)."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """f."""
    norms: bool = True
    """Train the scales and shifts of all normalisations too, as the paper does."""
    deviation: PositiveFloat = 1e-3
    """Of the matrices at the start: normal draws, cut at two deviations. Above 1e-2 it hurts, says the paper."""
    scale: PositiveFloat = 1.0
    """What the branch is multiplied by; 4 is usual for parallel."""

    @property
    def reversible(self) -> bool:
        return True

    def install(self, model: "PreTrainedModel") -> None:
        from posttrain.models.roles import Earlier
        from posttrain.tuners.bottleneck import Bottleneck, bottlenecks, norm_parameters

        if bottlenecks(model):
            raise RecipeError("tuner adapter: this model has adapters already, frozen; go on with another tuner, such as lora")
        model.requires_grad_(False)
        width = model.config.get_text_config().hidden_size
        for path in self._hosts(model):
            branch = Bottleneck(width, self.size, self.activation, self.deviation, self.scale, self.variant == "parallel")
            branch.to(model.device, in_dtype_of(model)).attach(model.get_submodule(path))
        norms = norm_parameters(model) if self.norms else {}
        for parameter in norms.values():
            parameter.requires_grad_(True)
        model.norms_before = Earlier(norms)

    def _hosts(self, model: "PreTrainedModel") -> list[str]:
        """The paths of the layers that get one."""
        if self.variant == "houlsby":
            found = places(model, ("attention_out", "feed_forward_out"), self.kind)
            return [path for paths in found.values() for path in paths]
        if self.variant == "pfeiffer":
            return places(model, ("feed_forward_out",), self.kind)["feed_forward_out"]
        found = places(model, ("feed_forward_in", "feed_forward_out"), self.kind)
        hosts = [path.rpartition(".")[0] for path in found["feed_forward_out"]]
        apart = not any(host.rpartition(".")[2].isdigit() for host in hosts)  # and not the block itself (OPT)
        if not apart or not all(any(path.startswith(f"{host}.") for path in found["feed_forward_in"]) for host in hosts):
            raise RecipeError(
                f"tuner.variant: parallel stands beside the whole feed-forward layer, which {type(model).__name__} has no module "
                "for; take pfeiffer or houlsby"
            )
        return hosts

    @contextmanager
    def switched_off(self, model: "PreTrainedModel") -> Iterator[None]:
        from posttrain.tuners.bottleneck import bottlenecks

        adapters = bottlenecks(model).values()
        for each in adapters:
            each.active = False
        try:
            with model.norms_before.in_place():
                yield
        finally:
            for each in adapters:
                each.active = True

    def state(self, model: "PreTrainedModel") -> "dict[str, Tensor]":
        from posttrain.tuners.bottleneck import NAME, bottlenecks, norm_parameters

        found = {
            f"{path}.{NAME}.{name}": parameter.detach()
            for path, adapter in bottlenecks(model).items()
            for name, parameter in adapter.named_parameters()
        }
        norms = norm_parameters(model) if self.norms else {}
        return found | {name: parameter.detach() for name, parameter in norms.items()}

"""LoRA's layer gives peft's values and gradients, and keeps no more than its input."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from posttrain.models.quantized import NF4
from posttrain.tuners.low_rank import LowRankLinear

INPUTS, OUTPUTS, RANK = 128, 96, 4


def filled(kind: type[Linear], base: nn.Linear, dtype: torch.dtype, names: tuple[str, ...]) -> Linear:
    """A layer with adapters of drawn weights; all but the last are frozen."""
    draw = torch.Generator().manual_seed(1)
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=["layer"])
    layer = kind(base, names[0], config=config, r=RANK, lora_alpha=6)
    for name in names[1:]:
        layer.update_layer(name, RANK, lora_alpha=2, config=config)
    layer.requires_grad_(False)
    for name in names:
        for part in (layer.lora_A[name], layer.lora_B[name]):
            part.to(dtype).weight.data = torch.randn(part.weight.shape, generator=draw, dtype=torch.float64).to(dtype)
    for part in (layer.lora_A[names[-1]], layer.lora_B[names[-1]]):
        part.requires_grad_(True)
    layer.set_adapter(list(names)) if len(names) == 1 else setattr(layer, "_active_adapter", list(names))
    return layer


def base_of(kind: str, dtype: torch.dtype) -> nn.Linear:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=draw, dtype=torch.float64).to(dtype)
    bias = nn.Parameter(torch.randn(OUTPUTS, generator=draw, dtype=torch.float64).to(dtype), requires_grad=False)
    if kind == "nf4":
        return NF4.of(weight, bias, double=True)
    layer = nn.Linear(INPUTS, OUTPUTS, dtype=dtype)
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), bias
    return layer


def found(layer: Linear, rows: Tensor, mixed: bool) -> list[Tensor]:
    """The layer's values, and the gradients of its input and of what is learned."""
    rows = rows.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
        values = layer(rows)
    learned = [each for each in layer.parameters() if each.requires_grad]
    weight = torch.linspace(-1, 1, OUTPUTS, dtype=values.dtype)
    return [values, *torch.autograd.grad((values * weight / 30).sin().sum(), [rows, *learned])]


@pytest.mark.parametrize("names", [("default",), ("below", "default")])
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize(
    ("dtype", "mixed", "tolerance"),
    [(torch.float64, False, 1e-12), (torch.float32, False, 1e-5), (torch.float32, True, 2e-2), (torch.bfloat16, False, 2e-2)],
)
def test_it_gives_what_peft_gives(
    names: tuple[str, ...], base: str, dtype: torch.dtype, mixed: bool, tolerance: float
) -> None:
    if base == "nf4" and dtype == torch.float64:
        dtype, tolerance = torch.float32, 1e-5
    rows = torch.randn(2, 5, INPUTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    ours, theirs = (found(filled(kind, base_of(base, dtype), dtype, names), rows, mixed) for kind in (LowRankLinear, Linear))
    assert len(ours) == 4  # values, input, A, B
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert (one - other).norm() <= tolerance * other.norm()


def test_it_keeps_its_input_and_nothing_else_of_that_size() -> None:
    layer = filled(LowRankLinear, base_of("dense", torch.float32), torch.float32, ("default",))
    rows, kept = torch.randn(50, INPUTS), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(rows)
    own = [each for each in kept if not isinstance(each, nn.Parameter)]
    assert [each.data_ptr() for each in own] == [rows.data_ptr()]


def test_a_layer_whose_base_learns_takes_the_ordinary_path() -> None:
    layer = filled(LowRankLinear, base_of("dense", torch.float32), torch.float32, ("default",))
    layer.get_base_layer().weight.requires_grad_(True)
    layer(torch.randn(3, INPUTS)).sum().backward()
    assert layer.get_base_layer().weight.grad is not None

"""The stage `quantize`: matrices of the blocks become codes of a few bits."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import PositiveInt, field_validator, model_validator

from posttrain.compress.rounders import Nearest, Rounder
from posttrain.pipeline.smaller import Smaller, sizes
from posttrain.pipeline.stage import Metrics

if TYPE_CHECKING:
    from posttrain.batch import Sequences
    from posttrain.models.load import Loaded


class Quantize(Smaller, kind="quantize"):
    """Rounds a model's matrices to few bits; writes a folder that posttrain loads everywhere, and transformers too.

    Integers are in the format of compressed-tensors (pack-quantized), nf4 in that of bitsandbytes. The codes stay as they are in
    further training: take a tuner that learns beside them, such as lora.
    """

    method: Rounder = Nearest()
    """How a weight is rounded."""
    bits: Literal[2, 3, 4, 8] = 4
    """Of each weight."""
    group: PositiveInt | Literal["channel"] = 128
    """Consecutive inputs of an output that share a scale; channel: all of them."""
    symmetric: bool = True
    """Whether the grid reaches as far below 0 as above, and so needs no zero."""

    @field_validator("group", mode="before")
    @classmethod
    def _number_or_channel(cls, value: Any) -> Any:
        if value != "channel" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{value!r}: give a number of inputs, such as 128, or channel")
        return value

    @model_validator(mode="after")
    def _sees_what_it_needs(self) -> Self:
        self.refuse_data(self.method.kind, self.method.reads)
        if not self.method.grid and (given := {"bits", "group", "symmetric"} & self.model_fields_set):
            raise ValueError(f"method {self.method.kind} has a grid of its own: remove {', '.join(sorted(given))}")
        return self

    def shrink(self, loaded: "Loaded", rows: "Sequences | None", folder: Path) -> Metrics:
        from posttrain.compress.blocks import blocks_of, refuse_odd_inputs
        from posttrain.models.linears import matrix_of
        from posttrain.models.quantized import replace
        from posttrain.models.quantizer import mark

        model = loaded.lm.model
        blocks = blocks_of(model, self.targets)
        if self.method.grid and self.group != "channel":
            refuse_odd_inputs(blocks, self.group, f"group: {self.group}", "or channel, ")
        weights = sum(matrix_of(layer).numel() for block in blocks for layer in block.layers.values())
        others = sum(each.numel() for each in model.parameters()) - weights
        grid = {"bits": self.bits, "group": self.group, "symmetric": self.symmetric}
        layers = self.method.layers(loaded.lm, blocks, rows, grid)
        for path, layer in layers.items():
            replace(model, path, layer)
        mark(model)
        self.write(loaded, folder)
        stored = sum(each.nbytes for layer in layers.values() for each in layer.stored().values())
        return {"bits": 8 * stored / weights, "bytes": sizes(weights, others, stored)}

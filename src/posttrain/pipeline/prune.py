"""The stage `prune`: weights of the blocks become zeros."""

from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from posttrain.compress.pruners import Magnitude, Pruner, Wanda
from posttrain.pipeline.smaller import Smaller, sizes
from posttrain.pipeline.stage import Metrics

if TYPE_CHECKING:
    from posttrain.batch import Sequences
    from posttrain.models.load import Loaded


class Prune(Smaller, kind="prune"):
    """Leaves out weights of a model's blocks; writes an ordinary transformers folder with zeros in their places.

    Says how many, what the model would take where only the others are stored, and how far it is from what it was.
    """

    method: Pruner = Wanda()
    """Which weights are left out, and what becomes of the others."""
    sparsity: float = Field(default=0.5, ge=0, lt=1)
    """The share of each layer's weights that is left out."""
    pattern: str | None = Field(default=None, pattern=r"^[1-9]\d*:[1-9]\d*$")
    """In place of `sparsity`: `2:4` keeps 2 of every 4 consecutive inputs, which some hardware multiplies faster."""

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if self.pattern is None:
            return self
        n, m = map(int, self.pattern.split(":"))
        if n >= m:
            raise ValueError(f"pattern {self.pattern} leaves nothing out: give n:m with n of every m to keep, such as 2:4")
        if "sparsity" in self.model_fields_set and self.sparsity != 1 - n / m:
            raise ValueError(f"pattern {self.pattern} leaves out {1 - n / m:.0%}; remove `sparsity`, or the pattern")
        if isinstance(self.method, Magnitude) and "within" in self.method.model_fields_set:
            raise ValueError(f"method.within: pattern {self.pattern} compares the weights of each group; remove `within`")
        return self

    @model_validator(mode="after")
    def _sees_what_it_needs(self) -> Self:
        self.refuse_data(self.method.kind, self.method.reads)
        return self

    def shrink(self, loaded: "Loaded", rows: "Sequences | None", folder: Path) -> Metrics:
        from posttrain.compress.blocks import blocks_of, refuse_odd_inputs
        from posttrain.compress.pruning import stored_bytes
        from posttrain.models.linears import matrix_of

        lm, pattern = loaded.lm, None
        if self.pattern is not None:
            n, m = map(int, self.pattern.split(":"))
            pattern = (n, m)
        blocks = blocks_of(lm.model, self.targets)
        if pattern is not None:
            refuse_odd_inputs(blocks, pattern[1], f"pattern: {self.pattern}")
        self.method.prune(lm, blocks, rows, self.sparsity, pattern)
        self.write(loaded, folder)
        matrices = {path: matrix_of(layer) for block in blocks for path, layer in block.layers.items()}
        weights = {path: matrix.numel() for path, matrix in matrices.items()}
        kept = {path: int(matrix.count_nonzero()) for path, matrix in matrices.items()}
        others = sum(each.numel() for each in lm.model.parameters()) - sum(weights.values())
        places = {path: kept[path] if pattern is None else weights[path] * pattern[0] // pattern[1] for path in weights}
        stored = sum(stored_bytes(weights[path], places[path], pattern) for path in weights)
        return {
            "sparsity": 1 - sum(kept.values()) / sum(weights.values()),
            "matrices": {path: {"weights": weights[path], "zeros": weights[path] - kept[path]} for path in weights},
            "bytes": sizes(sum(weights.values()), others, stored),
        }

"""The kinds of pruning: which weights of a model's blocks are left out, and what becomes of the others."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveFloat

from posttrain.component import Component

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.batch import Sequences
    from posttrain.compress.blocks import Block
    from posttrain.compress.calibration import Seen
    from posttrain.compress.pruning import Pattern
    from posttrain.models.lm import LM


class Pruner(Component):
    """Which weights are left out, and what becomes of the others."""

    reads: ClassVar[bool] = True
    """Whether it looks at what layers see on calibration rows."""
    second: ClassVar[bool] = False
    """Whether it looks at second moments of that, too."""

    def prune(
        self, lm: "LM", blocks: "Sequence[Block]", rows: "Sequences | None", share: float, pattern: "Pattern | None"
    ) -> None:
        """Prunes one block after another, each by what it sees once those before it are pruned."""
        from posttrain.compress.calibration import seen_by
        from posttrain.models.linears import matrix_of, put

        assert rows is not None
        for block in blocks:
            seen = seen_by(lm, rows, block, self.second)
            for path, layer in block.layers.items():
                put(layer, self.pruned(matrix_of(layer), seen[path], share, pattern))

    def pruned(self, weight: "Tensor", seen: "Seen", share: float, pattern: "Pattern | None") -> "Tensor":
        """The matrix [outputs, inputs] with zeros."""
        raise NotImplementedError


class Magnitude(Pruner, kind="magnitude"):
    """The smallest weights are left out, whatever they are multiplied with."""

    reads = False
    within: Literal["global", "layer", "row"] = "layer"
    """What is compared: the weights of all layers, of each layer, or of each output."""

    def prune(
        self, lm: "LM", blocks: "Sequence[Block]", rows: "Sequences | None", share: float, pattern: "Pattern | None"
    ) -> None:
        from posttrain.compress.pruning import lowest_of_all, lowest_of_groups, lowest_of_rows, magnitude
        from posttrain.models.linears import matrix_of, put

        layers = [layer for block in blocks for layer in block.layers.values()]
        scores = [magnitude(matrix_of(layer)) for layer in layers]
        if pattern is not None:
            dropped = [lowest_of_groups(each, pattern) for each in scores]
        elif self.within == "global":
            dropped = lowest_of_all(scores, share)
        elif self.within == "layer":
            dropped = [lowest_of_all([each], share)[0] for each in scores]
        else:
            dropped = [lowest_of_rows(each, share) for each in scores]
        for layer, mask in zip(layers, dropped, strict=True):
            put(layer, matrix_of(layer).masked_fill(mask, 0.0))


class Wanda(Pruner, kind="wanda"):
    """Of each output, the weights with the smallest |w| times the norm of their input are left out; arXiv 2306.11695."""

    def pruned(self, weight: "Tensor", seen: "Seen", share: float, pattern: "Pattern | None") -> "Tensor":
        from posttrain.compress.pruning import lowest_of_groups, lowest_of_rows, wanda

        scores = wanda(weight, seen.squares)
        return weight.masked_fill(lowest_of_rows(scores, share) if pattern is None else lowest_of_groups(scores, pattern), 0.0)


class SparseGPT(Pruner, kind="sparsegpt"):
    """Weights are left out where the output loses least, and the others make good for them; arXiv 2301.00774."""

    second = True
    damp: PositiveFloat = 0.01
    """Added to the diagonal of the second moments, as a share of its mean."""

    def pruned(self, weight: "Tensor", seen: "Seen", share: float, pattern: "Pattern | None") -> "Tensor":
        from posttrain.compress.pruning import sparsegpt

        return sparsegpt(weight, seen.hessian, share, pattern, self.damp)

"""The kinds of rounding: how the matrices of a model's blocks become small integers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PositiveFloat

from posttrain.component import Component

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.batch import Sequences
    from posttrain.compress.blocks import Block
    from posttrain.compress.calibration import Seen
    from posttrain.models.integers import Integers
    from posttrain.models.lm import LM
    from posttrain.models.quantized import Quantized

FEW = 2  # rows on which a fold is tried


class Rounder(Component):
    """How matrices become small integers."""

    reads: ClassVar[bool] = True
    """Whether it looks at what layers see on calibration rows."""
    grid: ClassVar[bool] = True
    """Whether it rounds to equal steps, of which there are some to choose."""

    def quantize(
        self, lm: "LM", blocks: "Sequence[Block]", rows: "Sequences | None", grid: dict[str, Any]
    ) -> "dict[str, Integers]":
        """One block after another; the weights become those of the codes, so that a block sees what the blocks before it give.

        grid: bits, group and symmetric, as `rounding.nearest` takes them.
        """
        from posttrain.compress.calibration import seen_by
        from posttrain.models.linears import put

        found: dict[str, Integers] = {}
        for block in blocks:
            seen = seen_by(lm, rows, block, second=True) if self.reads and rows is not None else {}
            codes = self.rounded(lm, block, rows, seen, grid)
            for path, each in codes.items():
                put(block.layers[path], each.dense())
            found |= codes
        return found

    def layers(
        self, lm: "LM", blocks: "Sequence[Block]", rows: "Sequences | None", grid: dict[str, Any]
    ) -> "dict[str, Quantized]":
        """What stands in the places of the blocks' layers afterwards."""
        from posttrain.models.integers import Whole

        biases = {path: getattr(layer, "bias", None) for block in blocks for path, layer in block.layers.items()}
        return {path: Whole.of(codes, biases[path]) for path, codes in self.quantize(lm, blocks, rows, grid).items()}

    def rounded(
        self, lm: "LM", block: "Block", rows: "Sequences | None", seen: "dict[str, Seen]", grid: dict[str, Any]
    ) -> "dict[str, Integers]":
        """The codes of a block's layers by path."""
        raise NotImplementedError


class Nearest(Rounder, kind="rtn"):
    """Each weight to the nearest point of its group's grid, whatever it is multiplied with."""

    reads = False

    def rounded(
        self, lm: "LM", block: "Block", rows: "Sequences | None", seen: "dict[str, Seen]", grid: dict[str, Any]
    ) -> "dict[str, Integers]":
        from posttrain.compress.rounding import nearest
        from posttrain.models.linears import matrix_of

        return {path: nearest(matrix_of(layer), **grid) for path, layer in block.layers.items()}


class GPTQ(Rounder, kind="gptq"):
    """Column after column to the nearest point, and what that loses made good by the columns after it; arXiv 2210.17323."""

    damp: PositiveFloat = 0.01
    """Added to the diagonal of the second moments, as a share of its mean."""
    order: bool = False
    """Round the columns of the largest inputs first (act-order), on grids that are fixed before."""

    def rounded(
        self, lm: "LM", block: "Block", rows: "Sequences | None", seen: "dict[str, Seen]", grid: dict[str, Any]
    ) -> "dict[str, Integers]":
        from posttrain.compress.rounding import gptq
        from posttrain.models.linears import matrix_of

        return {
            path: gptq(matrix_of(layer), seen[path].hessian, **grid, damp=self.damp, order=self.order)
            for path, layer in block.layers.items()
        }


class AWQ(Rounder, kind="awq"):
    """Columns of large inputs are scaled up before rounding to the nearest, and the inputs scaled down; arXiv 2306.00978.

    The scale of inputs is folded into what comes before, where the architecture allows it; then each group's range is cut off
    where that loses least (not of queries and keys).
    """

    def rounded(
        self, lm: "LM", block: "Block", rows: "Sequences | None", seen: "dict[str, Seen]", grid: dict[str, Any]
    ) -> "dict[str, Integers]":
        from posttrain.compress.folding import folds_of
        from posttrain.compress.rounding import awq_scale, awq_shrink, nearest
        from posttrain.models.linears import matrix_of
        from posttrain.tuners.places import part_of

        assert rows is not None
        moments: dict[str, Tensor] = {path: each.hessian for path, each in seen.items()}
        for fold in folds_of(lm, block, rows.select(range(min(FEW, rows.count)))):
            path, weights = next(iter(fold.readers)), [matrix_of(layer) for layer in fold.readers.values()]
            scale = awq_scale(weights, seen[path].mean_absolute, moments[path], **grid)
            fold.fold(scale)
            for reader in fold.readers:
                moments[reader] = moments[reader] / (scale[:, None] * scale)
        found = {}
        for path, layer in block.layers.items():
            cut = part_of(path) not in {"query", "key", "query_key_value"}
            shrink = awq_shrink(matrix_of(layer), moments[path], **grid) if cut else 1.0
            found[path] = nearest(matrix_of(layer), **grid, shrink=shrink)
        return found


class NormalFloat(Rounder, kind="nf4"):
    """Four bits by the quantiles of a normal distribution, in blocks of 64; arXiv 2305.14314."""

    reads = False
    grid = False
    double: bool = False
    """Keep the blocks' magnitudes in 8 bits too: 4.13 bits a weight in place of 4.5."""

    def layers(
        self, lm: "LM", blocks: "Sequence[Block]", rows: "Sequences | None", grid: dict[str, Any]
    ) -> "dict[str, Quantized]":
        from posttrain.models.linears import matrix_of
        from posttrain.models.quantized import NF4

        return {
            path: NF4.of(matrix_of(layer), getattr(layer, "bias", None), self.double)
            for block in blocks
            for path, layer in block.layers.items()
        }

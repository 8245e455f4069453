"""What linear layers see on calibration rows.

Block by block: the inputs of a block come from the blocks before it as they are by then, already made smaller.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posttrain.batch import Sequences
from posttrain.compress.blocks import Block
from posttrain.errors import RecipeError, RunError
from posttrain.models import layout
from posttrain.models.attention import TreePlan
from posttrain.models.linears import matrix_of
from posttrain.models.lm import LM
from posttrain.models.products import wide

NEVER = 1 << 60  # as long as a shared prefix would have to be
AT_A_TIME = 4096  # tokens


@dataclass
class Seen:
    """The inputs [n, K] that a linear layer has had, added up in float64; `second` only where it is wanted."""

    squares: Float[Tensor, " K"]
    absolute: Float[Tensor, " K"]
    second: Float[Tensor, "K K"] | None
    tokens: int = 0

    @classmethod
    def nothing(cls, inputs: int, second: bool, device: torch.device) -> "Seen":
        zeros = torch.zeros(inputs, dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone(), zeros.new_zeros(inputs, inputs) if second else None)

    def add(self, inputs: Float[Tensor, "n K"]) -> None:
        inputs = wide(inputs)
        self.squares += inputs.square().sum(0)
        self.absolute += inputs.abs().sum(0)
        if self.second is not None:
            self.second += inputs.t() @ inputs
        self.tokens += len(inputs)

    @property
    def hessian(self) -> Float[Tensor, "K K"]:
        """H = 2 X^T X / n."""
        assert self.second is not None, "second moments were not asked for"
        return 2 * self.second / self.tokens

    @property
    def mean_absolute(self) -> Float[Tensor, " K"]:
        return self.absolute / self.tokens


class _Enough(Exception):
    """The block that is looked at has been computed; the rest of the forward is not needed."""


def seen_by(lm: LM, seqs: Sequences, block: Block, second: bool, micro_tokens: int = AT_A_TIME) -> dict[str, Seen]:
    """What each linear layer of a block has seen when the rows have passed; layers that read the same share one `Seen`.

    Every token of every row counts once: prefixes are not shared here, and there is no padding. second: with second moments.
    """
    seen: dict[str, Seen] = {}
    last: list[tuple[Tensor, Seen]] = []  # what was added last: layers that read one tensor share what they have seen

    def looking(path: str) -> Callable[..., None]:
        def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if last and last[0][0] is inputs[0]:
                seen[path] = last[0][1]
                return
            if path not in seen:
                seen[path] = Seen.nothing(matrix_of(layer).shape[1], second, inputs[0].device)
            seen[path].add(inputs[0].detach().flatten(0, -2))
            last[:] = [(inputs[0], seen[path])]

        return look

    hooks = [layer.register_forward_pre_hook(looking(path)) for path, layer in block.layers.items()]
    try:
        forward_to(lm, seqs, block, micro_tokens)
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [path for path in block.layers if path not in seen]:
        raise RecipeError(
            f"{missing[0]}: this architecture reads the layer's weight without calling the layer, so that what it is given "
            "cannot be seen; leave it out with `targets`"
        )
    if odd := [path for path, each in seen.items() if not bool(each.squares.isfinite().all())]:
        raise RunError(f"{odd[0]}: what the calibration rows give this layer is not finite; look at the rows, and at the model")
    return seen


def forward_to(lm: LM, seqs: Sequences, block: Block, micro_tokens: int = AT_A_TIME) -> None:
    """Computes all rows as far as the end of a block."""

    def stop(*_: Any) -> None:
        raise _Enough

    hook = block.module.register_forward_hook(stop)
    try:
        with torch.no_grad():
            for rows in micro_rows(lm, seqs, micro_tokens):
                try:
                    states_of(lm, rows)
                except _Enough:
                    continue
    finally:
        hook.remove()


def micro_rows(lm: LM, seqs: Sequences, micro_tokens: int) -> Iterator[Sequences]:
    """A few rows at a time; one, where the model takes the padded layout: a row alone has no padding."""
    groups = layout.micro_batches(seqs, micro_tokens) if lm.layout == "tree" else [[row] for row in range(seqs.count)]
    for rows in groups:
        yield seqs.select(rows)


def states_of(lm: LM, rows: Sequences) -> None:
    """The forward of rows that share nothing."""
    if lm.layout == "tree":
        tree = layout.tree(rows.rows(), min_shared=NEVER)
        lm.states(tree, TreePlan(tree))
    else:
        lm.states_at(layout.at_last, [rows])

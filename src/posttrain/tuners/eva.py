"""EVA: A begins with the directions in which a layer's inputs vary most; layers that need more of them get more. 2410.07170."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor

from posttrain.errors import DataError
from posttrain.models import layout, soft
from posttrain.models.heads import is_encoder

if TYPE_CHECKING:
    from posttrain.batch import Sequences
    from posttrain.models.backbone import Backbone

RHO = 2.0  # no layer's rank is more than so many times the recipe's
AT_ONCE = 1024  # tokens of a forward
SEED = 0  # of the random projection in which peft finds the directions of wide inputs


class Inputs:
    """The directions of the largest variance of one layer's inputs, which come piece by piece."""

    def __init__(self, width: int, most: int) -> None:
        self.components = min(most, width)
        projected = 4 * self.components <= width  # else all directions are found: wide inputs are where that costs too much
        self.enough = 2 * self.components if projected else width
        self.pca = IncrementalPCA(self.components if projected else width, lowrank=projected, lowrank_seed=SEED)
        self.waiting: list[Tensor] = []

    def add(self, states: Tensor) -> None:
        self.waiting.append(states.detach().double())
        if sum(map(len, self.waiting)) >= max(self.enough, AT_ONCE // 2):
            self.take_in()

    def take_in(self) -> None:
        self.pca.partial_fit(torch.cat(self.waiting))
        self.waiting = []

    def found(self) -> tuple[Tensor, list[float]]:
        """([components, inputs], largest first; the share of the variance that each has)"""
        seen = sum(map(len, self.waiting))
        if seen >= self.enough:
            self.take_in()
        if not hasattr(self.pca, "components_"):
            raise DataError(
                f"tuner.init: eva: {seen} tokens are too few to find {self.components} directions of a layer's inputs (it takes "
                f"{self.enough}); give the stage more rows, lower tuner.rank, or take another init"
            )
        return self.pca.components_[: self.components], self.pca.explained_variance_ratio_[: self.components].tolist()


def directions(lm: "Backbone", rows: "Sequences", layers: Mapping[str, Any], rank: int) -> dict[str, Tensor]:
    """{path of a layer: A, [its rank, its inputs], float64}, for layers whose ranks are `rank` on average.

    Every token counts that the layout lays: a prefix that rows share does so once. Inputs are taken less their mean, as peft
    does. Ranks go where single directions have the largest shares of their layers' variance; each layer keeps one.
    """
    seen: dict[str, Inputs] = {}
    same: dict[str, str] = {}  # {path: an earlier one that is given the very same inputs}
    latest: list[tuple[Tensor, str]] = []
    real: list[Tensor | None] = [None]

    def look(path: str, _layer: Any, given: tuple[Tensor, ...]) -> None:
        states = given[0]
        if latest and latest[0][0] is states:
            same[path] = latest[0][1]
            return
        latest[:] = [(states, path)]
        marks = real[0]
        padded = marks is not None and states.shape[:-1] == marks.shape
        states = states[marks] if padded else states.flatten(0, -2)
        seen.setdefault(path, Inputs(states.shape[-1], round(RHO * rank))).add(states)

    handles = [layer.register_forward_pre_hook(partial(look, path)) for path, layer in layers.items()]
    try:
        with torch.no_grad():
            for piece in layout.micro_batches(rows, AT_ONCE):
                part = rows.select(piece)
                if lm.layout == "padded":
                    real[0] = layout.padded([soft.placed(lm.model, part)]).valid.to(lm.device)
                (lm.logits if is_encoder(lm.model) else lm.hidden)(part)
                latest.clear()
    finally:
        for handle in handles:
            handle.remove()
    found = {path: each.found() for path, each in seen.items()}
    found |= {path: found[other] for path, other in same.items()}
    kept = ranks({path: found[path][1] for path in layers if path in found}, rank)
    return {path: found[path][0][:count] for path, count in kept.items()}


def ranks(shares: Mapping[str, Iterable[float]], rank: int) -> dict[str, int]:
    """{layer: its rank}: one each, and what remains of rank x layers to the directions with the largest shares of variance.

    shares: of each layer's directions, descending.
    """
    further = [(share, path) for path, each in shares.items() for share in list(each)[1:]]
    further.sort(key=lambda each: -each[0])  # stable: of equal ones the earlier layer's
    chosen = [path for _, path in further[: (rank - 1) * len(shares)]]
    return {path: 1 + chosen.count(path) for path in shares}

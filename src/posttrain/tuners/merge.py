"""A model with the adapters on it folded into its weights."""

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.models.source import ModelSource
from posttrain.tuners.below import refuse_unfoldable

if TYPE_CHECKING:
    from posttrain.models.load import Loaded, LoadedScalar


def merged(source: ModelSource | str | Path, apart: bool = False) -> "Loaded | LoadedScalar":
    """A model with all of its adapters folded into its weights; a reward model with its score.

    apart: leave the topmost beside the weights, as it was while it was trained. Raises ModelError for one that cannot be folded.
    """
    from posttrain.models.load import resolved
    from posttrain.tuners.load import load, load_scalar

    source = resolved(source)
    refuse_unfoldable(source)
    return load_scalar(source, apart=apart) if is_scalar(source) else load(source, apart=apart)


def is_scalar(source: ModelSource) -> bool:
    """Whether it is a reward model: an adapter with a score, or a folder whose config says so."""
    from posttrain.tuners.folder import has_score

    folder = source.folder()
    if folder is None:
        return False
    below = source.below()
    if below is None:
        return "SequenceClassification" in (folder / "config.json").read_text(encoding="utf-8")
    return has_score(folder) or is_scalar(below)

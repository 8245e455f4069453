"""How much is sampled, and how often it is learned from."""

from pydantic import Field, NonNegativeInt, PositiveInt

from posttrain.component import Settings
from posttrain.sampling import Sampling


class Rollout(Settings):
    """How much is sampled, and how often it is learned from."""

    problems: PositiveInt = 32
    """Problems sampled at a time."""
    per_problem: PositiveInt = 8
    """Samples of each problem: the group."""
    epochs: PositiveInt = 1
    """How often each sample is learned from."""
    minibatches: PositiveInt = 1
    """Updates an epoch; each takes whole groups."""
    sampling: Sampling = Sampling()
    """How tokens are drawn."""
    refill: NonNegativeInt | None = None
    """How often, at most, further problems are drawn in place of those whose answers all have one score, until `problems` of
    mixed scores are there (dynamic sampling, arXiv 2503.14476); null: as the objective has it (dapo 10, others 0)."""
    audit: NonNegativeInt = 10
    """Before the first rollout, so many problems are tried with answers that should earn nothing (`posttrain audit` has 50)."""
    max_failures: float = Field(default=0.5, ge=0, lt=1)
    """The run stops when a larger share of samples could not be graded. A failure is not a score."""

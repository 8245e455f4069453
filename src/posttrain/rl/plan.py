"""How much is sampled, and how often it is learned from."""

from pydantic import Field, NonNegativeInt, PositiveInt

from posttrain.component import Settings
from posttrain.sampling import Sampling


class Curriculum(Settings):
    """Which problems are drawn, by how often they were solved so far. The score of an answer is what is measured, from 0 to 1."""

    replay: float = Field(default=0.25, ge=0, lt=1)
    """The share of a rollout's problems that have been drawn before: those whose measured rate is nearest to `target`, first
    those that have not been drawn for longest. Problems that are always solved are not drawn again."""
    target: float = Field(default=0.3, ge=0, lt=1)
    """The rate of those that are drawn again. 0.5 teaches most in one rollout; below it stand the hard ones."""
    skip: float = Field(default=1.0, gt=0, le=1)
    """New epochs leave out problems whose measured rate is at least this, while others are left."""
    memory: float = Field(default=0.5, ge=0, lt=1)
    """What an earlier measurement counts in the running rate; the rest is the newest one's."""


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
    curriculum: Curriculum | None = None
    """Problems by measured rate; null: every problem once an epoch, in random order."""
    audit: NonNegativeInt = 10
    """Before the first rollout, so many problems are tried with answers that should earn nothing (`posttrain audit` has 50)."""
    max_failures: float = Field(default=0.5, ge=0, lt=1)
    """The run stops when a larger share of samples could not be graded. A failure is not a score."""

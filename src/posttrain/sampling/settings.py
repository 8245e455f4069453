"""How tokens are drawn."""

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from posttrain.component import Settings


class Sampling(Settings):
    """How tokens are drawn. Training takes `temperature` only: a truncated distribution is not the policy's own."""

    max_tokens: PositiveInt = 256
    """The most tokens of an answer, its end token included."""
    temperature: NonNegativeFloat = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: NonNegativeInt = 0
    """Keep the k likeliest tokens; 0 keeps all. For evaluation only."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the likeliest tokens that together have this probability. For evaluation only."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Keep tokens at least this likely relative to the likeliest. For evaluation only."""

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

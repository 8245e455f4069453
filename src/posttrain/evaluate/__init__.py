"""What a policy can do, with intervals."""

from posttrain.evaluate.evaluate import Evaluation, Report, evaluate
from posttrain.evaluate.intervals import Figure

__all__ = ["Evaluation", "Figure", "Report", "evaluate"]

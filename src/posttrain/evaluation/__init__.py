"""What a policy can do, with intervals."""

from posttrain.evaluation.evaluate import Evaluation, Report, evaluate
from posttrain.evaluation.intervals import Figure

__all__ = ["Evaluation", "Figure", "Report", "evaluate"]

"""Problems and what grades them. Importing this package registers the kinds of both families."""

from posttrain.tasks.choice import ChoiceGrader, ChoiceTask
from posttrain.tasks.countdown import CountdownGrader
from posttrain.tasks.grader import ExactGrader, FunctionGrader, Grader
from posttrain.tasks.learned import JudgeGrader, RewardModelGrader, WeightedGrader
from posttrain.tasks.mathematics import MathGrader
from posttrain.tasks.numeric import EquationsGrader, NumberGrader
from posttrain.tasks.task import ArithmeticTask, CountdownTask, Gsm8kTask, MathTask, ProblemsTask, Task

__all__ = [
    "ArithmeticTask",
    "ChoiceGrader",
    "ChoiceTask",
    "CountdownGrader",
    "CountdownTask",
    "EquationsGrader",
    "ExactGrader",
    "FunctionGrader",
    "Grader",
    "Gsm8kTask",
    "JudgeGrader",
    "MathGrader",
    "MathTask",
    "NumberGrader",
    "ProblemsTask",
    "RewardModelGrader",
    "Task",
    "WeightedGrader",
]

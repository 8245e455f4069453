"""Problems and what grades them. Importing this package registers the kinds of both families."""

from posttrain.tasks.choice import ChoiceGrader, ChoiceTask
from posttrain.tasks.code import CodeGrader, CodeTask
from posttrain.tasks.composed import GatedGrader, WeightedGrader
from posttrain.tasks.countdown import CountdownGrader
from posttrain.tasks.form import JsonGrader, OverlongGrader, RegexGrader, RepetitionGrader, ScriptGrader, ThinkGrader
from posttrain.tasks.grader import ExactGrader, FunctionGrader, Grader
from posttrain.tasks.ifeval import IfevalTask, InstructionsGrader
from posttrain.tasks.learned import JudgeGrader, RewardModelGrader
from posttrain.tasks.mathematics import MathGrader
from posttrain.tasks.numeric import EquationsGrader, NumberGrader
from posttrain.tasks.process import EquationGrader, LinesGrader, ReturnsGrader, RewardFunctionGrader
from posttrain.tasks.task import (
    ArithmeticTask,
    CountdownTask,
    Gsm8kTask,
    GuessNumberTask,
    MathTask,
    ProblemsTask,
    RoomsTask,
    Task,
)

__all__ = [
    "ArithmeticTask",
    "ChoiceGrader",
    "ChoiceTask",
    "CodeGrader",
    "CodeTask",
    "CountdownGrader",
    "CountdownTask",
    "EquationGrader",
    "EquationsGrader",
    "ExactGrader",
    "FunctionGrader",
    "GatedGrader",
    "Grader",
    "Gsm8kTask",
    "GuessNumberTask",
    "IfevalTask",
    "InstructionsGrader",
    "JsonGrader",
    "JudgeGrader",
    "LinesGrader",
    "MathGrader",
    "MathTask",
    "NumberGrader",
    "OverlongGrader",
    "ProblemsTask",
    "RegexGrader",
    "RepetitionGrader",
    "ReturnsGrader",
    "RewardFunctionGrader",
    "RewardModelGrader",
    "RoomsTask",
    "ScriptGrader",
    "Task",
    "ThinkGrader",
    "WeightedGrader",
]

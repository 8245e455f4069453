"""What signal moves the parameters."""

from posttrain.objectives.grpo import GRPO
from posttrain.objectives.objective import Loss, Objective, OnPolicy
from posttrain.objectives.sft import SFT, Pretrain

__all__ = ["GRPO", "SFT", "Loss", "Objective", "OnPolicy", "Pretrain"]

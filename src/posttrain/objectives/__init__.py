"""What signal moves the parameters. Importing this package registers the kinds."""

from posttrain.objectives import preference as preference
from posttrain.objectives import reward as reward
from posttrain.objectives import unpaired as unpaired
from posttrain.objectives.classify import Classify
from posttrain.objectives.grpo import GRPO
from posttrain.objectives.match_logits import MatchLogits
from posttrain.objectives.objective import Loss, Objective, OnPolicy
from posttrain.objectives.online import XPO, OnlineDPO
from posttrain.objectives.policy_gradient import PolicyGradient
from posttrain.objectives.ppo import PPO
from posttrain.objectives.preference import DPO, IPO, PreferenceObjective
from posttrain.objectives.reward import BradleyTerry, RewardObjective
from posttrain.objectives.sft import SFT, Pretrain
from posttrain.objectives.unpaired import KTO

__all__ = [
    "DPO", "GRPO", "IPO", "KTO", "PPO", "SFT", "XPO", "BradleyTerry", "Classify", "Loss", "MatchLogits", "Objective",
    "OnPolicy", "OnlineDPO", "PolicyGradient",
    "PreferenceObjective", "Pretrain", "RewardObjective",
]  # fmt: skip

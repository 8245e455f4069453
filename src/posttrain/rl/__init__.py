"""On-policy training as an iterator."""

from posttrain.rl.drawing import Drawer, Drawn, Source
from posttrain.rl.plan import Rollout
from posttrain.rl.rollouts import OnPolicyStream, Rolled

__all__ = ["Drawer", "Drawn", "OnPolicyStream", "Rolled", "Rollout", "Source"]

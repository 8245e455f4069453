"""On-policy training as an iterator."""

from posttrain.rl.rollouts import OnPolicyStream, Rolled, Rollout

__all__ = ["OnPolicyStream", "Rolled", "Rollout"]

"""Which parameters move."""

from posttrain.tuners.lora import LoRA
from posttrain.tuners.tuner import Full, Tuner, tuned

__all__ = ["Full", "LoRA", "Tuner", "tuned"]

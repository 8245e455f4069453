"""Which parameters move."""

from posttrain.tuners.adapter import Adapter
from posttrain.tuners.delta_scale import DeltaScale
from posttrain.tuners.ia3 import IA3
from posttrain.tuners.in_place import BitFit, Full, Head, Layers
from posttrain.tuners.lora import LoRA
from posttrain.tuners.soft import Prefix, Prompt, PTuning
from posttrain.tuners.tuner import Tuner, tuned

__all__ = [
    "IA3", "Adapter", "BitFit", "DeltaScale", "Full", "Head", "Layers", "LoRA", "PTuning", "Prefix", "Prompt", "Tuner", "tuned",
]  # fmt: skip

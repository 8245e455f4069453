"""Where tokens come from."""

from posttrain.sampling.sampler import InProcess, Sampler, sample
from posttrain.sampling.settings import Sampling

__all__ = ["InProcess", "Sampler", "Sampling", "sample"]

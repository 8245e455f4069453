"""Where tokens come from."""

from posttrain.sampling.sampler import InProcess, ProcessSampler, Sampler, sample
from posttrain.sampling.settings import Sampling

__all__ = ["InProcess", "ProcessSampler", "Sampler", "Sampling", "sample"]

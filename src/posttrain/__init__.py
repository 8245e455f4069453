"""posttrain: post-training for language models. One recipe takes a base model to a better one, and shows that it is better."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Read by OpenMP and oneDNN when torch loads (docs/performance.md). Threads that wait by spinning for long lose most of a machine
# that they share; every new length of a bfloat16 product leaves compiled kernels, and by default thousands are kept: 0.4 GB.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from posttrain.api import evaluate, export, load, merge, run, train
    from posttrain.pipeline.recipe import Recipe

_HOME = {"Recipe": "pipeline.recipe"} | dict.fromkeys(("run", "train", "evaluate", "load", "merge", "export"), "api")

__all__ = ["Recipe", "evaluate", "export", "load", "merge", "run", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"posttrain has no {name!r}")
    return getattr(import_module(f"posttrain.{_HOME[name]}"), name)

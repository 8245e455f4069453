"""How torch and transformers are imported: without a search for garbage in them."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """For the first import of torch and what stands on it: no garbage collection within, and none of what was brought later.

    They bring 360,000 objects that live to the end. Searching these for garbage, again and again while they come, takes a quarter
    of the time of the import; and each full collection after it a third of a second.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()

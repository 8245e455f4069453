"""Randomness is addressed, not carried.

Every draw in posttrain comes from a generator made from (seed, purpose, address...): a shuffle from its epoch, a sample from
its problem and index. Nothing random needs to be saved, and no draw depends on batching, order or the number of processes.
"""

import hashlib

import numpy as np


def key(seed: int, purpose: str, *address: int | str) -> int:
    """A 128-bit integer that names one draw."""
    text = "\x1f".join([str(seed), purpose, *map(str, address)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, purpose: str, *address: int | str) -> np.random.Generator:
    """A numpy generator (Philox, counter based) whose stream depends on nothing but its address."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *address)))

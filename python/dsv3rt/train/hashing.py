"""Numbers that look random and depend on their keys alone: the same on every machine and in every version."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MASK = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(*numbers: int) -> int:
    """64 well-mixed bits of the numbers (splitmix64, chained)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + _STEP & _MASK
        state = (state ^ state >> 30) * _FIRST & _MASK
        state = (state ^ state >> 27) * _SECOND & _MASK
        state ^= state >> 31
    return state


def random_words(key: int, count: int) -> NDArray[np.uint64]:
    """`count` numbers of 64 bits: splitmix64's stream from `key` on."""
    state = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP)
    state = (state ^ state >> np.uint64(30)) * np.uint64(_FIRST)
    state = (state ^ state >> np.uint64(27)) * np.uint64(_SECOND)
    return state ^ state >> np.uint64(31)

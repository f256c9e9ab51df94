"""Training samples: fixed windows over a packed stream of tokens, in a fresh pseudo-random order each epoch.

Nothing is stored but a position: sample number `position` of a run is found in constant time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ROUNDS = 6
_MASK = 2**64 - 1


class TokenStream(Protocol):
    """Tokens that are read by slices: an array, or shards on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> NDArray[np.integer]: ...


@dataclass(frozen=True)
class Permutation:
    """A keyed pseudo-random permutation of range(size): a Feistel network, walked until it lands inside the range."""

    size: int
    key: int

    def __post_init__(self) -> None:
        assert self.size > 0

    def __getitem__(self, index: int) -> int:
        assert 0 <= index < self.size
        half = max(1, ((self.size - 1).bit_length() + 1) // 2)  # the domain 4**half is less than 4 * size + 4
        mask = 2**half - 1
        while True:
            left, right = index >> half, index & mask
            for round_ in range(_ROUNDS):
                left, right = right, left ^ (_mix(self.key, round_, right) & mask)
            index = left << half | right
            if index < self.size:
                return index


def _mix(*numbers: int) -> int:
    """64 well-mixed bits of the numbers (splitmix64, chained)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


@dataclass(frozen=True)
class Samples:
    """Windows of seq_len + 1 tokens at every seq_len tokens of a stream, so that each token is predicted once."""

    tokens: TokenStream
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        assert len(self) > 0, "the corpus promises at least one sample"

    def __len__(self) -> int:
        """Samples in an epoch; the last, incomplete window is dropped."""
        return (len(self.tokens) - 1) // self.seq_len

    def window_index(self, position: int) -> int:
        """Which window the run's sample number `position` is: every window once an epoch."""
        epoch, index = divmod(position, len(self))
        return Permutation(len(self), _mix(self.seed, epoch))[index]

    def batch(self, position: int, count: int) -> tuple[Tensor, Tensor]:
        """tokens_BT and labels_BT (the token after each), int64, of the `count` samples from `position` on."""
        starts = [self.window_index(position + offset) * self.seq_len for offset in range(count)]
        windows = np.stack([self.tokens[start : start + self.seq_len + 1] for start in starts]).astype(np.int64)
        window_BT = torch.from_numpy(windows)
        return window_BT[:, :-1], window_BT[:, 1:]

"""Training samples: fixed windows over a packed stream of tokens, in a fresh pseudo-random order each epoch.

Nothing is stored but a position: sample number `position` of a run is found in constant time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv3rt.train.hashing import mix

_ROUNDS = 6


class TokenStream(Protocol):
    """Tokens that are read by slices: an array, or shards on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> NDArray[np.integer]: ...


class SampleSource(Protocol):
    """What a run trains on: any stretch of its samples, found by position."""

    def batch(self, position: int, count: int) -> tuple[Tensor, Tensor]: ...


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
                left, right = right, left ^ (mix(self.key, round_, right) & mask)
            index = left << half | right
            if index < self.size:
                return index


class JoinedStream:
    """Streams one after the other as one."""

    def __init__(self, parts: Sequence[TokenStream]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)]).tolist()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, where: slice) -> NDArray[np.integer]:
        start, stop, step = where.indices(len(self))
        assert step == 1
        pairs = zip(self._starts, self._parts, strict=False)
        return np.concatenate([part[max(start - first, 0) : max(stop - first, 0)] for first, part in pairs])


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
        return Permutation(len(self), mix(self.seed, epoch))[index]

    def window(self, position: int) -> NDArray[np.integer]:
        """The seq_len + 1 tokens of the run's sample number `position`."""
        start = self.window_index(position) * self.seq_len
        return self.tokens[start : start + self.seq_len + 1]

    def batch(self, position: int, count: int) -> tuple[Tensor, Tensor]:
        """tokens_BT and labels_BT (the token after each), int64, of the `count` samples from `position` on."""
        return as_batch([self.window(position + offset) for offset in range(count)])


def as_batch(windows: Sequence[NDArray[np.integer]]) -> tuple[Tensor, Tensor]:
    """tokens_BT and labels_BT, int64, of windows of the same length."""
    window_BT = torch.from_numpy(np.stack(windows).astype(np.int64))
    return window_BT[:, :-1], window_BT[:, 1:]

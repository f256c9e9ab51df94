"""The sample order: a permutation an epoch, found in constant time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv3rt.train.data import Permutation, Samples


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permutation_is_one(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    assert sorted(permutation[index] for index in range(size)) == list(range(size))


def test_permutation_mixes() -> None:
    """Neighbours don't stay together, keys differ: what chance would give, within wide margins."""
    a, b = ([Permutation(1000, key)[index] for index in range(1000)] for key in (1, 2))
    distances = np.abs(np.diff(a))
    assert 250 < distances.mean() < 420  # 333 for a random order
    assert sum(x == y for x, y in zip(a, b, strict=True)) < 10
    assert abs(np.corrcoef(a, np.arange(1000))[0, 1]) < 0.15


def test_permutation_is_constant_time() -> None:
    """A size no array could hold, and no more than a few walks for any index."""
    huge = Permutation(10**15 + 7, 3)
    found = {huge[index] for index in range(0, 10**15, 10**13)}
    assert len(found) == 100
    assert all(0 <= index < huge.size for index in found)


def test_every_window_once_an_epoch() -> None:
    samples = Samples(np.arange(1003, dtype=np.uint16), seq_len=10, seed=5)
    epochs = [[samples.window_index(epoch * 100 + index) for index in range(100)] for epoch in range(3)]
    assert len(samples) == 100
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_windows_cover_the_stream_once() -> None:
    """Every token but the first is a label exactly once; the incomplete window at the end is dropped."""
    samples = Samples(np.arange(1003, dtype=np.uint16), seq_len=10, seed=5)
    tokens_BT, labels_BT = samples.batch(0, 100)
    assert tokens_BT.dtype == labels_BT.dtype == torch.int64
    assert torch.equal(labels_BT, tokens_BT + 1)
    assert sorted(labels_BT.flatten().tolist()) == list(range(1, 1001))


def test_batches_depend_on_position_alone() -> None:
    samples = Samples(np.arange(5000, dtype=np.int32), seq_len=7, seed=1)
    whole, _ = samples.batch(1000, 8)
    parts = torch.cat([samples.batch(1000 + first, 2)[0] for first in (0, 2, 4, 6)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, Samples(samples.tokens, 7, seed=2).batch(1000, 8)[0])

"""Several sources in given shares: which source sample number `position` of a run comes from, and which sample of it.

As with one source, nothing is stored but the position. Positions are dealt in blocks: the weights say how many of a
block each source gets, a shuffle with a key says which. Rounding does not add up: after any number of blocks a source's
share is met to within one sample for it and each source before it. A source gives its samples in its own order, every
one once in each of its epochs.
"""

from __future__ import annotations

import bisect
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsv3rt.config import MixturePhase, TrainConfig
from dsv3rt.train.corpus import load_corpus
from dsv3rt.train.data import JoinedStream, Samples, SampleSource, as_batch
from dsv3rt.train.hashing import mix, random_words
from dsv3rt.train.tokenizer import Tokenizer

BLOCK = 1024  # positions
_BLOCKS_AT_HAND = 4

Block = tuple[
    NDArray[np.int64], NDArray[np.int64]
]  # of each position in it: the source, and which draw from that it is


@dataclass(frozen=True)
class TrainingData:
    """What a run reads. fingerprint: changes when the training tokens do. description: for people."""

    train: SampleSource
    validation: Samples
    description: str
    fingerprint: int


def open_data(config: TrainConfig, tokenizer: Tokenizer) -> TrainingData:
    """Open `config.data`: its paths as one source, or each as a source of its own where there is a mixture.

    The documents held out of all sources are joined for validation, whatever the weights.
    """
    seq_len, seed, data = config.train.seq_len, config.train.seed, config.data
    if not data.mixture:
        corpus = load_corpus(data, tokenizer, seq_len + 1)
        validation = Samples(corpus.validation, seq_len, seed=0)
        return TrainingData(Samples(corpus.train, seq_len, seed), validation, corpus.description, corpus.fingerprint)
    alone = [replace(data, paths=(path,), mixture=()) for path in data.paths]
    corpora = [load_corpus(source, tokenizer, seq_len + 1) for source in alone]
    sources = [Samples(corpus.train, seq_len, mix(seed, index)) for index, corpus in enumerate(corpora)]
    lines = [f"{path}: {corpus.description}" for path, corpus in zip(data.paths, corpora, strict=True)]
    return TrainingData(
        Mixture(sources, data.mixture, seed),
        Samples(JoinedStream([corpus.validation for corpus in corpora]), seq_len, seed=0),
        "\n       ".join(lines),
        zlib.crc32(json.dumps([corpus.fingerprint for corpus in corpora]).encode()),
    )


class Mixture:
    """The samples of several sources, drawn as `phases` say; all sources have the same seq_len.

    A phase ends with the first sample before which its `until_tokens` tokens were drawn.
    """

    def __init__(self, sources: Sequence[Samples], phases: Sequence[MixturePhase], seed: int) -> None:
        assert all(len(phase.weights) == len(sources) > 0 for phase in phases)
        self._sources = sources
        seq_len = sources[0].seq_len
        self._starts = [0] + [math.ceil((phase.until_tokens or 0) / seq_len) for phase in phases[:-1]]

        @lru_cache(maxsize=_BLOCKS_AT_HAND)
        def block(phase: int, index: int) -> Block:
            return _deal(phases[phase].weights, index, mix(seed, phase, index))

        self._block = block
        self._drawn_before = [[0] * len(sources)]  # for each phase, from each source
        for phase, (start, end) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            drawn = self._drawn(phase, phases[phase].weights, end - start)
            self._drawn_before.append([a + b for a, b in zip(self._drawn_before[-1], drawn, strict=True)])

    def locate(self, position: int) -> tuple[int, int]:
        """The source of the run's sample number `position`, and how many were drawn from that source before."""
        phase = bisect.bisect_right(self._starts, position) - 1
        index, offset = divmod(position - self._starts[phase], BLOCK)
        sources, draws = self._block(phase, index)
        source = int(sources[offset])
        return source, self._drawn_before[phase][source] + int(draws[offset])

    def batch(self, position: int, count: int) -> tuple[Tensor, Tensor]:
        """As `Samples.batch`."""
        places = [self.locate(position + offset) for offset in range(count)]
        return as_batch([self._sources[source].window(draw) for source, draw in places])

    def _drawn(self, phase: int, weights: Sequence[float], count: int) -> list[int]:
        """What the first `count` positions of a phase draw from each source."""
        index, rest = divmod(count, BLOCK)
        begun = np.bincount(self._block(phase, index)[0][:rest], minlength=len(weights))
        return [whole + int(more) for whole, more in zip(_shares(weights, index * BLOCK), begun, strict=True)]


def same_past(before: Sequence[MixturePhase], now: Sequence[MixturePhase], tokens: int) -> bool:
    """Whether two mixtures draw the same up to `tokens`: what lies ahead of a run may be planned anew."""
    return _past(before, tokens) == _past(now, tokens)


def _past(phases: Sequence[MixturePhase], tokens: int) -> list[tuple[tuple[float, ...], float]]:
    past: list[tuple[tuple[float, ...], float]] = []
    for phase in phases:
        if past and past[-1][1] >= tokens:
            break
        past.append((phase.weights, min(phase.until_tokens or math.inf, tokens)))
    return past


def _shares(weights: Sequence[float], count: int) -> list[int]:
    """`count` divided in proportion to the weights, without a remainder; no share shrinks where `count` grows.

    Each source takes its part of what those before it left, rounded down, in exact arithmetic.
    """
    shares: list[int] = []
    left, weight_left = count, sum(map(Fraction, weights))
    for weight in map(Fraction, weights):
        shares.append(left * weight // weight_left if weight else 0)
        left -= shares[-1]
        weight_left -= weight
    return shares


def _deal(weights: Sequence[float], index: int, key: int) -> Block:
    """A block of a phase: its sources, shuffled, and the number of each draw from its source in that phase."""
    before, after = (_shares(weights, blocks * BLOCK) for blocks in (index, index + 1))
    counts = [last - first for first, last in zip(before, after, strict=True)]
    order = np.argsort(random_words(key, BLOCK), kind="stable")
    sources, draws = (np.empty(BLOCK, dtype=np.int64) for _ in range(2))
    sources[order] = np.repeat(np.arange(len(weights)), counts)
    for source, first in enumerate(before):
        mine = np.flatnonzero(sources == source)
        draws[mine] = first + np.arange(len(mine))
    return sources, draws

"""Documents to tokens: fill in the middle, so that a model learns to write between two texts, and split line breaks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsv3rt.config import DataConfig
from dsv3rt.train.newlines import NewlineSplit, newline_split
from dsv3rt.train.tokenizer import Tokenizer

_SHORTEST = 3  # bytes; shorter documents are left as they are


def document_key(name: str) -> int:
    """64 bits that depend on a document's name alone: its side of the split and its cuts follow from them."""
    digest = hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big")


@dataclass(frozen=True)
class Encoder:
    """Documents to tokens, a share `fim_rate` of them as `<begin>prefix<hole>suffix<end>middle` (PSM).

    Which documents, and where they are cut, depends on the document's key and the seed alone. Cuts are made in the
    text, between characters, so that a model learns to begin and end within a token. `newlines` comes after that.
    """

    tokenizer: Tokenizer
    fim_rate: float = 0.0
    fim_seed: int = 0
    newlines: NewlineSplit | None = None

    def encode(self, keys: Sequence[int], documents: Sequence[bytes]) -> list[NDArray[np.int64]]:
        """The tokens of each document, without eos."""
        parts = [self._parts(key, document) for key, document in zip(keys, documents, strict=True)]
        encoded = iter(self.tokenizer.encode([part for document in parts for part in document]))
        arranged = [self._arrange([next(encoded) for _ in document]) for document in parts]
        if self.newlines is None:
            return arranged
        return [self.newlines.apply(key, tokens) for key, tokens in zip(keys, arranged, strict=True)]

    def _parts(self, key: int, document: bytes) -> list[bytes]:
        """[document], or [prefix, suffix, middle]."""
        if self.fim_rate == 0 or len(document) < _SHORTEST:
            return [document]
        digest = hashlib.sha256(key.to_bytes(8, "big") + self.fim_seed.to_bytes(8, "big")).digest()
        chance, one, two = (int.from_bytes(digest[first : first + 8], "big") for first in (0, 8, 16))
        if chance >= self.fim_rate * 2**64:
            return [document]
        low, high = sorted(_character_start(document, number * (len(document) + 1) >> 64) for number in (one, two))
        return [document[:low], document[high:], document[low:high]]

    def _arrange(self, parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        if len(parts) == 1:
            return parts[0]
        assert self.tokenizer.fim is not None, "the tokenizer was opened for FIM"
        marks = [np.array([token], dtype=np.int64) for token in self.tokenizer.fim]
        return np.concatenate([piece for pair in zip(marks, parts, strict=True) for piece in pair])


def open_encoder(tokenizer: Tokenizer, config: DataConfig) -> Encoder:
    """The encoder that the [data] section describes.

    Raises:
        ValueError: tokens are to be split, and the tokenizer has none that join punctuation and line breaks.
    """
    newlines = None
    if config.newline_split_rate:
        newlines = newline_split(tokenizer, config.newline_split_rate, config.newline_split_seed)
        if not newlines.parts:
            raise ValueError(
                f"data.newline_split_rate: must be 0 with '{config.tokenizer}', none of its tokens joins punctuation "
                f"and line breaks, got {config.newline_split_rate}"
            )
    return Encoder(tokenizer, config.fim_rate, config.fim_seed, newlines)


def _character_start(document: bytes, position: int) -> int:
    """`position`, or the start of the UTF-8 character that it lies in."""
    for start in range(position, max(position - 4, -1), -1):
        if start == len(document) or document[start] & 0xC0 != 0x80:
            return start
    return position  # not UTF-8

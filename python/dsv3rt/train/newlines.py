"""Tokens that join punctuation and a line break, split now and then.

A tokenizer that writes ".\\n" as one token never shows a model a "." with a line break after it, so that a prompt which
ends in "." is none it knows. DeepSeek-V3 splits a share of such tokens in training, and does not say which share.
Source: DeepSeek-V3 report (arXiv 2412.19437) sec. 4.1.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsv3rt.train.hashing import mix, random_words
from dsv3rt.train.tokenizer import Tokenizer

_BREAKS = "\r\n"


@dataclass(frozen=True)
class NewlineSplit:
    """Splits a share `rate` of the tokens in `parts`; which ones depends on the document's key and the seed alone.

    is_merged_V: whether a token has parts, by its number.
    """

    rate: float
    seed: int
    parts: Mapping[int, NDArray[np.int64]]
    is_merged_V: NDArray[np.bool_]

    def apply(self, key: int, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens of a document, some of them as their parts."""
        merged = np.flatnonzero(self.is_merged_V[tokens])
        chance = (random_words(mix(key, self.seed), len(merged)) >> np.uint64(11)) * 2.0**-53  # in [0, 1)
        pieces: list[NDArray[np.int64]] = []
        done = 0
        for index in merged[chance < self.rate].tolist():
            pieces += [tokens[done:index], self.parts[int(tokens[index])]]
            done = index + 1
        return np.concatenate([*pieces, tokens[done:]])


def newline_split(tokenizer: Tokenizer, rate: float, seed: int) -> NewlineSplit:
    """A split for this tokenizer; its `parts` are empty where no token joins punctuation and line breaks."""
    parts = _parts(tokenizer)
    is_merged_V = np.zeros(tokenizer.vocab_size, dtype=bool)
    is_merged_V[list(parts)] = True
    return NewlineSplit(rate, seed, parts, is_merged_V)


def _parts(tokenizer: Tokenizer) -> dict[int, NDArray[np.int64]]:
    """Every token of punctuation and then line breaks, and the tokens that say the two apart."""
    texts = {token: tokenizer.decode([token]) for token in range(tokenizer.vocab_size)}
    joined = {token: text for token, text in texts.items() if _is_joined(text)}
    heads = [text.rstrip(_BREAKS) for text in joined.values()]
    tails = [text[len(head) :] for text, head in zip(joined.values(), heads, strict=True)]
    encoded = tokenizer.encode([text.encode() for text in (*heads, *tails)])
    found: dict[int, NDArray[np.int64]] = {}
    for (token, text), head, tail in zip(joined.items(), encoded[: len(heads)], encoded[len(heads) :], strict=True):
        apart = np.concatenate([head, tail])
        if tokenizer.decode(apart.tolist()) == text:  # not where a tokenizer puts a space before each text
            found[token] = apart
    return found


def _is_joined(text: str) -> bool:
    """One space or none, punctuation or symbols, line breaks."""
    marks = text.rstrip(_BREAKS).removeprefix(" ")
    return text[-1:] in ("\r", "\n") and bool(marks) and all(_is_mark(character) for character in marks)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS" and character != "\ufffd"

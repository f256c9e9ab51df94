"""Text files to two streams of tokens, training and validation."""

from __future__ import annotations

import hashlib
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsv3rt.config import DataConfig
from dsv3rt.train.tokenizer import Tokenizer

STDLIB = "python-stdlib"
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_ENCODE_AT_ONCE = 64  # documents


@dataclass(frozen=True)
class Document:
    """One file; `name` is its path relative to the entry of `data.paths` that it came from, with forward slashes."""

    name: str
    path: Path


@dataclass(frozen=True)
class Corpus:
    """The documents' tokens, each document followed by eos; `description` is one line for people."""

    train: NDArray[np.integer]
    validation: NDArray[np.integer]
    description: str

    @property
    def fingerprint(self) -> int:
        """Changes when the training tokens do: a resumed run must see the same ones."""
        return zlib.crc32(np.ascontiguousarray(self.train).data)


def load_corpus(config: DataConfig, tokenizer: Tokenizer, min_tokens: int) -> Corpus:
    """Read, tokenise and split what `config` names, all of it into memory; each side has at least `min_tokens` tokens.

    Whole files go to validation, chosen by a hash of their name, so that the choice is the same on every machine and
    survives files coming and going. Where that leaves a side too short (a single file, say), the end of the joined
    tokens is held out instead.
    """
    documents = find_documents(config)
    held_out = [is_validation(document.name, config.validation_fraction) for document in documents]
    tokens = _tokenise(documents, tokenizer)
    train = _join([t for t, held in zip(tokens, held_out, strict=True) if not held], tokenizer)
    validation = _join([t for t, held in zip(tokens, held_out, strict=True) if held], tokenizer)
    what = f"{len(documents)} files, {sum(held_out)} of them for validation"
    if min(len(train), len(validation)) < min_tokens:
        joined = _join(tokens, tokenizer)
        held = max(round(len(joined) * config.validation_fraction), min_tokens)
        if len(joined) - held < min_tokens:
            raise ValueError(
                f"data.paths: too little text: {len(joined)} tokens, but one training and one validation sequence need "
                f"{2 * min_tokens}; add text or lower train.seq_len"
            )
        train, validation = joined[:-held], joined[-held:]
        what = f"{len(documents)} files, the last {held} tokens for validation"
    return Corpus(train, validation, f"{what}; {len(train):,} training and {len(validation):,} validation tokens")


def find_documents(config: DataConfig) -> list[Document]:
    """The files that `config.paths` names, in a fixed order, each once."""
    found: dict[Path, Document] = {}
    for entry in config.paths:
        for document in _expand(entry, config.suffixes):
            found.setdefault(document.path.resolve(), document)
    return list(found.values())


def is_validation(name: str, fraction: float) -> bool:
    """Whether the file of this name is held out."""
    digest = hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _expand(entry: str, suffixes: Sequence[str]) -> list[Document]:
    if entry == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        documents = list(_walk(root, (".py",), _STDLIB_SKIPPED))
    else:
        root = Path(entry)
        if root.is_file():
            return [Document(root.name, root)]
        if not root.exists():
            raise ValueError(f"data.paths: no such file or folder: '{entry}'")
        documents = list(_walk(root, suffixes, {"__pycache__"}))
    if not documents:
        raise ValueError(f"data.paths: no files ending in {' '.join(suffixes)} (data.suffixes) under '{entry}'")
    return sorted(documents, key=lambda document: document.name)


def _walk(root: Path, suffixes: Sequence[str], skipped: set[str]) -> Iterator[Document]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        for name in files:
            if name.endswith(tuple(suffixes)):
                path = Path(folder, name)
                yield Document(path.relative_to(root).as_posix(), path)


def _tokenise(documents: Sequence[Document], tokenizer: Tokenizer) -> list[NDArray[np.integer]]:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    tokens: list[NDArray[np.integer]] = []
    for first in range(0, len(documents), _ENCODE_AT_ONCE):
        batch = [document.path.read_bytes() for document in documents[first : first + _ENCODE_AT_ONCE]]
        tokens += [encoded.astype(dtype) for encoded in tokenizer.encode(batch)]
    return tokens


def _join(documents: Sequence[NDArray[np.integer]], tokenizer: Tokenizer) -> NDArray[np.integer]:
    """The documents one after the other, each followed by eos; empty ones are left out."""
    eos = np.array([tokenizer.eos])
    parts = [part for document in documents if len(document) for part in (document, eos.astype(document.dtype))]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)

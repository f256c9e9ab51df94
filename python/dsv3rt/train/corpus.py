"""Text files, or folders of token shards, to two streams of tokens, training and validation."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsv3rt.config import DataConfig
from dsv3rt.train import shards
from dsv3rt.train.fim import Encoder, document_key, open_encoder
from dsv3rt.train.shards import ShardFolder
from dsv3rt.train.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dsv3rt.train.data import TokenStream  # needs torch, tokenising does not

STDLIB = "python-stdlib"
PACKAGE = "python-package:"
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_ENCODE_AT_ONCE = 64  # documents


@dataclass(frozen=True)
class Document:
    """One file; `name` is its path relative to the entry of `data.paths` that it came from, with forward slashes."""

    name: str
    path: Path


@dataclass(frozen=True)
class Corpus:
    """The documents' tokens, each document followed by eos; `description` is one line for people.

    fingerprint: changes when the training tokens do; a resumed run must see the same ones.
    """

    train: TokenStream
    validation: TokenStream
    description: str
    fingerprint: int


def load_corpus(config: DataConfig, tokenizer: Tokenizer, min_tokens: int) -> Corpus:
    """Open what `config` names and split it; each side has at least `min_tokens` tokens.

    Text is read and tokenised into memory, shards are mapped. Whole documents go to validation, chosen by a hash of
    their name, so that the choice is the same on every machine and survives files coming and going. Where that leaves
    a side too short (a single file, say), the end of the joined tokens is held out instead.
    """
    sharded = [entry for entry in config.paths if shards.is_shard_folder(Path(entry))]
    if len(sharded) == len(config.paths):
        return _open_shards(config, tokenizer, min_tokens)
    if sharded:
        raise ValueError(f"data.paths: must be all text or all token shards, only '{sharded[0]}' holds shards")
    documents = find_documents(config)
    held_out = [is_validation(document.name, config.validation_fraction) for document in documents]
    tokens = _tokenise(documents, open_encoder(tokenizer, config))
    train = _join([t for t, held in zip(tokens, held_out, strict=True) if not held], tokenizer)
    validation = _join([t for t, held in zip(tokens, held_out, strict=True) if held], tokenizer)
    what = f"{len(documents)} files, {sum(held_out)} of them for validation"
    if min(len(train), len(validation)) < min_tokens:
        joined = _join(tokens, tokenizer)
        kept = _kept_tokens(len(joined), config.validation_fraction, min_tokens)
        train, validation = joined[:kept], joined[kept:]
        what = f"{len(documents)} files, the last {len(validation)} tokens for validation"
    return Corpus(train, validation, _describe(what, train, validation), zlib.crc32(np.ascontiguousarray(train).data))


def _open_shards(config: DataConfig, tokenizer: Tokenizer, min_tokens: int) -> Corpus:
    folders = [ShardFolder.open(Path(entry)) for entry in config.paths]
    for folder in folders:
        _check_fits(folder, config, tokenizer)
    num_documents = sum(folder.manifest["documents"] for folder in folders)
    train, validation, num_held = shards.open_streams(folders, config.validation_fraction)
    what = f"{num_documents:,} documents in shards, {num_held:,} of them for validation"
    if min(len(train), len(validation)) < min_tokens:
        joined = shards.whole_stream(folders)
        kept = _kept_tokens(len(joined), config.validation_fraction, min_tokens)
        train, validation = joined.part(0, kept), joined.part(kept, len(joined))
        what = f"{num_documents:,} documents in shards, the last {len(validation)} tokens for validation"
    return Corpus(train, validation, _describe(what, train, validation), shards.fingerprint(folders))


def _check_fits(folder: ShardFolder, config: DataConfig, tokenizer: Tokenizer) -> None:
    """The shards must be what this configuration would make of their text."""
    made_with = folder.manifest["tokenizer"]
    if made_with["identity"] != tokenizer.identity:
        raise ValueError(
            f"data.tokenizer: '{folder.path}' was made with another tokenizer, '{made_with['name']}' "
            f"({made_with['identity'][:19]}), got '{config.tokenizer}' ({tokenizer.identity[:19]})"
        )
    for change in ("fim", "newline_split"):
        made = folder.manifest[change]
        rate, seed = getattr(config, f"{change}_rate"), getattr(config, f"{change}_seed")
        for name, value in (("rate", rate), ("seed", seed)):
            if made[name] != value and (name == "rate" or rate):
                where = f"that of the shards in '{folder.path}'"
                raise ValueError(f"data.{change}_{name} must be {made[name]}, {where}, got {value}")


def _kept_tokens(total: int, fraction: float, min_tokens: int) -> int:
    """How many of the joined tokens are for training when their end is held out."""
    held = max(round(total * fraction), min_tokens)
    if total - held < min_tokens:
        raise ValueError(
            f"data.paths: too little text: {total} tokens, but one training and one validation sequence need "
            f"{2 * min_tokens}; add text or lower train.seq_len"
        )
    return total - held


def _describe(what: str, train: TokenStream, validation: TokenStream) -> str:
    return f"{what}; {len(train):,} training and {len(validation):,} validation tokens"


def find_documents(config: DataConfig) -> list[Document]:
    """The files that `config.paths` names, in a fixed order, each once."""
    found: dict[Path, Document] = {}
    for entry in config.paths:
        for document in _expand(entry, config.suffixes):
            found.setdefault(document.path.resolve(), document)
    return list(found.values())


def is_validation(name: str, fraction: float) -> bool:
    """Whether the file of this name is held out."""
    return document_key(name) < fraction * 2**64


def _expand(entry: str, suffixes: Sequence[str]) -> list[Document]:
    if entry == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        documents = list(_walk(root, (".py",), _STDLIB_SKIPPED))
    elif entry.startswith(PACKAGE):
        documents = list(_walk(_package_folder(entry), (".py",), {"__pycache__"}))
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


def _package_folder(entry: str) -> Path:
    """Where an installed package's sources are; it is not imported."""
    name = entry.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"data.paths: no Python package of that name is installed: '{entry}'")
    return Path(next(iter(spec.submodule_search_locations)))


def _walk(root: Path, suffixes: Sequence[str], skipped: set[str]) -> Iterator[Document]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        for name in files:
            if name.endswith(tuple(suffixes)):
                path = Path(folder, name)
                yield Document(path.relative_to(root).as_posix(), path)


def _tokenise(documents: Sequence[Document], encoder: Encoder) -> list[NDArray[np.integer]]:
    dtype = np.uint16 if encoder.tokenizer.vocab_size <= 2**16 else np.int32
    tokens: list[NDArray[np.integer]] = []
    for first in range(0, len(documents), _ENCODE_AT_ONCE):
        batch = documents[first : first + _ENCODE_AT_ONCE]
        keys = [document_key(document.name) for document in batch]
        encoded = encoder.encode(keys, [document.path.read_bytes() for document in batch])
        tokens += [document.astype(dtype) for document in encoded]
    return tokens


def _join(documents: Sequence[NDArray[np.integer]], tokenizer: Tokenizer) -> NDArray[np.integer]:
    """The documents one after the other, each followed by eos; empty ones are left out."""
    eos = np.array([tokenizer.eos])
    parts = [part for document in documents if len(document) for part in (document, eos.astype(document.dtype))]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)

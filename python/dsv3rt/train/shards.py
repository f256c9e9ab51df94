"""Folders of token shards: what lies in them, whether it is what was written, and reading them as one stream.

shard-00000.bin  tokens (uint16 or uint32, little-endian), every document followed by eos
shard-00000.idx  where each document ends in the .bin, in tokens (int64)
shard-00000.key  64 bits of each document's name (uint64): its side of the split follows from them
manifest.json    written last: tokenizer, dtype, counts, the SHA-256 of every file, the inputs
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MANIFEST = "manifest.json"
PROGRESS = ".progress"  # a folder that is there while the shards are being written
FORMAT = "dsv3rt-shards-2"
ITEM_BYTES = {"idx": 8, "key": 8}
_MAPPED_AT_ONCE = 512  # shards; each takes a file descriptor

Pieces = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]  # shard, first token, token after the last


def is_shard_folder(path: Path) -> bool:
    """Whether `path` holds shards, be they finished, unfinished or damaged."""
    return path.is_dir() and ((path / PROGRESS).is_dir() or any(path.glob("shard-*.bin")))


@dataclass(frozen=True)
class ShardFolder:
    """A finished folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> ShardFolder:
        """Read the manifest, and check that every file has the size it says.

        Raises:
            ValueError: unfinished, not of this format, or a file is missing or cut off; one line.
        """
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
            known = manifest["format"] == FORMAT
        except FileNotFoundError:
            raise ValueError(f"{path}: its shards are not finished; run the same dsv3rt tokenize again") from None
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise ValueError(f"{path / MANIFEST}: not the manifest of token shards ({FORMAT})")
        folder = cls(path, manifest)
        for shard in manifest["shards"]:
            for suffix in shard["sha256"]:
                folder._check_size(shard, suffix)
        return folder

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.manifest["dtype"]).newbyteorder("<")

    def damage(self) -> str | None:
        """The first file whose SHA-256 is not the manifest's, as one line; None if all are."""
        for shard in self.manifest["shards"]:
            for suffix, digest in shard["sha256"].items():
                path = self.file(shard, suffix)
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        return f"{path}: damaged, its SHA-256 differs"
        return None

    def file(self, shard: dict[str, Any], suffix: str) -> Path:
        return self.path / f"{shard['name']}.{suffix}"

    def _check_size(self, shard: dict[str, Any], suffix: str) -> None:
        path = self.file(shard, suffix)
        count = shard["tokens" if suffix == "bin" else "documents"]
        expected = count * ITEM_BYTES.get(suffix, self.dtype.itemsize)
        found = path.stat().st_size if path.is_file() else None
        if found != expected:
            raise ValueError(
                f"{path}: damaged, must be {expected} bytes, {'missing' if found is None else f'got {found}'}"
            )


class ShardStream:
    """Pieces of shards as one array of tokens that is read by slices; only what is read comes into memory."""

    def __init__(self, folders: Sequence[ShardFolder], pieces: Pieces) -> None:
        self._folders = folders
        self._pieces = pieces
        self._ends = np.cumsum(pieces[2] - pieces[1])
        shards = [(folder, shard) for folder in folders for shard in folder.manifest["shards"]]

        @lru_cache(maxsize=_MAPPED_AT_ONCE)
        def tokens_of(index: int) -> NDArray[np.integer]:
            folder, shard = shards[index]
            return np.memmap(folder.file(shard, "bin"), dtype=folder.dtype, mode="r")

        self._tokens_of = tokens_of

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, where: slice) -> NDArray[np.integer]:
        """A copy of the tokens of a slice (step 1)."""
        start, stop, step = where.indices(len(self))
        assert step == 1
        found: list[NDArray[np.integer]] = []
        piece = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            shard, first, last = (int(column[piece]) for column in self._pieces)
            begin = last - (int(self._ends[piece]) - start)
            end = min(last, begin + stop - start)
            assert first <= begin < end
            found.append(self._tokens_of(shard)[begin:end])
            start += end - begin
            piece += 1
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def part(self, start: int, stop: int) -> ShardStream:
        """The stream from token `start` up to token `stop`."""
        shard_P, first_P, last_P = self._pieces
        begins = self._ends - (last_P - first_P)
        first_P = first_P + np.clip(start - begins, 0, last_P - first_P)
        last_P = last_P - np.clip(self._ends - stop, 0, last_P - first_P)
        kept = first_P < last_P
        return ShardStream(self._folders, (shard_P[kept], first_P[kept], last_P[kept]))


def open_streams(folders: Sequence[ShardFolder], fraction: float) -> tuple[ShardStream, ShardStream, int]:
    """The training and the validation documents, split by their keys, and how many of them are for validation."""
    threshold = np.uint64(math.ceil(fraction * 2**64))
    sides: tuple[list[Pieces], list[Pieces]] = ([], [])
    num_held = index = 0
    for folder in folders:
        for shard in folder.manifest["shards"]:
            ends = np.fromfile(folder.file(shard, "idx"), dtype="<i8")
            held = np.fromfile(folder.file(shard, "key"), dtype="<u8") < threshold
            num_held += int(held.sum())
            for side, chosen in zip(sides, (~held, held), strict=True):
                side.append(_runs(index, ends, chosen))
            index += 1
    train, validation = (ShardStream(folders, _join(side)) for side in sides)
    return train, validation, num_held


def whole_stream(folders: Sequence[ShardFolder]) -> ShardStream:
    """All documents, in the order they were given in."""
    counts = np.array([shard["tokens"] for folder in folders for shard in folder.manifest["shards"]], dtype=np.int64)
    return ShardStream(folders, (np.arange(len(counts)), np.zeros_like(counts), counts))


def fingerprint(folders: Sequence[ShardFolder]) -> int:
    """Changes when a token, a document's end or a document's key does."""
    digests = [shard["sha256"] for folder in folders for shard in folder.manifest["shards"]]
    return zlib.crc32(json.dumps(digests, sort_keys=True).encode())


def _runs(shard: int, ends: NDArray[np.int64], chosen: NDArray[np.bool_]) -> Pieces:
    """Stretches of neighbouring documents that are chosen, in tokens of the shard."""
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    edges = np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8))
    first, last = starts[edges[:-1] == 1], ends[edges[1:] == -1]
    return np.full(len(first), shard, dtype=np.int64), first, last


def _join(pieces: Sequence[Pieces]) -> Pieces:
    shard, first, last = (np.concatenate([piece[column] for piece in pieces]) for column in range(3))
    return shard, first, last

"""Input files to documents: text, JSON lines, Parquet; and how they are divided into shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dsv3rt.train.corpus import Document

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

SUFFIXES = (".jsonl", ".parquet")  # beside those of text files


@dataclass(frozen=True)
class Chunk:
    """A part of an input file: a text file as a whole, a range of bytes of JSON lines, a row group of Parquet.

    first: the byte, or the row, that it begins with. group: the row group. size: its bytes, for dividing the work.
    """

    name: str
    path: str
    kind: Literal["text", "jsonl", "parquet"]
    size: int
    first: int = 0
    group: int = 0


def divide(documents: Sequence[Document], shard_bytes: int) -> list[list[Chunk]]:
    """The chunks of each shard. Depends on the files alone, so that any number of workers writes the same shards."""
    shards: list[list[Chunk]] = []
    room = 0
    for document in documents:
        for chunk in _chunks(document, shard_bytes):
            if room <= 0:
                shards.append([])
                room = shard_bytes
            shards[-1].append(chunk)
            room -= chunk.size
    return shards


def read(chunk: Chunk, text_key: str) -> Iterator[tuple[str, bytes]]:
    """The documents of a chunk, each with a name that stays when documents are added after it."""
    if chunk.kind == "text":
        yield chunk.name, Path(chunk.path).read_bytes()
    elif chunk.kind == "jsonl":
        yield from _read_lines(chunk, text_key)
    else:
        yield from _read_rows(chunk, text_key)


def _chunks(document: Document, shard_bytes: int) -> Iterator[Chunk]:
    name, path = document.name, str(document.path)
    if path.endswith(".parquet"):
        file = _open_parquet(path)
        first = 0
        for group in range(file.metadata.num_row_groups):
            meta = file.metadata.row_group(group)
            yield Chunk(name, path, "parquet", meta.total_byte_size, first, group)
            first += meta.num_rows
        return
    size = document.path.stat().st_size
    if path.endswith(".jsonl"):
        for first in range(0, size, shard_bytes):
            yield Chunk(name, path, "jsonl", min(shard_bytes, size - first), first)
    else:
        yield Chunk(name, path, "text", size)


def _read_lines(chunk: Chunk, text_key: str) -> Iterator[tuple[str, bytes]]:
    """The lines that begin inside the chunk."""
    with open(chunk.path, "rb") as file:
        if chunk.first:
            file.seek(chunk.first - 1)
            file.readline()
        while (start := file.tell()) < chunk.first + chunk.size:
            line = file.readline()
            if line.isspace():
                continue
            try:
                text = json.loads(line)[text_key]
            except (ValueError, TypeError, KeyError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f"{chunk.path}: the line at byte {start} is no JSON object with a text '{text_key}'")
            yield f"{chunk.name}#{start}", text.encode("utf-8", errors="replace")


def _read_rows(chunk: Chunk, text_key: str) -> Iterator[tuple[str, bytes]]:
    file = _open_parquet(chunk.path)
    if text_key not in file.schema_arrow.names:
        raise ValueError(f"{chunk.path}: no column '{text_key}', only {', '.join(file.schema_arrow.names)}")
    column = file.read_row_group(chunk.group, columns=[text_key]).column(text_key)
    for row, text in enumerate((value.as_py() for value in column), chunk.first):
        if not isinstance(text, str):
            raise ValueError(f"{chunk.path}: row {row} of column '{text_key}' is no text")
        yield f"{chunk.name}#{row}", text.encode("utf-8", errors="replace")


def _open_parquet(path: str) -> ParquetFile:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path}: Parquet files need pyarrow: pip install pyarrow") from None
    try:
        return ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from None

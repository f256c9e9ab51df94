"""Writing a checkpoint's files: what goes into which shard, and one shard tensor by tensor.

safetensors' own writer wants all tensors of a file in memory at once; this one has a single one there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dsv3rt.hf.codec import stored_dtypes
from dsv3rt.hf.layout import TensorSpec

DEFAULT_SHARD_BYTES = 5_000_000_000
PART = ".part"
_DTYPE_NAMES = ((torch.float32, "F32"), (torch.bfloat16, "BF16"), (torch.float8_e4m3fn, "F8_E4M3"))


@dataclass(frozen=True)
class Item:
    """One tensor of a shard."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint: the specs it holds, each with its scales beside it, as items."""

    name: str
    specs: tuple[TensorSpec, ...]
    items: tuple[Item, ...]

    @property
    def num_bytes(self) -> int:
        return sum(item.num_bytes for item in self.items)


def plan_shards(op: str, specs: Iterable[TensorSpec], fmt: str, max_shard_bytes: int) -> list[Shard]:
    """Fill files in order, each up to `max_shard_bytes` of tensors; a tensor larger than that has a file of its own."""
    if max_shard_bytes <= 0:
        raise ValueError(f"{op}: max_shard_bytes must be positive, got {max_shard_bytes}")
    groups: list[tuple[list[TensorSpec], list[Item]]] = []
    room = 0
    for spec in specs:
        items = [Item(*stored) for stored in stored_dtypes(spec, fmt)]
        needed = sum(item.num_bytes for item in items)
        if not groups or needed > room:
            groups.append(([], []))
            room = max_shard_bytes
        groups[-1][0].append(spec)
        groups[-1][1].extend(items)
        room -= needed
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return [Shard(name, tuple(own), tuple(items)) for name, (own, items) in zip(names, groups, strict=True)]


def write_shard(folder: Path, shard: Shard, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write one file, which gets its name when it is whole and on the disk. `tensors` may come in any order."""
    header, places = _header(shard)
    part = folder / (shard.name + PART)
    items = {item.key: item for item in shard.items}
    with part.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + shard.num_bytes)
        for key, tensor in tensors:
            item = items.pop(key)
            assert (tuple(tensor.shape), tensor.dtype) == (item.shape, item.dtype), key
            file.seek(len(header) + places[key])
            _write_tensor(file, tensor)
        assert not items, next(iter(items))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / shard.name)


def _write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _header(shard: Shard) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes and every tensor's offset after them; wide dtypes come first, so that all are aligned."""
    names = dict(_DTYPE_NAMES)
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    end = 0
    for item in sorted(shard.items, key=lambda item: -item.dtype.itemsize):
        places[item.key], end = end, end + item.num_bytes
        offsets = [places[item.key], end]
        table[item.key] = {"dtype": names[item.dtype], "shape": list(item.shape), "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def write_index(folder: Path, shards: Iterable[Shard]) -> None:
    """model.safetensors.index.json of these shards."""
    shards = list(shards)
    weight_map = {item.key: shard.name for shard in shards for item in shard.items}
    total = sum(shard.num_bytes for shard in shards)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file by another at once."""
    part = path.with_name(path.name + PART)
    with part.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_target(path: Path) -> None:
    """A checkpoint is written where nothing is, in a folder that is there."""
    if path.exists():
        raise ValueError(f"{path}: already exists; remove it or name another path")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path.absolute().parent}: no such folder")


def finish(temporary: Path, final: Path) -> None:
    """Give a whole checkpoint its name."""
    check_target(final)
    os.replace(temporary, final)
    descriptor = os.open(final.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""hf.convert: a checkpoint from BF16 to FP8 or back, tensor by tensor, without a model."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from dsv3rt.hf.checkpoint import CONFIG, INDEX, Checkpoint
from dsv3rt.hf.codec import check_format, encode
from dsv3rt.hf.config_json import with_format
from dsv3rt.hf.shards import (
    DEFAULT_SHARD_BYTES,
    PART,
    Shard,
    check_target,
    checksum,
    finish,
    plan_shards,
    write_index,
    write_json,
    write_shard,
)

_PROGRESS = "convert-progress.json"
_COMPANIONS = (".json", ".jinja", ".md", ".model", ".py", ".txt")


@torch.no_grad()
def convert(
    src: str | Path,
    dst: str | Path,
    *,
    fmt: Literal["bf16", "fp8"],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    pow2_scales: bool = False,
    progress: bool | None = None,
) -> None:
    """Write the checkpoint `src` as `dst` in another format; what is FP8 already and stays so keeps its bits.

    The work goes on in `DST.partial`, which becomes `dst` when it is whole. Called again after an interruption, it
    keeps the files there whose size and SHA-256 are those recorded when they were finished. config.json is taken over
    but for its dtype and quantization_config; tokenizer and other small files beside it are copied.

    Args:
        src, dst: folders; dst must not be there yet.
        fmt: "bf16" or "fp8", as for hf.save.
        max_shard_bytes: tensors of one file; a larger tensor has a file of its own.
        pow2_scales: as for hf.save; FP8 with other scales is quantised anew, from its BF16 value.
        progress: show a bar; None: where stderr is a terminal.
    Raises:
        ValueError: an argument outside the above, or what hf.load raises; DST.partial of another conversion.
    """
    check_format("hf.convert", fmt, pow2_scales)
    final = Path(dst)
    check_target(final)
    checkpoint = Checkpoint(src)
    shards = plan_shards("hf.convert", checkpoint.specs, fmt, max_shard_bytes)
    partial = final.absolute().with_name(f"{final.name}.partial")
    done = _begin(partial, _fingerprint(checkpoint, shards, fmt, pow2_scales))
    codec = (fmt, pow2_scales or (checkpoint.pow2_scales and fmt == "fp8"))
    total = sum(shard.num_bytes for shard in shards)
    hidden = None if progress is None else not progress
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"to {fmt}", disable=hidden) as bar:
        for shard in shards:
            if _is_finished(partial / shard.name, done["shards"].get(shard.name)):
                bar.update(shard.num_bytes)
                continue
            write_shard(partial, shard, _tensors(checkpoint, shard, codec, bar))
            file = partial / shard.name
            done["shards"][shard.name] = {"bytes": file.stat().st_size, "sha256": checksum(file)}
            write_json(partial / _PROGRESS, done)
    checkpoint.close()
    _copy_companions(checkpoint.path, partial)
    write_index(partial, shards)
    raw = checkpoint.raw | {"num_nextn_predict_layers": checkpoint.config.mtp_depth}
    write_json(partial / CONFIG, with_format(raw, fmt, pow2_scales))
    finish(partial, final)
    (final / _PROGRESS).unlink()  # last: until the folder has its name, the same command must be able to go on


def _begin(partial: Path, fingerprint: str) -> dict[str, Any]:
    """The record of what an interrupted run of the same conversion finished; a fresh one where there was none."""
    file = partial / _PROGRESS
    fresh: dict[str, Any] = {"fingerprint": fingerprint, "shards": {}}
    partial.mkdir(exist_ok=True)
    if {entry.name for entry in partial.iterdir()} <= {file.name + PART}:
        write_json(file, fresh)
        return fresh
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["fingerprint"] == fingerprint and isinstance(record["shards"], dict):
            return dict(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{partial}: not an unfinished conversion ({type(error).__name__}); remove it") from None
    raise ValueError(f"{partial}: an unfinished conversion of another source or to another format; remove it")


def _fingerprint(checkpoint: Checkpoint, shards: list[Shard], fmt: str, pow2_scales: bool) -> str:
    """Names a conversion: its source's files, and what it makes of them."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    plan = [(shard.name, [(item.key, item.shape) for item in shard.items]) for shard in shards]
    return hashlib.sha256(json.dumps([fmt, pow2_scales, stats, checkpoint.raw, plan]).encode()).hexdigest()


def _is_finished(file: Path, record: dict[str, Any] | None) -> bool:
    if record is None or not file.is_file() or file.stat().st_size != record["bytes"]:
        return False
    return checksum(file) == record["sha256"]


def _tensors(checkpoint: Checkpoint, shard: Shard, codec: tuple[str, bool], bar: tqdm) -> Iterator[tuple[str, Tensor]]:
    for spec in shard.specs:
        for key, tensor in encode(spec, checkpoint.tensor(spec.key), checkpoint.scale(spec), *codec):
            yield key, tensor
            bar.update(tensor.nbytes)


def _copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, generation settings, remote code, licence: the small files that make a checkpoint usable."""
    for file in sorted(source.iterdir()):
        named = file.suffix in _COMPANIONS or file.name.upper().startswith("LICENSE")
        if file.is_file() and named and file.name not in (CONFIG, INDEX, _PROGRESS):
            shutil.copyfile(file, target / file.name)

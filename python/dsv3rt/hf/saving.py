"""hf.save: a Transformer as a Hugging Face checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dsv3rt.hf.checkpoint import CONFIG
from dsv3rt.hf.codec import check_format, encode
from dsv3rt.hf.config_json import to_json
from dsv3rt.hf.layout import tensor_specs, view_of
from dsv3rt.hf.shards import (
    DEFAULT_SHARD_BYTES,
    Shard,
    check_target,
    finish,
    plan_shards,
    write_index,
    write_json,
    write_shard,
)
from dsv3rt.layers.weights import require_copies
from dsv3rt.model.transformer import Transformer


@torch.no_grad()
def save(
    model: Transformer,
    path: str | Path,
    *,
    fmt: Literal["bf16", "fp8"] = "bf16",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    pow2_scales: bool = False,
) -> None:
    """Write a checkpoint that transformers, vLLM and SGLang read, complete or not at all.

    Args:
        model: on any device, of any floating dtype.
        path: a folder that is not there yet. An interrupted save leaves `.tmp-NAME` beside it, which the next removes.
        fmt: "bf16", or "fp8": the linear layers of the blocks as E4M3 with one FP32 scale per 128x128 block.
        max_shard_bytes: tensors of one file; a larger tensor has a file of its own.
        pow2_scales: for fmt "fp8": every scale a power of two, and config.json says so (scale_fmt "ue8m0"), as DeepSeek
            released V3.1.
    Raises:
        ValueError: an argument outside the above, `path` is there already, or weights are in FP8 alone, as in training.
    """
    check_format("hf.save", fmt, pow2_scales)
    require_copies("hf.save", model)
    final = Path(path)
    check_target(final)
    shards = plan_shards("hf.save", tensor_specs(model.config), fmt, max_shard_bytes)
    temporary = final.absolute().with_name(f".tmp-{final.name}")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    state = model.state_dict()
    for shard in shards:
        write_shard(temporary, shard, _tensors(state, shard, fmt, pow2_scales))
    write_index(temporary, shards)
    write_json(temporary / CONFIG, to_json(model.config, fmt, pow2_scales))
    finish(temporary, final)


def _tensors(state: dict[str, Tensor], shard: Shard, fmt: str, pow2_scales: bool) -> Iterator[tuple[str, Tensor]]:
    for spec in shard.specs:
        yield from encode(spec, view_of(state, spec), None, fmt, pow2_scales)

"""hf.load: a Transformer from a Hugging Face checkpoint; hf.weights: its tensors as they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dsv3rt.hf.checkpoint import Checkpoint, check_duplicate
from dsv3rt.hf.codec import decode_into
from dsv3rt.hf.layout import view_of
from dsv3rt.model.transformer import Transformer
from dsv3rt.ops.quant import BLOCK_TILE
from dsv3rt.ops.types import QuantTensor


@torch.no_grad()
def load(path: str | Path, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu") -> Transformer:
    """Read a BF16 or FP8 checkpoint; FP8 weights are dequantised as they are read.

    Args:
        path: a folder with config.json and model.safetensors, or shards with model.safetensors.index.json.
        dtype: of the parameters; router biases are FP32 in any case.
        device: where the model goes; beyond the model, memory is about one tensor, and one mapped shard.
    Raises:
        ValueError: one line: the file or key, what is allowed, what was found.
    """
    checkpoint = Checkpoint(path)
    model = Transformer(checkpoint.config, dtype=dtype, device="meta").to_empty(device=device)
    state = model.state_dict()
    for spec in sorted(checkpoint.specs, key=lambda spec: checkpoint.entries[spec.key].file):
        if spec.duplicate_of:
            check_duplicate(checkpoint, spec)
        else:
            decode_into(view_of(state, spec), checkpoint.tensor(spec.key), checkpoint.scale(spec))
    checkpoint.close()
    return model


def weights(path: str | Path) -> Iterator[tuple[str, Tensor | QuantTensor]]:
    """Every tensor of a checkpoint under its own key, one at a time and as it is stored: FP8 stays FP8.

    Args:
        path: as for `load`.
    Returns:
        (key, tensor); an FP8 weight as a QuantTensor, tile (128, 128), which `ops.fp8_gemm_nt` takes as it is. Tensors
        are mapped from the file: keep a clone of what is to outlive the next one, or pages stay resident.
    Raises:
        ValueError: as `load`.
    """
    checkpoint = Checkpoint(path)
    for spec in sorted(checkpoint.specs, key=lambda spec: checkpoint.entries[spec.key].file):
        data, scale = checkpoint.tensor(spec.key), checkpoint.scale(spec)
        yield spec.key, data if scale is None else QuantTensor(data, scale, BLOCK_TILE)
    checkpoint.close()

"""The model that a run has trained so far, without what training it further would need."""

from __future__ import annotations

from pathlib import Path

import torch

from dsv3rt.model.transformer import Transformer
from dsv3rt.train import checkpoint, config_file, manifest
from dsv3rt.train.run_dir import RunDir


def load(
    path: Path, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> tuple[Transformer, str]:
    """The model, its parameters in `dtype`, and the name of its tokenizer.

    Args:
        path: of a run, whose newest checkpoint is read, whatever layout it was trained in.
    Raises:
        ValueError: there is no checkpoint, or the newest is damaged.
    """
    folder = checkpoint.newest(RunDir(path).checkpoints)
    if folder is None:
        raise ValueError(f"{RunDir(path).checkpoints}: holds no checkpoint")
    damage = manifest.damage(folder)
    if damage is not None:
        raise ValueError(f"damaged checkpoint: {folder / damage}")
    config = config_file.load(checkpoint.read_state(folder)[1])
    model = Transformer(config.model, device="meta").to_empty(device="cpu")
    checkpoint.load(folder, {f"model.{name}": tensor for name, tensor in model.state_dict().items()})
    for parameter in model.parameters():  # router biases, buffers, stay FP32
        parameter.data = parameter.data.to(dtype)
    return model.to(device), config.data.tokenizer

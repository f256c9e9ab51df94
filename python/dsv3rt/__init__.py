"""dsv3rt: the DeepSeek-V3 system. `docs/architecture.md` describes the house; this module is its front door."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from dsv3rt import ops, presets
from dsv3rt.config import ModelConfig, ParallelConfig, TrainConfig
from dsv3rt.model.transformer import Transformer

if TYPE_CHECKING:
    from dsv3rt.train.trainer import Trainer

try:
    __version__ = version("dsv3rt")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+uninstalled"

__all__ = ["ModelConfig", "ParallelConfig", "TrainConfig", "Trainer", "Transformer", "__version__", "ops", "presets"]


def __getattr__(name: str) -> object:
    """Import the trainer only when someone asks for it, so that `import dsv3rt` stays light."""
    if name == "Trainer":
        from dsv3rt.train.trainer import Trainer

        return Trainer
    raise AttributeError(f"module 'dsv3rt' has no attribute {name!r}")

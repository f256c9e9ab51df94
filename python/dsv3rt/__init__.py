"""dsv3rt: the DeepSeek-V3 system. `docs/architecture.md` describes the house; this module is its front door."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from dsv3rt import ops, presets
from dsv3rt.config import ModelConfig, ParallelConfig, TrainConfig
from dsv3rt.model.transformer import Transformer

if TYPE_CHECKING:
    from dsv3rt import hf
    from dsv3rt.train.trainer import Trainer

try:
    __version__ = version("dsv3rt")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+uninstalled"

__all__ = [
    "ModelConfig", "ParallelConfig", "TrainConfig", "Trainer", "Transformer", "__version__", "hf", "ops", "presets",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Import the trainer and `hf` only when someone asks for them, so that `import dsv3rt` stays light."""
    if name == "Trainer":
        from dsv3rt.train.trainer import Trainer

        return Trainer
    if name == "hf":
        import dsv3rt.hf

        return dsv3rt.hf
    raise AttributeError(f"module 'dsv3rt' has no attribute {name!r}")

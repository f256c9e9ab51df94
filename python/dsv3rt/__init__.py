"""dsv3rt: the DeepSeek-V3 system. `docs/architecture.md` describes the house; this module is its front door."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv3rt import hf, ops, presets
    from dsv3rt.config import ModelConfig, ParallelConfig, TrainConfig
    from dsv3rt.model.transformer import Transformer
    from dsv3rt.train.trainer import Trainer

try:
    __version__ = version("dsv3rt")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+uninstalled"

__all__ = [
    "ModelConfig", "ParallelConfig", "TrainConfig", "Trainer", "Transformer", "__version__", "hf", "ops", "presets",
]  # fmt: skip

_MODULES = ("hf", "ops", "presets")
_PLACES = (
    ("ModelConfig", "config"),
    ("ParallelConfig", "config"),
    ("TrainConfig", "config"),
    ("Trainer", "train.trainer"),
    ("Transformer", "model.transformer"),
)


def __getattr__(name: str) -> object:
    """Import what is asked for when it is: a command that needs no torch starts without it."""
    if name in _MODULES:
        return import_module(f"dsv3rt.{name}")
    for known, module in _PLACES:
        if name == known:
            return getattr(import_module(f"dsv3rt.{module}"), name)
    raise AttributeError(f"module 'dsv3rt' has no attribute {name!r}")

"""Checkpoints: `step-N/` folders of torch.distributed.checkpoint files, complete or not there at all."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

_NAME = re.compile(r"step-(\d+)")
_TEMPORARY = ".tmp-"
_STATE = "state.json"
_CONFIG = "config.toml"


@dataclass(frozen=True)
class RunState:
    """Where a run stands, beside its tensors: steps and tokens done, and the next training sample.

    `data` is the fingerprint of the training tokens that `samples` counts through.
    """

    step: int = 0
    tokens: int = 0
    samples: int = 0
    data: int = 0


def save(root: Path, state: RunState, tensors: dict[str, Tensor], config_toml: str, keep_latest: int) -> Path:
    """Write `root/step-N`, durable before it gets its name, then drop all but the newest `keep_latest` (0: none)."""
    final = root / f"step-{state.step}"
    temporary = root / f"{_TEMPORARY}{final.name}"
    clean(root)
    temporary.mkdir(parents=True)
    with _quiet():
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary), no_dist=True)
    (temporary / _CONFIG).write_text(config_toml, encoding="utf-8")
    (temporary / _STATE).write_text(json.dumps(dataclasses.asdict(state)), encoding="utf-8")
    _sync_folder(temporary)
    if final.exists():
        _remove(final)
    os.replace(temporary, final)
    _sync(root)
    for old in _complete(root)[:-keep_latest] if keep_latest else ():
        _remove(old)
    return final


def newest(root: Path) -> Path | None:
    """The complete checkpoint of the highest step."""
    complete = _complete(root)
    return complete[-1] if complete else None


def read_state(folder: Path) -> tuple[RunState, Path]:
    """A checkpoint's state, and the path of the configuration that made it."""
    try:
        return RunState(**json.loads((folder / _STATE).read_text(encoding="utf-8"))), folder / _CONFIG
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(_unreadable(folder, error)) from None


def load(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place with what `save` wrote."""
    try:
        with _quiet():
            dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    except (CheckpointException, OSError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(_unreadable(folder, error)) from None


def clean(root: Path) -> None:
    """Remove what an interrupted save or removal left behind."""
    for leftover in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)


def _complete(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in root.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _remove(folder: Path) -> None:
    """Delete a checkpoint; a crash halfway leaves a temporary folder, never half a checkpoint."""
    doomed = folder.with_name(f"{_TEMPORARY}old-{folder.name}")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _sync_folder(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unreadable(folder: Path, error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{folder}: unreadable checkpoint ({type(error).__name__}: {lines[0]}); remove it to use the one before it"


def _quiet() -> warnings.catch_warnings:
    """dcp warns that no process group exists; a single process needs none."""
    return warnings.catch_warnings(action="ignore")

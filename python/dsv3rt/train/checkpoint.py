"""Checkpoints: `step-N/` folders of torch.distributed.checkpoint files, complete or not there at all."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dsv3rt.parallel.mesh import Ranks
from dsv3rt.train import manifest
from dsv3rt.train.pieces import LoadPlanner, Piece, SavePlanner

_NAME = re.compile(r"step-(\d+)")
_TEMPORARY = ".tmp-"
_REPLACED = ".replaced-"
_DAMAGED = "damaged-"
_STATE = "state.json"
_CONFIG = "config.toml"


@dataclass(frozen=True)
class RunState:
    """Where a run stands, beside its tensors: steps and tokens done, and the next training sample.

    `data` is the fingerprint of the training tokens that `samples` counts through. A rollback moves `samples` ahead of
    what `tokens` has seen. The rest is the memory of `dsv3rt.train.guards`.
    """

    step: int = 0
    tokens: int = 0
    samples: int = 0
    data: int = 0
    skipped_steps: int = 0
    skips_in_a_row: int = 0
    rollbacks: int = 0
    losses_seen: int = 0
    loss_mean: float = 0.0
    loss_variance: float = 0.0


@dataclass(frozen=True)
class Writers:
    """Who writes a checkpoint: all ranks together, each its pieces of the tensors; or one process all of them."""

    ranks: Ranks = field(default_factory=Ranks)
    pieces: Mapping[str, Piece] = field(default_factory=dict)


ALONE = Writers()


def save(
    root: Path,
    state: RunState,
    tensors: dict[str, Tensor],
    config_toml: str,
    keep_latest: int,
    writers: Writers = ALONE,
) -> Path:
    """Write `root/step-N`, durable before it gets its name, then drop all but the newest `keep_latest` (0: none).

    Where that fails, the temporary folder goes and every older checkpoint stays. All ranks call this together.
    """
    final = root / f"step-{state.step}"
    temporary = root / f"{_TEMPORARY}{final.name}"
    ranks = writers.ranks

    def begin() -> None:
        clean(root)
        temporary.mkdir(parents=True)

    def end() -> None:
        (temporary / _CONFIG).write_text(config_toml, encoding="utf-8")
        (temporary / _STATE).write_text(json.dumps(dataclasses.asdict(state)), encoding="utf-8")
        manifest.write(temporary)
        _sync_folder(temporary)

    def give_name() -> None:
        _name(temporary, final)
        for old in complete(root)[:-keep_latest] if keep_latest else ():
            _remove(old)

    try:
        ranks.together(begin)
        with _quiet():
            writer, planner = dcp.FileSystemWriter(temporary), SavePlanner(tensors, writers.pieces)
            alone = ranks.group is None
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=ranks.group, no_dist=alone)
        ranks.together(end)
    except BaseException:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    ranks.together(give_name)
    return final


def newest(root: Path) -> Path | None:
    """The complete checkpoint of the highest step."""
    found = complete(root)
    return found[-1] if found else None


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it is not one any more, but still there to look at."""
    names = (f"{_DAMAGED}{folder.name}{suffix}" for suffix in ("", *(f".{number}" for number in range(2, 1000))))
    target = next(path for name in names if not (path := folder.with_name(name)).exists())
    os.replace(folder, target)
    return target


def damaged(root: Path) -> list[Path]:
    """The checkpoints that were set aside."""
    return sorted(root.glob(f"{_DAMAGED}*"))


def read_state(folder: Path) -> tuple[RunState, Path]:
    """A checkpoint's state, and the path of the configuration that made it."""
    try:
        return RunState(**json.loads((folder / _STATE).read_text(encoding="utf-8"))), folder / _CONFIG
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(_unreadable(folder, error)) from None


def load(folder: Path, tensors: dict[str, Tensor], pieces: Mapping[str, Piece] = ALONE.pieces) -> None:
    """Fill `tensors` in place with what `save` wrote, in whatever pieces. A rank needs no other rank for it."""
    try:
        with _quiet():
            planner = LoadPlanner(tensors, pieces)
            dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(folder), planner=planner, no_dist=True)
    except (CheckpointException, OSError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(_unreadable(folder, error)) from None


def clean(root: Path) -> None:
    """Remove what an interrupted save or removal left behind."""
    for leftover in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)
    for replaced in root.glob(f"{_REPLACED}*"):
        final = replaced.with_name(replaced.name.removeprefix(_REPLACED))
        if final.exists():
            shutil.rmtree(replaced)
        else:
            os.replace(replaced, final)


def complete(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in root.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _name(temporary: Path, final: Path) -> None:
    """Give a finished checkpoint its name; one that has it already is kept until then (see `clean`)."""
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        os.replace(final, replaced)
    os.replace(temporary, final)
    _sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


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
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]  # torch wraps what a planner raised
    lines = str(error).strip().splitlines() or [""]
    return f"{folder}: unreadable checkpoint ({type(error).__name__}: {lines[0]}); remove it to use the one before it"


def _quiet() -> warnings.catch_warnings:
    """dcp warns that no process group exists; a single process needs none."""
    return warnings.catch_warnings(action="ignore")

"""Checkpoints are complete or absent, survive a kill, and come back bitwise."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor
from train_helpers import losses, rows, start, write_config

from dsv3rt.train import checkpoint
from dsv3rt.train.checkpoint import RunState


def tensors(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "model.w": torch.randn(5, 3, generator=g),
        "exp_avg.w": torch.randn(5, 3, generator=g).bfloat16(),
        "model.bias": torch.randn(4, generator=g),
    }


def save(root: Path, step: int, keep_latest: int = 0) -> Path:
    return checkpoint.save(root, RunState(step=step, tokens=step * 8), tensors(step), "[train]\n", keep_latest)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_roundtrips_bitwise(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    assert folder.name == "step-7"
    got = tensors(0)
    checkpoint.load(folder, got)
    assert all(torch.equal(got[name], want) for name, want in tensors(7).items())
    state, config_path = checkpoint.read_state(folder)
    assert state == RunState(step=7, tokens=56)
    assert config_path.read_text() == "[train]\n"


@pytest.mark.parametrize(("keep", "left"), [(0, ["step-1", "step-10", "step-2", "step-9"]), (2, ["step-10", "step-9"]),
                                            (1, ["step-10"])])  # fmt: skip
def test_keep_latest(tmp_path: Path, keep: int, left: list[str]) -> None:
    """By number, not by name: 10 is newer than 9."""
    for step in (1, 2, 9, 10):
        save(tmp_path, step, keep)
    assert names(tmp_path) == left
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.name == "step-10"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-3"]


def test_leftovers_are_ignored_and_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".tmp-step-5", ".tmp-old-step-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    (tmp_path / "step-x").mkdir()
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.name == "step-1"
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == ["step-1", "step-x"]
    assert checkpoint.newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("damage", ["state.json", ".metadata", "__0_0.distcp"])
def test_damage_is_one_line_that_names_the_folder(tmp_path: Path, damage: str) -> None:
    folder = save(tmp_path, 1)
    (folder / damage).write_bytes((folder / damage).read_bytes()[:10])
    with pytest.raises(ValueError, match=re.escape(f"{folder}: unreadable checkpoint")) as caught:
        checkpoint.read_state(folder) if damage == "state.json" else checkpoint.load(folder, tensors(0))
    assert "\n" not in str(caught.value)


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    with pytest.raises(ValueError, match="unreadable checkpoint"):
        checkpoint.load(folder, {"model.w": torch.zeros(5, 4)})
    with pytest.raises(ValueError, match="unreadable checkpoint"):
        checkpoint.load(folder, {"model.other": torch.zeros(5, 3)})


# The second save dies after its files are written and before they get their name.
DIE_IN_SAVE = """
import os, signal, sys
from dsv3rt import cli
from dsv3rt.train import checkpoint
sync, calls = checkpoint._sync_folder, []
def dying(folder):
    calls.append(folder)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(folder)
checkpoint._sync_folder = dying
cli.main(sys.argv[1:])
"""


def test_kill_during_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    path = write_config(tmp_path, train={"steps": 6}, checkpoint={"every": 2, "asynchronous": False})
    process = start("-c", DIE_IN_SAVE, "train", str(path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    root = tmp_path / "run" / "checkpoints"
    assert names(root) == [".tmp-step-4", "step-2"]
    assert len(rows(tmp_path)) == 5

    process = start("-m", "dsv3rt", "train", str(path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "resuming from" in output
    assert "step-2" in output
    assert names(root) == ["step-4", "step-6"]
    assert [step for step, _, _ in losses(tmp_path)] == list(range(7))

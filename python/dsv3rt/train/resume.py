"""Which checkpoint a run goes on from, and whether its configuration still fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsv3rt.config import TrainConfig
from dsv3rt.train import checkpoint, config_file, manifest
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.mixture import same_past
from dsv3rt.train.progress import say
from dsv3rt.train.run_dir import RunDir

# What a checkpoint's tensors or its place in the data depend on. All else may change between one start and the next.
_FIXED_SECTIONS = ("model.", "data.")
_FIXED_KEYS = ("train.seed", "train.seq_len", "optim.moment_dtype", "optim.ema_decay")


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from; `changed` are keys that differ from the configuration it was made with."""

    folder: Path
    state: RunState
    changed: tuple[str, ...]


def find(run: RunDir, config: TrainConfig) -> Resume | None:
    """The run's newest intact checkpoint, if it has one.

    Raises:
        ValueError: there are only damaged ones, or it was made with a configuration that can't be resumed with this
            one; names the keys.
    """
    folder = newest_intact(run.checkpoints)
    if folder is None:
        return None
    state, config_path = checkpoint.read_state(folder)
    saved = config_file.load(config_path)
    before, now = config_file.flat(saved), config_file.flat(config)
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    fixed = [key for key in changed if key.startswith(_FIXED_SECTIONS) or key in _FIXED_KEYS]
    if saved.data.mixture and same_past(saved.data.mixture, config.data.mixture, state.samples * saved.train.seq_len):
        fixed = [key for key in fixed if key != "data.mixture"]
    if fixed:
        differences = ", ".join(f"{key} (was {before.get(key)}, now {now.get(key)})" for key in fixed)
        raise ValueError(f"can't resume {folder} with other {differences}; change back or choose another train.run_dir")
    return Resume(folder, state, tuple(changed))


def newest_intact(root: Path) -> Path | None:
    """The newest checkpoint whose files are what was written; damaged ones on the way are set aside, and named aloud.

    Raises:
        ValueError: only damaged ones are left.
    """
    for folder in reversed(checkpoint.complete(root)):
        damage = manifest.damage(folder)
        if damage is None:
            return folder
        aside = checkpoint.set_aside(folder)
        say(f"damaged checkpoint: {folder / damage}; set aside as {aside.name}, looking for the one before it")
    damaged = checkpoint.damaged(root)
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise ValueError(
            f"{root}: no intact checkpoint, only {names}; remove them to start over, or choose another train.run_dir"
        )
    return None


def check_data(resume: Resume, fingerprint: int) -> None:
    """A position in the data means nothing in other data."""
    if resume.state.data != fingerprint:
        raise ValueError(
            f"can't resume {resume.folder}: the text under data.paths has changed since; "
            "restore it or choose another train.run_dir"
        )

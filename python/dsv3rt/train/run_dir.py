"""The files of a run, and the lock that keeps a second trainer out."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDir:
    """Where everything of a run lies."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def loss_png(self) -> Path:
        return self.path / "loss.png"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def stuck(self, rank: int) -> Path:
        return self.path / (f"stuck-rank-{rank}.txt" if rank else "stuck.txt")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and hold it; the system lets go when the process ends, however it ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"train.run_dir: another process is training in '{self.path}'") from None
            yield


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash, sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

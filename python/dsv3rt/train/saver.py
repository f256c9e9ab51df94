"""Checkpoints beside the training: a copy of the tensors at the step, files by a background thread."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dsv3rt.config import CheckpointConfig
from dsv3rt.errors import PeerError
from dsv3rt.train import checkpoint
from dsv3rt.train.checkpoint import RunState, Writers
from dsv3rt.train.progress import say

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CheckpointSaver:
    """Saves into `root`, one checkpoint at a time; leaving it waits for the last one.

    A full disk is said aloud and costs that checkpoint alone, unless the caller needs it. All else that goes wrong in
    the thread is an OSError of one line from the next `poll`, `save` or `wait`.
    """

    def __init__(
        self, root: Path, config: CheckpointConfig, config_toml: str, writers: Writers = checkpoint.ALONE
    ) -> None:
        self._root = root
        self._writers = writers
        self._config = config
        self._config_toml = config_toml
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._join()
        if kind is None:
            self._raise_error(needed=True)
        elif self._error is not None:
            say(str(self._as_os_error(self._error)))

    def save(self, state: RunState, tensors: dict[str, Tensor], *, needed: bool = False) -> None:
        """Save, in the background where configured; with `needed`, it is on disk when this returns."""
        self.wait()
        self._step = state.step
        if self._config.asynchronous:
            tensors = self._copy(tensors)
        self._thread = threading.Thread(target=self._write, args=(state, tensors), name="checkpoint", daemon=True)
        self._thread.start()
        if needed or not self._config.asynchronous:
            self._join()
            self._raise_error(needed)

    def poll(self) -> None:
        """Report on a save that has ended meanwhile."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until what was being saved is on disk."""
        self._join()
        self._raise_error(needed=False)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, state: RunState, tensors: dict[str, Tensor]) -> None:
        try:
            keep = self._config.keep_latest
            checkpoint.save(self._root, state, tensors, self._config_toml, keep, self._writers)
        except BaseException as error:  # raised again in the main thread
            self._error = error

    def _raise_error(self, needed: bool) -> None:
        if self._error is None:
            return
        error, self._error = self._as_os_error(self._error), None
        if needed or error.errno not in _NO_ROOM:
            raise error
        say(f"{error}; going on")

    def _as_os_error(self, error: BaseException) -> OSError:
        """One line with the system's reason where there is one, and what is left to go on from."""
        cause = _root_cause(error)
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else _first_line(cause)
        newest = checkpoint.newest(self._root)
        left = "there is no older one" if newest is None else f"{newest.name} stays the newest"
        made = OSError(f"checkpoint of step {self._step} not written to {self._root}: {reason}; {left}")
        made.errno = cause.errno if isinstance(cause, OSError | PeerError) else None
        made.__cause__ = error
        return made

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, in buffers of the host that every save uses again."""
        for name, tensor in tensors.items():
            if name not in self._copies:
                self._copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._copies[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return self._copies


def _root_cause(error: BaseException) -> BaseException:
    """torch wraps what a writer raised, and its zip writer raises anew over a failed write."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return error if found is None else found


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"

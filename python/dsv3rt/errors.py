"""Errors that dsv3rt raises beside ValueError and TypeError."""

import signal


class BackendUnavailableError(RuntimeError):
    """A CUDA tensor reached an op whose kernel is not in this installation."""


class StoppedBySignalError(Exception):
    """A run was asked to stop, has saved itself, and did; `exit_code` is the shell's for that signal."""

    def __init__(self, number: signal.Signals, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class PeerError(RuntimeError):
    """Another rank failed in what all do together; `errno` is that of its error, where it had one."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class ExchangeError(RuntimeError):
    """The expert exchange lost a peer or ran out of room; rank, peer, phase and counters are named."""

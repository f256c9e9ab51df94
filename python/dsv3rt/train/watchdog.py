"""Ends a process that makes no progress, and says where it hangs."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path
from typing import Self

EXIT_CODE = 75  # EX_TEMPFAIL: try again
_STDERR = 2


class Watchdog:
    """While entered, `timeout_s` without a `beat` dump every thread's stack to stderr and `stuck`, and end the process.

    A thread does that. Where the hang keeps threads from running (a C call that holds the interpreter's lock), half the
    timeout later `faulthandler` dumps the stacks to stderr and ends the process. A timeout of 0 does nothing.
    """

    def __init__(self, timeout_s: float, stuck: Path) -> None:
        self._timeout_s = timeout_s
        self._stuck = stuck
        self._last = (time.monotonic(), "the start")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._timeout_s:
            self.beat("the start")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timeout_s:
            faulthandler.cancel_dump_traceback_later()
            self._done.set()
            self._thread.join()

    def beat(self, what: str) -> None:
        """Progress was made; `what` comes next."""
        if self._timeout_s:
            self._last = (time.monotonic(), what)
            faulthandler.dump_traceback_later(1.5 * self._timeout_s + 1.0, exit=True, file=_STDERR)

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._timeout_s / 4)):
            since, what = self._last
            if time.monotonic() - since >= self._timeout_s:
                self._end(what)

    def _end(self, what: str) -> None:
        message = (
            f"dsv3rt: error: no progress for {self._timeout_s:g} s in {what} (guard.step_timeout_s); the stacks are in "
            f"{self._stuck}; the same command resumes from the newest checkpoint\n"
        )
        try:
            faulthandler.dump_traceback(_STDERR)
            os.write(_STDERR, message.encode())
            with open(self._stuck, "w", encoding="utf-8") as file:
                file.write(message)
                file.flush()
                faulthandler.dump_traceback(file)
        finally:
            os._exit(EXIT_CODE)

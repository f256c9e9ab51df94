"""The progress of a run on the terminal: a bar where someone watches, a line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

_LOG_EVERY_S = 10.0


def say(text: str) -> None:
    """One line for people; a progress bar on the screen steps aside. What ranks other than the first say, `own_log`
    sends to a file."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


@contextlib.contextmanager
def own_log(folder: Path, rank: int) -> Iterator[None]:
    """Let all that a rank but the first says go to `folder/rank-N.log`, after what is there."""
    if rank == 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"rank-{rank}.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield


class Progress:
    """Shows step, loss, tokens/s and time left."""

    def __init__(self, total: int, done: int, *, on_screen: bool = True) -> None:
        """on_screen: False where another process shows the bar."""
        self._total = total
        self._first = self._done = done
        self._started = time.monotonic()
        self._last_line = 0.0
        hidden = not on_screen or not sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=hidden)

    def update(self, loss: float, tokens_per_s: float, val_loss: float | None) -> None:
        """One more step is done."""
        self._done += 1
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
            self._bar.update()
        now = time.monotonic()
        due = self._bar.disable and (now - self._last_line >= _LOG_EVERY_S or self._done == self._total)
        if due or val_loss is not None:
            self._last_line = now
            say(self._line(loss, tokens_per_s, val_loss, now))

    def rewind(self, step: int) -> None:
        """The steps after `step` are to be done again."""
        self._done, self._first = step, min(self._first, step)
        if not self._bar.disable:
            self._bar.n = step
            self._bar.refresh()

    def close(self) -> None:
        self._bar.close()

    def _line(self, loss: float, tokens_per_s: float, val_loss: float | None, now: float) -> str:
        left = (now - self._started) / (self._done - self._first) * (self._total - self._done)
        validation = "" if val_loss is None else f"  val {val_loss:.3f}"
        eta = f"{int(left) // 60}:{int(left) % 60:02d} left"
        return f"step {self._done}/{self._total}  loss {loss:.3f}{validation}  {tokens_per_s:,.0f} tokens/s  {eta}"

"""`dsv3rt train` whose rank 1 is killed at the start of step 6, the first time: torchrun restarts all ranks."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from dsv3rt import cli
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.engine import Engine


class Dying:
    """Engine.step, until it is time."""

    def __init__(self, step: Any) -> None:
        self._step = step

    def __call__(self, engine: Engine, state: RunState) -> Any:
        first_time = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first_time and os.environ["RANK"] == "1" and state.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._step(engine, state)


if __name__ == "__main__":
    dying = Dying(Engine.step)
    Engine.step = lambda engine, state: dying(engine, state)  # type: ignore[method-assign]
    sys.exit(cli.main(sys.argv[1:]))

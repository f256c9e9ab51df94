"""The one place that reads and sets environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """How torchrun started this process: its number among all, its number on this machine, how many there are, and how
    often torchrun has started them all again."""

    rank: int = 0
    local_rank: int = 0
    num_processes: int = 1
    restarts: int = 0


def launch() -> Launch:
    """What torchrun says; without torchrun this process is the only one."""
    if any(name not in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        return Launch()
    _ask_for_queues()
    return Launch(
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        num_processes=int(os.environ["WORLD_SIZE"]),
        restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def _ask_for_queues() -> None:
    """As many hardware queues as CUDA gives, before it starts. With its default of 8 streams have to share one, and a
    kernel that waits for a peer then holds up the very kernel that the peer waits for."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

"""An exponential moving average of the weights, in host memory, beside the training."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Average:
    """The average of FP32 masters; each `update` runs in a thread while the next step computes.

    The masters must not change while it runs: `wait` before the optimizer does (DeepSeek-V3 report sec. 3.2.3).
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: float) -> None:
        self._masters = masters
        self._decay = decay
        self._values = {name: master.detach().to("cpu", copy=True) for name, master in masters.items()}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="average")
        self._running: Future[None] | None = None

    def update(self) -> None:
        """average = decay * average + (1 - decay) * master, begun now."""
        self.wait()
        if any(master.is_cuda for master in self._masters.values()):
            torch.cuda.current_stream().synchronize()
        self._running = self._pool.submit(self._update)

    def wait(self) -> None:
        """Until the update that was begun is done."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def tensors(self) -> dict[str, Tensor]:
        """By the parameters' names, up to date; loading is in place."""
        self.wait()
        return self._values

    @torch.no_grad()
    def _update(self) -> None:
        for name, value in self._values.items():
            value.lerp_(self._masters[name].to("cpu"), 1.0 - self._decay)

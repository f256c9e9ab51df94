"""An exponential moving average of the weights, in host memory, beside the training."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

PIECE = 1 << 24  # elements on their way at a time: 64 MiB of pinned memory, twice


class Average:
    """The average of FP32 masters; each `update` runs in a thread while the next step computes.

    The masters must not change while it runs: `wait` before the optimizer does (DeepSeek-V3 report sec. 3.2.3). From a
    GPU they come over a stream of their own, a piece at a time through pinned memory; nobody waits for the device.
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: float) -> None:
        """masters: contiguous, all on one device."""
        self._masters = masters
        self._decay = decay
        self._values = {name: master.detach().to("cpu", copy=True) for name, master in masters.items()}
        device = next((master.device for master in masters.values()), torch.device("cpu"))
        self._ferry = _Ferry(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="average")
        self._running: Future[None] | None = None

    def update(self) -> None:
        """average = decay * average + (1 - decay) * master, begun now, of masters as the work queued so far leaves."""
        self.wait()
        if self._ferry is not None:
            self._ferry.follow_current_stream()
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
        masters = _pieces(self._masters[name].detach() for name in self._values)
        values = _pieces(self._values.values())
        for value, master in zip(values, masters if self._ferry is None else self._ferry.bring(masters), strict=True):
            value.lerp_(master, 1.0 - self._decay)


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        yield from tensor.view(-1).split(PIECE)


class _Ferry:
    """Brings pieces of FP32 tensors from a GPU to two pinned buffers in turn, on its own stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(PIECE, dtype=torch.float32, pin_memory=True) for _ in range(2)]
        self._arrivals = [torch.cuda.Event(blocking=True) for _ in range(2)]  # a wait sleeps, it does not spin

    def follow_current_stream(self) -> None:
        """What is copied from now on is what the device's current stream has written by then."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def bring(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Each piece in host memory, in order, valid until the next is asked for, which is on its way already."""
        under_way: deque[tuple[int, int]] = deque()
        for count, piece in enumerate(pieces):
            slot = count % 2
            with torch.cuda.stream(self._stream):
                self._buffers[slot][: piece.numel()].copy_(piece, non_blocking=True)
                self._arrivals[slot].record(self._stream)
            under_way.append((slot, piece.numel()))
            if len(under_way) == 2:
                yield self._arrived(*under_way.popleft())
        while under_way:
            yield self._arrived(*under_way.popleft())

    def _arrived(self, slot: int, size: int) -> Tensor:
        self._arrivals[slot].synchronize()
        return self._buffers[slot][:size]

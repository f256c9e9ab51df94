"""Messages between stages: one channel per pair of stages and direction, a receive always waiting in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from dsv3rt.parallel.pipeline.trace import MESSAGES

AHEAD = 1  # receives that wait while the message before is used; each holds a multiprocessor of a GPU


@dataclass(frozen=True)
class Message:
    """What a stage sends for a micro-batch; `shape` may differ from one to the next, both ends work it out."""

    micro_batch: int
    shape: tuple[int, ...]


def connect(group: Any, peer: int, like: Tensor, *, sends: bool) -> None:
    """Send a first message through a channel, or receive it. All ranks go through their channels in one order here:
    NCCL's first message makes both ends wait for each other on the host, which in a step could go round in a circle."""
    first = like.new_zeros(1)
    work = dist.isend(first, peer, group=group) if sends else dist.irecv(first, peer, group=group)
    assert work is not None
    work.wait()


class Inbox:
    """The receiving end of a channel for one step: messages arrive in the order in which they are going to be used."""

    def __init__(self, group: Any, peer: int, messages: Sequence[Message], like: Tensor, ahead: int = AHEAD) -> None:
        """ahead: receives that wait already when their message is asked for."""
        self._group = group
        self._peer = peer
        self._like = like
        self._ahead = ahead
        self._to_post = deque(messages)
        self._posted: deque[tuple[Message, Tensor, Any]] = deque()
        self._post(ahead)

    def receive(self, micro_batch: int) -> Tensor:
        """The message, waited for: on a GPU by the current stream, elsewhere by the caller."""
        with record_function(MESSAGES):
            self._post(max(1, self._ahead))
            message, tensor, work = self._posted.popleft()
            assert message.micro_batch == micro_batch, (message, micro_batch)
            self._post(self._ahead)
            work.wait()
        return tensor

    def _post(self, room: int) -> None:
        while self._to_post and len(self._posted) < room:
            message = self._to_post.popleft()
            tensor = self._like.new_empty(message.shape)
            work = dist.irecv(tensor, self._peer, group=self._group)
            assert work is not None
            self._posted.append((message, tensor, work))


class Outbox:
    """The sending end of all channels of a rank: nobody waits for a message to leave, until the step ends."""

    def __init__(self) -> None:
        self._leaving: deque[tuple[Tensor, Any, bool]] = deque()

    def send(self, tensor: Tensor, peer: int, group: Any, *, release: bool) -> None:
        """release: nobody reads the tensor again; its memory goes as soon as the message has left, whoever still
        refers to it."""
        while self._leaving and self._leaving[0][1].is_completed():
            self._pop()
        tensor = tensor.detach().contiguous()
        with record_function(MESSAGES):
            self._leaving.append((tensor, dist.isend(tensor, peer, group=group), release))

    def close(self) -> None:
        """Wait until everything has left."""
        while self._leaving:
            self._pop()

    def _pop(self) -> None:
        tensor, work, release = self._leaving.popleft()
        work.wait()
        if release:
            tensor.untyped_storage().resize_(0)

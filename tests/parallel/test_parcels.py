"""Gradients travel in parcels: few at a time, in one order, and nobody waits for one before the step's end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsv3rt.parallel import zero
from dsv3rt.parallel.placement import Share, chunk
from dsv3rt.parallel.zero import Gradients, Sum

RANKS = 2


class Post:
    """Stands for the all-to-all of two ranks that hold the same gradients; parcels arrive when a test says so."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.arrived = 0
        self.waited = 0
        self.most = 0

    def all_to_all_single(self, arriving: Tensor, outgoing: Tensor, *, group: object, async_op: bool) -> Work:
        assert async_op
        arriving.copy_(outgoing[:1].expand_as(outgoing))  # this is rank 0: both send it their first piece
        self.sent.append(outgoing.numel())
        self.most = max(self.most, len(self.sent) - self.arrived)
        return Work(self, len(self.sent))


class Work:
    def __init__(self, post: Post, number: int) -> None:
        self._post, self._number = post, number

    def is_completed(self) -> bool:
        return self._number <= self._post.arrived

    def wait(self) -> None:
        self._post.waited += not self.is_completed()
        self._post.arrived = max(self._post.arrived, self._number)


@pytest.fixture
def post(monkeypatch: pytest.MonkeyPatch) -> Post:
    made = Post()
    monkeypatch.setattr(zero.dist, "all_to_all_single", made.all_to_all_single)
    return made


def gradients(parameters: list[nn.Parameter], in_flight: int) -> Gradients:
    sums = []
    for index, parameter in enumerate(parameters):
        shape = tuple(parameter.shape)
        sums.append(Sum(f"p{index}", parameter, Share((0, 1), chunk(shape[0], RANKS, 0), shape, 0)))
    return Gradients(sums, {(0, 1): (object(), 0)}, 4 * 64, in_flight)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_few_parcels_at_a_time_and_no_wait_before_the_end(post: Post, in_flight: int) -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((7, 20), (3,), (1, 500), (16, 8))]
    made = gradients(parameters, in_flight)
    values = [torch.randn_like(p) for p in parameters]
    made.expect({f"p{i}": 1 for i in range(len(parameters))})
    for parameter, value in zip(parameters[::-1], values[::-1], strict=True):
        made.add(parameter, value.clone())
        assert post.waited == 0
    assert len(post.sent) == in_flight
    assert made.sums["p2"].grad is not None, "what has not left lies where it was"
    post.arrived = 1
    made._set_out((0, 1))
    assert len(post.sent) == in_flight + 1
    assert post.waited == 0
    made.reduce()
    assert post.most == in_flight
    assert max(post.sent) <= 64
    for one, value in zip(made.sums.values(), values, strict=True):
        assert one.grad is None
        assert one.shard is not None
        assert torch.equal(one.shard, 2 * value[one.share.rows])


def test_a_parameter_that_some_step_does_not_use(post: Post) -> None:
    parameters = [nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(6, 4))]
    made = gradients(parameters, 1)
    for _ in range(2):
        made.expect({"p1": 1})
        made.add(parameters[1], torch.ones(6, 4))
        made.reduce(frozenset({"p0"}))
        shards = [one.shard for one in made.sums.values()]
        assert shards[0] is None
        assert shards[1] is not None
        assert torch.equal(shards[1], torch.full((3, 4), 2.0))

"""The average of the weights, brought from the GPU while it computes."""

from __future__ import annotations

import os

import pytest
import torch

from dsv3rt.train.average import PIECE, Average

pytestmark = pytest.mark.gpu

SIZES = [5, 0, PIECE, 2 * PIECE + 3, 1]
LONG = 200_000_000  # cycles: 0.1 s or more


@pytest.mark.parametrize("every", [1, 2])
def test_average_is_that_of_the_cpu_and_waits_for_nothing(every: int) -> None:
    """Of masters that work still queued has yet to write."""
    masters = {str(index): torch.randn(size, device="cuda").add_(1.0) for index, size in enumerate(SIZES)}
    copies = {name: master.cpu() for name, master in masters.items()}
    average, expected = Average(masters, 0.9, every), Average(copies, 0.9, every)
    for number in range(1, 4):
        average.wait()
        torch.cuda._sleep(LONG)
        for master in masters.values():
            master.add_(1.0)
        average.update(number)
        assert not torch.cuda.current_stream().query()
        expected.wait()
        for copy in copies.values():
            copy.add_(1.0)
        expected.update(number)
    for name, value in average.tensors().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, expected.tensors()[name]), name


def test_average_is_there_before_work_queued_after_it() -> None:
    master = torch.full((1000,), 4.0, device="cuda")
    average = Average({"w": master}, decay=0.5)
    master.fill_(8.0)
    average.update(1)
    torch.cuda._sleep(LONG)
    average.wait()
    assert not torch.cuda.current_stream().query()
    assert torch.equal(average.tensors()["w"], torch.full((1000,), 6.0))


def test_masters_may_change_as_soon_as_they_are_released() -> None:
    """Neither `update` nor `release_masters` waits for the device, which itself waits for the copies."""
    masters = {str(index): torch.empty(size, device="cuda") for index, size in enumerate(SIZES)}
    for master in masters.values():
        master.fill_(1.0)
    average = Average(masters, decay=0.5)
    for number in range(2, 6):
        average.wait()
        torch.cuda._sleep(LONG)
        for master in masters.values():
            master.fill_(number)
        average.update(number)
        average.release_masters()
        assert not torch.cuda.current_stream().query()
        for master in masters.values():
            master.fill_(torch.nan)
    # 1 -> (1 + 2) / 2 -> (1.5 + 3) / 2 and so on, exactly.
    for value in average.tensors().values():
        assert value.eq(4.0625).all()


def test_workers_leave_torch_the_cores_it_had() -> None:
    before = torch.get_num_threads()
    average = Average({"w": torch.ones(5, device="cuda")}, decay=0.5)
    assert torch.get_num_threads() == before
    cores = len(os.sched_getaffinity(0)) // torch.cuda.device_count()
    assert 1 <= average._num_workers <= max(1, cores - 2)

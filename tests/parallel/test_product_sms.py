"""How many multiprocessors products take beside what waits for messages."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsv3rt.config import ParallelConfig
from dsv3rt.parallel.pipeline.lanes import product_sms

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def gpu_of_132(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_all_where_nothing_travels() -> None:
    assert product_sms(ParallelConfig(), 0, GPU) == 0
    assert product_sms(ParallelConfig(dp=2, ep=2), 0, GPU) == 0
    assert product_sms(ParallelConfig(pp=2), 4, CPU) == 0


def test_messages_and_rows_have_their_own() -> None:
    """Two for each channel, and those that carry the experts' rows."""
    assert product_sms(ParallelConfig(pp=2), 4, GPU) == 124
    assert product_sms(ParallelConfig(pp=4, dp=2, ep=2), 8, GPU) == 132 - 16 - 16
    assert product_sms(ParallelConfig(pp=2), 100, GPU) == 66


def test_what_is_asked_for_stands() -> None:
    assert product_sms(ParallelConfig(pp=2, product_sms=132), 4, GPU) == 132

"""Who stands for an exchange takes what the MoE layer gives one."""

from __future__ import annotations

import inspect

import pytest

from benchmarks.slice_models import EvenShare
from dsv3rt.layers.moe import Exchange
from dsv3rt.parallel.expert import ExpertExchange


@pytest.mark.parametrize("name", ["dispatch", "combine"])
@pytest.mark.parametrize("body", [ExpertExchange, EvenShare])
def test_exchange_has_the_protocols_signature(body: type, name: str) -> None:
    ours, asked = (inspect.signature(getattr(owner, name)).parameters for owner in (body, Exchange))
    assert list(ours) == list(asked)
    assert [parameter.kind for parameter in ours.values()] == [parameter.kind for parameter in asked.values()]

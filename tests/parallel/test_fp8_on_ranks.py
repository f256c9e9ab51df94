"""Two processes train in FP8 without copies of the weights in BF16 as they do with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fleet import torchrun
from fp8_worker import LAYOUTS, STEPS


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("fp8") / "out.json"
    workers = torchrun(2, str(Path(__file__).with_name("fp8_worker.py")), str(out))
    try:
        output, _ = workers.communicate(timeout=300)
    finally:
        workers.kill()
    assert workers.returncode == 0, output
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_released_weights_change_no_bit(results: dict[str, Any], name: str) -> None:
    """Losses and gradient norms of all steps, and a validation loss after them."""
    ours, theirs = results[name]
    assert ours["released"] == ours["weights"] > 10
    assert theirs["released"] == 0
    assert len(ours["steps"]) == STEPS
    assert ours["steps"] == theirs["steps"]
    assert ours["val_loss"] == theirs["val_loss"]
    assert ours["val_loss"] < ours["steps"][0][0], "the updates reach the casts"


def test_weights_are_restored_from_all_ranks(results: dict[str, Any]) -> None:
    assert results["restored"] == [True, True]

"""The op surface as a whole."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from dsv3rt import ops

ARCHITECTURE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"
FUNCTIONS = [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]


def documented_ops() -> set[str]:
    """Names in the first column of the table of ops."""
    return set(re.findall(r"^\| `(\w+)\(", ARCHITECTURE.read_text(), flags=re.MULTILINE))


def test_ops_are_those_of_the_architecture() -> None:
    assert set(FUNCTIONS) == documented_ops() | {"calc_diff"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_op_documents_arguments_result_and_errors(name: str) -> None:
    function = getattr(ops, name)
    text = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters:
        assert f"\n    {argument}: " in text
    assert "Raises:" in text
    assert ("Returns:" in text) == (function.__annotations__["return"] != "None")

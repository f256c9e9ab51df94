"""calc_diff."""

from __future__ import annotations

import math

import pytest
import torch

from dsv3rt import ops


def test_calc_diff_of_known_pairs() -> None:
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([-4.0, 3.0])
    assert ops.calc_diff(x, x) == pytest.approx(0.0, abs=1e-15)
    assert ops.calc_diff(x, y) == pytest.approx(1.0)
    assert ops.calc_diff(x, -x) == pytest.approx(2.0)
    assert ops.calc_diff(x, 2 * x) == pytest.approx(1 - 2 * 2 / 5)
    assert ops.calc_diff(x, torch.zeros(2)) == pytest.approx(1.0)


def test_calc_diff_of_zeros_and_of_nothing_is_zero() -> None:
    assert ops.calc_diff(torch.zeros(3), torch.zeros(3)) == 0.0
    assert ops.calc_diff(torch.empty(0, 4), torch.empty(0, 4)) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_calc_diff_shows_bad_numbers(bad: float) -> None:
    assert math.isnan(ops.calc_diff(torch.tensor([1.0, bad]), torch.ones(2)))
    assert math.isnan(ops.calc_diff(torch.ones(2), torch.tensor([1.0, bad])))


def test_calc_diff_works_in_fp64() -> None:
    x = torch.full((1000,), 1e20)  # squares overflow FP32
    assert ops.calc_diff(x, x * (1 + 2**-10)) == pytest.approx(2**-21, rel=1e-2)
    assert ops.calc_diff(x.bfloat16(), x.bfloat16()) == pytest.approx(0.0, abs=1e-12)


def test_calc_diff_rejects_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"^calc_diff: y must have shape \(3,\), got \(3, 1\)$"):
        ops.calc_diff(torch.zeros(3), torch.zeros(3, 1))

"""How many SMs an exchange takes where nobody says."""

from __future__ import annotations

import pytest

from dsv3rt.ops.cuda.ep import sms_for


@pytest.mark.parametrize(
    ("node_size", "sharing", "sms_of_gpu", "expected"),
    [
        (8, 1, 132, 16),
        (2, 1, 132, 16),
        (1, 1, 132, 8),
        (8, 8, 132, 8),
        (4, 2, 132, 16),
        (8, 8, 114, 7),
        (8, 200, 132, 1),
    ],
)
def test_sms_for_fills_the_way_between_ranks(node_size: int, sharing: int, sms_of_gpu: int, expected: int) -> None:
    assert sms_for(node_size, sharing, sms_of_gpu) == expected


@pytest.mark.parametrize("sharing", range(1, 67))
def test_sms_for_leaves_half_of_a_shared_gpu(sharing: int) -> None:
    assert sharing * sms_for(8, sharing, 132) <= 66

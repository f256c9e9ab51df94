"""Placement of experts and their replicas: valid, even, and near what trying everything finds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations

import pytest
import torch

from dsv3rt.parallel.eplb import Placement, place_by_groups, place_globally

LOADS = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]


def best_packing(loads: list[float], num_bins: int) -> float:
    """The smallest possible load of the fullest of bins with equally many items, by trying all."""

    def peaks(left: tuple[int, ...]) -> Iterator[float]:
        if not left:
            yield 0.0
            return
        first, *others = left
        for partners in combinations(others, len(loads) // num_bins - 1):
            chosen = {first, *partners}
            total = sum(loads[i] for i in chosen)
            yield max(total, min(peaks(tuple(i for i in others if i not in chosen))))

    return min(peaks(tuple(range(len(loads)))))


def test_placement_holds_every_expert_in_equal_shares() -> None:
    placement = place_by_groups(LOADS, 16, num_groups=4, num_nodes=2, num_gpus=8)
    assert len(placement.expert_of_slot) == 16
    assert sorted(set(placement.expert_of_slot)) == list(range(12))
    assert sum(placement.gpu_loads(LOADS)) == pytest.approx(sum(LOADS))


def test_groups_stay_on_one_node() -> None:
    placement = place_by_groups(LOADS, 16, num_groups=4, num_nodes=2, num_gpus=8)
    nodes: dict[int, set[int]] = {}
    for slot, expert in enumerate(placement.expert_of_slot):
        nodes.setdefault(expert // 3, set()).add(slot // 8)
    assert all(len(held) == 1 for held in nodes.values())
    assert sorted(node for held in nodes.values() for node in held) == [0, 0, 1, 1]


def test_replicas_make_the_largest_share_least() -> None:
    """No other numbers of replicas have a smaller largest share: all of them are tried."""
    load_E = [7.0, 1.0, 3.0, 5.0]
    slots = place_globally(load_E, 8, 2).slots_of_experts()
    got = max(load / len(replicas) for load, replicas in zip(load_E, slots, strict=True))
    cuts = combinations(range(1, 8), 3)
    best = min(max(load / n for load, n in zip(load_E, (a, b - a, c - b, 8 - c), strict=True)) for a, b, c in cuts)
    assert got == best


@pytest.mark.parametrize("seed", range(8))
def test_packing_is_near_the_best(seed: int) -> None:
    """Within 4/3: what greed by falling size promises without equal numbers; exchanges make up for these."""
    numbers = random.Random(seed)
    load_E = [numbers.paretovariate(1.2) for _ in range(12)]
    peak = max(place_globally(load_E, 12, 4).gpu_loads(load_E))
    best = best_packing(load_E, 4)
    assert best * (1 - 1e-12) <= peak <= best * 4 / 3


def test_placement_is_better_than_none() -> None:
    """Skewed loads: with a quarter more slots the fullest GPU has at most a tenth more than the mean."""
    numbers = random.Random(3)
    load_E = [numbers.expovariate(1.0) for _ in range(256)]
    plain = Placement(tuple(range(256)), 256, 32).gpu_loads(load_E)
    even = place_globally(load_E, 320, 32).gpu_loads(load_E)
    mean = sum(load_E) / 32
    assert max(even) < 1.1 * mean < max(plain)


def test_assign_spreads_tokens_over_replicas() -> None:
    placement = Placement((0, 1, 0, 2, 0, 1), 3, 2)
    idx_TK = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 1]])
    slot_TK = placement.assign(idx_TK)
    assert slot_TK.tolist() == [[0, 1], [2, 5], [4, 3], [0, 5]]
    held = torch.tensor(placement.expert_of_slot)
    assert torch.equal(held[slot_TK], idx_TK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_slots": 11}, "place_by_groups: num_slots must be at least the 12 experts and positive, got 11"),
        ({"num_gpus": 5}, "place_by_groups: num_gpus must divide the 16 slots, got 5"),
        ({"num_groups": 5}, "place_by_groups: num_groups must divide the 12 experts, got 5"),
        ({"num_nodes": 3}, "place_by_groups: num_nodes must divide the 4 groups, got 3"),
        ({"load_E": [-1.0, *LOADS[1:]]}, r"place_by_groups: load_E must be finite and not negative, got -1.0..183"),
    ],
)
def test_placement_rejects_bad_fleets(change: dict[str, object], message: str) -> None:
    given = {"load_E": LOADS, "num_slots": 16, "num_groups": 4, "num_nodes": 2, "num_gpus": 8, **change}
    with pytest.raises(ValueError, match=message):
        place_by_groups(**given)  # type: ignore[arg-type]

"""Expert placement for serving: which experts get replicas, and which GPU holds what, so that loads are even.

Slots are equally many on each GPU. First replicas: one more, again and again, for the expert with the most load a
replica, which makes the largest share as small as it can be. Then packing: the largest share first, onto the GPU with
the least load that has room, and after that exchanges between the fullest GPU and others while they help.

The hierarchical form keeps the experts of a routing group on one node, so that tokens limited to few groups cross
between few nodes; the global form ignores groups and nodes. Source: DeepSeek-V3 report (arXiv 2412.19437) sec. 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """expert_of_slot: the expert in every slot; GPU g holds the g-th equal share of them."""

    expert_of_slot: tuple[int, ...]
    num_experts: int
    num_gpus: int
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_slots(self) -> int:
        return len(self.expert_of_slot)

    def experts_on(self, gpu: int) -> tuple[int, ...]:
        """The expert in every slot of a GPU, in the order in which dispatch lays out its rows."""
        width = self.num_slots // self.num_gpus
        return self.expert_of_slot[gpu * width : (gpu + 1) * width]

    def slots_of_experts(self) -> list[list[int]]:
        slots: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.expert_of_slot):
            slots[expert].append(slot)
        return slots

    def gpu_loads(self, load_E: Sequence[float]) -> list[float]:
        """With an expert's load shared equally by its replicas."""
        slots = self.slots_of_experts()
        share = [load_E[expert] / len(slots[expert]) for expert in self.expert_of_slot]
        width = len(share) // self.num_gpus
        return [sum(share[gpu * width : (gpu + 1) * width]) for gpu in range(self.num_gpus)]

    def assign(self, idx_TK: Tensor) -> Tensor:
        """The slot that serves each choice, for a dispatch with slots as experts: token t goes to replica t mod n.

        After the first call on a device nothing comes from the host any more, so that a CUDA graph can record it.
        """
        if idx_TK.device not in self._tables:
            self._tables[idx_TK.device] = self._table(idx_TK.device)
        slot_ER, count_E = self._tables[idx_TK.device]
        token_T1 = torch.arange(idx_TK.shape[0], device=idx_TK.device)[:, None]
        return slot_ER[idx_TK, token_T1 % count_E[idx_TK]]

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The slots of each expert, over again as often as rows are long, and how many there are."""
        slots = self.slots_of_experts()
        most = max(len(replicas) for replicas in slots)
        table = [[replicas[i % len(replicas)] for i in range(most)] for replicas in slots]
        return torch.tensor(table, device=device), torch.tensor([len(replicas) for replicas in slots], device=device)


def place_globally(load_E: Sequence[float], num_slots: int, num_gpus: int) -> Placement:
    """Raises ValueError: slots that are fewer than experts or no multiple of the GPUs; loads that are negative."""
    _check("place_globally", load_E, num_slots, num_gpus)
    replicas = _replicate(load_E, num_slots)
    gpus = _pack([load_E[expert] / replicas.count(expert) for expert in replicas], num_gpus)
    return Placement(tuple(replicas[item] for gpu in gpus for item in gpu), len(load_E), num_gpus)


def place_by_groups(
    load_E: Sequence[float], num_slots: int, *, num_groups: int, num_nodes: int, num_gpus: int
) -> Placement:
    """Neighbouring experts form `num_groups` equal groups; each node holds equally many, and all their replicas.

    Raises:
        ValueError: groups that do not divide the experts, nodes that do not divide groups and GPUs, and as in
            `place_globally`.
    """
    op = "place_by_groups"
    _check(op, load_E, num_slots, num_gpus)
    _divides(op, "num_groups", num_groups, "experts", len(load_E))
    _divides(op, "num_nodes", num_nodes, "groups", num_groups)
    _divides(op, "num_nodes", num_nodes, "GPUs", num_gpus)
    width = len(load_E) // num_groups
    group_loads = [sum(load_E[group * width : (group + 1) * width]) for group in range(num_groups)]
    slots: list[int] = []
    for groups in _pack(group_loads, num_nodes):
        experts = [group * width + i for group in sorted(groups) for i in range(width)]
        inside = place_globally([load_E[expert] for expert in experts], num_slots // num_nodes, num_gpus // num_nodes)
        slots += [experts[slot] for slot in inside.expert_of_slot]
    return Placement(tuple(slots), len(load_E), num_gpus)


def _check(op: str, load_E: Sequence[float], num_slots: int, num_gpus: int) -> None:
    if num_slots < len(load_E) or len(load_E) == 0:
        raise ValueError(f"{op}: num_slots must be at least the {len(load_E)} experts and positive, got {num_slots}")
    _divides(op, "num_gpus", num_gpus, "slots", num_slots)
    if not all(0 <= load < float("inf") for load in load_E):
        raise ValueError(f"{op}: load_E must be finite and not negative, got {min(load_E)}..{max(load_E)}")


def _divides(op: str, name: str, value: int, what: str, whole: int) -> None:
    if value <= 0 or whole % value:
        raise ValueError(f"{op}: {name} must divide the {whole} {what}, got {value}")


def _replicate(load_E: Sequence[float], num_slots: int) -> list[int]:
    """The expert of each slot, in no order of place; ties go to the lower expert."""
    counts = [1] * len(load_E)
    for _ in range(num_slots - len(load_E)):
        counts[max(range(len(load_E)), key=lambda expert: load_E[expert] / counts[expert])] += 1
    return [expert for expert, count in enumerate(counts) for _ in range(count)]


def _pack(load_I: Sequence[float], num_bins: int) -> list[list[int]]:
    """Items in bins of equally many, the fullest as empty as greed and pairwise exchange make it."""
    room = len(load_I) // num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals = [0.0] * num_bins
    for item in sorted(range(len(load_I)), key=lambda i: (-load_I[i], i)):
        chosen = min((b for b in range(num_bins) if len(bins[b]) < room), key=lambda b: (totals[b], b))
        bins[chosen].append(item)
        totals[chosen] += load_I[item]
    while _exchange(load_I, bins, totals):
        continue
    return bins


def _exchange(load_I: Sequence[float], bins: list[list[int]], totals: list[float]) -> bool:
    """Swap one item of the fullest bin for a smaller one elsewhere, such that both bins stay below it by the most."""
    full = max(range(len(bins)), key=lambda b: totals[b])
    best, swap = totals[full] * (1 - 1e-9), None  # an exchange that gains nothing but rounding would never end
    for other in range(len(bins)):
        for i, item in enumerate(bins[full]):
            for j, candidate in enumerate(bins[other]):
                gain = load_I[item] - load_I[candidate]
                peak = max(totals[full] - gain, totals[other] + gain)
                if other != full and peak < best:
                    best, swap = peak, (other, i, j)
    if swap is None:
        return False
    other, i, j = swap
    bins[full][i], bins[other][j] = bins[other][j], bins[full][i]
    for changed in (full, other):
        totals[changed] = sum(load_I[item] for item in bins[changed])
    return True

"""Which rank holds what: blocks to pipeline stages by counted cost, stages to pipeline ranks, experts to ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from dsv3rt.config import ModelConfig, ParallelConfig
from dsv3rt.model.flops import layer_costs
from dsv3rt.parallel.pipeline.schedule import Schedule, generate

EXPERT_MARK = ".mlp.experts."


@dataclass(frozen=True)
class Share:
    """A rank's part of a parameter's optimizer state, rows along dimension 0.

    ranks: those that hold the same values of it, and divide the state among them. rows: of this rank's parameter.
    shape: of the whole parameter. first_row: where `rows` begins in it.
    """

    ranks: tuple[int, ...]
    rows: slice
    shape: tuple[int, ...]
    first_row: int


@dataclass(frozen=True)
class Layout:
    """The model on the grid of pp x dp ranks, experts over ep neighbours; see `parallel.mesh`."""

    model: ModelConfig
    parallel: ParallelConfig
    seq_len: int

    def schedule(self, num_micro_batches: int) -> Schedule:
        """The table for a step; raises ValueError where the sizes don't fit the schedule."""
        parallel = self.parallel
        return generate(
            parallel.schedule,
            num_ranks=parallel.pp,
            num_micro_batches=num_micro_batches,
            stages_per_rank=parallel.stages_per_rank or None,
            put_off=parallel.put_off,
        )

    @cached_property
    def form(self) -> Schedule:
        """Any table of the kind: stages, chains and placement don't depend on the number of micro-batches."""
        return self.schedule(2 * self.parallel.pp)

    @cached_property
    def stages(self) -> tuple[range, ...]:
        """The main blocks of every stage of the model; head and MTP belong to the last."""
        layers, tail = self.costs
        mirrored = self.parallel.schedule in ("dualpipev", "dualpipe")
        return (balanced_in_pairs if mirrored else balanced)(layers, tail, self.form.stages_per_copy)

    @cached_property
    def costs(self) -> tuple[tuple[int, ...], int]:
        """Of every main block, and of what follows them: multiplications a token, or millionths of the times given."""
        given, model = self.parallel.layer_costs, self.model
        if given is None:
            counted = layer_costs(model, self.seq_len)
            return counted.layers, counted.tail
        dense, moe, head, mtp = (round(1e6 * cost) for cost in (given.dense, given.moe, given.head, given.mtp))
        layers = (dense if layer < model.num_dense_layers else moe for layer in range(model.num_layers))
        return tuple(layers), head + model.mtp_depth * mtp

    def model_stage(self, table_stage: int) -> int:
        """The stage of the model that a table's stage is (DualPipe's second copy counts on)."""
        return table_stage - self.form.chain_of(table_stage).stages.start

    def stages_on(self, pp_rank: int) -> tuple[int, ...]:
        """The stages of the model on a pipeline rank."""
        return tuple(sorted({self.model_stage(stage) for stage in self.form.stages_of(pp_rank)}))

    def stages_of(self, name: str) -> set[int]:
        """The stages of the model that use a parameter or buffer: MTP shares the embedding with the first."""
        last = len(self.stages) - 1
        if name.startswith("layers."):
            layer = int(name.split(".")[1])
            return {next((s for s, layers in enumerate(self.stages) if layer in layers), last)}
        if name.startswith("embed_tokens."):
            return {0, last} if self.model.mtp_depth else {0}
        return {last}

    def is_mtp(self, name: str) -> bool:
        return name.startswith("layers.") and int(name.split(".")[1]) >= self.model.num_layers

    def pp_ranks_of(self, name: str) -> tuple[int, ...]:
        users = self.stages_of(name)
        return tuple(rank for rank in range(self.parallel.pp) if users & set(self.stages_on(rank)))

    def experts_on(self, ep_rank: int) -> slice:
        count = self.model.num_experts // self.parallel.ep
        return slice(ep_rank * count, (ep_rank + 1) * count)

    def share(self, name: str, shape: tuple[int, ...], rank: int) -> Share:
        """A rank's share of a parameter that it holds; `shape` is that of the whole parameter."""
        ep = self.parallel.ep
        ep_rank = rank % self.parallel.dp % ep
        first, count, step, offset = 0, shape[0], 1, 0
        if EXPERT_MARK in name:
            experts = self.experts_on(ep_rank)
            first, count, step, offset = experts.start, experts.stop - experts.start, ep, ep_rank
        ranks = self._ranks(self.pp_ranks_of(name), offset, step)
        rows = chunk(count, len(ranks), ranks.index(rank))
        return Share(ranks, rows, shape, first + rows.start)

    def expert_groups(self) -> list[tuple[int, ...]]:
        """The groups of ranks among which experts are spread, all of them."""
        ep = self.parallel.ep
        return [tuple(range(first, first + ep)) for first in range(0, self.parallel.num_processes, ep)]

    def share_groups(self, names: Iterable[str]) -> list[tuple[int, ...]]:
        """All `ranks` of all shares of these parameters, in one order."""
        ep, found = self.parallel.ep, set()
        for name in names:
            parts = range(ep) if EXPERT_MARK in name else range(1)
            found |= {self._ranks(self.pp_ranks_of(name), part, len(parts)) for part in parts}
        return sorted(found)

    def _ranks(self, pp_ranks: tuple[int, ...], offset: int, step: int) -> tuple[int, ...]:
        """The ranks of these rows of the grid, every `step`-th of a row."""
        return tuple(pp * self.parallel.dp + d for pp in pp_ranks for d in range(offset, self.parallel.dp, step))


def chunk(count: int, parts: int, index: int) -> slice:
    """The index-th of `parts` pieces of `count` rows, of one size but for the last ones (which may be empty)."""
    size = -(-count // parts)
    return slice(min(index * size, count), min((index + 1) * size, count))


def balanced(costs: tuple[int, ...], tail: int, num_stages: int) -> tuple[range, ...]:
    """Cut the blocks into stages in order; the last stage also bears `tail`. A stage may be empty.

    The costliest stage is as cheap as can be; among such cuts the sum of the squares is least, then the first stages
    are the short ones (in a V the first stage shares its rank with the last). Integers, so that ties are ties.
    """
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)
    count = len(costs)
    never = total[-1] + tail + 1
    best: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, ()), *[(never, 0, ())] * count]
    for stage in range(num_stages):
        extra = tail if stage == num_stages - 1 else 0
        best = [
            min(
                (max(worst, cost), squares + cost * cost, (*cuts, end))
                for start, (worst, squares, cuts) in enumerate(best[: end + 1])
                for cost in (total[end] - total[start] + extra,)
            )
            for end in range(count + 1)
        ]
    cuts = best[count][2]
    return tuple(range(start, end) for start, end in zip((0, *cuts[:-1]), cuts, strict=True))


def balanced_in_pairs(costs: tuple[int, ...], tail: int, num_stages: int) -> tuple[range, ...]:
    """The same where the first and the last stage share a rank, the second and the last but one, and so on.

    The costliest pair is as cheap as can be; among such cuts the sum of the squares, of pairs and of stages, is least,
    then the first stages are the short ones. From the outside in, leaving out what is worse than `balanced`.
    """
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)
    by_stage = [total[part.stop] - total[part.start] for part in balanced(costs, tail, num_stages)]
    by_stage[-1] += tail
    bound = max(first + last for first, last in zip(by_stage, by_stage[::-1], strict=True))
    best: dict[tuple[int, int], _Cuts] = {(0, len(costs)): (0, 0, ())}
    for pair in range(num_stages // 2):
        pairs_left, extra = num_stages // 2 - pair - 1, 0 if pair else tail
        following: dict[tuple[int, int], _Cuts] = {}
        for (start, stop), (worst, squares, cuts) in best.items():
            for front, back in _inner(total, (start, stop), bound - extra, is_last=pairs_left == 0):
                first, last = total[front] - total[start], total[stop] - total[back] + extra
                if total[back] - total[front] <= bound * pairs_left:
                    sums = squares + (first + last) ** 2 + first**2 + last**2
                    found = (max(worst, first + last), sums, (*cuts, (front, back)))
                    following[front, back] = min(found, following.get((front, back), found))
        best = following
    cuts = min(best.values())[2]
    ends = [0, *(front for front, _ in cuts), *(back for _, back in cuts[-2::-1]), len(costs)]
    return tuple(range(start, end) for start, end in pairwise(ends))


_Cuts = tuple[int, int, tuple[tuple[int, int], ...]]  # costliest pair, squares, where the stages of each pair end


def _inner(total: list[int], left: tuple[int, int], limit: int, *, is_last: bool) -> Iterable[tuple[int, int]]:
    """Where the two stages of a pair may end for at most `limit`, outside in; the innermost two meet."""
    start, stop = left
    for front in range(start, stop + 1):
        for back in (front,) if is_last else range(stop, front - 1, -1):
            if total[front] - total[start] + total[stop] - total[back] > limit:
                break
            yield front, back

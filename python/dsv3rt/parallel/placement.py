"""Which rank holds what: blocks to pipeline stages by counted cost, stages to pipeline ranks, experts to ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

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
        costs = layer_costs(self.model, self.seq_len)
        return balanced(costs.layers, costs.tail, self.form.stages_per_copy)

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

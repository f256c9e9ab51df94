"""Runs any table of steps on a rank's stages: messages, phases, weight gradients put off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dsv3rt.layers.ledger import WeightGrads
from dsv3rt.model.transformer import Transformer
from dsv3rt.parallel.mesh import Mesh
from dsv3rt.parallel.pipeline.action import Action, Op, Overlap, Step
from dsv3rt.parallel.pipeline.chunk import Chunk, MicroBatch, Rule, Stage
from dsv3rt.parallel.pipeline.lanes import (
    MESSAGE_SMS,
    Lanes,
    OfChunk,
    Phase,
    Walk,
    product_sms,
    run_into_each_other,
)
from dsv3rt.parallel.pipeline.p2p import AHEAD, Inbox, Message, Outbox, connect
from dsv3rt.parallel.pipeline.schedule import Schedule
from dsv3rt.parallel.placement import EXPERT_MARK, Layout
from dsv3rt.parallel.zero import Gradients

Kind = Literal["activation", "gradient"]
Wire = tuple[Kind, int, int]  # what travels, from which stage of the table to which


@dataclass
class Tally:
    """What a rank's stages saw of its micro-batches; zeros where other ranks know. losses_M3: main, MTP and balance of
    each. counts: tokens per expert by layer, summed."""

    losses_M3: Tensor
    counts: dict[int, Tensor] = field(default_factory=dict)

    def add(self, micro_batch: int, chunk: Chunk) -> None:
        self.losses_M3[micro_batch] += chunk.losses
        for layer, counts_E in chunk.counts.items():
            self.counts[layer] = self.counts[layer] + counts_E if layer in self.counts else counts_E


class Executor:
    """The stages of one rank. All ranks of a pipeline run the same table at the same time, each its own row."""

    def __init__(self, model: Transformer, layout: Layout, mesh: Mesh, gradients: Gradients, like: Tensor) -> None:
        """like: any tensor of the model's dtype and device."""
        self._model = model
        self._layout = layout
        self._mesh = mesh
        self.gradients = gradients
        self.dim = layout.model.dim
        self._like = like
        last = len(layout.stages) - 1
        self._stages = {
            stage: Stage(model, layout.stages[stage], stage == 0, stage == last)
            for stage in layout.stages_on(mesh.pp_rank)
        }
        self._tables: dict[int, Schedule] = {}
        self._rehearsed = mesh.config.pp == 1
        self._groups = _channels(layout, mesh)
        self._lanes = Lanes(like.device, product_sms(layout.parallel, len(self._groups), like.device))
        if like.is_cuda:
            for wire, group in self._groups.items():
                sends = self.is_here(wire[1])
                connect(group, self._peer(wire[2] if sends else wire[1]), like, sends=sends)

    def table(self, num_micro_batches: int) -> Schedule:
        if num_micro_batches not in self._tables:
            self._tables[num_micro_batches] = self._layout.schedule(num_micro_batches)
        return self._tables[num_micro_batches]

    def train(self, batches: Sequence[MicroBatch], rule: Rule) -> Tally:
        """Forward and backward of all micro-batches; their gradients go to `gradients`."""
        schedule = self.table(len(batches))
        row = schedule.steps[self._mesh.pp_rank]
        if not self._rehearsed:
            self._rehearse(schedule, batches, rule)
            self._rehearsed = True
        self.gradients.expect(self._contributions(schedule, rule))
        run = _Run(self, schedule, row, batches, rule)
        for step in row:
            run.do(step)
        return run.close()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> Tally:
        """The forwards alone, through the model's first copy."""
        schedule = self._layout.form
        stages = [stage for stage in schedule.chains[0].stages if schedule.placement[stage] == self._mesh.pp_rank]
        row = tuple(Action(stage, "F", i) for stage in stages for i in range(len(batches)))
        run = _Run(self, schedule, row, batches, Rule())
        for step in row:
            run.do(step)
        return run.close()

    def _rehearse(self, schedule: Schedule, batches: Sequence[MicroBatch], rule: Rule) -> None:
        """A micro-batch forward and backward through each copy of the model, one stage at a time; leaves no gradients.

        CUDA and its libraries load a kernel when it is first launched, and that may wait for all work of the device. In
        a table, receives wait on the device for ranks that load kernels themselves, and so round in a circle. Here a
        receive is posted when its message is needed, so that every wait is for a stage before.
        """
        ops = {part.op for row in schedule.steps for step in row for part in step.parts}
        backwards: tuple[tuple[Op, ...], ...] = (("B",), ("I", "W"))
        for backward in backwards:
            for chain in schedule.chains if ops.issuperset(backward) else ():
                mine = [stage for stage in chain.stages if self.is_here(stage)]
                row = [Action(stage, "F", chain.micro_batches[0]) for stage in mine]
                row += [Action(stage, op, chain.micro_batches[0]) for stage in reversed(mine) for op in backward]
                run = _Run(self, schedule, row, batches, rule, ahead=0)
                for action in row:
                    run.do(action)
                run.close()
        self.gradients.reduce()
        self.gradients.drop()

    def stage(self, table_stage: int) -> Stage:
        return self._stages[self._layout.model_stage(table_stage)]

    def walk(self, action: Action, phases: Iterator[Phase | OfChunk]) -> Walk:
        return Walk(phases, self._lanes, str(action))

    def chunk(self, action: Action, batch: MicroBatch, rule: Rule, weight_grads: WeightGrads | None) -> Chunk:
        return Chunk(self.stage(action.stage), batch, rule, self._lanes, weight_grads)

    def inbox(self, wire: Wire, messages: Sequence[Message], ahead: int) -> Inbox:
        return Inbox(self._groups[wire], self._peer(wire[1]), messages, self._like, ahead)

    def send(self, outbox: Outbox, wire: Wire, tensor: Tensor) -> None:
        """A stage's output is read by the next stage alone, but its backward's graph refers to it."""
        outbox.send(tensor, self._peer(wire[2]), self._groups[wire], release=wire[0] == "activation")

    def is_here(self, table_stage: int) -> bool:
        return self._layout.form.placement[table_stage] == self._mesh.pp_rank

    def _peer(self, table_stage: int) -> int:
        return self._mesh.pipeline_peer(self._layout.form.placement[table_stage])

    def _contributions(self, schedule: Schedule, rule: Rule) -> dict[str, int]:
        """How many gradients every parameter is going to get: one a micro-batch and stage that uses it, of experts one
        a chunk of tokens."""
        uses = {stage: len(schedule.chain_of(stage).micro_batches) for stage in schedule.stages_of(self._mesh.pp_rank)}
        found = {}
        for name in self.gradients.sums:
            users = self._layout.stages_of(name)
            if rule.mtp_weight == 0:  # the last stage has no use for the embedding then, and MTP blocks idle
                users = {0} if name.startswith("embed_tokens.") else set() if self._layout.is_mtp(name) else users
            count = sum(count for stage, count in uses.items() if self._layout.model_stage(stage) in users)
            found[name] = count * (self._layout.parallel.expert_chunks if EXPERT_MARK in name else 1)
        return found


def _channels(layout: Layout, mesh: Mesh) -> dict[Wire, Any]:
    """The process groups of all wires that this rank is an end of."""
    schedule, mine = layout.form, {}
    for chain in schedule.chains:
        for stage in chain.stages[:-1]:
            ends = sorted({schedule.placement[stage], schedule.placement[stage + 1]})
            if len(ends) == 1:
                continue
            columns = [tuple(mesh.at(pp_rank, dp_rank) for pp_rank in ends) for dp_rank in range(mesh.config.dp)]
            wires: tuple[Wire, Wire] = ("activation", stage, stage + 1), ("gradient", stage + 1, stage)
            for wire in wires:
                # One, where this rank is an end.
                for group in mesh.groups(f"{wire}", columns, most_sms=MESSAGE_SMS).values():
                    mine[wire] = group
    return mine


class _Run:
    """One row of a table on its way: what is in flight."""

    def __init__(
        self,
        executor: Executor,
        schedule: Schedule,
        row: Sequence[Step],
        batches: Sequence[MicroBatch],
        rule: Rule,
        ahead: int = AHEAD,
    ) -> None:
        """ahead: receives that each channel has waiting."""
        self._executor = executor
        self._schedule = schedule
        self._batches = batches
        self._rule = rule
        self._chunks: dict[tuple[int, int], Chunk] = {}
        self._owed: dict[tuple[int, int], WeightGrads] = {}
        self._handed: dict[tuple[Kind, int, int], Tensor] = {}  # between two stages of this rank
        self._outbox = Outbox()
        losses = torch.zeros(len(batches), 3, dtype=torch.float32, device=batches[0].tokens_BT.device)
        self._tally = Tally(losses)
        actions = [part for step in row for part in step.parts]
        self._cut_in_two = {(action.stage, action.micro_batch) for action in actions if action.op == "I"}
        self._inboxes = self._open(actions, ahead)

    def do(self, step: Step) -> None:
        if isinstance(step, Overlap):
            forward, backward = self._start_forward(step.forward), self._start_backward(step.backward)
            run_into_each_other(forward, backward)
            self._end_forward(step.forward)
            self._end_backward(step.backward)
        elif step.op == "F":
            self._start_forward(step).finish()
            self._end_forward(step)
        elif step.op == "W":
            self._executor.walk(step, _weights(self._owed.pop((step.stage, step.micro_batch)))).finish()
        else:
            self._start_backward(step).finish()
            self._end_backward(step)

    def close(self) -> Tally:
        self._outbox.close()
        return self._tally

    def _start_forward(self, action: Action) -> Walk:
        key = (action.stage, action.micro_batch)
        if key in self._cut_in_two:
            self._owed[key] = WeightGrads(self._executor.gradients.add)
        batch = self._batches[action.micro_batch]
        chunk = self._executor.chunk(action, batch, self._rule, self._owed.get(key))
        self._chunks[key] = chunk
        source = self._neighbour(action.stage, -1)
        x_TD = None if source is None else self._take(("activation", source, action.stage), action.micro_batch)
        return self._executor.walk(action, chunk.forward(x_TD))

    def _end_forward(self, action: Action) -> None:
        chunk = self._chunks[action.stage, action.micro_batch]
        self._tally.add(action.micro_batch, chunk)
        target = self._neighbour(action.stage, +1)
        if target is not None:
            assert chunk.output is not None
            self._give(("activation", action.stage, target), action.micro_batch, chunk.output.detach())
        if not torch.is_grad_enabled():
            del self._chunks[action.stage, action.micro_batch]

    def _start_backward(self, action: Action) -> Walk:
        chunk = self._chunks[action.stage, action.micro_batch]
        source = self._neighbour(action.stage, +1)
        dy_TD = None if source is None else self._take(("gradient", source, action.stage), action.micro_batch)
        return self._executor.walk(action, chunk.backward(dy_TD, self._executor.gradients.take))

    def _end_backward(self, action: Action) -> None:
        chunk = self._chunks.pop((action.stage, action.micro_batch))
        target = self._neighbour(action.stage, -1)
        if target is not None:
            assert chunk.input_grad is not None
            self._give(("gradient", action.stage, target), action.micro_batch, chunk.input_grad)

    def _neighbour(self, stage: int, step: int) -> int | None:
        stages = self._schedule.chain_of(stage).stages
        return stage + step if stage + step in stages else None

    def _take(self, wire: Wire, micro_batch: int) -> Tensor:
        kind, source, target = wire
        if self._executor.is_here(source):
            return self._handed.pop((kind, target, micro_batch))
        return self._inboxes[wire].receive(micro_batch)

    def _give(self, wire: Wire, micro_batch: int, tensor: Tensor) -> None:
        kind, _, target = wire
        if self._executor.is_here(target):
            self._handed[kind, target, micro_batch] = tensor
        else:
            self._executor.send(self._outbox, wire, tensor)

    def _open(self, actions: Sequence[Action], ahead: int) -> dict[Wire, Inbox]:
        """An inbox a channel, with what is going to come through it, in the order of the row."""
        expected: dict[Wire, list[Message]] = {}
        for action in actions:
            if action.op == "W":
                continue
            kind: Kind = "activation" if action.op == "F" else "gradient"
            source = self._neighbour(action.stage, -1 if action.op == "F" else +1)
            if source is not None and not self._executor.is_here(source):
                message = Message(action.micro_batch, self._shape(action.micro_batch))
                expected.setdefault((kind, source, action.stage), []).append(message)
        return {wire: self._executor.inbox(wire, messages, ahead) for wire, messages in expected.items()}

    def _shape(self, micro_batch: int) -> tuple[int, ...]:
        return (self._batches[micro_batch].tokens_BT.numel(), self._executor.dim)


def _weights(owed: WeightGrads) -> Iterator[Phase]:
    """A W as a walk of one phase, so that it runs where the rest of the backward ran."""
    yield "experts"
    owed.run()

"""Dispatch, experts and combine of a MoE block as phases: of a whole micro-batch, or of its tokens chunk by chunk.

In chunks the next chunks' rows travel beside the experts of one, and its results beside the experts of the next:

    communication   dispatch 0 | dispatch 1 | dispatch 2 | combine 0 | combine 1 | combine 2
    computation     shared     | experts 0  | experts 1  | experts 2 |

The backward is the same from the end to the start. All ranks of an exchange run its chunks in this one order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import torch

from dsv3rt.layers.fp8 import Weighed
from dsv3rt.layers.ledger import Ledger
from dsv3rt.layers.moe import Dispatched, MoE
from dsv3rt.model.block import Block, ExpertOutput, Routed
from dsv3rt.parallel.pipeline.lanes import Lanes, OfChunk, Phase
from dsv3rt.parallel.pipeline.tape import Tape
from dsv3rt.parallel.placement import chunk

Phases = Generator[Phase | OfChunk, None, torch.Tensor]


def routed_experts(block: Block, routed: Routed, ledger: Ledger, lanes: Lanes, tape: Tape | None) -> Phases:
    """The block's result. Without a tape nothing is kept for a backward."""
    assert isinstance(block.mlp, MoE)
    keeps = torch.is_grad_enabled() and tape is not None
    in_chunks = block.mlp.num_chunks > 1
    return (_chunk_by_chunk if in_chunks else _at_once)(block, routed, ledger, tape or Tape(lanes), keeps)


def _at_once(block: Block, routed: Routed, ledger: Ledger, tape: Tape, keeps: bool) -> Phases:
    # The mode is set inside each phase, as another micro-batch's phases may come in between.
    yield "dispatch"
    with torch.set_grad_enabled(keeps):
        dispatched = block.dispatch(routed)
        assert dispatched is not None
        dispatched = _cut(tape, "dispatch", dispatched)
    yield "experts"
    with torch.set_grad_enabled(keeps):
        output = block.experts(routed, dispatched, ledger)
        rows_PD, *local = tape.cut("experts", *(t for t in (output.rows_PD, output.local_TD) if t is not None))
    yield "combine"
    with torch.set_grad_enabled(keeps):
        output = ExpertOutput(rows_PD, local[0] if local else None)
        (y_TD,) = tape.cut("combine", block.combine(routed, dispatched, output))
    return y_TD


def _chunk_by_chunk(block: Block, routed: Routed, ledger: Ledger, tape: Tape, keeps: bool) -> Phases:
    """No token's result depends on how many chunks there are; weight gradients are sums over them, last chunk first."""
    moe, routing = block.mlp, routed.routing
    assert isinstance(moe, MoE)
    assert routing is not None
    count, num_tokens = moe.num_chunks, routed.h_TD.shape[0]
    tokens = [chunk(num_tokens, count, index) for index in range(count)]
    sizes = [part.stop - part.start for part in tokens]
    yield "attention"
    with torch.set_grad_enabled(keeps):
        parts = tape.cut("attention", *routed.h_TD.split(sizes), *routing.weight_TK.split(sizes))
    routings = [
        dataclasses.replace(routing, idx_TK=routing.idx_TK[part], weight_TK=weight_TK)
        for part, weight_TK in zip(tokens, parts[count:], strict=True)
    ]
    sent, rows, results = [], [], []
    for index in range(count):
        now = OfChunk("dispatch", index)
        yield now
        with torch.set_grad_enabled(keeps):
            sent.append(_cut(tape, now, moe.dispatch(parts[index], routings[index], index)))
    now = OfChunk("experts", count)  # shared ones, which wait for no chunk
    yield now
    with torch.set_grad_enabled(keeps):
        local_TD = moe.run_shared(routed.h_TD, ledger)
        if local_TD is not None:
            (local_TD,) = tape.cut(now, local_TD)
    for index in range(count):
        now = OfChunk("experts", index)
        yield now
        with torch.set_grad_enabled(keeps):
            rows += tape.cut(now, moe.run_experts(sent[index], ledger))
    for index in range(count):
        now = OfChunk("combine", index)
        yield now
        with torch.set_grad_enabled(keeps):
            results += tape.cut(now, moe.combine(rows[index], sent[index], routings[index]))
    yield "combine"
    with torch.set_grad_enabled(keeps):
        (y_TD,) = tape.cut("combine", block.add_up(routed, local_TD, torch.cat(results)))
    for part_TD in results:
        part_TD.untyped_storage().resize_(0)  # the tape refers to them, for their gradients alone
    return y_TD


def _cut(tape: Tape, now: Phase | OfChunk, dispatched: Dispatched) -> Dispatched:
    # Made on one stream, read on the other: by weight gradients that are put off, for which nobody waits.
    layout, rows_TK = dispatched.layout, dispatched.permutation.row_of_TK
    tape.lanes.share((layout.counts_X, layout.offsets, rows_TK))
    gates = dispatched.gates
    if not isinstance(gates, Weighed):
        (rows_PD,) = tape.cut(now, dispatched.rows_PD)
        return dataclasses.replace(dispatched, rows_PD=rows_PD)
    rows_PD, gate_P = tape.cut(now, dispatched.rows_PD, gates.gate_P)
    return dataclasses.replace(dispatched, rows_PD=rows_PD, gates=dataclasses.replace(gates, gate_P=gate_P))

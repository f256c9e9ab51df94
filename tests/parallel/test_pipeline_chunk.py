"""A stage that is the whole model computes what `Transformer` computes, to the bit, however its backward is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fleet import configuration
from torch import Tensor

from dsv3rt import Transformer
from dsv3rt.config import ModelConfig
from dsv3rt.layers.ledger import WeightGrads
from dsv3rt.parallel.pipeline.chunk import Chunk, MicroBatch, Rule, Stage
from dsv3rt.parallel.pipeline.lanes import Lanes, Walk, run_into_each_other

LANES = Lanes(torch.device("cpu"))
ALL = ("norm", "mla_up", "swiglu", "experts")


def model_config(**changes: Any) -> ModelConfig:
    return configuration({"model": changes}).model


def batch(seed: int) -> MicroBatch:
    tokens = torch.randint(0, 258, (2, 17), generator=torch.Generator().manual_seed(seed))
    return MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def whole_graph(model: Transformer, micro_batch: MicroBatch, rule: Rule) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients by one uncut backward."""
    model.zero_grad(set_to_none=True)
    output = model(micro_batch.tokens_BT, micro_batch.labels_BT, alpha=rule.alpha, mtp_weight=rule.mtp_weight)
    (output.loss * rule.share).backward()
    losses = torch.stack([output.main_loss, output.mtp_loss, output.balance_loss]).detach()
    return losses, gradients(model)


def gradients(model: Transformer) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def start(model: Transformer, micro_batch: MicroBatch, rule: Rule, queue: WeightGrads | None = None) -> Chunk:
    layers = range(model.config.num_layers)
    return Chunk(Stage(model, layers, is_first=True, is_last=True), micro_batch, rule, LANES, queue)


class NotedWalk(Walk):
    """Writes down each phase as it is done."""

    def __init__(self, who: str, phases: Any, order: list[str]) -> None:
        super().__init__(phases, LANES)
        self._who, self._order = who, order

    def step(self) -> bool:
        if self.upcoming is not None:
            self._order.append(f"{self._who} {self.upcoming}")
        return super().step()


def add(parameter: Any, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


@pytest.mark.parametrize("recompute", [(), ("norm",), ("mla_up",), ("swiglu",), ("experts",), ALL])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("changes", [{}, {"mtp_depth": 2}, {"q_lora_rank": None, "num_shared_experts": 0}])
def test_pieces_equal_the_whole_graph(recompute: tuple[str, ...], split: bool, changes: dict[str, Any]) -> None:
    model, rule = Transformer(model_config(**changes)), Rule(0.01, 0.3, 0.25, frozenset(recompute))
    losses, want = whole_graph(model, batch(1), rule)
    queue = WeightGrads(add) if split else None
    chunk = start(model, batch(1), rule, queue)
    Walk(chunk.forward(None), LANES).finish()
    assert torch.equal(chunk.losses, losses)
    Walk(chunk.backward(None, lambda parameter: None), LANES).finish()
    if queue is not None:
        assert model.layers[1].mlp.experts.down_proj.grad is None, "put off"
        queue.run()
    got = gradients(model)
    assert got.keys() == want.keys()
    for name, right in want.items():
        # A norm's input also goes elsewhere; recomputed, the norm sums its two parts before it adds to that: a rounding
        # (6e-8) a norm, in 9 norms one after the other, each passed on by the layers before it.
        allowed = 9 * 2**-23 * right.abs().max() if "norm" in recompute else 0.0
        assert (got[name] - right).abs().max() <= allowed, name


def test_interleaved_phases_change_nothing() -> None:
    """A forward and a backward of different micro-batches in turn, phase by phase, some of it computed again."""
    model = Transformer(model_config())
    first, second = Rule(0.01, 0.3, 0.5), Rule(0.01, 0.3, 0.5, frozenset({"experts", "mla_up"}))
    want = [whole_graph(model, batch(seed), first) for seed in (1, 2)]
    chunks = [start(model, batch(seed), rule) for seed, rule in ((1, second), (2, second))]
    Walk(chunks[0].forward(None), LANES).finish()
    backward = chunks[0].backward(None, lambda parameter: None)
    run_into_each_other(Walk(chunks[1].forward(None), LANES), Walk(backward, LANES))
    got = gradients(model)
    assert all(torch.equal(got[name], want[0][1][name]) for name in got)
    Walk(chunks[1].backward(None, lambda parameter: None), LANES).finish()
    got = gradients(model)
    assert torch.equal(chunks[1].losses, want[1][0])
    assert all(torch.equal(got[name], want[1][1][name]) for name in got)


def test_phases_meet_in_the_papers_pairs() -> None:
    """What would run side by side on a GPU: of a middle stage's block, one computes while the other communicates."""
    model = Transformer(model_config())
    order: list[str] = []
    stage = Stage(model, range(1, 2), is_first=False, is_last=False)
    one, other = (Chunk(stage, batch(seed), Rule(alpha=0.01), LANES) for seed in (1, 2))
    x_TD, dy_TD = torch.randn(32, 32), torch.randn(32, 32)
    Walk(one.forward(x_TD.clone()), LANES).finish()
    backward = NotedWalk("B", one.backward(dy_TD, lambda parameter: None), order)
    forward = NotedWalk("F", other.forward(x_TD.clone()), order)
    run_into_each_other(forward, backward)
    assert order == [
        "F attention", "B combine", "B experts", "F dispatch", "F experts", "B dispatch", "B attention", "F combine",
        "F head",
    ]  # fmt: skip


class Crossing:
    """A tensor, as far as `Lanes.share` sees one."""

    def __init__(self) -> None:
        self.streams: list[str] = []

    def record_stream(self, stream: str) -> None:
        self.streams.append(stream)


@pytest.mark.parametrize("form", [list, iter])
def test_memory_that_crosses_is_kept_for_both_streams(form: Any) -> None:
    """Of every tensor, whatever they are handed over in: one that is forgotten is used again while it is read."""
    lanes = Lanes(torch.device("cpu"))
    lanes._streams = {False: "computes", True: "communicates"}  # type: ignore[dict-item]
    tensors = [Crossing(), Crossing()]
    lanes.share(form(tensors))
    assert [tensor.streams for tensor in tensors] == [["computes", "communicates"]] * 2

"""Whole training steps in FP8: gradients beside BF16's, tensor by tensor; no wait of the host; replays from a graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv3rt import ops, presets
from dsv3rt.config import OptimConfig
from dsv3rt.layers.precision import set_precision
from dsv3rt.layers.weights import WeightCast, casts_of
from dsv3rt.model.transformer import Transformer
from dsv3rt.parallel.build import moe_layers
from dsv3rt.parallel.pipeline.chunk import MicroBatch, Rule
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.data import Samples
from dsv3rt.train.engine import Engine
from dsv3rt.train.optimizer import AdamW
from scripts.gradients import SMALL, WIDE, Shape, Table, moe_layer, whole_model
from tests.train.train_helpers import config

CONFIG = replace(presets.model("tiny"), dim=512)
LR, GAMMA = 1e-3, 1e-3
RULE = Rule(alpha=1e-4, mtp_weight=0.3, share=0.5)  # of two micro-batches


@pytest.mark.parametrize("measure", [moe_layer, whole_model])
@pytest.mark.parametrize(
    ("shape", "device"), [(SMALL, "cpu"), pytest.param(WIDE, "cuda", marks=pytest.mark.gpu)], ids=["cpu", "v3"]
)
def test_fp8_gradients_are_near_bf16(measure: Callable[[Shape, str], Table], shape: Shape, device: str) -> None:
    """Each within twice what the casts behind it make: scripts/gradients.py says how these are counted."""
    found = measure(shape, device)
    print(found)
    assert not found.outside, str(found)
    assert all(row.diff > 0 for row in found.rows), "these were no products in FP8"


def update(optimizer: AdamW, number: int) -> Tensor:
    """Clipping and update as the trainer does them; returns the norm.

    But for `AdamW.squares`, which puts the norms into a table that ranks add up, and waits: it makes the places on the
    host.
    """
    optimizer.reduce()
    shards = [one.shard for one in optimizer.gradients.sums.values() if one.shard is not None]
    assert len(shards) > 20
    norm = optimizer.norm(ops.grad_norms(shards).square())
    optimizer.step(number, LR, norm)
    return norm


class Training:
    """The tiny model with all that is trained of V3: MTP, the balance loss, router biases; weights in FP8 alone."""

    def __init__(self, batch: Tensor) -> None:
        """batch: (2, B, T) tokens and labels; others may be written into `batch`."""
        torch.manual_seed(0)
        self.batch = batch.clone()
        self.model = Transformer(CONFIG, dtype=torch.bfloat16, device=batch.device)
        set_precision(self.model, "fp8")
        self.casts = casts_of(self.model)
        self.optimizer = AdamW(self.model.named_parameters(), OptimConfig(), casts=self.casts)

    def step(self, number: int = 3) -> Tensor:
        """Loss and gradient norm."""
        tokens_BT, labels_BT = self.batch
        seen = self.model(tokens_BT, labels_BT, alpha=RULE.alpha, mtp_weight=RULE.mtp_weight)
        assert seen.loss is not None
        seen.loss.backward()
        norm = update(self.optimizer, number)
        self.model.update_router_bias(seen.expert_counts_LE, GAMMA)
        return torch.stack([seen.loss.detach(), norm])

    def state(self) -> dict[str, Tensor]:
        codes = {str(index): cast.of(*cast.weights)[0].data.float() for index, cast in enumerate(self.casts)}
        return {**self.optimizer.tensors(), **dict(self.model.named_buffers()), **codes}


def draws(count: int, device: str = "cuda") -> list[Tensor]:
    return [torch.randint(0, CONFIG.vocab_size, (2, 2, 128)).to(device) for _ in range(count)]


def addresses(casts: list[WeightCast]) -> list[int]:
    return [q.data.data_ptr() for cast in casts for q in cast.of(*cast.weights) if q is not None]


@contextmanager
def sync_mode(mode: str) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_step_of_these_tests_trains() -> None:
    """On the references: the loss falls, biases move, and every cast is written where it lies."""
    training = Training(draws(1, "cpu")[0])
    before, start = addresses(training.casts), training.step(1)
    for number in range(2, 5):
        end = training.step(number)
    assert end[0] < start[0]
    assert addresses(training.casts) == before
    assert any(bias.any() for bias in training.model.buffers())


@pytest.mark.gpu
def test_fp8_step_does_not_wait_for_the_device() -> None:
    training = Training(draws(1)[0])
    training.step(1)
    with sync_mode("error"):
        training.step(2)


@pytest.mark.gpu
def test_fp8_step_with_the_optimizer_replays_from_a_graph() -> None:
    """Forward, backward, clipping, update with casts, router biases: captured once, replayed over other tokens, the
    bits of steps without a graph. The update's number and learning rate are numbers of its launch, so a replay repeats
    them, and the steps beside it do the same here."""
    first, *others = draws(4)
    eager, graphed = Training(first), Training(first)
    pinned = addresses(graphed.casts)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        graphed.step()
    torch.cuda.current_stream().wait_stream(aside)
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = graphed.step()
    assert addresses(graphed.casts) == pinned, "a replay would read old casts"
    for draw in others:
        for training in (eager, graphed):
            training.batch.copy_(draw)
        graph.replay()
        assert torch.equal(captured, eager.step())
    got, want = graphed.state(), eager.state()
    wrong = [name for name in want if not torch.equal(got[name], want[name])]
    assert not wrong, wrong


def engine(folder: Path, device: str) -> Engine:
    """Two micro-batches a step, from text of which the next token is the last one plus 1, 2 or 3."""
    tokens = (torch.randint(1, 4, (8000,)).cumsum(0) % 64).numpy().astype("uint16")
    train = {
        "precision": "fp8", "dtype": "bfloat16", "seq_len": 128, "batch_size": 4, "micro_batch_size": 2,
        "device": device,
    }  # fmt: skip
    made = config(folder, model=asdict(CONFIG), train=train, optim={"lr": LR})
    return Engine(made, Samples(tokens, made.train.seq_len, 0))


def step_without_reading(made: Engine, batches: list[MicroBatch], number: int) -> None:
    """`Engine.step` but for what the host brings and reads: batches are there, nobody looks at losses, norm, loads."""
    tally = made._executor.train(batches, RULE)
    update(made.optimizer, number)
    for layer, moe in moe_layers(made.model).items():
        moe.gate.update_bias(tally.counts[layer], GAMMA)


@pytest.mark.gpu
def test_trainers_step_does_not_wait_for_the_device_inside(tmp_path: Path) -> None:
    made = engine(tmp_path, "cuda")
    batches = [made._micro_batch(made.samples, position, 2) for position in (0, 2)]
    step_without_reading(made, batches, 1)
    with sync_mode("error"):
        step_without_reading(made, batches, 2)


@pytest.mark.gpu
def test_trainer_waits_where_it_reads_alone(tmp_path: Path) -> None:
    """The engine reads losses, norm and loads, at once and ahead of the update. Nothing else waits."""
    made = engine(tmp_path, "cuda")
    _, state = made.step(RunState())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sync_mode("warn"):
            made.step(state)
    waits = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    places = sorted({(Path(warning.filename).name, warning.lineno) for warning in waits})
    print(f"{len(waits)} waits of the host in a step, at {places}")
    files = {name for name, _ in places}
    assert files == {"engine.py"}, places

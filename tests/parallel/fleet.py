"""Runs of a very small model under torchrun: how they are started, and what the workers do.

As a script (`torchrun fleet.py JOBS.json RESULTS.json`) it trains each job on all its processes, one job after another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dsv3rt import ops
from dsv3rt.config import ParallelConfig, TrainConfig
from dsv3rt.env import launch
from dsv3rt.errors import ExchangeError, PeerError
from dsv3rt.parallel.expert import ExpertExchange
from dsv3rt.parallel.mesh import Mesh, join, leave
from dsv3rt.parallel.pipeline.chunk import Chunk, MicroBatch, Rule
from dsv3rt.parallel.pipeline.executor import Tally
from dsv3rt.train import config_file
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.data import Samples
from dsv3rt.train.engine import Engine, device_of

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
Sections = dict[str, dict[str, Any]]

MODEL: dict[str, Any] = {
    "vocab_size": 264, "dim": 32, "num_layers": 3, "num_dense_layers": 1, "num_heads": 2, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "ffn_dim": 32, "expert_dim": 16,
    "num_experts": 4, "top_k": 2, "num_expert_groups": 2, "num_groups_kept": 2, "max_position": 64, "init_std": 0.1,
}  # fmt: skip
BASE: Sections = {
    "model": MODEL,
    "parallel": {"bucket_mb": 0.02},  # several buckets
    "train": {
        "seq_len": 32, "batch_size": 8, "micro_batch_size": 1, "balance_alpha": 0.01, "device": "cpu",
        "dtype": "float32", "bf16_modules": [],
    },
    "optim": {"lr": 1e-2, "moment_dtype": "float32"},
}  # fmt: skip


def configuration(job: Sections) -> TrainConfig:
    return config_file.from_dict({name: {**BASE.get(name, {}), **job.get(name, {})} for name in {*BASE, *job}})


@contextmanager
def recorded_choices() -> Iterator[list[tuple[int, int, torch.Tensor]]]:
    """What this rank's forwards chose: micro-batch of the rank, layer, tokens per expert."""
    seen: list[tuple[int, int, torch.Tensor]] = []
    add = Tally.add

    def noting(self: Tally, micro_batch: int, chunk: Chunk) -> None:
        seen.extend((micro_batch, layer, counts_E) for layer, counts_E in chunk.counts.items())
        add(self, micro_batch, chunk)

    Tally.add = noting  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Tally.add = add  # type: ignore[method-assign]


def _together(seen: list[tuple[int, int, torch.Tensor]], engine: Engine) -> list[Any]:
    """Tokens per expert by micro-batch of the whole batch and layer, from all ranks."""
    config, mesh = engine.config, engine.mesh
    batch = int(config.train.batch_size[0].value) // config.train.micro_batch_size
    layers = config.model.num_layers + config.model.mtp_depth
    counts = torch.zeros(batch, layers, config.model.num_experts, dtype=torch.int64, device=engine.device)
    first = mesh.dp_rank * (batch // config.parallel.dp)
    for micro_batch, layer, counts_E in seen:
        counts[first + micro_batch, layer] = counts_E
    if mesh.size > 1:
        dist.all_reduce(counts)
    return counts.tolist()


def train(job: Sections, steps: int = STEPS, prepare: Callable[[Engine], None] | None = None) -> dict[str, Any]:
    """steps: loss, MTP loss, balance loss, gradient norm and expert load of each; val_loss after them; early: how many
    buckets of gradients set out while the last backward was still running; choices: of each step, tokens per expert by
    micro-batch and layer; norms: of the first step's gradients, by parameter. prepare: is given the engine before the
    first step."""
    config = configuration(job)
    stream = np.random.RandomState(3).randint(0, 258, 9000).astype("uint16")
    samples = Samples(stream, config.train.seq_len, config.train.seed)
    alone = config.parallel.num_processes == 1
    mesh = Mesh(config.parallel) if alone else join(config.parallel, launch(), device_of(config.train))
    engine = Engine(config, samples, mesh)
    gradients = engine.optimizer.gradients
    reduce, early = gradients.reduce, []

    def counting(idle: frozenset[str] = frozenset()) -> None:
        early.append(sum(bucket.started for queue in gradients._queues.values() for bucket in queue))
        reduce(idle)

    gradients.reduce = counting  # type: ignore[method-assign]
    norm, norms = engine.optimizer.norm, []

    def noting(squares: torch.Tensor) -> torch.Tensor:
        norms.append(squares.sqrt().tolist())
        return norm(squares)

    engine.optimizer.norm = noting  # type: ignore[method-assign]
    state, seen, choices = RunState(), [], []
    if prepare is not None:
        prepare(engine)
    for _ in range(steps):
        with recorded_choices() as chosen:
            result, state = engine.step(state)
        choices.append(_together(chosen, engine))
        load = result.max_expert_load
        seen.append([result.loss, result.mtp_loss, result.balance_loss, result.grad_norm, load])
    val_loss = engine.evaluate(samples, 7)
    by_name = dict(zip(engine._shapes, norms[0], strict=True))
    return {"steps": seen, "val_loss": val_loss, "early": early[-1], "choices": choices, "norms": by_name}


def other_lengths(parallel: ParallelConfig) -> list[list[float]]:
    """Losses of micro-batches that all have another length: messages of another shape each."""
    job = configuration({})
    config = replace(job, parallel=parallel)
    stream = np.random.RandomState(4).randint(0, 258, 3000).astype("uint16")
    alone = parallel.num_processes == 1
    mesh = Mesh(parallel) if alone else join(parallel, launch(), torch.device("cpu"))
    engine = Engine(config, Samples(stream, 32, 0), mesh)
    tokens = torch.from_numpy(stream.astype("int64"))
    lengths = [7, 32, 1, 19, 28, 5, 11, 30]
    starts = [100 * index for index in range(len(lengths))]
    batches = [
        MicroBatch(tokens[None, start : start + length], tokens[None, start + 1 : start + length + 1])
        for start, length in zip(starts, lengths, strict=True)
    ]
    losses_M3 = engine._executor.train(batches, Rule(0.01, 0.3)).losses_M3
    if not alone:
        dist.all_reduce(losses_M3)
    return losses_M3.tolist()


def exchange(block: int) -> list[dict[str, bool]]:
    """Of each rank: what it finds equal to one process's `ops.permute` and `ops.unpermute` of all ranks' tokens."""
    rank, size, experts = dist.get_rank(), dist.get_world_size(), 8
    random = torch.Generator().manual_seed(5)
    x_RTD, logits_RTE = (torch.randn(size, 6, n, generator=random) for n in (8, experts))
    routings = [ops.route(logits_TE, torch.zeros(experts), top_k=2) for logits_TE in logits_RTE]
    whole = ops.Routing(*(torch.cat([getattr(r, f.name) for r in routings]) for f in fields(ops.Routing)))
    rows_PD, layout, permutation = ops.permute(x_RTD.flatten(0, 1), whole, num_experts=experts, block=block)
    result_TD = ops.unpermute(rows_PD.square(), permutation, whole.weight_TK)

    x_TD = x_RTD[rank].clone().requires_grad_()
    carrier = ExpertExchange(dist.group.WORLD, size)
    sent = carrier.dispatch(x_TD, routings[rank], num_experts=experts, block=block)
    y_TD = carrier.combine(sent.rows_PD.square(), sent, routings[rank].weight_TK)
    y_TD.sum().backward()
    gate_T1 = routings[rank].weight_TK.sum(dim=1, keepdim=True)
    mine = slice(rank * experts // size, (rank + 1) * experts // size)
    first, last = layout.offsets[mine.start], layout.offsets[mine.stop]
    found = {
        "rows": torch.equal(sent.rows_PD, rows_PD[first:last]),
        "counts": torch.equal(sent.layout.counts_X, layout.counts_X[mine]),
        "offsets": torch.equal(sent.layout.offsets, layout.offsets[mine.start : mine.stop + 1] - first),
        "result": torch.equal(y_TD, result_TD.view(size, 6, 8)[rank]),
        "gradient": torch.allclose(x_TD.grad, 2 * x_RTD[rank] * gate_T1, rtol=1e-6),
    }
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, found)
    return everyone


def overflow() -> list[str]:
    """What each rank hears when all tokens want the first expert, and there is room for twice an even load."""
    size, experts = dist.get_world_size(), 8
    logits_TE = torch.zeros(64, experts)
    logits_TE[:, 0] = 1.0
    routing = ops.route(logits_TE, torch.zeros(experts), top_k=1)
    try:
        exchange = ExpertExchange(dist.group.WORLD, size, capacity=2.0)
        exchange.dispatch(torch.zeros(64, 8), routing, num_experts=experts, block=1)
        heard = "nothing"
    except ExchangeError as error:
        heard = str(error)
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, heard)
    return everyone


def failure() -> list[str]:
    """What each rank hears when rank 2 fails in what all do together, and whether they can go on after it."""

    def work() -> int:
        if dist.get_rank() == 2:
            raise ValueError("something of rank 2")
        return 7

    ranks = Mesh(ParallelConfig(dp=dist.get_world_size()), dist.get_rank()).ranks("test")
    try:
        ranks.together(work, everywhere=True)
        heard = "nothing"
    except (ValueError, PeerError) as error:
        heard = f"{type(error).__name__}: {error}"
    everyone: list[Any] = [None] * ranks.size
    dist.all_gather_object(everyone, (heard, ranks.together(lambda: "of rank 0"), ranks.highest(dist.get_rank(), 1)))
    return everyone


def torchrun(processes: int, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start processes of one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *(*options, *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def output_of(processes: subprocess.Popen[str], timeout: float) -> str:
    """What `torchrun` printed until its end, which must be a good one."""
    try:
        output, _ = processes.communicate(timeout=timeout)
    finally:
        processes.kill()
    assert processes.returncode == 0, output
    return output


def main() -> None:
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    results = {name: train(job) for name, job in jobs.items()}
    results |= {
        "exchange": {str(block): exchange(block) for block in (1, 4)},
        "failure": failure(),
        "overflow": overflow(),
    }
    results["lengths"] = other_lengths(ParallelConfig(pp=4, schedule="dualpipev"))
    if launch().rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()

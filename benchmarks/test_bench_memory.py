"""What each saving of the recipe brings: peak memory of a training step with it and without it, all else the same; and
what the average of the weights takes of a step's time.

The step is the trainer's own: two micro-batches of 4096 tokens through two MoE layers at V3's widths, ZeRO, AdamW.
"""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.conftest import record
from benchmarks.slice_models import Slice
from dsv3rt.config import OptimConfig, RunConfig, Segment, TrainConfig
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.data import Samples
from dsv3rt.train.engine import Engine

SHAPE = Slice()
RECIPE = TrainConfig(
    model=SHAPE.config,
    train=RunConfig(
        seq_len=SHAPE.tokens,
        batch_size=(Segment(value=2),),
        device="cuda",
        dtype="bfloat16",
        precision="fp8",
        bf16_modules=(),
        recompute=("norm", "mla_up"),
    ),
    optim=OptimConfig(moment_dtype="bfloat16", ema_decay=0.999),
)


def changed(section: str, **values: Any) -> TrainConfig:
    return replace(RECIPE, **{section: replace(getattr(RECIPE, section), **values)})


KINDS = ("weights", "masters", "moments", "gradients", "rest")

# Each saving: a step with it, and without it.
SAVINGS = {
    "products in FP8": (RECIPE, changed("train", precision="bf16")),
    "moments in BF16": (RECIPE, changed("optim", moment_dtype="float32")),
    "norms computed again": (RECIPE, changed("train", recompute=("mla_up",))),
    "up-projections of MLA computed again": (RECIPE, changed("train", recompute=("norm",))),
    "average in host memory against none": (RECIPE, changed("optim", ema_decay=0.0)),
    "weights in one orientation": (changed("train", weight_orientations=1), RECIPE),
}


def begin(config: TrainConfig) -> tuple[Engine, RunState]:
    """After two steps."""
    stream = np.random.RandomState(0).randint(0, config.model.vocab_size, 50 * config.train.seq_len)
    engine = Engine(config, Samples(stream, config.train.seq_len, 0))
    state = RunState()
    for _ in range(2):
        _, state = engine.step(state)
    return engine, state


@cache
def measure(config: TrainConfig) -> dict[str, float]:
    """Megabytes by kind, the peak, and seconds of a step; `rest` is what a peak has beside the kinds: activations."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    engine, state = begin(config)
    torch.cuda.reset_peak_memory_stats()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    engine.step(state)
    end.record()
    torch.cuda.synchronize()
    engine.tensors()  # waits for the average, which holds the masters as long as it runs
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    kept = {name: tensor for name, tensor in engine.optimizer.tensors().items() if tensor.is_cuda}
    moments = sum(tensor.nbytes for name, tensor in kept.items() if name.startswith("exp_avg"))
    masters = sum(tensor.nbytes for name, tensor in kept.items() if not name.startswith("exp_avg"))
    gradients = sum(4 * parameter.numel() for parameter in engine.model.parameters())
    found = {
        "weights": held - masters - moments, "masters": masters, "moments": moments, "gradients": gradients,
        "rest": peak - held - gradients, "peak": peak,
    }  # fmt: skip
    return {**{name: size / 1e6 for name, size in found.items()}, "seconds": start.elapsed_time(end) * 1e-3}


@pytest.mark.parametrize("saving", SAVINGS)
def test_bench_step_memory(request: pytest.FixtureRequest, benchmark: Any, saving: str) -> None:
    ours, without = (measure(config) for config in SAVINGS[saving])
    line = {
        "op": f"step memory, {saving}", "shape": f"{SHAPE}_2micro_batches", "metric": "mb",
        "value": round(ours["peak"], 1), "peer": "without_it", "peer_value": round(without["peak"], 1),
        "ratio": round(without["peak"] / ours["peak"], 4),
    }  # fmt: skip
    for prefix, found in (("", ours), ("peer_", without)):
        line |= {
            f"{prefix}{name}_mb": round(size, 1) for name, size in found.items() if name not in ("peak", "seconds")
        }
        line[f"{prefix}us"] = round(found["seconds"] * 1e6)
    record(request, benchmark, [ours["seconds"]], line)


@cache
def seconds_of_a_step(config: TrainConfig, steps: int) -> float:
    """The mean of steps in a row, by the host's clock."""
    gc.collect()
    torch.cuda.empty_cache()
    engine, state = begin(config)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        _, state = engine.step(state)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


@pytest.mark.parametrize("every", [1, 10, 50])
def test_bench_step_beside_average(request: pytest.FixtureRequest, benchmark: Any, every: int) -> None:
    ours = seconds_of_a_step(changed("optim", ema_every=every), max(20, 2 * every))
    without = seconds_of_a_step(changed("optim", ema_decay=0.0), 100)
    line = {
        "op": f"step beside the average, of every {every}", "shape": f"{SHAPE}_2micro_batches", "metric": "us",
        "value": round(ours * 1e6, 1), "peer": "without_it", "peer_value": round(without * 1e6, 1),
        "ratio": round(without / ours, 4),
    }  # fmt: skip
    record(request, benchmark, [ours], line)

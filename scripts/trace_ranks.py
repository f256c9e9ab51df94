"""Write a Chrome trace of one training step of every rank: which phases of which micro-batches run beside each other.

    torchrun --nproc-per-node 4 scripts/trace_ranks.py CONFIG.toml traces [--full] [--section.key value ...]
    python tests/gpu/run_ranks.py --ranks 8 --gpus 1 scripts/trace_ranks.py CONFIG.toml traces \
        --parallel.expert_sms 4 ...

Trains on random tokens, three steps, whose losses it prints, and traces the third: traces/rank-N.json.gz, for Perfetto,
chrome://tracing or scripts/trace_picture.py. A phase is named by its action in the table and itself, "3B2 dispatch":
backward of micro-batch 2 in stage 3. Only phases, kernels and their launches are written, or with --full
(rank-N.json) all that the profiler has.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from dsv3rt.env import launch
from dsv3rt.parallel.mesh import Mesh, join, leave
from dsv3rt.parallel.pipeline import trace
from dsv3rt.train import config_file
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.data import Samples
from dsv3rt.train.engine import Engine, StepResult, device_of


def main() -> None:
    path, folder, *rest = (argument for argument in sys.argv[1:] if argument != "--full")
    keys = [key.removeprefix("--") for key in rest[::2]]
    config = config_file.load(path, list(zip(keys, rest[1::2], strict=True)))
    device = device_of(config.train)
    mesh = join(config.parallel, launch(), device)
    stream = np.random.RandomState(0).randint(0, config.model.vocab_size, 100 * config.train.seq_len)
    engine = Engine(config, Samples(stream, config.train.seq_len, 0), mesh)
    state = RunState()
    for _ in range(2):
        result, state = engine.step(state)
        tell(mesh, state, result)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as traced:
        result, state = engine.step(state)
        if device.type == "cuda":
            torch.cuda.synchronize()
    tell(mesh, state, result)
    Path(folder).mkdir(parents=True, exist_ok=True)
    if "--full" in sys.argv:
        traced.export_chrome_trace(str(Path(folder) / f"rank-{mesh.rank}.json"))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            whole = Path(scratch) / "trace.json"
            traced.export_chrome_trace(str(whole))
            trace.save(trace.slim(trace.load(whole)), Path(folder) / f"rank-{mesh.rank}.json.gz")
    leave()


def tell(mesh: Mesh, state: RunState, result: StepResult) -> None:
    """What other layouts' steps can be held against."""
    if mesh.rank == 0:
        print(
            f"step {state.step}: loss {result.loss:.7f}, MTP loss {result.mtp_loss:.7f}, "
            f"gradient norm {result.grad_norm:.6f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

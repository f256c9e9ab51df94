"""Tokens a second of the trainer on several GPUs beside one GPU's: layers at V3's widths, FP8, whole steps.

    python tests/gpu/run_ranks.py --ranks 1 benchmarks/trainer_ranks.py --out one.json
    python tests/gpu/run_ranks.py --ranks 2 benchmarks/trainer_ranks.py --one one.json --out two.json

Weak scaling: each rank has as many sequences a step as the single one, and the peer is that one's rate times the ranks.
Losses of the first step differ, as batches do.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import provenance
from benchmarks.slice_models import Slice
from dsv3rt.config import TrainConfig
from dsv3rt.env import launch
from dsv3rt.parallel.mesh import join, leave
from dsv3rt.train import config_file
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.data import Samples
from dsv3rt.train.engine import Engine, device_of

WARM_UP = 2
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one GPU": {}},
    2: {"dp2-ep2": {"dp": 2, "ep": 2}, "pp2-dualpipev": {"pp": 2, "schedule": "dualpipev"}},
    4: {
        "dp4-ep4": {"dp": 4, "ep": 4},
        "pp2-dp2-ep2-dualpipev": {"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipev"},
    },
    8: {
        "dp8-ep8": {"dp": 8, "ep": 8},
        "pp2-dp4-ep4-dualpipev": {"pp": 2, "dp": 4, "ep": 4, "schedule": "dualpipev"},
    },
}


def configuration(args: argparse.Namespace, ranks: int, parallel: dict[str, Any]) -> TrainConfig:
    model = replace(Slice(layers=args.layers, tokens=args.tokens, experts=args.experts).config, **dict(args.model))
    train = {"device": "cuda", "dtype": "bfloat16", "precision": "fp8", "bf16_modules": [], "seq_len": args.tokens,
             "micro_batch_size": 1, "batch_size": args.sequences * ranks}  # fmt: skip
    parallel = {**parallel, "product_sms": args.product_sms}
    return config_file.from_dict({"model": asdict(model), "train": train, "parallel": parallel})


def seconds_of_steps(config: TrainConfig, steps: int) -> tuple[list[float], float]:
    """This rank's times of each step, in which all wait for each other, and the most memory that it held."""
    mesh = join(config.parallel, launch(), device_of(config.train))
    stream = np.random.RandomState(0).randint(0, config.model.vocab_size, 100 * config.train.seq_len)
    engine = Engine(config, Samples(stream, config.train.seq_len, 0), mesh)
    torch.cuda.reset_peak_memory_stats()
    state, found = RunState(), []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        result, state = engine.step(state)
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
        if mesh.rank == 0:
            print(f"  step {state.step}: {found[-1] * 1e3:.1f} ms, loss {result.loss:.5f}", flush=True)
    return found[WARM_UP:], torch.cuda.max_memory_allocated() / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "layers": 4,
        "tokens": 4096,
        "experts": 16,
        "sequences": 8,
        "steps": 5,
        "product-sms": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--model", action="append", default=[], type=lambda text: _number(*text.split("=", 1)),
                        metavar="KEY=NUMBER", help="of [model], for a smaller one")  # fmt: skip
    parser.add_argument("--one", type=Path, help="what one GPU wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit")
    args = parser.parse_args()
    me = launch()
    ranks = me.num_processes
    if ranks not in LAYOUTS:
        raise SystemExit(f"trainer_ranks: ranks must be one of {sorted(LAYOUTS)}, got {ranks}")
    rate_of_one = json.loads(args.one.read_text())["benchmarks"][0]["extra_info"]["value"] if args.one else None
    lines = []
    for name, parallel in LAYOUTS[ranks].items():
        config = configuration(args, ranks, parallel)
        seconds, gigabytes = seconds_of_steps(config, args.steps)
        tokens = args.tokens * args.sequences * ranks
        linear = ranks * rate_of_one if rate_of_one else tokens / median(seconds)
        shape = f"{args.layers}layers_{args.experts}experts_{args.sequences}x{args.tokens}tokens a rank"
        shape += f", products on {args.product_sms} SMs" * (args.product_sms > 0)
        line = {"op": f"trainer step, {name}", "shape": shape, "metric": "tokens/s",
                "value": round(tokens / median(seconds), 1), "peer": "one_gpu_times_ranks",
                "peer_value": round(linear, 1), "ratio": round(tokens / median(seconds) / linear, 4),
                "memory_gb": round(gigabytes, 2)}  # fmt: skip
        if me.rank == 0:
            print(json.dumps(line), flush=True)
        lines.append((line, median(seconds)))
        gc.collect()
        torch.cuda.empty_cache()
    if me.rank == 0:
        command = f"run_ranks.py --ranks {ranks} benchmarks/trainer_ranks.py " + " ".join(sys.argv[1:])
        commit = args.commit or provenance.commit()
        provenance.write_lines(args.out, "trainer_ranks.py", command, commit, lines, args.steps)
    leave()


def _number(key: str, value: str) -> tuple[str, int]:
    return key, int(value)


if __name__ == "__main__":
    main()

"""Several ranks train in FP8 with the kernels' exchange of experts as one process does.

    python tests/gpu/run_ranks.py --ranks 8 --gpus 1 --nccl path/to/libnccl.so.2 tests/gpu/check_fp8_trainer.py

A rank alone multiplies by the gates before the experts' last product, ranks that exchange rows after it: E4M3 rounds
other numbers, which moves a step no farther than FP8 moves it from BF16, a hundredth at most
(tests/train/test_fp8_training.py). The first step's gradients are compared parameter by parameter: of the mean of as many
roundings as a matrix has numbers little is left, but a vector or a router's row has few: they may differ by a tenth.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, replace
from typing import Any

from dsv3rt import presets
from dsv3rt.env import launch
from dsv3rt.parallel.mesh import leave
from tests.gpu.check_trainer import LAYOUTS
from tests.parallel.fleet import Sections, train

NEAR, NORMS_NEAR = 1e-2, 1e-1
MODEL = asdict(replace(presets.model("tiny"), num_layers=8, dim=256))


def job(parallel: dict[str, Any]) -> Sections:
    run = {"device": "cuda", "batch_size": 16, "seq_len": 128, "precision": "fp8", "dtype": "bfloat16"}
    return {"model": MODEL, "train": run, "parallel": {"bucket_mb": 1, "expert_sms": 2, **parallel}}


def farthest(ours: dict[str, float], theirs: dict[str, float], count: int) -> list[tuple[float, str]]:
    """The parameters whose gradients' norms differ most, relative."""
    apart = [(abs(ours[name] - norm) / max(norm, 1e-30), name) for name, norm in theirs.items()]
    return sorted(apart, reverse=True)[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", help="a layout's name: no other")
    args = parser.parse_args()
    me, start, failed = launch(), time.monotonic(), []

    def say(told: str) -> None:
        if me.rank == 0:
            print(f"{time.monotonic() - start:7.2f} s  {told}", flush=True)

    want = train(job({}), args.steps)
    say(f"one process: losses {[round(step[0], 6) for step in want['steps']]}, norm {want['steps'][0][3]:.5f}")
    for name, parallel in LAYOUTS[me.num_processes].items():
        if args.only not in (None, name):
            continue
        got = train(job(parallel), args.steps)
        pairs = zip(got["steps"], want["steps"], strict=True)
        apart = max(abs(a / b - 1) for x, y in pairs for a, b in zip(x[:2], y[:2], strict=True))
        norm = abs(got["steps"][0][3] / want["steps"][0][3] - 1)
        worst = farthest(got["norms"], want["norms"], 3)
        if not (apart <= NEAR and norm <= NEAR and worst[0][0] <= NORMS_NEAR):
            failed.append(name)
        farther = ", ".join(f"{which} {by:.1e}" for by, which in worst)
        say(f"{name}: losses {apart:.1e}, first gradient norm {norm:.1e}; of parameters {farther}")
    leave()
    if me.rank == 0:
        print(f"FP8 trainer: {'failed: ' + ', '.join(failed) if failed else 'passed'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

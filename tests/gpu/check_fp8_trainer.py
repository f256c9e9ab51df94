"""Several ranks train in FP8 with the kernels' exchange of experts as one process does.

    python tests/gpu/run_ranks.py --ranks 8 --gpus 1 --nccl path/to/libnccl.so.2 tests/gpu/check_fp8_trainer.py

Experts get the gates along with their rows, so a forward multiplies and rounds what one process does, row by row:
first losses differ by the order of some ten FP32 additions of equal sign, 2^-24 each. Weight gradients of experts are
of rows cast in columns of 128, and ranks put rows of several micro-batches into one column, so E4M3 rounds other
numbers: by 2^-4 / sqrt(3) of their size in the mean, for both factors 0.05. Noise of that size in one gradient and
none in the other would move its norm by 0.05^2 / 2 = 1.3e-3; three times that is asked. Later losses may differ three
times as far as those of one process whose weights were moved in their last bits: any difference grows with the steps.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import asdict, replace
from typing import Any

from dsv3rt import presets
from dsv3rt.env import launch
from dsv3rt.parallel.mesh import leave
from tests.gpu.check_trainer import LAYOUTS, change_last_bits
from tests.parallel.fleet import Sections, train

LOSS_NEAR, NORMS_NEAR = 1e-6, 4e-3
MODEL = asdict(replace(presets.model("tiny"), num_layers=8, dim=256))


def job(parallel: dict[str, Any]) -> Sections:
    run = {"device": "cuda", "batch_size": 16, "seq_len": 128, "precision": "fp8", "dtype": "bfloat16"}
    return {"model": MODEL, "train": run, "parallel": {"bucket_mb": 1, "expert_sms": 2, **parallel}}


def apart(ours: list[list[float]], theirs: list[list[float]]) -> list[float]:
    """Of each step, relative, over loss and MTP loss."""
    steps = zip(ours, theirs, strict=True)
    return [max(abs(a / b - 1) for a, b in zip(x[:2], y[:2], strict=True)) for x, y in steps]


def farthest(ours: dict[str, float], theirs: dict[str, float], count: int) -> list[tuple[float, str]]:
    """The parameters whose gradients' norms differ most, relative; one that is not finite first."""
    found = [(abs(ours[name] - norm) / max(norm, 1e-30), name) for name, norm in theirs.items()]
    return sorted(((by if math.isfinite(by) else math.inf, name) for by, name in found), reverse=True)[:count]


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
    drift = max(apart(train(job({}), args.steps, change_last_bits)["steps"], want["steps"]))
    say(f"one process, last bits changed: losses {drift:.1e}")
    say(f"one process: losses {[round(step[0], 6) for step in want['steps']]}, norm {want['steps'][0][3]:.5f}")
    for name, parallel in LAYOUTS[me.num_processes].items():
        if args.only not in (None, name):
            continue
        got = train(job(parallel), args.steps)
        first, *later = apart(got["steps"], want["steps"])
        norm = abs(got["steps"][0][3] / want["steps"][0][3] - 1)
        worst = farthest(got["norms"], want["norms"], 3)
        if not (first <= LOSS_NEAR and max(norm, worst[0][0]) <= NORMS_NEAR and max(later) <= 3 * drift):
            failed.append(name)
        farther = ", ".join(f"{which} {by:.1e}" for by, which in worst)
        say(f"{name}: losses first {first:.1e}, later {max(later):.1e}; gradient norm {norm:.1e}, farthest {farther}")
    leave()
    if me.rank == 0:
        print(f"FP8 trainer: {'failed: ' + ', '.join(failed) if failed else 'passed'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

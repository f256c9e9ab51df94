"""Several ranks train as one process does: schedules and layouts with NCCL and phases on two streams.

    python tests/gpu/run_ranks.py --ranks 2 tests/gpu/check_trainer.py            # or 4, or 8; one GPU is enough:
    python tests/gpu/run_ranks.py --ranks 8 --gpus 1 --nccl path/to/libnccl.so.2 tests/gpu/check_trainer.py

FP32 without TF32, so that only the order of sums differs: losses, MTP losses and balance losses within 1e-6, as on
CPUs. The first line says how far one process is from itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from dsv3rt.env import launch
from dsv3rt.parallel.mesh import leave
from tests.parallel.fleet import Sections, train

SAME = 1e-6
# By the number of ranks. The DualPipes need two micro-batches a pipeline rank.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dp2-ep2": {"dp": 2, "ep": 2},
        **{f"pp2-{name}": {"pp": 2, "schedule": name} for name in ("1f1b", "zb1p", "dualpipev", "dualpipe")},
    },
    4: {
        "dp4-ep2": {"dp": 4, "ep": 2},
        "pp4-zb1p": {"pp": 4, "schedule": "zb1p"},
        "pp2-dp2-ep2-dualpipev": {"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipev"},
        "pp2-dp2-ep2-dualpipe": {"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipe"},
    },
    8: {
        "dp8-ep4": {"dp": 8, "ep": 4},
        "pp4-dp2-ep2-dualpipev": {"pp": 4, "dp": 2, "ep": 2, "schedule": "dualpipev"},
        "pp4-dp2-ep2-dualpipe": {"pp": 4, "dp": 2, "ep": 2, "schedule": "dualpipe"},
    },
}


def job(device: str, parallel: dict[str, Any]) -> Sections:
    return {"train": {"device": device, "batch_size": 16}, "parallel": {"bucket_mb": 0.02, **parallel}}


def largest_differences(ours: list[list[float]], theirs: list[list[float]]) -> list[float]:
    """Of each step, relative, over loss, MTP loss and balance loss."""
    steps = zip(ours, theirs, strict=True)
    return [max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(x[:3], y[:3], strict=True)) for x, y in steps]


def differences(ours: list[list[float]], theirs: list[list[float]]) -> str:
    by_step = largest_differences(ours, theirs)
    return f"{max(by_step):.1e} (" + " ".join(f"{step:.0e}" for step in by_step[:6]) + " ...)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    me, start, failed = launch(), time.monotonic(), []
    if me.num_processes not in LAYOUTS:
        raise SystemExit(f"check_trainer: ranks must be one of {sorted(LAYOUTS)}, got {me.num_processes}")
    want, again = (train(job(args.device, {}), args.steps)["steps"] for _ in range(2))
    if me.rank == 0:
        print(f"{time.monotonic() - start:7.2f} s  one process twice: {differences(again, want)}", flush=True)
    for name, parallel in LAYOUTS[me.num_processes].items():
        got = train(job(args.device, parallel), args.steps)["steps"]
        if not max(largest_differences(got, want)) <= SAME:
            failed.append(name)
        if me.rank == 0:
            print(f"{time.monotonic() - start:7.2f} s  {name}: {differences(got, want)}, {args.steps} steps, "
                  f"last loss {got[-1][0]:.6f}", flush=True)  # fmt: skip
    leave()
    if me.rank == 0:
        print(f"trainer: {'failed: ' + ', '.join(failed) if failed else 'passed'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

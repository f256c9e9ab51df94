"""Several ranks train as one process does: schedules and layouts with NCCL and phases on two streams.

    python tests/gpu/run_ranks.py --ranks 2 tests/gpu/check_trainer.py            # or 4, or 8; one GPU is enough:
    python tests/gpu/run_ranks.py --ranks 8 --gpus 1 --nccl path/to/libnccl.so.2 tests/gpu/check_trainer.py

FP32 without TF32, so that only the order of sums differs: losses, MTP losses and balance losses within 1e-6, as on
CPUs. The lines before the layouts say how far one process is from itself: repeated; with two sequences a forward, so
that products have other shapes and sums another order; with its weights changed by one unit in the last place. What
none of them shows, and a layout does, is that layout's own. Each line gives the difference by step, that of the first
gradient norm, and how many choices of experts differ in which steps: one changes a loss by far more than rounding does.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from dsv3rt.env import launch
from dsv3rt.layers.weights import is_released
from dsv3rt.parallel.mesh import leave
from dsv3rt.train.engine import Engine
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
        "dp8-ep4-chunks2": {"dp": 8, "ep": 4, "expert_chunks": 2},
        "pp4-dp2-ep2-dualpipev": {"pp": 4, "dp": 2, "ep": 2, "schedule": "dualpipev"},
        "pp4-dp2-ep2-dualpipe": {"pp": 4, "dp": 2, "ep": 2, "schedule": "dualpipe"},
        "pp4-dp2-ep2-dualpipe-chunks3": {"pp": 4, "dp": 2, "ep": 2, "schedule": "dualpipe", "expert_chunks": 3},
    },
}


def job(device: str, parallel: dict[str, Any]) -> Sections:
    return {"train": {"device": device, "batch_size": 16}, "parallel": {"bucket_mb": 0.02, **parallel}}


def largest_differences(ours: list[list[float]], theirs: list[list[float]]) -> list[float]:
    """Of each step, relative, over loss, MTP loss and balance loss."""
    steps = zip(ours, theirs, strict=True)
    return [max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(x[:3], y[:3], strict=True)) for x, y in steps]


def moved_choices(ours: list[Any], theirs: list[Any]) -> list[int]:
    """Of each step: choices of experts that differ, at least, as counts of the same sequences tell."""
    found = []
    for a, b in zip(ours, theirs, strict=True):
        x, y = torch.tensor(a), torch.tensor(b)
        together = max(1, y.shape[0] // x.shape[0])  # x has more sequences in a forward
        found.append(int((x - y.unflatten(0, (-1, together)).sum(1)).abs().sum()) // 2)
    return found


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    by_step = largest_differences(ours["steps"], theirs["steps"])
    moved = moved_choices(ours["choices"], theirs["choices"])
    total = int(torch.tensor(ours["choices"][0]).sum())
    norms = ours["steps"][0][3], theirs["steps"][0][3]
    where = ", ".join(f"step {step}: {count}" for step, count in enumerate(moved, start=1) if count) or "none"
    return (
        f"largest {max(by_step):.1e}; by step " + " ".join(f"{step:.0e}" for step in by_step)
        + f"; first gradient norm {abs(norms[0] / norms[1] - 1):.0e}; choices moved, of {total} a step: {where}"
    )  # fmt: skip


@torch.no_grad()
def change_last_bits(engine: Engine) -> None:
    """Every weight up or down by one unit in the last place, at random; those kept in FP8 alone stay as they are."""
    random = torch.Generator().manual_seed(11)
    for parameter in engine.model.parameters():
        if is_released(parameter):
            continue
        up = torch.randint(0, 2, parameter.shape, generator=random).to(parameter.device) > 0
        ends = torch.where(up, torch.full_like(parameter, torch.inf), torch.full_like(parameter, -torch.inf))
        parameter.copy_(torch.nextafter(parameter, ends))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", help="a layout's name: no other")
    args = parser.parse_args()
    me, start, failed = launch(), time.monotonic(), []
    if me.num_processes not in LAYOUTS:
        raise SystemExit(f"check_trainer: ranks must be one of {sorted(LAYOUTS)}, got {me.num_processes}")

    def say(name: str, told: str) -> None:
        if me.rank == 0:
            print(f"{time.monotonic() - start:7.2f} s  {name}: {told}", flush=True)

    if args.device == "cuda":
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()
        say("TF32 in products", f"{tf32[0]} ({tf32[1]})")
    one = job(args.device, {})
    want = train(one, args.steps)
    if me.rank == 0:  # the others wait for it in the first layout
        say("one process twice", differences(train(one, args.steps), want))
        two = {**one, "train": {**one["train"], "micro_batch_size": 2}}
        say("one process, two sequences a forward", differences(train(two, args.steps), want))
        say("one process, last bits changed", differences(train(one, args.steps, change_last_bits), want))
    for name, parallel in LAYOUTS[me.num_processes].items():
        if args.only not in (None, name):
            continue
        got = train(job(args.device, parallel), args.steps)
        if not max(largest_differences(got["steps"], want["steps"])) <= SAME:
            failed.append(name)
        say(name, f"{differences(got, want)}; last loss {got['steps'][-1][0]:.6f}")
    leave()
    if me.rank == 0:
        print(f"trainer: {'failed: ' + ', '.join(failed) if failed else 'passed'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""`torchrun fp8_worker.py RESULTS.json`: trains in FP8 over BF16 parameters, with copies of the weights and without."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from fleet import MODEL, Sections, train
from torch import nn

from dsv3rt.env import launch
from dsv3rt.layers.weights import casts_of, is_released
from dsv3rt.parallel.mesh import leave
from dsv3rt.train import engine as engine_module
from dsv3rt.train.optimizer import AdamW

WIDE: dict[str, Any] = {
    **MODEL, "dim": 64, "ffn_dim": 128, "expert_dim": 128, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
STEPS = 4
# Buckets of 0.05 MB part gate from up, and the projections into latents from each other.
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2, "bucket_mb": 0.05},
    "dp2-one-bucket": {"dp": 2},
    "dp2-ep2": {"dp": 2, "ep": 2, "bucket_mb": 0.05},
    "pp2-dualpipe": {"pp": 2, "schedule": "dualpipe", "bucket_mb": 0.05},
}


def job(parallel: dict[str, Any]) -> Sections:
    weight = [{"value": 0.3, "until_steps": 2}, {"value": 0.0, "until_steps": 3}, {"value": 0.3}]  # MTP rests for once
    run = {"precision": "fp8", "dtype": "bfloat16", "mtp_weight": weight}
    return {"model": WIDE, "train": run, "parallel": parallel}


def steps(parallel: dict[str, Any], *, release: bool) -> dict[str, Any]:
    """What `train` sees, and how many weights in FP8 had no copy after it, of how many."""
    found: list[nn.Module] = []

    def casts(model: nn.Module) -> list[Any]:
        found.append(model)
        return casts_of(model) if release else []

    engine_module.casts_of = casts  # type: ignore[attr-defined]
    seen = train(job(parallel), STEPS)
    weights = [weight for cast in casts_of(found[0]) for weight in cast.weights]
    return {**seen, "released": sum(map(is_released, weights)), "weights": len(weights)}


def restored() -> bool:
    """Whether weights that are made again on all ranks are rounded masters, and the same on both."""
    made: list[AdamW] = []
    init = AdamW.__init__

    def note(self: AdamW, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        made.append(self)

    AdamW.__init__ = note  # type: ignore[method-assign]
    steps(LAYOUTS["dp2"], release=True)
    AdamW.__init__ = init  # type: ignore[method-assign]
    (optimizer,) = made
    optimizer.restore_weights()
    right = True
    for name, master in optimizer.masters().items():
        one = optimizer.gradients.sums[name]
        whole = one.parameter.detach()
        right &= torch.equal(whole[one.share.rows], master.bfloat16())
        other = whole.clone()
        torch.distributed.broadcast(other, 0)
        right &= torch.equal(whole, other) and not is_released(one.parameter)
    optimizer.release_weights()
    return right


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        name: [steps(parallel, release=release) for release in (True, False)] for name, parallel in LAYOUTS.items()
    }
    results["one process"] = steps({}, release=True)
    alright = [None] * launch().num_processes
    torch.distributed.all_gather_object(alright, restored())
    results["restored"] = alright
    if launch().rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()

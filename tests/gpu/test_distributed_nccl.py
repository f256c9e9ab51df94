"""Four GPUs train as one does: the schedules and layouts of tests/parallel, with NCCL and phases on two streams."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.fleet import torchrun, train

CUDA = {"device": "cuda"}
FLEET = Path(__file__).parents[1] / "parallel" / "fleet.py"
JOBS: dict[str, Any] = {
    "dp4-ep2": {"parallel": {"dp": 4, "ep": 2}},
    "pp4-zb1p": {"parallel": {"pp": 4, "schedule": "zb1p"}},
    "pp2-dp2-ep2-dualpipev": {"parallel": {"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipev"}},
    "pp2-dp2-ep2-dualpipe": {"parallel": {"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipe"}},
}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
def test_losses_equal_one_gpu(tmp_path: Path) -> None:
    """Within 1e-6, as on CPUs: FP32 without TF32, so that only the order of sums differs."""
    jobs, out = tmp_path / "jobs.json", tmp_path / "out.json"
    jobs.write_text(json.dumps({name: {**job, "train": CUDA} for name, job in JOBS.items()}))
    workers = torchrun(4, str(FLEET), str(jobs), str(out))
    output, _ = workers.communicate(timeout=500)
    assert workers.returncode == 0, output
    results = json.loads(out.read_text())
    want = train({"train": CUDA})
    for name in JOBS:
        for ours, one in zip(results[name]["steps"], want["steps"], strict=True):
            assert ours[:3] == pytest.approx(one[:3], rel=1e-6), name

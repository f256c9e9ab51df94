"""`dsv3rt plan memory`: the bytes of every pipeline rank, by kind, against what a GPU has."""

from __future__ import annotations

from dataclasses import fields

import torch

from dsv3rt.config import TrainConfig
from dsv3rt.parallel.memory import Bytes, plan

_KINDS = tuple(field.name for field in fields(Bytes))


def run(config: TrainConfig, gpu_gb: float) -> int:
    """Print the table; returns 0 where every rank fits, 1 where one does not."""
    dtype = torch.float32 if config.train.dtype == "float32" else torch.bfloat16
    parallel, recompute = config.parallel, config.train.recompute
    print(
        f"{parallel.num_processes} ranks: pp {parallel.pp} ({parallel.schedule}) x dp {parallel.dp}, experts over "
        f"{parallel.ep}; {str(dtype).removeprefix('torch.')}; recomputed: {', '.join(recompute) or 'nothing'}"
    )
    rows = list(plan(config, dtype))
    print("  ".join(["rank", *(kind.rjust(11) for kind in _KINDS), "total".rjust(8)]) + "  GB")
    for rank, row in enumerate(rows):
        cells = [f"{getattr(row, kind) / 1e9:11.2f}" for kind in _KINDS]
        print("  ".join([f"{rank:4}", *cells, f"{row.total / 1e9:8.2f}"]) + _verdict(row, gpu_gb))
    worst = max(row.total for row in rows) / 1e9
    print(f"the fullest rank needs {worst:.1f} GB of {gpu_gb:g}; not counted: CUDA context, NCCL, temporaries")
    return int(worst > gpu_gb)


def _verdict(row: Bytes, gpu_gb: float) -> str:
    return "  over" if row.total > gpu_gb * 1e9 else ""

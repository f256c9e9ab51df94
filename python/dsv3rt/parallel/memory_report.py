"""`dsv3rt plan memory`: the bytes of every pipeline rank, by kind, against what a GPU has."""

from __future__ import annotations

from dataclasses import fields

import torch

from dsv3rt.config import TrainConfig
from dsv3rt.parallel.memory import Bytes, plan

_KINDS = tuple(field.name for field in fields(Bytes))


def run(config: TrainConfig, gpu_gb: float, reserve_gb: float) -> int:
    """Print the table; returns 0 where every rank fits, 1 where one does not.

    Raises:
        ValueError: sizes that are none.
    """
    if not 0 < gpu_gb < float("inf"):
        raise ValueError(f"--gpu-gb: must be a positive number, got {gpu_gb:g}")
    if not 0 <= reserve_gb < float("inf"):
        raise ValueError(f"--reserve-gb: must be a number, not negative, got {reserve_gb:g}")
    dtype = torch.float32 if config.train.dtype == "float32" else torch.bfloat16
    parallel, recompute = config.parallel, config.train.recompute
    print(
        f"{parallel.num_processes} ranks: pp {parallel.pp} ({parallel.schedule}) x dp {parallel.dp}, experts over "
        f"{parallel.ep}; {_numbers(config, dtype)}; recomputed: {', '.join(recompute) or 'nothing'}"
    )
    rows = list(plan(config, dtype, int(reserve_gb * 1e9)))
    print(" ".join(["rank", *(kind.rjust(_width(kind)) for kind in _KINDS), "total".rjust(_width("total"))]) + "  GB")
    for rank, row in enumerate(rows):
        cells = [f"{getattr(row, kind) / 1e9:{_width(kind)}.2f}" for kind in _KINDS]
        print(" ".join([f"{rank:4}", *cells, f"{row.total / 1e9:{_width('total')}.2f}"]) + _verdict(row, gpu_gb))
    worst = max(row.total for row in rows) / 1e9
    print(f"the fullest rank needs {worst:.1f} GB of {gpu_gb:g}, {reserve_gb:g} of them in reserve for CUDA and NCCL")
    return int(worst > gpu_gb)


def _width(kind: str) -> int:
    return max(7, len(kind) + 1)


def _numbers(config: TrainConfig, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"fp8 and {name}" if config.train.precision == "fp8" else name


def _verdict(row: Bytes, gpu_gb: float) -> str:
    return "  over" if row.total > gpu_gb * 1e9 else ""

"""What a run reports: metrics.jsonl, TensorBoard events, and the figures of the machine."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import torch

from dsv3rt.train.run_dir import RunDir, write_atomically

Row = dict[str, Any]

# Dense BF16 TFLOPS of the SXM parts.
_PEAKS = {"H100": 989.0, "H800": 989.0, "H200": 989.0}
_TENSORBOARD = {  # metrics.jsonl key -> TensorBoard tag
    "loss": "loss/train",
    "val_loss": "loss/validation",
    "mtp_loss": "loss/mtp",
    "balance_loss": "loss/balance",
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/lr",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
    "max_expert_load": "moe/max_expert_load",
    "memory_bytes": "memory/bytes",
}


class MetricsWriter:
    """Appends one row a step to metrics.jsonl and to TensorBoard; a resumed run first drops the rows it will repeat."""

    def __init__(self, run: RunDir, resumed_step: int | None) -> None:
        """resumed_step: the last step that counts; None starts over."""
        self._run = run
        self._open(-1 if resumed_step is None else resumed_step)

    def write(self, row: Row) -> None:
        self._file.write(_line(row))
        self._file.flush()
        for key, tag in _TENSORBOARD.items():
            if row.get(key) is not None:
                self._events.add_scalar(tag, row[key], row["step"])

    def sync(self) -> None:
        """Make the rows so far durable, as a checkpoint that counts on them must."""
        os.fsync(self._file.fileno())

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`: a rollback repeats them."""
        self.close()
        self._open(step)

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def _open(self, kept: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        rows = [row for row in read_rows(self._run.metrics) if row["step"] <= kept]
        write_atomically(self._run.metrics, "".join(map(_line, rows)))
        self._file = open(self._run.metrics, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._events = SummaryWriter(str(self._run.tensorboard), purge_step=kept + 1)


class NoMetrics:
    """What the other ranks have in a MetricsWriter's place: rank 0 writes the rows of all."""

    def write(self, row: Row) -> None:
        """Nothing to do."""

    def sync(self) -> None:
        """Nothing to do."""

    def rewind(self, step: int) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; nothing where there is no file, and a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def peak_flops(device: torch.device, configured_tflops: float) -> float | None:
    """FLOP/s that MFU is measured against: `train.peak_tflops`, else the BF16 peak of a known GPU."""
    if configured_tflops > 0:
        return configured_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "PCIe" in name or "NVL" in name:  # slower parts of the same family
        return None
    return next((peak * 1e12 for known, peak in _PEAKS.items() if known in name), None)


def memory_bytes(device: torch.device) -> int:
    """The peak so far: allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

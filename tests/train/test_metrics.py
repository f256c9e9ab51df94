"""Peaks, rows on disk and progress lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv3rt.train import progress
from dsv3rt.train.metrics import peak_flops, read_rows
from dsv3rt.train.progress import Progress


@pytest.mark.parametrize(
    ("name", "configured", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 0.0, 989e12),
        ("NVIDIA H800", 0.0, 989e12),
        ("NVIDIA H200", 0.0, 989e12),
        ("NVIDIA H100 PCIe", 0.0, None),
        ("NVIDIA GeForce RTX 4090", 0.0, None),
        ("NVIDIA H100 PCIe", 756.0, 756e12),
    ],
)
def test_peak_of_gpus(monkeypatch: pytest.MonkeyPatch, name: str, configured: float, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), configured) == peak


def test_peak_of_a_cpu_is_unknown() -> None:
    assert peak_flops(torch.device("cpu"), 0.0) is None
    assert peak_flops(torch.device("cpu"), 0.5) == 5e11


def test_read_rows_stops_at_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]


def test_plain_lines_where_no_one_watches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Now and then, at every evaluation, and for the last step; the time left counts the steps of this start alone."""
    clock = iter([100.0, *(100.0 + 2 * step for step in range(1, 11))])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    bar = Progress(total=100, done=90)
    for step in range(91, 101):
        bar.update(loss=step / 10, tokens_per_s=1234.5, val_loss=9.5 if step == 92 else None)
    bar.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 91/100  loss 9.100  1,234 tokens/s  0:18 left",
        "step 92/100  loss 9.200  val 9.500  1,234 tokens/s  0:16 left",
        "step 97/100  loss 9.700  1,234 tokens/s  0:06 left",
        "step 100/100  loss 10.000  1,234 tokens/s  0:00 left",
    ]

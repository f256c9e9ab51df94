"""Where a figure comes from: the commit, the device and its driver."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import torch

from dsv3rt.doctor import driver_version

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The commit of the working tree, with "-dirty" if anything but results differs from it; "unknown" outside git."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs/performance.md")
    return f"{head}-dirty" if changes else head


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def machine() -> dict[str, str]:
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else "no GPU",
        "driver": driver_version() or "unknown",
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
    }


def folder_of(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100", the folder of benchmarks/results that keeps this device's figures."""
    model = re.search(r"\b[A-Z]{1,2}\d{2,4}[A-Z]*\b", device)
    name = model[0] if model else device.removeprefix("NVIDIA ")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

"""Where a figure comes from: the commit, the device and its driver."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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


def write_lines(
    out: Path, script: str, command: str, commit: str, lines: Sequence[tuple[dict[str, Any], float]], rounds: int
) -> None:
    """What a script that is no pytest suite measured, in pytest-benchmark's form: each line with our median seconds."""
    entries = [
        {"name": f"{line['op']}[{line['shape']}]", "fullname": f"benchmarks/{script}::{line['op']}",
         "extra_info": {**line, "commit": commit}, "stats": {"median": seconds, "rounds": rounds}}
        for line, seconds in lines
    ]  # fmt: skip
    result = {"machine_info": {**machine(), "command": command}, "commit_info": {"id": commit}, "benchmarks": entries,
              "datetime": datetime.now(UTC).isoformat(), "version": "1"}  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=4) + "\n")

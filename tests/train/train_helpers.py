"""A model and a text so small that a training step takes milliseconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from dsv3rt.config import TrainConfig
from dsv3rt.train import config_file

ROOT = Path(__file__).resolve().parents[2]

MODEL: dict[str, Any] = {
    "vocab_size": 264, "dim": 32, "num_layers": 2, "num_dense_layers": 1, "num_heads": 2, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "ffn_dim": 32, "expert_dim": 16,
    "num_experts": 4, "top_k": 2, "num_expert_groups": 2, "num_groups_kept": 2, "max_position": 64, "init_std": 0.1,
}  # fmt: skip


def write_corpus(folder: Path, files: int = 30) -> Path:
    """A folder of short, different text files."""
    folder.mkdir(parents=True)
    for index in range(files):
        lines = [f"line {line} of file {index}: {line * index % 97} apples\n" for line in range(12)]
        (folder / f"file{index:02}.txt").write_text("".join(lines))
    return folder


def sections(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a run in `folder`/run on the text in `folder`/text, which is made when missing."""
    text = folder / "text"
    if not text.exists():
        write_corpus(text)
    base: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "train": {
            "run_dir": str(folder / "run"), "steps": 6, "seq_len": 32, "batch_size": 4, "micro_batch_size": 2,
            "eval_sequences": 4, "device": "cpu", "bf16_modules": [],
        },
        "data": {"paths": [str(text)], "validation_fraction": 0.1},
        "optim": {"lr": 1e-2},
    }  # fmt: skip
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}


def config(folder: Path, **overrides: dict[str, Any]) -> TrainConfig:
    return config_file.from_dict(sections(folder, **overrides))


def write_config(folder: Path, **overrides: dict[str, Any]) -> Path:
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(sections(folder, **overrides)))
    return path


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float | None, float | None]]:
    """What must not depend on how often a run was interrupted; JSON keeps every bit of a float."""
    return [(row["step"], row["loss"], row.get("val_loss")) for row in rows(folder)]


def start(*arguments: str) -> subprocess.Popen[str]:
    """A fresh interpreter, one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with heeding_interrupts():
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=ROOT,
        )


@contextmanager
def heeding_interrupts() -> Iterator[None]:
    """In the background of a shell SIGINT is ignored, and by all that is started from there."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

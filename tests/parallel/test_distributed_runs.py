"""Whole runs under torchrun: other layouts go on from a checkpoint, a killed worker costs nothing but time."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from fleet import BASE, ROOT, Sections, output_of, torchrun

from dsv3rt import Trainer
from dsv3rt.train import checkpoint, config_file, manifest

TEXT = "".join(f"line {line} is followed by line {line + 1}; {line * line % 89} apples\n" for line in range(400))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for index in range(30):
        (folder / f"{index}.txt").write_text(TEXT[index * 90 :][:3000])
    return folder


def write_config(folder: Path, text: Path, **sections: dict[str, Any]) -> Path:
    """A configuration of a run in `folder`/run."""
    whole: Sections = {
        **BASE,
        "train": {**BASE["train"], "run_dir": str(folder / "run"), "steps": 10, "eval_every": 5, "eval_sequences": 5},
        "data": {"paths": [str(text)], "validation_fraction": 0.1},
        "checkpoint": {"every": 5, "keep_latest": 0},
    }
    merged = {name: {**whole.get(name, {}), **sections.get(name, {})} for name in {*whole, *sections}}
    folder.mkdir(exist_ok=True)
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(merged))
    return path


def metrics_lines(folder: Path) -> list[str]:
    path = folder / "run" / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics_lines(folder)]


def losses(folder: Path) -> list[float]:
    """Of all steps, one kind after the other."""
    kinds = ("loss", "mtp_loss", "val_loss")
    return [row[kind] for kind in kinds for row in rows(folder) if row.get(kind) is not None]


def run(processes: int, *arguments: str, options: tuple[str, ...] = ()) -> str:
    return output_of(torchrun(processes, *arguments, options=options), timeout=240)


def go_on_from(folder: Path, step: int, target: Path) -> None:
    """A run directory that has got as far as `step`."""
    name = f"step-{step}"
    shutil.copytree(folder / "run" / "checkpoints" / name, target / "checkpoints" / name)
    shutil.copy(folder / "run" / "metrics.jsonl", target)


@pytest.fixture(scope="module")
def pp4(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A run on four pipeline ranks, ten steps, with checkpoints at 5 and 10."""
    folder = tmp_path_factory.mktemp("pp4")
    config = write_config(folder, text, parallel={"pp": 4, "schedule": "dualpipev"}, optim={"ema_decay": 0.9})
    output = run(4, "-m", "dsv3rt", "train", str(config))
    assert output.count("step 10/10") == 1, "one rank speaks"
    assert "ranks  pp 4 (dualpipev) x dp 1" in output
    return folder


def test_run_directory_of_many_ranks(pp4: Path) -> None:
    assert [row["step"] for row in rows(pp4)] == list(range(11))
    assert sorted(path.name for path in (pp4 / "run" / "logs").iterdir()) == [f"rank-{n}.log" for n in (1, 2, 3)]
    assert "step 10/10" in (pp4 / "run" / "logs" / "rank-3.log").read_text()
    saved = pp4 / "run" / "checkpoints" / "step-10"
    assert {f"__{rank}_0.distcp" for rank in range(4)} < {path.name for path in saved.iterdir()}
    assert manifest.damage(saved) is None


def test_checkpoint_loads_under_another_layout(pp4: Path, text: Path, tmp_path: Path) -> None:
    """Saved at pp4, continued at pp2 x dp2 with experts over 2."""
    config = write_config(tmp_path, text, optim={"ema_decay": 0.9})
    go_on_from(pp4, 5, tmp_path / "run")
    keys = ("--parallel.pp=2", "--parallel.dp=2", "--parallel.ep=2", "--parallel.schedule=zb1p")
    output = run(4, "-m", "dsv3rt", "train", str(config), *keys)
    assert "step-5 (changed since: parallel.dp, parallel.ep, parallel.pp, parallel.schedule" in output
    assert len(losses(tmp_path)) == 23
    assert losses(tmp_path) == pytest.approx(losses(pp4), rel=1e-6)


def test_checkpoint_loads_in_one_process(pp4: Path, text: Path, tmp_path: Path) -> None:
    """The same losses, and in the end the same tensors, whole, but for what sums in another order make of them."""
    path = write_config(tmp_path, text, optim={"ema_decay": 0.9})
    go_on_from(pp4, 5, tmp_path / "run")
    trainer = Trainer(config_file.load(path))
    assert trainer.fit()
    assert losses(tmp_path) == pytest.approx(losses(pp4), rel=1e-6)
    mine = trainer.engine.tensors()
    theirs = {name: torch.empty_like(tensor) for name, tensor in mine.items()}
    checkpoint.load(pp4 / "run" / "checkpoints" / "step-10", theirs)
    assert {name.split(".")[0] for name in mine} == {"model", "exp_avg", "exp_avg_sq", "ema"}
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_killed_worker_is_restarted_and_changes_nothing(text: Path, tmp_path: Path) -> None:
    """torchrun starts all ranks again; they go on from the last checkpoint. Bit for bit the undisturbed run."""
    sections = {"parallel": {"pp": 2, "schedule": "zb1p"}, "checkpoint": {"every": 2}}
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    run(2, "-m", "dsv3rt", "train", str(write_config(quiet, text, **sections)))
    script = str(ROOT / "tests" / "parallel" / "dying_worker.py")
    config = write_config(killed, text, **sections)
    output = run(2, script, "train", str(config), options=("--max-restarts", "1"))
    assert "resuming from" in output
    assert [row["step"] for row in rows(killed)] == list(range(11))
    assert losses(killed) == losses(quiet)


def test_signal_stops_all_ranks_at_one_step(text: Path, tmp_path: Path) -> None:
    """torchrun passes SIGTERM on; whichever rank hears it first, all save the same step, and the run can go on."""
    config = write_config(tmp_path, text, parallel={"dp": 2}, train={"steps": 100_000, "eval_every": 0})
    process = torchrun(2, "-m", "dsv3rt", "train", str(config))
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and len(metrics_lines(tmp_path)) < 4:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "stopped by SIGTERM, saved in" in output
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert manifest.damage(newest) is None
    assert newest.name == f"step-{rows(tmp_path)[-1]['step']}"

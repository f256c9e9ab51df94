"""Whole runs: what they leave behind, and that interrupting them changes nothing."""

from __future__ import annotations

import math
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from train_helpers import config, losses, rows, start, write_config, write_corpus

from dsv3rt import Trainer
from dsv3rt.config import TrainConfig
from dsv3rt.train import config_file
from dsv3rt.train.plot import smooth
from dsv3rt.train.run_dir import RunDir

KEYS = {
    "step", "tokens", "loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "tokens_per_s", "mfu", "max_expert_load",
    "memory_bytes", "skipped_steps",
}  # fmt: skip


@pytest.fixture
def _one_thread():
    """Bitwise comparisons with another process need the same number of threads in both."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_steps(run: TrainConfig, steps: int) -> TrainConfig:
    return replace(run, train=replace(run.train, steps=steps))


def test_metrics_schema(tmp_path: Path) -> None:
    run = config(tmp_path, train={"steps": 5, "eval_every": 2, "peak_tflops": 0.1})
    assert Trainer(run).fit()
    first, *rest = rows(tmp_path)
    assert first["step"] == first["tokens"] == 0
    assert set(first) == KEYS | {"val_loss"}
    assert first["loss"] is None
    assert first["val_loss"] == pytest.approx(math.log(264), abs=1.0)
    assert [row["step"] for row in rest] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rest if "val_loss" in row] == [2, 4, 5]
    for row in rest:
        assert set(row) - {"val_loss"} == KEYS
        assert row["tokens"] == row["step"] * 4 * 32
        assert all(
            isinstance(row[key], float) and row[key] > 0
            for key in KEYS - {"step", "tokens", "memory_bytes", "skipped_steps"}
        )
        assert 1.0 <= row["max_expert_load"] <= 2.0  # 4 experts, 2 of them a token
        assert 2**20 < row["memory_bytes"] < 2**40
        assert row["skipped_steps"] == 0
    assert rest[-1]["val_loss"] < first["val_loss"]


def test_mfu_is_null_without_a_peak_and_no_evaluation_no_val_loss(tmp_path: Path) -> None:
    Trainer(config(tmp_path, train={"steps": 1, "eval_sequences": 0})).fit()
    assert all(row["mfu"] is None and "val_loss" not in row for row in rows(tmp_path))


def test_run_directory(tmp_path: Path) -> None:
    run = config(tmp_path, train={"steps": 4, "eval_every": 2}, checkpoint={"every": 1, "keep_latest": 2})
    Trainer(run).fit()
    folder = tmp_path / "run"
    assert config_file.load(folder / "config.toml") == run
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-3", "step-4"]
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    got = [(event.step, event.value) for event in events.Scalars("loss/train")]
    assert got == [(row["step"], pytest.approx(row["loss"])) for row in rows(tmp_path)[1:]]
    assert [event.step for event in events.Scalars("loss/validation")] == [0, 2, 4]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_is_bitwise(tmp_path: Path, dtype: str) -> None:
    """3 + 4 steps are 7: losses, weights, moments and router biases; the schedules go on where they were."""
    lr = [{"value": 0.01, "start": 0.0, "until_steps": 5, "shape": "linear"}, {"value": 0.01}]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    made = []
    for folder, stops in ((whole, [7]), (parts, [3, 7])):
        for steps in stops:
            run = config(folder, train={"steps": steps, "dtype": dtype, "eval_every": 7}, optim={"lr": lr})
            trainer = Trainer(run)
            trainer.fit()
        made.append(trainer.engine.tensors())
    assert [(s, loss) for s, loss, _ in losses(whole)] == [(s, loss) for s, loss, _ in losses(parts)]
    assert losses(whole)[-1] == losses(parts)[-1]
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_finished_run_says_so_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path, train={"steps": 2})
    Trainer(run).fit()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    capsys.readouterr()
    for steps in (2, 1):
        assert Trainer(with_steps(run, steps)).fit() is False
        assert f"already trained to step 2 of {steps}" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    (tmp_path / "run" / "loss.png").unlink()  # as a kill after the last checkpoint leaves it
    Trainer(run).fit()
    assert (tmp_path / "run" / "loss.png").exists()


def test_resume_drops_rows_and_events_it_repeats(tmp_path: Path) -> None:
    """A run killed between checkpoints has rows past the newest one, and perhaps half a line."""
    run = config(tmp_path, train={"steps": 4}, checkpoint={"every": 2})
    Trainer(run).fit()
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 5, "loss": 99.0}\n{"step": 6, "lo')
    with SummaryWriter(str(tmp_path / "run" / "tensorboard")) as stale:
        for step in (5, 6):
            stale.add_scalar("loss/train", 99.0, step)
    time.sleep(1.1)  # event files are named and ordered by the second
    Trainer(with_steps(run, 6)).fit()
    assert [row["step"] for row in rows(tmp_path)] == list(range(7))
    assert 99.0 not in [row["loss"] for row in rows(tmp_path)]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    got = [(event.step, event.value) for event in events.Scalars("loss/train")]
    assert got == [(row["step"], pytest.approx(row["loss"])) for row in rows(tmp_path)[1:]]


def test_without_a_checkpoint_a_run_starts_over(tmp_path: Path) -> None:
    run = config(tmp_path, train={"steps": 2})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    Trainer(run).fit()
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("section", "change", "culprit"),
    [
        ("model", {"dim": 64}, r"model\.dim \(was 32, now 64\)"),
        ("train", {"seq_len": 16}, r"train\.seq_len \(was 32, now 16\)"),
        ("train", {"seed": 5}, r"train\.seed \(was 0, now 5\)"),
        ("data", {"validation_fraction": 0.2}, r"data\.validation_fraction \(was 0\.1, now 0\.2\)"),
        ("optim", {"moment_dtype": "float32"}, r"optim\.moment_dtype \(was bfloat16, now float32\)"),
    ],
)
def test_incompatible_change_is_refused(tmp_path: Path, section: str, change: dict[str, object], culprit: str) -> None:
    Trainer(config(tmp_path, train={"steps": 1})).fit()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    changed = config(
        tmp_path, **{"train": {"steps": 2}, section: {**({"steps": 2} if section == "train" else {}), **change}}
    )
    with pytest.raises(ValueError, match=f"^can't resume .*step-1 with other {culprit};.*run_dir$"):
        Trainer(changed).fit()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_harmless_changes_are_named_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(config(tmp_path, train={"steps": 1})).fit()
    changed = config(tmp_path, train={"steps": 3, "micro_batch_size": 4}, optim={"lr": 1e-3}, checkpoint={"every": 1})
    capsys.readouterr()
    assert Trainer(changed).fit()
    message = "step-1 (changed since: checkpoint.every, optim.lr, train.micro_batch_size, train.steps)"
    assert message in capsys.readouterr().out
    assert [row["lr"] for row in rows(tmp_path)[1:]] == [1e-2, 1e-3, 1e-3]


def test_changed_text_is_refused(tmp_path: Path) -> None:
    Trainer(config(tmp_path, train={"steps": 1})).fit()
    (tmp_path / "text" / "file00.txt").write_text("another beginning\n" * 20)
    (tmp_path / "text" / "file01.txt").write_text("another beginning\n" * 20)
    with pytest.raises(ValueError, match=r"^can't resume .*step-1: the text under data\.paths has changed"):
        Trainer(config(tmp_path, train={"steps": 2})).fit()


def test_second_trainer_is_kept_out(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, train={"steps": 1}))
    with RunDir(tmp_path / "run").locked(), pytest.raises(ValueError, match=r"train\.run_dir: another process"):
        trainer.fit()
    assert trainer.fit()


def test_non_finite_loss_stops_without_a_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, train={"steps": 4}, checkpoint={"every": 1}, guard={"max_skipped": 0}))
    step = trainer.engine.step

    def poisoned(state):
        if state.step == 2:
            trainer.engine.tensors()["model.norm.weight"].fill_(float("nan"))
        return step(state)

    trainer.engine.step = poisoned  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=r"^step 3: the loss is nan"):
        trainer.fit()
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-1", "step-2"]


def kill_at_row(path: Path, folder: Path, row: int) -> None:
    """Start a run, and kill -9 it as soon as its metrics have this many rows."""
    process = start("-m", "dsv3rt", "train", str(path))
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= row:
            break
        time.sleep(0.002)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output


@pytest.mark.usefixtures("_one_thread")
def test_kill_at_a_random_step_changes_nothing(tmp_path: Path) -> None:
    """Twice, then left to finish: the file's losses are those of a run that nobody disturbed, bit for bit."""
    sections = {"train": {"steps": 120, "eval_every": 40}, "checkpoint": {"every": 7}}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Trainer(config(whole, **sections)).fit()
    write_corpus(killed / "text")
    path = write_config(killed, **sections)
    first = random.SystemRandom().randrange(2, 25)
    second = random.SystemRandom().randrange(first + 8, 45)  # far from the end: a kill may come late
    print(f"killed at rows {first} and {second}")
    for row in (first, second):
        kill_at_row(path, killed, row)
        assert row <= len(rows(killed)) < 121
    process = start("-m", "dsv3rt", "train", str(path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "resuming from" in output
    assert losses(killed) == losses(whole)


def test_smooth_is_a_running_mean() -> None:
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    assert smooth([1.0, 5.0, 2.0]) == [1.0, 5.0, 2.0]  # too short to smooth
    ramp = smooth(list(map(float, range(1000))))
    assert all(0 < index - value < 60 for index, value in enumerate(ramp) if index > 100)

"""Signals, stuck steps and kills: a run that is stopped in any way goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from train_helpers import config, losses, rows, start, write_config

from dsv3rt import Trainer
from dsv3rt.errors import StoppedBySignalError
from dsv3rt.train import checkpoint, manifest, watchdog
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.saver import CheckpointSaver

# Step 4 hangs in the way that the first argument says.
HANG = """
import ctypes, sys, time
from dsv3rt import cli
from dsv3rt.train.engine import Engine
step = Engine.step
def hangs_here():
    if sys.argv[1] == "sleep":
        time.sleep(100)
    ctypes.PyDLL(None).sleep(100)  # without letting go of the interpreter's lock
def step_or_hang(self, state):
    if state.step == 3:
        hangs_here()
    return step(self, state)
Engine.step = step_or_hang
sys.exit(cli.main(sys.argv[2:]))
"""


def wait_for_row(process: subprocess.Popen[str], folder: Path, row: int) -> None:
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < row:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def newest_step(folder: Path) -> int:
    newest = checkpoint.newest(folder / "run" / "checkpoints")
    assert newest is not None
    assert manifest.damage(newest) is None
    state, _ = checkpoint.read_state(newest)
    assert newest.name == f"step-{state.step}"
    return state.step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_stops(tmp_path: Path, number: signal.Signals) -> None:
    """The step is finished and saved, and the run goes on from there bit for bit."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    stopped.mkdir()
    path = write_config(stopped, train={"steps": 100_000, "eval_sequences": 0})
    process = start("-m", "dsv3rt", "train", str(path))
    wait_for_row(process, stopped, 4)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    step = rows(stopped)[-1]["step"]
    assert newest_step(stopped) == step
    folder = stopped / "run" / "checkpoints" / f"step-{step}"
    last = output.splitlines()[-1]
    assert last == f"dsv3rt: stopped by {number.name}, saved in {folder}; the same command resumes from there"
    assert "Traceback" not in output
    for one in (stopped, whole):
        Trainer(config(one, train={"steps": step + 3, "eval_sequences": 0})).fit()
    assert losses(stopped) == losses(whole)


def test_signal_while_saving_waits_for_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = CheckpointSaver.save

    def signalled(self: CheckpointSaver, state: RunState, *arguments: Any, **options: Any) -> None:
        save(self, state, *arguments, **options)
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(CheckpointSaver, "save", signalled)
    trainer = Trainer(config(tmp_path, train={"steps": 9}, checkpoint={"every": 2}))
    with pytest.raises(StoppedBySignalError, match=r"^stopped by SIGTERM, saved in .*step-3;") as caught:
        trainer.fit()
    assert caught.value.exit_code == 143
    assert newest_step(tmp_path) == 3


def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    path = write_config(tmp_path, checkpoint={"every": 1})
    process = start("-c", HANG, "sleep", "train", str(path))
    wait_for_row(process, tmp_path, 4)
    while newest_step(tmp_path) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None, "the first one waits for the step"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM
    assert newest_step(tmp_path) == 3


def test_signals_are_as_before_after_a_run_and_no_matter_in_a_thread(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    Trainer(config(tmp_path / "main", train={"steps": 1})).fit()
    trainer = Trainer(config(tmp_path / "thread", train={"steps": 1}))
    thread = threading.Thread(target=trainer.fit)
    thread.start()
    thread.join()
    assert newest_step(tmp_path / "thread") == 1
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize(("way", "code"), [("sleep", watchdog.EXIT_CODE), ("lock", 1)])
def test_stuck_step_ends_the_process(tmp_path: Path, way: str, code: int) -> None:
    """The stacks name the function that hangs, on stderr also where no thread of Python gets to run any more."""
    every = {"every": 1, "asynchronous": way == "sleep"}  # a writing thread needs the lock as well
    path = write_config(tmp_path, checkpoint=every, guard={"step_timeout_s": 3.0})
    process = start("-c", HANG, way, "train", str(path))
    output, _ = process.communicate(timeout=90)
    assert process.returncode == code, output
    assert "in hangs_here" in output
    assert newest_step(tmp_path) == 3
    if way == "sleep":
        stuck = tmp_path / "run" / "stuck.txt"
        assert "in hangs_here" in stuck.read_text()
        (line,) = [line for line in output.splitlines() if line.startswith("dsv3rt: error: ")]
        assert f"no progress for 3 s in step 4 (guard.step_timeout_s); the stacks are in {stuck}" in line


def test_watchdog_leaves_a_run_that_gets_on_alone(tmp_path: Path) -> None:
    """Many times the timeout in all, no single step near it."""
    trainer = Trainer(config(tmp_path, train={"steps": 10}, guard={"step_timeout_s": 1.5}))
    step = trainer.engine.step

    def slow(state):
        time.sleep(0.3)
        return step(state)

    trainer.engine.step = slow  # type: ignore[method-assign]
    assert trainer.fit()
    assert not (tmp_path / "run" / "stuck.txt").exists()
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_kills_at_random_moments_change_nothing() -> None:
    """6 kills -9, in training and in saving; `scripts/fault_drill.py --kills 50` is the long form."""
    process = start("scripts/fault_drill.py", "--kills", "6")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "6 kills" in output
    assert "all losses bitwise equal" in output

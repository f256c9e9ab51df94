"""Damaged files, slow and full disks: what is on disk is whole, or it is noticed and the one before it is used."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from train_helpers import config, losses, start, write_config

from dsv3rt import Trainer, cli
from dsv3rt.config import CheckpointConfig
from dsv3rt.train import checkpoint, manifest, resume
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.saver import CheckpointSaver
from scripts.fault_drill import flip_or_cut

NO_ROOM = OSError(errno.ENOSPC, "No space left on device")


def tensors(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"model.w": torch.randn(9, 7, generator=g), "exp_avg.w": torch.randn(9, 7, generator=g).bfloat16()}


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_every_flip_and_cut_is_found(tmp_path: Path) -> None:
    """300 random ones over all files, the list of checksums among them; each names the file it is in."""
    folder = checkpoint.save(tmp_path, RunState(step=1), tensors(1), "[train]\n", 0)
    files = sorted(folder.iterdir())
    assert {path.name for path in files} == {".metadata", "__0_0.distcp", "config.toml", "state.json", manifest.NAME}
    assert manifest.damage(folder) is None
    rng = random.Random(11)
    for number in range(300):
        path = files[number % len(files)]
        right = path.read_bytes()
        what = flip_or_cut(path, rng)
        found = manifest.damage(folder)
        assert found is not None, what
        assert found.startswith(f"{path.name}: "), (what, found)
        path.write_bytes(right)
    assert manifest.damage(folder) is None
    for path in files:
        path.rename(tmp_path / "away")
        assert manifest.damage(folder) == f"{path.name}: No such file or directory"
        (tmp_path / "away").rename(path)


def test_sha256sum_reads_the_list(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    manifest.write(tmp_path)
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (tmp_path / manifest.NAME).read_text().splitlines()[0] == f"{digest}  a"


def test_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each start damages the newest in a random place; the losses are those of the undisturbed run."""
    every = {"every": 2, "keep_latest": 0}
    Trainer(config(tmp_path / "whole", train={"steps": 12, "eval_sequences": 0}, checkpoint=every)).fit()
    rng, folder = random.Random(), tmp_path / "hit"
    root = folder / "run" / "checkpoints"
    for steps in (6, 8, 10, 12):
        if steps > 6:
            newest = checkpoint.newest(root)
            assert newest is not None
            hits = [flip_or_cut(rng.choice(sorted(newest.iterdir())), rng)]
            print(newest.name, *hits)
            capsys.readouterr()
        Trainer(config(folder, train={"steps": steps, "eval_sequences": 0}, checkpoint=every)).fit()
        if steps > 6:
            lines = capsys.readouterr().out.splitlines()
            (told,) = [line for line in lines if line.startswith("damaged checkpoint: ")]
            assert told.startswith(f"damaged checkpoint: {newest}/{hits[0].split()[0]}: "), (told, hits)
            assert any(f"resuming from {root}/step-{steps - 4}" in line for line in lines)
    assert losses(folder) == losses(tmp_path / "whole")
    assert [name for name in names(root) if "damaged" in name] == [f"damaged-step-{n}" for n in (10, 6, 8)]


def test_no_intact_checkpoint_is_one_line_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, train={"steps": 4}, checkpoint={"every": 2})
    assert cli.main(["train", str(path)]) == 0
    root = tmp_path / "run" / "checkpoints"
    for folder in root.iterdir():
        (folder / "__0_0.distcp").write_bytes(b"")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    for _ in range(2):
        capsys.readouterr()
        assert cli.main(["train", str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{root}: no intact checkpoint, only damaged-step-2, damaged-step-4; remove them" in line
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_set_aside_twice_keeps_both(tmp_path: Path) -> None:
    for _ in range(2):
        folder = checkpoint.save(tmp_path, RunState(step=1), tensors(1), "", 0)
        (folder / "state.json").write_text("{}")
        with pytest.raises(ValueError, match="no intact checkpoint"):
            resume.newest_intact(tmp_path)
    assert names(tmp_path) == ["damaged-step-1", "damaged-step-1.2"]


def test_interrupted_replacement_loses_nothing(tmp_path: Path) -> None:
    """A step saved again: until the new folder has the name, the old one can be had back."""
    folder = checkpoint.save(tmp_path, RunState(step=1), tensors(1), "", 0)
    folder.rename(tmp_path / ".replaced-step-1")  # as a kill between the two renames leaves it
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == ["step-1"]
    assert manifest.damage(folder) is None


class Gate:
    """Holds the writer back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.threads: list[str] = []
        save = checkpoint.save

        def gated(*arguments: Any) -> Path:
            self.threads.append(threading.current_thread().name)
            assert self.open.wait(30)
            return save(*arguments)

        monkeypatch.setattr(checkpoint, "save", gated)


def test_saves_what_was_there_while_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    live = tensors(1)
    with CheckpointSaver(tmp_path, CheckpointConfig(), "") as saver:
        saver.save(RunState(step=1), live)
        for tensor in live.values():
            tensor.zero_()
        saver.poll()  # does not wait
        assert not tmp_path.joinpath("step-1").exists()
        second = threading.Thread(target=saver.save, args=(RunState(step=2), live))
        second.start()
        second.join(0.2)
        assert second.is_alive(), "a save waits for the one before"
        gate.open.set()
        second.join()
    assert gate.threads == ["checkpoint", "checkpoint"]
    got = tensors(0)
    for step, want in ((1, tensors(1)), (2, live)):
        checkpoint.load(tmp_path / f"step-{step}", got)
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_background_writing_changes_no_bit(tmp_path: Path, asynchronous: bool) -> None:
    made = []
    for folder, stops in ((tmp_path / "whole", [7]), (tmp_path / "parts", [3, 7])):
        for steps in stops:
            every = {"every": 1, "asynchronous": asynchronous}
            trainer = Trainer(config(folder, train={"steps": steps, "eval_sequences": 0}, checkpoint=every))
            trainer.fit()
        made.append(trainer.engine.tensors())
        saved = {name: torch.empty_like(tensor) for name, tensor in made[-1].items()}
        checkpoint.load(folder / "run" / "checkpoints" / "step-7", saved)
        assert all(torch.equal(saved[name], tensor) for name, tensor in made[-1].items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def fail_saves(monkeypatch: pytest.MonkeyPatch, error: BaseException, fails: Callable[[int], bool]) -> None:
    """The saves whose number `fails` end halfway through with the error, as torch passes it on."""
    save, calls = dcp.save, []

    def failing(state: dict[str, Tensor], **options: Any) -> Any:
        calls.append(0)
        if not fails(len(calls)):
            return save(state, **options)
        (Path(options["storage_writer"].path) / "__0_0.distcp").write_bytes(b"half")
        raise CheckpointException("save", {0: _wrap_exception(error)})

    monkeypatch.setattr(dcp, "save", failing)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_full_disk_costs_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asynchronous: bool
) -> None:
    fail_saves(monkeypatch, NO_ROOM, lambda call: call in (2, 3))
    every = {"every": 2, "keep_latest": 1, "asynchronous": asynchronous}
    Trainer(config(tmp_path, train={"steps": 8}, checkpoint=every)).fit()
    output = capsys.readouterr().out
    root = tmp_path / "run" / "checkpoints"
    for step in (4, 6):
        reason = "No space left on device; step-2 stays the newest; going on"
        assert f"checkpoint of step {step} not written to {root}: {reason}" in output
    assert names(root) == ["step-8"]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_full_disk_at_the_end_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asynchronous: str
) -> None:
    fail_saves(monkeypatch, NO_ROOM, lambda call: call == 2)
    path = write_config(tmp_path, train={"steps": 4}, checkpoint={"every": 2})
    assert cli.main(["train", str(path), f"--checkpoint.asynchronous={asynchronous}"]) == 2
    root = tmp_path / "run" / "checkpoints"
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"dsv3rt: error: checkpoint of step 4 not written to {root}: No space left on device; step-2 stays the newest"
    )
    assert names(root) == ["step-2"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), RuntimeError("odd\nstory")])
def test_other_errors_of_the_writer_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    fail_saves(monkeypatch, error, lambda call: call == 1)
    path = write_config(tmp_path, train={"steps": 30}, checkpoint={"every": 1})
    assert cli.main(["train", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    reason = "Input/output error" if isinstance(error, OSError) else "RuntimeError: odd"
    assert line.endswith(f"checkpoint of step 1 not written to {tmp_path}/run/checkpoints: {reason}; "
                         "there is no older one")  # fmt: skip
    assert names(tmp_path / "run" / "checkpoints") == []


# No file may grow past 100 kB: a checkpoint does, the other files of a run do not.
LIMITED = """
import resource, sys
from dsv3rt import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(cli.main(sys.argv[1:]))
"""


def test_files_that_cannot_grow(tmp_path: Path) -> None:
    """The system's own refusal, through torch's writer: step 4 is passed over, the last one stops the run."""
    every = {"every": 2}
    Trainer(config(tmp_path / "whole", train={"steps": 6, "eval_every": 2}, checkpoint=every)).fit()
    folder = tmp_path / "full"
    Trainer(config(folder, train={"steps": 2, "eval_every": 2}, checkpoint=every)).fit()
    root = folder / "run" / "checkpoints"
    assert (root / "step-2" / "__0_0.distcp").stat().st_size > 100_000
    path = write_config(folder, train={"steps": 6, "eval_every": 2}, checkpoint=every)
    process = start("-c", LIMITED, "train", str(path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    lines = output.splitlines()
    assert sum("checkpoint of step 4 not written to" in line and line.endswith("going on") for line in lines) == 1
    assert lines[-1].startswith(f"dsv3rt: error: checkpoint of step 6 not written to {root}: File too large; step-2")
    assert "Traceback" not in output
    assert names(root) == ["step-2"]
    assert cli.main(["train", str(path)]) == 0
    assert losses(folder) == losses(tmp_path / "whole")

"""The average of the weights: what it is of, how often it follows them, and that nothing interrupts it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch import Tensor
from train_helpers import config

from dsv3rt import Trainer
from dsv3rt.train.average import Average, _start
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.engine import Engine

DECAY = 0.9


def parts(engine: Engine, kind: str) -> dict[str, Tensor]:
    """Copies of the tensors of parameters, by the parameters' names."""
    tensors = engine.tensors()
    averaged = [name.removeprefix("ema.") for name in tensors if name.startswith("ema.")]
    return {name: tensors[f"{kind}.{name}"].clone() for name in averaged}


def turns(engine: Engine, every: int) -> dict[str, int]:
    """The remainder of the updates that each parameter follows; all here are of one piece."""
    return {name: index % every for index, name in enumerate(engine.optimizer.masters())}


@pytest.mark.parametrize("every", [1, 3])
def test_average_is_the_closed_form(tmp_path: Path, every: int) -> None:
    """Of the masters of every so many updates, each older one weighed by the decay of `every` updates."""
    engine = Trainer(config(tmp_path, optim={"ema_decay": DECAY, "ema_every": every})).engine
    seen, averages, state = [parts(engine, "model")], [parts(engine, "ema")], RunState()
    assert seen[0].keys() == {name for name, _ in engine.model.named_parameters()}
    for _ in range(8):
        _, state = engine.step(state)
        seen.append(parts(engine, "model"))
        averages.append(parts(engine, "ema"))
    decay = DECAY**every
    for name, turn in turns(engine, every).items():
        average = averages[0][name]
        assert torch.equal(average, seen[0][name])
        followed = [step for step in range(1, 9) if step % every == turn]
        for step in range(1, 9):
            if step in followed:
                average.lerp_(seen[step][name], 1 - decay)
            assert torch.equal(averages[step][name], average), (step, name)
        last = len(followed)
        exact = decay**last * seen[0][name].double()
        for number, step in enumerate(followed, start=1):
            exact += (1 - decay) * decay ** (last - number) * seen[step][name].double()
        # A difference, a product and a sum round in FP32, each time; the largest weights here are of size one.
        torch.testing.assert_close(average.double(), exact, rtol=0, atol=last * 2**-22)


def test_average_counts_updates_and_not_steps(tmp_path: Path) -> None:
    """A step that updates nothing is none: half of the parameters follow the second update, which is the third
    step's."""
    engine = Trainer(config(tmp_path, optim={"ema_decay": DECAY, "ema_every": 2})).engine
    _, state = engine.step(RunState())
    after_one = parts(engine, "ema")
    _, state = engine.step(replace(state, step=2, skipped_steps=1))
    after_two = parts(engine, "ema")
    assert state.step == 3
    masters = parts(engine, "model")
    for name, turn in turns(engine, 2).items():
        expected = after_one[name] if turn else after_one[name].lerp_(masters[name], 1 - DECAY**2)
        assert torch.equal(after_two[name], expected), name


@pytest.mark.parametrize("stops", [[7], [1, 2, 4, 7]], ids=str)
def test_average_resumes_bitwise(tmp_path: Path, stops: list[int]) -> None:
    """From checkpoints between the updates that it follows, too; the saver copies while steps go on."""
    run = config(tmp_path, checkpoint={"every": 1}, optim={"ema_decay": DECAY, "ema_every": 3})
    engine = Trainer(replace(run, train=replace(run.train, run_dir=str(tmp_path / "none")))).engine
    state = RunState()
    for _ in range(7):
        _, state = engine.step(state)
    for steps in stops:
        trainer = Trainer(replace(run, train=replace(run.train, steps=steps)))
        trainer.fit()
    for name, tensor in engine.tensors().items():
        assert torch.equal(trainer.engine.tensors()[name], tensor), name


def test_average_may_follow_more_often_after_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps, every in ((2, 2), (4, 1)):
        optim = {"ema_decay": DECAY, "ema_every": every}
        assert Trainer(config(tmp_path, train={"steps": steps}, optim=optim)).fit()
    assert "step-2 (changed since: optim.ema_every, train.steps)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ema_every", 0, r"optim\.ema_every must be positive, got 0"),
        ("ema_every", 1.5, r"optim\.ema_every: must be an integer, got 1\.5"),
        ("ema_decay", 1.0, r"optim\.ema_decay must be in \[0, 1\), got 1\.0"),
    ],
)
def test_average_rejects_bad_settings(tmp_path: Path, key: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        config(tmp_path, optim={key: value})


def test_workers_take_a_core_each() -> None:
    """And nobody else's number changes, that of threads that start later included."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    pool, all_there = _start(3), Barrier(3)

    def ask() -> int:
        all_there.wait()
        return torch.get_num_threads()

    assert [one.result() for one in [pool.submit(ask) for _ in range(3)]] == [1, 1, 1]
    assert torch.get_num_threads() == 2
    assert ThreadPoolExecutor(1).submit(torch.get_num_threads).result() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [2, 5])
def test_average_is_the_same_by_any_number_of_workers(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    masters = {"a": torch.randn(100_003), "none": torch.empty(0, 3), "b": torch.randn(5, 13_107)}
    alone = Average(masters, decay=0.3)
    monkeypatch.setattr("dsv3rt.train.average.PIECE", 1001)
    before = torch.get_num_threads()
    torch.set_num_threads(workers)
    together = Average(masters, decay=0.3)
    torch.set_num_threads(before)
    for number in range(1, 21):
        for average in (alone, together):
            average.release_masters()
        for master in masters.values():
            master += 1.0
        for average in (alone, together):
            average.update(number)
    for name, value in alone.tensors().items():
        assert torch.equal(together.tensors()[name], value)


def test_errors_of_workers_reach_the_training() -> None:
    average = Average({"w": torch.ones(4)}, decay=0.5)
    average.tensors()["w"].resize_(5)
    average.update(1)
    with pytest.raises(RuntimeError, match="size of tensor"):
        average.release_masters()

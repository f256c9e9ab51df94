"""Bad numbers skip a step, spikes are seen and rolled back, and neither disturbs a resumed run."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_helpers import config, losses, rows

from dsv3rt import Trainer
from dsv3rt.config import GuardConfig
from dsv3rt.train import checkpoint, guards
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.engine import StepResult

BATCH = 4


class Positions:
    """The training samples, keeping note of which were asked for."""

    def __init__(self, trainer: Trainer) -> None:
        self.samples = trainer.engine.samples
        self.seen: list[int] = []

    def batch(self, position: int, count: int) -> tuple[Tensor, Tensor]:
        self.seen += range(position, position + count)
        return self.samples.batch(position, count)


def poison(trainer: Trainer, kind: str, bad: Callable[[RunState], bool]) -> None:
    """Make the loss, or the gradient alone, NaN in the steps that begin at a state that is `bad`."""
    step = trainer.engine.step
    norm = trainer.engine.tensors()["model.norm.weight"]
    parameter = next(trainer.engine.model.parameters())

    def poisoned(state: RunState) -> tuple[StepResult, RunState]:
        if not bad(state):
            return step(state)
        right = norm.clone()
        hook = parameter.register_hook(lambda grad: grad * math.nan if kind == "grad" else grad)
        if kind == "loss":
            norm.fill_(math.nan)
        result = step(state)
        hook.remove()
        norm.copy_(right)
        return result

    trainer.engine.step = poisoned  # type: ignore[method-assign]


def raise_loss(trainer: Trainer, spikes: Callable[[RunState], bool], loss: float = 1e6) -> None:
    """Report another loss for the steps that begin at a state that `spikes`."""
    step = trainer.engine.step

    def spiking(state: RunState) -> tuple[StepResult, RunState]:
        result, after = step(state)
        return (replace(result, loss=loss) if spikes(state) else result), after

    trainer.engine.step = spiking  # type: ignore[method-assign]


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def result(loss: float, skipped: str = "") -> StepResult:
    return StepResult(loss, 0.0, 0.0, 1.0, 1e-3, None, 128, 1.0, skipped)


@pytest.mark.parametrize("kind", ["loss", "grad"])
def test_bad_step_is_skipped_counted_and_told(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(config(tmp_path, train={"steps": 6}))
    poison(trainer, kind, lambda state: state.step in (2, 4))
    trainer.fit()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    got = [json.loads(line, parse_constant=no_constant) for line in lines]
    assert [row["skipped_steps"] for row in got] == [0, 0, 0, 1, 1, 2, 2]
    assert [row["step"] for row in got if row.get("skipped")] == [3, 5]
    assert all((row["loss"] is None) == (kind == "loss") for row in (got[3], got[5]))
    assert all(row["grad_norm"] is None for row in (got[3], got[5]))
    assert all(math.isfinite(row["loss"]) for row in (got[2], got[4], got[6]))
    output = capsys.readouterr().out
    what = "loss" if kind == "loss" else "gradient norm"
    assert f"step 3: the {what} is nan; skipped, 1 in a row, 1 in all" in output
    assert f"step 5: the {what} is nan; skipped, 1 in a row, 2 in all" in output
    state, _ = checkpoint.read_state(tmp_path / "run" / "checkpoints" / "step-6")
    assert (state.skipped_steps, state.skips_in_a_row, state.samples) == (2, 0, 6 * BATCH)


def test_too_many_in_a_row_stop_the_run(tmp_path: Path) -> None:
    """2 may be skipped, the third in a row stops; two and two with a good one between do not."""
    trainer = Trainer(config(tmp_path, train={"steps": 12}, guard={"max_skipped": 2}))
    poison(trainer, "loss", lambda state: state.step in (1, 2, 4, 5, 7, 8, 9))
    with pytest.raises(FloatingPointError, match=r"^step 10: the loss is nan, and 2 steps in a row were skipped"):
        trainer.fit()
    assert [row["step"] for row in rows(tmp_path)] == list(range(10))


def test_skipped_steps_resume_bitwise(tmp_path: Path) -> None:
    """Also from a checkpoint between two skips; none is written while steps are being skipped, but right after."""
    bad, every = {2, 4, 5}, {"every": 3, "keep_latest": 0}
    for folder, stops in ((tmp_path / "whole", [9]), (tmp_path / "parts", [5, 9])):
        for steps in stops:
            trainer = Trainer(config(folder, train={"steps": steps, "eval_sequences": 0}, checkpoint=every))
            poison(trainer, "grad", lambda state: state.step in bad)
            trainer.fit()
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert names(tmp_path / "whole") == ["step-4", "step-7", "step-9"]
    assert names(tmp_path / "parts") == ["step-4", "step-5", "step-7", "step-9"]


def test_guards_need_no_further_host_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, gradient norm, expert load: one read, good or bad."""
    trainer = Trainer(config(tmp_path))
    poison(trainer, "grad", lambda state: state.step == 1)
    trainer.engine.step(RunState())  # what is computed once
    reads: list[str] = []

    def watch(name: str) -> Callable[[Tensor], Any]:
        original = getattr(Tensor, name)

        def watched(self: Tensor) -> Any:
            if "/dsv3rt/train/" in sys._getframe(1).f_code.co_filename:
                reads.append(name)
            return original(self)

        return watched

    for name in ("item", "tolist", "cpu", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(Tensor, name, watch(name))
    counts = []
    for step in (0, 1):
        reads.clear()
        outcome, _ = trainer.engine.step(RunState(step=step))
        assert bool(outcome.skipped) == (step == 1)
        counts.append(sorted(reads))
    assert counts[0] == counts[1] == ["tolist"]


def test_spike_rule_matches_its_definition() -> None:
    """Plain mean and deviation over the first window, exponential after it; a spike counts as the ceiling."""
    guard = GuardConfig(spike_window=8, spike_deviations=3.0)
    rng = random.Random(5)
    state = RunState()
    first = [4.0 + rng.random() for _ in range(8)]
    for loss in first:
        state, spike = guards.judge(guard, state, result(loss))
        assert not spike
    assert state.loss_mean == pytest.approx(statistics.fmean(first))
    assert state.loss_variance == pytest.approx(statistics.pvariance(first))
    ceiling = state.loss_mean + 3.0 * math.sqrt(state.loss_variance)
    _, below = guards.judge(guard, state, result(ceiling - 1e-6))
    high, above = guards.judge(guard, state, result(ceiling + 1e-6))
    higher, far_above = guards.judge(guard, state, result(1e9))
    assert (below, above, far_above) == (False, True, True)
    assert high == higher
    assert high.loss_mean == pytest.approx(state.loss_mean + (ceiling - state.loss_mean) / 8)
    assert not guards.judge(GuardConfig(spike_window=0), state, result(1e9))[1]
    assert not guards.judge(guard, RunState(), result(1e9))[1]


def test_a_lasting_rise_becomes_the_new_level() -> None:
    guard = GuardConfig(spike_window=10, spike_deviations=3.0)
    state, rng = RunState(), random.Random(1)
    for _ in range(50):
        state, _ = guards.judge(guard, state, result(2.0 + 0.1 * rng.random()))
    verdicts = []
    for _ in range(200):
        state, spike = guards.judge(guard, state, result(6.0 + 0.1 * rng.random()))
        verdicts.append(spike)
    assert verdicts[0]
    assert not any(verdicts[-50:])


SPIKES = {"spike_window": 3, "spike_deviations": 100.0}


def test_spike_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(config(tmp_path, train={"steps": 8}, guard=SPIKES))
    raise_loss(trainer, lambda state: state.step == 5)
    trainer.fit()
    assert [row["step"] for row in rows(tmp_path) if row.get("spike")] == [6]
    assert "step 6: loss 1000000.000 is a spike" in capsys.readouterr().out


def test_statistics_resume_bitwise(tmp_path: Path) -> None:
    states = []
    for folder, stops in ((tmp_path / "whole", [9]), (tmp_path / "parts", [2, 5, 9])):
        for steps in stops:
            Trainer(config(folder, train={"steps": steps}, guard={"spike_window": 4})).fit()
        states.append(checkpoint.read_state(folder / "run" / "checkpoints" / "step-9")[0])
    assert states[0] == states[1]
    assert states[0].loss_variance > 0


def test_rollback_leaves_out_the_data_since_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A spike at step 7, the checkpoint is step 4's: samples 16 to 27 are never seen again, all others in order."""
    guard = {**SPIKES, "on_spike": "rollback"}
    trainer = Trainer(config(tmp_path, train={"steps": 8}, checkpoint={"every": 4}, guard=guard))
    raise_loss(trainer, lambda state: state.samples == 24)
    seen = Positions(trainer)
    trainer.engine.samples = seen  # type: ignore[assignment]
    trainer.fit()
    assert seen.seen == [*range(28), *range(28, 28 + 4 * BATCH)]
    assert [row["step"] for row in rows(tmp_path)] == list(range(9))
    output = capsys.readouterr().out
    assert "step 7: loss 1000000.000 is a spike" in output
    assert "step-4; samples 16 to 27 are left out" in output
    last, _ = checkpoint.read_state(tmp_path / "run" / "checkpoints" / "step-8")
    assert (last.rollbacks, last.samples, last.tokens) == (1, 44, 8 * BATCH * 32)

    engine = Trainer(config(tmp_path / "plain")).engine
    state, want = RunState(), []
    for step in range(8):
        outcome, state = engine.step(replace(state, samples=28) if step == 4 else state)
        want.append(outcome.loss)
    assert [row["loss"] for row in rows(tmp_path)[1:]] == want


def test_rollbacks_are_limited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two, then spikes are only logged; before the first checkpoint there is nothing to go back to."""
    guard = {"spike_window": 3, "spike_deviations": 1e4, "on_spike": "rollback", "max_rollbacks": 2}
    trainer = Trainer(config(tmp_path, train={"steps": 8}, checkpoint={"every": 5}, guard=guard))
    raise_loss(trainer, lambda state: state.samples in (12, 20, 24, 28), loss=1e12)
    trainer.fit()
    output = capsys.readouterr().out
    assert output.count("no checkpoint to roll back to yet; going on") == 1
    assert output.count("rolled back to") == 2
    assert [row["step"] for row in rows(tmp_path) if row.get("spike")] == [4, 6]
    assert [row["step"] for row in rows(tmp_path)] == list(range(9))


def test_interrupted_after_a_rollback_it_happens_again(tmp_path: Path) -> None:
    """Killed between a rollback and the next checkpoint, the run comes to the same end."""
    guard = {**SPIKES, "on_spike": "rollback"}

    def run(folder: Path, dies: bool) -> None:
        trainer = Trainer(config(folder, train={"steps": 9}, checkpoint={"every": 4}, guard=guard))
        raise_loss(trainer, lambda state: state.samples == 24)
        step = trainer.engine.step

        def dying(state: RunState) -> tuple[StepResult, RunState]:
            if dies and state.rollbacks and state.step == 6:
                raise RuntimeError("killed")
            return step(state)

        trainer.engine.step = dying  # type: ignore[method-assign]
        trainer.fit()

    run(tmp_path / "whole", dies=False)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", dies=True)
    run(tmp_path / "killed", dies=False)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    states = [checkpoint.read_state(tmp_path / name / "run/checkpoints/step-9")[0] for name in ("whole", "killed")]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_skipped", -1, r"guard\.max_skipped must not be negative"),
        ("spike_window", 1, r"guard\.spike_window must be 0 or at least 2"),
        ("spike_deviations", 0.0, r"guard\.spike_deviations must be positive"),
        ("max_rollbacks", -1, r"guard\.max_rollbacks must not be negative"),
        ("step_timeout_s", -1.0, r"guard\.step_timeout_s must not be negative"),
        ("on_spike", "stop", r"guard\.on_spike: must be 'log' or 'rollback', got 'stop'"),
    ],
)
def test_rejects_bad_settings(tmp_path: Path, key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        config(tmp_path, guard={key: value})


def test_drop_gradients_forgets_the_backward(tmp_path: Path) -> None:
    engine = Trainer(config(tmp_path)).engine
    next(engine.model.parameters()).sum().backward()
    assert engine.optimizer.grad_norm() > 0
    engine.optimizer.drop_gradients()
    assert torch.equal(engine.optimizer.grad_norm(), torch.tensor(0.0))

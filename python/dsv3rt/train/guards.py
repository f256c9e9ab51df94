"""Steps that went wrong: counting skipped ones, and noticing losses that spike. What they remember is in `RunState`."""

from __future__ import annotations

import dataclasses
import math

from dsv3rt.config import GuardConfig
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.engine import StepResult
from dsv3rt.train.progress import say


def judge(config: GuardConfig, state: RunState, result: StepResult) -> tuple[RunState, bool]:
    """`state` (after the step) with the guards' memory brought up to it, and whether the loss was a spike.

    Raises:
        FloatingPointError: the step was skipped as not finite, and so were the `guard.max_skipped` steps before it.
    """
    if result.skipped:
        return _count_skip(config, state, result.skipped), False
    state = dataclasses.replace(state, skips_in_a_row=0)
    ceiling = _ceiling(config, state)
    if result.loss > ceiling:
        say(f"step {state.step}: loss {result.loss:.3f} is a spike, above {ceiling:.3f} (mean {state.loss_mean:.3f})")
        return _remember(config, state, ceiling), True
    return _remember(config, state, result.loss), False


def _count_skip(config: GuardConfig, state: RunState, why: str) -> RunState:
    if state.skips_in_a_row >= config.max_skipped:
        raise FloatingPointError(
            f"step {state.step}: the {why}, and {state.skips_in_a_row} steps in a row were skipped before it "
            "(guard.max_skipped); stopped (lower optim.lr?)"
        )
    counted = dataclasses.replace(state, skipped_steps=state.skipped_steps + 1, skips_in_a_row=state.skips_in_a_row + 1)
    say(f"step {state.step}: the {why}; skipped, {counted.skips_in_a_row} in a row, {counted.skipped_steps} in all")
    return counted


def _ceiling(config: GuardConfig, state: RunState) -> float:
    """The highest loss that is no spike; infinite until a whole window was seen."""
    if config.spike_window == 0 or state.losses_seen < config.spike_window:
        return math.inf
    return state.loss_mean + config.spike_deviations * math.sqrt(state.loss_variance)


def _remember(config: GuardConfig, state: RunState, loss: float) -> RunState:
    """Running mean and variance: plain over the first window, then exponential. A spike counts as the ceiling, so that
    one does not hide the next, and a lasting rise is taken for the new level in the end."""
    if config.spike_window == 0:
        return state
    seen = min(state.losses_seen + 1, config.spike_window)
    weight = 1.0 / seen
    delta = loss - state.loss_mean
    variance = (1.0 - weight) * (state.loss_variance + weight * delta * delta)
    return dataclasses.replace(
        state, losses_seen=seen, loss_mean=state.loss_mean + weight * delta, loss_variance=variance
    )

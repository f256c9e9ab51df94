"""Schedules, and the published recipe as configs/deepseek-v3-671b.toml has it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dsv3rt.config import RunConfig, Segment, TrainConfig
from dsv3rt.train.config_file import load
from dsv3rt.train.schedule import Schedule, batch_sequences

T = 1e12
RECIPE = Path(__file__).resolve().parents[2] / "configs" / "deepseek-v3-671b.toml"


@pytest.fixture(scope="module")
def recipe() -> TrainConfig:
    return load(RECIPE)


@pytest.mark.parametrize(
    ("step", "tokens", "lr"),
    [
        (0, 0, 0.0),
        (1, 12.6e6, 2.2e-4 / 2000),
        (1000, 1e10, 1.1e-4),
        (2000, 2.6e10, 2.2e-4),
        (2001, 2.6e10, 2.2e-4),
        (160_000, 9.999 * T, 2.2e-4),
        (160_000, 10 * T, 2.2e-4),
        (190_000, 12.15 * T, (2.2e-4 + 2.2e-5) / 2),  # halfway down the cosine
        (200_000, (10 + 4.3 / 4) * T, 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi / 4)) / 2),
        (234_000, 14.3 * T, 2.2e-5),
        (235_000, 14.6329 * T, 2.2e-5),
        (236_000, 14.6331 * T, 7.3e-6),
        (242_783, 14.8 * T, 7.3e-6),
    ],
)
def test_recipe_learning_rate(recipe: TrainConfig, step: int, tokens: float, lr: float) -> None:
    assert Schedule(recipe.optim.lr).value(step, tokens) == pytest.approx(lr, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "tokens", "value"),
    [
        ("bias_update_speed", 0, 0.001),
        ("bias_update_speed", 14.299 * T, 0.001),
        ("bias_update_speed", 14.301 * T, 0.0),
        ("balance_alpha", 0, 1e-4),
        ("balance_alpha", 14.8 * T, 1e-4),
        ("mtp_weight", 9.99 * T, 0.3),
        ("mtp_weight", 10.01 * T, 0.1),
        ("batch_size", 0, 3072),
        ("batch_size", 469e9 / 2, (3072 + 15360) / 2),
        ("batch_size", 469e9, 15360),
        ("batch_size", 14.8 * T, 15360),
    ],
)
def test_recipe_schedules(recipe: TrainConfig, name: str, tokens: float, value: float) -> None:
    assert Schedule(getattr(recipe.train, name)).value(2000, tokens) == pytest.approx(value, rel=1e-9)


def test_recipe_steps_reach_the_tokens(recipe: TrainConfig) -> None:
    """Its tokens a step, summed over its steps, are the 14.8T of the paper, and one step fewer falls short."""
    schedule, tokens = Schedule(recipe.train.batch_size), 0
    for step in range(recipe.train.steps):
        last = batch_sequences(schedule, step, tokens, recipe.train.micro_batch_size) * recipe.train.seq_len
        tokens += last
    assert tokens - last < 14.8 * T <= tokens


def test_recipe_other_numbers(recipe: TrainConfig) -> None:
    optim = recipe.optim
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip_grad_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (recipe.model.init_std, recipe.train.seq_len, optim.moment_dtype) == (0.006, 4096, "bfloat16")


def test_value_moves_from_the_previous_segment() -> None:
    schedule = Schedule(
        (
            Segment(4.0, until_steps=10, shape="linear", start=0.0),
            Segment(2.0, until_steps=20, shape="linear"),
            Segment(0.0, until_steps=40, shape="cosine"),
        )
    )
    values = [schedule.value(step, 1e9) for step in (0, 5, 10, 15, 20, 30, 40, 1000)]
    assert values == pytest.approx([0.0, 2.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0])


def test_constant_ignores_position() -> None:
    assert {Schedule((Segment(3.0),)).value(step, step * 1e12) for step in (0, 1, 10**9)} == {3.0}


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 8), (24, 8), (26, 12), (74, 12), (76, 16), (1000, 16)])
def test_batch_is_whole_micro_batches(tokens: int, sequences: int) -> None:
    """The ramp 8 -> 16 by its value, rounded to the nearest multiple of 4."""
    schedule = Schedule((Segment(16, until_tokens=100, shape="linear", start=8), Segment(16)))
    assert batch_sequences(schedule, 0, tokens, 4) == sequences


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((), "at least one segment"),
        ((Segment(1.0), Segment(2.0)), "end somewhere"),
        ((Segment(1.0, shape="cosine"),), "have an end"),
        ((Segment(1.0, until_steps=5, shape="linear"),), "have a start"),
        ((Segment(1.0, until_steps=5), Segment(0.0, until_tokens=9, shape="cosine")), "unit of the segment before"),
        ((Segment(1.0, until_tokens=5), Segment(0.0, until_steps=9)), "end at until_tokens"),
        ((Segment(1.0, until_tokens=5), Segment(0.0, until_tokens=5)), "after the segment before"),
    ],
)
def test_rejects_bad_segments(segments: tuple[Segment, ...], message: str) -> None:
    with pytest.raises(ValueError, match=rf"train\.mtp_weight.*{message}"):
        RunConfig(mtp_weight=segments)


@pytest.mark.parametrize("arguments", [{"value": -1.0}, {"value": math.nan}, {"value": 1.0, "start": math.inf}])
def test_rejects_bad_numbers(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"segment\.(value|start) must be a finite number"):
        Segment(**arguments)  # type: ignore[arg-type]

"""One step: micro batches sum to the batch, schedules reach the model, bad numbers stop it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import config

from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.data import Samples
from dsv3rt.train.engine import Engine, StepResult


def engine(folder: Path, **sections: dict[str, Any]) -> Engine:
    tokens = torch.randint(0, 258, (2000,), generator=torch.Generator().manual_seed(3)).numpy().astype("uint16")
    run = config(folder, **sections)
    return Engine(run, Samples(tokens, run.train.seq_len, run.train.seed))


def run_steps(made: Engine, steps: int) -> tuple[list[StepResult], RunState]:
    state, results = RunState(), []
    for _ in range(steps):
        result, state = made.step(state)
        results.append(result)
    return results, state


def test_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    """Losses, gradients, updated parameters and router biases; the tolerance is that of another order of FP32 sums."""
    schedules = {"batch_size": 8, "balance_alpha": 0.01, "bias_update_speed": 0.01}
    optim = {"lr": 1e-3, "moment_dtype": "float32", "eps": 1e-4}
    made = [engine(tmp_path, train={**schedules, "micro_batch_size": size}, optim=optim) for size in (8, 2, 1)]
    results = [run_steps(one, 3) for one in made]
    for other, (other_results, other_state) in zip(made[1:], results[1:], strict=True):
        assert other_state == results[0][1]
        for got, want in zip(other_results, results[0][0], strict=True):
            assert got.loss == pytest.approx(want.loss, rel=1e-5)
            assert got.mtp_loss == pytest.approx(want.mtp_loss, rel=1e-5)
            assert got.balance_loss == pytest.approx(want.balance_loss, rel=1e-4)
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
            assert got.max_expert_load == want.max_expert_load  # the whole batch's counts, exactly
        for name, tensor in other.tensors().items():
            torch.testing.assert_close(tensor, made[0].tensors()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_same_seed_same_run_other_seed_other_run(tmp_path: Path) -> None:
    one, two, other = (run_steps(engine(tmp_path, train={"seed": seed}), 2)[0] for seed in (1, 1, 2))
    assert one == two != other


def test_router_bias_follows_gamma(tmp_path: Path) -> None:
    gamma = [{"value": 0.01, "until_steps": 1}, {"value": 0.0}]
    made = engine(tmp_path, train={"bias_update_speed": gamma})
    biases = [tensor for name, tensor in made.tensors().items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2  # the MoE block and the MTP block
    _, state = made.step(RunState())
    after_one = [bias.clone() for bias in biases]
    assert all(bias.abs().max() == torch.tensor(0.01) for bias in after_one)
    made.step(state)
    assert all(torch.equal(bias, old) for bias, old in zip(biases, after_one, strict=True))


def test_batch_ramp_counts_tokens_and_samples(tmp_path: Path) -> None:
    ramp = [{"value": 8, "start": 4, "until_tokens": 4 * 32 * 2, "shape": "linear"}, {"value": 8}]
    results, state = run_steps(engine(tmp_path, train={"batch_size": ramp}), 3)
    assert [result.tokens // 32 for result in results] == [4, 6, 8]
    assert state == RunState(step=3, tokens=18 * 32, samples=18)


def test_learning_rate_is_that_of_the_steps_end(tmp_path: Path) -> None:
    lr = [{"value": 0.4, "start": 0.0, "until_steps": 4, "shape": "linear"}, {"value": 0.4}]
    results, _ = run_steps(engine(tmp_path, optim={"lr": lr}), 2)
    assert [result.lr for result in results] == pytest.approx([0.1, 0.2])


def test_mtp_weight_zero_skips_mtp(tmp_path: Path) -> None:
    made = engine(tmp_path, train={"mtp_weight": 0.0})
    before = {name: tensor.clone() for name, tensor in made.tensors().items()}
    (result,), _ = run_steps(made, 1)
    assert result.mtp_loss == 0.0
    assert result.max_expert_load is not None
    changed = {name for name, tensor in made.tensors().items() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith("model.layers.2.") for name in changed)
    assert "model.layers.1.mlp.gate.weight" in changed


@pytest.mark.parametrize(("poison", "what"), [("loss", "loss"), ("grad", "gradient norm")])
def test_bad_numbers_update_nothing(tmp_path: Path, poison: str, what: str) -> None:
    """Neither parameters nor moments nor router biases; and the next step is as if the bad one's data were absent."""
    made, other = engine(tmp_path), engine(tmp_path)
    _, state = run_steps(made, 2)
    run_steps(other, 2)
    norm = made.tensors()["model.norm.weight"]
    right = norm.clone()
    parameter = next(made.model.parameters())
    hook = parameter.register_hook(lambda grad: grad * float("inf") if poison == "grad" else grad)
    before = {name: tensor.clone() for name, tensor in made.tensors().items()}
    if poison == "loss":
        norm.fill_(float("nan"))
    result, after = made.step(state)
    hook.remove()
    norm.copy_(right) if poison == "loss" else None
    assert re.fullmatch(f"{what} is (nan|inf)", result.skipped)
    assert after == replace(state, step=3, tokens=3 * 4 * 32, samples=12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.tensors().items())
    good, _ = made.step(replace(after, skipped_steps=1))
    want, _ = other.step(replace(state, samples=12))  # the third update, on the fourth batch
    assert (good.loss, good.grad_norm, good.skipped) == (want.loss, want.grad_norm, "")
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in made.tensors().items())


def test_evaluation_ignores_micro_batches_and_training(tmp_path: Path) -> None:
    made = [engine(tmp_path, train={"micro_batch_size": size}) for size in (1, 4)]
    values = [one.evaluate(one.samples, limit=6) for one in made]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0] != made[0].evaluate(made[0].samples, limit=5)
    assert made[0].evaluate(made[0].samples, limit=0) is None


def test_bf16_parameters_train_on_fp32_masters(tmp_path: Path) -> None:
    made = engine(tmp_path, train={"dtype": "bfloat16"})
    run_steps(made, 2)
    tensors = made.tensors()
    for name, parameter in made.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert tensors[f"model.{name}"].dtype == torch.float32
        assert torch.equal(parameter, tensors[f"model.{name}"].bfloat16())

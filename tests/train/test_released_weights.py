"""Training in FP8 without copies of the weights in BF16: the numbers are the same to the bit, the memory is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fp8_training import MODEL, TRAIN
from torch import Tensor, nn
from train_helpers import config, write_config

from dsv3rt import Trainer, cli, hf
from dsv3rt.config import ModelConfig, OptimConfig
from dsv3rt.infer.generate import GenerateOptions, generate
from dsv3rt.layers import fp8, main_grad
from dsv3rt.layers.precision import set_precision
from dsv3rt.layers.weights import Orientations, WeightCast, casts_of, is_released, release_copies, weight_bytes
from dsv3rt.model.transformer import Transformer
from dsv3rt.ops.types import QuantTensor
from dsv3rt.train import engine as engine_module
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.data import Samples
from dsv3rt.train.engine import Engine, StepResult
from dsv3rt.train.optimizer import AdamW

Make = Callable[..., Engine]


def released(folder: Path, **changes: Any) -> Engine:
    torch.manual_seed(3)
    tokens = (torch.randint(1, 4, (4000,)).cumsum(0) % 64).numpy().astype("uint16")
    run = config(folder, model=MODEL, train={**TRAIN, "dtype": "bfloat16", **changes}, optim={"lr": 3e-3})
    return Engine(run, Samples(tokens, run.train.seq_len, run.train.seed))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes engines whose optimizer knows of no casts: copies stay, and forwards cast them where they have changed."""

    def make(folder: Path, **changes: Any) -> Engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "casts_of", lambda model: [])
            made = released(folder, **changes)
        assert not any(map(is_released, made.model.parameters()))
        return made

    return make


def run_steps(made: Engine, state: RunState, steps: int) -> tuple[list[StepResult], RunState]:
    results = []
    for _ in range(steps):
        result, state = made.step(state)
        results.append(result)
    return results, state


def storage_bytes(tensors: list[Tensor]) -> int:
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def in_fp8(model: nn.Module) -> set[int]:
    return {id(weight) for cast in casts_of(model) for weight in cast.weights}


def assert_released(made: Engine) -> None:
    weights = in_fp8(made.model)
    assert len(weights) > 20
    for parameter in made.model.parameters():
        assert is_released(parameter) == (id(parameter) in weights)


def test_steps_are_the_same_to_the_bit(tmp_path: Path, kept: Make) -> None:
    """Also evaluations between them, and the state that is left."""
    ours, theirs = released(tmp_path), kept(tmp_path)
    states = RunState(), RunState()
    for _ in range(3):
        assert_released(ours)
        (got, states_0), (want, states_1) = run_steps(ours, states[0], 2), run_steps(theirs, states[1], 2)
        states = states_0, states_1
        assert got == want
        assert ours.evaluate(ours.samples, 4) == theirs.evaluate(theirs.samples, 4)
    for name, tensor in theirs.tensors().items():
        assert torch.equal(ours.tensors()[name], tensor), name


def test_memory_is_that_of_the_casts(tmp_path: Path, kept: Make) -> None:
    """Of weights in FP8 nothing is left but two codes a number, their scales, and a NaN that stands for the rest."""
    ours, theirs = released(tmp_path), kept(tmp_path)
    run_steps(ours, RunState(), 2)
    run_steps(theirs, RunState(), 2)
    held = []
    for made in (ours, theirs):
        casts = casts_of(made.model)
        quants = [q for cast in casts for q in cast.of(*cast.weights) if q is not None]
        parts = [part for q in quants for part in (q.data, q.scale)]
        held.append(storage_bytes([*made.model.parameters(), *parts]))
    count = len(in_fp8(ours.model))
    assert held[0] == weight_bytes(ours.model) + 2 * count
    numel = sum(p.numel() for p in ours.model.parameters() if id(p) in in_fp8(ours.model))
    assert held[1] - held[0] == 2 * (numel - count)
    assert held[0] < storage_bytes(list(theirs.model.parameters())) + numel  # two bytes a number and its scales


def test_one_orientation_changes_no_bit_and_saves_a_byte(tmp_path: Path) -> None:
    """With the copies released and without, as by FP32 parameters; put off and computed again."""
    one, two = (released(tmp_path, weight_orientations=number) for number in (1, 2))
    assert run_steps(one, RunState(), 3) == run_steps(two, RunState(), 3)
    assert_released(one)
    numbers = {id(p): p.numel() for p in one.model.parameters()}
    saved = weight_bytes(two.model) - weight_bytes(one.model)
    assert 1.0 < saved / sum(numbers[number] for number in in_fp8(one.model)) < 1.01
    for cast in casts_of(one.model):
        assert cast.of(*cast.weights)[1] is None
    plain = [
        run_steps(released(tmp_path, weight_orientations=number, dtype="float32", recompute=["mla_up", "swiglu"]),
                  RunState(), 2)[0] for number in (1, 2)
    ]  # fmt: skip
    assert plain[0] == plain[1]


def test_weight_bytes_counts_models_without_memory(tmp_path: Path) -> None:
    made = released(tmp_path)
    model = Transformer(made.config.model, dtype=torch.bfloat16, device="meta")
    assert weight_bytes(model) == 2 * sum(p.numel() for p in model.parameters())
    set_precision(model, "fp8")
    assert weight_bytes(model) == weight_bytes(made.model)


def test_fp32_masters_are_not_released(tmp_path: Path) -> None:
    made = released(tmp_path, dtype="float32")
    run_steps(made, RunState(), 1)
    assert not any(map(is_released, made.model.parameters()))


def test_loading_goes_on_to_the_bit(tmp_path: Path, kept: Make) -> None:
    first = released(tmp_path)
    _, state = run_steps(first, RunState(), 2)
    others = released(tmp_path), kept(tmp_path)
    for other in others:
        for name, tensor in other.tensors().items():
            tensor.copy_(first.tensors()[name])
        other.optimizer.write_parameters()
    assert_released(others[0])
    want, _ = run_steps(first, state, 3)
    assert [run_steps(other, state, 3)[0] for other in others] == [want, want]


def test_trainer_resumes_to_the_bit(tmp_path: Path) -> None:
    """Saved while released, loaded into released weights."""
    losses = []
    for name, stops in (("once", (6,)), ("twice", (3, 6))):
        for steps in stops:
            folder = tmp_path / name
            train = {**TRAIN, "dtype": "bfloat16", "steps": steps, "run_dir": str(folder / "run"), "eval_sequences": 0}
            trainer = Trainer(config(folder, model=MODEL, train=train, optim={"lr": 3e-3}))
            trainer.fit()
            assert_released(trainer.engine)
        losses.append([line.split('"loss": ')[1][:12] for line in trainer.run.metrics.read_text().splitlines()[1:]])
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]


def test_skipped_steps_keep_the_casts(tmp_path: Path, kept: Make) -> None:
    results = []
    for made in (released(tmp_path), kept(tmp_path)):
        _, state = run_steps(made, RunState(), 1)
        hook = next(made.model.parameters()).register_hook(lambda grad: grad * float("inf"))
        bad, state = made.step(state)
        hook.remove()
        assert bad.skipped
        results.append(run_steps(made, replace(state, skipped_steps=1), 2)[0])
    assert results[0] == results[1]


def test_idle_parameters_keep_their_casts(tmp_path: Path, kept: Make) -> None:
    """The MTP block rests for two steps."""
    weight = [{"value": 0.3, "until_steps": 1}, {"value": 0.0, "until_steps": 3}, {"value": 0.3}]
    ours, theirs = released(tmp_path, mtp_weight=weight), kept(tmp_path, mtp_weight=weight)
    _, state = run_steps(ours, RunState(), 1)
    run_steps(theirs, RunState(), 1)
    before = [cast.of(*cast.weights) for cast in casts_of(ours.model.layers[-1])]
    rest, state = run_steps(ours, state, 2)
    after = [cast.of(*cast.weights) for cast in casts_of(ours.model.layers[-1])]
    assert len(before) > 4
    assert all(one is other for one, other in zip(before, after, strict=True))
    last, _ = run_steps(ours, state, 2)
    assert [*rest, *last] == run_steps(theirs, replace(state, step=1, tokens=256, samples=4), 4)[0]
    assert_released(ours)


def test_sampling_needs_restored_weights_and_changes_nothing(tmp_path: Path, kept: Make) -> None:
    ours, theirs = released(tmp_path), kept(tmp_path)
    _, state = run_steps(ours, RunState(), 2)
    run_steps(theirs, RunState(), 2)
    options = GenerateOptions(5, 0.0, 1.0, 0, None)
    with pytest.raises(ValueError, match=r"^weight of shape .* must be restored before it is read as bfloat16"):
        generate(ours.model, [[1, 2, 3]], options)
    with pytest.raises(ValueError, match=r"^hf\.save: model must hold its weights .*, got layers\.0\..* in FP8 alone$"):
        hf.save(ours.model, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"^precision: model must hold its weights"):
        set_precision(ours.model, "bf16")
    ours.optimizer.restore_weights()
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert generate(ours.model, [[1, 2, 3]], options) == generate(theirs.model, [[1, 2, 3]], options)
    hf.save(ours.model, tmp_path / "hf")
    ours.optimizer.release_weights()
    assert_released(ours)
    assert run_steps(ours, state, 2) == run_steps(theirs, state, 2)


def test_updates_of_restored_weights_release_them(tmp_path: Path, kept: Make) -> None:
    ours, theirs = released(tmp_path), kept(tmp_path)
    ours.optimizer.restore_weights()
    assert run_steps(ours, RunState(), 2) == run_steps(theirs, RunState(), 2)
    assert_released(ours)


def test_completions_after_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = {**TRAIN, "dtype": "bfloat16", "steps": 1, "sample_prompts": ["ab"], "sample_tokens": 4}
    model = {name: value for name, value in MODEL.items() if value is not None}
    assert cli.main(["train", str(write_config(tmp_path, model=model, train=run))]) == 0
    assert "--- completion of 'ab'" in capsys.readouterr().out


@pytest.mark.parametrize("orientations", [1, 2])
def test_models_that_nobody_updates_can_do_without_copies(orientations: Orientations) -> None:
    """Losses and all gradients to the bit."""
    found = []
    for without in (False, True):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**MODEL), dtype=torch.bfloat16)
        set_precision(model, "fp8", orientations=orientations)
        if without:
            release_copies(model)
        tokens_BT = torch.randint(0, 64, (2, 33))
        loss = model(tokens_BT[:, :-1], tokens_BT[:, 1:], mtp_weight=0.3).loss
        loss.backward()
        sums = [main_grad.of(p).grad if p.grad is None else p.grad for p in model.parameters()]
        assert all(one is not None for one in sums)
        assert sum(map(is_released, model.parameters())) == (len(in_fp8(model)) if without else 0)
        found.append([loss.detach(), *sums])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_changes_of_released_weights_are_errors() -> None:
    weight, cast = nn.Parameter(torch.randn(128, 128).bfloat16()), WeightCast()
    optimizer = AdamW([("w", weight)], OptimConfig(), casts=[_bound(cast, weight)])
    x = torch.randn(4, 128).bfloat16()
    y = fp8.linear(x, (cast, (weight,)), None, keep_input=False)
    assert is_released(weight)
    assert weight.isnan().all(), "whoever reads it all the same sees it"
    with pytest.raises(RuntimeError), torch.no_grad():
        weight.mul_(2.0)
    optimizer.restore_weights()
    assert torch.equal(fp8.linear(x, (cast, (weight,)), None, keep_input=False), y)
    with torch.no_grad():
        weight.mul_(2.0)
    optimizer.release_weights()
    with pytest.raises(ValueError, match="must be restored"):
        fp8.linear(x, (cast, (weight,)), None, keep_input=False)


@pytest.mark.parametrize("updated", [0, 1])
@pytest.mark.parametrize("rows", [(128, 144), (144, 128)], ids=["apart", "in_one_block"])
def test_stacked_weights_of_which_one_rests(rows: tuple[int, int], updated: int) -> None:
    """Where the second begins with a block of its own, the first's codes are not touched."""
    weights = tuple(nn.Parameter(torch.randn(n, 128).bfloat16()) for n in rows)
    cast = WeightCast()
    optimizer = AdamW([("a", weights[0]), ("b", weights[1])], OptimConfig(), casts=[_bound(cast, *weights)])
    before = both(cast, weights)
    codes = [q.data.clone() for q in before]
    optimizer.gradients.add(weights[updated], torch.randn(weights[updated].shape))
    optimizer.step(1, 1.0, optimizer.grad_norm())
    assert all(map(is_released, weights))
    after = both(cast, weights)
    in_place = after[0] is before[0]
    assert in_place == (rows[0] % 128 == 0), "written in place"
    assert not any(torch.equal(q.data, old) for q, old in zip(after, codes, strict=True))
    if in_place:
        rest = slice(0, rows[0]) if updated else slice(rows[0], None)
        assert torch.equal(after[0].data[rest], codes[0][rest])
        assert torch.equal(after[1].data[:, rest], codes[1][:, rest])
    optimizer.restore_weights()
    want = both(WeightCast(), weights)
    for got, right in zip(after, want, strict=True):
        assert torch.equal(got.data, right.data)
        assert torch.equal(got.scale, right.scale)


def both(cast: WeightCast, weights: tuple[nn.Parameter, ...]) -> tuple[QuantTensor, QuantTensor]:
    w, w_t = cast.of(*weights)
    assert w_t is not None
    return w, w_t


def _bound(cast: WeightCast, *weights: nn.Parameter) -> WeightCast:
    cast.weights = weights
    return cast

"""Training in FP8 on the GPU without copies of the weights in BF16, and by one orientation: the same to the bit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3rt import presets
from dsv3rt.infer.generate import GenerateOptions, generate
from dsv3rt.layers.weights import casts_of, is_released, weight_bytes
from dsv3rt.train import engine as engine_module
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.data import Samples
from dsv3rt.train.engine import Engine
from tests.train.train_helpers import config

pytestmark = pytest.mark.gpu

MODEL = asdict(replace(presets.model("tiny"), dim=512, q_lora_rank=256))
Seen = list[tuple[float, float, float]]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    def one(*, release: bool = True, **changes: Any) -> Engine:
        torch.manual_seed(3)
        tokens = (torch.randint(1, 4, (8000,)).cumsum(0) % 64).numpy().astype("uint16")
        train = {
            "seq_len": 128, "batch_size": 4, "micro_batch_size": 2, "precision": "fp8", "device": "cuda",
            "dtype": "bfloat16", **changes,
        }  # fmt: skip
        run = config(tmp_path, model=MODEL, train=train, optim={"lr": 2e-3})
        with monkeypatch.context() as patch:
            if not release:
                patch.setattr(engine_module, "casts_of", lambda model: [])
            return Engine(run, Samples(tokens, run.train.seq_len, run.train.seed))

    return one


def requested_bytes() -> int:
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def run_steps(made: Engine, steps: int) -> Seen:
    state, seen = RunState(), []
    for _ in range(steps):
        result, state = made.step(state)
        seen.append((result.loss, result.mtp_loss, result.grad_norm))
    return seen


def test_released_weights_train_to_the_same_bits(make: Callable[..., Engine]) -> None:
    """Casts by the optimizer's kernel, against a copy and a cast in the next forward."""
    kept = make(release=False)
    want = run_steps(kept, 5)
    assert run_steps(make(release=False), 5) == want, "the steps themselves are not repeatable"
    ours = make()
    assert run_steps(ours, 5) == want
    for name, tensor in kept.tensors().items():
        assert torch.equal(ours.tensors()[name], tensor), name
    assert run_steps(make(weight_orientations=1), 5) == want
    assert ours.evaluate(ours.samples, 4) == kept.evaluate(kept.samples, 4)
    ours.optimizer.restore_weights()
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), kept.model.parameters(), strict=True))
    options = GenerateOptions(8, 0.0, 1.0, 0, None)
    assert generate(ours.model, [[1, 2, 3]], options) == generate(kept.model, [[1, 2, 3]], options)


@pytest.mark.parametrize("orientations", [1, 2])
def test_released_weights_take_no_memory(make: Callable[..., Engine], orientations: int) -> None:
    """Between steps masters, moments, casts and what is not in FP8 are allocated, and little more: as asked for, since
    the allocator gives a large tensor up to a megabyte that it does not split off."""
    run_steps(make(weight_orientations=orientations), 1)  # what is made once, and kept, is made here
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    before = requested_bytes()
    made = make(weight_orientations=orientations)
    run_steps(made, 2)
    torch._C._cuda_clearCublasWorkspaces()  # 32 MiB for each stream that multiplied
    held = requested_bytes() - before
    state = list(made.tensors().values())
    weights = [weight for cast in casts_of(made.model) for weight in cast.weights]
    assert all(map(is_released, weights))
    counted = sum(tensor.nbytes for tensor in state) + weight_bytes(made.model)
    assert counted <= held < counted + 2**18
    assert sum(weight.numel() for weight in weights) / 4 > 2**18, "copies would be seen"


def test_the_optimizer_makes_no_copies(make: Callable[..., Engine]) -> None:
    """Of weights that the rank keeps whole: a step's update allocates little beside what it holds."""
    made = make()
    state = RunState()
    for _ in range(2):
        _, state = made.step(state)
    numel = sum(weight.numel() for cast in casts_of(made.model) for weight in cast.weights)
    for one in made.optimizer.gradients.sums.values():
        one.shard = torch.zeros_like(one.parameter, dtype=torch.float32)
    norm = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made.optimizer.step(3, 1e-3, norm)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 0.1 * 2 * numel

"""`dsv3rt plan memory`: it counts what a rank really holds, and says who does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fleet import ROOT, configuration

from dsv3rt import cli
from dsv3rt.config import ParallelConfig
from dsv3rt.parallel.memory import plan
from dsv3rt.train.data import Samples
from dsv3rt.train.engine import Engine

V3 = str(ROOT / "configs" / "deepseek-v3-671b.toml")


def test_counts_what_one_process_holds() -> None:
    """Weights, masters and moments are the engine's tensors, to the byte."""
    config = configuration({"train": {"dtype": "bfloat16"}, "optim": {"moment_dtype": "bfloat16"}})
    stream = torch.zeros(2000, dtype=torch.int64).numpy()
    engine = Engine(config, Samples(stream, config.train.seq_len, 0))
    (found,) = plan(config, torch.bfloat16)

    def held(*kind: str) -> int:
        named = [(*name.split(".", 1), tensor) for name, tensor in engine.tensors().items()]
        parameters = dict(engine.model.named_parameters())
        return sum(tensor.nbytes for prefix, name, tensor in named if prefix in kind and name in parameters)

    assert found.weights == sum(p.nbytes for p in engine.model.parameters())
    assert found.gradients == 2 * found.weights
    assert found.masters == held("model")
    assert found.moments == held("exp_avg", "exp_avg_sq")
    assert found.buckets == 0


def test_layouts_divide_the_state() -> None:
    """Over two data-parallel ranks the state halves and the weights stay; recomputation takes activations alone."""
    config = configuration({"train": {"batch_size": 16}})
    (one,) = plan(config, torch.bfloat16)
    (half,) = plan(replace(config, parallel=ParallelConfig(dp=2)), torch.bfloat16)
    assert half.weights == one.weights
    assert half.masters == pytest.approx(one.masters / 2, rel=0.02)  # norms and others of odd length
    fewer = replace(config, train=replace(config.train, recompute=("experts", "mla_up")))
    (again,) = plan(fewer, torch.bfloat16)
    assert again.activations < one.activations
    assert replace(again, activations=one.activations) == one


def test_activations_follow_the_schedule() -> None:
    """1F1B: rank r of 4 holds the activations of 4 - r micro-batches of its stage at most."""
    config = configuration({"model": {"num_layers": 8, "num_dense_layers": 0}})
    config = replace(config, parallel=ParallelConfig(pp=4))
    ranks = list(plan(config, torch.bfloat16))
    (single,) = plan(replace(config, parallel=ParallelConfig()), torch.bfloat16)
    stages = [ranks[rank].activations / (4 - rank) for rank in range(4)]
    assert sum(stages) == pytest.approx(single.activations)
    assert [rank.heads > 0 for rank in ranks] == [False, False, False, True]


def test_deepseek_v3_fits_where_experts_are_recomputed(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["--parallel.pp", "16", "--parallel.dp", "128", "--parallel.ep", "64", "--parallel.schedule", "dualpipev"]
    recompute = '["norm", "mla_up", "swiglu", "experts"]'
    assert cli.main(["plan", "memory", V3, *keys, "--train.recompute", recompute]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2048 ranks: pp 16 (dualpipev) x dp 128, experts over 64; bfloat16; recomputed: norm")
    assert len(lines) == 19
    assert not any("over" in line for line in lines[2:18])
    assert cli.main(["plan", "memory", V3, *keys, "--train.recompute=[]"]) == 1
    assert capsys.readouterr().out.count("  over") == 16


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--gpu-gb", "-1"], "--gpu-gb: must be a positive number, got -1"),
        (["--parallel.ep", "3"], "parallel.ep must divide dp (128), got 3"),
        (["--parallel.pp", "16", "--parallel.dp=128", "--parallel.qq", "3"], "parallel.qq: unknown key"),
    ):
        assert cli.main(["plan", "memory", V3, *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"dsv3rt: error: {message}")

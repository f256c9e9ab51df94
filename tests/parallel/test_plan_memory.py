"""`dsv3rt plan memory`: it counts what a rank really holds, and says who does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fleet import ROOT, configuration

from dsv3rt import cli
from dsv3rt.config import ParallelConfig
from dsv3rt.layers.weights import casts_of, is_released
from dsv3rt.parallel.memory import plan
from dsv3rt.train.checkpoint import RunState
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
    assert replace(again, activations=one.activations, working=one.working) == one


def test_activations_follow_the_schedule() -> None:
    """1F1B: rank r of 4 holds the activations of 4 - r micro-batches of its stage at most."""
    config = configuration({"model": {"num_layers": 8, "num_dense_layers": 0}})
    config = replace(config, parallel=ParallelConfig(pp=4))
    ranks = list(plan(config, torch.bfloat16))
    (single,) = plan(replace(config, parallel=ParallelConfig()), torch.bfloat16)
    stages = [ranks[rank].activations / (4 - rank) for rank in range(4)]
    tables = 4 * config.train.seq_len * config.model.qk_rope_head_dim  # every stage has its own
    assert sum(stages) == pytest.approx(single.activations + 3 * tables)
    assert [rank.heads > 0 for rank in ranks] == [False, False, False, True]


@pytest.mark.parametrize("orientations", [1, 2])
def test_weights_in_fp8_are_their_casts(orientations: int) -> None:
    """To the byte, after a step; what is released of the copies in BF16 does not count, and all of those is."""
    model = {"dim": 128, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64,
             "v_head_dim": 64, "ffn_dim": 128, "expert_dim": 128}  # fmt: skip
    train = {"dtype": "bfloat16", "precision": "fp8", "weight_orientations": orientations}
    config = configuration({"model": model, "train": train})
    stream = torch.zeros(2000, dtype=torch.int64).numpy()
    engine = Engine(config, Samples(stream, config.train.seq_len, 0))
    engine.step(RunState())
    casts = casts_of(engine.model)
    of_casts = sum(t.nbytes for cast in casts for q in cast._cast or () if q is not None for t in (q.data, q.scale))
    others = sum(p.nbytes for p in engine.model.parameters() if not is_released(p))
    (found,) = plan(config, torch.bfloat16)
    assert all(is_released(weight) for cast in casts for weight in cast.weights)
    assert found.weights == of_casts + others


def test_deepseek_v3_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """Where experts are computed again, few weight gradients wait, and experts have room for twice the even load."""
    for schedule in ("zb1p", "dualpipev"):
        assert cli.main(["plan", "memory", V3, "--parallel.schedule", schedule]) == 0
        lines = capsys.readouterr().out.splitlines()
        want = f"2048 ranks: pp 16 ({schedule}) x dp 128, experts over 64; fp8 and bfloat16; recomputed: norm"
        assert lines[0].startswith(want)
        assert len(lines) == 19
        assert lines[1].split()[-3:] == ["reserve", "total", "GB"]
        assert not any("over" in line for line in lines[2:18])
    keys = ["--parallel.schedule", "dualpipev"]
    for change in ("--train.recompute=[]", "--parallel.put_off=0", "--parallel.expert_capacity=0", "--reserve-gb=20"):
        assert cli.main(["plan", "memory", V3, *keys, change]) == 1, change
    assert cli.main(["plan", "memory", V3, *keys, "--reserve-gb=-1"]) == 2


def test_buckets_in_flight_are_few() -> None:
    config = configuration({"train": {"batch_size": 16}, "parallel": {"dp": 2, "bucket_mb": 0.01}})
    (two,) = plan(config, torch.bfloat16)
    (four,) = plan(replace(config, parallel=replace(config.parallel, buckets_in_flight=4)), torch.bfloat16)
    parcel = 0.01 * 2**20
    assert four.buckets - two.buckets == pytest.approx(2 * 2 * parcel, abs=2)
    assert replace(four, buckets=two.buckets) == two


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--gpu-gb", "-1"], "--gpu-gb: must be a positive number, got -1"),
        (["--parallel.ep", "3"], "parallel.ep must divide dp (128), got 3"),
        (["--parallel.pp", "16", "--parallel.dp=128", "--parallel.qq", "3"], "parallel.qq: unknown key"),
    ):
        assert cli.main(["plan", "memory", V3, *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"dsv3rt: error: {message}")

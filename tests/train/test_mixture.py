"""Mixtures: the shares asked for, a source's samples once in each of its epochs, and a place by position alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_helpers import config, losses, sections, write_corpus

from dsv3rt.config import DataConfig, MixturePhase
from dsv3rt.train import config_file
from dsv3rt.train.data import JoinedStream, Samples
from dsv3rt.train.mixture import BLOCK, Mixture, same_past
from dsv3rt.train.tokenise import Job, tokenise
from dsv3rt.train.trainer import Trainer

SEQ_LEN = 4
SIZES = (50, 7, 1200)  # samples an epoch


def sources(sizes: tuple[int, ...] = SIZES) -> list[Samples]:
    """Token t of source s is 100000 * s + t."""
    streams = (np.arange(size * SEQ_LEN + 1) + 100_000 * index for index, size in enumerate(sizes))
    return [Samples(stream, SEQ_LEN, seed=index) for index, stream in enumerate(streams)]


def mixture(*phases: tuple[tuple[float, ...], float | None], seed: int = 0) -> Mixture:
    return Mixture(sources(), [MixturePhase(weights, until) for weights, until in phases], seed)


def places(mixed: Mixture, count: int, first: int = 0) -> list[tuple[int, int]]:
    return [mixed.locate(position) for position in range(first, first + count)]


THREE = ((0.7, 0.05, 0.25), 3000.0 * SEQ_LEN), ((0.0, 1.0, 3.0), 4500.5 * SEQ_LEN), ((1.0, 1.0, 0.0), None)


def test_draws_of_a_source_count_up() -> None:
    """Over phases and blocks, each source is drawn from in its own order without a gap."""
    found = places(mixture(*THREE), 9000)
    for source in range(3):
        draws = [draw for chosen, draw in found if chosen == source]
        assert draws == list(range(len(draws)))
        assert len(draws) > 300


def test_every_sample_of_a_source_once_in_its_epoch() -> None:
    """Read as batches: the tokens that come out of each source are a whole epoch, again and again."""
    mixed, size = mixture(*THREE), 9000
    labels_BT = mixed.batch(0, size)[1]
    for source, samples in enumerate(sources()):
        seen = labels_BT[(labels_BT[:, 0] // 100_000) == source] - 100_000 * source
        epochs = seen.split(len(samples))
        whole = torch.arange(1, SEQ_LEN * len(samples) + 1)
        full = [epoch for epoch in epochs if len(epoch) == len(samples)]
        assert full
        assert all(torch.equal(epoch.flatten().sort().values, whole) for epoch in full)
        assert len(full) == 1 or not torch.equal(full[0], full[1])


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 0.05, 0.25), (1e-4, 5.0, 0.0), (3.0, 1e-9, 7.0)])
def test_shares_are_the_weights(weights: tuple[float, ...]) -> None:
    """Exact to within a sample for each source after whole blocks; inside one, a random order of a fixed deal."""
    found = [source for source, _ in places(mixture((weights, None)), 20 * BLOCK)]
    for blocks in (1, 2, 7, 20):
        counts = Counter(found[: blocks * BLOCK])
        for source, weight in enumerate(weights):
            assert abs(counts[source] - blocks * BLOCK * weight / sum(weights)) <= 3
    ideal = 256 * weights[1] / sum(weights)
    for first in range(0, len(found), 256):  # five deviations of a draw with replacement, which is wider
        assert abs(found[first : first + 256].count(1) - ideal) <= 5 * (ideal * (1 - ideal / 256)) ** 0.5 + 3


def test_phases_follow_the_tokens() -> None:
    """The second begins with the first sample before which 3000 * SEQ_LEN tokens were drawn; the third's in between."""
    found = places(mixture(*THREE), 9000)
    assert {source for source, _ in found[:3000]} == {0, 1, 2}
    assert {source for source, _ in found[3000:4501]} == {1, 2}
    assert {source for source, _ in found[4501:]} == {0, 1}
    counts = Counter(source for source, _ in found[3000:4501])
    assert abs(counts[1] / 1501 - 0.25) < 0.03


def test_place_follows_from_the_position_alone() -> None:
    """Any order of asking, any division among ranks, and positions that no loop could reach."""
    whole = places(mixture(*THREE), 6000)
    fresh = mixture(*THREE)
    for position in np.random.default_rng(0).permutation(6000).tolist():
        assert fresh.locate(position) == whole[position]
    one, many = mixture(*THREE), mixture(*THREE)
    ranks = torch.cat([many.batch(5000 + 8 * rank, 8)[0] for rank in range(4)])
    assert torch.equal(one.batch(5000, 32)[0], ranks)
    far, total = places(mixture(*THREE), 2 * BLOCK, first=10**15), 10**15
    assert abs(far[0][1] - total / 2) < 10_000
    assert {source for source, _ in far} == {0, 1}


def test_seeds_differ_and_orders_are_mixed() -> None:
    a, b = ([s for s, _ in places(mixture(((1.0, 1.0, 1.0), None), seed=seed), BLOCK)] for seed in (0, 1))
    assert 0.2 < np.mean(np.array(a) == np.array(b)) < 0.47  # a third by chance
    runs = np.mean(np.diff(a) == 0)
    assert 0.2 < runs < 0.47


def test_pinned() -> None:
    """The same on every machine and in every version: a run that is resumed must find its place."""
    expected = [(1, 150), (0, 2092), (2, 756), (1, 151), (2, 757), (1, 152)]
    assert places(mixture(*THREE), 6, first=2998) == expected


def test_joined_stream_is_its_parts() -> None:
    parts = [np.arange(5), np.arange(5, 5), np.arange(5, 17), np.arange(17, 20)]
    joined = JoinedStream(parts)
    assert len(joined) == 20
    for start in range(21):
        for stop in range(21):
            assert np.array_equal(joined[start:stop], np.arange(20)[start:stop])


def two_sources(folder: Path) -> list[str]:
    """One of text, one of token shards."""
    write_corpus(folder / "text")
    other = write_corpus(folder / "other", files=12)
    for path in other.iterdir():
        path.write_text(path.read_text().upper())
    tokenise(Job((str(other),), folder / "shards", "bytes", shard_bytes=1000))
    return [str(folder / "text"), str(folder / "shards")]


def mixed_data(folder: Path, *phases: dict[str, Any]) -> dict[str, Any]:
    return {
        "paths": [str(folder / "text"), str(folder / "shards")],
        "mixture": list(phases),
        "validation_fraction": 0.2,
    }


def test_trains_on_a_mixture_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run stopped in the first phase is the run that was not; what lies ahead may change, what lies behind not."""
    two_sources(tmp_path)
    plan = [{"weights": [3, 1], "until_tokens": 400}, {"weights": [1, 3]}]
    data = mixed_data(tmp_path, *plan)
    Trainer(config(tmp_path, data=data)).fit()
    assert "text: 30 files" in capsys.readouterr().out
    whole = losses(tmp_path)
    run = {"run_dir": str(tmp_path / "b" / "run")}
    Trainer(config(tmp_path, data=data, train={**run, "steps": 2})).fit()
    Trainer(config(tmp_path, data=data, train=run)).fit()
    assert [row[:2] for row in losses(tmp_path / "b")] == [row[:2] for row in whole]
    assert losses(tmp_path / "b")[-1] == whole[-1]

    run = {"run_dir": str(tmp_path / "c" / "run")}
    Trainer(config(tmp_path, data=data, train={**run, "steps": 2})).fit()  # 256 tokens
    with pytest.raises(ValueError, match=r"can't resume .* with other data\.mixture"):
        Trainer(config(tmp_path, data=mixed_data(tmp_path, {"weights": [1, 1]}), train=run)).fit()
    ahead = mixed_data(tmp_path, plan[0], {"weights": [1, 0]})
    Trainer(config(tmp_path, data=ahead, train=run)).fit()
    assert losses(tmp_path / "c")[-1][1] != whole[-1][1]


def test_same_past() -> None:
    one = [MixturePhase((1.0, 2.0), 100), MixturePhase((2.0, 1.0))]
    later = [MixturePhase((1.0, 2.0), 200), MixturePhase((5.0, 1.0))]
    assert same_past(one, later, 100)
    assert not same_past(one, later, 101)
    assert not same_past(one, [], 1)


def test_mixture_survives_the_file(tmp_path: Path) -> None:
    data = {"paths": ["a", "b"], "mixture": [{"weights": [0.5, 1], "until_tokens": 10}, {"weights": [1, 0.25]}]}
    first = config_file.from_dict(sections(tmp_path, data=data))
    assert first.data.mixture == (MixturePhase((0.5, 1.0), 10.0), MixturePhase((1.0, 0.25)))
    (tmp_path / "a.toml").write_text(config_file.to_toml(first))
    assert config_file.load(tmp_path / "a.toml") == first
    short = config_file.load(tmp_path / "a.toml", [("data.mixture", "[2, 1]")])
    assert short.data.mixture == (MixturePhase((2.0, 1.0)),)
    assert json.dumps(config_file.to_dict(short)["data"]["mixture"]) == '[{"weights": [2.0, 1.0]}]'


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[1]", "data.mixture[0].weights must have one for each of the 2 paths, got (1.0,)"),
        ("[1, -1]", "data.mixture[0].weights must be finite numbers, not negative, not all zero, got (1.0, -1.0)"),
        ("[0, 0]", "data.mixture[0].weights must be finite numbers, not negative, not all zero, got (0.0, 0.0)"),
        ("[1, 0]", "data.mixture must give paths[1] a weight in some phase, got 0"),
        ("[{weights=[1, 1], until_tokens=5}]",
         "data.mixture[0].until_tokens must be left out, as it is the last phase"),
        ("[{weights=[1, 1]}, {weights=[1, 2]}]", "data.mixture[0].until_tokens must be given, as it is not the last "),
        ("[{weights=[1, 1], until_tokens=5}, {weights=[1, 2], until_tokens=5}, {weights=[1, 1]}]",
         "data.mixture[1].until_tokens must be after that of the phase before it, got 5.0"),
        ("[{weights=[1, 1], until_tokens=0}]", "data.mixture[0].until_tokens must be positive, got 0.0"),
        ("[{weight=[1, 1]}]", "data.mixture[0].weight: unknown key, did you mean weights?"),
        ("heavy", "data.mixture: must be a list of weights or of phases, got 'heavy'"),
    ],
)  # fmt: skip
def test_bad_mixtures_are_one_line(tmp_path: Path, value: str, message: str) -> None:
    raw = sections(tmp_path, data={"paths": ["a", "b"]})
    (tmp_path / "a.toml").write_text(config_file.to_toml(config_file.from_dict(raw)))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is the point, below)
        config_file.load(tmp_path / "a.toml", [("data.mixture", value)])
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


def test_no_mixture_is_the_default() -> None:
    assert DataConfig().mixture == ()

"""TOML and overrides to a TrainConfig, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_helpers import ROOT, write_config

from dsv3rt import presets
from dsv3rt.config import Segment, TrainConfig, YarnConfig
from dsv3rt.train import config_file

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_roundtrip(path: Path, tmp_path: Path) -> None:
    config = config_file.load(path)
    (tmp_path / "again.toml").write_text(config_file.to_toml(config))
    assert config_file.load(tmp_path / "again.toml") == config


def test_defaults_roundtrip() -> None:
    assert config_file.from_dict(config_file.to_dict(TrainConfig())) == config_file.from_dict({}) == TrainConfig()


def test_preset_takes_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[model]\npreset = "16b"\nnum_layers = 3\nyarn = {factor = 4}\n')
    model = config_file.load(path, [("model.dim", "512")]).model
    assert (model.num_layers, model.dim, model.yarn) == (3, 512, YarnConfig(factor=4.0))
    assert model.expert_dim == presets.model("16b").expert_dim
    assert model.q_lora_rank is None


def test_none_survives_the_file(tmp_path: Path) -> None:
    """16b has no query latent where the default has one: the written file must say so."""
    (tmp_path / "a.toml").write_text('[model]\npreset = "16b"\n')
    config = config_file.load(tmp_path / "a.toml")
    text = config_file.to_toml(config)
    assert 'q_lora_rank = "none"' in text
    assert "preset" not in text


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "7", 7),
        ("train.steps", "1_000", 1000),
        ("train.run_dir", "runs/x", "runs/x"),
        ("train.run_dir", '"runs/x"', "runs/x"),
        ("train.run_dir", "2024", "2024"),
        ("train.peak_tflops", "10", 10.0),
        ("data.paths", "some/folder", ("some/folder",)),
        ("data.paths", '["a", "b"]', ("a", "b")),
        ("optim.lr", "1e-3", (Segment(0.001),)),
        ("optim.lr", "[{value=1, start=0, until_steps=5, shape='linear'}, {value=2}]",
         (Segment(1.0, until_steps=5, shape="linear", start=0.0), Segment(2.0))),
        ("model.renormalize_gates", "false", False),
        ("model.q_lora_rank", "none", None),
    ],
)  # fmt: skip
def test_overrides(tmp_path: Path, key: str, text: str, value: object) -> None:
    config = config_file.load(write_config(tmp_path), [(key, "0"), (key, text)])  # the last one wins
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == value


def test_flat_names_what_differs(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    one, two = (config_file.flat(config_file.load(path, [("optim.lr", lr), ("train.steps", "5")])) for lr in ("1", "2"))
    assert {key for key in one if one[key] != two[key]} == {"optim.lr"}

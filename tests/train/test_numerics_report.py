"""What scripts/numerics.py keeps of its runs and says of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from test_fp8_training import MODEL

from dsv3rt.config import RunConfig
from dsv3rt.train import config_file
from dsv3rt.train.metrics import read_rows
from scripts import numerics, numerics_report
from scripts.numerics_ablations import settings
from tests.train.train_helpers import config as small_config


def rows_of(losses: list[float | None]) -> list[dict[str, Any]]:
    same = {"mtp_loss": 2.0, "grad_norm": 1.0, "max_expert_load": 1.5, "skipped_steps": 0, "memory_bytes": 10**9}
    rows = [{"step": 0, "tokens": 0, "loss": None, "val_loss": 5.0, **same}]
    for step, loss in enumerate(losses, 1):
        rows.append({"step": step, "tokens": 100 * step, "loss": loss, "tokens_per_s": 1000.0, **same})
    return rows


def write_run(folder: Path, name: str, losses: list[float | None], *overrides: tuple[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(losses)))
    precision = "bf16" if name.startswith("bf16") else "fp8"
    config = config_file.load(numerics.ROOT / "configs" / "numerics.toml", [("train.precision", precision), *overrides])
    (folder / f"{name}.toml").write_text(config_file.to_toml(config))
    (folder / f"{name}.json").write_text('{"device": "a device", "commit": "0123", "val_loss_in_bf16": 4.5}')


def test_report_compares_the_last_fifth(tmp_path: Path) -> None:
    bf16: list[float | None] = [5.0 - 0.01 * step for step in range(100)]
    fp8 = [loss * (1.5 if step < 80 else 1.001) for step, loss in enumerate(bf16) if loss is not None]
    write_run(tmp_path, "bf16", bf16)
    write_run(tmp_path, "fp8", [*fp8, 9.0])  # a longer run counts as far as the other goes
    numerics_report.report(tmp_path, tmp_path / "docs")
    text = (tmp_path / "docs" / "numerics.md").read_text()
    assert "the last fifth (20 steps)" in text
    assert "**+0.100%**" in text
    assert "| inside |" in text
    assert (tmp_path / "docs" / "img" / "numerics.png").stat().st_size > 10_000


def test_report_leaves_out_skipped_steps() -> None:
    runs = numerics_report.paired({"fp8": rows_of([3.0, None, 2.0]), "bf16": rows_of([3.0, 2.5, 2.0])})
    assert [row["step"] for row in runs["bf16"]] == [row["step"] for row in runs["fp8"]] == [1, 3]


def test_report_rejects_runs_that_differ_otherwise(tmp_path: Path) -> None:
    write_run(tmp_path, "bf16", [3.0] * 20)
    write_run(tmp_path, "fp8", [3.0] * 20, ("train.seed", "1"))
    with pytest.raises(SystemExit, match=r"bf16 must have fp8's configuration, got other train\.seed"):
        numerics_report.report(tmp_path, tmp_path / "docs")


BF16 = [5.0 - 0.01 * step for step in range(100)]


def test_report_says_what_was_not_studied(tmp_path: Path) -> None:
    for name in numerics_report.PRECISIONS:
        write_run(tmp_path, name, BF16)
    numerics_report.report(tmp_path, tmp_path / "docs")
    text = (tmp_path / "docs" / "numerics.md").read_text()
    assert (
        set(numerics_report.QUESTIONS)
        == set(numerics_report.ABLATIONS)
        == set(numerics_report.COLORS) - {*numerics_report.PRECISIONS, *numerics_report.AGAIN}
    )
    assert f"no ablation of {', '.join(numerics_report.QUESTIONS.values())}." in text
    assert "## Ablations" not in text


def test_report_sets_ablations_beside_both(tmp_path: Path) -> None:
    """One as long as the others, one that was lost after 50 of 100 steps; each over the fifth of its own steps."""
    write_run(tmp_path, "bf16", BF16)
    write_run(tmp_path, "fp8", [1.001 * loss for loss in BF16])
    write_run(tmp_path, "per_tensor", [1.002 * loss for loss in BF16])
    write_run(tmp_path, "no_promotion", [*(1.003 * loss for loss in BF16[:50]), *[None] * 50])
    numerics_report.report(tmp_path, tmp_path / "docs")
    text = (tmp_path / "docs" / "numerics.md").read_text()
    assert "**+0.100%**" in text  # FP8 against BF16, over all the steps of these two
    losses = [factor * mean(part) for factor, part in ((1.001, BF16[80:]), (1.002, BF16[80:]), (1.003, BF16[40:50]))]
    assert f"| FP8 | 100 | {losses[0]:.4f} | +0.100% (0.000%) |  | 5.0000 | 4.5000 | 1.000 | 0 | 0 |" in text
    rest = "5.0000 | 4.5000 | 1.000 | 0 | 0 |"
    assert f"| `per_tensor` | 100 | {losses[1]:.4f} | +0.200% (0.000%) | +0.100% (0.000%) | {rest}" in text
    assert f"| `no_promotion` | 50 | {losses[2]:.4f} | +0.300% (0.000%) | +0.200% (0.000%) | {rest}" in text
    assert "difference of `no_promotion` from `per_tensor`: +0.100% (0.000%)." in text
    assert "no ablation of the shape of tiles, casts for weight gradients, " in text
    assert "fine scales" not in text


def test_report_begins_with_the_paper_and_the_default(tmp_path: Path) -> None:
    modules = settings(numerics_report.DEFAULT)["train.bf16_modules"]
    assert tuple(modules) == RunConfig().bf16_modules
    write_run(tmp_path, "bf16", BF16)
    write_run(tmp_path, "fp8", [1.004 * loss for loss in BF16])
    write_run(tmp_path, numerics_report.DEFAULT, [1.002 * loss for loss in BF16], ("train.bf16_modules", str(modules)))
    numerics_report.report(tmp_path, tmp_path / "docs")
    text = (tmp_path / "docs" / "numerics.md").read_text()
    assert "| **+0.400%** (0.000%) | +0.400% | +0.000% (0.000%) | outside |" in text
    assert "| **+0.200%** (0.000%) | +0.200% | +0.000% (0.000%) | inside |" in text


def test_report_says_how_far_bf16_is_from_itself(tmp_path: Path) -> None:
    write_run(tmp_path, "bf16", BF16)
    write_run(tmp_path, "fp8", [1.001 * loss for loss in BF16])
    write_run(tmp_path, "bf16_again", [1.004 * loss for loss in BF16])
    write_run(tmp_path, "fp8_again", [1.002 * loss for loss in BF16])
    numerics_report.report(tmp_path, tmp_path / "docs")
    text = (tmp_path / "docs" / "numerics.md").read_text()
    assert "differs from BF16 by\n+0.400% (0.000%) in the loss and by +0.000% (0.000%) in the MTP loss" in text
    assert "differs from FP8 by\n+0.100% (0.000%)" in text
    assert "From BF16 it differs by +0.200% (0.000%)." in text
    assert "## Ablations" not in text


def test_report_counts_skips_and_spikes_of_an_ablation_that_both_lack(tmp_path: Path) -> None:
    for name in ("bf16", "fp8", "per_tensor"):
        write_run(tmp_path, name, BF16)
    path = tmp_path / "per_tensor.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[40] |= {"loss": None, "spike": True}
    rows[-1] |= {"loss": None, "skipped_steps": 2}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    numerics_report.report(tmp_path, tmp_path / "docs")
    assert "| 1.000 | 2 | 1 |" in (tmp_path / "docs" / "numerics.md").read_text()


def test_report_rejects_an_ablation_configured_otherwise(tmp_path: Path) -> None:
    for name in numerics_report.PRECISIONS:
        write_run(tmp_path, name, BF16)
    write_run(tmp_path, "per_tensor", BF16, ("train.precision", "bf16"))
    with pytest.raises(SystemExit, match=r"per_tensor must have fp8's configuration, got other train\.precision"):
        numerics_report.report(tmp_path, tmp_path / "docs")


def test_report_takes_the_settings_that_make_an_ablation(tmp_path: Path) -> None:
    """And no others under its name, nor under another."""
    for name in numerics_report.PRECISIONS:
        write_run(tmp_path, name, BF16)
    patterns = {"attention_bf16": '["*.self_attn.*"]', "experts_bf16": '["*.mlp.*"]'}
    for name, modules in patterns.items():
        write_run(tmp_path, name, BF16, ("train.bf16_modules", modules))
        numerics_report.report(tmp_path, tmp_path / "docs")
        assert f"\n| `{name}` | 100 |" in (tmp_path / "docs" / "numerics.md").read_text()
    for name, modules in (("attention_bf16", "[]"), ("wgrad_bf16", patterns["experts_bf16"])):
        write_run(tmp_path, name, BF16, ("train.bf16_modules", modules))
        with pytest.raises(SystemExit, match=rf"{name} must have fp8's configuration, got other train\.bf16_modules"):
            numerics_report.report(tmp_path, tmp_path / "docs")
        (tmp_path / f"{name}.jsonl").unlink()


def test_study_is_as_large_as_it_says() -> None:
    from dsv3rt.model.flops import parameter_counts

    config = config_file.load(numerics.ROOT / "configs" / "numerics.toml")
    assert parameter_counts(config.model).main >= 200e6
    assert config.train.steps >= 1000


def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["numerics.py", *arguments])
        numerics.main()

    return run


def test_an_ablation_is_a_run_that_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = command(monkeypatch)
    root = tmp_path / "root"
    (root / "configs").mkdir(parents=True)
    small = small_config(tmp_path, model=MODEL, train={"steps": 4, "dtype": "bfloat16"})
    (root / "configs" / "numerics.toml").write_text(config_file.to_toml(small))
    monkeypatch.setattr(numerics, "ROOT", root)
    kept = tmp_path / "kept"
    run("train", "fp8", "--runs", str(tmp_path), "--keep", str(kept))
    run("train", "per_tensor", "--runs", str(tmp_path / "whole"), "--keep", str(tmp_path / "whole"))
    for steps in ("2", "4"):
        run("train", "per_tensor", "--runs", str(tmp_path), "--keep", str(kept), "--steps", steps)
    losses = [[row["loss"] for row in read_rows(folder / "per_tensor.jsonl")] for folder in (kept, tmp_path / "whole")]
    assert len(losses[0]) == 5
    assert losses[0] == losses[1]
    assert losses[0] != [row["loss"] for row in read_rows(kept / "fp8.jsonl")]
    assert 'precision = "fp8"' in (kept / "per_tensor.toml").read_text()

"""What the runs of scripts/numerics.py say beside each other: docs/numerics.md and its figure."""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from dsv3rt.config import TrainConfig
from dsv3rt.model.flops import parameter_counts, train_flops_per_token
from dsv3rt.train import config_file
from dsv3rt.train.corpus import PACKAGE, STDLIB
from dsv3rt.train.metrics import Row, read_rows
from dsv3rt.train.plot import smooth
from scripts.numerics_ablations import ABLATIONS, QUESTIONS, settings

PRECISIONS = ("bf16", "fp8")
AGAIN = ("bf16_again", "fp8_again")
COLORS = {"bf16": "#4c72b0", "bf16_again": "#64b5cd", "fp8": "#dd8452", "fp8_again": "#ccb974",
          "block_128x128": "#55a868", "per_tensor": "#8172b3", "no_promotion": "#c44e52", "wgrad_bf16": "#937860",
          "dgrad_bf16": "#da8bc3", "fprop_bf16": "#8c8c8c", "swiglu_bf16": "#2f7f7f", "attention_bf16": "#a02c2c",
          "latents_bf16": "#e377c2", "latents_out_bf16": "#17becf",
          "experts_bf16": "#4a6b1f"}  # fmt: skip
DEFAULT = "attention_bf16"  # the run that is as train.bf16_modules has it
LIMIT = 0.0025  # what the V3 report (sec. 3.3) says that FP8 stays below
INK = "#333333"


def figures_of(rows: Sequence[Row]) -> dict[str, Any]:
    """What the table says of one run."""
    fifth = rows[-max(1, len(rows) // 5) :]
    return {
        "loss": mean(row["loss"] for row in fifth),
        "mtp_loss": mean(row["mtp_loss"] for row in fifth),
        "grad_norm": median(row["grad_norm"] for row in fifth),
        "max_expert_load": mean(row["max_expert_load"] for row in fifth),
        "skipped": rows[-1]["skipped_steps"],
        "spikes": sum(bool(row.get("spike")) for row in rows),
        "memory_gb": max(row["memory_bytes"] for row in rows) / 1e9,
    }


def compare(rows: Sequence[Row], base: Sequence[Row], loss: str = "loss") -> dict[str, float]:
    """Of the last fifth of paired runs: how the mean losses differ, the standard error of the steps' ratios, and the
    furthest that the smooth curves part; all relative to `base`."""
    ours, theirs = [row[loss] for row in rows], [row[loss] for row in base]
    fifth = max(2, len(ours) // 5)
    ratios = [one / other - 1 for one, other in zip(ours, theirs, strict=True)]
    return {
        "steps": fifth,
        "of_means": mean(ours[-fifth:]) / mean(theirs[-fifth:]) - 1,
        "error": stdev(ratios[-fifth:]) / fifth**0.5,
        "furthest": max(ratios_of_curves(rows, base, loss)[-fifth:], key=abs),
    }


def ratios_of_curves(rows: Sequence[Row], base: Sequence[Row], loss: str = "loss") -> list[float]:
    """How the smoothed losses of paired runs differ at each step, relative to `base`."""
    ours, theirs = smooth([row[loss] for row in rows]), smooth([row[loss] for row in base])
    return [one / other - 1 for one, other in zip(ours, theirs, strict=True)]


def draw(runs: dict[str, list[Row]], others: dict[str, dict[str, list[Row]]], path: Path) -> None:
    """Losses above, relative differences to BF16 below, all smoothed over a hundredth of the run."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = [row["step"] for row in runs["fp8"]]
    for name, rows in runs.items():
        above.plot(steps, smooth([row["loss"] for row in rows]), color=COLORS[name], linewidth=1.4, label=name.upper())
    for name, found in {"fp8": runs, **others}.items():
        rows, label = found[name], name if others else None
        difference = [100 * ratio for ratio in ratios_of_curves(rows, found["bf16"])]
        color = COLORS[name] if others else INK
        below.plot([row["step"] for row in rows], difference, color=color, linewidth=1.0, label=label)
    below.axhspan(-100 * LIMIT, 100 * LIMIT, color="#dddddd", label=f"within {LIMIT:.2%}")
    below.axvline(steps[-(len(steps) // 5)], color="#999999", linewidth=0.8, linestyle="--", label="last fifth")
    above.set_ylabel("cross-entropy (nats a byte)", color=INK)
    below.set_ylabel("against BF16 (%)" if others else "FP8 against BF16 (%)", color=INK)
    below.set_xlabel("step", color=INK)
    for axes in (above, below):
        axes.tick_params(colors=INK)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    above.legend(frameon=False, labelcolor=INK)
    over = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 6, "fontsize": 8}
    below.legend(frameon=False, labelcolor=INK, **over)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def verdict(in_fp8: str, rows: Sequence[Row], base: Sequence[Row]) -> str:
    """A line of the table that begins the page."""
    apart = compare(rows, base)
    inside = "inside" if abs(apart["of_means"]) < LIMIT else "outside"
    loss = f"**{apart['of_means']:+.3%}** ({apart['error']:.3%})"
    return f"| {in_fp8} | {loss} | {apart['furthest']:+.3%} | {with_error(rows, base, 'mtp_loss')} | {inside} |"


def report(folder: Path, docs: Path) -> None:
    """docs/numerics.md and docs/img/numerics.png; an error where the runs can't be compared."""
    kept = [*PRECISIONS, *(name for name in (*AGAIN, *ABLATIONS) if (folder / f"{name}.jsonl").exists())]
    whole = {name: read_rows(folder / f"{name}.jsonl") for name in kept}
    main_pair = {name: whole[name] for name in PRECISIONS}
    runs = paired(main_pair)
    others = {name: paired({**main_pair, name: whole[name]}) for name in kept if name not in PRECISIONS}
    for name, found in {"bf16": runs, **others}.items():
        if len(found[name]) < 10:
            raise SystemExit(f"numerics: {folder} must hold 10 steps with a loss that {name} has in common with fp8")
    configs = {name: config_file.load(folder / f"{name}.toml") for name in kept}
    for name, config in configs.items():
        check_same(name, config, configs["fp8"])
    origins = {name: json.loads((folder / f"{name}.json").read_text()) for name in kept}
    draw(runs, others, docs / "img" / "numerics.png")
    ablated = {name: found for name, found in others.items() if name in ABLATIONS}
    parts = [page(configs["fp8"], runs, others, whole, origins), not_studied(set(ABLATIONS) - set(ablated))]
    if ablated:
        parts.insert(1, ablations(runs, ablated, whole, origins))
    (docs / "numerics.md").write_text("\n".join(parts))
    for name, found in {"fp8": runs, **others}.items():
        apart = compare(found[name], found["bf16"])
        print(f"numerics: {name} {apart['of_means']:+.3%} over the last {apart['steps']:.0f} steps")


def check_same(name: str, config: TrainConfig, fp8: TrainConfig) -> None:
    """An error where a run was configured otherwise than the FP8 run, but for what makes its name."""
    ours, theirs = config_file.flat(config), config_file.flat(fp8) | settings(name)
    apart = {key for key, value in theirs.items() if value != ours.get(key)} - {"train.run_dir"}
    if name.startswith("bf16"):
        apart -= {"train.precision"}
    if apart:
        raise SystemExit(f"numerics: {name} must have fp8's configuration, got other {', '.join(sorted(apart))}")


def paired(runs: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The rows of the steps that have a loss in every run; one that was skipped has none."""
    losses = [{row["step"] for row in rows if row["loss"] is not None} for rows in runs.values()]
    common = set.intersection(*losses)
    return {name: [row for row in rows if row["step"] in common] for name, rows in runs.items()}


def page(
    config: TrainConfig,
    runs: dict[str, list[Row]],
    others: dict[str, dict[str, list[Row]]],
    whole: dict[str, list[Row]],
    origins: dict[str, dict[str, Any]],
) -> str:
    model, run = config.model, config.train
    counts = parameter_counts(model)
    last, total = runs["fp8"][-1]["step"], runs["fp8"][-1]["tokens"]
    tokens = total // last
    flops = tokens * train_flops_per_token(model, run.seq_len, with_mtp=True)
    made = "; ".join(f"{name_of(name)}: {o['device']}, commit {o['commit']}" for name, o in origins.items())
    steps = compare(runs["fp8"], runs["bf16"])["steps"]
    verdicts = [verdict("all linears, as in the report", runs["fp8"], runs["bf16"])]
    beside = {DEFAULT: "the default, attention's linears in BF16", "bf16_again": "none: BF16 once more"}
    verdicts += [
        verdict(told, others[name][name], others[name]["bf16"]) for name, told in beside.items() if name in others
    ]
    return f"""# FP8 beside BF16

Written by `scripts/numerics.py report`; don't edit. Both runs have the same initial weights, data and order of data
(seed {run.seed}), and differ in `train.precision` alone ([precision.md](precision.md) says what that changes).

The model (`configs/numerics.toml`): {counts.main:,} parameters and {counts.mtp:,} for MTP, {counts.activated:,} active
a token; {model.num_layers} layers of width {model.dim}, {model.num_dense_layers} dense, MLA with {model.num_heads} \
heads, {model.num_experts} experts of which a token
chooses {model.top_k}, and a shared one. The data: {sources(config)}, byte by byte, \
{tokens:,} tokens a step,
{total:,} in {last} steps, {flops / 1e12:.2f} TFLOP a step.

![Losses and their difference](img/numerics.png)

Over the last fifth ({steps:.0f} steps) mean losses in FP8 differ from those in BF16 by this much (in parentheses the
standard error of the steps' ratios; the DeepSeek-V3 report, sec. 3.3, has {LIMIT:.2%}):

| in FP8 | loss | curves smoothed over 1 % of the steps, at most | MTP loss | |
|---|---|---|---|---|
{chr(10).join(verdicts)}
{floor(others)}
{table(runs, whole, origins)}

{made}.

The runs shared the GPU, so they were not timed; for FP8's speed see the slice in [performance.md](performance.md).
"""


def sources(config: TrainConfig) -> str:
    names = {STDLIB: "Python's standard library"}
    named = [names.get(path, path.removeprefix(PACKAGE)) for path in config.data.paths]
    return "the sources of " + (named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}")


def floor(others: dict[str, dict[str, list[Row]]]) -> str:
    """How far each precision is from itself."""
    text = ""
    for name in (name for name in AGAIN if name in others):
        base = name.removesuffix("_again")
        pair = others[name][name], others[name][base]
        text += f"""
{base.upper()} once more, from initial weights moved in their last bits (`{name}`), differs from {base.upper()} by
{with_error(*pair)} in the loss and by {with_error(*pair, "mtp_loss")} in the MTP loss: so far apart are runs
between which there is nothing to choose.
"""
        if base == "fp8":
            text += f"From BF16 it differs by {with_error(pair[0], others[name]['bf16'])}.\n"
    return text


def table(runs: dict[str, list[Row]], whole: dict[str, list[Row]], origins: dict[str, dict[str, Any]]) -> str:
    found = {
        name: {**figures_of(rows), "val": last_validation(whole[name]), "val_bf16": of_bf16(origins[name])}
        for name, rows in runs.items()
    }
    lines = ["| | BF16 | FP8 |", "|---|---|---|"]
    for key, (what, form) in {
        "loss": ("loss, mean of the last fifth", "{:.4f}"),
        "mtp_loss": ("MTP loss, mean of the last fifth", "{:.4f}"),
        "val": ("validation loss, the last", "{:.4f}"),
        "val_bf16": ("the same with all products in BF16", "{:.4f}"),
        "grad_norm": ("gradient norm, median of the last fifth", "{:.3f}"),
        "max_expert_load": ("fullest expert over the mean, last fifth", "{:.2f}"),
        "skipped": ("skipped steps", "{}"),
        "spikes": ("spikes", "{}"),
        "memory_gb": ("peak memory, GB", "{:.2f}"),
    }.items():
        cells = [form.format(found[name][key]) for name in PRECISIONS]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ablations(
    runs: dict[str, list[Row]],
    ablated: dict[str, dict[str, list[Row]]],
    whole: dict[str, list[Row]],
    origins: dict[str, dict[str, Any]],
) -> str:
    """The section on runs that leave out a part of the recipe, each as far as it has come beside the other two."""
    lines = [
        "| run | steps | loss | against BF16 | against FP8 | validation | in BF16 | gradient norm | skipped | spikes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in {"fp8": runs, **ablated}.items():
        rows = found[name]
        figures = figures_of(rows)
        against = [with_error(rows, found[base]) if base != name else "" for base in ("bf16", "fp8")]
        skipped, spikes = whole[name][-1]["skipped_steps"], sum(bool(row.get("spike")) for row in whole[name])
        validation = " | ".join(f"{loss:.4f}" for loss in (last_validation(whole[name]), of_bf16(origins[name])))
        lines.append(
            f"| {name_of(name)} | {rows[-1]['step']} | {figures['loss']:.4f} | {' | '.join(against)} | {validation} "
            f"| {figures['grad_norm']:.3f} | {skipped} | {spikes} |"
        )
    what = "\n".join(f"- `{name}`: {ABLATIONS[name]}." for name in ablated)
    text = f"""## Ablations

Runs as the FP8 run in all else (`scripts/numerics_ablations.py`), each over the last fifth of the steps that it shares
with both; beside a difference of means the standard error of the steps' ratios. "Validation" is the last loss on
validation data, "in BF16" that of the last weights with all products in BF16. A scale that tokens share is computed
from later tokens too; where a model has learned to read them from it, its weights do worse in BF16, where they can't.

{what}

{chr(10).join(lines)}
"""
    if "no_promotion" in ablated:
        text += """
Scales of 1x128 tiles change every 128 addends, so they can't do without promotion; what promotion does is the
difference of `no_promotion` from `per_tensor`"""
        if "per_tensor" in ablated:
            pair = paired({name: whole[name] for name in ("no_promotion", "per_tensor")})
            text += f": {with_error(pair['no_promotion'], pair['per_tensor'])}"
        text += ".\n"
    return text


def last_validation(rows: Sequence[Row]) -> float:
    return [row["val_loss"] for row in rows if row.get("val_loss") is not None][-1]


def of_bf16(origin: dict[str, Any]) -> float:
    return float(origin["val_loss_in_bf16"])


def not_studied(missing: Set[str]) -> str:
    asked = [question for name, question in QUESTIONS.items() if name in missing]
    without = f"; no ablation of {', '.join(asked)}" if asked else ""
    return f"One seed, one size, a few million tokens{without}. What came before: [notes](notes/numerics.md).\n"


def with_error(rows: Sequence[Row], base: Sequence[Row], loss: str = "loss") -> str:
    apart = compare(rows, base, loss)
    return f"{apart['of_means']:+.3%} ({apart['error']:.3%})"


def name_of(run: str) -> str:
    return run.upper() if run in PRECISIONS else f"`{run}`"

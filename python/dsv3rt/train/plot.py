"""loss.png: the run's losses in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsv3rt.train.metrics import Row

_INK, _TRAIN, _VALIDATION = "#333333", "#4c72b0", "#dd8452"


def save_loss_png(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw training loss (every step, and smoothed) and validation loss over steps."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    validation = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=_TRAIN, alpha=0.25, linewidth=0.8, label="training, each step")
        axes.plot(steps, smooth(losses), color=_TRAIN, linewidth=1.8, label="training, smoothed")
    if validation:
        steps, losses = zip(*validation, strict=True)
        label = f"validation, {losses[-1]:.3f} at the end"
        axes.plot(steps, losses, color=_VALIDATION, marker="o", markersize=5, linewidth=1.2, label=label)
    axes.set_title(title, loc="left", color=_INK)
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("cross-entropy (nats a token)", color=_INK)
    axes.tick_params(colors=_INK)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if train or validation:
        axes.legend(frameon=False, labelcolor=_INK)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def smooth(values: Sequence[float], fraction: float = 0.01) -> list[float]:
    """An exponential moving average over about `fraction` of the run, its start unbiased."""
    decay = 1.0 - 1.0 / max(1.0, fraction * len(values))
    total = weight = 0.0
    result: list[float] = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1.0
        result.append(total / weight)
    return result

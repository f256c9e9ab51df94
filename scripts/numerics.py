"""Train one model in FP8 and in BF16 on the same data from the same seed, and set their losses side by side.

What the parts of the FP8 recipe are for, runs without them may say (scripts/numerics_ablations.py).

    python scripts/numerics.py train fp8 --seconds 100 --keep benchmarks/results/h200/numerics
    python scripts/numerics.py train bf16 ...    and as wanted: bf16_again, fp8_again, and ablations
    python scripts/numerics.py report benchmarks/results/h200/numerics

The same command goes on from its checkpoint in runs/numerics-fp8 (or another name) until the run is done. `report`
(scripts/numerics_report.py) writes docs/numerics.md and its figure from what was kept, as far as the runs have come.
`bf16_again` and `fp8_again` begin with weights moved in their last bits: how far runs part that nothing tells apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for benchmarks.provenance

from benchmarks import provenance  # noqa: E402
from dsv3rt.errors import StoppedBySignalError  # noqa: E402
from dsv3rt.layers.precision import set_precision  # noqa: E402
from dsv3rt.train import config_file  # noqa: E402
from dsv3rt.train.engine import Engine  # noqa: E402
from dsv3rt.train.trainer import Trainer  # noqa: E402
from scripts.numerics_ablations import ABLATIONS, ablation, settings  # noqa: E402
from scripts.numerics_report import AGAIN, PRECISIONS, report  # noqa: E402


def train(options: argparse.Namespace, started: float) -> None:
    """One piece of a run: up to its last step, or `seconds` after `started`."""
    overrides = [tuple(text.split("=", 1)) for text in options.set]
    run_dir = Path(options.runs, f"numerics-{options.name}")
    precision = "bf16" if options.name.startswith("bf16") else "fp8"
    overrides += [("train.precision", precision), ("train.run_dir", str(run_dir))]
    overrides += [(key, str(value)) for key, value in settings(options.name).items()]
    if options.steps:
        overrides.append(("train.steps", str(options.steps)))
    with ablation(options.name) if options.name in ABLATIONS else nullcontext():
        trainer = Trainer(config_file.load(ROOT / "configs" / "numerics.toml", overrides))
        if options.name in AGAIN:
            nudge(trainer.engine)  # a checkpoint's weights take the place of these
        if options.seconds:
            threading.Thread(target=stop_at, args=(started + options.seconds,), daemon=True).start()
        try:
            trainer.fit()
        except (StoppedBySignalError, FloatingPointError) as stopped:  # that a recipe diverges is a finding too
            print(f"numerics: {stopped}")
    if options.keep:
        keep(trainer, options.name, options.keep, options.commit)


@torch.no_grad()
def nudge(engine: Engine) -> None:
    """Move the weights by as much as the rounding of BF16 does."""
    for seed, master in enumerate(engine.optimizer.masters().values()):
        generator = torch.Generator(master.device).manual_seed(seed)
        noise = torch.randn(master.shape, generator=generator, device=master.device)
        master.mul_(1 + 2.0**-9 * noise)
    engine.optimizer.write_parameters()


def validation_in_bf16(trainer: Trainer) -> float | None:
    """The validation loss of the weights as they are, with all products in BF16."""
    trainer.engine.optimizer.restore_weights()
    set_precision(trainer.engine.model, "bf16")
    return trainer.validate()


def stop_at(deadline: float) -> None:
    """Ask the trainer to stop at the end of its step, as SIGTERM does, but not before it listens."""
    time.sleep(max(0.0, deadline - time.monotonic()))
    while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


def keep(trainer: Trainer, name: str, folder: Path, commit: str | None) -> None:
    """The metrics, the configuration and where they come from; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(trainer.run.metrics, folder / f"{name}.jsonl")
    shutil.copyfile(trainer.run.config, folder / f"{name}.toml")
    origin = {"commit": commit or provenance.commit(), **provenance.machine()}
    origin["val_loss_in_bf16"] = validation_in_bf16(trainer)
    (folder / f"{name}.json").write_text(json.dumps(origin, indent=2) + "\n")


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    piece = commands.add_parser("train", help="make one of the runs, or go on with it")
    piece.add_argument("name", choices=(*PRECISIONS, *AGAIN, *ABLATIONS))
    piece.add_argument("--steps", type=int, help="end there; the schedules stay those of configs/numerics.toml")
    piece.add_argument("--seconds", type=float, help="stop so long after the start, with a checkpoint")
    piece.add_argument("--runs", type=Path, default=ROOT / "runs", help="where run directories are")
    piece.add_argument("--keep", type=Path, help="folder for metrics, configuration and origin")
    piece.add_argument("--commit", help="of these sources, where they came without git")
    piece.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as train's --section.key")
    written = commands.add_parser("report", help="write docs/numerics.md and its figure from what was kept")
    written.add_argument("folder", type=Path)
    written.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    if options.command == "train":
        train(options, started)
    else:
        report(options.folder, options.docs)


if __name__ == "__main__":
    main()

"""Kill a training run again and again, then compare it with one that nobody disturbed.

    python scripts/fault_drill.py --kills 50

Half of the kills (-9) come at random moments of the training, half while a checkpoint is being written. After every
third, where an older checkpoint is there, a bit of the newest is flipped or one of its files is cut. The losses must be
the same bit for bit; the damaged checkpoints met must be just those. A trainer is forked from this process, to start
quickly.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard  # here, so that no trainer has to

from dsv3rt.train import checkpoint, config_file
from dsv3rt.train.run_dir import RunDir
from dsv3rt.train.trainer import Trainer

_STEPS_PER_KILL = 32  # more than a life gets on by, so that the run never ends before the last kill
_PATIENCE_S = 120.0

_MODEL = {
    "vocab_size": 264, "dim": 16, "num_layers": 1, "num_dense_layers": 0, "num_heads": 1, "q_lora_rank": "none",
    "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "ffn_dim": 16, "expert_dim": 8,
    "num_experts": 2, "top_k": 1, "num_expert_groups": 1, "num_groups_kept": 1, "max_position": 16, "mtp_depth": 0,
    "init_std": 0.1,
}  # fmt: skip


def sections(folder: Path, steps: int) -> dict[str, Any]:
    """A run in `folder`/run that saves every fourth step."""
    text = folder / "text"
    text.mkdir(parents=True)
    for index in range(20):
        (text / f"{index}.txt").write_text(f"file {index}: {index * 7919 % 1000} apples\n" * 8)
    train = {"run_dir": str(folder / "run"), "steps": steps, "seq_len": 16, "batch_size": 2, "device": "cpu"}
    return {
        "model": _MODEL,
        "train": {**train, "eval_sequences": 0},
        "data": {"paths": [str(text)], "validation_fraction": 0.1},
        "optim": {"lr": 1e-2},
        "checkpoint": {"every": 4},
    }


def train(run: dict[str, Any], log: Path) -> None:
    with open(log, "a") as file, contextlib.redirect_stdout(file):
        Trainer(config_file.from_dict(run)).fit()


def start(run: dict[str, Any], log: Path) -> Any:
    process = multiprocessing.get_context("fork").Process(target=train, args=(run, log), daemon=True)
    process.start()
    return process


def wait_until(ready: Callable[[], bool], process: Any) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not ready():
        if not process.is_alive() or time.monotonic() > deadline:
            raise SystemExit("fault_drill: FAILED: a trainer ended on its own, or does not get on")
        time.sleep(0.0005)


def rows(run: RunDir) -> int:
    return run.metrics.read_bytes().count(b"\n") if run.metrics.exists() else 0


def is_saving(run: RunDir) -> bool:
    return any(run.checkpoints.glob(".tmp-step-*"))


def live_and_die(settings: dict[str, Any], log: Path, rng: random.Random, in_save: bool) -> str:
    """One life; returns where the kill came."""
    run = RunDir(Path(settings["train"]["run_dir"]))
    before = run.metrics.stat().st_ino if run.metrics.exists() else 0
    process = start(settings, log)
    # The trainer drops the rows that it repeats by replacing the file.
    wait_until(lambda: run.metrics.exists() and run.metrics.stat().st_ino != before, process)
    target = rows(run) + rng.randrange(5, 17)
    wait_until(lambda: rows(run) >= target, process)
    if in_save:
        wait_until(lambda: is_saving(run), process)
    time.sleep(rng.random() * (0.03 if in_save else 0.05))
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise SystemExit(f"fault_drill: FAILED: a trainer ended with {process.exitcode} before its kill")
    return "while saving" if is_saving(run) else "while training"


def flip_or_cut(path: Path, rng: random.Random) -> str:
    """Flip one bit, or cut the file off, anywhere; returns what was done."""
    content = bytearray(path.read_bytes())
    position = rng.randrange(len(content))
    if rng.random() < 0.5:
        path.write_bytes(content[:position])
        return f"{path.name} cut off at {position}"
    bit = rng.randrange(8)
    content[position] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name} bit {bit} of byte {position}"


def damage(run: RunDir, rng: random.Random) -> bool:
    """Harm the newest checkpoint, unless it is the only one; returns whether it did."""
    checkpoint.clean(run.checkpoints)
    found = checkpoint.complete(run.checkpoints)
    if len(found) < 2:
        return False
    flip_or_cut(rng.choice(sorted(found[-1].iterdir())), rng)
    return True


def losses(settings: dict[str, Any]) -> list[tuple[int, float | None]]:
    lines = RunDir(Path(settings["train"]["run_dir"])).metrics.read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def finish(settings: dict[str, Any], log: Path) -> None:
    process = start(settings, log)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"fault_drill: FAILED: the last start ended with {process.exitcode}; {log.read_text()}")


def drill(kills: int, seed: int, folder: Path) -> str:
    """Run the drill; returns one line about it, or ends the process with one."""
    steps = kills * _STEPS_PER_KILL + 10
    whole, killed = (sections(folder / name, steps) for name in ("whole", "killed"))
    finish(whole, folder / "whole.log")
    rng = random.Random(seed)
    log = folder / "killed.log"
    met: Counter[str] = Counter()
    damaged = 0
    for number in range(kills):
        met[live_and_die(killed, log, rng, in_save=number % 2 == 1)] += 1
        if number % 3 == 2:
            damaged += damage(RunDir(Path(killed["train"]["run_dir"])), rng)
    finish(killed, log)
    text = log.read_text()
    if losses(killed) != losses(whole) or len(losses(whole)) != steps + 1:
        raise SystemExit(f"fault_drill: FAILED (seed {seed}): the losses are not those of the undisturbed run")
    if (told := text.count("damaged checkpoint: ")) != damaged:
        raise SystemExit(f"fault_drill: FAILED (seed {seed}): {damaged} checkpoints were damaged, {told} were noticed")
    if kills >= 6 and damaged == 0:
        raise SystemExit(f"fault_drill: FAILED (seed {seed}): there never was an older checkpoint to fall back to")
    resumed = text.count("resuming from")
    if resumed == 0:
        raise SystemExit(f"fault_drill: FAILED (seed {seed}): no life was long enough to leave a checkpoint")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(met.items()))
    return (
        f"{kills} kills ({kinds}), {damaged} checkpoints damaged and noticed, {resumed} resumed, {steps} steps: "
        f"all losses bitwise equal (seed {seed})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed {options.seed}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = drill(options.kills, options.seed, Path(folder))
    print(f"fault_drill: {result}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main())

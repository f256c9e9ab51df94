"""A training run: data, resuming, the loop, and what it leaves in the run directory."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from pathlib import Path

from dsv3rt.config import TrainConfig
from dsv3rt.env import launch
from dsv3rt.errors import StoppedBySignalError
from dsv3rt.model.flops import parameter_counts
from dsv3rt.parallel.mesh import join
from dsv3rt.train import checkpoint, config_file, guards, resume
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.engine import Engine, StepResult, device_of
from dsv3rt.train.metrics import MetricsWriter, NoMetrics, Row, memory_bytes, peak_flops, read_rows
from dsv3rt.train.mixture import open_data
from dsv3rt.train.plot import save_loss_png
from dsv3rt.train.progress import Progress, own_log, say
from dsv3rt.train.run_dir import RunDir, write_atomically
from dsv3rt.train.saver import CheckpointSaver
from dsv3rt.train.signals import StopSignals
from dsv3rt.train.tokenizer import open_tokenizer
from dsv3rt.train.watchdog import Watchdog


class Trainer:
    """Trains `config.model` on `config.data` in `config.train.run_dir`: `Trainer(config).fit()`.

    Errors in the configuration or the data are ValueErrors of one line, raised before anything is written.
    `prompts` are `train.sample_prompts` as tokens.
    """

    def __init__(self, config: TrainConfig) -> None:
        run = config.train
        self.config = config
        self.run = RunDir(Path(run.run_dir))
        self.tokenizer = open_tokenizer(config.data.tokenizer, fim=config.data.fim_rate > 0)
        if self.tokenizer.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"model.vocab_size must be at least the {self.tokenizer.vocab_size} of data.tokenizer "
                f"'{config.data.tokenizer}', got {config.model.vocab_size}"
            )
        self.prompts = self._encode_prompts()
        self._data = open_data(config, self.tokenizer)
        mesh = join(config.parallel, launch(), device_of(run))
        self.ranks = mesh.ranks("control")
        self.engine = Engine(config, self._data.train, mesh)
        self._writers = checkpoint.Writers(mesh.ranks("checkpoint"), self.engine.pieces())
        self._peak_flops = peak_flops(self.engine.device, run.peak_tflops)

    def fit(self) -> bool:
        """Train to `train.steps`, from the newest checkpoint in the run directory where there is one.

        Returns whether there was anything left to do.

        Raises:
            StoppedBySignalError: SIGTERM or SIGINT came; the run is saved as it was at the end of that step.
            FloatingPointError: more than `guard.max_skipped` steps in a row were not finite.
            OSError: a file could not be written, the last checkpoint among them.
            PeerError: another rank raised one of these.
        """
        with contextlib.ExitStack() as stack:
            self.ranks.together(lambda: stack.enter_context(self.run.locked()))
            stack.enter_context(own_log(self.run.logs, self.ranks.rank))
            return self._fit()

    def _fit(self) -> bool:
        found = self.ranks.together(self._find_checkpoint)
        if found is not None and found.state.step >= self.config.train.steps:
            say(
                f"{self.run.path} is already trained to step {found.state.step} of {self.config.train.steps}; "
                "raise train.steps to go on, or choose another train.run_dir"
            )
            if self.ranks.is_first and not self.run.loss_png.exists():  # killed after the last checkpoint
                self._finish()
            return False
        state = RunState(data=self._data.fingerprint) if found is None else self._restore(found)
        self.ranks.together(lambda: write_atomically(self.run.config, config_file.to_toml(self.config)))
        self._describe()
        resumed_step = None if found is None else state.step
        metrics = MetricsWriter(self.run, resumed_step) if self.ranks.is_first else NoMetrics()
        try:
            if found is None:
                metrics.write(self._first_row(state))
            self._loop(state, metrics)
        finally:
            metrics.close()
        if self.ranks.is_first:
            self._finish()
        return True

    def _find_checkpoint(self) -> resume.Resume | None:
        checkpoint.clean(self.run.checkpoints)
        return resume.find(self.run, self.config)

    def _restore(self, found: resume.Resume) -> RunState:
        resume.check_data(found, self._data.fingerprint)
        self._load(found.folder)
        changed = f" (changed since: {', '.join(found.changed)})" if found.changed else ""
        say(f"resuming from {found.folder}{changed}")
        return found.state

    def _load(self, folder: Path) -> None:
        engine = self.engine
        self.ranks.together(lambda: checkpoint.load(folder, engine.tensors(), engine.pieces()), everywhere=True)
        engine.optimizer.write_parameters()

    def _loop(self, state: RunState, metrics: MetricsWriter | NoMetrics) -> None:
        run, every = self.config.train, self.config.checkpoint.every
        toml = config_file.to_toml(self.config)
        save_owed = False
        with (
            contextlib.closing(Progress(run.steps, state.step, on_screen=self.ranks.is_first)) as progress,
            StopSignals() as signals,
            Watchdog(self.config.guard.step_timeout_s, self.run.stuck(self.ranks.rank)) as watchdog,
            CheckpointSaver(self.run.checkpoints, self.config.checkpoint, toml, self._writers) as saver,
        ):
            while state.step < run.steps:
                watchdog.beat(f"step {state.step + 1}")
                started = time.perf_counter()
                result, after = self.engine.step(state)
                seconds = time.perf_counter() - started
                after, spike = guards.judge(self.config.guard, after, result)
                saver.poll()
                # Read once: a signal that comes while saving waits for the next step.
                stop, memory = self.ranks.highest(signals.received or 0, memory_bytes(self.engine.device))
                if spike and (back := self._roll_back(after, saver)) is not None:
                    state, save_owed = back, False
                    metrics.rewind(state.step)
                    progress.rewind(state.step)
                else:
                    state = after
                    row = self._row(state, result, seconds, memory) | ({"spike": True} if spike else {})
                    if _is_due(state.step, run.eval_every, run.steps):
                        watchdog.beat(f"the evaluation after step {state.step}")
                        row |= self._val_loss()
                    metrics.write(row)
                    progress.update(result.loss, row["tokens_per_s"], row.get("val_loss"))
                    save_owed |= _is_due(state.step, every, run.steps)
                last = bool(stop) or state.step == run.steps
                # Parameters that give no finite loss are no reason to let go of an older checkpoint.
                if last or (save_owed and state.skips_in_a_row == 0):
                    watchdog.beat(f"the checkpoint of step {state.step}")
                    metrics.sync()
                    saver.save(state, self.engine.tensors(), needed=last)
                    save_owed = False
                if stop:
                    raise _stopped(signal.Signals(stop), state.step, self.run)

    def _roll_back(self, spiked: RunState, saver: CheckpointSaver) -> RunState | None:
        """Back to the newest checkpoint, and past the samples since; None where the run is to go on as it is."""
        if self.config.guard.on_spike == "log" or spiked.rollbacks >= self.config.guard.max_rollbacks:
            return None
        saver.wait()
        folder = self.ranks.together(lambda: resume.newest_intact(self.run.checkpoints))
        if folder is None:
            say("no checkpoint to roll back to yet; going on")
            return None
        state, _ = checkpoint.read_state(folder)
        self._load(folder)
        say(f"rolled back to {folder}; samples {state.samples} to {spiked.samples - 1} are left out")
        return dataclasses.replace(state, samples=spiked.samples, rollbacks=spiked.rollbacks + 1)

    def _finish(self) -> None:
        rows = read_rows(self.run.metrics)
        save_loss_png(rows, self.run.loss_png, title=f"Loss of {self.run.path}")
        losses = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
        validation = f"validation loss {losses[0]:.3f} -> {losses[-1]:.3f}; " if losses else ""
        say(f"done: {validation}{self.run.path} holds metrics.jsonl, loss.png, tensorboard/ and checkpoints/")

    def _encode_prompts(self) -> list[list[int]]:
        """train.sample_prompts as tokens, checked before the training; an empty one is the start of a document."""
        encoded = self.tokenizer.encode([prompt.encode() for prompt in self.config.train.sample_prompts])
        prompts = [tokens.tolist() or [self.tokenizer.eos] for tokens in encoded]
        longest = max(map(len, prompts), default=0) + self.config.train.sample_tokens
        if prompts and longest > self.config.model.max_position:
            raise ValueError(
                f"train.sample_tokens must leave room for the prompts in model.max_position "
                f"({self.config.model.max_position}), got {self.config.train.sample_tokens} after a prompt of "
                f"{longest - self.config.train.sample_tokens} tokens"
            )
        return prompts

    def _describe(self) -> None:
        counts = parameter_counts(self.config.model)
        dtype = str(self.engine.dtype).removeprefix("torch.")
        mtp = f" + {counts.mtp:,} for MTP" if counts.mtp else ""
        say(f"run    {self.run.path}")
        say(f"model  {counts.main:,} parameters{mtp}; {counts.activated:,} active a token")
        say(f"device {self.engine.device}, {dtype}")
        if self.ranks.size > 1:
            parallel = self.config.parallel
            say(f"ranks  pp {parallel.pp} ({parallel.schedule}) x dp {parallel.dp}, experts over {parallel.ep}")
        say(f"data   {self._data.description}")

    def validate(self) -> float | None:
        """The mean loss over `train.eval_sequences` of the validation data; all ranks call this together."""
        return self.engine.evaluate(self._data.validation, self.config.train.eval_sequences)

    def _val_loss(self) -> Row:
        loss = self.validate()
        return {} if loss is None else {"val_loss": loss}

    def _first_row(self, state: RunState) -> Row:
        """Step 0, the untrained model: a validation loss and nothing trained."""
        absent: Row = dict.fromkeys(
            ("loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "tokens_per_s", "mfu", "max_expert_load")
        )
        row = {"step": state.step, "tokens": state.tokens, **absent, "skipped_steps": 0, **self._val_loss()}
        return {**row, "memory_bytes": memory_bytes(self.engine.device)}

    def _row(self, state: RunState, result: StepResult, seconds: float, memory: int) -> Row:
        peak = None if self._peak_flops is None else self._peak_flops * self.ranks.size
        row = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": _finite(result.loss),
            "mtp_loss": _finite(result.mtp_loss),
            "balance_loss": _finite(result.balance_loss),
            "grad_norm": _finite(result.grad_norm),
            "lr": result.lr,
            "tokens_per_s": result.tokens / seconds,
            "mfu": None if peak is None else result.flops / seconds / peak,
            "max_expert_load": result.max_expert_load,
            "memory_bytes": memory,
            "skipped_steps": state.skipped_steps,
        }
        return row | {"skipped": True} if result.skipped else row


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _stopped(number: signal.Signals, step: int, run: RunDir) -> StoppedBySignalError:
    where = run.checkpoints / f"step-{step}"
    message = f"stopped by {number.name}, saved in {where}; the same command resumes from there"
    return StoppedBySignalError(number, message)


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)

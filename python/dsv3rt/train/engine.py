"""One training step, and the evaluation between steps: model, optimizer and schedules, without files or terminal."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3rt.config import RunConfig, TrainConfig
from dsv3rt.model.flops import train_flops_per_token
from dsv3rt.model.transformer import Transformer
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.data import Samples, SampleSource
from dsv3rt.train.optimizer import AdamW
from dsv3rt.train.schedule import Schedule, batch_sequences


@dataclass(frozen=True)
class StepResult:
    """What one step saw: losses and gradients are those before its update.

    loss: the main model's cross-entropy alone. max_expert_load: the fullest expert's load over the mean of its layer,
    the worst layer's; None without MoE layers. tokens and flops (forward and backward) are this step's. skipped: why
    nothing was updated ("loss is nan"), else empty.
    """

    loss: float
    mtp_loss: float
    balance_loss: float
    grad_norm: float
    lr: float
    max_expert_load: float | None
    tokens: int
    flops: float
    skipped: str = ""


class Engine:
    """The model in training. All that a resumed run needs is `tensors()` and the `RunState` that `step` returns."""

    def __init__(self, config: TrainConfig, samples: SampleSource) -> None:
        run = config.train
        self.config = config
        self.samples = samples
        self.device = _device(run)
        self.dtype = _dtype(run, self.device)
        self._batch_size = Schedule(run.batch_size)
        self._bias_update_speed = Schedule(run.bias_update_speed)
        self._balance_alpha = Schedule(run.balance_alpha)
        self._mtp_weight = Schedule(run.mtp_weight)
        self._lr = Schedule(config.optim.lr)
        torch.manual_seed(run.seed)
        self.model = Transformer(config.model, dtype=self.dtype, device=self.device)
        self.optimizer = AdamW(self.model.named_parameters(), config.optim)

    def step(self, state: RunState) -> tuple[StepResult, RunState]:
        """One batch and one update; returns what it saw and where the run stands after it.

        Where the loss or the gradient norm is not finite, nothing is updated; the batch counts as seen all the same.
        """
        run = self.config.train
        at = (state.step, state.tokens)
        sequences = batch_sequences(self._batch_size, *at, run.micro_batch_size)
        tokens = sequences * run.seq_len
        after = dataclasses.replace(
            state, step=state.step + 1, tokens=state.tokens + tokens, samples=state.samples + sequences
        )
        mtp_weight = self._mtp_weight.value(*at)
        losses, counts_LE = self._accumulate(state.samples, sequences, self._balance_alpha.value(*at), mtp_weight)
        norm = self.optimizer.grad_norm()
        loss, mtp_loss, balance_loss = losses.tolist()
        grad_norm = norm.item()
        skipped = _not_finite("loss", loss) or _not_finite("gradient norm", grad_norm)
        lr = self._lr.value(after.step, after.tokens)
        if skipped:
            self.optimizer.drop_gradients()
        else:
            self.optimizer.step(after.step - state.skipped_steps, lr, norm)
            self.model.update_router_bias(counts_LE, self._bias_update_speed.value(*at))
        flops = tokens * train_flops_per_token(self.config.model, run.seq_len, with_mtp=mtp_weight > 0)
        load = _max_expert_load(counts_LE)
        return StepResult(loss, mtp_loss, balance_loss, grad_norm, lr, load, tokens, flops, skipped), after

    @torch.no_grad()
    def evaluate(self, samples: Samples, limit: int) -> float | None:
        """Mean main loss over the first `limit` samples, the same ones each time; None where `limit` is 0."""
        micro = self.config.train.micro_batch_size
        count = min(limit, len(samples))
        total = 0.0
        for first in range(0, count, micro):
            size = min(micro, count - first)
            tokens_BT, labels_BT = (part.to(self.device) for part in samples.batch(first, size))
            output = self.model(tokens_BT, labels_BT)
            assert output.main_loss is not None
            total += output.main_loss.item() * size
        return total / count if count else None

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save, by checkpoint name: masters, moments, router biases. Loading is in place."""
        buffers = {f"model.{name}": buffer for name, buffer in self.model.named_buffers()}
        return {**self.optimizer.tensors(), **buffers}

    def _accumulate(self, position: int, sequences: int, alpha: float, mtp_weight: float) -> tuple[Tensor, Tensor]:
        """Backward over the batch in micro batches, scaled so that the gradients are those of the batch as one.

        Returns (loss, MTP loss, balance loss), each the batch's mean, and expert_counts_LE of the whole batch.
        """
        micro = self.config.train.micro_batch_size
        share = micro / sequences
        losses: list[Tensor] = []
        counts: list[Tensor] = []
        for first in range(0, sequences, micro):
            tokens_BT, labels_BT = (part.to(self.device) for part in self.samples.batch(position + first, micro))
            output = self.model(tokens_BT, labels_BT, alpha=alpha, mtp_weight=mtp_weight)
            assert output.loss is not None
            (output.loss * share).backward()
            losses.append(torch.stack([output.main_loss, output.mtp_loss, output.balance_loss]).detach())
            counts.append(output.expert_counts_LE)
        return torch.stack(losses).mean(dim=0), torch.stack(counts).sum(dim=0)


def _device(run: RunConfig) -> torch.device:
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device: must be 'cpu' or 'auto' here, got 'cuda': torch sees no CUDA device")
    if run.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(run.device)


def _dtype(run: RunConfig, device: torch.device) -> torch.dtype:
    if run.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if run.dtype == "bfloat16" else torch.float32


def _not_finite(what: str, value: float) -> str:
    return "" if math.isfinite(value) else f"{what} is {value}"


def _max_expert_load(counts_LE: Tensor) -> float | None:
    counts_LE = counts_LE[counts_LE.sum(dim=1) > 0].double()  # an idle MTP block has no load
    return (counts_LE.amax(dim=1) / counts_LE.mean(dim=1)).max().item() if len(counts_LE) else None

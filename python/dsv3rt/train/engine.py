"""One training step, and the evaluation between steps: model, optimizer and schedules, without files or terminal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3rt.config import RunConfig, TrainConfig
from dsv3rt.env import launch
from dsv3rt.layers.precision import check_patterns, set_precision
from dsv3rt.layers.weights import casts_of
from dsv3rt.model.flops import train_flops_per_token
from dsv3rt.parallel.build import build, moe_layers, parameter_shapes
from dsv3rt.parallel.mesh import Mesh
from dsv3rt.parallel.pipeline.chunk import MicroBatch, Rule
from dsv3rt.parallel.pipeline.executor import Executor
from dsv3rt.parallel.placement import Layout
from dsv3rt.parallel.zero import Gradients
from dsv3rt.train.average import Average
from dsv3rt.train.checkpoint import RunState
from dsv3rt.train.data import Samples, SampleSource
from dsv3rt.train.optimizer import AdamW
from dsv3rt.train.pieces import Piece
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
    """The model in training, or one rank's part of it. All that a resumed run needs is `tensors()` and the `RunState`
    that `step` returns. With one process and with many this is the same code."""

    def __init__(self, config: TrainConfig, samples: SampleSource, mesh: Mesh | None = None) -> None:
        run = config.train
        self.config = config
        self.samples = samples
        self.mesh = Mesh(config.parallel) if mesh is None else mesh
        self.device = device_of(run)
        self.dtype = dtype_of(run, self.device)
        self._batch_size = Schedule(run.batch_size)
        self._bias_update_speed = Schedule(run.bias_update_speed)
        self._balance_alpha = Schedule(run.balance_alpha)
        self._mtp_weight = Schedule(run.mtp_weight)
        self._lr = Schedule(config.optim.lr)
        self.layout = Layout(config.model, config.parallel, run.seq_len)
        _check_schedule(self.layout, run)
        self._shapes = parameter_shapes(config.model)
        torch.manual_seed(run.seed)
        tokens = run.micro_batch_size * run.seq_len
        # A second forward for the backward may run beside another micro-batch's first.
        gates = run.precision == "fp8" and "experts" not in run.recompute
        self.model = build(self.layout, self.mesh, self.dtype, self.device, tokens, carries_gates=gates)
        check_patterns(run.bf16_modules, _module_names(self._shapes), "train.bf16_modules")
        set_precision(self.model, run.precision, run.bf16_modules, run.weight_orientations)
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        named = list(self.model.named_parameters())
        late = frozenset({"embed_tokens.weight", "lm_head.weight"})
        gradients = Gradients.spread(named, self.layout, self.mesh, self._shapes, late)
        self.optimizer = AdamW(named, config.optim, gradients, casts_of(self.model))
        decay, every = config.optim.ema_decay, config.optim.ema_every
        self._average = Average(self.optimizer.masters(), decay, every) if decay else None
        self._executor = Executor(self.model, self.layout, self.mesh, gradients, like)

    def step(self, state: RunState) -> tuple[StepResult, RunState]:
        """One batch and one update; returns what it saw and where the run stands after it.

        Where the loss or the gradient norm is not finite, nothing is updated; the batch counts as seen all the same.
        """
        run = self.config.train
        at = (state.step, state.tokens)
        sequences = batch_sequences(self._batch_size, *at, run.micro_batch_size * self.config.parallel.dp)
        tokens = sequences * run.seq_len
        after = dataclasses.replace(
            state, step=state.step + 1, tokens=state.tokens + tokens, samples=state.samples + sequences
        )
        mtp_weight = self._mtp_weight.value(*at)
        share = run.micro_batch_size / sequences
        rule = Rule(self._balance_alpha.value(*at), mtp_weight, share, frozenset(run.recompute))
        seen = self._backward(state.samples, sequences, rule)
        loss, mtp_loss, balance_loss, grad_norm, load = seen.numbers()
        skipped = _not_finite("loss", loss) or _not_finite("gradient norm", grad_norm)
        lr = self._lr.value(after.step, after.tokens)
        if skipped:
            self.optimizer.drop_gradients()
        else:
            number = after.step - state.skipped_steps
            if self._average is not None:
                self._average.release_masters()
            self.optimizer.step(number, lr, seen.grad_norm)
            if self._average is not None:
                self._average.update(number)
            gamma = self._bias_update_speed.value(*at)
            for layer, moe in moe_layers(self.model).items():
                moe.gate.update_bias(seen.counts_LE[layer - self.config.model.num_dense_layers], gamma)
        flops = tokens * train_flops_per_token(self.config.model, run.seq_len, with_mtp=mtp_weight > 0)
        return StepResult(loss, mtp_loss, balance_loss, grad_norm, lr, load or None, tokens, flops, skipped), after

    def evaluate(self, samples: Samples, limit: int) -> float | None:
        """Mean main loss over the first `limit` samples, the same ones each time; None where `limit` is 0."""
        micro, dp, dp_rank = self.config.train.micro_batch_size, self.config.parallel.dp, self.mesh.dp_rank
        count = min(limit, len(samples))
        firsts = range(0, count, micro)
        if not firsts:
            return None
        sizes = [min(micro, count - first) for first in firsts]
        # Ranks without a micro-batch of their own in the last round join in with the last one, which isn't counted.
        rounds = range(dp_rank, -(-len(firsts) // dp) * dp, dp)
        mine = [min(index, len(firsts) - 1) for index in rounds]
        batches = [self._micro_batch(samples, firsts[index], sizes[index]) for index in mine]
        losses = torch.zeros(len(firsts), dtype=torch.float64, device=self.device)
        for index, losses_3 in zip(rounds, self._executor.evaluate(batches).losses_M3, strict=True):
            if index < len(firsts):
                losses[index] = losses_3[0].double()
        self._add_up(losses)
        total = 0.0
        for loss, size in zip(losses.tolist(), sizes, strict=True):
            total += loss * size
        return total / count

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save that is here, by checkpoint name: masters, moments, router biases. Loading is in place."""
        buffers = {f"model.{name}": buffer for name, buffer in self.model.named_buffers()}
        averages = {} if self._average is None else self._average.tensors()
        return {**self.optimizer.tensors(), **buffers, **{f"ema.{name}": value for name, value in averages.items()}}

    def pieces(self) -> dict[str, Piece]:
        """Where those of `tensors()` that other ranks hold too, or more of, lie in the model's."""
        found: dict[str, Piece] = {}
        for name, one in self.optimizer.gradients.sums.items():
            piece = Piece(one.share.shape, one.share.first_row)
            found.update({f"{kind}.{name}": piece for kind in ("model", "exp_avg", "exp_avg_sq", "ema")})
        for name, buffer in self.model.named_buffers():
            first = self.layout.share(name, tuple(buffer.shape), self.mesh.rank).ranks[0]
            found[f"model.{name}"] = Piece(tuple(buffer.shape), 0, first == self.mesh.rank)
        return found

    def _backward(self, position: int, sequences: int, rule: Rule) -> _Seen:
        """Backward over this rank's micro-batches, scaled so that the gradients are those of the batch as one; then
        all that the ranks must know of each other, in one sum over all of them."""
        micro, model = self.config.train.micro_batch_size, self.config.model
        count = sequences // micro // self.config.parallel.dp
        first = self.mesh.dp_rank * count
        indices = range(first, first + count)
        batches = [self._micro_batch(self.samples, position + index * micro, micro) for index in indices]
        tally = self._executor.train(batches, rule)
        idle = frozenset(filter(self.layout.is_mtp, self._shapes)) if rule.mtp_weight == 0 else frozenset()
        self.optimizer.reduce(idle)

        losses = torch.zeros(sequences // micro, 3, dtype=torch.float64, device=self.device)
        losses[first : first + count] = tally.losses_M3.double()
        num_moe = model.num_layers + model.mtp_depth - model.num_dense_layers
        counts = torch.zeros(num_moe, model.num_experts, dtype=torch.float64, device=self.device)
        for layer, counts_E in tally.counts.items():
            counts[layer - model.num_dense_layers] = counts_E.double()
        squares = self.optimizer.squares(list(self._shapes), self.device)
        parts = [losses, counts, squares]
        together = torch.cat([part.flatten() for part in parts])
        self._add_up(together)
        sums = together.split([part.numel() for part in parts])
        losses, counts, squares = (total.view_as(part) for total, part in zip(sums, parts, strict=True))
        return _Seen(losses.float().mean(dim=0), counts.long(), self.optimizer.norm(squares))

    def _add_up(self, values: Tensor) -> None:
        """In place, over all ranks. FP64: what one rank alone knows, and what is whole, comes through exactly."""
        if self.mesh.size > 1:
            dist.all_reduce(values)

    def _micro_batch(self, samples: SampleSource, position: int, count: int) -> MicroBatch:
        return MicroBatch(*(self._on_device(part) for part in samples.batch(position, count)))

    def _on_device(self, part: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return part.to(self.device)
        # From pinned memory the host need not wait for what is queued on the device.
        return part.contiguous().pin_memory().to(self.device, non_blocking=True)


@dataclass(frozen=True)
class _Seen:
    """A batch, from all ranks: mean (loss, MTP loss, balance loss), expert counts, gradient norm."""

    losses: Tensor
    counts_LE: Tensor
    grad_norm: Tensor

    def numbers(self) -> list[float]:
        """The losses, the norm and the fullest expert's load, in one read: the host waits once, ahead of the update."""
        numbers = [*self.losses.double(), self.grad_norm.double(), _max_expert_load(self.counts_LE)]
        return torch.stack(numbers).tolist()


def device_of(run: RunConfig) -> torch.device:
    """Where this process computes: under torchrun each one of a machine has its own GPU."""
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device: must be 'cpu' or 'auto' here, got 'cuda': torch sees no CUDA device")
    if run.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", launch().local_rank % torch.cuda.device_count())


def dtype_of(run: RunConfig, device: torch.device) -> torch.dtype:
    if run.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if run.dtype == "bfloat16" else torch.float32


def _module_names(parameters: Iterable[str]) -> list[str]:
    """Of the modules that own these parameters."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))


def _check_schedule(layout: Layout, run: RunConfig) -> None:
    """Fail at the start where the table can't be written for the batch sizes that segments begin and end with."""
    unit = run.micro_batch_size * layout.parallel.dp
    for segment in run.batch_size:
        for size in (segment.value, segment.value if segment.start is None else segment.start):
            try:
                layout.schedule(round(size / unit))
            except ValueError as error:
                raise ValueError(f"parallel.schedule does not fit train.batch_size {size:g}: {error}") from None


def _not_finite(what: str, value: float) -> str:
    return "" if math.isfinite(value) else f"{what} is {value}"


def _max_expert_load(counts_LE: Tensor) -> Tensor:
    """0 where no expert has any."""
    if len(counts_LE) == 0:
        return counts_LE.new_zeros((), dtype=torch.float64)
    counts_LE = counts_LE.double()
    mean_L = counts_LE.mean(dim=1)
    return torch.where(mean_L > 0, counts_LE.amax(dim=1) / mean_L, 0.0).max()  # an idle MTP block has no load

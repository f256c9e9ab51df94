"""Bytes a rank needs, by kind: what it holds from the model's own shapes on the meta device, activations by counting
what each phase keeps for its backward, over the steps of its row of the schedule.

Counted with ops that keep their inputs and outputs and nothing between, as kernels do; the references keep more. Load
of the experts: even. Not counted: the CUDA context, NCCL's buffers, the allocator's losses, temporaries of single ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from dsv3rt.config import ModelConfig, TrainConfig
from dsv3rt.model.transformer import Transformer
from dsv3rt.parallel.build import outline, parameter_shapes
from dsv3rt.parallel.pipeline.schedule import Schedule
from dsv3rt.parallel.placement import Layout

_FP32 = 4


@dataclass(frozen=True)
class Bytes:
    """Of one rank. heads: what the cross-entropies keep from forward to backward. buckets: all of the
    gradients arriving, as buckets may all be on their way at the end of the backward, and the reduced gradients."""

    weights: int
    gradients: int
    masters: int
    moments: int
    activations: int
    heads: int
    buckets: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def plan(config: TrainConfig, dtype: torch.dtype) -> Iterator[Bytes]:
    """Every pipeline rank's, of its dp rank that keeps the most."""
    layout = Layout(config.model, config.parallel, config.train.seq_len)
    sequences = config.train.batch_size[-1].value
    schedule = layout.schedule(int(sequences) // config.train.micro_batch_size // config.parallel.dp)
    shapes = parameter_shapes(config.model)
    for pp_rank in range(config.parallel.pp):
        model = outline(layout, pp_rank, 0, dtype)
        yield _rank_bytes(config, layout, schedule, model, (pp_rank, shapes))


def _rank_bytes(
    config: TrainConfig,
    layout: Layout,
    schedule: Schedule,
    model: Transformer,
    where: tuple[int, dict[str, tuple[int, ...]]],
) -> Bytes:
    pp_rank, shapes = where
    item = next(model.parameters()).element_size()
    moment = 2 * (_FP32 if config.optim.moment_dtype == "float32" else 2)
    numel = kept = 0
    for name, parameter in model.named_parameters():
        rows = layout.share(name, shapes[name], pp_rank * config.parallel.dp).rows
        numel += parameter.numel()
        kept += (rows.stop - rows.start) * parameter.numel() // max(1, parameter.shape[0])
    is_sharded = config.parallel.dp > 1 or len(schedule.chains) > 1
    chunk = _ChunkBytes(config, item)
    return Bytes(
        weights=item * numel,
        gradients=_FP32 * numel,
        masters=_FP32 * kept if item < _FP32 else 0,
        moments=moment * kept,
        activations=_peak(schedule, pp_rank, [chunk.blocks(layout, stage) for stage in range(len(layout.stages))]),
        heads=chunk.heads() if len(layout.stages) - 1 in layout.stages_on(pp_rank) else 0,
        buckets=_FP32 * (numel + kept) if is_sharded else 0,
    )


def _peak(schedule: Schedule, pp_rank: int, stage_bytes: list[int]) -> int:
    """The most that is in flight, from F until B or W; an overlapped forward counts before its backward frees any."""
    held = peak = 0
    for action in (part for step in schedule.steps[pp_rank] for part in step.parts):
        size = stage_bytes[action.stage - schedule.chain_of(action.stage).stages.start]
        held += size * ((action.op == "F") - (action.op in ("B", "W")))
        peak = max(peak, held)
    return peak


class _ChunkBytes:
    """What one micro-batch keeps in a stage; `item` bytes a number."""

    def __init__(self, config: TrainConfig, item: int) -> None:
        self._config = config
        self._model = config.model
        self._recompute = set(config.train.recompute)
        self._tokens = config.train.micro_batch_size * config.train.seq_len
        self._item = item

    def blocks(self, layout: Layout, stage: int) -> int:
        model = self._model
        numbers = sum(self._block(layer) for layer in layout.stages[stage])
        if stage == len(layout.stages) - 1:
            mtp = self._block(model.num_layers) + 5 * model.dim  # both norms' outputs, their pair, the norm after it
            numbers += 2 * model.dim + model.mtp_depth * mtp  # the last block's output and its norm
        return self._tokens * self._item * numbers

    def heads(self) -> int:
        """Gradients of hidden states and head weights, which the fused cross-entropy computes in its forward."""
        model = self._model
        return (1 + model.mtp_depth) * self._item * model.dim * (self._tokens + model.vocab_size)

    def _block(self, layer: int) -> int:
        """Numbers a token."""
        model = self._model
        norms = 0 if "norm" in self._recompute else 2 * model.dim
        own = 2 * model.dim + norms + self._attention(model)  # its input, and what attention made of it
        if layer < model.num_dense_layers:
            return own + self._feed_forward(model.ffn_dim)
        router = (2 * _FP32 * model.num_experts + 5 * _FP32 * model.top_k) // self._item
        return own + router + (0 if "experts" in self._recompute else self._experts(model))

    def _attention(self, model: ModelConfig) -> int:
        query = model.num_heads * model.qk_head_dim
        down = (model.q_lora_rank or query) + model.kv_lora_rank + model.qk_rope_head_dim
        keys = model.num_heads * (model.qk_nope_head_dim + model.v_head_dim) + model.qk_rope_head_dim
        up = query + keys + (model.q_lora_rank or 0) + model.kv_lora_rank
        out = model.num_heads * (model.v_head_dim + _FP32 // self._item)  # and the log-sum-exps
        return down + (0 if "mla_up" in self._recompute else up) + out

    def _experts(self, model: ModelConfig) -> int:
        """Rows in, their results, with several ranks the results that came back; the shared experts beside them."""
        rows = (3 if self._config.parallel.ep > 1 else 2) * model.top_k * model.dim
        hidden = model.num_shared_experts * model.expert_dim
        shared = self._feed_forward(hidden) + model.dim if hidden else 0
        return rows + self._feed_forward(model.top_k * model.expert_dim) + shared

    def _feed_forward(self, hidden: int) -> int:
        return (2 if "swiglu" in self._recompute else 3) * hidden

"""Bytes a rank needs, by kind: what it holds from the model's own shapes on the meta device, activations by counting
what each phase keeps for its backward (`parallel/kept.py`), over the steps of its row of the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import nn

from dsv3rt.config import TrainConfig
from dsv3rt.layers.linear import Linear
from dsv3rt.layers.moe import Experts
from dsv3rt.layers.precision import set_precision
from dsv3rt.model.block import Block
from dsv3rt.model.mtp import MTPBlock
from dsv3rt.model.transformer import Transformer
from dsv3rt.ops.types import TILE, ceil_div
from dsv3rt.parallel.build import Shapes, outline, parameter_shapes
from dsv3rt.parallel.kept import Kept
from dsv3rt.parallel.pipeline.schedule import Schedule
from dsv3rt.parallel.placement import Layout

_FP32 = 4
_DLOGITS = 1 << 30  # of the cross-entropy's gradients alive at once, ops/cuda/loss.py


@dataclass(frozen=True)
class Bytes:
    """Of one rank.

    weights: with their casts in FP8. activations: all micro-batches' in flight at the worst moment, and factors of
    weight gradients that were put off. heads: what the cross-entropies keep from forward to backward. buckets: those in
    flight, and the reduced gradients. working: one forward's and one backward's passing tensors, and the window of the
    experts' exchange. reserve: what nobody counts: CUDA's context, NCCL, the allocator's losses.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    activations: int
    heads: int
    buckets: int
    working: int
    reserve: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def plan(config: TrainConfig, dtype: torch.dtype, reserve: int = 0) -> Iterator[Bytes]:
    """Every pipeline rank's, of its dp rank that keeps the most."""
    layout = Layout(config.model, config.parallel, config.train.seq_len)
    sequences = config.train.batch_size[-1].value
    schedule = layout.schedule(int(sequences) // config.train.micro_batch_size // config.parallel.dp)
    shapes = parameter_shapes(config.model)
    for pp_rank in range(config.parallel.pp):
        model = outline(layout, pp_rank, 0, dtype)
        set_precision(model, config.train.precision, config.train.bf16_modules)
        yield _Rank(config, layout, schedule, model, pp_rank).bytes(shapes, reserve)


class _Rank:
    def __init__(
        self, config: TrainConfig, layout: Layout, schedule: Schedule, model: Transformer, pp_rank: int
    ) -> None:
        self._config = config
        self._layout = layout
        self._schedule = schedule
        self._model = model
        self._pp_rank = pp_rank
        self._item = next(model.parameters()).element_size()
        self._kept = Kept(config, self._item)
        self._last = len(layout.stages) - 1

    def bytes(self, shapes: Shapes, reserve: int) -> Bytes:
        parallel = self._config.parallel
        moment = 2 * (_FP32 if self._config.optim.moment_dtype == "float32" else 2)
        numel = kept = 0
        groups: dict[tuple[int, ...], int] = {}
        for name, parameter in self._model.named_parameters():
            share = self._layout.share(name, shapes[name], self._pp_rank * parallel.dp)
            numel += parameter.numel()
            kept += (share.rows.stop - share.rows.start) * parameter.numel() // max(1, parameter.shape[0])
            groups[share.ranks] = groups.get(share.ranks, 0) + _FP32 * parameter.numel()
        bucket = parallel.buckets_in_flight * parallel.bucket_mb * 2**20
        travelling = sum(2 * min(size, bucket) for ranks, size in groups.items() if len(ranks) > 1)
        activations, heads = self._peak()
        return Bytes(
            weights=weight_bytes(self._model, self._config.train.weight_orientations),
            gradients=_FP32 * numel,
            masters=_FP32 * kept if self._item < _FP32 else 0,
            moments=moment * kept,
            activations=activations,
            heads=heads,
            buckets=int(travelling) + (_FP32 * kept if travelling else 0),
            working=self._working(),
            reserve=reserve,
        )

    def _peak(self) -> tuple[int, int]:
        """Activations and heads at the worst moment; an overlapped forward counts before its backward frees any."""
        mine = self._layout.stages_on(self._pp_rank)
        sizes = {stage: self._stage(stage) for stage in mine}
        owed = {stage: sum(self._kept.owed(block) for block in self._blocks(stage)) for stage in mine}
        heads = self._kept.heads()
        held = held_heads = 0
        peak = (0, 0)
        for action in (part for step in self._schedule.steps[self._pp_rank] for part in step.parts):
            stage = self._layout.model_stage(action.stage)
            change = {"F": sizes[stage], "B": -sizes[stage], "I": owed[stage] - sizes[stage], "W": -owed[stage]}
            held += change[action.op]
            if stage == self._last:
                held_heads += {"F": heads, "B": -heads, "I": -heads, "W": 0}[action.op]
            peak = max(peak, (held, held_heads), key=sum)
        return peak

    def _stage(self, stage: int) -> int:
        blocks = self._blocks(stage)
        mtp = [block for block in blocks if isinstance(block, MTPBlock)]
        ends = self._kept.ends(is_last=stage == self._last, mtp=mtp)
        return ends + sum(self._kept.block(block) for block in blocks)

    def _blocks(self, stage: int) -> list[Block]:
        layers = list(self._layout.stages[stage])
        if stage == self._last:
            layers += range(self._config.model.num_layers, len(self._model.layers))
        return [block for block in (self._model.layers[layer] for layer in layers) if isinstance(block, Block)]

    def _working(self) -> int:
        """Of the largest block, a forward and a backward at a time as a schedule may overlap them; or of a head."""
        blocks = [block for block in self._model.layers if isinstance(block, Block)]
        forward = max((self._kept.forward_work(block) for block in blocks), default=0)
        backward = max((self._kept.backward_work(block) for block in blocks), default=0)
        logits = 0
        if self._last in self._layout.stages_on(self._pp_rank):
            logits = min(_DLOGITS, 2 * self._kept.tokens * self._config.model.vocab_size)
        turned = max((_cast_bytes(tuple(p.shape)) for p in _fp8_parameters(self._model)), default=0)
        turned *= self._config.train.weight_orientations == 1  # w^T, made when it is needed
        return max(forward, logits) + backward + turned + self._kept.window()


def weight_bytes(model: nn.Module, orientations: int = 2) -> int:
    """Parameters, those that multiply in FP8 as casts alone, in one or two orientations; FP32 ones are masters."""
    cast = _fp8_parameters(model)
    kept = sum(p.nbytes for p in model.parameters() if p.dtype == torch.float32 or all(p is not one for one in cast))
    return kept + orientations * sum(_cast_bytes(tuple(parameter.shape)) for parameter in cast)


def _fp8_parameters(model: nn.Module) -> list[nn.Parameter]:
    modules = (module for module in model.modules() if isinstance(module, Linear | Experts) and module.is_fp8)
    return [parameter for module in modules for parameter in module.parameters()]


def _cast_bytes(shape: tuple[int, ...]) -> int:
    """Of weights (F, D), or with a leading X, with their scales."""
    *leading, rows, columns = shape
    return math.prod(leading) * (rows * columns + _FP32 * ceil_div(rows, TILE) * ceil_div(columns, TILE))

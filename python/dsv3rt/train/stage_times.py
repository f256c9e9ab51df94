"""`dsv3rt plan stages`: how blocks are cut into stages, by counted multiplications or by times measured here."""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch

from dsv3rt.config import LayerCosts, ModelConfig, TrainConfig
from dsv3rt.layers.precision import set_precision
from dsv3rt.model.transformer import Transformer
from dsv3rt.parallel.pipeline.chunk import Chunk, MicroBatch, Rule, Stage
from dsv3rt.parallel.pipeline.lanes import Lanes, Walk
from dsv3rt.parallel.placement import Layout
from dsv3rt.train.engine import device_of, dtype_of

_WARM_UP, _ROUNDS = 2, 5
_DENSE, _MOE, _NONE = range(1), range(1, 2), range(0)


def run(config: TrainConfig, *, measure: bool) -> int:
    """Print the stages; returns 0."""
    if measure:
        printed = {name: f"{cost:.4g}" for name, cost in dataclasses.asdict(measured(config)).items()}
        costs = LayerCosts(**{name: float(text) for name, text in printed.items()})
        config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, layer_costs=costs))
        texts = (f"{name} = {text}" for name, text in printed.items())
        print(f"layer_costs = {{ {', '.join(texts)} }} # ms, for [parallel]")
    layout = Layout(config.model, config.parallel, config.train.seq_len)
    layers, tail = layout.costs
    whole = sum(layers) + tail
    per_rank = [0] * config.parallel.pp
    for stage, blocks in enumerate(layout.stages):
        is_last = stage == len(layout.stages) - 1
        cost = sum(layers[layer] for layer in blocks) + (tail if is_last else 0)
        here = [rank for rank in range(config.parallel.pp) if stage in layout.stages_on(rank)]
        for rank in here:
            per_rank[rank] += cost
        names = f"blocks {blocks.start} to {blocks.stop - 1}" if len(blocks) else "no blocks"
        where = f"rank {' and '.join(map(str, here))}"
        print(f"stage {stage:3}  {where:15} {names:18}{', head and MTP' if is_last else '':14} {cost / whole:7.2%}")
    mean = sum(per_rank) / len(per_rank)
    print(f"the costliest rank has {max(per_rank) / mean:.3f} times the mean of all")
    return 0


def measured(config: TrainConfig) -> LayerCosts:
    """Milliseconds of each kind of block, forward and backward of one micro-batch on this device.

    Without messages between ranks. A MoE block has as many experts as a rank of the configuration, at least `top_k`;
    all tokens' choices fall on them, as many rows as a rank gets at an even load.
    """
    device = device_of(config.train)
    model = Transformer(_small(config), dtype=dtype_of(config.train, device), device=device)
    set_precision(model, config.train.precision, config.train.bf16_modules)
    dense, moe, head = (_milliseconds(config, model, layers) for layers in (_DENSE, _MOE, _NONE))
    mtp = _milliseconds(config, model, _NONE, with_mtp=True) - head if config.model.mtp_depth else moe + head
    return LayerCosts(dense, moe, head, mtp)


def _small(config: TrainConfig) -> ModelConfig:
    """A dense block, a MoE block and an MTP block."""
    model = config.model
    experts = max(model.num_experts // config.parallel.ep, model.top_k)
    model = dataclasses.replace(model, num_layers=2, num_dense_layers=1, mtp_depth=min(1, model.mtp_depth))
    if experts == model.num_experts:
        return model
    return dataclasses.replace(model, num_experts=experts, num_expert_groups=1, num_groups_kept=1)


def _milliseconds(config: TrainConfig, model: Transformer, layers: range, *, with_mtp: bool = False) -> float:
    """The median of a few rounds."""
    run, device, is_last = config.train, model.lm_head.weight.device, len(layers) == 0
    stage, lanes = Stage(model, layers, is_first=False, is_last=is_last), Lanes(device)
    rule = Rule(run.balance_alpha[0].value, 0.1 if with_mtp else 0.0, 1.0, frozenset(run.recompute))
    shape = (run.micro_batch_size, run.seq_len + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, device=device)
    batch = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    x_TD = torch.randn(batch.tokens_BT.numel(), config.model.dim, device=device).to(model.lm_head.weight.dtype)
    times = []
    for _ in range(_WARM_UP + _ROUNDS):
        model.zero_grad(set_to_none=True)
        _wait(device)
        start = time.perf_counter()
        chunk = Chunk(stage, batch, rule, lanes)
        Walk(chunk.forward(x_TD.clone()), lanes).finish()
        Walk(chunk.backward(None if is_last else x_TD.clone(), lambda parameter: None), lanes).finish()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[_WARM_UP:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""A slice of DeepSeek-V3 that fits one GPU, in this package and in transformers: the same widths, the same batch."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.config import ModelConfig, OptimConfig, ParallelConfig
from dsv3rt.layers.moe import Dispatched
from dsv3rt.layers.precision import Precision, set_precision
from dsv3rt.layers.weights import Orientations, casts_of, release_copies
from dsv3rt.model.flops import train_flops_per_token
from dsv3rt.model.transformer import Transformer
from dsv3rt.ops.types import Routing
from dsv3rt.parallel.build import moe_layers, outline
from dsv3rt.parallel.placement import Layout
from dsv3rt.train.optimizer import AdamW

EP_RANKS = 64
BF16_LINEARS = {"": (), "latents": ("*.q_a_proj", "*.kv_a_proj_with_mqa"), "attention": ("*.self_attn.*",)}


@dataclass(frozen=True)
class Slice:
    """MoE layers at V3's widths over one sequence, no MTP, no dense layers.

    one_rank: one of 64 expert-parallel ranks at even load: a router over 256 experts, 4 of them here, which get as many
    rows as 8 choices a token make; nothing travels.
    orientations: of our weights in FP8 that are kept.
    bf16: which of our linears multiply in BF16: "latents", those into MLA's latents, or "attention", all of its.
    as_graph: our step is captured once as a CUDA graph and replayed; the peer's is as always.
    """

    layers: int = 2
    tokens: int = 4096
    experts: int = 16
    with_optimizer: bool = False
    one_rank: bool = False
    orientations: Orientations = 2
    bf16: Literal["", "latents", "attention"] = ""
    as_graph: bool = False

    def __str__(self) -> str:
        parts = [f"{self.layers}layers", f"{self.experts}experts", f"{self.tokens}tokens"]
        parts += ["optimizer"] * self.with_optimizer + ["1of64ranks"] * self.one_rank
        parts += ["1orientation"] * (self.orientations == 1) + [f"{self.bf16}_in_bf16"] * bool(self.bf16)
        return "_".join(parts + ["graph"] * self.as_graph)

    @property
    def what(self) -> str:
        return "forward, backward" + ", optimizer" * self.with_optimizer + ", as a CUDA graph" * self.as_graph

    @property
    def config(self) -> ModelConfig:
        groups = (8, 4) if self.one_rank else (1, 1)
        return ModelConfig(
            vocab_size=32768, num_layers=self.layers, num_dense_layers=0, num_experts=self.experts, mtp_depth=0,
            num_expert_groups=groups[0], num_groups_kept=groups[1], max_position=self.tokens,
        )  # fmt: skip

    @property
    def flops(self) -> float:
        """Of forward and backward, as `model/flops.py` counts them."""
        return self.tokens * train_flops_per_token(self.config, self.tokens)

    def batch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator("cuda").manual_seed(1)
        shape = (1, self.tokens)
        draw = (torch.randint(0, 32768, shape, device="cuda", generator=generator) for _ in range(2))
        tokens_BT, labels_BT = draw
        return tokens_BT, labels_BT


@dataclass
class Subject:
    """What is measured: a step, and the bytes that it holds between steps. peak_bytes: the most that a captured step
    holds, which a replay doesn't tell; None: a step tells itself."""

    step: Callable[[], object]
    held_bytes: int
    model: Any
    peak_bytes: int | None = None


class EvenShare:
    """Stands for the exchange of 64 ranks: this rank's experts get the rows that all ranks' tokens would send it. As
    between nodes, gates do not come along."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self.num_chunks = 1

    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, num_experts: int, block: int, with_gates: bool, chunk: int
    ) -> Dispatched:
        local = dataclasses.replace(routing, idx_TK=routing.idx_TK % self._experts)
        return Dispatched(*ops.permute(x_TD, local, num_experts=self._experts, block=block))

    def combine(self, rows_PD: Tensor, dispatched: Dispatched, weight_TK: Tensor) -> Tensor:
        return ops.unpermute(rows_PD, dispatched.permutation, weight_TK)


def ours(shape: Slice, precision: Precision) -> Subject:
    """This package; gradients are dropped after each step, or used up by its optimizer. Weights in FP8 have no copy in
    BF16, as in training, where the optimizer keeps their numbers; without one nobody does."""
    before = torch.cuda.memory_allocated()
    model = build(shape)
    set_precision(model, precision, BF16_LINEARS[shape.bf16], shape.orientations)
    tokens_BT, labels_BT = shape.batch()
    optimizer = None
    if shape.with_optimizer:
        optimizer = AdamW(model.named_parameters(), OptimConfig(), casts=casts_of(model))
    else:
        release_copies(model)
    steps = 0

    def step() -> None:
        nonlocal steps
        loss = model(tokens_BT, labels_BT).loss
        assert loss is not None
        loss.backward()
        if optimizer is None:
            drop_gradients(model)
        else:
            steps += 1
            optimizer.step(steps, 1e-5, optimizer.grad_norm())

    step()
    if shape.as_graph:
        return captured(step, before, model)
    return Subject(step, torch.cuda.memory_allocated() - before, model)


def captured(step: Callable[[], object], before: int, model: Transformer) -> Subject:
    """The step, warmed up, as a graph. Gradients start from nothing in each replay, as they do without a graph. The
    memory of a step is the graph's own, between replays too. before: what was allocated without the model."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with torch.cuda.graph(graph):
        step()
    peak = torch.cuda.max_memory_allocated() - before

    def replay() -> object:
        graph.replay()
        return step  # whose batch the graph reads, so it has to live as long

    return Subject(replay, peak, model, peak)


def drop_gradients(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None
        if (kept := getattr(parameter, "main_grad", None)) is not None:
            kept.grad = None


def build(shape: Slice) -> Transformer:
    """In BF16, on the device, with random weights."""
    torch.manual_seed(0)
    if not shape.one_rank:
        return Transformer(shape.config, dtype=torch.bfloat16, device="cuda")
    layout = Layout(shape.config, ParallelConfig(dp=EP_RANKS, ep=EP_RANKS), shape.tokens)
    model = outline(layout, 0, 0, torch.bfloat16).to_empty(device="cuda")
    model.init_weights()
    for moe in moe_layers(model).values():
        moe.exchange = EvenShare(shape.experts // EP_RANKS)
    return model


def transformers(shape: Slice, *, compiled: bool) -> Subject:
    """Hugging Face's model in BF16 with its own choices of attention and of experts' products."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    before = torch.cuda.memory_allocated()
    config = shape.config
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(
            vocab_size=config.vocab_size, hidden_size=config.dim, num_hidden_layers=config.num_layers,
            first_k_dense_replace=0, n_routed_experts=config.num_experts, num_experts_per_tok=config.top_k,
            n_group=1, topk_group=1, moe_intermediate_size=config.expert_dim, intermediate_size=config.ffn_dim,
            max_position_embeddings=config.max_position, use_cache=False, dtype="bfloat16",
        )).to(torch.bfloat16)  # fmt: skip
    model.train()
    run = torch.compile(model) if compiled else model
    tokens_BT, labels_BT = shape.batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if shape.with_optimizer else None

    def step() -> None:
        run(input_ids=tokens_BT, labels=labels_BT).loss.backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.zero_grad(set_to_none=True)

    step()
    return Subject(step, torch.cuda.memory_allocated() - before, model)


def peak_bytes(subject: Subject) -> int:
    """The most that a step holds, without what other subjects hold meanwhile."""
    if subject.peak_bytes is not None:
        return subject.peak_bytes
    others = torch.cuda.memory_allocated() - subject.held_bytes
    torch.cuda.reset_peak_memory_stats()
    subject.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - others


def free() -> None:
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()

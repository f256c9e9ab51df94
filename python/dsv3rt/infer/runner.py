"""The model's decoding steps; those of a fixed shape are captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv3rt.infer.cache import PagedLatentCache
from dsv3rt.layers.mla import DecodeStep
from dsv3rt.model.transformer import Transformer

Call = Callable[..., Tensor]


class Graph:
    """A call captured with inputs of its own, into which those of later calls are copied."""

    def __init__(self, call: Call, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(x.clone() for x in inputs)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels are loaded and weights cast before the capture
            call(*self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = call(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, x in zip(self._inputs, inputs, strict=True):
            own.copy_(x)
        self._graph.replay()
        return self._output.clone()


def can_be_captured(model: Transformer) -> bool:
    """Whether no op of a step waits for the device: attention by kernels, experts, if any, in FP8."""
    weight, config = model.embed_tokens.weight, model.config
    by_kernels = weight.is_cuda and weight.dtype == torch.bfloat16
    kernel_dims = (config.kv_lora_rank, config.qk_rope_head_dim) == (512, 64)
    return by_kernels and kernel_dims and all(moe.experts.is_fp8 for moe in model.moe_layers)


class Runner:
    """capture: whether calls of `step` become graphs, one for each shape."""

    def __init__(self, model: Transformer, cache: PagedLatentCache, *, capture: bool) -> None:
        self._model, self._cache, self._capture = model, cache, capture
        self._graphs: dict[tuple[str, torch.Size], Graph] = {}

    def prefill(self, tokens_BL: Tensor, step: DecodeStep) -> Tensor:
        """As `step`, for shapes that come once."""
        return self._model.decode(tokens_BL, step, self._cache.layers)

    def prefill_mtp(self, next_BL: Tensor, hidden_BLD: Tensor, step: DecodeStep) -> Tensor:
        return self._model.decode_mtp(next_BL, hidden_BLD, step, self._cache.layers[self._model.config.num_layers])

    def step(self, tokens_BL: Tensor, step: DecodeStep) -> Tensor:
        """Normed hidden states (B, L, D) of new tokens, whose latents go to the cache."""
        return self._run("main", lambda tokens, *rest: self.prefill(tokens, DecodeStep(*rest)), (tokens_BL,), step)

    def step_mtp(self, next_BL: Tensor, hidden_BLD: Tensor, step: DecodeStep) -> Tensor:
        """As `Transformer.decode_mtp`."""
        call = lambda tokens, hidden, *rest: self.prefill_mtp(tokens, hidden, DecodeStep(*rest))  # noqa: E731
        return self._run("mtp", call, (next_BL, hidden_BLD), step)

    def _run(self, name: str, call: Call, arguments: tuple[Tensor, ...], step: DecodeStep) -> Tensor:
        inputs = (*arguments, step.cos_TR, step.sin_TR, step.slots_T, step.block_table, step.lengths_B)
        if not self._capture:
            return call(*inputs)
        key = (name, arguments[0].shape)
        if key not in self._graphs:
            self._graphs[key] = Graph(call, inputs)
        return self._graphs[key](*inputs)

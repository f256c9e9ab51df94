"""A rank's part of the model, with the weights that the whole model would have in one process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv3rt.config import ModelConfig
from dsv3rt.layers.moe import MoE
from dsv3rt.model.block import Block
from dsv3rt.model.transformer import Transformer
from dsv3rt.ops.types import ceil_div
from dsv3rt.parallel.expert import ExpertExchange
from dsv3rt.parallel.mesh import Mesh
from dsv3rt.parallel.placement import EXPERT_MARK, Layout

Shapes = dict[str, tuple[int, ...]]


class Elsewhere(nn.Module):
    """Stands for a module that other ranks hold."""


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Name -> shape of every parameter of the whole model, in the model's order."""
    return {name: tuple(p.shape) for name, p in Transformer(config, device="meta").named_parameters()}


def outline(layout: Layout, pp_rank: int, ep_rank: int, dtype: torch.dtype = torch.float32) -> Transformer:
    """The modules of a rank on the meta device: blocks that are elsewhere, and experts, are left out."""
    model = Transformer(layout.model, dtype=dtype, device="meta")
    mine = set(layout.stages_on(pp_rank))
    for owner, name, label in (
        *((model, name, name) for name in ("embed_tokens", "norm", "lm_head")),
        *((model.layers, str(i), f"layers.{i}") for i in range(len(model.layers))),
    ):
        if not layout.stages_of(f"{label}.") & mine:
            setattr(owner, name, Elsewhere())
    if layout.parallel.ep > 1:
        experts = layout.experts_on(ep_rank)
        for moe in moe_layers(model).values():
            for name, parameter in list(moe.experts.named_parameters()):
                setattr(moe.experts, name, nn.Parameter(parameter.detach()[experts].clone()))
    return model


def build(
    layout: Layout, mesh: Mesh, dtype: torch.dtype, device: torch.device, tokens: int, *, carries_gates: bool = False
) -> Transformer:
    """The rank's model on its device. Draws from torch's generator what `Transformer.init_weights` would draw.

    tokens: the most of a micro-batch. carries_gates: see `ExpertExchange`.
    """
    model = outline(layout, mesh.pp_rank, mesh.ep_rank, dtype).to_empty(device=device)
    _draw(model, layout, mesh, torch.empty(0, dtype=dtype, device=device))
    if mesh.config.ep > 1:
        ((_, group),) = mesh.groups("experts", layout.expert_groups()).items()
        config = mesh.config
        exchange = ExpertExchange(
            group,
            config.ep,
            capacity=config.expert_capacity,
            num_sms=config.expert_sms,
            carries_gates=carries_gates,
            num_chunks=config.expert_chunks,
        )
        if device.type == "cuda":
            like_TD = torch.empty(ceil_div(tokens, config.expert_chunks), layout.model.dim, dtype=dtype, device=device)
            exchange.open(like_TD, layout.model.num_experts, layout.model.top_k)
        for moe in moe_layers(model).values():
            moe.exchange = exchange
    return model


def moe_layers(model: Transformer) -> dict[int, MoE]:
    """The MoE layers that are here, by layer number."""
    blocks = ((i, layer) for i, layer in enumerate(model.layers) if isinstance(layer, Block))
    return {i: block.mlp for i, block in blocks if isinstance(block.mlp, MoE)}


@torch.no_grad()
def _draw(model: Transformer, layout: Layout, mesh: Mesh, like: Tensor) -> None:
    """Every rank draws the whole model's numbers, one parameter after the other, and keeps its own."""
    mine = dict(model.named_parameters())
    for name, shape in parameter_shapes(layout.model).items():
        parameter = mine.get(name)
        if len(shape) == 1:
            if parameter is not None:
                parameter.fill_(1.0)
            continue
        is_whole = parameter is not None and tuple(parameter.shape) == shape
        whole = parameter if parameter is not None and is_whole else like.new_empty(shape)
        whole.normal_(std=layout.model.init_std)
        if parameter is not None and not is_whole:
            assert EXPERT_MARK in name
            parameter.copy_(whole[layout.experts_on(mesh.ep_rank)])
    for moe in moe_layers(model).values():
        moe.gate.e_score_correction_bias.zero_()

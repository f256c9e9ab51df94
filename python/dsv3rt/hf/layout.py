"""The tensors of a Hugging Face checkpoint of DeepSeek-V3: their keys, shapes, roles, and their place in a Transformer.

Source: the index of the released checkpoint (91,991 tensors, scales included) and its README_WEIGHTS.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dsv3rt.config import ModelConfig
from dsv3rt.ops.types import TILE, ceil_div

SCALE_SUFFIX = "_scale_inv"
Role = Literal["linear", "plain", "bias"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor. role: "linear" is FP8 in an FP8 checkpoint, "plain" always BF16, "bias" always FP32.

    duplicate_of: the key of the tensor that this one repeats, "" for none; duplicates may be absent.
    """

    key: str
    shape: tuple[int, ...]
    role: Role = "plain"
    duplicate_of: str = ""

    @property
    def scale_key(self) -> str:
        return self.key + SCALE_SUFFIX

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return tuple(ceil_div(size, TILE) for size in self.shape)


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the checkpoint in its order, scales aside."""
    table = (config.vocab_size, config.dim)
    yield TensorSpec("model.embed_tokens.weight", table)
    for layer in range(config.num_layers + config.mtp_depth):
        prefix = f"model.layers.{layer}."
        if layer >= config.num_layers:
            yield from _mtp_specs(config, prefix)
        yield from _attention_specs(config, f"{prefix}self_attn.")
        if layer < config.num_dense_layers:
            yield from _feed_forward_specs(f"{prefix}mlp.", config.dim, config.ffn_dim)
        else:
            yield from _moe_specs(config, f"{prefix}mlp.")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield TensorSpec(f"{prefix}{norm}.weight", (config.dim,))
    yield TensorSpec("model.norm.weight", (config.dim,))
    yield TensorSpec("lm_head.weight", table)


def mtp_prefixes(config: ModelConfig) -> tuple[str, ...]:
    """What the keys of the MTP layers start with."""
    first = config.num_layers
    return tuple(f"model.layers.{layer}." for layer in range(first, first + config.mtp_depth))


def _mtp_specs(config: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    dim, table = config.dim, (config.vocab_size, config.dim)
    yield TensorSpec(f"{prefix}embed_tokens.weight", table, duplicate_of="model.embed_tokens.weight")
    yield TensorSpec(f"{prefix}enorm.weight", (dim,))
    yield TensorSpec(f"{prefix}hnorm.weight", (dim,))
    yield TensorSpec(f"{prefix}eh_proj.weight", (dim, 2 * dim))
    yield TensorSpec(f"{prefix}shared_head.norm.weight", (dim,))
    yield TensorSpec(f"{prefix}shared_head.head.weight", table, duplicate_of="lm_head.weight")


def _attention_specs(config: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    dim, heads, rank, latent = config.dim, config.num_heads, config.q_lora_rank, config.kv_lora_rank
    q_dim = heads * config.qk_head_dim
    if rank is None:
        yield TensorSpec(f"{prefix}q_proj.weight", (q_dim, dim), "linear")
    else:
        yield TensorSpec(f"{prefix}q_a_proj.weight", (rank, dim), "linear")
        yield TensorSpec(f"{prefix}q_a_layernorm.weight", (rank,))
        yield TensorSpec(f"{prefix}q_b_proj.weight", (q_dim, rank), "linear")
    yield TensorSpec(f"{prefix}kv_a_proj_with_mqa.weight", (latent + config.qk_rope_head_dim, dim), "linear")
    yield TensorSpec(f"{prefix}kv_a_layernorm.weight", (latent,))
    kv_dim = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield TensorSpec(f"{prefix}kv_b_proj.weight", (kv_dim, latent), "linear")
    yield TensorSpec(f"{prefix}o_proj.weight", (dim, heads * config.v_head_dim), "linear")


def _feed_forward_specs(prefix: str, dim: int, hidden: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{prefix}gate_proj.weight", (hidden, dim), "linear")
    yield TensorSpec(f"{prefix}up_proj.weight", (hidden, dim), "linear")
    yield TensorSpec(f"{prefix}down_proj.weight", (dim, hidden), "linear")


def _moe_specs(config: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{prefix}gate.weight", (config.num_experts, config.dim))
    yield TensorSpec(f"{prefix}gate.e_score_correction_bias", (config.num_experts,), "bias")
    for expert in range(config.num_experts):
        yield from _feed_forward_specs(f"{prefix}experts.{expert}.", config.dim, config.expert_dim)
    if config.num_shared_experts:
        hidden = config.num_shared_experts * config.expert_dim
        yield from _feed_forward_specs(f"{prefix}shared_experts.", config.dim, hidden)


def view_of(state: Mapping[str, Tensor], spec: TensorSpec) -> Tensor:
    """The part of a Transformer's `state_dict()` that holds a tensor of the checkpoint; duplicates share one."""
    name = (spec.duplicate_of or spec.key).removeprefix("model.")
    head, fused, tail = name.partition(".experts.")
    if not fused:
        return state[name]
    expert, projection, _ = tail.split(".")
    if projection == "down_proj":
        return state[f"{head}.experts.down_proj"][int(expert)]
    gate, up = state[f"{head}.experts.gate_up_proj"][int(expert)].chunk(2)
    return gate if projection == "gate_proj" else up

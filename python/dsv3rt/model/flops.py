"""Counts of parameters and of floating point operations, from the configuration alone.

Accounting (reproduces DeepSeek's "Insights", arXiv 2505.09343, table 4): a training token costs 6 FLOPs for every
weight it meets in a product (2 forward, 4 backward) and 6 * H * ((N + R) + U) * keys a layer for attention's two
products, where keys is the sequence length, halved when causal. The embedding lookup, norms, softmax and rotations
count nothing; the head counts, once more for every MTP depth. Recomputation counts nothing. DeepSeek-V3 at 4096, in
GFLOP a token: 250.5 causal, 281.2 non-causal, 260.6 causal with MTP.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3rt.config import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """main: embedding, blocks, norm, head. mtp: the MTP blocks' own. activated: weights one token is multiplied with in
    the main model, norms and head included, the embedding table (a lookup) left out."""

    main: int
    mtp: int
    activated: int


def _attention_weights(config: ModelConfig) -> int:
    """Weights in the matrices of one MLA layer."""
    q_dim = config.num_heads * config.qk_head_dim
    rank = config.q_lora_rank
    query = config.dim * q_dim if rank is None else rank * (config.dim + q_dim)
    down = config.dim * (config.kv_lora_rank + config.qk_rope_head_dim)
    up = config.kv_lora_rank * config.num_heads * (config.qk_nope_head_dim + config.v_head_dim)
    return query + down + up + config.num_heads * config.v_head_dim * config.dim


def _norm_weights(config: ModelConfig) -> int:
    """Weights of the norms of one block."""
    return 2 * config.dim + config.kv_lora_rank + (config.q_lora_rank or 0)


def _moe_weights(config: ModelConfig, experts: int) -> int:
    """Weights of the router and of `experts` routed and all shared experts."""
    return config.num_experts * config.dim + 3 * config.dim * config.expert_dim * (experts + config.num_shared_experts)


def _layer_weights(config: ModelConfig, experts: int) -> int:
    """Weights in the matrices of the main blocks, `experts` routed experts counted a MoE layer."""
    dense = config.num_dense_layers * 3 * config.dim * config.ffn_dim
    moe = (config.num_layers - config.num_dense_layers) * _moe_weights(config, experts)
    return config.num_layers * _attention_weights(config) + dense + moe


def _mtp_weights(config: ModelConfig, experts: int) -> int:
    """Weights in the matrices of one MTP block, embedding and head left out."""
    return _attention_weights(config) + _moe_weights(config, experts) + 2 * config.dim * config.dim


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Parameters of `Transformer(config)`; the router biases are buffers and count nothing."""
    norms = config.num_layers * _norm_weights(config) + config.dim
    table = config.vocab_size * config.dim
    return ParameterCounts(
        main=_layer_weights(config, config.num_experts) + norms + 2 * table,
        mtp=config.mtp_depth * (_mtp_weights(config, config.num_experts) + _norm_weights(config) + 3 * config.dim),
        activated=_layer_weights(config, config.top_k) + norms + table,
    )


def train_flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True, with_mtp: bool = False) -> float:
    """FLOPs of forward and backward for one token of a sequence of `seq_len`; see the module's docstring."""
    keys = seq_len / 2 if causal else float(seq_len)
    attention = config.num_heads * (config.qk_head_dim + config.v_head_dim) * keys
    head = config.vocab_size * config.dim
    weights = _layer_weights(config, config.top_k) + head + config.num_layers * attention
    if with_mtp:
        weights += config.mtp_depth * (_mtp_weights(config, config.top_k) + head + attention)
    return 6.0 * weights


@dataclass(frozen=True)
class LayerCosts:
    """Multiplications a token of every main block, and of what follows them: head, MTP blocks and their heads."""

    layers: tuple[int, ...]
    tail: int


def layer_costs(config: ModelConfig, seq_len: int) -> LayerCosts:
    """What `train_flops_per_token` counts, block by block (causal, without its factor 6)."""
    products = config.num_heads * (config.qk_head_dim + config.v_head_dim) * seq_len // 2
    attention = _attention_weights(config) + products
    dense, moe = 3 * config.dim * config.ffn_dim, _moe_weights(config, config.top_k)
    head = config.vocab_size * config.dim
    feed_forwards = [dense if i < config.num_dense_layers else moe for i in range(config.num_layers)]
    mtp = _mtp_weights(config, config.top_k) + products + head
    return LayerCosts(tuple(attention + cost for cost in feed_forwards), head + config.mtp_depth * mtp)

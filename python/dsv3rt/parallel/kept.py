"""Bytes that a micro-batch keeps in a stage: from forward to backward, and of a backward cut in two from I to W.

Line by line what layers and ops save with the kernels' ops, `module.is_fp8` asked of each module (docs/precision.md).
tests/parallel/test_kept_bytes.py holds each line against the memory that is really held. Rows of experts are as many as
there is room for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dsv3rt.config import TrainConfig
from dsv3rt.layers.feed_forward import FeedForward
from dsv3rt.layers.linear import Linear
from dsv3rt.layers.mla import MLA
from dsv3rt.layers.moe import MoE
from dsv3rt.model.block import Block
from dsv3rt.model.mtp import MTPBlock
from dsv3rt.ops.types import TILE, ceil_div, round_up
from dsv3rt.parallel.expert import room

_FP32, _INT32, _INT64 = 4, 4, 8
_NODE_RANKS = 8  # so many are taken to reach each other's memory, and then fetch results instead of keeping them
# Tensors of a token's width that pass through a phase beside its own: residual, gradients, sums; as tests find them.
_PASSING_FORWARD, _PASSING_BACKWARD = 3, 8


def by_rows(rows: int, columns: int) -> int:
    """A cast in 1x128 tiles, with its scales."""
    return rows * columns + _FP32 * round_up(rows, 4) * ceil_div(columns, TILE)


def by_columns(rows: int, columns: int) -> int:
    """A cast in 128x1 tiles, with its scales."""
    padded = round_up(rows, TILE)
    return padded * columns + _FP32 * round_up(columns, 4) * (padded // TILE)


class Kept:
    """Of one micro-batch in one block."""

    def __init__(self, config: TrainConfig, item: int, *, row_block: int = TILE) -> None:
        """item: bytes of a number of the model's dtype. row_block: what experts' rows are padded to."""
        model = self._model = config.model
        self.tokens = config.train.micro_batch_size * config.train.seq_len
        self._item = item
        self._recompute = frozenset(config.train.recompute)
        self._is_fp8 = config.train.precision == "fp8"
        parallel = config.parallel
        self._spread = parallel.ep > 1
        self._fetches = self._spread and parallel.ep <= _NODE_RANKS and not self._recomputes("experts")
        self._chunks = parallel.expert_chunks
        self._chunk_tokens = ceil_div(self.tokens, self._chunks)
        choices = self._chunk_tokens, model.top_k
        self.rows = self._chunks * room(model.num_experts, parallel.ep, parallel.expert_capacity, choices, row_block)

    def block(self, block: Block) -> int:
        """From forward to backward. The input counts, the output is the next block's."""
        kept = self._norm(again="norm") + self.attention(block.self_attn) + self._norm(again="norm")
        if not self._recomputes("norm"):
            if not self._is_joint(block.self_attn) or not block.self_attn.kv_a_proj_with_mqa.is_fp8:
                kept += self._wide(self._model.dim) * self._reads_norm(block.self_attn)
            kept += self._wide(self._model.dim)  # of the second norm: router, dispatch and shared experts begin with it
        if isinstance(block.mlp, MoE):
            return kept + self._router() + (0 if self._recomputes("experts") else self.experts(block.mlp))
        return kept + self.feed_forward(block.mlp, self.tokens)

    def attention(self, mla: MLA) -> int:
        """From the norm's output to the output projection's input."""
        model, T = self._model, self.tokens
        width = model.num_heads * model.v_head_dim
        kept = self._wide(width) + _FP32 * T * model.num_heads
        kept += self._down(mla) + (0 if self._recomputes("mla_up") else self.up(mla))
        return kept

    def up(self, mla: MLA) -> int:
        """Queries, keys, values and what the products that make them save."""
        model = self._model
        kept = self._wide(model.num_heads * model.qk_head_dim + model.qk_rope_head_dim)
        kept += self._wide(model.num_heads * (model.qk_nope_head_dim + model.v_head_dim))
        if model.q_lora_rank is not None:
            kept += _FP32 * self.tokens + self._input(mla.q_b_proj)
        return kept + _FP32 * self.tokens + self._input(mla.kv_b_proj)

    def feed_forward(self, mlp: FeedForward, rows: int, *, keeps_swiglu: bool = False) -> int:
        """Of a dense feed-forward whose BF16 input somebody else keeps."""
        hidden = mlp.gate_proj.weight.shape[0]
        if mlp.gate_proj.is_fp8 and mlp.up_proj.is_fp8 and mlp.down_proj.is_fp8:
            return by_columns(rows, self._model.dim) + by_rows(rows, 2 * hidden)
        inputs = sum(self._input(linear) for linear in (mlp.gate_proj, mlp.up_proj) if linear.is_fp8)
        return inputs + self._swiglu(rows, hidden, down_is_fp8=mlp.down_proj.is_fp8, keeps=keeps_swiglu)

    def experts(self, moe: MoE, *, keeps_swiglu: bool = False) -> int:
        """From dispatch to combine, shared experts beside. keeps_swiglu: whatever else is computed again."""
        T, P, dim, hidden = self.tokens, self.rows, self._model.dim, self._model.expert_dim
        kept = 0
        if moe.shared_experts is not None:
            kept += self.feed_forward(moe.shared_experts, T, keeps_swiglu=keeps_swiglu) + self._wide(dim)
        where = _INT32 * P if self._spread else _INT64 * T * self._model.top_k
        if not moe.experts.is_fp8:
            return kept + where + 2 * self._item * P * dim + self._swiglu(P, hidden, keeps=keeps_swiglu)
        kept += where + by_columns(P, dim) + by_rows(P, 2 * hidden)
        if self._fetches:  # rows as they arrived, their gates, and where those of the tokens lie
            return kept + self._item * P * dim + _FP32 * P + _INT32 * T * self._model.top_k
        if self._spread:
            return kept + 2 * self._item * P * dim  # as they arrived, and the results, for the gradient of the gates
        return kept + (_INT32 + _FP32) * P + self._wide(dim)

    def ends(self, *, is_last: bool, mtp: Iterable[MTPBlock]) -> int:
        """Of a stage beside its blocks: rotary tables, and what last norm and MTP keep. Its output goes when sent."""
        model, T = self._model, self.tokens
        tables = _FP32 * T * model.qk_rope_head_dim
        if not is_last:
            return tables
        normed = self._norm() + self._wide(model.dim)
        merged = sum(self._norm() + _FP32 * T + self._wide(2 * model.dim) + _INT64 * T + normed for _ in mtp)
        return tables + normed + merged

    def heads(self) -> int:
        """Gradients of hidden states and head weights, which the cross-entropies compute in their forward."""
        model = self._model
        return (1 + model.mtp_depth) * self._item * model.dim * (self.tokens + model.vocab_size)

    def owed(self, block: Block) -> int:
        """From I to W: both factors of the weight gradients that were put off."""
        mla, T = block.self_attn, self.tokens
        first = mla.q_proj if self._model.q_lora_rank is None else mla.q_a_proj
        together = [first, mla.kv_a_proj_with_mqa]
        rest = [module for module in mla.modules() if isinstance(module, Linear) and module not in together]
        owed = self._factors(together, one_cast=self._is_joint(mla)) + sum(self._factors([linear]) for linear in rest)
        if isinstance(block, MTPBlock):
            owed += self._factors([block.eh_proj])
        if isinstance(block.mlp, FeedForward):
            return owed + self._owed_mlp(block.mlp)
        if block.mlp.shared_experts is not None:
            owed += self._owed_mlp(block.mlp.shared_experts)
        P, dim, hidden = self.rows, self._model.dim, self._model.expert_dim
        if not block.mlp.experts.is_fp8:
            return owed + self._item * P * (2 * dim + 3 * hidden)
        gates = 0 if self._spread else T * self._model.top_k * (_INT64 + 2 * _FP32)  # places, gates, their gradients
        return owed + gates + self._owed_swiglu(P, hidden)

    def forward_work(self, block: Block) -> int:
        """What the fullest phase of a forward has at one time and does not keep."""
        model, T, item = self._model, self.tokens, self._item
        attention = T * model.num_heads * model.v_head_dim  # cast for the output projection
        attention += self.up(block.self_attn) if self._recomputes("mla_up") else 0
        if isinstance(block.mlp, FeedForward):
            hidden = block.mlp.gate_proj.weight.shape[0]
            mlp = self._mlp_forward(T, hidden, is_fp8=block.mlp.gate_proj.is_fp8)
            mlp -= min(mlp, self.feed_forward(block.mlp, T))
        else:
            P = self.rows // self._chunks
            mlp = self._mlp_forward(P, model.expert_dim, is_fp8=block.mlp.experts.is_fp8) + 2 * item * P * model.dim
            if self._recomputes("experts"):
                mlp += 2 * item * (self.rows - P) * model.dim  # of chunks that wait, or that are done
            else:
                mlp -= min(mlp, self.experts(block.mlp) // self._chunks)
        return max(attention, mlp) + _PASSING_FORWARD * self._wide(model.dim)

    def backward_work(self, block: Block) -> int:
        """What a block's backward has computed again, and the fullest phase's gradients and casts."""
        model, T, P = self._model, self.tokens, self.rows
        again = self._wide(2 * model.dim) if self._recomputes("norm") else 0
        if self._recomputes("mla_up"):
            again += self.up(block.self_attn)
        heads = model.num_heads * (model.qk_head_dim + model.qk_nope_head_dim + 3 * model.v_head_dim)
        attention = self._wide(heads) + _FP32 * T * model.num_heads * (model.qk_rope_head_dim + 2)  # and FP32 parts
        if isinstance(block.mlp, FeedForward):
            mlp = self._mlp_backward(T, block.mlp.gate_proj.weight.shape[0], is_fp8=block.mlp.gate_proj.is_fp8)
        else:
            again += self.experts(block.mlp, keeps_swiglu=True) if self._recomputes("experts") else 0
            mlp = self._mlp_backward(P // self._chunks, model.expert_dim, is_fp8=block.mlp.experts.is_fp8)
            mlp += 2 * self._item * P * model.dim
        return again + max(attention, mlp) + _PASSING_BACKWARD * self._wide(model.dim)

    def window(self) -> int:
        """What the kernels' exchange registers: a chunk's tokens, results of its choices, and rooms for all rows."""
        if not self._spread:
            return 0
        rows = self._chunk_tokens * (1 + self._model.top_k) + (2 * self.rows if self._fetches and self._is_fp8 else 0)
        return self._item * self._model.dim * rows

    def _recomputes(self, what: str) -> bool:
        return what in self._recompute

    def _wide(self, columns: int) -> int:
        return self._item * self.tokens * columns

    def _norm(self, again: str = "") -> int:
        """Input, and the reciprocal root of each row."""
        return self._wide(self._model.dim) + (0 if self._recomputes(again) else _FP32 * self.tokens)

    def _input(self, linear: Linear) -> int:
        rows, columns = self.tokens, linear.weight.shape[1]
        return by_columns(rows, columns) if linear.is_fp8 else self._wide(columns)

    def _factors(self, linears: Sequence[Linear], *, one_cast: bool = False) -> int:
        """Of products with one input: it, in each form that they keep it in, and the gradients of the results."""
        fp8 = [linear for linear in linears if linear.is_fp8]
        wide = [linear for linear in linears if not linear.is_fp8]
        columns = linears[0].weight.shape[1]
        inputs = by_columns(self.tokens, columns) * (min(1, len(fp8)) if one_cast else len(fp8))
        inputs += self._wide(columns) if wide else 0
        gradients = sum(by_columns(self.tokens, linear.weight.shape[0]) for linear in fp8)
        return inputs + gradients + sum(self._wide(linear.weight.shape[0]) for linear in wide)

    def _is_joint(self, mla: MLA) -> bool:
        """Whether both projections into latents are one product."""
        return self._model.q_lora_rank is not None and mla.q_a_proj.is_fp8 and mla.kv_a_proj_with_mqa.is_fp8

    def _down(self, mla: MLA) -> int:
        """Inputs of the projections in FP8, and the latents."""
        model = self._model
        first = mla.q_proj if model.q_lora_rank is None else mla.q_a_proj
        both = [first] if self._is_joint(mla) else [first, mla.kv_a_proj_with_mqa]
        kept = sum(self._input(linear) for linear in both if linear.is_fp8)
        query = first.weight.shape[0] if model.q_lora_rank is not None or self._recomputes("mla_up") else 0
        return kept + self._wide(query + model.kv_lora_rank + model.qk_rope_head_dim)

    def _reads_norm(self, mla: MLA) -> bool:
        """Whether a product in the model's dtype keeps the first norm's output."""
        first = mla.q_proj if self._model.q_lora_rank is None else mla.q_a_proj
        return not (first.is_fp8 and mla.kv_a_proj_with_mqa.is_fp8)

    def _router(self) -> int:
        """Scores, choices and gates."""
        model = self._model
        return self.tokens * (_FP32 * model.num_experts + (_INT64 + _FP32) * model.top_k)

    def _swiglu(self, rows: int, hidden: int, *, down_is_fp8: bool = False, keeps: bool = False) -> int:
        """Of gate and up: themselves where the product is computed again, else FP32 copies and silu(gate)."""
        result = by_columns(rows, hidden) if down_is_fp8 else self._item * rows * hidden
        if keeps or not self._recomputes("swiglu"):
            return 3 * _FP32 * rows * hidden + result
        return 2 * self._item * rows * hidden + (result if down_is_fp8 else 0)

    def _mlp_forward(self, rows: int, hidden: int, *, is_fp8: bool) -> int:
        """All that is made, but for what comes in and goes out: casts of the input, of SwiGLU's input and output."""
        made = self._item * rows * 2 * hidden
        if is_fp8:
            return made + 2 * by_rows(rows, self._model.dim) + by_rows(rows, hidden) + by_rows(rows, 2 * hidden)
        return made + (4 * _FP32 + self._item) * rows * hidden  # both inputs, silu and the product in FP32

    def _mlp_backward(self, rows: int, hidden: int, *, is_fp8: bool) -> int:
        """The gradient of SwiGLU's output, and casts of all gradients and of that output, or FP32 gradients."""
        made = self._item * rows * hidden
        if is_fp8:
            casts = by_rows(rows, self._model.dim) + by_rows(rows, 2 * hidden)
            return made + casts + self._owed_swiglu(rows, hidden) - by_columns(rows, self._model.dim)
        return made + (4 * _FP32 + 2 * self._item) * rows * hidden

    def _owed_mlp(self, mlp: FeedForward) -> int:
        if mlp.gate_proj.is_fp8 and mlp.up_proj.is_fp8 and mlp.down_proj.is_fp8:
            return self._owed_swiglu(self.tokens, mlp.gate_proj.weight.shape[0])
        return self._factors([mlp.gate_proj, mlp.up_proj]) + self._factors([mlp.down_proj])

    def _owed_swiglu(self, rows: int, hidden: int) -> int:
        return 2 * by_columns(rows, self._model.dim) + by_columns(rows, hidden) + by_columns(rows, 2 * hidden)

"""Multi-head latent attention: the training form and the absorbed (decoding) form of the same parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsv3rt import ops
from dsv3rt.config import ModelConfig
from dsv3rt.layers import fp8
from dsv3rt.layers.ledger import Ledger, recomputed
from dsv3rt.layers.linear import Linear
from dsv3rt.layers.norm import RMSNorm
from dsv3rt.layers.rotary import rotate_queries
from dsv3rt.layers.weights import Stack, WeightCast, readable


@dataclass(frozen=True)
class Sequences:
    """What attention must know of a packed batch of T tokens.

    cos_TR, sin_TR: (T, R / 2) FP32 rotary tables. cu_seqlens: (B + 1,) int32, sequence b owns rows
    cu_seqlens[b] .. cu_seqlens[b + 1].
    """

    cos_TR: Tensor
    sin_TR: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class DecodeStep:
    """What absorbed attention must know of B sequences with L new tokens each (T = B * L rows, sequence-major).

    cos_TR, sin_TR: (T, R / 2) FP32. slots_T: (T,) int64, where each new token's latent goes: page * 64 + place;
    negative in rows that are idle.
    block_table: (B, max_pages) int32. lengths_B: (B,) int32, tokens in the cache, the new ones included.
    """

    cos_TR: Tensor
    sin_TR: Tensor
    slots_T: Tensor
    block_table: Tensor
    lengths_B: Tensor


class SplitColumns(torch.autograd.Function):
    """x[..., :first] and x[..., first:]. Gradients that already lie side by side are joined without a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        return x[..., :first], x[..., first:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, left: Tensor, right: Tensor) -> tuple[Tensor, None]:
        neighbours = (
            left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
            and left.storage_offset() + left.shape[-1] == right.storage_offset()
            and left.stride() == right.stride()
            and left.stride(-1) == 1
            and left.stride(-2) >= left.shape[-1] + right.shape[-1]
        )
        if not neighbours:
            return torch.cat((left, right), dim=-1), None
        return left.as_strided((*left.shape[:-1], left.shape[-1] + right.shape[-1]), left.stride()), None


def _norm_up(latent_TC: Tensor, norm: RMSNorm, proj: Linear, ledger: Ledger | None) -> Tensor:
    """The projection of a latent's norm; in FP8 norm and cast are one."""
    stacks = proj.fp8_weights()
    y: Tensor = fp8.norm_linear(latent_TC, norm, stacks[0], ledger) if stacks else proj(norm(latent_TC), ledger)
    return y


class MLA(nn.Module):
    """Attention over a shared latent of C + R numbers a token (DeepSeek-V2 report sec. 2.1, V3 report sec. 2.1.1).

    Parameter names and shapes are the Hugging Face checkpoint's; `q_lora_rank=None` gives one `q_proj`.

    Saved tensors, training form on the kernels; bytes a token counted in BF16 at DeepSeek-V3's widths:
        x (T, D)                                            14,336
        both latents before their norms, with k_rope         4,224
        both latents after them (*)                          4,096
        q, turned (*)                                       49,152
        kv, which k_nope and v view, and k_rope turned (*)  65,664
        the attention's output and FP32 lse                 33,280
    A ledger that recomputes "mla_up" keeps none of (*): they come again from the latents by one norm and one GEMM each
    (V3 report sec. 3.2.3), and 51,840 of 170,752 bytes remain.
    """

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        dim, heads, rank = config.dim, config.num_heads, config.q_lora_rank
        q_dim = heads * config.qk_head_dim
        if rank is None:
            self.q_proj = Linear(dim, q_dim, dtype=dtype, device=device)
        else:
            self.q_a_proj = Linear(dim, rank, dtype=dtype, device=device)
            self.q_a_layernorm = RMSNorm(rank, config.norm_eps, dtype=dtype, device=device)
            self.q_b_proj = Linear(rank, q_dim, dtype=dtype, device=device)
        latent = config.kv_lora_rank
        kv_dim = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_a_proj_with_mqa = Linear(dim, latent + config.qk_rope_head_dim, dtype=dtype, device=device)
        self.kv_a_layernorm = RMSNorm(latent, config.norm_eps, dtype=dtype, device=device)
        self.kv_b_proj = Linear(latent, kv_dim, dtype=dtype, device=device)
        self.o_proj = Linear(heads * config.v_head_dim, dim, dtype=dtype, device=device, keep_input=True)
        self._down_cast = WeightCast()

    def _query_input(self, x_TD: Tensor, ledger: Ledger | None = None) -> Tensor:
        """The query latent before its norm (T, Q), or the query itself where there is no latent."""
        q: Tensor = self.q_proj(x_TD, ledger) if self.config.q_lora_rank is None else self.q_a_proj(x_TD, ledger)
        return q

    def _queries(self, q: Tensor, cos_TR: Tensor, sin_TR: Tensor, ledger: Ledger | None = None) -> Tensor:
        """(T, H, N + R), the rope part rotated, from `_query_input`, which stays as it is."""
        config = self.config
        q = q.clone() if config.q_lora_rank is None else _norm_up(q, self.q_a_layernorm, self.q_b_proj, ledger)
        return rotate_queries(q.unflatten(-1, (config.num_heads, config.qk_head_dim)), cos_TR, sin_TR)

    def forward(self, x_TD: Tensor, sequences: Sequences, ledger: Ledger | None = None) -> Tensor:
        """Causal attention inside each sequence; (T, D) -> (T, D)."""
        config = self.config
        cos_TR, sin_TR = sequences.cos_TR, sequences.sin_TR

        def up(q: Tensor, kv_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q_THC = self._queries(q, cos_TR, sin_TR, ledger)
            latent_TC, rope_TR = kv_a.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
            kv = _norm_up(latent_TC, self.kv_a_layernorm, self.kv_b_proj, ledger)
            return q_THC, kv, ops.rope(rope_TR, cos_TR, sin_TR)

        q_THC, kv, k_rope_TR = recomputed(ledger, "mla_up", up, *self._down(x_TD, ledger))
        kv_THX = kv.unflatten(-1, (config.num_heads, -1))
        k_nope_THN, v_THU = cast(tuple[Tensor, Tensor], SplitColumns.apply(kv_THX, config.qk_nope_head_dim))
        out_THU, _ = ops.mla_prefill(
            q_THC, k_nope_THN, k_rope_TR, v_THU, sequences.cu_seqlens, scale=config.softmax_scale
        )
        y_TD: Tensor = self.o_proj(out_THU.flatten(1), ledger)
        return y_TD

    def _down(self, x_TD: Tensor, ledger: Ledger | None) -> tuple[Tensor, Tensor]:
        """`_query_input`, and keys and values before the norm of their latent; in FP8 by one product."""
        stacks = self.fp8_weights()
        if not stacks:
            return self._query_input(x_TD, ledger), self.kv_a_proj_with_mqa(x_TD, ledger)
        both = fp8.linear(x_TD, stacks[0], ledger, keep_input=False)
        return cast(tuple[Tensor, Tensor], SplitColumns.apply(both, self.config.q_lora_rank))

    def fp8_weights(self) -> list[Stack]:
        """The projections into both latents, one product, if both are in FP8."""
        if self.config.q_lora_rank is None or not (self.q_a_proj.is_fp8 and self.kv_a_proj_with_mqa.is_fp8):
            return []
        return [(self._down_cast, (self.q_a_proj.weight, self.kv_a_proj_with_mqa.weight))]

    def decode(self, x_TD: Tensor, step: DecodeStep, cache: Tensor) -> Tensor:
        """Attention of new tokens over the latent cache, kv_b_proj absorbed into query and output; (T, D) -> (T, D).

        cache: (pages, 64, C + R) in the model's dtype or the bytes of an FP8 cache, written in place at step.slots_T
        before it is read. The two halves of kv_b_proj are views: absorbing them costs nothing at load and no memory.
        For inference: call it without grad.
        """
        config = self.config
        q, kv_a = self._down(x_TD, None)
        q_THC = self._queries(q, step.cos_TR, step.sin_TR)
        q_nope_THN, q_rope_THR = q_THC.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        norm = self.kv_a_layernorm
        ops.append_latents(cache, kv_a, norm.weight, step.cos_TR, step.sin_TR, step.slots_T, eps=norm.eps)

        w_HXC = readable(self.kv_b_proj.weight).unflatten(0, (config.num_heads, -1))
        w_k_HNC, w_v_HUC = w_HXC.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        q_latent_THC = torch.einsum("thn,hnc->thc", q_nope_THN, w_k_HNC)
        q_BLHC = torch.cat([q_latent_THC, q_rope_THR], dim=-1).unflatten(0, (len(step.lengths_B), -1))
        scale, latent_dim = config.softmax_scale, config.kv_lora_rank
        out_BLHC, _ = ops.mla_decode(
            q_BLHC, cache, step.block_table, step.lengths_B, scale=scale, latent_dim=latent_dim
        )
        out_THU = torch.einsum("thc,huc->thu", out_BLHC.flatten(0, 1), w_v_HUC)
        y_TD: Tensor = self.o_proj(out_THU.flatten(1))
        return y_TD

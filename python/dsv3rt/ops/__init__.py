"""The ops: one signature each, a reference body in plain torch and, where there is one, a CUDA body.

Stateless functions; docs/architecture.md tabulates their contracts, each docstring states its own.
"""

from dsv3rt.ops.attention import mla_decode, mla_prefill
from dsv3rt.ops.embed import embedding, rope, rope_
from dsv3rt.ops.ep import EpGroup, ep_combine, ep_dispatch, ep_dispatch_with_weights, ep_room
from dsv3rt.ops.ep_latency import ep_collect, ep_receive, ep_send, ep_send_back
from dsv3rt.ops.gemm import (
    fp8_gemm_nt,
    grouped_gemm_nt,
    grouped_weight_grad,
    k_grouped_fp8_gemm_nt,
    m_grouped_fp8_gemm_nt,
)
from dsv3rt.ops.latent_cache import append_latents, dequantize_latents, fp8_token_bytes, quantize_latents
from dsv3rt.ops.loss import linear_cross_entropy
from dsv3rt.ops.metrics import calc_diff
from dsv3rt.ops.moe import balance_loss, permute, place, route, unpermute, update_bias
from dsv3rt.ops.norm import rms_norm, rms_norm_backward, rms_norm_beside, swiglu
from dsv3rt.ops.norm_cast import rms_norm_quantize_1x128
from dsv3rt.ops.optim import adamw_step, grad_norms
from dsv3rt.ops.quant import dequantize, quantize_1x128, quantize_128x128, transpose_128x128
from dsv3rt.ops.swiglu_cast import swiglu_backward_quantize_1x128, swiglu_quantize_1x128
from dsv3rt.ops.types import (
    AdamWHyper,
    AdamWSlot,
    EpLimits,
    EpRoute,
    GroupLayout,
    NormQuant,
    Permutation,
    QuantTensor,
    Routing,
    SwigluGradients,
)

__all__ = [
    "AdamWHyper",
    "AdamWSlot",
    "EpGroup",
    "EpLimits",
    "EpRoute",
    "GroupLayout",
    "NormQuant",
    "Permutation",
    "QuantTensor",
    "Routing",
    "SwigluGradients",
    "adamw_step",
    "append_latents",
    "balance_loss",
    "calc_diff",
    "dequantize",
    "dequantize_latents",
    "embedding",
    "ep_collect",
    "ep_combine",
    "ep_dispatch",
    "ep_dispatch_with_weights",
    "ep_receive",
    "ep_room",
    "ep_send",
    "ep_send_back",
    "fp8_gemm_nt",
    "fp8_token_bytes",
    "grad_norms",
    "grouped_gemm_nt",
    "grouped_weight_grad",
    "k_grouped_fp8_gemm_nt",
    "linear_cross_entropy",
    "m_grouped_fp8_gemm_nt",
    "mla_decode",
    "mla_prefill",
    "permute",
    "place",
    "quantize_1x128",
    "quantize_128x128",
    "quantize_latents",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_beside",
    "rms_norm_quantize_1x128",
    "rope",
    "rope_",
    "route",
    "swiglu",
    "swiglu_backward_quantize_1x128",
    "swiglu_quantize_1x128",
    "transpose_128x128",
    "unpermute",
    "update_bias",
]

"""A tiny case for each form of every kernel but the exchange's, by the kernels on a GPU and by the references on a CPU.

Few blocks, odd shapes: so that compute-sanitizer, under which a launch takes a hundred times as long, can look at all
of them (scripts/sanitize.sh). Whether results are right to the last bit is the matter of the other tests.

Numbers are drawn on the CPU, and results are compared there: what the device runs is ours, nearly all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops.cuda.extension import load
from dsv3rt.ops.types import AdamWHyper, AdamWSlot, GroupLayout, QuantTensor, Routing
from tests.gpu.gemm_cases import bytes_of
from tests.gpu.quant_cases import random_layout

BF16, FP32 = torch.bfloat16, torch.float32
EPS = 1e-6
# calc_diff at most. A number rounded to BF16 is wrong by 2^-8 * 0.42 in the mean square; calc_diff is half of that
# squared, 1.4e-6. Products of the same codes differ by less (test_fp8_layers.py); other results have up to six
# roundings behind them.
PRODUCT, ROUNDED = 2e-6, 1e-5
# Where BF16 numbers differ in their last bit, one code of a hundred may be the one beside, 2^-3 apart: half of its
# square by 1/100.
CODES = 1e-4


@dataclass(frozen=True)
class Case:
    """run: on a device, returns results on the CPU. near: how far they may be from the reference's; 0: same bits."""

    run: Callable[[str], Sequence[Tensor]]
    near: float = 0.0


class Numbers:
    """The same on every device."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = BF16, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * size).to(dtype).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator).to(self.device)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self._generator).to(self.device)

    def choices(self, tokens: int, experts: int, top_k: int) -> Tensor:
        """Different experts for each token."""
        keys = torch.rand((tokens, experts), generator=self._generator)
        return keys.argsort(dim=1)[:, :top_k].contiguous().to(self.device)

    def logits(self, tokens: int, experts: int) -> Tensor:
        """Multiples of 1/32, different within a token: no rounding decides between two."""
        ranks = torch.rand((tokens, 512), generator=self._generator).argsort(dim=1)[:, :experts]
        return ((ranks.float() - 256) / 32).to(self.device)


def layout_of(counts: list[int], device: str) -> tuple[GroupLayout, Tensor]:
    """Segments in multiples of 128 that fill the rows; which rows hold data, on the CPU."""
    layout, spans, rows = random_layout(counts, device=device)
    valid = torch.zeros(rows, dtype=torch.bool)
    for start, end, _ in spans:
        valid[start:end] = True
    return layout, valid


def on_cpu(*tensors: Tensor | QuantTensor | None) -> list[Tensor]:
    """Quantised ones as the numbers they stand for."""
    plain = [ops.dequantize(t) if isinstance(t, QuantTensor) else t for t in tensors if t is not None]
    return [t.detach().cpu() for t in plain]


# GEMM. Ragged in every tile; ten K-blocks, which are more than any ring has stages, in few blocks.

M, N, K, SMS = 304, 272, 1168, 4
Tile = tuple[int, int, int, int]  # rows, columns, share (0 none, 1 A, 2 B, 3 the depth), band


def dense(tile: Tile, dtype: torch.dtype, device: str, *, by_rows: bool = False, adds: bool = False) -> list[Tensor]:
    numbers = Numbers(device)
    x, weight, before = numbers.normal(M, K), numbers.normal(N, K), numbers.normal(M, N, dtype=dtype, size=30.0)
    q, w = ops.quantize_1x128(x), ops.quantize_1x128(weight) if by_rows else ops.quantize_128x128(weight)
    if device == "cpu":
        return [ops.fp8_gemm_nt(q, w, out_dtype=dtype, accumulate_into=before if adds else None)]
    sms = 0 if tile[2] == 3 else SMS  # halves of a depth have a cluster for each tile
    load().fp8_gemm_nt(*bytes_of(q, w), before, accumulate=adds, num_sms=sms, tile=tile)
    return on_cpu(before)


def by_rows(tile: Tile, dtype: torch.dtype, device: str, *, masked: bool = False) -> list[Tensor]:
    numbers, counts = Numbers(device), [5, 256, 0, 131]
    layout, valid = layout_of(counts, device)
    if masked:
        layout = GroupLayout.of_capacity(torch.tensor(counts, dtype=torch.int32).to(device), 256)
        valid = (torch.arange(256) < torch.tensor(counts)[:, None]).flatten()
    x, weight = numbers.normal(len(valid), K), numbers.normal(len(counts), N, K)
    q, w = ops.quantize_1x128(x), ops.quantize_128x128(weight)
    if device == "cpu":
        return [ops.m_grouped_fp8_gemm_nt(q, w, layout, out_dtype=dtype)[valid]]
    y = torch.empty((len(valid), N), dtype=dtype, device=device)
    load().m_grouped_fp8_gemm_nt(*bytes_of(q, w), y, layout.counts_X, layout.offsets, num_sms=SMS, tile=tile)
    return [y.cpu()[valid]]


def by_depth(tile: Tile, device: str, *, adds: bool) -> list[Tensor]:
    numbers, counts = Numbers(device), [5, 0, 1100]
    layout, valid = layout_of(counts, device)
    q, w = (
        ops.quantize_1x128(numbers.normal(len(valid), columns), layout=layout, with_transpose=True)[1]
        for columns in (M, N)
    )
    before = numbers.normal(len(counts), M, N, dtype=FP32, size=30.0)
    if device == "cpu":
        return [ops.k_grouped_fp8_gemm_nt(q, w, layout, accumulate_into=before if adds else None)]
    groups = layout.counts_X, layout.offsets
    load().k_grouped_fp8_gemm_nt(*bytes_of(q, w), before, *groups, accumulate=adds, num_sms=SMS, tile=tile)
    return on_cpu(before)


def gemm_cases() -> dict[str, Case]:
    found: dict[str, Callable[[str], list[Tensor]]] = {}
    for m, n, share in ((128, 64, 0), (128, 128, 1), (128, 192, 2), (192, 128, 1), (256, 128, 2), (256, 128, 3)):
        found[f"gemm_dense-{m}x{n}-{share}"] = partial(dense, (m, n, share, 2), BF16)
    found["gemm_dense-halves"] = partial(dense, (128, 128, 3, 2), BF16)
    found["gemm_dense-f32"] = partial(dense, (128, 128, 0, 2), FP32)
    found["gemm_dense-add"] = partial(dense, (128, 64, 2, 2), FP32, adds=True)
    found["gemm_by_row_scales-bf16"] = partial(dense, (128, 128, 0, 2), BF16, by_rows=True)
    found["gemm_by_row_scales-f32"] = partial(dense, (192, 128, 1, 2), FP32, by_rows=True)
    found["gemm_by_row_scales-add"] = partial(dense, (192, 128, 2, 2), FP32, by_rows=True, adds=True)
    found["gemm_by_row_scales-narrow"] = partial(dense, (128, 64, 1, 2), FP32, by_rows=True)
    found["gemm_grouped-rows"] = partial(by_rows, (128, 128, 0, 2), BF16)
    found["gemm_grouped-wide_rows"] = partial(by_rows, (256, 128, 1, 2), BF16)
    found["gemm_grouped-f32_rows"] = partial(by_rows, (128, 64, 1, 2), FP32)
    found["gemm_grouped-masked"] = partial(by_rows, (128, 192, 0, 2), BF16, masked=True)
    found["gemm_grouped-depth"] = partial(by_depth, (192, 128, 1, 2), adds=False)
    found["gemm_grouped-depth_add"] = partial(by_depth, (128, 128, 2, 2), adds=True)
    return {name: Case(run, PRODUCT) for name, run in found.items()}


# Casts.


def casts_of_rows(dtype: torch.dtype, pow2_scales: bool, device: str) -> list[Tensor]:
    x = Numbers(device).normal(131, 144, dtype=dtype, size=7.0)
    return on_cpu(
        ops.quantize_1x128(x, pow2_scales=pow2_scales),
        *ops.quantize_1x128(x, pow2_scales=pow2_scales, with_transpose=True),
    )


def casts_of_groups(gathers: bool, device: str) -> list[Tensor]:
    numbers = Numbers(device)
    layout, valid = layout_of([5, 0, 131], device)
    x = numbers.normal(77 if gathers else len(valid), 144)
    rows_P = numbers.below(77, len(valid)).int() if gathers else None
    return on_cpu(
        ops.quantize_1x128(x, layout=layout, rows_P=rows_P),
        *ops.quantize_1x128(x, layout=layout, rows_P=rows_P, with_transpose=True),
    )


def casts_of_blocks(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    w = Numbers(device).normal(*shape, dtype=dtype)
    q, q_t = ops.quantize_128x128(w, with_transpose=True)
    return on_cpu(q, q_t, ops.quantize_128x128(w), ops.transpose_128x128(q))


def swiglu(in_fp8: bool, weighs: bool, device: str) -> list[Tensor]:
    numbers = Numbers(device)
    layout, valid = layout_of([5, 0, 131], device)
    rows, F = len(valid), 128
    gate_up, grad_TF = numbers.normal(rows, 2 * F), numbers.normal(rows, F)
    weight_T = numbers.uniform(rows) if weighs else None
    x = ops.quantize_1x128(gate_up) if in_fp8 else gate_up
    given = {"weight_T": weight_T, "layout": layout}
    found: list[Tensor | QuantTensor | None] = [
        ops.swiglu_quantize_1x128(x, **given),
        *ops.swiglu_quantize_1x128(x, with_transpose=True, **given),
    ]
    for with_product in (False, True):
        grads = ops.swiglu_backward_quantize_1x128(x, grad_TF, with_product=with_product, **given)
        found += [grads.gate_up, grads.gate_up_t, grads.product_t]
    results = on_cpu(*found)
    if weighs and grads.weight_T is not None:
        results.append(grads.weight_T.cpu()[valid])
    return results


def norms(columns: int, weight_dtype: torch.dtype, device: str) -> list[Tensor]:
    """Two strips of 128 rows where rows are short."""
    rows = 131 if columns < 2000 else 5
    numbers = Numbers(device)
    x, residual, dy = (numbers.normal(rows, columns) for _ in range(3))
    weight = numbers.uniform(columns).to(weight_dtype)
    both = ops.rms_norm_quantize_1x128(x, weight, EPS, residual_TD=residual, with_transpose=True, with_output=True)
    alone = ops.rms_norm_quantize_1x128(x, weight, EPS, pow2_scales=True)
    plain = ops.rms_norm_backward(dy, x, weight, alone.rstd_T)
    beside = ops.rms_norm_backward(dy, x, weight, alone.rstd_T, grad_residual_TD=residual)
    found = both.sum_TD, both.y_TD, both.q, both.q_t, both.rstd_T, alone.q, alone.rstd_T
    return on_cpu(ops.rms_norm(x, weight, EPS), *found, *plain, *beside)


def cast_cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for name, dtype, pow2_scales in (("bf16", BF16, False), ("fp32", FP32, True)):
        found[f"casts-rows_{name}"] = Case(partial(casts_of_rows, dtype, pow2_scales))
        for shape in ((2, 130, 144), (77, 131)):
            found[f"casts-blocks_{name}_{len(shape)}"] = Case(partial(casts_of_blocks, shape, dtype))
    found["casts-groups"] = Case(partial(casts_of_groups, False))
    found["casts-gathered"] = Case(partial(casts_of_groups, True))
    for in_fp8 in (False, True):
        for weighs in (False, True):
            name = f"swiglu-{'fp8' if in_fp8 else 'bf16'}{'_weighed' if weighs else ''}"
            found[name] = Case(partial(swiglu, in_fp8, weighs), CODES)
    for columns in (144, 1536, 2064, 7168, 7296):
        found[f"norms-{columns}"] = Case(partial(norms, columns, FP32 if columns == 1536 else BF16), CODES)
    return found


# Embedding and rotary positions.


def rotary(device: str) -> list[Tensor]:
    numbers = Numbers(device)
    wide, cos, sin = numbers.normal(33, 3, 72), numbers.normal(33, 12, dtype=FP32), numbers.normal(33, 12, dtype=FP32)
    turned = ops.rope(wide[..., 48:], cos, sin)
    ops.rope_(wide[..., 48:], cos, sin, inverse=True)
    return on_cpu(turned, wide)


def embedded(columns: int, device: str) -> list[Tensor]:
    """A third of the tokens are one, a run longer than 16."""
    numbers = Numbers(device)
    tokens, weight = numbers.below(9, 100), numbers.normal(12, columns).requires_grad_()
    tokens[::3] = 7
    y = ops.embedding(tokens, weight)
    y.backward(numbers.normal(100, columns))
    return on_cpu(y, weight.grad)


# Experts: routing, places, rows, balance.


def routed(rule: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """rule: experts, groups, groups kept, choices of a token."""
    experts, groups, kept, top_k = rule
    numbers = Numbers(device, seed=experts)
    logits = numbers.logits(37, experts).to(dtype).requires_grad_()
    bias = torch.zeros(experts).to(device)
    got = ops.route(logits, bias, top_k=top_k, num_groups=groups, groups_kept=kept, scale=2.5)
    grads = numbers.uniform(37, top_k), numbers.uniform(37, experts)
    torch.autograd.backward((got.weight_TK, got.scores_TE), grads)
    ends = torch.tensor([0, 5, 5, 37], dtype=torch.int32).to(device)
    scores = got.scores_TE.detach().requires_grad_()
    loss = ops.balance_loss(scores, got.idx_TK, ends, alpha=0.3)
    loss.backward()
    return on_cpu(got.idx_TK, got.weight_TK, got.scores_TE, got.counts_E, logits.grad, loss.reshape(1), scores.grad)


def moved(top_k: int, device: str) -> list[Tensor]:
    numbers, experts = Numbers(device, seed=top_k), 20
    idx_TK, weight_TK = numbers.choices(37, experts, top_k), numbers.uniform(37, top_k).requires_grad_()
    x, dy = numbers.normal(37, 208), numbers.normal(37, 208)
    routing = Routing(idx_TK, weight_TK, weight_TK, idx_TK)
    leaf = x.clone().requires_grad_()
    rows, layout, permutation = ops.permute(leaf, routing, num_experts=experts)
    weighed = ops.unpermute(rows, permutation, weight_TK)
    (weighed + ops.unpermute(rows, permutation, None)).backward(dy)
    codes, _, _ = ops.permute(ops.quantize_1x128(x), routing, num_experts=experts)
    end = int(layout.offsets[-1])
    moved_rows = [t[:end] for t in on_cpu(rows, codes)]
    return [*moved_rows, *on_cpu(layout.offsets, permutation.row_of_TK, weighed, leaf.grad, weight_TK.grad)]


# Loss and optimizer.


def loss(vocab: int, device: str) -> list[Tensor]:
    numbers = Numbers(device)
    h, w = numbers.normal(5, 16).requires_grad_(), numbers.normal(vocab, 16, size=0.3).requires_grad_()
    labels = numbers.below(vocab, 5)
    labels[3] = -100
    value = ops.linear_cross_entropy(h, w, labels, z_loss=1e-3)
    value.backward()
    return on_cpu(value.reshape(1), h.grad, w.grad)


def updated(kind: tuple[torch.dtype, torch.dtype, torch.dtype | None], device: str) -> list[Tensor]:
    """kind: of gradients, moments and the parameter."""
    grad, moment, param = kind
    numbers, slots = Numbers(device), []
    for size, seed in ((4097, None), (7, None), (131, 3 if moment == BF16 else None)):
        state = [numbers.normal(size, dtype=dtype) for dtype in (FP32, grad, moment)]
        v = numbers.uniform(size).to(moment)
        copy = None if param is None else numbers.normal(size, dtype=param)
        slots.append(AdamWSlot(*state, v, copy, seed))
    ops.adamw_step(slots, hyper=AdamWHyper(lr=1e-3), step=3, grad_scale=0.5)
    return on_cpu(*(part for slot in slots for part in (slot.master, slot.m, slot.v, slot.param)))


def updated_with_casts(grad: torch.dtype, moment: torch.dtype, device: str) -> list[Tensor]:
    numbers, slots = Numbers(device), []
    for number, shape in enumerate(((2, 130, 144), (77, 131))):
        state = [numbers.normal(*shape, dtype=dtype) for dtype in (FP32, grad, moment)]
        q, q_t = ops.quantize_128x128(state[0].bfloat16(), with_transpose=True)
        v, cast = numbers.uniform(*shape).to(moment), (q, q_t if number == 0 or grad == BF16 else None)
        slots.append(AdamWSlot(*state, v, cast=cast))
    ops.adamw_step(slots, hyper=AdamWHyper(lr=1e-1), step=3, grad_scale=0.5)
    return on_cpu(*(part for slot in slots for part in (slot.master, slot.m, slot.v, *(slot.cast or ()))))


def gradient_norms(dtype: torch.dtype, device: str) -> list[Tensor]:
    numbers = Numbers(device)
    return on_cpu(ops.grad_norms([numbers.normal(size, dtype=dtype) for size in (1, 4097, 33_000)]))


def other_cases() -> dict[str, Case]:
    found = {"embed-rotary": Case(rotary)}
    for columns in (264, 8200):
        found[f"embed-{columns}"] = Case(partial(embedded, columns))
    rules = ((8, 1, 1, 1), (60, 5, 2, 6), (128, 1, 1, 3), (256, 8, 4, 8), (512, 16, 3, 16))
    for number, rule in enumerate(rules):
        found[f"experts-routed_{rule[0]}"] = Case(partial(routed, rule, (FP32, BF16)[number % 2]), ROUNDED)
    for top_k in (3, 6, 8):
        found[f"experts-moved_{top_k}"] = Case(partial(moved, top_k), ROUNDED)
    for vocab in (1001, 40_000, 70_001, 131_080):
        found[f"loss-{vocab}"] = Case(partial(loss, vocab), ROUNDED)
    for name, kind in {
        "plain": (FP32, FP32, None), "mixed": (FP32, BF16, BF16), "low": (BF16, BF16, FP32), "high": (BF16, FP32, BF16)
    }.items():  # fmt: skip
        found[f"optim-{name}"] = Case(partial(updated, kind))
    for grad, moment in ((FP32, BF16), (FP32, FP32), (BF16, BF16), (BF16, FP32)):
        name = "_".join(str(dtype).removeprefix("torch.") for dtype in (grad, moment))
        found[f"optim-fp8_{name}"] = Case(partial(updated_with_casts, grad, moment))
    for dtype in (FP32, BF16):
        found[f"optim-squares_{str(dtype).removeprefix('torch.')}"] = Case(partial(gradient_norms, dtype), ROUNDED)
    return found

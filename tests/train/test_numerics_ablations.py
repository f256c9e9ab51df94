"""The ablations of scripts/numerics.py change the scales they say or leave out the casts, and nothing outside their
block."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fp8_training import engine, run_steps
from torch import Tensor, nn

from dsv3rt import ops
from dsv3rt.layers import fp8
from dsv3rt.layers.norm import RMSNorm
from dsv3rt.layers.weights import Copies, WeightCast, casts_of, is_released
from dsv3rt.ops.reference import swiglu_cast
from dsv3rt.ops.types import GroupLayout, QuantTensor, round_up
from scripts.numerics_ablations import ABLATIONS, BF16_MODULES, UNCAST, ablation, settings, without_casts
from tests.layers.fp8_cases import CAST_DIFF, Weights, layout_of, take

COARSE = ("block_128x128", "per_tensor")
SCALED = [name for name in ABLATIONS if name not in (*UNCAST, *BF16_MODULES)]
PRODUCTS = ("fprop_bf16", "dgrad_bf16", "wgrad_bf16")
COUNTS = [5, 0, 131, 128]


def spread(*shape: int) -> Tensor:
    """Every row and every column of another magnitude, so that each tile has a scale of its own."""
    rows, columns = torch.rand(shape[-2], 1) * 8 - 4, torch.rand(1, shape[-1]) * 8 - 4
    return (torch.randn(shape) * 2**rows * 2**columns).bfloat16()


def regions(name: str, shape: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Which elements share a scale."""
    step = 128 if name == "block_128x128" else 10**6
    starts = [(r, c) for r in range(0, shape[0], step) for c in range(0, shape[1], step)]
    return [(slice(r, min(r + step, shape[0])), slice(c, min(c + step, shape[1]))) for r, c in starts]


def expected(name: str, x: Tensor, *, pow2_scales: bool = False) -> tuple[Tensor, Tensor]:
    """What the codes stand for and the scale of each element, region by region, in FP64 but for what FP32 rounds."""
    x = x.float()
    values, scales = torch.zeros_like(x), torch.zeros_like(x)
    for region in regions(name, (x.shape[0], x.shape[1])):
        scale = torch.tensor(max(x[region].abs().max().item(), 2.0**-100), dtype=torch.float32) / torch.tensor(448.0)
        if pow2_scales:
            scale = torch.tensor(2.0 ** scale.double().log2().ceil().item())
        scales[region] = scale
        values[region] = (x[region] * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return values, scales


def scale_of_elements(q: QuantTensor) -> Tensor:
    return q.scale.repeat_interleave(128, dim=1)[:, : q.data.shape[1]]


def assert_stands_for(q: QuantTensor, values: Tensor, scales: Tensor) -> None:
    assert q.tile == (1, 128)
    assert q.scale.stride() == (1, round_up(q.data.shape[0], 4))
    torch.testing.assert_close(ops.dequantize(q), values, rtol=0, atol=0)
    torch.testing.assert_close(scale_of_elements(q), scales, rtol=0, atol=0)


def padded(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(round_up(len(x), 128) - len(x), x.shape[1])])


@pytest.mark.parametrize("pow2_scales", [False, True])
@pytest.mark.parametrize("rows", [1, 128, 300])
@pytest.mark.parametrize("name", COARSE)
def test_scales_are_those_of_the_region(name: str, rows: int, pow2_scales: bool) -> None:
    x = spread(rows, 272)
    with ablation(name):
        q, q_t = ops.quantize_1x128(x, pow2_scales=pow2_scales, with_transpose=True)
        alone = ops.quantize_1x128(x, pow2_scales=pow2_scales)
    values, scales = expected(name, x, pow2_scales=pow2_scales)
    assert_stands_for(q, values, scales)
    assert_stands_for(alone, values, scales)
    values_t, scales_t = expected(name, padded(x), pow2_scales=pow2_scales)
    assert_stands_for(q_t, values_t.t(), scales_t.t())
    if rows == 300:
        assert len(scales.unique()) == {"block_128x128": 9, "per_tensor": 1}[name] or pow2_scales
        assert not torch.equal(q.scale, ops.quantize_1x128(x, pow2_scales=pow2_scales).scale)
    if pow2_scales:
        assert (scales.frexp().mantissa == 0.5).all()


@pytest.mark.parametrize("name", COARSE)
def test_padding_does_not_matter_to_grouped_scales(name: str) -> None:
    layout, valid, num_rows = layout_of(COUNTS)
    x = spread(num_rows, 256)
    poisoned = x.masked_fill(~valid[:, None], torch.nan)
    values, scales = expected(name, x.masked_fill(~valid[:, None], 0.0))
    with ablation(name):
        q, q_t = ops.quantize_1x128(poisoned, layout=layout, with_transpose=True)
    assert_stands_for(q, values, scales)
    assert_stands_for(q_t, values.t(), scales.t())


@pytest.mark.parametrize("name", COARSE)
def test_gathered_rows_are_scaled_as_rows_written_out(name: str) -> None:
    layout, valid, num_rows = layout_of(COUNTS)
    tokens = spread(100, 256)
    rows_P = torch.randint(0, 100, (num_rows,), dtype=torch.int32)
    anywhere = rows_P.where(valid, torch.tensor(10**6, dtype=torch.int32))
    with ablation(name):
        got = ops.quantize_1x128(tokens, layout=layout, rows_P=anywhere, with_transpose=True)
        want = ops.quantize_1x128(tokens[rows_P.long()], layout=layout, with_transpose=True)
    for one, other in zip(got, want, strict=True):
        assert_stands_for(one, ops.dequantize(other), scale_of_elements(other))


@pytest.mark.parametrize("name", COARSE)
@pytest.mark.parametrize("kept_in_fp8", [False, True])
def test_swiglu_is_scaled_by_regions(name: str, kept_in_fp8: bool) -> None:
    """The values by autograd in FP64, padding NaN. BF16 rounds what FP32 made of them, so a code may be the next one:
    a step of E4M3, 2^-3 of the number or, under 2^-6, 2^-9 of the scale; and a scale 2^-8 off."""
    layout, valid, num_rows = layout_of(COUNTS)
    mask = valid[:, None]
    gate_up, grad = torch.randn(num_rows, 256).bfloat16(), torch.randn(num_rows, 128).bfloat16()
    weight = torch.rand(num_rows)
    kept: Any = ops.quantize_1x128(gate_up) if kept_in_fp8 else gate_up.masked_fill(~mask, torch.nan)
    wide = (ops.dequantize(kept) if kept_in_fp8 else gate_up).double().requires_grad_()
    gate, up = wide.chunk(2, dim=1)
    product = torch.nn.functional.silu(gate) * up * weight[:, None].double()
    product.backward(grad.double())
    assert wide.grad is not None
    poison = grad.masked_fill(~mask, torch.nan)
    with ablation(name):
        hidden = ops.swiglu_quantize_1x128(kept, weight_T=weight, layout=layout)
        found = ops.swiglu_backward_quantize_1x128(kept, poison, weight_T=weight, layout=layout, with_product=True)
    assert found.product_t is not None
    assert found.weight_T is not None
    product, both = (rows.detach().masked_fill(~mask, 0.0) for rows in (product, wide.grad))
    cases = [(hidden, product), (found.gate_up, both), (found.gate_up_t, both.t()), (found.product_t, product.t())]
    for q, want in cases:
        _, scales = expected(name, want)
        torch.testing.assert_close(scale_of_elements(q), scales, rtol=2**-8, atol=0)
        error = (ops.dequantize(q) - want).abs()
        assert (error <= 2**-3 * want.abs() + 2**-9 * scales).all()
    # An FP32 sum of 128 terms of some 8 roundings each, in any order.
    terms = grad.double() * product / weight[:, None].double()
    error = (found.weight_T - terms.sum(dim=1)).abs()
    assert (error <= (128 + 8) * 2**-24 * terms.abs().sum(dim=1)).all()


@pytest.mark.parametrize("name", COARSE)
def test_normed_rows_are_scaled_by_regions(name: str) -> None:
    x, weight = spread(300, 272), torch.rand(272).bfloat16()
    y = ops.rms_norm(x, weight, 1e-6)
    with ablation(name):
        normed = ops.rms_norm_quantize_1x128(x, weight, 1e-6, with_transpose=True)
    assert normed.q_t is not None
    assert_stands_for(normed.q, *expected(name, y))
    values_t, scales_t = expected(name, padded(y))
    assert_stands_for(normed.q_t, values_t.t(), scales_t.t())
    assert torch.equal(normed.rstd_T, ops.rms_norm_quantize_1x128(x, weight, 1e-6).rstd_T)


def test_every_cast_of_activations_is_replaced() -> None:
    """A cast that an ablation does not know of would keep its finer scales, and go unseen."""
    layers = Path(str(ops.__file__)).parents[1] / "layers"
    used = {name for file in layers.glob("*.py") for name in re.findall(r"ops\.(\w*quantize_1x128)", file.read_text())}
    before = dict(vars(ops))
    assert used
    with ablation("block_128x128"):
        assert [name for name in used if getattr(ops, name) is before[name]] == []


@pytest.mark.parametrize("experts", [(), (3,)])
def test_weights_have_one_scale_per_tensor(experts: tuple[int, ...]) -> None:
    w = spread(*experts, 272, 144)
    with ablation("per_tensor"):
        q, q_t = ops.quantize_128x128(w, with_transpose=True)
    values, scales = expected("per_tensor", w.reshape(-1, 144))
    assert torch.equal(ops.dequantize(q), values.view(w.shape))
    assert torch.equal(ops.dequantize(q_t), values.view(w.shape).mT)
    assert q.scale.unique().tolist() == scales.unique().tolist()
    assert (q.scale.shape, q_t.scale.shape) == ((*experts, 3, 2), (*experts, 2, 3))
    with ablation("block_128x128"):
        assert ops.quantize_128x128(w).scale.unique().numel() > 1


@pytest.mark.parametrize("name", COARSE)
def test_poison_stays_in_the_result(name: str) -> None:
    """So that the step's loss is not finite and the step is skipped."""
    x = spread(256, 256)
    x[3, 7] = torch.inf
    with ablation(name):
        q = ops.quantize_1x128(x)
    assert ops.dequantize(q)[:128, :128].isnan().all()


@pytest.mark.parametrize("name", SCALED)
def test_ops_are_restored(name: str) -> None:
    """SwiGLU's reference too, which the ablations borrow."""
    before, gate_up = dict(vars(ops)), spread(200, 256)
    want = ops.swiglu_quantize_1x128(gate_up)

    def fail() -> None:
        assert ops.quantize_1x128 is not before["quantize_1x128"]
        assert not torch.equal(ops.swiglu_quantize_1x128(gate_up).scale, want.scale)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), ablation(name):
        fail()
    assert vars(ops) == before
    assert torch.equal(ops.swiglu_quantize_1x128(gate_up).scale, want.scale)


def test_unknown_ablation_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"^ablation: name must be one of .*, got 'fp4'$"), ablation("fp4"):
        pass


def test_each_ablation_trains_otherwise_than_fp8(tmp_path: Path) -> None:
    """At initialisation a tensor's numbers lie within a few powers of two of each other, and E4M3 keeps as many bits
    over the 15 that it spans: as near to FP8 as FP8 is to BF16 (test_fp8_training.py). The first loss is FP8's to the
    bit where the forward is. Without any cast a step is as near to BF16 as products of other roundings are."""
    bf16, fp8_alone = (run_steps(engine(tmp_path, dtype="bfloat16", precision=name), 5) for name in ("bf16", "fp8"))
    runs = {}
    for name in ABLATIONS:
        changes = {key.removeprefix("train."): value for key, value in settings(name).items()}
        with ablation(name):
            runs[name] = run_steps(engine(tmp_path, dtype="bfloat16", **changes), 5)
        first, *rest = zip(runs[name], fp8_alone, strict=True)
        assert (first[0].loss == first[1].loss) == (name in ("wgrad_bf16", "dgrad_bf16", "swiglu_bf16")), name
        assert all(got.loss != want.loss for got, want in rest)
        assert all(got.grad_norm != want.grad_norm for got, want in (first, *rest))
        assert all(got.loss == pytest.approx(want.loss, rel=1e-2) for got, want in (first, *rest))
    assert runs["block_128x128"] != runs["per_tensor"]
    assert runs["no_promotion"] == runs["per_tensor"]  # on a CPU
    with without_casts(*UNCAST.values()):
        got = run_steps(engine(tmp_path, dtype="bfloat16"), 1)[0]
    assert (got.loss, got.grad_norm) == pytest.approx((bf16[0].loss, bf16[0].grad_norm), rel=1e-3)


@pytest.mark.parametrize("name", [*SCALED, ""])
def test_ablations_hold_for_what_the_optimizer_casts(tmp_path: Path, name: str) -> None:
    with ablation(name) if name else nullcontext():
        made = engine(tmp_path, dtype="bfloat16")
        run_steps(made, 2)
    scales = [cast.of(*cast.weights)[0].scale.unique().numel() for cast in casts_of(made.model)]
    assert (max(scales) == 1) == (name in ("per_tensor", "no_promotion"))


def product(x: Tensor, w: Tensor) -> Tensor:
    return x.float() @ w.float().t()


def linear(x: Tensor, dy: Tensor, weights: tuple[nn.Parameter, ...], kind: str) -> list[Tensor]:
    """y, dx and the weights' gradients."""
    leaf, stack = x.clone().requires_grad_(), (WeightCast(), weights)
    if kind == "norm":
        y = fp8.norm_linear(leaf, RMSNorm(x.shape[1], 1e-6, dtype=x.dtype), stack, None)
    else:
        y = fp8.linear(leaf, stack, None, keep_input=kind == "keep_input")
    y.backward(dy)
    assert leaf.grad is not None
    return [y.detach(), leaf.grad, torch.cat([gradient for w in weights if (gradient := take(w)) is not None])]


@pytest.mark.parametrize("kind", ["linear", "keep_input", "norm"])
@pytest.mark.parametrize("rows", [3, 130])
@pytest.mark.parametrize("name", PRODUCTS)
def test_one_product_of_a_linear_is_that_of_bf16(name: str, rows: int, kind: str) -> None:
    """But for FP32 sums in another order, which make of a BF16 result perhaps the next number; the others have the
    bits of FP8. Behind a norm dx is that of the norm's own backward."""
    weights = tuple(nn.Parameter((torch.randn(n, 256) * 0.05).bfloat16()) for n in (128, 48))
    x, dy = torch.randn(rows, 256).bfloat16(), torch.randn(rows, 176).bfloat16()
    plain = linear(x, dy, weights, kind)
    with ablation(name):
        got = linear(x, dy, weights, kind)
    w = torch.cat([weight.detach() for weight in weights])
    y = ops.rms_norm(x, torch.ones(256).bfloat16(), 1e-6) if kind == "norm" else x
    exact = [product(y, w).bfloat16(), product(dy, w.t()).bfloat16(), product(dy.t(), y.t())]
    if kind == "norm":
        leaf = x.clone().requires_grad_()
        ops.rms_norm(leaf, torch.ones(256).bfloat16(), 1e-6).backward(exact[1])
        assert leaf.grad is not None
        exact[1] = leaf.grad
    index = PRODUCTS.index(name)
    torch.testing.assert_close(
        got[index], exact[index], rtol=2**-7 if index < 2 else 1e-5, atol=2**-12, check_dtype=False
    )
    assert ops.calc_diff(got[index], exact[index]) < 1e-6 < CAST_DIFF / 2 < ops.calc_diff(plain[index], exact[index])
    assert all(torch.equal(got[other], plain[other]) for other in {0, 1, 2} - {index})


def mlp(parts: tuple[str, ...], weights: Weights, x: Tensor, dy: Tensor, layout: GroupLayout | None) -> list[Tensor]:
    """y, dx and the weights' gradients, cast by cast: each operand but those of `parts` is rounded to E4M3."""

    def rows(x_TD: Tensor, part: str) -> Tensor:
        return x_TD.float() if part in parts else ops.dequantize(ops.quantize_1x128(x_TD, layout=layout))

    def columns(x_TD: Tensor) -> Tensor:
        if "wgrad" in parts:
            return x_TD.float().t()
        return ops.dequantize(ops.quantize_1x128(x_TD, layout=layout, with_transpose=True)[1])[:, : len(x_TD)]

    def weight(w: Tensor, part: str) -> Tensor:
        found = w.detach().float() if part in parts else ops.dequantize(ops.quantize_128x128(w.detach()))
        return found if found.dim() == 3 else found[None]

    counts, firsts = ([len(x)], [0]) if layout is None else (layout.counts_X.tolist(), layout.offsets.tolist()[:-1])
    spans = [slice(first, first + count) for first, count in zip(firsts, counts, strict=True)]

    def by_rows(x_TD: Tensor, w_XFD: Tensor) -> Tensor:
        y_TF = torch.zeros(len(x_TD), w_XFD.shape[1], dtype=torch.bfloat16)
        for span, w_FD in zip(spans, w_XFD, strict=True):
            y_TF[span] = product(x_TD[span], w_FD).bfloat16()
        return y_TF

    def by_depth(dy_FT: Tensor, x_DT: Tensor, like: Tensor) -> Tensor:
        return torch.stack([product(dy_FT[:, span], x_DT[:, span]) for span in spans]).view(like.shape)

    def swiglu(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return nn.functional.silu(gate) * up

    gate_up = by_rows(rows(x, "fprop"), weight(weights.up, "fprop"))
    y = by_rows(rows(swiglu(gate_up.float()).bfloat16(), "fprop"), weight(weights.down, "fprop"))
    kept = rows(gate_up, "swiglu").requires_grad_()
    again = swiglu(kept)
    again.backward(by_rows(rows(dy, "dgrad"), weight(weights.down, "dgrad").mT).float())
    assert kept.grad is not None
    grad = kept.grad.bfloat16()
    dx = by_rows(rows(grad, "dgrad"), weight(weights.up, "dgrad").mT)
    of_down = by_depth(columns(dy), columns(again.detach().bfloat16()), weights.down)
    return [y, dx, by_depth(columns(grad), columns(x), weights.up), of_down]


@pytest.mark.parametrize("counts", [None, COUNTS], ids=["dense", "experts"])
@pytest.mark.parametrize("parts", [(), *((p,) for p in UNCAST.values()), tuple(UNCAST.values())], ids="+".join)
def test_feed_forward_has_the_casts_that_it_says(parts: tuple[str, ...], counts: list[int] | None) -> None:
    """A cast too many or too few would be 30 times the bound. What none of `parts` is behind has the bits of FP8."""
    layout, valid, num_rows = (None, torch.ones(150, dtype=torch.bool), 150) if counts is None else layout_of(counts)
    weights = Weights.draw(128, 128, counts and len(counts), torch.bfloat16)
    x, dy = (torch.randn(num_rows, 128).bfloat16() * valid[:, None] for _ in range(2))
    want, fp8_alone = mlp(parts, weights, x, dy, layout), weights.run(x, dy, layout)
    poison = torch.zeros_like(x).masked_fill(~valid[:, None], torch.nan)
    with without_casts(*parts):
        got = weights.run(x + poison, dy + poison, layout)
    assert max(ops.calc_diff(one, other) for one, other in zip(got, want, strict=True)) < CAST_DIFF / 30
    behind = {"fprop": {0, 1, 2, 3}, "dgrad": {1, 2}, "wgrad": {2, 3}, "swiglu": {1, 2, 3}}
    moved = set().union(*(behind[part] for part in parts))
    assert {index for index in range(4) if not torch.equal(got[index], fp8_alone[index])} == moved


@pytest.mark.parametrize("name", [*UNCAST, *BF16_MODULES])
def test_casts_are_restored(name: str) -> None:
    def patched() -> list[object]:
        return [dict(vars(ops)), fp8._as_kept, Copies.part, swiglu_cast.quantize_1x128]

    before = patched()
    with ablation(name):
        assert (patched() == before) == (name in BF16_MODULES)
    assert patched() == before


def test_unknown_parts_are_rejected() -> None:
    with (
        pytest.raises(ValueError, match=r"^without_casts: parts must be of .*, got forward$"),
        without_casts("forward"),
    ):
        pass


@pytest.mark.parametrize("name", ["fprop_bf16", "dgrad_bf16"])
def test_weights_are_the_rounded_masters(tmp_path: Path, name: str) -> None:
    """After updates too, while their own copies are released; the other orientation is cast."""
    with ablation(name):
        made = engine(tmp_path, dtype="bfloat16")
        run_steps(made, 2)
        with pytest.raises(ValueError, match="weight_orientations must be 2, got 1"):
            engine(tmp_path, dtype="bfloat16", weight_orientations=1)
    names, masters = {id(p): n for n, p in made.model.named_parameters()}, made.optimizer.masters()
    for cast in casts_of(made.model):
        exact = torch.cat([masters[names[id(weight)]] for weight in cast.weights]).bfloat16()
        w, w_t = cast.of(*cast.weights)
        assert w_t is not None
        assert all(is_released(weight) for weight in cast.weights)
        uncast, other, exact = (w, w_t, exact) if name == "fprop_bf16" else (w_t, w, exact.mT)
        assert torch.equal(uncast.data, exact)
        assert other.data.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(("name", "rest"), [("attention_bf16", ".mlp."), ("experts_bf16", ".self_attn.")])
def test_settings_leave_the_rest_in_fp8(tmp_path: Path, name: str, rest: str) -> None:
    made = [engine(tmp_path, bf16_modules=modules).model for modules in (settings(name)["train.bf16_modules"], [])]
    ours, all_of_them = (
        {n for n, p in model.named_parameters() for cast in casts_of(model) if any(p is w for w in cast.weights)}
        for model in made
    )
    assert ours == {weight for weight in all_of_them if rest in weight}
    assert ours

"""The ablations of scripts/numerics.py that leave casts out: those they name, and the rest has FP8's bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_fp8_training import engine, run_steps
from torch import Tensor, nn

from dsv3rt import ops
from dsv3rt.layers import fp8
from dsv3rt.layers.ledger import Ledger, WeightGrads
from dsv3rt.layers.norm import RMSNorm
from dsv3rt.layers.weights import Copies, WeightCast, casts_of, is_released
from dsv3rt.ops.reference import swiglu_cast
from dsv3rt.ops.types import GroupLayout
from scripts.numerics_ablations import BF16_MODULES, UNCAST, ablation, settings, without_casts
from tests.layers.fp8_cases import CAST_DIFF, Weights, layout_of, take

PRODUCTS = ["fprop_bf16", "dgrad_bf16", "wgrad_bf16"]
SAME = CAST_DIFF / 30  # a cast too many or too few would show
COUNTS = [5, 0, 131, 128]


def product(x: Tensor, w: Tensor) -> Tensor:
    return x.float() @ w.float().t()


def linear(x: Tensor, dy: Tensor, weights: tuple[nn.Parameter, ...], *, keep_input: bool, norm: bool) -> list[Tensor]:
    """y, dx and the weights' gradients."""
    leaf = x.clone().requires_grad_()
    stack = (WeightCast(), weights)
    if norm:
        y = fp8.norm_linear(leaf, RMSNorm(x.shape[1], 1e-6, dtype=x.dtype), stack, None)
    else:
        y = fp8.linear(leaf, stack, None, keep_input=keep_input)
    y.backward(dy)
    assert leaf.grad is not None
    return [y.detach(), leaf.grad, torch.cat([gradient for w in weights if (gradient := take(w)) is not None])]


@pytest.mark.parametrize("keep_input", [False, True])
@pytest.mark.parametrize("rows", [1, 130])
@pytest.mark.parametrize("name", PRODUCTS)
def test_one_product_of_a_linear_is_that_of_bf16(name: str, rows: int, keep_input: bool) -> None:
    weights = tuple(nn.Parameter((torch.randn(n, 256) * 0.05).bfloat16()) for n in (128, 48))
    x, dy = torch.randn(rows, 256).bfloat16(), torch.randn(rows, 176).bfloat16()
    plain = linear(x, dy, weights, keep_input=keep_input, norm=False)
    with ablation(name):
        got = linear(x, dy, weights, keep_input=keep_input, norm=False)
    w = torch.cat([weight.detach() for weight in weights])
    exact = [product(x, w).bfloat16(), product(dy, w.t()).bfloat16(), product(dy.t(), x.t())]
    index = PRODUCTS.index(name)
    # FP32 sums in another order, of a BF16 result perhaps the next number.
    torch.testing.assert_close(got[index].float(), exact[index].float(), rtol=2**-7 if index < 2 else 1e-5, atol=1e-5)
    assert ops.calc_diff(plain[index], exact[index]) > CAST_DIFF
    for other in {0, 1, 2} - {index}:
        assert torch.equal(got[other], plain[other])


@pytest.mark.parametrize("name", PRODUCTS)
def test_one_product_behind_a_norm_is_that_of_bf16(name: str) -> None:
    """What is before the norm's own backward is as above."""
    weight = nn.Parameter((torch.randn(80, 256) * 0.05).bfloat16())
    x, dy = torch.randn(130, 256).bfloat16(), torch.randn(130, 80).bfloat16()
    y = ops.rms_norm(x, torch.ones(256).bfloat16(), 1e-6)
    with ablation(name):
        fused = linear(x, dy, (weight,), keep_input=False, norm=True)
        apart = linear(y, dy, (weight,), keep_input=False, norm=False)
    plain = linear(x, dy, (weight,), keep_input=False, norm=True)
    assert torch.equal(fused[0], apart[0])
    assert torch.equal(fused[2], apart[2])
    assert [torch.equal(one, other) for one, other in zip(fused, plain, strict=True)] == [
        other != name for other in PRODUCTS
    ]


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

    spans = [(0, len(x))]
    if layout is not None:
        counts, offsets = layout.counts_X.tolist(), layout.offsets.tolist()
        spans = [(offsets[g], offsets[g] + count) for g, count in enumerate(counts)]

    def by_rows(x_TD: Tensor, w_XFD: Tensor) -> Tensor:
        y_TF = torch.zeros(len(x_TD), w_XFD.shape[1], dtype=torch.bfloat16)
        for (start, end), w_FD in zip(spans, w_XFD, strict=True):
            y_TF[start:end] = product(x_TD[start:end], w_FD).bfloat16()
        return y_TF

    def by_depth(dy_FT: Tensor, x_DT: Tensor, like: Tensor) -> Tensor:
        return torch.stack([product(dy_FT[:, start:end], x_DT[:, start:end]) for start, end in spans]).view(like.shape)

    gate_up = by_rows(rows(x, "fprop"), weight(weights.up, "fprop"))
    gate, up = gate_up.float().chunk(2, dim=1)
    hidden = (nn.functional.silu(gate) * up).bfloat16()
    y = by_rows(rows(hidden, "fprop"), weight(weights.down, "fprop"))
    kept = rows(gate_up, "swiglu").requires_grad_()
    gate, up = kept.chunk(2, dim=1)
    again = nn.functional.silu(gate) * up
    dhidden = by_rows(rows(dy, "dgrad"), weight(weights.down, "dgrad").mT)
    again.backward(dhidden.float())
    assert kept.grad is not None
    dgate_up, again = kept.grad.bfloat16(), again.detach().bfloat16()
    dx = by_rows(rows(dgate_up, "dgrad"), weight(weights.up, "dgrad").mT)
    dw_up, dw_down = (
        by_depth(columns(dgate_up), columns(x), weights.up),
        by_depth(columns(dy), columns(again), weights.down),
    )
    return [y, dx, dw_up, dw_down]


PARTS = [(), *((part,) for part in UNCAST.values()), ("wgrad", "swiglu"), tuple(UNCAST.values())]


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "+".join(parts) or "none")
def test_feed_forward_has_the_casts_that_it_says(parts: tuple[str, ...], experts: bool) -> None:
    layout, valid, num_rows = layout_of(COUNTS) if experts else (None, torch.ones(150, dtype=torch.bool), 150)
    weights = Weights.draw(128, 128, len(COUNTS) if experts else None, torch.bfloat16)
    x, dy = (torch.randn(num_rows, 128).bfloat16() * valid[:, None] for _ in range(2))
    want, fp8_alone = mlp(parts, weights, x, dy, layout), weights.run(x, dy, layout)
    poison = torch.zeros_like(x).masked_fill(~valid[:, None], torch.nan)
    with without_casts(*parts):
        got = weights.run(x + poison, dy + poison, layout)
    assert len(got) == 4
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        assert ops.calc_diff(one, other) < SAME, index
    # y, dx and the gradients of up and down, where nothing that was left out is behind them.
    touched = {"fprop": {0, 1, 2, 3}, "dgrad": {1, 2}, "wgrad": {2, 3}, "swiglu": {1, 2, 3}}
    behind = {index for part in parts for index in touched[part]}
    assert {index for index in range(4) if not torch.equal(got[index], fp8_alone[index])} == behind


def test_gathered_rows_and_gates_are_those_of_rows_written_out() -> None:
    """And with weight gradients put off. The gates' gradient is as in FP8 where only weight gradients are in BF16."""
    tokens, experts = 70, 4
    weights = Weights.draw(128, 128, experts, torch.bfloat16)
    x, dy = torch.randn(tokens, 128).bfloat16(), torch.randn(tokens, 128).bfloat16()
    idx_TK = torch.rand(tokens, experts).argsort(dim=1)[:, :2].contiguous()
    layout, permutation = ops.place(idx_TK, num_experts=experts)
    gates = [torch.rand(tokens, 2).requires_grad_() for _ in range(1)]
    gather = fp8.Gather(permutation, gates[0])

    def gate_gradient() -> Tensor:
        taken, gates[0].grad = gates[0].grad, None
        assert taken is not None
        return taken

    plain, of_gates = weights.run(x, dy, layout, gather=gather), gate_gradient()
    with without_casts("wgrad"):
        got = weights.run(x, dy, layout, gather=gather)
        assert torch.equal(gate_gradient(), of_gates)
        queue = WeightGrads(lambda parameter, gradient: None)
        weights.run(x, dy, layout, Ledger(queue), gather)
        queue.run()
        put_off = weights.gradients()
    assert all(torch.equal(one, other) for one, other in zip(put_off, got[2:], strict=True))
    assert [torch.equal(one, other) for one, other in zip(got, plain, strict=True)] == [True, True, False, False]
    token_P, gate_P = gather.by_rows()
    rows, kept = x[token_P.long()], ops.dequantize(ops.quantize_1x128(torch.zeros(1, 16).bfloat16()))
    assert kept.shape == (1, 16)
    dy_rows = dy[token_P.long()]
    for g in range(experts):
        start, count = int(layout.offsets[g]), int(layout.counts_X[g])
        at = slice(start, start + count)
        gate_up = ops.fp8_gemm_nt(ops.quantize_1x128(rows[at]), ops.quantize_128x128(weights.up.detach()[g]))
        gate, up = ops.dequantize(ops.quantize_1x128(gate_up)).chunk(2, dim=1)
        hidden = (nn.functional.silu(gate) * up * gate_P[at, None]).bfloat16()
        assert ops.calc_diff(got[3][g], product(dy_rows[at].t(), hidden.t())) < SAME


@pytest.mark.parametrize("name", [*UNCAST, *BF16_MODULES])
def test_everything_is_restored(name: str) -> None:
    before, kept, part = dict(vars(ops)), fp8._as_kept, Copies.part
    cast = swiglu_cast.quantize_1x128
    with pytest.raises(RuntimeError, match="inside"), ablation(name):
        assert (vars(ops) == before) == (name in BF16_MODULES)
        assert (fp8._as_kept is kept) == (name != "swiglu_bf16")
        raise RuntimeError("inside")
    assert vars(ops) == before
    assert (fp8._as_kept, Copies.part, swiglu_cast.quantize_1x128) == (kept, part, cast)


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
        names = {id(p): n for n, p in made.model.named_parameters()}
        masters = made.optimizer.masters()
        for cast in casts_of(made.model):
            w, w_t = cast.of(*cast.weights)
            assert all(is_released(weight) for weight in cast.weights)
            assert w_t is not None
            exact = torch.cat([masters[names[id(weight)]] for weight in cast.weights]).bfloat16()
            pair = [(w, exact), (w_t, exact.mT)]
            (uncast, want), (other, _) = pair if name == "fprop_bf16" else pair[::-1]
            assert torch.equal(uncast.data, want)
            assert other.data.dtype == torch.float8_e4m3fn
    with pytest.raises(ValueError, match="weight_orientations must be 2, got 1"), ablation(name):
        engine(tmp_path, dtype="bfloat16", weight_orientations=1)


def test_steps_differ_where_they_should(tmp_path: Path) -> None:
    """The first loss is FP8's to the bit where the forward is; its gradients, and the second loss, are not. With all
    casts left out both are BF16's: BF16 rounds the gradients of weights, and gates elsewhere."""
    plain, bf16 = (run_steps(engine(tmp_path, dtype="bfloat16", precision=one), 2) for one in ("fp8", "bf16"))
    for name in (*UNCAST, *BF16_MODULES):
        with ablation(name):
            changes = {key.removeprefix("train."): value for key, value in settings(name).items()}
            got = run_steps(engine(tmp_path, dtype="bfloat16", **changes), 2)
        assert (got[0].loss == plain[0].loss) == (name in ("wgrad_bf16", "dgrad_bf16", "swiglu_bf16")), name
        assert got[0].grad_norm != plain[0].grad_norm
        assert got[1].loss != plain[1].loss
        assert [step.loss for step in got] == pytest.approx([step.loss for step in plain], rel=1e-2)
        assert got[0].grad_norm == pytest.approx(plain[0].grad_norm, rel=1e-2)
    with without_casts(*UNCAST.values()):
        got = run_steps(engine(tmp_path, dtype="bfloat16"), 2)
    assert got[0].loss == pytest.approx(bf16[0].loss, rel=1e-3)
    assert got[0].grad_norm == pytest.approx(bf16[0].grad_norm, rel=1e-3)


@pytest.mark.parametrize("name", BF16_MODULES)
def test_settings_leave_the_modules_they_say(tmp_path: Path, name: str) -> None:
    modules = settings(name)["train.bf16_modules"]
    made = engine(tmp_path, bf16_modules=modules)
    home = {"attention_bf16": "mlp", "experts_bf16": "self_attn"}[name]
    names = {id(p): n for n, p in made.model.named_parameters()}
    weights = [names[id(weight)] for cast in casts_of(made.model) for weight in cast.weights]
    assert weights
    assert all(f".{home}." in weight for weight in weights)
    everything = engine(tmp_path)
    names = {id(p): n for n, p in everything.model.named_parameters()}
    of_home = [names[id(weight)] for cast in casts_of(everything.model) for weight in cast.weights]
    assert weights == [weight for weight in of_home if f".{home}." in weight]

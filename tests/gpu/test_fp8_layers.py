"""Layers in FP8 on the GPU: the kernels give what the references give, repeatably, and the host never waits."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dsv3rt import ops, presets
from dsv3rt.layers import fp8, main_grad
from dsv3rt.layers.norm import RMSNorm
from dsv3rt.layers.precision import set_precision
from dsv3rt.layers.router import Router
from dsv3rt.layers.weights import WeightCast
from dsv3rt.model.block import Block
from dsv3rt.model.transformer import Transformer
from tests.layers.fp8_cases import Weights, bound, layout_of, take

pytestmark = pytest.mark.gpu

# A tensor core keeps 13 bits behind the point of the largest addend: sums of the same codes differ by 2^-13 of their
# size. That moves one BF16 rounding of 32, by a step of 2^-7 at a binade's lower end: a mean square of 2^-14 against
# 7/3 of the numbers, and calc_diff is half of a relative mean square: 2^-5 * 2^-15.2 / 2 = 4e-7. FP32 results differ by
# far less. Twice what is expected:
SAME_PRODUCT = 1e-6
# Between two products a BF16 sum is cast: of the steps that moved, one of 16 moves a code of E4M3, 2^-9 of all codes,
# by 2^-3 at the lower end: 2^-9 * 2^-6 * 3/7 / 2 = 6.5e-6 for each such tensor. y has gate and up behind it, the
# gradients have the codes kept of both and the gradient of their product: three. An emulation of such sums (truncated
# at 13 bits behind the point of the largest, 32 products at a time, FP32 every 128) gives 1.3e-5, 1.9e-5, 1.6e-5 and
# 2.4e-5 for y, dx and the weights of up and down. Twice what is expected:
SAME_CASTS = 2 * 3 * 6.5e-6
BF16 = torch.bfloat16


def assert_same(got: list[Tensor], want: list[Tensor], most: float) -> None:
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        assert torch.isfinite(one).all(), index
        diff = ops.calc_diff(one.cpu(), other)
        assert diff < most, (index, diff)


@pytest.mark.parametrize("keep_input", [False, True])
@pytest.mark.parametrize("rows", [1, 200, 512])
def test_fp8_linear_matches_reference(rows: int, keep_input: bool) -> None:
    weights = [nn.Parameter((torch.randn(n, 384) * 0.05).to(BF16)) for n in (256, 64)]
    x, dy = torch.randn(rows, 384).to(BF16), torch.randn(rows, 320).to(BF16)

    def run(device: str) -> list[Tensor]:
        own = tuple(nn.Parameter(w.detach().to(device)) for w in weights)
        leaf = x.to(device).requires_grad_()
        y = fp8.linear(leaf, (WeightCast(), own), None, keep_input=keep_input)
        y.backward(dy.to(device))
        return [y.detach(), leaf.grad, *(take(w) for w in own)]  # type: ignore[list-item]

    assert_same(run("cuda"), run("cpu"), SAME_PRODUCT)


@pytest.mark.parametrize("columns", [512, 1536])
def test_fp8_norm_linear_is_the_linear_of_the_norm(columns: int) -> None:
    """To the bit, as tests/layers has it on the CPU; x are columns of a wider tensor."""
    norm = RMSNorm(columns, 1e-6, dtype=BF16, device="cuda")
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    weight = nn.Parameter((torch.randn(768, columns, device="cuda") * 0.05).to(BF16))
    wide, dy = (torch.randn(300, width, device="cuda").to(BF16) for width in (2112, 768))

    def run(fused: bool) -> list[Tensor]:
        stack = WeightCast(), (weight,)
        leaf = wide.clone().requires_grad_()
        x, norm.weight.grad = leaf[:, 64 : 64 + columns], None
        y = fp8.norm_linear(x, norm, stack, None) if fused else fp8.linear(norm(x), stack, None, keep_input=False)
        y.backward(dy)
        return [y.detach(), leaf.grad, norm.weight.grad, take(weight)]  # type: ignore[list-item]

    assert all(torch.equal(one, other) for one, other in zip(run(True), run(False), strict=True))


def test_fp8_mlp_matches_reference() -> None:
    weights = Weights.draw(256, 384, None, BF16)
    x, dy = (torch.randn(300, 256).to(BF16) for _ in range(2))
    got = weights.to("cuda").run(x.cuda(), dy.cuda(), None)
    assert_same(got, weights.run(x, dy, None), SAME_CASTS)


@pytest.mark.parametrize("counts", [[128, 256, 128], [5, 0, 131, 300], [0, 0], [1, 512]])
def test_fp8_experts_match_reference(counts: list[int]) -> None:
    layout, valid, num_rows = layout_of(counts)
    weights = Weights.draw(256, 128, len(counts), BF16)
    x, dy = (torch.randn(num_rows, 256).to(BF16) * valid[:, None] for _ in range(2))
    poison = torch.full_like(x, torch.nan).where(~valid[:, None], torch.zeros_like(x))
    device_layout, mask, _ = layout_of(counts, "cuda")
    got = weights.to("cuda").run((x + poison).cuda(), (dy + poison).cuda(), device_layout)
    for index in range(2):
        got[index] = got[index].where(mask[:, None], torch.zeros_like(got[index]))
    assert_same(got, weights.run(x, dy, layout), SAME_CASTS)


@pytest.mark.parametrize("tokens", [130, 512])
def test_fp8_experts_gather_tokens_as_reference(tokens: int) -> None:
    """The gates' gradient is a sum over F of what two casts lie behind, in a FP32 sum of its own."""
    experts, top_k = 4, 2
    weights = Weights.draw(256, 128, experts, BF16)
    x, dy = (torch.randn(tokens, 256).to(BF16) for _ in range(2))
    idx_TK = torch.rand(tokens, experts).argsort(dim=1)[:, :top_k].contiguous()
    gate_TK = torch.rand(tokens, top_k)

    def run(device: str) -> list[Tensor]:
        layout, permutation = ops.place(idx_TK.to(device), num_experts=experts)
        gates = gate_TK.to(device).requires_grad_()
        found = weights.to(device).run(x.to(device), dy.to(device), layout, gather=fp8.Gather(permutation, gates))
        assert gates.grad is not None
        return [*found, gates.grad]

    assert_same(run("cuda"), run("cpu"), SAME_CASTS)


@pytest.mark.parametrize("num_experts", [16, 256])
def test_router_matches_fp32_products(num_experts: int) -> None:
    """Products of BF16 are exact in FP32, and 16 bits of the gradient leave 2^-17 of it: what differs is the rounding
    of BF16 results, in steps of 2^-7 at a binade's lower end: 2^-14 / 12 * 3/7 / 2 = 1.1e-6. Three times that."""
    router = Router(replace(presets.model("tiny"), dim=512, num_experts=num_experts), dtype=BF16, device="cuda")
    nn.init.normal_(router.weight, std=0.05)
    x, dy = torch.randn(500, 512, device="cuda", dtype=BF16), torch.randn(500, num_experts, device="cuda")
    leaf = x.clone().requires_grad_()
    router(leaf).scores_TE.logit().backward(dy)
    wide, weight = x.double().requires_grad_(), router.weight.detach().double().requires_grad_()
    (wide @ weight.t()).backward(dy.double())
    assert ops.calc_diff(router(x).scores_TE, (wide @ weight.t()).sigmoid().detach()) < 1e-12
    assert leaf.grad is not None
    assert router.weight.grad is not None
    for got, want in ((leaf.grad, wide.grad), (router.weight.grad, weight.grad)):
        assert ops.calc_diff(got, want) < 3.3e-6


def test_fp8_experts_do_not_wait_for_the_device() -> None:
    counts = [128, 200, 0, 77]
    layout, _, num_rows = layout_of(counts, "cuda")
    weights = Weights.draw(256, 128, len(counts), BF16).to("cuda")
    x, dy = (torch.randn(num_rows, 256, device="cuda", dtype=BF16) for _ in range(2))
    tokens, grad = x[:100], dy[:100]
    gate_TK = torch.rand(100, 2, device="cuda")
    idx_TK = torch.rand(100, len(counts), device="cuda").argsort(dim=1)[:, :2].contiguous()

    def run() -> None:
        weights.run(x, dy, layout)
        placed, permutation = ops.place(idx_TK, num_experts=len(counts))
        weights.run(tokens, grad, placed, gather=fp8.Gather(permutation, gate_TK))

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def block_gradients(block: Block, model: Transformer, x: Tensor, dy: Tensor, tokens_BT: Tensor) -> dict[str, Tensor]:
    leaf = x.detach().requires_grad_()
    y, _ = block(leaf, model.sequences(tokens_BT))
    y.backward(dy)
    found = {"y": y.detach(), "x": leaf.grad}
    for name, parameter in block.named_parameters():
        gradient = take(parameter) if parameter.grad is None else parameter.grad
        found[name], parameter.grad = gradient, None
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
def test_fp8_block_is_near_bf16_and_repeatable(layer: int) -> None:
    """With every expert chosen no token can be routed elsewhere; gates then follow their logits smoothly. Each tensor
    has a bound of its own, at V3's widths, in test_fp8_step.py."""
    config = replace(presets.model("tiny"), top_k=8, num_groups_kept=4, dim=512)
    model = Transformer(config, dtype=BF16, device="cuda")
    block = model.layers[layer]
    assert isinstance(block, Block)
    tokens_BT = torch.zeros(2, 512, dtype=torch.int64, device="cuda")
    x, dy = (torch.randn(1024, config.dim, device="cuda", dtype=BF16) for _ in range(2))
    want = block_gradients(block, model, x, dy, tokens_BT)
    names = set_precision(model, "fp8")
    assert len(names) > 10
    got = block_gradients(block, model, x, dy, tokens_BT)
    again = block_gradients(block, model, x, dy, tokens_BT)
    assert all(torch.equal(got[name], again[name]) for name in got)
    # The longest way, to the first projections: theirs and the next ones' casts forward (8, to the output and through
    # the feed-forward) and backward (12).
    diffs = {name: ops.calc_diff(got[name], want[name]) for name in got}
    assert max(diffs.values()) < bound(20), diffs


def test_trainer_learns_in_fp8_on_the_gpu(tmp_path: Path) -> None:
    from dsv3rt.train.metrics import read_rows
    from dsv3rt.train.trainer import Trainer
    from tests.train.train_helpers import config

    tiny = asdict(presets.model("tiny"))
    losses = {}
    for precision in ("bf16", "fp8"):
        train = {
            "precision": precision, "steps": 30, "seq_len": 128, "batch_size": 8, "micro_batch_size": 4,
            "device": "cuda", "run_dir": str(tmp_path / precision),
        }  # fmt: skip
        trainer = Trainer(config(tmp_path, model=tiny, train=train, optim={"lr": 2e-3}))
        trainer.fit()
        losses[precision] = [row["loss"] for row in read_rows(trainer.run.metrics)[1:]]
    assert losses["fp8"][-1] < 0.7 * losses["fp8"][0]
    # Both fall from 5.6; a step's own noise is far above what casts do, which 5% tells from a broken gradient.
    assert sum(losses["fp8"]) == pytest.approx(sum(losses["bf16"]), rel=0.05)


def test_fp8_step_replays_from_a_graph() -> None:
    """Forward and backward of a whole model, captured once: other tokens, the same bits as without a graph. With the
    optimizer: test_fp8_step.py."""
    config = replace(presets.model("tiny"), dim=512)
    model = Transformer(config, dtype=BF16, device="cuda")
    set_precision(model, "fp8")
    draws = [torch.randint(0, config.vocab_size, (2, 1, 256), device="cuda") for _ in range(3)]
    tokens_BT, labels_BT = draws[0].clone()

    def step() -> dict[str, Tensor]:
        for parameter in model.parameters():
            parameter.grad = None
            main_grad.of(parameter).grad = None
        loss = model(tokens_BT, labels_BT).loss
        loss.backward()
        grads = {n: main_grad.of(p).grad if p.grad is None else p.grad for n, p in model.named_parameters()}
        return {"loss": loss.detach(), **{name: grad for name, grad in grads.items() if grad is not None}}

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    assert len(captured) > 20
    for draw in draws:
        tokens_BT.copy_(draw[0])
        labels_BT.copy_(draw[1])
        graph.replay()
        replayed = {name: tensor.clone() for name, tensor in captured.items()}
        eager = step()
        assert replayed.keys() == eager.keys()
        wrong = [name for name in eager if not torch.equal(eager[name], replayed[name])]
        assert not wrong, wrong

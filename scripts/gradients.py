"""How far gradients in FP8 are from those in BF16, tensor by tensor, beside what rounding to E4M3 alone makes of it.

    python scripts/gradients.py --out benchmarks/results/h200/gradients.md
    python scripts/gradients.py --small            widths for a machine without a GPU

A MoE layer by itself, and a model of a dense and a MoE layer, at DeepSeek-V3's widths with random weights. The tables
have calc_diff of each tensor, and twice what is to be expected of the casts behind it (`bound`,
tests/layers/fp8_cases.py), which tests/gpu/test_fp8_step.py holds the kernels to. Casts round at random, so:

- a product has its operands' casts behind it and what was behind these;
- a product of two results, as in SwiGLU and in the gradients of scores, has what is behind both;
- a sum of a residual stream and a branch has what is behind either, by its share in the sum of squares. These shares
  are measured, in BF16, forward and backward.

What is left out is small at initialisation: what casts move in the weights of attention, as scores are far below one,
in the gates, and in the softmax of the loss.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for benchmarks.provenance and tests.layers

from benchmarks import provenance  # noqa: E402
from dsv3rt import ops  # noqa: E402
from dsv3rt.config import ModelConfig  # noqa: E402
from dsv3rt.layers import main_grad  # noqa: E402
from dsv3rt.layers.moe import MoE  # noqa: E402
from dsv3rt.layers.precision import set_precision  # noqa: E402
from dsv3rt.model.transformer import Transformer  # noqa: E402
from tests.layers.fp8_cases import bound  # noqa: E402

Tensors = dict[str, Tensor]
Counts = dict[str, float]


@dataclass(frozen=True)
class Shape:
    """Widths, and how many experts the layer by itself has. The model has top_k, so that every expert is chosen and no
    token can be routed elsewhere."""

    config: ModelConfig
    experts: int
    tokens: int

    @property
    def layer(self) -> ModelConfig:
        return replace(self.config, num_layers=1, num_dense_layers=0, num_experts=self.experts)

    @property
    def model(self) -> ModelConfig:
        return replace(self.config, num_layers=2, num_dense_layers=1, num_experts=self.config.top_k)


_V3 = ModelConfig(vocab_size=32768, num_expert_groups=1, num_groups_kept=1, mtp_depth=0)
WIDE = Shape(_V3, experts=16, tokens=2048)
# init_std of sqrt(7168 / 512) times V3's: numbers as large as at V3's widths.
SMALL = Shape(
    replace(_V3, vocab_size=512, dim=512, num_heads=2, q_lora_rank=256, ffn_dim=512, expert_dim=256, init_std=0.0225),
    experts=16,
    tokens=256,
)


@dataclass(frozen=True)
class Row:
    """One tensor: the casts behind it, and how far FP8 is from BF16."""

    name: str
    casts: float
    diff: float

    @property
    def bound(self) -> float:
        return bound(self.casts)


@dataclass(frozen=True)
class Table:
    title: str
    rows: list[Row]

    @property
    def outside(self) -> list[Row]:
        return [row for row in self.rows if not row.diff < row.bound]

    def __str__(self) -> str:
        lines = [f"{self.title}:", "", "| tensor | casts behind it | calc_diff | at most |", "|---|---:|---:|---:|"]
        lines += [f"| `{row.name}` | {row.casts:.1f} | {row.diff:.2e} | {row.bound:.2e} |" for row in self.rows]
        return "\n".join(lines)


def of_attention(x: float, dy: float) -> tuple[Counts, float, float]:
    """Behind each weight's gradient, the result, and the gradient of the normed input, where `x` casts are behind the
    input and `dy` behind the result's gradient."""
    latent = x + 2
    heads = latent + 2  # queries, keys, values
    dheads = dy + 2 + 2 * heads  # of queries and keys: from that of the output, values, and keys or queries
    dlatent = dheads + 2
    up, norm, down = latent + dheads + 2, latent + dlatent, x + dlatent + 2
    found = {
        "q_a_proj": down, "kv_a_proj_with_mqa": down, "q_a_layernorm": norm, "kv_a_layernorm": norm, "q_b_proj": up,
        "kv_b_proj": up, "o_proj": heads + dy + 2,
    }  # fmt: skip
    return {f"self_attn.{name}.weight": casts for name, casts in found.items()}, heads + 2, dlatent + 2


def of_feed_forward(x: float, dy: float) -> tuple[Counts, float, float]:
    """The same for a feed-forward, dense or MoE."""
    hidden = 2 * (x + 2)  # of gate and up
    again = 2 * (x + 3)  # from gate and up as they are kept, in FP8
    dgate_up = dy + 2 + again
    up, down = x + dgate_up + 2, again + dy + 2
    linears = {"gate_proj.weight": up, "up_proj.weight": up, "down_proj.weight": down}
    found = {
        **linears, **{f"shared_experts.{name}": casts for name, casts in linears.items()}, "gate.weight": x + dgate_up,
        "experts.gate_up_proj": up, "experts.down_proj": down,
    }  # fmt: skip
    return {f"mlp.{name}": casts for name, casts in found.items()}, hidden + 2, dgate_up + 2


BRANCHES = (("input_layernorm", of_attention), ("post_attention_layernorm", of_feed_forward))


def counts_of(forward: Sequence[float], backward: Sequence[float]) -> Counts:
    """Behind the gradient of each weight of a model, by the shares of its branches: attention, feed-forward, ...

    The gradient of the logits is as in BF16, and norms hand on what is behind their input.
    """
    branches = [BRANCHES[index % 2] for index in range(len(forward))]
    behind = [0.0]  # the stream
    for (_, branch), share in zip(branches, forward, strict=True):
        behind.append(behind[-1] * (1 - share) + branch(behind[-1], 0)[1] * share)
    found = {"lm_head.weight": behind[-1], "norm.weight": behind[-1]}
    dy = 0.0
    for index in reversed(range(len(branches))):
        norm, branch = branches[index]
        weights, _, dx = branch(behind[index], dy)
        weights[f"{norm}.weight"] = behind[index] + dx
        found.update({f"layers.{index // 2}.{name}": casts for name, casts in weights.items()})
        dy = dy * (1 - backward[index]) + dx * backward[index]
    return {**found, "embed_tokens.weight": dy}


def take_gradients(model: nn.Module) -> Tensors:
    """By name, from autograd or from FP32 sums; the next ones start from nothing."""
    found: Tensors = {}
    for name, parameter in model.named_parameters():
        kept = main_grad.of(parameter)
        gradient = kept.grad if parameter.grad is None else parameter.grad
        parameter.grad = kept.grad = None
        if gradient is not None:
            found[name] = gradient
    return found


def share(part: Tensor, rest: Tensor) -> float:
    """Of a part in the sum of squares."""
    squares = [float(one.double().square().sum()) for one in (part, rest)]
    return squares[0] / sum(squares)


def moe_layer(shape: Shape, device: str) -> Table:
    """The layer by itself: the router sees the same input in both precisions, so choices are the same."""
    torch.manual_seed(0)
    model = Transformer(shape.layer, dtype=torch.bfloat16, device=device)
    (layer,) = model.moe_layers
    x, dy = (torch.randn(shape.tokens, shape.config.dim).bfloat16().to(device) for _ in range(2))

    def run(layer: MoE) -> Tensors:
        leaf = x.clone().requires_grad_()
        y, _ = layer(leaf)
        y.backward(dy)
        assert leaf.grad is not None
        return {"y": y.detach(), "x": leaf.grad, **take_gradients(layer)}

    weights, y, dx = of_feed_forward(0, 0)
    casts = {"y": y, "x": dx, **{name.removeprefix("mlp."): count for name, count in weights.items()}}
    title = f"Gradients of a MoE layer and of its input, and its result y, {sizes(shape.layer, shape.tokens)}"
    return Table(title, compare(model, lambda: run(layer), lambda _: casts))


def whole_model(shape: Shape, device: str) -> Table:
    """Embedding, a dense and a MoE layer, and the loss of random tokens."""
    torch.manual_seed(0)
    model = Transformer(shape.model, dtype=torch.bfloat16, device=device)
    tokens_BT, labels_BT = torch.randint(shape.config.vocab_size, (2, 1, shape.tokens)).to(device)

    def run() -> Tensors:
        """Gradients, and of the stream at each of its sums what is there forward and backward."""
        sequences = model.sequences(tokens_BT)
        stream = [model.embed_tokens(tokens_BT.flatten())]
        for block in model.main_blocks:
            stream.append(block.attention(stream[-1], sequences))
            routed = block.route(stream[-1])
            dispatched = block.dispatch(routed)
            stream.append(block.combine(routed, dispatched, block.experts(routed, dispatched)))
        for x_TD in stream:
            x_TD.retain_grad()
        ops.linear_cross_entropy(model.norm(stream[-1]), model.lm_head.weight, labels_BT.flatten()).backward()
        forward = {f"x{index}": x_TD.detach() for index, x_TD in enumerate(stream)}
        backward = {f"dx{index}": x_TD.grad for index, x_TD in enumerate(stream) if x_TD.grad is not None}
        return {**take_gradients(model), **forward, **backward}

    def casts(found: Tensors) -> Counts:
        pairs = [(f"x{index}", f"x{index + 1}") for index in range(2 * len(model.main_blocks))]
        forward = [share(found[after] - found[before], found[before]) for before, after in pairs]
        backward = [share(found[f"d{one}"] - found[f"d{other}"], found[f"d{other}"]) for one, other in pairs]
        return counts_of(forward, backward)

    title = f"Gradients of a model of a dense and a MoE layer, {sizes(shape.model, shape.tokens)}"
    return Table(title, compare(model, run, casts))


def compare(model: Transformer, run: Callable[[], Tensors], casts: Callable[[Tensors], Counts]) -> list[Row]:
    """`run` in BF16 and in FP8. `casts` says, of what BF16 gave, which of it is compared."""
    want = run()
    set_precision(model, "fp8")
    got, counts = run(), casts(want)
    return [Row(name, counts[name], ops.calc_diff(got[name], want[name])) for name in want if name in counts]


def sizes(config: ModelConfig, tokens: int) -> str:
    experts = f"{config.num_experts} experts of {config.expert_dim}, {config.top_k} a token"
    return f"{config.dim} wide, {experts}, {tokens} tokens"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="widths for a machine without a GPU")
    parser.add_argument("--out", type=Path, help="a Markdown file for the tables")
    parser.add_argument("--commit", help="of these sources, where they came without git")
    options = parser.parse_args(argv)
    shape, device = SMALL if options.small else WIDE, "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "references on a CPU"
    tables = [measure(shape, device) for measure in (moe_layer, whole_model)]
    origin = f"Written by `scripts/gradients.py`: {where}, commit {options.commit or provenance.commit()}."
    text = "\n\n".join([origin, *map(str, tables)])
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    return int(any(table.outside for table in tables))


if __name__ == "__main__":
    sys.exit(main())

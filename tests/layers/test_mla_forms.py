"""MLA: the training form, the absorbed form, and a dense recomputation from the equations."""

from dataclasses import replace

import pytest
import torch

from dsv3rt import presets
from dsv3rt.layers.mla import MLA, DecodeStep, Sequences, SplitColumns
from dsv3rt.layers.rope import rope_tables

LENGTHS = [70, 1, 130]


def make_mla(q_lora_rank, dtype=torch.float32):
    config = replace(presets.model("tiny"), q_lora_rank=q_lora_rank)
    mla = MLA(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mla.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else noise * 1.5 * parameter.shape[1] ** -0.5)
    return config, mla


def batch(config):
    x_TD = torch.randn(sum(LENGTHS), config.dim, generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return x_TD, positions, Sequences(*rope_tables(config, positions), cu_seqlens)


def dense_attention(config, mla, x_LD):
    """Equations 1-11 of the V3 report for one sequence, in FP64, rotations as complex products."""
    w = {name: parameter.double() for name, parameter in mla.named_parameters()}
    x = x_LD.double()

    def norm(y, weight):
        return y / (y.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def rotate(y):  # (L, ..., R)
        position = torch.arange(len(y), dtype=torch.float64)
        frequency = 10000.0 ** (-torch.arange(0, 64, 2).double() / 64)
        turn = torch.polar(torch.ones(len(y), len(frequency)).double(), position[:, None] * frequency)
        turn = turn.view(len(y), *[1] * (y.dim() - 2), -1)
        pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    if config.q_lora_rank is None:
        q = x @ w["q_proj.weight"].T
    else:
        q = norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"]) @ w["q_b_proj.weight"].T
    q = q.unflatten(-1, (config.num_heads, -1))
    q_nope, q_rope = q[..., :128], rotate(q[..., 128:])
    down = x @ w["kv_a_proj_with_mqa.weight"].T
    latent = norm(down[:, :512], w["kv_a_layernorm.weight"])
    k_rope = rotate(down[:, 512:])
    kv = (latent @ w["kv_b_proj.weight"].T).unflatten(-1, (config.num_heads, -1))
    scores = torch.einsum("qhn,khn->hqk", q_nope, kv[..., :128]) + torch.einsum("qhr,kr->hqk", q_rope, k_rope)
    scores = scores * 192**-0.5 + torch.full((len(x), len(x)), -torch.inf).double().triu(1)
    out = torch.einsum("hqk,khu->qhu", scores.softmax(-1), kv[..., 128:])
    return out.flatten(1) @ w["o_proj.weight"].T


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("q_lora_rank", [256, None])
def test_mla_matches_equations(q_lora_rank):
    config, mla = make_mla(q_lora_rank)
    x_TD, _, sequences = batch(config)
    got = mla(x_TD, sequences)
    want = torch.cat([dense_attention(config, mla, x) for x in x_TD.split(LENGTHS)])
    assert relative(got, want) < 2e-6  # FP32 sums of a few hundred terms


@pytest.mark.parametrize("q_lora_rank", [256, None])
def test_mla_absorbed_form_matches_training_form(q_lora_rank):
    config, mla = make_mla(q_lora_rank)
    x_TD, _, sequences = batch(config)
    pages = [[5, 2], [0], [3, 6, 1]]  # scattered; page 4 stays unused
    cache = torch.full((7, 64, 576), torch.nan)
    with torch.no_grad():
        want = mla(x_TD, sequences)
        for x_LD, y_LD, own in zip(x_TD.split(LENGTHS), want.split(LENGTHS), pages, strict=True):
            done = 0
            for chunk in (50, 1, 40, 39):  # chunks, single tokens, page borders crossed inside a chunk
                rows = x_LD[done : done + chunk]
                if len(rows) == 0:
                    break
                positions = torch.arange(done, done + len(rows))
                slots = torch.tensor(own)[positions // 64] * 64 + positions % 64
                lengths = torch.tensor([done + len(rows)], dtype=torch.int32)
                table = torch.tensor([own], dtype=torch.int32)
                step = DecodeStep(*rope_tables(config, positions), slots, table, lengths)
                got = mla.decode(rows, step, cache)
                assert relative(got, y_LD[done : done + chunk]) < 5e-6
                done += len(rows)
            assert done == len(x_LD)
    assert cache[4].isnan().all()


def test_mla_is_causal_and_keeps_sequences_apart():
    config, mla = make_mla(256)
    x_TD, _, sequences = batch(config)
    with torch.no_grad():
        before = mla(x_TD, sequences)
        x_TD[80:] += 1.0  # inside the third sequence (71..200)
        after = mla(x_TD, sequences)
    torch.testing.assert_close(after[:80], before[:80], rtol=0, atol=1e-6)
    assert (after[80:] - before[80:]).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("side_by_side", [True, False])
def test_split_columns_joins_gradients(side_by_side):
    x = torch.randn(3, 2, 10, requires_grad=True)
    left, right = SplitColumns.apply(x, 6)
    assert torch.equal(left, x[..., :6])
    assert torch.equal(right, x[..., 6:])
    whole = torch.randn(3, 2, 10)
    parts = [whole[..., :6], whole[..., 6:]] if side_by_side else [whole[..., :6].clone(), whole[..., 6:].clone()]
    (gradient,) = torch.autograd.grad((left, right), x, parts)
    assert torch.equal(gradient, whole)
    assert (gradient.data_ptr() == whole.data_ptr()) == side_by_side


def test_split_columns_does_not_take_overlapping_gradients_for_neighbours():
    """Rows of 6 + 4 columns that lie 6 apart would overlap: equal strides alone are not enough."""
    x = torch.randn(3, 10, requires_grad=True)
    left, right = SplitColumns.apply(x, 6)
    flat = torch.randn(40)
    parts = [flat.as_strided((3, 6), (6, 1)), flat.as_strided((3, 4), (6, 1), 6)]
    (gradient,) = torch.autograd.grad((left, right), x, parts)
    assert torch.equal(gradient, torch.cat(parts, dim=1))

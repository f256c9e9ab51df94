"""Multi-token prediction: shapes of the shift, sharing, and the loss against a brute-force recomputation."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from dsv3rt import Transformer, presets
from dsv3rt.model.mtp import shifted_labels, shifted_tokens

SMALL = replace(
    presets.model("tiny"), vocab_size=64, dim=64, num_layers=2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16, ffn_dim=64, expert_dim=32, init_std=0.1,
)  # fmt: skip


def make(depth=1, seed=0):
    torch.manual_seed(seed)
    model = Transformer(replace(SMALL, mtp_depth=depth))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms that are not idempotent
                parameter.uniform_(0.5, 1.5)
    stream = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(1))
    return model, stream[:, :-1], stream[:, 1:]


def test_shifts():
    tokens, labels = torch.tensor([[10, 11, 12, 13]]), torch.tensor([[11, 12, 13, 14]])
    assert shifted_tokens(tokens, labels, 1).tolist() == [[11, 12, 13, 14]]
    assert shifted_tokens(tokens, labels, 2).tolist() == [[12, 13, 14, 0]]
    assert shifted_tokens(tokens, None, 1).tolist() == [[11, 12, 13, 0]]
    assert shifted_tokens(tokens, torch.full((1, 4), -100), 1).tolist() == [[11, 12, 13, 0]]
    assert shifted_labels(labels, 1).tolist() == [[12, 13, 14, -100]]
    assert shifted_labels(labels, 3).tolist() == [[14, -100, -100, -100]]
    assert shifted_tokens(tokens[:, :1], labels[:, :1], 1).tolist() == [[11]]
    assert shifted_tokens(tokens[:, :1], labels[:, :1], 3).shape == (1, 1)
    assert shifted_labels(labels[:, :1], 3).tolist() == [[-100]]


def brute_force_losses(model, tokens, labels):
    """Each sequence and depth alone, cut to the positions that have a target; no padding, no dummy token."""
    losses = [[] for _ in model.mtp_blocks]
    for row in range(len(tokens)):
        stream = torch.cat([tokens[row], labels[row, -1:]])
        length = len(tokens[row])
        x = model.embed_tokens.weight[tokens[row]]
        for block in model.main_blocks:
            x, _ = block(x, model.sequences(tokens[row : row + 1]))
        h = model.norm(x)
        for depth, block in enumerate(model.mtp_blocks, start=1):
            count = length - depth
            embedded = block.enorm(model.embed_tokens.weight[stream[depth : depth + count]])
            both = torch.cat([embedded, block.hnorm(h[:count])], dim=1)
            x = both @ block.eh_proj.weight.T
            y, _ = block(x, model.sequences(tokens[:1, :count]))
            h = block.shared_head.norm(y)
            logits = h @ model.lm_head.weight.T
            losses[depth - 1].append(functional.cross_entropy(logits, stream[depth + 1 :], reduction="none"))
    return [torch.cat(rows).mean() for rows in losses]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_mtp_loss_matches_brute_force(depth):
    model, tokens, labels = make(depth)
    output = model(tokens, labels, mtp_weight=0.3)
    want = brute_force_losses(model, tokens, labels)
    assert len(want) == depth
    torch.testing.assert_close(output.mtp_loss, torch.stack(want).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(output.loss, output.main_loss + 0.3 * output.mtp_loss, rtol=1e-6, atol=0)
    assert output.expert_counts_LE.shape == (1 + depth, 8)
    assert (output.expert_counts_LE.sum(1) == tokens.numel() * 2).all()


def test_mtp_logits_give_the_mtp_loss():
    model, tokens, labels = make(2)
    output = model(tokens, labels, mtp_weight=1.0, return_logits=True)
    losses = [
        functional.cross_entropy(logits[:, :-depth].flatten(0, 1), labels[:, depth:].flatten())
        for depth, logits in enumerate(output.mtp_logits, start=1)
    ]
    torch.testing.assert_close(output.mtp_loss, torch.stack(losses).mean(), rtol=1e-5, atol=0)
    free = model(tokens)
    torch.testing.assert_close(free.mtp_logits[0][:, :-1], output.mtp_logits[0][:, :-1], rtol=1e-4, atol=1e-5)


def test_mtp_shares_embedding_and_head():
    model, tokens, labels = make()
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "layers." in name and ("embed" in name or "head.head" in name)]
    assert sum(parameter.shape == (64, 64) and ("embed" in name or name.startswith("lm_head"))
               for name, parameter in model.named_parameters()) == 2  # fmt: skip

    def gradients(**weights):
        output = model(tokens, labels, mtp_weight=1.0)
        shared = [model.embed_tokens.weight, model.lm_head.weight]
        return torch.autograd.grad(getattr(output, weights["of"]), shared)

    for total, main, mtp in zip(*(gradients(of=of) for of in ("loss", "main_loss", "mtp_loss")), strict=True):
        assert main.norm() > 0
        assert mtp.norm() > 0
        torch.testing.assert_close(total, main + mtp, rtol=1e-4, atol=1e-6)


def test_mtp_is_skipped_without_weight():
    model, tokens, labels = make()
    output = model(tokens, labels, alpha=0.01)
    assert output.mtp_loss == 0
    assert output.mtp_logits == ()
    assert output.logits_BTV is None
    assert output.expert_counts_LE[-1].sum() == 0
    assert output.expert_counts_LE[0].sum() > 0
    shown = model(tokens, labels, alpha=0.01, return_logits=True)
    assert shown.mtp_loss > 0
    assert len(shown.mtp_logits) == 1
    assert shown.loss == output.loss  # looking at logits changes no loss

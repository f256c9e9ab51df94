"""The assembled model: phases, losses, gradients, dtypes, names, checks."""

import time
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from dsv3rt import Transformer, ops, presets
from dsv3rt.layers.moe import MoE

SMALL = replace(
    presets.model("tiny"), vocab_size=64, dim=64, num_layers=3, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16, ffn_dim=64, expert_dim=32, init_std=0.1, max_position=64,
)  # fmt: skip


def make(config=SMALL, seed=0, **options):
    torch.manual_seed(seed)
    model = Transformer(config, **options)
    stream = torch.randint(0, config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(1))
    return model, stream[:, :-1], stream[:, 1:]


def test_phases_in_sequence_equal_the_block():
    model, tokens, _ = make()
    sequences = model.sequences(tokens)
    x_TD = torch.randn(tokens.numel(), 64, generator=torch.Generator().manual_seed(2))
    for block, is_moe in zip(model.main_blocks, [False, True, True], strict=True):
        want, routing = block(x_TD, sequences)
        routed = block.route(block.attention(x_TD, sequences))
        dispatched = block.dispatch(routed)
        got = block.combine(routed, dispatched, block.experts(routed, dispatched))
        assert torch.equal(got, want)
        assert isinstance(block.mlp, MoE) == is_moe == (routing is not None) == (dispatched is not None)
        y_TD = block.attention(x_TD, sequences)
        mlp = block.mlp(block.post_attention_layernorm(y_TD))
        torch.testing.assert_close(got, y_TD + (mlp[0] if is_moe else mlp), rtol=1e-5, atol=1e-5)


def test_phases_can_be_interleaved():
    """Nothing is kept between phases: two batches taking turns give what they give alone."""
    model, tokens, _ = make()
    block = model.main_blocks[1]
    batches = [model.embed_tokens(tokens[:2].flatten()), model.embed_tokens(tokens[1:].flatten())]
    sequences = model.sequences(tokens[:2])
    want = [block(x_TD, sequences)[0] for x_TD in batches]
    routed = [block.route(block.attention(x_TD, sequences)) for x_TD in batches]
    dispatched = [block.dispatch(one) for one in reversed(routed)][::-1]
    outputs = [block.experts(one, rows) for one, rows in zip(routed, dispatched, strict=True)]
    got = [block.combine(*parts) for parts in zip(routed, dispatched, outputs, strict=True)]
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_positions_restart_in_every_sequence():
    model, tokens, _ = make()
    sequences = model.sequences(tokens)
    assert sequences.cu_seqlens.tolist() == [0, 16, 32, 48]
    assert sequences.cu_seqlens.dtype == torch.int32
    for table in (sequences.cos_TR, sequences.sin_TR):
        assert torch.equal(table, table[:16].repeat(3, 1))
        assert not torch.equal(table[0], table[1])


def test_loss_parts():
    model, tokens, labels = make()
    labels = labels.masked_fill(torch.rand(labels.shape, generator=torch.Generator().manual_seed(5)) < 0.3, -100)
    output = model(tokens, labels, alpha=0.02, mtp_weight=0.4, return_logits=True)
    assert output.logits_BTV.dtype == torch.float32
    assert output.logits_BTV.shape == (3, 16, 64)
    want = functional.cross_entropy(output.logits_BTV.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.main_loss, want, rtol=1e-5, atol=0)
    total = output.main_loss + 0.4 * output.mtp_loss + output.balance_loss
    torch.testing.assert_close(output.loss, total, rtol=1e-6, atol=0)
    assert output.loss.dtype == torch.float32
    assert output.loss.dim() == 0
    # The balance loss is that of each MoE layer and the MTP block, sequence by sequence.
    sequences = model.sequences(tokens)
    h_TD, routings = model._main(tokens, sequences)
    routings = routings + model._mtp(tokens, labels, h_TD, sequences)[1]
    want = torch.zeros(())
    for routing in routings:
        for scores, idx in zip(routing.scores_TE.split(16), routing.idx_TK.split(16), strict=True):
            load = torch.bincount(idx.flatten(), minlength=8) * 8 / (2 * 16)
            want += 0.02 * (load * (scores / scores.sum(1, keepdim=True)).mean(0)).sum() / 3
    assert len(routings) == 3
    torch.testing.assert_close(output.balance_loss, want, rtol=1e-5, atol=0)
    assert torch.equal(output.expert_counts_LE, torch.stack([routing.counts_E for routing in routings]))
    assert output.expert_counts_LE.dtype == torch.int64
    without = model(tokens)
    assert without.loss is without.main_loss is without.mtp_loss is without.balance_loss is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_every_parameter(dtype):
    model, tokens, labels = make(dtype=dtype)
    output = model(tokens, labels, alpha=0.01, mtp_weight=0.3)
    output.loss.backward()
    assert output.loss.isfinite()
    assert output.loss.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype, name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if ".experts." not in name:
            assert parameter.grad.abs().sum() > 0, name
    for moe, counts_E in zip(model.moe_layers, output.expert_counts_LE, strict=True):
        for parameter in (moe.experts.gate_up_proj, moe.experts.down_proj):
            assert torch.equal(parameter.grad.abs().amax((1, 2)) > 0, counts_E > 0)
        assert moe.gate.e_score_correction_bias.dtype == torch.float32


def test_bf16_stays_near_fp32():
    model, tokens, labels = make()
    want = model(tokens, labels).loss
    low = Transformer(SMALL, dtype=torch.bfloat16)
    low.load_state_dict(model.state_dict())
    # Weights and activations carry 2^-9 of relative noise; a loss of 4.2 nats moves in the second decimal.
    torch.testing.assert_close(low(tokens, labels).loss, want, rtol=0, atol=0.05)
    assert low(tokens).logits_BTV.dtype == torch.float32


def test_router_bias_update_reaches_each_layer():
    model, tokens, labels = make()
    counts_LE = torch.stack([torch.arange(8).roll(shift) for shift in (0, 3, 5)])
    model.update_router_bias(counts_LE, 0.001)
    for moe, counts_E in zip(model.moe_layers, counts_LE, strict=True):
        want = ops.update_bias(torch.zeros(8), counts_E, gamma=0.001)
        assert torch.equal(moe.gate.e_score_correction_bias, want)
        assert want[counts_E.argmin()] == pytest.approx(0.001)
        assert want[counts_E.argmax()] == pytest.approx(-0.001)
    output = model(tokens, labels, mtp_weight=0.1)
    model.update_router_bias(output.expert_counts_LE, 0.0)
    with pytest.raises(ValueError, match=r"counts_LE must have shape \(3, 8\), got \(2, 8\)"):
        model.update_router_bias(counts_LE[:2], 0.001)


def test_parameter_names_are_the_checkpoint_format():
    model, _, _ = make()
    names = set(model.state_dict())
    parts = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
    attention = {f"self_attn.{part}.weight" for part in parts}
    block = attention | {"input_layernorm.weight", "post_attention_layernorm.weight"}
    dense = block | {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    moe = block | {f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")}
    moe |= {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
    moe |= {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    mtp = moe | {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    want = {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
    for layer, part in enumerate((dense, moe, moe, mtp)):
        want |= {f"layers.{layer}.{name}" for name in part}
    assert names == want


def test_init_weights():
    model, _, _ = make(replace(SMALL, init_std=0.013))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            # Fewest elements: a (8, 64) router; the standard error of its std is 1 / sqrt(2 * 512) = 3%.
            assert parameter.std().item() == pytest.approx(0.013, rel=0.15), name
    again, _, _ = make(replace(SMALL, init_std=0.013))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_meta_device_is_quick_and_materialises():
    start = time.perf_counter()
    model = Transformer(presets.model("671b"), dtype=torch.bfloat16, device="meta")
    assert time.perf_counter() - start < 10
    assert all(parameter.is_meta for parameter in model.parameters())
    meta, tokens, _ = make(device="meta")
    real, _, _ = make()
    built = meta.to_empty(device="cpu")
    torch.manual_seed(0)
    built.init_weights()
    assert torch.equal(built(tokens).logits_BTV, real(tokens).logits_BTV)


def test_forward_rejects_bad_shapes():
    model, tokens, labels = make()
    with pytest.raises(ValueError, match="max_position"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens_BT"):
        model(tokens[0])
    with pytest.raises(ValueError, match="labels_BT"):
        model(tokens, labels[:, :-1])


def test_depth_zero_and_all_dense_models_run():
    model, tokens, labels = make(replace(SMALL, num_dense_layers=3, mtp_depth=0))
    output = model(tokens, labels, alpha=0.1, mtp_weight=0.3)
    assert output.expert_counts_LE.shape == (0, 8)
    assert output.loss == output.main_loss
    model.update_router_bias(output.expert_counts_LE, 0.001)
    output.loss.backward()

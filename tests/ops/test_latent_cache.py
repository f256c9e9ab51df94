"""The FP8 form of the latent cache."""

import math

import pytest
import torch

from dsv3rt import ops


def test_latents_roundtrip_within_half_a_unit():
    """E4M3 has four significant bits: 2^-4 of a number, or half of its least step, 2^-10 of a scale, which is at most
    twice the tile's largest over 448."""
    torch.manual_seed(0)
    rows = (torch.randn(300, 576) * torch.logspace(-3, 3, 300)[:, None]).bfloat16()
    packed = ops.quantize_latents(rows, latent_dim=512)
    assert packed.shape == (300, 656)
    assert packed.shape[-1] == ops.fp8_token_bytes(512, 64)
    back = ops.dequantize_latents(packed, latent_dim=512)
    assert torch.equal(back[:, 512:], rows[:, 512:])
    latent = rows[:, :512].float().unflatten(1, (4, 128))
    bound = torch.maximum(latent.abs() / 16, latent.abs().amax(2, keepdim=True) * 2 / 448 / 1024)
    assert ((back[:, :512].float().unflatten(1, (4, 128)) - latent).abs() <= bound).all()


def test_latents_come_back_as_they_were():
    """BF16 holds what was quantised, and quantising it again changes no number."""
    torch.manual_seed(0)
    packed = ops.quantize_latents(torch.randn(5, 64, 576), latent_dim=512)
    exact = ops.dequantize_latents(packed, latent_dim=512, dtype=torch.float64)
    assert torch.equal(exact, ops.dequantize_latents(packed, latent_dim=512).double())
    again = ops.quantize_latents(exact, latent_dim=512)
    assert torch.equal(ops.dequantize_latents(again, latent_dim=512, dtype=torch.float64), exact)


def test_latents_show_nan():
    rows = torch.zeros(1, 576)
    rows[0, 130] = math.nan
    back = ops.dequantize_latents(ops.quantize_latents(rows, latent_dim=512), latent_dim=512)
    assert back[0, 128:256].isnan().all()
    assert not back[0, :128].any()
    assert not back[0, 256:].any()


@pytest.mark.parametrize(("latent_dim", "rope_dim"), [(32, 8), (512, 64), (130, 6)])
def test_decode_over_fp8_equals_decode_over_its_numbers(latent_dim, rope_dim):
    torch.manual_seed(0)
    cache = torch.randn(4, 64, latent_dim + rope_dim).bfloat16()
    packed = ops.quantize_latents(cache, latent_dim=latent_dim)
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)
    lengths = torch.tensor([70, 128], dtype=torch.int32)
    q = torch.randn(2, 2, 3, latent_dim + rope_dim).bfloat16()
    got = ops.mla_decode(q, packed, table, lengths, scale=0.3, latent_dim=latent_dim)
    exact = ops.dequantize_latents(packed, latent_dim=latent_dim)
    want = ops.mla_decode(q, exact, table, lengths, scale=0.3, latent_dim=latent_dim)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# E4M3 has four significant bits: a number moves by a relative error of random sign, whose mean square is E^2 = 2^-8 / 3
# at most; what lies below a tile's normal numbers, 2^-13 of its largest or less, is nothing beside it. With weights w
# and values v of tokens that have nothing to do with each other, |out|^2 is sum(w^2 |v|^2) or more. The error has two
# parts:
#   - of values: E^2 sum(w^2 |v|^2);
#   - of scores: each moves by E s, s^2 the sum over columns of (scale q k)^2, and its weight by as much of itself:
#     E^2 s^2 sum(w^2 |v|^2).
# calc_diff is half of the square over |out|^2. What tokens have in common makes |out| larger, so less remains.
E4M3_SQUARE = 2.0**-8 / 3


@pytest.mark.parametrize("common", [0.0, 1.0])
@pytest.mark.parametrize("size", [0.5, 1.0])
@pytest.mark.parametrize("num_tokens", [300, 2000])
def test_decode_over_fp8_is_as_near_as_its_rounding(num_tokens, size, common):
    """To decoding over the BF16 cache of the same tokens; latents come normed into both, as in the layer."""
    torch.manual_seed(0)
    rows = (torch.randn(num_tokens, 576) + common * torch.randn(576)).bfloat16()
    angle, slots = torch.rand(num_tokens, 32) * 6, torch.arange(num_tokens)
    pages = -(-num_tokens // 64)
    plain = torch.zeros(pages, 64, 576, dtype=torch.bfloat16)
    packed = torch.zeros(pages, 64, ops.fp8_token_bytes(512, 64), dtype=torch.uint8)
    for cache in (plain, packed):
        weight = torch.ones(512, dtype=torch.bfloat16)
        ops.append_latents(cache, rows, weight, angle.cos(), angle.sin(), slots, eps=1e-6)
    q, scale = torch.randn(1, 2, 16, 576) * size, 192**-0.5
    table, lengths = torch.arange(pages, dtype=torch.int32)[None], torch.tensor([num_tokens], dtype=torch.int32)
    (want, want_lse), (got, lse) = (
        ops.mla_decode(q, cache, table, lengths, scale=scale, latent_dim=512) for cache in (plain.float(), packed)
    )
    keys = plain.flatten(0, 1)[:num_tokens].float()
    score_square = ((scale * q[..., :512]).square() @ keys[:, :512].square().t()).mean().item()
    diff, bound = ops.calc_diff(got, want), E4M3_SQUARE / 2 * (1 + score_square)
    deviation = (q @ keys.t() * scale).std(dim=-1).mean()
    print(
        f"\n{num_tokens} tokens, in common {common}, scores' deviation {deviation:.2f}: calc_diff {diff:.1e} "
        f"({diff / bound:.2f} of the bound), out off by {((got - want).norm() / want.norm()).item():.1%}, "
        f"lse by {(lse - want_lse).abs().max().item():.3f} at most"
    )
    assert 0 < diff < bound


def test_latent_cache_rejects_bad_arguments():
    with pytest.raises(ValueError, match=r"quantize_latents: latent_dim must be in 1..575, got 576"):
        ops.quantize_latents(torch.zeros(2, 576), latent_dim=576)
    with pytest.raises(TypeError, match="dequantize_latents: packed must"):
        ops.dequantize_latents(torch.zeros(2, 656), latent_dim=512)
    with pytest.raises(ValueError, match="dequantize_latents: packed must have the width of some R"):
        ops.dequantize_latents(torch.zeros(2, 528, dtype=torch.uint8), latent_dim=512)


def appended(cache, rows, slots, weight=None):
    angle = torch.arange(len(rows) * 4, dtype=torch.float32).view(-1, 4)
    weight = torch.ones(32, dtype=rows.dtype) if weight is None else weight
    return ops.append_latents(cache, rows, weight, angle.cos(), angle.sin(), torch.tensor(slots), eps=1e-6)


def test_append_latents_norms_turns_and_places():
    torch.manual_seed(0)
    rows, weight = torch.randn(3, 40, dtype=torch.float64), torch.rand(32, dtype=torch.float64)
    cache = torch.full((2, 64, 40), 7.0, dtype=torch.float64)
    assert appended(cache, rows, [70, -1, 3], weight) is cache
    for row, (page, place) in ((0, (1, 6)), (2, (0, 3))):
        latent = rows[row, :32]
        want = latent / (latent.square().mean() + 1e-6).sqrt() * weight
        torch.testing.assert_close(cache[page, place, :32], want)
        turn = torch.polar(torch.ones(4).double(), torch.arange(4 * row, 4 * row + 4).double())
        pairs = torch.view_as_complex(rows[row, 32:].view(4, 2).contiguous()) * turn
        torch.testing.assert_close(cache[page, place, 32:], torch.view_as_real(pairs).flatten(), rtol=1e-6, atol=1e-6)
        cache[page, place] = 7.0
    assert (cache == 7.0).all()


def test_append_latents_quantises():
    torch.manual_seed(0)
    rows = torch.randn(2, 40).bfloat16()
    packed, exact = torch.zeros(1, 64, 32 + 4 + 16, dtype=torch.uint8), torch.zeros(1, 64, 40, dtype=torch.bfloat16)
    appended(packed, rows, [9, 1])
    appended(exact, rows, [9, 1])
    assert torch.equal(packed[0, [9, 1]], ops.quantize_latents(exact[0, [9, 1]], latent_dim=32))


def test_append_latents_rejects_bad_arguments():
    rows, cache = torch.zeros(1, 40), torch.zeros(2, 64, 40)
    with pytest.raises(ValueError, match="append_latents: slots_T must be in the cache, got 128"):
        appended(cache, rows, [128])
    with pytest.raises(ValueError, match="append_latents: cache must have shape"):
        appended(cache[:, :, :39], rows, [1])
    with pytest.raises(ValueError, match="append_latents: cache must be contiguous"):
        appended(torch.zeros(2, 64, 80)[:, :, ::2], rows, [1])
    with pytest.raises(TypeError, match="append_latents: rows_TX must be float32"):
        appended(cache, rows.double(), [1], torch.ones(32))
    with pytest.raises(ValueError, match="append_latents: rows_TX must have 32"):
        appended(cache, rows[:, :32], [1])

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


def test_latent_cache_rejects_bad_arguments():
    with pytest.raises(ValueError, match=r"quantize_latents: latent_dim must be in 1..575, got 576"):
        ops.quantize_latents(torch.zeros(2, 576), latent_dim=576)
    with pytest.raises(TypeError, match="dequantize_latents: packed must"):
        ops.dequantize_latents(torch.zeros(2, 656), latent_dim=512)
    with pytest.raises(ValueError, match="dequantize_latents: packed must have the width of some R"):
        ops.dequantize_latents(torch.zeros(2, 528, dtype=torch.uint8), latent_dim=512)

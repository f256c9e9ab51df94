"""What the tests of the cast kernels share: rows of many magnitudes, comparisons to the bit, buffers with guards."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv3rt.ops import GroupLayout, QuantTensor
from dsv3rt.ops.types import round_up

FP8 = torch.float8_e4m3fn
GUARD = 512
GUARD_BYTE = 0xA5
# Of weights, and of experts' weights: inside a tile, whole tiles, ragged ones.
MATRICES = [
    (1, 1),
    (1, 16),
    (16, 16),
    (8, 136),
    (77, 130),
    (128, 128),
    (130, 77),
    (129, 144),
    (144, 129),
    (576, 7168),
    (2112, 512),
    (3, 130, 200),
    (5, 64, 272),
    (2, 33, 7),
]


def random_rows(shape: tuple[int, ...], dtype: torch.dtype, seed: int, decades: float = 12) -> Tensor:
    """Rows whose magnitudes spread over `decades` either side of one, so that every scale differs."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(shape, generator=generator, device="cuda")
    exponents = torch.rand((*shape[:-1], 1), generator=generator, device="cuda") * 2 - 1
    return (x * 10 ** (exponents * decades)).to(dtype)


def random_layout(
    counts: list[int], spare: int = 0, *, device: str = "cuda"
) -> tuple[GroupLayout, list[tuple[int, int, int]], int]:
    """Segments padded to 128 rows: the layout, each one's (start, end, padded end), the rows with `spare` more."""
    spans, start = [], 0
    for count in counts:
        spans.append((start, start + count, start + round_up(count, 128)))
        start = spans[-1][2]
    offsets = [0, *(end for _, _, end in spans)]
    layout = GroupLayout(*(torch.tensor(values, dtype=torch.int32, device=device) for values in (counts, offsets)))
    return layout, spans, start + spare


def assert_same_bits(got: QuantTensor, expected: QuantTensor) -> None:
    assert got.tile == expected.tile
    assert got.data.shape == expected.data.shape
    assert got.scale.stride() == expected.scale.stride()
    nan = expected.data.float().isnan()
    torch.testing.assert_close(got.data.float().isnan(), nan)
    bits, expected_bits = got.data.view(torch.uint8), expected.data.view(torch.uint8)
    assert torch.equal(bits.masked_fill(nan, 0), expected_bits.masked_fill(nan, 0))
    torch.testing.assert_close(got.scale, expected.scale, rtol=0, atol=0, equal_nan=True)


def up_to(q: QuantTensor, rows: int) -> QuantTensor:
    """The first rows of a quantised tensor, with strides kept."""
    return QuantTensor(q.data[:rows], q.scale[:rows], q.tile)


def columns_up_to(q: QuantTensor, columns: int) -> QuantTensor:
    """The first columns, a multiple of 128 of them."""
    return QuantTensor(q.data[:, :columns], q.scale[:, : columns // 128], q.tile)


@dataclass
class Guarded:
    """Outputs full of NaN with no room to spare, in front of and behind which nothing may be written."""

    storages: list[Tensor] = field(default_factory=list)

    def _new(self, num_bytes: int) -> Tensor:
        storage = torch.full((num_bytes + 2 * GUARD,), GUARD_BYTE, dtype=torch.uint8, device="cuda")
        self.storages.append(storage)
        return storage[GUARD : GUARD + num_bytes]

    def codes(self, *shape: int) -> Tensor:
        return self._new(torch.Size(shape).numel()).fill_(0x7F).view(shape)

    def floats(self, *shape: int) -> Tensor:
        return self._new(4 * torch.Size(shape).numel()).view(torch.float32).fill_(torch.nan).view(shape)

    def halves(self, *shape: int) -> Tensor:
        return self._new(2 * torch.Size(shape).numel()).view(torch.bfloat16).fill_(torch.nan).view(shape)

    def row_scales(self, rows: int, tiles: int) -> Tensor:
        stride = round_up(rows, 4)
        room = (tiles - 1) * stride + rows
        return self.floats(room).as_strided((rows, tiles), (1, stride))

    def assert_intact(self) -> None:
        for storage in self.storages:
            assert storage[:GUARD].eq(GUARD_BYTE).all()
            assert storage[len(storage) - GUARD :].eq(GUARD_BYTE).all()


def assert_pads_kept(scale: Tensor) -> None:
    """What lies between the rows and the aligned stride of guarded scales is as it was: NaN."""
    rows, tiles = scale.shape
    stride = round_up(rows, 4)
    if stride > rows and tiles > 1:
        pads = scale.as_strided((tiles - 1, stride - rows), (stride, 1), scale.storage_offset() + rows)
        assert pads.isnan().all()

"""What the tests of the FP8 GEMM kernels share: operands, groups, and comparisons with FP64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from dsv3rt import ops
from dsv3rt.ops.types import GroupLayout, QuantTensor, ceil_div, empty_row_scales
from tests.gpu.quant_cases import random_layout

# Over operands of like magnitude. FP32 results: the tensor cores keep about 14 bits of a partial sum over 128
# products of random sign, so its relative error is near 2^-14; calc_diff is half of the square, under 1e-8, and 1e-6
# leaves room for cancellation. BF16 results: rounding to 8 bits has a mean square relative error of 2^-18 / 3 at
# most, half of which is 6.4e-7; the rest is FP32_DIFF.
FP32_DIFF = 1e-6
BF16_DIFF = 2e-6
# Over scales of many decades one tile outweighs all others, and where its sum cancels the relative error is large. So
# errors are held to the sum of the magnitudes of an element's products. A step of the tensor cores adds 32 products to
# a partial sum, each truncated at 2^-13 of the largest: never more than 33 * 2^-13 < 2^-7 of the magnitudes. On average
# a truncation is half of that, and the largest product a fifth of the 32 magnitudes: 33 * 2^-14 / 5 < 2^-11. One lost
# product of 128 would be 2^-7 on average.
TRUNCATION_WORST = 2.0**-7
TRUNCATION_MEAN = 2.0**-11
BF16_ROUNDING = 2.0**-9
FP32_ROUNDING = 2.0**-24  # matters where a product is added to a number that outweighs it
# Deep products hide a wrong scale from both: 16 columns times another K-block's scale are nothing to calc_diff, and
# magnitudes add up faster than products of random sign do. So scales differ by factors of up to four (two decimal
# logarithms of 0.3), and each error is held to the root of the sum of its element's squared products. Of 32 products
# the largest is about 8 of their root mean square, and the 4 * 33 truncations of a K-block at 2^-13 of it come to
# sqrt(132 / 3) * 8 * 2^-13 of that, or, over sqrt(128), to 2^-10.8 of the root. Six times as much is 2^-8.2, the worst
# of 2^28 elements. Half or twice the scale in one K-block is wrong by about sqrt(128 / k): 2^-4 at k = 32768.
LIKE_DECADES = 0.3
LIKE_WORST = 2.0**-6

# What csrc/gemm/heuristics.h compiles, and what the two blocks of a cluster share there.
SMALL_TILES = ((128, 64), (128, 128))
GRADIENT_TILES = (*SMALL_TILES, (192, 128))
TILES = (*GRADIENT_TILES, (128, 192), (256, 128))
SHARE_NONE, SHARE_A, SHARE_B = SHARES = range(3)

BLOCK = 2048  # of rows and columns compared at a time, so that no FP64 matrix is large


class Random:
    """Operands from one seed: data over the whole range of E4M3, scales over `decades` either side of one."""

    def __init__(self, seed: int, decades: float = 12.0) -> None:
        self.generator = torch.Generator("cuda").manual_seed(seed)
        self.host = torch.Generator().manual_seed(seed)
        self.decades = decades

    def pick(self, choices: list[int]) -> int:
        return choices[int(torch.randint(len(choices), (), generator=self.host))]

    def picks(self, choices: list[int], number: int) -> list[int]:
        return [self.pick(choices) for _ in range(number)]

    def data(self, *shape: int) -> Tensor:
        # Half precision holds 448 and halves what experts' weights take on their way.
        values = torch.randn(shape, generator=self.generator, dtype=torch.float16, device="cuda")
        return values.mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)

    def scales(self, *shape: int) -> Tensor:
        exponents = torch.rand(shape, generator=self.generator, device="cuda") * 2 - 1
        return 10 ** (exponents * self.decades)

    def rows(self, rows: int, columns: int) -> QuantTensor:
        scale = empty_row_scales(rows, -(-columns // 128), torch.device("cuda"))
        scale.copy_(self.scales(*scale.shape))
        return QuantTensor(self.data(rows, columns), scale, (1, 128))

    def blocks(self, *shape: int) -> QuantTensor:
        *groups, rows, columns = shape
        return QuantTensor(self.data(*shape), self.scales(*groups, -(-rows // 128), -(-columns // 128)), (128, 128))

    def sums_like(self, sizes: Tensor) -> Tensor:
        """FP32 numbers to add to: about a sixteenth of each size, so that rounding does not matter; 1 where it is 0."""
        numbers = torch.randn(sizes.shape, generator=self.generator, device="cuda")
        return numbers * torch.where(sizes > 0, sizes / 16, 1.0).float()


@dataclass(frozen=True)
class Groups:
    """Rows, or depth, in groups: the layout, each one's (start, end, padded end), all of the buffer, its last part."""

    layout: GroupLayout
    spans: list[tuple[int, int, int]]
    total: int
    spare: int = 0


def packed(counts: list[int], spare: int = 0) -> Groups:
    return Groups(*random_layout(counts, spare), spare)


def masked(counts: list[int], capacity: int) -> Groups:
    spans = [(g * capacity, g * capacity + count, (g + 1) * capacity) for g, count in enumerate(counts)]
    filled = torch.tensor(counts, dtype=torch.int32, device="cuda")
    return Groups(GroupLayout.of_capacity(filled, capacity), spans, len(counts) * capacity)


def poison_padding_rows(x: QuantTensor, groups: Groups) -> None:
    """NaN in data and scales of every row that is no group's: they may spoil padding rows of the result alone."""
    padding = torch.ones((groups.total, 1), dtype=torch.bool)
    for start, end, _ in groups.spans:
        padding[start:end] = False
    padding = padding.to(x.device)
    x.data.view(torch.uint8).masked_fill_(padding, 0x7F)
    x.scale.masked_fill_(padding, torch.nan)


def clear_padding_columns(x: QuantTensor, groups: Groups) -> None:
    """Zeros behind each group, as the op demands; NaN in data and scales of the columns behind all of them."""
    data = x.data.view(torch.uint8)
    for _, end, padded_end in groups.spans:
        data[:, end:padded_end] = 0
    used = groups.total - groups.spare
    data[:, used:] = 0x7F
    x.scale[:, used // 128 :] = torch.nan


def rows_of(q: QuantTensor, start: int, end: int) -> QuantTensor:
    tile = q.tile[0]
    return QuantTensor(q.data[start:end], q.scale[start // tile : ceil_div(end, tile)], q.tile)


def columns_of(q: QuantTensor, start: int, end: int) -> QuantTensor:
    tile = q.tile[1]
    return QuantTensor(q.data[:, start:end], q.scale[:, start // tile : ceil_div(end, tile)], q.tile)


def bytes_of(*operands: QuantTensor) -> list[Tensor]:
    """Arguments of the extension."""
    return [part for q in operands for part in (q.data.view(torch.uint8), q.scale)]


def full_of_nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device="cuda")


def group_of(w: QuantTensor, group: int) -> QuantTensor:
    return QuantTensor(w.data[group], w.scale[group], w.tile)


def double(q: QuantTensor) -> Tensor:
    """FP64 of a quantised tensor, or of a part that begins where a tile does."""
    rows, columns = q.data.shape[-2:]
    scale = q.scale.double().repeat_interleave(q.tile[1], dim=-1)[..., :columns]
    if q.tile[0] > 1:
        scale = scale.repeat_interleave(q.tile[0], dim=-2)[..., :rows, :]
    return q.data.float() * scale


def product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a @ b^T, and the same with every sign dropped."""
    return a @ b.mT, a.abs() @ b.abs().mT


def product_by_rows(x: QuantTensor, w: QuantTensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """`product` of the rows of each group, one group behind the other without padding."""
    a, b = double(x), double(w)
    parts = [product(a[start:end], b[g]) for g, (start, end, _) in enumerate(groups.spans)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def product_by_depth(x: QuantTensor, y: QuantTensor, groups: Groups) -> tuple[Tensor, Tensor]:
    a, b = double(x), double(y)
    parts = [product(a[:, start:end], b[:, start:end]) for start, end, _ in groups.spans]
    return torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])


def with_every_tile(launch: Callable[..., object], compiled: tuple[tuple[int, int], ...], shares: range) -> None:
    """Calls `launch` with each choice of tile: on all multiprocessors, and on a few, where each walks several tiles."""
    for tile in TILES:
        for share in SHARES:
            for num_sms, band in ((0, 8), (12, 3)):
                choice = partial(launch, num_sms=num_sms, tile=(*tile, share, band))
                if tile in compiled and share in shares:
                    choice()
                else:
                    with pytest.raises(RuntimeError, match="no kernel was compiled for this tile"):
                        choice()


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert not got.isnan().any()
    diff = ops.calc_diff(got, expected)
    assert diff < (BF16_DIFF if got.dtype == torch.bfloat16 else FP32_DIFF), diff


def assert_within_truncation(got: Tensor, expected: Tensor, magnitude: Tensor, decades: float | None = None) -> None:
    """Element by element; by calc_diff too where all scales are one. Where there are no products `got` is zero."""
    if got.numel() == 0:
        return
    assert not got.isnan().any()
    error = (got.double() - expected).abs()
    if got.dtype == torch.bfloat16:
        error = (error - expected.abs() * BF16_ROUNDING).clamp_min(0)
    error /= magnitude.clamp_min(1e-300)
    assert error.max() < TRUNCATION_WORST
    assert error.sum() <= TRUNCATION_MEAN * magnitude.count_nonzero()
    if decades == 0 and got.numel() > 10000:
        assert_close(got, expected)


def assert_product(got_MN: Tensor, x: QuantTensor, w: QuantTensor, before_MN: Tensor | None = None) -> None:
    """All of x @ w^T, less what was there before, over operands of LIKE_DECADES: calc_diff and the worst element."""
    is_bf16 = got_MN.dtype == torch.bfloat16
    squares, total, worst = torch.zeros(3, dtype=torch.float64, device=got_MN.device)
    for first_row in range(0, got_MN.shape[0], BLOCK):
        a = double(rows_of(x, first_row, first_row + BLOCK))
        for first_column in range(0, got_MN.shape[1], BLOCK):
            b = double(rows_of(w, first_column, first_column + BLOCK))
            part = slice(first_row, first_row + BLOCK), slice(first_column, first_column + BLOCK)
            got, expected = got_MN[part].double(), a @ b.mT
            if before_MN is not None:
                got -= before_MN[part]
            error = (got - expected).abs()
            squares += error.square().sum()
            total += got.square().sum() + expected.square().sum()
            result = expected if before_MN is None else expected + before_MN[part]
            error -= result.abs() * (BF16_ROUNDING if is_bf16 else FP32_ROUNDING)
            root = (a.square().bfloat16() @ b.square().bfloat16().mT).double().sqrt()  # a rough one will do
            worst = torch.maximum(worst, (error.clamp_min(0) / root.clamp_min(1e-30)).max())
    assert squares / total.clamp_min(1e-300) < (BF16_DIFF if is_bf16 else FP32_DIFF)
    assert worst < LIKE_WORST


def assert_row_groups(out: Tensor, x: QuantTensor, w: QuantTensor, groups: Groups) -> None:
    for g, (start, end, _) in enumerate(groups.spans):
        assert_product(out[start:end], rows_of(x, start, end), group_of(w, g))


def assert_depth_groups(
    out: Tensor, x: QuantTensor, y: QuantTensor, groups: Groups, before: Tensor | None = None
) -> None:
    """Of an empty group: zero, or what was there before."""
    for g, (start, end, _) in enumerate(groups.spans):
        added = None if before is None else before[g]
        assert_product(out[g], columns_of(x, start, end), columns_of(y, start, end), added)

"""Matrix products: FP8 with block scales, and the grouped product of a mixture of experts."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dsv3rt.ops.checks import FLOATS, check_layout, check_quant, check_same_device, check_tensor, dtype_name, require
from dsv3rt.ops.quant import BLOCK_TILE, ROW_TILE
from dsv3rt.ops.reference import gemm as reference
from dsv3rt.ops.reference.common import segments
from dsv3rt.ops.registry import register
from dsv3rt.ops.types import TILE, GroupLayout, QuantTensor


def _nothing(*_: object) -> None:
    """The fake body of an op that only writes into its arguments."""


def _fp8_on_cpu(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, w_rows: int, out: Tensor, accumulate: bool, num_sms: int
) -> None:
    operands = QuantTensor(x, x_scale, ROW_TILE), QuantTensor(w, w_scale, (w_rows, TILE))
    if accumulate:
        reference.fp8_gemm_nt(*operands, out.dtype, out)
    else:
        out.copy_(reference.fp8_gemm_nt(*operands, out.dtype, None))


def _fp8_on_cuda(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, w_rows: int, out: Tensor, accumulate: bool, num_sms: int
) -> None:
    from dsv3rt.ops.cuda import gemm as cuda

    operands = QuantTensor(x, x_scale, ROW_TILE), QuantTensor(w, w_scale, (w_rows, TILE))
    cuda.fp8_gemm_nt(*operands, out, accumulate=accumulate, num_sms=num_sms)


_fp8_gemm_nt = register(
    "fp8_gemm_nt(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, int w_rows, Tensor(a!) out, bool accumulate,"
    " int num_sms) -> ()",
    cpu=_fp8_on_cpu,
    cuda=_fp8_on_cuda,
    fake=_nothing,
)


def fp8_gemm_nt(
    x: QuantTensor,
    w: QuantTensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate_into: Tensor | None = None,
    num_sms: int = 0,
) -> Tensor:
    """y_TF = dequant(x_TD) @ dequant(w_FD)^T, accumulated in fp32.

    Args:
        x: data (T, D) e4m3, tile (1, 128).
        w: data (F, D) e4m3, tile (128, 128) or (1, 128).
        out_dtype: bf16 or fp32; not used with `accumulate_into`.
        accumulate_into: (T, F) fp32, contiguous: y is added to it in place.
        num_sms: multiprocessors the kernel may take; 0 means all. Communication may run on the rest.
    Returns:
        y_TF, (T, F), out_dtype, contiguous, or `accumulate_into`; T == 0 gives an empty tensor.
    Raises:
        ValueError: shape, stride or tile; on CUDA also D % 16 != 0 or F % 8 != 0.
        TypeError: dtype outside the above.
        BackendUnavailableError: CUDA tensor, no extension.
    Numerics: the reference multiplies dequantised FP32 tensors; the kernel promotes to FP32 every 128 along D and is
        bitwise repeatable.
    Source: DeepSeek-V3 report (arXiv 2412.19437) sec. 3.3; DeepGEMM sm90_fp8_gemm_1d2d.cuh, sm90_fp8_gemm_1d1d.cuh.
    """
    op = "fp8_gemm_nt"
    check_quant(op, "x", x, (None, None), (ROW_TILE,))
    check_quant(op, "w", w, (None, x.data.shape[1]), (BLOCK_TILE, ROW_TILE))
    check_same_device(op, x=x.data, w=w.data, accumulate_into=accumulate_into)
    _check_kernel_limits(op, "w", w, num_sms)
    shape = (x.data.shape[0], w.data.shape[0])
    if accumulate_into is None:
        _check_out_dtype(op, out_dtype)
        out = torch.empty(shape, dtype=out_dtype, device=x.data.device)
    else:
        check_tensor(op, "accumulate_into", accumulate_into, shape, (torch.float32,))
        _check_contiguous(op, "accumulate_into", accumulate_into)
        out = accumulate_into
    _fp8_gemm_nt(x.data, x.scale, w.data, w.scale, w.tile[0], out, accumulate_into is not None, num_sms)
    return out


def _m_grouped_on_cpu(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, counts: Tensor, offsets: Tensor, out: Tensor, num_sms: int
) -> None:
    operands = QuantTensor(x, x_scale, ROW_TILE), QuantTensor(w, w_scale, BLOCK_TILE), GroupLayout(counts, offsets)
    out.copy_(reference.m_grouped_fp8_gemm_nt(*operands, out.dtype))


def _m_grouped_on_cuda(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, counts: Tensor, offsets: Tensor, out: Tensor, num_sms: int
) -> None:
    from dsv3rt.ops.cuda import gemm as cuda

    operands = QuantTensor(x, x_scale, ROW_TILE), QuantTensor(w, w_scale, BLOCK_TILE), GroupLayout(counts, offsets)
    cuda.m_grouped_fp8_gemm_nt(*operands, out, num_sms=num_sms)


_m_grouped_fp8_gemm_nt = register(
    "m_grouped_fp8_gemm_nt(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor counts, Tensor offsets,"
    " Tensor(a!) out, int num_sms) -> ()",
    cpu=_m_grouped_on_cpu,
    cuda=_m_grouped_on_cuda,
    fake=_nothing,
)


def m_grouped_fp8_gemm_nt(
    x: QuantTensor,
    w: QuantTensor,
    layout: GroupLayout,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    out_PF: Tensor | None = None,
    num_sms: int = 0,
) -> Tensor:
    """y_PF: rows of group g times dequant(w[g])^T, accumulated in fp32.

    Args:
        x: data (P, D) e4m3, tile (1, 128), rows expert-major as `layout` says.
        w: data (X, F, D) e4m3, tile (128, 128).
        layout: of X groups, on the device: nothing is read back.
        out_dtype: bf16 or fp32.
        out_PF: (P, F), out_dtype, contiguous, to be written; None: a new tensor.
        num_sms: as in `fp8_gemm_nt`.
    Returns:
        y_PF, (P, F), out_dtype, contiguous. Padding rows are zero on the CPU and unspecified on CUDA.
    Raises:
        ValueError: shape, stride or tile; on CUDA also D % 16 != 0, F % 8 != 0 or more than 512 groups.
        TypeError: dtype outside the above.
        BackendUnavailableError: CUDA tensor, no extension.
    Source: DeepGEMM m_grouped_fp8_gemm_nt_contiguous.
    """
    op = "m_grouped_fp8_gemm_nt"
    check_quant(op, "x", x, (None, None), (ROW_TILE,))
    check_quant(op, "w", w, (None, None, x.data.shape[1]), (BLOCK_TILE,))
    check_layout(op, layout, w.data.shape[0])
    check_same_device(op, x=x.data, w=w.data, layout=layout.offsets)
    _check_kernel_limits(op, "w", w, num_sms)
    _check_out_dtype(op, out_dtype)
    shape = (x.data.shape[0], w.data.shape[1])
    if out_PF is None:
        out_PF = torch.empty(shape, dtype=out_dtype, device=x.data.device)
    check_tensor(op, "out_PF", out_PF, shape, (out_dtype,))
    _check_contiguous(op, "out_PF", out_PF)
    check_same_device(op, x=x.data, out_PF=out_PF)
    _m_grouped_fp8_gemm_nt(x.data, x.scale, w.data, w.scale, layout.counts_X, layout.offsets, out_PF, num_sms)
    return out_PF


def _k_grouped_on_cpu(
    x: Tensor,
    x_scale: Tensor,
    y: Tensor,
    y_scale: Tensor,
    layout: list[Tensor],
    out: Tensor,
    accumulate: bool,
    num_sms: int,
) -> None:
    operands = QuantTensor(x, x_scale, ROW_TILE), QuantTensor(y, y_scale, ROW_TILE), GroupLayout(*layout)
    reference.k_grouped_fp8_gemm_nt(*operands, out if accumulate else out.zero_())


def _k_grouped_on_cuda(
    x: Tensor,
    x_scale: Tensor,
    y: Tensor,
    y_scale: Tensor,
    layout: list[Tensor],
    out: Tensor,
    accumulate: bool,
    num_sms: int,
) -> None:
    from dsv3rt.ops.cuda import gemm as cuda

    operands = QuantTensor(x, x_scale, ROW_TILE), QuantTensor(y, y_scale, ROW_TILE), GroupLayout(*layout)
    cuda.k_grouped_fp8_gemm_nt(*operands, out, accumulate=accumulate, num_sms=num_sms)


_k_grouped_fp8_gemm_nt = register(
    "k_grouped_fp8_gemm_nt(Tensor x, Tensor x_scale, Tensor y, Tensor y_scale, Tensor[] layout,"
    " Tensor(a!) out, bool accumulate, int num_sms) -> ()",
    cpu=_k_grouped_on_cpu,
    cuda=_k_grouped_on_cuda,
    fake=_nothing,
)


def k_grouped_fp8_gemm_nt(
    x: QuantTensor, y: QuantTensor, layout: GroupLayout, *, accumulate_into: Tensor | None = None, num_sms: int = 0
) -> Tensor:
    """Weight gradients of all groups: group g adds x[:, rows of g] @ y[:, rows of g]^T to its slice, in fp32.

    Args:
        x: data (M, P) e4m3, tile (1, 128) along P, the columns grouped as `layout` says in steps of 128. Padding
            columns must hold zeros, in y too: the kernel multiplies whole tiles.
        y: data (N, P) e4m3, tile (1, 128) along P.
        layout: of X groups, on the device: nothing is read back.
        accumulate_into: (X, M, N) fp32, contiguous; the slice of an empty group stays as it is. None: a new one,
            where it is zeros.
        num_sms: as in `fp8_gemm_nt`.
    Returns:
        accumulate_into, or (X, M, N) fp32.
    Raises:
        ValueError: shape, stride or tile; on CUDA also P % 16 != 0, N % 8 != 0 or more than 512 groups.
        TypeError: dtype outside the above.
        BackendUnavailableError: CUDA tensor, no extension.
    Source: DeepGEMM k_grouped_fp8_gemm_nt_contiguous.
    """
    op = "k_grouped_fp8_gemm_nt"
    check_quant(op, "x", x, (None, None), (ROW_TILE,))
    check_quant(op, "y", y, (None, x.data.shape[1]), (ROW_TILE,))
    num_groups = layout.counts_X.numel() if accumulate_into is None else accumulate_into.shape[0]
    shape = (num_groups, x.data.shape[0], y.data.shape[0])
    if accumulate_into is not None:
        check_tensor(op, "accumulate_into", accumulate_into, (None, *shape[1:]), (torch.float32,))
        _check_contiguous(op, "accumulate_into", accumulate_into)
    check_layout(op, layout, num_groups)
    check_same_device(op, x=x.data, y=y.data, accumulate_into=accumulate_into, layout=layout.offsets)
    _check_kernel_limits(op, "y", y, num_sms)
    accumulates = accumulate_into is not None
    if accumulate_into is None:
        make = torch.empty if x.data.shape[1] > 0 else torch.zeros  # without a depth no kernel is launched
        accumulate_into = make(shape, dtype=torch.float32, device=x.device)
    operands = (x.data, x.scale, y.data, y.scale, [layout.counts_X, layout.offsets])
    _k_grouped_fp8_gemm_nt(*operands, accumulate_into, accumulates, num_sms)
    return accumulate_into


def grouped_gemm_nt(x_PD: Tensor, w_XFD: Tensor, layout: GroupLayout) -> Tensor:
    """y_PF: rows of group g times w_XFD[g]^T, in the dtype of x. Differentiable.

    Args:
        x_PD: bf16, fp32 or fp64, rows expert-major as `layout` says.
        w_XFD: of x's dtype.
        layout: of X groups.
    Returns:
        y_PF, (P, F), x's dtype, contiguous; padding rows are zero, and so are their gradients.
    Raises:
        ValueError: shape.
        TypeError: dtype outside the above.
    """
    op = "grouped_gemm_nt"
    check_tensor(op, "x_PD", x_PD, (None, None), FLOATS)
    check_tensor(op, "w_XFD", w_XFD, (None, None, x_PD.shape[1]), (x_PD.dtype,))
    check_layout(op, layout, w_XFD.shape[0])
    check_same_device(op, x_PD=x_PD, w_XFD=w_XFD, layout=layout.offsets)
    return cast(Tensor, reference.GroupedGemm.apply(x_PD, w_XFD, layout))


def grouped_weight_grad(dy_PF: Tensor, x_PD: Tensor, layout: GroupLayout) -> Tensor:
    """dw_XFD: of each group, dy[rows]^T times x[rows]: the gradient of `grouped_gemm_nt` to its weights.

    Args:
        dy_PF: bf16, fp32 or fp64, rows expert-major as `layout` says.
        x_PD: of dy's dtype.
        layout: of X groups.
    Returns:
        dw_XFD, (X, F, D), x's dtype, contiguous; zero for a group without rows. Padding rows are not read.
    Raises:
        ValueError: shape.
        TypeError: dtype outside the above.
    """
    op = "grouped_weight_grad"
    check_tensor(op, "dy_PF", dy_PF, (None, None), FLOATS)
    check_tensor(op, "x_PD", x_PD, (dy_PF.shape[0], None), (dy_PF.dtype,))
    check_layout(op, layout, layout.counts_X.shape[0])
    check_same_device(op, dy_PF=dy_PF, x_PD=x_PD, layout=layout.offsets)
    return reference.grouped_weight_grad(dy_PF, x_PD, segments(layout))


def _check_kernel_limits(op: str, argument: str, operand: QuantTensor, num_sms: int) -> None:
    """What the copy engine needs of the second operand (rows, depth): 16-byte strides of operands and of the result."""
    require(num_sms >= 0, op, "num_sms", "not be negative", num_sms)
    if operand.data.is_cuda:
        rows, depth = operand.data.shape[-2:]
        require(depth % 16 == 0, op, argument, "have a depth divisible by 16 on CUDA", depth)
        require(rows % 8 == 0, op, argument, "have a number of rows divisible by 8 on CUDA", rows)
        groups = operand.data.shape[0] if operand.data.dim() == 3 else 1
        require(groups <= 512, op, argument, "have at most 512 groups on CUDA", groups)


def _check_out_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"{op}: out_dtype must be bfloat16 or float32, got {dtype_name(dtype)}")


def _check_contiguous(op: str, argument: str, tensor: Tensor) -> None:
    require(tensor.is_contiguous(), op, argument, "be contiguous", f"stride {tensor.stride()}")

"""The optimizer's fused update, and the norms that its clipping needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dsv3rt.ops.checks import check_dtype, check_quant, check_same_device, check_tensor, require
from dsv3rt.ops.reference import optim as reference
from dsv3rt.ops.registry import register
from dsv3rt.ops.types import TILE, AdamWHyper, AdamWSlot, QuantTensor, ceil_div

_STORED = (torch.bfloat16, torch.float32)
_BLOCK = ((TILE, TILE),)


def _adamw_on_cpu(
    states: list[Tensor],
    params: list[Tensor],
    casts: list[Tensor],
    grad_scale: Tensor | None,
    numbers: list[float],
    keys: list[int],
) -> None:
    count = len(states) // 4
    for i, key in enumerate(_pairs(keys) or [None] * count):
        master, grad, m, v = states[i::count]
        param = params[i] if params else None
        reference.adamw_step((master, grad, m, v), param, casts[i::count], grad_scale, numbers, key)


def _adamw_on_cuda(
    states: list[Tensor],
    params: list[Tensor],
    casts: list[Tensor],
    grad_scale: Tensor | None,
    numbers: list[float],
    keys: list[int],
) -> None:
    from dsv3rt.ops.cuda import optim as cuda

    count = len(states) // 4
    lists = [states[i : i + count] for i in range(0, 4 * count, count)]
    if casts:
        cast_lists = [casts[i : i + count] for i in range(0, len(casts), count)]
        cuda.adamw_step_fp8(lists, cast_lists, grad_scale, numbers, _pairs(keys))
    else:
        cuda.adamw_step(lists, params, grad_scale, numbers, _pairs(keys))


def _adamw_fake(*_: object) -> None:
    return None


_adamw_step = register(
    "adamw_step(Tensor(a!)[] states, Tensor(b!)[] params, Tensor(c!)[] casts, Tensor? grad_scale, float[] numbers,"
    " int[] keys) -> ()",
    cpu=_adamw_on_cpu,
    cuda=_adamw_on_cuda,
    fake=_adamw_fake,
)


def adamw_step(slots: Sequence[AdamWSlot], *, hyper: AdamWHyper, step: int, grad_scale: Tensor | float = 1.0) -> None:
    """One AdamW update of a list of parameters, in place: decoupled weight decay, bias correction.

    Args:
        slots: the tensors of each parameter, any shapes; those with the same dtypes are one launch on CUDA, of those
            with a cast too.
        hyper: learning rate and the rest, for this step.
        step: number of this update, from 1.
        grad_scale: multiplies the gradients first; a number, or fp32 of one element on the slots' device.
    Raises:
        ValueError: shape or step; param and cast both; on CUDA also a tensor that is not contiguous (gradients may be
            anything).
        TypeError: dtype outside those of AdamWSlot.
        BackendUnavailableError: CUDA tensors, no extension.
    Numerics: fp32, every operation rounded by itself; this step uses the moments before they are rounded to their own
        dtype. Casts are those of `quantize_128x128`. Kernel and reference agree bitwise.
    Source: arXiv 1711.05101; DeepSeek-V3 report (arXiv 2412.19437) sec. 3.3.3 for BF16 moments.
    """
    op = "adamw_step"
    require(step >= 1, op, "step", "be at least 1", step)
    for slot in slots:
        _check_slot(op, slot)
        check_same_device(op, first=slots[0].master, **_tensors(slot))
    if not slots:
        return
    scale = _scale_of(op, grad_scale, slots[0].master)
    numbers = reference.numbers_of(hyper, step)
    for alike in _by_dtypes(slots):
        states = [[slot.master, slot.grad, slot.m, slot.v] for slot in alike]
        params = [slot.param.detach() for slot in alike if slot.param is not None]
        casts = [part for kind in zip(*map(_cast_tensors, alike), strict=True) for part in kind]
        keys = [word for slot in alike if slot.seed is not None for word in reference.rounding_key(slot.seed, step)]
        flat = [tensor.detach() for kind in zip(*states, strict=True) for tensor in kind]
        _adamw_step(flat, params, casts, scale, numbers, keys)


def _grad_norms_on_cuda(grads: list[Tensor]) -> Tensor:
    from dsv3rt.ops.cuda import optim as cuda

    return cuda.grad_norms(grads)


def _grad_norms_fake(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty(len(grads), dtype=torch.float64)


_grad_norms = register(
    "grad_norms(Tensor[] grads) -> Tensor", cpu=reference.grad_norms, cuda=_grad_norms_on_cuda, fake=_grad_norms_fake
)


def grad_norms(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each tensor. The norm of all is `torch.linalg.vector_norm` of the result, also over several ranks.

    Args:
        grads: at least one, all bf16 or all fp32, any shapes.
    Returns:
        (len(grads),) fp64 on their device, which is not waited for.
    Raises:
        ValueError: an empty list, or tensors on several devices.
        TypeError: dtype outside the above.
        BackendUnavailableError: CUDA tensors, no extension.
    Numerics: squares are exact in fp64 and added up in it, so that no square overflows, and a tensor's norm and one put
        together from its pieces' are the same fp32 number (bar a tie within the fp64 error, 1 in 2^24 or so). The
        kernel adds in one order: repeatable.
    """
    op = "grad_norms"
    require(len(grads) > 0, op, "grads", "not be empty", "no tensor")
    check_dtype(op, "grads", grads[0], _STORED)
    for grad in grads:
        check_dtype(op, "grads", grad, (grads[0].dtype,))
        check_same_device(op, first=grads[0], grads=grad)
    return _grad_norms([grad.detach() for grad in grads])


def _check_slot(op: str, slot: AdamWSlot) -> None:
    shape = tuple(slot.master.shape)
    check_tensor(op, "master", slot.master, shape, (torch.float32,))
    check_tensor(op, "grad", slot.grad, shape, _STORED)
    check_tensor(op, "m", slot.m, shape, _STORED)
    check_tensor(op, "v", slot.v, shape, (slot.m.dtype,))
    if slot.param is not None:
        check_tensor(op, "param", slot.param, shape, _STORED)
        require(slot.cast is None, op, "cast", "be None where param is given", "both")
    if slot.cast is not None:
        require(len(shape) in (2, 3), op, "master", "have 2 or 3 dimensions with a cast", shape)
        check_quant(op, "cast[0]", slot.cast[0], shape, _BLOCK)
        if slot.cast[1] is not None:
            _check_transposed(op, slot.cast[1], shape)
    for name, tensor in _tensors(slot).items():
        if tensor is not None and tensor.is_cuda and name != "grad" and not name.startswith("cast"):
            require(tensor.is_contiguous(), op, name, "be contiguous on CUDA", f"stride {tensor.stride()}")


def _check_transposed(op: str, q: QuantTensor, shape: tuple[int, ...]) -> None:
    *leading, rows, columns = shape
    check_tensor(op, "cast[1].data", q.data, (*leading, columns, rows), (torch.float8_e4m3fn,))
    scales = (*leading, ceil_div(columns, TILE), ceil_div(rows, TILE))
    check_tensor(op, "cast[1].scale", q.scale, scales, (torch.float32,))
    require(q.tile in _BLOCK, op, "cast[1].tile", f"be {_BLOCK[0]}", q.tile)
    for name, part in (("data", q.data), ("scale", q.scale)):
        # Where matrices follow each other, no columns lie between; the stride of a dimension of size 1 is no matter.
        good = part.is_contiguous() or (len(shape) == 2 and (part.stride(1) == 1 or part.shape[1] == 1))
        require(good, op, f"cast[1].{name}", "have contiguous rows, or matrices", f"stride {part.stride()}")


def _tensors(slot: AdamWSlot) -> dict[str, Tensor | None]:
    casts = {f"cast[{i}]": part for i, part in enumerate(_cast_tensors(slot))}
    return {"master": slot.master, "grad": slot.grad, "m": slot.m, "v": slot.v, "param": slot.param, **casts}


def _cast_tensors(slot: AdamWSlot) -> list[Tensor]:
    return [part for q in slot.cast or () if q is not None for part in (q.data, q.scale)]


def _by_dtypes(slots: Sequence[AdamWSlot]) -> Iterable[list[AdamWSlot]]:
    groups: dict[object, list[AdamWSlot]] = {}
    for slot in slots:
        param = None if slot.param is None else slot.param.dtype
        kind = (slot.grad.dtype, slot.m.dtype, param, slot.seed is None, len(_cast_tensors(slot)))
        groups.setdefault(kind, []).append(slot)
    return groups.values()


def _scale_of(op: str, grad_scale: Tensor | float, like: Tensor) -> Tensor | None:
    if isinstance(grad_scale, Tensor):
        check_dtype(op, "grad_scale", grad_scale, (torch.float32,))
        require(grad_scale.numel() == 1, op, "grad_scale", "have one element", tuple(grad_scale.shape))
        check_same_device(op, master=like, grad_scale=grad_scale)
        return grad_scale.detach().reshape(())
    return None if grad_scale == 1.0 else like.new_full((), grad_scale)


def _pairs(keys: list[int]) -> list[tuple[int, int]]:
    return list(zip(keys[::2], keys[1::2], strict=True))

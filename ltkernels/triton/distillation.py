"""Distillation of logits in Triton: one launch forward, one backward.

How the kernels work stands in distillation_kernels.py; they are launched as those of cross_entropy are, with the
teacher's logits as a second tensor over all classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltkernels.ops import gpu
from ltkernels.ops.distillation import new_state
from ltkernels.ops.options import DistillationOptions, Reduction
from ltkernels.triton import Variant, tiles
from ltkernels.triton.distillation_kernels import backward_kernel, forward_kernel
from ltkernels.triton.launches import (
    POINTERS,
    launch,
    memory,
    multiprocessors,
    plan_backward,
    plan_forward,
    variant,
)

_Optional = Tensor | None
_LOGITS = tiles.LOGITS // 2
"""Of a tile: half of what others have, since two logits are kept of every place."""


def _at_unit_stride(values: _Optional) -> _Optional:
    return None if values is None else values.contiguous()


def forward(
    input: Tensor,
    teacher: Tensor,
    target: _Optional,
    student_bias: _Optional,
    teacher_bias: _Optional,
    class_bias: _Optional,
    sample_weight: _Optional,
    ignore_index: int,
    reduction: int,
    student_scale: float,
    teacher_scale: float,
    kd_weight: float,
    ce_weight: float,
    with_gradient: bool = False,
) -> tuple[Tensor, Tensor, None]:
    """The loss and the state for :func:`backward`; arguments as in ``ltkernels.ops.distillation``."""
    device, shape = input.device, input.shape
    state = new_state((input,), DistillationOptions())
    loss = state.new_empty((shape[0], *shape[2:]) if reduction == Reduction.NONE else ())
    heavy = any(tensor is not None for tensor in (target, student_bias, teacher_bias))  # more is kept of every logit
    plan = plan_forward(shape, memory(input), memory(teacher), heavy, multiprocessors(device), _LOGITS)
    launch(
        forward_kernel, plan, device, input, teacher, _at_unit_stride(target), student_bias, teacher_bias, class_bias,
        sample_weight, loss, state, torch.empty(2 * plan.partials, dtype=torch.float64, device=device),
        gpu.tickets(device), gpu.error_word(device), *plan.numbers, ignore_index, reduction, student_scale,
        teacher_scale, kd_weight, ce_weight,
    )  # fmt: skip
    return loss, state, None


def backward(
    grad: Tensor,
    state: Tensor,
    input: Tensor,
    teacher: Tensor,
    target: _Optional,
    student_bias: _Optional,
    teacher_bias: _Optional,
    class_bias: _Optional,
    sample_weight: _Optional,
    ignore_index: int,
    reduction: int,
    student_scale: float,
    teacher_scale: float,
    kd_weight: float,
    ce_weight: float,
    need_input: bool,
    inplace: bool = False,
) -> tuple[Tensor]:
    """The gradient of the student's logits, empty where it is not needed."""
    if not need_input:
        return (state.new_empty(0),)
    device = input.device
    d_input = input if inplace else torch.empty_like(input)
    plan = plan_backward(
        input.shape, memory(input), memory(teacher), memory(d_input), grad.stride(), 0, False, multiprocessors(device),
        _LOGITS,
    )  # fmt: skip
    launch(
        backward_kernel, plan, device, grad, state, input, teacher, _at_unit_stride(target), student_bias, teacher_bias,
        class_bias, sample_weight, d_input, gpu.error_word(device), *plan.numbers, ignore_index, student_scale,
        teacher_scale, kd_weight, ce_weight,
    )  # fmt: skip
    return (d_input,)


# --- For the machine-code check ---


def _variant(way: str, dtype: torch.dtype, classes: int, given: tuple[str, ...] = (), inner: int = 1) -> Variant:
    """What a call with contiguous ``(8192, classes, inner)`` logits of both sides launches on an H100."""
    shape = (8192, classes, inner) if inner > 1 else (8192, classes)
    logits = ((classes * inner, inner, 1)[: len(shape)], dtype.itemsize, 0)
    computed = "*fp64" if dtype == torch.float64 else "*fp32"
    types = {"input": POINTERS[dtype], "teacher": POINTERS[dtype], "state": computed, "error": "*i32"}
    types |= {table: "*i64" if table == "target" else computed for table in given}
    kernel: Any
    if way.startswith("forward"):
        kernel, plan = forward_kernel, plan_forward(shape, logits, logits, bool(given), 132, _LOGITS)
        types |= {"loss": computed, "partials": "*fp64", "tickets": "*i32"}
    else:
        kernel, plan = backward_kernel, plan_backward(shape, logits, logits, logits, (), 0, False, 132, _LOGITS)
        types |= {"grad": computed, "d_input": POINTERS[dtype]}
    return variant(f"{way}<{str(dtype)[6:]}, {classes}>", kernel, plan, (), types, dtype, dtype.itemsize)


def variants() -> list[Variant]:
    """Instantiations that stand for all: odd and even, short and long rows, with labels and biases."""
    bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
    everything = ("target", "student_bias", "teacher_bias", "class_bias", "sample_weight")
    found = []
    for way in ("forward", "backward"):
        found += [_variant(way, dtype, classes) for dtype in (bf16, f32) for classes in (1000, 8142, 50304)]
        found += [_variant(f"{way}_labels", dtype, 1000, ("target",)) for dtype in (bf16, f32)]
        found += [_variant(f"{way}_all", dtype, 8142, everything) for dtype in (bf16, f32)]
        found += [_variant(way, f64, 1000, ("target",)), _variant(f"{way}_inner", bf16, 19, ("target",), inner=4096)]
    return found

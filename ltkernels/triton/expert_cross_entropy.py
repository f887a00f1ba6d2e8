"""The losses of several experts in Triton: one launch forward, one backward.

How the kernels work stands in expert_cross_entropy_kernels.py; they are launched as those of cross_entropy are, with
the rows of one expert for the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltkernels.ops import gpu
from ltkernels.ops.expert_cross_entropy import new_state
from ltkernels.ops.options import ExpertCrossEntropyOptions, Reduction
from ltkernels.triton import Variant, tiles
from ltkernels.triton.expert_cross_entropy_kernels import backward_kernel, forward_kernel
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


def _logits(size: int) -> int:
    """Of a tile: a quarter of what others have, since of every place four numbers and those of its class are kept."""
    return tiles.LOGITS // (8 if size == 8 else 4)


def memory_of_experts(tensor: Tensor) -> tuple[Any, ...]:
    """Of one expert's rows; the address is aligned as far as those of all experts are."""
    strides, size, address = memory(tensor)
    return strides[1:], size, address | strides[0] * size % 16


def forward(
    input: Tensor,
    target: Tensor,
    weight: _Optional,
    class_scale: _Optional,
    class_bias: _Optional,
    class_margin: _Optional,
    temperature: _Optional,
    sample_weight: _Optional,
    teacher: _Optional,
    ignore_index: int,
    reduction: int,
    scale: float,
    diversity: float,
    distillation: float,
    distillation_scale: float,
    aggregate: bool,
    empty_zero: bool,
    with_gradient: bool = False,
) -> tuple[Tensor, Tensor, None]:
    """The loss and the state for :func:`backward`; arguments as in ``ltkernels.ops.expert_cross_entropy``."""
    device, (experts, rows, classes) = input.device, input.shape
    whole = new_state((input,), ExpertCrossEntropyOptions(aggregate=aggregate))
    state = whole[rows * classes :] if aggregate else whole
    needs_mean = diversity != 0.0 or teacher is not None
    mean = whole if aggregate else whole.new_empty(rows * classes) if needs_mean else None
    loss = state.new_empty((rows,) if reduction == Reduction.NONE else ())
    second = memory(target.contiguous() if teacher is None else teacher)
    plan = plan_forward(
        (rows, classes), memory_of_experts(input), second, False, multiprocessors(device), _logits(input.element_size())
    )
    partials = torch.empty((2 * experts + 2) * plan.programs, dtype=torch.float64, device=device)
    launch(
        forward_kernel, plan, device, input, target.contiguous(), weight, class_scale, class_bias, class_margin,
        temperature, sample_weight, teacher, loss, mean, state, partials, gpu.tickets(device), gpu.error_word(device),
        experts, input.stride(0), *plan.numbers, ignore_index, reduction, empty_zero, scale, diversity, distillation,
        distillation_scale, diversity != 0.0,
    )  # fmt: skip
    return loss, whole, None


def backward(
    grad: Tensor,
    state: Tensor,
    input: Tensor,
    target: Tensor,
    weight: _Optional,
    class_scale: _Optional,
    class_bias: _Optional,
    class_margin: _Optional,
    temperature: _Optional,
    sample_weight: _Optional,
    teacher: _Optional,
    ignore_index: int,
    reduction: int,
    scale: float,
    diversity: float,
    distillation: float,
    distillation_scale: float,
    aggregate: bool,
    empty_zero: bool,
    need_input: bool,
    inplace: bool = False,
) -> tuple[Tensor]:
    """The gradient of the logits, empty where it is not needed."""
    if not need_input:
        return (state.new_empty(0),)
    device, (experts, rows, classes) = input.device, input.shape
    d_input = input if inplace else torch.empty_like(input)
    second = memory(target.contiguous() if teacher is None else teacher)
    plan = plan_backward(
        (rows, classes), memory_of_experts(input), second, memory_of_experts(d_input), grad.stride(), 0, False,
        multiprocessors(device), _logits(input.element_size()),
    )  # fmt: skip
    launch(
        backward_kernel, plan, device, grad, state[rows * classes :] if aggregate else state, input,
        target.contiguous(), weight, class_scale, class_bias, temperature, sample_weight, teacher, d_input,
        gpu.error_word(device), experts, input.stride(0), d_input.stride(0), *plan.numbers, ignore_index, scale,
        diversity, distillation, distillation_scale, diversity != 0.0,
    )  # fmt: skip
    return (d_input,)


# --- For the machine-code check ---


def _variant(way: str, dtype: torch.dtype, classes: int, given: tuple[str, ...] = (), diverse: bool = True) -> Variant:
    """What a call with contiguous logits of three experts, 2730 samples and int64 labels launches on an H100."""
    shape = (2730, classes)
    logits, labels = ((classes, 1), dtype.itemsize, 0), ((1,), 8, 0)
    second = logits if "teacher" in given else labels
    computed = "*fp64" if dtype == torch.float64 else "*fp32"
    types = {"input": POINTERS[dtype], "target": "*i64", "state": computed, "error": "*i32"}
    types |= {table: POINTERS[dtype] if table == "teacher" else computed for table in given}
    kernel: Any
    flags: tuple[Any, ...]
    if way.startswith("forward"):
        kernel, flags, plan = (
            forward_kernel,
            (diverse,),
            plan_forward(shape, logits, second, False, 132, _logits(dtype.itemsize)),
        )
        types |= {"loss": computed, "partials": "*fp64", "tickets": "*i32"}
        types |= {"mean": computed} if diverse or "teacher" in given else {}
    else:
        kernel, flags = backward_kernel, (diverse,)
        plan = plan_backward(shape, logits, second, logits, (), 0, False, 132, _logits(dtype.itemsize))
        types |= {"grad": computed, "d_input": POINTERS[dtype]}
        types.pop("class_margin", None)
    return variant(f"{way}<{str(dtype)[6:]}, {classes}>", kernel, plan, flags, types, dtype)


def variants() -> list[Variant]:
    """Instantiations that stand for all: RIDE early and late, SADE, a teacher alone, everything; short, long rows."""
    bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
    late = ("class_margin", "weight", "temperature")
    everything = (*late, "class_scale", "class_bias", "sample_weight", "teacher")
    found = []
    for way in ("forward", "backward"):
        found += [
            _variant(f"{way}_ride", dtype, classes, ("class_margin",))
            for dtype in (bf16, f32)
            for classes in (1000, 8142)
        ]
        found += [_variant(f"{way}_late", dtype, 1000, late) for dtype in (bf16, f32)]
        found += [_variant(f"{way}_sade", dtype, 1000, ("class_bias",), diverse=False) for dtype in (bf16, f32)]
        found += [_variant(f"{way}_distilled", dtype, 1000, ("teacher",), diverse=False) for dtype in (bf16, f32)]
        found += [_variant(f"{way}_all", bf16, 1000, everything), _variant(f"{way}_ride", f64, 1000, ("class_margin",))]
    return found

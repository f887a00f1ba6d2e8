"""Sigmoid cross-entropy in Triton: one launch forward, two where sums of columns are wanted, and one backward.

How the kernels work stands in binary_cross_entropy_kernels.py; they are launched as those of cross_entropy.py are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltkernels.ops import gpu
from ltkernels.ops.binary_cross_entropy import new_state
from ltkernels.ops.options import BinaryCrossEntropyOptions, Reduction
from ltkernels.triton import Variant, tiles
from ltkernels.triton.binary_cross_entropy_kernels import backward_kernel, columns_kernel, rows_kernel
from ltkernels.triton.launches import (
    POINTERS,
    launch,
    memory,
    multiprocessors,
    plan_backward,
    plan_forward,
    variant,
)

_TENSORS, _SCALARS = 9, len(BinaryCrossEntropyOptions._fields)
_HEAVY = True  # of every logit two terms are kept: a tile of half the size fills the registers


def _logits(bytes_a_logit: int, compiled: tuple[bool, ...]) -> int:
    """Of a tile: powers and logarithms take registers too, in float64 so many that one logit a thread is left.

    ``compiled`` is what :func:`_compiled_for` says.
    """
    powers = compiled[1] or compiled[2]
    return tiles.LOGITS // ((8 if bytes_a_logit == 8 else 2) if powers else 1)


def _numbers(options: BinaryCrossEntropyOptions) -> tuple[Any, ...]:
    """What all kernels take behind sizes and strides."""
    return (
        options.ignore_index, options.background_index, options.alpha_pos, options.alpha_neg, options.gamma_pos,
        options.gamma_neg, options.clip, options.score_logit, options.seed,
    )  # fmt: skip


def _compiled_for(target: Tensor, options: BinaryCrossEntropyOptions) -> tuple[bool, ...]:
    """HOT, FOCAL_POS, FOCAL_NEG, CLIP, SCORED and ROW_DRAWS."""
    return (
        target.is_floating_point(), options.gamma_pos > 0, options.gamma_neg > 0, options.clip > 0, options.scored,
        options.row_draws,
    )  # fmt: skip


def forward(*arguments: Any) -> tuple[Tensor, Tensor, None]:
    """The loss and the state for :func:`backward`; arguments as in ``ltkernels.ops.binary_cross_entropy``.

    They are its tensors, its options, and whether to compute the gradient too, which is not done here.
    """
    input, target = arguments[:2]
    tensors = arguments[:_TENSORS]
    options = BinaryCrossEntropyOptions(*arguments[_TENSORS : _TENSORS + _SCALARS])
    device, shape = input.device, input.shape
    state = new_state(tensors, options)
    at, counted = (memory(input), memory(target)), multiprocessors(device)
    numbers, constants = _numbers(options), _compiled_for(target, options)
    if options.column_sums:
        plan = plan_backward(shape, *at, None, (), 2, _HEAVY, counted, _logits(input.element_size(), constants))
        launch(
            columns_kernel, plan, device, *tensors, state, state.new_empty(plan.partials),
            gpu.tickets(device, plan.tickets), *plan.numbers[:9], *numbers, *constants,
        )  # fmt: skip
    plan = plan_forward(shape, *at, _HEAVY, counted, _logits(input.element_size(), constants))
    loss = state.new_empty((shape[0], *shape[2:]) if options.reduction == Reduction.NONE else ())
    launch(
        rows_kernel, plan, device, *tensors, loss, state[-1:],
        torch.empty(plan.partials, dtype=torch.float64, device=device), gpu.tickets(device), gpu.error_word(device),
        *plan.numbers, *numbers, options.reduction, options.empty_zero, *constants,
    )  # fmt: skip
    return loss, state, None


def backward(grad: Tensor, state: Tensor, *arguments: Any) -> tuple[Tensor]:
    """The gradient of the logits, empty where it is not needed.

    The arguments are those of :func:`forward`, then whether it is needed, and whether it is to be written over them.
    """
    input, target = arguments[:2]
    tensors = arguments[:_TENSORS]
    options = BinaryCrossEntropyOptions(*arguments[_TENSORS : _TENSORS + _SCALARS])
    need, inplace = (*arguments[_TENSORS + _SCALARS :], False)[:2]
    if not need:
        return (state.new_empty(0),)
    device = input.device
    d_input = input if inplace else torch.empty_like(input)
    constants = _compiled_for(target, options)
    plan = plan_backward(
        input.shape, memory(input), memory(target), memory(d_input), grad.stride(), 0, _HEAVY, multiprocessors(device),
        _logits(input.element_size(), constants),
    )  # fmt: skip
    launch(
        backward_kernel, plan, device, grad, state[-1:], *tensors, d_input, gpu.error_word(device), *plan.numbers,
        *_numbers(options), *constants,
    )  # fmt: skip
    return (d_input,)


# --- For the machine-code check ---


def _variant(
    way: str,
    method: str,
    dtype: torch.dtype,
    classes: int,
    given: tuple[str, ...] = (),
    flags: tuple[bool, ...] = (False,) * 6,
    inner: int = 1,
) -> Variant:
    """What a call with contiguous ``(8192, classes, inner)`` logits launches on an H100; ``flags``: see above."""
    shape = (8192, classes, inner) if inner > 1 else (8192, classes)
    strides = (classes * inner, inner, 1)[: len(shape)]
    input = (strides, dtype.itemsize, 0)
    hot = flags[0]
    target = (strides, dtype.itemsize, 0) if hot else (((inner, 1) if inner > 1 else (1,)), 8, 0)
    computed = "*fp64" if dtype == torch.float64 else "*fp32"
    types = {"input": POINTERS[dtype], "target": POINTERS[dtype] if hot else "*i64", "state": computed}
    types |= {"inverse": computed, "loss": computed, "grad": computed, "tickets": "*i32", "error": "*i32"}
    types |= dict.fromkeys(given, computed)
    kernel: Any
    if way == "rows":
        kernel, plan = rows_kernel, plan_forward(shape, input, target, _HEAVY, 132, _logits(dtype.itemsize, flags))
        types["partials"] = "*fp64"
    elif way == "columns":
        kernel, plan = (
            columns_kernel,
            plan_backward(shape, input, target, None, (), 2, _HEAVY, 132, _logits(dtype.itemsize, flags)),
        )
        types["partials"] = computed
    else:
        kernel, plan = (
            backward_kernel,
            plan_backward(shape, input, target, input, (), 0, _HEAVY, 132, _logits(dtype.itemsize, flags)),
        )
        types["d_input"] = POINTERS[dtype]
    types = {key: kind for key, kind in types.items() if key in kernel.arg_names}
    name = f"{way}_{method}<{str(dtype)[6:]}, {classes}>"
    return variant(name, kernel, plan, flags, types, dtype, dtype.itemsize * hot)


def variants() -> list[Variant]:
    """Instantiations that stand for all: the methods' forms, of short and long rows."""
    bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
    focal = (False, True, True, False, False, False)
    asymmetric = (True, False, True, True, False, False)
    found = []
    for way in ("rows", "backward"):
        for classes in (1000, 8142):
            found += [_variant(way, "focal", dtype, classes, flags=focal) for dtype in (bf16, f32)]
        found.append(_variant(way, "asymmetric", bf16, 1000, flags=asymmetric))
        found.append(_variant(way, "drop", bf16, 1000, ("foreground_keep", "background_keep")))
        found += [_variant(way, "focal", f64, 1000, flags=focal), _variant(way, "plain", bf16, 19, inner=4096)]
    weights = ("pos_weight", "neg_weight")
    found += [_variant("columns", "weights", dtype, 1000, weights) for dtype in (bf16, f32)]
    return found

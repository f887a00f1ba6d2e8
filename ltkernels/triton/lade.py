"""Prior cross-entropy with LADE's regulariser in Triton: two launches forward, one backward.

How the kernels work stands in lade_kernels.py; they are launched as those of cross_entropy are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltkernels.ops import gpu
from ltkernels.ops.lade import new_state
from ltkernels.ops.options import LadeOptions
from ltkernels.triton import Variant, tiles
from ltkernels.triton.lade_kernels import backward_kernel, columns_kernel, rows_kernel
from ltkernels.triton.launches import (
    POINTERS,
    Plan,
    launch,
    memory,
    multiprocessors,
    plan_backward,
    plan_forward,
    variant,
)

_Optional = Tensor | None
_SUMS = 4  # a column: maximum, sum, the labels' logits and their number


def _logits() -> int:
    """Of a tile: half of what others have, since four numbers are kept of every place, or of every class."""
    return tiles.LOGITS // 2


def _without_output(plan: Plan) -> tuple[int, ...]:
    """Classes, groups, inner, and the strides of logits and labels."""
    return plan.numbers[:9]


def forward(
    input: Tensor,
    target: Tensor,
    prior: Tensor,
    class_bias: _Optional,
    class_offset: _Optional,
    row_offset: _Optional,
    ignore_index: int,
    reduction: int,
    remine_lambda: float,
    weight: float,
    with_ce: bool,
    with_gradient: bool = False,
) -> tuple[Tensor, Tensor, None]:
    """The loss and the state for :func:`backward`; arguments as in ``ltkernels.ops.lade``."""
    device, shape = input.device, input.shape
    options = LadeOptions(ignore_index, reduction, remine_lambda, weight, with_ce)
    state = new_state((input,), options)
    loss = state.new_empty(())
    at, counted = (memory(input), memory(target)), multiprocessors(device)
    sums, chunks = state, 0
    if weight > 0:
        plan = plan_backward(shape, *at, None, (), _SUMS, False, counted, _logits())
        chunks = plan.tickets
        partials = state.new_empty(plan.partials)
        sums = torch.empty(chunks + plan.programs, dtype=torch.float64, device=device)
        launch(
            columns_kernel, plan, device, input, target, prior, class_offset, row_offset, state, partials, sums,
            gpu.tickets(device, chunks), *_without_output(plan), ignore_index, remine_lambda, weight,
        )  # fmt: skip
    else:
        state.zero_()
    plan = plan_forward(shape, *at, True, counted, _logits())
    launch(
        rows_kernel, plan, device, input, target, class_bias, loss, state,
        torch.empty(plan.partials, dtype=torch.float64, device=device), sums, gpu.tickets(device),
        gpu.error_word(device), *plan.numbers, ignore_index, chunks, weight, with_ce,
    )  # fmt: skip
    return loss, state, None


def backward(
    grad: Tensor,
    state: Tensor,
    input: Tensor,
    target: Tensor,
    prior: Tensor,
    class_bias: _Optional,
    class_offset: _Optional,
    row_offset: _Optional,
    ignore_index: int,
    reduction: int,
    remine_lambda: float,
    weight: float,
    with_ce: bool,
    need_input: bool,
    inplace: bool = False,
) -> tuple[Tensor]:
    """The gradient of the logits, empty where it is not needed."""
    if not need_input:
        return (state.new_empty(0),)
    device = input.device
    d_input = input if inplace else torch.empty_like(input)
    plan = plan_backward(
        input.shape, memory(input), memory(target), memory(d_input), (), 0, False, multiprocessors(device), _logits()
    )  # fmt: skip
    launch(
        backward_kernel, plan, device, grad, state, input, target, class_bias, row_offset, d_input,
        gpu.error_word(device), *plan.numbers, ignore_index, with_ce, weight > 0,
    )  # fmt: skip
    return (d_input,)


# --- For the machine-code check ---


def _variant(way: str, dtype: torch.dtype, classes: int, given: tuple[str, ...] = (), inner: int = 1) -> Variant:
    """What a call with contiguous ``(8192, classes, inner)`` logits, and int64 labels, launches on an H100."""
    shape = (8192, classes, inner) if inner > 1 else (8192, classes)
    input = ((classes * inner, inner, 1)[: len(shape)], dtype.itemsize, 0)
    target = (((inner, 1) if inner > 1 else (1,)), 8, 0)
    computed = "*fp64" if dtype == torch.float64 else "*fp32"
    types = {"input": POINTERS[dtype], "target": "*i64", "state": computed, "prior": computed, "loss": computed}
    types |= {"tickets": "*i32", "error": "*i32", "sums": "*fp64", "grad": computed} | dict.fromkeys(given, computed)
    kernel: Any
    flags: tuple[bool, ...]
    if way == "rows":
        kernel, flags, plan = rows_kernel, (True,), plan_forward(shape, input, target, True, 132, _logits())
        types["partials"] = "*fp64"
    elif way == "columns":
        kernel, flags = columns_kernel, ()
        plan = plan_backward(shape, input, target, None, (), _SUMS, False, 132, _logits())
        types["partials"] = computed
    else:
        kernel, flags = backward_kernel, (True, True)
        plan = plan_backward(shape, input, target, input, (), 0, False, 132, _logits())
        types["d_input"] = POINTERS[dtype]
    types = {key: kind for key, kind in types.items() if key in kernel.arg_names}
    return variant(f"{way}<{str(dtype)[6:]}, {classes}>", kernel, plan, flags, types, dtype)


def variants() -> list[Variant]:
    """Instantiations that stand for all: odd and even, short and long rows, groups of neighbouring rows."""
    bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
    found = []
    for way in ("columns", "rows", "backward"):
        given = ("class_bias", "class_offset")
        found += [_variant(way, dtype, classes, given) for dtype in (bf16, f32) for classes in (1000, 8142, 50304)]
        found += [_variant(way, f64, 1000, given), _variant(way, bf16, 19, ("row_offset",), inner=4096)]
    return found

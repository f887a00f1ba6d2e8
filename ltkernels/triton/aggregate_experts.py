"""The mean of several experts in Triton: one launch forward and one backward, two for weights by class.

How the kernels work stands in aggregate_experts_kernels.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltkernels.ops import gpu
from ltkernels.ops.aggregate_experts import new_state
from ltkernels.ops.options import AggregateExpertsOptions, AggregateMode, ExpertWeights
from ltkernels.triton import Variant, tiles
from ltkernels.triton.aggregate_experts_kernels import backward_kernel, class_kernel, forward_kernel
from ltkernels.triton.expert_cross_entropy import memory_of_experts
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


def _logits(size: int) -> int:
    """Of a tile: half of what others have, since of every place the logits of two experts are under way."""
    return tiles.LOGITS // (4 if size == 8 else 2)


def forward(
    input: Tensor, expert_weight: _Optional, mode: int, weights: int, topk: int, with_gradient: bool = False
) -> tuple[Tensor, Tensor, None]:
    """The mean and the state for :func:`backward`; arguments as in ``ltkernels.ops.aggregate_experts``."""
    device, (experts, rows, classes) = input.device, input.shape
    state = new_state((input,), AggregateExpertsOptions(mode, weights, topk))
    output = input.new_empty((rows, classes))
    mean = None if topk == 0 else output if output.dtype == state.dtype else state.new_empty((rows, classes))
    plan = plan_forward(
        (rows, classes), memory_of_experts(input), memory(output), False, multiprocessors(device),
        _logits(input.element_size()),
    )  # fmt: skip
    launch(
        forward_kernel, plan, device, input, expert_weight, output, mean, state, experts, topk, input.stride(0),
        *plan.numbers, mode, weights, topk > 0,
    )  # fmt: skip
    return output, state, None


def backward(
    grad: Tensor,
    state: Tensor,
    input: Tensor,
    expert_weight: _Optional,
    mode: int,
    weights: int,
    topk: int,
    need_input: bool,
    need_expert_weight: bool,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradients of logits and weights that are needed, the others empty."""
    device, (experts, rows, classes) = input.device, input.shape
    nothing = state.new_empty(0)
    by_class = weights == ExpertWeights.CLASS
    total = shares = sums = None
    if expert_weight is not None:
        total = expert_weight.sum(dim=0 if by_class else -1, keepdim=True)
        shares = expert_weight / total
        if need_expert_weight:  # of classes before the gradient may replace the logits
            sums = _class_sums(grad, state, input, shares, mode) if by_class else state.new_empty((rows, experts))
    of_rows = None if by_class else sums
    d_input = (input if inplace else torch.empty_like(input)) if need_input else None
    if d_input is not None or of_rows is not None:
        out = input if d_input is None else d_input
        plan = plan_forward(
            (rows, classes), memory_of_experts(input), memory(grad), False, multiprocessors(device),
            _logits(input.element_size()), memory_of_experts(out),
        )  # fmt: skip
        launch(
            backward_kernel, plan, device, grad, state, state[-1:], input, shares, d_input, of_rows,
            gpu.error_word(device), experts, input.stride(0), out.stride(0), *plan.numbers, mode, weights,
        )  # fmt: skip
    d_weight = nothing
    if sums is not None and shares is not None and total is not None:
        d_weight = (sums - (sums * shares).sum(dim=0 if by_class else 1, keepdim=True)) / total
        d_weight = d_weight.sum(dim=0) if weights == ExpertWeights.EXPERT else d_weight
    return nothing if d_input is None else d_input, d_weight


def _class_sums(grad: Tensor, state: Tensor, input: Tensor, shares: Tensor, mode: int) -> Tensor:
    """G of experts and classes."""
    device, (experts, rows, classes) = input.device, input.shape
    sums = torch.empty_like(shares)
    plan = plan_backward(
        (rows, classes), memory_of_experts(input), memory(grad), None, (), experts, False,
        tiles.cdiv(multiprocessors(device), experts), _logits(input.element_size()),
    )  # fmt: skip
    plan = plan._replace(programs=experts * plan.programs)
    launch(
        class_kernel, plan, device, grad, state, state[-1:], input, shares, sums, state.new_empty(plan.partials),
        gpu.tickets(device, experts * plan.tickets), gpu.error_word(device), experts, input.stride(0),
        *plan.numbers[:9], mode,
    )  # fmt: skip
    return sums


# --- For the machine-code check ---


def _variant(way: str, dtype: torch.dtype, classes: int, mode: int, weights: int = 0, best: bool = False) -> Variant:
    """What a call with contiguous logits of three experts and 2730 samples launches on an H100."""
    shape = (2730, classes)
    logits = ((classes, 1), dtype.itemsize, 0)
    computed = "*fp64" if dtype == torch.float64 else "*fp32"
    types = {"input": POINTERS[dtype], "state": computed}
    types |= {"weights" if way == "forward" else "shares": computed} if weights else {}
    types |= {} if way == "forward" else {"grad": POINTERS[dtype], "end_of_state": computed, "error": "*i32"}
    size = _logits(dtype.itemsize)
    kernel: Any
    flags: tuple[Any, ...]
    plan: Plan
    if way == "forward":
        kernel, flags = forward_kernel, (mode, weights, best)
        plan = plan_forward(shape, logits, logits, False, 132, size)
        types |= {"output": POINTERS[dtype]} | ({"mean": computed} if best else {})
    elif way == "backward":
        kernel, flags = backward_kernel, (mode, weights)
        plan = plan_forward(shape, logits, logits, False, 132, size, logits)
        types |= {"d_input": POINTERS[dtype]} | ({"sums": computed} if weights else {})
    else:
        kernel, flags = class_kernel, (mode,)
        plan = plan_backward(shape, logits, logits, None, (), 3, False, 44, size)
        types |= {"sums": computed, "partials": computed, "tickets": "*i32"}
    name = f"{way}_{AggregateMode(mode).name.lower()}_{ExpertWeights(weights).name.lower()}{'_best' * best}"
    return variant(f"{name}<{str(dtype)[6:]}, {classes}>", kernel, plan, flags, types, dtype)


def variants() -> list[Variant]:
    """Instantiations that stand for all: modes, kinds of weights, the best classes; short and long rows."""
    bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
    found = []
    for way in ("forward", "backward"):
        found += [_variant(way, dtype, c, mode) for dtype in (bf16, f32) for c in (1000, 8142) for mode in (0, 1)]
        found += [_variant(way, f32, 1000, 2), _variant(way, f64, 1000, 1)]
        found += [_variant(way, bf16, 1000, 1, weights) for weights in (1, 2, 3)]
    found += [_variant("forward", dtype, 1000, 0, best=True) for dtype in (bf16, f32)]
    found += [_variant("classes", f32, 1000, mode, 3) for mode in (0, 1)]
    return found

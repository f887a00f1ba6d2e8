"""Cross-entropy of adjusted logits in Triton: every argument, type and layout, one launch forward and one backward.

How the kernels work stands in cross_entropy_kernels.py, how they cut rows into tiles in tiles.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltkernels.ops import gpu
from ltkernels.ops.options import Reduction
from ltkernels.triton import Variant, tiles
from ltkernels.triton.cross_entropy_kernels import backward_kernel, forward_kernel
from ltkernels.triton.launches import POINTERS, memory, multiprocessors, plan_backward, plan_forward, variant
from ltkernels.triton.launches import launch as _launch

_Optional = Tensor | None


def _is_heavy(target: Tensor, class_scale: Tensor | None, label_smoothing: float) -> bool:
    """Whether so much is kept of every logit that a tile of half the size fills the registers."""
    return class_scale is not None or label_smoothing > 0 or target.is_floating_point()


def forward(
    input: Tensor,
    target: Tensor,
    weight: _Optional,
    class_scale: _Optional,
    class_bias: _Optional,
    class_margin: _Optional,
    sample_weight: _Optional,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    scale: float,
    focal_gamma: float,
    focal_weighted: bool,
    focal_detached: bool,
    z_loss: float,
    empty_zero: bool,
    with_gradient: bool = False,
) -> tuple[Tensor, Tensor, None]:
    """The loss and the state for :func:`backward`; arguments as in ``ltkernels.ops.cross_entropy``."""
    device, shape = input.device, input.shape
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    heavy = _is_heavy(target, class_scale, label_smoothing)
    plan = plan_forward(shape, memory(input), memory(target), heavy, multiprocessors(device), tiles.LOGITS)
    row_shape = (shape[0], *shape[2:])
    rows = input.numel() // shape[1]
    loss = torch.empty(row_shape if reduction == Reduction.NONE else (), dtype=dtype, device=device)
    state = torch.empty(4 * rows + 1, dtype=dtype, device=device)
    sums = torch.empty(8 * rows, dtype=dtype, device=device) if target.is_floating_point() else state
    partials = torch.empty(plan.partials, dtype=torch.float64, device=device)
    margin = 0.0
    if class_margin is not None and class_margin.device.type == "cpu" and class_margin.numel() == 1:
        margin, class_margin = class_margin.item(), None
    elif class_margin is not None and class_margin.numel() != shape[1]:
        raise RuntimeError("ltkernels: expected one margin on the CPU or one a class on the device")
    _launch(
        forward_kernel, plan, device, input, target, weight, class_scale, class_bias, class_margin, sample_weight, loss,
        state, sums, partials, gpu.tickets(device), gpu.error_word(device), *plan.numbers, ignore_index, reduction,
        empty_zero, focal_weighted, focal_detached, label_smoothing, scale, focal_gamma, z_loss, margin,
        label_smoothing > 0,
    )  # fmt: skip
    return loss, state, None


def backward(
    grad: Tensor,
    state: Tensor,
    input: Tensor,
    target: Tensor,
    weight: _Optional,
    class_scale: _Optional,
    class_bias: _Optional,
    class_margin: _Optional,
    sample_weight: _Optional,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    scale: float,
    focal_gamma: float,
    focal_weighted: bool,
    focal_detached: bool,
    z_loss: float,
    empty_zero: bool,
    need_input: bool,
    need_class_scale: bool,
    need_class_bias: bool,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, class_scale and class_bias that are needed, the others empty."""
    device, shape = input.device, input.shape
    d_input = (input if inplace else torch.empty_like(input)) if need_input else None
    d_scale = state.new_empty(shape[1]) if need_class_scale else None
    d_bias = state.new_empty(shape[1]) if need_class_bias else None
    plan = plan_backward(
        shape, memory(input), memory(target), None if d_input is None else memory(d_input), grad.stride(),
        need_class_scale + need_class_bias, _is_heavy(target, class_scale, label_smoothing), multiprocessors(device),
        tiles.LOGITS,
    )  # fmt: skip
    partials = state.new_empty(plan.partials) if plan.partials else None
    _launch(
        backward_kernel, plan, device, grad, state, input, target, weight, class_scale, class_bias, d_input, d_scale,
        d_bias, partials, gpu.tickets(device, plan.tickets), gpu.error_word(device), *plan.numbers, ignore_index,
        label_smoothing, scale, label_smoothing > 0,
    )  # fmt: skip
    return (
        state.new_empty(0) if d_input is None else d_input,
        state.new_empty(0) if d_scale is None else d_scale,
        state.new_empty(0) if d_bias is None else d_bias,
    )


# --- For the machine-code check ---


def _variant(
    name: str,
    dtype: torch.dtype,
    classes: int,
    tables: tuple[str, ...] = (),
    smoothing: bool = False,
    probabilities: bool = False,
    sums: int = 0,
    inner: int = 1,
) -> Variant:
    """What a call with contiguous ``(8192, classes, inner)`` logits, and int64 labels, launches on an H100."""
    shape = (8192, classes, inner) if inner > 1 else (8192, classes)
    strides = (classes * inner, inner, 1)[: len(shape)]
    input = (strides, dtype.itemsize, 0)
    target = (strides, 4, 0) if probabilities else (((inner, 1) if inner > 1 else (1,)), 8, 0)
    heavy = smoothing or probabilities or "class_scale" in tables
    computed = "*fp64" if dtype == torch.float64 else "*fp32"
    given = {"input": POINTERS[dtype], "target": "*fp32" if probabilities else "*i64", "state": computed}
    given |= {"tickets": "*i32", "error": "*i32"} | dict.fromkeys(tables, computed)
    kernel: Any
    if name.startswith("forward"):
        kernel, plan = forward_kernel, plan_forward(shape, input, target, heavy, 132, tiles.LOGITS)
        given |= {"partials": "*fp64", "loss": computed, "sums": computed}
    else:
        plan = plan_backward(shape, input, target, input, (), sums, heavy, 132, tiles.LOGITS)
        kernel, given = backward_kernel, given | {"grad": computed, "d_input": POINTERS[dtype]}
        given |= dict.fromkeys(("partials", "d_bias", "d_scale")[: 1 + sums if sums else 0], computed)
    return variant(f"{name}<{str(dtype)[6:]}, {classes}>", kernel, plan, (smoothing,), given, dtype, 4 * probabilities)


def variants() -> list[Variant]:
    """Instantiations that stand for all: odd and even, short and long rows, with and without tables and sums."""
    bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
    adjusted = ("weight", "class_bias")
    found = []
    for way in ("forward", "backward"):
        found += [_variant(way, dtype, classes) for dtype in (bf16, f32) for classes in (365, 1000, 8142, 50257)]
        for classes in (1000, 50304):
            found += [_variant(f"{way}_adjusted", dtype, classes, adjusted) for dtype in (bf16, f32)]
            found.append(_variant(f"{way}_smoothed", bf16, classes, adjusted, smoothing=True))
        found.append(_variant(f"{way}_scaled", bf16, 1000, ("class_scale", "class_bias")))
        found.append(_variant(f"{way}_probabilities", bf16, 1000, probabilities=True))
        found += [_variant(way, f64, 1000), _variant(f"{way}_inner", bf16, 19, inner=4096)]
    found += [_variant("backward_sums", dtype, 1000, ("class_scale", "class_bias"), sums=2) for dtype in (bf16, f32)]
    return found

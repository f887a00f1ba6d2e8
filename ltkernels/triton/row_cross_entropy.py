"""Cross-entropy whose adjustments depend on the row in Triton: one launch forward and one backward.

How the kernels work stands in row_cross_entropy_kernels.py; they are launched as those of cross_entropy.py are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ltkernels.ops import gpu
from ltkernels.ops.options import PairTerm, Reduction, RowCrossEntropyOptions
from ltkernels.ops.row_cross_entropy import new_state
from ltkernels.triton import Variant, tiles
from ltkernels.triton.launches import POINTERS, memory, multiprocessors, plan_backward, plan_forward, variant
from ltkernels.triton.launches import launch as _launch
from ltkernels.triton.row_cross_entropy_kernels import backward_kernel, forward_kernel

_Optional = Tensor | None
_HEAVY = True  # what is kept of every logit: a tile of half the size fills the registers
_LOGITS = tiles.LOGITS // 4  # of a forward, which keeps both labels' sums too: with more, some variants spill


def _number(name: str, value: _Optional, count: int) -> tuple[float, _Optional]:
    """What a parameter is to a kernel: one number, read from the CPU, or a tensor of ``count`` values."""
    if value is not None and value.numel() == 1 and value.device.type == "cpu":
        return value.item(), None
    if value is not None and value.numel() != count:
        raise RuntimeError(f"ltkernels: {name}: expected one value on the CPU or {count} on the device")
    return 0.0, value


def _two_labels(target: Tensor, second_target: _Optional, lam: _Optional) -> tuple[Tensor, _Optional]:
    """Labels that lie alike in memory, so that a kernel has one set of strides for them."""
    if second_target is None:
        return target, None
    if lam is None or second_target.shape != target.shape or second_target.dtype != target.dtype:
        raise RuntimeError("ltkernels: expected a second target of the first one's shape and type, and lam")
    if second_target.stride() != target.stride():
        target, second_target = target.contiguous(), second_target.contiguous()
    return target, second_target


def _compiled_for(options: RowCrossEntropyOptions, class_margin: _Optional, class_smoothing: _Optional) -> list[Any]:
    """SMOOTHING, MARGIN and PAIR."""
    smoothing = options.label_smoothing > 0 or class_smoothing is not None
    return [smoothing, 0 if class_margin is None else int(options.margin_type), int(options.pair_term)]


def _check_pair(pair: _Optional, pair_step: _Optional, two: bool, classes: int, term: int) -> None:
    size = classes * classes if term == PairTerm.TABLE else classes
    fits = pair is None if term == PairTerm.NONE else pair is not None and pair.numel() == size and not two
    if not fits or (term == PairTerm.DROP and pair_step is None):
        raise RuntimeError("ltkernels: pair: expected what pair_term says, and one label a row")


def forward(*arguments: Any) -> tuple[Tensor, Tensor, None]:
    """The loss and the state for :func:`backward`; arguments as in ``ltkernels.ops.row_cross_entropy``.

    They are its tensors, its options, and whether to compute the gradient too, which is not done here.
    """
    (
        input, target, second_target, lam, weight, class_scale, class_bias, class_margin, class_smoothing,
        sample_weight, row_gate, feature_norm, pair, pair_step,
    ) = tensors = arguments[:14]  # fmt: skip
    options = RowCrossEntropyOptions(*arguments[14:32])
    device, shape = input.device, input.shape
    target, second_target = _two_labels(target, second_target, lam)
    _check_pair(pair, pair_step, second_target is not None, shape[1], options.pair_term)
    plan = plan_forward(shape, memory(input), memory(target), _HEAVY, multiprocessors(device), _LOGITS)
    state = new_state(tensors, options)
    row_shape = (shape[0], *shape[2:])
    loss = torch.empty(row_shape if options.reduction == Reduction.NONE else (), dtype=state.dtype, device=device)
    partials = torch.empty((1 + (second_target is not None)) * plan.partials, dtype=torch.float64, device=device)
    constants = _compiled_for(options, class_margin, class_smoothing)
    margin, class_margin = _number("class_margin", class_margin, shape[1])
    share, lam = _number("lam", None if second_target is None else lam, target.numel())
    _launch(
        forward_kernel, plan, device, input, target, second_target, lam, weight, class_scale, class_bias, class_margin,
        class_smoothing, sample_weight, row_gate, feature_norm, pair, pair_step, loss, state, partials,
        gpu.tickets(device), gpu.error_word(device), *plan.numbers, options.ignore_index, options.reduction,
        options.empty_zero, options.off_target, options.focal_weighted, options.focal_detached,
        int(options.pair_p * 2.0**32), options.seed, options.label_smoothing, options.scale, options.focal_gamma,
        options.z_loss, options.influence_alpha, options.influence_eps, options.pair_p, options.pair_q,
        math.log(options.pair_eps) if options.pair_eps > 0 else -math.inf, share, margin, *constants,
    )  # fmt: skip
    return loss, state, None


def backward(grad: Tensor, state: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of input, class_scale, class_bias and row_gate that are needed, the others empty.

    The arguments are those of :func:`forward`, then which gradients are needed, and whether that of the logits is to be
    written over them.
    """
    (
        input, target, second_target, lam, weight, class_scale, class_bias, class_margin, class_smoothing, _, row_gate,
        _, pair, pair_step,
    ) = arguments[:14]  # fmt: skip
    options = RowCrossEntropyOptions(*arguments[14:32])
    need_input, need_scale, need_bias, need_gate = arguments[32:36]
    inplace = arguments[36] if len(arguments) > 36 else False
    device, shape = input.device, input.shape
    target, second_target = _two_labels(target, second_target, lam)
    d_input = (input if inplace else torch.empty_like(input)) if need_input else None
    d_scale = state.new_empty(shape[1]) if need_scale else None
    d_bias = state.new_empty(shape[1]) if need_bias else None
    d_gate = torch.empty_like(row_gate) if need_gate else None
    plan = plan_backward(
        shape, memory(input), memory(target), None if d_input is None else memory(d_input), grad.stride(),
        need_scale + need_bias, _HEAVY, multiprocessors(device), tiles.LOGITS,
    )  # fmt: skip
    partials = state.new_empty(plan.partials) if plan.partials else None
    constants = _compiled_for(options, class_margin, class_smoothing)
    margin, class_margin = _number("class_margin", class_margin, shape[1])
    if options.margin_type == 0:
        margin, class_margin = 0.0, None  # only margins on the angle matter to the gradient
    _launch(
        backward_kernel, plan, device, grad, state, input, target, second_target, weight, class_scale, class_bias,
        class_margin, row_gate, pair, pair_step, d_input, d_scale, d_bias, d_gate, partials,
        gpu.tickets(device, plan.tickets), gpu.error_word(device), *plan.numbers, options.ignore_index,
        int(options.pair_p * 2.0**32), options.seed, options.scale, options.pair_p, options.pair_q, margin, *constants,
    )  # fmt: skip
    return tuple(state.new_empty(0) if d is None else d for d in (d_input, d_scale, d_bias, d_gate))  # type: ignore[return-value]


# --- For the machine-code check ---


def _variant(
    name: str,
    dtype: torch.dtype,
    classes: int,
    given: tuple[str, ...] = (),
    smoothing: bool = False,
    margin_type: int = 0,
    pair_term: int = PairTerm.NONE,
    sums: int = 0,
    inner: int = 1,
) -> Variant:
    """What a call with contiguous ``(8192, classes, inner)`` logits, and int64 labels, launches on an H100."""
    shape = (8192, classes, inner) if inner > 1 else (8192, classes)
    input = ((classes * inner, inner, 1)[: len(shape)], dtype.itemsize, 0)
    target = (((inner, 1) if inner > 1 else (1,)), 8, 0)
    computed = "*fp64" if dtype == torch.float64 else "*fp32"
    types = {"input": POINTERS[dtype], "target": "*i64", "state": computed, "tickets": "*i32", "error": "*i32"}
    types |= dict.fromkeys(given, computed)
    if pair_term != PairTerm.NONE:
        types["pair"] = computed
    if pair_term == PairTerm.DROP:
        types["pair_step"] = "*i64"
    if "second_target" in given:
        types["second_target"] = "*i64"
    kernel: Any
    if name.startswith("forward"):
        kernel, plan = forward_kernel, plan_forward(shape, input, target, _HEAVY, 132, _LOGITS)
        types |= {"partials": "*fp64", "loss": computed}
    else:
        kernel, plan = backward_kernel, plan_backward(shape, input, target, input, (), sums, _HEAVY, 132, tiles.LOGITS)
        types |= {"grad": computed, "d_input": POINTERS[dtype]}
        types |= dict.fromkeys(("partials", "d_bias", "d_scale")[: 1 + sums if sums else 0], computed)
        types |= {"d_gate": computed} if "row_gate" in given else {}
    types = {key: kind for key, kind in types.items() if key in kernel.arg_names}
    more = 4 if pair_term == PairTerm.TABLE else 0
    flags = (smoothing, margin_type, int(pair_term))
    return variant(f"{name}<{str(dtype)[6:]}, {classes}>", kernel, plan, flags, types, dtype, more)


def variants() -> list[Variant]:
    """Instantiations that stand for all: every adjustment, of short and long rows."""
    bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
    found = []
    for way in ("forward", "backward"):
        for classes in (1000, 50304):
            mixed = ("second_target", "weight", "class_bias")
            found += [_variant(f"{way}_mixed", dtype, classes, mixed) for dtype in (bf16, f32)]
            found.append(_variant(f"{way}_seesaw", bf16, classes, pair_term=PairTerm.SEESAW))
            found.append(_variant(f"{way}_drop", bf16, classes, pair_term=PairTerm.DROP))
            found.append(_variant(f"{way}_gate", bf16, classes, ("class_scale", "class_bias", "row_gate")))
        found.append(_variant(f"{way}_arc", bf16, 1000, ("class_margin",), margin_type=1))
        found.append(_variant(f"{way}_table", bf16, 1000, pair_term=PairTerm.TABLE))
        found.append(_variant(f"{way}_smoothed", bf16, 1000, ("class_smoothing", "feature_norm"), smoothing=True))
        found += [
            _variant(f"{way}_mixed", f64, 1000, ("second_target",)),
            _variant(f"{way}_inner", bf16, 19, inner=4096),
        ]
    gated = ("class_scale", "class_bias", "row_gate")
    found += [_variant("backward_gate_sums", dtype, 1000, gated, sums=2) for dtype in (bf16, f32)]
    return found

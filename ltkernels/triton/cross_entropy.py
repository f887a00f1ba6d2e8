"""Cross-entropy of adjusted logits in Triton: every argument, type and layout, one launch forward and one backward.

How the kernels work stands in cross_entropy_kernels.py, how they cut rows into tiles in tiles.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltkernels.ops import gpu
from ltkernels.ops.options import Reduction
from ltkernels.triton import Variant, tiles
from ltkernels.triton.cross_entropy_kernels import backward_kernel, forward_kernel

_BLOCKS_A_MULTIPROCESSOR = 16  # of four warps; about twice what fits, so that the end of a launch is not ragged
_BLOCKS_WITH_SUMS, _MOST_SPLITS = 4, 128  # the last block of a chunk reads a sum of every split
_Optional = Tensor | None


class _Plan(NamedTuple):
    """What a launch takes from how its tensors lie in memory: found once, since looking costs more than launching."""

    programs: int
    tickets: int
    partials: int
    numbers: tuple[int, ...]
    constants: tuple[int, ...]
    warps: int


@lru_cache(maxsize=4096)
def _plan_forward(
    shape: tuple[int, ...],
    input: tuple[Any, ...],
    target: tuple[Any, ...],
    heavy: bool,
    multiprocessors: int,
    logits: int,
) -> _Plan:
    """``input`` and ``target`` are strides, bytes an element and address; those of probabilities are as long."""
    grouped = tiles.group_rows(shape, input[0], target[0])
    of_input, of_target = grouped.strides
    visited = [(of_input, *input[1:])] + ([(of_target, *target[1:])] if len(target[0]) == len(shape) else [])
    by = tiles.access(shape[1], grouped, visited)
    logits = logits // 2 if heavy or input[1] == 8 else logits
    columns, warps = tiles.next_power_of_2(shape[1]), tiles.WARPS
    if by.unit != tiles.ROWS and columns > logits:
        warps *= 2  # a long row needs the registers of more threads; one in chunks, as many bytes of each thread
        logits *= 2 if columns <= 2 * logits or input[1] == 2 else 1
    tile = tiles.tile(columns, grouped, by, logits, warps)
    most = _BLOCKS_A_MULTIPROCESSOR * multiprocessors * tiles.WARPS // warps
    programs = tiles.even_share(tile.count(grouped), most)
    return _Plan(
        programs, 1, 2 * programs,
        (shape[1], grouped.groups, grouped.inner, *of_input, *of_target),
        (*by, tile.K, tile.R, tile.L, tile.columns >= shape[1]), warps,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _plan_backward(
    shape: tuple[int, ...],
    input: tuple[Any, ...],
    target: tuple[Any, ...],
    out: tuple[Any, ...] | None,
    grad: tuple[int, ...],
    sums: int,
    heavy: bool,
    multiprocessors: int,
    logits: int,
) -> _Plan:
    """As above, with the gradient's memory if there is one, the upstream's strides, and how many class sums to take."""
    grouped = tiles.group_rows(shape, input[0], target[0], input[0] if out is None else out[0], grad)
    of_input, of_target, of_out, of_grad = grouped.strides
    visited = [(of_input, *input[1:])]
    if len(target[0]) == len(shape):
        visited.append((of_target, *target[1:]))
    if out is not None:
        visited.append((of_out, *out[1:]))
    by = tiles.access(shape[1], grouped, visited)
    logits = logits // 2 if heavy or input[1] == 8 else logits
    if sums:  # they take registers, and few columns make many splits of the rows
        tile = tiles.tile(tiles.next_power_of_2(min(shape[1], 32 * by.vector)), grouped, by, logits // 2, tiles.WARPS)
    else:
        tile = tiles.tile(tiles.chunk_columns(shape[1], logits), grouped, by, logits, tiles.WARPS)
    chunks = tiles.cdiv(shape[1], tile.columns)
    most = tiles.cdiv((_BLOCKS_WITH_SUMS if sums else _BLOCKS_A_MULTIPROCESSOR) * multiprocessors, chunks)
    splits = tiles.even_share(tile.count(grouped), min(most, _MOST_SPLITS) if sums else most)
    return _Plan(
        chunks * splits, chunks, sums * splits * shape[1],
        (shape[1], grouped.groups, grouped.inner, *of_input, *of_target, *of_out, of_grad.group, of_grad.row),
        (*by, tile.K, tile.R, tile.L), tile.warps,
    )  # fmt: skip


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.stride(), tensor.element_size(), tensor.data_ptr() % 16


def _is_heavy(target: Tensor, class_scale: Tensor | None, label_smoothing: float) -> bool:
    """Whether so much is kept of every logit that a tile of half the size fills the registers."""
    return class_scale is not None or label_smoothing > 0 or target.is_floating_point()


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _launch(kernel: Any, plan: _Plan, device: torch.device, *arguments: Any) -> None:
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(plan.programs,)](*arguments, *plan.constants, num_warps=plan.warps)
    else:
        kernel[(plan.programs,)](*arguments, *plan.constants, num_warps=plan.warps)


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
    plan = _plan_forward(shape, _memory(input), _memory(target), heavy, _multiprocessors(device), tiles.LOGITS)
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
    plan = _plan_backward(
        shape, _memory(input), _memory(target), None if d_input is None else _memory(d_input), grad.stride(),
        need_class_scale + need_class_bias, _is_heavy(target, class_scale, label_smoothing), _multiprocessors(device),
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

_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}
_ALIGNED = ("weight", "class_scale", "class_bias")  # what Triton specialises for being aligned, as torch's memory is


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
    given = {"input": _POINTERS[dtype], "target": "*fp32" if probabilities else "*i64", "state": computed}
    given |= {"tickets": "*i32", "error": "*i32"} | dict.fromkeys(tables, computed)
    kernel: Any
    if name.startswith("forward"):
        kernel, plan = forward_kernel, _plan_forward(shape, input, target, heavy, 132, tiles.LOGITS)
        given |= {"partials": "*fp64", "loss": computed, "sums": computed}
    else:
        plan = _plan_backward(shape, input, target, input, (), sums, heavy, 132, tiles.LOGITS)
        kernel, given = backward_kernel, given | {"grad": computed, "d_input": _POINTERS[dtype]}
        given |= dict.fromkeys(("partials", "d_bias", "d_scale")[: 1 + sums if sums else 0], computed)
    constants: dict[str, Any] = dict(
        zip([p.name for p in kernel.params if p.is_constexpr], (smoothing, *plan.constants), strict=True)
    )
    logits, written = constants["K"] * constants["R"] * constants["L"], "d_input" in given
    wide = logits * dtype.itemsize // (16 * 32 * plan.warps) if constants["VEC"] * dtype.itemsize >= 16 else 0
    signature = {p.name: given.get(p.name) or p.annotation_type or "constexpr" for p in kernel.params}
    constants |= {n: None for n, kind in signature.items() if kind == "constexpr" and n not in constants}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {
        (kernel.arg_names.index(table),): [["tt.divisibility", 16]] for table in tables if table in _ALIGNED
    }
    return Variant(
        f"{name}<{str(dtype)[6:]}, {classes}>", kernel, signature, constants, attrs, plan.warps, logits, wide,
        wide if written else 0, float(dtype.itemsize * (1 + written) + 4 * probabilities),
    )  # fmt: skip


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

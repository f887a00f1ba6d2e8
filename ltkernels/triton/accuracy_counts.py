"""Right predictions of each class in Triton: one launch, which reads each logit once.

A row is right if fewer than k classes come before its label (reference/accuracy_counts.py), so a program compares the
logits of its rows with their labels' and adds each row to its class. The sums are of integers: they do not depend on
who adds first.

Every row is an addition in L2, without a histogram of the program before it. With a thousand classes that costs little:
an addition is 8 bytes beside the 2 KB of a row, to as many places. Where rows are many and classes few they wait for
one another: a million pixels of 19 classes are two million additions to 304 bytes, by arithmetic about a millisecond
where reading the logits takes 15 microseconds. There the CUDA kernel, which is preferred, counts in shared memory first
(csrc/cuda/accuracy_counts.cu). Here ``tl.histogram`` could, but it takes every row through shared memory and barriers;
neither form has been timed on a GPU, so the simple one stays.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltkernels.ops import gpu
from ltkernels.triton import Variant, tiles
from ltkernels.triton.launches import POINTERS, Plan, launch, memory, multiprocessors, plan_forward, variant
from ltkernels.triton.sums import labels
from ltkernels.triton.tiles import (
    are_classes,
    lane_sum,
    of_rows,
    pointers,
    row_offsets,
    rows_of_tile,
    share_of_tiles,
    tile_columns,
)

_NO_LABEL, _NO_PREDICTION = tl.constexpr(gpu.LABEL_NOT_COUNTED), tl.constexpr(gpu.PREDICTION_NOT_COUNTED)
_ROWS, _BLOCKS_A_MULTIPROCESSOR = 1024, 2  # of predicted labels: rows of a program, which takes them in turns


@triton.jit
def _count(correct, total, y, counted, right):
    """Adds rows to their classes; ``y`` int64."""
    one = tl.full(y.shape, 1, tl.int64)
    tl.atomic_add(total + y, one, mask=counted, sem="relaxed")
    tl.atomic_add(correct + y, one, mask=counted & right, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "top_k", "ignore_index", "classes", "groups", "inner", "input_group", "input_class", "input_row",
        "target_group", "target_class", "target_row",
    ],
    do_not_specialize_on_alignment=["input", "target", "correct", "total", "error"],
)  # fmt: skip
def logits_kernel(
    input, target, correct, total, error, top_k: tl.int32, ignore_index: tl.int64,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    target_group: tl.int64, target_class: tl.int64, target_row: tl.int64,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Rows of logits."""
    T: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    all_columns = tile_columns(K, L)
    end = K * L if ONE else classes
    first, last, blocks = share_of_tiles(tl.program_id(0), tl.num_programs(0), groups, inner, R)
    for tile in range(first, last):
        group, place, exists, _ = rows_of_tile(tile, blocks, inner, UNIT, VEC, R)
        offsets = row_offsets(group, place, target_group, target_row)
        y, ignored, known = labels(target, offsets, exists, classes, ignore_index)
        used = exists & ~ignored
        counted = used & known
        tl.store(error + tl.zeros_like(place), _NO_LABEL, mask=used & ~known)
        y = tl.where(counted, y, 0)
        at_label = input + row_offsets(group, place, input_group, input_row) + y * input_class
        own = of_rows(tl.load(at_label, mask=counted, other=0.0).to(T))
        label = of_rows(y.to(tl.int32))
        before = tl.zeros((R, L), tl.int32)
        for start in range(0, end, K * L):
            columns = start + all_columns
            mask = are_classes(columns, classes, UNIT, VEC) & of_rows(exists)
            at = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
            x = tl.load(at, mask=mask, other=0.0).to(T)
            # Not x >= own: true of NaN too, which is above every number and equal to NaN.
            precedes = tl.where(columns < label, ~(x < own), ~(x <= own))
            precedes = tl.where(own != own, (columns < label) & (x != x), precedes)
            before += lane_sum((precedes & mask & (columns != label)).to(tl.int32))
        _count(correct, total, y, counted, tl.sum(before, 1) < top_k)


@triton.jit(
    do_not_specialize=["ignore_index", "classes", "rows", "input_row", "target_row"],
    do_not_specialize_on_alignment=["input", "target", "correct", "total", "error"],
)
def labels_kernel(
    input, target, correct, total, error, ignore_index: tl.int64,
    classes: tl.int64, rows: tl.int64, input_row: tl.int64, target_row: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of predicted labels."""
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, rows, tl.num_programs(0).to(tl.int64) * BLOCK):
        row = start + tl.arange(0, BLOCK)
        exists = row < rows
        y, ignored, known = labels(target, row * target_row, exists, classes, ignore_index)
        predicted, _, possible = labels(input, row * input_row, exists, classes, ignore_index)
        used = exists & ~ignored
        counted = used & known & possible
        report = tl.where(known, _NO_PREDICTION, _NO_LABEL)
        tl.store(error + tl.zeros_like(report), report, mask=used & ~counted)
        _count(correct, total, tl.where(counted, y, 0), counted, predicted == y)


# --- The call ---


def accuracy_counts(
    input: Tensor, target: Tensor, correct: Tensor, total: Tensor, top_k: int, ignore_index: int
) -> None:
    """Adds to ``correct`` and ``total``; arguments as in ``ltkernels.reference.accuracy_counts``."""
    _check(input, target, correct, total, top_k)
    device = input.device
    outputs = (correct, total, gpu.error_word(device))
    if input.is_floating_point():
        plan = plan_forward(
            input.shape, memory(input), memory(target), False, multiprocessors(device), _logits(input.element_size())
        )
        launch(logits_kernel, plan, device, input, target, *outputs, top_k, ignore_index, *plan.numbers)
        return
    rows = input.numel()
    most = _BLOCKS_A_MULTIPROCESSOR * multiprocessors(device)
    plan = Plan(max(1, min(tiles.cdiv(rows, _ROWS), most)), 0, 0, (), (_ROWS,), tiles.WARPS)
    launch(
        labels_kernel, plan, device, input, target, *outputs, ignore_index, correct.numel(), rows, *input.stride(),
        *target.stride(),
    )  # fmt: skip


def _logits(size: int) -> int:
    """Of a tile."""
    return tiles.LOGITS // (2 if size == 8 else 1)


def _check(input: Tensor, target: Tensor, correct: Tensor, total: Tensor, top_k: int) -> None:
    """As csrc/bindings/accuracy_counts_arguments.h does: a direct call of the op has been checked by nobody."""
    of_labels = not input.is_floating_point()
    good = input.dim() == 1 if of_labels else input.dim() in (2, 3) and input.shape[1] >= 1
    _expect(good, "logits (N, C) or (N, C, D) with C >= 1, or predicted labels (N,)")
    classes = correct.numel() if of_labels else input.shape[1]
    for counts in (correct, total):
        good = counts.shape == (classes,) and counts.dtype is torch.int64 and counts.is_contiguous()
        _expect(good and counts.device == input.device and classes >= 1, "correct and total: contiguous int64 (C,)")
    shape = input.shape if of_labels else (input.shape[0], *input.shape[2:])
    good = target.shape == shape and not target.is_floating_point() and target.device == input.device
    _expect(good, "a label for each row on the device of the input")
    _expect(1 <= top_k <= (1 if of_labels else classes), "top_k from 1 to C, 1 with predicted labels")


def _expect(good: bool, what: str) -> None:
    if not good:
        raise RuntimeError(f"ltkernels: accuracy_counts: expected {what}")


# --- For the machine-code check ---

_OUTPUTS = {"correct": "*i64", "total": "*i64", "error": "*i32"}


def _variant(dtype: torch.dtype, classes: int, inner: int = 1) -> Variant:
    """What a call with contiguous ``(8192, classes, inner)`` logits, and int64 labels, launches on an H100."""
    shape = (8192, classes, inner) if inner > 1 else (8192, classes)
    input = ((classes * inner, inner, 1)[: len(shape)], dtype.itemsize, 0)
    target = (((inner, 1) if inner > 1 else (1,)), 8, 0)
    plan = plan_forward(shape, input, target, False, 132, _logits(dtype.itemsize))
    types = {"input": POINTERS[dtype], "target": "*i64"} | _OUTPUTS
    name = f"logits<{str(dtype)[6:]}, {classes}{', inner' * (inner > 1)}>"
    return variant(name, logits_kernel, plan, (), types, dtype)


def variants() -> list[Variant]:
    """Instantiations that stand for all: odd and even, short and long rows, neighbouring rows, predicted labels."""
    bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
    found = [_variant(dtype, classes) for dtype in (bf16, f32) for classes in (365, 1000, 8142, 50304)]
    found += [_variant(f64, 1000), _variant(bf16, 19, inner=4096)]
    kernel: Any = labels_kernel
    given = {"input": "*i64", "target": "*i64"} | _OUTPUTS
    signature = {p.name: given.get(p.name) or p.annotation_type or "constexpr" for p in kernel.params}
    constants: dict[str, Any] = {"BLOCK": _ROWS}
    return [*found, Variant("labels", kernel, signature, constants, {}, tiles.WARPS, None, 0, 0, None)]

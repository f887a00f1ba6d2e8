"""What the kernels of every loss over rows share: labels, the tables of the classes, sums of a sweep and of a batch.

A sweep adds up exponentials relative to a maximum, each lane of a row for itself: where a row is more than a tile, the
maximum rises on the way, and what was added before is scaled down to it.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ltkernels.triton.row_loss import weighted
from ltkernels.triton.tiles import ROW_AXIS, lane_max, lane_sum, of_lanes, of_rows

LOG2_E = tl.constexpr(1.4426950408889634)
FINISHED = tl.constexpr(128)
"""Rows that a program finishes at a time."""
_PARTIALS = tl.constexpr(1024)  # programs' sums that the last one adds at a time
_NUMBERS = tl.constexpr(256)  # the same in kernels that have few registers to spare
OUT_OF_RANGE, ABSENT_CLASS, FOREIGN_STATE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""Reports, as in ltkernels/ops/gpu.py."""


@triton.jit
def labels(target, offsets, exists, classes, ignore_index):
    """Labels as int64, which of them are ignored, and which are classes; 2^63 and more of uint64 is neither."""
    y = tl.load(target + offsets, mask=exists, other=0).to(tl.int64)
    ignored = y == ignore_index
    if target.dtype.element_ty == tl.uint64:
        ignored = ignored & (y >= 0)
    return y, ignored, (y >= 0) & (y < classes)


@triton.jit
def used_labels(target, offsets, exists, classes, ignore_index):
    """Labels as int32, -1 where there is none to find in the row, and the rows that are not ignored."""
    y, ignored, known = labels(target, offsets, exists, classes, ignore_index)
    return tl.where(exists & known & ~ignored, y, -1).to(tl.int32), exists & ~ignored


@triton.jit
def tables(weight, class_scale, class_bias, columns, inside, T: tl.constexpr):
    """Of the classes at ``columns``: scale, bias, weight, and ws, the weight where smoothing reaches."""
    a = tl.full((), 1.0, T)
    b = tl.full((), 0.0, T)
    w = tl.where(inside, 1.0, 0.0).to(T)
    if class_scale is not None:
        a = tl.load(class_scale + columns, mask=inside, other=1.0)
    if class_bias is not None:
        b = tl.load(class_bias + columns, mask=inside, other=0.0)
    if weight is not None:
        w = tl.load(weight + columns, mask=inside, other=0.0)
    ws = w
    if class_bias is not None:
        ws = tl.where(b == -float("inf"), 0.0, w)
    return a, b, w, ws


@triton.jit
def adjusted(x, a, b, class_scale, class_bias):
    if class_scale is not None:
        x = x * a
    if class_bias is not None:
        x = x + b
    return x


@triton.jit
def classes_reached(class_bias, classes, T: tl.constexpr):
    """K, the classes with a finite bias. They are counted here: the host would have to wait for the number."""
    if class_bias is None:
        return classes.to(T)
    else:
        count = tl.zeros((_PARTIALS,), tl.int32)
        for start in range(0, classes, _PARTIALS):
            columns = start + tl.arange(0, _PARTIALS)
            bias = tl.load(class_bias + columns, mask=columns < classes, other=-float("inf"))
            count += (bias != -float("inf")).to(tl.int32)
        return tl.sum(count).to(T)


@triton.jit
def smoothing_per_class(label_smoothing, class_bias, classes, SMOOTHING: tl.constexpr, T: tl.constexpr):
    """eps / K."""
    if not SMOOTHING:
        return tl.full((), 0.0, T)
    else:
        return tl.full((), label_smoothing, T) / classes_reached(class_bias, classes, T)


@triton.jit
def finite(top):
    """A maximum to subtract: -inf - -inf is NaN."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def add_exponentials(top, total, u, s2, ONE: tl.constexpr):
    """Adds ``2^(s2 u)`` of a tile to the lanes' sums; ONE: a tile has whole rows, and one maximum is the row's.

    Returns maxima and sums, what was subtracted of u, and how far that is above what was before.
    """
    higher = lane_max(u)
    higher = tl.max(higher, 1)[:, None] if ONE else tl.maximum(top, higher)
    reference = finite(higher)
    rise = tl.where(top == -float("inf"), 0.0, reference - top)
    e = lane_sum(tl.exp2((u - of_lanes(reference)) * s2))
    return higher, e if ONE else total * tl.exp2((top - reference) * s2) + e, reference, rise


@triton.jit
def add(total, distance, coefficient, below, rise):
    """Adds a chunk's coefficients and ``coefficient * below``; what was added before is ``rise`` further below now."""
    distance = distance + weighted(total, rise) + lane_sum(weighted(coefficient, below))
    return total + lane_sum(coefficient), distance


@triton.jit
def over_lanes(top, total, s2, ONE: tl.constexpr):
    """Maxima and sums of rows, from those of their lanes, and how far the maximum is above each lane's."""
    highest = tl.max(top, 1)
    reference = finite(highest)[:, None]
    climb = tl.where(top == -float("inf"), 0.0, reference - top)
    return highest, tl.sum(total if ONE else total * tl.exp2((top - reference) * s2), 1), climb


@triton.jit
def join_label(own, top, total, s2):
    """The label joins the other classes, to whose maximum ``top`` their sum is relative: the maximum may rise to it.

    Returns the maximum, how far it rose, and relative to it the others' sum and the label's exponential.
    """
    raised = tl.maximum(own, top)
    rise = tl.where(top == -float("inf"), 0.0, raised - top)
    return raised, rise, total * tl.exp2((top - raised) * s2), tl.exp2((own - raised) * s2)


@triton.jit
def put(sums, row, exists, place: tl.constexpr, value, WIDTH: tl.constexpr):
    tl.store(sums + row.to(tl.int64) * WIDTH + place, value, mask=exists)


@triton.jit
def get(sums, row, exists, place: tl.constexpr, WIDTH: tl.constexpr):
    return tl.load(sums + row.to(tl.int64) * WIDTH + place, mask=exists, other=0.0)


@triton.jit
def add_up(numbers, count):
    """Float64 numbers in memory, in a fixed order."""
    total = tl.zeros((_NUMBERS,), tl.float64)
    for start in range(0, count, _NUMBERS):
        one = start + tl.arange(0, _NUMBERS)
        total += tl.load(numbers + one, mask=one < count, other=0.0)
    return tl.sum(total)


@triton.jit
def divided(partials, programs, reduction, empty_zero):
    """From the sums of all programs: the loss and 1 / denominator."""
    losses = tl.zeros((_PARTIALS,), tl.float64)
    weights = tl.zeros((_PARTIALS,), tl.float64)
    for start in range(0, programs, _PARTIALS):
        one = start + tl.arange(0, _PARTIALS)
        losses += tl.load(partials + one, mask=one < programs, other=0.0)
        weights += tl.load(partials + programs + one, mask=one < programs, other=0.0)
    total = tl.sum(losses)
    denominator = tl.where(reduction == 1, 1.0, tl.sum(weights))
    empty = (denominator == 0.0) & (empty_zero != 0)
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, denominator))
    return tl.where(empty, 0.0, total * inverse), inverse  # 0 * inf is torch's mean over nothing


@triton.jit
def finish_batch(
    loss, inverse_denominator, loss_sum, weight_sum, partials, tickets, reduction, empty_zero,
    second_loss_sum=None, second_weight_sum=None,
):  # fmt: skip
    """The batch's loss and denominator, by the program that comes last; of second labels too, where there are some."""
    programs = tl.num_programs(0)
    program = tl.program_id(0)
    if reduction == 0:
        if program == 0:
            tl.store(inverse_denominator, 1.0)
            if second_loss_sum is not None:
                tl.store(inverse_denominator + 1, 1.0)
    else:
        tl.store(partials + program, loss_sum)
        tl.store(partials + programs + program, weight_sum)
        if second_loss_sum is not None:
            tl.store(partials + 2 * programs + program, second_loss_sum)
            tl.store(partials + 3 * programs + program, second_weight_sum)
        tl.debug_barrier()  # the ticket is taken by one thread, which has to have seen what the others stored
        if tl.atomic_add(tickets, 1, sem="acq_rel") == programs - 1:
            tl.store(tickets, 0)
            total, inverse = divided(partials, programs, reduction, empty_zero)
            tl.store(inverse_denominator, inverse)
            if second_loss_sum is not None:
                of_second, inverse = divided(partials + 2 * programs, programs, reduction, empty_zero)
                tl.store(inverse_denominator + 1, inverse)
                total += of_second
            tl.store(loss, total)


@triton.jit
def inverse_of(inverse_denominator, error):
    """What finish_batch left; NaN and a report if the state is the reference's, which keeps nothing there."""
    inverse = tl.load(inverse_denominator)
    if inverse < 0:
        tl.store(error, FOREIGN_STATE)
        inverse = inverse * float("nan")
    return inverse


@triton.jit
def add_splits(d_class, partials, columns, inside, splits, classes, R: tl.constexpr):
    """Adds up the sums of all splits, R at a time, in the order of the splits."""
    total = tl.zeros(columns.shape, tl.float64)
    for start in range(0, splits, R):
        split = of_rows(start + tl.arange(0, R))
        part = tl.load(partials + split.to(tl.int64) * classes + columns, mask=inside & (split < splits), other=0.0)
        total += tl.sum(part.to(tl.float64), ROW_AXIS, keep_dims=True)
    tl.store(d_class + columns, total, mask=inside)


@triton.jit
def finish_class_sums(
    first_sum, second_sum, d_first, d_second, partials, tickets, chunk, split, splits, columns, inside, classes,
    R: tl.constexpr,
):  # fmt: skip
    """From tiles of sums over a split's rows, the classes' sums over all rows, by the last program of a chunk.

    One of ``d_first`` and ``d_second`` may be None.
    """
    mine = partials + split.to(tl.int64) * classes + columns
    if d_first is not None:
        tl.store(mine, tl.sum(first_sum, ROW_AXIS, keep_dims=True), mask=inside)
        mine += splits.to(tl.int64) * classes
    if d_second is not None:
        tl.store(mine, tl.sum(second_sum, ROW_AXIS, keep_dims=True), mask=inside)
    tl.debug_barrier()  # the ticket is taken by one thread, which has to have seen what the others stored
    if tl.atomic_add(tickets + chunk, 1, sem="acq_rel") == splits - 1:
        tl.store(tickets + chunk, 0)
        if d_first is not None:
            add_splits(d_first, partials, columns, inside, splits, classes, R)
        if d_second is not None:
            of_second = partials if d_first is None else partials + splits.to(tl.int64) * classes
            add_splits(d_second, of_second, columns, inside, splits, classes, R)

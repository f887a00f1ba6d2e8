"""What depends on the row in its logits: csrc/common/row_adjustments.h in Triton.

A gate of the row on the classes' scale and bias, terms of the pairs of its label and a class, margins on the angle: for
tiles of logits, and for the labels' own.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ltkernels.triton.philox import class_words
from ltkernels.triton.sums import LOG2_E, add_exponentials, over_lanes, tables
from ltkernels.triton.tiles import are_classes, of_rows, pointers, row_offsets, tile_columns

TABLE, SEESAW, DROP = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # ops/options.py: PairTerm
_CLASS_DROPS = tl.constexpr(4)  # csrc/common/philox.h


@triton.jit
def adjusted_by_row(x, a, b, gate, class_scale, class_bias, row_gate, scale):
    """``s (A x + B)``; a masked logit stays masked, whatever its factor."""
    u = x
    if row_gate is not None:
        if class_scale is not None:
            u = x * (1.0 + gate * a)
        if class_bias is not None:
            u = u + gate * b
    else:
        if class_scale is not None:
            u = x * a
        if class_bias is not None:
            u = u + b
    if class_scale is not None:
        u = tl.where(x == -float("inf"), x, u)
    return u * scale


@triton.jit
def log_counts_at(pair, y, PAIR: tl.constexpr, T: tl.constexpr):
    """Seesaw's log n of the labels."""
    counts = tl.zeros(y.shape, T)
    if PAIR == SEESAW:
        counts = tl.load(pair + y, mask=y >= 0, other=0.0)
    return counts


@triton.jit
def with_pair(
    u, columns, inside, y, row, log_count, center, pair, pair_step, classes, p, q, threshold, seed, PAIR: tl.constexpr
):
    """A tile's logits with the terms of the pairs of label and class; ``y``, ``row`` and so on are of the rows."""
    if PAIR == TABLE:
        start = of_rows(tl.maximum(y, 0).to(tl.int64) * classes)
        u += tl.load(pair + start + columns, mask=inside & of_rows(y >= 0), other=0.0)
    elif PAIR == SEESAW:
        rarer = tl.load(pair + columns, mask=inside, other=0.0) - of_rows(log_count)
        above = u - of_rows(center)
        term = tl.where(rarer < 0, p * rarer, 0.0) + tl.where(above > 0, q * above, 0.0)
        u = tl.where(columns == of_rows(y), u, u + term)
    elif PAIR == DROP:
        rare = tl.load(pair + columns, mask=inside, other=0.0) != 0
        step = tl.load(pair_step).to(tl.uint32)
        word = class_words(of_rows(row), columns, classes, step, _CLASS_DROPS, tl.full((), seed, tl.int64))
        dropped = rare & (word.to(tl.int64) < threshold) & (columns != of_rows(y))
        u = tl.where(dropped, -float("inf"), u)
    return u


@triton.jit
def cosine_and_sine(angle):
    """Of angles in ``[0, pi]``, by Taylor's series around pi / 2, an argument of at most pi / 2 then.

    ``tl.cos`` is an approximation to 2^-21 in float32. The first term left out, ``(pi/2)^16 / 16!`` (``^26 / 26!``), is
    less than 1e-10 (1e-21). Half of pi comes in two parts, so that the difference is exact where it is small.
    """
    LAST: tl.constexpr = 26 if angle.dtype == tl.float64 else 16
    if angle.dtype == tl.float64:
        t = (angle - 1.5707963267948966) - 6.123233995736766e-17
    else:
        t = (angle - 1.57079637050628662109375) + 4.37113900018624283e-8
    square = t * t
    even = tl.full(angle.shape, 1.0, angle.dtype)
    odd = even
    for n in tl.static_range(LAST // 2 - 1):  # powers LAST - 2, LAST - 4, ..., 2, in Horner's scheme
        even = 1.0 - even * square * (1.0 / ((LAST - 2 * n - 2) * (LAST - 2 * n - 3)))
        odd = 1.0 - odd * square * (1.0 / ((LAST - 2 * n - 2) * (LAST - 2 * n - 1)))
    return -t * odd, even


@triton.jit
def arc_cosine(cosine, margin, straight_through):
    """``cos(acos(c) + m)`` and its slope: csrc/common/row_adjustments.h."""
    cos_m, sin_m = cosine_and_sine(margin)
    squared = 1.0 - cosine * cosine
    flat = ~(squared >= 1e-12)
    sine = tl.sqrt(tl.where(flat, 1e-12, squared))
    moved = cosine * cos_m - sine * sin_m
    slope = tl.where(flat, cos_m, cos_m + cosine / sine * sin_m)
    past_pi = ~(cosine > -cos_m)
    slope = tl.where(past_pi | (straight_through != 0), 1.0, slope)
    return tl.where(past_pi & (straight_through == 0), cosine - margin * sin_m, moved), slope


@triton.jit
def arc_of_label(
    input, class_margin, group, place, y, input_group, input_class, input_row, margin, straight_through,
    T: tl.constexpr,
):  # fmt: skip
    """The cosine moved by the margin, and the slope.

    Where the gradient is written over the logits, only the chunk that holds the label uses this, and reads it in time.
    """
    at = input + row_offsets(group, place, input_group, input_row) + y.to(tl.int64) * input_class
    m = tl.zeros(y.shape, T) + tl.full((), margin, T)
    if class_margin is not None:
        m = tl.load(class_margin + y, mask=y >= 0, other=0.0)
    return arc_cosine(tl.load(at, mask=y >= 0, other=0.0).to(T), m, straight_through)


@triton.jit
def at_labels(
    input, weight, class_scale, class_bias, class_margin, row_gate, pair, group, place, y, gate, classes,
    input_group, input_class, input_row, scale, margin, MARGIN: tl.constexpr, PAIR: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Of the rows' labels: logits with margins and without, weights, ws, and which classes are not there."""
    NOTHING: tl.constexpr = -float("inf")
    used = y >= 0
    at = input + row_offsets(group, place, input_group, input_row) + y.to(tl.int64) * input_class
    x = tl.load(at, mask=used, other=0.0).to(T)
    a, b, w, ws = tables(weight, class_scale, class_bias, y, used, T)
    u = adjusted_by_row(x, a, b, gate, class_scale, class_bias, row_gate, scale)
    m = tl.zeros(y.shape, T) + tl.full((), margin, T)
    if class_margin is not None:
        m = tl.load(class_margin + y, mask=used, other=0.0)
    moved = u
    if MARGIN == 0:
        moved = u - scale * m
    else:
        phi, _ = arc_cosine(x, m, MARGIN == 2)
        moved = adjusted_by_row(phi, a, b, gate, class_scale, class_bias, row_gate, scale)
    if PAIR == TABLE:
        diagonal = tl.load(pair + y.to(tl.int64) * (classes + 1), mask=used, other=0.0)
        moved += diagonal
        u += diagonal
    absent = tl.zeros(y.shape, tl.int1)
    if class_bias is not None:
        absent = used & (b == NOTHING)
    return moved, u, w, ws, absent


@triton.jit
def seesaw_center(
    input, weight, class_scale, class_bias, row_gate, group, place, exists, y, gate, end, classes,
    input_group, input_class, input_row, scale, log_eps, T: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """``lse + max(z_y - lse, log eps)`` of the logits z without pair terms: above it the compensation begins."""
    NOTHING: tl.constexpr = -float("inf")
    top = tl.full((R, L), NOTHING, T)
    total = tl.zeros((R, L), T)
    for start in range(0, end, K * L):
        columns = start + tile_columns(K, L)
        inside = are_classes(columns, classes, UNIT, VEC)
        a, b, _, _ = tables(weight, class_scale, class_bias, columns, inside, T)
        x = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
        x = tl.load(x, mask=inside & of_rows(exists), other=NOTHING).to(T)
        z = adjusted_by_row(x, a, b, of_rows(gate), class_scale, class_bias, row_gate, scale)
        top, total, _, _ = add_exponentials(top, total, z, LOG2_E, False)
    highest, sum_of_row, _ = over_lanes(top, total, LOG2_E, False)
    log_sum = highest + tl.log(sum_of_row)
    _, z, _, _, _ = at_labels(
        input, weight, class_scale, class_bias, None, row_gate, None, group, place, y, gate, classes,
        input_group, input_class, input_row, scale, 0.0, 0, 0, T,
    )  # fmt: skip
    return log_sum + tl.maximum(z - log_sum, log_eps)

"""The kernels of distillation.py.

**Forward.** A program has whole rows, several at a time. Two sweeps over a row, the second of which finds it in the
cache: the maxima of the softened student, of the softened teacher and of the label's softmax; then one exponential of
each, and the sums that csrc/common/distillation_row.h makes a divergence of. The label joins its softmax after that.

**Backward.** Elementwise from the state, a chunk of the classes and a share of the rows a program.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ltkernels.triton.row_loss import divergence, finish_label, masked_term
from ltkernels.triton.sums import (
    ABSENT_CLASS,
    LOG2_E,
    OUT_OF_RANGE,
    finish_batch,
    finite,
    get,
    inverse_of,
    join_label,
    put,
    used_labels,
)
from ltkernels.triton.tiles import (
    are_classes,
    chunk_of_classes,
    lane_max,
    lane_sum,
    of_rows,
    pointers,
    row_offsets,
    rows_of_tile,
    share_of_tiles,
    tile_columns,
)

_WIDTH = tl.constexpr(7)  # numbers a row of the state


@triton.jit
def _softened(x, scale, bias, columns, inside):
    """``scale x + bias`` of a tile."""
    u = x * scale
    if bias is not None:
        u += tl.load(bias + columns, mask=inside, other=0.0)
    return u


@triton.jit(
    do_not_specialize=[
        "classes", "groups", "inner", "input_group", "input_class", "input_row", "teacher_group", "teacher_class",
        "teacher_row", "ignore_index", "reduction",
    ],
    do_not_specialize_on_alignment=[
        "input", "teacher", "target", "sample_weight", "loss", "state", "partials", "tickets", "error",
    ],
)  # fmt: skip
def forward_kernel(
    input, teacher, target, student_bias, teacher_bias, class_bias, sample_weight, loss, state, partials, tickets,
    error, classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    teacher_group: tl.int64, teacher_class: tl.int64, teacher_row: tl.int64,
    ignore_index: tl.int64, reduction: tl.int32,
    student_scale: tl.float64, teacher_scale: tl.float64, kd_weight: tl.float64, ce_weight: tl.float64,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Row states and losses, and by the last program the mean. ONE: a tile holds whole rows (K L >= classes)."""
    T: tl.constexpr = state.dtype.element_ty
    NOTHING: tl.constexpr = -float("inf")
    s = tl.full((), student_scale, T)
    of_teacher = tl.full((), teacher_scale, T)
    all_columns = tile_columns(K, L)
    first, last, blocks = share_of_tiles(tl.program_id(0), tl.num_programs(0), groups, inner, R)
    kd_sum = tl.zeros((R,), tl.float64)
    ce_sum = tl.zeros((R,), tl.float64)
    rows = tl.zeros((R,), tl.float64)
    labelled = tl.zeros((R,), tl.float64)
    for tile in range(first, last):
        group, place, exists, row = rows_of_tile(tile, blocks, inner, UNIT, VEC, R)
        y = tl.full((R,), -1, tl.int32)
        if target is not None:
            y, used = used_labels(target, row.to(tl.int64), exists, classes, ignore_index)

        top_a = tl.full((R, L), NOTHING, T)
        top_b = tl.full((R, L), NOTHING, T)
        top_u = tl.full((R, L), NOTHING, T)
        for start in range(0, K * L if ONE else classes, K * L):
            columns = start + all_columns
            inside = are_classes(columns, classes, UNIT, VEC)
            mask = inside & of_rows(exists)
            x = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
            x = tl.load(x, mask=mask, other=NOTHING).to(T)
            t = pointers(teacher, group, place, columns, teacher_group, teacher_class, teacher_row, UNIT, VEC)
            t = tl.load(t, mask=mask, other=NOTHING).to(T)
            top_a = tl.maximum(top_a, lane_max(_softened(x, s, student_bias, columns, inside)))
            top_b = tl.maximum(top_b, lane_max(_softened(t, of_teacher, teacher_bias, columns, inside)))
            if target is not None:
                u = _softened(x, 1.0, class_bias, columns, inside)
                top_u = tl.maximum(top_u, lane_max(tl.where(columns == of_rows(y), NOTHING, u)))
        max_a = finite(tl.max(top_a, 1))
        max_b = finite(tl.max(top_b, 1))
        max_u = tl.max(top_u, 1)

        student = tl.zeros((R, L), T)
        total = tl.zeros((R, L), T)
        excess = tl.zeros((R, L), T)
        distance = tl.zeros((R, L), T)
        others = tl.zeros((R, L), T)
        for start in range(0, K * L if ONE else classes, K * L):
            columns = start + all_columns
            inside = are_classes(columns, classes, UNIT, VEC)
            mask = inside & of_rows(exists)
            x = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
            x = tl.load(x, mask=mask, other=NOTHING).to(T)
            t = pointers(teacher, group, place, columns, teacher_group, teacher_class, teacher_row, UNIT, VEC)
            t = tl.load(t, mask=mask, other=NOTHING).to(T)
            a = _softened(x, s, student_bias, columns, inside) - of_rows(max_a)
            b = _softened(t, of_teacher, teacher_bias, columns, inside) - of_rows(max_b)
            ea = tl.exp2(a * LOG2_E)
            eb = tl.exp2(b * LOG2_E)
            student += lane_sum(ea)
            total += lane_sum(eb)
            excess += lane_sum(ea - eb)
            distance += lane_sum(tl.where(eb != 0.0, eb * (b - a), 0.0))  # 0 log 0 is 0
            if target is not None:
                u = tl.where(columns == of_rows(y), NOTHING, _softened(x, 1.0, class_bias, columns, inside))
                others += lane_sum(tl.exp2((u - of_rows(finite(max_u))) * LOG2_E))

        r = tl.full((R,), 1.0, T)
        if sample_weight is not None:
            r = tl.load(sample_weight + row.to(tl.int64), mask=exists, other=0.0)
        sum_a = tl.sum(student, 1)
        sum_b = tl.sum(total, 1)
        kl = divergence(sum_a, sum_b, tl.sum(excess, 1), tl.sum(distance, 1))
        kd = masked_term(tl.full((), kd_weight, T) * r, kl)
        put(state, row, exists, 0, max_a, _WIDTH)
        put(state, row, exists, 1, 1.0 / sum_a, _WIDTH)
        put(state, row, exists, 2, max_b, _WIDTH)
        put(state, row, exists, 3, 1.0 / sum_b, _WIDTH)
        ce = tl.zeros((R,), T)
        if target is not None:
            found = y >= 0
            wrong = tl.where(used & ~found, OUT_OF_RANGE, 0)
            at = row_offsets(group, place, input_group, input_row) + y.to(tl.int64) * input_class
            own = tl.load(input + at, mask=found, other=0.0).to(T)
            if class_bias is not None:
                bias = tl.load(class_bias + y, mask=found, other=0.0)
                wrong = tl.where(found & (bias == NOTHING), ABSENT_CLASS, wrong)
                own += bias
            raised, _, rest, at_label = join_label(own, max_u, tl.sum(others, 1), LOG2_E)
            nll, inverse, minus_one = finish_label(rest, at_label, raised - own)
            tl.store(error + tl.zeros_like(row), wrong, mask=wrong > 0)
            nothing = tl.where(wrong > 0, float("nan"), 0.0).to(T)
            without = ~used | (wrong > 0)
            put(state, row, exists, 4, tl.where(without, nothing, raised), _WIDTH)
            put(state, row, exists, 5, tl.where(without, nothing, inverse), _WIDTH)
            put(state, row, exists, 6, tl.where(without, nothing, minus_one), _WIDTH)
            ce = tl.where(without, nothing, masked_term(tl.full((), ce_weight, T) * r, nll))
            labelled += used.to(tl.float64)
            ce_sum += tl.where(exists, ce, 0.0).to(tl.float64)
        kd_sum += tl.where(exists, kd, 0.0).to(tl.float64)
        rows += exists.to(tl.float64)
        if reduction == 0:
            tl.store(loss + row.to(tl.int64), kd + ce, mask=exists)

    count = tl.sum(labelled)
    if target is None:
        count = tl.full((), 1.0, tl.float64)  # nothing over something
    inverses = state + (groups * inner).to(tl.int64) * _WIDTH
    finish_batch(loss, inverses, tl.sum(ce_sum), count, partials, tickets, reduction, 0, tl.sum(kd_sum), tl.sum(rows))


@triton.jit(
    do_not_specialize=[
        "classes", "groups", "inner", "input_group", "input_class", "input_row", "teacher_group", "teacher_class",
        "teacher_row", "out_group", "out_class", "out_row", "grad_group", "grad_row", "ignore_index",
    ],
    do_not_specialize_on_alignment=["grad", "state", "input", "teacher", "target", "sample_weight", "d_input", "error"],
)  # fmt: skip
def backward_kernel(
    grad, state, input, teacher, target, student_bias, teacher_bias, class_bias, sample_weight, d_input, error,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    teacher_group: tl.int64, teacher_class: tl.int64, teacher_row: tl.int64,
    out_group: tl.int64, out_class: tl.int64, out_row: tl.int64, grad_group: tl.int64, grad_row: tl.int64,
    ignore_index: tl.int64,
    student_scale: tl.float64, teacher_scale: tl.float64, kd_weight: tl.float64, ce_weight: tl.float64,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The gradient of the student's logits."""
    T: tl.constexpr = state.dtype.element_ty
    NOTHING: tl.constexpr = -float("inf")
    s = tl.full((), student_scale, T)
    of_teacher = tl.full((), teacher_scale, T)
    chunk, split, splits, columns, inside = chunk_of_classes(classes, UNIT, VEC, K, L)
    inverses = state + (groups * inner).to(tl.int64) * _WIDTH
    inverse_labels = tl.load(inverses)
    inverse_rows = inverse_of(inverses + 1, error)
    first, last, blocks = share_of_tiles(split, splits, groups, inner, R)
    for tile in range(first, last):
        group, place, exists, row = rows_of_tile(tile, blocks, inner, UNIT, VEC, R)
        mask = inside & of_rows(exists)
        factor = tl.load(grad + row_offsets(group, place, grad_group, grad_row), mask=exists, other=0.0).to(T)
        if sample_weight is not None:
            factor *= tl.load(sample_weight + row.to(tl.int64), mask=exists, other=0.0)
        kd = factor * (tl.full((), kd_weight, T) * s * inverse_rows)
        x = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
        x = tl.load(x, mask=mask, other=NOTHING).to(T)
        t = pointers(teacher, group, place, columns, teacher_group, teacher_class, teacher_row, UNIT, VEC)
        t = tl.load(t, mask=mask, other=NOTHING).to(T)
        a = _softened(x, s, student_bias, columns, inside) - of_rows(get(state, row, exists, 0, _WIDTH))
        b = _softened(t, of_teacher, teacher_bias, columns, inside) - of_rows(get(state, row, exists, 2, _WIDTH))
        d = of_rows(kd * get(state, row, exists, 1, _WIDTH)) * tl.exp2(a * LOG2_E)
        d -= of_rows(kd * get(state, row, exists, 3, _WIDTH)) * tl.exp2(b * LOG2_E)
        if target is not None:
            y, used = used_labels(target, row.to(tl.int64), exists, classes, ignore_index)
            ce = factor * (tl.full((), ce_weight, T) * inverse_labels)
            u = _softened(x, 1.0, class_bias, columns, inside) - of_rows(get(state, row, used, 4, _WIDTH))
            e = of_rows(ce * get(state, row, used, 5, _WIDTH)) * tl.exp2(u * LOG2_E)
            own = of_rows(ce * get(state, row, used, 6, _WIDTH))
            d += tl.where(of_rows(used), tl.where(columns == of_rows(y), own, e), 0.0)
        out = pointers(d_input, group, place, columns, out_group, out_class, out_row, UNIT, VEC)
        tl.store(out, d.to(d_input.dtype.element_ty), mask=mask)

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

from ltkernels.triton.row_loss import log1p, weighted
from ltkernels.triton.sums import ABSENT_CLASS, FOREIGN_STATE, LOG2_E, OUT_OF_RANGE, finish_batch, get, labels, put
from ltkernels.triton.tiles import (
    are_classes,
    are_rows,
    lane_max,
    lane_sum,
    of_rows,
    pointers,
    tile_columns,
)

_WIDTH = tl.constexpr(7)


@triton.jit
def _softened(x, scale, bias, columns, inside):
    """``scale x + bias`` of a tile."""
    u = x * scale
    if bias is not None:
        u += tl.load(bias + columns, mask=inside, other=0.0)
    return u


@triton.jit
def _finite(top):
    """A maximum to subtract: -inf - -inf is NaN."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _divergence(student, teacher, excess, distance):
    """KL of rows, from the sums of their exponentials: csrc/common/distillation_row.h."""
    relative = excess / teacher
    near = (relative > -0.5) & (relative < 1.0)
    log_ratio = tl.where(near, log1p(tl.where(near, relative, 0.0)), tl.log(student / teacher))
    kl = distance / teacher + log_ratio
    return tl.where(kl < 0.0, 0.0, kl)  # by rounding


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
    blocks = tl.cdiv(inner, R)
    share = tl.cdiv(groups * blocks, tl.num_programs(0))
    first = tl.program_id(0) * share
    kd_sum = tl.zeros((R,), tl.float64)
    ce_sum = tl.zeros((R,), tl.float64)
    rows = tl.zeros((R,), tl.float64)
    labelled = tl.zeros((R,), tl.float64)
    for tile in range(first, tl.minimum(first + share, groups * blocks)):
        group = tile // blocks
        place = tile % blocks * R + tl.arange(0, R)
        exists = are_rows(place, inner, UNIT, VEC)
        row = group * inner + place
        y = tl.full((R,), -1, tl.int32)
        if target is not None:
            y, ignored, known = labels(target, row.to(tl.int64), exists, classes, ignore_index)
            wrong = tl.where(exists & ~ignored & ~known, OUT_OF_RANGE, 0)
            y = tl.where(known & ~ignored, y, -1).to(tl.int32)

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
        max_a = _finite(tl.max(top_a, 1))
        max_b = _finite(tl.max(top_b, 1))
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
                others += lane_sum(tl.exp2((u - of_rows(_finite(max_u))) * LOG2_E))

        r = tl.full((R,), 1.0, T)
        if sample_weight is not None:
            r = tl.load(sample_weight + row.to(tl.int64), mask=exists, other=0.0)
        sum_a = tl.sum(student, 1)
        sum_b = tl.sum(total, 1)
        kl = _divergence(sum_a, sum_b, tl.sum(excess, 1), tl.sum(distance, 1))
        kd = weighted(tl.full((), kd_weight, T) * r, kl)
        put(state, row, exists, 0, max_a, _WIDTH)
        put(state, row, exists, 1, 1.0 / sum_a, _WIDTH)
        put(state, row, exists, 2, max_b, _WIDTH)
        put(state, row, exists, 3, 1.0 / sum_b, _WIDTH)
        ce = tl.zeros((R,), T)
        if target is not None:
            used = exists & (y >= 0)
            at = group.to(tl.int64) * input_group + place.to(tl.int64) * input_row + y.to(tl.int64) * input_class
            own = tl.load(input + at, mask=used, other=0.0).to(T)
            if class_bias is not None:
                bias = tl.load(class_bias + y, mask=used, other=0.0)
                wrong = tl.where(bias == NOTHING, ABSENT_CLASS, wrong)
                own += bias
            raised = tl.maximum(own, max_u)
            rest = tl.sum(others, 1) * tl.exp2(tl.where(max_u == NOTHING, 0.0, max_u - raised) * LOG2_E)
            at_label = tl.exp2((own - raised) * LOG2_E)
            confident = at_label > rest
            sum_u = at_label + rest
            ratio = tl.where(confident, rest / at_label, 0.0)
            nll = tl.where(confident, log1p(ratio), raised - own + tl.log(sum_u))
            tl.store(error + tl.zeros_like(row), wrong, mask=wrong > 0)
            nothing = tl.where(wrong > 0, float("nan"), 0.0).to(T)
            without = ~used | (wrong > 0)
            put(state, row, exists, 4, tl.where(without, nothing, raised), _WIDTH)
            put(state, row, exists, 5, tl.where(without, nothing, 1.0 / sum_u), _WIDTH)
            put(state, row, exists, 6, tl.where(without, nothing, -rest / sum_u), _WIDTH)
            ce = tl.where(without, nothing, weighted(tl.full((), ce_weight, T) * r, nll))
            labelled += (exists & ~ignored).to(tl.float64)
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
    """The gradient of the student's logits. Programs are numbered chunks of classes first, then splits of the rows."""
    T: tl.constexpr = state.dtype.element_ty
    NOTHING: tl.constexpr = -float("inf")
    s = tl.full((), student_scale, T)
    of_teacher = tl.full((), teacher_scale, T)
    chunks = tl.cdiv(classes, K * L)
    columns = tl.program_id(0) % chunks * (K * L) + tile_columns(K, L)
    inside = are_classes(columns, classes, UNIT, VEC)
    split = tl.program_id(0) // chunks
    inverses = state + (groups * inner).to(tl.int64) * _WIDTH
    inverse_labels = tl.load(inverses)
    inverse_rows = tl.load(inverses + 1)
    if inverse_rows < 0:  # the state of the reference, which keeps nothing there
        tl.store(error, FOREIGN_STATE)
        inverse_rows = inverse_rows * float("nan")
    blocks = tl.cdiv(inner, R)
    share = tl.cdiv(groups * blocks, tl.num_programs(0) // chunks)
    first = split * share
    for tile in range(first, tl.minimum(first + share, groups * blocks)):
        group = tile // blocks
        place = tile % blocks * R + tl.arange(0, R)
        exists = are_rows(place, inner, UNIT, VEC)
        row = group * inner + place
        mask = inside & of_rows(exists)
        factor = tl.load(grad + group.to(tl.int64) * grad_group + place.to(tl.int64) * grad_row, mask=exists, other=0.0)
        factor = factor.to(T)
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
            y, ignored, known = labels(target, row.to(tl.int64), exists, classes, ignore_index)
            used = exists & ~ignored
            ce = factor * (tl.full((), ce_weight, T) * inverse_labels)
            u = _softened(x, 1.0, class_bias, columns, inside) - of_rows(get(state, row, used, 4, _WIDTH))
            e = of_rows(ce * get(state, row, used, 5, _WIDTH)) * tl.exp2(u * LOG2_E)
            own = of_rows(ce * get(state, row, used, 6, _WIDTH))
            at_label = columns == of_rows(tl.where(known, y, -1).to(tl.int32))
            d += tl.where(of_rows(used), tl.where(at_label, own, e), 0.0)
        out = pointers(d_input, group, place, columns, out_group, out_class, out_row, UNIT, VEC)
        tl.store(out, d.to(d_input.dtype.element_ty), mask=mask)

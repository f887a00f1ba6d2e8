"""The kernels of cross_entropy.py.

**Forward.** First, tile by tile (tiles.py), the sums over the classes other than the label (over all of them, for
probabilities): in one piece where a row fits into registers, else with running maxima, and sums that are rescaled when
these rise. Either way a row is read once. The sums go to memory, and after a barrier the program finishes its rows, one
a thread (row_loss.py): by all the threads that share a row, that would take more instructions than the sweep does.
Last, the program that takes the last ticket adds up what all have found, in a fixed order.

**Backward.** Elementwise, from the state: a program has a chunk of the classes and walks down its share of the rows,
with the chunk's parameters in registers and, for learnable ones, their sums over the rows.

The numbers of a call are arguments at run time for which no kernel is specialised (but ``label_smoothing`` for being
0); how logits lie in memory is, and which tensors there are: ``None`` is no argument to Triton.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ltkernels.triton.row_loss import finish_label_row, finish_probability_row, weighted
from ltkernels.triton.sums import (
    ABSENT_CLASS,
    FINISHED,
    FOREIGN_STATE,
    LOG2_E,
    OUT_OF_RANGE,
    add,
    add_splits,
    adjusted,
    finish_batch,
    get,
    labels,
    put,
    smoothing_per_class,
    tables,
)
from ltkernels.triton.tiles import (
    _ROWS,
    ROW_AXIS,
    are_classes,
    are_rows,
    lane_max,
    lane_sum,
    no_logits,
    of_lanes,
    of_rows,
    pointers,
    tile_columns,
)  # fmt: skip

# --- Forward ---


@triton.jit
def _finish_rows(
    input, target, weight, class_scale, class_bias, class_margin, sample_weight, loss, state, sums, error,
    begin, end, classes, inner, input_group, input_class, input_row, target_group, target_row,
    ignore_index, reduction, focal_weighted, focal_detached, label_smoothing, scale, gamma, z, margin,
    SMOOTHING: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Losses and states of the rows [begin, end), a row a thread; returns their sums of losses and denominators."""
    T: tl.constexpr = state.dtype.element_ty
    PROBABILITIES: tl.constexpr = target.dtype.element_ty.is_floating()
    NOTHING: tl.constexpr = -float("inf")
    soft = smoothing_per_class(label_smoothing, class_bias, classes, SMOOTHING, T)
    loss_sum = tl.zeros((FINISHED,), tl.float64)
    weight_sum = tl.zeros((FINISHED,), tl.float64)
    for start in range(begin, end, FINISHED):
        row = start + tl.arange(0, FINISHED)
        exists = row < end
        r = tl.full((FINISHED,), 1.0, T)
        if sample_weight is not None:
            r = tl.load(sample_weight + row, mask=exists, other=0.0)
        top = get(sums, row, exists, 0, WIDTH)
        total = get(sums, row, exists, 1, WIDTH)
        smooth_total = tl.zeros((FINISHED,), T)
        smooth_distance = smooth_total
        if SMOOTHING:
            smooth_total = get(sums, row, exists, 2, WIDTH)
            smooth_distance = scale * get(sums, row, exists, 3, WIDTH)
        if PROBABILITIES:
            target_total = get(sums, row, exists, 4, WIDTH)
            target_distance = scale * get(sums, row, exists, 5, WIDTH)
            weighted_total, weighted_distance = target_total, target_distance
            if weight is not None:
                weighted_total = get(sums, row, exists, 6, WIDTH)
                weighted_distance = scale * get(sums, row, exists, 7, WIDTH)
            value, probability, factor, rest = finish_probability_row(
                scale * top, total, target_total, target_distance, weighted_total, weighted_distance,
                smooth_distance, smooth_total, r, label_smoothing, soft, gamma, z, focal_weighted, focal_detached,
            )  # fmt: skip
            counted = r
            if reduction == 3:
                counted = tl.full((FINISHED,), 1.0, T)
        else:
            group = (row // inner).to(tl.int64)
            place = (row % inner).to(tl.int64)
            offsets = group * target_group + place * target_row
            y, ignored, known = labels(target, offsets, exists, classes, ignore_index)
            used = exists & known & ~ignored
            wrong = tl.where(exists & ~ignored & ~known, OUT_OF_RANGE, 0)
            x = input + group * input_group + place * input_row + y * input_class
            u = tl.load(x, mask=used, other=0.0).to(T)
            w = tl.full((FINISHED,), 1.0, T)
            if class_scale is not None:
                u *= tl.load(class_scale + y, mask=used, other=1.0)
            if class_bias is not None:
                b = tl.load(class_bias + y, mask=used, other=0.0)
                u += b
                wrong = tl.where(used & (b == NOTHING), ABSENT_CLASS, wrong)
            if class_margin is not None:
                u -= tl.load(class_margin + y, mask=used, other=0.0).to(T)
            else:
                u -= tl.full((), margin, T)
            if weight is not None:
                w = tl.load(weight + y, mask=used, other=0.0)
            # The label joins the other classes: the maximum may rise to it.
            raised = tl.maximum(u, top)
            rise = tl.where(top == NOTHING, 0.0, raised - top)
            others = total * tl.exp2(-rise * scale * LOG2_E)
            at_label = tl.exp2((u - raised) * (scale * LOG2_E))
            top = raised
            below = scale * (top - u)
            if SMOOTHING:
                smooth_distance += weighted(smooth_total, scale * rise) + weighted(w, below)
                smooth_total += w
            value, probability, factor, rest = finish_label_row(
                scale * top, others, at_label, below, smooth_distance, smooth_total, w, w, r,
                label_smoothing, soft, gamma, z, focal_weighted, focal_detached,
            )  # fmt: skip
            tl.store(error + tl.zeros_like(row), wrong, mask=wrong > 0)
            without = ignored | (wrong > 0)
            nothing = tl.where(wrong > 0, float("nan"), 0.0).to(T)
            value = tl.where(without, nothing, value)
            top = tl.where(without, nothing, top)
            probability = tl.where(without, nothing, probability)
            factor = tl.where(without, nothing, factor)
            rest = tl.where(without, nothing, rest)
            counted = tl.where((wrong > 0) | (reduction == 3), 1.0, r * w)
            counted = tl.where(ignored, 0.0, counted)
        put(state, row, exists, 0, top, 4)
        put(state, row, exists, 1, probability, 4)
        put(state, row, exists, 2, factor, 4)
        put(state, row, exists, 3, rest, 4)
        if reduction == 0:
            tl.store(loss + row, value, mask=exists)
        loss_sum += tl.where(exists, value, 0.0).to(tl.float64)
        weight_sum += tl.where(exists, counted, 0.0).to(tl.float64)
    return tl.sum(loss_sum), tl.sum(weight_sum)


@triton.jit(
    do_not_specialize=[
        "classes", "groups", "inner", "input_group", "input_class", "input_row", "target_group", "target_class",
        "target_row", "ignore_index", "reduction", "empty_zero", "focal_weighted", "focal_detached",
    ],
    do_not_specialize_on_alignment=[
        "input", "target", "class_margin", "sample_weight", "loss", "state", "sums", "partials", "tickets", "error",
    ],
)  # fmt: skip
def forward_kernel(
    input, target, weight, class_scale, class_bias, class_margin, sample_weight,
    loss, state, sums, partials, tickets, error,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    target_group: tl.int64, target_class: tl.int64, target_row: tl.int64,
    ignore_index: tl.int64, reduction: tl.int32, empty_zero: tl.int32,
    focal_weighted: tl.int32, focal_detached: tl.int32,
    label_smoothing: tl.float64, scale: tl.float64, focal_gamma: tl.float64, z_loss: tl.float64, margin: tl.float64,
    SMOOTHING: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """Row losses, states, and by the last program the loss. ONE: a tile holds whole rows (K L >= classes)."""
    T: tl.constexpr = state.dtype.element_ty
    PROBABILITIES: tl.constexpr = target.dtype.element_ty.is_floating()
    WIDTH: tl.constexpr = 8 if PROBABILITIES else 4  # numbers a row in `sums`, which for labels is `state`
    NOTHING: tl.constexpr = -float("inf")
    # tl.full, since these are float64 to the compiler but Python's floats to the interpreter.
    s = tl.full((), scale, T)
    s2 = s * LOG2_E
    all_columns = tile_columns(K, L)
    if ONE:  # every tile has the same classes
        inside = are_classes(all_columns, classes, UNIT, VEC)
        a, b, w, ws = tables(weight, class_scale, class_bias, all_columns, inside, T)
    blocks = tl.cdiv(inner, R)
    share = tl.cdiv(groups * blocks, tl.num_programs(0))
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, groups * blocks)

    for tile in range(first, last):
        group = tile // blocks
        place = tile % blocks * R + tl.arange(0, R)
        exists = are_rows(place, inner, UNIT, VEC)
        row = group * inner + place
        end = K * L if ONE else classes
        if not PROBABILITIES:
            offsets = group.to(tl.int64) * target_group + place.to(tl.int64) * target_row
            y, ignored, known = labels(target, offsets, exists, classes, ignore_index)
            y = tl.where(known, y, -1).to(tl.int32)
            if not ONE:  # of long rows, what nobody asks for is not read: that is worth waiting for the labels
                end = tl.where(tl.max((exists & known & ~ignored).to(tl.int32), 0) > 0, classes, 0)
        # The maximum of every lane so far, and its sums relative to that.
        top = tl.full((R, 1) if ONE else (R, L), NOTHING, T)
        total = tl.zeros((R, L), T)
        smooth_total, smooth_distance = total, total
        target_total, target_distance = total, total
        weighted_total, weighted_distance = total, total
        for start in range(0, end, K * L):
            columns = start + all_columns
            if not ONE:
                inside = are_classes(columns, classes, UNIT, VEC)
                a, b, w, ws = tables(weight, class_scale, class_bias, columns, inside, T)
            mask = inside & of_rows(exists)
            x = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
            u = adjusted(tl.load(x, mask=mask, other=NOTHING).to(T), a, b, class_scale, class_bias)
            reached = ws
            if not PROBABILITIES:
                at_label = columns == of_rows(y)
                u = tl.where(at_label, NOTHING, u)  # out of maximum and sum; _finish_rows adds it
                reached = tl.where(at_label, 0.0, ws)
            higher = lane_max(u)
            higher = tl.max(higher, 1)[:, None] if ONE else tl.maximum(top, higher)
            reference = tl.where(higher == NOTHING, 0.0, higher)  # -inf - -inf is NaN
            rise = tl.where(top == NOTHING, 0.0, reference - top)
            e = lane_sum(tl.exp2((u - of_lanes(reference)) * s2))
            total = e if ONE else total * tl.exp2(-rise * s2) + e
            if SMOOTHING or PROBABILITIES:
                below = tl.where(u == NOTHING, float("inf"), of_lanes(reference) - u)
            if SMOOTHING:
                smooth_total, smooth_distance = add(smooth_total, smooth_distance, reached, below, rise)
            if PROBABILITIES:
                t = pointers(target, group, place, columns, target_group, target_class, target_row, UNIT, VEC)
                t = tl.load(t, mask=mask, other=0.0).to(T)
                target_total, target_distance = add(target_total, target_distance, t, below, rise)
                if weight is not None:
                    weighted_total, weighted_distance = add(weighted_total, weighted_distance, w * t, below, rise)
            top = higher

        # Over the lanes.
        highest = tl.max(top, 1)
        climb = tl.where(top == NOTHING, 0.0, highest[:, None] - top)
        put(sums, row, exists, 0, highest, WIDTH)
        put(sums, row, exists, 1, tl.sum(total if ONE else total * tl.exp2(-climb * s2), 1), WIDTH)
        if SMOOTHING:
            put(sums, row, exists, 2, tl.sum(smooth_total, 1), WIDTH)
            put(sums, row, exists, 3, tl.sum(smooth_distance + weighted(smooth_total, climb), 1), WIDTH)
        if PROBABILITIES:
            put(sums, row, exists, 4, tl.sum(target_total, 1), WIDTH)
            put(sums, row, exists, 5, tl.sum(target_distance + weighted(target_total, climb), 1), WIDTH)
            if weight is not None:
                put(sums, row, exists, 6, tl.sum(weighted_total, 1), WIDTH)
                put(sums, row, exists, 7, tl.sum(weighted_distance + weighted(weighted_total, climb), 1), WIDTH)

    tl.debug_barrier()  # the sums are read by other threads than wrote them
    loss_sum, weight_sum = _finish_rows(
        input, target, weight, class_scale, class_bias, class_margin, sample_weight, loss, state, sums, error,
        first // blocks * inner + first % blocks * R, last // blocks * inner + last % blocks * R,
        classes, inner, input_group, input_class, input_row, target_group, target_row, ignore_index, reduction,
        focal_weighted, focal_detached, tl.full((), label_smoothing, T), s, tl.full((), focal_gamma, T),
        tl.full((), z_loss, T), margin, SMOOTHING, WIDTH,
    )  # fmt: skip
    denominator = state + (groups * inner).to(tl.int64) * 4
    finish_batch(loss, denominator, loss_sum, weight_sum, partials, tickets, reduction, empty_zero)


# --- Backward ---


@triton.jit(
    do_not_specialize=[
        "classes", "groups", "inner", "input_group", "input_class", "input_row", "target_group", "target_class",
        "target_row", "out_group", "out_class", "out_row", "grad_group", "grad_row", "ignore_index",
    ],
    do_not_specialize_on_alignment=[
        "grad", "state", "input", "target", "d_input", "d_scale", "d_bias", "partials", "tickets", "error",
    ],
)  # fmt: skip
def backward_kernel(
    grad, state, input, target, weight, class_scale, class_bias, d_input, d_scale, d_bias, partials, tickets, error,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    target_group: tl.int64, target_class: tl.int64, target_row: tl.int64,
    out_group: tl.int64, out_class: tl.int64, out_row: tl.int64, grad_group: tl.int64, grad_row: tl.int64,
    ignore_index: tl.int64, label_smoothing: tl.float64, scale: tl.float64,
    SMOOTHING: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The gradients that are not None. Programs are numbered chunks of classes first, then splits of the rows."""
    T: tl.constexpr = state.dtype.element_ty
    PROBABILITIES: tl.constexpr = target.dtype.element_ty.is_floating()
    SUMS: tl.constexpr = d_scale is not None or d_bias is not None
    NOTHING: tl.constexpr = -float("inf")
    chunks = tl.cdiv(classes, K * L)
    chunk = tl.program_id(0) % chunks
    split = tl.program_id(0) // chunks
    splits = tl.num_programs(0) // chunks
    columns = chunk * (K * L) + tile_columns(K, L)
    inside = are_classes(columns, classes, UNIT, VEC)
    a, b, w, ws = tables(weight, class_scale, class_bias, columns, inside, T)
    s = tl.full((), scale, T)
    eps = tl.full((), label_smoothing, T)
    soft = smoothing_per_class(eps, class_bias, classes, SMOOTHING, T)
    inverse = tl.load(state + (groups * inner).to(tl.int64) * 4)
    if inverse < 0:  # the state of the reference, which keeps nothing there
        tl.store(error, FOREIGN_STATE)
        inverse = inverse * float("nan")
    bias_sum = no_logits(K, R, L, T)
    scale_sum = no_logits(K, R, L, T)
    blocks = tl.cdiv(inner, R)
    share = tl.cdiv(groups * blocks, splits)
    first = split * share
    for tile in range(first, tl.minimum(first + share, groups * blocks)):
        group = tile // blocks
        place = tile % blocks * R + tl.arange(0, R)
        exists = are_rows(place, inner, UNIT, VEC)
        row = group * inner + place
        used = exists
        if not PROBABILITIES:
            offsets = group.to(tl.int64) * target_group + place.to(tl.int64) * target_row
            y, ignored, known = labels(target, offsets, exists, classes, ignore_index)
            y = tl.where(known, y, -1).to(tl.int32)
            used = exists & ~ignored
        upstream = tl.load(grad + group.to(tl.int64) * grad_group + place.to(tl.int64) * grad_row, mask=used, other=0.0)
        factor = of_rows(tl.where(used, s * inverse * upstream.to(T), 0.0))
        top = of_rows(get(state, row, used, 0, 4))
        probability = of_rows(get(state, row, used, 1, 4)) * factor
        smooth = of_rows(get(state, row, used, 2, 4)) * factor
        rest = of_rows(get(state, row, used, 3, 4)) * factor

        # Rows that are ignored are not read but where that would narrow the accesses: e^-inf = 0, whatever they hold.
        mask = inside & of_rows(exists if UNIT == _ROWS else used)
        x = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
        x = tl.load(x, mask=mask, other=NOTHING).to(T)
        if UNIT == _ROWS:
            x = tl.where(of_rows(used), x, NOTHING)
        d = probability * tl.exp2((adjusted(x, a, b, class_scale, class_bias) - top) * (s * LOG2_E))
        if PROBABILITIES:
            t = pointers(target, group, place, columns, target_group, target_class, target_row, UNIT, VEC)
            t = tl.load(t, mask=mask, other=0.0).to(T)
            hard = smooth * (1.0 - eps)
            d -= t * ((hard if weight is None else hard * w) + rest)
        if SMOOTHING:
            d -= smooth * soft * ws
        if not PROBABILITIES:
            d = tl.where(columns == of_rows(y), rest, d)
        if class_scale is not None:
            d = tl.where(of_rows(used), d, 0.0)  # a scale of 0 or less makes NaN or inf of -inf
        if d_bias is not None:
            bias_sum += d
        if d_scale is not None:
            # Whatever flows to a masked logit, it does not depend on the class's scale: -inf times anything is -inf.
            scale_sum += tl.where(x == NOTHING, 0.0, d * x)
        if d_input is not None:
            out = pointers(d_input, group, place, columns, out_group, out_class, out_row, UNIT, VEC)
            d = d if class_scale is None else a * d
            tl.store(out, d.to(d_input.dtype.element_ty), mask=inside & of_rows(exists))

    if SUMS:
        mine = partials + split.to(tl.int64) * classes + columns
        if d_bias is not None:
            tl.store(mine, tl.sum(bias_sum, ROW_AXIS, keep_dims=True), mask=inside)
            mine += splits.to(tl.int64) * classes
        if d_scale is not None:
            tl.store(mine, tl.sum(scale_sum, ROW_AXIS, keep_dims=True), mask=inside)
        tl.debug_barrier()
        if tl.atomic_add(tickets + chunk, 1, sem="acq_rel") == splits - 1:
            tl.store(tickets + chunk, 0)
            if d_bias is not None:
                add_splits(d_bias, partials, columns, inside, splits, classes, R)
            if d_scale is not None:
                others = partials if d_bias is None else partials + splits.to(tl.int64) * classes
                add_splits(d_scale, others, columns, inside, splits, classes, R)

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
    LOG2_E,
    OUT_OF_RANGE,
    add,
    add_exponentials,
    adjusted,
    finish_batch,
    finish_class_sums,
    get,
    inverse_of,
    join_label,
    labels,
    over_lanes,
    put,
    smoothing_per_class,
    tables,
    used_labels,
)
from ltkernels.triton.tiles import (
    _ROWS,
    are_classes,
    chunk_of_classes,
    no_logits,
    of_lanes,
    of_rows,
    pointers,
    row_offsets,
    rows_of_tile,
    share_of_tiles,
    tile_columns,
)

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
            group = row // inner
            place = row % inner
            offsets = row_offsets(group, place, target_group, target_row)
            y, used = used_labels(target, offsets, exists, classes, ignore_index)
            found = y >= 0
            wrong = tl.where(used & ~found, OUT_OF_RANGE, 0)
            x = input + row_offsets(group, place, input_group, input_row) + y.to(tl.int64) * input_class
            u = tl.load(x, mask=found, other=0.0).to(T)
            w = tl.full((FINISHED,), 1.0, T)
            if class_scale is not None:
                u *= tl.load(class_scale + y, mask=found, other=1.0)
            if class_bias is not None:
                b = tl.load(class_bias + y, mask=found, other=0.0)
                u += b
                wrong = tl.where(found & (b == -float("inf")), ABSENT_CLASS, wrong)
            if class_margin is not None:
                u -= tl.load(class_margin + y, mask=found, other=0.0).to(T)
            else:
                u -= tl.full((), margin, T)
            if weight is not None:
                w = tl.load(weight + y, mask=found, other=0.0)
            top, rise, others, at_label = join_label(u, top, total, scale * LOG2_E)
            below = scale * (top - u)
            if SMOOTHING:
                smooth_distance += weighted(smooth_total, scale * rise) + weighted(w, below)
                smooth_total += w
            value, probability, factor, rest = finish_label_row(
                scale * top, others, at_label, below, smooth_distance, smooth_total, w, w, r,
                label_smoothing, soft, gamma, z, focal_weighted, focal_detached,
            )  # fmt: skip
            tl.store(error + tl.zeros_like(row), wrong, mask=wrong > 0)
            without = ~used | (wrong > 0)
            nothing = tl.where(wrong > 0, float("nan"), 0.0).to(T)
            value = tl.where(without, nothing, value)
            top = tl.where(without, nothing, top)
            probability = tl.where(without, nothing, probability)
            factor = tl.where(without, nothing, factor)
            rest = tl.where(without, nothing, rest)
            counted = tl.where((wrong > 0) | (reduction == 3), 1.0, r * w)
            counted = tl.where(used, counted, 0.0)
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
    first, last, blocks = share_of_tiles(tl.program_id(0), tl.num_programs(0), groups, inner, R)

    for tile in range(first, last):
        group, place, exists, row = rows_of_tile(tile, blocks, inner, UNIT, VEC, R)
        end = K * L if ONE else classes
        if not PROBABILITIES:
            offsets = row_offsets(group, place, target_group, target_row)
            y, ignored, known = labels(target, offsets, exists, classes, ignore_index)
            y = tl.where(known & ~ignored, y, -1).to(tl.int32)
            if not ONE:  # of long rows, what nobody asks for is not read: that is worth waiting for the labels
                end = tl.where(tl.max(y, 0) >= 0, classes, 0)
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
            top, total, reference, rise = add_exponentials(top, total, u, s2, ONE)
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

        highest, sum_of_row, climb = over_lanes(top, total, s2, ONE)
        put(sums, row, exists, 0, highest, WIDTH)
        put(sums, row, exists, 1, sum_of_row, WIDTH)
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
    """The gradients that are not None."""
    T: tl.constexpr = state.dtype.element_ty
    PROBABILITIES: tl.constexpr = target.dtype.element_ty.is_floating()
    SUMS: tl.constexpr = d_scale is not None or d_bias is not None
    NOTHING: tl.constexpr = -float("inf")
    chunk, split, splits, columns, inside = chunk_of_classes(classes, UNIT, VEC, K, L)
    a, b, w, ws = tables(weight, class_scale, class_bias, columns, inside, T)
    s = tl.full((), scale, T)
    eps = tl.full((), label_smoothing, T)
    soft = smoothing_per_class(eps, class_bias, classes, SMOOTHING, T)
    inverse = inverse_of(state + (groups * inner).to(tl.int64) * 4, error)
    bias_sum = no_logits(K, R, L, T)
    scale_sum = no_logits(K, R, L, T)
    first, last, blocks = share_of_tiles(split, splits, groups, inner, R)
    for tile in range(first, last):
        group, place, exists, row = rows_of_tile(tile, blocks, inner, UNIT, VEC, R)
        used = exists
        if not PROBABILITIES:
            offsets = row_offsets(group, place, target_group, target_row)
            y, ignored, known = labels(target, offsets, exists, classes, ignore_index)
            y = tl.where(known, y, -1).to(tl.int32)
            used = exists & ~ignored
        upstream = tl.load(grad + row_offsets(group, place, grad_group, grad_row), mask=used, other=0.0)
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
        finish_class_sums(
            bias_sum, scale_sum, d_bias, d_scale, partials, tickets, chunk, split, splits, columns, inside, classes, R
        )

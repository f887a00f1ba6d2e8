"""The kernels of row_cross_entropy.py.

They go over the rows as those of cross_entropy_kernels.py do, with what depends on the row added to a tile's logits.

**Forward.** For seesaw first the log-sum-exp of the rows, which its pair term needs: of a short row the second read is
from the cache. Then the sums over all classes but the rows' labels, from which a thread finishes a row: with two
labels, each has a softmax of its own, which the other enters as any class. A gate's gradient is a product with the
gradient of the logits, so it takes another sweep; its program has the rows' states by then.

**Backward.** Elementwise, an exponential for each label. The seesaw term needs the label's logit everywhere in a row;
since another program may already have written the gradient over it, the forward leaves what follows from it
(``seesaw_center``) where the other backends keep the log-sum-exp.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ltkernels.triton.row_adjustments import (
    SEESAW,
    adjusted_by_row,
    arc_of_label,
    log_counts_at,
    seesaw_center,
    with_pair,
)
from ltkernels.triton.row_cross_entropy_labels import finish_rows, state_of, without_label
from ltkernels.triton.row_loss import weighted
from ltkernels.triton.sums import (
    LOG2_E,
    add,
    add_exponentials,
    finish_batch,
    finish_class_sums,
    inverse_of,
    over_lanes,
    put,
    tables,
    used_labels,
)
from ltkernels.triton.tiles import (
    _ROWS,
    are_classes,
    chunk_of_classes,
    lane_sum,
    no_logits,
    of_lanes,
    of_rows,
    pointers,
    row_offsets,
    rows_of_tile,
    share_of_tiles,
    tile_columns,
)


@triton.jit
def _behind_rows(state, rows, row_gate, TWO: tl.constexpr, PAIR: tl.constexpr):
    """What the state has behind the rows of each label: seesaw's centers, gradients of the gate, 1 / denominators."""
    centers = state + rows * (8 if TWO else 4)
    of_gate = centers + (rows if PAIR == SEESAW else 0)
    inverse_denominator = of_gate
    if row_gate is not None:
        inverse_denominator += rows * (2 if TWO else 1)
    return centers, of_gate, inverse_denominator


# --- Forward ---


@triton.jit
def _gate_gradients(
    input, target, second_target, weight, class_scale, class_bias, row_gate, pair, pair_step, state, of_gate, centers,
    first, last, blocks, rows, classes, inner, input_group, input_class, input_row, target_group, target_row,
    ignore_index, scale, p, q, threshold, seed, SMOOTHING: tl.constexpr, PAIR: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """``s sum_j dl/du_j (a_j x_j + b_j)`` of the rows of the tiles [first, last), for each label."""
    T: tl.constexpr = state.dtype.element_ty
    NOTHING: tl.constexpr = -float("inf")
    for tile in range(first, last):
        group, place, exists, row = rows_of_tile(tile, blocks, inner, UNIT, VEC, R)
        offsets = row_offsets(group, place, target_group, target_row)
        y, used = used_labels(target, offsets, exists, classes, ignore_index)
        top, probability, factor, rest = state_of(state, row, used)
        read = used
        if second_target is not None:
            second_y, second_used = used_labels(second_target, offsets, exists, classes, ignore_index)
            second_top, second_probability, second_factor, second_rest = state_of(state + rows * 4, row, second_used)
            read = used | second_used
        gate = tl.load(row_gate + row, mask=exists, other=0.0)
        log_count = log_counts_at(pair, y, PAIR, T)
        center = log_count
        if PAIR == SEESAW:
            center = tl.load(centers + row, mask=exists, other=0.0)
        total = tl.zeros((R, L), T)
        second_total = total
        for start in range(0, classes, K * L):
            columns = start + tile_columns(K, L)
            inside = are_classes(columns, classes, UNIT, VEC)
            a, b, _, ws = tables(weight, class_scale, class_bias, columns, inside, T)
            x = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
            x = tl.load(x, mask=inside & of_rows(exists if UNIT == _ROWS else read), other=NOTHING).to(T)
            if UNIT == _ROWS:
                x = tl.where(of_rows(read), x, NOTHING)
            u = adjusted_by_row(x, a, b, of_rows(gate), class_scale, class_bias, row_gate, scale)
            u = with_pair(
                u, columns, inside, y, row, log_count, center, pair, pair_step, classes, p, q, threshold, seed, PAIR
            )  # fmt: skip
            v = x * 0.0 if class_scale is None else x * a
            if class_bias is not None:
                v += b
            v = tl.where(x == NOTHING, 0.0, v)
            d = without_label(u, ws, top, probability, factor, SMOOTHING)
            total += lane_sum(v * tl.where(columns == of_rows(y), of_rows(rest), d))
            if second_target is not None:
                d = without_label(u, ws, second_top, second_probability, second_factor, SMOOTHING)
                second_total += lane_sum(v * tl.where(columns == of_rows(second_y), of_rows(second_rest), d))
        tl.store(of_gate + row, scale * tl.sum(total, 1), mask=exists)
        if second_target is not None:
            tl.store(of_gate + rows + row, scale * tl.sum(second_total, 1), mask=exists)


@triton.jit(
    do_not_specialize=[
        "classes", "groups", "inner", "input_group", "input_class", "input_row", "target_group", "target_class",
        "target_row", "ignore_index", "reduction", "empty_zero", "off_target", "focal_weighted", "focal_detached",
        "threshold", "seed",
    ],
    do_not_specialize_on_alignment=[
        "input", "target", "second_target", "lam", "class_margin", "class_smoothing", "sample_weight", "row_gate",
        "feature_norm", "pair", "pair_step", "loss", "state", "partials", "tickets", "error",
    ],
)  # fmt: skip
def forward_kernel(
    input, target, second_target, lam, weight, class_scale, class_bias, class_margin, class_smoothing, sample_weight,
    row_gate, feature_norm, pair, pair_step, loss, state, partials, tickets, error,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    target_group: tl.int64, target_class: tl.int64, target_row: tl.int64,
    ignore_index: tl.int64, reduction: tl.int32, empty_zero: tl.int32, off_target: tl.int32,
    focal_weighted: tl.int32, focal_detached: tl.int32, threshold: tl.int64, seed: tl.int64,
    label_smoothing: tl.float64, scale: tl.float64, focal_gamma: tl.float64, z_loss: tl.float64,
    influence_alpha: tl.float64, influence_eps: tl.float64, pair_p: tl.float64, pair_q: tl.float64,
    log_eps: tl.float64, share: tl.float64, margin: tl.float64,
    SMOOTHING: tl.constexpr, MARGIN: tl.constexpr, PAIR: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Row losses, states, and by the last program the loss. ONE: a tile holds whole rows (K L >= classes)."""
    T: tl.constexpr = state.dtype.element_ty
    TWO: tl.constexpr = second_target is not None
    NOTHING: tl.constexpr = -float("inf")
    s = tl.full((), scale, T)
    p = tl.full((), pair_p, T)
    q = tl.full((), pair_q, T)
    rows = (groups * inner).to(tl.int64)
    centers, of_gate, inverse_denominator = _behind_rows(state, rows, row_gate, TWO, PAIR)
    all_columns = tile_columns(K, L)
    if ONE:  # every tile has the same classes
        inside = are_classes(all_columns, classes, UNIT, VEC)
        a, b, w, ws = tables(weight, class_scale, class_bias, all_columns, inside, T)
    first, last, blocks = share_of_tiles(tl.program_id(0), tl.num_programs(0), groups, inner, R)

    for tile in range(first, last):
        group, place, exists, row = rows_of_tile(tile, blocks, inner, UNIT, VEC, R)
        offsets = row_offsets(group, place, target_group, target_row)
        y, _ = used_labels(target, offsets, exists, classes, ignore_index)
        highest_label = y
        if TWO:
            second_y, _ = used_labels(second_target, offsets, exists, classes, ignore_index)
            highest_label = tl.maximum(y, second_y)
        end = K * L
        if not ONE:  # of long rows, what nobody asks for is not read: that is worth waiting for the labels
            end = tl.where(tl.max(highest_label, 0) >= 0, classes, 0)
        gate = tl.zeros((R,), T)
        if row_gate is not None:
            gate = tl.load(row_gate + row, mask=exists, other=0.0)
        log_count = log_counts_at(pair, y, PAIR, T)
        center = log_count
        if PAIR == SEESAW:
            center = seesaw_center(
                input, weight, class_scale, class_bias, row_gate, group, place, exists, y, gate, end, classes,
                input_group, input_class, input_row, s, tl.full((), log_eps, T), T, UNIT, VEC, K, R, L,
            )  # fmt: skip
            tl.store(centers + row, center, mask=exists)
        # The maximum of every lane so far, and its sums relative to that.
        top = tl.full((R, 1) if ONE else (R, L), NOTHING, T)
        total = tl.zeros((R, L), T)
        smooth_total, smooth_distance = total, total
        for start in range(0, end, K * L):
            columns = start + all_columns
            if not ONE:
                inside = are_classes(columns, classes, UNIT, VEC)
                a, b, w, ws = tables(weight, class_scale, class_bias, columns, inside, T)
            x = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
            x = tl.load(x, mask=inside & of_rows(exists), other=NOTHING).to(T)
            u = adjusted_by_row(x, a, b, of_rows(gate), class_scale, class_bias, row_gate, s)
            u = with_pair(
                u, columns, inside, y, row, log_count, center, pair, pair_step, classes, p, q, threshold, seed, PAIR
            )  # fmt: skip
            at_label = columns == of_rows(y)
            if TWO:
                at_label = at_label | (columns == of_rows(second_y))
            u = tl.where(at_label, NOTHING, u)  # out of maximum and sum; finish_rows adds it
            top, total, reference, rise = add_exponentials(top, total, u, LOG2_E, ONE)
            if SMOOTHING:
                below = tl.where(u == NOTHING, float("inf"), of_lanes(reference) - u)
                smooth_total, smooth_distance = add(
                    smooth_total, smooth_distance, tl.where(at_label, 0.0, ws), below, rise
                )  # fmt: skip

        highest, sum_of_row, climb = over_lanes(top, total, LOG2_E, ONE)
        put(state, row, exists, 0, highest, 4)
        put(state, row, exists, 1, sum_of_row, 4)
        if SMOOTHING:
            put(state, row, exists, 2, tl.sum(smooth_total, 1), 4)
            put(state, row, exists, 3, tl.sum(smooth_distance + weighted(smooth_total, climb), 1), 4)

    tl.debug_barrier()  # the sums are read by other threads than wrote them
    loss_sum, weight_sum, second_loss_sum, second_weight_sum = finish_rows(
        input, target, second_target, lam, weight, class_scale, class_bias, class_margin, class_smoothing,
        sample_weight, row_gate, feature_norm, pair, loss, state, error,
        first // blocks * inner + first % blocks * R, last // blocks * inner + last % blocks * R, rows,
        classes, inner, input_group, input_class, input_row, target_group, target_row, ignore_index, reduction,
        off_target, focal_weighted, focal_detached, tl.full((), label_smoothing, T), s,
        tl.full((), focal_gamma, T), tl.full((), z_loss, T), tl.full((), influence_alpha, T),
        tl.full((), influence_eps, T), share, margin, SMOOTHING, MARGIN, PAIR,
    )  # fmt: skip
    if row_gate is not None:
        tl.debug_barrier()
        _gate_gradients(
            input, target, second_target, weight, class_scale, class_bias, row_gate, pair, pair_step, state, of_gate,
            centers, first, last, blocks, rows, classes, inner, input_group, input_class, input_row, target_group,
            target_row, ignore_index, s, p, q, threshold, seed, SMOOTHING, PAIR, UNIT, VEC, K, R, L,
        )  # fmt: skip
    if TWO:
        finish_batch(
            loss, inverse_denominator, loss_sum, weight_sum, partials, tickets, reduction, empty_zero,
            second_loss_sum, second_weight_sum,
        )  # fmt: skip
    else:
        finish_batch(loss, inverse_denominator, loss_sum, weight_sum, partials, tickets, reduction, empty_zero)
        if tl.program_id(0) == 0:
            tl.store(inverse_denominator + 1, 1.0)


# --- Backward ---


@triton.jit(
    do_not_specialize=[
        "classes", "groups", "inner", "input_group", "input_class", "input_row", "target_group", "target_class",
        "target_row", "out_group", "out_class", "out_row", "grad_group", "grad_row", "ignore_index", "threshold",
        "seed",
    ],
    do_not_specialize_on_alignment=[
        "grad", "state", "input", "target", "second_target", "class_margin", "row_gate", "pair", "pair_step", "d_input",
        "d_scale", "d_bias", "d_gate", "partials", "tickets", "error",
    ],
)  # fmt: skip
def backward_kernel(
    grad, state, input, target, second_target, weight, class_scale, class_bias, class_margin, row_gate, pair, pair_step,
    d_input, d_scale, d_bias, d_gate, partials, tickets, error,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    target_group: tl.int64, target_class: tl.int64, target_row: tl.int64,
    out_group: tl.int64, out_class: tl.int64, out_row: tl.int64, grad_group: tl.int64, grad_row: tl.int64,
    ignore_index: tl.int64, threshold: tl.int64, seed: tl.int64,
    scale: tl.float64, pair_p: tl.float64, pair_q: tl.float64, margin: tl.float64,
    SMOOTHING: tl.constexpr, MARGIN: tl.constexpr, PAIR: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The gradients that are not None."""
    T: tl.constexpr = state.dtype.element_ty
    TWO: tl.constexpr = second_target is not None
    SUMS: tl.constexpr = d_scale is not None or d_bias is not None
    NOTHING: tl.constexpr = -float("inf")
    s = tl.full((), scale, T)
    p = tl.full((), pair_p, T)
    q = tl.full((), pair_q, T)
    rows = (groups * inner).to(tl.int64)
    centers, of_gate, inverse_denominator = _behind_rows(state, rows, row_gate, TWO, PAIR)
    inverse = inverse_of(inverse_denominator, error)
    if TWO:
        second_inverse = inverse_of(inverse_denominator + 1, error)
    chunk, split, splits, columns, inside = chunk_of_classes(classes, UNIT, VEC, K, L)
    a, b, _, ws = tables(weight, class_scale, class_bias, columns, inside, T)
    bias_sum = no_logits(K, R, L, T)
    scale_sum = no_logits(K, R, L, T)
    first, last, blocks = share_of_tiles(split, splits, groups, inner, R)
    for tile in range(first, last):
        group, place, exists, row = rows_of_tile(tile, blocks, inner, UNIT, VEC, R)
        offsets = row_offsets(group, place, target_group, target_row)
        y, used = used_labels(target, offsets, exists, classes, ignore_index)
        read = used
        if TWO:
            second_y, second_used = used_labels(second_target, offsets, exists, classes, ignore_index)
            read = used | second_used
        gate = tl.zeros((R,), T)
        if row_gate is not None:
            gate = tl.load(row_gate + row, mask=exists, other=0.0)
        log_count = log_counts_at(pair, y, PAIR, T)
        center = log_count
        if PAIR == SEESAW:
            center = tl.load(centers + row, mask=exists, other=0.0)
        upstream = tl.load(grad + row_offsets(group, place, grad_group, grad_row), mask=read, other=0.0)
        upstream = tl.where(read, upstream.to(T), 0.0)
        if d_gate is not None:
            if chunk == 0:
                d = tl.where(used, inverse * tl.load(of_gate + row, mask=used, other=0.0), 0.0)
                if TWO:
                    of_second = tl.load(of_gate + rows + row, mask=second_used, other=0.0)
                    d += tl.where(second_used, second_inverse * of_second, 0.0)
                tl.store(d_gate + row, upstream * d, mask=exists)

        # Rows that are ignored are not read but where that would narrow the accesses: e^-inf = 0, whatever they hold.
        mask = inside & of_rows(exists if UNIT == _ROWS else read)
        x = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
        x = tl.load(x, mask=mask, other=NOTHING).to(T)
        if UNIT == _ROWS:
            x = tl.where(of_rows(read), x, NOTHING)
        u = adjusted_by_row(x, a, b, of_rows(gate), class_scale, class_bias, row_gate, s)
        u = with_pair(
            u, columns, inside, y, row, log_count, center, pair, pair_step, classes, p, q, threshold, seed, PAIR
        )  # fmt: skip
        top, probability, factor, rest = state_of(state, row, used)
        c = tl.where(used, s * inverse * upstream, 0.0)  # without any label of a kind, its inverse is infinite
        rest *= c
        at_label = columns == of_rows(y)
        d = without_label(u, ws, top, probability * c, factor * c, SMOOTHING)
        d = tl.where(at_label, of_rows(rest), d)
        if TWO:
            top, probability, factor, second_rest = state_of(state + rows * 4, row, second_used)
            c = tl.where(second_used, s * second_inverse * upstream, 0.0)
            second_rest *= c
            at_second = columns == of_rows(second_y)
            second = without_label(u, ws, top, probability * c, factor * c, SMOOTHING)
            d += tl.where(at_second, of_rows(second_rest), second)
        # d is s dl/du. A margin on the angle has a slope for its label's share, and moves what class_scale multiplies.
        of_logit = d
        of_scale = tl.where(x == NOTHING, 0.0, d * x)  # a masked logit does not depend on the class's scale
        if MARGIN > 0:
            moved, slope = arc_of_label(
                input, class_margin, group, place, y, input_group, input_class, input_row, margin, MARGIN == 2, T
            )  # fmt: skip
            of_logit += tl.where(at_label, of_rows(rest * (slope - 1.0)), 0.0)
            of_scale += tl.where(at_label, of_rows(rest) * (of_rows(moved) - x), 0.0)
            if TWO:
                moved, slope = arc_of_label(
                    input, class_margin, group, place, second_y, input_group, input_class, input_row, margin,
                    MARGIN == 2, T,
                )  # fmt: skip
                of_logit += tl.where(at_second, of_rows(second_rest * (slope - 1.0)), 0.0)
                of_scale += tl.where(at_second, of_rows(second_rest) * (of_rows(moved) - x), 0.0)
        factor_of_x = a
        if row_gate is not None:
            if class_scale is not None:
                factor_of_x = 1.0 + of_rows(gate) * a
            d *= of_rows(gate)
            of_scale *= of_rows(gate)
        if d_bias is not None:
            bias_sum += d
        if d_scale is not None:
            scale_sum += of_scale
        if d_input is not None:
            out = pointers(d_input, group, place, columns, out_group, out_class, out_row, UNIT, VEC)
            of_logit = of_logit if class_scale is None else factor_of_x * of_logit
            tl.store(out, of_logit.to(d_input.dtype.element_ty), mask=inside & of_rows(exists))

    if SUMS:
        finish_class_sums(
            bias_sum, scale_sum, d_bias, d_scale, partials, tickets, chunk, split, splits, columns, inside, classes, R
        )

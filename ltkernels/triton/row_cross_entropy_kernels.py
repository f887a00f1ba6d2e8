"""The kernels of row_cross_entropy.py.

They go over the rows as those of cross_entropy_kernels.py do, with what depends on the row added to a tile's logits.

**Forward.** For seesaw first the log-sum-exp of the rows, which its pair term needs: of a short row the second read is
from the cache. Then the sums over all classes but the rows' labels, from which a thread finishes a row: with two
labels, each has a softmax of its own, which the other enters as any class. A gate's gradient is a product with the
gradient of the logits, so it takes another sweep; its program has the rows' states by then.

**Backward.** Elementwise, an exponential for each label. The seesaw term needs the label's logit everywhere in a row;
since another program may already have written the gradient over it, the forward leaves what follows from it
(``_seesaw_center``) where the other backends keep the log-sum-exp.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ltkernels.triton.philox import philox
from ltkernels.triton.row_loss import arc_cosine, finish_label_row, weighted
from ltkernels.triton.sums import (
    ABSENT_CLASS,
    FINISHED,
    FOREIGN_STATE,
    LOG2_E,
    OUT_OF_RANGE,
    add,
    add_splits,
    classes_reached,
    finish_batch,
    get,
    labels,
    put,
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

_TABLE, _SEESAW, _DROP = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # ops/options.py: PairTerm
_CLASS_DROPS = tl.constexpr(4)  # csrc/common/philox.h


# --- What a row adds to its logits ---


@triton.jit
def _used_labels(target, offsets, exists, classes, ignore_index):
    """Labels as int32, -1 where there is none to find in the row, and the rows that are not ignored."""
    y, ignored, known = labels(target, offsets, exists, classes, ignore_index)
    return tl.where(exists & known & ~ignored, y, -1).to(tl.int32), exists & ~ignored


@triton.jit
def _adjusted(x, a, b, gate, class_scale, class_bias, row_gate, scale):
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
def _log_counts_at(pair, y, PAIR: tl.constexpr, T: tl.constexpr):
    """Seesaw's log n of the labels."""
    counts = tl.zeros(y.shape, T)
    if PAIR == _SEESAW:
        counts = tl.load(pair + y, mask=y >= 0, other=0.0)
    return counts


@triton.jit
def _with_pair(
    u, columns, inside, y, row, log_count, center, pair, pair_step, classes, p, q, threshold, seed, PAIR: tl.constexpr
):
    """A tile's logits with the terms of the pairs of label and class; ``y``, ``row`` and so on are of the rows."""
    if PAIR == _TABLE:
        start = of_rows(tl.maximum(y, 0).to(tl.int64) * classes)
        u += tl.load(pair + start + columns, mask=inside & of_rows(y >= 0), other=0.0)
    elif PAIR == _SEESAW:
        rarer = tl.load(pair + columns, mask=inside, other=0.0) - of_rows(log_count)
        above = u - of_rows(center)
        term = tl.where(rarer < 0, p * rarer, 0.0) + tl.where(above > 0, q * above, 0.0)
        u = tl.where(columns == of_rows(y), u, u + term)
    elif PAIR == _DROP:
        rare = tl.load(pair + columns, mask=inside, other=0.0) != 0
        position = of_rows(row.to(tl.int64) * ((classes + 3) // 4)) + columns // 4
        r0, r1, r2, r3 = philox(position, tl.load(pair_step).to(tl.uint32), _CLASS_DROPS, tl.full((), seed, tl.int64))
        place = columns % 4
        word = tl.where(place < 2, tl.where(place == 0, r0, r1), tl.where(place == 2, r2, r3))
        dropped = rare & (word.to(tl.int64) < threshold) & (columns != of_rows(y))
        u = tl.where(dropped, -float("inf"), u)
    return u


# --- Forward ---


@triton.jit
def _seesaw_center(
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
        z = _adjusted(x, a, b, of_rows(gate), class_scale, class_bias, row_gate, scale)
        higher = tl.maximum(top, lane_max(z))
        reference = tl.where(higher == NOTHING, 0.0, higher)
        rise = tl.where(top == NOTHING, 0.0, reference - top)
        total = total * tl.exp2(-rise * LOG2_E) + lane_sum(tl.exp2((z - of_lanes(reference)) * LOG2_E))
        top = higher
    highest = tl.max(top, 1)
    climb = tl.where(top == NOTHING, 0.0, highest[:, None] - top)
    log_sum = highest + tl.log(tl.sum(total * tl.exp2(-climb * LOG2_E), 1))
    _, z, _, _, _, _ = _at_labels(
        input, weight, class_scale, class_bias, None, row_gate, None, group, place, y, y >= 0, gate, classes,
        input_group, input_class, input_row, scale, 0.0, 0, 0, T,
    )  # fmt: skip
    return log_sum + tl.maximum(z - log_sum, log_eps)


@triton.jit
def _at_labels(
    input, weight, class_scale, class_bias, class_margin, row_gate, pair, group, place, y, used, gate, classes,
    input_group, input_class, input_row, scale, margin, MARGIN: tl.constexpr, PAIR: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Of the rows' labels: logits with margins and without, weights, ws, and which classes are not there."""
    NOTHING: tl.constexpr = -float("inf")
    at = input + group.to(tl.int64) * input_group + place.to(tl.int64) * input_row + y.to(tl.int64) * input_class
    x = tl.load(at, mask=used, other=0.0).to(T)
    a, b, w, ws = tables(weight, class_scale, class_bias, y, used, T)
    u = _adjusted(x, a, b, gate, class_scale, class_bias, row_gate, scale)
    m = tl.zeros(y.shape, T) + tl.full((), margin, T)
    if class_margin is not None:
        m = tl.load(class_margin + y, mask=used, other=0.0)
    moved = u
    if MARGIN == 0:
        moved = u - scale * m
    else:
        phi, _ = arc_cosine(x, m, MARGIN == 2)
        moved = _adjusted(phi, a, b, gate, class_scale, class_bias, row_gate, scale)
    if PAIR == _TABLE:
        diagonal = tl.load(pair + y.to(tl.int64) * (classes + 1), mask=used, other=0.0)
        moved += diagonal
        u += diagonal
    absent = tl.zeros(y.shape, tl.int1)
    if class_bias is not None:
        absent = used & (b == NOTHING)
    return moved, u, w, ws, absent, x


@triton.jit
def _finish_label(
    u, w, y, other_u, other_ws, top, total, smooth_total, smooth_distance, norm, class_smoothing, row_weight, used,
    wrong, reached, label_smoothing, off_target, gamma, z, focal_weighted, focal_detached, influence_alpha,
    influence_eps, feature_norm, SMOOTHING: tl.constexpr, TWO: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Loss and state of one label of each row, from the sums over the classes that are no label of it."""
    NOTHING: tl.constexpr = -float("inf")
    raised = tl.maximum(u, top)
    if TWO:
        raised = tl.maximum(raised, other_u)
    rise = tl.where(top == NOTHING, 0.0, raised - top)
    others = total * tl.exp2(-rise * LOG2_E)
    if TWO:
        others += tl.exp2((other_u - raised) * LOG2_E)
    at_label = tl.exp2((u - raised) * LOG2_E)
    below = raised - u
    eps = tl.zeros(u.shape, T)
    soft = eps
    if SMOOTHING:
        smooth_distance += weighted(smooth_total, rise) + weighted(w, below)
        smooth_total += w
        if TWO:
            smooth_distance += weighted(other_ws, raised - other_u)
            smooth_total += other_ws
        eps += label_smoothing
        if class_smoothing is not None:
            eps = tl.load(class_smoothing + y, mask=used & (wrong == 0), other=0.0)
        eps = tl.where(off_target != 0, tl.where(reached > 1, eps * reached / tl.maximum(reached - 1, 1.0), 0.0), eps)
        soft = eps / reached
    value, probability, factor, rest = finish_label_row(
        raised, others, at_label, below, smooth_distance, smooth_total, w, w, row_weight, eps, soft, gamma, z,
        focal_weighted, focal_detached, None if feature_norm is None else norm, influence_alpha, influence_eps,
    )  # fmt: skip
    without = ~used | (wrong > 0)
    nothing = tl.where(wrong > 0, float("nan"), 0.0).to(T)
    return (
        tl.where(without, nothing, value), tl.where(without, nothing, raised), tl.where(without, nothing, probability),
        tl.where(without, nothing, factor * soft), tl.where(without, nothing, rest),
    )  # fmt: skip


@triton.jit
def _put_state(state, row, exists, top, probability, factor, rest):
    put(state, row, exists, 0, top, 4)
    put(state, row, exists, 1, probability, 4)
    put(state, row, exists, 2, factor, 4)
    put(state, row, exists, 3, rest, 4)


@triton.jit
def _finish_rows(
    input, target, second_target, lam, weight, class_scale, class_bias, class_margin, class_smoothing, sample_weight,
    row_gate, feature_norm, pair, loss, state, error, begin, end, rows, classes, inner,
    input_group, input_class, input_row, target_group, target_row, ignore_index, reduction, off_target,
    focal_weighted, focal_detached, label_smoothing, scale, gamma, z, influence_alpha, influence_eps, share, margin,
    SMOOTHING: tl.constexpr, MARGIN: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """Losses and states of the rows [begin, end), a row a thread; returns each label's sums of losses and weights."""
    T: tl.constexpr = state.dtype.element_ty
    TWO: tl.constexpr = second_target is not None
    NOTHING: tl.constexpr = -float("inf")
    reached = classes_reached(class_bias if SMOOTHING else None, classes, T)
    loss_sum = tl.zeros((FINISHED,), tl.float64)
    weight_sum = loss_sum
    second_loss_sum = loss_sum
    second_weight_sum = loss_sum
    for start in range(begin, end, FINISHED):
        row = start + tl.arange(0, FINISHED)
        exists = row < end
        r = tl.full((FINISHED,), 1.0, T)
        if sample_weight is not None:
            r = tl.load(sample_weight + row, mask=exists, other=0.0)
        gate = r
        if row_gate is not None:
            gate = tl.load(row_gate + row, mask=exists, other=0.0)
        norm = r
        if feature_norm is not None:
            norm = tl.load(feature_norm + row, mask=exists, other=0.0)
        top = get(state, row, exists, 0, 4)
        total = get(state, row, exists, 1, 4)
        smooth_total = tl.zeros((FINISHED,), T)
        smooth_distance = smooth_total
        if SMOOTHING:
            smooth_total = get(state, row, exists, 2, 4)
            smooth_distance = get(state, row, exists, 3, 4)
        group = (row // inner).to(tl.int64)
        place = (row % inner).to(tl.int64)
        offsets = group * target_group + place * target_row
        y, used = _used_labels(target, offsets, exists, classes, ignore_index)
        u, plain, w, ws, absent, _ = _at_labels(
            input, weight, class_scale, class_bias, class_margin, row_gate, pair, group, place, y, y >= 0, gate,
            classes, input_group, input_class, input_row, scale, margin, MARGIN, PAIR, T,
        )  # fmt: skip
        wrong = tl.where(absent, ABSENT_CLASS, tl.where(used & (y < 0), OUT_OF_RANGE, 0))
        shared = r
        other_u = u
        other_ws = ws
        if TWO:
            second_y, second_used = _used_labels(second_target, offsets, exists, classes, ignore_index)
            second_u, second_plain, second_w, second_ws, absent, _ = _at_labels(
                input, weight, class_scale, class_bias, class_margin, row_gate, pair, group, place, second_y,
                second_y >= 0, gate, classes, input_group, input_class, input_row, scale, margin, MARGIN, PAIR, T,
            )  # fmt: skip
            second_wrong = tl.where(absent, ABSENT_CLASS, tl.where(second_used & (second_y < 0), OUT_OF_RANGE, 0))
            of_first = tl.zeros((FINISHED,), T) + tl.full((), share, T)
            if lam is not None:
                of_first = tl.load(lam + row, mask=exists, other=0.0)
            shared = r * of_first
            # The other label joins a label's softmax as a plain class, if it is another.
            joins = (second_y >= 0) & (second_y != y)
            other_u = tl.where(joins, second_plain, NOTHING)
            other_ws = tl.where(joins, second_ws, 0.0)
        value, top_of, probability, factor, rest = _finish_label(
            u, w, y, other_u, other_ws, top, total, smooth_total, smooth_distance, norm, class_smoothing, shared, used,
            wrong, reached, label_smoothing, off_target, gamma, z, focal_weighted, focal_detached, influence_alpha,
            influence_eps, feature_norm, SMOOTHING, TWO, T,
        )  # fmt: skip
        _put_state(state, row, exists, top_of, probability, factor, rest)
        tl.store(error + tl.zeros_like(row), wrong, mask=wrong > 0)
        loss_sum += tl.where(exists, value, 0.0).to(tl.float64)
        counted = tl.where((wrong > 0) | (reduction == 3), 1.0, r * w)
        weight_sum += tl.where(used, counted, 0.0).to(tl.float64)
        if TWO:
            joins = (y >= 0) & (second_y != y)
            other_u = tl.where(joins, plain, NOTHING)
            other_ws = tl.where(joins, ws, 0.0)
            second_value, top_of, probability, factor, rest = _finish_label(
                second_u, second_w, second_y, other_u, other_ws, top, total, smooth_total, smooth_distance, norm,
                class_smoothing, r * (1.0 - of_first), second_used, second_wrong, reached, label_smoothing, off_target,
                gamma, z, focal_weighted, focal_detached, influence_alpha, influence_eps, feature_norm, SMOOTHING, TWO,
                T,
            )  # fmt: skip
            _put_state(state + rows * 4, row, exists, top_of, probability, factor, rest)
            tl.store(error + tl.zeros_like(row), second_wrong, mask=second_wrong > 0)
            second_loss_sum += tl.where(exists, second_value, 0.0).to(tl.float64)
            counted = tl.where((second_wrong > 0) | (reduction == 3), 1.0, r * second_w)
            second_weight_sum += tl.where(second_used, counted, 0.0).to(tl.float64)
            value += second_value
        if reduction == 0:
            tl.store(loss + row, value, mask=exists)
    return tl.sum(loss_sum), tl.sum(weight_sum), tl.sum(second_loss_sum), tl.sum(second_weight_sum)


@triton.jit
def _state_of(state, row, used):
    """Maximum, factor of ``e^(u - maximum)``, factor of ws and dl/du_y; nothing of a label that is not used."""
    top = tl.load(state + row.to(tl.int64) * 4, mask=used, other=float("inf"))  # e^-inf = 0
    return top, get(state, row, used, 1, 4), get(state, row, used, 2, 4), get(state, row, used, 3, 4)


@triton.jit
def _without_label(u, ws, top, probability, factor, SMOOTHING: tl.constexpr):
    """dl/du of the classes that are not the label, for a tile of u."""
    d = of_rows(probability) * tl.exp2((u - of_rows(top)) * LOG2_E)
    if SMOOTHING:
        d -= of_rows(factor) * ws
    return d


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
        group = tile // blocks
        place = tile % blocks * R + tl.arange(0, R)
        exists = are_rows(place, inner, UNIT, VEC)
        row = group * inner + place
        offsets = group.to(tl.int64) * target_group + place.to(tl.int64) * target_row
        y, used = _used_labels(target, offsets, exists, classes, ignore_index)
        top, probability, factor, rest = _state_of(state, row, used)
        read = used
        if second_target is not None:
            second_y, second_used = _used_labels(second_target, offsets, exists, classes, ignore_index)
            second_top, second_probability, second_factor, second_rest = _state_of(state + rows * 4, row, second_used)
            read = used | second_used
        gate = tl.load(row_gate + row, mask=exists, other=0.0)
        log_count = _log_counts_at(pair, y, PAIR, T)
        center = log_count
        if PAIR == _SEESAW:
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
            u = _adjusted(x, a, b, of_rows(gate), class_scale, class_bias, row_gate, scale)
            u = _with_pair(
                u, columns, inside, y, row, log_count, center, pair, pair_step, classes, p, q, threshold, seed, PAIR
            )  # fmt: skip
            v = x * 0.0 if class_scale is None else x * a
            if class_bias is not None:
                v += b
            v = tl.where(x == NOTHING, 0.0, v)
            d = _without_label(u, ws, top, probability, factor, SMOOTHING)
            total += lane_sum(v * tl.where(columns == of_rows(y), of_rows(rest), d))
            if second_target is not None:
                d = _without_label(u, ws, second_top, second_probability, second_factor, SMOOTHING)
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
    centers = state + rows * (8 if TWO else 4)
    of_gate = centers + (rows if PAIR == _SEESAW else 0)
    inverse_denominator = of_gate
    if row_gate is not None:
        inverse_denominator += rows * (2 if TWO else 1)
    all_columns = tile_columns(K, L)
    if ONE:  # every tile has the same classes
        inside = are_classes(all_columns, classes, UNIT, VEC)
        a, b, w, ws = tables(weight, class_scale, class_bias, all_columns, inside, T)
    blocks = tl.cdiv(inner, R)
    part = tl.cdiv(groups * blocks, tl.num_programs(0))
    first = tl.program_id(0) * part
    last = tl.minimum(first + part, groups * blocks)

    for tile in range(first, last):
        group = tile // blocks
        place = tile % blocks * R + tl.arange(0, R)
        exists = are_rows(place, inner, UNIT, VEC)
        row = group * inner + place
        offsets = group.to(tl.int64) * target_group + place.to(tl.int64) * target_row
        y, _ = _used_labels(target, offsets, exists, classes, ignore_index)
        highest_label = y
        if TWO:
            second_y, _ = _used_labels(second_target, offsets, exists, classes, ignore_index)
            highest_label = tl.maximum(y, second_y)
        end = K * L
        if not ONE:  # of long rows, what nobody asks for is not read: that is worth waiting for the labels
            end = tl.where(tl.max(highest_label, 0) >= 0, classes, 0)
        gate = tl.zeros((R,), T)
        if row_gate is not None:
            gate = tl.load(row_gate + row, mask=exists, other=0.0)
        log_count = _log_counts_at(pair, y, PAIR, T)
        center = log_count
        if PAIR == _SEESAW:
            center = _seesaw_center(
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
            u = _adjusted(x, a, b, of_rows(gate), class_scale, class_bias, row_gate, s)
            u = _with_pair(
                u, columns, inside, y, row, log_count, center, pair, pair_step, classes, p, q, threshold, seed, PAIR
            )  # fmt: skip
            at_label = columns == of_rows(y)
            if TWO:
                at_label = at_label | (columns == of_rows(second_y))
            u = tl.where(at_label, NOTHING, u)  # out of maximum and sum; _finish_rows adds it
            higher = lane_max(u)
            higher = tl.max(higher, 1)[:, None] if ONE else tl.maximum(top, higher)
            reference = tl.where(higher == NOTHING, 0.0, higher)  # -inf - -inf is NaN
            rise = tl.where(top == NOTHING, 0.0, reference - top)
            e = lane_sum(tl.exp2((u - of_lanes(reference)) * LOG2_E))
            total = e if ONE else total * tl.exp2(-rise * LOG2_E) + e
            if SMOOTHING:
                below = tl.where(u == NOTHING, float("inf"), of_lanes(reference) - u)
                smooth_total, smooth_distance = add(
                    smooth_total, smooth_distance, tl.where(at_label, 0.0, ws), below, rise
                )  # fmt: skip
            top = higher

        # Over the lanes.
        highest = tl.max(top, 1)
        climb = tl.where(top == NOTHING, 0.0, highest[:, None] - top)
        put(state, row, exists, 0, highest, 4)
        put(state, row, exists, 1, tl.sum(total if ONE else total * tl.exp2(-climb * LOG2_E), 1), 4)
        if SMOOTHING:
            put(state, row, exists, 2, tl.sum(smooth_total, 1), 4)
            put(state, row, exists, 3, tl.sum(smooth_distance + weighted(smooth_total, climb), 1), 4)

    tl.debug_barrier()  # the sums are read by other threads than wrote them
    loss_sum, weight_sum, second_loss_sum, second_weight_sum = _finish_rows(
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


@triton.jit
def _inverse_of(inverse_denominator, error):
    inverse = tl.load(inverse_denominator)
    if inverse < 0:  # the state of the reference, which keeps nothing there
        tl.store(error, FOREIGN_STATE)
        inverse = inverse * float("nan")
    return inverse


@triton.jit
def _arc_of_label(
    input, class_margin, group, place, y, input_group, input_class, input_row, margin, straight_through,
    T: tl.constexpr,
):  # fmt: skip
    """The cosine moved by the margin, and the slope.

    Where the gradient is written over the logits, only the chunk that holds the label uses this, and reads it in time.
    """
    at = input + group.to(tl.int64) * input_group + place.to(tl.int64) * input_row + y.to(tl.int64) * input_class
    m = tl.zeros(y.shape, T) + tl.full((), margin, T)
    if class_margin is not None:
        m = tl.load(class_margin + y, mask=y >= 0, other=0.0)
    return arc_cosine(tl.load(at, mask=y >= 0, other=0.0).to(T), m, straight_through)


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
    """The gradients that are not None. Programs are numbered chunks of classes first, then splits of the rows."""
    T: tl.constexpr = state.dtype.element_ty
    TWO: tl.constexpr = second_target is not None
    SUMS: tl.constexpr = d_scale is not None or d_bias is not None
    NOTHING: tl.constexpr = -float("inf")
    s = tl.full((), scale, T)
    p = tl.full((), pair_p, T)
    q = tl.full((), pair_q, T)
    rows = (groups * inner).to(tl.int64)
    centers = state + rows * (8 if TWO else 4)
    of_gate = centers + (rows if PAIR == _SEESAW else 0)
    inverse_denominator = of_gate
    if row_gate is not None:
        inverse_denominator += rows * (2 if TWO else 1)
    inverse = _inverse_of(inverse_denominator, error)
    if TWO:
        second_inverse = _inverse_of(inverse_denominator + 1, error)
    chunks = tl.cdiv(classes, K * L)
    chunk = tl.program_id(0) % chunks
    split = tl.program_id(0) // chunks
    splits = tl.num_programs(0) // chunks
    columns = chunk * (K * L) + tile_columns(K, L)
    inside = are_classes(columns, classes, UNIT, VEC)
    a, b, _, ws = tables(weight, class_scale, class_bias, columns, inside, T)
    bias_sum = no_logits(K, R, L, T)
    scale_sum = no_logits(K, R, L, T)
    blocks = tl.cdiv(inner, R)
    part = tl.cdiv(groups * blocks, splits)
    first = split * part
    for tile in range(first, tl.minimum(first + part, groups * blocks)):
        group = tile // blocks
        place = tile % blocks * R + tl.arange(0, R)
        exists = are_rows(place, inner, UNIT, VEC)
        row = group * inner + place
        offsets = group.to(tl.int64) * target_group + place.to(tl.int64) * target_row
        y, used = _used_labels(target, offsets, exists, classes, ignore_index)
        read = used
        if TWO:
            second_y, second_used = _used_labels(second_target, offsets, exists, classes, ignore_index)
            read = used | second_used
        gate = tl.zeros((R,), T)
        if row_gate is not None:
            gate = tl.load(row_gate + row, mask=exists, other=0.0)
        log_count = _log_counts_at(pair, y, PAIR, T)
        center = log_count
        if PAIR == _SEESAW:
            center = tl.load(centers + row, mask=exists, other=0.0)
        upstream = tl.load(grad + group.to(tl.int64) * grad_group + place.to(tl.int64) * grad_row, mask=read, other=0.0)
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
        u = _adjusted(x, a, b, of_rows(gate), class_scale, class_bias, row_gate, s)
        u = _with_pair(
            u, columns, inside, y, row, log_count, center, pair, pair_step, classes, p, q, threshold, seed, PAIR
        )  # fmt: skip
        top, probability, factor, rest = _state_of(state, row, used)
        c = tl.where(used, s * inverse * upstream, 0.0)  # without any label of a kind, its inverse is infinite
        rest *= c
        at_label = columns == of_rows(y)
        d = _without_label(u, ws, top, probability * c, factor * c, SMOOTHING)
        d = tl.where(at_label, of_rows(rest), d)
        if TWO:
            top, probability, factor, second_rest = _state_of(state + rows * 4, row, second_used)
            c = tl.where(second_used, s * second_inverse * upstream, 0.0)
            second_rest *= c
            at_second = columns == of_rows(second_y)
            second = _without_label(u, ws, top, probability * c, factor * c, SMOOTHING)
            d += tl.where(at_second, of_rows(second_rest), second)
        # d is s dl/du. A margin on the angle has a slope for its label's share, and moves what class_scale multiplies.
        of_logit = d
        of_scale = tl.where(x == NOTHING, 0.0, d * x)  # a masked logit does not depend on the class's scale
        if MARGIN > 0:
            moved, slope = _arc_of_label(
                input, class_margin, group, place, y, input_group, input_class, input_row, margin, MARGIN == 2, T
            )  # fmt: skip
            of_logit += tl.where(at_label, of_rows(rest * (slope - 1.0)), 0.0)
            of_scale += tl.where(at_label, of_rows(rest) * (of_rows(moved) - x), 0.0)
            if TWO:
                moved, slope = _arc_of_label(
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

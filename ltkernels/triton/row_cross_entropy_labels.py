"""What the labels of rows come to in row_cross_entropy: losses and states, and from a state dl/du.

With two labels each has a softmax of its own, which the other enters as any class. The sums of a sweep are over the
classes that are no label of the row, so that both softmaxes are made of the same ones.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ltkernels.triton.row_adjustments import at_labels
from ltkernels.triton.row_loss import finish_label_row, weighted
from ltkernels.triton.sums import (
    ABSENT_CLASS,
    FINISHED,
    LOG2_E,
    OUT_OF_RANGE,
    classes_reached,
    get,
    put,
    used_labels,
)
from ltkernels.triton.tiles import of_rows, row_offsets


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
def finish_rows(
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
        group = row // inner
        place = row % inner
        offsets = row_offsets(group, place, target_group, target_row)
        y, used = used_labels(target, offsets, exists, classes, ignore_index)
        u, plain, w, ws, absent = at_labels(
            input, weight, class_scale, class_bias, class_margin, row_gate, pair, group, place, y, gate, classes,
            input_group, input_class, input_row, scale, margin, MARGIN, PAIR, T,
        )  # fmt: skip
        wrong = tl.where(absent, ABSENT_CLASS, tl.where(used & (y < 0), OUT_OF_RANGE, 0))
        shared = r
        other_u = u
        other_ws = ws
        if TWO:
            second_y, second_used = used_labels(second_target, offsets, exists, classes, ignore_index)
            second_u, second_plain, second_w, second_ws, absent = at_labels(
                input, weight, class_scale, class_bias, class_margin, row_gate, pair, group, place, second_y,
                gate, classes, input_group, input_class, input_row, scale, margin, MARGIN, PAIR, T,
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
def state_of(state, row, used):
    """Maximum, factor of ``e^(u - maximum)``, factor of ws and dl/du_y; nothing of a label that is not used."""
    top = tl.load(state + row.to(tl.int64) * 4, mask=used, other=float("inf"))  # e^-inf = 0
    return top, get(state, row, used, 1, 4), get(state, row, used, 2, 4), get(state, row, used, 3, 4)


@triton.jit
def without_label(u, ws, top, probability, factor, SMOOTHING: tl.constexpr):
    """dl/du of the classes that are not the label, for a tile of u."""
    d = of_rows(probability) * tl.exp2((u - of_rows(top)) * LOG2_E)
    if SMOOTHING:
        d -= of_rows(factor) * ws
    return d

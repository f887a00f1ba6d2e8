"""The kernels of binary_cross_entropy.py.

A term needs nothing of its neighbours, so every kernel is one visit of the logits. **Forward**: tiles along the rows,
whose losses are added up; where sums of columns are wanted, a launch before takes them: a program has a chunk of the
columns and walks down its share of the rows, and whoever is last of a chunk adds up, in the order of the shares.
**Backward**: elementwise. What a term costs, and its slope, is derived in csrc/common/binary_terms.h.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ltkernels.triton.philox import philox
from ltkernels.triton.row_loss import log1p, power
from ltkernels.triton.sums import FOREIGN_STATE, LOG2_E, OUT_OF_RANGE, add_splits, finish_batch, labels
from ltkernels.triton.tiles import (
    ROW_AXIS,
    are_classes,
    are_rows,
    lane_max,
    lane_sum,
    no_logits,
    of_rows,
    pointers,
    tile_columns,
)  # fmt: skip

_NEGATIVE_DROPS = tl.constexpr(5)  # csrc/common/philox.h


@triton.jit
def _negative(z, gamma, clip, FOCAL: tl.constexpr, CLIP: tl.constexpr):
    """What a negative with logit z costs, and the slope; a positive is that of -z."""
    e = tl.exp2(-tl.abs(z) * LOG2_E)
    share = 1.0 / (1.0 + e)
    up = z >= 0
    p = tl.where(up, share, e * share)
    rest = tl.where(up, e * share, share)
    if CLIP:
        q = p - clip
        none = q <= 0
        q = tl.where(none, 0.0, q)
        below = rest + clip
        nll = -tl.where(q <= 0.5, log1p(-tl.where(q <= 0.5, q, 0.0)), tl.log(below))
        slope = p * rest / below
        loss = nll
        if FOCAL:
            positive = tl.where(none, 1.0, q)
            factor = power(positive, gamma)
            slope = p * rest * factor * (1.0 / below + gamma * nll / positive)
            loss = factor * nll
        # NaN is neither below nor above.
        return tl.where(none, 0.0, loss) + (q - q), tl.where(none, 0.0, slope)
    else:
        softplus = tl.where(z > 0, z, 0.0) + log1p(e)
        if not FOCAL:
            return softplus, p
        else:
            factor = power(p, gamma)
            beside = tl.where(rest == 0, 0.0, rest * softplus)  # softplus may be infinite
            return factor * softplus, factor * (p + gamma * beside)


@triton.jit
def _masked(coefficient, value):
    """The product, where a coefficient of zero takes out an infinite value, but not NaN."""
    return tl.where((coefficient == 0) & (value > 1e30), 0.0, coefficient * value)


@triton.jit
def _has_positive(
    target, group, place, exists, classes, target_group, target_class, target_row,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Which rows of floating targets have one above zero ``[R]``."""
    most = tl.zeros((R, L), tl.float32)
    for start in range(0, classes, K * L):
        columns = start + tile_columns(K, L)
        inside = are_classes(columns, classes, UNIT, VEC)
        at = pointers(target, group, place, columns, target_group, target_class, target_row, UNIT, VEC)
        t = tl.load(at, mask=inside & of_rows(exists), other=0.0)
        most = tl.maximum(most, lane_max((t > 0).to(tl.float32)))
    return tl.max(most, 1) > 0


@triton.jit
def _rows(
    target, weight, sample_weight, foreground_keep, background_keep, group, place, exists, classes, inner,
    target_group, target_class, target_row, ignore_index, background_index, HOT: tl.constexpr, T: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Of the rows at ``place`` ``[R]``: positive columns or -1, factors, which are background, used, and wrong."""
    row = group.to(tl.int64) * inner + place
    factor = tl.full((R,), 1.0, T)
    if sample_weight is not None:
        factor = tl.load(sample_weight + row, mask=exists, other=0.0)
    used = exists
    wrong = exists & (factor != factor) & False
    background = wrong
    y = tl.full((R,), -1, tl.int32)
    if HOT:
        if (foreground_keep is not None) or (background_keep is not None):
            background = ~_has_positive(
                target, group, place, exists, classes, target_group, target_class, target_row, UNIT, VEC, K, R, L
            )
    else:
        offsets = group.to(tl.int64) * target_group + place.to(tl.int64) * target_row
        label, ignored, known = labels(target, offsets, exists, classes, ignore_index)
        used = exists & ~ignored
        background = used & (label == background_index) & (label >= 0)
        wrong = used & ~known & ~background
        known = used & known
        y = tl.where(known, label, -1).to(tl.int32)
        if weight is not None:
            factor *= tl.load(weight + tl.where(known, label, 0), mask=known, other=1.0)
        factor = tl.where(wrong, float("nan"), factor)
    return y, factor, background, used, wrong


@triton.jit
def _elements(
    target, pos_weight, neg_weight, foreground_keep, background_keep, draw_step, x, columns, inside, row, group, place,
    exists, y, factor, background, classes, target_group, target_class, target_row, alpha_pos, alpha_neg, gamma_pos,
    gamma_neg, clip, score_logit, seed, HOT: tl.constexpr, FOCAL_POS: tl.constexpr, FOCAL_NEG: tl.constexpr,
    CLIP: tl.constexpr, SCORED: tl.constexpr, ROW_DRAWS: tl.constexpr, T: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Losses, and the sizes of the derivatives of positive and negative terms, of a tile."""
    at_label = columns == of_rows(y)
    if HOT:
        at = pointers(target, group, place, columns, target_group, target_class, target_row, UNIT, VEC)
        t = tl.load(at, mask=inside & of_rows(exists), other=0.0).to(T)
    else:
        t = at_label.to(T)
    positive = of_rows(factor * tl.full((), alpha_pos, T)) * t
    negative = of_rows(factor * tl.full((), alpha_neg, T)) * (1.0 - t)
    if pos_weight is not None:
        positive *= tl.load(pos_weight + columns, mask=inside, other=0.0)
    if neg_weight is not None:
        negative *= tl.load(neg_weight + columns, mask=inside, other=0.0)
    if (foreground_keep is not None) or (background_keep is not None):
        fore = tl.full(columns.shape, 1.0, T)
        back = fore
        if foreground_keep is not None:
            fore = tl.load(foreground_keep + columns, mask=inside, other=1.0)
        if background_keep is not None:
            back = tl.load(background_keep + columns, mask=inside, other=1.0)
        step = tl.full((), 0, tl.uint32)
        if draw_step is not None:
            step = tl.load(draw_step).to(tl.uint32)
        key = tl.full((), seed, tl.int64)
        if ROW_DRAWS:
            word, _, _, _ = philox(row, step, _NEGATIVE_DROPS, key)
            draw = of_rows((word >> 8).to(T) * 5.9604644775390625e-8)
        else:
            position = of_rows(row * ((classes + 3) // 4)) + columns // 4
            r0, r1, r2, r3 = philox(position, step, _NEGATIVE_DROPS, key)
            of_four = columns % 4
            word = tl.where(of_four < 2, tl.where(of_four == 0, r0, r1), tl.where(of_four == 2, r2, r3))
            draw = (word >> 8).to(T) * 5.9604644775390625e-8
        kept = draw < tl.where(of_rows(background), back, fore)
        if SCORED:
            kept = kept | (x >= tl.full((), score_logit, T))
        negative = tl.where(kept, negative, 0.0)
    of_neg, slope_neg = _negative(x, tl.full((), gamma_neg, T), tl.full((), clip, T), FOCAL_NEG, CLIP)
    of_pos, slope_pos = _negative(-x, tl.full((), gamma_pos, T), tl.full((), 0.0, T), FOCAL_POS, False)
    loss = _masked(positive, of_pos) + _masked(negative, of_neg)
    return loss, positive * slope_pos, negative * slope_neg


_NOT_SPECIALIZED = [
    "classes", "groups", "inner", "input_group", "input_class", "input_row", "target_group", "target_class",
    "target_row", "ignore_index", "background_index", "seed",
]  # fmt: skip
_TABLES = [
    "input", "target", "weight", "pos_weight", "neg_weight", "foreground_keep", "background_keep", "sample_weight",
    "draw_step",
]  # fmt: skip


@triton.jit(
    do_not_specialize=[*_NOT_SPECIALIZED, "reduction", "empty_zero"],
    do_not_specialize_on_alignment=[*_TABLES, "loss", "inverse", "partials", "tickets", "error"],
)
def rows_kernel(
    input, target, weight, pos_weight, neg_weight, foreground_keep, background_keep, sample_weight, draw_step, loss,
    inverse, partials, tickets, error,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    target_group: tl.int64, target_class: tl.int64, target_row: tl.int64,
    ignore_index: tl.int64, background_index: tl.int64, alpha_pos: tl.float64, alpha_neg: tl.float64,
    gamma_pos: tl.float64, gamma_neg: tl.float64, clip: tl.float64, score_logit: tl.float64, seed: tl.int64,
    reduction: tl.int32, empty_zero: tl.int32,
    HOT: tl.constexpr, FOCAL_POS: tl.constexpr, FOCAL_NEG: tl.constexpr, CLIP: tl.constexpr, SCORED: tl.constexpr,
    ROW_DRAWS: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Losses of rows, and by the last program that of the batch and 1 / denominator."""
    T: tl.constexpr = inverse.dtype.element_ty
    blocks = tl.cdiv(inner, R)
    share = tl.cdiv(groups * blocks, tl.num_programs(0))
    first = tl.program_id(0) * share
    loss_sum = tl.zeros((R,), tl.float64)
    count = tl.zeros((R,), tl.float64)
    for tile in range(first, tl.minimum(first + share, groups * blocks)):
        group = tile // blocks
        place = tile % blocks * R + tl.arange(0, R)
        exists = are_rows(place, inner, UNIT, VEC)
        row = group.to(tl.int64) * inner + place
        y, factor, background, used, wrong = _rows(
            target, weight, sample_weight, foreground_keep, background_keep, group, place, exists, classes, inner,
            target_group, target_class, target_row, ignore_index, background_index, HOT, T, UNIT, VEC, K, R, L,
        )  # fmt: skip
        tl.store(error + tl.zeros_like(place), OUT_OF_RANGE, mask=wrong)
        total = tl.zeros((R, L), T)
        for start in range(0, classes, K * L):
            columns = start + tile_columns(K, L)
            inside = are_classes(columns, classes, UNIT, VEC)
            x = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
            x = tl.load(x, mask=inside & of_rows(exists), other=-float("inf")).to(T)
            of_logits, _, _ = _elements(
                target, pos_weight, neg_weight, foreground_keep, background_keep, draw_step, x, columns, inside, row,
                group, place, exists, y, factor, background, classes, target_group, target_class, target_row,
                alpha_pos, alpha_neg, gamma_pos, gamma_neg, clip, score_logit, seed, HOT, FOCAL_POS, FOCAL_NEG, CLIP,
                SCORED, ROW_DRAWS, T, UNIT, VEC,
            )  # fmt: skip
            total += lane_sum(of_logits)
        value = tl.where(used, tl.sum(total, 1), 0.0)
        if reduction == 0:
            tl.store(loss + row, value, mask=exists)
        loss_sum += value.to(tl.float64)
        count += used.to(tl.float64)
    finish_batch(loss, inverse, tl.sum(loss_sum), tl.sum(count), partials, tickets, reduction, empty_zero)


@triton.jit(
    do_not_specialize=_NOT_SPECIALIZED, do_not_specialize_on_alignment=[*_TABLES, "state", "partials", "tickets"]
)
def columns_kernel(
    input, target, weight, pos_weight, neg_weight, foreground_keep, background_keep, sample_weight, draw_step, state,
    partials, tickets,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    target_group: tl.int64, target_class: tl.int64, target_row: tl.int64,
    ignore_index: tl.int64, background_index: tl.int64, alpha_pos: tl.float64, alpha_neg: tl.float64,
    gamma_pos: tl.float64, gamma_neg: tl.float64, clip: tl.float64, score_logit: tl.float64, seed: tl.int64,
    HOT: tl.constexpr, FOCAL_POS: tl.constexpr, FOCAL_NEG: tl.constexpr, CLIP: tl.constexpr, SCORED: tl.constexpr,
    ROW_DRAWS: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The columns' part of the state. Programs are numbered chunks of columns first, then shares of the rows."""
    T: tl.constexpr = state.dtype.element_ty
    chunks = tl.cdiv(classes, K * L)
    chunk = tl.program_id(0) % chunks
    split = tl.program_id(0) // chunks
    splits = tl.num_programs(0) // chunks
    columns = chunk * (K * L) + tile_columns(K, L)
    inside = are_classes(columns, classes, UNIT, VEC)
    blocks = tl.cdiv(inner, R)
    share = tl.cdiv(groups * blocks, splits)
    first = split * share
    of_positives = no_logits(K, R, L, T)
    of_negatives = of_positives
    for tile in range(first, tl.minimum(first + share, groups * blocks)):
        group = tile // blocks
        place = tile % blocks * R + tl.arange(0, R)
        exists = are_rows(place, inner, UNIT, VEC)
        row = group.to(tl.int64) * inner + place
        y, factor, background, used, _ = _rows(
            target, weight, sample_weight, foreground_keep, background_keep, group, place, exists, classes, inner,
            target_group, target_class, target_row, ignore_index, background_index, HOT, T, UNIT, VEC, K, R, L,
        )  # fmt: skip
        x = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
        x = tl.load(x, mask=inside & of_rows(exists), other=-float("inf")).to(T)
        _, positive, negative = _elements(
            target, pos_weight, neg_weight, foreground_keep, background_keep, draw_step, x, columns, inside, row,
            group, place, exists, y, factor, background, classes, target_group, target_class, target_row,
            alpha_pos, alpha_neg, gamma_pos, gamma_neg, clip, score_logit, seed, HOT, FOCAL_POS, FOCAL_NEG, CLIP,
            SCORED, ROW_DRAWS, T, UNIT, VEC,
        )  # fmt: skip
        of_positives += tl.where(of_rows(used), positive, 0.0)
        of_negatives += tl.where(of_rows(used), negative, 0.0)
    mine = split.to(tl.int64) * classes + columns
    others = splits.to(tl.int64) * classes
    tl.store(partials + mine, tl.sum(of_positives, ROW_AXIS, keep_dims=True), mask=inside)
    tl.store(partials + others + mine, tl.sum(of_negatives, ROW_AXIS, keep_dims=True), mask=inside)
    tl.debug_barrier()  # the ticket is taken by one thread, which has to have seen what the others stored
    if tl.atomic_add(tickets + chunk, 1, sem="acq_rel") == splits - 1:
        tl.store(tickets + chunk, 0)
        add_splits(state, partials, columns, inside, splits, classes, R)
        add_splits(state + classes, partials + others, columns, inside, splits, classes, R)


@triton.jit(
    do_not_specialize=[*_NOT_SPECIALIZED, "out_group", "out_class", "out_row", "grad_group", "grad_row"],
    do_not_specialize_on_alignment=[*_TABLES, "grad", "inverse", "d_input", "error"],
)
def backward_kernel(
    grad, inverse, input, target, weight, pos_weight, neg_weight, foreground_keep, background_keep, sample_weight,
    draw_step, d_input, error,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    target_group: tl.int64, target_class: tl.int64, target_row: tl.int64,
    out_group: tl.int64, out_class: tl.int64, out_row: tl.int64, grad_group: tl.int64, grad_row: tl.int64,
    ignore_index: tl.int64, background_index: tl.int64, alpha_pos: tl.float64, alpha_neg: tl.float64,
    gamma_pos: tl.float64, gamma_neg: tl.float64, clip: tl.float64, score_logit: tl.float64, seed: tl.int64,
    HOT: tl.constexpr, FOCAL_POS: tl.constexpr, FOCAL_NEG: tl.constexpr, CLIP: tl.constexpr, SCORED: tl.constexpr,
    ROW_DRAWS: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits. Programs are numbered as columns_kernel's are."""
    T: tl.constexpr = inverse.dtype.element_ty
    chunks = tl.cdiv(classes, K * L)
    chunk = tl.program_id(0) % chunks
    split = tl.program_id(0) // chunks
    splits = tl.num_programs(0) // chunks
    columns = chunk * (K * L) + tile_columns(K, L)
    inside = are_classes(columns, classes, UNIT, VEC)
    factor_of_all = tl.load(inverse)
    if factor_of_all < 0:  # the state of the reference, which keeps nothing there
        tl.store(error, FOREIGN_STATE)
        factor_of_all = factor_of_all * float("nan")
    blocks = tl.cdiv(inner, R)
    share = tl.cdiv(groups * blocks, splits)
    first = split * share
    for tile in range(first, tl.minimum(first + share, groups * blocks)):
        group = tile // blocks
        place = tile % blocks * R + tl.arange(0, R)
        exists = are_rows(place, inner, UNIT, VEC)
        row = group.to(tl.int64) * inner + place
        y, factor, background, used, _ = _rows(
            target, weight, sample_weight, foreground_keep, background_keep, group, place, exists, classes, inner,
            target_group, target_class, target_row, ignore_index, background_index, HOT, T, UNIT, VEC, K, R, L,
        )  # fmt: skip
        upstream = tl.load(
            grad + group.to(tl.int64) * grad_group + place.to(tl.int64) * grad_row, mask=exists, other=0.0
        )
        x = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
        x = tl.load(x, mask=inside & of_rows(exists), other=-float("inf")).to(T)
        _, positive, negative = _elements(
            target, pos_weight, neg_weight, foreground_keep, background_keep, draw_step, x, columns, inside, row,
            group, place, exists, y, factor, background, classes, target_group, target_class, target_row,
            alpha_pos, alpha_neg, gamma_pos, gamma_neg, clip, score_logit, seed, HOT, FOCAL_POS, FOCAL_NEG, CLIP,
            SCORED, ROW_DRAWS, T, UNIT, VEC,
        )  # fmt: skip
        d = tl.where(of_rows(used), (negative - positive) * of_rows(factor_of_all * upstream), 0.0)
        out = pointers(d_input, group, place, columns, out_group, out_class, out_row, UNIT, VEC)
        tl.store(out, d.to(d_input.dtype.element_ty), mask=inside & of_rows(exists))

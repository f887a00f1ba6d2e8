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

from ltkernels.triton.philox import class_words, philox
from ltkernels.triton.row_loss import log1p, masked_term, power
from ltkernels.triton.sums import LOG2_E, OUT_OF_RANGE, finish_batch, finish_class_sums, inverse_of, labels
from ltkernels.triton.tiles import (
    are_classes,
    chunk_of_classes,
    lane_max,
    lane_sum,
    no_logits,
    of_rows,
    pointers,
    row_offsets,
    rows_of_tile,
    share_of_tiles,
    tile_columns,
)

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
    target, weight, sample_weight, foreground_keep, background_keep, row, group, place, exists, classes,
    target_group, target_class, target_row, ignore_index, background_index, HOT: tl.constexpr, T: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Of the rows at ``place`` ``[R]``: positive columns or -1, factors, which are background, used, and wrong."""
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
        offsets = row_offsets(group, place, target_group, target_row)
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
            word = class_words(of_rows(row), columns, classes, step, _NEGATIVE_DROPS, key)
            draw = (word >> 8).to(T) * 5.9604644775390625e-8
        kept = draw < tl.where(of_rows(background), back, fore)
        if SCORED:
            kept = kept | (x >= tl.full((), score_logit, T))
        negative = tl.where(kept, negative, 0.0)
    of_neg, slope_neg = _negative(x, tl.full((), gamma_neg, T), tl.full((), clip, T), FOCAL_NEG, CLIP)
    of_pos, slope_pos = _negative(-x, tl.full((), gamma_pos, T), tl.full((), 0.0, T), FOCAL_POS, False)
    loss = masked_term(positive, of_pos) + masked_term(negative, of_neg)
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
    loss_sum = tl.zeros((R,), tl.float64)
    count = tl.zeros((R,), tl.float64)
    first, last, blocks = share_of_tiles(tl.program_id(0), tl.num_programs(0), groups, inner, R)
    for tile in range(first, last):
        group, place, exists, _ = rows_of_tile(tile, blocks, inner, UNIT, VEC, R)
        row = group.to(tl.int64) * inner + place
        y, factor, background, used, wrong = _rows(
            target, weight, sample_weight, foreground_keep, background_keep, row, group, place, exists, classes,
            target_group, target_class, target_row, ignore_index, background_index, HOT, T, UNIT, VEC, K, R, L,
        )  # fmt: skip
        tl.store(error + tl.zeros_like(place), OUT_OF_RANGE, mask=wrong)
        total = tl.zeros((R, L), T)
        for start in range(0, classes, K * L):
            columns = start + tile_columns(K, L)
            inside = are_classes(columns, classes, UNIT, VEC)
            x = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
            x = tl.load(x, mask=inside & of_rows(exists), other=-float("inf")).to(T)
            of_logits, positive, negative = _elements(
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
    """The columns' part of the state."""
    T: tl.constexpr = state.dtype.element_ty
    chunk, split, splits, columns, inside = chunk_of_classes(classes, UNIT, VEC, K, L)
    of_positives = no_logits(K, R, L, T)
    of_negatives = of_positives
    first, last, blocks = share_of_tiles(split, splits, groups, inner, R)
    for tile in range(first, last):
        group, place, exists, _ = rows_of_tile(tile, blocks, inner, UNIT, VEC, R)
        row = group.to(tl.int64) * inner + place
        y, factor, background, used, _ = _rows(
            target, weight, sample_weight, foreground_keep, background_keep, row, group, place, exists, classes,
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
    finish_class_sums(
        of_positives, of_negatives, state, state + classes, partials, tickets, chunk, split, splits, columns, inside,
        classes, R,
    )  # fmt: skip


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
    """The gradient of the logits."""
    T: tl.constexpr = inverse.dtype.element_ty
    chunk, split, splits, columns, inside = chunk_of_classes(classes, UNIT, VEC, K, L)
    factor_of_all = inverse_of(inverse, error)
    first, last, blocks = share_of_tiles(split, splits, groups, inner, R)
    for tile in range(first, last):
        group, place, exists, _ = rows_of_tile(tile, blocks, inner, UNIT, VEC, R)
        row = group.to(tl.int64) * inner + place
        y, factor, background, used, _ = _rows(
            target, weight, sample_weight, foreground_keep, background_keep, row, group, place, exists, classes,
            target_group, target_class, target_row, ignore_index, background_index, HOT, T, UNIT, VEC, K, R, L,
        )  # fmt: skip
        upstream = tl.load(grad + row_offsets(group, place, grad_group, grad_row), mask=exists, other=0.0)
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

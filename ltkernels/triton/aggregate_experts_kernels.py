"""The kernels of aggregate_experts.py.

**Forward.** A program has whole samples, several at a time: for each expert the maximum and the sum of its softmax, if
one is needed, then the mean of all, in sweeps that find the rows in the cache. The best classes are taken from the mean
one after the other: the next one is the largest of those that come later in the order of (value, class).

**Backward.** Again whole samples, since a softmax's gradient needs a sum over its row. Of weights, what is wanted is
G_e = sum g f_e over what the weight goes with; the gradient (G_e - sum_k share_k G_k) / sum_k w_k follows from it. Of
weights by class that is a sum over the samples: a program has a chunk of the classes of one expert and walks down its
split of the samples, and whoever is last of a chunk adds up.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ltkernels.triton.expert_cross_entropy_kernels import _of_mean
from ltkernels.triton.sums import LOG2_E, add_splits, finite, inverse_of
from ltkernels.triton.tiles import (
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
)

LOGITS, PROBS, LOG_PROBS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
EQUAL, EXPERT, SAMPLE, CLASS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_NO_CLASS = tl.constexpr(2**31 - 1)
_MOST, _MOST_64 = tl.constexpr(2**31 - 1), tl.constexpr(2**63 - 1)


@triton.jit
def _weight(weights, e, experts, row, exists, classes, columns, inside, WEIGHTS: tl.constexpr, T: tl.constexpr):
    """Expert e's weight, so that it goes with a tile's logits; of equal ones the share."""
    if WEIGHTS == EQUAL:
        return tl.full((1, 1, 1), 1.0, T) / experts.to(T)
    elif WEIGHTS == EXPERT:
        return tl.full((1, 1, 1), 0.0, T) + tl.load(weights + e)
    elif WEIGHTS == SAMPLE:
        return of_rows(tl.load(weights + row.to(tl.int64) * experts + e, mask=exists, other=1.0))
    else:
        return tl.load(weights + e * classes + columns, mask=inside, other=1.0)


@triton.jit
def _total_weight(weights, experts, row, exists, classes, columns, inside, WEIGHTS: tl.constexpr, T: tl.constexpr):
    if WEIGHTS == EQUAL:
        return tl.full((1, 1, 1), 1.0, T)
    else:
        total = _weight(weights, 0, experts, row, exists, classes, columns, inside, WEIGHTS, T)
        for e in range(1, experts):
            total += _weight(weights, e, experts, row, exists, classes, columns, inside, WEIGHTS, T)
        return total


@triton.jit
def _value(x, top, inverse, MODE: tl.constexpr):
    """Logits, probabilities or log-probabilities of a tile; ``top`` and ``inverse`` of its rows."""
    if MODE == PROBS:
        x = of_rows(inverse) * tl.exp2((x - of_rows(top)) * LOG2_E)
    elif MODE == LOG_PROBS:
        x = (x - of_rows(top)) + of_rows(tl.log(inverse))
    return x


@triton.jit
def _one(end, error, MODE: tl.constexpr, T: tl.constexpr):
    """1; NaN and a report if the state is the reference's, which keeps no softmaxes."""
    return tl.full((), 1.0, T) if MODE == LOGITS else inverse_of(end, error)


@triton.jit
def _rank(v):
    """Integers in the order of numbers; NaN is above all, as torch sorts it, and what is no class at -_MOST below."""
    v = tl.where(v == 0.0, 0.0, v)  # -0 has other bits
    if v.dtype == tl.float64:
        bits = v.to(tl.int64, bitcast=True)
        return tl.where(v != v, _MOST_64, bits ^ ((bits >> 63) & _MOST_64))
    else:
        bits = v.to(tl.int32, bitcast=True)
        return tl.where(v != v, _MOST, bits ^ ((bits >> 31) & _MOST))


@triton.jit
def _next_best(best, place, rank, columns, candidates, NONE: tl.constexpr):
    """The best of every lane, ``[R, L]``, with what a tile has: of equal values the first class."""
    rank = tl.where(candidates, rank, NONE)
    top = lane_max(rank)
    at = tl.where(candidates & (rank == of_lanes(top)), columns, _NO_CLASS)
    at = -lane_max(-at)
    better = (top > best) | ((top == best) & (at < place))
    return tl.where(better, top, best), tl.where(better, at, place)


@triton.jit(
    do_not_specialize=[
        "experts", "topk", "classes", "groups", "inner", "input_expert", "input_group", "input_class", "input_row",
        "output_group", "output_class", "output_row",
    ],
    do_not_specialize_on_alignment=["input", "weights", "output", "mean", "state"],
)  # fmt: skip
def forward_kernel(
    input, weights, output, mean, state, experts: tl.int32, topk: tl.int32, input_expert: tl.int64,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    output_group: tl.int64, output_class: tl.int64, output_row: tl.int64,
    MODE: tl.constexpr, WEIGHTS: tl.constexpr, BEST: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """The mean, and the state. ``mean`` is where it stands unrounded for the best classes, if they are wanted."""
    T: tl.constexpr = state.dtype.element_ty
    NOTHING: tl.constexpr = -float("inf")
    INT: tl.constexpr = tl.int64 if T == tl.float64 else tl.int32
    MOST: tl.constexpr = _MOST_64 if T == tl.float64 else _MOST
    all_columns = tile_columns(K, L)
    end = K * L if ONE else classes
    group = groups - 1  # 0: samples are one group of rows, or none
    blocks = groups * tl.cdiv(inner, R)
    share = tl.cdiv(blocks, tl.num_programs(0))
    first = tl.program_id(0) * share
    rows = (groups * inner).to(tl.int64)
    best_classes = state
    if MODE != LOGITS:
        best_classes = state + 2 * experts * rows
    confidences = best_classes + topk * rows
    if tl.program_id(0) == 0:
        tl.store(confidences + topk * rows, 1.0)
    for tile in range(first, tl.minimum(first + share, blocks)):
        row = tile * R + tl.arange(0, R)
        exists = are_rows(row, inner, UNIT, VEC)
        softmaxes = state + row.to(tl.int64) * (2 * experts)
        if MODE != LOGITS:
            for e in range(experts):
                base = input + e * input_expert
                top = tl.full((R, L), NOTHING, T)
                total = tl.zeros((R, L), T)
                for start in range(0, end, K * L):
                    columns = start + all_columns
                    mask = are_classes(columns, classes, UNIT, VEC) & of_rows(exists)
                    at = pointers(base, group, row, columns, input_group, input_class, input_row, UNIT, VEC)
                    x = tl.load(at, mask=mask, other=NOTHING).to(T)
                    higher = tl.maximum(top, lane_max(x))
                    reference = finite(higher)
                    e_x = lane_sum(tl.exp2((x - of_lanes(reference)) * LOG2_E))
                    total = total * tl.exp2((top - reference) * LOG2_E) + e_x
                    top = higher
                highest = finite(tl.max(top, 1))
                total = tl.sum(total * tl.exp2((top - highest[:, None]) * LOG2_E), 1)
                tl.store(softmaxes + 2 * e, highest, mask=exists)
                tl.store(softmaxes + 2 * e + 1, 1.0 / total, mask=exists)
            tl.debug_barrier()  # they may be read by other threads than wrote them

        for start in range(0, end, K * L):
            columns = start + all_columns
            inside = are_classes(columns, classes, UNIT, VEC)
            mask = inside & of_rows(exists)
            weight = _total_weight(weights, experts, row, exists, classes, columns, inside, WEIGHTS, T)
            out = no_logits(K, R, L, T)
            for e in range(experts):
                at = pointers(
                    input + e * input_expert, group, row, columns, input_group, input_class, input_row, UNIT, VEC
                )
                x = tl.load(at, mask=mask, other=0.0).to(T)
                if MODE == LOGITS:
                    f = x
                else:
                    top = tl.load(softmaxes + 2 * e, mask=exists, other=0.0)
                    f = _value(x, top, tl.load(softmaxes + 2 * e + 1, mask=exists, other=1.0), MODE)
                w = _weight(weights, e, experts, row, exists, classes, columns, inside, WEIGHTS, T) / weight
                if WEIGHTS != EQUAL:
                    f = tl.where((w == 0.0) & ((f - f) != 0.0), 0.0, f)  # what has no weight counts for nothing
                out += w * f
            at = pointers(output, group, row, columns, output_group, output_class, output_row, UNIT, VEC)
            tl.store(at, out.to(output.dtype.element_ty), mask=mask)
            if BEST:
                tl.store(_of_mean(mean, row, columns, classes, UNIT, VEC), out, mask=mask)

        if BEST:
            tl.debug_barrier()
            last = tl.full((R,), MOST, INT)
            last_class = tl.full((R,), -1, tl.int32)
            highest = tl.zeros((R,), T)
            inverse = tl.full((R,), 1.0, T)
            for k in range(topk):
                best = tl.full((R, L), -MOST, INT)
                place = tl.full((R, L), _NO_CLASS, tl.int32)
                for start in range(0, end, K * L):
                    columns = start + all_columns
                    mask = are_classes(columns, classes, UNIT, VEC) & of_rows(exists)
                    v = _rank(tl.load(_of_mean(mean, row, columns, classes, UNIT, VEC), mask=mask, other=NOTHING))
                    left = (v < of_rows(last)) | ((v == of_rows(last)) & (columns > of_rows(last_class)))
                    best, place = _next_best(best, place, v, columns, mask & left, -MOST)
                last = tl.max(best, 1)
                last_class = tl.min(tl.where(best == last[:, None], place, _NO_CLASS), 1)
                confidence = tl.load(mean + row.to(tl.int64) * classes + last_class, mask=exists, other=0.0)
                if MODE != PROBS:
                    if k == 0:
                        highest = finite(confidence)
                        total = tl.zeros((R, L), T)
                        for start in range(0, end, K * L):
                            columns = start + all_columns
                            mask = are_classes(columns, classes, UNIT, VEC) & of_rows(exists)
                            v = tl.load(_of_mean(mean, row, columns, classes, UNIT, VEC), mask=mask, other=NOTHING)
                            total += lane_sum(tl.exp2((v - of_rows(highest)) * LOG2_E))
                        inverse = 1.0 / tl.sum(total, 1)
                    confidence = inverse * tl.exp2((confidence - highest) * LOG2_E)
                number = last_class.to(INT).to(T, bitcast=True)
                at = row.to(tl.int64) * topk + k
                tl.store(best_classes + at, number, mask=exists)
                tl.store(confidences + at, confidence, mask=exists)


@triton.jit(
    do_not_specialize=[
        "experts", "classes", "groups", "inner", "input_expert", "out_expert", "input_group", "input_class",
        "input_row", "grad_group", "grad_class", "grad_row", "out_group", "out_class", "out_row",
    ],
    do_not_specialize_on_alignment=["grad", "state", "end_of_state", "input", "shares", "d_input", "sums", "error"],
)  # fmt: skip
def backward_kernel(
    grad, state, end_of_state, input, shares, d_input, sums, error,
    experts: tl.int32, input_expert: tl.int64, out_expert: tl.int64,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    grad_group: tl.int64, grad_class: tl.int64, grad_row: tl.int64,
    out_group: tl.int64, out_class: tl.int64, out_row: tl.int64,
    MODE: tl.constexpr, WEIGHTS: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits, if there is a ``d_input``, and G of samples and experts, if there are ``sums``."""
    T: tl.constexpr = state.dtype.element_ty
    one = _one(end_of_state, error, MODE, T)
    all_columns = tile_columns(K, L)
    end = K * L if ONE else classes
    group = groups - 1  # 0: samples are one group of rows, or none
    blocks = groups * tl.cdiv(inner, R)
    share = tl.cdiv(blocks, tl.num_programs(0))
    first = tl.program_id(0) * share
    for tile in range(first, tl.minimum(first + share, blocks)):
        row = tile * R + tl.arange(0, R)
        exists = are_rows(row, inner, UNIT, VEC)
        softmaxes = state + row.to(tl.int64) * (2 * experts)
        for e in range(experts):
            base = input + e * input_expert
            top = tl.zeros((R,), T)
            inverse = tl.full((R,), 1.0, T)
            if MODE != LOGITS:
                top = tl.load(softmaxes + 2 * e, mask=exists, other=0.0)
                inverse = one * tl.load(softmaxes + 2 * e + 1, mask=exists, other=1.0)
            of_row = tl.zeros((R, L), T)
            of_weight = tl.zeros((R, L), T)
            if MODE != LOGITS or sums is not None:
                for start in range(0, end, K * L):
                    columns = start + all_columns
                    inside = are_classes(columns, classes, UNIT, VEC)
                    mask = inside & of_rows(exists)
                    at = pointers(base, group, row, columns, input_group, input_class, input_row, UNIT, VEC)
                    f = _value(tl.load(at, mask=mask, other=0.0).to(T), top, inverse, MODE)
                    at = pointers(grad, group, row, columns, grad_group, grad_class, grad_row, UNIT, VEC)
                    g = tl.load(at, mask=mask, other=0.0).to(T)
                    w = _weight(shares, e, experts, row, exists, classes, columns, inside, WEIGHTS, T)
                    f = tl.where(mask & ((w != 0.0) | ((f - f) == 0.0)), f, 0.0)  # f is of what was not loaded, too
                    if sums is not None:
                        of_weight += lane_sum(g * f)
                    if MODE == PROBS:
                        of_row += lane_sum(w * g * f)
                    elif MODE == LOG_PROBS:
                        of_row += lane_sum(w * g)
            if sums is not None:
                tl.store(sums + row.to(tl.int64) * experts + e, tl.sum(of_weight, 1), mask=exists)
            if d_input is not None:
                inner_sum = tl.sum(of_row, 1)
                for start in range(0, end, K * L):
                    columns = start + all_columns
                    inside = are_classes(columns, classes, UNIT, VEC)
                    mask = inside & of_rows(exists)
                    at = pointers(grad, group, row, columns, grad_group, grad_class, grad_row, UNIT, VEC)
                    g = tl.load(at, mask=mask, other=0.0).to(T)
                    w = _weight(shares, e, experts, row, exists, classes, columns, inside, WEIGHTS, T)
                    d = w * g
                    if MODE != LOGITS:
                        at = pointers(base, group, row, columns, input_group, input_class, input_row, UNIT, VEC)
                        x = tl.load(at, mask=mask, other=0.0).to(T)
                        p = of_rows(inverse) * tl.exp2((x - of_rows(top)) * LOG2_E)
                        d = p * (d - of_rows(inner_sum)) if MODE == PROBS else d - p * of_rows(inner_sum)
                        if WEIGHTS == EXPERT or WEIGHTS == SAMPLE:
                            d = tl.where(w == 0.0, 0.0, d)
                    at = pointers(
                        d_input + e * out_expert, group, row, columns, out_group, out_class, out_row, UNIT, VEC
                    )
                    tl.store(at, d.to(d_input.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "experts", "classes", "groups", "inner", "input_expert", "input_group", "input_class", "input_row",
        "grad_group", "grad_class", "grad_row",
    ],
    do_not_specialize_on_alignment=[
        "grad", "state", "end_of_state", "input", "shares", "sums", "partials", "tickets", "error",
    ],
)  # fmt: skip
def class_kernel(
    grad, state, end_of_state, input, shares, sums, partials, tickets, error,
    experts: tl.int32, input_expert: tl.int64,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    grad_group: tl.int64, grad_class: tl.int64, grad_row: tl.int64,
    MODE: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """G of experts and classes. Programs are numbered experts first, which share g, then chunks, then splits."""
    T: tl.constexpr = state.dtype.element_ty
    e = tl.program_id(0) % experts
    chunks = tl.cdiv(classes, K * L)
    chunk = tl.program_id(0) // experts % chunks
    split = tl.program_id(0) // (experts * chunks)
    splits = tl.num_programs(0) // (experts * chunks)
    columns = chunk * (K * L) + tile_columns(K, L)
    inside = are_classes(columns, classes, UNIT, VEC)
    w = tl.load(shares + e * classes + columns, mask=inside, other=1.0)
    total = no_logits(K, R, L, T)
    group = groups - 1  # 0: samples are one group of rows, or none
    blocks = groups * tl.cdiv(inner, R)
    share = tl.cdiv(blocks, splits)
    first = split * share
    for tile in range(first, tl.minimum(first + share, blocks)):
        row = tile * R + tl.arange(0, R)
        exists = are_rows(row, inner, UNIT, VEC)
        mask = inside & of_rows(exists)
        at = pointers(input + e * input_expert, group, row, columns, input_group, input_class, input_row, UNIT, VEC)
        f = tl.load(at, mask=mask, other=0.0).to(T)
        if MODE != LOGITS:
            softmaxes = state + row.to(tl.int64) * (2 * experts) + 2 * e
            top = tl.load(softmaxes, mask=exists, other=0.0)
            f = _value(f, top, tl.load(softmaxes + 1, mask=exists, other=1.0), MODE)
        f = tl.where(mask & ((w != 0.0) | ((f - f) == 0.0)), f, 0.0)
        at = pointers(grad, group, row, columns, grad_group, grad_class, grad_row, UNIT, VEC)
        total += tl.load(at, mask=mask, other=0.0).to(T) * f
    total *= _one(end_of_state, error, MODE, T)
    of_splits = partials + e.to(tl.int64) * splits * classes
    at = of_splits + split.to(tl.int64) * classes + columns
    tl.store(at, tl.sum(total, ROW_AXIS, keep_dims=True), mask=inside)
    tl.debug_barrier()  # the ticket is taken by one thread, which has to have seen what the others stored
    ticket = tickets + chunk * experts + e
    if tl.atomic_add(ticket, 1, sem="acq_rel") == splits - 1:
        tl.store(ticket, 0)
        add_splits(sums + e * classes, of_splits, columns, inside, splits, classes, R)

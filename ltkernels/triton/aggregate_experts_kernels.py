"""The kernels of aggregate_experts.py.

**Forward.** A program has whole samples, several at a time: for each expert the maximum and the sum of its softmax, if
one is needed, then the mean of all, in sweeps that find the rows in the cache. The best classes are taken from the mean
one after the other: the next one is the largest of those that come later in the order of (value, class).

**Backward.** Again whole samples, since a softmax's gradient needs a sum over its row. Of weights, what is wanted is
G_e = sum g f_e over what the weight is shared by; the gradient (G_e - sum_k share_k G_k) / sum_k w_k follows from it.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ltkernels.triton.distillation_kernels import _finite
from ltkernels.triton.expert_cross_entropy_kernels import _of_mean
from ltkernels.triton.sums import LOG2_E
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


@triton.jit
def _weight(weights, e, experts, row, exists, classes, columns, inside, WEIGHTS: tl.constexpr, T: tl.constexpr):
    """Expert e's weight, so that it goes with a tile's logits."""
    if WEIGHTS == EQUAL:
        return tl.full((1, 1, 1), 1.0, T)
    elif WEIGHTS == EXPERT:
        return tl.full((1, 1, 1), 0.0, T) + tl.load(weights + e)
    elif WEIGHTS == SAMPLE:
        return of_rows(tl.load(weights + row.to(tl.int64) * experts + e, mask=exists, other=1.0))
    else:
        return tl.load(weights + e * classes + columns, mask=inside, other=1.0)


@triton.jit
def _total_weight(weights, experts, row, exists, classes, columns, inside, WEIGHTS: tl.constexpr, T: tl.constexpr):
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
def _next_best(best, place, keys, columns, candidates):
    """The best of every lane, ``[R, L]``, with what a tile has: of equal values the first class."""
    keys = tl.where(candidates, keys, -float("inf"))
    top = lane_max(keys)
    at = tl.where(candidates & (keys == of_lanes(top)), columns, _NO_CLASS)
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
    all_columns = tile_columns(K, L)
    end = K * L if ONE else classes
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
        group = tile // blocks  # 0
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
                    reference = _finite(higher)
                    e_x = lane_sum(tl.exp2((x - of_lanes(reference)) * LOG2_E))
                    total = total * tl.exp2((top - reference) * LOG2_E) + e_x
                    top = higher
                highest = _finite(tl.max(top, 1))
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
            last = tl.full((R,), float("inf"), T)
            last_class = tl.full((R,), -1, tl.int32)
            highest = tl.zeros((R,), T)
            inverse = tl.full((R,), 1.0, T)
            for k in range(topk):
                best = tl.full((R, L), NOTHING, T)
                place = tl.full((R, L), _NO_CLASS, tl.int32)
                for start in range(0, end, K * L):
                    columns = start + all_columns
                    mask = are_classes(columns, classes, UNIT, VEC) & of_rows(exists)
                    v = tl.load(_of_mean(mean, row, columns, classes, UNIT, VEC), mask=mask, other=NOTHING)
                    v = tl.where(v != v, float("inf"), v)  # NaN comes first
                    left = (v < of_rows(last)) | ((v == of_rows(last)) & (columns > of_rows(last_class)))
                    best, place = _next_best(best, place, v, columns, mask & left)
                top = tl.max(best, 1)
                last_class = tl.min(tl.where(best == top[:, None], place, _NO_CLASS), 1)
                last = top
                if MODE == PROBS:
                    confidence = last
                else:
                    if k == 0:
                        highest = _finite(last)
                        total = tl.zeros((R, L), T)
                        for start in range(0, end, K * L):
                            columns = start + all_columns
                            mask = are_classes(columns, classes, UNIT, VEC) & of_rows(exists)
                            v = tl.load(_of_mean(mean, row, columns, classes, UNIT, VEC), mask=mask, other=NOTHING)
                            total += lane_sum(tl.exp2((v - of_rows(highest)) * LOG2_E))
                        inverse = 1.0 / tl.sum(total, 1)
                    confidence = inverse * tl.exp2((last - highest) * LOG2_E)
                number = last_class.to(tl.int64 if T == tl.float64 else tl.int32).to(T, bitcast=True)
                at = row.to(tl.int64) * topk + k
                tl.store(best_classes + at, number, mask=exists)
                tl.store(confidences + at, confidence, mask=exists)


@triton.jit(
    do_not_specialize=[
        "experts", "classes", "groups", "inner", "input_expert", "out_expert", "input_group", "input_class",
        "input_row", "grad_group", "grad_class", "grad_row", "out_group", "out_class", "out_row",
    ],
    do_not_specialize_on_alignment=["grad", "state", "input", "weights", "d_input", "sums"],
)  # fmt: skip
def backward_kernel(
    grad, state, input, weights, d_input, sums, experts: tl.int32, input_expert: tl.int64, out_expert: tl.int64,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    grad_group: tl.int64, grad_class: tl.int64, grad_row: tl.int64,
    out_group: tl.int64, out_class: tl.int64, out_row: tl.int64,
    MODE: tl.constexpr, WEIGHTS: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits, if there is a ``d_input``, and G of samples and experts, if there are ``sums``."""
    T: tl.constexpr = state.dtype.element_ty
    all_columns = tile_columns(K, L)
    end = K * L if ONE else classes
    blocks = groups * tl.cdiv(inner, R)
    share = tl.cdiv(blocks, tl.num_programs(0))
    first = tl.program_id(0) * share
    for tile in range(first, tl.minimum(first + share, blocks)):
        group = tile // blocks  # 0
        row = tile * R + tl.arange(0, R)
        exists = are_rows(row, inner, UNIT, VEC)
        softmaxes = state + row.to(tl.int64) * (2 * experts)
        for e in range(experts):
            base = input + e * input_expert
            top = tl.zeros((R,), T)
            inverse = tl.full((R,), 1.0, T)
            if MODE != LOGITS:
                top = tl.load(softmaxes + 2 * e, mask=exists, other=0.0)
                inverse = tl.load(softmaxes + 2 * e + 1, mask=exists, other=1.0)
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
                    w = _weight(weights, e, experts, row, exists, classes, columns, inside, WEIGHTS, T)
                    w = w / _total_weight(weights, experts, row, exists, classes, columns, inside, WEIGHTS, T)
                    f = tl.where((w == 0.0) & ((f - f) != 0.0), 0.0, f)
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
                    w = _weight(weights, e, experts, row, exists, classes, columns, inside, WEIGHTS, T)
                    w = w / _total_weight(weights, experts, row, exists, classes, columns, inside, WEIGHTS, T)
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
    do_not_specialize_on_alignment=["grad", "state", "input", "weights", "sums"],
)  # fmt: skip
def class_kernel(
    grad, state, input, weights, sums, experts: tl.int32, input_expert: tl.int64,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    grad_group: tl.int64, grad_class: tl.int64, grad_row: tl.int64,
    MODE: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """G of experts and classes: a program has a chunk of the classes of an expert, and walks down the samples."""
    T: tl.constexpr = state.dtype.element_ty
    e = tl.program_id(0) % experts
    columns = tl.program_id(0) // experts * (K * L) + tile_columns(K, L)
    inside = are_classes(columns, classes, UNIT, VEC)
    w = tl.load(weights + e * classes + columns, mask=inside, other=1.0)
    total = no_logits(K, R, L, T)
    for tile in range(0, groups * tl.cdiv(inner, R)):
        group = tile // (groups * tl.cdiv(inner, R))  # 0
        row = tile * R + tl.arange(0, R)
        exists = are_rows(row, inner, UNIT, VEC)
        mask = inside & of_rows(exists)
        at = pointers(input + e * input_expert, group, row, columns, input_group, input_class, input_row, UNIT, VEC)
        f = tl.load(at, mask=mask, other=0.0).to(T)
        if MODE != LOGITS:
            softmaxes = state + row.to(tl.int64) * (2 * experts) + 2 * e
            f = _value(
                f, tl.load(softmaxes, mask=exists, other=0.0), tl.load(softmaxes + 1, mask=exists, other=1.0), MODE
            )
        f = tl.where((w == 0.0) & ((f - f) != 0.0), 0.0, f)
        at = pointers(grad, group, row, columns, grad_group, grad_class, grad_row, UNIT, VEC)
        total += tl.where(mask, tl.load(at, mask=mask, other=0.0).to(T) * f, 0.0)
    tl.store(sums + e * classes + columns, tl.sum(total, ROW_AXIS, keep_dims=True), mask=inside)

"""The kernels of lade.py.

**Forward**, in two launches, since tiles along the rows and down the columns have different shapes. The first takes the
log-sum-exp down the columns: a program has a chunk of the classes and walks down its share of the rows, with a running
maximum and sum for every place of a tile, so that nothing is exchanged between threads before the end. Whoever is last
of a chunk joins its sums and finishes its classes. The second is the softmax along the rows, as of cross_entropy; its
last program adds the chunks' regulariser to the loss.

**Backward.** Elementwise from the state, a chunk of the classes and a share of the rows a program.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ltkernels.triton.row_loss import finish_label
from ltkernels.triton.sums import (
    ABSENT_CLASS,
    FINISHED,
    LOG2_E,
    OUT_OF_RANGE,
    add_exponentials,
    add_up,
    divided,
    finite,
    get,
    inverse_of,
    join_label,
    labels,
    over_lanes,
    put,
    used_labels,
)
from ltkernels.triton.tiles import (
    _ROWS,
    ROW_AXIS,
    are_classes,
    chunk_of_classes,
    no_logits,
    of_rows,
    pointers,
    row_offsets,
    rows_of_tile,
    share_of_tiles,
    tile_columns,
)

# --- Forward: down the columns ---


@triton.jit
def _part(partials, split, splits, columns, inside, classes, place: tl.constexpr, other: tl.constexpr):
    """One of the four sums of the splits ``[R]``, of the columns of a tile."""
    split = of_rows(split)
    at = partials + (split.to(tl.int64) * 4 + place) * classes + columns
    return tl.load(at, mask=inside & (split < splits), other=other)


@triton.jit
def _finish_chunk(
    prior, class_offset, class_states, partials, counts, columns, inside, classes, splits, remine_lambda, strength,
    R: tl.constexpr,
):  # fmt: skip
    """The state of a chunk's classes, from the sums of all splits; returns the chunk's part of the regulariser."""
    NOTHING: tl.constexpr = -float("inf")
    T: tl.constexpr = class_states.dtype.element_ty
    rows = add_up(counts, splits)
    top = tl.full(columns.shape, NOTHING, T)
    for start in range(0, splits, R):
        split = start + tl.arange(0, R)
        part = _part(partials, split, splits, columns, inside, classes, 0, NOTHING)
        top = tl.maximum(top, tl.max(part, ROW_AXIS, keep_dims=True))
    top = finite(top)
    total = tl.zeros(columns.shape, tl.float64)
    own = tl.zeros(columns.shape, tl.float64)
    number = tl.full(columns.shape, 1e-8, tl.float64)
    for start in range(0, splits, R):
        split = start + tl.arange(0, R)
        shrunk = tl.exp2((_part(partials, split, splits, columns, inside, classes, 0, NOTHING) - top) * LOG2_E)
        part = _part(partials, split, splits, columns, inside, classes, 1, 0.0) * shrunk
        total += tl.sum(part.to(tl.float64), ROW_AXIS, keep_dims=True)
        part = _part(partials, split, splits, columns, inside, classes, 2, 0.0)
        own += tl.sum(part.to(tl.float64), ROW_AXIS, keep_dims=True)
        part = _part(partials, split, splits, columns, inside, classes, 3, 0.0)
        number += tl.sum(part.to(tl.float64), ROW_AXIS, keep_dims=True)
    log_sum = top.to(tl.float64) + tl.log(total)
    bound = log_sum - tl.log(rows)
    if class_offset is not None:
        bound += tl.load(class_offset + columns, mask=inside, other=0.0).to(tl.float64)
    share = tl.load(prior + columns, mask=inside, other=0.0).to(tl.float64)
    tl.store(class_states + columns, (strength * share * (1.0 + 2.0 * remine_lambda * bound)).to(T), mask=inside)
    tl.store(class_states + classes + columns, log_sum.to(T), mask=inside)
    tl.store(class_states + 2 * classes + columns, (strength * share / number).to(T), mask=inside)
    terms = share * (own / number - bound - remine_lambda * bound * bound)
    return -tl.sum(tl.where(inside, terms, 0.0))


@triton.jit(
    do_not_specialize=[
        "classes", "groups", "inner", "input_group", "input_class", "input_row", "target_group", "target_class",
        "target_row", "ignore_index",
    ],
    do_not_specialize_on_alignment=[
        "input", "target", "prior", "class_offset", "row_offset", "state", "partials", "sums", "tickets",
    ],
)  # fmt: skip
def columns_kernel(
    input, target, prior, class_offset, row_offset, state, partials, sums, tickets,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    target_group: tl.int64, target_class: tl.int64, target_row: tl.int64,
    ignore_index: tl.int64, remine_lambda: tl.float64, strength: tl.float64,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The classes' part of the state, and in ``sums`` the regulariser of each chunk of them."""
    T: tl.constexpr = state.dtype.element_ty
    NOTHING: tl.constexpr = -float("inf")
    chunks = tl.cdiv(classes, K * L)
    chunk, split, splits, columns, inside = chunk_of_classes(classes, UNIT, VEC, K, L)
    total = no_logits(K, R, L, T)
    top = total + NOTHING
    own = total
    number = total
    count = tl.zeros((R,), tl.int32)
    first, last, blocks = share_of_tiles(split, splits, groups, inner, R)
    for tile in range(first, last):
        group, place, exists, _ = rows_of_tile(tile, blocks, inner, UNIT, VEC, R)
        offsets = row_offsets(group, place, target_group, target_row)
        y, _ = used_labels(target, offsets, exists, classes, ignore_index)
        used = y >= 0
        count += used.to(tl.int32)
        mask = inside & of_rows(exists if UNIT == _ROWS else used)
        x = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
        x = tl.load(x, mask=mask, other=NOTHING).to(T)
        u = x
        if row_offset is not None:
            u += of_rows(tl.load(row_offset + y, mask=used, other=0.0))
        if UNIT == _ROWS:
            u = tl.where(of_rows(used), u, NOTHING)
        higher = tl.maximum(top, u)
        reference = finite(higher)
        total = total * tl.exp2((top - reference) * LOG2_E) + tl.exp2((u - reference) * LOG2_E)
        top = higher
        mine = columns == of_rows(y)
        own += tl.where(mine, x, 0.0)
        number += mine.to(T)

    highest = tl.max(top, ROW_AXIS, keep_dims=True)
    total = tl.sum(total * tl.exp2((top - finite(highest)) * LOG2_E), ROW_AXIS, keep_dims=True)
    mine = partials + split.to(tl.int64) * 4 * classes + columns
    tl.store(mine, highest, mask=inside)
    tl.store(mine + classes, total, mask=inside)
    tl.store(mine + 2 * classes, tl.sum(own, ROW_AXIS, keep_dims=True), mask=inside)
    tl.store(mine + 3 * classes, tl.sum(number, ROW_AXIS, keep_dims=True), mask=inside)
    counts = sums + chunks + chunk * splits
    tl.store(counts + split, tl.sum(count).to(tl.float64))
    tl.debug_barrier()  # the ticket is taken by one thread, which has to have seen what the others stored
    if tl.atomic_add(tickets + chunk, 1, sem="acq_rel") == splits - 1:
        tl.store(tickets + chunk, 0)
        class_states = state + (groups * inner).to(tl.int64) * 3
        regulariser = _finish_chunk(
            prior, class_offset, class_states, partials, counts, columns, inside, classes, splits,
            tl.full((), remine_lambda, tl.float64), tl.full((), strength, tl.float64), R,
        )  # fmt: skip
        tl.store(sums + chunk, regulariser)


# --- Forward: along the rows ---


@triton.jit
def _finish_rows(
    input, target, class_bias, state, error, begin, end, classes, inner, input_group, input_class, input_row,
    target_group, target_row, ignore_index, WITH_CE: tl.constexpr,
):  # fmt: skip
    """States of the rows [begin, end), a row a thread; returns the sum of their losses, and their number."""
    T: tl.constexpr = state.dtype.element_ty
    loss_sum = tl.zeros((FINISHED,), tl.float64)
    count = tl.zeros((FINISHED,), tl.float64)
    for start in range(begin, end, FINISHED):
        row = start + tl.arange(0, FINISHED)
        exists = row < end
        group = row // inner
        place = row % inner
        offsets = row_offsets(group, place, target_group, target_row)
        y, used = used_labels(target, offsets, exists, classes, ignore_index)
        found = y >= 0
        wrong = tl.where(used & ~found, OUT_OF_RANGE, 0)
        value = tl.zeros((FINISHED,), T)
        top, inverse, rest = value, value, value
        if class_bias is not None:
            b = tl.load(class_bias + y, mask=found, other=0.0)
            wrong = tl.where(found & (b == -float("inf")), ABSENT_CLASS, wrong)
        if WITH_CE:
            x = input + row_offsets(group, place, input_group, input_row) + y.to(tl.int64) * input_class
            u = tl.load(x, mask=found, other=0.0).to(T)
            if class_bias is not None:
                u += b
            top, _, others, at_label = join_label(
                u, get(state, row, exists, 0, 3), get(state, row, exists, 1, 3), LOG2_E
            )
            value, inverse, rest = finish_label(others, at_label, top - u)
        tl.store(error + tl.zeros_like(row), wrong, mask=wrong > 0)
        without = ~used | (wrong > 0)
        nothing = tl.where(wrong > 0, float("nan"), 0.0).to(T)
        put(state, row, exists, 0, tl.where(without, nothing, top), 3)
        put(state, row, exists, 1, tl.where(without, nothing, inverse), 3)
        put(state, row, exists, 2, tl.where(without, nothing, rest), 3)
        value = tl.where(without, nothing, value)
        loss_sum += tl.where(exists, value, 0.0).to(tl.float64)
        count += used.to(tl.float64)
    return tl.sum(loss_sum), tl.sum(count)


@triton.jit(
    do_not_specialize=[
        "classes", "groups", "inner", "input_group", "input_class", "input_row", "target_group", "target_class",
        "target_row", "ignore_index", "chunks",
    ],
    do_not_specialize_on_alignment=["input", "target", "loss", "state", "partials", "sums", "tickets", "error"],
)  # fmt: skip
def rows_kernel(
    input, target, class_bias, loss, state, partials, sums, tickets, error,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    target_group: tl.int64, target_class: tl.int64, target_row: tl.int64,
    ignore_index: tl.int64, chunks: tl.int32, strength: tl.float64,
    WITH_CE: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """Row states, and by the last program the loss. ONE: a tile holds whole rows (K L >= classes)."""
    T: tl.constexpr = state.dtype.element_ty
    NOTHING: tl.constexpr = -float("inf")
    all_columns = tile_columns(K, L)
    if ONE:  # every tile has the same classes
        inside = are_classes(all_columns, classes, UNIT, VEC)
        if class_bias is not None:
            bias = tl.load(class_bias + all_columns, mask=inside, other=0.0)
    programs = tl.num_programs(0)
    first, last, blocks = share_of_tiles(tl.program_id(0), programs, groups, inner, R)
    if WITH_CE:
        for tile in range(first, last):
            group, place, exists, row = rows_of_tile(tile, blocks, inner, UNIT, VEC, R)
            offsets = row_offsets(group, place, target_group, target_row)
            y, ignored, known = labels(target, offsets, exists, classes, ignore_index)
            y = tl.where(known & ~ignored, y, -1).to(tl.int32)
            end = K * L if ONE else classes
            if not ONE:  # of long rows, what nobody asks for is not read: that is worth waiting for the labels
                end = tl.where(tl.max(y, 0) >= 0, classes, 0)
            # The maximum of every lane so far, and its sum relative to that.
            top = tl.full((R, 1) if ONE else (R, L), NOTHING, T)
            total = tl.zeros((R, L), T)
            for start in range(0, end, K * L):
                columns = start + all_columns
                if not ONE:
                    inside = are_classes(columns, classes, UNIT, VEC)
                    if class_bias is not None:
                        bias = tl.load(class_bias + columns, mask=inside, other=0.0)
                x = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
                u = tl.load(x, mask=inside & of_rows(exists), other=NOTHING).to(T)
                if class_bias is not None:
                    u += bias
                u = tl.where(columns == of_rows(y), NOTHING, u)  # _finish_rows adds the label
                top, total, _, _ = add_exponentials(top, total, u, LOG2_E, ONE)
            highest, sum_of_row, _ = over_lanes(top, total, LOG2_E, ONE)
            put(state, row, exists, 0, highest, 3)
            put(state, row, exists, 1, sum_of_row, 3)
        tl.debug_barrier()  # the sums are read by other threads than wrote them

    loss_sum, count = _finish_rows(
        input, target, class_bias, state, error,
        first // blocks * inner + first % blocks * R, last // blocks * inner + last % blocks * R,
        classes, inner, input_group, input_class, input_row, target_group, target_row, ignore_index, WITH_CE,
    )  # fmt: skip
    tl.store(partials + tl.program_id(0), loss_sum)
    tl.store(partials + programs + tl.program_id(0), count)
    tl.debug_barrier()
    if tl.atomic_add(tickets, 1, sem="acq_rel") == programs - 1:
        tl.store(tickets, 0)
        mean, inverse = divided(partials, programs, 3, 0)
        tl.store(state + (groups * inner).to(tl.int64) * 3 + 3 * classes, inverse)
        tl.store(loss, mean + tl.full((), strength, tl.float64) * add_up(sums, chunks))


# --- Backward ---


@triton.jit(
    do_not_specialize=[
        "classes", "groups", "inner", "input_group", "input_class", "input_row", "target_group", "target_class",
        "target_row", "out_group", "out_class", "out_row", "grad_group", "grad_row", "ignore_index",
    ],
    do_not_specialize_on_alignment=["grad", "state", "input", "target", "row_offset", "d_input", "error"],
)  # fmt: skip
def backward_kernel(
    grad, state, input, target, class_bias, row_offset, d_input, error,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    target_group: tl.int64, target_class: tl.int64, target_row: tl.int64,
    out_group: tl.int64, out_class: tl.int64, out_row: tl.int64, grad_group: tl.int64, grad_row: tl.int64,
    ignore_index: tl.int64,
    WITH_CE: tl.constexpr, COLUMNS: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits. COLUMNS: there is a regulariser."""
    T: tl.constexpr = state.dtype.element_ty
    NOTHING: tl.constexpr = -float("inf")
    chunk, split, splits, columns, inside = chunk_of_classes(classes, UNIT, VEC, K, L)
    class_states = state + (groups * inner).to(tl.int64) * 3
    if COLUMNS:
        column_factor = tl.load(class_states + columns, mask=inside, other=0.0)
        log_sum = tl.load(class_states + classes + columns, mask=inside, other=0.0)
        label_loss = tl.load(class_states + 2 * classes + columns, mask=inside, other=0.0)
    if class_bias is not None:
        bias = tl.load(class_bias + columns, mask=inside, other=0.0)
    upstream = tl.load(grad)
    inverse = inverse_of(class_states + 3 * classes, error)
    if inverse != inverse:
        upstream = inverse
    first, last, blocks = share_of_tiles(split, splits, groups, inner, R)
    for tile in range(first, last):
        group, place, exists, row = rows_of_tile(tile, blocks, inner, UNIT, VEC, R)
        offsets = row_offsets(group, place, target_group, target_row)
        y, ignored, known = labels(target, offsets, exists, classes, ignore_index)
        used = exists & ~ignored
        at_label = columns == of_rows(tl.where(known, y, -1).to(tl.int32))
        # Rows that are ignored are not read but where that would narrow the accesses.
        mask = inside & of_rows(exists if UNIT == _ROWS else used)
        x = pointers(input, group, place, columns, input_group, input_class, input_row, UNIT, VEC)
        x = tl.load(x, mask=mask, other=NOTHING).to(T)
        d = no_logits(K, R, L, T)
        rest = get(state, row, used, 2, 3)
        if COLUMNS:
            offset = tl.zeros((R,), T)
            if row_offset is not None:
                offset = tl.load(row_offset + y, mask=used & known, other=0.0)
            d += column_factor * tl.exp2((x - (log_sum - of_rows(offset))) * LOG2_E)
            d = tl.where(at_label, d - label_loss, d)
        if WITH_CE:
            top = get(state, row, used, 0, 3)
            probability = of_rows(get(state, row, used, 1, 3) * inverse)
            u = x
            if class_bias is not None:
                u += bias
            e = probability * tl.exp2((u - of_rows(top)) * LOG2_E)
            d += tl.where(at_label, of_rows(rest * inverse), e)
        else:
            d += of_rows(rest)  # 0, or NaN where the label is wrong
        d = tl.where(of_rows(used), d * upstream, 0.0)
        out = pointers(d_input, group, place, columns, out_group, out_class, out_row, UNIT, VEC)
        tl.store(out, d.to(d_input.dtype.element_ty), mask=inside & of_rows(exists))

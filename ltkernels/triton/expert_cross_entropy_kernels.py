"""The kernels of expert_cross_entropy.py.

**Forward.** A program has whole samples, several at a time. It writes the mean of their experts' rows once, where the
later sweeps find it in the cache as they find the rows; then come the mean's own softmaxes, and for each expert the
maxima and the sums of exponentials that csrc/common/distillation_row.h makes a divergence of. A label joins the softmax
of the other classes after that. Every expert has a denominator: the last program divides.

**Backward.** Elementwise from the state, a chunk of the classes and a share of the samples a program.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ltkernels.triton.row_loss import divergence, log1p, masked_term
from ltkernels.triton.sums import ABSENT_CLASS, LOG2_E, OUT_OF_RANGE, add_up, finite, inverse_of, labels
from ltkernels.triton.tiles import (
    _CLASSES,
    are_classes,
    are_rows,
    lane_max,
    lane_sum,
    multiple,
    of_rows,
    pointers,
    tile_columns,
)


@triton.jit
def _adjusted(x, scale, class_scale, class_bias, expert, classes, columns, inside):
    """``s (a x + b)`` of an expert's tile."""
    if class_scale is not None:
        x = x * tl.load(class_scale + expert * classes + columns, mask=inside, other=1.0)
    if class_bias is not None:
        x = x + tl.load(class_bias + expert * classes + columns, mask=inside, other=0.0)
    return x * scale


@triton.jit
def _softened(x, temperature, columns, inside):
    if temperature is not None:
        x = x * tl.load(temperature + columns, mask=inside, other=1.0)
    return x


@triton.jit
def _of_mean(mean, row, columns, classes, UNIT: tl.constexpr, VEC: tl.constexpr):
    """Pointers to a tile of the mean, whose rows lie one after the other."""
    stride = multiple(classes, VEC) if UNIT == _CLASSES else classes
    return of_rows(mean + row.to(tl.int64) * stride) + columns


@triton.jit
def _finish_batch(loss, tail, partials, tickets, experts, reduction, empty_zero):
    """The batch's loss and denominators, by the program that comes last.

    ``partials`` has for each expert losses and weights of all programs, then divergences and numbers of samples.
    """
    programs = tl.num_programs(0)
    if reduction <= 1:
        if tl.program_id(0) == 0:
            for e in range(experts + 1):
                tl.store(tail + e, 1.0)
    if reduction > 0:
        tl.debug_barrier()  # the ticket is taken by one thread, which has to have seen what the others stored
        if tl.atomic_add(tickets, 1, sem="acq_rel") == programs - 1:
            tl.store(tickets, 0)
            others = partials + 2 * experts * programs
            count = add_up(others + programs, programs)
            total = add_up(others, programs)
            weights = tl.zeros((), tl.float64)
            if reduction > 1:
                total = total / tl.where(count == 0.0, 1.0, count)
                tl.store(tail + experts, 1.0 / tl.where(count == 0.0, 1.0, count))
            for e in range(experts):
                part = add_up(partials + 2 * e * programs, programs)
                if reduction > 1:
                    weight = tl.where(reduction == 3, count, add_up(partials + (2 * e + 1) * programs, programs))
                    inverse = tl.where(weight == 0.0, 0.0, 1.0 / tl.where(weight == 0.0, 1.0, weight))
                    tl.store(tail + e, inverse)
                    part = tl.where(weight == 0.0, 0.0, part * inverse)
                    weights += weight
                total += part
            empty = (reduction > 1) & (weights == 0.0) & (empty_zero == 0)
            tl.store(loss, tl.where(empty, float("nan"), total))


@triton.jit(
    do_not_specialize=[
        "experts", "classes", "groups", "inner", "input_expert", "input_group", "input_class", "input_row",
        "teacher_group", "teacher_class", "teacher_row", "ignore_index", "reduction", "empty_zero",
    ],
    do_not_specialize_on_alignment=[
        "input", "target", "weight", "class_margin", "sample_weight", "teacher", "loss", "state", "partials", "tickets",
        "error",
    ],
)  # fmt: skip
def forward_kernel(
    input, target, weight, class_scale, class_bias, class_margin, temperature, sample_weight, teacher, loss, mean,
    state, partials, tickets, error, experts: tl.int32, input_expert: tl.int64,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    teacher_group: tl.int64, teacher_class: tl.int64, teacher_row: tl.int64,
    ignore_index: tl.int64, reduction: tl.int32, empty_zero: tl.int32,
    scale: tl.float64, diversity: tl.float64, distillation: tl.float64, distillation_scale: tl.float64,
    DIVERSE: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """States and losses of samples, and by the last program the mean. ONE: a tile holds whole rows (K L >= classes)."""
    T: tl.constexpr = state.dtype.element_ty
    NOTHING: tl.constexpr = -float("inf")
    s = tl.full((), scale, T)
    tau = tl.full((), distillation_scale, T)
    width = 5 * experts + 6
    factor = tl.full((), diversity, T)
    if temperature is not None:
        factor *= tl.load(temperature + classes)
    all_columns = tile_columns(K, L)
    blocks = groups * tl.cdiv(inner, R)  # one group of rows, or none without samples
    programs = tl.num_programs(0)
    share = tl.cdiv(blocks, programs)
    first = tl.program_id(0) * share
    end = K * L if ONE else classes
    mine = partials + tl.program_id(0)
    if reduction > 0:
        for e in range(2 * experts):
            tl.store(mine + e * programs, 0.0)
    divergences = tl.zeros((R,), tl.float64)
    count = tl.zeros((R,), tl.float64)
    for tile in range(first, tl.minimum(first + share, blocks)):
        group = tile // blocks  # 0
        row = tile * R + tl.arange(0, R)
        exists = are_rows(row, inner, UNIT, VEC)
        y, ignored, known = labels(target, row.to(tl.int64), exists, classes, ignore_index)
        counted = exists & ~ignored
        wrong = tl.where(counted & ~known, OUT_OF_RANGE, 0)
        y = tl.where(known & counted, y, -1).to(tl.int32)
        states = state + row.to(tl.int64) * width
        of_sample = states + 5 * experts
        r = tl.full((R,), 1.0, T)
        if sample_weight is not None:
            r = tl.load(sample_weight + row.to(tl.int64), mask=exists, other=0.0)
        value = tl.zeros((R,), T)  # of the sample
        mean_max = tl.zeros((R,), T)
        mean_total = tl.full((R,), 1.0, T)

        if mean is not None:
            top = tl.full((R, L), NOTHING, T)
            for start in range(0, end, K * L):
                columns = start + all_columns
                inside = are_classes(columns, classes, UNIT, VEC)
                mask = inside & of_rows(exists)
                at = pointers(input, group, row, columns, input_group, input_class, input_row, UNIT, VEC)
                z = tl.load(at, mask=mask, other=NOTHING).to(T)
                for e in range(1, experts):
                    at = pointers(
                        input + e * input_expert, group, row, columns, input_group, input_class, input_row, UNIT, VEC
                    )
                    z += tl.load(at, mask=mask, other=0.0).to(T)
                z = z / experts.to(T)
                tl.store(_of_mean(mean, row, columns, classes, UNIT, VEC), z, mask=mask)
                if DIVERSE:
                    top = tl.maximum(top, lane_max(_softened(z, temperature, columns, inside)))
            tl.debug_barrier()  # it may be read by other threads than wrote it
            if DIVERSE:
                mean_max = finite(tl.max(top, 1))
                total = tl.zeros((R, L), T)
                for start in range(0, end, K * L):
                    columns = start + all_columns
                    inside = are_classes(columns, classes, UNIT, VEC)
                    z = tl.load(
                        _of_mean(mean, row, columns, classes, UNIT, VEC), mask=inside & of_rows(exists), other=NOTHING
                    )
                    b = _softened(z, temperature, columns, inside) - of_rows(mean_max)
                    total += lane_sum(tl.exp2(b * LOG2_E))
                mean_total = tl.sum(total, 1)
                tl.store(of_sample, mean_max, mask=exists)
                tl.store(of_sample + 1, 1.0 / mean_total, mask=exists)

        if teacher is not None:
            top_a = tl.full((R, L), NOTHING, T)
            top_b = tl.full((R, L), NOTHING, T)
            for start in range(0, end, K * L):
                columns = start + all_columns
                mask = are_classes(columns, classes, UNIT, VEC) & of_rows(exists)
                z = tl.load(_of_mean(mean, row, columns, classes, UNIT, VEC), mask=mask, other=NOTHING)
                t = pointers(teacher, group, row, columns, teacher_group, teacher_class, teacher_row, UNIT, VEC)
                top_a = tl.maximum(top_a, lane_max(z * tau))
                top_b = tl.maximum(top_b, lane_max(tl.load(t, mask=mask, other=NOTHING).to(T) * tau))
            max_a = finite(tl.max(top_a, 1))
            max_b = finite(tl.max(top_b, 1))
            sum_a = tl.zeros((R, L), T)
            sum_b = tl.zeros((R, L), T)
            excess = tl.zeros((R, L), T)
            distance = tl.zeros((R, L), T)
            for start in range(0, end, K * L):
                columns = start + all_columns
                mask = are_classes(columns, classes, UNIT, VEC) & of_rows(exists)
                z = tl.load(_of_mean(mean, row, columns, classes, UNIT, VEC), mask=mask, other=NOTHING)
                t = pointers(teacher, group, row, columns, teacher_group, teacher_class, teacher_row, UNIT, VEC)
                a = z * tau - of_rows(max_a)
                b = tl.load(t, mask=mask, other=NOTHING).to(T) * tau - of_rows(max_b)
                ea = tl.exp2(a * LOG2_E)
                eb = tl.exp2(b * LOG2_E)
                sum_a += lane_sum(ea)
                sum_b += lane_sum(eb)
                excess += lane_sum(ea - eb)
                distance += lane_sum(tl.where(eb != 0.0, eb * (b - a), 0.0))
            student, of_teacher = tl.sum(sum_a, 1), tl.sum(sum_b, 1)
            kl = divergence(student, of_teacher, tl.sum(excess, 1), tl.sum(distance, 1))
            tl.store(of_sample + 2, max_a, mask=exists)
            tl.store(of_sample + 3, 1.0 / student, mask=exists)
            tl.store(of_sample + 4, max_b, mask=exists)
            tl.store(of_sample + 5, 1.0 / of_teacher, mask=exists)
            # masked_term, in the form in which ptxas keeps nothing on the stack without diversity.
            of_kl = tl.full((), distillation, T) * r
            value += of_kl * tl.where((of_kl == 0.0) & (kl > 1e30), 0.0, kl)

        losses = tl.zeros((R,), T)
        for e in range(experts):
            base = input + e * input_expert
            top_u = tl.full((R, L), NOTHING, T)
            top_a = tl.full((R, L), NOTHING, T)
            for start in range(0, end, K * L):
                columns = start + all_columns
                inside = are_classes(columns, classes, UNIT, VEC)
                at = pointers(base, group, row, columns, input_group, input_class, input_row, UNIT, VEC)
                x = tl.load(at, mask=inside & of_rows(exists), other=NOTHING).to(T)
                u = _adjusted(x, s, class_scale, class_bias, e, classes, columns, inside)
                top_u = tl.maximum(top_u, lane_max(tl.where((columns == of_rows(y)) | ~inside, NOTHING, u)))
                if DIVERSE:
                    top_a = tl.maximum(top_a, lane_max(_softened(x, temperature, columns, inside)))
            max_u = tl.max(top_u, 1)
            max_a = finite(tl.max(top_a, 1))
            others = tl.zeros((R, L), T)
            sum_a = tl.zeros((R, L), T)
            excess = tl.zeros((R, L), T)
            distance = tl.zeros((R, L), T)
            for start in range(0, end, K * L):
                columns = start + all_columns
                inside = are_classes(columns, classes, UNIT, VEC)
                mask = inside & of_rows(exists)
                at = pointers(base, group, row, columns, input_group, input_class, input_row, UNIT, VEC)
                x = tl.load(at, mask=mask, other=NOTHING).to(T)
                u = _adjusted(x, s, class_scale, class_bias, e, classes, columns, inside)
                u = tl.where((columns == of_rows(y)) | ~inside, NOTHING, u)
                others += lane_sum(tl.exp2((u - of_rows(finite(max_u))) * LOG2_E))
                if DIVERSE:
                    z = tl.load(_of_mean(mean, row, columns, classes, UNIT, VEC), mask=mask, other=NOTHING)
                    a = _softened(x, temperature, columns, inside) - of_rows(max_a)
                    b = _softened(z, temperature, columns, inside) - of_rows(mean_max)
                    ea = tl.exp2(a * LOG2_E)
                    eb = tl.exp2(b * LOG2_E)
                    sum_a += lane_sum(ea)
                    excess += lane_sum(ea - eb)
                    distance += lane_sum(tl.where(eb != 0.0, eb * (b - a), 0.0))

            used = counted & (y >= 0)
            w = tl.full((R,), 1.0, T)
            if weight is not None:
                w = tl.load(weight + e * classes + y, mask=used, other=0.0)
            of_label = row.to(tl.int64) * input_row + y.to(tl.int64) * input_class
            own = tl.load(base + of_label, mask=used, other=0.0).to(T)
            if class_scale is not None:
                own *= tl.load(class_scale + e * classes + y, mask=used, other=1.0)
            if class_bias is not None:
                bias = tl.load(class_bias + e * classes + y, mask=used, other=0.0)
                wrong = tl.where((bias == NOTHING) & (w != 0.0), ABSENT_CLASS, wrong)
                own += bias
            if class_margin is not None:
                own -= tl.load(class_margin + e * classes + y, mask=used, other=0.0)
            own *= s
            of_others = tl.sum(others, 1)
            raised = tl.maximum(own, max_u)
            rest = of_others * tl.exp2(tl.where(max_u == NOTHING, 0.0, max_u - raised) * LOG2_E)
            at_label = tl.exp2((own - raised) * LOG2_E)
            sum_u = at_label + rest
            confident = at_label > rest
            ratio = tl.where(confident, rest / at_label, 0.0)
            nll = tl.where(confident, log1p(ratio), raised - own + tl.log(sum_u))
            nothing = tl.where(wrong > 0, float("nan"), 0.0).to(T)
            # What has no weight adds nothing, also where no class is left and the softmax would be 0 / 0.
            without = ~used | (wrong > 0) | ((r * w + of_others == 0.0) & (own == NOTHING))
            tl.store(states + 5 * e, tl.where(without, nothing, raised), mask=exists)
            tl.store(states + 5 * e + 1, tl.where(without, nothing, 1.0 / sum_u), mask=exists)
            tl.store(states + 5 * e + 2, tl.where(without, nothing, -rest / sum_u), mask=exists)
            nll = tl.where(without, nothing, masked_term(r * w, nll))
            losses += nll
            if reduction > 0:  # summed in memory: as many registers as there are experts would be too many
                sums = mine + 2 * e * programs
                tl.debug_barrier()
                loss_sum = tl.load(sums) + tl.sum(nll.to(tl.float64))
                weight_sum = tl.load(sums + programs) + tl.sum(tl.where(used, r * w, 0.0).to(tl.float64))
                tl.debug_barrier()
                tl.store(sums, loss_sum)
                tl.store(sums + programs, weight_sum)
            if DIVERSE:
                of_expert = tl.sum(sum_a, 1)
                kl = divergence(of_expert, mean_total, tl.sum(excess, 1), tl.sum(distance, 1))
                tl.store(states + 5 * e + 3, max_a, mask=exists)
                tl.store(states + 5 * e + 4, 1.0 / of_expert, mask=exists)
                value += masked_term(factor * r, kl)

        tl.store(error + tl.zeros_like(row), wrong, mask=wrong > 0)
        value = tl.where(counted, value, 0.0)
        divergences += value.to(tl.float64)
        count += counted.to(tl.float64)
        if reduction == 0:
            tl.store(loss + row.to(tl.int64), losses + value, mask=exists)

    if reduction > 0:
        tl.store(mine + 2 * experts * programs, tl.sum(divergences))
        tl.store(mine + (2 * experts + 1) * programs, tl.sum(count))
    tail = state + (groups * inner).to(tl.int64) * width
    _finish_batch(loss, tail, partials, tickets, experts, reduction, empty_zero)


@triton.jit(
    do_not_specialize=[
        "experts", "classes", "groups", "inner", "input_expert", "out_expert", "input_group", "input_class",
        "input_row", "teacher_group", "teacher_class", "teacher_row", "out_group", "out_class", "out_row",
        "grad_group", "grad_row", "ignore_index",
    ],
    do_not_specialize_on_alignment=[
        "grad", "state", "input", "target", "weight", "sample_weight", "teacher", "d_input", "error",
    ],
)  # fmt: skip
def backward_kernel(
    grad, state, input, target, weight, class_scale, class_bias, temperature, sample_weight, teacher, d_input, error,
    experts: tl.int32, input_expert: tl.int64, out_expert: tl.int64,
    classes: tl.int32, groups: tl.int32, inner: tl.int32,
    input_group: tl.int64, input_class: tl.int64, input_row: tl.int64,
    teacher_group: tl.int64, teacher_class: tl.int64, teacher_row: tl.int64,
    out_group: tl.int64, out_class: tl.int64, out_row: tl.int64, grad_group: tl.int64, grad_row: tl.int64,
    ignore_index: tl.int64,
    scale: tl.float64, diversity: tl.float64, distillation: tl.float64, distillation_scale: tl.float64,
    DIVERSE: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits. Programs are numbered chunks of classes first, then splits of the samples."""
    T: tl.constexpr = state.dtype.element_ty
    NOTHING: tl.constexpr = -float("inf")
    s = tl.full((), scale, T)
    tau = tl.full((), distillation_scale, T)
    width = 5 * experts + 6
    chunks = tl.cdiv(classes, K * L)
    columns = tl.program_id(0) % chunks * (K * L) + tile_columns(K, L)
    inside = are_classes(columns, classes, UNIT, VEC)
    tail = state + (groups * inner).to(tl.int64) * width
    inverse_count = inverse_of(tail + experts, error)
    if not DIVERSE and teacher is None:  # whose terms are NaN by themselves
        s += inverse_count - inverse_count
    factor = tl.full((), diversity, T) * inverse_count
    t = tl.full((), 1.0, T)
    if temperature is not None:
        factor *= tl.load(temperature + classes)
        t = tl.load(temperature + columns, mask=inside, other=1.0)
    kd = tl.full((), distillation, T) * tau * inverse_count / experts.to(T)
    blocks = groups * tl.cdiv(inner, R)
    share = tl.cdiv(blocks, tl.num_programs(0) // chunks)
    first = tl.program_id(0) // chunks * share
    for tile in range(first, tl.minimum(first + share, blocks)):
        group = tile // blocks  # 0
        row = tile * R + tl.arange(0, R)
        exists = are_rows(row, inner, UNIT, VEC)
        mask = inside & of_rows(exists)
        y, ignored, known = labels(target, row.to(tl.int64), exists, classes, ignore_index)
        used = exists & ~ignored
        y = tl.where(known, y, -1).to(tl.int32)
        states = state + row.to(tl.int64) * width
        of_sample = states + 5 * experts
        upstream = tl.load(grad + row.to(tl.int64) * grad_row, mask=used, other=0.0).to(T)
        r = upstream
        if sample_weight is not None:
            r = upstream * tl.load(sample_weight + row.to(tl.int64), mask=used, other=0.0)
        at_label = columns == of_rows(y)

        common = tl.zeros_like(at_label).to(T)
        if DIVERSE or teacher is not None:
            at = pointers(input, group, row, columns, input_group, input_class, input_row, UNIT, VEC)
            z = tl.load(at, mask=mask, other=NOTHING).to(T)
            for e in range(1, experts):
                at = pointers(
                    input + e * input_expert, group, row, columns, input_group, input_class, input_row, UNIT, VEC
                )
                z += tl.load(at, mask=mask, other=0.0).to(T)
            z = z / experts.to(T)
            if DIVERSE:
                top = tl.load(of_sample, mask=used, other=0.0)
                of_mean = factor * r * tl.load(of_sample + 1, mask=used, other=0.0)
                common -= t * (of_rows(of_mean) * tl.exp2((z * t - of_rows(top)) * LOG2_E))
            if teacher is not None:
                top = tl.load(of_sample + 2, mask=used, other=0.0)
                of_student = kd * r * tl.load(of_sample + 3, mask=used, other=0.0)
                common += of_rows(of_student) * tl.exp2((z * tau - of_rows(top)) * LOG2_E)
                b = pointers(teacher, group, row, columns, teacher_group, teacher_class, teacher_row, UNIT, VEC)
                b = tl.load(b, mask=mask, other=NOTHING).to(T) * tau
                top = tl.load(of_sample + 4, mask=used, other=0.0)
                of_teacher = kd * r * tl.load(of_sample + 5, mask=used, other=0.0)
                common -= of_rows(of_teacher) * tl.exp2((b - of_rows(top)) * LOG2_E)

        for e in range(experts):
            at = pointers(input + e * input_expert, group, row, columns, input_group, input_class, input_row, UNIT, VEC)
            x = tl.load(at, mask=mask, other=NOTHING).to(T)
            u = _adjusted(x, s, class_scale, class_bias, e, classes, columns, inside)
            w = r * tl.load(tail + e)
            if weight is not None:
                w *= tl.load(weight + e * classes + y, mask=used & known, other=0.0)
            top = tl.load(states + 5 * e, mask=used, other=0.0)
            inverse = tl.load(states + 5 * e + 1, mask=used, other=0.0)
            rest = tl.load(states + 5 * e + 2, mask=used, other=0.0)
            d = of_rows(w * inverse) * tl.exp2((u - of_rows(top)) * LOG2_E)
            d = tl.where(at_label, of_rows(w * rest), d) * s
            # What has no weight moves nothing, even where its loss is infinite; what is wrong stays NaN.
            d = tl.where(of_rows((w == 0.0) & (rest == rest)), 0.0, d)
            if class_scale is not None:
                d *= tl.load(class_scale + e * classes + columns, mask=inside, other=1.0)
            if DIVERSE:
                top = tl.load(states + 5 * e + 3, mask=used, other=0.0)
                of_soft = factor * r * tl.load(states + 5 * e + 4, mask=used, other=0.0)
                d += t * (of_rows(of_soft) * tl.exp2((x * t - of_rows(top)) * LOG2_E))
            if DIVERSE or teacher is not None:
                d += common
            d = tl.where(of_rows(used), d, 0.0)
            out = pointers(d_input + e * out_expert, group, row, columns, out_group, out_class, out_row, UNIT, VEC)
            tl.store(out, d.to(d_input.dtype.element_ty), mask=mask)

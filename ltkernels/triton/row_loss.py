"""The row maths of csrc/common in Triton: from the few sums that a row's sweep leaves to its loss and state.

The derivations stand in row_loss.h and distillation_row.h. Everything here is a vector with a value a row; it is called
for many rows at once (one a thread), since what every thread of a row repeats for itself costs as much as the row's
logits do.

The functions that neither Triton 3.4 nor its interpreter has are written out below: they have to keep the digits of
small losses, which ``log(1 + x)`` and ``1 - exp(-x)`` round away.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weighted(weight, value):
    """``weight * value``, where a weight of zero takes out an infinite value."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def masked_term(coefficient, value):
    """The same, but NaN stays NaN: csrc/common/masked_term.h."""
    return tl.where((coefficient == 0) & (value > 1e30), 0.0, coefficient * value)


@triton.jit
def log1p(x):
    """``log(1 + x)`` for ``-1/2 <= x <= 1``, to the last digits of the smallest x.

    It is ``2 atanh(z)`` with ``z = x / (2 + x)``, at most 1/3 in size, whose series ``2 (z + z^3 / 3 + ...)`` loses
    nothing and is finished after 8 terms (17 for float64): the next would add ``9^-8 / 17 = 1e-9`` (``9^-17 / 35``).
    """
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    z = x / (2.0 + x)
    square = z * z
    series = tl.zeros_like(x)
    for n in tl.static_range(TERMS):
        series = series * square + 2.0 / (2 * (TERMS - 1 - n) + 1)
    return z * series


@triton.jit
def one_minus_exp(x):
    """``1 - e^-x`` for ``x >= 0``; below 1/2 by Taylor's series, which does not cancel.

    Its term n is at most ``2^-n / n!``: 10 (18) terms leave 1e-11 (1e-22) of the result.
    """
    TERMS: tl.constexpr = 18 if x.dtype == tl.float64 else 10
    small = tl.where(x < 0.5, x, 0.0)
    series = tl.full(x.shape, 1.0, x.dtype)
    for n in tl.static_range(TERMS):
        series = 1.0 - series * small * (1.0 / (TERMS + 1 - n))
    return tl.where(x < 0.5, small * series, 1.0 - tl.exp2(x * -1.4426950408889634))


@triton.jit
def power(x, exponent):
    """``x^exponent`` for normal ``x > 0``.

    With ``x = f 2^k`` it is ``2^(exponent k) 2^(exponent log2 f)``. ``exponent log2 x`` in one piece would be a large
    number for a small x, and an error in its last digit one in the sixth of the result.
    """
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        k = (bits >> 52) - 1023
        fraction = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        k = (bits >> 23) - 127
        fraction = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    return tl.exp2(exponent * k.to(x.dtype)) * tl.exp2(exponent * tl.log2(fraction))


@triton.jit
def focal_terms(ce, rest, gamma, focal_weighted, focal_detached):
    """The focal factor F and the factors A and B of the gradient, from ce and ``rest = 1 - e^-nll``."""
    modulation = tl.full(ce.shape, 1.0, ce.dtype)
    a = modulation
    b = tl.zeros_like(ce)
    if gamma > 0:  # not a constant of the compilation: a row is a thread's here, which makes the branch cheap
        rest = tl.where(focal_weighted != 0, one_minus_exp(ce), rest)
        modulation = power(rest, gamma)
        p = 1.0 - rest
        slope = tl.where(p > 0, ce * gamma * (modulation / rest) * p, 0.0)  # p = 0: ce may be infinite
        slope = tl.where(focal_detached != 0, 0.0, slope)
        # At rest = 0 all have the limit 0, though rest^(gamma - 1) alone is infinite for gamma < 1; NaN stays NaN.
        modulation = tl.where(rest > 0, modulation, rest * 0.0)
        slope = tl.where(rest > 0, slope, rest * 0.0)
        a = tl.where(focal_weighted != 0, modulation + slope, modulation)
        b = tl.where(focal_weighted != 0, 0.0, slope)
    return modulation, a, b


@triton.jit
def with_influence(modulation, a, b, ce, rest, norm, alpha, eps, detached):
    """The factors F, A and B times ``alpha / (2 norm rest + eps)``, which has a derivative of its own."""
    below = 2.0 * norm * rest + eps
    factor = alpha / below
    p = 1.0 - rest
    slope = ce * modulation * factor * (2.0 * norm * p / below)
    slope = tl.where((detached != 0) | ~(p > 0), 0.0, slope)
    return modulation * factor, a * factor, b * factor - slope


@triton.jit
def _label_nll(others, at_label, otherwise):
    """-log p of labels, with the digits of a small one: ``otherwise`` is a difference of far larger numbers there."""
    confident = at_label > others
    ratio = tl.where(confident, others / at_label, 0.0)
    return tl.where(confident, log1p(ratio), otherwise)


@triton.jit
def finish_label_row(
    maximum, others, at_label, label_distance, smooth_distance, smooth_total, weight, smooth_weight, row_weight,
    label_smoothing, smoothing_per_class, gamma, z_loss, focal_weighted, focal_detached,
    norm=None, influence_alpha=1.0, influence_eps=0.0,
):  # fmt: skip
    """Loss of rows with labels, and their state after the maximum: r P / sum, r A, dl/du_y. See the header."""
    total = others + at_label
    log_sum = tl.log(total)
    lse = maximum + log_sum
    p = at_label / total
    rest = others / total
    nll = _label_nll(others, at_label, label_distance + log_sum)
    hard = (1.0 - label_smoothing) * weight
    soft = smoothing_per_class
    ce = weighted(hard, nll)
    ce = tl.where(soft > 0, ce + soft * (smooth_total * log_sum + smooth_distance), ce)
    modulation, a, b = focal_terms(ce, rest, gamma, focal_weighted, focal_detached)
    if norm is not None:
        modulation, a, b = with_influence(
            modulation, a, b, ce, rest, norm, influence_alpha, influence_eps, focal_detached
        )  # fmt: skip
    spread = a * soft * smooth_total + 2.0 * z_loss * lse  # P minus the label's own part of it
    own = a * hard + b
    probability = row_weight * (own + spread) / total
    factor = row_weight * a
    gradient_at_label = row_weight * (spread * p - own * rest - a * soft * smooth_weight)
    loss = weighted(modulation, ce) + tl.where(z_loss > 0, z_loss * lse * lse, 0.0)
    return weighted(row_weight, loss), probability, factor, gradient_at_label


@triton.jit
def finish_probability_row(
    maximum, total, target_total, distance, weighted_total, weighted_distance, smooth_distance, smooth_total,
    row_weight, label_smoothing, smoothing_per_class, gamma, z_loss, focal_weighted, focal_detached,
):  # fmt: skip
    """Loss of rows of probabilities, and their state after the maximum: r P / sum, r A, r B."""
    log_sum = tl.log(total)
    lse = maximum + log_sum
    nll = target_total * log_sum + distance
    hard = 1.0 - label_smoothing
    soft = smoothing_per_class
    ce = tl.where(hard > 0, hard * (weighted_total * log_sum + weighted_distance), 0.0)
    ce = tl.where(soft > 0, ce + soft * (smooth_total * log_sum + smooth_distance), ce)
    modulation, a, b = focal_terms(ce, one_minus_exp(nll), gamma, focal_weighted, focal_detached)
    everything = a * (hard * weighted_total + soft * smooth_total) + b * target_total + 2.0 * z_loss * lse
    loss = weighted(modulation, ce) + tl.where(z_loss > 0, z_loss * lse * lse, 0.0)
    return weighted(row_weight, loss), row_weight * everything / total, row_weight * a, row_weight * b


@triton.jit
def finish_label(others, at_label, label_distance):
    """-log p of labels in a plain softmax, and for the gradient 1 / sum and p - 1."""
    total = others + at_label
    return _label_nll(others, at_label, label_distance + tl.log(total)), 1.0 / total, -others / total


@triton.jit
def divergence(student, teacher, excess, distance):
    """KL of rows from the sums A, B, A - B and ``sum_j e^(b_j) (b_j - a_j)``."""
    relative = excess / teacher
    near = (relative > -0.5) & (relative < 1.0)
    log_ratio = tl.where(near, log1p(tl.where(near, relative, 0.0)), tl.log(student / teacher))
    kl = distance / teacher + log_ratio
    return tl.where(kl < 0.0, 0.0, kl)  # by rounding

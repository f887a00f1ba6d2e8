"""The row maths of csrc/common/row_loss.h in Triton: from the few sums that a row's sweep leaves to its loss and state.

The derivation stands in that header. Everything here is a vector with a value a row; it is called for many rows at once
(one a thread), since what every thread of a row repeats for itself costs as much as the row's logits do.

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
def log1p(x):
    """``log(1 + x)`` for ``0 <= x <= 1``, to the last digits of the smallest x.

    It is ``2 atanh(z)`` with ``z = x / (2 + x) <= 1/3``, whose series ``2 (z + z^3 / 3 + z^5 / 5 + ...)`` loses nothing
    and is finished after 8 terms (17 for float64): the next would add ``9^-8 / 17 = 1e-9`` (``9^-17 / 35 = 2e-18``).
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
def cosine_and_sine(angle):
    """Of angles in ``[0, pi]``, by Taylor's series around pi / 2, an argument of at most pi / 2 then.

    ``tl.cos`` is an approximation to 2^-21 in float32. The first term left out, ``(pi/2)^16 / 16!`` (``^26 / 26!``), is
    less than 1e-10 (1e-21). Half of pi comes in two parts, so that the difference is exact where it is small.
    """
    LAST: tl.constexpr = 26 if angle.dtype == tl.float64 else 16
    if angle.dtype == tl.float64:
        t = (angle - 1.5707963267948966) - 6.123233995736766e-17
    else:
        t = (angle - 1.57079637050628662109375) + 4.37113900018624283e-8
    square = t * t
    even = tl.full(angle.shape, 1.0, angle.dtype)
    odd = even
    for n in tl.static_range(LAST // 2 - 1):  # powers LAST - 2, LAST - 4, ..., 2, in Horner's scheme
        even = 1.0 - even * square * (1.0 / ((LAST - 2 * n - 2) * (LAST - 2 * n - 3)))
        odd = 1.0 - odd * square * (1.0 / ((LAST - 2 * n - 2) * (LAST - 2 * n - 1)))
    return -t * odd, even


@triton.jit
def arc_cosine(cosine, margin, straight_through):
    """``cos(acos(c) + m)`` and its slope: csrc/common/row_adjustments.h."""
    cos_m, sin_m = cosine_and_sine(margin)
    squared = 1.0 - cosine * cosine
    flat = ~(squared >= 1e-12)
    sine = tl.sqrt(tl.where(flat, 1e-12, squared))
    moved = cosine * cos_m - sine * sin_m
    slope = tl.where(flat, cos_m, cos_m + cosine / sine * sin_m)
    past_pi = ~(cosine > -cos_m)
    slope = tl.where(past_pi | (straight_through != 0), 1.0, slope)
    return tl.where(past_pi & (straight_through == 0), cosine - margin * sin_m, moved), slope


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
    confident = at_label > others
    ratio = tl.where(confident, others / at_label, 0.0)
    nll = tl.where(confident, log1p(ratio), label_distance + log_sum)
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

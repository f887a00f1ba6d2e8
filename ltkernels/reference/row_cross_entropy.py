"""Softmax cross-entropy whose adjustments depend on the row, in plain PyTorch: the definition.

What reference/cross_entropy.py defines for tables that all rows share, here with a row's own. For row i with logits
``x``, label ``y`` and the class tables ``a``, ``b``::

    u_j = s (A_j x_j + B_j) + pair_ij - s m_y [j = y]      A = a, B = b, or with a row gate g: A = 1 + g a, B = g b

* **Margins**: additive as written, or on the angle of a cosine ``x_y = cos(t)``, which is replaced by ``cos(t + m_y)``.
* **pair_ij**, which no gradient flows through: a table's entry ``[y, j]``; seesaw's ``p min(0, log n_j - log n_y) +
  q max(0, log p_j - log max(p_y, eps))`` with p the softmax of the rest of u; or -inf for rare classes that are dropped
  at random. It is 0 at j = y but for the table.
* **Two labels**: ``lam`` of the loss of one and ``1 - lam`` of that of the other, each with its own margin, weight and
  denominator, as if the criterion were called twice.
* **Smoothing** has an eps of the label's class, and may leave out the label: ``q_y = 1 - eps``, the others
  ``eps / (K - 1)``.
* **Influence**: a factor ``alpha / (h |p - onehot|_1 + eps)`` of the row, with its feature's norm h, beside the focal
  factor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ltkernels.ops.options import MarginType, PairTerm, Reduction, RowCrossEntropyOptions
from ltkernels.reference.cross_entropy import (
    _focal_factor,
    _masked_dot,
    _masked_product,
    _require,
)
from ltkernels.reference.cross_entropy import (
    check_values as check_shared_values,
)
from ltkernels.reference.sampling import philox

CLASS_DROPS = 4  # stream, as in csrc/common/philox.h
SINE_FLOOR = 1e-12  # of a squared sine: below it the angle has no slope


class _Tables(NamedTuple):
    """What all labels of a batch share, in the type of the computation."""

    weight: Tensor | None
    class_bias: Tensor | None
    class_margin: Tensor | None
    class_smoothing: Tensor | None
    feature_norm: Tensor | None


def row_cross_entropy(
    input: Tensor,
    target: Tensor,
    second_target: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    class_scale: Tensor | None,
    class_bias: Tensor | None,
    class_margin: Tensor | None,
    class_smoothing: Tensor | None,
    sample_weight: Tensor | None,
    row_gate: Tensor | None,
    feature_norm: Tensor | None,
    pair: Tensor | None,
    pair_step: Tensor | None,
    options: RowCrossEntropyOptions,
) -> Tensor:
    """The loss of ``(N, C)`` or ``(N, C, D)`` logits, reduced as ``options.reduction`` says.

    Args:
        input: logits, floating.
        target: labels ``(N,)`` or ``(N, D)`` of an integer type.
        second_target: other labels of the same shape and type.
        lam: share of the first label: ``(1,)``, or one value a row.
        weight: ``(C,)`` class weights.
        class_scale: ``(C,)`` factors ``a``.
        class_bias: ``(C,)`` biases ``b``; ``-inf`` removes a class (without a row gate).
        class_margin: ``(C,)`` or ``(1,)`` margins ``m``, in radians for margins on the angle.
        class_smoothing: ``(C,)`` eps of each class, in place of ``options.label_smoothing``.
        sample_weight: row weights ``r`` of the labels' shape.
        row_gate: gates ``g`` of the labels' shape.
        feature_norm: L1 norms ``h`` of the rows' features, of the labels' shape.
        pair: by ``options.pair_term`` a table ``(C, C)``, ``log n`` ``(C,)``, or ``(C,)`` 1 where a class is rare.
        pair_step: 0-d int64: which of the random drops.
        options: the scalars.

    Returns:
        A 0-d tensor, or the labels' shape without reduction; float64 for float64 logits, else float32.
    """
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    num_classes = input.shape[1]
    row_shape = (*input.shape[:1], *input.shape[2:])

    def rows_of(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.reshape(-1).to(dtype)

    def table(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(input.device, dtype)

    x = input.movedim(1, -1).reshape(-1, num_classes).to(dtype)
    labels = [target.reshape(-1).long()]
    shares = [torch.ones((), dtype=dtype, device=x.device)]
    if second_target is not None:
        assert lam is not None
        labels.append(second_target.reshape(-1).long())
        share = lam.reshape(-1).to(x.device, dtype)
        shares = [share, 1.0 - share]
    valid = labels[0] != options.ignore_index
    for label in labels[1:]:
        valid = valid | (label != options.ignore_index)
    x = torch.where(valid[:, None], x, 0.0)  # what an ignored row holds, NaN even, reaches nothing
    u = _adjusted_logits(x, table(class_scale), table(class_bias), rows_of(row_gate), options.scale)
    tables = _Tables(
        table(weight), table(class_bias), table(class_margin), table(class_smoothing), rows_of(feature_norm)
    )
    row_weight = rows_of(sample_weight)
    pair = table(pair)
    losses, totals = [], []
    for label, share in zip(labels, shares, strict=True):
        loss, counted = _of_label(x, u, label, tables, row_weight, pair, pair_step, table(class_scale), options)
        losses.append(_masked_product(share.expand_as(loss), loss))
        totals.append(counted)

    if options.reduction == Reduction.NONE:
        return torch.stack(losses).sum(0).reshape(row_shape)
    total = torch.zeros((), dtype=dtype, device=x.device)
    for loss, counted in zip(losses, totals, strict=True):
        if options.reduction == Reduction.SUM:
            total = total + loss.sum()
            continue
        denominator = counted.sum()
        if options.empty_zero:
            nothing = denominator == 0
            total = total + torch.where(nothing, loss.sum() * 0.0, loss.sum() / torch.where(nothing, 1.0, denominator))
        else:
            total = total + loss.sum() / denominator
    return total


def _adjusted_logits(
    x: Tensor, class_scale: Tensor | None, class_bias: Tensor | None, row_gate: Tensor | None, scale: float
) -> Tensor:
    """``s (A x + B)``; a masked logit (-inf) stays masked and gives its factor a zero gradient, not ``0 * inf``."""
    if row_gate is not None:
        gate = row_gate[:, None]
        class_scale = 1.0 + gate * (x.new_zeros(1) if class_scale is None else class_scale)
        class_bias = None if class_bias is None else gate * class_bias
    u = x
    if class_scale is not None:
        masked = torch.isneginf(x)
        u = torch.where(masked, x, torch.where(masked, 0.0, x) * class_scale)
    if class_bias is not None:
        u = u + class_bias
    return u if scale == 1.0 else u * scale


def _of_label(
    x: Tensor,
    u: Tensor,
    label: Tensor,
    tables: _Tables,
    row_weight: Tensor | None,
    pair: Tensor | None,
    pair_step: Tensor | None,
    class_scale: Tensor | None,
    options: RowCrossEntropyOptions,
) -> tuple[Tensor, Tensor]:
    """Row losses of one label, and what each row adds to its denominator."""
    num_classes = x.shape[1]
    valid = label != options.ignore_index
    label = torch.where(valid, label, 0)
    outside = (label < 0) | (label >= num_classes)
    label = torch.where(outside, 0, label)
    at = label[:, None]
    if pair is not None:
        u = u + _pair_term(u.detach(), label, pair, pair_step, options)
    if tables.class_margin is not None:
        margin = tables.class_margin.expand(num_classes)[label]
        if options.margin_type != MarginType.ADDITIVE:
            cosine = x.gather(1, at)[:, 0]
            margin = cosine - arc_cosine(cosine, margin, options.margin_type)
            margin = margin if class_scale is None else class_scale[label] * margin
        u = u.scatter_add(1, at, -options.scale * margin[:, None])
    log_p = torch.log_softmax(u, dim=1)
    nll = -log_p.gather(1, at)[:, 0]
    weight = x.new_ones(num_classes) if tables.weight is None else tables.weight

    eps = torch.full((), options.label_smoothing, dtype=x.dtype, device=x.device)
    if tables.class_smoothing is not None:
        eps = tables.class_smoothing[label]
    present = x.new_ones(num_classes)
    if tables.class_bias is not None:
        present = torch.isfinite(tables.class_bias.detach()).to(x.dtype)
    reached = present.sum()
    if options.off_target:  # q_y = 1 - eps is (1 - e) + e / K for e = eps K / (K - 1)
        eps = torch.where(reached > 1, eps * reached / (reached - 1).clamp_min(1), 0.0)
    ce = _masked_product((1.0 - eps) * weight[label], nll)
    if options.label_smoothing > 0 or tables.class_smoothing is not None:
        ce = ce - _masked_product(eps / reached, _masked_dot(present * weight, log_p))

    loss = ce
    factor = None
    if options.focal_gamma > 0:
        factor = _focal_factor(ce if options.focal_weighted else nll, options.focal_gamma)
    if tables.feature_norm is not None:
        impossible = torch.isposinf(nll)  # a masked label: p_y is 0 and stays it
        rest = torch.where(impossible, 1.0, -torch.expm1(-torch.where(impossible, 1.0, nll)))  # 1 - p_y
        influence = options.influence_alpha / (2.0 * tables.feature_norm * rest + options.influence_eps)
        factor = influence if factor is None else factor * influence
    if factor is not None:
        loss = _masked_product(factor.detach() if options.focal_detached else factor, ce)
    if options.z_loss > 0:
        loss = loss + options.z_loss * torch.logsumexp(u, dim=1).square()
    counted = weight[label] if options.reduction == Reduction.MEAN_WEIGHT else torch.ones_like(nll)
    if row_weight is not None:
        loss = _masked_product(row_weight, loss)
        counted = counted * row_weight if options.reduction == Reduction.MEAN_WEIGHT else counted
    loss = torch.where(valid, loss, 0.0) * torch.where(outside, torch.nan, 1.0)
    return loss, torch.where(valid, torch.where(outside, 1.0, counted), 0.0)


def arc_cosine(cosine: Tensor, margin: Tensor, margin_type: int) -> Tensor:
    """``cos(acos(c) + m)``, without the angle: ``c cos m - sqrt(1 - c^2) sin m``.

    Exact: where ``acos(c) + m`` would pass pi, and the cosine rise again, ``c - m sin m`` goes on falling (the "easy
    margin" fallback of the ArcFace heads). Straight through: no fallback, and the gradient is that of ``c``.
    """
    sine = (1.0 - cosine.square()).clamp_min(SINE_FLOOR).sqrt()
    moved = cosine * margin.cos() - sine * margin.sin()
    if margin_type == MarginType.ARC_STRAIGHT_THROUGH:
        return cosine + (moved - cosine).detach()
    return torch.where(cosine > -margin.cos(), moved, cosine - margin * margin.sin())


def _pair_term(
    u: Tensor, label: Tensor, pair: Tensor, pair_step: Tensor | None, options: RowCrossEntropyOptions
) -> Tensor:
    """``pair_ij`` ``(rows, C)``."""
    at = label[:, None]
    if options.pair_term == PairTerm.TABLE:
        return pair[label]
    if options.pair_term == PairTerm.SEESAW:
        mitigation = options.pair_p * (pair[None, :] - pair[at]).clamp_max(0.0)
        log_p = torch.log_softmax(u, dim=1)
        ratio = log_p - log_p.gather(1, at).clamp_min(math.log(options.pair_eps))
        # A masked class stays masked: -inf - x is no compensation.
        return (mitigation + options.pair_q * ratio.clamp_min(0.0)).scatter(1, at, 0.0)
    dropped = class_drops(u.shape[0], pair, pair_step, options).scatter(1, at, False)
    return torch.where(dropped, -torch.inf, 0.0).to(u.dtype)


def class_drops(rows: int, rare: Tensor, pair_step: Tensor | None, options: RowCrossEntropyOptions) -> Tensor:
    """Which classes are dropped in which rows: rare ones whose word of Philox is below ``rate * 2^32``.

    The words of row i are those of the blocks at positions ``i ceil(C / 4), ...``, in order.
    """
    num_classes, device = rare.shape[0], rare.device
    blocks = -(-num_classes // 4)
    position = torch.arange(rows * blocks, device=device)
    step = torch.zeros((), dtype=torch.int64, device=device) if pair_step is None else pair_step.to(device)
    words = torch.stack(philox(position, step & 0xFFFFFFFF, CLASS_DROPS, options.seed), dim=1)
    below = words.reshape(rows, 4 * blocks)[:, :num_classes] < int(options.pair_p * 2.0**32)
    return below & (rare != 0)


def check_values(
    target: Tensor,
    second_target: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    class_scale: Tensor | None,
    class_bias: Tensor | None,
    class_margin: Tensor | None,
    class_smoothing: Tensor | None,
    sample_weight: Tensor | None,
    row_gate: Tensor | None,
    feature_norm: Tensor | None,
    pair: Tensor | None,
    num_classes: int,
    options: RowCrossEntropyOptions,
) -> None:
    """Raise on values no backend may accept; reads the tensors, so it is called for CPU tensors only."""
    for labels in (target, second_target):
        if labels is not None:
            check_shared_values(
                labels, weight, class_scale, class_bias, class_margin, sample_weight, num_classes, options.ignore_index
            )
    for name, value in (("lam", lam), ("label_smoothing", class_smoothing)):
        if value is not None:
            _require(name, value, (value >= 0) & (value <= 1), "values in [0, 1]")
    if class_margin is not None and options.margin_type != MarginType.ADDITIVE:
        _require("class_margin", class_margin, (class_margin >= 0) & (class_margin <= math.pi), "angles in [0, pi]")
    if row_gate is not None:
        _require("row_gate", row_gate, torch.isfinite(row_gate), "finite values")
        if class_bias is not None:
            _require("class_bias", class_bias, torch.isfinite(class_bias), "finite values with a row_gate")
    if feature_norm is not None:
        _require("feature_norm", feature_norm, torch.isfinite(feature_norm) & (feature_norm >= 0), "finite values >= 0")
    if pair is None:
        return
    if options.pair_term == PairTerm.TABLE:
        _require("pair_bias", pair, torch.isfinite(pair) | torch.isneginf(pair), "finite values or -inf")
        diagonal = pair.diagonal()
        _require("pair_bias", diagonal, torch.isfinite(diagonal), "finite values on the diagonal")

"""What the mean of row losses divides by: a sum over targets and weights, known before any logit is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltkernels.ops.options import Reduction


def inverse_denominator(
    logits: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, options: Any
) -> Tensor:
    """One over the denominator of a mean, 0-d float64; 0 for nothing with ``options.empty_zero``, else infinity.

    Args:
        logits: a tensor of the logits' shape, ``(N, C)`` or ``(N, C, P)``, which is not read.
        target: labels ``(N,)`` or ``(N, P)``, or probabilities of the logits' shape.
        weight: ``(C,)`` class weights.
        sample_weight: row weights of the labels' shape.
        options: what has ``reduction`` (a mean), ``ignore_index`` and ``empty_zero``.
    """
    total = denominator(
        target, logits.shape[1], weight, sample_weight, options.ignore_index, options.reduction == Reduction.MEAN_WEIGHT
    )
    nothing = total == 0
    return torch.where(nothing, 0.0 if options.empty_zero else torch.inf, torch.where(nothing, 1.0, total).reciprocal())


def denominator(
    target: Tensor,
    classes: int,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    by_weight: bool,
) -> Tensor:
    """The sum of the rows' weights, ``r_i w_{y_i}``, or without ``by_weight`` the number of rows; 0-d float64.

    Rows with ``ignore_index`` do not count; those of probabilities all do, by weight ``r_i``. A label out of range
    counts as class 0 does: what refuses it, or makes its loss NaN, is the kernel that reads it next.
    """
    if target.is_floating_point():
        if by_weight and sample_weight is not None:
            return sample_weight.sum(dtype=torch.float64)
        return torch.full((), target.numel() // classes, dtype=torch.float64, device=target.device)
    label = target.long()
    counted = label != ignore_index
    if not by_weight or (weight is None and sample_weight is None):
        return counted.sum().double()
    share = counted.double()
    if weight is not None:
        share = share * weight[torch.where(counted & (label >= 0) & (label < classes), label, 0)]
    return (share if sample_weight is None else share * sample_weight).sum()

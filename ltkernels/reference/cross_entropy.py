"""Softmax cross-entropy of adjusted logits in plain PyTorch: any dtype and device, differentiable any number of times.

This file defines the values. For row i with logits ``x``, label ``y`` and the options of
:func:`ltkernels.functional.cross_entropy`::

    u_j  = s * (a_j x_j + b_j - m_y [j = y])         adjusted logits
    nll  = -sum_j t_j log softmax(u)_j                t: one-hot of y, or the row of probabilities
    ce   = -sum_j w_j q_j log softmax(u)_j            q = (1 - eps) t + eps / K over the K classes with a finite bias
    F    = (1 - exp(-nll))^gamma                      or (1 - exp(-ce))^gamma for focal_pt="weighted"
    loss = r * (F * ce + z_loss * logsumexp(u)^2)

The mean divides by ``sum_i r_i w_{y_i}`` for labels and, as torch does, by ``sum_i r_i`` for probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltkernels.ops.options import CrossEntropyOptions, Reduction


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_scale: Tensor | None,
    class_bias: Tensor | None,
    class_margin: Tensor | None,
    sample_weight: Tensor | None,
    options: CrossEntropyOptions,
) -> Tensor:
    """The loss of ``(N, C)`` or ``(N, C, D)`` logits, reduced as ``options.reduction`` says.

    Args:
        input: logits, ``(N, C)`` or ``(N, C, D)``, floating.
        target: labels ``(N,)`` or ``(N, D)`` of an integer type, or probabilities of ``input``'s shape.
        weight: ``(C,)`` class weights.
        class_scale: ``(C,)`` factors ``a``.
        class_bias: ``(C,)`` biases ``b``; ``-inf`` removes a class.
        class_margin: ``(C,)`` or ``(1,)`` margins ``m``.
        sample_weight: row weights ``r`` of the labels' shape.
        options: the scalars.

    Returns:
        A 0-d tensor, or the labels' shape without reduction; float64 for float64 logits, else float32.
    """
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    num_classes = input.shape[1]
    row_shape = (*input.shape[:1], *input.shape[2:])
    x = input.movedim(1, -1).reshape(-1, num_classes).to(dtype)
    weight, class_scale, class_bias, class_margin = (
        None if v is None else v.to(x.device, dtype) for v in (weight, class_scale, class_bias, class_margin)
    )
    row_weight = None if sample_weight is None else sample_weight.reshape(-1).to(dtype)

    if target.is_floating_point():
        t = target.movedim(1, -1).reshape(-1, num_classes).to(dtype)
        valid = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        row_total = torch.ones(x.shape[0], dtype=dtype, device=x.device)
        u = _adjusted_logits(x, class_scale, class_bias, options.scale)
    else:
        label = target.reshape(-1).long()
        valid = label != options.ignore_index
        x = torch.where(valid[:, None], x, 0.0)  # what an ignored row holds, NaN even, reaches nothing
        label = torch.where(valid, label, 0)
        outside = (label < 0) | (label >= num_classes)
        label = torch.where(outside, 0, label)
        u = _adjusted_logits(x, class_scale, class_bias, options.scale)
        if class_margin is not None:
            margin = class_margin.expand(num_classes)[label] * options.scale
            u = u.scatter_add(1, label[:, None], -margin[:, None])
        t = torch.zeros_like(x).scatter(1, label[:, None], 1.0)
        row_total = torch.ones_like(x[:, 0]) if weight is None else weight[label]
    row_total = torch.where(valid, row_total if row_weight is None else row_total * row_weight, 0.0)

    log_p = torch.log_softmax(u, dim=1)
    nll = -_masked_dot(t, log_p)
    q = _smoothed(t, class_bias, options.label_smoothing)
    ce = -_masked_dot(q if weight is None else q * weight, log_p)
    loss = ce
    if options.focal_gamma > 0:
        factor = _focal_factor(ce if options.focal_weighted else nll, options.focal_gamma)
        loss = _masked_product(factor.detach() if options.focal_detached else factor, ce)
    if options.z_loss > 0:
        loss = loss + options.z_loss * torch.logsumexp(u, dim=1).square()
    if row_weight is not None:
        loss = _masked_product(row_weight, loss)
    loss = torch.where(valid, loss, 0.0)
    if not target.is_floating_point():
        # What a GPU backend does without stopping the device; on the CPU check_values has raised before.
        loss = loss * torch.where(outside, torch.nan, 1.0)

    if options.reduction == Reduction.NONE:
        return loss.reshape(row_shape)
    total = loss.sum()
    if options.reduction == Reduction.SUM:
        return total
    denominator = row_total.sum() if options.reduction == Reduction.MEAN_WEIGHT else valid.sum().to(dtype)
    if options.empty_zero:
        return torch.where(denominator == 0, total * 0.0, total / torch.where(denominator == 0, 1.0, denominator))
    return total / denominator


def _adjusted_logits(x: Tensor, class_scale: Tensor | None, class_bias: Tensor | None, scale: float) -> Tensor:
    """``s * (a x + b)``; a masked logit (-inf) stays masked and gives ``a`` a zero gradient, not ``0 * inf``."""
    u = x
    if class_scale is not None:
        masked = torch.isneginf(x)
        u = torch.where(masked, x * class_scale.detach(), torch.where(masked, 0.0, x) * class_scale)
    if class_bias is not None:
        u = u + class_bias
    return u if scale == 1.0 else u * scale


def _smoothed(t: Tensor, class_bias: Tensor | None, label_smoothing: float) -> Tensor:
    """``(1 - eps) t + eps / K`` over the K classes whose bias is finite: a class that is out gets no mass."""
    if label_smoothing == 0.0:
        return t
    if class_bias is None:
        return (1.0 - label_smoothing) * t + label_smoothing / t.shape[1]
    present = torch.isfinite(class_bias.detach()).to(t.dtype)
    return (1.0 - label_smoothing) * t + label_smoothing * present / present.sum()


def _masked_product(coefficient: Tensor, value: Tensor) -> Tensor:
    """``coefficient * value`` with ``0 * inf = 0``: what carries no weight adds nothing, in the gradient too."""
    return coefficient * torch.where((coefficient == 0) & torch.isinf(value), 0.0, value)


def _masked_dot(coefficient: Tensor, log_p: Tensor) -> Tensor:
    return _masked_product(coefficient, log_p).sum(dim=1)


def _focal_factor(nll: Tensor, gamma: float) -> Tensor:
    """``(1 - exp(-nll))^gamma`` with its limits where a derivative is 0 times infinity.

    At ``nll = 0`` value and gradient are 0, also for ``gamma < 1``; at ``nll = inf`` (a masked label) they are 1 and 0.
    """
    impossible = torch.isposinf(nll)
    rest = -torch.expm1(-torch.where(impossible, 1.0, nll))
    certain = rest <= 0
    factor = torch.where(certain, 0.0, torch.where(certain, 1.0, rest).pow(gamma))
    return torch.where(impossible, 1.0, factor)


def check_values(
    target: Tensor,
    weight: Tensor | None,
    class_scale: Tensor | None,
    class_bias: Tensor | None,
    class_margin: Tensor | None,
    sample_weight: Tensor | None,
    num_classes: int,
    ignore_index: int,
) -> None:
    """Raise on values no backend may accept; reads the tensors, so it is called for CPU tensors only."""
    for name, value in (("weight", weight), ("sample_weight", sample_weight)):
        if value is not None:
            _require(name, value, torch.isfinite(value) & (value >= 0), "finite values >= 0")
    for name, value in (("class_scale", class_scale), ("class_margin", class_margin)):
        if value is not None:
            _require(name, value, torch.isfinite(value), "finite values")
    if class_bias is not None:
        _require(
            "class_bias", class_bias, torch.isfinite(class_bias) | torch.isneginf(class_bias), "finite values or -inf"
        )
    if target.is_floating_point():
        probabilities = target.movedim(1, -1).reshape(-1, num_classes)
        good = torch.isfinite(probabilities) & (probabilities >= 0)
        _require_probabilities("finite probabilities >= 0", probabilities, good)
        if class_bias is not None:
            good = (probabilities == 0) | ~torch.isneginf(class_bias)
            _require_probabilities("probability 0 for a class with class_bias -inf", probabilities, good)
        return
    label = target.reshape(-1).long()
    beyond = (label < 0) if target.dtype == torch.uint64 else torch.zeros_like(label, dtype=torch.bool)  # 2^63 or more
    good = ((label >= 0) & (label < num_classes)) | ((label == ignore_index) & ~beyond)
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        found = int(label[row]) % 2**64 if bool(beyond[row]) else int(label[row])
        raise IndexError(
            f"target: expected labels in [0, {num_classes}) or ignore_index {ignore_index}, found {found} at row {row}"
        )
    if class_bias is not None:
        valid = label[label != ignore_index]
        absent_rows = torch.isneginf(class_bias)[valid]
        if bool(absent_rows.any()):
            found = int(valid[absent_rows][0])
            raise ValueError(
                f"target: expected labels of classes with a finite class_bias, found class {found} with class_bias -inf"
                " (a class without training samples)"
            )


def _require_probabilities(expected: str, probabilities: Tensor, good: Tensor) -> None:
    if not bool(good.all()):
        row, column = (~good).nonzero()[0].tolist()
        found = float(probabilities[row, column])
        raise ValueError(f"target: expected {expected}, found {found:g} at row {row}, class {column}")


def _require(name: str, value: Tensor, good: Tensor, expected: str) -> None:
    if not bool(good.all()):
        index = int((~good).reshape(-1).nonzero()[0])
        raise ValueError(f"{name}: expected {expected}, found {float(value.reshape(-1)[index]):g} at index {index}")

"""Distillation of logits, in plain PyTorch: the definition.

For row i with student logits ``z``, teacher logits ``t`` and label ``y``::

    q = softmax(teacher_scale t + teacher_bias)      p = softmax(student_scale z + student_bias)
    loss = r (kd_weight sum_j q_j (log q_j - log p_j) + ce_weight (-log softmax(z + class_bias)_y))

The mean divides the first part by the number of rows and the second by that of the rows that are not ignored. A scale
is one over a temperature; a bias of -inf takes a class out; ``log w`` as the teacher's weights its classes. The teacher
takes no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltkernels.ops.options import DistillationOptions, Reduction
from ltkernels.reference.cross_entropy import _masked_product, _require
from ltkernels.reference.cross_entropy import check_values as check_shared_values


def distillation(
    input: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    class_bias: Tensor | None,
    sample_weight: Tensor | None,
    options: DistillationOptions,
) -> Tensor:
    """The loss of ``(N, C)`` or ``(N, C, D)`` logits, reduced as ``options.reduction`` says.

    Args:
        input: the student's logits, floating.
        teacher: the teacher's logits of the same shape, of any floating type.
        target: labels ``(N,)`` or ``(N, D)`` of an integer type, or None without the label's part.
        student_bias: ``(C,)``, finite or -inf.
        teacher_bias: ``(C,)``, finite or -inf.
        class_bias: ``(C,)``, finite or -inf, of the label's part.
        sample_weight: row weights ``r`` of the labels' shape.
        options: the scalars.

    Returns:
        A 0-d tensor, or the labels' shape without reduction; float64 for float64 logits, else float32.
    """
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    num_classes = input.shape[1]
    row_shape = (*input.shape[:1], *input.shape[2:])
    z = input.movedim(1, -1).reshape(-1, num_classes).to(dtype)
    t = teacher.detach().movedim(1, -1).reshape(-1, num_classes).to(dtype)
    log_p = torch.log_softmax(_scaled(z, options.student_scale, student_bias), dim=1)
    log_q = torch.log_softmax(_scaled(t, options.teacher_scale, teacher_bias), dim=1)
    kd = divergence(log_q, log_p)
    ce, valid, weight = torch.zeros_like(kd), torch.ones_like(kd, dtype=torch.bool), torch.ones_like(kd)
    if target is not None:
        label = target.reshape(-1).long()
        valid = label != options.ignore_index
        outside = valid & ((label < 0) | (label >= num_classes))
        label = torch.where(valid & ~outside, label, 0)
        nll = -torch.log_softmax(_scaled(z, 1.0, class_bias), dim=1).gather(1, label[:, None])[:, 0]
        ce = torch.where(valid, nll, 0.0) * torch.where(outside, torch.nan, 1.0)
    if sample_weight is not None:
        weight = sample_weight.reshape(-1).to(dtype)
    kd, ce = _masked_product(options.kd_weight * weight, kd), _masked_product(options.ce_weight * weight, ce)
    if options.reduction == Reduction.NONE:
        rows: Tensor = (kd + ce).reshape(row_shape)
        return rows
    if options.reduction == Reduction.SUM:
        total: Tensor = (kd + ce).sum()
        return total
    mean: Tensor = kd.sum() / kd.new_tensor(float(kd.numel()))
    return mean if target is None else mean + ce.sum() / valid.sum().to(dtype)


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``sum_j q_j (log q_j - log p_j)`` of each row; what q rules out adds nothing, whatever p says."""
    q = log_q.exp()
    nothing = q == 0
    terms = q * (torch.where(nothing, 0.0, log_q) - torch.where(nothing, 0.0, log_p))
    return terms.sum(dim=1)


def _scaled(logits: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    u = logits if scale == 1.0 else logits * scale
    return u if bias is None else u + bias.to(u.dtype)


def check_values(
    target: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    class_bias: Tensor | None,
    sample_weight: Tensor | None,
    num_classes: int,
    options: DistillationOptions,
) -> None:
    """Raise on values no backend may accept; reads the tensors, so it is called for CPU tensors only."""
    if target is not None:
        check_shared_values(target, None, None, class_bias, None, None, num_classes, options.ignore_index)
    for name, bias in (("student_bias", student_bias), ("teacher_bias", teacher_bias), ("class_bias", class_bias)):
        if bias is not None:
            _require(name, bias, torch.isfinite(bias) | torch.isneginf(bias), "finite values or -inf")
    if sample_weight is not None:
        good = torch.isfinite(sample_weight) & (sample_weight >= 0)
        _require("sample_weight", sample_weight, good, "finite values >= 0")

"""Losses of several experts on one batch, in plain PyTorch: the definition.

For sample i with label ``y`` and expert e's logits ``z_e``, with ``zbar = sum_e z_e / E``::

    u_ej = s (a_ej z_ej + b_ej - m_ey [j = y])                         adjusted logits
    pm   = softmax(t zbar), no gradient    p_e = softmax(t z_e)        t_j: one over the temperature of class j
    q    = softmax(tau teacher)            pbar = softmax(tau zbar)
    loss = r (sum_e w_ey (-log softmax(u_e)_y) + lambda sum_e KL(pm | p_e) + kappa KL(q | pbar))

The mean divides expert e's cross-entropies by ``sum_i r_i w_ey`` (an expert that no sample of the batch has weight for
adds nothing) and the divergences by the number of samples that are not ignored. ``lambda`` comes times the last number
of ``temperature``, which is there so that a device need not be waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltkernels.ops.options import ExpertCrossEntropyOptions, Reduction
from ltkernels.reference.cross_entropy import _adjusted_logits, _masked_product, _require
from ltkernels.reference.cross_entropy import check_values as check_shared_values
from ltkernels.reference.distillation import divergence


def expert_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_scale: Tensor | None,
    class_bias: Tensor | None,
    class_margin: Tensor | None,
    temperature: Tensor | None,
    sample_weight: Tensor | None,
    teacher: Tensor | None,
    options: ExpertCrossEntropyOptions,
) -> Tensor:
    """The loss of ``(E, N, C)`` logits, reduced as ``options.reduction`` says.

    Args:
        input: the experts' logits, floating.
        target: labels ``(N,)`` of an integer type.
        weight: ``(E, C)``.
        class_scale: ``(E, C)`` factors ``a``.
        class_bias: ``(E, C)`` biases ``b``; ``-inf`` removes a class.
        class_margin: ``(E, C)`` margins ``m``.
        temperature: ``(C + 1,)``: one over the temperature of each class, then the factor of the diversity.
        sample_weight: ``(N,)`` factors ``r``.
        teacher: ``(N, C)`` logits of any floating type, which take no gradient.
        options: the scalars.

    Returns:
        A 0-d tensor, or ``(N,)`` without reduction; float64 for float64 logits, else float32.
    """
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    experts, rows, num_classes = input.shape
    label = target.long()
    valid = label != options.ignore_index
    z = torch.where(valid[:, None], input.to(dtype), 0.0)  # what an ignored row holds, NaN even, reaches nothing
    label = torch.where(valid, label, 0)
    outside = (label < 0) | (label >= num_classes)
    label = torch.where(outside, 0, label)
    r = z.new_ones(rows) if sample_weight is None else sample_weight.to(dtype)

    losses, totals = [], []
    for e in range(experts):
        of_expert = [None if table is None else table[e].to(dtype) for table in (class_scale, class_bias, class_margin)]
        u = _adjusted_logits(z[e], of_expert[0], of_expert[1], options.scale)
        if of_expert[2] is not None:
            u = u.scatter_add(1, label[:, None], -options.scale * of_expert[2][label][:, None])
        share = r if weight is None else r * weight[e].to(dtype)[label]
        # What has no share adds nothing: also where no class is left, as of an expert that knows none, and a softmax
        # would be 0 / 0.
        nothing = (share == 0) & torch.isneginf(u).all(dim=1)
        nll = -torch.log_softmax(torch.where(nothing[:, None], 0.0, u), dim=1).gather(1, label[:, None])[:, 0]
        losses.append(torch.where(valid, _masked_product(share, nll), 0.0))
        totals.append(torch.where(valid, share, 0.0).sum())

    divergences = z.new_zeros(rows)
    mean = z.mean(dim=0)
    if options.diversity != 0.0:
        t, factor = (1.0, 1.0) if temperature is None else (temperature[:-1].to(dtype), temperature[-1].to(dtype))
        log_pm = torch.log_softmax(mean.detach() * t, dim=1)
        for e in range(experts):
            kl = divergence(log_pm, torch.log_softmax(z[e] * t, dim=1))
            divergences = divergences + _masked_product(options.diversity * factor * r, kl)
    if teacher is not None:
        log_q = torch.log_softmax(
            torch.where(valid[:, None], teacher.detach().to(dtype), 0.0) * options.distillation_scale, dim=1
        )
        kl = divergence(log_q, torch.log_softmax(mean * options.distillation_scale, dim=1))
        divergences = divergences + _masked_product(options.distillation * r, kl)
    divergences = torch.where(valid, divergences, 0.0) * torch.where(outside, torch.nan, 1.0)

    if options.reduction in (Reduction.NONE, Reduction.SUM):
        total = torch.stack(losses).sum(dim=0) + divergences
        return total if options.reduction == Reduction.NONE else total.sum()
    count = valid.sum().to(dtype)
    denominators = torch.stack(totals) if options.reduction == Reduction.MEAN_WEIGHT else count.expand(experts)
    empty = denominators == 0
    parts = torch.where(empty, 0.0, torch.stack(losses).sum(dim=1) / torch.where(empty, 1.0, denominators))
    mean_loss: Tensor = parts.sum() + divergences.sum() / torch.where(count == 0, 1.0, count)
    return mean_loss if options.empty_zero else mean_loss * torch.where(empty.all(), torch.nan, 1.0)


def mean_logits(input: Tensor) -> Tensor:
    """``(N, C)``: the mean over the experts, in the type of the computation."""
    return input.to(torch.float64 if input.dtype == torch.float64 else torch.float32).mean(dim=0)


def check_values(
    target: Tensor,
    weight: Tensor | None,
    class_scale: Tensor | None,
    class_bias: Tensor | None,
    class_margin: Tensor | None,
    temperature: Tensor | None,
    sample_weight: Tensor | None,
    teacher: Tensor | None,
    num_classes: int,
    options: ExpertCrossEntropyOptions,
) -> None:
    """Raise on values no backend may accept; reads the tensors, so it is called for CPU tensors only."""
    check_shared_values(
        target, weight, class_scale, None, class_margin, sample_weight, num_classes, options.ignore_index
    )
    if temperature is not None:
        _require("diversity_temperature", temperature, torch.isfinite(temperature) & (temperature > 0), "numbers > 0")
    if class_bias is None:
        return
    _require("class_bias", class_bias, torch.isfinite(class_bias) | torch.isneginf(class_bias), "finite values or -inf")
    label = target.long()
    label = label[label != options.ignore_index]
    absent = torch.isneginf(class_bias)[:, label]
    if weight is not None:
        absent = absent & (weight[:, label] != 0)
    if bool(absent.any()):
        expert, row = absent.nonzero()[0].tolist()
        raise ValueError(
            f"target: expected labels of classes with a finite class_bias or weight 0, found class {int(label[row])}"
            f" with class_bias -inf for expert {expert}"
        )

"""Distillation of logits, as ltkernels computes it and as it is computed today. As in peers.py.

The teacher's logits belong to the batch; they are drawn with a seed of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ltkernels import functional
from ltkernels.bench.peers import LossFn, Variant, widen
from ltkernels.bench.scenarios import Problem

T = 2.0
ALPHA = 0.5


def _teacher(problem: Problem) -> Tensor:
    z = problem.logits
    generator = torch.Generator(z.device).manual_seed(1)
    noise = torch.randn(z.shape, generator=generator, device=z.device)
    return (z.detach() + noise).to(z.dtype)


def kd_ours(problem: Problem) -> LossFn:
    teacher = _teacher(problem)
    return lambda x, y: functional.distillation_loss(x, teacher, T)


def kd(problem: Problem, dtype: torch.dtype) -> LossFn:
    """Hinton et al. 2015 by PyTorch's own divergence, which is how everybody writes it."""
    teacher = _teacher(problem)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        q = F.softmax(teacher.to(dtype) / T, dim=1)
        return F.kl_div(F.log_softmax(x.to(dtype) / T, dim=1), q, reduction="batchmean") * (T * T)

    return loss


def kd_labels_ours(problem: Problem) -> LossFn:
    teacher = _teacher(problem)
    return lambda x, y: functional.distillation_loss(x, teacher, T, target=y, alpha=ALPHA, ce_weight=1 - ALPHA)


def kd_labels(problem: Problem, dtype: torch.dtype) -> LossFn:
    distil = kd(problem, dtype)
    return lambda x, y: ALPHA * distil(x, y) + (1 - ALPHA) * F.cross_entropy(widen(x), y)


def _class_weight(problem: Problem) -> Tensor:
    """Weights by the effective number of samples, scaled to sum to C."""
    weight = 1 / -torch.expm1(problem.class_counts.double() * torch.tensor(0.9999, dtype=torch.float64).log())
    return weight * (len(weight) / weight.sum())


def balanced_ours(problem: Problem) -> LossFn:
    teacher, bias = _teacher(problem), _class_weight(problem).log().float()
    return lambda x, y: functional.distillation_loss(x, teacher, T, teacher_bias=bias, target=y)


def balanced(problem: Problem, dtype: torch.dtype) -> LossFn:
    """The weights as biases of the teacher's logits: its softmax is normalised as it is."""
    teacher, bias = _teacher(problem), _class_weight(problem).log().to(dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        q = F.softmax(torch.add(bias, teacher.to(dtype), alpha=1 / T), dim=1)
        kl = F.kl_div(F.log_softmax(x.to(dtype) / T, dim=1), q, reduction="batchmean")
        return F.cross_entropy(widen(x), y) + (T * T) * kl

    return loss


def balanced_published(problem: Problem, dtype: torch.dtype) -> LossFn:
    """Balanced knowledge distillation: the teacher's probabilities are weighted, then normalised again."""
    teacher, weight = _teacher(problem), _class_weight(problem).to(dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        q = F.softmax(teacher.to(dtype) / T, dim=1) * weight
        q = q / q.sum(1)[:, None]
        kl = F.kl_div(F.log_softmax(x.to(dtype) / T, dim=1), q, reduction="batchmean")
        return F.cross_entropy(widen(x), y) + kl * T * T

    return loss


DISTILLATION_VARIANTS: tuple[Variant, ...] = (
    Variant("kd", "distillation", kd_ours, kd, op="distillation"),
    Variant("kd_labels", "distillation + CE", kd_labels_ours, kd_labels, op="distillation"),
    Variant("balanced_kd", "balanced distillation", balanced_ours, balanced, balanced_published, op="distillation"),
)

"""Sigmoid losses, as ltkernels computes them and as they are computed today. As in peers.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ltkernels import functional
from ltkernels.bench.peers import LossFn, Variant, widen
from ltkernels.bench.scenarios import Problem

GAMMA, FOCAL_ALPHA = 2.0, 0.25
GAMMA_NEG, CLIP = 4.0, 0.05
STEEPNESS, MU, EQL_ALPHA = 12.0, 0.8, 4.0


def _one_hot(x: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(x).scatter(1, y.unsqueeze(1), 1.0)


def sigmoid_focal_ours(problem: Problem) -> LossFn:
    return lambda x, y: functional.binary_cross_entropy(
        x, y, focal_gamma=GAMMA, focal_alpha=FOCAL_ALPHA, denominator="elements"
    )


def sigmoid_focal(problem: Problem, dtype: torch.dtype) -> LossFn:
    """In the domain of logarithms, with one logsigmoid; of the label's column the terms are gathered."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = widen(x)
        log_rest = F.logsigmoid(-z)
        log_p = z + log_rest
        negative = (1 - FOCAL_ALPHA) * torch.exp(GAMMA * log_p) * -log_rest
        at = y.unsqueeze(1)
        of_label, of_rest = log_p.gather(1, at), log_rest.gather(1, at)
        positive = FOCAL_ALPHA * torch.exp(GAMMA * of_rest) * -of_label
        return (negative.sum() - negative.gather(1, at).sum() + positive.sum()) / z.numel()

    return loss


def sigmoid_focal_published(problem: Problem, dtype: torch.dtype) -> LossFn:
    """One-hot targets, probabilities of both kinds, a matrix of weights."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = widen(x)
        t = _one_hot(z, y)
        p = z.sigmoid()
        other = (1 - p) * t + p * (1 - t)
        weight = (FOCAL_ALPHA * t + (1 - FOCAL_ALPHA) * (1 - t)) * other.pow(GAMMA)
        return (F.binary_cross_entropy_with_logits(z, t, reduction="none") * weight).mean()

    return loss


def asymmetric_ours(problem: Problem) -> LossFn:
    return lambda x, y: functional.binary_cross_entropy(
        x, y, focal_gamma=(0.0, GAMMA_NEG), clip=CLIP, denominator="elements"
    )


def asymmetric(problem: Problem, dtype: torch.dtype) -> LossFn:
    """Published form: one-hot targets, clamps and a power of a matrix."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = widen(x)
        t = _one_hot(z, y)
        p = z.sigmoid()
        pt = (1 - p + CLIP).clamp(max=1) * (1 - t) + p * t
        return (-torch.log(pt.clamp(min=1e-8)) * (1 - pt).pow(GAMMA_NEG * (1 - t))).mean()

    return loss


def _equalization_weights(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of positives and negatives, as after a while: the balance of a class grows with its share."""
    balance = problem.class_counts.double() / problem.class_counts.double().max()
    negative = torch.sigmoid(STEEPNESS * (balance - MU))
    return (1 + EQL_ALPHA * (1 - negative)).to(dtype), negative.to(dtype)


def equalization_v2_ours(problem: Problem) -> LossFn:
    positive, negative = _equalization_weights(problem, torch.float32)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return functional.binary_cross_entropy(x, y, pos_weight=positive, neg_weight=negative, column_sums=True)[0]

    return loss


def equalization_v2(problem: Problem, dtype: torch.dtype) -> LossFn:
    """Published form: a matrix of weights, and the sums over the batch of the sizes of the gradients."""
    positive, negative = _equalization_weights(problem, dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = widen(x)
        t = _one_hot(z, y)
        weight = positive * t + negative * (1 - t)
        with torch.no_grad():
            size = (z.sigmoid() - t).abs() * weight
            (size * t).sum(0), (size * (1 - t)).sum(0)
        return (F.binary_cross_entropy_with_logits(z, t, reduction="none") * weight).sum() / len(y)

    return loss


BINARY_VARIANTS: tuple[Variant, ...] = (
    Variant(
        "sigmoid_focal",
        "Sigmoid focal",
        sigmoid_focal_ours,
        sigmoid_focal,
        sigmoid_focal_published,
        op="binary_cross_entropy",
    ),
    Variant("asymmetric", "Asymmetric", asymmetric_ours, asymmetric, op="binary_cross_entropy"),
    Variant("eql_v2", "Equalization v2", equalization_v2_ours, equalization_v2, op="binary_cross_entropy"),
)

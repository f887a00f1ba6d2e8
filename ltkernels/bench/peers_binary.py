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
RARE, THRESHOLD = 1.77e-3, 0.7


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


def class_balanced_ours(problem: Problem) -> LossFn:
    return lambda x, y: functional.binary_cross_entropy(x, y, weight=problem.weight)


def class_balanced(problem: Problem, dtype: torch.dtype) -> LossFn:
    """Each sample's sum over the classes by the weight of its class."""
    weight = problem.weight.to(dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = widen(x)
        rows = F.binary_cross_entropy_with_logits(z, _one_hot(z, y), reduction="none").sum(dim=1)
        return (rows * weight[y]).mean()

    return loss


def class_balanced_published(problem: Problem, dtype: torch.dtype) -> LossFn:
    """Class-balanced loss (Cui et al. 2019): the weights repeated over the classes, as a matrix."""
    weight = problem.weight.to(dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = widen(x)
        t = _one_hot(z, y)
        matrix = (weight.unsqueeze(0).repeat(len(z), 1) * t).sum(1).unsqueeze(1).repeat(1, z.shape[1])
        return F.binary_cross_entropy_with_logits(z, t, weight=matrix, reduction="sum") / t.sum()

    return loss


def _is_rare(problem: Problem) -> Tensor:
    return problem.class_counts / problem.class_counts.sum() < RARE


def equalization_ours(problem: Problem) -> LossFn:
    keep, classes = (~_is_rare(problem)).float(), len(problem.class_counts)
    return lambda x, y: functional.binary_cross_entropy(x, y, foreground_keep=keep, background_index=classes)


def equalization(problem: Problem, dtype: torch.dtype) -> LossFn:
    """Equalization loss (Tan et al. 2020): rows of foreground do not push rare classes down."""
    rare = _is_rare(problem).to(dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = widen(x)
        t = _one_hot(z, y)
        weight = 1 - rare * (1 - t)
        return F.binary_cross_entropy_with_logits(z, t, weight=weight, reduction="sum") / len(y)

    return loss


def suppression_ours(problem: Problem) -> LossFn:
    keep, classes = torch.zeros(len(problem.class_counts), device=problem.logits.device), len(problem.class_counts)
    return lambda x, y: functional.binary_cross_entropy(
        x, y, foreground_keep=keep, background_index=classes, score_threshold=THRESHOLD, draws="row"
    )


def suppression(problem: Problem, dtype: torch.dtype) -> LossFn:
    """Adaptive class suppression (Wang et al. 2021): negatives count from a score on; no row is of background here."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = widen(x)
        t = _one_hot(z, y)
        weight = torch.logical_or(z.detach().sigmoid() >= THRESHOLD, t > 0).to(z.dtype)
        return F.binary_cross_entropy_with_logits(z, t, weight=weight, reduction="sum") / len(y)

    return loss


def _subset(problem: Problem) -> Tensor:
    """The classes of the batch and every twentieth."""
    chosen = torch.zeros(len(problem.class_counts), device=problem.logits.device)
    chosen[::20] = 1.0
    chosen[problem.target] = 1.0
    return chosen


def federated_ours(problem: Problem) -> LossFn:
    chosen = _subset(problem)
    return lambda x, y: functional.binary_cross_entropy(x, y, neg_weight=chosen)


def federated(problem: Problem, dtype: torch.dtype) -> LossFn:
    """Federated loss (Zhou et al. 2021): the losses of all classes, times a mask."""
    chosen = _subset(problem).to(dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = widen(x)
        rows = F.binary_cross_entropy_with_logits(z, _one_hot(z, y), reduction="none")
        return (rows * chosen.view(1, -1)).sum() / len(y)

    return loss


_OP = "binary_cross_entropy"
BINARY_VARIANTS: tuple[Variant, ...] = (
    Variant("sigmoid_focal", "Sigmoid focal", sigmoid_focal_ours, sigmoid_focal, sigmoid_focal_published, op=_OP),
    Variant("asymmetric", "Asymmetric", asymmetric_ours, asymmetric, op=_OP),
    Variant("eql_v2", "Equalization v2", equalization_v2_ours, equalization_v2, op=_OP),
    Variant(
        "cb_sigmoid", "Class-balanced sigmoid", class_balanced_ours, class_balanced, class_balanced_published, op=_OP
    ),
    Variant("eql", "Equalization (and Drop, foreground)", equalization_ours, equalization, op=_OP),
    Variant("acsl", "ACSL", suppression_ours, suppression, op=_OP),
    Variant("federated", "Federated", federated_ours, federated, op=_OP),
)

"""The methods that the demo compares: a loss of ltkernels, and the same loss in plain PyTorch as published code
writes it.

The plain forms are written from the formulas. They are what a training script holds without ltkernels, so their time
is what the kernels are compared with; every run checks on its own logits that both give the same loss and gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from longtail_experts import EXPERT_METHODS
from longtail_method import DRW_START, Loss, Method
from longtail_metrics import FEW_SHOT_BELOW
from longtail_plan import Settings
from torch import Tensor, nn

import ltkernels as ltk

MAX_M, S = 0.5, 30.0  # LDAM (Cao et al. 2019); the scale of ArcFace too
BETA = 0.9999  # effective number (Cui et al. 2019), also LDAM-DRW's
TAU = 1.0  # logit adjustment (Menon et al. 2021)


def _plain_ce(counts: Tensor, loss: Any) -> Loss:
    return F.cross_entropy


def _plain_weighted(counts: Tensor, loss: Any) -> Loss:
    return lambda logits, labels: F.cross_entropy(logits, labels, weight=loss.weight)


def _plain_class_balanced(counts: Tensor, loss: Any) -> Loss:
    # Published as the mean over the rows, not over the weights: F.cross_entropy's own mean is another loss.
    return lambda logits, labels: (loss.weight[labels] * F.cross_entropy(logits, labels, reduction="none")).mean()


def _plain_logit_adjustment(counts: Tensor, loss: Any) -> Loss:
    log_prior = (TAU * (counts.double() / counts.sum()).log()).float()
    return lambda logits, labels: F.cross_entropy(logits + log_prior, labels)


def _plain_ldam(counts: Tensor, loss: Any) -> Loss:
    margins = counts.double().pow(-0.25)
    margins = (MAX_M * margins / margins.max()).float()

    def ldam(cosines: Tensor, labels: Tensor) -> Tensor:
        is_label = torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, labels[:, None], True)
        row_margins = torch.matmul(margins[None], is_label.float().t()).view(-1, 1)
        return F.cross_entropy(S * torch.where(is_label, cosines - row_margins, cosines), labels, weight=loss.weight())

    return ldam


def _plain_vs(counts: Tensor, loss: Any) -> Loss:
    divisor = (counts.max() / counts.double()).pow(loss.gamma).float()
    log_prior = (TAU * (counts.double() / counts.sum()).log()).float()
    return lambda logits, labels: F.cross_entropy(logits / divisor + log_prior, labels)


def _seesaw(counts: Tensor, settings: Settings) -> nn.Module:
    # The counts are known, so the loss need not count labels; a run calls it more often than it trains, to time it.
    loss = ltk.losses.SeesawLoss(len(counts)).eval()
    loss.class_counts.copy_(counts)
    return loss


def _plain_seesaw(counts: Tensor, loss: Any) -> Loss:
    def seesaw(logits: Tensor, labels: Tensor) -> Tensor:
        n = loss.class_counts.float().clamp(min=1)
        ratio = n[None] / n[:, None]  # C x C, at every step
        factor = ratio.clamp(max=1).pow(loss.p)[labels]
        scores = logits.detach().softmax(1)
        ratio = scores / scores.gather(1, labels[:, None]).clamp(min=loss.eps)
        factor = factor * ratio.clamp(min=1).pow(loss.q)
        return F.cross_entropy(logits + factor.log() * (1 - F.one_hot(labels, len(n))), labels)

    return seesaw


def _plain_arcface(counts: Tensor, loss: Any) -> Loss:
    def arcface(cosines: Tensor, labels: Tensor) -> Tensor:
        margin = loss.margin[labels]
        of_label = cosines.gather(1, labels[:, None])[:, 0]
        moved = torch.cos(torch.acos(of_label) + margin)
        moved = torch.where(of_label > -margin.cos(), moved, of_label - margin * margin.sin())
        return F.cross_entropy(loss.scale * cosines.scatter(1, labels[:, None], moved[:, None]), labels)

    return arcface


def _plain_label_aware_smoothing(counts: Tensor, loss: Any) -> Loss:
    def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
        smoothing: Tensor = loss.label_smoothing[labels]
        log_p = F.log_softmax(logits, dim=1)
        nll = -log_p.gather(1, labels[:, None])[:, 0]
        return ((1 - smoothing) * nll - smoothing * log_p.mean(1)).mean()

    return smoothed


def _equalization(counts: Tensor, settings: Settings) -> nn.Module:
    # The paper's threshold is a share of ImageNet-LT; here the few-shot classes are the rare ones, whatever the data.
    share = (FEW_SHOT_BELOW - 0.5) / counts.sum().item()
    return ltk.losses.SoftmaxEqualizationLoss(counts, rare_threshold=share, seed=settings.seed)


def _plain_equalization(counts: Tensor, loss: Any) -> Loss:
    rare = counts < FEW_SHOT_BELOW

    def equalization(logits: Tensor, labels: Tensor) -> Tensor:
        leaves = (torch.rand_like(logits) < loss.gamma) & rare & ~F.one_hot(labels, len(rare)).bool()
        return F.cross_entropy(logits.masked_fill(leaves, -torch.inf), labels)

    return equalization


def _plain_lade(counts: Tensor, loss: Any) -> Loss:
    prior = (counts.double() / counts.sum()).float()
    log_prior, log_uniform = (prior + 1e-9).log(), math.log(1 / len(prior) + 1e-9)

    def lade(logits: Tensor, labels: Tensor) -> Tensor:
        is_label = F.one_hot(labels, len(prior)).to(logits.dtype)
        of_class = (logits * is_label).sum(0) / (is_label.sum(0) + 1e-8)
        of_all = (logits - log_prior + log_uniform).logsumexp(0) - math.log(len(labels))
        bound: Tensor = of_class - of_all - loss.remine_lambda * of_all.square()
        regularizer = -(prior * bound).sum()
        return F.cross_entropy(logits + log_prior, labels) + regularizer * float(loss.weight)

    return lade


def _plain_sigmoid_focal(counts: Tensor, loss: Any) -> Loss:
    def sigmoid_focal(logits: Tensor, labels: Tensor) -> Tensor:
        is_label = F.one_hot(labels, len(counts)).to(logits.dtype)
        p = logits.sigmoid()
        missed = is_label * (1 - p) + (1 - is_label) * p
        factor: Tensor = (is_label * loss.alpha + (1 - is_label) * (1 - loss.alpha)) * missed.pow(loss.gamma)
        terms = F.binary_cross_entropy_with_logits(logits, is_label, reduction="none")
        return (factor * terms).sum() / len(labels)

    return sigmoid_focal


def _plain_class_balanced_sigmoid(counts: Tensor, loss: Any) -> Loss:
    def class_balanced_sigmoid(logits: Tensor, labels: Tensor) -> Tensor:
        is_label = F.one_hot(labels, len(counts)).to(logits.dtype)
        weight = loss.weight[labels][:, None].expand_as(logits)
        return F.binary_cross_entropy_with_logits(logits, is_label, weight, reduction="sum") / len(labels)

    return class_balanced_sigmoid


METHODS = {
    "ce": Method(lambda counts, settings: ltk.losses.CrossEntropyLoss(), _plain_ce),
    "weighted": Method(
        lambda counts, settings: ltk.losses.CrossEntropyLoss(weight=ltk.rebalance.inverse_frequency_weight(counts)),
        _plain_weighted,
    ),
    "cb": Method(lambda counts, settings: ltk.losses.ClassBalancedLoss(counts, beta=BETA), _plain_class_balanced),
    "la": Method(lambda counts, settings: ltk.losses.LogitAdjustedLoss(counts, tau=TAU), _plain_logit_adjustment),
    "ldam-drw": Method(
        lambda counts, settings: ltk.losses.LDAMLoss(
            counts, max_m=MAX_M, s=S, reweight_epoch=round(DRW_START * settings.epochs), beta=BETA
        ),
        _plain_ldam,
        cosine=True,
    ),
    "vs": Method(lambda counts, settings: ltk.losses.VSLoss(counts, gamma=settings.vs_gamma, tau=TAU), _plain_vs),
    "seesaw": Method(_seesaw, _plain_seesaw),
    "arcface": Method(
        lambda counts, settings: ltk.losses.ArcFaceLoss(ltk.rebalance.arcface_margin(counts), scale=S),
        _plain_arcface,
        cosine=True,
    ),
    "label-aware-smoothing": Method(
        lambda counts, settings: ltk.losses.LabelAwareSmoothingLoss(counts), _plain_label_aware_smoothing
    ),
    "equalization": Method(_equalization, _plain_equalization, certain={"gamma": 1.0}),
    "lade": Method(lambda counts, settings: ltk.losses.LADELoss(counts), _plain_lade),
    "sigmoid-focal": Method(
        # Every row has one object: the paper's mean over anchors with an object is that over rows.
        lambda counts, settings: ltk.losses.SigmoidFocalLoss(denominator="count"),
        _plain_sigmoid_focal,
        sigmoid=True,
    ),
    "cb-sigmoid": Method(
        lambda counts, settings: ltk.losses.ClassBalancedSigmoidLoss(counts, beta=BETA),
        _plain_class_balanced_sigmoid,
        sigmoid=True,
    ),
    **EXPERT_METHODS,
}
"""What is trained. Post-hoc logit adjustment is not: it is the model of ``ce``, its logits adjusted at evaluation."""


def evaluations(method: str, logits: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """The logits to predict from, by name of the method that they are the result of."""
    # Biases, scales and margins belong to training: the raw logits are what is predicted from.
    results = {method: logits}
    if method == "ce":
        results["la-posthoc"] = ltk.rebalance.adjust_logits(logits, counts, tau=TAU)
    return results


def check_agreement(logits: Tensor, labels: Tensor, ours: Loss, plain: Loss) -> None:
    """Checks that two losses give the same value and gradient for these logits.

    Raises:
        AssertionError: they do not; the message says by how much.
    """
    results = []
    for loss_fn in (ours, plain):
        leaf = logits.detach().requires_grad_()
        loss = loss_fn(leaf, labels)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    (our_loss, our_gradient), (plain_loss, plain_gradient) = results
    torch.testing.assert_close(our_loss, plain_loss, rtol=1e-4, atol=1e-6)
    scale = plain_gradient.abs().max().item()
    torch.testing.assert_close(our_gradient, plain_gradient, rtol=1e-4, atol=1e-4 * scale)

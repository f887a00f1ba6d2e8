"""The methods of several experts that the demo compares, and their losses as published code writes them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from longtail_method import DRW_START, Loss, Method
from longtail_model import BilateralClassifier, ExpertClassifier, TaughtClassifier
from longtail_plan import Settings
from torch import Tensor, nn

import ltkernels as ltk

NUM_EXPERTS = 3
SCALE = 30.0  # of the cosine heads of RIDE and SADE


class BilateralLoss(nn.Module):
    """BBN's loss of the labels of both draws, one behind the other."""

    def __init__(self, num_epochs: int) -> None:
        super().__init__()
        self.mixing = ltk.experts.BBN(num_epochs)

    def set_epoch(self, epoch: int) -> None:
        self.mixing.set_epoch(epoch)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.mixing.loss(logits, *labels.chunk(2))


class SelfPacedLoss(nn.Module):
    """LFME: in the first stage each expert learns the classes of its group, in the second they teach the student.

    Shape:
        logits ``(1 + G, N, C)``, the student's first.
    """

    teaching: Tensor

    def __init__(self, counts: Tensor, settings: Settings) -> None:
        super().__init__()
        self.start = settings.epochs
        self.student = ltk.experts.LFMELoss(counts)
        # Experts of disjoint groups: a softmax over the classes of the group, for the samples of the group.
        self.experts = ltk.experts.ACELoss(counts, self.student.groups, complementary_weight=0.0)
        self.register_buffer("teaching", torch.tensor(False))

    def set_epoch(self, epoch: int) -> None:
        self.teaching.fill_(epoch >= self.start)

    def watch(self, logits: Tensor, labels: Tensor) -> None:
        """Sets how much each expert still teaches, from accuracies on the training part: there is no other to use."""
        student, experts = logits[0].argmax(1) == labels, self.of_own_classes(logits).argmax(2) == labels
        groups = [group[labels] for group in self.student.groups]  # whose samples
        self.student.set_accuracy(
            [float(student[rows].double().mean()) for rows in groups],
            [float(right[rows].double().mean()) for right, rows in zip(experts, groups, strict=True)],
        )

    def of_own_classes(self, logits: Tensor) -> Tensor:
        """The experts' logits, ``(G, N, C)``, -inf for classes of other groups."""
        return logits[1:].masked_fill(~self.student.groups[:, None], -torch.inf)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = (
            self.student(logits[0], logits[1:], labels) if self.teaching else self.experts(logits[1:], labels)
        )
        return loss


def _plain_ride(counts: Tensor, loss: Any) -> Loss:
    share = counts.double() / counts.sum()
    k = len(counts) * share * loss.reweight_factor + 1 - loss.reweight_factor
    late = (k / k.max()).float()

    def ride(logits: Tensor, labels: Tensor) -> Tensor:
        weight = loss.weight()
        temperature = late if bool((weight != weight[0]).any()) else torch.ones_like(late)
        with torch.no_grad():
            target = F.softmax(logits.mean(0) / temperature, dim=1)
        total = logits.new_zeros(())
        for expert in logits:
            moved = expert - loss.class_margin * F.one_hot(labels, len(counts))
            divergence = F.kl_div(F.log_softmax(expert / temperature, dim=1), target, reduction="batchmean")
            total = total + F.cross_entropy(moved, labels, weight=weight)
            total = total + loss.diversity_factor * temperature.mean() ** 2 * divergence
        return total

    return ride


def _plain_sade(counts: Tensor, loss: Any) -> Loss:
    prior = counts.double() / counts.sum()
    reverse = torch.empty_like(prior)
    order = prior.argsort(stable=True)
    reverse[order] = prior[order.flip(0)]
    of_second = (prior + loss.prior_eps).log().float()
    of_third = of_second - loss.tau * (reverse + loss.prior_eps).log().float()

    def sade(logits: Tensor, labels: Tensor) -> Tensor:
        return (
            F.cross_entropy(logits[0], labels)
            + F.cross_entropy(logits[1] + of_second, labels)
            + F.cross_entropy(logits[2] + of_third, labels)
        )

    return sade


def _of_subsets(logits: Tensor, labels: Tensor, cover: Tensor) -> Tensor:
    """Each expert's cross-entropy within its classes, over the samples of its classes."""
    total = logits.new_zeros(())
    for expert, classes in zip(logits, cover, strict=True):
        rows = classes[labels]
        if bool(rows.any()):
            total = total + F.cross_entropy(expert[rows].masked_fill(~classes, -torch.inf), labels[rows])
    return total


def _plain_ace(counts: Tensor, loss: Any) -> Loss:
    def ace(logits: Tensor, labels: Tensor) -> Tensor:
        interfering = [e[:, ~classes].square().sum() for e, classes in zip(logits, loss.cover, strict=True)]
        return _of_subsets(logits, labels, loss.cover) + torch.stack(interfering).sum() / len(labels)

    return ace


def _plain_bbn(counts: Tensor, loss: Any) -> Loss:
    def bbn(logits: Tensor, labels: Tensor) -> Tensor:
        lam = loss.mixing.lam
        one, other = labels.chunk(2)
        total: Tensor = lam * F.cross_entropy(logits, one) + (1 - lam) * F.cross_entropy(logits, other)
        return total

    return bbn


def _plain_lfme(counts: Tensor, loss: Any) -> Loss:
    def lfme(logits: Tensor, labels: Tensor) -> Tensor:
        groups, T = loss.student.groups, loss.student.T
        if not loss.teaching:
            return _of_subsets(logits[1:], labels, groups)
        student = logits[0]
        total = F.cross_entropy(student, labels)
        for weight, classes, expert in zip(loss.student.weight, groups, logits[1:], strict=True):
            target = F.softmax(expert.detach()[:, classes] / T, dim=1)
            kl = F.kl_div(F.log_softmax(student[:, classes] / T, dim=1), target, reduction="batchmean")
            total = total + weight * kl
        return total

    return lfme


def _ride(counts: Tensor, settings: Settings) -> nn.Module:
    return ltk.losses.RIDELoss(counts, scale=SCALE, reweight_epoch=round(DRW_START * settings.epochs))


EXPERT_METHODS = {
    "ride": Method(
        _ride,
        _plain_ride,
        model=lambda data, loss: ExpertClassifier(data, NUM_EXPERTS, cosine_scale=SCALE),
        num_experts=lambda loss: NUM_EXPERTS,
        predict=lambda loss, logits: logits.mean(0),
        each=lambda loss, logits: logits,
    ),
    "sade": Method(
        lambda counts, settings: ltk.losses.SADELoss(counts),
        _plain_sade,
        model=lambda data, loss: ExpertClassifier(data, NUM_EXPERTS, cosine_scale=SCALE),
        num_experts=lambda loss: NUM_EXPERTS,
        predict=lambda loss, logits: logits.mean(0),
        each=lambda loss, logits: logits,
    ),
    "bbn": Method(
        lambda counts, settings: BilateralLoss(settings.epochs),
        _plain_bbn,
        model=lambda data, loss: BilateralClassifier(data, loss.mixing),
        paired=True,
    ),
    "ace": Method(
        lambda counts, settings: ltk.experts.ACELoss(counts),
        _plain_ace,
        model=lambda data, loss: ExpertClassifier(data, loss.num_experts, first_alone=True),
        num_experts=lambda loss: loss.num_experts,
        predict=lambda loss, logits: loss.aggregate(logits),
        each=lambda loss, logits: logits,
    ),
    "lfme": Method(
        lambda counts, settings: SelfPacedLoss(counts, settings),
        _plain_lfme,
        model=TaughtClassifier,
        num_experts=lambda loss: 1 + len(loss.student.groups),
        predict=lambda loss, logits: logits[0],
        each=lambda loss, logits: loss.of_own_classes(logits),
        stages=2,
        watches=True,
    ),
}

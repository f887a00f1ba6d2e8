"""LFME: one student that learns from experts of parts of the classes, of each until it nearly knows as much."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels import functional, rebalance
from ltkernels.experts.subsets import class_sets, shot_groups
from ltkernels.functional.experts import Experts, stacked
from ltkernels.losses.base import LossModule
from ltkernels.rebalance import ClassCounts

__all__ = ["LFMELoss"]


class LFMELoss(LossModule):
    r"""Cross-entropy, and divergences from experts that each know a group of the classes.

    .. math:: \mathrm{CE}(z) + \sum_g w_g\, \mathrm{KL}\bigl(\sigma(t_g / T)_{S_g} \,\|\, \sigma(z / T)_{S_g}\bigr)

    Both distributions of a divergence are over the classes :math:`S_g` of its expert alone, for every sample of the
    batch, and are not multiplied by :math:`T^2`. The weights start at 1. Call :meth:`set_accuracy` when accuracies are
    known, which is after each epoch: a weight stays 1 until the student reaches ``threshold`` times the expert's
    accuracy on the group, and then falls linearly, from 1 to 0 where the student is as good.

    Published code trains the experts before, each on the samples of its group alone, and multiplies the student's
    logits by a weight of the sample that rises to 1 (curriculum selection): do that before the call.

    Args:
        class_counts: training samples of each class, ``(C,)``.
        groups: ``(G, C)`` bool, the classes of each expert. None: ``shot_groups(class_counts)``.
        T: temperature above 0.
        threshold: in ``[0, 1)``.
        ignore_index: label of samples that have no cross-entropy; they distil all the same.

    Attributes:
        weight: the groups' weights, ``(G,)``, a buffer.

    Shape:
        the student's logits ``(N, C)``, the experts' ``(G, N, C)``, of which columns of other groups are not looked at;
        labels ``(N,)`` of any integer type; a 0-d loss.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape; a group without classes, a class without group.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.experts.LFMELoss([900, 800, 30, 20, 10, 5])
        >>> experts, student = torch.randn(3, 8, 6), torch.randn(8, 6)
        >>> loss = criterion(student, experts, torch.randint(6, (8,)))
        >>> criterion.set_accuracy(student=[0.8, 0.4, 0.1], expert=[0.8, 0.6, 0.5])
        >>> criterion.weight
        tensor([0.0000, 0.4762, 1.0000])

    Source:
        Xiang et al., "Learning From Multiple Experts: Self-paced Knowledge Distillation for Long-tailed
        Classification", ECCV 2020, and its published code, which takes the mean over samples and classes of a group
        times the number of its classes.
    """

    groups: Tensor
    weight: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        groups: Tensor | None = None,
        T: float = 2.0,
        threshold: float = 0.3,
        *,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        counts = rebalance.counts_buffer(class_counts)
        groups = shot_groups(class_counts) if groups is None else groups
        self.register_buffer("groups", class_sets("groups", groups, counts))
        self.register_buffer("weight", torch.ones(len(groups), device="cpu"))
        self.T = arg.number("T", T, 0.0, math.inf, open_low=True)
        self.threshold = arg.number("threshold", threshold, 0.0, 1.0)
        if self.threshold == 1.0:
            raise ValueError("threshold: expected a number below 1, found 1")
        self.ignore_index = arg.integer("ignore_index", ignore_index)

    def set_accuracy(self, student: Tensor | list[float], expert: Tensor | list[float]) -> None:
        """Sets the groups' weights.

        Args:
            student: accuracy of the student on each group, ``(G,)``, in ``[0, 1]``; validation data are meant.
            expert: accuracy of each expert on its own group, ``(G,)``. With 0 there is nothing to learn: weight 0.
        """
        shape = tuple(self.weight.shape)
        accuracies = []
        for name, value in (("student", student), ("expert", expert)):
            accuracy = torch.as_tensor(value, dtype=torch.float64, device="cpu")
            if accuracy.shape != shape:
                raise ValueError(f"{name}: expected the accuracy of each group, shape {shape}, found"
                                 f" {tuple(accuracy.shape)}")  # fmt: skip
            if not bool(((accuracy >= 0) & (accuracy <= 1)).all()):
                raise ValueError(f"{name}: expected accuracies in [0, 1], found {accuracy.tolist()}")
            accuracies.append(accuracy)
        own, known = accuracies
        missing = torch.where(known > 0, (known - own) / known, 0.0)
        self.weight.copy_((missing / (1.0 - self.threshold)).clamp(0.0, 1.0))  # in place: a captured step reads it here

    def forward(self, student: Tensor, experts: Experts, target: Tensor) -> Tensor:
        """The loss.

        Args:
            student: logits ``(N, C)``.
            experts: logits ``(G, N, C)`` or a list of ``(N, C)``, which take no gradient.
            target: labels.

        Returns:
            0-d; float64 for float64 logits, else float32.
        """
        teachers = stacked("experts", experts, "G, N, C")
        if teachers.shape[0] != len(self.groups):
            raise ValueError(f"experts: expected the logits of {len(self.groups)} experts, found {teachers.shape[0]}")
        loss = functional.cross_entropy(student, target, ignore_index=self.ignore_index)
        for weight, teacher, group in zip(self.weight, teachers, self.groups, strict=True):
            kl = functional.distillation_loss(student, teacher, self.T, class_mask=group, temperature_scale=False)
            loss = loss + weight * kl
        return loss

    def extra_repr(self) -> str:
        return f"groups={self.groups.sum(dim=1).tolist()}, T={self.T!r}, threshold={self.threshold!r}"

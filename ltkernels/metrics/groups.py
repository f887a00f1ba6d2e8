"""From counts to the accuracies that long-tailed learning reports."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from ltkernels.class_counts import ClassCounts, _as_array, _native, as_class_counts

Counts = Tensor | npt.NDArray[Any]

ACCURACIES = ("overall", "balanced", "many", "medium", "few", "prior_weighted")
"""Names of the accuracies of :func:`shot_accuracy`, in [0, 1] or nan."""

NUMBERS = ("num_many", "num_medium", "num_few", "num_absent")
"""Names of its numbers of classes."""


def shot_accuracy(
    correct: Counts,
    total: Counts,
    class_counts: ClassCounts,
    many_shot_thr: float = 100,
    low_shot_thr: float = 20,
) -> dict[str, float]:
    """The accuracies that long-tailed learning reports, from how many samples of each class were predicted right.

    Accuracy over all samples hides the rare classes. So the recall of each class is averaged over groups of classes, by
    their *training* counts: many-shot above ``many_shot_thr``, few-shot below ``low_shot_thr``, medium-shot between,
    both ends included. Classes without test samples are left out of every mean, and counted.

    Args:
        correct: ``(C,)``, test samples of each class that were predicted right, as
            :func:`ltkernels.functional.accuracy_counts` counts them.
        total: ``(C,)``, test samples of each class.
        class_counts: ``(C,)``, training samples of each class.
        many_shot_thr: a class of more samples is many-shot.
        low_shot_thr: a class of fewer samples is few-shot; at most ``many_shot_thr``.

    Returns:
        In [0, 1], and nan where no class was tested: ``overall``, over the samples; ``balanced``, the mean recall of
        the classes (scikit-learn's ``balanced_accuracy_score``); ``many``, ``medium`` and ``few``, the mean recall of
        the group; ``prior_weighted``, recall weighted by training counts: the accuracy to expect where rare classes
        stay rare. ``num_many``, ``num_medium`` and ``num_few`` are how many classes those are means of, ``num_absent``
        how many were not tested.

    Raises:
        TypeError: counts that are not integers, class counts or thresholds that are not numbers.
        ValueError: a wrong shape; a count below 0; more right predictions than samples; ``low_shot_thr`` above
            ``many_shot_thr``.

    Example:
        >>> import torch, ltkernels as ltk
        >>> correct, total = torch.tensor([9, 3, 1, 0]), torch.tensor([10, 5, 2, 0])
        >>> found = ltk.metrics.shot_accuracy(correct, total, class_counts=[500, 50, 5, 1])
        >>> {name: round(value, 3) for name, value in found.items()}
        {'overall': 0.765, 'balanced': 0.667, 'many': 0.9, 'medium': 0.6, 'few': 0.5, 'prior_weighted': 0.869,
         'num_many': 1.0, 'num_medium': 1.0, 'num_few': 1.0, 'num_absent': 1.0}

    Source:
        Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019 (groups and thresholds).
    """
    prior = as_class_counts(class_counts)
    check_thresholds(many_shot_thr, low_shot_thr)
    right, tested = _as_counts("correct", correct, len(prior)), _as_counts("total", total, len(prior))
    if (right > tested).any():
        index = int((right > tested).nonzero()[0])
        raise ValueError(
            f"correct: expected at most total, found {int(right[index])} of {int(tested[index])} at class {index}"
        )
    recall, there = right.double() / tested, tested > 0
    many, few = prior > many_shot_thr, prior < low_shot_thr
    groups = {"many": many & there, "medium": ~many & ~few & there, "few": few & there}
    weight = torch.where(there, prior, 0.0)
    return {
        "overall": float(right.sum().double() / tested.sum()),
        "balanced": float(recall[there].mean()),
        **{name: float(recall[group].mean()) for name, group in groups.items()},
        "prior_weighted": float((recall[there] * weight[there]).sum() / weight.sum()),
        **{f"num_{name}": float(group.sum()) for name, group in groups.items()},
        "num_absent": float((~there).sum()),
    }


def check_thresholds(many_shot_thr: float, low_shot_thr: float) -> None:
    """Raises where a class could be in two groups."""
    for name, value in (("many_shot_thr", many_shot_thr), ("low_shot_thr", low_shot_thr)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected a number of samples, found {value!r}")
    if not low_shot_thr <= many_shot_thr:
        raise ValueError(f"low_shot_thr: expected at most many_shot_thr {many_shot_thr}, found {low_shot_thr}")


def _as_counts(name: str, counts: Counts, classes: int) -> Tensor:
    values = (
        counts.detach().cpu()
        if isinstance(counts, Tensor)
        else torch.from_numpy(_native(_as_array(name, counts, "iu")))
    )
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, found {values.dtype}")
    if values.shape != (classes,):
        raise ValueError(f"{name}: expected shape ({classes},), a count for each class, found {tuple(values.shape)}")
    values = values.long()
    if (values < 0).any():
        index = int((values < 0).nonzero()[0])
        raise ValueError(f"{name}: expected counts >= 0, found {int(values[index])} at class {index}")
    return values

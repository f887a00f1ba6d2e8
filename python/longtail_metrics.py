"""What long-tailed learning reports: accuracy over all test samples hides the rare classes, so every group is shown."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MANY_SHOT_ABOVE = 100
FEW_SHOT_BELOW = 20

METRICS = {
    "overall": "overall",
    "balanced": "balanced",
    "many": "many-shot",
    "medium": "medium",
    "few": "few-shot",
    "prior_weighted": "prior weighted",
}
"""Names and column titles."""


def per_class_recall(predicted: NDArray[np.int64], labels: NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    """Share of each class's samples that were predicted right, ``(C,)``; NaN for a class without test samples."""
    right = np.bincount(labels[predicted == labels], minlength=num_classes)
    with np.errstate(invalid="ignore"):
        return right / np.bincount(labels, minlength=num_classes)


def summarize(
    recall: NDArray[np.float64], labels: NDArray[np.int64], class_counts: NDArray[np.int64]
) -> dict[str, float]:
    """The six figures of a run, in [0, 1]; NaN for a group without classes in the test part.

    Groups go by the *training* counts: many-shot above 100, few-shot below 20, medium between. A group's accuracy is
    the mean recall of its classes. ``balanced`` is the mean over all classes, ``prior_weighted`` weights them by
    training frequency: the accuracy to expect where rare classes stay rare. Classes without test samples are left out
    of every mean.

    Args:
        recall: ``(C,)``, from ``per_class_recall``.
        labels: of the test part.
        class_counts: of the training part, ``(C,)``.
    """
    tested = ~np.isnan(recall)
    test_counts = np.bincount(labels, minlength=len(recall))
    many = class_counts > MANY_SHOT_ABOVE
    few = class_counts < FEW_SHOT_BELOW
    groups = {"balanced": np.ones_like(many), "many": many, "medium": ~many & ~few, "few": few}
    means = {name: _mean(recall, group & tested) for name, group in groups.items()}
    return {
        "overall": float(np.average(recall[tested], weights=test_counts[tested])),
        **means,
        "prior_weighted": float(np.average(recall[tested], weights=class_counts[tested])),
    }


def _mean(values: NDArray[np.float64], chosen: NDArray[np.bool_]) -> float:
    return float(values[chosen].mean()) if chosen.any() else float("nan")

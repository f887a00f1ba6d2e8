"""What long-tailed learning reports: accuracy over all test samples hides the rare classes, so every group is shown."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import ltkernels as ltk

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


def summarize(predictions: Tensor, labels: Tensor, class_counts: Tensor) -> dict[str, Any]:
    """The six figures of a run, in [0, 1]; NaN for a group without classes in the test part.

    What they are says ``ltkernels.metrics.shot_accuracy``: groups go by the *training* counts, and a group's accuracy
    is the mean recall of its classes. Classes without test samples are left out of every mean.

    Args:
        predictions: logits ``(T, C)`` of the test part, or predicted labels ``(T,)``.
        labels: of the test part.
        class_counts: of the training part, ``(C,)``.

    Returns:
        The figures by their names in ``METRICS``, and ``recall``: the share of each class's samples that were predicted
        right, NaN for a class without test samples.
    """
    correct, total = ltk.functional.accuracy_counts(predictions, labels, num_classes=len(class_counts))
    figures = ltk.metrics.shot_accuracy(correct, total, class_counts, MANY_SHOT_ABOVE, FEW_SHOT_BELOW)
    return {"recall": (correct.double() / total).tolist(), **{name: figures[name] for name in METRICS}}

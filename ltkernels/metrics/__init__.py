"""What long-tailed learning measures: accuracy by how many training samples a class has.

:class:`ShotAccuracy` is the metric for an evaluation loop, :func:`shot_accuracy` makes the same figures of counts, and
:func:`relative_accuracy` relates an accuracy to what the same model reaches without a long tail. The counts come from
:func:`ltkernels.functional.accuracy_counts`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ltkernels.metrics.groups import ACCURACIES, NUMBERS, shot_accuracy
from ltkernels.metrics.relative import relative_accuracy

if TYPE_CHECKING:
    from ltkernels.metrics.shot_metric import ShotAccuracy

__all__ = ["ACCURACIES", "NUMBERS", "ShotAccuracy", "relative_accuracy", "shot_accuracy"]


def __getattr__(name: str) -> Any:
    if name == "ShotAccuracy":  # on first use: it derives from torchmetrics' Metric, whose import takes seconds
        from ltkernels.metrics.shot_metric import ShotAccuracy

        globals()[name] = ShotAccuracy
        return ShotAccuracy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Accuracy of many-, medium- and few-shot classes over an evaluation: a metric.

A module of its own, because importing it imports torchmetrics where that is installed, which takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels.class_counts import ClassCounts, as_class_counts
from ltkernels.functional.accuracy_counts import accuracy_counts
from ltkernels.metrics.groups import check_thresholds, shot_accuracy

if TYPE_CHECKING:
    from ltkernels.metrics.accumulated import AccumulatedMetric as Metric
else:
    try:
        from torchmetrics import Metric
    except ImportError:
        from ltkernels.metrics.accumulated import AccumulatedMetric as Metric


class ShotAccuracy(Metric):
    r"""Recall of every class, and its means over many-, medium- and few-shot classes.

    A ``torchmetrics.Metric`` where torchmetrics is installed, so it works in a ``MetricCollection`` and in Lightning's
    ``log_dict``; without it a module of the same interface. The states ``correct`` and ``total`` are counts of each
    class on the metric's device: ``update`` is one pass over the logits and waits for nothing, ``compute`` adds up over
    all processes. What the figures mean stands at :func:`ltkernels.metrics.shot_accuracy`.

    Args:
        class_counts: ``(C,)``, *training* samples of each class, which decide on its group.
        many_shot_thr: a class of more samples is many-shot.
        low_shot_thr: a class of fewer samples is few-shot; at most ``many_shot_thr``.
        top_k: a prediction is right if the label is among the k classes of the largest logits.
        ignore_index: samples with this label are left out.
        **kwargs: as of ``torchmetrics.Metric``, such as ``process_group`` and ``sync_on_compute``.

    Raises:
        TypeError: class counts or thresholds that are not numbers; without torchmetrics, an unknown keyword.
        ValueError: bad class counts, ``low_shot_thr`` above ``many_shot_thr``, ``top_k`` outside [1, C], or, as
            torchmetrics has it, an unknown keyword.

    Example:
        >>> import torch, ltkernels as ltk
        >>> metric = ltk.metrics.ShotAccuracy(class_counts=[500, 50, 5, 1])
        >>> metric.update(torch.eye(4)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 2]))  # logits; the last one is wrong
        >>> metric.update(torch.tensor([2, 0]), torch.tensor([2, 1]))  # or predicted labels
        >>> figures = metric.compute()
        >>> {name: round(figures[name].item(), 3) for name in ("overall", "balanced", "many", "medium", "few")}
        {'overall': 0.667, 'balanced': 0.667, 'many': 1.0, 'medium': 0.5, 'few': 0.5}
        >>> metric.recall()
        tensor([1.0000, 0.5000, 0.5000,    nan])
    """

    is_differentiable: ClassVar[bool] = False
    higher_is_better: ClassVar[bool] = True
    full_state_update: ClassVar[bool] = False
    plot_lower_bound: ClassVar[float] = 0.0
    plot_upper_bound: ClassVar[float] = 1.0

    correct: Tensor
    total: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        many_shot_thr: float = 100,
        low_shot_thr: float = 20,
        top_k: int = 1,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        counts = as_class_counts(class_counts)
        check_thresholds(many_shot_thr, low_shot_thr)
        self.num_classes = len(counts)
        self.class_counts = counts  # no buffer: it is read on the host alone, and stays there
        self.many_shot_thr, self.low_shot_thr = many_shot_thr, low_shot_thr
        self.top_k = arg.integer("top_k", top_k)
        if not 1 <= self.top_k <= self.num_classes:
            raise ValueError(f"top_k: expected a number of classes in [1, {self.num_classes}], found {top_k}")
        self.ignore_index = arg.integer("ignore_index", ignore_index)
        zeros = torch.zeros(self.num_classes, dtype=torch.int64)
        self.add_state("correct", default=zeros, dist_reduce_fx="sum")
        self.add_state("total", default=zeros.clone(), dist_reduce_fx="sum")
        # A MetricCollection lets metrics whose states are equal after the first batch share them from then on. Top-1
        # and top-5 accuracy may well be equal there; with what tells them apart among their states they do not share.
        told = torch.tensor([self.top_k, self.ignore_index])
        self.add_state("counting", default=told, dist_reduce_fx="max")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch.

        Args:
            preds: logits or probabilities, ``(N, C)`` or ``(N, C, d1, ...)``, or predicted labels of the target's
                shape (with ``top_k=1``).
            target: labels in [0, C) or ``ignore_index``, of the shape without the class dimension.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a wrong shape or number of classes, or another device than the metric's.
            IndexError: a label outside [0, C) (CPU; nothing of the batch is then counted). On a GPU the row is left
                out, and the next call or :func:`ltkernels.check` raises.
        """
        if isinstance(preds, Tensor) and preds.device != self.correct.device:
            raise ValueError(
                f"preds: expected device {self.correct.device} as the metric's, found {preds.device};"
                f" metric.to({str(preds.device)!r}) moves the metric"
            )
        if self.correct.is_inference() and not torch.is_inference_mode_enabled():  # reset() was called in that mode
            self.correct, self.total = self.correct.clone(), self.total.clone()
        try:
            accuracy_counts(
                preds, target, self.correct, self.total,
                top_k=self.top_k, ignore_index=self.ignore_index, num_classes=self.num_classes,
            )  # fmt: skip
        except (IndexError, TypeError, ValueError) as error:  # under the name that the argument has here
            if not str(error).startswith("input:"):
                raise
            raise type(error)(f"preds{str(error).removeprefix('input')}") from None

    def compute(self) -> dict[str, Tensor]:
        """The figures of :func:`ltkernels.metrics.shot_accuracy`: float32 numbers on the metric's device."""
        correct, total = torch.stack([self.correct, self.total]).cpu()
        figures = shot_accuracy(correct, total, self.class_counts, self.many_shot_thr, self.low_shot_thr)
        values = torch.tensor(list(figures.values()), dtype=torch.float32, device=self.correct.device)
        return dict(zip(figures, values.unbind(), strict=True))

    def recall(self) -> Tensor:
        """Recall of every class over all processes, ``(C,)``, float32; nan for a class without samples."""
        apart = not self._is_synced
        with self.sync_context(should_sync=apart and self.sync_on_compute, should_unsync=apart):
            recall = self.correct / self.total
        return recall

    def extra_repr(self) -> str:
        shots = f"many_shot_thr={self.many_shot_thr}, low_shot_thr={self.low_shot_thr}"
        return f"num_classes={self.num_classes}, {shots}, top_k={self.top_k}, ignore_index={self.ignore_index}"

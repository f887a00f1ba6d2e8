"""Sigmoid losses of long-tailed detection: which negatives push the sigmoid of a rare class down.

========================== =============================================================================================
loss                       parameters of :func:`ltkernels.functional.binary_cross_entropy`
========================== =============================================================================================
`EqualizationLoss`         ``foreground_keep`` 0 for rare classes
`EqualizationLossV2`       ``pos_weight`` and ``neg_weight`` from the gradients so far
`DropLoss`                 ``foreground_keep`` 0 and ``background_keep`` the batch's share of rare classes, for these
`ACSLLoss`                 ``foreground_keep`` 0 with a ``score_threshold``, ``background_keep`` by frequency
`FederatedLoss`            ``neg_weight`` 1 for a random subset of the classes
========================== =============================================================================================

Rows without an object are called background. Their label is C, the number of classes, with or without a column of its
own; each loss says which. `DropLoss`, `ACSLLoss` and `FederatedLoss` look at the labels and take no multi-hot targets.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ltkernels import arguments as arg
from ltkernels import functional
from ltkernels.class_counts import ClassCounts, as_class_counts
from ltkernels.losses.base import flag
from ltkernels.losses.sigmoid import SigmoidLoss, SigmoidOptions

__all__ = ["ACSLLoss", "DropLoss", "EqualizationLoss", "EqualizationLossV2", "FederatedLoss"]

RARE_FREQUENCY = 1.77e-3  # of images: the lambda of the equalization and drop losses, for LVIS


def _rare_classes(class_counts: ClassCounts, num_images: float | None, threshold: float) -> Tensor:
    """Which classes are in fewer than ``threshold`` of all images."""
    counts = as_class_counts(class_counts)
    images = counts.sum().item() if num_images is None else arg.number("num_images", num_images, 0.0, math.inf, True)
    return counts / images < arg.number("threshold", threshold, 0.0, math.inf)


def _labels(input: Tensor, target: Tensor) -> Tensor:
    """The batch's labels, ``(N,)``, int64. Multi-hot targets would pass for labels 0 and 1."""
    arg.check_logits("input", input)
    if arg.tensor("target", target).dtype not in arg.INTEGER_TYPES:
        raise TypeError(f"target: expected labels of an integer type for this loss, found {target.dtype}")
    arg.check_target(input, target)
    return target.reshape(-1).long()


class EqualizationLoss(SigmoidLoss):
    """Equalization loss: rows with an object do not push down the sigmoids of rare classes other than the label.

    The logits have C columns; the label C is for rows of background, which push all classes down.

    Args:
        class_counts: in how many images each class is, ``(C,)``.
        num_images: how many images there are; by default the sum of the counts (one class an image).
        threshold: classes in a smaller share of the images than this are rare.
        **options: ``ignore_index``, ``reduction``, ``denominator`` (by default ``"count"``: rows) and ``empty``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.EqualizationLoss([9000, 990, 10])
        >>> criterion(torch.zeros(2, 3), torch.tensor([0, 3]))  # 2 terms of the first row and 3 of the second
        tensor(1.7329)

    Source:
        Tan et al., "Equalization Loss for Long-Tailed Object Recognition", CVPR 2020, equations 2 and 3.
    """

    _shown = ("threshold",)
    foreground_keep: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        num_images: float | None = None,
        threshold: float = RARE_FREQUENCY,
        **options: Unpack[SigmoidOptions],
    ) -> None:
        rare = _rare_classes(class_counts, num_images, threshold)
        super().__init__(len(rare), **options)
        self.threshold = float(threshold)
        self.register_buffer("foreground_keep", (~rare).float())
        self._check()

    def _parameters_of(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        return {"background_index": self._columns, "foreground_keep": self.foreground_keep}


class EqualizationLossV2(SigmoidLoss):
    r"""Equalization loss v2: a class's terms are weighted by the balance of its gradients so far.

    With the sums :math:`P_c` and :math:`N_c` of the sizes of the weighted gradients of positives and negatives over all
    steps before, :math:`g = P_c / N_c`, negatives have the weight :math:`\sigma(\gamma (g - \mu))` =: n and positives
    :math:`1 + \alpha (1 - n)`. Both are 1 before the first step.

    The sums are buffers, so a run that is resumed goes on with them. They grow in ``train()`` mode only.

    Args:
        num_classes: C.
        gamma: steepness of the weights, at least 0.
        mu: the balance at which a negative weighs 1/2.
        alpha: how much more positives of starved classes weigh, at least 0.
        background: whether the logits have one more column, the last, for background; it is never weighted.
        process_group: of ``torch.distributed``: its processes add up their gradients (one all-reduce a step). None:
            each process keeps its own.
        **options: ``ignore_index``, ``reduction``, ``denominator`` (by default ``"count"``: rows) and ``empty``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.EqualizationLossV2(3)
        >>> logits, labels = torch.zeros(4, 3), torch.tensor([0, 0, 0, 1])
        >>> first = criterion(logits, labels)
        >>> [round(weight, 3) for weight in criterion.weights()[1].tolist()]  # of negatives: 1 for the frequent class
        [1.0, 0.004, 0.0]

    Source:
        Tan et al., "Equalization Loss v2: A New Gradient Balance Approach for Long-tailed Object Detection", CVPR 2021,
        equations 4 to 7.
    """

    _shown = ("gamma", "mu", "alpha", "background")
    pos_grad: Tensor
    neg_grad: Tensor

    def __init__(
        self,
        num_classes: int,
        gamma: float = 12.0,
        mu: float = 0.8,
        alpha: float = 4.0,
        background: bool = False,
        process_group: Any = None,
        **options: Unpack[SigmoidOptions],
    ) -> None:
        num_classes = arg.integer("num_classes", num_classes)
        if num_classes < 1:
            raise ValueError(f"num_classes: expected >= 1, found {num_classes}")
        super().__init__(num_classes + flag("background", background), **options)
        self.gamma = arg.number("gamma", gamma, 0.0, math.inf)
        self.mu = arg.number("mu", mu, -math.inf, math.inf)
        self.background = background
        self.alpha = arg.number("alpha", alpha, 0.0, math.inf)
        self.process_group = process_group
        # float64: in float32 a sum of 2^24 would not grow by what a step adds.
        self.register_buffer("pos_grad", torch.zeros(num_classes, dtype=torch.float64, device="cpu"))
        self.register_buffer("neg_grad", torch.zeros(num_classes, dtype=torch.float64, device="cpu"))
        self._check()

    def weights(self) -> tuple[Tensor, Tensor]:
        """The weights of positives and of negatives in the next step, ``(C,)`` each, float32."""
        negative = torch.sigmoid(self.gamma * (self.pos_grad / (self.neg_grad + 1e-10) - self.mu))
        negative = torch.where(self.pos_grad + self.neg_grad == 0, 1.0, negative)
        return (1.0 + self.alpha * (1.0 - negative)).float(), negative.float()

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss, as of the other losses here; in ``train()`` mode the gradients are added to the sums."""
        arguments = self._options() | self._parameters_of(input, target)
        loss: Tensor
        if not self.training:
            loss = functional.binary_cross_entropy(input, target, sample_weight=sample_weight, **arguments)
            return loss
        loss, sums = functional.binary_cross_entropy(
            input, target, sample_weight=sample_weight, column_sums=True, **arguments
        )
        with torch.no_grad():
            sums = sums[:, : len(self.pos_grad)].to(self.pos_grad.dtype)
            if self.process_group is not None:
                torch.distributed.all_reduce(sums, group=self.process_group)
            self.pos_grad += sums[0]
            self.neg_grad += sums[1]
        return loss

    def _parameters_of(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        positive, negative = self.weights()
        if self.background:
            positive, negative = (torch.cat([w, w.new_ones(1)]) for w in (positive, negative))
        return {"pos_weight": positive, "neg_weight": negative}


class _DrawnLoss(SigmoidLoss):
    """A loss that draws: the numbers depend on seed and step alone."""

    step: Tensor

    def __init__(self, columns: int, seed: int, **options: Unpack[SigmoidOptions]) -> None:
        super().__init__(columns, **options)
        self.seed = seed
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device="cpu"))

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss, as of the other losses here; in ``train()`` mode the next call draws anew."""
        loss = super().forward(input, target, sample_weight)
        if self.training:
            self.step.add_(1)
        return loss

    def _parameters_of(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        return {"seed": self.seed, "step": self.step.clone()}  # the backward reads it when the other has moved on


class DropLoss(_DrawnLoss):
    """Drop loss: like equalization, and rows of background push rare classes down only now and then.

    A rare negative of a background row is kept with a probability that is the share of rare classes among the batch's
    foreground rows (0 in a batch without foreground). The logits have C columns; the label C is for background.

    Args:
        class_counts: in how many images each class is, ``(C,)``.
        num_images: how many images there are; by default the sum of the counts.
        threshold: classes in a smaller share of the images than this are rare.
        seed: of the drops. Each call in ``train()`` mode takes the next drawing; ``state_dict`` has which.
        **options: ``ignore_index``, ``reduction``, ``denominator`` (by default ``"count"``: rows) and ``empty``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.DropLoss([9000, 990, 10])
        >>> criterion(torch.zeros(2, 3), torch.tensor([0, 3]))  # no rare class in this batch
        tensor(1.3863)

    Source:
        Hsieh et al., "DropLoss for Long-Tail Instance Segmentation", AAAI 2021.
    """

    _shown = ("threshold", "seed")
    rare: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        num_images: float | None = None,
        threshold: float = RARE_FREQUENCY,
        seed: int = 0,
        **options: Unpack[SigmoidOptions],
    ) -> None:
        rare = _rare_classes(class_counts, num_images, threshold)
        super().__init__(len(rare), seed, **options)
        self.threshold = float(threshold)
        self.register_buffer("rare", rare)
        self._check()

    def _parameters_of(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        labels = _labels(input, target)
        foreground = (labels >= 0) & (labels < self._columns) & (labels != self.ignore_index)
        of_rare = foreground & self.rare[torch.where(foreground, labels, 0)]
        share = of_rare.sum() / foreground.sum().clamp_min(1)
        return super()._parameters_of(input, target) | {
            "background_index": self._columns,
            "foreground_keep": (~self.rare).float(),
            "background_keep": torch.where(self.rare, share, 1.0),
        }


class ACSLLoss(_DrawnLoss):
    """Adaptive class suppression loss: a class is pushed down only by rows that it is confused with.

    In rows with an object a negative is kept where its sigmoid reaches ``threshold``. Rows of background keep all
    frequent classes, and common and rare ones in a random part of the rows. The logits have C + 1 columns; the last is
    that of background, whose label is C.

    Which rows is drawn once a row, with the probabilities ``keep``; the published code takes exactly that part of the
    batch's rows, for each group of classes by itself.

    Args:
        class_counts: in how many images each class is, ``(C,)``.
        threshold: in (0, 1).
        groups: a class is rare in at most this many images, common in at most the second number. LVIS: 10 and 100.
        keep: part of the background rows that push down rare and common classes.
        seed: of the draws. Each call in ``train()`` mode takes the next drawing; ``state_dict`` has which.
        **options: ``ignore_index``, ``reduction``, ``denominator`` (by default ``"count"``: rows) and ``empty``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> logits = torch.tensor([[1.0, 2.0, -1.0]])
        >>> ltk.losses.ACSLLoss([900, 90])(logits, torch.tensor([0]))  # the label, and class 1 at 0.88
        tensor(2.4402)

    Source:
        Wang et al., "Adaptive Class Suppression Loss for Long-Tail Object Detection", CVPR 2021, equations 5 and 6.
    """

    _shown = ("threshold", "groups", "keep", "seed")
    background_keep: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        threshold: float = 0.7,
        groups: tuple[float, float] = (10, 100),
        keep: tuple[float, float] = (0.01, 0.1),
        seed: int = 0,
        **options: Unpack[SigmoidOptions],
    ) -> None:
        counts = as_class_counts(class_counts)
        super().__init__(len(counts) + 1, seed, **options)
        self.threshold, self.groups, self.keep = threshold, _groups(groups), keep
        kept = torch.where(counts <= groups[0], keep[0], torch.where(counts <= groups[1], keep[1], 1.0))
        self.register_buffer("background_keep", torch.cat([kept, kept.new_ones(1)]).float())
        self._check()

    def _parameters_of(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        _labels(input, target)
        return super()._parameters_of(input, target) | {
            "background_index": self._columns - 1,
            "foreground_keep": torch.zeros_like(self.background_keep),
            "background_keep": self.background_keep,
            "score_threshold": self.threshold,
            "draws": "row",
        }


def _groups(groups: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(groups, (tuple, list)) or len(groups) != 2:
        raise TypeError(f"groups: expected two numbers of images, found {groups!r}")
    rare, common = (arg.number(f"groups[{i}]", value, 0.0, math.inf) for i, value in enumerate(groups))
    if rare > common:
        raise ValueError(f"groups: expected the number of rare classes first, found {groups!r}")
    return groups


class FederatedLoss(SigmoidLoss):
    """Federated loss: only the batch's classes and some others, drawn by their frequency, have negatives.

    ``num_sample_classes`` classes take part in a call, or as many as the batch has if that is more; the rest are drawn
    without replacement from the device's generator, with probabilities proportional to ``n_c ** power``, without
    waiting for the device. The logits have C columns; the label C is for background, which is not counted as a class
    (detectron2 counts it).

    Args:
        class_counts: in how many images each class is, ``(C,)``.
        num_sample_classes: at least 1.
        power: of the counts, at least 0.
        **options: ``ignore_index``, ``reduction``, ``denominator`` (by default ``"count"``: rows) and ``empty``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.FederatedLoss([9000, 990, 10], num_sample_classes=2)
        >>> criterion(torch.zeros(2, 3), torch.tensor([0, 3]))  # two classes, whichever the second is
        tensor(1.3863)

    Source:
        Zhou et al., "Probabilistic two-stage detection", 2021, section 5, in the form of detectron2.
    """

    _shown = ("num_sample_classes", "power")
    draw_weight: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        num_sample_classes: int = 50,
        power: float = 0.5,
        **options: Unpack[SigmoidOptions],
    ) -> None:
        counts = as_class_counts(class_counts)
        super().__init__(len(counts), **options)
        self.num_sample_classes = arg.integer("num_sample_classes", num_sample_classes)
        if self.num_sample_classes < 1:
            raise ValueError(f"num_sample_classes: expected >= 1, found {num_sample_classes}")
        self.power = arg.number("power", power, 0.0, math.inf)
        weight = torch.where(counts > 0, counts.pow(self.power), 0.0)
        self.register_buffer("draw_weight", (weight / weight.sum()).float())
        self._check()

    def class_subset(self, target: Tensor) -> Tensor:
        """Which classes take part, ``(C,)``, 1 or 0: an exponential race, in which the batch's classes come first."""
        labels = target.reshape(-1).long()
        valid = (labels >= 0) & (labels < self._columns) & (labels != self.ignore_index)
        # One slot more takes the rows that have no class.
        present = torch.zeros(self._columns + 1, device=labels.device)
        present = present.scatter(0, torch.where(valid, labels, self._columns), 1.0)[: self._columns]
        key = self.draw_weight / torch.empty_like(self.draw_weight).exponential_()
        chosen = torch.where(present > 0, torch.inf, key).topk(min(self.num_sample_classes, self._columns)).indices
        drawn = torch.zeros_like(key).scatter(0, chosen, 1.0) * (self.draw_weight > 0)
        return torch.maximum(drawn, present)

    def _parameters_of(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        return {"background_index": self._columns, "neg_weight": self.class_subset(_labels(input, target))}

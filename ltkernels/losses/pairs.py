"""Losses with a term for each pair of label and class, and a state that training moves on.

:mod:`ltkernels.losses` has the classes by name, and says what holds for all losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor, distributed
from typing_extensions import Unpack

from ltkernels import arguments as arg
from ltkernels import functional, rebalance
from ltkernels.functional.row_cross_entropy import log_counts, seesaw_of_log_counts
from ltkernels.losses.base import WeightedLossModule, differing
from ltkernels.rebalance import ClassCounts, DeferredReweighting

__all__ = ["SeesawLoss", "SoftmaxEqualizationLoss"]


class PairOptions(TypedDict, total=False):
    """Keyword arguments of both losses; :class:`ltkernels.losses.CrossEntropyLoss` explains them."""

    weight: Tensor | DeferredReweighting | None
    ignore_index: int
    reduction: str
    scale: float
    denominator: str | float | Tensor
    empty: str


class _PairLoss(WeightedLossModule):
    """What the losses share: options, checks and repr."""

    _shown: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[Mapping[str, object]] = {  # options, in the repr where they differ from this
        "weight": None,
        "ignore_index": -100,
        "denominator": "weight",
        "empty": "nan",
    }

    def __init__(
        self,
        *,
        weight: Tensor | DeferredReweighting | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        scale: float = 1.0,
        denominator: str | float | Tensor = "weight",
        empty: str = "nan",
    ) -> None:
        super().__init__()
        self.weight = weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.scale = scale
        self.denominator = denominator
        self.empty = empty

    def _options(self) -> dict[str, Any]:
        return {
            "weight": self._class_weight(),
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "scale": self.scale,
            "denominator": self.denominator if self.reduction == "mean" else "weight",
            "empty": self.empty,
        }

    def _check(self, function: Callable[..., Tensor], table: Tensor, **settings: Any) -> None:
        """Calls the loss with no rows: what the call would refuse is refused by the constructor, in the same words."""
        options = {name: v.detach().cpu() if isinstance(v, Tensor) else v for name, v in self._options().items()}
        labels = torch.empty(0, dtype=torch.int64, device="cpu")
        function(torch.empty(0, table.numel(), device="cpu"), labels, table, **settings, **options)

    def extra_repr(self) -> str:
        return ", ".join([f"{name}={getattr(self, name)!r}" for name in self._shown] + differing(self, self._defaults))


class SeesawLoss(_PairLoss):
    """Seesaw loss: what a sample of class y does to the logits of rarer classes is lessened.

    See :func:`ltkernels.functional.seesaw_cross_entropy` for the formula. The counts are those of the labels seen so
    far: an int64 buffer, in ``state_dict``, which only training moves on. Counting is one scatter on the device: it
    waits for nothing. Ignored rows are not counted. At evaluation use the logits as they are.

    Args:
        num_classes: C.
        p: mitigation, at least 0.
        q: compensation, at least 0.
        eps: least probability of the label that compensation reckons with, in (0, 1].
        update: ``"before"``: a batch counts in its own loss (published); ``"after"``: only in the next one.
        process_group: whose counts are added up: a ``torch.distributed`` process group, True for the default one, None
            for this process's alone (published).
        **options: ``weight``, ``ignore_index``, ``reduction``, ``denominator``, ``empty`` of
            :class:`ltkernels.losses.CrossEntropyLoss`, and ``scale``, for cosines (the paper: 20). ``denominator`` is
            ``"count"`` by default.

    Attributes:
        class_counts: int64 ``(C,)``, labels seen so far, at first 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.SeesawLoss(3)
        >>> loss = criterion(torch.zeros(4, 3), torch.tensor([0, 0, 0, 2]))
        >>> criterion.class_counts
        tensor([3, 0, 1])

    Source:
        Wang et al., "Seesaw Loss for Long-Tailed Instance Segmentation", CVPR 2021. The published code keeps float32
        counts, which stop at 2^24, and counts at evaluation too.
    """

    _shown = ("num_classes", "p", "q", "eps", "update", "scale", "reduction")
    _defaults: ClassVar[Mapping[str, object]] = {**_PairLoss._defaults, "denominator": "count"}
    class_counts: Tensor

    def __init__(
        self,
        num_classes: int,
        p: float = 0.8,
        q: float = 2.0,
        eps: float = 1e-2,
        *,
        update: Literal["before", "after"] = "before",
        process_group: distributed.ProcessGroup | Literal[True] | None = None,
        **options: Unpack[PairOptions],
    ) -> None:
        options.setdefault("denominator", "count")
        super().__init__(**options)
        self.num_classes = arg.integer("num_classes", num_classes)
        if self.num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, found {num_classes}")
        self.p, self.q, self.eps = p, q, eps
        self.update = arg.choice("update", update, ("before", "after"))
        self.process_group = process_group
        self.register_buffer("class_counts", torch.zeros(self.num_classes, dtype=torch.int64, device="cpu"))
        self._check(functional.seesaw_cross_entropy, self.class_counts, p=p, q=q, eps=eps)

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss; in training mode the labels are counted.

        Args:
            input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``.
            target: labels of any integer type, ``()``, ``(N,)`` or ``(N, d1, ...)``.
            sample_weight: a factor on the loss of each row, of the labels' shape.

        Returns:
            A 0-d tensor, or the labels' shape with ``reduction="none"``; float64 for float64 logits, else float32.
        """
        counts = self.class_counts
        if not isinstance(target, Tensor) or target.is_floating_point():
            found = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(f"target: expected labels of an integer type for this loss, found {found}")
        arg.check_logits("input", input)
        arg.check_target(input, target)
        if input.shape[min(input.dim() - 1, 1)] != self.num_classes:
            raise ValueError(
                f"input: expected {self.num_classes} classes, the num_classes of this loss, found shape"
                f" {tuple(input.shape)}"
            )
        if counts.device != input.device:
            raise ValueError(
                f"input: expected device {counts.device} as the loss's, found {input.device};"
                f" loss.to({str(input.device)!r}) moves the loss"
            )
        if self.training:
            counts = counts + self._counts_of(target)
        loss = seesaw_of_log_counts(
            input,
            target,
            log_counts(counts if self.update == "before" else self.class_counts, input),
            p=self.p,
            q=self.q,
            eps=self.eps,
            sample_weight=sample_weight,
            **self._options(),
        )
        if self.training:  # only now: a call that is refused counts nothing
            self.class_counts.copy_(counts)
        return loss

    def _counts_of(self, target: Tensor) -> Tensor:
        """Labels of a batch by class; ignored and wrong ones fall into bins of their own, before and behind."""
        bins = target.detach().reshape(-1).long().clamp(-1, self.num_classes).add_(1)
        counts = torch.zeros(self.num_classes + 2, dtype=torch.int64, device=bins.device)
        counts = counts.scatter_(0, bins, 1, reduce="add")[1:-1]
        if 0 <= self.ignore_index < self.num_classes:
            counts[self.ignore_index] = 0
        if self.process_group is not None:
            group = None if self.process_group is True else self.process_group
            counts = counts.contiguous()
            distributed.all_reduce(counts, group=group)
        return counts


class SoftmaxEqualizationLoss(_PairLoss):
    """Softmax equalization: rare classes other than the label leave the softmax of a row at random.

    A class is rare where its share of the training samples is at most ``rare_threshold``. Each call in training mode
    draws anew; which classes leave is a pure function of (seed, step, row, class), so a resumed run draws as if it had
    not stopped. In evaluation mode the loss draws too, but the step stays. At evaluation use the logits as they are.
    A class with count 0 may leave, and is an error as a label, on the CPU.

    Args:
        class_counts: training samples of each class, ``(C,)``.
        gamma: probability to leave, in ``[0, 1]``.
        rare_threshold: share of the samples, at least 0 (``lambda`` in the paper).
        seed: of the drawing.
        **options: as of :class:`SeesawLoss`; ``denominator`` is ``"weight"`` by default.

    Attributes:
        rare: bool ``(C,)``, the classes that may leave.
        step: int64, calls in training mode.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.SoftmaxEqualizationLoss([9000, 900, 3], gamma=1.0)
        >>> criterion(torch.zeros(2, 3), torch.tensor([0, 2]))
        tensor(0.8959)

    Source:
        Tan et al., "Equalization Loss for Long-Tailed Object Recognition", CVPR 2020, section 3.3.
    """

    _shown = ("gamma", "rare_threshold", "seed", "scale", "reduction")
    class_counts: Tensor
    rare: Tensor
    step: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        gamma: float = 0.9,
        rare_threshold: float = 4.3e-4,
        seed: int = 0,
        **options: Unpack[PairOptions],
    ) -> None:
        super().__init__(**options)
        counts = rebalance.as_class_counts(class_counts)
        self.gamma = gamma
        self.rare_threshold = arg.number("rare_threshold", rare_threshold, 0.0, math.inf)
        self.seed = seed
        self.register_buffer("class_counts", rebalance.counts_buffer(class_counts))
        self.register_buffer("rare", counts / counts.sum() <= self.rare_threshold)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device="cpu"))
        self._find_absent_classes()
        self._check(functional.equalization_cross_entropy, self.rare, drop_rate=gamma, seed=seed)

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss; in training mode the step moves on.

        Args:
            input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``.
            target: labels of any integer type, ``()``, ``(N,)`` or ``(N, d1, ...)``; or ``(labels, other labels,
                lam)``.
            sample_weight: a factor on the loss of each row, of the labels' shape.

        Returns:
            A 0-d tensor, or the labels' shape with ``reduction="none"``; float64 for float64 logits, else float32.
        """
        arg.check_logits("input", input)
        loss = functional.equalization_cross_entropy(
            input,
            target,
            self.rare,
            drop_rate=self.gamma,
            seed=self.seed,
            step=self.step.clone(),  # the backward reads it when this one has moved on
            sample_weight=sample_weight,
            **self._options(),
        )
        if self._has_absent_classes:
            self._refuse_absent_classes(target)
        if self.training:
            self.step.add_(1)
        return loss

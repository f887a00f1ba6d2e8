"""Sigmoid losses, each class for itself: parameters of :func:`ltkernels.functional.binary_cross_entropy`.

========================== =============================================================================================
loss                       parameters
========================== =============================================================================================
`ClassBalancedSigmoidLoss` ``weight`` by effective number, ``focal_gamma``
`SigmoidFocalLoss`         ``focal_gamma``, ``focal_alpha``
`AsymmetricLoss`           ``focal_gamma=(gamma_pos, gamma_neg)``, ``clip``
========================== =============================================================================================

Those of detection, which choose their negatives, are in :mod:`ltkernels.losses.detection`.

Published code starts the bias of the last layer so that all sigmoids are small: at ``-log(C - 1)`` (class-balanced
sigmoid) or ``-log((1 - 0.001) / 0.001)`` (equalization losses).
"""

from __future__ import annotations

from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from ltkernels import functional, rebalance
from ltkernels.losses.base import LossModule, differing
from ltkernels.rebalance import ClassCounts

__all__ = ["AsymmetricLoss", "ClassBalancedSigmoidLoss", "SigmoidFocalLoss"]


class SigmoidOptions(TypedDict, total=False):
    """Keyword arguments that every loss here has: see :func:`ltkernels.functional.binary_cross_entropy`."""

    ignore_index: int
    reduction: str
    denominator: str | float | Tensor
    empty: str


class SigmoidLoss(LossModule):
    """Options, checks, repr and the call."""

    _shown: ClassVar[tuple[str, ...]] = ()
    _denominator: ClassVar[str] = "count"  # of the published code

    def __init__(self, columns: int, **options: Unpack[SigmoidOptions]) -> None:
        """``columns``: of the logits that the loss takes, as far as its tables say."""
        super().__init__()
        self._columns = columns
        self.ignore_index = options.pop("ignore_index", -100)
        self.reduction = options.pop("reduction", "mean")
        self.denominator = options.pop("denominator", self._denominator)
        self.empty = options.pop("empty", "nan")
        if options:
            raise TypeError(f"{type(self).__name__}: found an unexpected argument {next(iter(options))!r}")

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            input: logits, ``(N, C)`` or ``(N, C, d1, ...)``; float64, float32, bfloat16 or float16.
            target: labels of any integer type; or, where the loss takes them, multi-hot targets.
            sample_weight: a factor on the loss of each row, of the labels' shape.

        Returns:
            A 0-d tensor, or the labels' shape with ``reduction="none"``; float64 for float64 logits, else float32.
        """
        arguments = self._options() | self._parameters_of(input, target)
        loss: Tensor = functional.binary_cross_entropy(input, target, sample_weight=sample_weight, **arguments)
        if self._has_absent_classes:
            self._refuse_absent_classes(target)
        return loss

    def extra_repr(self) -> str:
        parts = [f"{name}={getattr(self, name)!r}" for name in self._shown]
        if "class_counts" in self._buffers:
            parts.append(rebalance.describe_counts(self.get_buffer("class_counts")))
        defaults = {"ignore_index": -100, "reduction": "mean", "denominator": self._denominator, "empty": "nan"}
        return ", ".join(parts + differing(self, defaults))

    def _options(self) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            # Libraries set `loss.reduction = "none"` on a loss they were given; a denominator is for the mean alone.
            "denominator": self.denominator if self.reduction == "mean" else "count",
            "empty": self.empty,
        }

    def _parameters_of(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """The method's arguments, for these logits and labels."""
        return {}

    def _check(self) -> None:
        """Calls the loss with no rows: what the call would refuse is refused by the constructor, in the same words."""
        logits, labels = torch.empty(0, self._columns, device="cpu"), torch.empty(0, dtype=torch.int64, device="cpu")
        options = self._options()
        if isinstance(options["denominator"], Tensor):
            options["denominator"] = options["denominator"].detach().cpu()
        functional.binary_cross_entropy(logits, labels, **(options | self._parameters_of(logits, labels)))


class ClassBalancedSigmoidLoss(SigmoidLoss):
    """Sigmoid cross-entropy weighted by the effective number of samples of the row's label, on all its columns.

    Args:
        class_counts: training samples of each class, ``(C,)``. A class with count 0 is an error as a label, on the CPU.
        beta: in ``[0, 1)``; 0.9999 on long-tailed CIFAR.
        gamma: exponent of a focal factor, at least 0; 0 is the sigmoid loss, the published focal loss has 1.
        **options: ``ignore_index``, ``reduction``, ``denominator`` (by default ``"count"``, as published) and
            ``empty``, as of :func:`ltkernels.functional.binary_cross_entropy`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.ClassBalancedSigmoidLoss([900, 90, 10], beta=0.999)
        >>> criterion(torch.zeros(2, 3), torch.tensor([0, 2]))
        tensor(2.8007)

    Source:
        Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, equations 8 and 10.
    """

    _shown = ("beta", "gamma")
    class_counts: Tensor
    weight: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        beta: float = 0.9999,
        gamma: float = 0.0,
        **options: Unpack[SigmoidOptions],
    ) -> None:
        weight = rebalance.effective_number_weight(class_counts, beta)
        super().__init__(len(weight), **options)
        self.register_buffer("class_counts", rebalance.counts_buffer(class_counts))
        self._find_absent_classes()
        self.register_buffer("weight", weight)
        self.beta, self.gamma = float(beta), gamma
        self._check()

    def _parameters_of(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        return {"weight": self.weight, "focal_gamma": self.gamma}


class SigmoidFocalLoss(SigmoidLoss):
    """Sigmoid focal loss: ``alpha (1 - p)^gamma`` on positives and ``(1 - alpha) p^gamma`` on negatives.

    Args:
        gamma: at least 0.
        alpha: in [0, 1]; None for no factor.
        **options: ``ignore_index``, ``reduction``, ``denominator`` (by default ``"elements"``) and ``empty``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value.

    Example:
        >>> import torch, ltkernels as ltk
        >>> ltk.losses.SigmoidFocalLoss()(torch.zeros(1, 2), torch.tensor([[1, 0]]))
        tensor(0.0866)

    Source:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 5. The paper divides by the number of
        anchors with an object: give that as ``denominator``.
    """

    _shown = ("gamma", "alpha")
    _denominator = "elements"

    def __init__(self, gamma: float = 2.0, alpha: float | None = 0.25, **options: Unpack[SigmoidOptions]) -> None:
        super().__init__(1, **options)
        self.gamma, self.alpha = gamma, alpha
        self._check()

    def _parameters_of(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        return {"focal_gamma": self.gamma, "focal_alpha": self.alpha}


class AsymmetricLoss(SigmoidLoss):
    """Asymmetric loss: its own focal exponent for negatives, whose probability is shifted down by ``clip``.

    Args:
        gamma_pos: exponent for positives, at least 0.
        gamma_neg: exponent for negatives, at least 0.
        clip: in [0, 1): negatives below this probability are lost.
        **options: ``ignore_index``, ``reduction``, ``denominator`` (by default ``"elements"``) and ``empty``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value.

    Example:
        >>> import torch, ltkernels as ltk
        >>> ltk.losses.AsymmetricLoss()(torch.zeros(1, 2), torch.tensor([[1, 0]]))
        tensor(0.3588)

    Source:
        Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021, equations 5 to 7. The gradient flows
        through the factors; the paper's own code can hold them constant.
    """

    _shown = ("gamma_pos", "gamma_neg", "clip")
    _denominator = "elements"

    def __init__(
        self,
        gamma_pos: float = 0.0,
        gamma_neg: float = 4.0,
        clip: float = 0.05,
        **options: Unpack[SigmoidOptions],
    ) -> None:
        super().__init__(1, **options)
        self.gamma_pos, self.gamma_neg, self.clip = gamma_pos, gamma_neg, clip
        self._check()

    def _parameters_of(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        return {"focal_gamma": (self.gamma_pos, self.gamma_neg), "clip": self.clip}

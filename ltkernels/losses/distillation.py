"""Distillation as a module: the weights of the classes in, one functional call out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels import functional
from ltkernels.losses.base import LossModule, differing

__all__ = ["DistillationLoss"]


class DistillationLoss(LossModule):
    """Divergence of the student from its teacher at temperature ``T`` and, with labels, cross-entropy at 1.

    The defaults are Hinton's. Published methods are arguments:

    * balanced knowledge distillation: ``class_weight``, the effective-number weights with ``beta=0.9999``;
    * DiVE: ``power=0.5``, ``alpha`` and ``ce_weight=1 - alpha``, ``class_bias`` the logarithms of the class counts, a
      teacher that was trained with balanced softmax;
    * an expert of LFME: ``class_mask`` of its classes, ``temperature_scale=False``;
    * RIDE's distillation: ``T=1.5``, without labels.

    Args:
        T: temperature > 0.
        alpha: weight >= 0 of the divergence.
        ce_weight: weight >= 0 of the cross-entropy, where a call has labels.
        class_weight: ``(C,)`` weights >= 0 by which the teacher's probabilities are multiplied; they are normalised
            again, so that a common factor changes nothing.
        power: > 0, to which the teacher's probabilities are raised.
        class_mask: ``(C,)`` bool: the classes of the divergence; None for all.
        class_bias: ``(C,)``, added to the student's logits in the cross-entropy alone; finite or -inf.
        temperature_scale: multiply the divergence by ``T ** 2``.
        ignore_index: label of rows without cross-entropy; they distil all the same.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``; the mean divides the divergence by the number of rows and the
            cross-entropy by that of rows that are not ignored.

    Shape:
        student and teacher ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)`` of any floating types, labels of any integer
        type and that shape without the classes; a 0-d loss, or the labels' shape with ``reduction="none"``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.DistillationLoss(class_weight=torch.tensor([0.2, 0.8, 2.0]))
        >>> student, teacher = torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([[1.0, 1.0, 0.0]])
        >>> criterion(student, teacher, torch.tensor([0]))
        tensor(3.0680)

    Source:
        See :func:`ltkernels.functional.distillation_loss`.
    """

    class_mask: Tensor | None
    class_bias: Tensor | None
    teacher_bias: Tensor | None

    def __init__(
        self,
        T: float = 2.0,
        alpha: float = 1.0,
        ce_weight: float = 1.0,
        *,
        class_weight: Tensor | None = None,
        power: float = 1.0,
        class_mask: Tensor | None = None,
        class_bias: Tensor | None = None,
        temperature_scale: bool = True,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.T = arg.number("T", T, 0.0, math.inf, open_low=True)
        self.power = arg.number("power", power, 0.0, math.inf, open_low=True)
        self.alpha, self.ce_weight = alpha, ce_weight
        self.temperature_scale, self.ignore_index, self.reduction = temperature_scale, ignore_index, reduction
        for name, table in (("class_mask", class_mask), ("class_bias", class_bias)):
            self.register_buffer(name, None if table is None else arg.tensor(name, table))
        self.register_buffer("teacher_bias", None if class_weight is None else _log_weight(class_weight))
        self._check()

    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The loss.

        Args:
            student: logits.
            teacher: logits of the same shape; takes no gradient.
            target: labels; None for no cross-entropy.
            sample_weight: factors on the rows' losses, of the labels' shape.

        Returns:
            0-d, or the labels' shape with ``reduction="none"``; float64 for a float64 student, else float32.
        """
        return functional.distillation_loss(
            student,
            teacher,
            self.T,
            teacher_T=self.T / self.power,
            teacher_bias=self.teacher_bias,
            class_mask=self.class_mask,
            target=target,
            class_bias=None if target is None else self.class_bias,
            alpha=self.alpha,
            ce_weight=self.ce_weight,
            temperature_scale=self.temperature_scale,
            sample_weight=sample_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        parts = [f"{name}={getattr(self, name)!r}" for name in ("T", "alpha", "ce_weight", "power")]
        tables = {"class_weight": self.teacher_bias, "class_mask": self.class_mask, "class_bias": self.class_bias}
        parts += [f"{name}={tuple(table.shape)}" for name, table in tables.items() if table is not None]
        if not self.temperature_scale:
            parts.append("temperature_scale=False")
        return ", ".join(parts + differing(self, {"ignore_index": -100, "reduction": "mean"}))

    def _check(self) -> None:
        """Calls the loss with no rows: what the call would refuse is refused by the constructor, in the same words."""
        table = next(self.buffers(), torch.empty(1, device="cpu"))
        logits = torch.empty(0, table.numel(), device=table.device)
        self.forward(logits, logits, torch.empty(0, dtype=torch.int64, device=table.device))


def _log_weight(class_weight: Tensor) -> Tensor:
    """q ∝ softmax(u) w is softmax(u + log w); float64 until the logarithm is taken, -inf for a weight of 0."""
    weight = arg.tensor("class_weight", class_weight)
    if not weight.is_floating_point():
        raise TypeError(f"class_weight: expected a floating type, found {weight.dtype}")
    if weight.dim() != 1 or not bool((torch.isfinite(weight) & (weight >= 0)).all()) or not bool((weight > 0).any()):
        raise ValueError(
            f"class_weight: expected shape (C,) and finite values >= 0, one of them > 0, found {weight.tolist()}"
        )
    return weight.double().log().float()

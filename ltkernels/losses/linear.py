"""A loss that owns its classifier, so that logits are never in memory as a whole.

:mod:`ltkernels.losses` has the classes by name, and says what holds for all losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ltkernels import arguments as arg
from ltkernels import functional
from ltkernels.functional.row_cross_entropy import Target
from ltkernels.functional.unit import unit
from ltkernels.losses.base import AdjustedCrossEntropy
from ltkernels.rebalance import DeferredReweighting

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions

__all__ = ["LinearCrossEntropyLoss"]


class LinearCrossEntropyLoss(AdjustedCrossEntropy):
    """A linear classifier and a softmax loss of its logits, which never exist whole: features in, loss out.

    ``torch.nn.LinearCrossEntropyLoss`` with the same arguments, values and ``state_dict``; and, by ``criterion``, the
    same for every loss that is made of class tables: :class:`LogitAdjustedLoss`, :class:`BalancedSoftmaxLoss`,
    :class:`VSLoss`, :class:`LDAMLoss`, :class:`CosFaceLoss`, :class:`ArcFaceLoss`, :class:`FocalLoss`,
    :class:`ClassBalancedLoss`, :class:`LabelAwareSmoothingLoss`. See
    :func:`ltkernels.functional.linear_cross_entropy`.

    The layer is the attribute ``linear``: at evaluation predict from ``loss.logits(features)``.

    Args:
        in_features: D, size of a feature vector.
        num_classes: C.
        out_features: ``(d1, ..., dK)`` for logits ``(N, C, d1, ..., dK)``.
        bias: whether the layer has one.
        device: of the layer.
        dtype: of the layer.
        weight: class weights ``(C,)``, or a :class:`ltkernels.rebalance.DeferredReweighting`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: label of rows that take no part; None is -100.
        label_smoothing: in ``[0, 1]``, or ``(C,)``, by the row's label.
        options: a :class:`torch.nn.LinearCrossEntropyOptions`; None chooses the rows of a chunk by size.
        criterion: another loss, in place of the four arguments above ``options``.
        normalize: whether logits are cosines, as the losses with margins expect them; their scale is the
            criterion's.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> margins = ltk.losses.LDAMLoss([900, 90, 10])
        >>> loss = ltk.losses.LinearCrossEntropyLoss(16, 3, criterion=margins, normalize=True)
        >>> loss(torch.randn(8, 16), torch.randint(3, (8,))).backward()
        >>> loss.linear.weight.grad.shape, loss.logits(torch.randn(2, 16)).shape
        (torch.Size([3, 16]), torch.Size([2, 3]))
    """

    _defaults: ClassVar[Mapping[str, object]] = {
        "weight": None,
        "ignore_index": -100,
        "reduction": "mean",
        "label_smoothing": 0.0,
        "options": None,
        "normalize": False,
    }
    _made = False

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | DeferredReweighting | None = None,
        ignore_index: int | None = None,
        label_smoothing: float | Tensor = 0.0,
        options: LinearCrossEntropyOptions | None = None,
        criterion: AdjustedCrossEntropy | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__(
            weight=weight,
            ignore_index=-100 if ignore_index is None else ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        self.in_features = arg.size("in_features", in_features)
        self.num_classes = arg.size("num_classes", num_classes)
        self.out_features = tuple(arg.size("out_features", size) for size in out_features)
        self.options = options
        self.normalize = normalize
        if criterion is not None:
            self._check_criterion(criterion)
        self.criterion = criterion
        columns = math.prod(self.out_features, start=self.num_classes)
        self.linear = nn.Linear(self.in_features, columns, bias=bias, device=device, dtype=dtype)
        self._made = True
        self._check()

    def forward(self, input: Tensor, target: Target, sample_weight: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            input: features, ``(D,)``, ``(N, D)`` or ``(..., D)``.
            target: labels, probabilities or ``(labels, other labels, lam)``, as of
                :func:`ltkernels.functional.linear_cross_entropy`.
            sample_weight: a factor on the loss of each row, of the labels' shape.

        Returns:
            A 0-d tensor, or one value a row with ``reduction="none"``; float64 for float64 features, else float32.
        """
        shape = (self.num_classes, *self.out_features)
        weight: Tensor = self.linear.weight
        bias: Tensor | None = self.linear.bias
        if self.out_features:
            weight, bias = weight.view(*shape, self.in_features), None if bias is None else bias.view(shape)
        return self._of(input, weight, bias, target, sample_weight)

    def logits(self, input: Tensor) -> Tensor:
        """Logits for evaluation, without the loss's tables: ``(..., C)``, or ``(N, C, d1, ..., dK)``."""
        weight = self.linear.weight
        z: Tensor = nn.functional.linear(
            unit(input) if self.normalize else input, unit(weight) if self.normalize else weight, self.linear.bias
        )
        return z.unflatten(-1, (self.num_classes, *self.out_features)) if self.out_features else z

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if self.criterion is not None:
            self.criterion.set_epoch(epoch)

    def extra_repr(self) -> str:
        head = f"in_features={self.in_features}, num_classes={self.num_classes}, bias={self.linear.bias is not None}"
        if self.out_features:
            head += f", out_features={self.out_features}"
        return ", ".join(part for part in (head, super().extra_repr()) if part)

    def _of(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, target: Target, sample_weight: Tensor | None
    ) -> Tensor:
        of = self if self.criterion is None else self.criterion
        arguments = of._arguments()
        del arguments["inplace"]  # there are no logits that the caller could want
        if isinstance(target, Tensor) and target.is_floating_point() and arguments["ignore_index"] == -100:
            arguments["ignore_index"] = None
        loss = functional.linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            sample_weight=sample_weight,
            options=self.options,
            normalize=self.normalize,
            **arguments,
        )
        if of._has_absent_classes:
            of._refuse_absent_classes(target)
        return loss

    def _check_criterion(self, criterion: AdjustedCrossEntropy) -> None:
        if (
            not isinstance(criterion, AdjustedCrossEntropy)
            or type(criterion).forward is not AdjustedCrossEntropy.forward
        ):
            raise TypeError(
                "criterion: expected a loss of ltkernels.losses that is made of class tables, found"
                f" {type(criterion).__name__}"
            )
        for name in ("weight", "ignore_index", "reduction", "label_smoothing"):
            value = getattr(self, name)
            if isinstance(value, (Tensor, nn.Module)) or value != self._defaults[name]:
                raise ValueError(f"{name}: expected none beside a criterion, which has its own, found {value!r}")
        if criterion.margin_type != "additive" and not self.normalize:
            raise ValueError(
                f"normalize: expected True with a {type(criterion).__name__}, whose margin is on the angle, found False"
            )

    def _check(self) -> None:
        """As of the other losses; not before there is a classifier that the tables have to fit."""
        if not self._made:
            return
        of = self if self.criterion is None else self.criterion
        moved = {name: value for name, value in of._arguments().items() if isinstance(value, Tensor)}
        device = next((value.device for value in moved.values() if value.dim()), torch.device("cpu"))
        one = torch.empty((), device=device)
        weight = one.expand(self.num_classes, *self.out_features, self.in_features)
        labels = torch.empty(0, *self.out_features, dtype=torch.int64, device=device)
        with torch.no_grad():
            self._of(one.expand(0, self.in_features), weight, None, labels, None)

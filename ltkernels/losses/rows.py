"""Losses whose adjustment depends on the row: its label's angle, its label's smoothing, its influence.

:mod:`ltkernels.losses` has the classes by name, and says what holds for all losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from ltkernels import arguments as arg
from ltkernels import functional, rebalance
from ltkernels.functional.row_cross_entropy import Target
from ltkernels.losses.base import AdjustedCrossEntropy, Method, Options, Setting, WeightedOptions
from ltkernels.rebalance import ClassCounts, DeferredReweighting

__all__ = ["ArcFaceLoss", "InfluenceBalancedLoss", "LabelAwareSmoothingLoss"]

_MARGIN_TYPES = {"exact": "arc", "straight_through": "arc_straight_through"}


class ArcFaceLoss(AdjustedCrossEntropy):
    """Additive angular margin: the label's cosine ``cos t`` becomes ``cos(t + margin)``, then ``scale`` scales all.

    The logits are cosines, from :class:`ltkernels.CosineLinear` with ``scale=1``. At evaluation use the cosines as
    they are.

    Published heads differ beyond the formula. ``gradient="exact"``: the derivative of the formula, and where ``t +
    margin`` passes pi, the cosine less ``margin sin(margin)``, which goes on falling (mmpretrain, the "easy margin"
    fallback). ``"straight_through"``: no fallback, and the gradient of the cosine as if it had not been moved
    (insightface). Exact gradients grow without bound as a cosine comes near 1; the backward holds the sine above
    1e-6.

    Args:
        margin: in radians, in ``[0, pi]``; or one for each class, ``(C,)``, as of
            :func:`ltkernels.rebalance.arcface_margin`.
        scale: above 0.
        gradient: ``"exact"`` or ``"straight_through"``.
        **options: as of :class:`ltkernels.losses.LogitAdjustedLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> head = ltk.CosineLinear(16, 3)
        >>> criterion = ltk.losses.ArcFaceLoss(ltk.rebalance.arcface_margin([900, 90, 10]))
        >>> criterion
        ArcFaceLoss(margin=(3,), scale=64.0, gradient='exact')
        >>> loss = criterion(head(torch.randn(8, 16)), torch.randint(3, (8,)))

    Source:
        Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019, equation 3.
    """

    _shown = ("margin", "scale", "gradient")

    def __init__(
        self,
        margin: float | Tensor = 0.5,
        scale: float = 64.0,
        gradient: Literal["exact", "straight_through"] = "exact",
        **options: Unpack[WeightedOptions],
    ) -> None:
        arg.choice("gradient", gradient, tuple(_MARGIN_TYPES))
        method: Method = {"class_margin": _angle(margin), "margin_type": _MARGIN_TYPES[gradient], "scale": scale}
        super().__init__(None, method, **options)

    @property
    def margin(self) -> float | Tensor:
        """In radians; may be assigned between steps."""
        margin = self.class_margin
        assert margin is not None
        return margin

    @margin.setter
    def margin(self, value: float | Tensor) -> None:
        self.class_margin = _angle(value)

    @property
    def gradient(self) -> str:
        """``"exact"`` or ``"straight_through"``."""
        return next(name for name, margin_type in _MARGIN_TYPES.items() if margin_type == self.margin_type)


def _angle(margin: float | Tensor) -> float | Tensor:
    """A number in ``[0, pi]``; the values of a tensor are checked at the call."""
    return margin if isinstance(margin, Tensor) else arg.number("margin", margin, 0.0, math.pi)


class LabelAwareSmoothingLoss(AdjustedCrossEntropy):
    """Cross entropy with the label smoothing of the row's class: much for frequent classes, little for rare ones.

    MiSLAS trains the classifier with it in a second stage, on frozen features. At evaluation use the logits as they
    are.

    Args:
        class_counts: training samples of each class, ``(C,)``.
        smooth_head: of the most frequent class, in ``[0, 1]``.
        smooth_tail: of the rarest class, in ``[0, 1]``.
        shape: how it goes from one to the other, see :func:`ltkernels.rebalance.label_aware_smoothing`.
        power: for ``shape="exp"``.
        **options: as of :class:`ltkernels.losses.LogitAdjustedLoss`, but without ``label_smoothing``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.LabelAwareSmoothingLoss([900, 90, 10], smooth_head=0.4, smooth_tail=0.1)
        >>> criterion(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]))
        tensor(0.7729)

    Source:
        Zhong et al., "Improving Calibration for Long-Tailed Recognition" (MiSLAS), CVPR 2021, equation 6.
    """

    _shown = ("smooth_head", "smooth_tail", "shape")
    _defaults: ClassVar[Mapping[str, object]] = {
        name: default for name, default in AdjustedCrossEntropy._defaults.items() if name != "label_smoothing"
    }
    smooth_head = Setting()
    smooth_tail = Setting()

    def __init__(
        self,
        class_counts: ClassCounts,
        smooth_head: float = 0.3,
        smooth_tail: float = 0.0,
        shape: Literal["concave", "linear", "convex", "exp"] = "concave",
        power: float | None = None,
        **options: Unpack[WeightedOptions],
    ) -> None:
        if "label_smoothing" in options:
            raise TypeError("label_smoothing: expected none, the loss makes it from class_counts, found one")
        options["label_smoothing"] = rebalance.label_aware_smoothing(
            class_counts, smooth_head, smooth_tail, shape, power
        )
        super().__init__(class_counts, **options)
        self.smooth_head = float(smooth_head)
        self.smooth_tail = float(smooth_tail)
        self.shape = shape


class InfluenceBalancedLoss(AdjustedCrossEntropy):
    """Cross entropy divided by the row's influence: ``alpha / (|h|_1 |p - onehot|_1 + eps)`` times the row's loss.

    ``h`` is what the last linear layer sees. Published training starts with plain cross entropy and changes to this
    loss half way, when the model is good on frequent classes. As published the gradient flows through ``p`` in the
    factor too; here none flows into the features by the norm.

    Args:
        alpha: above 0. As published; any constant does the same to a rate of learning.
        eps: above 0.
        weight: class weights, as of :class:`ltkernels.losses.CrossEntropyLoss`. The published ones are ``1 / n`` scaled
            to sum to C.
        gamma: exponent of a focal factor beside the other, at least 0. As published it takes ``p`` from the weighted
            cross entropy.
        **options: as of :class:`ltkernels.losses.LogitAdjustedLoss`; ``denominator`` is ``"count"`` by default.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> head = torch.nn.Linear(16, 3)
        >>> features = torch.randn(8, 16)
        >>> criterion = ltk.losses.InfluenceBalancedLoss(weight=ltk.rebalance.inverse_frequency_weight([900, 90, 10]))
        >>> loss = criterion(head(features), torch.randint(3, (8,)), features)

    Source:
        Park et al., "Influence-Balanced Loss for Imbalanced Visual Classification", ICCV 2021, equation 10.
    """

    _shown = ("alpha", "eps", "gamma")
    _defaults: ClassVar[Mapping[str, object]] = {**AdjustedCrossEntropy._defaults, "denominator": "count"}
    gamma = Setting("focal_gamma")

    def __init__(
        self,
        alpha: float = 1e4,
        eps: float = 1e-3,
        weight: Tensor | DeferredReweighting | None = None,
        gamma: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        gamma = arg.number("gamma", gamma, 0.0, math.inf)
        options.setdefault("denominator", "count")
        super().__init__(None, {"focal_gamma": gamma, "focal_pt": "weighted"}, weight=weight, **options)
        self.alpha = arg.number("alpha", alpha, 0.0, math.inf, open_low=True)
        self.eps = arg.number("eps", eps, 0.0, math.inf, open_low=True)

    def forward(  # type: ignore[override]  # the features are no option
        self, input: Tensor, target: Target, features: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The loss.

        Args:
            input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``.
            target: labels of any integer type, ``()``, ``(N,)`` or ``(N, d1, ...)``.
            features: what the last layer made the logits of, ``(D,)``, ``(N, D)`` or ``(N, D, d1, ...)``, floating.
            sample_weight: a factor on the loss of each row, of the labels' shape.

        Returns:
            A 0-d tensor, or the labels' shape with ``reduction="none"``; float64 for float64 logits, else float32.
        """
        arg.check_logits("input", input)
        shape = tuple(arg.tensor("features", features).shape)
        rows = arg.label_shape(input)
        if not features.is_floating_point():
            raise TypeError(f"features: expected a floating type, found {features.dtype}")
        if len(shape) != input.dim() or shape[:1] * (input.dim() > 1) + shape[2:] != rows:
            expected = ", ".join(map(str, (*rows[:1], "D", *rows[1:])))
            raise ValueError(f"features: expected shape ({expected}), found {shape}")
        norm = torch.linalg.vector_norm(
            features.detach(),
            ord=1,
            dim=min(input.dim() - 1, 1),
            dtype=torch.promote_types(features.dtype, torch.float32),
        )
        return functional.cross_entropy(
            input,
            target,
            sample_weight=sample_weight,
            feature_norm=norm,
            influence_alpha=self.alpha,
            influence_eps=self.eps,
            **self._arguments(),
        )

"""Second stages: what is learnt on the logits of a frozen classifier, with class-balanced data or weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ltkernels import arguments as arg
from ltkernels import functional

__all__ = ["DisAlignCalibration", "LearnableWeightScaling"]


def _num_classes(name: str, value: int) -> int:
    value = arg.integer(name, value)
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, found {value}")
    return value


def _check_classes(logits: Tensor, of_classes: Tensor) -> None:
    if logits.shape[-1:] != of_classes.shape:
        raise ValueError(f"logits: expected shape (..., {len(of_classes)}), found {tuple(logits.shape)}")


class DisAlignCalibration(nn.Module):
    r"""DisAlign: a learnt scale and bias of each class, by a learnt confidence of each sample.

    .. math:: u_j = (1 + g \alpha_j) z_j + g \beta_j, \qquad g = \sigma(w^\top h + c)

    The logits come from a frozen model; :math:`\alpha`, :math:`\beta`, w and c are trained. Published training weights
    the classes by :math:`\pi_j^{-\rho}` scaled to sum to C, which is
    :func:`ltkernels.rebalance.inverse_frequency_weight` with ``power=rho`` (1.2 on ImageNet-LT). At evaluation predict
    from what the module gives.

    Args:
        in_features: D, size of the features.
        num_classes: C.
        device: of the parameters.

    Attributes:
        class_scale: :math:`\alpha`, ``(C,)``, starts at 1.
        class_bias: :math:`\beta`, ``(C,)``, starts at 0.
        confidence: the linear layer, its weights start at 0.1.

    Raises:
        TypeError: sizes are not integers.
        ValueError: sizes below 1.

    Example:
        >>> import torch, ltkernels as ltk
        >>> calibrate = ltk.DisAlignCalibration(16, 3)
        >>> weight = ltk.rebalance.inverse_frequency_weight([900, 90, 10], power=1.2)
        >>> features, logits = torch.randn(8, 16), torch.randn(8, 3)
        >>> calibrate.loss(logits, features, torch.randint(3, (8,)), weight=weight).backward()
        >>> prediction = calibrate(logits, features).argmax(1)

    Source:
        Zhang et al., "Distribution Alignment: A Unified Framework for Long-tail Visual Recognition", CVPR 2021,
        equations 9 to 11; starts as in the published code.
    """

    def __init__(self, in_features: int, num_classes: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        num_classes = _num_classes("num_classes", num_classes)
        self.class_scale = nn.Parameter(torch.ones(num_classes, device=device))
        self.class_bias = nn.Parameter(torch.zeros(num_classes, device=device))
        self.confidence = nn.Linear(_num_classes("in_features", in_features), 1, device=device)
        nn.init.constant_(self.confidence.weight, 0.1)

    def _gate(self, features: Tensor) -> Tensor:
        return self.confidence(features).sigmoid().squeeze(-1)  # type: ignore[no-any-return]

    def forward(self, logits: Tensor, features: Tensor) -> Tensor:
        """The adjusted logits.

        Args:
            logits: ``(..., C)``, floating.
            features: ``(..., D)``.

        Returns:
            ``(..., C)``.
        """
        _check_classes(logits, self.class_scale)
        gate = self._gate(features)[..., None]
        return (1 + gate * self.class_scale) * logits + gate * self.class_bias

    def loss(self, logits: Tensor, features: Tensor, target: Tensor, **options: Any) -> Tensor:
        """The cross entropy of the adjusted logits, which are not stored.

        Args:
            logits: ``(C,)`` or ``(N, C)``.
            features: ``(D,)`` or ``(N, D)``.
            target: labels of any integer type, ``()`` or ``(N,)``.
            **options: of :func:`ltkernels.functional.cross_entropy`: ``weight``, ``reduction``, ``ignore_index`` and
                more.

        Returns:
            A 0-d tensor, or the labels' shape with ``reduction="none"``; float64 for float64 logits, else float32.
        """
        return functional.cross_entropy(
            logits,
            target,
            class_scale=self.class_scale,
            class_bias=self.class_bias,
            row_gate=self._gate(features),
            **options,
        )


class LearnableWeightScaling(nn.Module):
    """LWS: a learnt factor for each class on the logits of a frozen classifier.

    Trained with a class-balanced sampler. The classifier's bias is scaled too, as in the published code.

    Args:
        num_classes: C.
        device: of the factors.

    Attributes:
        class_scale: ``(C,)``, starts at 1.

    Raises:
        TypeError: ``num_classes`` is not an integer.
        ValueError: ``num_classes`` below 1.

    Example:
        >>> import torch, ltkernels as ltk
        >>> scaling = ltk.LearnableWeightScaling(3)
        >>> logits = torch.randn(8, 3)
        >>> scaling.loss(logits, torch.randint(3, (8,))).backward()
        >>> prediction = scaling(logits).argmax(1)

    Source:
        Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 4.
    """

    def __init__(self, num_classes: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.class_scale = nn.Parameter(torch.ones(_num_classes("num_classes", num_classes), device=device))

    def forward(self, logits: Tensor) -> Tensor:
        """The logits ``(..., C)``, scaled."""
        _check_classes(logits, self.class_scale)
        return logits * self.class_scale

    def loss(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        """The cross entropy of the scaled logits; no gradient flows into ``logits``, and none is computed.

        Args:
            logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``.
            target: labels of any integer type, or probabilities.
            **options: of :func:`ltkernels.functional.cross_entropy`.

        Returns:
            A 0-d tensor, or the labels' shape with ``reduction="none"``; float64 for float64 logits, else float32.
        """
        return functional.cross_entropy(logits.detach(), target, class_scale=self.class_scale, **options)

"""What the tests of the losses share: every loss, a batch, and how values and gradients are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ltkernels import losses, rebalance

COUNTS = [int(500 * 0.01 ** (c / 99)) for c in range(100)]  # CIFAR-100-LT
N, C = 48, len(COUNTS)
WEIGHT = torch.linspace(0.2, 3.0, C, dtype=torch.float64)

COUNTED = {  # every loss that takes class counts, and each of its forms
    "LogitAdjustedLoss": lambda n, **k: losses.LogitAdjustedLoss(n, **k),
    "LogitAdjustedLoss(tau=1.5)": lambda n, **k: losses.LogitAdjustedLoss(n, tau=1.5, **k),
    "BalancedSoftmaxLoss": lambda n, **k: losses.BalancedSoftmaxLoss(n, **k),
    "VSLoss": lambda n, **k: losses.VSLoss(n, **k),
    "VSLoss(tau=0)": lambda n, **k: losses.VSLoss(n, tau=0.0, **k),
    "LDAMLoss": lambda n, **k: losses.LDAMLoss(n, **k),
    "LDAMLoss(logits_scaled)": lambda n, **k: losses.LDAMLoss(n, logits_scaled=True, **k),
    "LDAMLoss(reweight_epoch=0)": lambda n, **k: losses.LDAMLoss(n, reweight_epoch=0, **k),
    "ClassBalancedLoss": lambda n, **k: losses.ClassBalancedLoss(n, **k),
    "ClassBalancedLoss(gamma=1)": lambda n, **k: losses.ClassBalancedLoss(n, gamma=1.0, **k),
}
EVERY = COUNTED | {
    "CrossEntropyLoss": lambda n, **k: losses.CrossEntropyLoss(**k),
    "CosFaceLoss": lambda n, **k: losses.CosFaceLoss(**k),
    "FocalLoss": lambda n, **k: losses.FocalLoss(**k),
    "ArcFaceLoss": lambda n, **k: losses.ArcFaceLoss(**k),
    "ArcFaceLoss(straight_through)": lambda n, **k: losses.ArcFaceLoss(gradient="straight_through", **k),
    "ArcFaceLoss(by class)": lambda n, **k: losses.ArcFaceLoss(rebalance.arcface_margin(n), scale=16.0, **k),
}


def _linear(n: list[int], **options: Any) -> nn.Module:
    """With the unit matrix as its classifier: features are logits."""
    loss = losses.LinearCrossEntropyLoss(len(n), len(n), **options)
    nn.init.eye_(loss.linear.weight)
    return loss


PUBLIC: dict[str, Callable[..., nn.Module]] = {  # every name of ltkernels.losses once, for what all of them promise
    "ACSLLoss": lambda n, **k: losses.ACSLLoss(n, **k),
    "ArcFaceLoss": lambda n, **k: losses.ArcFaceLoss(rebalance.arcface_margin(n), **k),
    "AsymmetricLoss": lambda n, **k: losses.AsymmetricLoss(**k),
    "BalancedSoftmaxLoss": lambda n, **k: losses.BalancedSoftmaxLoss(n, **k),
    "ClassBalancedLoss": lambda n, **k: losses.ClassBalancedLoss(n, **k),
    "ClassBalancedSigmoidLoss": lambda n, **k: losses.ClassBalancedSigmoidLoss(n, **k),
    "CosFaceLoss": lambda n, **k: losses.CosFaceLoss(**k),
    "CrossEntropyLoss": lambda n, **k: losses.CrossEntropyLoss(**k),
    "DistillationLoss": lambda n, **k: losses.DistillationLoss(class_weight=rebalance.effective_number_weight(n), **k),
    "DropLoss": lambda n, **k: losses.DropLoss(n, **k),
    "EqualizationLoss": lambda n, **k: losses.EqualizationLoss(n, **k),
    "EqualizationLossV2": lambda n, **k: losses.EqualizationLossV2(len(n), **k),
    "FederatedLoss": lambda n, **k: losses.FederatedLoss(n, 3, **k),
    "FocalLoss": lambda n, **k: losses.FocalLoss(0.5, **k),  # below 1 the factor has no derivative where p is 1
    "InfluenceBalancedLoss": lambda n, **k: losses.InfluenceBalancedLoss(**k),
    "LADELoss": lambda n, **k: losses.LADELoss(n, **k),
    "LDAMLoss": lambda n, **k: losses.LDAMLoss(n, reweight_epoch=0, **k),
    "LabelAwareSmoothingLoss": lambda n, **k: losses.LabelAwareSmoothingLoss(n, **k),
    "LinearCrossEntropyLoss": _linear,
    "LogitAdjustedLoss": lambda n, **k: losses.LogitAdjustedLoss(n, **k),
    "RIDELoss": lambda n, **k: losses.RIDELoss(n, reweight_epoch=0, **k),
    "SADELoss": lambda n, **k: losses.SADELoss(n, **k),
    "SeesawLoss": lambda n, **k: losses.SeesawLoss(len(n), **k),
    "SigmoidFocalLoss": lambda n, **k: losses.SigmoidFocalLoss(**k),
    "SoftmaxEqualizationLoss": lambda n, **k: losses.SoftmaxEqualizationLoss(n, rare_threshold=0.01, **k),
    "VSLoss": lambda n, **k: losses.VSLoss(n, **k),
}
every_public_loss = pytest.mark.parametrize("name", PUBLIC)


def arguments_of(loss: nn.Module, x: Tensor, y: Any) -> tuple[Any, ...]:
    """What the loss takes for ``(N, C)`` logits: several experts, a column more, a teacher, features."""
    if isinstance(loss, (losses.RIDELoss, losses.SADELoss)):
        return torch.stack([x, x / 2, -x]), y
    if isinstance(loss, losses.ACSLLoss):
        return torch.cat([x, x[:, :1]], 1), y
    if isinstance(loss, losses.DistillationLoss):
        return x, x.detach().flip(1), y
    if isinstance(loss, losses.InfluenceBalancedLoss):
        return x, y, x.new_ones(len(x), 3)
    return x, y


every_counted = pytest.mark.parametrize("make", COUNTED.values(), ids=COUNTED.keys())
every_loss = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())


def batch(dtype: torch.dtype = torch.float64, num_classes: int = C) -> tuple[Tensor, Tensor]:
    """Cosine-like logits, and labels."""
    return (torch.rand(N, num_classes, dtype=dtype) * 2 - 1).requires_grad_(), torch.randint(num_classes, (N,))


def value_and_gradient(loss: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, logits, retain_graph=True)[0]


def assert_same(actual: Tensor, expected: Tensor, logits: Tensor, rtol: float = 1e-6) -> None:
    """Values and gradients agree; 1e-6 is the rounding of float32 tables, which float64 logits do not remove."""
    value, gradient = value_and_gradient(actual, logits)
    expected_value, expected_gradient = value_and_gradient(expected, logits)
    torch.testing.assert_close(value.double(), expected_value.double(), rtol=rtol, atol=0)
    assert (gradient - expected_gradient).norm() <= rtol * 3 * expected_gradient.norm()
    assert expected_gradient.norm() > 0

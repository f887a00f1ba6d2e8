"""Losses for long-tailed data as modules: class counts in, one call of :mod:`ltkernels.functional` out.

======================================== ===============================================================================
module                                   losses
======================================== ===============================================================================
`softmax`, by class tables               `CrossEntropyLoss`, `LogitAdjustedLoss`, `BalancedSoftmaxLoss`, `VSLoss`,
                                         `LDAMLoss`, `CosFaceLoss`, `FocalLoss`, `ClassBalancedLoss`
`rows`, by what the row is               `ArcFaceLoss` (margins on the angle), `LabelAwareSmoothingLoss`,
                                         `InfluenceBalancedLoss`
`pairs`, by label and class, with a      `SeesawLoss`, `SoftmaxEqualizationLoss`
state that training moves on
`lade`, by columns of the batch too      `LADELoss`
`linear`, with the classifier in it      `LinearCrossEntropyLoss`
`distillation`, towards a teacher        `DistillationLoss`
`experts`, of several at once            `RIDELoss`, `SADELoss`
`sigmoid`, each class for itself         `ClassBalancedSigmoidLoss`, `SigmoidFocalLoss`, `AsymmetricLoss`
`detection`, the same, with a choice     `EqualizationLoss`, `EqualizationLossV2`, `DropLoss`, `ACSLLoss`,
of negatives                             `FederatedLoss`
======================================== ===============================================================================

The adjustments belong to training and are part of the loss in ``train()`` and ``eval()`` mode alike: a loss printed
on validation data is the adjusted one. Predict from the logits as they are, without bias, scale or margin.

Every loss has ``set_epoch``, so a training loop need not know which of them have a schedule.
"""

from ltkernels.losses.detection import ACSLLoss, DropLoss, EqualizationLoss, EqualizationLossV2, FederatedLoss
from ltkernels.losses.distillation import DistillationLoss
from ltkernels.losses.experts import RIDELoss, SADELoss
from ltkernels.losses.lade import LADELoss
from ltkernels.losses.linear import LinearCrossEntropyLoss
from ltkernels.losses.pairs import SeesawLoss, SoftmaxEqualizationLoss
from ltkernels.losses.rows import ArcFaceLoss, InfluenceBalancedLoss, LabelAwareSmoothingLoss
from ltkernels.losses.sigmoid import AsymmetricLoss, ClassBalancedSigmoidLoss, SigmoidFocalLoss
from ltkernels.losses.softmax import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    CosFaceLoss,
    CrossEntropyLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    VSLoss,
)

__all__ = [
    "ACSLLoss",
    "ArcFaceLoss",
    "AsymmetricLoss",
    "BalancedSoftmaxLoss",
    "ClassBalancedLoss",
    "ClassBalancedSigmoidLoss",
    "CosFaceLoss",
    "CrossEntropyLoss",
    "DistillationLoss",
    "DropLoss",
    "EqualizationLoss",
    "EqualizationLossV2",
    "FederatedLoss",
    "FocalLoss",
    "InfluenceBalancedLoss",
    "LADELoss",
    "LDAMLoss",
    "LabelAwareSmoothingLoss",
    "LinearCrossEntropyLoss",
    "LogitAdjustedLoss",
    "RIDELoss",
    "SADELoss",
    "SeesawLoss",
    "SigmoidFocalLoss",
    "SoftmaxEqualizationLoss",
    "VSLoss",
]

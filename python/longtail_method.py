"""What a method of the demo is: a loss of ltkernels, the same in plain PyTorch, a model, and how it predicts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from longtail_data import LongTailData
from longtail_model import Classifier
from longtail_plan import Settings
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]

DRW_START = 0.8  # share of the epochs before the weights of LDAM-DRW and RIDE start: 160 of 200


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        build: from class counts ``(C,)`` and the settings of the run to the loss of ltkernels.
        plain: from class counts and that loss, whose settings it shares, to the same loss in plain PyTorch.
        cosine: whether the head is a cosine head.
        sigmoid: whether the loss is on sigmoids. They start at 1 / C then, as Cui et al. 2019 published it; from 1/2
            the short recipes here would spend their epochs on pushing all classes down.
        certain: settings of a loss that draws at random with which it has no choice.
        model: from the data and the loss to a model, where it is not a ``Classifier``.
        num_experts: from the loss to E where the model gives ``(E, N, C)`` logits, to 0 where it gives ``(N, C)``.
        predict: from the loss and the model's logits to those to predict from.
        each: from the same to the logits ``(E, N, C)`` of the experts whose own accuracies are told; None: of none.
        paired: whether a step draws its samples twice, the second time with probabilities reversed; the labels are
            those of both draws then, one behind the other.
        stages: how often the epochs are gone through, each time with the learning rate from its start.
        watches: whether the loss is to see the model's logits of all training samples before an epoch, by ``watch``.
    """

    build: Callable[[Tensor, Settings], nn.Module]
    plain: Callable[[Tensor, Any], Loss]
    cosine: bool = False
    sigmoid: bool = False
    certain: Mapping[str, float] = field(default_factory=dict)
    model: Callable[[LongTailData, Any], nn.Module] | None = None
    num_experts: Callable[[Any], int] = lambda loss: 0
    predict: Callable[[Any, Tensor], Tensor] = lambda loss, logits: logits
    each: Callable[[Any, Tensor], Tensor] | None = None
    paired: bool = False
    stages: int = 1
    watches: bool = False

    def classifier(self, data: LongTailData, loss: nn.Module) -> nn.Module:
        """The model before training."""
        if self.model is not None:
            return self.model(data, loss)
        return Classifier(data, cosine=self.cosine, sigmoid=self.sigmoid)

    def exact(self, loss: nn.Module) -> nn.Module:
        """A copy of the loss in which nothing is left to chance, so that the plain form can be compared with it."""
        loss = copy.deepcopy(loss)
        for name, value in self.certain.items():
            setattr(loss, name, value)
        return loss

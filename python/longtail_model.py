"""The models of the demo: features of a text, a token window or an image, and a linear or cosine head, or several.

They are small on purpose: twelve training runs have to fit in three minutes on two cores.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from longtail_data import Bags, LongTailData
from torch import Tensor, nn

import ltkernels as ltk


class Batches:
    """All inputs of a data set as tensors; ``batch(rows)`` gives the arguments of ``Classifier`` for some of them."""

    def __init__(self, data: LongTailData) -> None:
        self.bags = isinstance(data.inputs, Bags)
        if isinstance(data.inputs, Bags):
            self.indices = torch.from_numpy(data.inputs.indices)
            self.offsets = torch.from_numpy(data.inputs.offsets)
        else:
            self.inputs = torch.from_numpy(data.inputs)

    def batch(self, rows: Tensor) -> tuple[Tensor, ...]:
        if not self.bags:
            return (self.inputs[rows],)
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        first = lengths.cumsum(0) - lengths
        # Position k of the batch's bags is k - first + start of its bag: one gather, no loop over the samples.
        positions = torch.repeat_interleave(starts - first, lengths) + torch.arange(int(lengths.sum()))
        return self.indices[positions], first


class Classifier(nn.Module):
    """Features and head.

    Args:
        data: what is classified; decides the kind of features.
        cosine: a ``CosineLinear`` head of scale 1 (for losses that scale by themselves) in place of a linear one.
        sigmoid: a linear head whose biases start where the sigmoid of each class is 1 / C.

    Shape:
        the tensors of ``Batches.batch`` for N rows; output ``(N, C)``.
    """

    def __init__(self, data: LongTailData, *, cosine: bool, sigmoid: bool = False) -> None:
        super().__init__()
        self.features, width = _features(data)
        self.head = ltk.CosineLinear(width, data.num_classes) if cosine else nn.Linear(width, data.num_classes)
        if sigmoid and isinstance(self.head, nn.Linear):
            nn.init.constant_(self.head.bias, -math.log(data.num_classes - 1))

    def forward(self, *batch: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(*batch))
        return logits


class ExpertClassifier(nn.Module):
    """Shared features, then a head for each expert, with a hidden layer of its own before it.

    The linear models of n-grams stay linear, each expert a head: with the large steps of their recipe, hidden layers
    cost more than experts gain by them.

    Args:
        data: what is classified.
        num_experts: E.
        cosine_scale: of cosine heads; None for linear ones.
        first_alone: the first expert alone moves the shared features.

    Shape:
        the tensors of ``Batches.batch`` for N rows; output ``(E, N, C)``.
    """

    def __init__(
        self, data: LongTailData, num_experts: int, *, cosine_scale: float | None = None, first_alone: bool = False
    ) -> None:
        super().__init__()
        self.first_alone = first_alone
        self.features, width = _features(data)
        linear = isinstance(data.inputs, Bags)
        self.hidden = nn.ModuleList(nn.Identity() if linear else _hidden(width) for _ in range(num_experts))
        self.heads = nn.ModuleList(
            nn.Linear(width, data.num_classes)
            if cosine_scale is None
            else ltk.CosineLinear(width, data.num_classes, cosine_scale)
            for _ in range(num_experts)
        )

    def forward(self, *batch: Tensor) -> Tensor:
        shared = self.features(*batch)
        logits = []
        for hidden, head in zip(self.hidden, self.heads, strict=True):
            logits.append(head(hidden(shared)))
            if self.first_alone:
                shared = shared.detach()
        return torch.stack(logits)


class BilateralClassifier(nn.Module):
    """BBN: shared features, a hidden layer for each of two branches, and one head of their mixed features.

    In ``train()`` mode the first half of the rows goes through one branch and the second through the other.

    Shape:
        the tensors of ``Batches.batch`` for 2N rows in ``train()`` mode, else N; output ``(N, C)``.
    """

    def __init__(self, data: LongTailData, mixing: nn.Module) -> None:
        super().__init__()
        self.mixing = mixing
        self.features, width = _features(data)
        self.branches = nn.ModuleList(_hidden(width) for _ in range(2))
        self.head = nn.Linear(2 * width, data.num_classes)

    def forward(self, *batch: Tensor) -> Tensor:
        shared = self.features(*batch)
        halves = shared.chunk(2) if self.training else (shared, shared)
        features = [branch(half) for branch, half in zip(self.branches, halves, strict=True)]
        logits: Tensor = self.head(self.mixing(*features))
        return logits


class TaughtClassifier(nn.Module):
    """LFME: a student and the experts of the groups, each a classifier of its own; one or the others learn.

    Args:
        data: what is classified.
        loss: whose ``teaching`` says who, and which has the groups.

    Shape:
        the tensors of ``Batches.batch`` for N rows; output ``(1 + G, N, C)``, the student's first.
    """

    def __init__(self, data: LongTailData, loss: Any) -> None:
        super().__init__()
        self.loss = loss
        self.student = Classifier(data, cosine=False)
        self.experts = nn.ModuleList(Classifier(data, cosine=False) for _ in loss.student.groups)

    def forward(self, *batch: Tensor) -> Tensor:
        teaching, grad = bool(self.loss.teaching), torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and teaching):  # no gradient at all, or Adam would go on with its last steps
            student = self.student(*batch)
        with torch.set_grad_enabled(grad and not teaching):
            experts = [expert(*batch) for expert in self.experts]
        return torch.stack([student, *experts])


def _hidden(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU())


def _features(data: LongTailData) -> tuple[nn.Module, int]:
    if isinstance(data.inputs, Bags):
        # Dense gradients and fused Adam: a step takes half the time it takes with sparse gradients and SparseAdam.
        return nn.EmbeddingBag(data.vocabulary, 64, mode="mean"), 64
    columns = data.inputs.shape[1]
    if data.vocabulary:
        return nn.Sequential(
            nn.Embedding(data.vocabulary, 32), nn.Flatten(), nn.Linear(32 * columns, 256), nn.ReLU()
        ), 256
    return nn.Sequential(nn.Linear(columns, 64), nn.ReLU()), 64

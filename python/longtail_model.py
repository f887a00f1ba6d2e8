"""The models of the demo: features of a text, a token window or an image, and a linear or cosine head.

They are small on purpose: twelve training runs have to fit in three minutes on two cores.
"""

from __future__ import annotations

import math

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

"""How many samples of each class were predicted right, in plain PyTorch: the definition.

A prediction of k classes is right if the label is among them. With logits that needs no sorting: the label y of row i
has the rank ::

    rank_i = #{j : x_ij before x_iy} = #{j : x_ij > x_iy} + #{j < y : x_ij = x_iy}

and is among the first k if ``rank_i < k``. Of equal logits the first class comes first, and NaN, which is equal to
NaN, is above every number: for k = 1 that is what :func:`torch.argmax` finds. :func:`torch.topk` agrees on NaN and
leaves open which of equal logits it takes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy_counts(
    input: Tensor, target: Tensor, correct: Tensor, total: Tensor, top_k: int, ignore_index: int
) -> None:
    """Adds to ``total`` how many rows each class has, and to ``correct`` how many of them were predicted right.

    Args:
        input: logits, ``(N, C)`` or ``(N, C, D)``, or predicted labels, ``(N,)``.
        target: labels of an integer type, ``(N,)`` or ``(N, D)``; those equal to ``ignore_index`` are left out.
        correct: int64, ``(C,)``; added to.
        total: int64, ``(C,)``; added to.
        top_k: how many classes a row of logits predicts.
        ignore_index: the label of rows that are left out.
    """
    label = target.long()
    counted = label != ignore_index
    label = torch.where(counted, label, 0)
    right = rank(input, label) < top_k if input.is_floating_point() else input.long() == label
    total.index_add_(0, label.reshape(-1), counted.reshape(-1).long())
    correct.index_add_(0, label.reshape(-1), (right & counted).reshape(-1).long())


def rank(input: Tensor, label: Tensor) -> Tensor:
    """How many classes of ``(N, C, ...)`` logits come before the label's: int64 of the labels' shape."""
    own = input.gather(1, label.unsqueeze(1))
    nan, own_nan = input.isnan(), own.isnan()
    above = (input > own) | (nan & ~own_nan)
    equal = (input == own) | (nan & own_nan)
    columns = torch.arange(input.shape[1], device=input.device).view(-1, *(1,) * (input.dim() - 2))
    return (above | (equal & (columns < label.unsqueeze(1)))).sum(dim=1)


def check_values(input: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise on labels no backend may accept; reads the tensors, so it is called for CPU tensors only."""
    label, beyond = _labels(target)
    ignored = (label == ignore_index) & ~beyond
    good = ((label >= 0) & (label < num_classes) & ~beyond) | ignored
    _require("target", f"labels in [0, {num_classes}) or ignore_index {ignore_index}", label, beyond, good)
    if not input.is_floating_point():
        predicted, beyond = _labels(input)
        good = ((predicted >= 0) & (predicted < num_classes) & ~beyond) | ignored
        _require("input", f"predicted labels in [0, {num_classes})", predicted, beyond, good)


def _labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """As int64, and which of them int64 does not hold."""
    values = labels.reshape(-1).long()
    return values, (values < 0) & (labels.dtype == torch.uint64)


def _require(name: str, expected: str, labels: Tensor, beyond: Tensor, good: Tensor) -> None:
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        found = int(labels[row]) % 2**64 if bool(beyond[row]) else int(labels[row])
        raise IndexError(f"{name}: expected {expected}, found {found} at row {row}")

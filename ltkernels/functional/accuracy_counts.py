"""Right predictions of each class, counted in one pass over the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels.ops import accuracy_counts as _op


class AccuracyCounts(NamedTuple):
    """Counts of each class, which :class:`ltkernels.metrics.ShotAccuracy` makes accuracies of."""

    correct: Tensor
    """``(C,)`` int64: samples of the class that were predicted right."""
    total: Tensor
    """``(C,)`` int64: samples of the class."""


def accuracy_counts(
    input: Tensor,
    target: Tensor,
    correct: Tensor | None = None,
    total: Tensor | None = None,
    *,
    top_k: int = 1,
    ignore_index: int = -100,
    num_classes: int | None = None,
) -> AccuracyCounts:
    r"""How many samples each class has, and how many of them were predicted right, in one pass over the logits.

    With k = ``top_k`` a row predicts its k classes of the largest logits. It is right if fewer than k classes come
    before its label, which is counted without sorting:

    .. math:: \#\{j : x_{ij} > x_{iy}\} + \#\{j < y : x_{ij} = x_{iy}\} < k

    So of equal logits the first class comes first, and NaN is above every number: for k = 1 what
    :func:`torch.argmax` predicts. (:func:`torch.topk` leaves open which of equal logits it takes;
    ``sklearn.metrics.top_k_accuracy_score`` takes the last.)

    Counts that are given are added to, where they are: on a GPU one launch for each batch, and nothing waits for the
    device. int64 does not overflow.

    Args:
        input: logits or probabilities, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)`` of any strides, float64, float32,
            bfloat16 or float16; or predicted labels of the target's shape, of an integer type.
        target: labels in [0, C) or ``ignore_index``, of the input's shape without the class dimension, of any integer
            type.
        correct: ``(C,)``, int64 and contiguous, to which right predictions are added. None: new counts.
        total: the same for samples; both or neither.
        top_k: how many classes a row predicts, at most C; 1 with predicted labels.
        ignore_index: samples with this label are left out, whatever their prediction.
        num_classes: C, which predicted labels without ``correct`` do not tell.

    Returns:
        ``correct`` and ``total``, the given ones or new ones. They take no gradient.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or option.
        IndexError: a label or a predicted label outside ``[0, C)`` (CPU; nothing is then added). On a GPU such a row is
            left out, and the next call or :func:`ltkernels.check` raises.

    Example:
        >>> import torch, ltkernels as ltk
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0]])
        >>> correct, total = ltk.functional.accuracy_counts(logits, torch.tensor([0, 1, 1]))
        >>> correct.tolist(), total.tolist()
        ([1, 1, 0], [1, 2, 0])
        >>> _ = ltk.functional.accuracy_counts(torch.tensor([2, 0]), torch.tensor([2, 1]), correct, total)  # labels
        >>> correct.tolist(), total.tolist()
        ([1, 1, 1], [1, 3, 1])
    """
    of_labels = arg.tensor("input", input).dtype in arg.INTEGER_TYPES
    if of_labels:
        _check_labels(input, target)
    else:
        arg.check_logits("input", input)
        arg.check_target(input, target)
        if target.is_floating_point():
            raise TypeError(f"target: expected labels of an integer type, found {target.dtype}")
    classes = _number_of_classes(input, correct, num_classes, of_labels)
    top_k = arg.integer("top_k", top_k)
    if not 1 <= top_k <= (1 if of_labels else classes):
        found = f"{top_k} with predicted labels" if of_labels else f"{top_k}"
        raise ValueError(f"top_k: expected a number of classes in [1, {1 if of_labels else classes}], found {found}")
    if correct is None or total is None:
        if correct is not total:
            raise ValueError(f"total: expected both correct and total or neither, found {correct=} and {total=}")
        correct, total = torch.zeros((2, classes), dtype=torch.int64, device=input.device).unbind()
    else:
        _check_counts("correct", correct, classes, input)
        _check_counts("total", total, classes, input)
        if not torch.compiler.is_compiling() and abs(correct.data_ptr() - total.data_ptr()) < 8 * classes:
            raise ValueError("total: expected other memory than correct's, found the same")
    x, y = _plain(input), _plain(target)
    if of_labels:
        x, y = x.reshape(-1), y.reshape(-1)
    elif x.dim() == 1:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
    elif x.dim() > 3:
        x, y = x.flatten(2), y.flatten(1)
    _op.accuracy_counts(x, y, correct, total, top_k, arg.integer("ignore_index", ignore_index))
    return AccuracyCounts(correct, total)


def _check_labels(input: Tensor, target: Tensor) -> None:
    if arg.tensor("target", target).dtype not in arg.INTEGER_TYPES:
        raise TypeError(f"target: expected labels of an integer type, found {target.dtype}")
    if target.shape != input.shape:
        raise ValueError(
            f"target: expected shape {tuple(input.shape)} as the predicted labels', found {tuple(target.shape)}"
        )
    if target.device != input.device:
        raise ValueError(f"target: expected device {input.device} as input's, found {target.device}")


def _number_of_classes(input: Tensor, correct: Tensor | None, num_classes: int | None, of_labels: bool) -> int:
    known = input.shape[0 if input.dim() == 1 else 1] if not of_labels else None
    if num_classes is not None:
        num_classes = arg.size("num_classes", num_classes)
        if known is not None and num_classes != known:
            raise ValueError(f"num_classes: expected {known} as input has, found {num_classes}")
        return num_classes
    if known is not None:
        return known
    if correct is None:
        raise ValueError("num_classes: expected the number of classes with predicted labels, found None")
    return arg.size("correct.numel()", arg.tensor("correct", correct).numel())


def _check_counts(name: str, counts: Tensor, classes: int, input: Tensor) -> None:
    if arg.tensor(name, counts).dtype is not torch.int64:
        raise TypeError(f"{name}: expected torch.int64, found {counts.dtype}")
    if counts.shape != (classes,) or not counts.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous counts of shape ({classes},), found shape {tuple(counts.shape)} and strides"
            f" {counts.stride()}"
        )
    if counts.device != input.device:
        raise ValueError(f"{name}: expected device {input.device} as input's, found {counts.device}")


def _plain(value: Tensor) -> Tensor:
    """The tensor without its graph: nothing is differentiated here, not by transforms of :mod:`torch.func` either."""
    if torch.compiler.is_compiling():
        return value.detach()
    # Twice each batch: detach() costs a microsecond, and what an evaluation hands over rarely has a graph.
    while torch._C._functorch.is_gradtrackingtensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    if torch._C._functorch.is_batchedtensor(value):
        raise TypeError("input: expected a tensor outside of torch.func.vmap, found one of its batches")
    return value.detach() if value.requires_grad else value

"""Class counts as users have them, checked, and what is made of them first: tables, buffers, log priors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ltkernels import arguments as arg

ClassCounts = Sequence[float] | npt.NDArray[Any] | Tensor
Labels = Sequence[int] | npt.NDArray[Any] | Tensor

# How many classes labels alone may make: 128 MiB of counts. Beyond, a stray label is likelier than so many classes.
_MOST_CLASSES = 2**24


def as_class_counts(class_counts: ClassCounts) -> Tensor:
    """Checks class counts and returns them as a new float64 CPU tensor of shape ``(C,)``.

    Raises:
        TypeError: not numbers (strings, booleans, a dict or a Counter).
        ValueError: not one-dimensional, empty, negative, not finite, or all zero.
    """
    if isinstance(class_counts, Tensor):
        if class_counts.dtype == torch.bool or class_counts.is_complex():
            raise TypeError(f"class_counts: expected integers or floats, found {class_counts.dtype}")
        counts = class_counts.detach().to("cpu", torch.float64, copy=True)
    else:
        counts = torch.from_numpy(_as_array("class_counts", class_counts, kinds="iuf").astype(np.float64))
    if counts.ndim != 1 or counts.numel() == 0:
        raise ValueError(f"class_counts: expected one count per class, shape (C,), found shape {tuple(counts.shape)}")
    for wrong, expected in (
        (~counts.isfinite(), "all counts finite"),
        (counts < 0, "all counts >= 0"),
        (counts >= 2.0**63, "all counts below 2^63"),  # losses keep them as int64
    ):
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise ValueError(f"class_counts: expected {expected}, found {counts[index]:g} at class {index}")
    if not counts.any():
        raise ValueError(f"class_counts: expected at least one count > 0, found {counts.numel()} zeros")
    return counts


def _as_array(name: str, values: object, kinds: str) -> npt.NDArray[Any]:
    """``values`` as an array whose ``dtype.kind`` is one of ``kinds``; an empty list, which has no type, passes."""
    expected = "integers or floats" if "f" in kinds else "integers"
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name}: expected {expected}, one per entry, found a ragged sequence") from error
    if array.size == 0 and isinstance(values, (list, tuple)):
        return array.astype(np.int64)
    if array.dtype.kind not in kinds:
        raise TypeError(f"{name}: expected {expected}, found {type(values).__name__} of {array.dtype}")
    return array


def count_classes(labels: Labels, num_classes: int | None = None) -> Tensor:
    """Counts the samples of each class.

    Args:
        labels: class index of every sample, any shape, any integer type (8 to 64 bits, signed or not): a list, a
            NumPy array or a tensor on any device. Labels to ignore (-100, 255) must be dropped first: ``labels[labels
            != -100]``.
        num_classes: number of classes C; default: the largest label + 1, which may be 2^24 at most.

    Returns:
        int64 CPU tensor of shape ``(C,)``.

    Raises:
        TypeError: labels are not integers (floats, booleans, strings), or ``num_classes`` is not one.
        ValueError: a label below 0 or at least ``num_classes``; no label and no ``num_classes``; a label from 2^24
            on without ``num_classes``.

    Warns:
        UserWarning: a class has no sample; names how many and the first five.

    Example:
        >>> import torch, ltkernels as ltk
        >>> ltk.rebalance.count_classes([0, 2, 1, 0, 0, 2])
        tensor([3, 1, 2])
    """
    if not isinstance(labels, Tensor):
        labels = torch.from_numpy(np.ascontiguousarray(_native(_as_array("labels", labels, kinds="iu"))))
    elif labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels: expected integers, found {labels.dtype}")
    if num_classes is not None:
        num_classes = arg.integer("num_classes", num_classes)
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, found {num_classes}")
    if labels.numel() == 0 and num_classes is None:
        raise ValueError("labels: expected at least one label, or num_classes, found 0 labels and num_classes=None")

    flat = labels.detach().reshape(-1)
    # A uint64 label from 2^63 on turns negative here, and is reported below with its own value.
    index = flat.to(torch.int64)
    wrong = (index < 0) | (index >= (_MOST_CLASSES if num_classes is None else num_classes))
    if wrong.any():
        position = int(wrong.nonzero()[0])
        found = flat[position].item()
        if num_classes is not None:
            expected = f"all labels in [0, {num_classes})"
        elif found < 0:
            expected = "all labels >= 0"
        else:
            expected = f"all labels below {_MOST_CLASSES} (for more classes give num_classes)"
        raise ValueError(f"labels: expected {expected}, found {found} at position {position}")
    counts = torch.bincount(index, minlength=num_classes or 0).cpu()

    absent = (counts == 0).nonzero().flatten()
    if len(absent):
        names = ", ".join(map(str, absent[:5].tolist())) + (", ..." if len(absent) > 5 else "")
        warnings.warn(f"count_classes: {len(absent)} of {len(counts)} classes have no sample: {names}", stacklevel=2)
    return counts


def _native(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """``array`` in this machine's byte order, which is all that torch reads."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def finite_table(values: Tensor, seen: Tensor, dtype: torch.dtype, name: str, setting: float) -> Tensor:
    """``values`` as ``dtype``, where a class with samples may not become infinite: a bias of -inf says it has none."""
    result = values.to(dtype)
    wrong = ~result.isfinite() & seen
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected a number that keeps every class with samples finite in {dtype}, found {setting:g},"
            f" which gives {result[index]:g} at class {index}"
        )
    return result


def log_prior(class_counts: ClassCounts, tau: float, dtype: torch.dtype) -> Tensor:
    """``tau log(n_c / N)``; -inf for a class with count 0, whatever ``tau``."""
    counts = as_class_counts(class_counts)
    tau = arg.number("tau", tau, 0.0, math.inf)
    seen = counts > 0
    return finite_table(torch.where(seen, tau * (counts / counts.sum()).log(), -math.inf), seen, dtype, "tau", tau)


def counts_buffer(class_counts: ClassCounts) -> Tensor:
    """Checked class counts as a module keeps them: int64, or float32 where they are frequencies."""
    counts = as_class_counts(class_counts)
    return counts.long() if bool((counts == counts.round()).all()) else counts.float()


def describe_counts(class_counts: Tensor) -> str:
    """Number of classes and range of the counts, for a module's repr."""
    low, high = class_counts.min().item(), class_counts.max().item()
    return f"num_classes={class_counts.numel()}, class_counts={low:g}..{high:g}"

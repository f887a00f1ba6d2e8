"""How often a sample is repeated: repeat-factor sampling, also of streams that are too large to index.

A sample of class c is to be seen r_c times an epoch. How often it is in one epoch is decided by its own random number,
a pure function of (seed, epoch, key): every worker of every machine can decide it for the samples that it reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels import rebalance
from ltkernels.class_index import flat_labels
from ltkernels.reference import sampling as reference

try:
    from ltkernels._host import round_repeats as _round_repeats  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # installed without a compiler

    def _round_repeats(
        keys: npt.NDArray[np.int64], factors: npt.NDArray[np.float64], seed: int, epoch: int
    ) -> npt.NDArray[np.int64]:
        words = reference.philox(torch.from_numpy(keys), torch.tensor(epoch), reference.REPEATS, seed)
        bits = ((words[1] << 32 | words[0]) >> 11) & (2**53 - 1)
        whole = np.floor(factors)
        return whole.astype(np.int64) + (bits.numpy() * 2.0**-53 < factors - whole)


Labels = int | Sequence[int] | Sequence[Sequence[int]] | npt.NDArray[np.integer[Any]] | Tensor
Keys = int | str | Sequence[int] | Sequence[str] | npt.NDArray[np.integer[Any]] | Tensor


def repeat_factor(class_counts: rebalance.ClassCounts, threshold: float, num_samples: int | None = None) -> Tensor:
    r"""Repeat factor of each class: :math:`r_c = \max(1, \sqrt{t / f_c})`, with :math:`f_c` the class's frequency.

    Args:
        class_counts: samples (images) in which class c occurs, ``(C,)``, as in :mod:`ltkernels.rebalance`.
        threshold: t > 0: classes of a smaller frequency are repeated. LVIS uses 0.001.
        num_samples: number of samples, of which :math:`f_c` is a fraction. Default: the sum of ``class_counts``, right
            if every sample has one class.

    Returns:
        float64 CPU tensor ``(C,)``; 1 for a class without samples.

    Raises:
        TypeError, ValueError: wrong counts or threshold; a class in more than ``num_samples`` samples.

    Example:
        >>> import ltkernels as ltk
        >>> ltk.samplers.repeat_factor([90, 9, 1], threshold=0.25)
        tensor([1.0000, 1.6667, 5.0000], dtype=torch.float64)

    Source:
        Gupta et al. 2019 (LVIS), section 4.3; detectron2's ``RepeatFactorTrainingSampler``.
    """
    counts = rebalance.as_class_counts(class_counts).to("cpu", torch.float64)
    threshold = arg.number("threshold", threshold, 0.0, float("inf"), open_low=True)
    total = float(counts.sum()) if num_samples is None else float(arg.integer("num_samples", num_samples))
    if float(counts.max()) > total:
        raise ValueError(f"num_samples: expected at least {counts.max():g}, the largest class, found {num_samples}")
    frequency = torch.where(counts > 0, counts / total, threshold)
    return (threshold / frequency).sqrt().clamp(min=1.0)


def repeat_count(
    keys: Keys,
    labels: Labels,
    repeat_factor: Tensor | Sequence[float],
    *,
    seed: int,
    epoch: int = 0,
    rounding: str = "stochastic",
) -> Tensor | int:
    """How often each sample is to be used in an epoch: a pure function of (seed, epoch, key).

    For data sets in shards and streams of unknown length: nothing about other samples has to be known. A factor below
    1 leaves samples out. Use each sample that often where it is read, and shuffle behind it.

    Args:
        keys: what a sample is known by, the same in every epoch: integers of 64 bits or strings, ``(n,)``; or one.
        labels: class of each sample, ``(n,)``, any integer type. For samples of several classes ``(n, k)`` with
            negative padding, or a sequence of sequences: the largest factor of its classes counts, and a sample without
            a class has factor 1. For one key, one label or a sequence of them.
        repeat_factor: how often to see a sample of each class, ``(C,)``, >= 0 and below 2^31; from
            :func:`repeat_factor`, or for instance ``counts.max() / counts`` to balance the classes.
        seed: an integer of 64 bits.
        epoch: in [0, 2^32).
        rounding: ``"stochastic"`` rounds up with the probability of the fraction, anew in each epoch, so that the
            expectation is the factor (detectron2); ``"ceil"`` always up (mmengine).

    Returns:
        int64 tensor ``(n,)``; an int for one key.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value; a label that is no class.

    Example:
        >>> import torch, ltkernels as ltk
        >>> factor = ltk.samplers.repeat_factor([90, 9, 1], threshold=0.25)
        >>> ltk.samplers.repeat_count(torch.arange(6), [0, 0, 1, 1, 1, 2], factor, seed=0)
        tensor([1, 1, 2, 2, 2, 5])
        >>> ltk.samplers.repeat_count("shard-3/000017.jpg", [0, 2], factor, seed=0)
        5

    Source:
        Gupta et al. 2019 (LVIS); detectron2's ``RepeatFactorTrainingSampler``, mmengine's ``ClassBalancedDataset``.
    """
    arg.choice("rounding", rounding, ("stochastic", "ceil"))
    seed, epoch = arg.integer("seed", seed), _epoch(epoch)
    factor = _factors(repeat_factor)
    one = isinstance(keys, (int, str, np.integer)) or (isinstance(keys, Tensor) and keys.dim() == 0)
    of_sample = sample_factors(cast(Any, [labels] if one else labels), factor)
    key = _keys([keys] if one else keys)
    if len(key) != len(of_sample):
        raise ValueError(f"labels: expected those of {len(key)} keys, found {len(of_sample)}")
    counts = rounded(key, of_sample, seed, epoch, rounding)
    return int(counts[0]) if one else torch.from_numpy(counts)


def rounded(
    keys: npt.NDArray[np.int64], factors: npt.NDArray[np.float64], seed: int, epoch: int, rounding: str
) -> npt.NDArray[np.int64]:
    """Checked factors as counts."""
    if rounding == "ceil":
        return np.ceil(factors).astype(np.int64)
    counts: npt.NDArray[np.int64] = _round_repeats(keys, factors, seed & (2**64 - 1), epoch)
    return counts


def sample_factors(labels: Any, class_factor: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The largest factor of each sample's classes; 1 for a sample without a class."""
    sample, label, count = flat_labels(labels)
    wrong = (label < 0) | (label >= len(class_factor))
    if wrong.any():
        raise ValueError(
            f"labels: expected classes in [0, {len(class_factor)}), as many as repeat_factor has, found"
            f" {label[wrong][0]} at sample {sample[wrong][0]}"
        )
    factors = np.full(count, -1.0)
    np.maximum.at(factors, sample, class_factor[label])
    return np.where(factors < 0, 1.0, factors)


def _factors(repeat_factor: Tensor | Sequence[float]) -> npt.NDArray[np.float64]:
    is_tensor = isinstance(repeat_factor, Tensor)
    values = arg.tensor("repeat_factor", repeat_factor).detach().cpu().double().numpy() if is_tensor else repeat_factor
    factor = rebalance._as_array("repeat_factor", values, kinds="iuf").astype(np.float64)
    if factor.ndim != 1 or factor.size == 0:
        raise ValueError(f"repeat_factor: expected shape (C,), found {tuple(factor.shape)}")
    right = (factor >= 0) & (factor < 2**31)
    if not right.all():
        wrong = int((~right).argmax())
        raise ValueError(f"repeat_factor: expected 0 <= factors < 2^31, found {factor[wrong]:g} at class {wrong}")
    return factor


def _keys(keys: Any) -> npt.NDArray[np.int64]:
    if isinstance(keys, Tensor):
        keys = keys.detach().cpu().numpy()
    array = np.asarray(keys)
    if array.ndim == 1 and array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim == 1 and array.dtype.kind == "U" and not isinstance(keys, np.ndarray):
        if all(isinstance(key, str) for key in keys):
            array = np.array(keys, dtype=object)  # NumPy's own strings lose NULs at their end
    if array.ndim == 1 and array.dtype.kind in "UO" and all(isinstance(key, str) for key in array):
        digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in array)
        return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise TypeError(
            f"keys: expected integers of 64 bits or strings, (n,), found {array.dtype} of shape {array.shape}"
        )
    return np.ascontiguousarray(array.astype(np.int64))


def _epoch(epoch: int) -> int:
    epoch = arg.integer("epoch", epoch)
    if not 0 <= epoch < 2**32:
        raise ValueError(f"epoch: expected >= 0 and below 2^32, found {epoch}")
    return epoch

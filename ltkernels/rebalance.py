"""From class counts to what rebalances a loss: weights, biases, margins, scales and schedules.

Everything here is computed once, in float64 on the CPU, and returned as a float32 tensor of shape ``(C,)``
(``dtype=`` changes that). ``class_counts`` is the number of training samples of each class, in class order: a list, a
NumPy array or a tensor. Published code calls it ``cls_num_list`` (LDAM-DRW, RIDE, SADE), ``samples_per_cls``
(class-balanced loss) or ``sample_per_class`` (Balanced Softmax).

A class without training samples (count 0) has one meaning in the whole package: weight 0, bias -inf, margin 0, scale
1, and it takes no part in any normalisation. Nothing becomes NaN because of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ltkernels import arguments as arg

__all__ = [
    "DeferredReweighting",
    "adjust_logits",
    "count_classes",
    "effective_number_weight",
    "inverse_frequency_weight",
    "ldam_margin",
    "logit_adjustment",
    "vs_scale",
]

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
    for wrong, expected in ((~counts.isfinite(), "all counts finite"), (counts < 0, "all counts >= 0")):
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


def _beta(beta: float) -> float:
    beta = arg.number("beta", beta, 0.0, 1.0)
    if beta == 1:
        raise ValueError("beta: expected a number below 1 (1 is the limit of inverse frequency), found 1")
    return beta


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


def inverse_frequency_weight(
    class_counts: ClassCounts,
    power: float = 1.0,
    normalize: Literal["mean", "balanced"] | None = "mean",
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Class weights proportional to ``n_c ** -power``, for ``weight=`` of any loss.

    Args:
        class_counts: training samples of each class, ``(C,)``.
        power: 1 is inverse frequency, 0.5 is ``1 / sqrt(n_c)``, 0 is no weighting. At least 0.
        normalize: ``"mean"``: the mean over the classes is 1 (the weights sum to C); what timm and the class-balanced
            loss do. ``"balanced"``: the mean over the training samples is 1, so the scale of the loss does not
            change; with ``power=1`` it is scikit-learn's ``"balanced"``, ``N / (C n_c)``. ``None``: ``n_c ** -power``
            itself.
        dtype: type of the result.

    Returns:
        Weights of shape ``(C,)``; 0 for a class with count 0, which counts neither in C nor in a mean.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: bad counts, negative ``power``, unknown ``normalize``; a ``power`` that makes ``n_c ** -power``
            infinite.

    Example:
        >>> import torch, ltkernels as ltk
        >>> ltk.rebalance.inverse_frequency_weight([60, 30, 10], normalize="balanced")
        tensor([0.5556, 1.1111, 3.3333])
    """
    counts = as_class_counts(class_counts)
    power = arg.number("power", power, 0.0, math.inf)
    seen = counts > 0
    if normalize is None:
        return _finite(torch.where(seen, counts.pow(-power), 0.0), seen, dtype, "power", power)
    arg.choice("normalize", normalize, ("mean", "balanced"), " or None")
    # Relative to the rarest class a large power can only underflow, to the limit, and never makes 0 / 0.
    weight = torch.where(seen, (counts[seen].min() / counts).pow(power), 0.0)
    over = seen.double() if normalize == "mean" else counts  # the mean is over classes, or over samples
    return (weight * (over.sum() / (over * weight).sum())).to(dtype)


def _finite(values: Tensor, seen: Tensor, dtype: torch.dtype, name: str, setting: float) -> Tensor:
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


def effective_number_weight(
    class_counts: ClassCounts, beta: float = 0.9999, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Class weights ``(1 - beta) / (1 - beta ** n_c)``, scaled to sum to the number of classes.

    ``beta = 0`` gives equal weights and ``beta -> 1`` gives inverse frequency.

    Args:
        class_counts: training samples of each class, ``(C,)``: counts, not frequencies, because the formula is not
            scale-free.
        beta: in ``[0, 1)``.
        dtype: type of the result.

    Returns:
        Weights of shape ``(C,)`` that sum to the number of classes with samples; 0 for a class with count 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: bad counts, a count between 0 and 1, ``beta`` outside ``[0, 1)``.

    Example:
        >>> import torch, ltkernels as ltk
        >>> ltk.rebalance.effective_number_weight([1000, 100, 10], beta=0.999)
        tensor([0.0422, 0.2800, 2.6778])

    Source:
        Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019. The published
        code divides the weighted sum by the number of rows: ``denominator="count"``, the default of
        :class:`ltkernels.losses.ClassBalancedLoss`.
    """
    counts = as_class_counts(class_counts)
    beta = _beta(beta)
    fraction = (counts > 0) & (counts < 1)
    if fraction.any():
        index = int(fraction.nonzero()[0])
        raise ValueError(f"class_counts: expected numbers of samples, found {counts[index]:g} at class {index}")
    # 1 - beta^n = -expm1(n log beta): subtracting the power from 1 loses 1.3 % at beta = 0.999999 in float32. The
    # factor 1 - beta cancels.
    log_beta = math.log(beta) if beta else -math.inf
    seen = counts > 0
    weight = torch.where(seen, -1 / torch.expm1(counts * log_beta), 0.0)
    return (weight * (seen.sum() / weight.sum())).to(dtype)


def logit_adjustment(class_counts: ClassCounts, tau: float = 1.0, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class biases ``tau * log(n_c / N)`` that are added to the logits while training.

    Only the ratios of the counts matter, so class frequencies are as good as counts.

    Args:
        class_counts: training samples of each class, ``(C,)``.
        tau: strength, at least 0; 1 is the Bayes-consistent value.
        dtype: type of the result.

    Returns:
        Biases of shape ``(C,)``; -inf for a class with count 0, whatever ``tau``: it leaves the softmax and gets no
        gradient.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: bad counts; ``tau`` negative, or so large that a class with samples would get -inf.

    Example:
        >>> import torch, ltkernels as ltk
        >>> ltk.rebalance.logit_adjustment([90, 10, 0])
        tensor([-0.1054, -2.3026,    -inf])

    Source:
        Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 10. The published code adds
        ``log(pi ** tau + 1e-12)``, and LADE, SADE and PaCo ``log(pi + 1e-9)``: the small number keeps a class with
        count 0 in the softmax, and hardly changes another.
    """
    counts = as_class_counts(class_counts)
    tau = arg.number("tau", tau, 0.0, math.inf)
    seen = counts > 0
    return _finite(torch.where(seen, tau * (counts / counts.sum()).log(), -math.inf), seen, dtype, "tau", tau)


def ldam_margin(class_counts: ClassCounts, max_m: float = 0.5, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class margins proportional to ``n_c ** -0.25``; the rarest class has ``max_m``.

    Args:
        class_counts: training samples of each class, ``(C,)``; only the ratios matter.
        max_m: margin of the rarest class, in cosine units, at least 0.
        dtype: type of the result.

    Returns:
        Margins of shape ``(C,)``; 0 for a class with count 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: bad counts or negative ``max_m``.

    Example:
        >>> import torch, ltkernels as ltk
        >>> ltk.rebalance.ldam_margin([1600, 100, 1])
        tensor([0.0791, 0.1581, 0.5000])

    Source:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, equation
        13. The mmdet port uses 0.3.
    """
    counts = as_class_counts(class_counts)
    max_m = arg.number("max_m", max_m, 0.0, math.inf)
    seen = counts > 0
    return torch.where(seen, max_m * (counts[seen].min() / counts).pow(0.25), 0.0).to(dtype)


def vs_scale(class_counts: ClassCounts, gamma: float = 0.3, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class scales ``(n_c / n_max) ** gamma`` that multiply the logits while training.

    Args:
        class_counts: training samples of each class, ``(C,)``; only the ratios matter.
        gamma: strength, at least 0; 0 gives scales of 1.
        dtype: type of the result.

    Returns:
        Scales of shape ``(C,)``, in ``(0, 1]``; 1 for a class with count 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: bad counts or negative ``gamma``.

    Example:
        >>> import torch, ltkernels as ltk
        >>> ltk.rebalance.vs_scale([10000, 100, 1], gamma=0.5)
        tensor([1.0000, 0.1000, 0.0100])

    Source:
        Kini et al., "Label-Imbalanced and Group-Sensitive Classification under Overparameterization", NeurIPS 2021
        (the multiplicative part of the VS loss); before it Ye et al., "Identifying and Compensating for Feature
        Deviation in Imbalanced Deep Learning", 2020 (CDT).
    """
    counts = as_class_counts(class_counts)
    gamma = arg.number("gamma", gamma, 0.0, math.inf)
    return torch.where(counts > 0, (counts / counts.max()).pow(gamma), 1.0).to(dtype)


def adjust_logits(logits: Tensor, class_counts: ClassCounts, tau: float = 1.0) -> Tensor:
    """Post-hoc logit adjustment: ``logits - tau * log(n_c / N)``, for a model trained with plain cross entropy.

    Use it at evaluation. A model trained with :class:`ltkernels.losses.LogitAdjustedLoss` (or Balanced Softmax, or
    VS) has the adjustment in its weights already: adjusting its logits again would do it twice.

    A class with count 0 gets -inf, whatever ``tau``: it is never predicted. The formula alone would give it +inf, and
    make every prediction a class that the model never saw; nothing was learnt that could rank it, and it is out of
    the softmax in training with adjustment too.

    Args:
        logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, floating, as for cross entropy.
        class_counts: training samples of each class, ``(C,)``; only the ratios matter.
        tau: strength, at least 0; the best value on a validation set is often above 1.

    Returns:
        New logits of the same shape: float64 for float64 logits, otherwise float32 (half precision would tie classes
        that the adjustment tells apart).

    Raises:
        TypeError: logits are not a floating tensor.
        ValueError: bad counts, negative ``tau``, or another number of classes.

    Example:
        >>> import torch, ltkernels as ltk
        >>> logits = torch.tensor([[2.0, 1.0]])
        >>> ltk.rebalance.adjust_logits(logits, [90, 10]).argmax(1)
        tensor([1])

    Source:
        Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, section 4.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating tensor, found {getattr(logits, 'dtype', type(logits).__name__)}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    bias = logit_adjustment(class_counts, tau, dtype=dtype)
    class_dim = min(logits.ndim - 1, 1)
    if logits.ndim == 0 or logits.shape[class_dim] != bias.numel():
        raise ValueError(
            f"logits: expected shape (C,), (N, C) or (N, C, d1, ...) with C = {bias.numel()} (the length of"
            f" class_counts), found {tuple(logits.shape)}"
        )
    subtrahend = torch.where(bias.isinf(), math.inf, bias).to(logits.device)
    return logits - subtrahend.view(-1, *[1] * (logits.ndim - 1 - class_dim))


class ClassTableModule(nn.Module):
    """A module whose floating buffers never fall below float32.

    ``model.half()`` or ``model.to(torch.bfloat16)`` reaches the loss too where it is an attribute of the model. It
    has no weights to make smaller, and a log prior of -9.2103 would become -9.1875 in bfloat16. So devices and
    float64 are followed, half precision is not.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassTableModule:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, table in before.items():
            after = self._buffers[name]
            if table is not None and after is not None and after.is_floating_point() and after.dtype.itemsize < 4:
                self._buffers[name] = table.to(after.device)
        return self


class DeferredReweighting(ClassTableModule):
    """Class weights that start late (DRW): equal until ``reweight_epoch``, then :func:`effective_number_weight`.

    Give it to any loss as ``weight=``; ``loss.set_epoch(epoch)`` then drives it. Or call it for the weights of the
    current epoch. The weights change in place, in one buffer, and so also inside a compiled or captured step.
    ``state_dict`` holds the epoch, the weights and the counts: a resumed run has the right weights before the next
    ``set_epoch``.

    Args:
        class_counts: training samples of each class, ``(C,)``.
        reweight_epoch: first epoch (counted from 0) with weights. Published: 160 of 200 on CIFAR, the 161st; RIDE
            counts from 1 and writes the same as "after epoch 160".
        beta: of the effective number, in ``[0, 1)``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: bad counts, negative ``reweight_epoch``, ``beta`` outside ``[0, 1)``.

    Example:
        >>> import torch, ltkernels as ltk
        >>> weight = ltk.rebalance.DeferredReweighting([1000, 10], reweight_epoch=160, beta=0.999)
        >>> weight.set_epoch(159)
        >>> weight()
        tensor([1., 1.])
        >>> weight.set_epoch(160)
        >>> weight()
        tensor([0.0310, 1.9690])

    Source:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, algorithm
        1. The published code selects beta by ``epoch // 160`` from two values and stops with an error at epoch 320;
        here the second stage has no end.
    """

    class_counts: Tensor
    epoch: Tensor
    weight: Tensor

    def __init__(self, class_counts: ClassCounts, reweight_epoch: int, beta: float = 0.9999) -> None:
        super().__init__()
        self.reweight_epoch = _epoch("reweight_epoch", reweight_epoch)
        self.beta = _beta(beta)
        self.register_buffer("class_counts", counts_buffer(class_counts))
        self.register_buffer("epoch", torch.tensor(0, device="cpu"))
        self.register_buffer("weight", self.weight_at(0))

    def weight_at(self, epoch: int) -> Tensor:
        """The class weights of an epoch, float32 ``(C,)``, without moving there."""
        beta = self.beta if _epoch("epoch", epoch) >= self.reweight_epoch else 0.0
        return effective_number_weight(self.class_counts, beta)

    def set_epoch(self, epoch: int) -> None:
        """Moves to an epoch, counted from 0; call it before the epoch's first step."""
        self.weight.copy_(self.weight_at(epoch))
        self.epoch.fill_(epoch)

    def forward(self) -> Tensor:
        """The class weights of the current epoch, ``(C,)``."""
        return self.weight

    def extra_repr(self) -> str:
        return f"reweight_epoch={self.reweight_epoch}, beta={self.beta:g}, {describe_counts(self.class_counts)}"


def _epoch(name: str, epoch: int) -> int:
    epoch = arg.integer(name, epoch)
    if epoch < 0:
        raise ValueError(f"{name}: expected an epoch >= 0, counted from 0, found {epoch}")
    return epoch


def counts_buffer(class_counts: ClassCounts) -> Tensor:
    """Checked class counts as a module keeps them: int64, or float32 where they are frequencies."""
    counts = as_class_counts(class_counts)
    return counts.long() if bool((counts == counts.round()).all()) else counts.float()


def describe_counts(class_counts: Tensor) -> str:
    """Number of classes and range of the counts, for a module's repr."""
    low, high = class_counts.min().item(), class_counts.max().item()
    return f"num_classes={class_counts.numel()}, class_counts={low:g}..{high:g}"

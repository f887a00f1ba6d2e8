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
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ltkernels import arguments as arg
from ltkernels.class_counts import ClassCounts as ClassCounts
from ltkernels.class_counts import _as_array as _as_array
from ltkernels.class_counts import as_class_counts as as_class_counts
from ltkernels.class_counts import count_classes, finite_table, log_prior
from ltkernels.class_counts import counts_buffer as counts_buffer
from ltkernels.class_counts import describe_counts as describe_counts
from ltkernels.post_hoc import adjust_logits, norcal, tau_normalize

__all__ = [
    "DeferredReweighting",
    "adjust_logits",
    "arcface_margin",
    "count_classes",
    "effective_number_weight",
    "inverse_frequency_weight",
    "label_aware_smoothing",
    "ldam_margin",
    "logit_adjustment",
    "norcal",
    "tau_normalize",
    "vs_scale",
]


def _beta(beta: float) -> float:
    beta = arg.number("beta", beta, 0.0, 1.0)
    if beta == 1:
        raise ValueError("beta: expected a number below 1 (1 is the limit of inverse frequency), found 1")
    return beta


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
        return finite_table(torch.where(seen, counts.pow(-power), 0.0), seen, dtype, "power", power)
    arg.choice("normalize", normalize, ("mean", "balanced"), " or None")
    # Relative to the rarest class a large power can only underflow, to the limit, and never makes 0 / 0.
    weight = torch.where(seen, (counts[seen].min() / counts).pow(power), 0.0)
    over = seen.double() if normalize == "mean" else counts  # the mean is over classes, or over samples
    return (weight * (over.sum() / (over * weight).sum())).to(dtype)


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
    return log_prior(class_counts, tau, dtype)


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


def arcface_margin(
    class_counts: ClassCounts,
    m_min: float = 0.05,
    m_max: float = 0.5,
    power: float = 0.25,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Angular margins of classes: ``n_c ** -power``, brought linearly to ``[m_min, m_max]``.

    Args:
        class_counts: training samples of each class, ``(C,)``; only the ratios matter.
        m_min: margin of the most frequent class, in radians, in ``[0, pi]``.
        m_max: margin of the rarest class, in radians, in ``[m_min, pi]``; of all where the counts are equal.
        power: how fast margins fall with the count, at least 0.
        dtype: type of the result.

    Returns:
        Margins of shape ``(C,)`` for :class:`ltkernels.losses.ArcFaceLoss`; 0 for a class with count 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: bad counts, a margin outside its range, negative ``power``.

    Example:
        >>> import torch, ltkernels as ltk
        >>> ltk.rebalance.arcface_margin([10000, 16, 1])
        tensor([0.0500, 0.2500, 0.5000])

    Source:
        The adaptive margins of mmpretrain's ArcFace head, after Ha et al., "Google Landmark Recognition 2020
        Competition Third Place Solution", 2020.
    """
    counts = as_class_counts(class_counts)
    m_min = arg.number("m_min", m_min, 0.0, math.pi)
    m_max = arg.number("m_max", m_max, m_min, math.pi)
    power = arg.number("power", power, 0.0, math.inf)
    seen = counts > 0
    size = torch.where(seen, (counts[seen].min() / counts).pow(power), 0.0)  # 1 for the rarest
    least = size[seen].min()
    share = (size - least) / (1 - least) if least < 1 else torch.ones_like(size)
    return torch.where(seen, m_min + (m_max - m_min) * share, 0.0).to(dtype)


def label_aware_smoothing(
    class_counts: ClassCounts,
    smooth_head: float = 0.3,
    smooth_tail: float = 0.0,
    shape: Literal["concave", "linear", "convex", "exp"] = "concave",
    power: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Label smoothing of each class, from ``smooth_tail`` for the rarest to ``smooth_head`` for the most frequent.

    With ``t = (n_c - n_min) / (n_max - n_min)`` it is ``tail + (head - tail) f(t)``, f being ``sin(t pi / 2)``
    (concave), ``t`` (linear), ``1 - cos(t pi / 2)`` (convex) or ``t ** power`` (exp).

    Args:
        class_counts: training samples of each class, ``(C,)``; only the ratios matter.
        smooth_head: of the most frequent class, in ``[0, 1]``; of all where the counts are equal.
        smooth_tail: of the rarest class, in ``[0, 1]``.
        shape: ``"concave"``, ``"linear"``, ``"convex"`` or ``"exp"``.
        power: for ``"exp"``, above 0; None otherwise.
        dtype: type of the result.

    Returns:
        Smoothing of shape ``(C,)``, for ``label_smoothing=``; 0 for a class with count 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: bad counts, a smoothing outside ``[0, 1]``, an unknown shape, ``power`` without ``"exp"`` or
            ``"exp"`` without it.

    Example:
        >>> import torch, ltkernels as ltk
        >>> ltk.rebalance.label_aware_smoothing([101, 51, 1], shape="linear")
        tensor([0.3000, 0.1500, 0.0000])

    Source:
        Zhong et al., "Improving Calibration for Long-Tailed Recognition" (MiSLAS), CVPR 2021, section 3.2, and its
        published code; there the convex form is written ``head + (head - tail) sin(3 pi / 2 + t pi / 2)``, which is
        the same. On CIFAR-100-LT, imbalance 100, it has ``smooth_head=0.4, smooth_tail=0.1``.
    """
    counts = as_class_counts(class_counts)
    head = arg.number("smooth_head", smooth_head, 0.0, 1.0)
    tail = arg.number("smooth_tail", smooth_tail, 0.0, 1.0)
    arg.choice("shape", shape, ("concave", "linear", "convex", "exp"))
    if (power is not None) != (shape == "exp"):
        raise ValueError(f"power: expected a number with shape='exp' and None otherwise, found {power} with {shape!r}")
    seen = counts > 0
    low, high = counts[seen].min(), counts.max()
    t = ((counts - low) / (high - low)).clamp_min(0.0) if low < high else torch.ones_like(counts)
    if power is not None:
        f = t.pow(arg.number("power", power, 0.0, math.inf, open_low=True))
    elif shape == "concave":
        f = torch.sin(t * (math.pi / 2))
    else:
        f = t if shape == "linear" else 2 * torch.sin(t * (math.pi / 4)).square()  # 1 - cos, where it is small
    return torch.where(seen, tail + (head - tail) * f, 0.0).to(dtype)


class ClassTableModule(nn.Module):
    """A module whose floating buffers never fall below float32, and whose class counts load as what they are.

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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded, counts = state_dict.get(f"{prefix}class_counts"), self._buffers.get("class_counts")
        if isinstance(loaded, Tensor) and counts is not None and not counts.is_floating_point():
            if loaded.is_floating_point() and bool((loaded != loaded.round()).any()):
                self._buffers["class_counts"] = counts.to(loaded.dtype)  # frequencies, which integers would make 0
        super()._load_from_state_dict(state_dict, prefix, *args)


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

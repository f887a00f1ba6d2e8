"""What rebalances a trained classifier: its logits, its probabilities or its class vectors, without training.

:mod:`ltkernels.rebalance` has the functions by name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels.class_counts import ClassCounts, as_class_counts, log_prior

__all__ = ["adjust_logits", "norcal", "tau_normalize"]


def adjust_logits(
    logits: Tensor, class_counts: ClassCounts, tau: float = 1.0, *, target_prior: ClassCounts | None = None
) -> Tensor:
    """Post-hoc logit adjustment: ``logits - tau * log(n_c / N)``, for a model trained with plain cross entropy.

    Use it at evaluation. A model trained with :class:`ltkernels.losses.LogitAdjustedLoss` (or Balanced Softmax, or
    VS) has the adjustment in its weights already: adjusting its logits again would do it twice.

    With ``target_prior`` it is a change of prior: ``logits - tau * log(n_c / N) + log target_prior_c``, for test data
    whose class frequencies are known and not equal. For a model that has the adjustment in its weights, ``tau=0``
    adds the target prior alone.

    A class with count 0 gets -inf, whatever ``tau``: it is never predicted. The formula alone would give it +inf, and
    make every prediction a class that the model never saw; nothing was learnt that could rank it, and it is out of
    the softmax in training with adjustment too.

    Args:
        logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, floating, as for cross entropy.
        class_counts: training samples of each class, ``(C,)``; only the ratios matter.
        tau: strength, at least 0; the best value on a validation set is often above 1.
        target_prior: class frequencies of the test data, or counts, ``(C,)``; only the ratios matter. None: equal. A
            class with frequency 0 gets -inf.

    Returns:
        New logits of the same shape: float64 for float64 logits, otherwise float32 (half precision would tie classes
        that the adjustment tells apart).

    Raises:
        TypeError: logits are not a floating tensor.
        ValueError: bad counts or frequencies, negative ``tau``, or another number of classes.

    Example:
        >>> import torch, ltkernels as ltk
        >>> logits = torch.tensor([[2.0, 1.0]])
        >>> ltk.rebalance.adjust_logits(logits, [90, 10]).argmax(1)
        tensor([1])

    Source:
        Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, section 4. With a target prior: Hong et
        al., "Disentangling Label Distribution for Long-tailed Visual Recognition" (LADE), CVPR 2021, where it is the
        post-compensated softmax (PC).
    """
    dtype = _float_type("logits", logits)
    bias = log_prior(class_counts, tau, dtype)
    absent = bias.isinf()
    shift = torch.where(absent, -math.inf, -bias)
    if target_prior is not None:
        prior = _named("target_prior", target_prior)
        if prior.numel() != shift.numel():
            raise ValueError(
                f"target_prior: expected shape ({shift.numel()},) as class_counts, found ({prior.numel()},)"
            )
        shift = shift + (prior / prior.sum()).log().to(dtype)
    return logits + _along_classes(shift, logits, "the length of class_counts")


def _float_type(name: str, value: Tensor) -> torch.dtype:
    """The type that results are computed in."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, found {getattr(value, 'dtype', type(value).__name__)}")
    return torch.promote_types(value.dtype, torch.float32)


def _named(name: str, frequencies: ClassCounts) -> Tensor:
    """Checked as class counts are, under another name."""
    try:
        return as_class_counts(frequencies)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("class_counts", name, 1)) from None


def _along_classes(shift: Tensor, logits: Tensor, what: str) -> Tensor:
    """``(C,)`` values in a shape that adds to the logits."""
    class_dim = min(logits.ndim - 1, 1)
    if logits.ndim == 0 or logits.shape[class_dim] != shift.numel():
        raise ValueError(
            f"logits: expected shape (C,), (N, C) or (N, C, d1, ...) with C = {shift.numel()} ({what}),"
            f" found {tuple(logits.shape)}"
        )
    return shift.to(logits.device).view(-1, *[1] * (logits.ndim - 1 - class_dim))


def norcal(logits: Tensor, class_counts: ClassCounts, gamma: float = 1.0, *, background: int | None = None) -> Tensor:
    """NorCal: probabilities ``p_c n_c ** -gamma``, brought back to sum to 1, with a background class left as it is.

    Without background this is the softmax of :func:`adjust_logits` with ``tau=gamma``. With one it is not: the
    background competes with ``p_c n_c ** -gamma`` of the others, so the size of the counts matters too.

    Args:
        logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, floating; or logarithms of probabilities. With a
            background class there is one column more than there are counts.
        class_counts: training samples of each class but the background, ``(C,)``. A class with count 0 gets
            probability 0.
        gamma: strength, at least 0; 0 changes nothing.
        background: index of the background's column, negative from the end (-1 in mmdetection and detectron2); None
            if there is none.

    Returns:
        Probabilities of the logits' shape: float64 for float64 logits, otherwise float32.

    Raises:
        TypeError: logits are not a floating tensor, ``background`` is not an integer.
        ValueError: bad counts, negative ``gamma``, another number of classes, ``background`` out of range.

    Example:
        >>> import torch, ltkernels as ltk
        >>> p = torch.tensor([[0.5, 0.2, 0.3]])
        >>> ltk.rebalance.norcal(p.log(), [100, 4], gamma=0.5, background=-1)
        tensor([[0.1111, 0.2222, 0.6667]])

    Source:
        Pan et al., "On Model Calibration for Long-Tailed Object Detection and Instance Segmentation", NeurIPS 2021,
        equation 4.
    """
    dtype = _float_type("logits", logits)
    counts = as_class_counts(class_counts)
    gamma = arg.number("gamma", gamma, 0.0, math.inf)
    shift = torch.where(counts > 0, -gamma * counts.log(), -math.inf).to(dtype)
    if background is not None:
        columns = shift.numel() + 1
        at = arg.integer("background", background)
        if not -columns <= at < columns:
            raise ValueError(f"background: expected a column in [{-columns}, {columns}), found {at}")
        at %= columns
        shift = torch.cat((shift[:at], shift.new_zeros(1), shift[at:]))
    what = "the length of class_counts" if background is None else "the length of class_counts and the background"
    moved = logits + _along_classes(shift, logits, what)
    return moved.softmax(min(logits.ndim - 1, 1))


def tau_normalize(weight: Tensor, tau: float = 1.0) -> Tensor:
    """Class vectors ``w_c / |w_c| ** tau`` of a trained linear classifier.

    Rare classes have learnt short vectors; ``tau=1`` makes all lengths equal, 0 leaves them. The classifier's bias is
    to be dropped with it: it belongs to the lengths that were learnt.

    Args:
        weight: ``(C, D)``, as of ``nn.Linear``, floating.
        tau: at least 0; published values are 0.7 (ImageNet-LT) and 0.3 (iNaturalist), found on validation data.

    Returns:
        ``(C, D)`` of the weight's type. A vector of length 0 stays 0.

    Raises:
        TypeError: ``weight`` is not a floating tensor.
        ValueError: ``weight`` has another number of dimensions, negative ``tau``.

    Example:
        >>> import torch, ltkernels as ltk
        >>> head = torch.nn.Linear(16, 10)
        >>> weight = ltk.rebalance.tau_normalize(head.weight.detach(), tau=0.7)
        >>> logits = torch.nn.functional.linear(torch.randn(4, 16), weight)  # without head.bias

    Source:
        Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, equation 5.
    """
    dtype = _float_type("weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"weight: expected shape (C, D), found {tuple(weight.shape)}")
    tau = arg.number("tau", tau, 0.0, math.inf)
    # Half precision squares to infinity or 0 where float32 does not; a length of 0 has no direction to scale.
    length: Tensor = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=dtype)
    return (weight * torch.where(length > 0, length, 1.0).pow(-tau)).to(weight.dtype)

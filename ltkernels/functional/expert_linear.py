"""Linear classifiers of several experts and the mean of what they say, without the experts' logits in memory."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels.functional.aggregate_experts import MODES, expert_weights
from ltkernels.functional.experts import stacked
from ltkernels.functional.unit import unit
from ltkernels.ops import aggregate_experts as _aggregate
from ltkernels.ops import expert_linear as _op
from ltkernels.ops.averaged_linear import averaged, needs_parts
from ltkernels.ops.entries import is_traced
from ltkernels.ops.options import AggregateExpertsOptions, AggregateMode, ExpertLinearOptions, ExpertWeights
from ltkernels.reference.aggregate_experts import check_values

EXPERTS = "experts"


def expert_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    expert_weight: Tensor | None = None,
    mode: str = "logits",
    normalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    r"""The weighted mean over E experts, each a linear classifier: of their logits, or of the softmaxes of these.

    .. math::
        z_{ei} = s\,W_e x_{ei} + b_e, \qquad
        \mathrm{out}_{ic} = \frac{\sum_e w f_{eic}}{\sum_e w}

    with f the logits z, ``softmax(z)`` or ``log_softmax(z)``, as in :func:`aggregate_experts`. No tensor of size
    ``(E, N, C)`` is made for a mean:

    * of logits: what is linear commutes with the mean. If the experts share features and weights are not by sample,
      the classifiers are averaged, a few classes at a time, and one product of matrices is left of E; otherwise E
      products add up in the result.
    * of softmaxes: logits are made for so many rows that the cache holds them, and again in the backward: a third more
      products, for memory that does not grow with N. Logits of less than 64 MiB are kept instead if there may be a
      backward.

    Args:
        input: features, ``(E, N, D)``, or ``(N, D)`` that all experts share; float64, float32, bfloat16 or float16.
        weight: classifiers, ``(E, C, D)``, of ``input``'s type (under autocast of any).
        bias: ``(E, C)``, of that type, finite.
        expert_weight: weights >= 0 of a floating type, ``(E,)``, ``(N, E)`` by sample or ``(E, C)`` by class; None: 1
            for all. See :func:`aggregate_experts`.
        mode: ``"logits"``, ``"probs"``, ``"log_probs"``; ``"experts"`` gives z itself, for
            :func:`expert_cross_entropy`, and takes no ``expert_weight``.
        normalize: cosines: features and class vectors are brought to length 1.
        scale: s, above 0; multiplies the features, and leaves the bias.

    Returns:
        ``(N, C)``, or with ``"experts"`` ``(E, N, C)`` of any strides; of ``input``'s type, under autocast of
        autocast's. Differentiable with respect to all tensors.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or option; negative weights; a class or sample for which no expert has a
            weight (CPU).

    Example:
        >>> import torch, ltkernels as ltk
        >>> features, weight = torch.randn(8, 16), torch.randn(3, 10, 16)  # three experts
        >>> ltk.functional.expert_linear(features, weight).shape
        torch.Size([8, 10])
        >>> logits = ltk.functional.expert_linear(features, weight, mode="experts")
        >>> loss = ltk.functional.expert_cross_entropy(logits, torch.randint(10, (8,)))

    Source:
        The heads of Wang et al., RIDE, ICLR 2021, and Zhang et al., SADE, NeurIPS 2022, whose logits are averaged at
        evaluation.
    """
    arg.choice("mode", mode, (*MODES, EXPERTS))
    scale = arg.number("scale", scale, 0.0, math.inf, open_low=True)
    x, w, b = _checked(input, weight, bias)
    (experts, classes, _), rows = w.shape, x.shape[-2]
    if mode == EXPERTS and expert_weight is not None:
        raise ValueError("expert_weight: expected None with mode='experts', which averages nothing")
    share, kind = expert_weights(expert_weight, (experts, rows, classes), x)
    options = ExpertLinearOptions(MODES.get(mode, AggregateMode.LOGITS), kind)
    if share is not None and share.is_cpu and arg.may_look(share):
        check_values(share.detach(), AggregateExpertsOptions(*options))

    if normalize:
        x, w = unit(x, scale), unit(w)
    elif scale != 1.0:
        x = x * scale
    if mode == EXPERTS:
        return _expert_logits(x, w, b)
    by_classes = x.dim() == 2 and kind != ExpertWeights.SAMPLE and not is_traced(x) and needs_parts(x, w)
    if mode == "logits" and not by_classes:
        return _mean_logits(x, w, b, share, kind)
    if _autocast(x) and x.dtype != torch.float64:  # as for PyTorch's products
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w, b = x.to(dtype), w.to(dtype), None if b is None else b.to(dtype)
    if mode != "logits" and _op.may_keep(x, w):
        return _aggregate.aggregate_experts((_expert_logits(x, w, b), share), AggregateExpertsOptions(*options))[0]
    return _op.expert_linear((x, w.contiguous(), None if b is None else b.contiguous(), share), options)


def _checked(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features, classifiers and biases of matching shapes, in the type that they are multiplied in."""
    w = stacked("weight", weight, "E, C, D")
    experts, classes, features = w.shape
    x = arg.tensor("input", input)
    if x.dtype not in arg.LOGITS_TYPES:
        raise TypeError(f"input: expected float64, float32, bfloat16 or float16, found {x.dtype}")
    shared, own = x.dim() == 2, x.dim() == 3 and x.shape[0] == experts
    if not (shared or own) or x.shape[-1] != features:
        raise ValueError(
            f"input: expected shape ({experts}, N, {features}), or (N, {features}) for all experts, as weight"
            f" {tuple(w.shape)} has it, found {tuple(x.shape)}"
        )
    if bias is not None and arg.tensor("bias", bias).shape != (experts, classes):
        raise ValueError(f"bias: expected shape ({experts}, {classes}), found {tuple(bias.shape)}")
    for name, value in (("weight", w), ("bias", bias)):
        if value is None:
            continue
        if value.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as input's, found {value.device}")
        mixed = value.dtype != x.dtype
        if mixed and (not _autocast(x) or torch.float64 in (x.dtype, value.dtype)):  # which autocast leaves alone
            raise TypeError(f"{name}: expected {x.dtype} as input's, found {value.dtype}")
    return x, w, bias


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _expert_logits(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """``(E, N, C)``."""
    if x.dim() == 3:
        return torch.bmm(x, w.mT) if b is None else torch.baddbmm(b.unsqueeze(1), x, w.mT)
    # One product, whose backward adds up what the experts want of the features by itself.
    z: Tensor = F.linear(x, w.flatten(0, 1), None if b is None else b.flatten()).unflatten(1, w.shape[:2])
    return z.transpose(0, 1)


def _mean_logits(x: Tensor, w: Tensor, b: Tensor | None, weight: Tensor | None, kind: ExpertWeights) -> Tensor:
    """``sum_e s_e (x_e W_e^T + b_e)`` with shares s that add up to 1."""
    by_sample = kind == ExpertWeights.SAMPLE
    share = None if weight is None else weight / weight.sum(dim=1 if by_sample else 0, keepdim=True)
    if x.dim() == 2 and not by_sample:  # few classifiers, or in a graph, which then runs where ltkernels is not
        return F.linear(x, averaged(w, share), None if b is None else averaged(b, share))
    constant = None
    if b is not None:
        constant = b.sum(dim=0) if share is None else share.to(b.dtype) @ b if by_sample else averaged(b, share)
    if share is not None and kind == ExpertWeights.CLASS:
        w = (w * share.unsqueeze(-1)).to(w.dtype)
    elif share is not None:
        x = (x * (share.t().unsqueeze(-1) if by_sample else share[:, None, None])).to(x.dtype)
    # The products add up in the result. Its gradient is one product for all W_e and one for all x_e.
    total = torch.addbmm(x.new_zeros(()) if constant is None else constant, x, w.mT)
    return total.div_(len(w)) if share is None else total  # as alpha it would be multiplied into a copy of W's gradient

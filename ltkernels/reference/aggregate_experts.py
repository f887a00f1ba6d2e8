"""The weighted mean of several experts, in plain PyTorch: the definition.

For sample i and class c, with ``f_e`` the logits, probabilities or log-probabilities of expert e::

    out_ic = sum_e w f_eic / sum_e w            w = 1, w_e, w_ie or w_ec

Probabilities that are weighted by class are not normalised again, and neither are mean log-probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltkernels.ops.options import AggregateExpertsOptions, AggregateMode, ExpertWeights
from ltkernels.reference.cross_entropy import _require


def aggregate_experts(input: Tensor, expert_weight: Tensor | None, options: AggregateExpertsOptions) -> Tensor:
    """``(N, C)`` of ``(E, N, C)`` logits, in their type; computed in float64 for float64, else in float32.

    Args:
        input: the experts' logits.
        expert_weight: ``(E,)``, ``(N, E)`` or ``(E, C)``, as ``options.weights`` says.
        options: the scalars.
    """
    return unrounded(input, expert_weight, options).to(input.dtype)


def unrounded(input: Tensor, expert_weight: Tensor | None, options: AggregateExpertsOptions) -> Tensor:
    """The mean in the type of the computation."""
    z = input.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    if expert_weight is None:
        return _values(z, options).mean(dim=0)
    w = expert_weight.to(z.dtype)
    if options.weights == ExpertWeights.EXPERT:
        w = w[:, None, None]
    elif options.weights == ExpertWeights.SAMPLE:
        w = w.t()[:, :, None]
    else:
        w = w[:, None, :]
    share = w / w.sum(dim=0)
    if options.weights != ExpertWeights.CLASS:  # an expert that counts for nothing has no gradient, even if it is NaN
        z = torch.where((share == 0) & ~torch.isfinite(z.amax(dim=2, keepdim=True)), z.detach(), z)
    f = _values(z, options)
    return (share * torch.where((share == 0) & ~torch.isfinite(f), 0.0, f)).sum(dim=0)  # nothing times -inf is 0


def _values(z: Tensor, options: AggregateExpertsOptions) -> Tensor:
    if options.mode == AggregateMode.PROBS:
        return torch.softmax(z, dim=2)
    return torch.log_softmax(z, dim=2) if options.mode == AggregateMode.LOG_PROBS else z


def best(input: Tensor, expert_weight: Tensor | None, options: AggregateExpertsOptions) -> tuple[Tensor, Tensor]:
    """The ``topk`` best classes of each sample, ``(N, k)`` int64, of equal ones the first, and their probabilities.

    A probability is the mean's softmax, or the mean itself where it is one of probabilities.
    """
    with torch.no_grad():
        mean = unrounded(input, expert_weight, options)
        place = torch.argsort(mean, dim=1, descending=True, stable=True)[:, : options.topk]
        probability = mean if options.mode == AggregateMode.PROBS else torch.softmax(mean, dim=1)
        return place, probability.gather(1, place)


def check_values(expert_weight: Tensor | None, options: AggregateExpertsOptions) -> None:
    """Raise on values no backend may accept; reads the tensors, so it is called for CPU tensors only."""
    if expert_weight is None:
        return
    _require("expert_weight", expert_weight, torch.isfinite(expert_weight) & (expert_weight >= 0), "finite values >= 0")
    total = expert_weight.sum(dim=1 if options.weights == ExpertWeights.SAMPLE else 0)
    if not bool((total > 0).all()):
        every = {ExpertWeights.SAMPLE: " for every sample", ExpertWeights.CLASS: " for every class"}
        at = "" if total.dim() == 0 else f" at index {int((total == 0).nonzero()[0])}"
        raise ValueError(
            f"expert_weight: expected an expert with weight > 0{every.get(ExpertWeights(options.weights), '')}, found"
            f" none{at}"
        )

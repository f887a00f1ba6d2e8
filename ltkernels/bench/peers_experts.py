"""Losses and mean of several experts, as ltkernels computes them and as they are computed today. As in peers.py.

The logits are ``(EXPERTS, N, C)``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ltkernels import functional
from ltkernels.bench.peers import SCALE, LossFn, Variant, margins, widen
from ltkernels.bench.scenarios import Problem

EXPERTS = 3
DIVERSITY, REWEIGHT = -0.2, 0.05
TAU, EPS = 2.0, 1e-9


def _scaled_margins(problem: Problem) -> Tensor:
    """LDAM's, times the factor that the logits of a cosine head come with."""
    return SCALE * margins(problem.class_counts)


def _temperature(problem: Problem) -> Tensor:
    """RIDE's temperature of each class: near 1 for frequent ones."""
    counts = problem.class_counts.double()
    k = len(counts) * counts / counts.sum() * REWEIGHT + 1 - REWEIGHT
    return k / k.max()


def ride_ours(problem: Problem) -> LossFn:
    margin = _scaled_margins(problem).float()
    return lambda x, y: functional.expert_cross_entropy(x, y, class_margin=margin, diversity_factor=DIVERSITY)


def ride_late_ours(problem: Problem) -> LossFn:
    margin, temperature = _scaled_margins(problem).float(), _temperature(problem).float()
    return lambda x, y: functional.expert_cross_entropy(
        x, y, problem.weight, class_margin=margin, diversity_factor=DIVERSITY, diversity_temperature=temperature
    )


def _ride(problem: Problem, dtype: torch.dtype, late: bool) -> LossFn:
    """The mean's distribution once; each margin moved in place in the copy that autograd needs."""
    margin, weight = _scaled_margins(problem).to(dtype), problem.weight.to(dtype) if late else None
    temperature = _temperature(problem).to(dtype) if late else None
    factor = DIVERSITY * (1.0 if temperature is None else float(temperature.mean()) ** 2)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = widen(x)
        label, shift = y.unsqueeze(1), -margin[y].unsqueeze(1)
        soft = z if temperature is None else z / temperature
        with torch.no_grad():
            mean = z.mean(dim=0)
            pm = F.softmax(mean if temperature is None else mean / temperature, dim=1)
        total = z.new_zeros(())
        for e in range(len(z)):
            moved = z[e].clone()
            moved.scatter_add_(1, label, shift)
            total = total + F.cross_entropy(moved, y, weight)
            total = total + factor * F.kl_div(F.log_softmax(soft[e], dim=1), pm, reduction="batchmean")
        return total

    return loss


def _ride_published(problem: Problem, dtype: torch.dtype, late: bool) -> LossFn:
    """A mask and a product of matrices for each expert's margins, the mean's distribution and ``item()`` for each."""
    margin, weight = margins(problem.class_counts).to(dtype), problem.weight.to(dtype) if late else None
    temperatures = _temperature(problem).to(dtype).view(1, -1) if late else None

    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits = widen(x)
        output = logits.mean(dim=0)
        total: Tensor | float = 0
        for e in range(len(logits)):
            z = logits[e]
            is_target = torch.zeros_like(z, dtype=torch.bool).scatter_(1, y.unsqueeze(1), True)
            row_margin = torch.matmul(margin.unsqueeze(0), is_target.to(z.dtype).t()).view(-1, 1)
            total = total + F.cross_entropy(torch.where(is_target, z - row_margin * SCALE, z), y, weight)
            temperature = 1.0 if temperatures is None else temperatures
            mean = 1.0 if temperatures is None else temperatures.mean().item()
            log_p = F.log_softmax(z / temperature, dim=1)
            with torch.no_grad():
                pm = F.softmax(output / temperature, dim=1)
            total = total + DIVERSITY * mean * mean * F.kl_div(log_p, pm, reduction="batchmean")
        assert isinstance(total, Tensor)
        return total

    return loss


def _sade_bias(problem: Problem) -> Tensor:
    """Biases of the three experts: none, the prior's, the prior's against the inverse prior's."""
    prior = (problem.class_counts / problem.class_counts.sum()).double()
    order = torch.argsort(prior, stable=True)
    inverse = torch.empty_like(prior)
    inverse[order] = prior[order.flip(0)]
    log_prior = (prior + EPS).log()
    return torch.stack([torch.zeros_like(prior), log_prior, log_prior - TAU * (inverse + EPS).log()])


def sade_ours(problem: Problem) -> LossFn:
    bias = _sade_bias(problem).float()
    return lambda x, y: functional.expert_cross_entropy(x, y, class_bias=bias)


def sade(problem: Problem, dtype: torch.dtype) -> LossFn:
    bias = _sade_bias(problem).to(dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = widen(x) + bias.unsqueeze(1)
        return len(z) * F.cross_entropy(z.flatten(0, 1), y.repeat(len(z)))

    return loss


def sade_published(problem: Problem, dtype: torch.dtype) -> LossFn:
    """The inverse prior is sorted anew, and both logarithms taken, in every call."""
    prior = (problem.class_counts / problem.class_counts.sum()).to(dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = widen(x)
        value, first = torch.sort(prior)
        _, rank = torch.sort(first)
        inverse = value.index_select(0, len(prior) - 1 - rank)
        total = F.cross_entropy(z[0], y)
        total = total + F.cross_entropy(z[1] + torch.log(prior + EPS), y)
        return total + F.cross_entropy(z[2] + torch.log(prior + EPS) - TAU * torch.log(inverse + EPS), y)

    return loss


def aggregate_ours(problem: Problem) -> LossFn:
    def output(x: Tensor, y: Tensor) -> Tensor:
        result = functional.aggregate_experts(x, mode="probs")
        assert isinstance(result, Tensor)
        return result

    return output


def aggregate(problem: Problem, dtype: torch.dtype) -> LossFn:
    return lambda x, y: F.softmax(widen(x), dim=2).mean(dim=0).to(x.dtype)


EXPERT_VARIANTS: tuple[Variant, ...] = (
    Variant(
        "ride", "RIDE", ride_ours, lambda p, dtype: _ride(p, dtype, False),
        lambda p, dtype: _ride_published(p, dtype, False), op="experts", experts=EXPERTS,
    ),
    Variant(
        "ride_late", "RIDE, deferred weights on", ride_late_ours, lambda p, dtype: _ride(p, dtype, True),
        lambda p, dtype: _ride_published(p, dtype, True), op="experts", experts=EXPERTS,
    ),
    Variant("sade", "SADE", sade_ours, sade, sade_published, op="experts", experts=EXPERTS),
    Variant("aggregate_probs", "mean of probabilities", aggregate_ours, aggregate, op="experts", experts=EXPERTS),
)  # fmt: skip

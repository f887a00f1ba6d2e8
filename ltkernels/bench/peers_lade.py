"""Prior cross-entropy with LADE's regulariser, as ltkernels computes it and as it is computed today. As in peers.py."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ltkernels import functional
from ltkernels.bench.peers import LossFn, Variant, widen
from ltkernels.bench.scenarios import Problem

LAMBDA, WEIGHT, EPS, COUNT_EPS = 0.1, 0.1, 1e-9, 1e-8


def _prior(problem: Problem) -> Tensor:
    counts = problem.class_counts.double()
    return counts / counts.sum()


def _tables(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Prior, its logarithm, and the logarithm of uniform over prior."""
    prior = _prior(problem)
    log_prior = (prior + EPS).log()
    return prior.to(dtype), log_prior.to(dtype), (math.log(1 / len(prior) + EPS) - log_prior).to(dtype)


def lade_ours(problem: Problem) -> LossFn:
    prior, bias, offset = _tables(problem, torch.float32)
    return lambda x, y: functional.lade_cross_entropy(
        x, y, prior, class_bias=bias, class_offset=offset, remine_lambda=LAMBDA, weight=WEIGHT
    )


def lade(problem: Problem, dtype: torch.dtype) -> LossFn:
    """The label's logits are gathered and added up by class, instead of masked."""
    prior, bias, offset = _tables(problem, dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = widen(x)
        own = z.gather(1, y.unsqueeze(1))[:, 0]
        counts = torch.zeros_like(prior).index_add(0, y, torch.ones_like(own))
        first = torch.zeros_like(prior).index_add(0, y, own) / (counts + COUNT_EPS)
        bound = torch.logsumexp(z, dim=0) - math.log(len(z)) + offset
        regulariser = -(prior * (first - bound - LAMBDA * bound.square())).sum()
        return F.cross_entropy(z + bias, y) + WEIGHT * regulariser

    return loss


def lade_published(problem: Problem, dtype: torch.dtype) -> LossFn:
    """A mask of classes and rows picks the label's logits of the transposed batch."""
    prior = _prior(problem).to(dtype)
    uniform = torch.full_like(prior, 1 / len(prior))
    classes = torch.arange(len(prior), device=prior.device).unsqueeze(1)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = widen(x)
        prior_loss = F.cross_entropy(z + torch.log(prior + EPS), y)
        is_own = (classes == y).to(dtype)
        count = is_own.sum(dim=-1)
        first = (is_own * z.t()).sum(dim=-1) / (count + COUNT_EPS)
        bound = torch.logsumexp(z, dim=0) - math.log(len(z)) - torch.log(prior + EPS) + torch.log(uniform + EPS)
        remine = first - (bound + LAMBDA * bound**2)
        return prior_loss - WEIGHT * (prior * remine).sum()

    return loss


LADE_VARIANTS: tuple[Variant, ...] = (Variant("lade", "LADE", lade_ours, lade, lade_published, op="lade"),)

"""Who is measured: each loss as ltkernels computes it, and as it is computed today.

Ours is the call of :mod:`ltkernels.functional`, since the others are functions too; ``ltkernels module`` is the call of
the loss module. Every loss has at most four other forms, all written here from the formulas:

* ``eager``: the cheapest way to say it in plain PyTorch;
* ``published``: the way research code says it, where that differs;
* ``compile``: ``torch.compile`` of ``eager``;
* ``imbalanced-losses``: that package, where it computes the same loss.

Two more are no losses and are marked so: ``clone`` copies the logits into fresh memory (the copy bandwidth), and
``empty Function`` is an autograd Function without work (what PyTorch itself charges for a forward and a backward).

Half-precision logits are converted to float32 by the plain forms first, which is what autocast does: without it
their logit adjustments would be rounded to 8 bits and the loss would be another one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ltkernels import functional, losses
from ltkernels.bench.scenarios import Problem
from ltkernels.losses.base import AdjustedCrossEntropy

LossFn = Callable[[Tensor, Tensor], Tensor]

OURS = "ltkernels"
MODULE = "ltkernels module"
EAGER = "eager"
PUBLISHED = "published"
COMPILE = "compile"
LIBRARY = "imbalanced-losses"
CLONE = "clone"
EMPTY = "empty Function"
NOT_LOSSES = (CLONE, EMPTY)

TAU = 1.0
MAX_M = 0.5
SCALE = 30.0
VS_GAMMA = 0.3
FOCAL_GAMMA = 2.0
SMOOTHING = 0.1


def widen(x: Tensor) -> Tensor:
    """Half logits to float32, as autocast hands them to a loss."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def log_prior(counts: Tensor) -> Tensor:
    return TAU * (counts.double() / counts.sum()).log()


def margins(counts: Tensor) -> Tensor:
    """LDAM's margins, the rarest class at MAX_M (Cao et al. 2019, section 3.1)."""
    quarter = counts.double().pow(-0.25)
    return MAX_M * quarter / quarter.max()


def ce(problem: Problem, dtype: torch.dtype) -> LossFn:
    return lambda x, y: F.cross_entropy(widen(x), y)


def ce_weight_smoothing(problem: Problem, dtype: torch.dtype) -> LossFn:
    weight = problem.weight.to(dtype)
    return lambda x, y: F.cross_entropy(widen(x), y, weight=weight, label_smoothing=SMOOTHING)


def la_weight(problem: Problem, dtype: torch.dtype) -> LossFn:
    weight, adjustment = problem.weight.to(dtype), log_prior(problem.class_counts).to(dtype)
    return lambda x, y: F.cross_entropy(widen(x) + adjustment, y, weight=weight)


def la_weight_published(problem: Problem, dtype: torch.dtype) -> LossFn:
    """Balanced softmax (Ren et al. 2020, eq. 4): log of the counts, expanded to the batch at every call."""
    weight, counts = problem.weight.to(dtype), problem.class_counts.to(dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        wide = widen(x)
        return F.cross_entropy(wide + counts.unsqueeze(0).expand(wide.shape[0], -1).log(), y, weight=weight)

    return loss


def ldam(problem: Problem, dtype: torch.dtype) -> LossFn:
    """The scaled copy that autograd needs anyway takes the margins in place, one element a row."""
    shift = (-SCALE * margins(problem.class_counts)).to(dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        scaled = widen(x) * SCALE
        scaled.scatter_add_(1, y.unsqueeze(1), shift[y].unsqueeze(1))
        return F.cross_entropy(scaled, y)

    return loss


def ldam_published(problem: Problem, dtype: torch.dtype) -> LossFn:
    """One-hot mask, margins picked by a matrix product, a shifted copy of the logits, a select between the two."""
    margin = margins(problem.class_counts).to(dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        wide = widen(x)
        is_target = torch.zeros_like(wide, dtype=torch.bool).scatter_(1, y.unsqueeze(1), True)
        row_margin = torch.matmul(margin.unsqueeze(0), is_target.to(wide.dtype).t()).view(-1, 1)
        return F.cross_entropy(SCALE * torch.where(is_target, wide - row_margin, wide), y)

    return loss


def _vs_tables(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    counts = problem.class_counts.double()
    return (counts / counts.max()).pow(VS_GAMMA).to(dtype), log_prior(problem.class_counts).to(dtype)


def vs(problem: Problem, dtype: torch.dtype) -> LossFn:
    scale, bias = _vs_tables(problem, dtype)
    return lambda x, y: F.cross_entropy(torch.addcmul(bias, widen(x), scale), y)


def vs_published(problem: Problem, dtype: torch.dtype) -> LossFn:
    """Divide by the multiplicative adjustment, then add the additive one (Kini et al. 2021, eq. 2)."""
    scale, bias = _vs_tables(problem, dtype)
    divisor = 1 / scale
    return lambda x, y: F.cross_entropy(widen(x) / divisor + bias, y)


def focal(problem: Problem, dtype: torch.dtype) -> LossFn:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        cross_entropy = F.cross_entropy(widen(x), y, reduction="none")
        return ((1 - torch.exp(-cross_entropy)) ** FOCAL_GAMMA * cross_entropy).mean()

    return loss


def focal_library(problem: Problem) -> LossFn | None:
    """imbalanced-losses' focal loss without alpha is the same function; it has none of the other losses."""
    try:
        package = importlib.import_module("imbalanced_losses")
    except ImportError:
        return None
    module: Any = package.SoftmaxFocalLoss(gamma=FOCAL_GAMMA, gather_distributed=False)
    return lambda x, y: module(widen(x), y)


@dataclass(frozen=True)
class Learning:
    """A loss of frozen logits: the gradient that is measured is that of what it learns, not of the logits."""

    call: LossFn
    learned: tuple[Tensor, ...]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call(x.detach(), y)


@dataclass(frozen=True)
class Variant:
    """One loss: ours as users construct it, and the forms it is compared with.

    Attributes:
        name: identifier in records and on the command line.
        title: for tables.
        cosine: the loss expects logits in [-1, 1].
        ours: the module of ``ltk.losses``, or a call of ours where no module has the batch's other inputs.
        eager: the cheapest plain form; in float64 it is also the truth that errors are measured against.
        published: the form of research code, where it is another one.
        library: a form from another package; ``None`` where that is not installed.
        op: whose list it is in.
        experts: the logits are those of so many experts, ``(experts, N, C)``; 0 for ``(N, C)``.
    """

    name: str
    title: str
    ours: Callable[[Problem], LossFn]
    eager: Callable[[Problem, torch.dtype], LossFn]
    published: Callable[[Problem, torch.dtype], LossFn] | None = None
    library: Callable[[Problem], LossFn | None] | None = None
    cosine: bool = False
    op: str = "cross_entropy"
    experts: int = 0


VARIANTS: tuple[Variant, ...] = (
    Variant("ce", "CE", lambda p: losses.CrossEntropyLoss(), ce),
    Variant(
        "ce_weight_smoothing",
        "CE + weight + smoothing",
        lambda p: losses.CrossEntropyLoss(p.weight, label_smoothing=SMOOTHING),
        ce_weight_smoothing,
    ),
    Variant(
        "la_weight",
        "LA + weight",
        lambda p: losses.LogitAdjustedLoss(p.class_counts, tau=TAU, weight=p.weight),
        la_weight,
        la_weight_published,
    ),
    Variant(
        "ldam",
        "LDAM",
        lambda p: losses.LDAMLoss(p.class_counts, max_m=MAX_M, s=SCALE),
        ldam,
        ldam_published,
        cosine=True,
    ),
    Variant("vs", "VS", lambda p: losses.VSLoss(p.class_counts, gamma=VS_GAMMA, tau=TAU), vs, vs_published),
    Variant("focal", "focal", lambda p: losses.FocalLoss(gamma=FOCAL_GAMMA), focal, library=focal_library),
)


class EmptyFunction(torch.autograd.Function):
    """Allocates what a loss has to return, computes nothing: the floor that PyTorch sets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape, ctx.options = x.shape, {"dtype": x.dtype, "device": x.device}
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return torch.empty(ctx.shape, **ctx.options)


def empty_function(x: Tensor, y: Tensor) -> Tensor:
    result: Tensor = EmptyFunction.apply(x)  # type: ignore[no-untyped-call]
    return result


def our_function(variant: Variant, problem: Problem) -> LossFn:
    """Ours as a call of a function: the one that the module makes, with its tables at hand as the other forms have."""
    ours = variant.ours(problem)
    if not isinstance(ours, AdjustedCrossEntropy):
        return ours
    arguments = ours.to(problem.logits.device)._arguments()
    return lambda x, y: functional.cross_entropy(x, y, **arguments)


def loss_forms(variant: Variant, problem: Problem, dtype: torch.dtype) -> dict[str, LossFn]:
    """Every form of ``variant`` that runs here, compiled ones aside, ours first.

    Args:
        variant: the loss.
        problem: inputs, for the class counts and weights.
        dtype: type that the tables (weights, adjustments, margins) take in the plain forms.
    """
    forms: dict[str, LossFn] = {OURS: our_function(variant, problem)}
    module = variant.ours(problem)
    if isinstance(module, torch.nn.Module):
        forms[MODULE] = module.to(problem.logits.device)
    forms[EAGER] = variant.eager(problem, dtype)
    if variant.published is not None:
        forms[PUBLISHED] = variant.published(problem, dtype)
    if variant.library is not None and (library := variant.library(problem)) is not None:
        forms[LIBRARY] = library
    return forms


def compiled(form: LossFn) -> LossFn:
    """``torch.compile`` for this shape alone.

    ``fullgraph`` makes a silent fall-back to eager an error; the cache of earlier shapes is dropped because the
    eighth recompilation of one function would be refused.
    """
    torch._dynamo.reset()
    if isinstance(form, Learning):
        return Learning(torch.compile(form.call, fullgraph=True, dynamic=False), form.learned)
    result: LossFn = torch.compile(form, fullgraph=True, dynamic=False)
    return result

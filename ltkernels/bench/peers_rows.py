"""The losses whose adjustments depend on the row, as ltkernels computes them and as they are computed today.

As in peers.py; the forms are written here from the formulas. Where a second label or a gate belongs to the batch, it
is drawn from the labels' distribution with a seed of its own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ltkernels import functional, losses
from ltkernels.bench.peers import Learning, LossFn, Variant, widen
from ltkernels.bench.scenarios import Problem

LAM = 0.3
P, Q, EPS = 0.8, 2.0, 1e-2
SCALE, ANGLE = 64.0, 0.5
HEAD, TAIL = 0.3, 0.0
ALPHA, INFLUENCE_EPS = 1e4, 1e-3
RARE = 4.3e-4


def _second_labels(problem: Problem) -> Tensor:
    return problem.target.flip(0)


def two_labels_ours(problem: Problem) -> LossFn:
    other, weight = _second_labels(problem), problem.weight
    return lambda x, y: functional.cross_entropy(x, (y, other, LAM), weight=weight)


def two_labels(problem: Problem, dtype: torch.dtype) -> LossFn:
    """One log softmax for both labels; each label's mean is over its own weights."""
    other, weight = _second_labels(problem), problem.weight.to(dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        log_p = torch.log_softmax(widen(x), dim=1)
        return LAM * F.nll_loss(log_p, y, weight) + (1 - LAM) * F.nll_loss(log_p, other, weight)

    return loss


def two_labels_published(problem: Problem, dtype: torch.dtype) -> LossFn:
    """Mixup as every training script has it: the criterion called twice."""
    other, weight = _second_labels(problem), problem.weight.to(dtype)
    return lambda x, y: (
        LAM * F.cross_entropy(widen(x), y, weight) + (1 - LAM) * F.cross_entropy(widen(x), other, weight)
    )


def seesaw_ours(problem: Problem) -> LossFn:
    module = losses.SeesawLoss(len(problem.class_counts)).to(problem.logits.device)
    return module


def _seesaw(z: Tensor, y: Tensor, log_n: Tensor) -> Tensor:
    """In the log domain, row by row: no C x C matrix."""
    log_p = torch.log_softmax(z.detach(), dim=1)
    label = y.unsqueeze(1)
    least = log_p.gather(1, label).clamp(min=math.log(EPS))
    term = P * (log_n - log_n[label]).clamp(max=0) + Q * (log_p - least).clamp(min=0)
    return F.cross_entropy(z + term.scatter(1, label, 0.0), y)


def seesaw(problem: Problem, dtype: torch.dtype) -> LossFn:
    """The counts are those of the labels seen so far, this batch included."""
    counts = torch.zeros_like(problem.class_counts)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        counts.scatter_add_(0, y, torch.ones_like(y))
        return _seesaw(widen(x), y, counts.clamp(min=1).to(dtype).log())

    return loss


def seesaw_fixed(problem: Problem, dtype: torch.dtype) -> LossFn:
    """The counts are those of the data set, so that every call has the same values."""
    log_n = problem.class_counts.to(dtype).log()
    return lambda x, y: _seesaw(widen(x), y, log_n)


def seesaw_fixed_ours(problem: Problem) -> LossFn:
    counts = problem.class_counts
    return lambda x, y: functional.seesaw_cross_entropy(x, y, counts)


def seesaw_published(problem: Problem, dtype: torch.dtype) -> LossFn:
    """Factors of a C x C matrix of count ratios and of probability ratios; a loop over the batch's classes counts."""
    counts = torch.zeros(len(problem.class_counts), dtype=dtype, device=problem.logits.device)
    classes = len(counts)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        for label in y.unique():
            counts[label] += (y == label).sum()
        wide = widen(x)
        is_target = F.one_hot(y, classes)
        ratios = counts[None, :].clamp(min=1) / counts[:, None].clamp(min=1)
        rarer = (ratios < 1.0).to(dtype)
        mitigation = (ratios.pow(P) * rarer + (1 - rarer))[y, :]
        scores = F.softmax(wide.detach(), dim=1)
        own = scores.gather(1, y.unsqueeze(1))
        relative = scores / own.clamp(min=EPS)
        above = (relative > 1.0).to(dtype)
        compensation = relative.pow(Q) * above + (1 - above)
        return F.cross_entropy(wide + (mitigation * compensation).log() * (1 - is_target), y)

    return loss


def arcface_ours(problem: Problem) -> LossFn:
    return losses.ArcFaceLoss(ANGLE, SCALE)


def arcface(problem: Problem, dtype: torch.dtype) -> LossFn:
    """The angle of the label alone; the scaled copy that autograd needs anyway takes it in place."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        wide = widen(x)
        cosine = wide.gather(1, y.unsqueeze(1))
        sine = (1 - cosine.square()).clamp(min=1e-12).sqrt()
        moved = cosine * math.cos(ANGLE) - sine * math.sin(ANGLE)
        moved = torch.where(cosine > -math.cos(ANGLE), moved, cosine - ANGLE * math.sin(ANGLE))
        scaled = wide * SCALE
        scaled.scatter_add_(1, y.unsqueeze(1), SCALE * (moved - cosine))
        return F.cross_entropy(scaled, y)

    return loss


def arcface_published(problem: Problem, dtype: torch.dtype) -> LossFn:
    """A margin head: sine and moved cosine of all classes, a one-hot mask that picks the label's."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        cosine = widen(x)
        sine = torch.sqrt((1.0 - torch.pow(cosine, 2)).clamp(1e-12, 1))
        phi = cosine * math.cos(ANGLE) - sine * math.sin(ANGLE)
        phi = torch.where(cosine > -math.cos(ANGLE), phi, cosine - ANGLE * math.sin(ANGLE))
        is_target = torch.zeros_like(cosine).scatter_(1, y.unsqueeze(1), 1)
        return F.cross_entropy((is_target * phi + (1.0 - is_target) * cosine) * SCALE, y)

    return loss


def _class_smoothing(problem: Problem, dtype: torch.dtype) -> Tensor:
    counts = problem.class_counts.double()
    rise = (counts - counts.min()) / (counts.max() - counts.min())
    return (TAIL + (HEAD - TAIL) * torch.sin(rise * math.pi / 2)).to(dtype)


def label_aware_ours(problem: Problem) -> LossFn:
    smoothing = _class_smoothing(problem, torch.float32)
    return lambda x, y: functional.cross_entropy(x, y, label_smoothing=smoothing)


def label_aware(problem: Problem, dtype: torch.dtype) -> LossFn:
    smoothing = _class_smoothing(problem, dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        log_p = torch.log_softmax(widen(x), dim=1)
        eps = smoothing[y]
        return ((eps - 1) * log_p.gather(1, y.unsqueeze(1))[:, 0] - eps * log_p.mean(dim=1)).mean()

    return loss


def _feature_norm(problem: Problem, dtype: torch.dtype) -> Tensor:
    return (problem.target.flip(0) % 17 + 5).to(dtype)


def influence_ours(problem: Problem) -> LossFn:
    norm = _feature_norm(problem, torch.float32)
    return lambda x, y: functional.cross_entropy(
        x, y, feature_norm=norm, influence_alpha=ALPHA, influence_eps=INFLUENCE_EPS
    )


def influence(problem: Problem, dtype: torch.dtype) -> LossFn:
    """With ``|p - onehot| = 2 (1 - p_y)``, a number a row."""
    norm = _feature_norm(problem, dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        cross_entropy = F.cross_entropy(widen(x), y, reduction="none")
        distance = -2 * torch.expm1(-cross_entropy)
        return (cross_entropy * ALPHA / (distance * norm + INFLUENCE_EPS)).mean()

    return loss


def influence_published(problem: Problem, dtype: torch.dtype) -> LossFn:
    """Influence-balanced loss: the distance is summed over all classes."""
    norm = _feature_norm(problem, dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        wide = widen(x)
        distance = (F.softmax(wide, dim=1) - F.one_hot(y, wide.shape[1])).abs().sum(dim=1)
        factor = ALPHA / (distance * norm + INFLUENCE_EPS)
        return (F.cross_entropy(wide, y, reduction="none") * factor).mean()

    return loss


def _rare(problem: Problem) -> Tensor:
    return problem.class_counts / problem.class_counts.sum() <= RARE


def equalization_ours(problem: Problem) -> LossFn:
    rare = _rare(problem)
    return lambda x, y: functional.equalization_cross_entropy(x, y, rare, drop_rate=1.0)


def equalization(problem: Problem, dtype: torch.dtype) -> LossFn:
    """All draws are made and all of them drop, so that every form has the same values."""
    rare = _rare(problem)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        wide = widen(x)
        leaves = (torch.rand_like(wide) < 1.0) & rare
        leaves.scatter_(1, y.unsqueeze(1), False)
        return F.cross_entropy(wide.masked_fill(leaves, -math.inf), y)

    return loss


def equalization_published(problem: Problem, dtype: torch.dtype) -> LossFn:
    """Softmax equalization (Tan et al. 2020, eq. 8): exponentials times a mask of draws, rare classes and labels."""
    rare = _rare(problem).to(dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        wide = widen(x)
        drawn = (torch.rand_like(wide) < 1.0).to(dtype)
        is_target = F.one_hot(y, wide.shape[1]).to(dtype)
        weight = 1 - drawn * rare * (1 - is_target)
        exponentials = weight * torch.exp(wide - wide.max(dim=1, keepdim=True).values)
        log_p = torch.log((exponentials / exponentials.sum(dim=1, keepdim=True)).clamp(min=1e-30))
        return F.nll_loss(log_p, y)

    return loss


def _learned(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and bias of the classes and confidence of the rows, in the middle of their training."""
    generator = torch.Generator(problem.logits.device).manual_seed(2)
    rows, classes = problem.logits.shape
    device = problem.logits.device
    values = [torch.rand(size, generator=generator, device=device) for size in (classes, classes, rows)]
    scale, bias, gate = (value.to(dtype).requires_grad_() for value in values)
    return scale, bias, gate


def lws_ours(problem: Problem) -> LossFn:
    scale = _learned(problem, torch.float32)[0]
    return Learning(lambda x, y: functional.cross_entropy(x, y, class_scale=scale), (scale,))


def lws(problem: Problem, dtype: torch.dtype) -> LossFn:
    scale = _learned(problem, dtype)[0]
    return Learning(lambda x, y: F.cross_entropy(widen(x) * scale, y), (scale,))


def disalign_ours(problem: Problem) -> LossFn:
    scale, bias, gate = _learned(problem, torch.float32)
    return Learning(
        lambda x, y: functional.cross_entropy(x, y, problem.weight, class_scale=scale, class_bias=bias, row_gate=gate),
        (scale, bias, gate),
    )


def disalign(problem: Problem, dtype: torch.dtype) -> LossFn:
    """One affine map of the logits by the row's gate."""
    scale, bias, gate = _learned(problem, dtype)
    weight = problem.weight.to(dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        wide = widen(x)
        return F.cross_entropy(wide + gate.unsqueeze(1) * torch.addcmul(bias, wide, scale), y, weight)

    return Learning(loss, (scale, bias, gate))


def disalign_published(problem: Problem, dtype: torch.dtype) -> LossFn:
    """DisAlign: the confidence mixes the calibrated and the plain logits."""
    scale, bias, gate = _learned(problem, dtype)
    weight = problem.weight.to(dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        wide = widen(x)
        confidence = gate.unsqueeze(1)
        mixed = confidence * ((1 + scale).repeat(1, 1) * wide + bias.repeat(1, 1)) + (1 - confidence) * wide
        return F.cross_entropy(mixed, y, weight)

    return Learning(loss, (scale, bias, gate))


ROW_VARIANTS: tuple[Variant, ...] = (
    Variant(
        "two_labels", "two labels (mixup) + weight", two_labels_ours, two_labels, two_labels_published,
        op="row_cross_entropy",
    ),
    Variant("seesaw", "seesaw", seesaw_ours, seesaw, seesaw_published, op="row_cross_entropy"),
    Variant(
        "arcface", "ArcFace", arcface_ours, arcface, arcface_published, cosine=True, op="row_cross_entropy"
    ),
    Variant("label_aware", "label-aware smoothing", label_aware_ours, label_aware, op="row_cross_entropy"),
    Variant(
        "influence", "influence-balanced", influence_ours, influence, influence_published, op="row_cross_entropy"
    ),
    Variant(
        "equalization", "softmax equalization", equalization_ours, equalization, equalization_published,
        op="row_cross_entropy",
    ),
    Variant("lws", "LWS, frozen logits", lws_ours, lws, op="row_cross_entropy"),
    Variant(
        "disalign", "DisAlign, frozen logits", disalign_ours, disalign, disalign_published, op="row_cross_entropy"
    ),
)  # fmt: skip
SEESAW_FIXED = Variant("seesaw_fixed", "seesaw, fixed counts", seesaw_fixed_ours, seesaw_fixed, op="row_cross_entropy")

"""Sigmoid cross-entropy of weighted, focused, masked columns in plain PyTorch: the definition.

For row i with logits ``z``, targets ``t`` in [0, 1] (for labels ``t_j = [j = y]``) and the options of
:func:`ltkernels.functional.binary_cross_entropy`::

    h(z; g, m) = -q^g log(1 - q),   q = max(sigmoid(z) - m, 0)      without m: sigmoid(z)^g softplus(z)
    l_ij = r_i (t A+ w+_j h(-z_ij; g+, 0)  +  (1 - t) A- w-_j k_ij h(z_ij; g-, m))

``r_i`` is the row's sample weight times the weight of its label, ``k_ij`` 1 where the negative is kept and 0 where it
is not. A row's loss is the sum over its columns. It is never ``log1p(exp(-z))``, which overflows: ``logsigmoid`` is
exact everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ltkernels.ops.options import BinaryCrossEntropyOptions, Reduction
from ltkernels.reference.cross_entropy import _masked_product, _require
from ltkernels.reference.sampling import philox

NEGATIVE_DROPS = 5  # stream, as in csrc/common/philox.h


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    neg_weight: Tensor | None,
    foreground_keep: Tensor | None,
    background_keep: Tensor | None,
    sample_weight: Tensor | None,
    draw_step: Tensor | None,
    options: BinaryCrossEntropyOptions,
) -> Tensor:
    """The loss of ``(N, C)`` or ``(N, C, D)`` logits, reduced as ``options.reduction`` says.

    Args:
        input: logits, floating.
        target: labels ``(N,)`` or ``(N, D)`` of an integer type, or floating targets in [0, 1] of ``input``'s shape.
        weight: ``(C,)`` weight of the row with that label, for labels.
        pos_weight: ``(C,)`` weight of positive terms.
        neg_weight: ``(C,)`` weight of negative terms.
        foreground_keep: ``(C,)`` probability that a negative of a foreground row is kept.
        background_keep: the same for background rows.
        sample_weight: row weights of the labels' shape.
        draw_step: 0-d int64: which of the seed's drawings.
        options: the scalars.

    Returns:
        A 0-d tensor, or the labels' shape without reduction; float64 for float64 logits, else float32.
    """
    z, positive, negative, valid, outside = _terms(
        input, target, weight, pos_weight, neg_weight, foreground_keep, background_keep, sample_weight, draw_step,
        options,
    )  # fmt: skip
    loss = _masked_product(positive, _negative(-z, options.gamma_pos, 0.0))
    loss = loss + _masked_product(negative, _negative(z, options.gamma_neg, options.clip))
    # What a GPU backend does without stopping the device; on the CPU check_values has raised before.
    rows = loss.sum(dim=1) * torch.where(outside, torch.nan, 1.0)
    if options.reduction == Reduction.NONE:
        return rows.reshape(*input.shape[:1], *input.shape[2:])
    total = rows.sum()
    if options.reduction == Reduction.SUM:
        return total
    count = valid.sum().to(z.dtype)
    if options.empty_zero:
        return torch.where(count == 0, total * 0.0, total / count.clamp_min(1.0))
    return total / count


def column_sums(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    neg_weight: Tensor | None,
    foreground_keep: Tensor | None,
    background_keep: Tensor | None,
    sample_weight: Tensor | None,
    draw_step: Tensor | None,
    options: BinaryCrossEntropyOptions,
) -> Tensor:
    """``(2, C)``: sums over rows of the sizes of the derivatives of positive and of negative terms, not reduced.

    Without focal factors ``sum_i |sigma - 1| t w`` and ``sum_i sigma (1 - t) w``.
    """
    z, positive, negative, _, outside = _terms(
        input.detach(), target, weight, pos_weight, neg_weight, foreground_keep, background_keep, sample_weight,
        draw_step, options,
    )  # fmt: skip
    wrong = torch.where(outside, torch.nan, 1.0)[:, None]
    sums = [
        (positive * wrong * _slope(-z, options.gamma_pos, 0.0)).sum(0),
        (negative * wrong * _slope(z, options.gamma_neg, options.clip)).sum(0),
    ]
    return torch.stack(sums).detach()


def _terms(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    neg_weight: Tensor | None,
    foreground_keep: Tensor | None,
    background_keep: Tensor | None,
    sample_weight: Tensor | None,
    draw_step: Tensor | None,
    options: BinaryCrossEntropyOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits ``(rows, C)``, the coefficients of positive and negative terms, which rows count, which are wrong."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    num_classes = input.shape[1]
    z = input.movedim(1, -1).reshape(-1, num_classes).to(dtype)
    if target.is_floating_point():
        t = target.movedim(1, -1).reshape(-1, num_classes).to(dtype)
        valid = torch.ones_like(z[:, 0], dtype=torch.bool)
        outside = ~valid
        background = ~(t > 0).any(dim=1)
        row_weight = torch.ones_like(z[:, 0])
    else:
        label = target.reshape(-1).long()
        valid = label != options.ignore_index
        background = (label == options.background_index) & valid & (options.background_index >= 0)
        inside = (label >= 0) & (label < num_classes)
        outside = valid & ~inside & ~background
        z = torch.where(valid[:, None], z, 0.0)  # what an ignored row holds, NaN even, reaches nothing
        has_column = valid & inside
        label = torch.where(has_column, label, 0)
        t = torch.zeros_like(z).scatter(1, label[:, None], has_column[:, None].to(dtype))
        row_weight = torch.ones_like(z[:, 0])
        if weight is not None:
            row_weight = torch.where(has_column, weight.to(dtype)[label], row_weight)
    if sample_weight is not None:
        row_weight = row_weight * sample_weight.reshape(-1).to(dtype)
    row_weight = torch.where(valid, row_weight, 0.0)[:, None]
    positive = row_weight * options.alpha_pos * t
    negative = row_weight * options.alpha_neg * (1.0 - t)
    if pos_weight is not None:
        positive = positive * pos_weight.to(dtype)
    if neg_weight is not None:
        negative = negative * neg_weight.to(dtype)
    if foreground_keep is not None or background_keep is not None:
        kept = _kept(z.detach(), background, foreground_keep, background_keep, draw_step, options)
        negative = torch.where(kept, negative, 0.0)
    return z, positive, negative, valid, outside


def _kept(
    z: Tensor,
    background: Tensor,
    foreground_keep: Tensor | None,
    background_keep: Tensor | None,
    draw_step: Tensor | None,
    options: BinaryCrossEntropyOptions,
) -> Tensor:
    """Which negatives are kept ``(rows, C)``: the likely enough, and those whose draw is below the probability.

    A draw is a multiple of 2^-24 in [0, 1), from the first 24 bits of a word of Philox, so that a probability of 1
    always keeps, one of 0 never, and all precisions agree. Column j of row i has word ``j % 4`` of the block at
    position ``i ceil(C / 4) + j // 4``; with draws of rows, row i has word 0 of the block at i.
    """
    rows, num_classes = z.shape
    always = z.new_ones(num_classes)
    fore, back = (always if keep is None else keep.to(z.dtype) for keep in (foreground_keep, background_keep))
    probability = torch.where(background[:, None], back, fore)
    step = torch.zeros((), dtype=torch.int64, device=z.device) if draw_step is None else draw_step.to(z.device)
    blocks = 1 if options.row_draws else -(-num_classes // 4)
    position = torch.arange(rows * blocks, device=z.device)
    words = torch.stack(philox(position, step & 0xFFFFFFFF, NEGATIVE_DROPS, options.seed), dim=1)
    words = words[:, :1] if options.row_draws else words.reshape(rows, 4 * blocks)[:, :num_classes]
    kept = (words >> 8).to(z.dtype) * 2.0**-24 < probability
    return kept | (z >= options.score_logit) if options.scored else kept


def _negative(z: Tensor, gamma: float, clip: float) -> Tensor:
    """``h(z; gamma, clip)``, with its limits where a derivative is 0 times infinity."""
    if clip > 0.0:
        q = (torch.sigmoid(z) - clip).clamp_min(0.0)
        loss = -torch.log1p(-q)
        if gamma > 0.0:
            none = q == 0
            loss = loss * torch.where(none, 0.0, torch.where(none, 1.0, q).pow(gamma))
        return loss
    loss = -logsigmoid(-z)
    if gamma > 0.0:
        infinite = torch.isinf(z)
        finite = torch.where(infinite, 0.0, z)
        # The power in the domain of logarithms, whose derivatives are finite for every exponent.
        focused = torch.exp(gamma * logsigmoid(finite)) * -logsigmoid(-finite)
        loss = torch.where(infinite, loss, focused)  # sigmoid is 0 or 1 there, and the factor at most that
    return loss


def _slope(z: Tensor, gamma: float, clip: float) -> Tensor:
    """``dh/dz``."""
    p, rest = torch.sigmoid(z), torch.sigmoid(-z)
    if clip > 0.0:
        q = (p - clip).clamp_min(0.0)
        some = q > 0
        q = torch.where(some, q, 0.5)
        power = q.pow(gamma)
        return torch.where(some, p * rest * power * (1.0 / (rest + clip) - gamma / q * torch.log1p(-q)), p * 0.0)
    if gamma == 0.0:
        return p
    power = torch.exp(gamma * logsigmoid(z))
    return power * (p + gamma * _masked_product(rest, -logsigmoid(-z)))


def check_values(
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    neg_weight: Tensor | None,
    foreground_keep: Tensor | None,
    background_keep: Tensor | None,
    sample_weight: Tensor | None,
    num_classes: int,
    options: BinaryCrossEntropyOptions,
) -> None:
    """Raise on values no backend may accept; reads the tensors, so it is called for CPU tensors only."""
    for name, value in (
        ("weight", weight), ("pos_weight", pos_weight), ("neg_weight", neg_weight), ("sample_weight", sample_weight),
    ):  # fmt: skip
        if value is not None:
            _require(name, value, torch.isfinite(value) & (value >= 0), "finite values >= 0")
    for name, value in (("foreground_keep", foreground_keep), ("background_keep", background_keep)):
        if value is not None:
            _require(name, value, (value >= 0) & (value <= 1), "probabilities in [0, 1]")
    if target.is_floating_point():
        good = (target >= 0) & (target <= 1)
        if not bool(good.all()):
            at = (~good).nonzero()[0].tolist()
            raise ValueError(f"target: expected values in [0, 1], found {float(target[tuple(at)]):g} at {tuple(at)}")
        return
    label = target.reshape(-1).long()
    beyond = (label < 0) if target.dtype == torch.uint64 else torch.zeros_like(label, dtype=torch.bool)  # 2^63 or more
    good = (label >= 0) & (label < num_classes)
    good |= ((label == options.ignore_index) | ((label == options.background_index) & (label >= 0))) & ~beyond
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        found = int(label[row]) % 2**64 if bool(beyond[row]) else int(label[row])
        background = "" if options.background_index < 0 else f", background_index {options.background_index}"
        raise IndexError(
            f"target: expected labels in [0, {num_classes}){background} or ignore_index {options.ignore_index},"
            f" found {found} at row {row}"
        )

"""The softmax of a row whose classes do not lie in one tensor: blocks of classes, shards of ranks, a sample of classes.

What a row needs of some of its classes is four numbers, which :func:`row_sums` finds; those of all classes follow from
those of the parts (:func:`merged`), whoever holds them. From them :func:`finish` makes the row's loss and what the
gradient needs to know of the row, and :func:`gradient_` writes the gradient over the logits of any part. Exponentials,
sums and gradients are the kernels' of ``cross_entropy``, on every backend; the arithmetic on one number a row is that
of csrc/common/row_loss.h in PyTorch, whose formulas are derived there.

With u the adjusted logits, the label's margin included, and ``m`` near their maximum, the loss of a row is made of
``sum_{j != y} e^(u_j - m)``, ``u_y`` and, with label smoothing, ``sum_j ws_j u_j``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ltkernels import backends
from ltkernels.ops.options import CrossEntropyOptions, Reduction

MAX, OTHERS, LABEL, SMOOTH = range(4)
"""The rows of what :func:`row_sums` returns."""
_ABSENT = -1e20
"""In place of a bias of -inf: e to it is 0, and a part may have no other classes."""


class Shard(NamedTuple):
    """Some of the classes: what is known of them beside their logits."""

    label: Tensor
    """``(N,)`` int64: the place of the row's label among these classes; -1 where the label is elsewhere or the row is
    ignored; their number where the label is no class at all."""
    class_scale: Tensor | None
    """``(c,)``."""
    class_bias: Tensor | None
    """``(c,)``."""
    margin: Tensor | None
    """``(N,)``: of the row's label, read where that is here."""
    smooth: Tensor | None
    """``(c,)``: what label smoothing gives each class: its weight, or 0 where its bias is -inf. None without."""

    def tables(self, logits: Tensor, s: float) -> tuple[Tensor | None, Tensor | None]:
        """Scales and biases as the kernels take them here, with the scale of all classes in them.

        The kernels' states differ in whether ``m`` has that scale. A bias of -inf is not one: no label may have it,
        and any class may stand in for a label that is elsewhere.
        """
        scale, bias = self.class_scale, self.class_bias
        if s != 1.0:
            dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
            scale = logits.new_full((logits.shape[1],), s, dtype=dtype) if scale is None else s * scale
            bias = None if bias is None else s * bias
        return scale, None if bias is None else bias.clamp_min(_ABSENT)


class Rows(NamedTuple):
    """What is known of the rows, the same for all parts; ``(N,)`` unless said, in the type of the computation."""

    valid: Tensor
    """bool: not ignored."""
    weight: Tensor | None
    """The label's class weight; None for 1."""
    sample_weight: Tensor | None
    smooth_total: Tensor | float
    """The sum of ``Shard.smooth`` over all classes, 0-d."""
    reached: Tensor | float
    """The number of classes that label smoothing reaches, 0-d: those whose bias is not -inf."""


def local_labels(target: Tensor, first: int, count: int, classes: int, ignore_index: int) -> Tensor:
    """Labels in ``[0, classes)`` as :class:`Shard` has them, for the classes ``[first, first + count)``."""
    label = target.long()
    inside = (label >= 0) & (label < classes)
    here = (label >= first) & (label < first + count)
    nowhere = ~inside & (label != ignore_index)
    return torch.where(here, label - first, torch.where(nowhere, count, -1))


def row_sums(row: backends.Implementation, logits: Tensor, shard: Shard, options: CrossEntropyOptions) -> Tensor:
    """Finds the four numbers of each row.

    Args:
        row: a backend's implementation of ``cross_entropy``.
        logits: ``(N, c)`` of these classes. Written to, and as before when this returns.
        shard: what else is known of the classes.
        options: the scalars; ``scale`` is read here.

    Returns:
        ``(4, N)``, contiguous, in the type of the computation: ``MAX``, near the largest u; ``OTHERS``, the sum of
        ``e^(u - MAX)`` over the classes other than the label; ``LABEL``, the label's u, -inf where it is not here;
        ``SMOOTH``, the sum of ``smooth * u``.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    here = (shard.label >= 0) & (shard.label < logits.shape[1])
    at = torch.where(here, shard.label, 0)[:, None]
    own = logits.gather(1, at)
    scale, bias = shard.tables(logits, options.scale)
    # Without its label a row's sum is that over the others, and no margin is in the way of its maximum.
    logits.scatter_(1, at, torch.where(here[:, None], -torch.inf, own))
    plain = CrossEntropyOptions(ignore_index=-1, reduction=Reduction.NONE)
    asked = torch.where(shard.label < 0, 0, shard.label)  # any class will do for a label; what is none is reported
    _, state, _ = row.forward(logits, asked, None, scale, bias, None, None, *plain, False)
    logits.scatter_(1, at, own)
    state = state[:-1].view(-1, 4)
    found = torch.empty(4, len(logits), dtype=dtype, device=logits.device)
    alone = state[:, 0] == -torch.inf  # the label is the only class here
    found[MAX] = torch.where(alone, _ABSENT, state[:, 0])
    found[OTHERS] = torch.where(alone, 0.0, state[:, 1].reciprocal())  # 1 / sum is the factor of a plain row
    u = own[:, 0].to(dtype)
    u = u if scale is None else u * scale[at[:, 0]]
    u = u if bias is None else u + bias[at[:, 0]]
    u = u if shard.margin is None else u - options.scale * shard.margin
    found[LABEL] = torch.where(here, u, -torch.inf)
    found[SMOOTH] = 0.0
    if shard.smooth is not None:
        found[SMOOTH] = options.scale * _smooth_sum(logits, shard, at[:, 0], here)
    return found


def _smooth_sum(logits: Tensor, shard: Shard, at: Tensor, here: Tensor) -> Tensor:
    """``sum_j ws_j (a_j x_j + b_j - m_y [j = y])``."""
    assert shard.smooth is not None
    factors = shard.smooth if shard.class_scale is None else shard.smooth * shard.class_scale
    total = torch.mv(logits, factors.to(logits.dtype)).to(factors.dtype)
    if shard.class_bias is not None:
        total = total + (shard.smooth * torch.where(shard.smooth == 0, 0.0, shard.class_bias)).sum()
    if shard.margin is not None:
        total = total - torch.where(here, shard.smooth[at] * shard.margin, 0.0)
    return total


def merged(sums: Tensor) -> Tensor:
    """``(4, N)`` of all classes from ``(parts, 4, N)`` of disjoint parts of them, in any order."""
    label = sums[:, LABEL].amax(dim=0)
    # The label's own e^(u_y - m) has to be finite too.
    top = torch.maximum(sums[:, MAX].amax(dim=0), label)
    others = (sums[:, OTHERS] * (sums[:, MAX] - top).exp()).sum(dim=0)
    return torch.stack((top, others, label, sums[:, SMOOTH].sum(dim=0)))


def finish(sums: Tensor, rows: Rows, options: CrossEntropyOptions) -> tuple[Tensor, Tensor]:
    """The losses of rows from their numbers over all classes, and their states for :func:`gradient_`.

    Args:
        sums: ``(4, N)``, merged.
        rows: what else is known of the rows.
        options: the scalars.

    Returns:
        The row losses ``(N,)``, and ``(N, 4)``: ``m``, the factor of ``e^(u_j - m)``, the factor of ``smooth`` by
        number of classes, and the gradient at the label without what smoothing takes from it.
    """
    eps = options.label_smoothing
    m, others, label = sums[MAX], sums[OTHERS], sums[LABEL]
    at_label = (label - m).exp()
    total = others + at_label
    log_sum = total.log()
    p, rest = at_label / total, others / total
    # log1p keeps the digits of a small loss, which log(sum) + (m - u_y) rounds away.
    nll = torch.where(at_label > others, torch.log1p(others / at_label), m - label + log_sum)
    hard = (1.0 - eps) * (torch.ones_like(m) if rows.weight is None else rows.weight)
    ce = _weighted(hard, nll)
    reached = rows.reached.to(m.dtype) if isinstance(rows.reached, Tensor) else rows.reached
    soft = eps / reached if eps > 0 else 0.0
    if eps > 0:
        ce = ce + soft * (rows.smooth_total * (m + log_sum) - sums[SMOOTH])
    modulation, a, b = _focal(ce, rest, options)
    lse = m + log_sum
    spread = a * soft * rows.smooth_total + 2.0 * options.z_loss * lse
    own = a * hard + b
    r = torch.ones_like(m) if rows.sample_weight is None else rows.sample_weight
    loss = _weighted(modulation, ce)
    if options.z_loss > 0:
        loss = loss + options.z_loss * lse.square()
    state = torch.stack((m, r * (own + spread) / total, r * a * soft, r * (spread * p - own * rest)), dim=1)
    return (
        torch.where(rows.valid, _weighted(r, loss), 0.0),
        torch.where(rows.valid[:, None], state, 0.0),
    )


def _focal(ce: Tensor, rest: Tensor, options: CrossEntropyOptions) -> tuple[Tensor, Tensor, Tensor]:
    """csrc/common/row_loss.h: focal_terms."""
    gamma = options.focal_gamma
    if gamma == 0.0:
        one = torch.ones_like(ce)
        return one, one, torch.zeros_like(ce)
    if options.focal_weighted:
        rest = -torch.expm1(-ce)
    certain = rest <= 0
    rest = torch.where(certain, 1.0, rest)
    modulation = torch.where(certain, 0.0, rest.pow(gamma))
    if options.focal_detached:
        return modulation, modulation, torch.zeros_like(ce)
    p = 1.0 - rest
    slope = torch.where(~certain & (p > 0), ce * gamma * (modulation / rest) * p, 0.0)
    if options.focal_weighted:
        return modulation, modulation + slope, torch.zeros_like(ce)
    return modulation, modulation, slope


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    """A weight of zero takes out an infinite value."""
    return torch.where(weight == 0, 0.0, weight * value)


class TableGradients(NamedTuple):
    """Of the class tables of a part; None where not wanted."""

    class_scale: Tensor | None
    class_bias: Tensor | None


def gradient_(
    row: backends.Implementation,
    upstream: Tensor,
    logits: Tensor,
    state: Tensor,
    shard: Shard,
    options: CrossEntropyOptions,
    need: tuple[bool, bool] = (False, False),
) -> TableGradients:
    """Writes the gradient of the rows' losses over the logits of a part.

    Args:
        row: as of :func:`row_sums`.
        upstream: of the row losses: 0-d, or ``(N,)``.
        logits: ``(N, c)``; holds the gradient when this returns.
        state: ``(N, 4)`` of :func:`finish`.
        shard: what else is known of the classes.
        options: the scalars.
        need: whether the gradients of ``class_scale`` and ``class_bias`` are wanted.
    """
    here = (shard.label >= 0) & (shard.label < logits.shape[1])
    s = options.scale
    scale, bias = shard.tables(logits, s)
    # The kernels write a row's number for its label there. A label that is elsewhere has this class's, the first's.
    u = logits[:, 0].to(state.dtype)
    u = u if scale is None else u * scale[0]
    u = u if bias is None else u + bias[0]
    first = state[:, 1] * (u - state[:, 0]).exp()
    kernel = state.new_ones(4 * len(logits) + 1)
    rows = kernel[:-1].view(-1, 4)
    rows.copy_(state)
    rows[:, 2] = 0.0
    rows[:, 3] = torch.where(here, state[:, 3], first)
    taken = state[:, 2] * upstream  # by smoothing, from each class times its share
    of_scale = None
    if shard.smooth is not None and need[0]:
        of_scale = torch.mv(logits.t(), taken.to(logits.dtype)).to(state.dtype) * (s * shard.smooth)
    plain = CrossEntropyOptions(ignore_index=-1, reduction=Reduction.NONE)
    label = torch.where(here, shard.label, 0)
    _, d_scale, d_bias = row.backward(
        upstream, kernel, logits, label, None, scale, bias, None, None, *plain, True, *need, True
    )
    d_scale, d_bias = s * d_scale, s * d_bias
    if shard.smooth is not None:
        slope = shard.smooth if scale is None else shard.smooth * scale
        logits.addr_(taken.to(logits.dtype), slope.to(logits.dtype), alpha=-1)
        d_bias = d_bias - taken.sum() * (s * shard.smooth) if need[1] else d_bias
        d_scale = d_scale if of_scale is None else d_scale - of_scale
    return TableGradients(d_scale if need[0] else None, d_bias if need[1] else None)

"""The softmax of rows whose classes do not lie in one tensor, such as shards of the ranks of a group.

What a row needs of some of its classes is a few numbers, which :func:`numbers` finds; those of all classes follow from
those of the parts (:func:`merged`), whoever holds them. :func:`finish` makes the row's loss of them, in plain PyTorch,
whose autograd differentiates it: vectors of a number a row. :func:`gradient_` makes of that the gradient of the logits
of any part. What visits logits are the kernels of ``cross_entropy``, on every backend.

With u the adjusted logits without margins, and ``m`` near their maximum, a row's numbers are ``m``, the sum of
``e^(u_j - m)`` over the classes that are no label of the row, ``sum_j ws_j u_j`` for label smoothing and, for each of
its labels (one, or two with mixup), ``u_y`` without and with the margin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltkernels import backends
from ltkernels.ops.options import CrossEntropyOptions, MarginType, Reduction
from ltkernels.ops.table import _autograd_in_a_kernel
from ltkernels.reference.cross_entropy import _focal_factor, _masked_product
from ltkernels.reference.row_cross_entropy import arc_cosine

MAX, OTHERS, SMOOTH, LABELS = range(4)
"""The rows of what :func:`numbers` returns; from ``LABELS`` on two for each label, without and with its margin."""
COEFFICIENT, HARD, MARGIN, SOFT, WEIGHT = range(5)
"""What is known of a row's label: its share of the result, 0 where it is ignored; its weight in the loss beside what
smoothing takes; its margin; what smoothing gives a class of weight 1; its class weight."""
PER_LABEL = 5
ABSENT = -1e20
"""In place of a bias of -inf: e to it is 0, and a part may have no other classes."""
_TINY = 1e-30
"""In place of a scale of 0, which times infinity is no number."""
_PLAIN = CrossEntropyOptions(ignore_index=-1, reduction=Reduction.NONE)


class Shard(NamedTuple):
    """Some of the classes: what is known of them beside their logits, and where they are labels."""

    places: Tensor
    """``(L, N)`` int64: the places of each row's L labels among these classes; -1 where a label is elsewhere or the row
    is ignored; their number where the label is no class at all. Two labels of a row are different classes."""
    class_scale: Tensor | None = None
    """``(c,)``."""
    class_bias: Tensor | None = None
    """``(c,)``."""
    smooth: Tensor | None = None
    """``(c,)``: what label smoothing gives each class: its weight, or 0 where its bias is -inf. None without."""

    def of_rows(self, rows: slice) -> Shard:
        """The same for some of the rows."""
        return self._replace(places=self.places[:, rows])

    def tables(self, logits: Tensor, s: float) -> tuple[Tensor | None, Tensor | None]:
        """Scales and biases as the kernels take them here, with the scale of all classes in them.

        The kernels' states differ in whether ``m`` has that scale. A bias of -inf is not one: no label may have it,
        and any class may stand in for a label that is elsewhere.
        """
        scale, bias = self.class_scale, self.class_bias
        if s != 1.0:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            scale = logits.new_full((logits.shape[1],), s, dtype=dtype) if scale is None else s * scale
            bias = None if bias is None else s * bias
        if scale is not None:  # by which what stands for a label's logit is multiplied, to have no part in a sum
            scale = torch.where(scale == 0, _TINY, scale)
        return scale, None if bias is None else bias.clamp_min(ABSENT)


def local_places(label: Tensor, first: int, count: int, classes: int, ignore_index: int) -> Tensor:
    """Int64 labels in ``[0, classes)`` as :class:`Shard` has them, for the classes ``[first, first + count)``."""
    inside = (label >= 0) & (label < classes)
    here = (label >= first) & (label < first + count)
    nowhere = ~inside & (label != ignore_index)
    return torch.where(here, label - first, torch.where(nowhere, count, -1))


class _Labels:
    """The labels of some rows among the classes of a part."""

    def __init__(self, shard: Shard, logits: Tensor) -> None:
        count = logits.shape[1]
        self.here = (shard.places >= 0) & (shard.places < count)
        self.at = torch.where(self.here, shard.places, 0)
        self.asked = torch.where(shard.places[0] < 0, 0, shard.places[0])  # what is no class is reported by the kernels
        self.shard, self.logits = shard, logits

    def taken(self) -> Tensor:
        """The logits at the labels, ``(L, N)``, in whose places is afterwards what their scale makes a part of nothing.

        That is -inf, or where the scale is negative a large number: kernels know -inf, whose gradient times it is 0.
        """
        nothing: list[Tensor | float] = [-torch.inf] * len(self.at)
        if (scale := self.of(self.shard.class_scale)) is not None:
            least = self.logits.new_full((), -torch.inf)
            most = torch.full_like(least, torch.finfo(least.dtype).max / 4)
            nothing = [torch.where(of < 0, most, least)[:, None] for of in scale]
        return torch.stack([self._write(k, value) for k, value in enumerate(nothing)])

    def put(self, values: Tensor) -> None:
        """Writes ``(L, N)`` to where the labels are."""
        for k, value in enumerate(values):
            self._write(k, value[:, None].to(self.logits.dtype))

    def _write(self, k: int, value: Tensor | float) -> Tensor:
        """One label after the other: the class that stands in for one that is elsewhere may be the other."""
        at = self.at[k][:, None]
        before = self.logits.gather(1, at)
        self.logits.scatter_(1, at, torch.where(self.here[k][:, None], value, before))
        return before[:, 0]

    def of(self, table: Tensor | None) -> Tensor | None:
        """The labels' values of a class table."""
        return None if table is None else table[self.at]


def _label_logits(
    x: Tensor, scale: Tensor | None, bias: Tensor | None, margin: Tensor, options: Any
) -> tuple[Tensor, Tensor]:
    """``u_y`` without and with the margin."""

    def adjusted(value: Tensor) -> Tensor:
        value = value if scale is None else scale * value
        u: Tensor = options.scale * (value if bias is None else value + bias)
        return u

    plain = adjusted(x)
    if options.margin_type == MarginType.ADDITIVE:
        return plain, plain - options.scale * margin
    return plain, adjusted(arc_cosine(x, margin, options.margin_type))


def numbers(row: backends.Implementation, logits: Tensor, shard: Shard, margins: Tensor, options: Any) -> Tensor:
    """Finds the numbers of each row.

    Args:
        row: a backend's implementation of ``cross_entropy``.
        logits: ``(N, c)`` of these classes; c may be 0. Written to, and as before when this returns.
        shard: what else is known of the classes.
        margins: ``(L, N)``, of the rows' labels.
        options: has ``scale`` and ``margin_type``.

    Returns:
        ``(3 + 2 L, N)``, contiguous, in the type of the computation. A label that is elsewhere has -inf.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    found = torch.empty(LABELS + 2 * len(margins), len(logits), dtype=dtype, device=logits.device)
    found[MAX], found[OTHERS], found[SMOOTH], found[LABELS:] = ABSENT, 0.0, 0.0, -torch.inf
    if logits.shape[1] == 0:
        return found
    labels = _Labels(shard, logits)
    if shard.smooth is not None:
        factors = shard.smooth if shard.class_scale is None else shard.smooth * shard.class_scale
        total = torch.mv(logits, factors.to(logits.dtype)).to(dtype)
        if shard.class_bias is not None:
            total = total + (shard.smooth * torch.where(shard.smooth == 0, 0.0, shard.class_bias)).sum()
        found[SMOOTH] = options.scale * total
    scale, bias = shard.tables(logits, options.scale)
    own = labels.taken()
    state = row.forward(logits, labels.asked, None, scale, bias, None, None, *_PLAIN, False)[1][:-1].view(-1, 4)
    labels.put(own)
    alone = state[:, 0] == -torch.inf  # there are no classes but labels
    found[MAX] = torch.where(alone, ABSENT, state[:, 0])
    found[OTHERS] = torch.where(alone, 0.0, state[:, 1].reciprocal())  # 1 / sum is the factor of a plain row
    x = own.to(dtype)
    both = _label_logits(x, labels.of(shard.class_scale), labels.of(shard.class_bias), margins.to(dtype), options)
    for k, values in enumerate(zip(*both, strict=True)):
        for place, value in enumerate(values):
            found[LABELS + 2 * k + place] = torch.where(labels.here[k], value, -torch.inf)
    return found


def merged(parts: Tensor) -> Tensor:
    """The numbers ``(3 + 2 L, N)`` of all classes, float64, from those of disjoint parts of them, ``(parts, ...)``."""
    parts = parts.double()
    labels = parts[:, LABELS:].amax(dim=0)
    # To which e^(u_y - m) is finite too; a constant, as it is for what is made of the numbers.
    top = torch.maximum(parts[:, MAX].amax(dim=0), labels[::2].amax(dim=0)).detach()
    others = (parts[:, OTHERS] * (parts[:, MAX] - top).exp()).sum(dim=0)
    return torch.cat((torch.stack((top, others, parts[:, SMOOTH].sum(dim=0))), labels))


def finish(all_numbers: Tensor, of_labels: Tensor, smooth_total: Tensor, norm: Tensor | None, options: Any) -> Tensor:
    """The losses of rows from their numbers over all classes: plain PyTorch, to be differentiated by it.

    With ``A`` the log-sum-exp of the classes that are not the label, the loss ``-log p_y`` is ``softplus(A - u_y)``,
    which loses no digits however small it is, nor does its derivative.

    Args:
        all_numbers: ``(3 + 2 L, N)``, float64, merged.
        of_labels: ``(L, PER_LABEL, N)``, float64.
        smooth_total: the sum of ``Shard.smooth`` over all classes, 0-d.
        norm: ``(N,)`` L1 norms of the rows' features, for the influence-balanced loss.
        options: the scalars of ``ClassParallelOptions``.

    Returns:
        ``(N,)``, float64, each times its coefficient.
    """
    m, others, smooth = all_numbers[MAX].detach(), all_numbers[OTHERS], all_numbers[SMOOTH]
    total = torch.zeros_like(m)
    for k, of in enumerate(of_labels):
        # A label that has no share is anywhere: infinite losses have no derivative that 0 times it were 0.
        counted = of[COEFFICIENT] != 0
        plain, own = (torch.where(counted, all_numbers[LABELS + 2 * k + place], 0.0) for place in (0, 1))
        rest = others
        if len(of_labels) == 2:
            rest = rest + (all_numbers[LABELS + 2 * (1 - k)] - m).exp()
        nobody = rest <= 0
        log_rest = torch.where(nobody, -torch.inf, m + torch.where(nobody, 1.0, rest).log())
        nll = _softplus(log_rest - own)
        lse = torch.where(nobody, own, log_rest + _softplus(own - log_rest))
        ce = _masked_product(of[HARD], nll)
        if options.smoothing:
            ce = ce - of[SOFT] * (smooth + of[WEIGHT] * (own - plain) - smooth_total * lse)
        factor = None
        if options.focal_gamma > 0:
            factor = _focal_factor(ce if options.focal_weighted else nll, options.focal_gamma)
        if norm is not None:
            impossible = torch.isposinf(nll)  # p_y is 0 and stays it
            others_p = torch.where(impossible, 1.0, -torch.expm1(-torch.where(impossible, 1.0, nll)))
            influence = options.influence_alpha / (2.0 * norm * others_p + options.influence_eps)
            factor = influence if factor is None else factor * influence
        if factor is not None:
            ce = _masked_product(factor.detach() if options.focal_detached else factor, ce)
        if options.z_loss > 0:
            ce = ce + options.z_loss * lse.square()
        total = total + of[COEFFICIENT] * ce
    return total


def _softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x, threshold=500.0)  # e to more is no float64


def differentiated(
    all_numbers: Tensor, upstream: Tensor, of_labels: Tensor, smooth_total: Tensor, norm: Tensor | None, options: Any
) -> tuple[Tensor, Tensor]:
    """:func:`finish`, and the derivative of its results, times ``upstream``, with respect to the numbers."""
    with torch.enable_grad(), _autograd_in_a_kernel():
        variables = all_numbers.detach().requires_grad_()
        loss = finish(variables, of_labels, smooth_total, norm, options)
        (derivative,) = torch.autograd.grad(loss, variables, upstream.double().expand_as(loss))
    return loss.detach(), torch.where(of_labels[:, COEFFICIENT].ne(0).any(dim=0), derivative, 0.0)


class TableGradients(NamedTuple):
    """Of the class tables of a part; None where not wanted."""

    class_scale: Tensor | None
    class_bias: Tensor | None


def gradient_(
    row: backends.Implementation,
    derivative: Tensor,
    top: Tensor,
    logits: Tensor,
    shard: Shard,
    margins: Tensor,
    options: Any,
    need: tuple[bool, bool] = (False, False),
) -> TableGradients:
    """Writes the gradient of the rows' losses over the logits of a part.

    Args:
        row, logits, shard, margins, options: as of :func:`numbers`; ``logits`` holds the gradient when this returns.
        derivative: ``(3 + 2 L, N)``, of :func:`differentiated`.
        top: ``(N,)``, the ``MAX`` of all classes.
        need: whether the gradients of ``class_scale`` and ``class_bias`` are wanted.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if logits.shape[1] == 0:
        nothing = logits.new_zeros(0, dtype=dtype)
        return TableGradients(nothing if need[0] else None, nothing if need[1] else None)
    labels, s = _Labels(shard, logits), options.scale
    scale, bias = shard.tables(logits, s)
    derivative = derivative.to(dtype)
    taken = derivative[SMOOTH]
    of_smoothing = None
    if shard.smooth is not None and need[0]:
        of_smoothing = torch.mv(logits.t(), taken.to(logits.dtype)).to(dtype) * (s * shard.smooth)
    own = labels.taken()

    # The kernels write a number of the row at its label. Where that is not here it is what any class has there.
    u = logits.gather(1, labels.at[0][:, None])[:, 0].to(dtype)
    u = u if scale is None else u * scale[labels.at[0]]
    u = u if bias is None else u + bias[labels.at[0]]
    top = top.to(dtype)
    state = torch.ones(4 * len(logits) + 1, dtype=dtype, device=logits.device)
    rows = state[:-1].view(-1, 4)
    rows[:, 0], rows[:, 1], rows[:, 2] = top, derivative[OTHERS], 0.0
    rows[:, 3] = derivative[OTHERS] * (u - top).exp()
    one = torch.ones((), dtype=dtype, device=logits.device)
    _, d_scale, d_bias = row.backward(
        one, state, logits, labels.asked, None, scale, bias, None, None, *_PLAIN, True, *need, True
    )
    d_scale, d_bias = s * d_scale, s * d_bias
    if shard.smooth is not None:
        slope = shard.smooth if scale is None else shard.smooth * scale
        logits.addr_(taken.to(logits.dtype), slope.to(logits.dtype))
        if need[1]:
            d_bias = d_bias + taken.sum() * (s * shard.smooth)
        if of_smoothing is not None:
            d_scale = d_scale + of_smoothing
    d_x, d_a, d_b = _at_labels(own.to(dtype), labels, margins.to(dtype), derivative[LABELS:], options)
    now = torch.stack([logits.gather(1, at[:, None])[:, 0] for at in labels.at])
    labels.put(now.to(dtype) + d_x)
    if need[0]:
        d_scale = d_scale.index_put_((labels.at,), torch.where(labels.here, d_a, 0.0), accumulate=True)
    if need[1]:
        d_bias = d_bias.index_put_((labels.at,), torch.where(labels.here, d_b, 0.0), accumulate=True)
    return TableGradients(d_scale if need[0] else None, d_bias if need[1] else None)


def _at_labels(
    x: Tensor, labels: _Labels, margins: Tensor, derivative: Tensor, options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients at the labels, ``(L, N)``, with respect to logit, scale and bias of the class."""
    scale, bias = labels.of(labels.shard.class_scale), labels.of(labels.shard.class_bias)
    with torch.enable_grad(), _autograd_in_a_kernel():
        variables = [
            x.detach().requires_grad_(),
            (torch.ones_like(x) if scale is None else scale).detach().requires_grad_(),
            (torch.zeros_like(x) if bias is None else bias).detach().requires_grad_(),
        ]
        plain, own = _label_logits(variables[0], variables[1], variables[2], margins, options)
        upstream = [torch.where(labels.here, d, 0.0) for d in (derivative[::2], derivative[1::2])]
        d_x, d_a, d_b = torch.autograd.grad((plain, own), variables, upstream)
    return d_x, d_a, d_b

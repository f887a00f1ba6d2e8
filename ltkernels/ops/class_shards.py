"""The softmax of rows whose classes do not lie in one tensor, such as shards of the ranks of a group.

What a row needs of some of its classes is a few numbers, which :func:`numbers` finds; those of all classes follow from
those of the parts (:func:`merged`), whoever holds them. :func:`finish` makes the row's loss of them, in plain PyTorch,
whose autograd differentiates it: vectors of a number a row. :func:`gradient_` makes of that the gradient of the logits
of any part. What visits logits are the kernels of ``cross_entropy``, on every backend; for row gates and probabilities,
which they cannot have apart from a whole row, it is PyTorch (``class_shards_plain.py``).

With u the adjusted logits without margins, and ``m`` near their maximum, a row's numbers are ``m``, the sum of
``e^(u_j - m)`` over the classes that are no label of the row, ``sum_j ws_j u_j`` for label smoothing and, for each of
its labels (one, or two with mixup), ``u_y`` without and with the margin. For probabilities t they are, in place of the
labels', ``sum_j w_j t_j (u_j - m)`` and ``sum_j w_j t_j``, and both without the class weights.
"""

from __future__ import annotations

from collections.abc import Sequence
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
WEIGHTED, WEIGHTED_MASS, RAW, RAW_MASS = range(LABELS, LABELS + 4)
"""The rows from ``LABELS`` on for probabilities."""
COEFFICIENT, HARD, SOFT, WEIGHT = range(4)
"""What is known of a row's label: its share of the result, 0 where it is ignored; its weight in the loss beside what
smoothing takes (of probabilities without the class weights); what smoothing gives a class of weight 1; its class
weight."""
PER_LABEL = 4
ABSENT = -1e20
"""In place of a bias of -inf: e to it is 0, and a part may have no other classes."""
_TINY = 1e-30
"""In place of a scale of 0, which times infinity is no number."""
_PLAIN = CrossEntropyOptions(ignore_index=-1, reduction=Reduction.NONE)


class Shard(NamedTuple):
    """Some of the classes: what is known of them beside their logits, and where they are labels."""

    places: Tensor
    """``(L, N)`` int64: the places of each row's L labels among these classes; -1 where a label is elsewhere or the row
    is ignored; their number where the label is no class at all. Two labels of a row are different classes. L is 0 for
    probabilities."""
    class_scale: Tensor | None = None
    """``(c,)``."""
    class_bias: Tensor | None = None
    """``(c,)``."""
    smooth: Tensor | None = None
    """``(c,)``: what label smoothing gives each class: its weight, or 0 where its bias is -inf. None without."""
    row_gate: Tensor | None = None
    """``(N,)``."""
    probabilities: Tensor | None = None
    """``(N, c)``: those of these classes."""
    class_weight: Tensor | None = None
    """``(c,)``, for probabilities."""

    @property
    def plain(self) -> bool:
        """Whether it is a part that the kernels cannot serve."""
        return self.row_gate is not None or self.probabilities is not None

    def of_rows(self, rows: slice) -> Shard:
        """The same for some of the rows."""
        gate, probabilities = (None if value is None else value[rows] for value in (self.row_gate, self.probabilities))
        return self._replace(places=self.places[:, rows], row_gate=gate, probabilities=probabilities)

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
    valid = label != ignore_index
    here = valid & (label >= first) & (label < first + count)
    nowhere = valid & ((label < 0) | (label >= classes))
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


def label_logits(
    x: Tensor, scale: Tensor | None, bias: Tensor | None, margin: Tensor, options: Any
) -> tuple[Tensor, Tensor]:
    """``u_y`` of a logit ``x`` without and with the margin."""

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
    both = label_logits(x, labels.of(shard.class_scale), labels.of(shard.class_bias), margins.to(dtype), options)
    for k, values in enumerate(zip(*both, strict=True)):
        for place, value in enumerate(values):
            found[LABELS + 2 * k + place] = torch.where(labels.here[k], value, -torch.inf)
    return found


def merged(parts: Tensor, probabilities: bool = False) -> Tensor:
    """The numbers of all classes, float64, from those of disjoint parts of them, ``(parts, ...)``."""
    parts = parts.double()
    most = parts[:, MAX].amax(dim=0)
    if probabilities:
        top = most.detach()
        shift = parts[:, MAX] - top
        of_target = []
        for values, mass in ((WEIGHTED, WEIGHTED_MASS), (RAW, RAW_MASS)):
            moved = parts[:, values] + parts[:, mass] * torch.where(parts[:, mass] == 0, 0.0, shift)
            of_target += [moved.sum(dim=0), parts[:, mass].sum(dim=0)]
        target = torch.stack(of_target)
    else:
        target = parts[:, LABELS:].amax(dim=0)
        # To which e^(u_y - m) is finite too; a constant, as it is for what is made of the numbers.
        top = torch.maximum(most, target[::2].amax(dim=0)).detach()
    others = (parts[:, OTHERS] * (parts[:, MAX] - top).exp()).sum(dim=0)
    return torch.cat((torch.stack((top, others, parts[:, SMOOTH].sum(dim=0))), target))


def finish(all_numbers: Tensor, of_labels: Tensor, smooth_total: Tensor, norm: Tensor | None, options: Any) -> Tensor:
    """The losses of rows from their numbers over all classes: plain PyTorch, to be differentiated by it.

    Args:
        all_numbers: float64, merged.
        of_labels: ``(L, PER_LABEL, N)``, float64; L is 1 for probabilities.
        smooth_total: the sum of ``Shard.smooth`` over all classes, 0-d.
        norm: ``(N,)`` L1 norms of the rows' features, for the influence-balanced loss.
        options: the scalars of ``ClassParallelOptions``.

    Returns:
        ``(N,)``, float64, each times its coefficient.
    """
    if options.soft_target:
        return _masked_product(
            of_labels[0, COEFFICIENT], _of_probabilities(all_numbers, of_labels[0], smooth_total, options)
        )
    total = torch.zeros_like(all_numbers[MAX])
    for k, of in enumerate(of_labels):
        total = total + _masked_product(
            of[COEFFICIENT], _of_label(all_numbers, k, of_labels, smooth_total, norm, options)
        )
    return total


def _of_label(
    all_numbers: Tensor, k: int, of_labels: Tensor, smooth_total: Tensor, norm: Tensor | None, options: Any
) -> Tensor:
    """The row losses of one label, without its coefficient.

    With ``A`` the log-sum-exp of the classes that are not the label, the loss ``-log p_y`` is ``softplus(A - u_y)``,
    which loses no digits however small it is, nor does its derivative.
    """
    m, rest, of, at = all_numbers[MAX].detach(), all_numbers[OTHERS], of_labels[k], LABELS + 2 * k
    # A label that is nowhere, of an ignored row: infinite losses have no derivative that 0 times it were 0.
    counted = (of[COEFFICIENT] != 0) | (all_numbers[at] > -torch.inf)
    plain, own = (torch.where(counted, all_numbers[at + place], 0.0) for place in (0, 1))
    if len(of_labels) == 2:
        rest = rest + (all_numbers[LABELS + 2 * (1 - k)] - m).exp()
    nobody = rest <= 0
    log_rest = torch.where(nobody, -torch.inf, m + torch.where(nobody, 1.0, rest).log())
    nll = _softplus(log_rest - own)
    lse = torch.where(nobody, own, log_rest + _softplus(own - log_rest))
    ce = _masked_product(of[HARD], nll)
    if options.smoothing:
        ce = ce - of[SOFT] * (all_numbers[SMOOTH] + of[WEIGHT] * (own - plain) - smooth_total * lse)
    return _modulated(ce, nll, lse, norm, options)


def _of_probabilities(all_numbers: Tensor, of: Tensor, smooth_total: Tensor, options: Any) -> Tensor:
    """The row losses of probabilities, without their coefficient."""
    m, log_sum = all_numbers[MAX].detach(), all_numbers[OTHERS].log()
    weighted, nll = (all_numbers[at + 1] * log_sum - all_numbers[at] for at in (WEIGHTED, RAW))
    lse = m + log_sum
    ce = _masked_product(of[HARD], weighted)
    if options.smoothing:
        ce = ce - of[SOFT] * (all_numbers[SMOOTH] - smooth_total * lse)
    return _modulated(ce, nll, lse, None, options)


def _modulated(ce: Tensor, nll: Tensor, lse: Tensor, norm: Tensor | None, options: Any) -> Tensor:
    """The cross-entropies with the factors of focal and influence-balanced loss, and with the z-loss."""
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
    return ce + options.z_loss * lse.square() if options.z_loss > 0 else ce


def _softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x, threshold=500.0)  # e to more is no float64


class RowGradients(NamedTuple):
    """Of what :func:`finish` is given; None where not wanted."""

    numbers: Tensor
    of_labels: Tensor | None
    smooth_total: Tensor | None
    feature_norm: Tensor | None


def differentiated(
    all_numbers: Tensor,
    upstream: Tensor,
    of_labels: Tensor,
    smooth_total: Tensor,
    norm: Tensor | None,
    options: Any,
    need: Sequence[bool] = (False, False, False),
) -> tuple[Tensor, RowGradients]:
    """:func:`finish`, and the gradients of its results times ``upstream``; ``need`` says which beside the numbers'."""
    with torch.enable_grad(), _autograd_in_a_kernel():
        numbers = all_numbers.detach().requires_grad_()
        labels, total = of_labels.detach().requires_grad_(need[0]), smooth_total.detach().requires_grad_(need[1])
        norm = None if norm is None else norm.detach().requires_grad_(need[2])
        others = (labels, total, norm)
        wanted = [value for value in others if value is not None and value.requires_grad]
        loss = finish(numbers, labels, total, norm, options)
        upstream = upstream.double().expand_as(loss)
        derivative, *found = torch.autograd.grad(loss, [numbers, *wanted], upstream, materialize_grads=True)
    gradients = iter(found)
    return loss.detach(), RowGradients(
        torch.where(of_labels[:, COEFFICIENT].ne(0).any(dim=0), derivative, 0.0),
        *(next(gradients) if value is not None and value.requires_grad else None for value in others),
    )


class PartGradients(NamedTuple):
    """Of what is known of a part beside its logits; None where not wanted."""

    class_scale: Tensor | None = None
    class_bias: Tensor | None = None
    smooth: Tensor | None = None
    margins: Tensor | None = None
    """``(L, N)``, where the label is here, else 0."""
    row_gate: Tensor | None = None
    probabilities: Tensor | None = None
    class_weight: Tensor | None = None


NO_GRADIENTS = (False,) * len(PartGradients._fields)


def gradient_(
    row: backends.Implementation,
    derivative: Tensor,
    top: Tensor,
    logits: Tensor,
    shard: Shard,
    margins: Tensor,
    options: Any,
    need: Sequence[bool] = NO_GRADIENTS,
) -> PartGradients:
    """Writes the gradient of the rows' losses over the logits of a part.

    Args:
        row, logits, shard, margins, options: as of :func:`numbers`; ``logits`` holds the gradient when this returns.
        derivative: of the numbers, by :func:`differentiated`.
        top: ``(N,)``, the ``MAX`` of all classes.
        need: which gradients are wanted, in the order of :class:`PartGradients`.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    need_scale, need_bias, need_smooth, need_margins, *_ = need
    if logits.shape[1] == 0:
        nothing = logits.new_zeros(0, dtype=dtype)
        scale, bias, d_smooth = (nothing if wanted else None for wanted in need[:3])
        return PartGradients(scale, bias, d_smooth, torch.zeros_like(margins, dtype=dtype) if need_margins else None)
    labels, s = _Labels(shard, logits), options.scale
    scale, bias = shard.tables(logits, s)
    derivative = derivative.to(dtype)
    taken = derivative[SMOOTH]
    of_columns = None
    if shard.smooth is not None and (need_scale or need_smooth):
        of_columns = torch.mv(logits.t(), taken.to(logits.dtype)).to(dtype)
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
        one, state, logits, labels.asked, None, scale, bias, None, None, *_PLAIN, True, need_scale, need_bias, True
    )
    d_scale, d_bias, d_smooth = s * d_scale, s * d_bias, None
    if shard.smooth is not None:
        slope = shard.smooth if scale is None else shard.smooth * scale
        logits.addr_(taken.to(logits.dtype), slope.to(logits.dtype))
        if need_bias:
            d_bias = d_bias + taken.sum() * (s * shard.smooth)
        if of_columns is not None:
            d_scale = d_scale + of_columns * (s * shard.smooth) if need_scale else d_scale
            d_smooth = s * (of_columns if shard.class_scale is None else of_columns * shard.class_scale)
            if shard.class_bias is not None:
                present = torch.isfinite(shard.class_bias)
                d_smooth = torch.where(present, d_smooth + taken.sum() * s * shard.class_bias, 0.0)
    d_x, d_a, d_b, d_margins = _at_labels(own.to(dtype), labels, margins.to(dtype), derivative[LABELS:], options)
    now = torch.stack([logits.gather(1, at[:, None])[:, 0] for at in labels.at])
    labels.put(now.to(dtype) + d_x)
    if need_scale:
        d_scale = d_scale.index_put_((labels.at,), torch.where(labels.here, d_a, 0.0), accumulate=True)
    if need_bias:
        d_bias = d_bias.index_put_((labels.at,), torch.where(labels.here, d_b, 0.0), accumulate=True)
    return PartGradients(
        d_scale if need_scale else None,
        d_bias if need_bias else None,
        d_smooth if need_smooth else None,
        d_margins if need_margins else None,
    )


def _at_labels(x: Tensor, labels: _Labels, margins: Tensor, derivative: Tensor, options: Any) -> tuple[Tensor, ...]:
    """The gradients at the labels, ``(L, N)``, with respect to logit, scale and bias of the class, and margin."""
    scale, bias = labels.of(labels.shard.class_scale), labels.of(labels.shard.class_bias)
    with torch.enable_grad(), _autograd_in_a_kernel():
        variables = [
            torch.where(labels.here, x, 0.0).detach().requires_grad_(),  # elsewhere it may be the other label's -inf
            (torch.ones_like(x) if scale is None else scale).detach().requires_grad_(),
            (torch.zeros_like(x) if bias is None else bias).detach().requires_grad_(),
            margins.detach().requires_grad_(),
        ]
        plain, own = label_logits(variables[0], variables[1], variables[2], variables[3], options)
        upstream = [torch.where(labels.here, d, 0.0) for d in (derivative[::2], derivative[1::2])]
        return torch.autograd.grad((plain, own), variables, upstream, materialize_grads=True)

"""What all processes know of the rows' targets, from labels or probabilities and tables of all classes.

The op (``ops/class_parallel.py``) is given numbers a row in their place: a label's share of the result, its weight, its
margin, and where it is among the classes of this process. They are plain PyTorch of the tables, so that what learns
among these gets its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels.functional.class_samples import ClassSample
from ltkernels.functional.ranks import OfAllRanks, Ranks
from ltkernels.ops.class_shards import COEFFICIENT, HARD, PER_LABEL, SOFT, WEIGHT, local_places
from ltkernels.ops.denominators import inverse_denominator
from ltkernels.ops.linear_cross_entropy import MEANS
from ltkernels.ops.options import RowCrossEntropyOptions


class Part(NamedTuple):
    """This process's classes among all, or a sample of them."""

    first: int
    """The first of this process's classes."""
    here: int
    """The number of this process's classes."""
    classes: int
    """Of all processes together."""
    sample: ClassSample | None

    @property
    def own(self) -> Tensor | slice:
        """The classes whose logits are computed here."""
        if self.sample is None:
            return slice(self.first, self.first + self.here)
        return self.sample.classes + self.first

    def places(self, label: Tensor, ignore_index: int) -> Tensor:
        """As :class:`ltkernels.ops.class_shards.Shard` has them."""
        places = local_places(label, self.first, self.here, self.classes, ignore_index)
        if self.sample is None:
            return places
        of = self.sample.classes
        here = (places >= 0) & (places < self.here)
        at = torch.searchsorted(of, torch.where(here, places, 0)).clamp_max(max(0, len(of) - 1))
        if places.is_cpu and arg.may_look(places) and not bool((of[at[here]] == places[here]).all()):
            row = int((here & (of[at] != places)).nonzero()[0])
            raise ValueError(f"sample: expected all labels of this rank's classes in it, found none of row {row}")
        return torch.where(here, at, torch.where(places == self.here, len(of), places))


class Smoothing(NamedTuple):
    """What label smoothing gives the classes: each its weight, or nothing where its bias is -inf."""

    own: Tensor | None
    """``(c,)``, the classes here; None without smoothing."""
    total: Tensor
    """The sum over all classes, 0-d float64."""
    reached: float | Tensor
    """How many classes it gives something to."""

    @classmethod
    def of(
        cls,
        tensors: tuple[Tensor | None, ...],
        options: RowCrossEntropyOptions,
        part: Part,
        own: Callable[[Tensor | None], Tensor | None],
        ranks: Ranks | None,
    ) -> Smoothing:
        logits, _, _, _, weight, _, bias, _, eps, *_ = tensors
        assert logits is not None
        if not (options.label_smoothing > 0 or eps is not None):
            return cls(None, torch.zeros((), dtype=torch.float64, device=logits.device), part.classes)
        present = None if bias is None else torch.isfinite(bias.detach())
        if weight is None:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            weight = torch.ones((), dtype=dtype, device=logits.device).expand(part.classes)
        table = weight if present is None else torch.where(present, weight, 0.0)
        here = own(table)
        assert here is not None
        if part.sample is None or ranks is None:
            return cls(
                here, table.sum(dtype=torch.float64), part.classes if present is None else present.sum().double()
            )
        # Only each process knows which of its classes are in the sample.
        count = torch.ones_like(here) if present is None else present[part.own]
        sums = torch.stack((count.sum(dtype=torch.float64), here.sum(dtype=torch.float64)))
        reached, total = OfAllRanks.apply(sums, ranks)  # type: ignore[no-untyped-call]
        return cls(here, total, reached.detach())


class Known(NamedTuple):
    """What all processes know of the rows' labels, or of their probabilities."""

    places: Tensor
    """``(L, N)``, of this process."""
    margins: Tensor
    """``(L, N)``."""
    of_labels: Tensor
    """``(L, PER_LABEL, N)``; L is 1 for probabilities, of which there are no places and margins."""
    nothing: Tensor | None
    """0-d, whether a mean is of nothing; None where that is 0."""


def of_labels(
    tensors: tuple[Tensor | None, ...], options: RowCrossEntropyOptions, part: Part, smoothing: Smoothing
) -> Known:
    logits, target, second, lam, weight, _, _, margin, table_eps, row_weight, *_ = tensors
    assert logits is not None and target is not None
    labels = [target.long()] if second is None else [target.long(), second.long()]
    share = torch.ones((), dtype=torch.float64, device=logits.device)
    shares = [share] if lam is None else [lam.to(logits.device).double(), 1.0 - lam.to(logits.device).double()]
    places = [part.places(label, options.ignore_index) for label in labels]
    coefficients: list[Tensor] = []
    nothing: Tensor | None = None
    parts, margins = [], []
    for label, of_share in zip(labels, shares, strict=True):
        valid = label != options.ignore_index
        outside = valid & ((label < 0) | (label >= part.classes))
        at = torch.where(valid & ~outside, label, 0)
        coefficient, empty = _coefficient(of_share, label, tensors, options)
        nothing = empty if nothing is None else nothing if empty is None else nothing | empty
        # Out of range is an error on the CPU, and known by now; on a GPU it makes the row's loss NaN.
        coefficients.append(torch.where(outside, torch.nan, torch.where(valid, coefficient, 0.0)))
        weights = torch.ones_like(coefficients[-1]) if weight is None else weight[at].double()
        eps = torch.full_like(weights, options.label_smoothing) if table_eps is None else table_eps[at].double()
        if options.off_target:  # q_y = 1 - eps is (1 - e) + e / K for e = eps K / (K - 1)
            rest = torch.as_tensor(smoothing.reached, device=label.device, dtype=torch.float64) - 1
            eps = torch.where(rest > 0, eps * smoothing.reached / rest.clamp_min(1), 0.0)
        parts.append(((1.0 - eps) * weights, eps / smoothing.reached, weights))
        table = None if margin is None else margin.to(label.device).expand(part.classes)
        margins.append(torch.zeros_like(weights) if table is None else table[at].double())
    if len(labels) == 2:  # the same class twice is one label
        same = (labels[0] == labels[1]) & (labels[0] != options.ignore_index)
        first, other = coefficients
        coefficients = [first + torch.where(same, other, 0.0), torch.where(same, 0.0, other)]
        places[1] = torch.where(same, -1, places[1])
    known = []
    for coefficient, (hard, soft, weights) in zip(coefficients, parts, strict=True):
        of: dict[int, Tensor] = {COEFFICIENT: coefficient, HARD: hard, SOFT: soft, WEIGHT: weights}
        known.append(torch.stack([of[place] for place in range(PER_LABEL)]))
    return Known(torch.stack(places), torch.stack(margins), torch.stack(known), nothing)


def of_soft_target(tensors: tuple[Tensor | None, ...], options: RowCrossEntropyOptions, smoothing: Smoothing) -> Known:
    target = tensors[1]
    assert target is not None
    share = torch.ones(len(target), dtype=torch.float64, device=target.device)
    coefficient, nothing = _coefficient(share, target, tensors, options)
    eps = options.label_smoothing
    of: dict[int, Tensor] = {
        COEFFICIENT: coefficient, HARD: share * (1.0 - eps), SOFT: share * eps / smoothing.reached, WEIGHT: share,
    }  # fmt: skip
    places = torch.empty(0, len(target), dtype=torch.int64, device=target.device)
    known = torch.stack([of[place] for place in range(PER_LABEL)])
    return Known(places, share.new_empty(0, len(target)), known[None], nothing)


def _coefficient(
    share: Tensor, target: Tensor, tensors: tuple[Tensor | None, ...], options: RowCrossEntropyOptions
) -> tuple[Tensor, Tensor | None]:
    """The rows' shares of the result, and whether they are of nothing, where that is not 0."""
    logits, weight, row_weight = tensors[0], tensors[4], tensors[9]
    assert logits is not None
    share = share.expand(len(target))
    share = share if row_weight is None else share * row_weight
    if options.reduction not in MEANS:
        return share, None
    inverse = inverse_denominator(logits, target, weight, row_weight, options)
    if options.empty_zero:
        return share * inverse, None
    empty = torch.isinf(inverse)
    return share * torch.where(empty, 0.0, inverse), empty

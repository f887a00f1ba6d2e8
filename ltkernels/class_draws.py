"""How classes come: drawn by an alias table, or dealt in rounds. What they are, not which comes when: that is the op's.

Both are made once from probabilities and hold what the op reads: integers, so that every device draws the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels import rebalance

try:
    from ltkernels import _host as _compiled  # type: ignore[attr-defined, unused-ignore]
except ImportError:  # an install without a C++ compiler
    _compiled = None

__all__ = ["AliasTable", "ClassRounds"]

Probabilities = Sequence[float] | npt.NDArray[Any] | Tensor
_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]

_host: ModuleType | None = _compiled  # None: NumPy does the same, slower
_ONE = 2**32  # the mass of a column
_MOST_CLASSES = 2**31 - 1
_SUMS = 4096
_LEAST = 5e-324  # the smallest float64


class AliasTable:
    """Probabilities of classes as an alias table (Walker 1977, Vose 1991) in exact integers, for draws in O(1).

    A draw picks one of C columns of mass 2^32 with equal probability; in column c it is class c below the threshold,
    else the column's alias. Probabilities are rounded once, to multiples of 2^-32 / C; the table is exact in those.

    Args:
        class_probs: ``(C,)``, finite, >= 0, not all 0; a tensor, an array or a sequence of integers or floats. They are
            relative and need not sum to 1. A class of probability 0 is never drawn, one of any other can be.

    Attributes:
        entries: int64 tensor ``(C,)``: the threshold in the low and the alias in the high 32 bits.
        class_probs: float64 CPU tensor ``(C,)``, with sum 1.

    Raises:
        TypeError: not numbers.
        ValueError: not of shape ``(C,)`` with C from 1 to 2^31 - 1; negative, not finite, or all 0.

    Example:
        >>> from ltkernels.samplers import AliasTable
        >>> table = AliasTable([3, 0, 1])
        >>> table.class_probs
        tensor([0.7500, 0.0000, 0.2500], dtype=torch.float64)
        >>> table.entries % 2**32 / 2**32, table.entries >> 32
        (tensor([0.0000, 0.0000, 0.7500]), tensor([0, 0, 0]))
    """

    entries: Tensor
    class_probs: Tensor

    def __init__(self, class_probs: Probabilities) -> None:
        probs = _normalised(_weights(class_probs))
        self.class_probs = torch.from_numpy(probs)
        self.entries = torch.from_numpy(_alias_entries(_masses(probs)))

    @property
    def num_classes(self) -> int:
        """The number of classes C."""
        return self.entries.numel()

    @property
    def drawn(self) -> Tensor:
        """bool CPU tensor ``(C,)``: the classes that can come."""
        return self.class_probs > 0

    @property
    def device(self) -> torch.device:
        """Where ``entries`` is."""
        return self.entries.device

    def to(self, device: torch.device | str | int) -> AliasTable:
        """This table with its entries on a device; itself if they are there."""
        entries = self.entries.to(device)
        if entries is self.entries:
            return self
        moved = copy.copy(self)
        moved.entries = entries
        return moved


class ClassRounds:
    """Classes without replacement: dealt in rounds, in which each has a fixed number of turns.

    Without ``class_probs`` a round is every class once, or ``classes_per_round`` of them, in random order. With them, a
    round has up to R groups, of which each class has its share, spread evenly over the round. Groups are shuffled
    within windows in which no class is twice. If ``class_probs`` are integers, such as numbers of samples, whose sum
    without a common divisor is at most R, each class has exactly so many groups. Otherwise shares are rounded by
    largest remainder, so that none is further than 1 / R from its probability, but for classes of less than 1 / R: they
    have one group, at the cost of the others. R is the largest multiple of C up to 256 C that is at most 2^20, or 4 C;
    a divisor that all classes' groups have in common is taken out.

    Args:
        num_classes: number of classes C.
        class_probs: as in :class:`AliasTable`, ``(C,)``; None: all the same.
        draws_per_class: positions of a group: draws of a class one after the other.
        classes_per_round: a random choice of so many of all classes in each round; not with ``class_probs``.
        distinct: no sample twice in a group, if its class has enough.

    Attributes:
        groups: groups in a round.
        draws: positions in a group.
        distinct: as given.
        slots: int32 tensor ``(groups, 4)``: start and size of the slot's window, its class, and the slots of that class
            before; None without ``class_probs``.
        quotas: int32 tensor ``(C,)``: the slots of each class; None without ``class_probs``.
        drawn: bool CPU tensor ``(C,)``: the classes that can come.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: numbers below 1, ``classes_per_round`` above C or together with ``class_probs``; probabilities that
            :class:`AliasTable` refuses or of another shape.

    Example:
        >>> from ltkernels.samplers import ClassRounds
        >>> rounds = ClassRounds(3, [2, 1, 1])
        >>> rounds.quotas, rounds.slots[:, 2]
        (tensor([2, 1, 1], dtype=torch.int32), tensor([0, 2, 0, 1], dtype=torch.int32))
    """

    num_classes: int
    groups: int
    draws: int
    distinct: bool
    slots: Tensor | None
    quotas: Tensor | None
    drawn: Tensor

    def __init__(
        self,
        num_classes: int,
        class_probs: Probabilities | None = None,
        *,
        draws_per_class: int = 1,
        classes_per_round: int | None = None,
        distinct: bool = False,
    ) -> None:
        self.num_classes = _integer("num_classes", num_classes, _MOST_CLASSES)
        self.draws = _integer("draws_per_class", draws_per_class, _MOST_CLASSES)
        if not isinstance(distinct, bool):
            raise TypeError(f"distinct: expected a bool, found {type(distinct).__name__}")
        self.distinct = distinct
        self.slots = self.quotas = None
        if class_probs is None:
            self.groups = self.num_classes
            if classes_per_round is not None:
                self.groups = _integer("classes_per_round", classes_per_round, self.num_classes)
            self.drawn = torch.ones(1, dtype=torch.bool).expand(self.num_classes)
            return
        if classes_per_round is not None:
            raise ValueError(f"classes_per_round: expected None with class_probs, found {classes_per_round}")
        weights = _weights(class_probs)
        if len(weights) != self.num_classes:
            raise ValueError(f"class_probs: expected shape ({self.num_classes},), found ({len(weights)},)")
        quotas = _quotas(weights)
        self.groups = int(quotas.sum())
        self.quotas = torch.from_numpy(quotas.astype(np.int32))
        self.slots = torch.from_numpy(_slots(quotas))
        self.drawn = self.quotas > 0

    @property
    def positions(self) -> int:
        """Positions in a round."""
        return self.groups * self.draws

    @property
    def device(self) -> torch.device:
        """Where ``slots`` and ``quotas`` are; the CPU if there are none."""
        return torch.device("cpu") if self.slots is None else self.slots.device

    def to(self, device: torch.device | str | int) -> ClassRounds:
        """These rounds with their tensors on a device; themselves if they are there."""
        if self.slots is None or self.quotas is None or self.slots.to(device) is self.slots:
            return self
        moved = copy.copy(self)
        moved.slots, moved.quotas = self.slots.to(device), self.quotas.to(device)
        return moved


def _integer(name: str, value: int, most: int) -> int:
    value = arg.integer(name, value)
    if not 1 <= value <= most:
        raise ValueError(f"{name}: expected 1 to {most}, found {value}")
    return value


def _weights(class_probs: Probabilities) -> _Floats:
    """The checked numbers in float64."""
    if isinstance(class_probs, Tensor):
        if class_probs.dtype == torch.bool or class_probs.is_complex():
            raise TypeError(f"class_probs: expected integers or floats, found {class_probs.dtype}")
        array = arg.tensor("class_probs", class_probs).detach().to("cpu", torch.float64).numpy()
    else:
        array = rebalance._as_array("class_probs", class_probs, kinds="iuf").astype(np.float64)
    if array.ndim != 1 or not 1 <= array.size <= _MOST_CLASSES:
        raise ValueError(f"class_probs: expected one number a class, shape (C,), found shape {array.shape}")
    for wrong, expected in ((~np.isfinite(array), "all finite"), (array < 0, "all >= 0")):
        if wrong.any():
            index = int(wrong.argmax())
            raise ValueError(f"class_probs: expected {expected}, found {array[index]:g} at class {index}")
    if not array.any():
        raise ValueError(f"class_probs: expected at least one > 0, found {array.size} zeros")
    return array


def _sum(array: _Floats) -> float:
    """The sum, in an order that does not depend on the processor: every bit of a stream hangs on it."""
    rows = np.zeros((-(-array.size // _SUMS), _SUMS))
    rows.reshape(-1)[: array.size] = array
    return math.fsum(rows.sum(axis=0))


def _normalised(weights: _Floats) -> _Floats:
    """Probabilities with sum 1."""
    relative = weights / weights.max()  # so that no sum is infinite
    probs: _Floats = relative / _sum(relative)
    return np.maximum(probs, _LEAST, out=probs, where=weights > 0)  # what can come does not vanish


def _masses(probs: _Floats) -> _Ints:
    """Integers of sum C 2^32 that stand for ``probs``. The largest, which is at least 2^32, takes the remainder."""
    total = len(probs) * _ONE
    masses = np.maximum(np.floor(probs * total), probs > 0).astype(np.int64)
    masses[probs.argmax()] += total - int(masses.sum())
    return masses


def _alias_entries(masses: _Ints) -> _Ints:
    """Columns of mass 2^32 that hold ``masses`` exactly.

    Classes below 2^32 ("small") are filled up in their order by the others ("large") in theirs; one that has given so
    much that it is small itself is filled up by the next. So the small class k, with the sum ``given`` of what classes
    before it lacked, gets from the first large class up to which more than ``given`` was there to give.
    """
    if _host is not None:
        return np.asarray(_host.alias_entries(masses))
    size = len(masses)
    is_small = masses < _ONE
    small, large = np.flatnonzero(is_small), np.flatnonzero(~is_small)
    lacking = np.cumsum(_ONE - masses[small])
    spare = np.cumsum(masses[large] - _ONE)
    threshold, alias = np.zeros(size, np.int64), np.arange(size)
    threshold[small] = masses[small]
    given = lacking - (_ONE - masses[small])
    alias[small] = large[np.searchsorted(spare, given)]
    # A large class is short of what its last taker took beyond what all large classes up to it could spare.
    last = np.searchsorted(lacking, spare, side="right")
    short = np.flatnonzero(last < len(small))
    threshold[large[short]] = _ONE - (lacking[last[short]] - spare[short])
    alias[large[short]] = large[short + 1]
    return alias << 32 | threshold


def _quotas(weights: _Floats) -> _Ints:
    """Slots of each class in a round."""
    size = len(weights)
    total = size * min(256, max(2**20 // size, 4))
    if (weights == np.floor(weights)).all() and weights.max() <= 2**53 / size:  # no sum overflows
        whole = weights.astype(np.int64)
        whole //= np.gcd.reduce(whole)
        if whole.sum() <= total:
            return whole
    probs = _normalised(weights)
    quotas, shared = np.zeros(size, np.int64), probs > 0
    while True:  # what is below 1 becomes 1, and the others share the rest
        share = np.where(shared, probs, 0)
        share *= (total - int(quotas.sum())) / _sum(share)
        rare = shared & (share < 1)
        if not rare.any():
            break
        quotas[rare] = 1
        shared &= ~rare
    quotas += np.floor(share).astype(np.int64)
    by_remainder = np.argsort(np.floor(share) - share, kind="stable")
    quotas[by_remainder[: total - int(quotas.sum())]] += 1
    return np.asarray(quotas // np.gcd.reduce(quotas))


def _slots(quotas: _Ints) -> npt.NDArray[np.int32]:
    """The slots of a round: int32 ``(groups, 4)``.

    The draws of class c are at times ``(i + phase_c) / quotas[c]`` of the round. Phases are multiples of the golden
    ratio, so that the first draws of classes with the same quota are spread evenly too.
    """
    if _host is not None:
        return np.asarray(_host.slots(quotas))
    groups = int(quotas.sum())
    classes = np.repeat(np.arange(len(quotas)), quotas)
    ordinals = np.arange(groups) - np.repeat(np.cumsum(quotas) - quotas, quotas)
    phases = (classes * 0x9E3779B9 & 0xFFFFFFFF) / _ONE
    order = np.argsort((ordinals + phases) / quotas[classes], kind="stable")
    place = np.empty(groups, np.int64)
    place[order] = np.arange(groups)
    again = np.full(groups, groups)  # where the class of a slot comes the next time
    same = classes[1:] == classes[:-1]
    again[place[:-1][same]] = place[1:][same]
    ends = np.minimum.accumulate(again[::-1])[::-1].tolist()  # of a window that starts here
    starts = [0]
    while ends[starts[-1]] < groups:
        starts.append(ends[starts[-1]])
    sizes = np.diff([*starts, groups])
    columns = (np.repeat(starts, sizes), np.repeat(sizes, sizes), classes[order], ordinals[order])
    return np.stack(columns, axis=1).astype(np.int32)

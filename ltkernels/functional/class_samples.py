"""Some of very many classes, for one step of training: those of the batch, and others at random."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels.class_draws import AliasTable
from ltkernels.functional.ranks import Header, Ranks
from ltkernels.functional.row_cross_entropy import Target
from ltkernels.ops import sampling as _sampling

_MOST_CLASSES = 2**31 - 1
_FIRST_POSITION = (
    2**61
)  # of the streams of `sample_indices`, where no sampler gets to: so no random number serves twice
_IGNORED = -100
_MOST_DRAWS = 64  # for a class of the sample, before probabilities are refused as too uneven


class ClassSample(NamedTuple):
    """Classes of a step, by :func:`sample_classes`; for :func:`linear_cross_entropy`."""

    classes: Tensor
    """The classes: int64 ``(S,)``, ascending, none twice."""
    log_expected: Tensor
    """Of each the log of the probability with which it is in the sample, float32 ``(S,)``: 0 for the batch's own."""
    num_classes: int
    """How many they are taken from."""

    def places(self, target: Tensor, ignore_index: int = -100) -> Tensor:
        """Labels as places in ``classes``.

        Args:
            target: labels of any integer type and shape, on the device of ``classes``.
            ignore_index: label of rows that take no part.

        Returns:
            int64, of the shape of ``target``: the place of each label; -100 for ``ignore_index``; ``num_classes``,
            which is no place, for a label that the sample does not have, where that cannot be looked at (not on the
            CPU, or in a compiled graph).

        Raises:
            TypeError: ``target`` is no tensor of an integer type.
            ValueError: a wrong device; a label of a class that is not in the sample (CPU).
            IndexError: a label outside ``[0, num_classes)`` that is not ``ignore_index`` (CPU).

        Example:
            >>> import torch, ltkernels as ltk
            >>> sample = ltk.functional.sample_classes(torch.tensor([7, 2]), 10, 5, seed=0)
            >>> sample.classes.tolist(), sample.places(torch.tensor([7, -100, 2])).tolist()
            ([0, 1, 2, 7, 9], [3, -100, 2])
        """
        labels = _labels("target", target, self.classes.device)
        place = torch.searchsorted(self.classes, labels).clamp(max=len(self.classes) - 1)
        ignored, found = labels == ignore_index, self.classes[place] == labels
        if arg.may_look(labels) and labels.device.type == "cpu":
            _refuse_outside(labels, ignored, self.num_classes, ignore_index)
            missing = (~(ignored | found)).reshape(-1)
            if missing.any():
                row = int(missing.nonzero()[0])
                raise ValueError(
                    f"target: expected labels of classes in sample, found class {int(labels.reshape(-1)[row])} at row"
                    f" {row}, which is not among its {len(self.classes)}"
                )
        return torch.where(ignored, _IGNORED, torch.where(found, place, self.num_classes))


def sample_classes(
    target: Target,
    num_classes: int,
    num_sampled: int | None = None,
    *,
    sample_rate: float | None = None,
    seed: int,
    step: int | Tensor = 0,
    class_probs: Tensor | AliasTable | None = None,
    ignore_index: int = -100,
    class_range: tuple[int, int] | None = None,
) -> ClassSample:
    r"""The classes of the batch and some of the others, to train a classifier of very many classes by these alone.

    All classes that the labels name ("positives") are in the sample, and, drawn without replacement, as many others
    ("negatives") as make it S classes. Which come is a pure function of seed, step and labels: the same on every
    device and backend, whatever was drawn before. Time and memory are of the order of S and the number of labels, not
    of C, and nothing waits for the device.

    * **Size**: S is ``num_sampled``, or, where that is less, the most classes that these labels can name, the smaller
      of their number and C. So no positive is ever missing, and S is known without a look at the labels.
    * **Uniform** negatives are the first of a random permutation of all classes, which is computed place by place. One
      is in the sample with the probability :math:`\pi = (S - P) / (C - P)`, for P positives.
    * **With class_probs** classes are drawn in proportion to these until there are enough different ones. In the terms
      of Cohen and Kaplan: if the first negative beyond the sample came as draw t and c was drawn :math:`n_c` times
      before, then, given all draws of others, c is in the sample with :math:`\pi_c = 1 - (1 - p_c)^{t - n_c}`.

    In both cases a sum over the classes of the sample of :math:`v_c / \pi_c`, with :math:`\pi_c = 1` for the positives,
    is without bias the sum of :math:`v_c` over all classes, whatever v is. That is what ``correction`` of
    :func:`linear_cross_entropy` makes use of, with :math:`v_c = e^{u_c}`.

    Args:
        target: labels of any integer type and shape, or ``(labels, labels, lam)``.
        num_classes: C, up to 2^31 - 1.
        num_sampled: S, positives included, 1 to C.
        sample_rate: instead: S / C, in (0, 1]; S is rounded to at least 1.
        seed: which samples; an integer of 64 bits.
        step: which sample of the seed; an int in [0, 2^32), or a 0-d int64 tensor on the device of ``target``, which is
            read when the kernel runs: a captured graph that adds to it has other classes at every replay.
        class_probs: how probable the classes are relative to one another as negatives, ``(C,)`` on the CPU, finite and
            >= 0; or an :class:`~ltkernels.samplers.AliasTable` of it on the device of ``target``, which saves making it
            in each call. More than S classes must have a probability > 0. Default: all alike.
        ignore_index: label of rows that take no part.
        class_range: the first of the classes that this process has, and the one after the last, as of
            :class:`~ltkernels.ClassParallelLinear`. The sample is of these alone, counted from 0 on, as are
            ``num_sampled``, ``sample_rate`` and ``class_probs``; labels of others are passed over. Every range has
            random numbers of its own. Give all processes the labels of all.

    Returns:
        A :class:`ClassSample`: ``classes`` ``(S,)``, ``log_expected`` ``(S,)``, both on the device of ``target``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong value, shape or device; ``class_probs`` with fewer than S + 1 classes that can be drawn, or
            so uneven that 64 S draws do not find as many.
        IndexError: a label outside ``[0, C)`` that is not ``ignore_index`` (CPU).

    Example:
        >>> import torch, ltkernels as ltk
        >>> features, weight = torch.randn(4, 16), torch.randn(100_000, 16, requires_grad=True)
        >>> labels = torch.tensor([5, 99_999, 5, 70])
        >>> sample = ltk.functional.sample_classes(labels, 100_000, 1000, seed=0, step=17)
        >>> len(sample.classes), sample.places(labels).tolist()
        (1000, [0, 999, 0, 1])
        >>> loss = ltk.functional.linear_cross_entropy(features, weight, labels, sample=sample, sparse_grad=True)
        >>> loss.backward()
        >>> weight.grad._nnz(), weight.grad.shape
        (1000, torch.Size([100000, 16]))

    Source:
        Positives and a uniform share of negatives: An et al., "Partial FC", ICCVW 2021, section 3.3. Sampled softmax:
        Jean et al. 2015, section 3. Probability of inclusion given the others: Cohen and Kaplan, "Summarizing data
        using bottom-k sketches", PODC 2007, section 3.
    """
    num_classes = arg.size("num_classes", num_classes)
    if num_classes > _MOST_CLASSES:
        raise ValueError(f"num_classes: expected at most {_MOST_CLASSES}, found {num_classes}")
    ignore_index = arg.integer("ignore_index", ignore_index)
    labels = _flat_labels(target)
    step, step_at = arg.position("step", step, labels.device, 2**32)
    seed = arg.integer("seed", seed)
    ignored = labels == ignore_index
    if arg.may_look(labels) and labels.device.type == "cpu":
        _refuse_outside(labels, ignored, num_classes, ignore_index)
    first = 0
    if class_range is not None:
        first, num_classes = _range(class_range, num_classes)
        labels = labels - first
        if num_classes == 0:
            return ClassSample(labels.new_empty(0), labels.new_empty(0, dtype=torch.float32), 0)
    size = sampled_size(num_classes, num_sampled, sample_rate)
    table = None if class_probs is None else prepared(class_probs, num_classes, labels.device)
    if len(labels) > size:  # not max(), which would make a symbol of it in a graph
        size = min(len(labels), num_classes)
    if size == num_classes:
        everything = torch.arange(num_classes, device=labels.device)
        return ClassSample(everything, torch.zeros_like(everything, dtype=torch.float32), num_classes)

    def stream(entries: Tensor | None, groups: int, start: int, count: int) -> Tensor:
        nothing = labels.new_empty(0)
        return _sampling.sample_indices(
            nothing, nothing.int(), entries, None, None, None, step_at, num_classes, groups, 1, False, seed, step,
            start, 1, count,
        )  # fmt: skip

    outside = ignored | (labels < 0) | (labels >= num_classes)
    positives = torch.where(outside, num_classes, labels)
    if table is None:  # a round of sample_indices(replacement=False) is a permutation of the classes
        start = (_FIRST_POSITION // num_classes + first) * num_classes
        found = _Distinct.of(positives, [stream(None, num_classes, start, size)], size, num_classes)
        others = (size - found.num_positive).double() / (num_classes - found.num_positive)
        log_expected = torch.where(found.positive, 0.0, others.log())
    else:
        draws = number_of_draws(table, size)
        drawn = stream(table.entries, 0, _FIRST_POSITION + (first << 31), draws)
        # Should the draws not do, which happens once in 10^9 steps, any classes make up the number.
        rest = torch.arange(size, device=labels.device)
        found = _Distinct.of(positives, [drawn, rest], size, num_classes)
        probs = _probs_on(table)[found.classes]
        log_expected = torch.where(found.positive, 0.0, _log_inclusion(probs, *found.draws(len(labels), draws)))
    return ClassSample(found.classes, log_expected.float(), num_classes)


class _Distinct(NamedTuple):
    """The first ``size`` different classes of a list of candidates, which starts with positives.

    What belongs to a sorted list of the candidates is called sorted; ``order`` says which candidate stands where.
    """

    classes: Tensor
    """The classes, ascending."""
    positive: Tensor
    """Whether the class is among the positives."""
    num_positive: Tensor
    """How many of them are different, 0-d."""
    order: Tensor
    rank: Tensor
    """How many different classes the candidates up to this one are."""
    place: Tensor
    """Sorted: where in ``classes`` a candidate's class stands, if it is there."""

    @classmethod
    def of(cls, positives: Tensor, others: list[Tensor], size: int, num_classes: int) -> _Distinct:
        """Of candidates, among which ``num_classes`` stands for none."""
        candidates, order = torch.sort(torch.cat([positives, *others]), stable=True)
        changes = torch.ones_like(candidates, dtype=torch.bool)
        changes[1:] = candidates[1:] != candidates[:-1]
        first = changes & (candidates < num_classes)
        rank = torch.zeros_like(order).scatter(0, order, first.to(order.dtype)).cumsum(0)
        kept = first & (rank[order] <= size)
        place = kept.cumsum(0) - 1
        to = torch.where(kept, place, size)  # one place more, for what is not kept
        is_positive = first & (order < len(positives))
        classes = candidates.new_zeros(size + 1).scatter(0, to, candidates)[:size]
        positive = is_positive.new_zeros(size + 1).scatter(0, to, is_positive)[:size]
        return cls(classes, positive, is_positive.sum(), order, rank, place)

    def draws(self, num_positives: int, count: int) -> tuple[Tensor, Tensor]:
        """The number of the draw that had the first class beyond the sample, and of each class the draws before it.

        Draws are the ``count`` candidates after the positives, counted from 1.
        """
        size = len(self.classes)
        beyond = torch.searchsorted(self.rank, torch.full_like(self.rank[:1], size + 1)).clamp(
            max=num_positives + count
        )
        before = (self.order >= num_positives) & (self.order < beyond)
        # A class that is not in the sample has no draw before.
        times = self.place.new_zeros(size).index_add(0, self.place.clamp(min=0), before.to(self.place.dtype))
        return beyond - num_positives + 1, times


def _log_inclusion(probs: Tensor, beyond: Tensor, times: Tensor) -> Tensor:
    """The log of ``1 - (1 - p)^(t - n)``."""
    never = (beyond - times) * torch.log1p(-probs.clamp(min=2.0**-64))  # a class that makes up the number may have 0
    return torch.log(-torch.expm1(never))


def _range(class_range: tuple[int, int], num_classes: int) -> tuple[int, int]:
    """The first class of a range, and how many it has."""
    if not isinstance(class_range, tuple) or len(class_range) != 2:
        raise TypeError(f"class_range: expected a tuple of 2 integers, found {class_range!r}")
    first, end = (arg.integer("class_range", value) for value in class_range)
    if not 0 <= first <= end <= num_classes:
        raise ValueError(f"class_range: expected 0 <= first <= end <= {num_classes}, found {class_range}")
    return first, end - first


def sampled_size(num_classes: int, num_sampled: int | None, sample_rate: float | None) -> int:
    """The number of classes that is asked for."""
    if (num_sampled is None) == (sample_rate is None):
        raise ValueError(f"num_sampled: expected num_sampled or sample_rate, found {num_sampled=} and {sample_rate=}")
    if sample_rate is not None:
        rate = arg.number("sample_rate", sample_rate, 0.0, 1.0, open_low=True)
        return max(1, round(rate * num_classes))
    size = arg.size("num_sampled", num_sampled)  # type: ignore[arg-type]
    if size > num_classes:
        raise ValueError(f"num_sampled: expected at most num_classes, which is {num_classes}, found {size}")
    return size


def prepared(class_probs: Tensor | AliasTable, num_classes: int, device: torch.device | None = None) -> AliasTable:
    """The probabilities as a table on the device; on any without one."""
    if isinstance(class_probs, Tensor):
        if class_probs.device.type != "cpu":
            raise ValueError(
                "class_probs: expected a tensor on the CPU, or AliasTable(...).to(device), found a tensor on"
                f" {class_probs.device}"
            )
        class_probs = AliasTable(class_probs)
        class_probs = class_probs if device is None else class_probs.to(device)
    if not isinstance(class_probs, AliasTable):
        raise TypeError(
            f"class_probs: expected None, a torch.Tensor or an AliasTable, found {type(class_probs).__name__}"
        )
    if class_probs.num_classes != num_classes:
        raise ValueError(f"class_probs: expected {num_classes} classes, found {class_probs.num_classes}")
    if device is not None and class_probs.device != device:
        raise ValueError(f"class_probs: expected an AliasTable on {device}, found one on {class_probs.device}")
    return class_probs


_probs: WeakKeyDictionary[AliasTable, Tensor] = WeakKeyDictionary()
_numbers: WeakKeyDictionary[AliasTable, dict[int, int]] = WeakKeyDictionary()


def _probs_on(table: AliasTable) -> Tensor:
    """The probabilities where the table's entries are."""
    if table.device.type == "cpu":
        return table.class_probs
    if table not in _probs:
        _probs[table] = table.class_probs.to(table.device)
    return _probs[table]


def number_of_draws(table: AliasTable, size: int) -> int:
    """How many draws find one more than ``size`` different classes but once in 10^9 times.

    Whether a class comes in t draws are negatively associated events (Dubhashi and Ranjan 1998), so that the number of
    classes that come keeps Bernstein's bound for independent ones: it is below its mean by more than ``7 sigma + 14``
    with a probability under e^-20. Where nearly all come, the mean number of those that do not is a sharper bound.
    """
    numbers = _numbers.setdefault(table, {})
    if size not in numbers:
        numbers[size] = _number_of_draws(table.class_probs, size)
    return numbers[size]


# A number of the table, not of what a graph is given. It is what torch.compiler.assume_constant_result does, which
# imports torch._dynamo for it (tests/test_import.py).
number_of_draws._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _number_of_draws(class_probs: Tensor, size: int) -> int:
    probs = class_probs[class_probs > 0]
    if len(probs) <= size:
        raise ValueError(
            f"class_probs: expected more than {size} classes with a probability > 0, for a sample of so many, found"
            f" {len(probs)}"
        )
    never = torch.log1p(-probs)

    def suffice(draws: int) -> bool:
        missing = torch.exp(draws * never)
        mean = float(missing.sum())
        sigma = math.sqrt(float((missing * (1.0 - missing)).sum()))
        return mean <= 1e-9 or len(probs) - mean - 7.0 * sigma - 14.0 >= size + 1

    most = max(_MOST_DRAWS * size, 2**16)
    low, high = 0, size + 1
    while not suffice(high):
        if high == most:
            raise ValueError(
                f"class_probs: expected probabilities of which {most} draws find {size + 1} different classes, found"
                " more uneven ones; make them flatter (class_probs ** 0.75) or the sample smaller"
            )
        low, high = high, min(2 * high, most)
    while high - low > high // 32:
        middle = (low + high) // 2
        low, high = (low, middle) if suffice(middle) else (middle, high)
    return high


def _labels(name: str, value: Tensor, device: torch.device | None = None) -> Tensor:
    if arg.tensor(name, value).dtype not in arg.INTEGER_TYPES:
        raise TypeError(f"{name}: expected labels of an integer type, found {value.dtype}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, found {value.device}")
    return value.to(torch.int64)


def _flat_labels(target: Target) -> Tensor:
    """All labels of a target in one row."""
    if not isinstance(target, tuple):
        return _labels("target", target).reshape(-1)
    if len(target) != 3:
        raise ValueError(f"target: expected labels or (labels, other labels, lam), found a tuple of {len(target)}")
    first = _labels("target[0]", target[0]).reshape(-1)
    return torch.cat([first, _labels("target[1]", target[1], first.device).reshape(-1)])


def labels_of_all(target: Target, ranks: Ranks, device: torch.device) -> Tensor:
    """The labels of the rows of all processes, on each of them; ``device`` is the classifier's."""
    try:
        labels = _flat_labels(target)
    except (TypeError, ValueError):
        with suppress(RuntimeError):  # tells the others, who would wait
            ranks.agree(Header(1, 0, 0, 0, 0, 0), device, False)
        raise
    headers = ranks.agree(Header(0, len(labels), 0, 0, 0, 0), device, False)
    return ranks.gathered(labels, [header.rows for header in headers])


def _refuse_outside(labels: Tensor, ignored: Tensor, num_classes: int, ignore_index: int) -> None:
    wrong = (((labels < 0) | (labels >= num_classes)) & ~ignored).reshape(-1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(
            f"target: expected labels in [0, {num_classes}) or ignore_index {ignore_index}, found"
            f" {int(labels.reshape(-1)[row])} at row {row}"
        )


class Sampled(NamedTuple):
    """The arguments of a loss of all classes as those of the loss of a sample."""

    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Target
    weight: Tensor | None
    class_scale: Tensor | None
    class_bias: Tensor | None
    class_margin: Tensor | float | None
    label_smoothing: Tensor | float


def at_sample(
    sample: ClassSample,
    all_classes: Sampled,
    ignore_index: int | None,
    scale: float,
    gated: bool,
    correction: bool,
    sparse_grad: bool,
) -> Sampled:
    """The rows of the classifier and of the tables that a sample names, and the labels' places in it.

    The correction is a bias of the adjusted logits, which are ``scale`` times what ``class_bias`` is added to.
    """
    if not isinstance(sample, ClassSample):
        raise TypeError(f"sample: expected a ClassSample, found {type(sample).__name__}")
    for name, value in (("correction", correction), ("sparse_grad", sparse_grad)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, found {type(value).__name__}")
    if correction and gated:
        raise ValueError("correction: expected False with row_gate, which would multiply it, found True")
    index, log_expected, num_classes = sample
    given = all_classes._asdict()
    weight, target = given.pop("linear_weight"), given.pop("target")
    if arg.tensor("linear_weight", weight).dim() < 2 or weight.shape[0] != num_classes:
        raise ValueError(
            f"linear_weight: expected {num_classes} classes as sample has, found shape {tuple(weight.shape)}"
        )
    if weight.device != index.device:
        raise ValueError(f"sample: expected device {weight.device} as linear_weight's, found {index.device}")
    if sparse_grad and weight.dim() > 2:
        raise ValueError(
            "sparse_grad: expected False with linear_weight of more than two dimensions, found True with shape"
            f" {tuple(weight.shape)}"
        )

    def row(name: str, value: Tensor | float | None) -> Tensor | float | None:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if name != "linear_bias" and value.dim() > 1 or value.shape[0] != num_classes:
            raise ValueError(f"{name}: expected shape ({num_classes},), one value a class, found {tuple(value.shape)}")
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating type, found {value.dtype}")
        if value.device != index.device:
            raise ValueError(f"{name}: expected device {index.device} as linear_weight's, found {value.device}")
        if name == "linear_bias" and sparse_grad:
            return torch.gather(value, 0, index, sparse_grad=True)
        return value.index_select(0, index)

    at = {name: row(name, value) for name, value in given.items()}
    if correction:
        offset = log_expected / -arg.number("scale", scale, 0.0, math.inf, open_low=True)
        at["class_bias"] = offset if at["class_bias"] is None else at["class_bias"] + offset
    rows = F.embedding(index, weight, sparse=True) if sparse_grad else weight.index_select(0, index)
    return Sampled(rows, target=places(sample, target, ignore_index), **at)  # type: ignore[arg-type]


def places(sample: ClassSample, target: Target, ignore_index: int | None) -> Target:
    """A target of labels as one of places."""
    ignored = _IGNORED if ignore_index is None else arg.integer("ignore_index", ignore_index)
    if isinstance(target, tuple):
        _flat_labels(target)  # refuses what is no target
        return sample.places(target[0], ignored), sample.places(target[1], ignored), target[2]
    if arg.tensor("target", target).is_floating_point():
        raise ValueError(
            "sample: expected None with probability targets, which are of all classes, found a ClassSample"
        )
    return sample.places(target, ignored)

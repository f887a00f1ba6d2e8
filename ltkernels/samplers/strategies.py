"""Strategies: how probable each class is, whether members come with or without replacement, how long an epoch is.

Every strategy is a few parameters of :func:`ltkernels.functional.sample_indices`. With n_c samples of class c of N:

====================  ===============================================================  ====================
name                  what it draws                                                    samples in an epoch
====================  ===============================================================  ====================
``instance``          every sample alike; without replacement, a plain shuffle         N
``class_balanced``    every class alike, then every member alike                       N
``square_root``       class c in proportion to the square root of n_c                  N
``reversed``          class c in proportion to 1 / n_c (BBN)                           N
``power``             class c in proportion to n_c to a power: 1, 0, 0.5, -1 are       N
                      "instance", "class_balanced", "square_root", "reversed"
``effective_number``  a sample of class c in proportion to 1 / (1 - beta^n_c)          N
``progressive``       from "instance" to "class_balanced" in the course of training    N
``class_weight``      a sample of class c in proportion to ``class_weight[c]``         N
``sample_weight``     sample i in proportion to ``sample_weight[i]``                   N
``over_sampling``     every class max n_c times, its members equally often             C max n_c
``under_sampling``    every class min n_c times, no sample twice                       C min n_c
``class_aware``       rounds of all classes, ``draws_per_class`` of each at a time     C max n_c
``repeat_factor``     every sample once, those of rare classes more often (LVIS)          from N on
``m_per_class``       batches of ``batch_size / m`` classes, ``m`` samples of each     N, in whole batches
====================  ===============================================================  ====================

With replacement, classes and members are drawn independently. ``replacement=False`` deals classes in rounds, in the
same proportions, and gives every member of a class once before any twice.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels import functional as F
from ltkernels import rebalance
from ltkernels.class_draws import AliasTable, ClassRounds
from ltkernels.class_index import ClassIndex
from ltkernels.samplers import repeats

Weights = Sequence[float] | npt.NDArray[Any] | Tensor


class EpochSamples(Protocol):
    """The samples of an epoch, by position."""

    @property
    def num_samples(self) -> int:
        """How many they are, if the sampler's user says nothing else."""

    def indices(self, start: int, stop: int, step: int, *, seed: int, epoch: int) -> Tensor:
        """The samples at positions ``range(start, stop, step)``, int64."""


@dataclass(frozen=True)
class Draws:
    """Samples whose class is drawn or dealt: what :func:`ltkernels.functional.sample_indices` needs to know."""

    class_index: ClassIndex
    class_draws: AliasTable | ClassRounds | None
    num_samples: int

    def indices(self, start: int, stop: int, step: int, *, seed: int, epoch: int) -> Tensor:
        return F.sample_indices(
            self.class_index,
            start,
            stop,
            step,
            seed=seed,
            epoch=epoch,
            class_probs=self.class_draws,
            replacement=not isinstance(self.class_draws, ClassRounds),
        )


class Strategy(ABC):
    """What a sampler needs to know beside labels and seed. Its repr stands for it in a sampler's state."""

    by_epoch: ClassVar[bool] = False
    """Whether :meth:`samples` has to be asked in each epoch."""
    takes_multilabel: ClassVar[bool] = False
    """Whether samples may have several classes."""

    @property
    def length_varies(self) -> bool:
        """Whether epochs have different numbers of samples, if the sampler's user says nothing else."""
        return False

    @abstractmethod
    def samples(self, class_index: ClassIndex, seed: int, epoch: int) -> EpochSamples:
        """The samples of an epoch."""

    def check_dataset(self, size: int) -> None:  # noqa: B027 (most strategies have nothing that could be wrong)
        """Refuses a data set of another number of samples than the strategy was made for."""


@dataclass(frozen=True)
class Instance(Strategy):
    """Every sample alike: without replacement a plain shuffle, as of ``RandomSampler``."""

    replacement: bool = False

    def __post_init__(self) -> None:
        _check_bool("replacement", self.replacement)

    def samples(self, class_index: ClassIndex, seed: int, epoch: int) -> Draws:
        return Draws(class_index.pooled(), None if self.replacement else ClassRounds(1), class_index.num_samples)


@dataclass(frozen=True)
class Power(Strategy):
    """Class c in proportion to ``n_c ** power``.

    Source:
        Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 3:
        power 1 is instance-balanced, 0 class-balanced, 0.5 square-root sampling. Zhou et al., "BBN", CVPR 2020: -1.
    """

    power: float
    replacement: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "power", arg.number("power", self.power, -arg.FLOAT32.max, math.inf) + 0.0)
        _check_bool("replacement", self.replacement)

    def samples(self, class_index: ClassIndex, seed: int, epoch: int) -> Draws:
        counts = _counts_of_all(class_index)
        # Relative to the most probable class, no power is infinite.
        mass = None if self.power == 0 else (self.power * (counts / counts.max()).log()).softmax(0)
        return _draws(class_index, mass, self.replacement)


@dataclass(frozen=True)
class EffectiveNumber(Strategy):
    """A sample of class c in proportion to ``(1 - beta) / (1 - beta ** n_c)``: the class in proportion to n_c times it.

    Source:
        Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, as sampling weights in
        LDAM-DRW's and MiSLAS's code.
    """

    beta: float = 0.9999
    replacement: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", rebalance._beta(self.beta))
        _check_bool("replacement", self.replacement)

    def samples(self, class_index: ClassIndex, seed: int, epoch: int) -> Draws:
        counts = _counts_of_all(class_index)
        # expm1 as in rebalance.effective_number_weight; the factor 1 - beta cancels.
        log_beta = math.log(self.beta) if self.beta else -math.inf
        return _draws(class_index, -counts / torch.expm1(counts * log_beta), self.replacement)


@dataclass(frozen=True)
class Progressive(Strategy):
    """Class c in proportion to ``lam / C + (1 - lam) n_c / N`` with ``lam = epoch / (epochs - 1)``, at most 1.

    Source:
        Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, equation 3. The
        published code takes lam from ``linspace(0, 1, epochs)``, which the paper's formula never reaches the end of.
    """

    by_epoch = True
    epochs: int
    replacement: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "epochs", _at_least_one("epochs", self.epochs))
        _check_bool("replacement", self.replacement)

    def samples(self, class_index: ClassIndex, seed: int, epoch: int) -> Draws:
        counts = _counts_of_all(class_index)
        lam = min(epoch / max(self.epochs - 1, 1), 1.0)
        return _draws(class_index, lam / counts.numel() + (1 - lam) * counts / counts.sum(), self.replacement)


@dataclass(frozen=True, eq=False, repr=False)
class ClassWeight(Strategy):
    """A sample of class c in proportion to ``class_weight[c]``, as of ``WeightedRandomSampler(class_weight[labels])``.

    A class of weight 0 never comes, nor does one without samples.
    """

    class_weight: Weights
    replacement: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_weight", _weights("class_weight", self.class_weight, "class"))
        _check_bool("replacement", self.replacement)

    def samples(self, class_index: ClassIndex, seed: int, epoch: int) -> Draws:
        weight = torch.as_tensor(self.class_weight)
        if weight.shape != (class_index.num_classes,):
            raise ValueError(
                f"class_weight: expected shape ({class_index.num_classes},), one weight a class, found"
                f" ({weight.numel()},)"
            )
        mass = weight / weight.max() * class_index.class_counts
        if not mass.any():
            raise ValueError("class_weight: expected a weight > 0 of a class with samples, found none")
        return _draws(class_index, mass, self.replacement)

    def __repr__(self) -> str:
        return f"ClassWeight({_digest(self.class_weight)}, replacement={self.replacement})"


@dataclass(frozen=True, eq=False, repr=False)
class SampleWeight(Strategy):
    """Sample i in proportion to ``sample_weight[i]``, as of ``WeightedRandomSampler``, without its limit of 2^24.

    The weights are those of all samples of the data set, also where a sampler is for some of them.
    """

    sample_weight: Weights

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_weight", _weights("sample_weight", self.sample_weight, "sample"))

    def check_dataset(self, size: int) -> None:
        weight = torch.as_tensor(self.sample_weight)
        if weight.numel() != size:
            raise ValueError(f"sample_weight: expected shape ({size},), one weight a sample, found ({weight.numel()},)")

    def samples(self, class_index: ClassIndex, seed: int, epoch: int) -> Draws:
        weight, members, size = torch.as_tensor(self.sample_weight), class_index.members, class_index.num_samples
        least = int(members.max()) + 1 if members.numel() else size
        if weight.numel() < least:
            raise ValueError(
                f"sample_weight: expected at least {least}, one weight a sample of the data set, found {weight.numel()}"
            )
        mass = weight[members.long()] if members.numel() else weight[:size]
        if not mass.any():
            raise ValueError("sample_weight: expected a weight > 0 of a sample that the sampler is for, found none")
        return Draws(ClassIndex.singletons(size, members if members.numel() else None), AliasTable(mass), size)

    def __repr__(self) -> str:
        return f"SampleWeight({_digest(self.sample_weight)})"


@dataclass(frozen=True)
class ClassAware(Strategy):
    """Rounds of all classes in random order, of each ``draws_per_class`` samples one after the other.

    An epoch has C times as many samples as the largest class (``length="max"``), so that each class comes that often,
    or as the smallest (``"min"``), so that no sample comes twice; with several draws a class, give or take a group of
    them in the last round.

    Source:
        Shen et al., "Relay Backpropagation for Effective Learning of Deep CNNs", ECCV 2016 (class-aware sampling);
        Kang et al., ICLR 2020, use ``draws_per_class=4`` to retrain classifiers (cRT).
    """

    draws_per_class: int = 1
    length: str = "max"

    def __post_init__(self) -> None:
        object.__setattr__(self, "draws_per_class", _at_least_one("draws_per_class", self.draws_per_class))
        arg.choice("length", self.length, ("max", "min"))

    def samples(self, class_index: ClassIndex, seed: int, epoch: int) -> Draws:
        counts = _counts_of_all(class_index)
        of_each = counts.max() if self.length == "max" else counts.min()
        rounds = ClassRounds(class_index.num_classes, draws_per_class=self.draws_per_class)
        return Draws(class_index, rounds, class_index.num_classes * int(of_each))


@dataclass(frozen=True)
class RepeatFactor(Strategy):
    """Every sample of the data set, repeated by the largest factor of its classes, ``max(1, sqrt(threshold / f_c))``.

    f_c is the share of the samples that have class c; a sample may have several classes, or none. ``"stochastic"``
    rounds factors anew in each epoch, so that their fractions count and epochs differ in length; ``"ceil"`` rounds
    them up. Training loops that count the batches of an epoch once (Lightning, transformers) leave out what a later
    epoch has more: give the sampler ``num_samples`` there, or take ``"ceil"``.

    Source:
        Gupta et al., "LVIS", CVPR 2019, section 4.3; stochastic as detectron2's ``RepeatFactorTrainingSampler``, ceil
        as mmengine's ``ClassBalancedDataset``.
    """

    by_epoch = True
    takes_multilabel = True
    threshold: float
    rounding: str = "stochastic"

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", arg.number("threshold", self.threshold, 0.0, math.inf, open_low=True))
        arg.choice("rounding", self.rounding, ("stochastic", "ceil"))

    @property
    def length_varies(self) -> bool:
        return self.rounding == "stochastic"

    def samples(self, class_index: ClassIndex, seed: int, epoch: int) -> Draws:
        members, counts = class_index.members.long(), class_index.class_counts
        size = class_index.data_size if class_index.is_multilabel else class_index.num_samples
        factors = repeats.repeat_factor(counts, self.threshold, size).repeat_interleave(counts)
        if class_index.is_multilabel and size is not None:
            keys = torch.arange(size)
            factors = torch.ones(size, dtype=torch.float64).scatter_reduce(0, members, factors, "amax")
        else:
            keys = members if members.numel() else torch.arange(class_index.num_samples)
        counts = torch.from_numpy(repeats.rounded(keys.numpy(), factors.numpy(), seed, epoch, self.rounding))
        repeated = keys.repeat_interleave(counts)
        return Draws(ClassIndex.singletons(len(repeated), repeated).pooled(), ClassRounds(1), len(repeated))


@dataclass(frozen=True)
class MPerClass(Strategy):
    """Batches of ``batch_size / m`` different classes with ``m`` samples of each, different where the class has m.

    The sampler's batches start at multiples of ``batch_size``: give the ``DataLoader`` the same. Classes take turns: in
    a round of batches each comes at most once, and all but fewer than a batch has. Where W ranks share a stream,
    ``batch_size`` is that of all ranks, and ``m`` a multiple of W: each rank has ``m / W`` samples of the same classes.
    """

    m: int
    batch_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "m", _at_least_one("m", self.m))
        object.__setattr__(self, "batch_size", _at_least_one("batch_size", self.batch_size))
        if self.batch_size % self.m:
            raise ValueError(f"batch_size: expected a multiple of m, which is {self.m}, found {self.batch_size}")

    def samples(self, class_index: ClassIndex, seed: int, epoch: int) -> Draws:
        _counts_of_all(class_index)
        in_batch, classes = self.batch_size // self.m, class_index.num_classes
        if in_batch > classes:
            raise ValueError(
                f"batch_size: expected at most {classes} classes times m, {classes * self.m}, found {self.batch_size}"
            )
        in_round = classes - classes % in_batch
        rounds = ClassRounds(classes, draws_per_class=self.m, classes_per_round=in_round, distinct=True)
        return Draws(class_index, rounds, max(class_index.num_samples // self.batch_size, 1) * self.batch_size)


STRATEGIES: dict[str, tuple[type[Strategy], Mapping[str, Any]]] = {
    "instance": (Instance, {}),
    "class_balanced": (Power, {"power": 0.0}),
    "square_root": (Power, {"power": 0.5}),
    "reversed": (Power, {"power": -1.0}),
    "power": (Power, {}),
    "effective_number": (EffectiveNumber, {}),
    "progressive": (Progressive, {}),
    "class_weight": (ClassWeight, {}),
    "sample_weight": (SampleWeight, {}),
    "over_sampling": (ClassAware, {"draws_per_class": 1, "length": "max"}),
    "under_sampling": (ClassAware, {"draws_per_class": 1, "length": "min"}),
    "class_aware": (ClassAware, {"length": "max"}),
    "repeat_factor": (RepeatFactor, {}),
    "m_per_class": (MPerClass, {}),
}
"""By name: the class, and those of its parameters that the name stands for. Each is a dataclass."""


def as_strategy(strategy: str | Strategy, parameters: Mapping[str, Any]) -> Strategy:
    """The strategy of a name with its parameters; a strategy itself takes none."""
    if isinstance(strategy, Strategy):
        if parameters:
            raise TypeError(f"{min(parameters)}: expected no parameter beside a Strategy, found {strategy!r}")
        return strategy
    if not isinstance(strategy, str):
        raise TypeError(f"strategy: expected a name or a Strategy, found {type(strategy).__name__}")
    kind, fixed = STRATEGIES[arg.choice("strategy", strategy, tuple(STRATEGIES))]
    taken = [field for field in fields(kind) if field.name not in fixed]  # type: ignore[arg-type]
    unknown = sorted(parameters.keys() - {field.name for field in taken})
    if unknown:
        names = ", ".join(field.name for field in taken) or "none"
        raise TypeError(f"{unknown[0]}: expected parameters of strategy {strategy!r}, which are: {names}")
    missing = [field.name for field in taken if field.default is MISSING and field.name not in parameters]
    if missing:
        raise TypeError(f"{missing[0]}: expected with strategy {strategy!r}, found nothing")
    return kind(**fixed, **parameters)


def _draws(class_index: ClassIndex, mass: Tensor | None, replacement: bool) -> Draws:
    """As many samples as the index has, classes in proportion to ``mass`` or all alike."""
    draws: AliasTable | ClassRounds | None = None
    if not replacement:
        draws = ClassRounds(class_index.num_classes, mass)
    elif mass is not None:
        draws = AliasTable(mass)
    return Draws(class_index, draws, class_index.num_samples)


def _counts_of_all(class_index: ClassIndex) -> Tensor:
    """The class counts in float64, none of which may be 0."""
    counts = class_index.class_counts
    empty = (counts == 0).nonzero().flatten()
    if empty.numel():
        more = f" and {empty.numel() - 1} more" if empty.numel() > 1 else ""
        raise ValueError(
            f"labels: expected a sample of every class, found none of class {int(empty[0])}{more}; number the classes"
            " without gaps, or give strategy='class_weight', which leaves out classes without samples"
        )
    return counts.double()


def _weights(name: str, values: Weights, of: str) -> Tensor:
    """Weights as a new float64 CPU tensor: finite, >= 0, not all 0."""
    if isinstance(values, Tensor):
        if values.dtype is torch.bool or values.is_complex():
            raise TypeError(f"{name}: expected integers or floats, found {values.dtype}")
        weight = values.detach().to("cpu", torch.float64, copy=True)
    else:
        weight = torch.tensor(rebalance._as_array(name, values, kinds="iuf"), dtype=torch.float64)
    if weight.dim() != 1 or weight.numel() == 0:
        raise ValueError(f"{name}: expected one weight a {of}, found shape {tuple(weight.shape)}")
    for wrong, expected in ((~weight.isfinite(), "all finite"), (weight < 0, "all >= 0")):
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise ValueError(f"{name}: expected {expected}, found {weight[at]:g} at {of} {at}")
    if not weight.any():
        raise ValueError(f"{name}: expected at least one > 0, found {weight.numel()} zeros")
    return weight


def _digest(weight: Weights) -> str:
    """What tells weights apart in a repr."""
    values = torch.as_tensor(weight).numpy().astype("<f8")
    return f"{values.size} weights, {hashlib.blake2b(values.data, digest_size=8).hexdigest()}"


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, found {value!r}")


def _at_least_one(name: str, value: int) -> int:
    value = arg.integer(name, value)
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, found {value}")
    return value

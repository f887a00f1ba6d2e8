"""Class-balanced sampling against what people use today: draws, the class index, an epoch of a Python sampler.

Every form gives indices; before it is timed, they are held against what was asked for: a chi-square test of classes and
of the halves of classes for what draws, equality for what has one answer. A form that fails is refused. Forms:

* ``torch.multinomial``: over a weight for each sample (in float64: float32 loses the last of a million weights), what
  ``WeightedRandomSampler`` does, and with it most samplers for long-tailed data;
* ``torch, vectorised``: the cheapest way we know to say it in plain PyTorch: a class by ``randint`` (and by Walker's
  alias table, where classes are not alike), a member by ``rand`` times the size, int64 throughout;
* ``np.take`` and ``index_select``: only the gather of the members, of places that are known: the floor, less work;
* ``torch.randperm``: a permutation of all samples at once, where ours is computed position by position;
* ``torch.argsort``: stable, of the labels, what makes a class index elsewhere;
* ``RandomSampler`` (no balance: less work), ``WeightedRandomSampler``, ``as torchsampler`` (that package iterates over
  the tensor of ``torch.multinomial`` and looks each sample up in a list; it needs torchvision and pandas, so its way is
  written here) and ``MPerClassSampler`` of pytorch-metric-learning, where that is installed.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ltkernels import functional
from ltkernels.backends import explain
from ltkernels.bench import runner
from ltkernels.bench.device import Call, Device
from ltkernels.bench.peers import OURS
from ltkernels.bench.scenarios import IMBALANCE_FACTOR, Scenario
from ltkernels.class_draws import AliasTable
from ltkernels.class_index import ClassIndex

MULTINOMIAL = "torch.multinomial"
VECTORISED = "torch, vectorised"
TAKE = "np.take"
INDEX_SELECT = "index_select"
ARGSORT = "torch.argsort"
RANDPERM = "torch.randperm"
RANDOM = "RandomSampler"
WEIGHTED = "WeightedRandomSampler"
TORCHSAMPLER = "as torchsampler"
M_PER_CLASS = "MPerClassSampler"
LESS_WORK = (TAKE, INDEX_SELECT, RANDOM)

SCENARIOS: tuple[Scenario, ...] = (
    Scenario(1_280_000, 1000, "as many as ImageNet"),
    Scenario(10_000_000, 8142, "classes of iNaturalist 2018"),
)
MOST_DRAWS = 1_000_000
MOST_MULTINOMIAL = 2**24  # categories that torch.multinomial takes
MOST_DEVIATION = 6.0  # standard deviations of chi-square
M = 4  # samples of a class in a batch of MPerClassSampler
SLOW_ROUNDS = 5

Draw = Callable[[], Tensor]


@dataclass(frozen=True)
class Data:
    """One data set: long-tailed counts (C,), labels (N,) in random order, and what the forms prepare of them."""

    counts: Tensor
    labels: Tensor
    index: ClassIndex
    order: Tensor
    """int64 ``(N,)``: samples in the order of their classes."""
    draws: int

    def sample_weights(self, class_probs: Tensor) -> Tensor:
        """float64 ``(N,)``: so that classes come with ``class_probs`` and a class's samples alike."""
        return (class_probs / self.counts)[self.labels]


@lru_cache(maxsize=1)  # variants of a scenario follow one another
def make_data(shape: Scenario, seed: int = 0) -> Data:
    """A data set of ``shape.n`` samples whose class counts fall exponentially by IMBALANCE_FACTOR, at least one each.

    Raises:
        ValueError: fewer samples than classes.
    """
    if shape.n < shape.c:
        raise ValueError(f"scenario: expected at least a sample for each class, found {shape.name}")
    share = IMBALANCE_FACTOR ** -torch.linspace(0, 1, shape.c, dtype=torch.float64)
    counts = 1 + (share / share.sum() * (shape.n - shape.c)).long()
    counts[0] += shape.n - counts.sum()
    labels = torch.arange(shape.c).repeat_interleave(counts)
    labels = labels[torch.randperm(shape.n, generator=torch.Generator().manual_seed(seed))]
    order = labels.argsort(stable=True)
    return Data(counts, labels, ClassIndex(labels, shape.c), order, min(MOST_DRAWS, shape.n))


@dataclass(frozen=True)
class Forms:
    """What is timed against each other, how each form's result is judged, and what cannot be timed."""

    calls: dict[str, Call]
    check: Callable[[str], str | None]
    """The reason why a form's result is wrong, or None."""
    refused: dict[str, str]
    backend: str | None = None
    model_bytes: int | None = None


@dataclass(frozen=True)
class Variant:
    """One thing to measure.

    Attributes:
        name: identifier in records and on the command line.
        title: for tables.
        forms: makes the forms for a data set.
        slow: a round takes seconds, so that few have to do.
    """

    name: str
    title: str
    forms: Callable[[Data], Forms]
    slow: bool = False


def deviation(indices: Tensor, data: Data, class_probs: Tensor) -> float:
    """How far draws are from ``class_probs`` and equal members, in standard deviations of chi-square.

    Cells are the two halves of each class, as far as they are not expected to be empty.
    """
    rank = torch.empty_like(data.order)
    rank[data.order] = torch.arange(len(data.order))
    first = torch.cat([data.counts.new_zeros(1), data.counts.cumsum(0)])
    classes = data.labels[indices]
    lower = data.counts // 2
    upper_half = rank[indices] - first[classes] >= lower[classes]
    found = torch.bincount(2 * classes + upper_half, minlength=2 * len(data.counts)).double()
    halves = torch.stack([lower, data.counts - lower], 1) / data.counts.unsqueeze(1)
    expected = (class_probs / class_probs.sum()).unsqueeze(1) * halves * len(indices)
    kept = expected.flatten() > 0
    if found[~kept].any():
        return math.inf
    statistic = float(((found - expected.flatten())[kept] ** 2 / expected.flatten()[kept]).sum())
    freedom = max(1, int(kept.sum()) - 1)
    return (statistic - freedom) / math.sqrt(2 * freedom)


def _of_distribution(draws: Mapping[str, Draw], data: Data, probs: Tensor) -> Callable[[str], str | None]:
    def check(name: str) -> str | None:
        indices = draws[name]()
        if len(indices) != data.draws or not 0 <= int(indices.min()) <= int(indices.max()) < len(data.labels):
            return f"gives {len(indices)} indices up to {int(indices.max())}, asked for {data.draws}"
        apart = deviation(indices.long(), data, probs)
        # Far above zero: another distribution. Far below: too even for independent draws.
        return None if abs(apart) < MOST_DEVIATION else f"has another distribution: {apart:.1f} standard deviations"

    return check


def _vectorised(data: Data, class_probs: Tensor | None) -> Draw:
    """In place and by index_select, which take half the time of new tensors and of brackets."""
    first, sizes = data.counts.cumsum(0) - data.counts, data.counts.double()
    table = None if class_probs is None else AliasTable(class_probs).entries
    threshold = None if table is None else (table & 0xFFFFFFFF).double() / 2**32
    alias = None if table is None else (table >> 32).to(torch.int32)

    def draw() -> Tensor:
        classes = torch.randint(len(data.counts), (data.draws,), dtype=torch.int32)
        if threshold is not None and alias is not None:
            stays = torch.rand(data.draws, dtype=torch.float64) < threshold.index_select(0, classes)
            classes = torch.where(stays, classes, alias.index_select(0, classes))
        # float64: the product with float32 is rounded up to the size at times.
        member = torch.rand(data.draws, dtype=torch.float64).mul_(sizes.index_select(0, classes)).long()
        return data.order.index_select(0, member.add_(first.index_select(0, classes)))

    return draw


def _draw_forms(data: Data, class_probs: Tensor | None) -> Forms:
    table = None if class_probs is None else AliasTable(class_probs)
    probs = torch.ones(len(data.counts), dtype=torch.float64) if class_probs is None else class_probs
    starts = itertools.count(0, data.draws)  # goes on in the stream, as an epoch does

    def ours(start: int | None = None) -> Tensor:
        start = next(starts) if start is None else start
        return functional.sample_indices(data.index, start, start + data.draws, seed=1, class_probs=table)

    draws: dict[str, Draw] = {OURS: ours, VECTORISED: _vectorised(data, class_probs)}
    refused: dict[str, str] = {}
    if len(data.labels) <= MOST_MULTINOMIAL:
        weights = data.sample_weights(probs)
        draws[MULTINOMIAL] = lambda: torch.multinomial(weights, data.draws, replacement=True)
    else:
        refused[MULTINOMIAL] = f"takes at most 2^24 categories, found {len(data.labels)}"

    # Only the gather: of the very places that ours reads.
    members = data.index.members
    rank = torch.empty_like(data.order)
    rank[data.order] = torch.arange(len(data.order))
    places = rank[ours(0)]
    array, where = members.numpy(), places.numpy()
    gathers: dict[str, Draw] = {
        TAKE: lambda: torch.from_numpy(array.take(where)),
        INDEX_SELECT: lambda: members.index_select(0, places),
    }
    distribution = _of_distribution(draws, data, probs)

    def check(name: str) -> str | None:
        if name in draws:
            return distribution(name)
        return None if torch.equal(gathers[name]().long(), ours(0)) else "gathers other members"

    backend = explain(functional.sample_indices, data.index, 0, 1, seed=1, class_probs=table).backend
    # Read a member, write an index.
    moved = data.draws * (members.element_size() + 8)
    return Forms({**draws, **gathers}, check, refused, backend, moved)


def _index_forms(data: Data) -> Forms:
    labels, classes = data.labels, len(data.counts)
    results: dict[str, Callable[[], Any]] = {
        OURS: lambda: ClassIndex(labels, classes),
        ARGSORT: lambda: torch.argsort(labels, stable=True),
    }

    def check(name: str) -> str | None:
        made = results[name]()
        members = made.members.long() if name == OURS else made
        return None if torch.equal(members, data.order) else "sorts otherwise"

    # Read each label twice (to count, to place), write its member.
    return Forms(results, check, {}, None, len(labels) * (2 * labels.element_size() + 4))


def _shuffle_forms(data: Data) -> Forms:
    pooled, size = data.index.pooled(), len(data.labels)
    epochs = itertools.count()
    results: dict[str, Draw] = {
        OURS: lambda: functional.sample_indices(pooled, 0, size, seed=1, epoch=next(epochs), replacement=False),
        RANDPERM: lambda: torch.randperm(size),
    }

    def check(name: str) -> str | None:
        shuffled = results[name]()
        if not torch.equal(shuffled.sort().values, torch.arange(size)):
            return "is no permutation"
        return "is in order" if torch.equal(shuffled, torch.arange(size)) else None

    return Forms({**results}, check, {})


def _torchsampler(weights: Tensor, draws: int) -> Iterator[int]:
    indices = list(range(len(weights)))
    return (indices[i] for i in torch.multinomial(weights, draws, replacement=True))


def _epoch_forms(data: Data) -> Forms:
    refused: dict[str, str] = {}
    samplers: dict[str, Iterable[int]] = {}
    try:
        samplers[OURS] = importlib.import_module("ltkernels.samplers").LongTailSampler(
            data.index, "class_balanced", num_samples=data.draws
        )
    except ImportError as error:
        refused[OURS] = f"cannot be imported: {error}"
    samplers[RANDOM] = torch.utils.data.RandomSampler(range(data.draws))
    if len(data.labels) <= MOST_MULTINOMIAL:
        weights = data.sample_weights(torch.ones(len(data.counts), dtype=torch.float64))
        samplers[WEIGHTED] = torch.utils.data.WeightedRandomSampler(weights, data.draws)  # type: ignore[arg-type]
        samplers[TORCHSAMPLER] = _Again(lambda: _torchsampler(weights, data.draws))
    try:
        package = importlib.import_module("pytorch_metric_learning.samplers")
    except ImportError:
        refused[M_PER_CLASS] = "pytorch-metric-learning is not installed"
    else:
        samplers[M_PER_CLASS] = package.MPerClassSampler(data.labels, M, length_before_new_iter=data.draws)

    def check(name: str) -> str | None:
        found = list(samplers[name])
        rounded = M * len(data.counts) if name == M_PER_CLASS else 1  # to whole turns of the classes
        if not data.draws - rounded < len(found) <= data.draws or not 0 <= min(found) <= max(found) < len(data.labels):
            return f"gives {len(found)} indices up to {max(found)}, asked for {data.draws} below {len(data.labels)}"
        return None

    def consumed(sampler: Iterable[int]) -> Call:
        return lambda: deque(sampler, maxlen=0)

    return Forms({name: consumed(sampler) for name, sampler in samplers.items()}, check, refused)


@dataclass(frozen=True)
class _Again:
    """What can be iterated anew."""

    begin: Callable[[], Iterator[int]]

    def __iter__(self) -> Iterator[int]:
        return self.begin()


VARIANTS: tuple[Variant, ...] = (
    Variant("balanced", "class-balanced", lambda data: _draw_forms(data, None)),
    Variant("square_root", "square root of the counts", lambda data: _draw_forms(data, data.counts.double().sqrt())),
    Variant("shuffle", "every sample once", _shuffle_forms, slow=True),
    Variant("class_index", "class index", _index_forms, slow=True),
    Variant("epoch", "a Python epoch", _epoch_forms, slow=True),
)


def measure(variant: Variant, shape: Scenario, device: Device, plan: runner.Plan) -> runner.Measurement:
    """Checks and times every form of one variant on one data set.

    Args:
        variant: what to measure.
        shape: N samples of C classes.
        device: the CPU.
        plan: budget; mode, type and compile mean nothing here.

    Returns:
        One record a form, and the refused forms with reasons.

    Raises:
        WrongResultError: the result of ours is wrong.
        ValueError: fewer samples than classes.
    """
    torch.default_generator.manual_seed(plan.seed)
    data = make_data(shape, plan.seed)
    forms = variant.forms(data)
    refused = dict(forms.refused)
    refused |= {name: reason for name in forms.calls if (reason := forms.check(name)) is not None}
    if OURS in forms.calls and OURS in refused:
        raise runner.WrongResultError(f"ltkernels, {variant.name} of {shape.name}: {refused[OURS]}")
    calls = {name: call for name, call in forms.calls.items() if name not in refused}
    if variant.slow:
        plan = replace(plan, min_rounds=min(plan.min_rounds, SLOW_ROUNDS), warm_up_rounds=1)
    samples = runner.interleave(calls, device, plan)
    common = {
        **{"op": "sampling", "variant": variant.name, "scenario": shape.name, "source": shape.source},
        **{"N": shape.n, "C": shape.c, "dtype": str(data.index.members.dtype).removeprefix("torch.")},
        **{"mode": f"{data.draws} draws", "memory": plan.memory, "threads": torch.get_num_threads()},
        **dict.fromkeys(("frac_copy", "rel_err_loss", "rel_err_grad", "rounding_grad")),
    }
    records = []
    for name, call in calls.items():
        peak = device.peak_bytes(call) if variant.name != "epoch" else None  # the profiler would see each index
        of_form = {
            "peer": name,
            "less_work": name in LESS_WORK,
            "backend": forms.backend if name == OURS else None,
            "model_bytes": None if name in LESS_WORK else forms.model_bytes,
            "launches": None,
            "peak_mb": None if peak is None else round(peak / 2**20, 4),
            "peak_bytes": peak,
        }
        records.append(common | of_form | runner.time_fields(name, samples))
    return runner.Measurement(records, refused)

"""functional.sample_classes: what is in a sample, how probable that is, and that sums over samples are without bias.

That all backends draw the same stands in test_sampling_gpu.py; the loss of a sample in test_class_samples_loss.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import ltkernels as ltk
from ltkernels.bench.device import Cpu
from ltkernels.functional import ClassSample, class_samples, sample_classes, sample_indices
from ltkernels.samplers import AliasTable, ClassIndex

each_backend = pytest.mark.parametrize("backend", ltk.available_backends("cpu"))
C = 1000
ZIPF = AliasTable(1.0 / torch.arange(1, C + 1).double())
PRIORS = {"uniform": None, "zipf": ZIPF, "half of them": AliasTable(torch.arange(C) % 2)}
each_prior = pytest.mark.parametrize("prior", PRIORS)


def some_labels(count: int = 40, classes: int = C) -> Tensor:
    return torch.randint(classes, (count,))


def check(sample: ClassSample, labels: Tensor, classes: int, size: int) -> None:
    """What holds of every sample."""
    assert sample.classes.shape == sample.log_expected.shape == (size,)
    assert sample.classes.dtype == torch.int64 and sample.log_expected.dtype == torch.float32
    assert sample.num_classes == classes
    assert bool((sample.classes[1:] > sample.classes[:-1]).all()), "ascending, none twice"
    assert 0 <= int(sample.classes[0]) and int(sample.classes[-1]) < classes
    positive = torch.isin(sample.classes, labels)
    assert int(positive.sum()) == len(labels.unique()), "every class of the batch"
    assert bool((sample.log_expected[positive] == 0).all())
    assert bool((sample.log_expected <= 0).all()) and bool(sample.log_expected.isfinite().all())


# --- What is in it ---


@each_backend
@each_prior
@pytest.mark.parametrize("size", [1, 60, 499])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_the_batch_and_others(backend: str, prior: str, size: int, count: int) -> None:
    """A sample that is smaller than the batch, larger, and nearly all that the prior can draw."""
    labels = some_labels(count)
    with ltk.use_backend(backend):
        sample = sample_classes(labels, C, size, seed=1, step=2, class_probs=PRIORS[prior])
    check(sample, labels, C, max(size, count))
    if prior == "half of them":
        others = sample.classes[~torch.isin(sample.classes, labels)]
        assert bool((others % 2 == 1).all()), "classes of probability 0 do not come"
    assert torch.equal(sample.classes[sample.places(labels)], labels)


@given(
    classes=st.integers(1, 40),
    size=st.integers(1, 40),
    labels=st.lists(st.integers(-1, 39), max_size=30),
    ignore_index=st.integers(-1, 40),
    step=st.integers(0, 2**32 - 1),
)
def test_any_sizes(classes: int, size: int, labels: list[int], ignore_index: int, step: int) -> None:
    """Also classes that are few enough for the permutation of up to 16, and ignored labels that are a class."""
    size = min(size, classes)
    given_labels = torch.tensor([label if label < classes else ignore_index for label in labels], dtype=torch.int64)
    given_labels[given_labels == -1] = ignore_index
    sample = sample_classes(given_labels, classes, size, seed=9, step=step, ignore_index=ignore_index)
    taken = given_labels[given_labels != ignore_index]
    check(sample, taken, classes, max(size, min(len(labels), classes)))
    places = sample.places(given_labels, ignore_index)
    assert bool((places[given_labels == ignore_index] == -100).all())
    assert torch.equal(sample.classes[places[given_labels != ignore_index]], taken)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.uint16], ids=str)
def test_label_types_and_shapes(dtype: torch.dtype) -> None:
    labels = torch.randint(100, (3, 5))
    expected = sample_classes(labels.flatten(), C, 50, seed=0)
    found = sample_classes(labels.to(dtype), C, 50, seed=0)
    assert torch.equal(found.classes, expected.classes)
    assert torch.equal(found.classes[found.places(labels.to(dtype))], labels)


def test_two_labels() -> None:
    first, second = some_labels(), some_labels()
    sample = sample_classes((first, second, 0.3), C, 200, seed=0)
    check(sample, torch.cat([first, second]), C, 200)


def test_all_classes() -> None:
    """By a rate of 1, and because the batch could have all."""
    for labels, size in ((some_labels(5), C), (some_labels(C), 10)):
        sample = sample_classes(labels, C, size, seed=0, class_probs=ZIPF)
        assert torch.equal(sample.classes, torch.arange(C)) and not sample.log_expected.any()


def test_sample_rate() -> None:
    """Rounded, and at least one."""
    for rate, size in ((0.1, 100), (0.0004, 1), (0.0006, 1), (0.0016, 2), (1.0, C)):
        assert len(sample_classes(some_labels(0), C, sample_rate=rate, seed=0).classes) == size


# --- A pure function of seed, step and labels ---


@each_prior
def test_a_function_of_seed_and_step(prior: str) -> None:
    labels, probs = some_labels(), PRIORS[prior]

    def draw(**given: Any) -> Tensor:
        return sample_classes(labels, C, 100, **{"seed": 5, "step": 7, "class_probs": probs, **given}).classes

    expected = draw()
    assert torch.equal(draw(step=torch.tensor(7)), expected)
    for other in ({"step": 8}, {"seed": 6}, {"step": 7 + 2**31}, {"seed": 5 + 2**40}, {"seed": -5}):
        assert not torch.equal(draw(**other), expected), other


@each_prior
def test_labels_change_nothing_but_what_they_are(prior: str) -> None:
    """Their order and number do not matter; another batch takes its own classes and leaves the rest nearly alone."""
    labels = some_labels()
    first = sample_classes(labels, C, 100, seed=0, class_probs=PRIORS[prior])
    again = sample_classes(labels.flip(0).repeat(2)[:77], C, 100, seed=0, class_probs=PRIORS[prior])
    assert torch.equal(first.classes, again.classes)
    torch.testing.assert_close(first.log_expected, again.log_expected, rtol=0, atol=0)
    one, other = (
        sample_classes(y, C, 100, seed=0, class_probs=PRIORS[prior]).classes for y in (labels[:1], labels[1:2])
    )
    assert int(torch.isin(one, other).sum()) >= 97


def test_random_numbers_of_its_own() -> None:
    """A sampler of the same seed does not deal the classes of step e in the order of epoch e."""
    singletons = ClassIndex.singletons(C)
    for replacement, probs in ((False, None), (True, ZIPF)):
        theirs = sample_indices(singletons, 0, 400, seed=3, epoch=4, replacement=replacement, class_probs=probs)
        ours = sample_classes(some_labels(0), C, 50, seed=3, step=4, class_probs=probs).classes
        theirs = torch.tensor(sorted(set(list(dict.fromkeys(theirs.tolist()))[:50])))
        assert not torch.equal(ours, theirs)


# --- How probable ---


def test_every_set_of_negatives_is_as_probable() -> None:
    """6 classes, one of them the batch's: the 10 pairs of the 5 others, chi-square."""
    labels, steps = torch.tensor([2, 2]), 6000
    counts: dict[tuple[int, ...], int] = {}
    for step in range(steps):
        sample = sample_classes(labels, 6, 3, seed=0, step=step)
        key = tuple(sample.classes.tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 10
    chi_square = sum((count - steps / 10) ** 2 / (steps / 10) for count in counts.values())
    assert abs(chi_square - 9) < 4 * math.sqrt(2 * 9)
    assert float(sample.log_expected[sample.classes != 2][0]) == pytest.approx(math.log(2 / 5), rel=1e-6)


def test_uniform_over_many_classes() -> None:
    """How often each of 1000 classes is among 96 negatives in 2000 steps: chi-square without replacement."""
    labels, steps = torch.tensor([3, 500, 501, 999]), 2000
    counts = torch.zeros(C)
    for step in range(steps):
        counts[sample_classes(labels, C, 100, seed=1, step=step).classes] += 1
    assert bool((counts[labels] == steps).all())
    others = torch.ones(C, dtype=torch.bool)
    others[labels] = False
    share, found = 96 / 996, counts[others].double()
    chi_square = float(((found - steps * share) ** 2).sum()) / (steps * share * (1 - share)) * 995 / 996
    assert abs(chi_square - 995) < 4 * math.sqrt(2 * 995)


def test_one_negative_has_its_probability() -> None:
    """The first that is drawn and not the batch's: chi-square against the prior without the batch's class."""
    probs, steps = torch.tensor([5.0, 1.0, 2.0, 4.0, 0.5]), 4000
    counts = torch.zeros(5)
    for step in range(steps):
        counts[sample_classes(torch.tensor([3]), 5, 2, seed=0, step=step, class_probs=AliasTable(probs)).classes] += 1
    expected = probs / (probs.sum() - probs[3]) * steps
    found, expected = counts[[0, 1, 2, 4]], expected[[0, 1, 2, 4]]
    assert abs(float(((found - expected) ** 2 / expected).sum()) - 3) < 4 * math.sqrt(6)


UNEVEN = torch.tensor([30.0, 12.0, 7.0, 5.0, 3.0, 2.0, 1.0, 1.0, 0.7, 0.5])


def _estimates(weigh: Callable[[ClassSample], Tensor], probs: Tensor | None, steps: int = 5000) -> Tensor:
    """Of each step, the sums over a sample of 4 of 10 classes, one of them the batch's, of four functions."""
    values = torch.stack([torch.ones(10), torch.rand(10), 1 / UNEVEN, UNEVEN]).double()
    table = None if probs is None else AliasTable(probs)
    found = []
    for step in range(steps):
        sample = sample_classes(torch.tensor([4]), 10, 4, seed=2, step=step, class_probs=table)
        found.append((values[:, sample.classes] * weigh(sample)).sum(1))
    return (torch.stack(found) - values.sum(1)) / values.sum(1)


def _distance(estimates: Tensor) -> float:
    """Of the means from 0, in standard errors; the number of classes is estimated to rounding if all are alike."""
    return float((estimates.mean(0) / (estimates.std(0) / math.sqrt(len(estimates)) + 1e-6)).abs().max())


@pytest.mark.parametrize("probs", [None, UNEVEN], ids=["uniform", "prior"])
def test_sums_over_samples_are_without_bias(probs: Tensor | None) -> None:
    estimates = _estimates(lambda sample: torch.exp(-sample.log_expected.double()), probs)
    assert _distance(estimates) < 4


def test_and_would_have_one_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without weights; and so few classes show that a class's own draws do not count among those it came in."""
    assert _distance(_estimates(lambda sample: torch.ones(4), UNEVEN, 500)) > 20
    log_inclusion = class_samples._log_inclusion
    monkeypatch.setattr(class_samples, "_log_inclusion", lambda p, beyond, times: log_inclusion(p, beyond, times * 0))
    assert _distance(_estimates(lambda sample: torch.exp(-sample.log_expected.double()), UNEVEN, 2000)) > 8


def test_the_draws_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number leaves none short in 300 steps; where they were short, the sample is whole all the same."""
    table, size = ZIPF, 200
    draws = class_samples.number_of_draws(table, size)
    singletons = ClassIndex.singletons(C)
    for epoch in range(300):
        drawn = sample_indices(singletons, 0, draws, seed=0, epoch=epoch, class_probs=table)
        assert len(drawn.unique()) > size
    monkeypatch.setattr(class_samples, "number_of_draws", lambda *_: 20)
    labels = some_labels()
    short = sample_classes(labels, C, size, seed=0, class_probs=AliasTable(torch.arange(C).double()))
    check(short, labels, C, size)


# --- Costs ---


def test_memory_is_of_the_order_of_the_sample() -> None:
    """1000 of 2^31 - 1 classes: 200 bytes for each of the sample, not one for each of all."""
    labels = torch.randint(2**31 - 1, (100,))

    def draw() -> ClassSample:
        return sample_classes(labels, 2**31 - 1, 1000, seed=0)

    check(draw(), labels, 2**31 - 1, 1000)
    assert Cpu().peak_bytes(draw) < 200_000


@each_prior
def test_compiled(prior: str) -> None:
    """In one graph, hence without waiting for a value, and once for all batches and steps."""
    counter = CompileCounter()
    torch._dynamo.reset()
    probs = PRIORS[prior]

    def draw(labels: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        sample = sample_classes(labels, C, 100, seed=1, step=step, class_probs=probs)
        return sample.classes, sample.log_expected

    compiled = torch.compile(draw, backend=counter, fullgraph=True, dynamic=True)
    for count, step in ((30, 0), (40, 1), (50, 2)):
        given_labels, at = some_labels(count), torch.tensor(step)
        for found, expected in zip(compiled(given_labels, at), draw(given_labels, at), strict=True):
            assert torch.equal(found, expected)
    assert counter.frame_count == 1
    torch._dynamo.reset()


# --- Wrong calls ---

Y = torch.tensor([1, 2, 3])
ERRORS: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "target: expected a torch.Tensor, found list", ([1], 10, 5), {}),
    (TypeError, "target: expected labels of an integer type, found torch.float32", (Y.float(), 10, 5), {}),
    (TypeError, r"target\[1\]: expected labels of an integer type", ((Y, Y.float(), 0.5), 10, 5), {}),
    (ValueError, "target: expected labels or .* found a tuple of 2", ((Y, Y), 10, 5), {}),
    (ValueError, r"target\[1\]: expected device cpu, found meta", ((Y, Y.to("meta"), 0.5), 10, 5), {}),
    (IndexError, r"target: expected labels in \[0, 3\) or ignore_index -100, found 3 at row 2", (Y, 3, 2), {}),
    (IndexError, "target: .* ignore_index 7, found -100 at row 0", (Y - 101, 10, 5), {"ignore_index": 7}),
    (TypeError, "num_classes: expected an integer, found 10.0", (Y, 10.0, 5), {}),
    (ValueError, "num_classes: expected at least 1, found 0", (Y, 0, 5), {}),
    (ValueError, "num_classes: expected at most 2147483647", (Y, 2**31, 5), {}),
    (ValueError, "num_sampled: expected num_sampled or sample_rate, found .*None", (Y, 10), {}),
    (ValueError, "num_sampled: expected num_sampled or sample_rate", (Y, 10, 5), {"sample_rate": 0.5}),
    (ValueError, "num_sampled: expected at most num_classes, which is 10, found 11", (Y, 10, 11), {}),
    (ValueError, "num_sampled: expected at least 1, found 0", (Y, 10, 0), {}),
    (TypeError, "num_sampled: expected an integer, found 0.5", (Y, 10, 0.5), {}),
    (ValueError, "sample_rate: expected a finite number > 0 and <= 1, found 0", (Y, 10), {"sample_rate": 0}),
    (ValueError, "sample_rate: expected .* <= 1, found 1.5", (Y, 10), {"sample_rate": 1.5}),
    (TypeError, "sample_rate: expected a number", (Y, 10), {"sample_rate": "all"}),
    (TypeError, "seed: expected an integer", (Y, 10, 5), {"seed": 0.5}),
    (ValueError, "step: expected >= 0 and below 4294967296, found -1", (Y, 10, 5), {"step": -1}),
    (ValueError, "step: expected an integer or a 0-d int64 tensor", (Y, 10, 5), {"step": torch.tensor(1.0)}),
    (TypeError, "ignore_index: expected an integer", (Y, 10, 5), {"ignore_index": None}),
    (TypeError, "class_probs: expected None, .* or an AliasTable, found list", (Y - 1, 3, 2), {"class_probs": [1]}),
    (ValueError, "class_probs: expected 10 classes, found 9", (Y, 10, 5), {"class_probs": torch.ones(9)}),
    (ValueError, "class_probs: expected all >= 0, found -1 at class", (Y, 10, 5), {"class_probs": torch.arange(-1, 9)}),
    (ValueError, "class_probs: expected a tensor on the CPU", (Y, 10, 5), {"class_probs": torch.ones(10).to("meta")}),
    (
        ValueError, "class_probs: expected an AliasTable on cpu, found one on meta", (Y, C, 5),
        {"class_probs": ZIPF.to("meta")},
    ),
    (
        ValueError, "class_probs: expected more than 5 classes with a probability > 0, .* found 5", (Y, 10, 5),
        {"class_probs": torch.arange(10) // 5},
    ),
    (
        ValueError, "class_probs: expected probabilities of which 65536 draws find 6 different classes", (Y, 10, 5),
        {"class_probs": 10.0 ** -torch.arange(10)},
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"), ERRORS, ids=[f"{i}-{e[1][:24]}" for i, e in enumerate(ERRORS)]
)
def test_wrong_calls(error: type[Exception], message: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        sample_classes(*arguments, **{"seed": 0, **options})


def test_wrong_places() -> None:
    sample = sample_classes(torch.tensor([5]), 10, 2, seed=0)
    absent = next(c for c in range(10) if c not in sample.classes)
    for error, message, labels in (
        (ValueError, f"target: expected labels of classes in sample, found class {absent} at row 1", [5, absent]),
        (IndexError, r"target: expected labels in \[0, 10\) or ignore_index -100, found 10 at row 0", [10, 5]),
    ):
        with pytest.raises(error, match=message):
            sample.places(torch.tensor(labels))
    with pytest.raises(TypeError, match="target: expected labels of an integer type, found torch.float32"):
        sample.places(torch.tensor([5.0]))
    with pytest.raises(ValueError, match="target: expected device cpu, found meta"):
        sample.places(torch.empty(1, dtype=torch.int64, device="meta"))

"""What samplers draw: each strategy against its published definition, lengths, labels of all types, and wrong calls."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import ltkernels as ltk
from ltkernels.samplers import STRATEGIES, ClassIndex, DistributedLongTailSampler, LongTailBatchSampler, LongTailSampler
from ltkernels.samplers.strategies import ClassAware, Power

# Sizes on both sides of 16, where permutations change their algorithm, a class of one sample, and one of thousands.
COUNTS = np.array([2000, 300, 40, 17, 16, 5, 1])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(len(COUNTS)), COUNTS))
N, C = len(LABELS), len(COUNTS)
WEIGHT = np.array([0.5, 0.0, 3.0, 1.0, 0.0, 2.0, 7.0])


def effective(beta: float) -> np.ndarray:
    exact = [n * (1 - beta) / (1 - math.fsum([1.0, math.expm1(n * math.log(beta))])) for n in COUNTS.tolist()]
    return np.array(exact)


# Mass of each class, and parameters; by hand, so that it is another computation than the one that is tested.
DRAWN: dict[str, tuple[dict[str, Any], np.ndarray]] = {
    "instance": ({"replacement": True}, COUNTS),
    "class_balanced": ({}, np.ones(C)),
    "square_root": ({}, np.sqrt(COUNTS)),
    "power": ({"power": 0.25}, np.sqrt(np.sqrt(COUNTS))),
    "reversed": ({}, 1 / COUNTS),
    "effective_number": ({"beta": 0.99}, effective(0.99)),
    "progressive": ({"epochs": 5}, COUNTS),  # epoch 0
    "class_weight": ({"class_weight": WEIGHT}, WEIGHT * COUNTS),
    "sample_weight": ({"sample_weight": WEIGHT[LABELS]}, WEIGHT * COUNTS),
}
OTHERS: dict[str, dict[str, Any]] = {
    "over_sampling": {},
    "under_sampling": {},
    "class_aware": {"draws_per_class": 4},
    "m_per_class": {"m": 4, "batch_size": 12},
}
DEALT = [name for name in DRAWN if name not in ("instance", "sample_weight")]


def parameters(name: str) -> dict[str, Any]:
    return DRAWN[name][0] if name in DRAWN else OTHERS[name]


def sampler(name: str, **options: Any) -> LongTailSampler:
    return LongTailSampler(LABELS, name, **{**parameters(name), **options})


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's chi-square as a standard normal number, by the cube root of Wilson and Hilferty."""
    seen = expected > 0
    freedom = seen.sum() - 1
    statistic = ((found[seen] - expected[seen]) ** 2 / expected[seen]).sum()
    return float(((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom)))


def draws_by_class(indices: list[int]) -> Iterator[tuple[int, list[int]]]:
    for c in range(C):
        yield c, [i for i in indices if LABELS[i] == c]


def test_every_strategy_is_tested() -> None:
    assert set(STRATEGIES) - {"repeat_factor"} == set(DRAWN) | set(OTHERS)  # tests of that are in test_repeats.py


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", DRAWN)
def test_class_and_member_frequencies(name: str, seed: int) -> None:
    """Classes by their mass and members all alike, by chi-square; |z| < 4 fails one correct sampler in 16,000."""
    mass = DRAWN[name][1]
    drawn = np.array(list(sampler(name, num_samples=60_000, seed=seed)))
    classes = np.bincount(LABELS[drawn], minlength=C)
    assert classes[mass == 0].sum() == 0
    assert abs(deviation(classes, 60_000 * mass / mass.sum())) < 4
    of_members = (classes / COUNTS)[LABELS]
    for c in (c for c in range(C) if 1 < COUNTS[c] < classes[c] / 5):
        one = LABELS == c
        assert abs(deviation(np.bincount(drawn, minlength=N)[one], of_members[one])) < 4, c


@pytest.mark.parametrize("name", DEALT)
def test_dealt_classes_have_their_shares_exactly(name: str) -> None:
    """Without replacement shares are not random: up to one draw and the rounding of a round to 256 C slots."""
    mass = DRAWN[name][1]
    classes = np.bincount(LABELS[list(sampler(name, replacement=False, num_samples=256 * C))], minlength=C)
    assert (np.abs(classes - 256 * C * mass / mass.sum()) <= 2).all()
    assert classes[mass == 0].sum() == 0


WITHOUT_REPLACEMENT: list[tuple[str, dict[str, Any]]] = [
    *((name, {"replacement": False}) for name in DEALT),
    ("instance", {"replacement": False}),
    ("over_sampling", {}),
    ("under_sampling", {}),
    ("class_aware", {"draws_per_class": 1}),
    ("class_aware", {"draws_per_class": 4}),
]


@pytest.mark.parametrize(("name", "options"), WITHOUT_REPLACEMENT)
def test_every_member_once_before_any_twice(name: str, options: dict[str, Any]) -> None:
    """The draws of a class, in the order of time, are permutations of its members, one behind the other."""
    indices = list(sampler(name, num_samples=5000, seed=3, **options))
    if name == "instance":
        cycles = [indices[:N], indices[N : 2 * N]]
        assert [sorted(cycle) for cycle in cycles] == [list(range(N))] * 2
        assert cycles[0] != cycles[1]
        return
    for c, draws in draws_by_class(indices):
        for at in range(0, len(draws), COUNTS[c]):
            assert len(set(draws[at : at + COUNTS[c]])) == len(draws[at : at + COUNTS[c]])


def test_over_and_under_sampling() -> None:
    over = np.bincount(list(sampler("over_sampling")), minlength=N)
    for c in range(C):
        members = over[LABELS == c]
        assert members.sum() == COUNTS.max()
        assert members.max() - members.min() <= 1
    labels = np.repeat(np.arange(4), [100, 20, 7, 9])
    under = list(LongTailSampler(labels, "under_sampling"))
    assert len(under) == len(set(under)) == 28
    assert np.bincount(labels[under]).tolist() == [7] * 4


def test_class_aware_rounds() -> None:
    """Four samples of a class at a time, every class once in a round of 28, in another order in each round."""
    classes = LABELS[list(sampler("class_aware"))].reshape(-1, 4)
    assert (classes == classes[:, :1]).all()
    rounds = classes[:, 0].reshape(-1, C)
    assert (np.sort(rounds, axis=1) == np.arange(C)).all()
    assert len({tuple(order) for order in rounds[:50].tolist()}) > 40
    # each of the 7! orders alike: each class at each place
    places = [np.bincount(rounds[:, place], minlength=C) for place in range(C)]
    assert abs(deviation(np.concatenate(places), np.full(C * C, len(rounds) / C))) < 4


@pytest.mark.parametrize(("m", "batch_size"), [(1, 7), (4, 12), (5, 5), (16, 32)])
def test_m_per_class(m: int, batch_size: int) -> None:
    """Batches of batch_size / m classes; the classes of 5 and of 1 have to repeat samples, the others must not."""
    drawn = sampler("m_per_class", m=m, batch_size=batch_size, num_samples=120 * batch_size)
    seen = np.zeros(C)
    for batch in LongTailBatchSampler(drawn, batch_size):
        classes, counts = np.unique(LABELS[batch], return_counts=True)
        assert len(classes) == batch_size // m
        assert (counts == m).all()
        seen[classes] += 1
        for c, draws in draws_by_class(batch):
            assert len(set(draws)) == min(len(draws), COUNTS[c])
    assert seen.min() > 0


def test_progressive_goes_from_instance_to_balanced() -> None:
    progressive = sampler("progressive", num_samples=40_000)
    for epoch in (0, 1, 2, 4, 9):
        progressive.set_epoch(epoch)
        lam = min(epoch / 4, 1)
        expected = 40_000 * (lam / C + (1 - lam) * COUNTS / N)
        assert abs(deviation(np.bincount(LABELS[list(progressive)], minlength=C), expected)) < 4
    once = LongTailSampler(LABELS, "progressive", epochs=1)  # linspace(0, 1, 1) is [0]
    assert abs(deviation(np.bincount(LABELS[list(once)], minlength=C), COUNTS.astype(float))) < 4


def test_effective_number_close_to_one() -> None:
    """beta = 0.999999 subtracts nearly equal numbers; in float32 the shares would be 1.3 % wrong."""
    by_hand = [n / sum(0.999999**k for k in range(n)) for n in COUNTS.tolist()]
    draws = sampler("effective_number", beta=0.999999)._epoch_samples(0).class_draws  # type: ignore[attr-defined]
    torch.testing.assert_close(draws.class_probs, torch.tensor(by_hand).double() / sum(by_hand), rtol=1e-7, atol=0)


def test_names_are_parameters_of_few_strategies() -> None:
    assert sampler("square_root").strategy == sampler("power", power=0.5).strategy == Power(0.5)
    assert sampler("over_sampling").strategy == sampler("class_aware", draws_per_class=1).strategy == ClassAware()
    for name, power in (("class_balanced", 0), ("reversed", -1), ("square_root", 0.5)):
        assert list(sampler(name)) == list(sampler("power", power=power)) == list(LongTailSampler(LABELS, Power(power)))


@pytest.mark.parametrize(
    ("name", "length"),
    [
        *((name, N) for name in DRAWN),
        ("over_sampling", C * 2000),
        ("under_sampling", C),
        ("class_aware", C * 2000),
        ("m_per_class", N // 12 * 12),
    ],
)
def test_published_lengths(name: str, length: int) -> None:
    published = sampler(name)
    assert len(published) == published.num_samples == length
    assert len(list(published)) == length
    other = sampler(name, num_samples=100)
    assert len(other) == len(list(other)) == 100
    shorter = min(length, 100)
    assert other.indices(0, shorter).tolist() == published.indices(0, shorter).tolist()  # only the end differs


@pytest.mark.parametrize("name", [*DRAWN, *OTHERS])
def test_streams(name: str) -> None:
    """Python integers; another stream for another seed or epoch; indices() shows the epoch without taking from it."""
    first, again, other = sampler(name, seed=1), sampler(name, seed=1), sampler(name, seed=2)
    length = min(len(first), 3000)
    of_first = first.indices(0, len(first))
    assert of_first.dtype is torch.int64
    indices = list(first)
    assert {type(i) for i in indices} == {int}
    assert indices == of_first.tolist() == list(again)
    assert first.indices(2, length, 3).tolist() == list(again)[2:length:3] != indices[2:length:3]
    assert indices != list(other)
    first.set_epoch(0)
    assert list(first) == indices


LABEL_TYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4"]


def test_labels_of_any_type(tmp_path: Any) -> None:
    expected = list(LongTailSampler(LABELS, num_samples=50))
    on_disk = np.memmap(tmp_path / "labels", np.int16, "w+", shape=(N,))
    on_disk[:] = LABELS
    names = [f"class {c}" for c in LABELS]
    forms: list[Any] = [LABELS.tolist(), tuple(LABELS.tolist()), ClassIndex(LABELS), on_disk, names, np.array(names)]
    forms += [np.array(names, dtype=object)]
    forms += [LABELS.astype(kind) for kind in LABEL_TYPES]
    forms += [torch.from_numpy(LABELS.astype(kind)) for kind in LABEL_TYPES[:-1]]
    for form in forms:
        assert list(LongTailSampler(form, num_samples=50)) == expected


def test_names_of_classes() -> None:
    named = LongTailSampler(["owl", "cat", "cat", "cat"], "class_weight", class_weight=[0, 1])
    assert named.class_names == ["cat", "owl"]
    assert set(named) == {0}
    assert LongTailSampler([0, 1]).class_names is None


@pytest.mark.parametrize("name", [*DRAWN, *OTHERS])
def test_a_part_of_the_data_set(name: str) -> None:
    """Positions of the data set, in whatever order they are given: weights belong to samples, not to their order."""
    part = np.random.default_rng(1).permutation(N)[: N // 2]
    part = np.concatenate([part, np.flatnonzero(LABELS >= 3)])  # some twice; no class without samples
    drawn = sampler(name, indices=part, num_samples=20_000)
    indices = np.array(list(drawn))
    assert set(indices) <= set(part)
    if name in ("sample_weight", "class_weight", "instance"):
        mass = np.bincount(LABELS[part], minlength=C) * (np.ones(C) if name == "instance" else WEIGHT)
        assert abs(deviation(np.bincount(LABELS[indices], minlength=C), 20_000 * mass / mass.sum())) < 4


def test_classes_without_samples() -> None:
    """Only weights of classes and samples say what becomes of a class without samples, and instances do not ask."""
    labels = [0, 0, 3, 3, 3]
    assert set(LongTailSampler(labels, "class_weight", class_weight=[1, 0, 5, 1])) == {0, 1, 2, 3, 4}
    dealt = LongTailSampler(labels, "class_weight", class_weight=[1, 0, 5, 1], replacement=False)
    assert set(dealt) == {0, 1, 2, 3, 4}
    assert sorted(LongTailSampler(labels, "instance")) == [0, 1, 2, 3, 4]
    for name in [*DRAWN, *OTHERS]:
        if name not in ("instance", "class_weight", "sample_weight"):
            with pytest.raises(
                ValueError, match=r"^labels: expected a sample of every class, found none of class 1 and"
            ):
                LongTailSampler(labels, name, **parameters(name))
    with pytest.raises(ValueError, match="found none of class 4; number the classes without gaps, or give strategy="):
        LongTailSampler([0, 1, 2, 3], num_classes=5)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"strategy": "balanced"}, ValueError, "strategy: expected 'instance' or 'class_balanced' or .* found 'balanced'"),
    ({"strategy": 3}, TypeError, "strategy: expected a name or a Strategy, found int"),
    ({"strategy": "square_root", "power": 2}, TypeError, "power: expected parameters of strategy 'square_root', which"),
    (
        {"strategy": "under_sampling", "replacement": False},
        TypeError,
        "replacement: .*'under_sampling', which are: none",
    ),
    ({"strategy": "progressive"}, TypeError, "epochs: expected with strategy 'progressive', found nothing"),
    ({"strategy": Power(1.0), "power": 2}, TypeError, "power: expected no parameter beside a Strategy"),
    ({"generator": torch.Generator()}, TypeError, "generator: expected parameters of strategy 'class_balanced'"),
    ({"strategy": "power", "power": "1"}, TypeError, "power: expected a number, found str"),
    ({"strategy": "power", "power": math.nan}, ValueError, "power: expected a finite number"),
    ({"replacement": 1}, TypeError, "replacement: expected a bool, found 1"),
    ({"strategy": "effective_number", "beta": 1}, ValueError, "beta: expected a number below 1"),
    ({"strategy": "progressive", "epochs": 0}, ValueError, "epochs: expected at least 1, found 0"),
    ({"strategy": "class_aware", "draws_per_class": 0}, ValueError, "draws_per_class: expected at least 1, found 0"),
    ({"strategy": "m_per_class", "m": 2, "batch_size": 5}, ValueError, "batch_size: expected a multiple of m, .* 2"),
    (
        {"strategy": "m_per_class", "m": 2, "batch_size": 8},
        ValueError,
        "batch_size: expected at most 3 classes times m",
    ),
    (
        {"strategy": "class_weight", "class_weight": [1, 1]},
        ValueError,
        r"class_weight: expected shape \(3,\), .* \(2,\)",
    ),
    ({"strategy": "class_weight", "class_weight": [1, -1, 1]}, ValueError, "class_weight: .* found -1 at class 1"),
    (
        {"strategy": "class_weight", "class_weight": [1, 0, math.nan]},
        ValueError,
        "class_weight: .* found nan at class 2",
    ),
    ({"strategy": "class_weight", "class_weight": [0, 0, 0]}, ValueError, "class_weight: .* found 3 zeros"),
    ({"strategy": "class_weight", "class_weight": ["a"]}, TypeError, "class_weight: expected integers or floats"),
    ({"strategy": "class_weight", "class_weight": [[1, 1, 1]]}, ValueError, r"class_weight: .* found shape \(1, 3\)"),
    (
        {"strategy": "sample_weight", "sample_weight": [1.0] * 5},
        ValueError,
        r"sample_weight: .* \(4,\), .* found \(5,\)",
    ),
    ({"num_samples": 0}, ValueError, "num_samples: expected at least 1, found 0"),
    ({"num_samples": 2.0}, TypeError, "num_samples: expected an integer, found 2.0"),
    ({"seed": None}, TypeError, "seed: expected an integer, found None"),
    ({"seed": 2**64}, ValueError, "seed: expected an integer of 64 bits"),
    ({"indices": [4]}, IndexError, r"indices: expected positions in \[0, 4\), found 4 at position 0"),
    ({"num_classes": 2}, ValueError, r"labels: expected all labels in \[0, 2\), found 2 at position 3"),
    ({"labels": [0, 1, -1]}, ValueError, "labels: expected all labels >= 0, found -1 at position 2"),
    ({"labels": [0.5, 1.0]}, TypeError, "labels: expected integers, found list of float64"),
    ({"labels": torch.ones(3)}, TypeError, "labels: expected integers, found torch.float32"),
    ({"labels": [True, False]}, TypeError, "labels: expected integers, found list of bool"),
    ({"labels": ["a", 1, None]}, TypeError, "labels: expected integers or strings, found list of object"),
    ({"labels": ["a", math.nan]}, TypeError, "labels: expected integers or strings, found list of strings and other"),
    ({"labels": ("0", 0)}, TypeError, "labels: expected integers or strings, found tuple of strings and other types"),
    ({"labels": [[0], [1, 2]]}, ValueError, r"labels: expected one class a sample for Power\(.*\), found several"),
    ({"labels": []}, ValueError, "labels: expected at least one, found 0"),
    ({"labels": ClassIndex([0, 1]), "num_classes": 2}, ValueError, "num_classes: expected None with a ClassIndex"),
    ({"labels": ClassIndex([0, 1]), "indices": [1]}, ValueError, "indices: expected None with a ClassIndex"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_wrong_calls(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LongTailSampler(**{"labels": [0, 0, 1, 2], **options})


def test_wrong_weights_beside_an_index() -> None:
    """An index that was not made of labels does not say how large the data set is; but where its last member is."""
    with pytest.raises(ValueError, match=r"sample_weight: expected shape \(4,\), one weight a sample, found \(3,\)"):
        LongTailSampler(ClassIndex([0, 0, 1, 2]), "sample_weight", sample_weight=[1, 1, 1])
    with pytest.raises(ValueError, match="sample_weight: expected at least 4, one weight a sample .* found 3"):
        LongTailSampler(ClassIndex.singletons(2, [1, 3]), "sample_weight", sample_weight=[1, 1, 1])
    with pytest.raises(ValueError, match="sample_weight: expected a weight > 0 of a sample that the sampler is for"):
        LongTailSampler([0, 0, 1], "sample_weight", sample_weight=[1, 0, 0], indices=[1, 2])
    with pytest.raises(ValueError, match="class_weight: expected a weight > 0 of a class with samples"):
        LongTailSampler([0, 0, 2], "class_weight", class_weight=[0, 1, 0])


def test_wrong_indices_and_epochs() -> None:
    drawn = LongTailSampler([0, 0, 1, 2])
    for start, stop, step in ((-1, 2, 1), (0, 5, 1), (3, 2, 1), (0, 2, 0)):
        with pytest.raises(ValueError, match="expected"):
            drawn.indices(start, stop, step)
    for epoch, error in ((-1, ValueError), (2**32, ValueError), (1.0, TypeError), (None, TypeError)):
        with pytest.raises(error, match="epoch: expected"):
            drawn.set_epoch(epoch)  # type: ignore[arg-type]
    drawn.set_epoch(2**32 - 2)
    assert len(list(drawn)) == 4
    drawn.epoch = 5  # as some do with a DistributedSampler
    assert drawn.epoch == 5


def test_an_iterator_that_has_not_begun_changes_nothing() -> None:
    """StatefulDataLoader calls iter() up to four times before it takes the first index."""
    drawn = sampler("class_balanced")
    expected = sampler("class_balanced").indices(0, N).tolist()
    iterators = [iter(drawn) for _ in range(4)]
    assert drawn.epoch == 0
    assert list(iterators[2]) == expected
    assert drawn.epoch == 1
    assert list(iterators[0]) != expected  # began now, in epoch 1
    assert drawn.epoch == 2


def test_an_iteration_that_is_broken_off_is_followed_by_the_next_epoch() -> None:
    drawn, whole = sampler("class_balanced"), sampler("class_balanced")
    epochs = [list(whole) for _ in range(3)]
    for epoch in epochs:
        taken = [i for i, _ in zip(drawn, range(10), strict=False)]  # zip takes one more
        assert taken == epoch[:10]
    assert (drawn.epoch, drawn.state_dict()["position"]) == (2, 11)
    drawn.set_epoch(2)  # the same epoch again
    assert list(drawn) == epochs[2]


def test_two_iterators_at_a_time() -> None:
    """Each is whole. The sampler follows the one that began last."""
    drawn, whole = sampler("class_balanced"), sampler("class_balanced")
    first = iter(drawn)
    start = [next(first) for _ in range(5)]
    second = iter(drawn)
    begun = next(second)
    assert start + list(first) == list(whole)
    assert drawn.epoch == 1
    assert [begun, *second] == list(whole)
    assert drawn.epoch == 2


def test_never_looks_at_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("torch.distributed was asked")

    for name in ("is_available", "is_initialized", "get_rank", "get_world_size"):
        monkeypatch.setattr(torch.distributed, name, refuse)
    assert len(list(sampler("class_balanced"))) == N


def test_accelerate_finds_no_generator() -> None:
    """Accelerate assigns a torch.Generator to an attribute of that name, and synchronises it across ranks."""
    assert not hasattr(sampler("class_balanced"), "generator")


@pytest.mark.parametrize("kind", ["sampler", "ranks", "batches"])
def test_copies_go_on_where_the_original_is(kind: str) -> None:
    drawn: Any = sampler("square_root", replacement=False)
    if kind == "ranks":
        drawn = DistributedLongTailSampler(LABELS, "square_root", num_replicas=2, rank=1)
    elif kind == "batches":
        drawn = LongTailBatchSampler(drawn, 7)
    list(drawn)
    iterator = iter(drawn)
    next(iterator)
    copies = [pickle.loads(pickle.dumps(drawn)), copy.deepcopy(drawn)]
    rest = list(iterator)
    assert len(rest) == len(drawn) - 1
    assert all(list(one) == rest for one in copies)
    assert list(copies[0]) == list(drawn)  # the next epoch of both
    assert len(pickle.dumps(drawn)) < 100_000


def test_reprs() -> None:
    assert repr(LongTailSampler([0, 1, 0], seed=3)) == (
        "LongTailSampler(Power(power=0.0, replacement=True), 3 samples of 2 classes, seed=3, epoch=0)"
    )
    weights = [repr(LongTailSampler([0, 1], "class_weight", class_weight=w).strategy) for w in ([1, 2], [1, 3])]
    assert weights[0].startswith("ClassWeight(2 weights, ")
    assert weights[0] != weights[1]


def test_public_names() -> None:
    assert ltk.samplers.LongTailSampler is LongTailSampler
    assert all(hasattr(ltk.samplers, name) for name in ltk.samplers.__all__)


@pytest.mark.slow
def test_more_samples_than_multinomial_takes() -> None:
    """WeightedRandomSampler stops at 2^24 weights. The last samples, beyond, have all the weight here."""
    size = 2**24 + 1000
    weight = torch.zeros(size)
    weight[2**24 :] = 1
    drawn = LongTailSampler(np.zeros(size, np.int8), "sample_weight", sample_weight=weight, num_samples=50_000)
    found = np.bincount(np.array(list(drawn)) - 2**24, minlength=1000)
    assert abs(deviation(found, np.full(1000, 50.0))) < 4


def test_parameters_of_any_integer_type_are_the_same_strategy() -> None:
    labels = [0, 0, 0, 1, 1, 2]
    for strategy, parameters in (
        ("progressive", {"epochs": 5}),
        ("class_aware", {"draws_per_class": 2}),
        ("m_per_class", {"m": 2, "batch_size": 4}),
    ):
        typed = {name: np.int64(value) for name, value in parameters.items()}
        state = LongTailSampler(labels, strategy, **typed).state_dict()
        LongTailSampler(labels, strategy, **parameters).load_state_dict(state)
    assert repr(Power(-0.0)) == repr(Power(0.0))


def test_labels_as_a_data_set_gives_them() -> None:
    expected = list(LongTailSampler([0, 0, 1, 2]))
    for of_sample in (torch.tensor, np.array, np.int16):
        assert list(LongTailSampler([of_sample(label) for label in (0, 0, 1, 2)])) == expected

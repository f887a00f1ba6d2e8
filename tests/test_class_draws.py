"""AliasTable and ClassRounds against their definitions, in integers: which probabilities they stand for, and where."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ltkernels import class_draws
from ltkernels.class_draws import AliasTable, ClassRounds

COMPILED = class_draws._host
ONE = 2**32

compiled_only = pytest.mark.skipif(COMPILED is None, reason="the C++ host module is not built")
both = pytest.mark.parametrize("host", [pytest.param("compiled", marks=compiled_only), "numpy"], indirect=True)


@pytest.fixture
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two implementations."""
    monkeypatch.setattr(class_draws, "_host", COMPILED if request.param == "compiled" else None)


_rng = np.random.default_rng(5)
LONG_TAIL = 500 * 0.01 ** (np.arange(100) / 99)
WEIGHTS = {
    "one": [3.0],
    "equal": [1] * 7,
    "integers": [3, 0, 1],
    "powers of two": [1, 2, 4, 8, 16, 16, 8, 4, 2, 1],  # columns that are full exactly when a class is used up
    "long tail": LONG_TAIL,
    "dominated": [1e9, *[1.0] * 40],
    "ascending": np.arange(1000),
    "mostly zero": np.where(_rng.random(300) < 0.9, 0, _rng.random(300)),
    "last alone": [0] * 20 + [1],
    "denormal": [5e-324, 1e-323, 0, 5e-324],
    "huge": [1.7e308, 1.7e308, 1e308, 1],  # their sum is infinite
    "all sizes": 10.0 ** _rng.uniform(-308, 308, 500),
    "Zipf": 1 / np.arange(1.0, 5000),
}
every_weights = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())


def exactly(weights: Any) -> tuple[list[int], int]:
    """The weights as integers, in units of the smallest float64, and their sum."""
    exact = [int(Fraction(float(w)) * 2**1074) for w in weights]
    return exact, sum(exact)


# ---------------------------------------------------------------------------------------------- alias tables


def masses(table: AliasTable) -> npt.NDArray[np.int64]:
    """What each class gets of all columns together, C * 2^32."""
    entries = table.entries.numpy()
    threshold, alias = entries & ONE - 1, entries >> 32
    result = threshold.copy()
    np.add.at(result, alias, ONE - threshold)
    return result


@both
@every_weights
def test_masses_are_the_probabilities(host: None, weights: Any) -> None:
    """Each rounded to a multiple of 2^-32 / C: down, but for classes that would vanish, and the largest."""
    table = AliasTable(weights)
    of_class, (exact, total) = masses(table), exactly(weights)
    size = len(exact)
    assert of_class.sum() == size * ONE
    for mass, weight in zip(of_class.tolist(), exact, strict=True):
        assert (mass > 0) == (weight > 0)
        ideal = weight * size * ONE // total
        slack = 1 + (ideal >> 50)  # of float64
        if weight < max(exact):
            assert ideal - slack <= mass <= max(1, ideal + slack)
        else:
            assert abs(mass - ideal) <= size * slack
    assert table.entries.dtype is torch.int64 and table.entries.shape == (size,)


@both
@every_weights
def test_no_class_of_weight_zero(host: None, weights: Any) -> None:
    """Neither as a column below its threshold nor as an alias; no mass alone could show an alias that has none."""
    table = AliasTable(weights)
    zero = np.asarray(weights) == 0
    entries = table.entries.numpy()
    assert not (entries & ONE - 1)[zero].any()
    assert not zero[entries >> 32].any()
    assert table.drawn.tolist() == (~zero).tolist()


@compiled_only
@every_weights
def test_alias_implementations_agree(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = AliasTable(weights)
    monkeypatch.setattr(class_draws, "_host", None)
    assert torch.equal(table.entries, AliasTable(weights).entries)


@given(st.lists(st.integers(0, 2**40) | st.integers(0, 3), min_size=1, max_size=60).filter(any))
def test_alias_tables_of_any_weights(weights: list[int]) -> None:
    """Where all classes' masses are whole, they are exact; both implementations."""
    total = len(weights) * ONE
    wanted = [total * Fraction(w, sum(weights)) for w in weights]
    for host in {COMPILED, None}:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(class_draws, "_host", host)
            got = masses(AliasTable(weights)).tolist()
        assert sum(got) == total and all((m > 0) == (w > 0) for m, w in zip(got, weights, strict=True))
        assert all(abs(m - w) <= 2 * len(weights) + w * Fraction(2) ** -50 for m, w in zip(got, wanted, strict=True))


def test_class_probs_are_normalised() -> None:
    table = AliasTable([3, 0, 1])
    assert table.class_probs.tolist() == [0.75, 0.0, 0.25] and table.class_probs.dtype is torch.float64
    assert (AliasTable(WEIGHTS["all sizes"]).class_probs > 0).all()  # 10^-600 of the largest is not 0
    assert abs(AliasTable(WEIGHTS["Zipf"]).class_probs.sum() - 1) < 1e-15
    assert AliasTable([2]).entries.tolist() == [0]


def test_scale_and_type_do_not_matter() -> None:
    expected = AliasTable([1, 2, 3, 0]).entries
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int64):
        assert torch.equal(AliasTable(torch.tensor([2, 4, 6, 0], dtype=dtype)).entries, expected)
    for dtype in (np.float16, np.float32, np.longdouble, np.uint64, ">f4"):
        assert torch.equal(AliasTable(np.array([2, 4, 6, 0], dtype)).entries, expected)
    strided = torch.tensor([1.0, 2.0, 3.0, 0.0]).repeat_interleave(2)[::2].requires_grad_()
    assert torch.equal(AliasTable(strided).entries, expected)
    assert torch.equal(AliasTable([2.0**-1060 * w for w in (1, 2, 3, 0)]).entries, expected)


def test_the_caller_keeps_its_weights() -> None:
    weights = np.array([1.0, 2.0])
    table = AliasTable(weights)
    weights[0] = 100
    assert table.class_probs.tolist() == [1 / 3, 2 / 3]


BAD_PROBS = [
    ([1, -1, -2], ValueError, "class_probs: expected all >= 0, found -1 at class 1"),
    ([1, float("nan")], ValueError, "class_probs: expected all finite, found nan at class 1"),
    ([float("inf"), 1], ValueError, "class_probs: expected all finite, found inf at class 0"),
    ([0, 0.0], ValueError, "class_probs: expected at least one > 0, found 2 zeros"),
    ([], ValueError, "class_probs: expected one number a class, shape (C,), found shape (0,)"),
    ([[0.5, 0.5]], ValueError, "found shape (1, 2)"),
    (1.0, ValueError, "found shape ()"),
    ([True, False], TypeError, "class_probs: expected integers or floats, found list of bool"),
    (torch.ones(2, dtype=torch.bool), TypeError, "class_probs: expected integers or floats, found torch.bool"),
    (torch.ones(2, dtype=torch.complex64), TypeError, "expected integers or floats, found torch.complex64"),
    (["a"], TypeError, "class_probs: expected integers or floats, found list of"),
    ({0: 1.0}, TypeError, "class_probs: expected integers or floats, found dict of"),
]


@pytest.mark.parametrize(("probs", "error", "message"), BAD_PROBS)
def test_bad_probabilities(probs: Any, error: type[Exception], message: str) -> None:
    for make in (AliasTable, lambda p: ClassRounds(2, p)):
        with pytest.raises(error) as raised:
            make(probs)
        assert message in str(raised.value)


# ---------------------------------------------------------------------------------------------- rounds


def check_rounds(rounds: ClassRounds, weights: Any) -> None:
    """All that the op takes for granted, and what is promised of the order."""
    assert rounds.slots is not None and rounds.quotas is not None
    assert rounds.slots.dtype is rounds.quotas.dtype is torch.int32 and rounds.slots.is_contiguous()
    quotas = rounds.quotas.numpy().astype(np.int64)
    start, size, classes, ordinal = rounds.slots.numpy().astype(np.int64).T
    groups = rounds.groups
    assert len(start) == quotas.sum() == groups
    assert np.array_equal(np.bincount(classes, minlength=len(quotas)), quotas)
    assert ((quotas > 0) == (np.asarray(weights) > 0)).all()
    assert rounds.drawn.tolist() == (quotas > 0).tolist()
    place = np.arange(groups)
    assert ((start <= place) & (place < start + size)).all()
    firsts = np.flatnonzero(place == start)
    assert np.array_equal(np.diff([*firsts, groups]), size[firsts])  # windows follow one another
    assert np.array_equal(np.repeat(firsts, size[firsts]), start)
    for first in firsts[:: max(1, len(firsts) // 2000)]:
        window = classes[first : first + size[first]]
        assert len(np.unique(window)) == len(window)
        if first + size[first] < groups:  # it ends because the next class is in it
            assert classes[first + size[first]] in window
    by_class = np.argsort(classes, kind="stable")
    starts = np.repeat(np.cumsum(quotas) - quotas, quotas)
    assert np.array_equal(ordinal[by_class], place - starts)  # 0, 1, ... in the order of the round
    # Spread evenly: the i-th draw of a class is near (i + phase) / quota, where no slot is far from its time.
    ideal = ordinal[by_class] / np.maximum(np.repeat(quotas, quotas), 1)
    seen = (quotas > 0).sum()
    late = place[by_class] / groups - ideal
    assert (late > -(seen + 1) / groups).all()
    assert (late < 1 / np.repeat(quotas, quotas) + (seen + 1) / groups).all()


@both
@every_weights
def test_rounds(host: None, weights: Any) -> None:
    size = len(weights)
    rounds = ClassRounds(size, weights)
    check_rounds(rounds, weights)
    most = min(256 * size, max(2**20, 4 * size))
    assert rounds.groups <= most
    exact, total = exactly(weights)
    limit = size * min(256, max(2**20 // size, 4))
    if all(weight == 0 or weight * limit >= total for weight in exact):  # else rare classes have more than their share
        assert rounds.quotas is not None
        for quota, weight in zip(rounds.quotas.tolist(), exact, strict=True):
            assert abs(quota * total - weight * rounds.groups) * limit < rounds.groups * total


@compiled_only
@every_weights
def test_round_implementations_agree(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = ClassRounds(len(weights), weights).slots
    monkeypatch.setattr(class_draws, "_host", None)
    other = ClassRounds(len(weights), weights).slots
    assert slots is not None and other is not None and torch.equal(slots, other)


@given(st.lists(st.integers(0, 6) | st.integers(0, 10**6), min_size=1, max_size=20).filter(any))
def test_rounds_of_any_weights(weights: list[int]) -> None:
    check_rounds(ClassRounds(len(weights), weights), weights)


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        ([5], [1]),
        ([1] * 8142, [1] * 8142),  # more than 2^20 / 256 classes
        ([0.1] * 10, [1] * 10),
        ([4, 2, 2], [2, 1, 1]),
        ([0, 3, 0, 1], [0, 3, 0, 1]),
        ([0.9, 0.1], [461, 51]),  # of 512
        ([9, 1], [9, 1]),
        ([90_000_000, 10_000_000, 0], [9, 1, 0]),
        ([511, 1], [511, 1]),  # as they are
        ([512, 1], [511, 1]),  # too many
        ([2.0**1023, 2.0**1023], [1, 1]),  # whole, but no int64
        (list(range(1, 101)), list(range(1, 101))),  # numbers of samples
        ([1, 0, 1], [1, 0, 1]),
    ],
)
def test_quotas(weights: list[float], quotas: list[int]) -> None:
    rounds = ClassRounds(len(weights), weights)
    assert rounds.quotas is not None and rounds.quotas.tolist() == quotas
    assert rounds.groups == rounds.positions == sum(quotas)


def test_rare_classes_have_one_slot_and_the_others_share_the_rest() -> None:
    """Six classes of 10^-9, four of 1/4: of 2560 slots 2554 are left for the four; ties go to the first."""
    rounds = ClassRounds(10, [1e-9] * 3 + [0.25] * 4 + [1e-9] * 3)
    assert rounds.quotas is not None
    assert rounds.quotas.tolist() == [1] * 3 + [639, 639, 638, 638] + [1] * 3


def test_a_class_that_becomes_rare_when_others_are_served() -> None:
    """10.2 / 2560 is more than one slot of 2560, but not of what nine classes at 1 leave to share."""
    weights = [1e-12] * 98 + [1.0001, 25_598.9999]
    rounds = ClassRounds(100, weights)
    check_rounds(rounds, weights)
    assert rounds.quotas is not None and rounds.quotas.tolist() == [1] * 99 + [25_501]


def test_a_dominant_class_comes_between_the_others() -> None:
    """9 to 1: windows of one or two slots, in none of which a class is twice."""
    rounds = ClassRounds(2, [0.9, 0.1])
    assert rounds.slots is not None
    assert set(rounds.slots[:, 1].tolist()) == {1, 2}
    rare = (rounds.slots[:, 2] == 1).nonzero().flatten()
    assert set(rare.diff().tolist()) <= {10, 11, 9}


def test_rounds_without_probabilities() -> None:
    rounds = ClassRounds(7, draws_per_class=3, distinct=True)
    assert (rounds.num_classes, rounds.groups, rounds.draws, rounds.distinct) == (7, 7, 3, True)
    assert rounds.positions == 21 and rounds.slots is None and rounds.quotas is None
    assert rounds.drawn.tolist() == [True] * 7
    some = ClassRounds(7, classes_per_round=2)
    assert (some.groups, some.positions, some.drawn.tolist()) == (2, 2, [True] * 7)


def test_draws_of_a_class_with_probabilities() -> None:
    rounds = ClassRounds(3, [2, 1, 1], draws_per_class=5)
    assert (rounds.groups, rounds.draws, rounds.positions, rounds.distinct) == (4, 5, 20, False)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0,), {}, ValueError, "num_classes: expected 1 to 2147483647, found 0"),
        ((2**31,), {}, ValueError, "num_classes: expected 1 to 2147483647, found 2147483648"),
        ((2.0,), {}, TypeError, "num_classes: expected an integer, found 2.0"),
        ((3, [1, 1]), {}, ValueError, "class_probs: expected shape (3,), found (2,)"),
        ((3,), {"draws_per_class": 0}, ValueError, "draws_per_class: expected 1 to 2147483647, found 0"),
        ((3,), {"draws_per_class": 1.5}, TypeError, "draws_per_class: expected an integer, found 1.5"),
        ((3,), {"classes_per_round": 0}, ValueError, "classes_per_round: expected 1 to 3, found 0"),
        ((3,), {"classes_per_round": 4}, ValueError, "classes_per_round: expected 1 to 3, found 4"),
        ((3,), {"classes_per_round": True}, TypeError, "classes_per_round: expected an integer, found True"),
        ((2, [1, 1]), {"classes_per_round": 1}, ValueError, "expected None with class_probs, found 1"),
        ((3,), {"distinct": 1}, TypeError, "distinct: expected a bool, found int"),
    ],
)
def test_wrong_rounds(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        ClassRounds(*arguments, **options)
    assert message in str(raised.value)


# ---------------------------------------------------------------------------------------------- devices and copies


def test_to_a_device() -> None:
    table, rounds, plain = AliasTable([1, 2]), ClassRounds(2, [1, 2]), ClassRounds(2)
    for one in (table, rounds, plain):
        assert one.to("cpu") is one and one.device == torch.device("cpu")
    moved = table.to("meta")
    assert moved.device.type == "meta" and table.device.type == "cpu"
    assert moved.num_classes == 2 and moved.class_probs is table.class_probs and moved.drawn.tolist() == [True] * 2
    dealt = rounds.to("meta")
    assert dealt.device.type == "meta" and dealt.quotas is not None and dealt.quotas.is_meta
    assert rounds.device.type == "cpu" and dealt.drawn.tolist() == [True] * 2 and dealt.positions == 3
    assert plain.to("meta") is plain


def test_copies_and_pickles() -> None:
    for copied in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        assert torch.equal(copied(AliasTable([1, 2])).entries, AliasTable([1, 2]).entries)
        slots = copied(ClassRounds(2, [1, 2])).slots
        assert slots is not None and torch.equal(slots, ClassRounds(2, [1, 2]).slots)  # type: ignore[arg-type]


@compiled_only
def test_the_module_refuses_what_would_lead_it_out_of_its_arrays() -> None:
    for wrong in ([ONE, ONE - 1], [-1, 2 * ONE + 1], []):
        with pytest.raises(ValueError, match="masses: expected"):
            COMPILED.alias_entries(np.array(wrong, np.int64))
    with pytest.raises(ValueError, match="masses: expected"):
        COMPILED.alias_entries(np.array([ONE], np.uint64))
    for quotas in ([-1, 2], [2**31], [2**30, 2**30], []):
        with pytest.raises(ValueError, match="quotas: expected"):
            COMPILED.slots(np.array(quotas, np.int64))

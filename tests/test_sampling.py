"""functional.sample_indices: what is drawn and dealt, on every backend of this process.

That all backends give the bits of the reference is tested beside each of them; here stands what the reference means:
frequencies, guarantees, and that a position's sample does not depend on the call.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import ltkernels as ltk
from ltkernels.functional import sample_indices
from ltkernels.reference.sampling import philox
from ltkernels.samplers import AliasTable, ClassIndex, ClassRounds

each_backend = pytest.mark.parametrize("backend", ltk.available_backends("cpu"))
COUNTS = (50, 20, 7, 3, 1)


def _labels(counts: tuple[int, ...] = COUNTS, seed: int = 0) -> Tensor:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


LABELS = _labels()
INDEX = ClassIndex(LABELS)


def _z(found: Tensor, expected: Tensor) -> float:
    """Chi-square as a distance from its mean in standard deviations."""
    statistic = float(((found - expected) ** 2 / expected).sum())
    return (statistic - (len(found) - 1)) / math.sqrt(2 * (len(found) - 1))


# Random123, kat_vectors: philox4x32 with 10 rounds.
VECTORS = (
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_is_the_published_one(counter: tuple[int, ...], key: tuple[int, int], expected: str) -> None:
    position = int.from_bytes(b"".join(word.to_bytes(4, "little") for word in counter[:2]), "little", signed=True)
    words = philox(torch.tensor([position]), torch.tensor(counter[2]), counter[3], key[0] | key[1] << 32)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


# --- Frequencies ---


@each_backend
@pytest.mark.parametrize("probs", [None, (1, 1, 1, 1, 1), (50, 20, 7, 3, 1), (0.2, 0, 0.5, 0.3, 0)], ids=str)
def test_classes_and_members_are_drawn_with_their_probabilities(backend: str, probs: tuple[float, ...] | None) -> None:
    count = 200_000
    wanted = torch.tensor(probs or (1.0,) * 5, dtype=torch.float64)
    with ltk.use_backend(backend):
        drawn = sample_indices(
            INDEX, 0, count, seed=3, epoch=1, class_probs=None if probs is None else torch.tensor(probs)
        )
    found = torch.bincount(LABELS[drawn], minlength=5).double()
    assert (found[wanted == 0] == 0).all()
    possible = wanted > 0
    assert abs(_z(found[possible], (wanted / wanted.sum() * count)[possible])) < 4
    of_sample = torch.bincount(drawn, minlength=len(LABELS)).double()
    expected = (wanted / wanted.sum() / torch.tensor(COUNTS))[LABELS] * count
    assert abs(_z(of_sample[expected > 0], expected[expected > 0])) < 4


@each_backend
def test_pairs_of_draws_are_independent(backend: str) -> None:
    """Neighbouring positions, positions of another epoch, another seed."""
    with ltk.use_backend(backend):
        a, b, c = (LABELS[sample_indices(INDEX, 0, 100_000, seed=s, epoch=e)] for s, e in ((3, 0), (3, 1), (4, 0)))
    for first, second in ((a[:-1], a[1:]), (a, b), (a, c)):
        found = torch.bincount(first * 5 + second, minlength=25).double()
        assert abs(_z(found, torch.full((25,), len(first) / 25.0))) < 4


@each_backend
def test_weights_of_samples_beyond_2_to_the_24(backend: str) -> None:
    """torch.multinomial refuses as many categories; float32 weights that small would be drawn wrongly."""
    size = 2**24 + 5
    weight = torch.ones(size, dtype=torch.float64)
    weight[-5:] = size / 5  # the last five together are as likely as all others
    with ltk.use_backend(backend):
        drawn = sample_indices(ClassIndex.singletons(size), 0, 20_000, seed=0, class_probs=AliasTable(weight))
    last = torch.bincount(drawn[drawn >= size - 5] - (size - 5), minlength=5).double()
    assert abs(float(last.sum()) - 10_000) < 4 * math.sqrt(5000)
    assert abs(_z(last, torch.full((5,), float(last.sum()) / 5))) < 4
    tenths = torch.bincount(drawn[drawn < size - 5] * 10 // size, minlength=10).double()
    assert abs(_z(tenths, torch.full((10,), float(tenths.sum()) / 10))) < 4


@each_backend
def test_a_class_of_more_than_2_to_the_32_members(backend: str) -> None:
    """Members that nobody stores: the index of a data set that is one class."""
    index = ClassIndex.singletons(1)
    index._set(torch.tensor([0, 2**40, 2**40 + 3]), torch.empty(0, dtype=torch.int32), 2, 2**40 + 3)
    with ltk.use_backend(backend):
        drawn = sample_indices(index, 0, 20_000, seed=0)
        dealt = sample_indices(index, 0, 20_000, seed=0, replacement=False)
    for indices in (drawn, dealt):
        large = indices[indices < 2**40]
        tenths = torch.bincount((large.double() / 2**40 * 10).long(), minlength=10).double()
        assert abs(_z(tenths, torch.full((10,), len(large) / 10.0))) < 4
        assert len(large.unique()) == len(large)
        assert abs(len(large) - 10_000) < 4 * math.sqrt(5000)
        assert set(indices[indices >= 2**40].tolist()) == {2**40, 2**40 + 1, 2**40 + 2}


# --- Without replacement ---

counts_of_classes = st.lists(st.integers(1, 40), min_size=1, max_size=8).map(tuple)


def _members_come_once_before_any_comes_twice(indices: Tensor, labels: Tensor) -> None:
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().view(-1)
        mine = indices[labels[indices] == label]
        whole = mine[: len(mine) // len(members) * len(members)].view(-1, len(members))
        assert torch.equal(whole.sort(1).values, members.expand_as(whole))
        rest = mine[whole.numel() :]
        assert len(rest.unique()) == len(rest)


@each_backend
@given(counts=counts_of_classes, seed=st.integers(-(2**63), 2**63 - 1), epoch=st.integers(0, 2**32 - 1))
def test_every_member_once_before_any_twice(backend: str, counts: tuple[int, ...], seed: int, epoch: int) -> None:
    labels = _labels(counts)
    with ltk.use_backend(backend):
        indices = sample_indices(ClassIndex(labels), 0, 300, seed=seed, epoch=epoch, replacement=False)
    _members_come_once_before_any_comes_twice(indices, labels)
    rounds = labels[indices[: 300 // len(counts) * len(counts)]].view(-1, len(counts))
    assert torch.equal(rounds.sort(1).values, torch.arange(len(counts)).expand_as(rounds))


@each_backend
@given(
    counts=counts_of_classes,
    weights=st.lists(st.floats(0.01, 100), min_size=8, max_size=8),
    seed=st.integers(0, 2**32),
)
def test_and_so_with_probabilities(backend: str, counts: tuple[int, ...], weights: list[float], seed: int) -> None:
    labels, classes = _labels(counts), len(counts)
    rounds = ClassRounds(classes, torch.tensor(weights[:classes], dtype=torch.float64))
    count = min(rounds.positions, 3000)
    with ltk.use_backend(backend):
        indices = sample_indices(ClassIndex(labels), 0, count, seed=seed, class_probs=rounds, replacement=False)
    _members_come_once_before_any_comes_twice(indices, labels)
    if count == rounds.positions:
        assert rounds.quotas is None or torch.equal(torch.bincount(labels[indices], minlength=classes), rounds.quotas)


@each_backend
@pytest.mark.parametrize("draws", [1, 2, 4])
def test_some_draws_of_a_class_in_a_row(backend: str, draws: int) -> None:
    rounds = ClassRounds(5, draws_per_class=draws)
    with ltk.use_backend(backend):
        indices = sample_indices(INDEX, 0, 40 * draws, seed=1, class_probs=rounds, replacement=False)
    groups = LABELS[indices].view(-1, draws)
    assert (groups == groups[:, :1]).all()
    _members_come_once_before_any_comes_twice(indices, LABELS)


@each_backend
def test_groups_of_distinct_members(backend: str) -> None:
    """For batches of m a class: no member twice in a group where the class has m; groups of 3 leave one of 7."""
    rounds = ClassRounds(5, draws_per_class=3, classes_per_round=4, distinct=True)
    with ltk.use_backend(backend):
        indices = sample_indices(INDEX, 0, 3 * 4 * 200, seed=1, class_probs=rounds, replacement=False).view(-1, 4, 3)
    labels = LABELS[indices]
    assert (labels == labels[..., :1]).all()
    for groups, of_class in zip(indices.view(-1, 3).tolist(), labels.view(-1, 3)[:, 0].tolist(), strict=True):
        assert len(set(groups)) == min(3, COUNTS[of_class])
    for classes in labels[..., 0].tolist():
        assert len(set(classes)) == 4
    assert set(indices.view(-1).tolist()) == set(range(len(LABELS)))
    found = torch.bincount(labels[..., 0].reshape(-1), minlength=5).double()
    assert float((found - 160).abs().max()) < 4 * math.sqrt(200 * 0.2 * 0.8)


# --- A position's sample does not depend on the call ---


@each_backend
@given(
    start=st.one_of(st.integers(0, 500), st.integers(2**32 - 300, 2**32), st.integers(0, 2**62)),
    step=st.integers(1, 40),
    count=st.integers(0, 50),
    replacement=st.booleans(),
    weighted=st.booleans(),
)
def test_slices_of_one_stream(
    backend: str, start: int, step: int, count: int, replacement: bool, weighted: bool
) -> None:
    options: dict[str, Any] = {"seed": -5, "epoch": 2**31 + 9, "replacement": replacement}
    if weighted:
        options["class_probs"] = torch.tensor([5.0, 1, 1, 2, 0.5])
    with ltk.use_backend(backend):
        part = sample_indices(INDEX, start, start + count * step, step, **options)
        assert part.dtype == torch.int64 and part.shape == (count,)
        if count:
            one = sample_indices(INDEX, start + (count - 1) * step, num_samples=1, **options)
            assert one.item() == part[-1].item()
            several = sample_indices(INDEX, start, num_samples=min(count * step, 100), **options)
            assert torch.equal(several[::step], part[: len(several[::step])])


@each_backend
def test_start_and_epoch_may_be_tensors(backend: str) -> None:
    start, epoch = torch.tensor(2**40 + 3), torch.tensor(7)
    with ltk.use_backend(backend):
        for replacement in (True, False):
            expected = sample_indices(INDEX, 2**40 + 3, 2**40 + 53, 2, seed=1, epoch=7, replacement=replacement)
            found = sample_indices(INDEX, start, step=2, num_samples=25, seed=1, epoch=epoch, replacement=replacement)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("count", [2**16, 300_007])
def test_threads_change_nothing(count: int, threads: Any) -> None:
    for replacement in (True, False):
        one = sample_indices(INDEX, 5, num_samples=count, seed=0, replacement=replacement)
        with threads(2):
            assert torch.equal(sample_indices(INDEX, 5, num_samples=count, seed=0, replacement=replacement), one)


# --- torch.compile, the op, explain ---


def test_compiled_without_recompilation() -> None:
    counter = CompileCounter()
    torch._dynamo.reset()

    def draw(start: Tensor, epoch: int) -> Tensor:
        return sample_indices(INDEX, start, num_samples=8, seed=1, epoch=epoch, class_probs=TABLE) * 2

    compiled = torch.compile(draw, backend=counter, fullgraph=True)
    for epoch in (1, 2, 3, 4):
        for start in (0, 8):
            at = torch.tensor(start)
            assert torch.equal(compiled(at, epoch), draw(at, epoch))
    assert counter.frame_count <= 2  # the second has the epoch as a symbol
    torch._dynamo.reset()


TABLE = AliasTable([1, 2, 3, 4, 5])


def test_the_op_keeps_its_promises() -> None:
    rounds = ClassRounds(5, [3, 1, 1, 1, 1])
    start = torch.tensor(3)
    for tensors, options in (
        ((TABLE.entries, None, None, None, None), (5, 0, 1, False, 1, 2, 3, 4, 10)),
        ((None, None, None, start, start), (5, 5, 1, False, 1, 2, 3, 4, 10)),
        ((None, rounds.slots, rounds.quotas, None, start), (5, rounds.groups, 2, True, 1, 2, 3, 4, 0)),
    ):
        torch.library.opcheck(torch.ops.ltkernels.sample_indices, (INDEX.offsets, INDEX.members, *tensors, *options))


def test_explain() -> None:
    with ltk.use_backend("reference"):
        text = ltk.explain(sample_indices, INDEX, 0, 5, seed=1)
    assert text.op == "sample_indices" and text.backend == "reference"


# --- Wrong calls ---

EMPTY = ClassIndex([0, 0, 2], num_classes=3)
WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "index": (TypeError, "class_index: expected a ltkernels.samplers.ClassIndex, found list", {"class_index": [0, 1]}),
    "empty class": (
        ValueError,
        "class_index: expected a member of every class that can be drawn, found none of class 1; give it probability 0"
        " in class_probs",
        {"class_index": EMPTY},
    ),
    "empty class in a table": (
        ValueError,
        "class_index: expected a member of every class that can be drawn, found none of class 1; give it probability 0"
        " in class_probs",
        {"class_index": EMPTY, "class_probs": torch.tensor([1.0, 0.1, 1.0])},
    ),
    "start": (ValueError, "start: expected >= 0 and below 9223372036854775808, found -1", {"start": -1}),
    "start type": (TypeError, "start: expected an integer, found 0.5", {"start": 0.5}),
    "start dtype": (
        ValueError,
        "start: expected an integer or a 0-d int64 tensor on cpu, found torch.int32 of shape () on cpu",
        {"start": torch.tensor(0, dtype=torch.int32), "stop": None, "num_samples": 1},
    ),
    "stop": (ValueError, "stop: expected >= start, which is 5, found 3", {"start": 5, "stop": 3}),
    "stop with a tensor": (
        ValueError,
        "stop: expected None with a tensor as start (give num_samples), found 4",
        {"start": torch.tensor(0)},
    ),
    "no stop": (
        ValueError, "stop: expected stop or num_samples, found stop=None and num_samples=None", {"stop": None},
    ),
    "both": (
        ValueError, "stop: expected stop or num_samples, found stop=4 and num_samples=4", {"num_samples": 4},
    ),
    "num_samples": (ValueError, "num_samples: expected >= 0, found -1", {"stop": None, "num_samples": -1}),
    "beyond": (
        ValueError,
        f"num_samples: expected positions below 2^63, found {2**63 + 1}",
        {"start": 2**63 - 1, "stop": None, "num_samples": 3},
    ),
    "replacement": (TypeError, "replacement: expected a bool, found 'no'", {"replacement": "no"}),
    "step": (ValueError, "step: expected >= 1, found 0", {"step": 0}),
    "seed": (TypeError, "seed: expected an integer, found None", {"seed": None}),
    "seed size": (ValueError, f"seed: expected an integer of 64 bits, found {2**63}", {"seed": 2**63}),
    "epoch": (ValueError, "epoch: expected >= 0 and below 4294967296, found 4294967296", {"epoch": 2**32}),
    "probs shape": (
        ValueError,
        "class_probs: expected 5 classes on cpu as class_index has, found 3 on cpu",
        {"class_probs": torch.ones(3)},
    ),
    "probs negative": (
        ValueError, "class_probs: expected all >= 0, found -1 at class 1",
        {"class_probs": torch.tensor([1.0, -1, 1, 1, 1])},
    ),
    "probs nan": (
        ValueError, "class_probs: expected all finite, found nan at class 0",
        {"class_probs": torch.tensor([float("nan"), 1, 1, 1, 1])},
    ),
    "probs zero": (
        ValueError, "class_probs: expected at least one > 0, found 5 zeros", {"class_probs": torch.zeros(5)},
    ),
    "probs list": (
        TypeError,
        "class_probs: expected None, a torch.Tensor or AliasTable with replacement=True, found list",
        {"class_probs": [1.0] * 5},
    ),
    "rounds with replacement": (
        TypeError,
        "class_probs: expected None, a torch.Tensor or AliasTable with replacement=True, found ClassRounds",
        {"class_probs": ClassRounds(5)},
    ),
    "table without": (
        TypeError,
        "class_probs: expected None, a torch.Tensor or ClassRounds with replacement=False, found AliasTable",
        {"class_probs": TABLE, "replacement": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    exception, message, changes = WRONG[name]
    call: dict[str, Any] = {"class_index": INDEX, "start": 0, "stop": 4, "seed": 0} | changes
    with pytest.raises(exception) as raised:
        sample_indices(**call)
    assert str(raised.value) == message


def test_a_class_without_members_may_have_probability_0() -> None:
    probs = torch.tensor([1.0, 0.0, 1.0])
    for replacement in (True, False):
        found = sample_indices(EMPTY, 0, 200, seed=0, class_probs=probs, replacement=replacement)
        assert set(found.tolist()) == {0, 1, 2}


@pytest.mark.slow
def test_more_than_2_to_the_31_samples() -> None:
    """Members that need 64 bits: 2 GiB of labels, 17 GiB of members."""
    size = 2**31 + 10
    labels = torch.zeros(size, dtype=torch.uint8)
    labels[-10:] = 1
    index = ClassIndex(labels)
    assert index.members.dtype == torch.int64
    drawn = sample_indices(index, 0, 10_000, seed=0)
    tail = drawn[labels[drawn] == 1]
    assert int(tail.min()) == size - 10 and int(tail.max()) == size - 1
    assert abs(len(tail) - 5000) < 4 * math.sqrt(2500)

"""sample_indices on the GPU backends: bit by bit what the reference draws, wherever the kernels change their path.

Without a GPU the forms of this file exist in processes that emulate them: tests/test_cuda.py and tests/test_triton.py
start those. Streams as such - frequencies, permutations, unions of ranks - are tested on what the reference draws.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from cross_entropy_cases import Form, each_gpu_form, seed
from torch import Tensor

import ltkernels as ltk
from ltkernels import backends
from ltkernels.class_draws import AliasTable, ClassRounds
from ltkernels.ops import sampling as op
from ltkernels.reference import sampling as reference
from ltkernels.reference.sampling import SamplingOptions

Call = tuple[Any, ...]
# Classes smaller than a group; permutations of up to 16 elements and of more; sizes at both sides of a power of two.
COUNTS = (1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 300, 1025)
EMPTY = torch.empty(0, dtype=torch.int64)
SEED = 0x0123_4567_89AB_CDEF


@pytest.fixture(autouse=True)
def _fewer_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, a program takes as long for 64 positions as for 512. One test has programs as they are."""
    if backends.emulated("triton") and request.node.originalname != "test_counts":
        from ltkernels.triton import sampling as kernels

        monkeypatch.setattr(kernels, "_DEALT", (512, 1))


def tables(members: str = "int32", counts: tuple[int, ...] = COUNTS) -> tuple[Tensor, Tensor]:
    """Offsets and members: samples in random order, or as they come."""
    sizes = torch.tensor(counts)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    if members == "identity":
        return offsets, EMPTY
    samples = torch.randperm(int(sizes.sum()))
    return offsets, samples.int() if members == "int32" else samples + 2**40


def singletons(members: str = "int32", size: int = 50) -> tuple[Tensor, Tensor]:
    return EMPTY, tables(members, (size,))[1]


# How classes come, of a number of classes: an alias table, or rounds.
KINDS: dict[str, Any] = {
    "uniform": lambda classes: None,
    "weighted": lambda classes: AliasTable(torch.arange(classes).double() ** 2),  # class 0 never
    "rounds": lambda classes: ClassRounds(classes),
    "some of a round": lambda classes: ClassRounds(classes, classes_per_round=classes // 2),
    "groups": lambda classes: ClassRounds(classes, draws_per_class=4),
    "distinct": lambda classes: ClassRounds(classes, draws_per_class=4, distinct=True),
    "slots": lambda classes: ClassRounds(classes, torch.arange(classes).double() + 0.5),
    "distinct slots": lambda classes: ClassRounds(
        classes, 1 / (torch.arange(classes).double() + 1), draws_per_class=3, distinct=True
    ),
}


def call(
    data: tuple[Tensor, Tensor],
    kind: str,
    *,
    seed: int = SEED,
    epoch: int = 3,
    start: int = 0,
    step: int = 1,
    count: int = 301,
    start_at: int | None = None,
    epoch_at: int | None = None,
) -> Call:
    offsets, members = data
    classes = offsets.numel() - 1 if offsets.numel() else members.numel()
    made = KINDS[kind](classes)
    alias = made.entries if isinstance(made, AliasTable) else None
    rounds = made if isinstance(made, ClassRounds) else None
    on_device = [None if value is None else torch.tensor(value) for value in (start_at, epoch_at)]
    return (
        offsets, members, alias, rounds and rounds.slots, rounds and rounds.quotas, *on_device,
        classes, rounds.groups if rounds else 0, rounds.draws if rounds else 1, bool(rounds and rounds.distinct),
        seed, epoch, start, step, count,
    )  # fmt: skip


def sample(made: Call, form: Form) -> Tensor:
    with form.use():
        return op.sample_indices(*(v.to(form.device) if isinstance(v, Tensor) else v for v in made))


def check(made: Call, form: Form) -> Tensor:
    """Samples as the reference does, and returns them."""
    expected = reference.sample_indices(*made[:7], SamplingOptions(*made[7:]))
    found = sample(made, form)
    assert found.dtype == torch.int64 and found.shape == expected.shape and found.is_contiguous()
    assert torch.equal(found.cpu(), expected)
    return expected


@each_gpu_form
@pytest.mark.parametrize("members", ["int32", "int64", "identity"])
@pytest.mark.parametrize("kind", KINDS)
def test_classes_of_all_sizes(kind: str, members: str, form: Form) -> None:
    seed(1)
    found = check(call(tables(members), kind, start=40, count=501), form)
    assert len(found.unique()) > 100, "a case that shows nothing"


@each_gpu_form
@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_a_class_of_its_own(kind: str, form: Form) -> None:
    seed(2)
    for members in ("int32", "int64"):
        check(call(singletons(members), kind), form)
    made = call(singletons("int32"), kind)
    check((made[0], EMPTY, *made[2:]), form)


@each_gpu_form
@pytest.mark.parametrize("kind", KINDS)
def test_far_into_the_stream(kind: str, form: Form) -> None:
    """Positions beyond 32 bits, and what crosses them within a call: every word of a counter and of the key counts."""
    seed(3)
    data = tables()
    places = ((2**31 - 9, 1), (2**32 - 40, 3), (2**40, 8), (2**61 + 5, 1))
    for (start, step), epoch, key in zip(places, (0, 2**32 - 1, 2**31, 7), (0, -1, -(2**63), 2**63 - 1), strict=True):
        check(call(data, kind, seed=key, epoch=epoch, start=start, step=step, count=90), form)
    check(call(data, kind, start=1, step=2**40, count=33), form)


@each_gpu_form
@pytest.mark.parametrize("kind", ["uniform", "weighted", "rounds", "slots"])
def test_counts(kind: str, form: Form) -> None:
    """None, one, an odd number, both sides of a block, and, emulated, more than all blocks take at a time."""
    seed(4)
    data = tables()
    dealt = kind in ("rounds", "slots")
    for count in (0, 1, 2, 63, 64, 65, *((130,) if dealt else (511, 512, 513, 1025))):
        check(call(data, kind, start=11, count=count), form)
    if form.backend == "cuda" or form.device != "cpu":
        check(call(data, kind, count=40_001), form)


@each_gpu_form
@pytest.mark.parametrize("kind", ["uniform", "weighted", "rounds", "distinct slots"])
def test_start_and_epoch_on_the_device(kind: str, form: Form) -> None:
    """They are added; of the epoch the low 32 bits count."""
    seed(5)
    data = tables()
    both = check(call(data, kind, start=5, start_at=2**32, epoch=9, epoch_at=2**32 - 4, step=3), form)
    assert torch.equal(both, check(call(data, kind, start=2**32 + 5, epoch=5, step=3), form))
    check(call(data, kind, start_at=77), form)
    check(call(data, kind, epoch=0, epoch_at=1), form)


@each_gpu_form
@pytest.mark.parametrize("kind", KINDS)
def test_classes_with_more_than_2_32_members(kind: str, form: Form) -> None:
    """Offsets alone, of samples that are numbered class by class: nothing is as large as they say."""
    offsets = torch.tensor([0, 2**32 - 1, 2**33, 2**33 + 7, 2**45, 2**45 + 2**20 + 1, 2**61])
    found = check(call((offsets, EMPTY), kind, start=2**36 - 20, count=200), form)
    assert int(found.max()) > 2**45


@each_gpu_form
@pytest.mark.parametrize("kind", ["uniform", "rounds"])
def test_one_class(kind: str, form: Form) -> None:
    for size in (1, 16, 1000):
        found = check(call(tables("int32", (size,)), kind, count=2 * size), form)
        if kind == "rounds":
            assert torch.equal(found[:size].sort().values, torch.arange(size)), "each once before any twice"


@each_gpu_form
def test_many_classes(form: Form) -> None:
    """More than a window of a round that shows: class numbers beyond 16 bits."""
    seed(6)
    counts = tuple((torch.arange(70_001) % 3 + 1).tolist())
    data = tables("int32", counts)
    for kind in ("uniform", "weighted", "rounds", "distinct"):
        found = check(call(data, kind, start=12345, count=200), form)
        assert len(found.unique()) > 50


@each_gpu_form
def test_calls_that_fit_nothing_are_refused(form: Form) -> None:
    """A direct call has been checked by nobody: sizes, types and what would make a kernel loop for ever."""
    good = call(tables(), "slots")
    names = (
        "offsets members alias_table slots quotas start_at epoch_at classes groups draws distinct seed epoch start step"
        " count"
    ).split()
    wrong: list[dict[str, Any]] = [
        {"offsets": good[0][:-1]},
        {"offsets": good[0].int()},
        {"members": good[1].short()},
        {"alias_table": torch.zeros(3, dtype=torch.int64)},
        {"slots": None},
        {"slots": good[3].long()},
        {"slots": good[3][:-1]},
        {"quotas": good[4][1:]},
        {"start_at": torch.zeros(1, dtype=torch.int32)[0]},
        {"epoch_at": torch.zeros(2, dtype=torch.int64)},
        {"slots": None, "quotas": None, "groups": len(COUNTS) + 1},
        {"classes": 0},
        {"groups": -1},
        {"draws": 0},
        {"step": 0},
        {"count": -1},
        {"start": -1},
        {"start": 2**63 - 5},
        {"offsets": EMPTY},
    ]
    for change in wrong:
        made = tuple(change.get(name, value) for name, value in zip(names, good, strict=True))
        with pytest.raises(RuntimeError, match="sample_indices: expected"):
            sample(made, form)
    check(good, form)


@each_gpu_form
def test_all_kinds_at_random(form: Form) -> None:
    """Sizes, kinds and numbers that nobody chose."""
    generator = torch.Generator().manual_seed(7)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for kind, members in product(KINDS, ("int32", "identity")):
        counts = tuple(1 + 2 ** pick(0, 9) * pick(1, 8) // 8 for _ in range(pick(2, 40)))
        epoch, start, step = pick(0, 2**32), pick(0, 2 ** pick(1, 60)), pick(1, 100)
        data = tables(members, counts)
        check(call(data, kind, seed=pick(-(2**62), 2**62), epoch=epoch, start=start, step=step, count=130), form)


@each_gpu_form
@pytest.mark.parametrize("classes", [10, 1000, 2**31 - 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_samples_of_classes(form: Form, weighted: bool, classes: int) -> None:
    """Positions beyond 2^61, in permutations of few and of many elements; alias tables only of what fits in memory."""
    labels, step = torch.tensor([3, 7, 3]), torch.tensor(5, device=form.device)
    probs = AliasTable(torch.arange(1, min(classes, 1000) + 1)) if weighted else None
    size = min(classes // 2, 50)
    classes = probs.num_classes if probs else classes
    with ltk.use_backend("reference"):
        expected = ltk.functional.sample_classes(labels, classes, size, seed=SEED, step=5, class_probs=probs)
    probs = probs and probs.to(form.device)
    with form.use():
        found = ltk.functional.sample_classes(
            labels.to(form.device), classes, size, seed=SEED, step=step, class_probs=probs
        )
    assert torch.equal(found.classes.cpu(), expected.classes)
    torch.testing.assert_close(found.log_expected.cpu(), expected.log_expected)

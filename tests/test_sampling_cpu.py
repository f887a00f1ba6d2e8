"""The C++ kernel of sample_indices: the bits of the reference on every instruction set, and direct calls of the op.

Chosen where the kernel changes its path: vectors and what is left of one, blocks, several threads, classes too large
for 32-bit products, the two kinds of members, none at all, the four ways in which classes come.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ltkernels import backends
from ltkernels.reference import sampling as reference
from ltkernels.samplers import AliasTable, ClassIndex, ClassRounds

pytestmark = pytest.mark.skipif(backends.status()["cpu"] is not None, reason="the C++ library was not built")

TENSORS = ("offsets", "members", "alias_table", "slots", "quotas", "start_at", "epoch_at")


@pytest.fixture(autouse=True)
def _same_instruction_set_after() -> Iterator[None]:
    before = backends.cpu_instruction_set()
    yield
    backends.cpu_instruction_set(before)


def instruction_sets() -> list[str]:
    """Those of this processor; portable is always there."""
    before, found = backends.cpu_instruction_set(), []
    for name in backends.CPU_INSTRUCTION_SETS:
        try:
            found.append(backends.cpu_instruction_set(name))
        except ValueError:
            continue
    backends.cpu_instruction_set(before)
    assert "portable" in found
    return found


def a_call(**changes: Any) -> dict[str, Any]:
    """Five classes, one of them of one sample, drawn; some tensors and options changed."""
    index = ClassIndex([0] * 40 + [1] * 17 + [2] * 3 + [3] + [4] * 100)
    call: dict[str, Any] = dict.fromkeys(TENSORS)
    call |= {"offsets": index.offsets, "members": index.members, "classes": 5, "groups": 0, "draws": 1}
    call |= {"distinct": False, "seed": 1, "epoch": 2, "start": 0, "step": 1, "count": 300}
    return call | changes


def op(call: dict[str, Any]) -> Tensor:
    indices: Tensor = torch.ops.ltkernels_cpu.sample_indices(*call.values())
    return indices


def expected(call: dict[str, Any]) -> Tensor:
    values = list(call.values())
    return reference.sample_indices(*values[: len(TENSORS)], reference.SamplingOptions(*values[len(TENSORS) :]))


def expect_the_bits_of_the_reference(call: dict[str, Any]) -> None:
    wanted = expected(call)
    for name in instruction_sets():
        backends.cpu_instruction_set(name)
        found = op(call)
        assert found.dtype == torch.int64
        assert torch.equal(found, wanted), name


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    classes = draw(st.integers(1, 40))
    counts = torch.tensor(draw(st.lists(st.integers(1, 70), min_size=classes, max_size=classes)))
    kind = draw(st.sampled_from(["members", "members", "identity", "singletons", "huge"]))
    if kind == "huge":  # of 2^30 to 2^37 samples: nothing is stored for a member
        counts = counts << 30
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    if kind == "singletons":
        offsets = offsets[:0]
    total = classes if kind == "singletons" else int(counts.sum())
    stored = kind == "members" or (kind == "singletons" and draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    members = torch.randint(2**31 if draw(st.booleans()) else 2**62, (total if stored else 0,), generator=generator)
    if draw(st.booleans()):
        members = members.to(torch.int32)
    count, step = draw(st.integers(0, 300)), draw(st.sampled_from([1, 1, 2, 7, 2**20 + 1, 2**32, 2**33 + 5]))
    start = draw(st.sampled_from([0, 5, 2**32 - 100, 2**40 - 9, 2**62]))
    changes: dict[str, Any] = {
        **{"offsets": offsets, "members": members, "classes": classes, "count": count, "step": step, "start": start},
        "seed": draw(st.sampled_from([0, 1, -1, -(2**63), 2**63 - 1, 0x1234_5678_9ABC_DEF0])),
        "epoch": draw(st.sampled_from([0, 1, 2**31, 2**32 - 1])),
    }
    probs = torch.tensor(draw(st.lists(st.integers(0, 9), min_size=classes, max_size=classes)), dtype=torch.float64)
    probs[draw(st.integers(0, classes - 1))] += 1
    way = draw(st.sampled_from(["uniform", "table", "dealt", "slots"]))
    if way == "table":
        changes["alias_table"] = AliasTable(probs).entries
    elif way in ("dealt", "slots"):
        draws, distinct = draw(st.integers(1, 5)), draw(st.booleans())
        if way == "slots":
            rounds = ClassRounds(classes, probs, draws_per_class=draws, distinct=distinct)
        else:
            chosen = draw(st.integers(1, classes))
            rounds = ClassRounds(classes, draws_per_class=draws, distinct=distinct, classes_per_round=chosen)
        changes |= {"groups": rounds.groups, "draws": draws, "distinct": distinct}
        changes |= {"slots": rounds.slots, "quotas": rounds.quotas}
    for name, option in (("start_at", "start"), ("epoch_at", "epoch")):
        if draw(st.booleans()):
            changes |= {name: torch.tensor(changes[option]), option: draw(st.integers(0, 3))}
    return a_call(**changes)


@given(calls())
def test_every_instruction_set_has_the_bits_of_the_reference(call: dict[str, Any]) -> None:
    expect_the_bits_of_the_reference(call)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 65, 127, 128, 129, 500])
def test_lengths_around_vectors_and_blocks(count: int) -> None:
    expect_the_bits_of_the_reference(a_call(count=count))


@pytest.mark.parametrize("groups", [0, 5])
def test_threads_and_pieces_have_the_bits_of_the_whole(groups: int, threads: Any) -> None:
    """Long enough that two and three threads each get a part: a part is 16,384 indices, or 1,024 where classes are
    dealt."""
    call = a_call(count=70_001, groups=groups, draws=2 if groups else 1, start=2**32 - 30_000)
    whole = expected(call)
    for name in instruction_sets():
        backends.cpu_instruction_set(name)
        for count in (1, 2, 3):
            with threads(count):
                assert torch.equal(op(call), whole), (name, count)
        first = op(call | {"count": 1_000})
        second = op(call | {"count": 500, "start": call["start"] + 1, "step": 3})
        assert torch.equal(first, whole[:1_000]) and torch.equal(second, whole[1:1_501:3])


def test_a_class_of_more_than_2_to_the_32_members_uses_all_of_them() -> None:
    call = a_call(offsets=torch.tensor([0, 3 << 40]), members=torch.zeros(0, dtype=torch.int64), classes=1, count=2_000)
    expect_the_bits_of_the_reference(call)
    assert 2**40 < int(op(call).float().median()) < 2**41
    assert len(op(call).unique()) > 1_990


def test_a_point_on_the_threshold_is_the_alias() -> None:
    """One in 2^32 draws, so here the thresholds are made of the draws."""
    call = a_call()
    first, second, _, _ = reference.philox(torch.arange(300), torch.tensor(2), reference.DRAWS, 1)
    point = first * 5 + (second * 5 >> 32)
    column, behind = point >> 32, point & 0xFFFFFFFF
    hit = torch.stack([(column == c).nonzero()[0, 0] for c in range(5)])
    aliases = torch.tensor([1, 2, 3, 4, 0])
    call = a_call(alias_table=behind[hit] | aliases << 32, members=call["offsets"][:0])
    expect_the_bits_of_the_reference(call)
    assert torch.equal(torch.bucketize(op(call)[hit], call["offsets"], right=True) - 1, aliases)


def test_the_last_position_is_2_to_the_63_minus_1() -> None:
    for groups in (0, 5):
        expect_the_bits_of_the_reference(a_call(start=2**63 - 300, groups=groups))
        expect_the_bits_of_the_reference(a_call(start=3, step=2**61, count=4, groups=groups))


@pytest.mark.parametrize("groups", [0, 5])
def test_a_class_without_members_is_an_error_not_a_wrong_index(groups: int) -> None:
    """The last class, where a member read for it would lie behind the end; and only if it comes."""
    offsets = torch.tensor([0, 40, 57, 60, 161, 161])
    call = a_call(offsets=offsets, groups=groups)
    never = AliasTable([1, 1, 1, 1, 0]).entries
    for name in instruction_sets():
        backends.cpu_instruction_set(name)
        with pytest.raises(RuntimeError, match="a class without members came"):
            op(call)
        if groups == 0:
            assert torch.equal(op(call | {"alias_table": never}), expected(call | {"alias_table": never}))


INT = torch.int32
WRONG = {
    "classes": [{"classes": 0}, {"classes": 2**31}, {"classes": -1}],
    "offsets": [
        {"classes": 4},
        {"offsets": torch.zeros(6, dtype=INT)},
        {"offsets": torch.arange(12)[::2]},
        {"offsets": torch.tensor([1, 40, 57, 60, 61, 161])},
        {"offsets": torch.tensor([0, 40, 57, 60, 61, 162])},
        {"offsets": torch.tensor([0, 40, 57, 60, 61, -1]), "members": torch.zeros(0, dtype=INT)},
    ],
    "members": [{"members": torch.arange(161.0)}, {"members": torch.arange(322)[::2]}],
    "a member for each class": [{"offsets": torch.zeros(0, dtype=torch.int64)}],
    "alias_table": [{"alias_table": torch.zeros(4, dtype=torch.int64)}, {"alias_table": torch.zeros(5, dtype=INT)}],
    "start_at and epoch_at": [
        {"start_at": torch.zeros(1, dtype=torch.int64)},
        {"start_at": torch.tensor(0, dtype=INT)},
        {"epoch_at": torch.tensor(0.0)},
        {"epoch_at": torch.zeros(2, dtype=torch.int64)},
    ],
    "start >= 0, step >= 1 and count >= 0": [{"start": -1}, {"step": 0}, {"step": -1}, {"count": -1}],
    "positions": [
        {"start": 2**63 - 1, "count": 2},
        {"step": 2**62, "count": 3},
        {"start_at": torch.tensor(-1)},
        {"start_at": torch.tensor(2**63 - 1), "start": 1},
        {"start_at": torch.tensor(2**63 - 299)},
    ],
    "groups": [{"groups": -1}, {"groups": 5, "draws": 0}, {"groups": 5, "draws": 2**31}],
    "at most a group for each class": [{"groups": 6}],
    "slots and quotas": [
        {"groups": 3, "slots": torch.zeros(3, 4, dtype=INT)},
        {"groups": 3, "quotas": torch.zeros(5, dtype=INT)},
    ],
    "slots:": [
        {"groups": 3, "slots": torch.zeros(2, 4, dtype=INT), "quotas": torch.zeros(5, dtype=INT)},
        {"groups": 3, "slots": torch.zeros(12, dtype=INT), "quotas": torch.zeros(5, dtype=INT)},
        {"groups": 3, "slots": torch.zeros(4, 3, dtype=INT).T, "quotas": torch.zeros(5, dtype=INT)},
        {"groups": 3, "slots": torch.zeros(3, 4, dtype=torch.int64), "quotas": torch.zeros(5, dtype=INT)},
    ],
    "quotas:": [
        {"groups": 3, "slots": torch.zeros(3, 4, dtype=INT), "quotas": torch.zeros(4, dtype=INT)},
        {"groups": 3, "slots": torch.zeros(3, 4, dtype=INT), "quotas": torch.zeros(5, dtype=torch.int64)},
    ],
}


@pytest.mark.parametrize(
    ("message", "changes"), [(message, changes) for message, cases in WRONG.items() for changes in cases]
)
def test_a_direct_call_with_what_does_not_fit_is_refused(message: str, changes: dict[str, Any]) -> None:
    """Python checks nothing for whoever calls the op itself."""
    assert len(op(a_call())) == 300
    with pytest.raises(RuntimeError, match=f"sample_indices: expected .*{message}"):
        op(a_call(**changes))


def test_the_library_calls_this_kernel() -> None:
    """The public function reaches the op of the library, not the reference."""
    import ltkernels as ltk

    index = ClassIndex([0, 0, 1])
    with ltk.use_backend("cpu"):
        text = ltk.explain(ltk.functional.sample_indices, index, 0, 4, seed=0)
        found = ltk.functional.sample_indices(index, 0, 4, seed=0)
    assert "cpu        serves this call" in text
    with ltk.use_backend("reference"):
        assert torch.equal(found, ltk.functional.sample_indices(index, 0, 4, seed=0))

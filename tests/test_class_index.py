"""ClassIndex against a sort by hand: every kind of labels, both implementations, files and their damage."""

from __future__ import annotations

import copy
import os
import pickle
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ltkernels import class_index
from ltkernels.class_index import ClassIndex

COMPILED = class_index._host
TYPES = [f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)]
LABELS = [2, 0, 5, 2, 2, 0, 1, 5, 5, 2]  # classes 3 and 4 are empty

compiled_only = pytest.mark.skipif(COMPILED is None, reason="the C++ host module is not built")
both = pytest.mark.parametrize("host", [pytest.param("compiled", marks=compiled_only), "numpy"], indirect=True)


@pytest.fixture
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two implementations."""
    monkeypatch.setattr(class_index, "_host", COMPILED if request.param == "compiled" else None)


def by_hand(labels: Any, num_classes: int, indices: Any = None) -> tuple[list[int], list[int]]:
    """Offsets and members, from the definition."""
    positions = range(len(labels)) if indices is None else [int(i) for i in indices]
    of_class = [[i for i in positions if labels[i] == c] for c in range(num_classes)]
    return [0, *np.cumsum([len(m) for m in of_class]).tolist()], [i for m in of_class for i in m]


def check(index: ClassIndex, labels: Any, num_classes: int, indices: Any = None) -> None:
    offsets, members = by_hand(labels, num_classes, indices)
    assert index.offsets.tolist() == offsets and index.offsets.dtype is torch.int64
    assert index.members.tolist() == members
    assert index.class_counts.tolist() == np.diff(offsets).tolist()
    assert (index.num_classes, index.num_samples) == (num_classes, len(members))


def same(a: ClassIndex, b: ClassIndex) -> bool:
    return (
        torch.equal(a.offsets, b.offsets)
        and torch.equal(a.members, b.members)
        and a.members.dtype is b.members.dtype
        and (a.num_classes, a.num_samples) == (b.num_classes, b.num_samples)
        and a.fingerprint == b.fingerprint
    )


# ---------------------------------------------------------------------------------------------- kinds of labels


@both
@pytest.mark.parametrize("dtype", TYPES)
def test_every_integer_type_and_layout(host: None, dtype: str) -> None:
    """As a list, an array and a tensor; strided, backwards, broadcast, not aligned, and in the other byte order."""
    native = np.array(LABELS, dtype)
    gaps = np.zeros(3 * len(LABELS), dtype)
    gaps[::3] = native
    unaligned = np.zeros(len(LABELS), np.dtype([("flag", "u1"), ("label", dtype)]))
    unaligned["label"] = native
    read_only = native.copy()
    read_only.flags.writeable = False
    swapped = native.astype(native.dtype.newbyteorder())
    tensor = torch.from_numpy(native)
    for labels in (native, gaps[::3], unaligned["label"], read_only, swapped, tensor, torch.from_numpy(gaps)[::3]):
        index = ClassIndex(labels)
        check(index, LABELS, 6)
        assert index.members.dtype is torch.int32
    check(ClassIndex(native[::-1]), LABELS[::-1], 6)
    check(ClassIndex(swapped[::-2]), LABELS[::-2], 6)
    check(ClassIndex(np.broadcast_to(np.array(3, dtype), 5)), [3] * 5, 4)


@both
def test_lists_and_sizes_at_the_edges(host: None) -> None:
    check(ClassIndex(LABELS), LABELS, 6)
    check(ClassIndex(tuple(LABELS), 9), LABELS, 9)  # classes at the end that have no sample
    check(ClassIndex([0]), [0], 1)
    check(ClassIndex([0] * 7, 1), [0] * 7, 1)
    check(ClassIndex([4]), [4], 5)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=200), st.integers(0, 3), st.data())
def test_any_labels(labels: list[int], more: int, data: st.DataObject) -> None:
    classes = max(labels) + 1 + more
    indices = data.draw(st.none() | st.lists(st.integers(0, len(labels) - 1), min_size=1, max_size=100))
    for host in {COMPILED, None}:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(class_index, "_host", host)
            check(ClassIndex(labels, classes, indices=indices), labels, classes, indices)


@pytest.mark.parametrize("dtype", ["<i8", ">i8", "<u2", ">u2"])
@compiled_only
def test_memory_mapped_labels_stay_on_disk(dtype: str, tmp_path: Path) -> None:
    """Whatever the order of bytes, no copy is made of them: nothing is allocated but the index."""
    labels = (np.arange(2**20) % 1000).astype(dtype)
    labels.tofile(tmp_path / "labels")
    mapped = np.memmap(tmp_path / "labels", dtype, "r")
    for form in (mapped, mapped[::-1]):
        tracemalloc.start()
        index = ClassIndex(form)
        allocated = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert index.num_classes == 1000
        assert 4 * 2**20 <= allocated < 1.1 * 4 * 2**20
    assert same(ClassIndex(mapped), ClassIndex(labels.astype(np.int64)))


@compiled_only
@pytest.mark.parametrize("classes", [1, 3, 1000, 70_000])
def test_threads_and_implementations_agree(
    classes: int, threads: Callable[[int], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough labels for eight threads (16384 each), but with 70,000 classes for one alone; not in whole blocks."""
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 200_003)
    indices = rng.integers(0, len(labels), 150_001)
    for chosen in (None, indices):
        results = []
        for count in (1, 2, 8):
            with threads(count):
                results.append(ClassIndex(labels, classes, indices=chosen))
        with monkeypatch.context() as patch:
            patch.setattr(class_index, "_host", None)
            results.append(ClassIndex(labels, classes, indices=chosen))
        assert all(same(results[0], other) for other in results[1:])
        order = np.argsort(labels if chosen is None else labels[chosen], kind="stable")
        assert np.array_equal(results[0].members.numpy(), order if chosen is None else indices[order])


# ---------------------------------------------------------------------------------------------- subsets


@both
@pytest.mark.parametrize("dtype", TYPES)
def test_members_are_the_given_positions_in_their_order(host: None, dtype: str) -> None:
    labels = np.array(LABELS, np.int16)
    indices = np.array([9, 0, 4, 3, 0, 2, 9], dtype)  # not sorted, and two of them twice
    for given_as in (indices, indices.tolist(), torch.from_numpy(indices), indices.repeat(2)[::2]):
        check(ClassIndex(labels, 6, indices=given_as), labels, 6, indices)
    check(ClassIndex(LABELS, indices=indices[1:5]), LABELS, 3, indices[1:5])  # the largest label of a member


@both
def test_labels_of_other_positions_are_not_looked_at(host: None) -> None:
    check(ClassIndex([0, -1, 2**40, 1], indices=[3, 0]), [0, -1, -1, 1], 2, [3, 0])


@both
def test_many_members_of_few_samples(host: None) -> None:
    index = ClassIndex([1, 0], indices=[1] * 5000 + [0] * 5000)
    assert index.class_counts.tolist() == [5000, 5000]
    assert index.members.tolist() == [1] * 5000 + [0] * 5000


@both
def test_positions_beyond_2_to_the_31(host: None, tmp_path: Path) -> None:
    """A sparse file of 2 GiB and ten members: as an int32 the positions would be negative."""
    size = 2**31 + 10
    labels = np.memmap(tmp_path / "labels", np.uint8, "w+", shape=(size,))
    labels[-3:] = [1, 2, 1]
    index = ClassIndex(labels, indices=[size - 1, 5, size - 2, size - 3])
    assert index.members.dtype is torch.int64
    assert index.members.tolist() == [5, size - 1, size - 3, size - 2]
    index.save(tmp_path / "index")
    assert same(ClassIndex.load(tmp_path / "index"), index)


@both
def test_int64_members(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For data sets, and for numbers of members, that int32 cannot count: here from 4 on."""
    monkeypatch.setattr(class_index, "_INT32_SAMPLES", 3)
    for labels, indices, dtype in (
        ([1, 0, 1], None, torch.int32),
        ([1, 0, 1, 1], None, torch.int64),
        ([1, 0, 1, 1], [3, 1], torch.int64),
        ([1, 0], [1, 1, 0, 1], torch.int64),
        ([1, 0], [1, 1, 0], torch.int32),
    ):
        index = ClassIndex(labels, indices=indices)
        check(index, labels, 2, indices)
        assert index.members.dtype is dtype
    assert ClassIndex.singletons(2, [5, 2]).members.dtype is torch.int64
    assert ClassIndex.singletons(2, [1, 2]).members.dtype is torch.int32


@pytest.mark.slow
@compiled_only
def test_more_than_2_to_the_31_samples(tmp_path: Path) -> None:
    """Needs 18 GiB of memory."""
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 19 * 2**30:
        pytest.skip("less than 19 GiB of memory are free")
    size = 2**31 + 3
    labels = np.memmap(tmp_path / "labels", np.uint8, "w+", shape=(size,))
    labels[[5, size - 1]] = 2
    index = ClassIndex(labels)
    assert index.offsets.tolist() == [0, size - 2, size - 2, size]
    assert index.members[-2:].tolist() == [5, size - 1]
    assert index.members[[0, 4, 5, size - 3]].tolist() == [0, 4, 6, size - 2]


# ---------------------------------------------------------------------------------------------- wrong calls


WRONG_LABELS = [  # labels, num_classes, exception, message
    ([0, 1, 3, 5], 3, ValueError, "labels: expected all labels in [0, 3), found 3 at position 2"),
    ([0, -1, -2], 3, ValueError, "labels: expected all labels in [0, 3), found -1 at position 1"),
    ([0, -100], None, ValueError, "labels: expected all labels >= 0, found -100 at position 1"),
    (np.array([0, -1], np.int8), None, ValueError, "expected all labels >= 0, found -1 at position 1"),
    ([2**24 - 1, 2**24], None, ValueError, "below 16777216 (for more classes give num_classes), found 16777216 at pos"),
    ([0, 2**32], 5, ValueError, "found 4294967296 at position 1"),  # 0 in its low 32 bits
    (np.array([1, 2**63], np.uint64), 5, ValueError, "found 9223372036854775808 at position 1"),
    (np.array([1, 2**64 - 1], np.uint64), None, ValueError, "below 16777216 (for more classes give num_classes)"),
    ([], None, ValueError, "labels: expected at least one, found 0"),
    ([], 3, ValueError, "labels: expected at least one, found 0"),
    (torch.zeros(0, dtype=torch.int64), 3, ValueError, "labels: expected at least one, found 0"),
    ([[0, 1]], 3, ValueError, "labels: expected one dimension, found shape (1, 2)"),
    (3, None, ValueError, "labels: expected one dimension, found shape ()"),
    ([[0], [1, 2]], None, ValueError, "labels: expected integers, one per entry, found a ragged sequence"),
    ([0.0, 1.0], None, TypeError, "labels: expected integers, found list of float64"),
    ([True, False], None, TypeError, "labels: expected integers, found list of bool"),
    (["cat"], None, TypeError, "labels: expected integers, found list of"),
    (torch.zeros(3), None, TypeError, "labels: expected integers, found torch.float32"),
    (torch.zeros(3, dtype=torch.bool), None, TypeError, "labels: expected integers, found torch.bool"),
    (None, None, TypeError, "labels: expected integers, found NoneType"),
    ([0], 0, ValueError, "num_classes: expected 1 to 2147483647, found 0"),
    ([0], 2**31, ValueError, "num_classes: expected 1 to 2147483647, found 2147483648"),
    ([0], 2.0, TypeError, "num_classes: expected an integer, found 2.0"),
    ([0], True, TypeError, "num_classes: expected an integer, found True"),
]


@both
@pytest.mark.parametrize(("labels", "num_classes", "error", "message"), WRONG_LABELS)
def test_wrong_labels(host: None, labels: Any, num_classes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        ClassIndex(labels, num_classes)
    assert message in str(raised.value)


@both
@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 10], IndexError, "indices: expected positions in [0, 10), found 10 at position 1"),
        ([3, 4, -1, 11], IndexError, "indices: expected positions in [0, 10), found -1 at position 2"),
        (np.array([2**64 - 1], np.uint64), IndexError, "found 18446744073709551615 at position 0"),
        ([], ValueError, "indices: expected at least one, found 0"),
        ([[0]], ValueError, "indices: expected one dimension, found shape (1, 1)"),
        ([0.0], TypeError, "indices: expected integers, found list of float64"),
        (np.ones(10, bool), TypeError, "indices: expected integers, found ndarray of bool"),  # a mask
    ],
)
def test_wrong_indices(host: None, indices: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        ClassIndex(LABELS, indices=indices)
    assert message in str(raised.value)


@both
def test_a_wrong_label_is_named_by_its_position_in_the_data_set(host: None) -> None:
    with pytest.raises(ValueError, match=r"found 5 at position 7"):
        ClassIndex(LABELS, 3, indices=[9, 0, 7, 2])


@compiled_only
@pytest.mark.parametrize("wrong", [0, 1023, 1024, 99_999, 199_999])
@pytest.mark.parametrize("num_classes", [7, None])
def test_the_first_wrong_label_of_all_threads(
    wrong: int, num_classes: int | None, threads: Callable[[int], AbstractContextManager[None]]
) -> None:
    """In the first and last place of blocks and of threads' shares; a second wrong one at the end must not win."""
    labels = np.arange(200_000) % 7
    labels[[wrong, -1]] = -5, -6
    value = int(labels[wrong])
    with threads(2), pytest.raises(ValueError, match=rf"found {value} at position {wrong}$"):
        ClassIndex(labels, num_classes)


@compiled_only
def test_the_module_refuses_arrays_that_it_could_not_fill() -> None:
    labels, offsets, members = np.array(LABELS), np.empty(7, np.int64), np.empty(10, np.int32)
    for wrong in (
        (labels.astype(float), None, offsets, members, 1),
        (labels, None, offsets.astype(np.int32), members, 1),
        (labels, None, offsets[:1], members, 1),
        (labels, None, offsets, members[:9], 1),
        (labels, None, offsets, np.empty(20, np.int32)[::2], 1),
        (labels[:0], labels, offsets, members, 1),
    ):
        with pytest.raises(ValueError, match="expected"):
            COMPILED.sort_by_class(*wrong)
    members.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        COMPILED.sort_by_class(labels, None, offsets, members, 1)


# ---------------------------------------------------------------------------------------------- other ways to make one


def test_singletons() -> None:
    index = ClassIndex.singletons(4)
    assert (index.num_classes, index.num_samples, index.offsets.numel(), index.members.numel()) == (4, 4, 0, 0)
    assert index.class_counts.tolist() == [1, 1, 1, 1]
    assert ClassIndex.singletons(3, [7, 2, 2]).members.tolist() == [7, 2, 2]
    given = np.array([1, 2])
    index = ClassIndex.singletons(2, given)
    given[0] = 5
    assert index.members.tolist() == [1, 2]  # a copy: what the caller does to the array later is not seen
    for wrong, error, message in (
        ((0,), ValueError, "num_samples: expected 1 to 2147483647, found 0"),
        ((2.0,), TypeError, "num_samples: expected an integer, found 2.0"),
        ((2, [1]), ValueError, r"members: expected shape \(2,\), found \(1,\)"),
        ((2, [1, -1]), ValueError, "members: expected positions >= 0, found -1 at position 1"),
        ((2, [1.0, 2.0]), TypeError, "members: expected integers"),
    ):
        with pytest.raises(error, match=message):
            ClassIndex.singletons(*wrong)


def test_pooled_shares_the_members() -> None:
    index = ClassIndex(LABELS)
    pooled = index.pooled()
    assert pooled.offsets.tolist() == [0, 10] and pooled.num_classes == 1
    assert pooled.members.data_ptr() == index.members.data_ptr()
    assert pooled.class_counts.tolist() == [10]
    assert ClassIndex.singletons(5).pooled().offsets.tolist() == [0, 5]


def test_to_a_device() -> None:
    index = ClassIndex(LABELS)
    assert index.to("cpu") is index and index.device == torch.device("cpu")
    counts, fingerprint = index.class_counts, index.fingerprint
    moved = index.to("meta")  # has no values: counts and fingerprint must come along
    assert moved.device.type == moved.members.device.type == "meta"
    assert moved.class_counts is counts and moved.fingerprint == fingerprint
    assert (moved.num_classes, moved.num_samples) == (6, 10)


def test_copies_and_pickles() -> None:
    index = ClassIndex(LABELS)
    assert same(copy.deepcopy(index), index)
    assert same(pickle.loads(pickle.dumps(index)), index)
    assert repr(index) == f"ClassIndex(10 samples, 6 classes, {index.fingerprint})"


# ---------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_tells_data_apart() -> None:
    indices = [
        ClassIndex(LABELS),
        ClassIndex(LABELS, 7),  # one more class without samples
        ClassIndex(LABELS[::-1]),
        ClassIndex([*LABELS[1::-1], *LABELS[2:]]),  # two labels changed places: the counts are the same
        ClassIndex(LABELS[:-1]),
        ClassIndex(LABELS, indices=range(1, 10)),
        ClassIndex(LABELS).pooled(),
        ClassIndex.singletons(10),
        ClassIndex.singletons(11),
        ClassIndex.singletons(10, range(1, 11)),
    ]
    assert len({index.fingerprint for index in indices}) == len(indices)


def test_fingerprint_is_of_content_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the labels' type nor of the members'; and the same tomorrow, on any machine."""
    index = ClassIndex(np.array(LABELS, ">u2"))
    assert ClassIndex(LABELS).fingerprint == index.fingerprint == "8415ff066cf48f4145f9859685030196"
    monkeypatch.setattr(class_index, "_INT32_SAMPLES", 3)
    assert ClassIndex(LABELS).members.dtype is torch.int64
    assert ClassIndex(LABELS).fingerprint == index.fingerprint
    assert ClassIndex.singletons(5000).fingerprint == ClassIndex.singletons(5000, range(5000)).fingerprint


def test_fingerprint_of_many_samples() -> None:
    """More than 4096 members: some are looked at, from everywhere."""
    labels = np.arange(10_000) % 10
    index = ClassIndex(labels)
    labels[[5000, 9001]] = labels[[9001, 5000]]
    assert ClassIndex(labels).fingerprint != index.fingerprint


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "index",
    [
        ClassIndex(LABELS, 9),
        ClassIndex(LABELS, indices=[9, 3, 3]),
        ClassIndex(LABELS).pooled(),
        ClassIndex.singletons(5),
        ClassIndex.singletons(2, [7, 3]),
        ClassIndex([0]),
    ],
    ids=["empty classes", "subset", "pooled", "singletons", "some singletons", "one"],
)
def test_saved_and_loaded(index: ClassIndex, tmp_path: Path) -> None:
    for path in (tmp_path / "index.npz", str(tmp_path / "no suffix")):
        index.save(path)
        assert same(ClassIndex.load(path), index)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index.npz", "no suffix"]


def test_an_interrupted_save_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index"
    before = ClassIndex(LABELS)
    before.save(path)

    def interrupted(file: Any, **fields: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ClassIndex([0, 1]).save(path)
    assert same(ClassIndex.load(path), before)
    assert [file.name for file in tmp_path.iterdir()] == ["index"]


def damaged(path: Path, **changes: Any) -> None:
    """The saved index of LABELS with other fields; None leaves one out."""
    ClassIndex(LABELS).save(path)
    with np.load(path) as file:
        fields = {**file, **changes}
    with open(path, "wb") as out:
        np.savez(out, **{name: value for name, value in fields.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": np.int64(2)}, "expected version 1 of ClassIndex.save, found 2"),
        ({"format": None}, "expected a complete file of ClassIndex.save, found 'format is not a file"),
        ({"format": np.float64(1)}, "expected a complete file of ClassIndex.save, found another kind of file"),
        ({"members": None}, "expected all fields of a ClassIndex, found none called members"),
        ({"num_samples": np.int64(0)}, "expected num_samples: an int64 > 0, found"),
        ({"num_samples": np.int64(11)}, "expected 0 or 11 members, found 10"),
        ({"num_samples": np.array([10])}, "expected num_samples: an int64 > 0, found"),
        ({"offsets": np.zeros(7)}, r"expected offsets: int64 (C + 1,), found float64 (7,)"),
        ({"offsets": np.array([[0, 10]])}, "expected offsets: int64 (C + 1,), found int64 (1, 2)"),
        ({"offsets": np.array([0])}, "expected no offsets or at least two, found one"),
        ({"offsets": np.array([1, 10])}, "expected offsets from 0 to 10, found 1 to 10"),
        ({"offsets": np.array([0, 9])}, "expected offsets from 0 to 10, found 0 to 9"),
        ({"offsets": np.array([0, 7, 6, 10])}, "expected ascending offsets, found 6 after 7"),
        ({"offsets": np.array([0, 2**63 - 1, -2, 10])}, "expected ascending offsets, found -2 after"),
        ({"offsets": np.array([0, 5, 10])}, "expected content of fingerprint"),
        ({"members": np.zeros(10, np.int16)}, "expected members: int32 or int64 (M,), found int16 (10,)"),
        ({"members": np.zeros((10, 1), np.int32)}, "expected members: int32 or int64 (M,), found int32 (10, 1)"),
        ({"members": np.zeros(9, np.int32)}, "expected 0 or 10 members, found 9"),
        ({"members": np.array([0, 1, -1] + [2] * 7)}, "expected members in [0, 10), found -1 at position 2"),
        ({"members": np.array([0, 1, 10] + [2] * 7)}, "expected members in [0, 10), found 10 at position 2"),
        ({"data_size": np.int64(3)}, "expected members in [0, 3), found"),
        ({"data_size": np.float64(10)}, "expected data_size: an int64, found"),
        ({"is_multilabel": np.int64(1)}, "expected is_multilabel: a bool, found"),
        ({"members": np.arange(10)}, "expected content of fingerprint"),
        ({"fingerprint": np.array("0" * 32)}, f"expected content of fingerprint {'0' * 32}, found"),
        ({"fingerprint": np.array([{}], dtype=object)}, "expected a complete file of ClassIndex.save"),  # a pickle
    ],
)
def test_damaged_content(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "index"
    damaged(path, **changes)
    with pytest.raises(ValueError) as raised:
        ClassIndex.load(path)
    assert message in str(raised.value) and str(raised.value).startswith(f"{path}: ")


def test_damaged_files(tmp_path: Path) -> None:
    """Cut anywhere, or with a bit turned anywhere: never an index, and no other error."""
    path = tmp_path / "index"
    ClassIndex(LABELS).save(path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="expected a complete file of ClassIndex.save"):
            ClassIndex.load(path)
    members = ClassIndex(LABELS).members.numpy().tobytes()
    data = range(whole.index(members), whole.index(members) + len(members))
    for byte in range(len(whole)):
        changed = bytearray(whole)
        changed[byte] ^= 1 << byte % 8
        path.write_bytes(changed)
        try:
            index = ClassIndex.load(path)
        except (ValueError, OSError) as error:
            assert str(path) in str(error) or isinstance(error, OSError)
        else:
            assert byte not in data and same(index, ClassIndex(LABELS))  # a date, or another byte that nobody reads
    for other in (b"not an index", b"\x80\x04N.", b"PK\x03\x04"):  # text, a pickle, the start of an archive
        path.write_bytes(other)
        with pytest.raises(ValueError, match="expected a complete file of ClassIndex.save"):
            ClassIndex.load(path)
    np.save(tmp_path / "array.npy", np.arange(3))
    with pytest.raises(ValueError, match="found an array"):
        ClassIndex.load(tmp_path / "array.npy")
    with pytest.raises(FileNotFoundError):
        ClassIndex.load(tmp_path / "nothing")

"""Which samples belong to which class: what samplers draw from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels import rebalance

try:
    from ltkernels import _host as _compiled  # type: ignore[attr-defined, unused-ignore]
except ImportError:  # an install without a C++ compiler
    _compiled = None

__all__ = ["ClassIndex"]

Integers = Sequence[int] | npt.NDArray[Any] | Tensor
MultiLabels = Sequence[Sequence[int]] | npt.NDArray[Any] | Tensor
_Array = npt.NDArray[Any]

_host: ModuleType | None = _compiled  # None: NumPy does the same, slower
_FORMAT = 1  # of a file
_FIELDS = ("num_samples", "data_size", "is_multilabel", "offsets", "members", "fingerprint")
_INT32_SAMPLES = 2**31  # data sets of at most as many samples have int32 members
_MOST_CLASSES = 2**31 - 1  # what the arithmetic of a draw allows
_MOST_UNASKED_CLASSES = 2**24  # as in rebalance.count_classes
_CHUNK = 2**20  # labels that NumPy looks at in one go
_FINGERPRINT_MEMBERS = 4096


class ClassIndex:
    """The samples of a data set in the order of their classes (compressed sparse rows).

    Built by a counting sort, on ``torch.get_num_threads()`` threads, that reads the labels in pieces: a memory-mapped
    file is never in memory as a whole. An index is not changed once it is made.

    Args:
        labels: class of every sample of the data set, shape ``(N,)``, any integer type (8 to 64 bits, signed or not):
            a list, a NumPy array (memory-mapped too) or a tensor on any device.
        num_classes: number of classes C; default: the largest label of a member + 1, which may be 2^24 at most.
        indices: positions of the samples that are members, shape ``(M,)``, any integer type, in any order, repeated or
            not; default: all. Labels at other positions are not looked at.

    Attributes:
        offsets: int64 tensor ``(C + 1,)``: class c has the members ``[offsets[c], offsets[c + 1])``. Empty: every
            member is a class of its own (:meth:`singletons`).
        members: int32 tensor ``(M,)``, int64 if the data set or M is larger than 2^31: positions in the data set, in
            each class in the order of the data set, or of ``indices``. Empty: member m is sample m.
        num_classes: number of classes C. A class may have no member.
        num_samples: number of members M.
        data_size: number of samples of the data set; None where it was not told (:meth:`singletons`).
        is_multilabel: whether a sample may be a member of several classes (:meth:`multilabel`).

    Raises:
        TypeError: labels or indices that are not integers (floats, booleans, strings).
        ValueError: a label below 0 or at least ``num_classes``; no member; not one dimension; a label from 2^24 on
            without ``num_classes``.
        IndexError: an index that is not a position of the data set.

    Example:
        >>> from ltkernels.samplers import ClassIndex
        >>> index = ClassIndex([1, 0, 1, 1])
        >>> index.offsets, index.members
        (tensor([0, 1, 4]), tensor([1, 0, 2, 3], dtype=torch.int32))
    """

    offsets: Tensor
    members: Tensor
    num_classes: int
    num_samples: int
    data_size: int | None
    is_multilabel: bool
    _class_counts: Tensor | None
    _has_empty: bool | None
    _fingerprint: str | None

    def __init__(self, labels: Integers, num_classes: int | None = None, *, indices: Integers | None = None) -> None:
        of_all = _integers("labels", labels)
        if num_classes is not None:
            num_classes = arg.integer("num_classes", num_classes)
            if not 1 <= num_classes <= _MOST_CLASSES:
                raise ValueError(f"num_classes: expected 1 to {_MOST_CLASSES}, found {num_classes}")
        chosen = None if indices is None else _integers("indices", indices)
        for name, values in (("labels", of_all), ("indices", chosen)):
            if values is not None and len(values) == 0:
                raise ValueError(f"{name}: expected at least one, found 0")
        if chosen is not None:
            wrong, _ = _scan(chosen, None, len(of_all))
            if wrong >= 0:
                found = f"{chosen[wrong]} at position {wrong}"
                raise IndexError(f"indices: expected positions in [0, {len(of_all)}), found {found}")

        limit = num_classes
        if limit is None:
            wrong, largest = _scan(of_all, chosen, _MOST_UNASKED_CLASSES)
            _check_labels(of_all, chosen, wrong, None)
            limit = largest + 1
        offsets = np.empty(limit + 1, np.int64)
        size = len(of_all if chosen is None else chosen)
        members = np.empty(size, np.int32 if max(size, len(of_all)) <= _INT32_SAMPLES else np.int64)
        _check_labels(of_all, chosen, _sort(of_all, chosen, offsets, members), num_classes)
        self._set(torch.from_numpy(offsets), torch.from_numpy(members), limit, size, len(of_all))

    def _set(
        self,
        offsets: Tensor,
        members: Tensor,
        num_classes: int,
        num_samples: int,
        data_size: int | None = None,
        is_multilabel: bool = False,
    ) -> ClassIndex:
        self.offsets, self.members = offsets, members
        self.num_classes, self.num_samples = num_classes, num_samples
        self.data_size, self.is_multilabel = data_size, is_multilabel
        self._class_counts = self._has_empty = self._fingerprint = None
        return self

    @classmethod
    def singletons(cls, num_samples: int, members: Integers | None = None) -> ClassIndex:
        """Every sample a class of its own, for weights of samples; nothing is stored for all samples of a data set.

        Args:
            num_samples: number of members, and of classes.
            members: positions in the data set, ``(num_samples,)``; default: ``0, 1, ..., num_samples - 1``.

        Raises:
            TypeError: not integers.
            ValueError: ``num_samples`` below 1 or from 2^31 on, another number of members, or a negative one.

        Example:
            >>> from ltkernels.samplers import ClassIndex
            >>> ClassIndex.singletons(3).class_counts
            tensor([1, 1, 1])
        """
        num_samples = arg.integer("num_samples", num_samples)
        if not 1 <= num_samples <= _MOST_CLASSES:
            raise ValueError(f"num_samples: expected 1 to {_MOST_CLASSES}, found {num_samples}")
        positions = np.empty(0, np.int32)
        if members is not None:
            given = _integers("members", members)
            if len(given) != num_samples:
                raise ValueError(f"members: expected shape ({num_samples},), found ({len(given)},)")
            wrong, largest = _scan(given, None, 2**63 - 1)
            if wrong >= 0:
                raise ValueError(f"members: expected positions >= 0, found {given[wrong]} at position {wrong}")
            positions = np.array(given, np.int32 if largest < _INT32_SAMPLES else np.int64)
        empty = torch.empty(0, dtype=torch.int64)
        return cls.__new__(cls)._set(empty, torch.from_numpy(positions), num_samples, num_samples)

    @classmethod
    def multilabel(cls, labels: MultiLabels, num_classes: int | None = None) -> ClassIndex:
        """Samples with several classes, as images in detection: a sample is a member of each of its classes.

        Args:
            labels: classes of each sample: ``(N, k)`` integers, padded with negative ones, or a sequence of sequences
                of integers. A sample may have none; a class that it has twice counts once.
            num_classes: as in :class:`ClassIndex`.

        Raises:
            TypeError, ValueError: as :class:`ClassIndex`; a position is that of a (sample, class) pair, in their order.

        Example:
            >>> from ltkernels.samplers import ClassIndex
            >>> index = ClassIndex.multilabel([[0, 2], [], [2]])
            >>> index.class_counts, index.members, index.data_size
            (tensor([1, 0, 2]), tensor([0, 0, 2], dtype=torch.int32), 3)
        """
        samples, classes, size = flat_labels(labels)
        order = np.lexsort((classes, samples))
        samples, classes = samples[order], classes[order]
        first = np.ones(len(order), bool)
        first[1:] = (samples[1:] != samples[:-1]) | (classes[1:] != classes[:-1])
        samples, classes = samples[first], classes[first]
        index = cls(classes, num_classes)
        members = torch.from_numpy(samples)[index.members.long()].to(index.members.dtype)
        return index._set(index.offsets, members, index.num_classes, index.num_samples, size, True)

    def pooled(self) -> ClassIndex:
        """The same members as one class; shares their memory."""
        offsets = torch.tensor([0, self.num_samples], device=self.device)
        return ClassIndex.__new__(ClassIndex)._set(
            offsets, self.members, 1, self.num_samples, self.data_size, self.is_multilabel
        )

    def to(self, device: torch.device | str | int) -> ClassIndex:
        """This index with its tensors on a device; itself if they are there."""
        offsets, members = self.offsets.to(device), self.members.to(device)
        if offsets is self.offsets and members is self.members:
            return self
        moved = ClassIndex.__new__(ClassIndex)._set(
            offsets, members, self.num_classes, self.num_samples, self.data_size, self.is_multilabel
        )
        moved._class_counts, moved._fingerprint = self._class_counts, self._fingerprint
        return moved

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.offsets.device

    @property
    def class_counts(self) -> Tensor:
        """Members of each class: int64 CPU tensor ``(C,)``, not to be changed."""
        if self._class_counts is None:
            single = self.offsets.numel() == 0
            ones = torch.ones(1, dtype=torch.int64).expand(self.num_classes)
            self._class_counts = ones if single else self.offsets.diff().cpu()
        return self._class_counts

    @property
    def has_empty_classes(self) -> bool:
        """Whether some class has no member."""
        if self._has_empty is None:
            self._has_empty = self.offsets.numel() > 0 and not bool(self.class_counts.all())
        return self._has_empty

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that tell indices apart: a hash of sizes, offsets and up to 4096 members."""
        if self._fingerprint is None:
            count = min(self.num_samples, _FINGERPRINT_MEMBERS)
            at = torch.arange(count) * self.num_samples // count
            some = self.members[at.to(self.device)].cpu() if self.members.numel() else at
            digest = hashlib.blake2b(digest_size=16)
            size = -1 if self.data_size is None else self.data_size
            sizes = [self.num_samples, self.num_classes, size, self.is_multilabel]
            for part in (torch.tensor(sizes), self.offsets.cpu(), some):
                digest.update(np.ascontiguousarray(part.numpy(), "<i8").data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def __repr__(self) -> str:
        return f"ClassIndex({self.num_samples} samples, {self.num_classes} classes, {self.fingerprint})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the index to a file, in NumPy's npz format, for :meth:`load`.

        The file appears under its name when it is complete; until then one that was there stays as it was.
        """
        path = os.fsdecode(path)
        partial = f"{path}.{uuid4().hex}.partial"
        try:
            with open(partial, "xb") as file:
                np.savez(
                    file,
                    format=np.int64(_FORMAT),
                    num_samples=np.int64(self.num_samples),
                    data_size=np.int64(-1 if self.data_size is None else self.data_size),
                    is_multilabel=np.bool_(self.is_multilabel),
                    offsets=self.offsets.cpu().numpy(),
                    members=self.members.cpu().numpy(),
                    fingerprint=np.array(self.fingerprint),
                )
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            if os.path.exists(partial):
                os.unlink(partial)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassIndex:
        """Reads a file of :meth:`save`.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not such a file, it is of another version, cut off, or its content is inconsistent.

        Example:
            >>> import os, tempfile
            >>> from ltkernels.samplers import ClassIndex
            >>> path = os.path.join(tempfile.mkdtemp(), "train.index")
            >>> ClassIndex([1, 0, 1, 1]).save(path)
            >>> ClassIndex.load(path).class_counts
            tensor([1, 3])
        """
        path = os.fsdecode(path)
        fields = _read(path)

        def check(right: object, expected: str, found: object) -> None:
            if not right:
                raise ValueError(f"{path}: expected {expected}, found {found}")

        missing = [name for name in _FIELDS if name not in fields]
        check(not missing, "all fields of a ClassIndex", f"none called {', '.join(missing)}")
        offsets, members, size, stored = (fields[n] for n in ("offsets", "members", "num_samples", "fingerprint"))
        check(size.dtype == np.int64 and size.shape == () and size > 0, "num_samples: an int64 > 0", repr(size))
        check(offsets.dtype == np.int64 and offsets.ndim == 1, "offsets: int64 (C + 1,)", _described(offsets))
        member_types = (np.int32, np.int64)
        check(members.dtype in member_types and members.ndim == 1, "members: int32 or int64 (M,)", _described(members))
        n = int(size)
        check(len(members) in (0, n), f"0 or {n} members", len(members))
        check(len(offsets) != 1, "no offsets or at least two", "one")
        if len(offsets):
            check(offsets[0] == 0 and offsets[-1] == n, f"offsets from 0 to {n}", f"{offsets[0]} to {offsets[-1]}")
            falls = offsets[1:] < offsets[:-1]
            worst = int(falls.argmax())
            check(not falls[worst], "ascending offsets", f"{offsets[worst + 1]} after {offsets[worst]}")
        classes = max(len(offsets) - 1, 0) or n
        data_size, several = fields["data_size"], fields["is_multilabel"]
        check(data_size.dtype == np.int64 and data_size.shape == (), "data_size: an int64", repr(data_size))
        check(several.dtype == np.bool_ and several.shape == (), "is_multilabel: a bool", repr(several))
        limit = 2**63 - 1 if data_size < 0 else int(data_size)
        wrong, _ = _scan(members, None, limit)
        found = f"{members[wrong]} at position {wrong}" if wrong >= 0 else ""
        check(wrong < 0, f"members in [0, {limit})" if data_size >= 0 else "members >= 0", found)
        index = cls.__new__(cls)._set(
            torch.from_numpy(offsets),
            torch.from_numpy(members),
            classes,
            n,
            None if data_size < 0 else int(data_size),
            bool(several),
        )
        check(str(stored) == index.fingerprint, f"content of fingerprint {stored}", index.fingerprint)
        return index


def has_several(labels: Any) -> bool:
    """Whether labels are several a sample: two dimensions, or sequences in a sequence."""
    if isinstance(labels, (Tensor, np.ndarray)):
        return labels.ndim == 2
    return isinstance(labels, Sequence) and not isinstance(labels, str) and any(map(_is_sequence, labels))


def _is_sequence(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str)


def flat_labels(labels: Any) -> tuple[_Array, _Array, int]:
    """Labels of one or several classes a sample as pairs (sample, class), int64, and the number of samples."""
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().numpy()
    if not isinstance(labels, np.ndarray) and has_several(labels):
        parts = []
        for sample, part in enumerate(labels):
            if not _is_sequence(part):
                raise TypeError(f"labels: expected a sequence of classes for each sample, found {part!r} at {sample}")
            parts.append(rebalance._as_array("labels", part, kinds="iu") if len(part) else np.zeros(0, np.uint8))
        samples = np.repeat(np.arange(len(parts)), [part.size for part in parts])
        classes, size = np.concatenate([part.reshape(-1).astype(np.int64) for part in parts]), len(parts)
    else:
        array = rebalance._as_array("labels", labels, kinds="iu")
        if array.ndim not in (1, 2):
            raise ValueError(f"labels: expected shape (n,) or (n, k), found {array.shape}")
        samples = np.repeat(np.arange(len(array)), array[0].size if len(array) else 1)
        classes, size = array.reshape(-1), len(array)
        if array.ndim == 2 and array.dtype.kind == "i":  # padding
            samples, classes = samples[classes >= 0], classes[classes >= 0]
    return samples, classes.astype(np.int64), size


def _integers(name: str, values: Integers) -> _Array:
    """``values`` as an array of integers of one dimension; without a copy, if they are an array or a CPU tensor."""
    if isinstance(values, Tensor):
        values = arg.tensor(name, values)
        if values.dtype not in arg.INTEGER_TYPES:
            raise TypeError(f"{name}: expected integers, found {values.dtype}")
        values = values.detach().cpu().numpy()
    array = rebalance._as_array(name, values, kinds="iu")
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, found shape {array.shape}")
    return array


def _check_labels(labels: _Array, indices: _Array | None, wrong: int, num_classes: int | None) -> None:
    """Raises for the label of member ``wrong``, if that is one; the messages are those of count_classes."""
    if wrong < 0:
        return
    position = wrong if indices is None else int(indices[wrong])
    found = labels[position]
    if num_classes is not None:
        expected = f"all labels in [0, {num_classes})"
    elif found < 0:
        expected = "all labels >= 0"
    else:
        expected = f"all labels below {_MOST_UNASKED_CLASSES} (for more classes give num_classes)"
    raise ValueError(f"labels: expected {expected}, found {found} at position {position}")


def _scan(values: _Array, indices: _Array | None, limit: int) -> tuple[int, int]:
    """Looks at ``values``, or at ``values[indices]``, before they are used.

    Returns:
        The first position at which the value is not in ``[0, limit)``, or -1, and, if none is, the largest value.
    """
    if _host is not None:
        first, most = _host.scan(values, indices, limit, torch.get_num_threads())
        return int(first), int(most)
    largest = 0
    for start in range(0, len(values if indices is None else indices), _CHUNK):
        part = _part(values, indices, start)
        wrong = (part < 0) | (part >= limit)
        if wrong.any():
            return start + int(wrong.argmax()), 0
        largest = max(largest, int(part.max()))
    return -1, largest


def _sort(labels: _Array, indices: _Array | None, offsets: _Array, members: _Array) -> int:
    """Fills ``offsets`` and ``members``; ``indices`` are positions of the data set.

    Returns:
        The first member whose label is not a class, or -1.
    """
    if _host is not None:
        return int(_host.sort_by_class(labels, indices, offsets, members, torch.get_num_threads()))
    wrong, _ = _scan(labels, indices, len(offsets) - 1)
    if wrong >= 0:
        return wrong
    offsets.fill(0)
    for start in range(0, len(members), _CHUNK):
        part = _part(labels, indices, start).astype(np.int64)
        offsets[1:] += np.bincount(part, minlength=len(offsets) - 1)
    np.cumsum(offsets, out=offsets)
    order = np.argsort(labels if indices is None else labels[indices], kind="stable")
    members[:] = order if indices is None else indices[order]
    return -1


def _part(values: _Array, indices: _Array | None, start: int) -> _Array:
    """A chunk of ``values`` or of ``values[indices]``."""
    stop = start + _CHUNK
    return values[start:stop] if indices is None else values[indices[start:stop]]


def _read(path: str) -> dict[str, _Array]:
    """The arrays in a file of this version."""
    try:
        with open(path, "rb") as opened:  # numpy.load itself does not close an archive that it cannot read
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("an array")
            version = file["format"]
            if version.dtype != np.int64 or version.shape != ():
                raise ValueError("another kind of file")
            if version == _FORMAT:
                return {name: file[name] for name in file.files}  # checks the archive's sums
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what a damaged archive makes of zipfile and NumPy is any of a dozen types
        raise ValueError(f"{path}: expected a complete file of ClassIndex.save, found {error}") from error
    raise ValueError(f"{path}: expected version {_FORMAT} of ClassIndex.save, found {version}")


def _described(array: _Array) -> str:
    return f"{array.dtype} {array.shape}"

"""Samplers for long-tailed data whose state is three numbers: seed, epoch, position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ltkernels import arguments as arg
from ltkernels import rebalance
from ltkernels.class_index import ClassIndex, MultiLabels, has_several
from ltkernels.samplers.iterator import EpochIterator, Place, Rest
from ltkernels.samplers.strategies import EpochSamples, Strategy, as_strategy

Labels = Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | npt.NDArray[Any] | Tensor
Indices = Sequence[int] | npt.NDArray[Any] | Tensor

_VERSION = 1  # of a state
_KEYS = ("seed", "epoch", "position", "num_samples", "strategy", "fingerprint")


class LongTailSampler(Sampler[int]):
    """Draws the samples of long-tailed data for a ``DataLoader``: class-balanced, or by any other strategy.

    What it draws is a pure function of seed, epoch and position: the same on every machine and in every process that
    has the same data, seed and epoch, whatever was drawn before. Nothing is prepared for an epoch, so the first sample
    comes at once, and there is no limit on how many there are.

    **Epochs.** Each iteration is an epoch, and the next one is another: at its end the sampler goes on to the next
    epoch by itself, and so it does when an iteration was broken off. ``set_epoch`` chooses one; calling it with the
    number of the epoch that would come anyway, as trainers do, changes nothing. An iterator begins with its first
    ``next``: ``iter(sampler)`` alone does nothing.

    **Resuming.** ``state_dict()`` is a small dict for JSON, exact in the middle and at the end of an epoch. torchdata's
    ``StatefulDataLoader`` stores and loads it by itself, in a state that belongs to its number of workers. With a plain
    ``DataLoader``, whose workers draw ahead of what was used, say how many samples the loop has consumed; the run may
    then go on with another batch size, other workers and, distributed, other processes::

        sampler.load_state_dict(checkpoint["sampler"])
        for epoch in range(sampler.epoch, epochs):
            sampler.set_epoch(epoch)
            consumed = sampler.start  # 0, or where the state is
            for batch in loader:
                ...
                consumed += len(batch)
                checkpoint["sampler"] = sampler.state_dict(consumed=consumed)  # in the loop
            checkpoint["sampler"] = sampler.state_dict()  # behind it

    Processes: it never looks at ``torch.distributed``. Lightning and Accelerate distribute it correctly by themselves,
    because it is the same in all processes; otherwise there is :class:`DistributedLongTailSampler`.

    Args:
        labels: class of every sample of the data set, ``(N,)``: a list, an array (memory-mapped too) or a tensor of
            any integer type; or strings, whose classes are in sorted order (``class_names``). For "repeat_factor" also
            several classes a sample, as :meth:`ClassIndex.multilabel` takes them. Or a :class:`ClassIndex`.
        strategy: one of ``ltkernels.samplers.STRATEGIES``, which :mod:`ltkernels.samplers.strategies` describes, or a
            ``Strategy``.
        num_classes: number of classes C; default: the largest label + 1.
        num_samples: how many samples an epoch has; default: what was published for the strategy, mostly N.
        seed: an integer of 64 bits.
        indices: positions of the samples to draw from, for a part of the data set; default: all. What is drawn are
            positions of the data set, so give the ``DataLoader`` that, not a ``Subset``.
        **parameters: of the strategy: ``replacement`` (most), ``power``, ``beta``, ``epochs``, ``class_weight``,
            ``sample_weight``, ``draws_per_class``, ``m``, ``batch_size``.

    Attributes:
        class_index: the samples of each class.
        class_names: sorted names of the classes, if labels are strings; else None.
        strategy: a ``Strategy``.

    Raises:
        TypeError: an argument of the wrong type; a parameter that the strategy does not have, or one that is missing.
        ValueError: a wrong value or shape; an unknown strategy; a class without samples that it would draw.
        IndexError: an index that is not a position of the data set.

    Example:
        >>> import ltkernels as ltk
        >>> labels = ["cat"] * 6 + ["owl"] * 2
        >>> sampler = ltk.samplers.LongTailSampler(labels, "class_balanced", replacement=False, seed=1)
        >>> [labels[i] for i in sampler].count("owl")
        4
        >>> sampler.epoch, sampler.state_dict()["position"]
        (1, 0)
    """

    _rank, _replicas, _drop_last = 0, 1, False

    def __init__(
        self,
        labels: Labels | ClassIndex,
        strategy: str | Strategy = "class_balanced",
        *,
        num_classes: int | None = None,
        num_samples: int | None = None,
        seed: int = 0,
        indices: Indices | None = None,
        **parameters: Any,
    ) -> None:
        self.strategy = as_strategy(strategy, parameters)
        self.class_index, self.class_names = _class_index(labels, num_classes, indices)
        if self.class_index.is_multilabel and not self.strategy.takes_multilabel:
            raise ValueError(f"labels: expected one class a sample for {self.strategy}, found several")
        if self.class_index.data_size is not None:
            self.strategy.check_dataset(self.class_index.data_size)
        self.seed = arg.integer("seed", seed)
        self._num_samples = None if num_samples is None else arg.integer("num_samples", num_samples)
        if self._num_samples is not None and self._num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, found {num_samples}")
        self._next: Place | None = Place(0, 0)  # where the next iteration starts; None: an epoch after the last one
        self._epoch_was_set = False
        self._last: Rest | None = None  # the last iteration that began, unless its epoch was left since
        self._samples: tuple[tuple[int, int], EpochSamples] | None = None
        self._epoch_samples(0)  # says now what is wrong

    def __iter__(self) -> EpochIterator[int]:
        return EpochIterator.over(self)

    def __len__(self) -> int:
        """Samples in an epoch (of the current one, where the strategy's epochs differ)."""
        return self._rank_samples(Place(self.epoch, 0))

    @property
    def epoch(self) -> int:
        """The epoch that is being iterated; between iterations the next one. Assigning is :meth:`set_epoch`."""
        running = self._last is not None and not self._last.ended
        return self._place.epoch if running else self._next_place.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.set_epoch(epoch)

    @property
    def start(self) -> int:
        """Samples of its epoch that the next iteration leaves out (on this rank): 0, unless a state was loaded."""
        return self._next_place.position // self._replicas

    @property
    def num_samples(self) -> int:
        """Samples in an epoch, as ``len(sampler)``."""
        return len(self)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration, which starts at its beginning.

        If it is the epoch that comes next anyway, nothing changes: one that was loaded goes on where it was. An
        iteration of that epoch that is under way keeps going, and ``state_dict`` says where it is until another begins.
        """
        epoch = _checked_epoch("epoch", epoch)
        if self._next is None or self._next.epoch != epoch:
            self._next = Place(epoch, 0)
        if self._last is not None and (self._last.ended or self._place.epoch != epoch):
            self._last = None
        self._epoch_was_set = True

    def indices(self, start: int, stop: int, step: int = 1) -> Tensor:
        """The samples at positions ``range(start, stop, step)`` of the current epoch, int64 ``(n,)``.

        They are those of ``list(sampler)``: with several ranks, this rank's. Nothing is consumed.

        Example:
            >>> import ltkernels as ltk
            >>> sampler = ltk.samplers.LongTailSampler([0, 0, 0, 1], seed=3)
            >>> sampler.indices(0, 4).tolist() == list(sampler)
            True
        """
        start, stop, step = arg.integer("start", start), arg.integer("stop", stop), arg.integer("step", step)
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"start, stop: expected 0 <= start <= stop <= {len(self)}, found {start} and {stop}")
        if step < 1:
            raise ValueError(f"step: expected at least 1, found {step}")
        return self._rank_indices(Place(self.epoch, 0), range(start, stop, step))

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Where the stream goes on: a small dict of integers and strings.

        Args:
            consumed: how many samples of the epoch have been used (on this rank), if that is fewer than were drawn: a
                ``DataLoader`` with workers draws ahead. The epoch is that of the last iteration, also when that has
                ended, and the next one after ``set_epoch``. One that was resumed counts from :attr:`start`. Default:
                all that were drawn.

        Raises:
            TypeError, ValueError: ``consumed`` is no number of samples in the epoch.
        """
        if consumed is None:
            return self._state_at(self._place)
        rest, before = self._counted()
        consumed = arg.integer("consumed", consumed)
        if not 0 <= consumed <= before + rest.count:
            raise ValueError(f"consumed: expected 0 to {before + rest.count} samples of an epoch, found {consumed}")
        return self._state_at(rest.place_after(consumed - before))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a state was taken: the next iteration starts there, with the seed of the state.

        A state at the end of an epoch goes on with the next epoch, unless ``set_epoch`` asks for the one that has
        ended, of which nothing is left. A state that is refused leaves the sampler as it was.

        Raises:
            TypeError: not a dict.
            ValueError: a state of another version, strategy, data set or number of samples, or an incomplete one.
        """
        self._next = self._load(state_dict)
        self._epoch_was_set, self._last = False, None

    def __repr__(self) -> str:
        index = self.class_index
        return (
            f"{type(self).__name__}({self.strategy}, {index.num_samples} samples of {index.num_classes} classes,"
            f" seed={self.seed}, epoch={self.epoch})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy goes on where this sampler is, without what it has drawn ahead."""
        place = self._place
        return self.__dict__ | {"_next": place, "_last": None, "_samples": None, "_epoch_was_set": False}

    # Where the stream is.

    @property
    def _place(self) -> Place:
        """Where the next sample of the running iteration is, or of the next one."""
        if self._last is not None and not self._last.ended:
            return self._last.place
        return self._next or self._next_place

    @property
    def _next_place(self) -> Place:
        """Where the next iteration starts."""
        if self._next is None:
            assert self._last is not None and self._last.start is not None
            return Place(self._last.start.epoch + 1, 0)
        if (
            not self._epoch_was_set
            and self._next.position
            and self._next.position == self._epoch_length(self._next.epoch)
        ):
            return Place(self._next.epoch + 1, 0)
        return self._next

    def _counted(self) -> tuple[Rest, int]:
        """The iteration whose epoch ``consumed`` is about, and how many samples of that epoch came before it."""
        rest = self._last
        if rest is None:  # nothing began since the epoch was set or loaded
            rest = Rest(self, None, False)
            rest.start = self._next_place
            rest.count = self._rank_samples(rest.start)
        assert rest.start is not None
        return rest, rest.start.position // self._replicas

    @property
    def _consumable(self) -> int:
        """The largest ``consumed``: the samples of the epoch that was iterated, also when the next one has more."""
        rest, before = self._counted()
        return before + rest.count

    def _begin(self, rest: Rest) -> Place:
        """An iteration begins. Returns where."""
        start = rest.start or self._next_place
        self._next, self._epoch_was_set, self._last = None, False, rest
        return start

    def _end(self, rest: Rest) -> None:
        """An iteration has come to the end of its epoch."""
        if self._last is rest and rest.start is not None:
            self._next, self._epoch_was_set = Place(rest.start.epoch + 1, 0), False

    # What is in it.

    def _epoch_samples(self, epoch: int, seed: int | None = None) -> EpochSamples:
        seed = self.seed if seed is None else seed
        key = (seed, epoch) if self.strategy.by_epoch else (0, 0)
        samples = self._samples  # other threads may replace it
        if samples is None or samples[0] != key:
            samples = self._samples = key, self.strategy.samples(self.class_index, seed, epoch)
        return samples[1]

    def _epoch_length(self, epoch: int, seed: int | None = None) -> int:
        """Samples in an epoch, on all ranks."""
        return self._num_samples or self._epoch_samples(epoch, seed).num_samples

    @property
    def _length_varies(self) -> bool:
        return self._num_samples is None and self.strategy.length_varies

    def _rank_samples(self, start: Place) -> int:
        """Samples in the rest of an epoch for one rank; they are the same number for all."""
        left = self._epoch_length(start.epoch) - start.position
        return left // self._replicas if self._drop_last else -(-left // self._replicas)

    def _rank_indices(self, start: Place, of_rank: range) -> Tensor:
        """This rank's samples in the rest of an epoch: the i-th, for each i in ``of_rank``."""
        first = start.position + self._rank
        at = range(
            first + of_rank.start * self._replicas, first + of_rank.stop * self._replicas, of_rank.step * self._replicas
        )
        length, epoch_samples = self._epoch_length(start.epoch), self._epoch_samples(start.epoch)
        inside = range(min(at.start, length), min(at.stop, length), at.step)
        found = epoch_samples.indices(inside.start, inside.stop, inside.step, seed=self.seed, epoch=start.epoch)
        if len(inside) == len(at):
            return found
        # The last sample of a rank can be beyond the end: an epoch is padded from its beginning, as torch does it.
        padded = at[-1] % length
        last = epoch_samples.indices(padded, padded + 1, 1, seed=self.seed, epoch=start.epoch)
        return torch.cat([found, last])

    # States.

    def _state_at(self, place: Place, seed: int | None = None) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "seed": self.seed if seed is None else seed,
            "epoch": place.epoch,
            "position": place.position,
            "num_samples": self._epoch_length(place.epoch, seed),
            "strategy": repr(self.strategy),
            "fingerprint": self.class_index.fingerprint,
        }

    def _load(self, state_dict: dict[str, Any]) -> Place:
        """Checks all of a state, then takes over its seed. Returns where it goes on."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a dict, found {type(state_dict).__name__}")
        if state_dict.get("version") != _VERSION:
            raise ValueError(f"state_dict: expected version {_VERSION}, found {state_dict.get('version')!r}")
        missing = [key for key in _KEYS if key not in state_dict]
        if missing:
            raise ValueError(f"state_dict: expected all of a sampler's state, found no {', '.join(missing)}")
        seed, position = (arg.integer(f"state_dict[{key!r}]", state_dict[key]) for key in ("seed", "position"))
        epoch = _checked_epoch("state_dict['epoch']", state_dict["epoch"])
        expected = self._state_at(Place(epoch, position), seed)
        for key, what in (("strategy", "strategy"), ("fingerprint", "data"), ("num_samples", "num_samples")):
            if state_dict[key] != expected[key]:
                raise ValueError(
                    f"state_dict: expected the {what} of this sampler, {expected[key]}, found {state_dict[key]}"
                )
        if not 0 <= position <= expected["num_samples"]:
            raise ValueError(f"state_dict: expected a position from 0 to {expected['num_samples']}, found {position}")
        self.seed = seed
        return Place(epoch, position)


def _class_index(
    labels: Labels | ClassIndex, num_classes: int | None, indices: Indices | None
) -> tuple[ClassIndex, list[str] | None]:
    """The index of labels, and the names of its classes, if labels are strings."""
    if isinstance(labels, ClassIndex):
        for name, value in (("num_classes", num_classes), ("indices", indices)):
            if value is not None:
                raise ValueError(f"{name}: expected None with a ClassIndex, which has its own, found {value!r}")
        return labels.to("cpu"), None
    if has_several(labels):
        if indices is not None:
            raise ValueError("indices: expected None with several classes a sample, found indices")
        return ClassIndex.multilabel(cast(MultiLabels, labels), num_classes), None
    if isinstance(labels, Tensor):
        return ClassIndex(labels, num_classes, indices=indices), None
    array = rebalance._as_array("labels", labels, kinds="iuUTO")
    if array.dtype.kind in "iu":
        return ClassIndex(array, num_classes, indices=indices), None
    # NumPy makes strings of all labels if one is, NaN for instance.
    given = labels if array.dtype.kind == "U" and isinstance(labels, Sequence) else array.flat
    if not all(isinstance(label, str) for label in given):
        found = array.dtype if array.dtype.kind == "O" else "strings and other types"
        raise TypeError(f"labels: expected integers or strings, found {type(labels).__name__} of {found}")
    names, classes = np.unique(array, return_inverse=True)
    num_classes = len(names) if num_classes is None else num_classes
    return ClassIndex(classes, num_classes, indices=indices), [str(name) for name in names]


def _checked_epoch(name: str, epoch: int) -> int:
    epoch = arg.integer(name, epoch)
    if not 0 <= epoch < 2**32:
        raise ValueError(f"{name}: expected an epoch from 0 to 2^32 - 1, found {epoch}")
    return epoch

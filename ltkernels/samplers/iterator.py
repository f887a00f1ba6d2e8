"""The iterator over the rest of an epoch: lazy, as fast as one over a list, and it knows where it is."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

if TYPE_CHECKING:
    from ltkernels.samplers.sampler import LongTailSampler

T = TypeVar("T")

_FIRST_PIECE, _GROWTH, _LARGEST_PIECE = 256, 4, 16384  # samples: the first comes soon, and later ones cost least


class Place(NamedTuple):
    """Where a stream goes on."""

    epoch: int
    position: int
    """Samples of the epoch before it, on all ranks."""


class Rest:
    """The rest of an epoch in pieces, each an iterator over a list that is made when it is asked for.

    How far it is follows from what the current piece has left. So nothing has to be counted from one sample to the
    next, and nothing can be counted wrong.
    """

    def __init__(self, sampler: LongTailSampler, batch_size: int | None, drop_last: bool) -> None:
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last
        self.start: Place | None = None  # where the sampler will be, if nothing else was loaded
        self.begun = self.ended = False
        self.count = self._made = 0  # samples of this rank in the rest of the epoch; and in the pieces up to now
        self._piece: Iterator[Any] = iter(())
        self._size = _FIRST_PIECE

    def __iter__(self) -> Iterator[Iterator[Any]]:
        return self

    def __next__(self) -> Iterator[Any]:
        if not self.begun:
            self.start = start = self.sampler._begin(self)
            self.count = self.sampler._rank_samples(start)
            if self.batch_size is not None and self.drop_last:
                self.count -= self.count % self.batch_size
            self.begun = True
        if self._made == self.count:
            self.ended = True
            self.sampler._end(self)
            raise StopIteration
        assert self.start is not None
        step = self.batch_size or 1
        first, last = self._made, min(self._made + -(-self._size // step) * step, self.count)
        samples = self.sampler._rank_indices(self.start, range(first, last)).tolist()
        if self.batch_size is not None:
            samples = [samples[at : at + step] for at in range(0, len(samples), step)]
        self._size = min(self._size * _GROWTH, _LARGEST_PIECE)
        self._piece, self._made = iter(samples), last
        return self._piece

    @property
    def place(self) -> Place:
        """Where the next sample is."""
        if not self.begun:
            return self.start or self.sampler._next_place
        # All batches that are left in the piece are full, but for the last one of the epoch.
        left = operator.length_hint(self._piece)
        partial = -self.count % (self.batch_size or 1) if left and self._made == self.count else 0
        return self.place_after(self._made - (left * (self.batch_size or 1) - partial))

    def place_after(self, taken: int) -> Place:
        """Where the next sample is when this rank has taken so many here. After the last the epoch is at its end."""
        assert self.start is not None
        if taken == self.count:
            return Place(self.start.epoch, self.sampler._epoch_length(self.start.epoch))
        return Place(self.start.epoch, self.start.position + taken * self.sampler._replicas)


class EpochIterator(chain[T]):
    """Iterator of a sampler (integers) or a batch sampler (lists of integers), with a state of its own.

    The state says which epoch the iterator is in, also when that has ended; the sampler's says what the next iterator
    starts with. ``torchdata.stateful_dataloader`` stores both.
    """

    _rest: Rest

    @classmethod
    def over(cls, sampler: LongTailSampler, batch_size: int | None = None, drop_last: bool = False) -> EpochIterator[T]:
        """An iterator that begins, for the sampler too, with its first ``next``."""
        rest = Rest(sampler, batch_size, drop_last)
        iterator = cast("EpochIterator[T]", cls.from_iterable(rest))
        iterator._rest = rest
        return iterator

    def state_dict(self) -> dict[str, Any]:
        return self._rest.sampler._state_at(self._rest.place)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._rest.begun:
            raise RuntimeError("state_dict: expected an iterator that has not begun, found one that has")
        self._rest.start = self._rest.sampler._load(state_dict)

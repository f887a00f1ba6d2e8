"""Whole batches at once."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler

from ltkernels import arguments as arg
from ltkernels.samplers.iterator import EpochIterator
from ltkernels.samplers.sampler import LongTailSampler


class LongTailBatchSampler(BatchSampler):
    """Batches of a sampler's stream, as lists, for the ``batch_sampler`` of a ``DataLoader``.

    The batches are those of torch's ``BatchSampler``, without a step in Python for each sample. Epochs and states are
    the sampler's.

    Args:
        sampler: a :class:`LongTailSampler` or :class:`DistributedLongTailSampler`. No other: a framework that replaces
            it (Lightning does, unless the trainer has ``use_distributed_sampler=False``) would silently undo the
            balance.
        batch_size: samples in a batch.
        drop_last: leave out the last batch of an epoch if it is smaller.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``batch_size`` below 1.

    Example:
        >>> import ltkernels as ltk
        >>> sampler = ltk.samplers.LongTailSampler([0, 0, 0, 1, 1], "instance")
        >>> [len(batch) for batch in ltk.samplers.LongTailBatchSampler(sampler, batch_size=2)]
        [2, 2, 1]
    """

    sampler: LongTailSampler
    batch_size: int
    drop_last: bool

    def __init__(self, sampler: LongTailSampler, batch_size: int, drop_last: bool = False) -> None:
        if not isinstance(sampler, LongTailSampler):
            raise TypeError(
                "sampler: expected a LongTailSampler or DistributedLongTailSampler, found"
                f" {type(sampler).__name__}; in Lightning give the Trainer use_distributed_sampler=False"
            )
        batch_size = arg.integer("batch_size", batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
        if not isinstance(drop_last, bool):
            raise TypeError(f"drop_last: expected a bool, found {drop_last!r}")
        super().__init__(sampler, batch_size, drop_last)

    def __iter__(self) -> EpochIterator[list[int]]:
        return EpochIterator.over(self.sampler, self.batch_size, self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """As the sampler's."""
        self.sampler.set_epoch(epoch)

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """As the sampler's; ``consumed`` counts samples."""
        return self.sampler.state_dict(consumed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the sampler's."""
        self.sampler.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"LongTailBatchSampler({self.sampler!r}, batch_size={self.batch_size}, drop_last={self.drop_last})"

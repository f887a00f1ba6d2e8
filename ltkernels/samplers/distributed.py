"""The sampler for several processes that share one stream."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.utils.data import DistributedSampler

from ltkernels import arguments as arg
from ltkernels.class_index import ClassIndex
from ltkernels.samplers.sampler import Indices, Labels, LongTailSampler
from ltkernels.samplers.strategies import Strategy


class DistributedLongTailSampler(LongTailSampler, DistributedSampler[int]):  # type: ignore[override]
    """:class:`LongTailSampler` for ``torch.distributed``: rank r of W takes positions r, r + W, ... of its stream.

    All ranks together draw exactly what one process would. A state is that of the whole run: the same on all ranks at
    the end of a step, and good for any number of them, also for a :class:`LongTailSampler`. As every rank has drawn as
    much as this one when it is taken, take it between steps.

    Args:
        labels, strategy: as of :class:`LongTailSampler`.
        num_replicas: number of ranks W; default: that of the process group.
        rank: this one; default: that of this process.
        shuffle: True: a stream that is drawn has no other order.
        seed: as of :class:`LongTailSampler`; the same on all ranks.
        drop_last: leave out samples at the end of an epoch so that all ranks have the same number, instead of repeating
            some from its beginning.
        num_classes, num_samples, indices, **parameters: as of :class:`LongTailSampler`; ``num_samples`` is for all
            ranks together.

    Attributes:
        num_samples: samples in an epoch on this rank, as of torch's ``DistributedSampler``.
        total_size: on all ranks, with those that are repeated.

    Raises:
        TypeError, ValueError: as of :class:`LongTailSampler`; ranks that do not go together.
        RuntimeError: no process group to take them from.

    Example:
        >>> import ltkernels as ltk
        >>> labels = [0, 0, 0, 0, 0, 1]
        >>> ranks = [ltk.samplers.DistributedLongTailSampler(labels, num_replicas=2, rank=r) for r in (0, 1)]
        >>> parts = [list(sampler) for sampler in ranks]
        >>> [i for step in zip(*parts) for i in step] == list(ltk.samplers.LongTailSampler(labels))
        True
    """

    def __init__(
        self,
        labels: Labels | ClassIndex,
        strategy: str | Strategy = "class_balanced",
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_classes: int | None = None,
        num_samples: int | None = None,
        indices: Indices | None = None,
        **parameters: Any,
    ) -> None:
        if shuffle is not True:
            raise ValueError(f"shuffle: expected True (a stream that is drawn has no other order), found {shuffle!r}")
        if not isinstance(drop_last, bool):
            raise TypeError(f"drop_last: expected a bool, found {drop_last!r}")
        if (num_replicas is None or rank is None) and not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "num_replicas, rank: expected both, or a process group (torch.distributed.init_process_group), found"
                f" {num_replicas} and {rank}"
            )
        replicas = arg.integer("num_replicas", dist.get_world_size() if num_replicas is None else num_replicas)
        rank = arg.integer("rank", dist.get_rank() if rank is None else rank)
        if replicas < 1:
            raise ValueError(f"num_replicas: expected at least 1, found {replicas}")
        if not 0 <= rank < replicas:
            raise ValueError(f"rank: expected 0 to {replicas - 1}, found {rank}")
        self.num_replicas = self._replicas = replicas
        self.rank = self._rank = rank
        self.drop_last = self._drop_last = drop_last
        self.shuffle = True
        super().__init__(
            labels, strategy, num_classes=num_classes, num_samples=num_samples, seed=seed, indices=indices, **parameters
        )
        self.dataset: Any = range(self.class_index.num_samples)  # for those who ask a DistributedSampler for its size

    @property
    def total_size(self) -> int:  # type: ignore[override]
        """Samples in an epoch on all ranks, with those that are repeated."""
        return self.num_samples * self.num_replicas

"""Samplers for long-tailed data: a pure function of seed, epoch and position, as objects that PyTorch knows.

:class:`LongTailSampler` is for a ``DataLoader``, :class:`DistributedLongTailSampler` for several processes and
:class:`LongTailBatchSampler` for whole batches. What they draw is a strategy: :mod:`ltkernels.samplers.strategies`.
:class:`DeviceBatches` draws and gathers on a GPU, :func:`repeat_count` is for streams that are too large to index.

Example:
    >>> import torch, ltkernels as ltk
    >>> labels = torch.tensor([0] * 89 + [1] * 9 + [2])
    >>> sampler = ltk.samplers.LongTailSampler(labels, "class_balanced", replacement=False)
    >>> labels[list(sampler)].bincount()
    tensor([33, 33, 33])
"""

from ltkernels.class_draws import AliasTable, ClassRounds
from ltkernels.class_index import ClassIndex
from ltkernels.samplers.batches import LongTailBatchSampler
from ltkernels.samplers.device import DeviceBatches
from ltkernels.samplers.distributed import DistributedLongTailSampler
from ltkernels.samplers.repeats import repeat_count, repeat_factor
from ltkernels.samplers.sampler import LongTailSampler
from ltkernels.samplers.strategies import STRATEGIES, Strategy

__all__ = [
    "STRATEGIES",
    "AliasTable",
    "ClassIndex",
    "ClassRounds",
    "DeviceBatches",
    "DistributedLongTailSampler",
    "LongTailBatchSampler",
    "LongTailSampler",
    "Strategy",
    "repeat_count",
    "repeat_factor",
]

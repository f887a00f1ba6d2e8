"""Samplers and losses in a loop of your own with ``accelerate``.

``accelerator.prepare`` gives each process its batches of the one stream that a ``LongTailSampler`` draws alike in all
of them, so nothing has to be known of ranks. What it does not do is to tell a sampler its epoch wherever that is
needed; :func:`epoch_batches` does. Checked with accelerate 1.15.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import DistributedSampler

from ltkernels import arguments as arg
from ltkernels.integrations import epochs

try:
    from accelerate import PartialState, skip_first_batches
    from accelerate.data_loader import DataLoaderDispatcher
except ImportError as error:
    message = f"ltkernels.integrations.accelerate needs accelerate, run: pip install accelerate ({error})"
    raise ImportError(message) from error

__all__ = ["epoch_batches"]


def epoch_batches(loader: Any, epoch: int, skip_batches: int = 0) -> Any:
    """The batches of an epoch, or what is left of them, of a loader that ``accelerator.prepare`` has returned.

    Iterating a prepared loader sets the epoch of its sampler to the number of times it was iterated: in a run that is
    resumed, 0. And ``accelerate.skip_first_batches`` wraps the sampler once more, so that in several processes no epoch
    reaches it at all. Here the sampler has the epoch first, whatever is around it. Skipped batches are drawn, but not
    loaded. The loop's position is two numbers, to be stored as you like::

        for epoch in range(first_epoch, epochs):
            criterion.set_epoch(epoch)
            skip = first_step if epoch == first_epoch else 0
            for step, (x, y) in enumerate(epoch_batches(loader, epoch, skip), start=skip):
                ...

    With ``DataLoaderConfiguration(use_stateful_dataloader=True)`` Accelerate stores how many batches of the epoch were
    drawn, and not which epoch it was: after ``load_state`` give the epoch, and no ``skip_batches``.

    Args:
        loader: from ``accelerator.prepare``; its sampler is a :class:`ltkernels.samplers.LongTailSampler`, not one for
            several processes, which would be shared out twice.
        epoch: counted from 0.
        skip_batches: batches of this process that an earlier run has trained.

    Returns:
        A loader for this epoch.

    Raises:
        TypeError: an argument of the wrong type; a loader without a sampler of this package, or with a distributed one.
        ValueError: a negative number; more batches to skip than there are.

    Example:
        >>> import torch, ltkernels as ltk
        >>> from accelerate import Accelerator
        >>> from ltkernels.integrations.accelerate import epoch_batches
        >>> labels = torch.tensor([0] * 8 + [1])
        >>> sampler = ltk.samplers.LongTailSampler(labels, "class_balanced", replacement=False, num_samples=8)
        >>> loader = Accelerator(cpu=True).prepare(torch.utils.data.DataLoader(labels, batch_size=4, sampler=sampler))
        >>> [sorted(batch.tolist()) for batch in epoch_batches(loader, epoch=0)]
        [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    epoch, skip_batches = arg.integer("epoch", epoch), arg.integer("skip_batches", skip_batches)
    found = epochs.samplers(loader)
    if not found:
        raise TypeError("loader: expected one with a LongTailSampler, found none behind it")
    for sampler in found:
        if isinstance(sampler, DistributedSampler):
            raise TypeError(
                "loader: expected a LongTailSampler, which Accelerate shares out, found"
                f" {type(sampler).__name__}, which would be shared out twice"
            )
    if not 0 <= skip_batches <= len(loader):
        raise ValueError(f"skip_batches: expected 0 to {len(loader)}, the batches of an epoch, found {skip_batches}")
    # Where one process hands batches out, it draws one for each process in a step, and skips as it draws.
    drawn = 1
    if isinstance(loader, DataLoaderDispatcher) and not loader.split_batches:
        drawn = PartialState().num_processes
    left = skip_first_batches(loader, skip_batches * drawn) if skip_batches else loader
    left.set_epoch(epoch)  # its own number, which its iterator passes on
    for sampler in found:
        sampler.set_epoch(epoch)
    return left

"""A Lightning callback that tells losses of epochs, checks how samplers are shared out, and resumes them.

Checked with lightning 2.6; ``pytorch_lightning`` of the same version works as well.

Which sampler and loader for what:

* One device: ``DataLoader(..., sampler=LongTailSampler(labels))``.
* Several devices: the same, which Lightning shuffles and shares out (``DistributedSamplerWrapper``), or
  ``DistributedLongTailSampler(labels)`` made in ``train_dataloader()``, where the process group is known. Lightning
  leaves that one alone, and it alone can be resumed in the middle of an epoch.
* ``LongTailBatchSampler``: one device, or over a ``DistributedLongTailSampler`` with
  ``Trainer(use_distributed_sampler=False)``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler

from ltkernels.integrations import epochs
from ltkernels.samplers.distributed import DistributedLongTailSampler
from ltkernels.samplers.sampler import LongTailSampler

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ImportError as missing:
        try:
            from pytorch_lightning import Callback
        except ImportError:
            message = f"ltkernels.integrations.lightning needs lightning, run: pip install lightning ({missing})"
            raise ImportError(message) from missing

__all__ = ["LongTailCallback"]


@dataclass
class _Drawn:
    """A training loader and the sampler that it draws from."""

    loader: DataLoader[Any]
    sampler: LongTailSampler
    start: int = 0  # samples of the epoch, on this rank, that an earlier run has trained

    @property
    def wrapped(self) -> bool:
        """Lightning shares the sampler out: it makes a list of the whole epoch, from its beginning."""
        outer: Any = self.loader.sampler
        return isinstance(outer, DistributedSampler) and not isinstance(outer, LongTailSampler)

    @property
    def draws_at_once(self) -> bool:
        """An iterator of the loader draws when it is made."""
        return self.wrapped or self.loader.num_workers > 0

    def state(self, batches: int) -> dict[str, Any] | None:
        """Where the sampler is after so many batches; None where that can not be said."""
        epoch_end = self.sampler._consumable
        if self.wrapped:
            return self.sampler.state_dict(consumed=epoch_end) if batches == len(self.loader) else None
        batch_size = self.loader.batch_size
        for batch_sampler in (self.loader.batch_sampler, self.loader.sampler):  # the latter: batches as samples
            batch_size = batch_size or getattr(batch_sampler, "batch_size", None)
        if batch_size is None:
            return None
        consumed = self.start + batches * batch_size
        if consumed >= epoch_end + batch_size:  # gone through more than once
            return None
        return self.sampler.state_dict(consumed=min(consumed, epoch_end))


class LongTailCallback(Callback):  # type: ignore[misc]
    """Give it to the Trainer, and losses and samplers follow its epochs.

    * Every loss and schedule in the LightningModule is told which epoch begins (DRW, RIDE's second stage).
    * A checkpoint has where the samplers behind the training loaders are, counted by the batches that were trained, not
      by those that workers have drawn. A run that is resumed goes on with the next batch: Lightning itself begins the
      epoch's samples anew, and where they are drawn ahead, by workers or to be shared out, those of epoch 0.
    * A sampler that several processes would draw from alike, or that belongs to other ranks, is an error.

    A loader that has a state of its own, as torchdata's ``StatefulDataLoader``, is left to Lightning, which stores it.
    So is one that ``CombinedLoader`` goes through more than once in an epoch.

    Args:
        *parts: whatever else has ``set_epoch``, such as a loss that is no part of the module.

    Raises:
        TypeError: something without ``set_epoch``.
        ValueError: at the start of training: a sampler that the processes do not share as they should; a checkpoint of
            other samplers.

    Warns:
        UserWarning: a run is resumed in the middle of an epoch whose samples Lightning shares out: it begins them anew.

    Example:
        >>> import ltkernels as ltk
        >>> from ltkernels.integrations.lightning import LongTailCallback
        >>> callback = LongTailCallback()  # for Trainer(callbacks=[callback])
    """

    def __init__(self, *parts: Any) -> None:
        for part in parts:
            if not callable(getattr(part, "set_epoch", None)):
                raise TypeError(f"parts: expected objects with set_epoch, found {type(part).__name__}")
        self.parts = parts
        self._drawn: list[_Drawn] = []
        self._batches = 0  # trained in this epoch, by this process
        self._loaded: list[dict[str, Any] | None] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Before the first batch: a run that goes on within an epoch has no ``on_train_epoch_start``."""
        self._drawn, self._batches = _drawn(trainer), 0
        self._set_epoch(trainer, pl_module)
        states, self._loaded = self._loaded, None
        epoch = trainer.fit_loop.epoch_progress.current.processed  # what Lightning tells samplers
        if states is None and epoch == 0:
            return
        if states is not None:
            self._load(states)
        for drawn in self._drawn:
            drawn.sampler.set_epoch(epoch)  # nothing, if that is where it is
            drawn.start = drawn.sampler.start
        # Lightning has made the iterators before this hook: from where the samplers were then, and, of a loader with a
        # state of the last step of an epoch, one that has nothing left.
        at_end = trainer.fit_loop.epoch_loop.batch_progress.current.processed >= trainer.num_training_batches
        if at_end or any(drawn.draws_at_once for drawn in self._drawn):
            iter(trainer.fit_loop._data_fetcher)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._drawn, self._batches = _drawn(trainer), 0  # others, with reload_dataloaders_every_n_epochs
        self._set_epoch(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        self._batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"samplers": [drawn.state(self._batches) for drawn in self._drawn]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["samplers"]

    def _set_epoch(self, trainer: Any, pl_module: Any) -> None:
        for part in (*epochs.schedules(pl_module), *self.parts):
            part.set_epoch(trainer.current_epoch)

    def _load(self, states: list[dict[str, Any] | None]) -> None:
        if len(states) != len(self._drawn):
            raise ValueError(
                f"checkpoint: expected states of {len(self._drawn)} samplers, as the loaders have, found {len(states)}"
            )
        for drawn, state in zip(self._drawn, states, strict=True):
            if state is None or (drawn.wrapped and 0 < state["position"] < state["num_samples"]):
                warnings.warn(
                    f"{drawn.sampler!r} begins its epoch anew: give the loader a DistributedLongTailSampler to resume"
                    " within an epoch",
                    stacklevel=2,
                )
            else:
                drawn.sampler.load_state_dict(state)


def _drawn(trainer: Any) -> list[_Drawn]:
    """The training loaders that draw from samplers of this package, those that Lightning resumes by itself apart."""
    found = []
    for loader in tree_leaves(trainer.train_dataloader):
        if isinstance(loader, DataLoader):
            for sampler in epochs.samplers(loader):
                drawn = _Drawn(loader, sampler)
                _check_shared(trainer, drawn)
                if not hasattr(loader, "load_state_dict"):
                    found.append(drawn)
    return found


def _check_shared(trainer: Any, drawn: _Drawn) -> None:
    """Each rank has to have its own part of the stream."""
    processes = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    replicas, rank = processes["num_replicas"], processes["rank"]
    sampler = drawn.sampler
    if isinstance(sampler, DistributedLongTailSampler):
        if (sampler.num_replicas, sampler.rank) != (replicas, rank):
            raise ValueError(
                f"sampler: expected rank {rank} of {replicas}, as the Trainer's, found rank {sampler.rank} of"
                f" {sampler.num_replicas}"
            )
    elif drawn.wrapped and sampler._length_varies:
        raise ValueError(
            "sampler: expected epochs of one length, by which Lightning shares a sampler out, found"
            f" {sampler.strategy}; give it num_samples, or take a DistributedLongTailSampler"
        )
    elif replicas > 1 and not drawn.wrapped:
        raise ValueError(
            f"sampler: expected a DistributedLongTailSampler in {replicas} processes with use_distributed_sampler=False"
            f", found {type(sampler).__name__}, of which each would draw the same"
        )

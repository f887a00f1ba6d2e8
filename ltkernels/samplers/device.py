"""Batches of data that lie on a device: drawn, gathered and advanced there, without a word from the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels import functional as F
from ltkernels.class_draws import ClassRounds
from ltkernels.samplers.iterator import Place
from ltkernels.samplers.sampler import LongTailSampler
from ltkernels.samplers.strategies import Draws


class DeviceBatches:
    """Batches of a sampler's stream, of tensors on one device: for classifiers that are trained on cached features.

    ``batches()`` gives the next batch. On a GPU position and epoch are tensors there that each call advances, so a call
    can be captured in a CUDA graph, whose every replay then is the next batch; nothing waits for the device.
    ``for batch in batches`` gives those of one epoch. The samples are those that the sampler itself would give; of an
    epoch's last ones fewer than a batch are left out.

    Args:
        sampler: a :class:`LongTailSampler`, or :class:`DistributedLongTailSampler`, of which this rank's part is
            taken. A strategy that changes from epoch to epoch ("progressive", "repeat_factor") is refused: a graph
            would go on with what it was captured with.
        *tensors: data to gather from, samples along dimension 0, all on one device.
        batch_size: samples in a batch (on this rank).

    Attributes:
        indices: the samples of the last batch, int64 ``(batch_size,)``; None before the first.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value; tensors on several devices, or with fewer samples
            than the sampler may draw; a batch larger than an epoch.

    Example:
        >>> import torch, ltkernels as ltk
        >>> labels = torch.tensor([0] * 96 + [1] * 4)
        >>> sampler = ltk.samplers.LongTailSampler(labels, "class_balanced", replacement=False)
        >>> batches = ltk.samplers.DeviceBatches(sampler, torch.randn(100, 8), labels, batch_size=50)
        >>> [(tuple(features.shape), y.bincount().tolist()) for features, y in batches]
        [((50, 8), [25, 25]), ((50, 8), [25, 25])]
    """

    indices: Tensor | None

    def __init__(self, sampler: LongTailSampler, *tensors: Tensor, batch_size: int) -> None:
        if not isinstance(sampler, LongTailSampler):
            raise TypeError(f"sampler: expected a LongTailSampler, found {type(sampler).__name__}")
        if sampler.strategy.by_epoch:
            raise ValueError(f"sampler: expected a strategy that is the same in every epoch, found {sampler.strategy}")
        if not tensors:
            raise ValueError("tensors: expected at least one, found none")
        draws = sampler._epoch_samples(0)
        assert isinstance(draws, Draws)
        device, members = arg.tensor("tensors[0]", tensors[0]).device, draws.class_index.members
        least = int(members.max()) + 1 if members.numel() else draws.class_index.num_samples
        for number, values in enumerate(tensors):
            name = f"tensors[{number}]"
            if arg.tensor(name, values).device != device:
                raise ValueError(f"{name}: expected device {device} as of tensors[0], found {values.device}")
            if values.dim() == 0 or values.shape[0] < least:
                raise ValueError(f"{name}: expected at least {least} samples, found shape {tuple(values.shape)}")
        batch_size, self._replicas = arg.integer("batch_size", batch_size), sampler._replicas
        of_all = batch_size * self._replicas
        if not 1 <= of_all <= sampler._epoch_length(0):
            raise ValueError(
                f"batch_size: expected 1 to {sampler._epoch_length(0) // self._replicas}, the samples of an epoch,"
                f" found {batch_size}"
            )
        self.sampler, self.tensors, self.batch_size, self.indices = sampler, tensors, batch_size, None
        self._class_index = draws.class_index.to(device)
        self._class_draws = None if draws.class_draws is None else draws.class_draws.to(device)
        self._steps = sampler._epoch_length(0) // of_all
        # Of this rank's next sample. Numbers on the CPU: there is no graph to capture, and advancing tensors took
        # as long there as drawing and gathering a small batch.
        self._position: int | Tensor = 0
        self._epoch: int | Tensor = 0
        if device.type != "cpu":
            self._position, self._epoch = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        running = sampler._last is not None and not sampler._last.ended
        self._go_to(sampler._place if running else sampler._next_place)

    def _go_to(self, place: Place) -> None:
        of_all = self.batch_size * self._replicas
        batches, partial = divmod(place.position, of_all)
        ended = batches >= self._steps
        if partial and not ended:
            raise ValueError(
                f"sampler, state_dict: expected a position that is a multiple of {of_all}, the samples of a batch,"
                f" found {place.position}"
            )
        position = self.sampler._rank + (0 if ended else place.position)
        epoch = place.epoch + ended
        if isinstance(self._position, Tensor) and isinstance(self._epoch, Tensor):
            self._position.fill_(position)  # captured graphs have these tensors
            self._epoch.fill_(epoch)
        else:
            self._position, self._epoch = position, epoch

    def __call__(self) -> tuple[Tensor, ...]:
        """The next batch: of each tensor the rows of the same samples."""
        self.indices = F.sample_indices(
            self._class_index,
            self._position,
            step=self._replicas,
            num_samples=self.batch_size,
            seed=self.sampler.seed,
            epoch=self._epoch,
            class_probs=self._class_draws,
            replacement=not isinstance(self._class_draws, ClassRounds),
        )
        of_all = self.batch_size * self._replicas
        self._position += of_all
        # An epoch ends before a batch that it cannot fill. Without a branch, which the host would have to take.
        ended = self._position >= self._steps * of_all
        self._epoch += ended
        self._position -= ended * self._steps * of_all
        return tuple(values.index_select(0, self.indices) for values in self.tensors)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """The batches that are left of the epoch under way, or of the next one."""
        done = (int(self._position) - self.sampler._rank) // (self.batch_size * self._replicas)
        for _ in range(self._steps - done):
            yield self()

    def state_dict(self) -> dict[str, Any]:
        """A state as of ``sampler``, to go on from with either; waits for the device."""
        return self.sampler._state_at(Place(int(self._epoch), int(self._position) - self.sampler._rank))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a state of these batches, or of the sampler, was taken; also in graphs captured before.

        Raises:
            TypeError, ValueError: as of the sampler; a state of another seed, which captured graphs would not take
                over; a position in the middle of a batch.
        """
        seed = self.sampler.seed
        place = self.sampler._load(state_dict)
        found, self.sampler.seed = self.sampler.seed, seed
        if found != seed:
            raise ValueError(f"state_dict: expected seed {seed} as of the sampler, found {found}")
        self._go_to(place)

"""Samplers in what uses them: DataLoader, torchdata's StatefulDataLoader, and as Lightning and Accelerate do."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from ltkernels.samplers import DistributedLongTailSampler, LongTailBatchSampler, LongTailSampler

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it

LABELS = np.repeat(np.arange(3), [30, 10, 3])
N = len(LABELS)
EPOCHS = 4


class Positions(Dataset[int]):
    """A data set whose samples are their positions."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> int:
        return index


def sampler(kind: str = "one") -> LongTailSampler:
    if kind == "rank":
        return DistributedLongTailSampler(LABELS, seed=5, num_replicas=2, rank=1)
    return LongTailSampler(LABELS, seed=5)


def loader(drawn: LongTailSampler, batch_size: int, of_batches: bool, kind: Any = DataLoader, **options: Any) -> Any:
    if of_batches:
        return kind(Positions(), batch_sampler=LongTailBatchSampler(drawn, batch_size), **options)
    return kind(Positions(), sampler=drawn, batch_size=batch_size, **options)


def batches(source: Any) -> Iterator[list[int]]:
    return (batch.tolist() for batch in source)


def whole(kind: str, batch_size: int) -> list[list[list[int]]]:
    """All epochs of a run that is not interrupted, in batches."""
    drawn = sampler(kind)
    return [list(BatchSampler(drawn, batch_size, drop_last=False)) for _ in range(EPOCHS)]


def expected(epochs: list[list[list[int]]], epoch: int, steps: int | None) -> list[list[list[int]]]:
    """What is left of them: steps None is the end of an epoch, when the loop has left it."""
    return epochs[epoch + 1 :] if steps is None else [epochs[epoch][steps:], *epochs[epoch + 1 :]]


def stop_at(steps: int | None, last: int) -> int | None:
    """After how many of an epoch's steps to stop: -1 is the last one, and so is a number that is too large."""
    return None if steps is None else last if steps < 0 else min(steps, last)


# In epoch 0, in epoch 1, at the end of a step that is the last one, and at the end of the epoch.
INTERRUPTED = [(0, 3), (1, 2), (1, -1), (1, None)]
# Batches that do and do not divide the epoch of 43, or 22 of a rank: with workers the loader then sees the end of the
# epoch before, or after, it stores the last step.
SHAPES = [("one", 5, False), ("one", 43, False), ("one", 5, True), ("rank", 11, True), ("rank", 5, False)]


@pytest.mark.parametrize(("epoch", "steps"), INTERRUPTED)
@pytest.mark.parametrize("use_set_epoch", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_dataloader(workers: int, use_set_epoch: bool, epoch: int, steps: int | None) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    for kind, batch_size, of_batches in SHAPES if workers == 0 else SHAPES[:1] + SHAPES[3:4]:
        epochs = whole(kind, batch_size)
        stop = stop_at(steps, len(epochs[0]))
        drawn = sampler(kind)
        source = loader(drawn, batch_size, of_batches, stateful, num_workers=workers)
        for e in range(epoch + 1):
            if use_set_epoch:
                drawn.set_epoch(e)
            taken = list(itertools.islice(batches(source), stop if e == epoch else None))
            assert taken == epochs[e][: stop if e == epoch else None]
        state = json.loads(json.dumps(source.state_dict()))

        drawn = sampler(kind)
        source = loader(drawn, batch_size, of_batches, stateful, num_workers=workers)
        source.load_state_dict(state)
        found = []
        for e in range(epoch + (stop is None), EPOCHS):
            if use_set_epoch:
                drawn.set_epoch(e)
            found.append(list(batches(source)))
        assert found == expected(epochs, epoch, stop)


@pytest.mark.parametrize(("epoch", "steps"), INTERRUPTED)
@pytest.mark.parametrize("use_set_epoch", [False, True])
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_plain_dataloader(workers: int, persistent: bool, use_set_epoch: bool, epoch: int, steps: int | None) -> None:
    """With the number of samples that were consumed; behind the loop without."""
    options = {"num_workers": workers, "persistent_workers": persistent}
    for kind, batch_size, of_batches in SHAPES if workers == 0 else SHAPES[:1] + SHAPES[3:4]:
        epochs = whole(kind, batch_size)
        stop = stop_at(steps, len(epochs[0]))
        drawn = sampler(kind)
        source = loader(drawn, batch_size, of_batches, **options)
        for e in range(epoch + 1):
            if use_set_epoch:
                drawn.set_epoch(e)
            consumed = drawn.start
            state = None
            for step, batch in enumerate(batches(source), 1):
                assert batch == epochs[e][step - 1]
                consumed += len(batch)
                if (e, step) == (epoch, stop):
                    state = drawn.state_dict(consumed=consumed)
                    break
        state = json.loads(json.dumps(state or drawn.state_dict()))

        drawn = sampler(kind)
        drawn.load_state_dict(state)
        source = loader(drawn, batch_size, of_batches, **options)
        found = []
        for e in range(drawn.epoch, EPOCHS):
            if use_set_epoch:
                drawn.set_epoch(e)
            found.append(list(batches(source)))
        left = [left for left in expected(epochs, epoch, stop) if left]  # an epoch of which nothing is left is over
        assert found == left


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_interrupted_twice_in_an_epoch(workers: int) -> None:
    """What was consumed counts from the beginning of the epoch, in an iteration that was resumed too."""
    epochs = whole("one", 4)
    drawn = sampler()
    found = []
    for _ in range(3):
        consumed = drawn.start
        for step, batch in enumerate(batches(loader(drawn, 4, False, num_workers=workers)), 1):
            found.append(batch)
            consumed += len(batch)
            if step == 2:
                break
        state = drawn.state_dict(consumed=consumed)
        drawn = sampler()
        drawn.load_state_dict(state)
    assert found == epochs[0][:6]
    assert state["position"] == 24


def test_goes_on_with_other_workers_batches_and_ranks() -> None:
    """Where a plain loader was is a number of samples: not of batches, and of no worker's."""
    drawn, rest = sampler(), [i for epoch in whole("one", 1)[:2] for i in itertools.chain(*epoch)]
    found: list[int] = []
    for workers, batch_size in ((2, 4), (0, 7), (1, 3)):
        consumed = drawn.start
        for batch in itertools.islice(batches(loader(drawn, batch_size, False, num_workers=workers)), 2):
            found += batch
            consumed += len(batch)
        state = json.loads(json.dumps(drawn.state_dict(consumed=consumed)))
        drawn = sampler()
        drawn.load_state_dict(state)
    assert found == rest[:28]
    pair = [DistributedLongTailSampler(LABELS, num_replicas=2, rank=rank) for rank in range(2)]
    parts = []
    for rank in pair:
        rank.load_state_dict(state)
        parts.append(list(itertools.chain(*batches(loader(rank, 5, True, num_workers=2)))))
    assert [i for step in zip(*parts, strict=True) for i in step][: N - 28] == rest[28:N]


def test_state_before_anything_was_drawn() -> None:
    """StatefulDataLoader makes its iterator for that, which draws ahead with workers, and uses it later."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    epochs = whole("one", 4)
    source = loader(sampler(), 4, False, stateful, num_workers=2)
    state = source.state_dict()
    assert list(batches(source)) == epochs[0]
    other = loader(sampler(), 4, False, stateful, num_workers=2)
    other.load_state_dict(state)
    assert [list(batches(other)) for _ in range(2)] == epochs[:2]


def test_stateful_dataloader_refuses_other_data() -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    source = loader(sampler(), 4, False, stateful)
    next(iter(source))
    other = loader(LongTailSampler(LABELS[::-1].copy(), seed=5), 4, False, stateful)
    other.load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match="state_dict: expected the data of this sampler"):
        iter(other)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", ["one", "rank"])
def test_batches_are_those_of_torch(kind: str, drop_last: bool) -> None:
    for batch_size in (1, 2, 11, 22, 43, 44):
        ours = LongTailBatchSampler(sampler(kind), batch_size, drop_last)
        torchs = BatchSampler(sampler(kind), batch_size, drop_last)
        for _ in range(2):
            assert list(ours) == list(torchs)
            assert len(ours) == len(torchs)


def test_batch_sampler_attributes() -> None:
    """Lightning makes a batch sampler again from these; Accelerate and loaders set epochs through them."""
    first = LongTailBatchSampler(sampler(), batch_size=4, drop_last=True)
    again = type(first)(first.sampler, batch_size=first.batch_size, drop_last=first.drop_last)
    assert isinstance(again, BatchSampler)
    again.set_epoch(3)
    assert first.sampler.epoch == 3
    assert repr(again).endswith("epoch=3), batch_size=4, drop_last=True)")
    source = DataLoader(Positions(), batch_sampler=again)
    assert source.batch_sampler.sampler is first.sampler  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (DistributedSampler(range(5), 2, 0), 2),
            TypeError,
            "found DistributedSampler; in Lightning give the Trainer use",
        ),
        (([1, 2], 2), TypeError, "sampler: expected a LongTailSampler or DistributedLongTailSampler, found list"),
        ((sampler(), 0), ValueError, "batch_size: expected at least 1, found 0"),
        ((sampler(), 2.0), TypeError, "batch_size: expected an integer, found 2.0"),
        ((sampler(), 2, None), TypeError, "drop_last: expected a bool, found None"),
    ],
)
def test_wrong_batch_samplers(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LongTailBatchSampler(*arguments)


class LightningWrapper(DistributedSampler[int]):
    """What Lightning puts around a sampler: all of its epoch as a list on each rank, of which the rank takes its part.

    ``set_epoch`` stops here: the sampler inside hears nothing of it.
    """

    def __init__(self, inner: LongTailSampler, world: int, rank: int) -> None:
        super().__init__(range(len(inner)), world, rank, shuffle=False)
        self.inner = inner

    def __iter__(self) -> Iterator[int]:
        drawn = list(self.inner)
        return (drawn[at] for at in super().__iter__())


def test_as_lightning_wraps() -> None:
    """All ranks list the same stream, another one in each epoch."""
    ranks = [LightningWrapper(sampler(), 2, rank) for rank in range(2)]
    single = sampler()
    seen = []
    for epoch in range(3):
        parts = []
        for rank in ranks:
            rank.set_epoch(epoch)
            parts.append(list(rank))
        together = [i for step in zip(*parts, strict=True) for i in step]
        assert together[:N] == list(single)
        seen.append(together)
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize("of_batches", [False, True])
def test_as_accelerate_shards(of_batches: bool) -> None:
    """Process p of P takes batches p, p + P, ... of the sampler, which is the same in all, and sets its own epochs."""
    per_process = []
    for process in range(2):
        drawn = sampler()
        source: Any = LongTailBatchSampler(drawn, 4, True) if of_batches else BatchSampler(drawn, 4, True)
        epochs = []
        for epoch in range(3):
            source.sampler.set_epoch(epoch)
            epochs.append(list(itertools.islice(source, process, None, 2)))
        per_process.append(epochs)
    single = sampler()
    for epoch in range(3):
        both = itertools.zip_longest(*(epochs[epoch] for epochs in per_process))
        together = [batch for pair in both for batch in pair if batch is not None]
        assert together == list(BatchSampler(single, 4, True))


def test_a_data_set_that_takes_batches() -> None:
    """A batch as a whole to __getitems__, as PyTorch's own fetcher does it."""

    class Rows(Positions):
        def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
            return list(torch.as_tensor(indices))

    source = DataLoader(Rows(), batch_sampler=LongTailBatchSampler(sampler(), 5))
    assert list(batches(source)) == whole("one", 5)[0]


def test_spawned_workers() -> None:
    """Loader and sampler can be made before processes are spawned, which pickle what they get."""
    source = loader(sampler(), 11, True, num_workers=1, multiprocessing_context="spawn")
    assert list(batches(source)) == whole("one", 11)[0]

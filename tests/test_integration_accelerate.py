"""The real accelerate with this package's samplers: one process here, two in integration_worker_accelerate.py."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_cases import LABELS, PROGRAMS, ROOT, SAMPLES, Positions, reports, torchrun
from torch.utils.data import BatchSampler, DataLoader

import ltkernels as ltk
from ltkernels.samplers import DistributedLongTailSampler, LongTailBatchSampler, LongTailSampler

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

from ltkernels.integrations.accelerate import epoch_batches  # noqa: E402

BATCH = 8


def prepared(kind: str = "sampler", workers: int = 0, batch: int = BATCH, **options: Any) -> Any:
    """A loader as Accelerate hands it back."""
    sampler = LongTailSampler(LABELS, seed=3)
    if kind == "sampler":
        loader = DataLoader(Positions(), batch, sampler=sampler, num_workers=workers)
    else:
        loader = DataLoader(Positions(), batch_sampler=LongTailBatchSampler(sampler, batch), num_workers=workers)
    configured = accelerate.utils.DataLoaderConfiguration(**options)
    return accelerate.Accelerator(cpu=True, dataloader_config=configured).prepare(loader)


# Halves of batches of 16; and those, or whole batches, that the first process hands out.
SHARED: dict[str, tuple[int, dict[str, bool]]] = {
    "split": (2 * BATCH, {"split_batches": True}),
    "dispatched halves": (2 * BATCH, {"split_batches": True, "dispatch_batches": True}),
    "dispatched": (BATCH, {"dispatch_batches": True}),
}


def positions(batches: Any) -> list[list[int]]:
    return [batch["position"].tolist() for batch in batches]


def stream(epochs: int, batch: int = BATCH) -> list[list[list[int]]]:
    """What a run that is not interrupted trains with, by epoch."""
    sampler = LongTailSampler(LABELS, seed=3)
    return [list(BatchSampler(sampler, batch, drop_last=False)) for _ in range(epochs)]


@pytest.mark.parametrize(("kind", "workers"), [("sampler", 0), ("batch sampler", 0), ("sampler", 2)])
def test_epochs_and_resuming(kind: str, workers: int) -> None:
    """13 batches an epoch. The resumed loader is a new one, as in a new process."""
    expected = stream(3)
    loader = prepared(kind, workers)
    assert [positions(epoch_batches(loader, epoch)) for epoch in range(3)] == expected
    for epoch, skip in ((0, 3), (1, 12), (2, 13)):
        assert positions(epoch_batches(prepared(kind, workers), epoch, skip)) == expected[epoch][skip:]


def test_an_epoch_that_was_left_early() -> None:
    expected = stream(3)
    loader = prepared()
    assert positions(itertools.islice(epoch_batches(loader, 0), 2)) == expected[0][:2]
    assert positions(epoch_batches(loader, 1)) == expected[1]
    assert positions(epoch_batches(loader, 1, 4)) == expected[1][4:]


def test_without_it_a_resumed_run_begins_with_epoch_0() -> None:
    """Why there is one: the sampler was told epoch 2, and iterating the loader tells it 0."""
    loader = prepared()
    loader.batch_sampler.sampler.set_epoch(2)
    assert positions(loader) == stream(1)[0]


def test_wrong_arguments() -> None:
    loader = prepared()
    for arguments, kind, message in (
        ((loader, 0.5), TypeError, "epoch: expected an integer, found 0.5"),
        ((loader, 0, 14), ValueError, "skip_batches: expected 0 to 13, the batches of an epoch, found 14"),
        ((loader, 0, -1), ValueError, "skip_batches: expected 0 to 13"),
        ((loader, -1), ValueError, "epoch: expected an epoch from 0"),
        ((DataLoader(Positions()), 0), TypeError, "loader: expected one with a LongTailSampler, found none"),
    ):
        with pytest.raises(kind, match=message):
            epoch_batches(*arguments)
    sampler = DistributedLongTailSampler(LABELS, num_replicas=2, rank=0)
    other = accelerate.Accelerator(cpu=True).prepare(DataLoader(Positions(), 4, sampler=sampler))
    with pytest.raises(TypeError, match="found DistributedLongTailSampler, which would be shared out twice"):
        epoch_batches(other, 0)


def test_sampler_and_loss_are_stored_with_the_state(tmp_path: Path) -> None:
    """Both have what ``register_for_checkpointing`` asks for, and come back as they were."""
    loss = ltk.losses.LDAMLoss([9, 1], reweight_epoch=2)
    sampler = LongTailSampler(LABELS, seed=3)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.register_for_checkpointing(loss, sampler)
    loss.set_epoch(2)
    drawn = list(itertools.islice(sampler, 30))
    accelerator.save_state(str(tmp_path))
    loss.set_epoch(0)
    sampler.set_epoch(5)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(loss.weight(), loss.weight.weight_at(2))
    assert drawn + list(sampler) == [i for batch in stream(1)[0] for i in batch]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_loader_with_a_state_of_its_own(epoch: int) -> None:
    """Accelerate's state of it has three batches, and no epoch."""
    pytest.importorskip("torchdata.stateful_dataloader")
    expected, loader = stream(3), prepared(use_stateful_dataloader=True)
    for before in range(epoch):
        positions(epoch_batches(loader, before))
    batches = iter(epoch_batches(loader, epoch))
    drawn = [next(batches)["position"].tolist() for _ in range(3)]
    resumed = prepared(use_stateful_dataloader=True)
    resumed.load_state_dict(loader.state_dict())
    assert drawn + positions(epoch_batches(resumed, epoch)) == expected[epoch]
    assert positions(epoch_batches(resumed, epoch + 1)) == expected[epoch + 1]


def test_two_processes(tmp_path: Path) -> None:
    """However Accelerate shares batches out, both together draw the single stream, and go on with it."""
    torchrun(2, ROOT / "tests/integration_worker_accelerate.py", tmp_path)
    ranks = reports(tmp_path)
    for how in ("in turn", *SHARED):
        size = SHARED[how][0] if how in SHARED else BATCH
        for epoch, whole in enumerate(stream(2, size)):
            steps = zip(*(rank[how][epoch] for rank in ranks), strict=True)
            both = [i for step in steps for batch in step for i in batch]
            full = SAMPLES - SAMPLES % (2 * BATCH)  # the last step is filled from the beginning
            assert both[:full] == [i for batch in whole for i in batch][:full], how
            assert set(both[full:]) >= set([i for batch in whole for i in batch][full:]), how
    for rank in ranks:
        assert rank["by itself"] == rank["in turn"]
        assert rank["resumed"] == rank["in turn"][1][2:]
        for how in SHARED:
            assert rank[f"{how}, resumed"] == rank[how][1][2:], how
        assert rank["resumed without"] == rank["in turn"][0][2:] != rank["in turn"][1][2:]


def test_program(tmp_path: Path) -> None:
    """Stopped within the fourth epoch of 14 steps and resumed, it ends with the same figures."""
    import accelerate_loop

    whole = accelerate_loop.main([])
    assert accelerate_loop.main(["--out", str(tmp_path), "--stop-after", "47"]) == {}
    assert accelerate_loop.main(["--out", str(tmp_path), "--resume"]) == whole
    assert whole["few"] > accelerate_loop.main(["--loss", "ce"])["few"] + 0.05


def test_program_in_two_processes() -> None:
    """As users start it: by its path."""
    assert "la, instance sampling" in torchrun(2, PROGRAMS / "accelerate_loop.py", "--epochs", "3")

"""DeviceBatches: the sampler's own stream, drawn and gathered where the data are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ltkernels.samplers import DeviceBatches, DistributedLongTailSampler, LongTailSampler

LABELS = torch.tensor([0] * 60 + [1] * 30 + [2] * 11)[torch.randperm(101, generator=torch.Generator().manual_seed(0))]
DATA = torch.arange(101) * 10
STRATEGIES: dict[str, dict[str, Any]] = {
    "class_balanced": {},
    "square_root": {"replacement": False},
    "instance": {},
    "sample_weight": {"sample_weight": torch.arange(101.0)},
    "m_per_class": {"m": 4, "batch_size": 8},
}


def _sampler(strategy: str = "class_balanced", **options: Any) -> LongTailSampler:
    return LongTailSampler(LABELS, strategy, seed=3, **STRATEGIES[strategy], **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_the_samples_of_the_sampler_epoch_after_epoch(strategy: str, as_on_a_gpu: bool) -> None:
    batches, sampler = DeviceBatches(_sampler(strategy), DATA, LABELS, batch_size=16), _sampler(strategy)
    assert batches._position == batches._epoch == 0
    if as_on_a_gpu:  # where they are tensors
        batches._position, batches._epoch = torch.tensor(0), torch.tensor(0)
        batches.load_state_dict(sampler.state_dict())
    assert len(batches) == len(sampler) // 16
    for _ in range(3):
        expected = list(sampler)
        for at, (data, labels) in enumerate(batches):
            part = torch.tensor(expected[at * 16 : at * 16 + 16])
            assert torch.equal(data, part * 10) and torch.equal(labels, LABELS[part])
            assert batches.indices is not None and torch.equal(batches.indices, part)
        assert at == len(batches) - 1


def test_ranks_share_a_stream() -> None:
    whole = list(_sampler())
    for replicas in (2, 3):
        ranks = [
            DeviceBatches(
                DistributedLongTailSampler(LABELS, seed=3, num_replicas=replicas, rank=rank), DATA, batch_size=5
            )
            for rank in range(replicas)
        ]
        for _ in range(len(ranks[0])):
            for batches in ranks:
                batches()
            step = torch.stack([b.indices for b in ranks if b.indices is not None], dim=1).view(-1).tolist()
            assert step == whole[: len(step)]
            whole = whole[len(step) :]
        whole = list(_sampler())


def test_states_are_the_samplers() -> None:
    batches, sampler = DeviceBatches(_sampler(), DATA, batch_size=10), _sampler()
    for _ in range(4):
        batches()
    sampler.load_state_dict(batches.state_dict())
    rest = list(sampler)
    assert len(rest) == 61 and batches()[0].tolist() == [10 * i for i in rest[:10]]

    other = DeviceBatches(_sampler(), DATA, batch_size=10)
    other.load_state_dict(batches.state_dict())
    assert torch.equal(other()[0], batches()[0])
    # What is left of an epoch is too little for a batch: the next one.
    state = _sampler().state_dict() | {"position": 101}
    other.load_state_dict(state)
    assert other()[0].tolist() == [10 * i for i in _epoch(1)[:10]]
    before = other.state_dict()
    message = "sampler, state_dict: expected a position that is a multiple of 10, the samples of a batch, found 7"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state | {"position": 7})
    with pytest.raises(ValueError, match="state_dict: expected seed 3 as of the sampler, found 4"):
        other.load_state_dict(state | {"seed": 4})
    assert other.state_dict() == before


def _epoch(epoch: int) -> list[int]:
    sampler = _sampler()
    sampler.set_epoch(epoch)
    return list(sampler)


def test_from_a_sampler_that_is_somewhere() -> None:
    for position, epoch, start in ((0, 0, 0), (40, 0, 40), (100, 1, 0), (101, 1, 0)):
        sampler = _sampler()
        sampler.load_state_dict(sampler.state_dict() | {"position": position})
        batches = DeviceBatches(sampler, DATA, batch_size=10)
        assert batches()[0].tolist() == [10 * i for i in _epoch(epoch)[start : start + 10]]


def test_from_a_sampler_that_is_under_way() -> None:
    """After its last whole batch the next epoch begins; in the middle of a batch there is no place to begin."""
    for taken in (20, 100):
        sampler = _sampler()
        begun = iter(sampler)
        for _ in range(taken):
            next(begun)
        batches = DeviceBatches(sampler, DATA, batch_size=10)
        assert [len(list(batches)) for _ in range(2)] == ([8, 10] if taken == 20 else [10, 10])
    sampler = _sampler()
    next(iter(sampler))
    with pytest.raises(
        ValueError, match="expected a position that is a multiple of 10, the samples of a batch, found 1"
    ):
        DeviceBatches(sampler, DATA, batch_size=10)


def test_the_rest_of_an_epoch_after_a_break() -> None:
    batches = DeviceBatches(_sampler(), DATA, batch_size=10)
    for at, _ in enumerate(batches):
        if at == 3:
            break
    assert len(list(batches)) == 6 and len(list(batches)) == 10


WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "sampler": (TypeError, "sampler: expected a LongTailSampler, found list", {"sampler": [0]}),
    "strategy": (
        ValueError,
        "sampler: expected a strategy that is the same in every epoch, found Progressive(epochs=3, replacement=True)",
        {"sampler": LongTailSampler(LABELS, "progressive", epochs=3)},
    ),
    "no data": (ValueError, "tensors: expected at least one, found none", {"tensors": ()}),
    "data": (TypeError, "tensors[0]: expected a torch.Tensor, found list", {"tensors": ([1],)}),
    "too few": (
        ValueError, "tensors[1]: expected at least 101 samples, found shape (100,)", {"tensors": (DATA, DATA[1:])},
    ),
    "device": (
        ValueError, "tensors[1]: expected device cpu as of tensors[0], found meta",
        {"tensors": (DATA, torch.zeros(101, device="meta"))},
    ),
    "batch": (
        ValueError, "batch_size: expected 1 to 101, the samples of an epoch, found 102", {"batch_size": 102},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    exception, message, changes = WRONG[name]
    call: dict[str, Any] = {"sampler": _sampler(), "tensors": (DATA,), "batch_size": 8} | changes
    with pytest.raises(exception) as raised:
        DeviceBatches(call["sampler"], *call["tensors"], batch_size=call["batch_size"])
    assert str(raised.value) == message


@pytest.mark.gpu
def test_replays_of_a_graph_go_on_in_the_stream() -> None:
    batches = DeviceBatches(_sampler(), DATA.cuda(), batch_size=10)
    expected = _epoch(0)[:100] + _epoch(1)[:100]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        warm = batches()[0].tolist()
    torch.cuda.current_stream().wait_stream(side)
    assert warm == [10 * i for i in expected[:10]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (data,) = batches()
    for at in range(1, 20):
        graph.replay()
        assert data.tolist() == [10 * i for i in expected[at * 10 : at * 10 + 10]]

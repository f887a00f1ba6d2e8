"""One stream for several ranks: whatever W is, together they draw it, and a run goes on with any other W."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from ltkernels.samplers import DistributedLongTailSampler, LongTailBatchSampler, LongTailSampler

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [40, 17, 9, 3, 1]))
N = len(LABELS)
STRATEGIES: list[tuple[str, dict[str, Any]]] = [
    ("instance", {}),
    ("class_balanced", {}),
    ("class_balanced", {"replacement": False}),
    ("square_root", {"replacement": False}),
    ("progressive", {"epochs": 3}),
    ("sample_weight", {"sample_weight": np.arange(N)}),
    ("class_aware", {"draws_per_class": 3}),
    ("m_per_class", {"m": 2, "batch_size": 6}),
]
strategies = st.sampled_from(STRATEGIES)
seeds = st.integers(-(2**63), 2**63 - 1)
worlds = st.integers(1, 9)
lengths = st.one_of(st.none(), st.integers(1, 300))


def single(strategy: tuple[str, dict[str, Any]], seed: int, length: int | None) -> LongTailSampler:
    return LongTailSampler(LABELS, strategy[0], seed=seed, num_samples=length, **strategy[1])


def ranks(
    strategy: tuple[str, dict[str, Any]], seed: int, length: int | None, world: int, drop_last: bool
) -> list[DistributedLongTailSampler]:
    name, options = strategy
    return [
        DistributedLongTailSampler(
            LABELS, name, num_replicas=world, rank=r, seed=seed, drop_last=drop_last, num_samples=length, **options
        )
        for r in range(world)
    ]


def interleaved(parts: list[list[int]]) -> list[int]:
    """The samples of all ranks, step by step. Ranks have the same number of steps, or this raises."""
    return [i for step in zip(*parts, strict=True) for i in step]


def as_torch_does(indices: list[int], world: int, drop_last: bool) -> list[int]:
    """What all ranks of torch's DistributedSampler together draw of an epoch, with padding or without the rest."""
    at = [list(DistributedSampler(range(len(indices)), world, r, False, 0, drop_last)) for r in range(world)]
    return [indices[i] for i in interleaved(at)]


@given(strategy=strategies, seed=seeds, length=lengths, world=worlds, drop_last=st.booleans())
def test_the_union_of_the_ranks_is_the_single_stream(
    strategy: tuple[str, dict[str, Any]], seed: int, length: int | None, world: int, drop_last: bool
) -> None:
    one, parts = single(strategy, seed, length), ranks(strategy, seed, length, world, drop_last)
    for _ in range(3):
        expected = as_torch_does(list(one), world, drop_last)
        assert interleaved([part.indices(0, len(part)).tolist() for part in parts]) == expected
        assert interleaved([list(part) for part in parts]) == expected
        assert [len(part) for part in parts] == [len(expected) // world] * world
        assert all(part.total_size == len(expected) for part in parts)
        assert [part.epoch for part in parts] == [one.epoch] * world


stages = st.lists(st.tuples(worlds, st.integers(0, 40)), min_size=1, max_size=5)  # numbers of ranks, and of steps


@given(strategy=strategies, seed=seeds, length=lengths, stages=stages, batch=st.integers(0, 4), drop_last=st.booleans())
def test_a_run_goes_on_with_any_number_of_ranks(
    strategy: tuple[str, dict[str, Any]],
    seed: int,
    length: int | None,
    stages: list[tuple[int, int]],
    batch: int,
    drop_last: bool,
) -> None:
    """Stopped and resumed with other numbers of ranks, all together draw the single stream without gap or repetition.

    ``batch`` 0 is samplers, else batch samplers. A stage draws some steps and consumes all but the last, so that it
    ends in the middle of what it drew, and before any padding.
    """
    one = single(strategy, seed, length)
    whole = [i for _ in range(len(stages) + 2) for i in one]
    one.set_epoch(0)
    state = one.state_dict()

    def start() -> int:
        return int(state["epoch"] * state["num_samples"] + state["position"])

    for world, steps in stages:
        at, states, drawn = start(), [], []
        for part in ranks(strategy, 1, length, world, drop_last):  # another seed: the state's counts
            loaded: Any = LongTailBatchSampler(part, batch, drop_last) if batch else part
            loaded.load_state_dict(json.loads(json.dumps(state)))
            before = part.start
            taken = [step if batch else [step] for step in itertools.islice(loaded, steps)]
            kept = [i for step in taken[:-1] for i in step]
            states.append(loaded.state_dict(consumed=before + len(kept)))
            drawn.append(kept)
        assert all(other == states[0] for other in states)
        together = interleaved(drawn)
        assert together == whole[at : at + len(together)]
        state = states[0]
        at_end = state["position"] == state["num_samples"]
        assert start() == at + len(together) or (drop_last and not together and at_end)  # nothing but a rest was left

    again = single(strategy, 1, length)
    at = start()
    again.load_state_dict(state)
    assert list(again) == whole[at : (at // state["num_samples"] + 1) * state["num_samples"]]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world", [3, 100, 300])  # with 70 samples also more ranks than samples, and than twice as many
def test_the_last_step_of_an_epoch_ends_it(world: int, drop_last: bool) -> None:
    """Also where padding or a dropped rest would let a position look like the middle of an epoch to other ranks."""
    for part in ranks(("class_balanced", {}), 0, None, world, drop_last)[:: max(world // 3, 1)]:
        taken = list(itertools.islice(part, len(part)))
        assert len(taken) == len(part)
        by_count = part.state_dict(consumed=len(taken))
        assert (by_count["epoch"], by_count["position"]) == (0, N)
        assert part.state_dict() == by_count or not taken
        other = single(("class_balanced", {}), 0, None)
        other.load_state_dict(by_count)
        assert other.epoch == 1


def test_m_per_class_on_ranks() -> None:
    """``batch_size`` of all ranks: each has as many samples of the same classes."""
    parts = ranks(("m_per_class", {"m": 4, "batch_size": 12}), 0, 120, 2, False)
    for step in zip(*(LongTailBatchSampler(part, 6) for part in parts), strict=True):
        counts = [np.bincount(LABELS[batch], minlength=5).tolist() for batch in step]
        assert counts[0] == counts[1]
        assert sorted(counts[0]) == [0, 0, 2, 2, 2]


def work(rank: int, folder: str) -> None:
    """One of three processes that are process groups of one, two and three ranks, one after the other."""
    for world in (1, 2, 3):
        if rank >= world:
            continue
        dist.init_process_group(
            "gloo", store=dist.FileStore(f"{folder}/store{world}", world), rank=rank, world_size=world
        )
        sampler = DistributedLongTailSampler(LABELS, "square_root", seed=4)
        epochs = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            steps = []
            for index in sampler:
                gathered = [0] * world
                dist.all_gather_object(gathered, index)
                steps += gathered
            epochs.append(steps)
        if rank == 0:
            Path(folder, f"{world}.json").write_text(json.dumps(epochs))
        dist.destroy_process_group()


def test_processes() -> None:
    """Ranks are those of the process group; what they draw at the same time is the single stream."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder,), nprocs=3)
        one = LongTailSampler(LABELS, "square_root", seed=4)
        epochs = [list(one) for _ in range(2)]
        for world in (1, 2, 3):
            expected = [as_torch_does(epoch, world, False) for epoch in epochs]
            assert json.loads(Path(folder, f"{world}.json").read_text()) == expected


def test_is_a_distributed_sampler() -> None:
    """Lightning leaves a sampler alone if it is one; its keywords and attributes are torch's."""
    part = DistributedLongTailSampler(LABELS, num_replicas=4, rank=1, shuffle=True, seed=3, drop_last=True)
    assert isinstance(part, DistributedSampler)
    assert (part.num_replicas, part.rank, part.shuffle, part.seed, part.drop_last) == (4, 1, True, 3, True)
    assert (part.num_samples, part.total_size, part.epoch, len(part.dataset)) == (N // 4, N // 4 * 4, 0, N)
    part.set_epoch(5)
    assert part.epoch == 5
    assert repr(part).startswith("DistributedLongTailSampler(")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shuffle": False}, ValueError, "shuffle: expected True"),
        ({"drop_last": 1}, TypeError, "drop_last: expected a bool, found 1"),
        ({"num_replicas": 0}, ValueError, "num_replicas: expected at least 1, found 0"),
        ({"num_replicas": 2.0}, TypeError, "num_replicas: expected an integer, found 2.0"),
        ({"rank": 2}, ValueError, "rank: expected 0 to 1, found 2"),
        ({"rank": -1}, ValueError, "rank: expected 0 to 1, found -1"),
        ({"rank": None}, RuntimeError, "num_replicas, rank: expected both, or a process group"),
        ({"beta": 0.9}, TypeError, "beta: expected parameters of strategy 'class_balanced'"),
    ],
)
def test_wrong_calls(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DistributedLongTailSampler(LABELS, **{"num_replicas": 2, "rank": 0, **options})

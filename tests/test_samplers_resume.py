"""States of samplers: exact wherever they are taken, small, refused where they do not fit, and good after a kill."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltkernels.samplers import ClassIndex, DistributedLongTailSampler, LongTailBatchSampler, LongTailSampler

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [30, 9, 3, 1]))
N = len(LABELS)


def sampler(**options: Any) -> LongTailSampler:
    return LongTailSampler(LABELS, **{"seed": 7, **options})


def resumed(state: dict[str, Any], **options: Any) -> LongTailSampler:
    """A sampler in a new process, whose seed does not matter, from a state that was a JSON file meanwhile."""
    other = sampler(seed=0, **options)
    other.load_state_dict(json.loads(json.dumps(state)))
    return other


EPOCHS = [list(s) for s in [sampler()] for _ in range(4)]
STREAM = [i for epoch in EPOCHS for i in epoch]


def test_the_state_is_small_and_says_what_it_is() -> None:
    drawn = LongTailSampler(np.arange(100_000), "progressive", epochs=3, seed=-5)
    iterator = iter(drawn)
    for _ in range(12_345):
        next(iterator)
    state = drawn.state_dict()
    assert state == {
        "version": 1,
        "seed": -5,
        "epoch": 0,
        "position": 12_345,
        "num_samples": 100_000,
        "strategy": "Progressive(epochs=3, replacement=True)",
        "fingerprint": drawn.class_index.fingerprint,
    }
    assert len(json.dumps(state)) < 300
    assert iterator.state_dict() == state


@pytest.mark.parametrize("at", [0, 1, 10, 255, 256, 257, 1279, 1280, 1281, 5000, 21_760, 30_000])
def test_every_position_is_exact(at: int) -> None:
    """Around the ends of pieces too, which are made at 256, 1280, 5376, 21760, ... samples."""
    whole = sampler(num_samples=30_000)
    iterator = iter(whole)
    taken = list(islice(iterator, at))
    state = whole.state_dict()
    assert (state["epoch"], state["position"]) == (0, at)
    rest = list(iterator)
    assert len(taken) + len(rest) == 30_000
    again = resumed(state, num_samples=30_000)
    if at < 30_000:
        assert list(again) == rest
    assert list(again) == list(whole)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, N, N + 1, 300])
@pytest.mark.parametrize("length", [N, 1000])
def test_every_batch_is_exact(batch_size: int, drop_last: bool, length: int) -> None:
    """Batch sizes that divide the epoch, that do not, larger than it, and larger than the first piece."""
    batches = LongTailBatchSampler(sampler(num_samples=length), batch_size, drop_last)
    whole = list(LongTailBatchSampler(sampler(num_samples=length), batch_size, drop_last))
    assert len(batches) == len(whole)
    iterator = iter(batches)
    for at in range(len(whole)):
        again = LongTailBatchSampler(resumed(batches.state_dict(), num_samples=length), batch_size, drop_last)
        assert list(again) == whole[at:]
        assert next(iterator) == whole[at]
    assert batches.state_dict()["position"] == (length if whole else 0)
    assert list(iterator) == []
    assert batches.state_dict()["epoch"] == 1


@pytest.mark.parametrize("use_set_epoch", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 20, N - 1, N, "end"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_loops_go_on_where_they_stopped(epoch: int, taken: int | str, use_set_epoch: bool) -> None:
    """A training loop that starts from a state sees what was left of the epoch, then the epochs that follow."""
    first = sampler()
    for e in range(epoch):
        first.set_epoch(e)
        list(first)
    first.set_epoch(epoch)
    iterator = iter(first)
    if taken == "end":
        list(iterator)
    elif isinstance(taken, int):
        list(islice(iterator, taken))
    second = resumed(first.state_dict())
    start = epoch + (taken in (N, "end"))
    assert second.epoch == start
    seen = []
    for e in range(second.epoch, 4):
        if use_set_epoch:
            second.set_epoch(e)
        seen.append(list(second))
    assert [i for one in seen for i in one] == STREAM[epoch * N + (N if taken == "end" else int(taken)) :]
    assert [len(one) for one in seen[1:]] == [N] * (3 - start)


def test_an_epoch_that_has_ended_is_empty_for_a_loop_that_insists() -> None:
    """The state of an epoch's last step says which epoch that was: set_epoch with it does not start it again."""
    first = sampler()
    list(islice(first, N))
    state = first.state_dict()
    second = resumed(state)
    second.set_epoch(0)
    assert second.state_dict() == {**state, "seed": 7}
    assert list(second) == []
    assert list(second) == EPOCHS[1]


def test_set_epoch() -> None:
    drawn = sampler()
    drawn.set_epoch(2)
    assert list(drawn) == EPOCHS[2]
    assert list(drawn) == EPOCHS[3]
    drawn.set_epoch(3)  # once more
    assert list(drawn) == EPOCHS[3]
    drawn.load_state_dict(sampler().state_dict() | {"epoch": 1, "position": 5})
    drawn.set_epoch(1)  # what comes anyway
    assert list(drawn) == EPOCHS[1][5:]
    drawn.load_state_dict(sampler().state_dict() | {"epoch": 1, "position": 5})
    drawn.set_epoch(2)
    assert list(drawn) == EPOCHS[2]


def test_set_epoch_during_an_iteration() -> None:
    """Some set the epoch when the loader has drawn ahead already; the iteration that runs keeps its account."""
    drawn = sampler()
    iterator = iter(drawn)
    taken = [next(iterator)]
    drawn.set_epoch(0)
    assert drawn.state_dict()["position"] == 1
    assert taken + list(iterator) == EPOCHS[0]
    assert list(drawn) == EPOCHS[1]
    iterator = iter(drawn)
    next(iterator)
    drawn.set_epoch(0)  # leaves epoch 2
    state = drawn.state_dict()
    assert (state["epoch"], state["position"]) == (0, 0)
    assert len(list(iterator)) == N - 1
    assert drawn.epoch == 0
    assert list(drawn) == EPOCHS[0]


def test_consumed_samples() -> None:
    """They are those of the epoch, also in one that was resumed, whatever was drawn ahead."""
    first = sampler()
    list(first)  # all of epoch 0 is drawn ahead ...
    state = first.state_dict(consumed=12)  # ... of which 12 were used
    assert (state["epoch"], state["position"]) == (0, 12)
    assert first.state_dict()["epoch"] == 1
    second = resumed(state)
    assert second.start == 12
    assert second.state_dict(consumed=15)["position"] == 15  # not begun yet
    assert list(second) == EPOCHS[0][12:]
    assert second.start == 0  # of the next iteration
    assert second.state_dict(consumed=15)["position"] == 15
    assert second.state_dict(consumed=N)["position"] == N
    second.set_epoch(1)
    assert second.state_dict(consumed=3) == {**state, "epoch": 1, "position": 3}
    for wrong, error in ((N + 1, ValueError), (-1, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match="consumed: expected"):
            second.state_dict(consumed=wrong)  # type: ignore[arg-type]


def test_states_of_iterators() -> None:
    """An iterator that was loaded goes on by itself; one that has begun cannot be moved."""
    first = sampler()
    iterator = iter(first)
    list(islice(iterator, 9))
    state = iterator.state_dict()
    second = sampler(seed=0)
    other = iter(second)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert list(other) == EPOCHS[0][9:]
    assert second.epoch == 1
    with pytest.raises(RuntimeError, match="state_dict: expected an iterator that has not begun"):
        other.load_state_dict(state)


STATE = sampler().state_dict() | {"epoch": 1, "position": 4}
REFUSED: list[tuple[Any, type[Exception], str]] = [
    (None, TypeError, "state_dict: expected a dict, found NoneType"),
    ([1], TypeError, "state_dict: expected a dict, found list"),
    ({}, ValueError, "state_dict: expected version 1, found None"),
    ({**STATE, "version": 2}, ValueError, "state_dict: expected version 1, found 2"),
    ({k: v for k, v in STATE.items() if k != "seed"}, ValueError, "state_dict: expected all of .*, found no seed"),
    ({**STATE, "strategy": "ClassAware()"}, ValueError, r"the strategy of this sampler, Power.*, found ClassAware\(\)"),
    ({**STATE, "fingerprint": "0" * 32}, ValueError, "state_dict: expected the data of this sampler, .* found 000"),
    ({**STATE, "num_samples": 44}, ValueError, "state_dict: expected the num_samples of this sampler, 43, found 44"),
    ({**STATE, "position": 44}, ValueError, "state_dict: expected a position from 0 to 43, found 44"),
    ({**STATE, "position": -1}, ValueError, "state_dict: expected a position from 0 to 43, found -1"),
    ({**STATE, "position": "4"}, TypeError, r"state_dict\['position'\]: expected an integer, found '4'"),
    ({**STATE, "position": math.nan}, TypeError, r"state_dict\['position'\]: expected an integer, found nan"),
    ({**STATE, "epoch": -1}, ValueError, r"state_dict\['epoch'\]: expected an epoch from 0"),
    ({**STATE, "epoch": 1.5}, TypeError, r"state_dict\['epoch'\]: expected an integer, found 1.5"),
    ({**STATE, "seed": True}, TypeError, r"state_dict\['seed'\]: expected an integer, found True"),
]
OTHERS: list[tuple[Callable[[], LongTailSampler], str]] = [
    (lambda: LongTailSampler(np.roll(LABELS, 1)), "data"),
    (lambda: LongTailSampler(LABELS[:-1]), "data"),
    (lambda: LongTailSampler(LABELS, indices=np.arange(N - 1)), "data"),
    (lambda: LongTailSampler(LABELS, "instance"), "strategy"),
    (lambda: LongTailSampler(LABELS, replacement=False), "strategy"),
    (lambda: LongTailSampler(LABELS, num_samples=100), "num_samples"),
]


@pytest.mark.parametrize(("state", "error", "message"), REFUSED)
@pytest.mark.parametrize("begun", [False, True])
def test_a_state_that_is_refused_changes_nothing(state: Any, error: type[Exception], message: str, begun: bool) -> None:
    drawn = sampler()
    drawn.load_state_dict(STATE)
    iterator = iter(drawn)
    if begun:
        next(iterator)
    before = dict(drawn.__dict__), drawn.state_dict()
    for refuses in (drawn, LongTailBatchSampler(drawn, 3), iter(drawn)):
        with pytest.raises(error, match=message):
            refuses.load_state_dict(state)
    assert (dict(drawn.__dict__), drawn.state_dict()) == before
    assert list(iterator) == EPOCHS[1][4 + begun :]


@pytest.mark.parametrize(("other", "what"), OTHERS)
def test_a_state_of_something_else_is_refused(other: Callable[[], LongTailSampler], what: str) -> None:
    for state in (STATE, sampler().state_dict()):
        with pytest.raises(ValueError, match=f"state_dict: expected the {what} of this sampler"):
            other().load_state_dict(state)


def test_weights_are_part_of_the_strategy() -> None:
    state = sampler(strategy="class_weight", class_weight=[1, 2, 3, 4]).state_dict()
    resumed(state, strategy="class_weight", class_weight=np.array([1.0, 2, 3, 4]))
    with pytest.raises(ValueError, match="state_dict: expected the strategy of this sampler"):
        resumed(state, strategy="class_weight", class_weight=[1, 2, 3, 5])


def test_states_fit_what_is_the_same() -> None:
    """Labels in another form, the same strategy by another name, ranks and single processes."""
    state = sampler(strategy="square_root").state_dict()
    for labels in (LABELS.tolist(), ClassIndex(LABELS), [f"{c}" for c in LABELS]):
        LongTailSampler(labels, "power", power=0.5).load_state_dict(state)
    ranks = DistributedLongTailSampler(LABELS, "square_root", num_replicas=2, rank=1)
    ranks.load_state_dict(state)
    assert ranks.state_dict() == state


def test_strategies_that_change_by_epoch() -> None:
    """The tables of the epoch that a state is in, not of the one before."""
    options: dict[str, Any] = {"strategy": "progressive", "epochs": 3}
    first = sampler(**options)
    epochs = [list(first) for _ in range(3)]
    for epoch in (2, 0, 1):
        second = resumed(first.state_dict() | {"epoch": epoch, "position": 20}, **options)
        assert second.indices(0, N).tolist() == epochs[epoch]
        assert list(second) == epochs[epoch][20:]


EPOCHS_OF_TRAINING = 250  # about a second


def train(folder: Path) -> None:
    """Logs each batch, then stores the state, as training does with a checkpoint; killed anywhere, also between."""
    batches = LongTailBatchSampler(sampler(strategy="square_root", replacement=False), 5)
    checkpoint, log = folder / "state.json", folder / "log"
    done = 0
    if checkpoint.exists():
        saved = json.loads(checkpoint.read_text())
        batches.load_state_dict(saved["sampler"])
        done = saved["done"]
    with open(log, "r+b" if log.exists() else "w+b") as file:
        file.truncate(done)  # what no state knows of did not happen
        file.seek(done)
        while True:
            for batch in batches:
                file.write(b"".join(b"%d " % i for i in batch))
                file.flush()
                (folder / "new.json").write_text(json.dumps({"sampler": batches.state_dict(), "done": file.tell()}))
                os.replace(folder / "new.json", checkpoint)
                if batches.sampler.epoch >= EPOCHS_OF_TRAINING:
                    os._exit(0)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL, again and again, at moments that range from before the first step to several epochs later."""
    moments = random.Random(0)
    context = multiprocessing.get_context("fork")
    kills = 0
    while True:
        process = context.Process(target=train, args=(tmp_path,))
        process.start()
        process.join(moments.uniform(0.003, 0.03) if kills < 20 else 60)
        if process.exitcode is None:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode != -signal.SIGKILL:
            break
    assert process.exitcode == 0
    assert kills >= 4
    whole = sampler(strategy="square_root", replacement=False)
    expected = [i for _ in range(EPOCHS_OF_TRAINING) for i in whole]
    found = [int(i) for i in (tmp_path / "log").read_text().split()]
    assert found[: len(expected)] == expected
    assert found[len(expected) :] == whole.indices(0, 5).tolist()

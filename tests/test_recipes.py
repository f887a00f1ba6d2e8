"""Stage two of decoupled training: every method against its published definition, and the program as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint
import longtail_data
import longtail_features
import longtail_run
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import workers
from longtail_cases import PROGRAM, load, settings
from longtail_features import Stage, stage_one
from longtail_model import Batches
from recipes import crt

import ltkernels as ltk

KINDS = ("un", "l2n", "cl2n")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """417 images of 10 classes, 124 to 6 of each."""
    torch.set_num_threads(1)
    return stage_one("digits", 0, tmp_path_factory.mktemp("digits") / "ce.pt")


@pytest.fixture(scope="module")
def airports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program writes for 170 countries, the largest with 12,438 airports: one seed, one epoch of stage two."""
    out = tmp_path_factory.mktemp("airports")
    assert crt.main(["--seeds", "1", "--epochs", "1", "--out", str(out)]) == 0
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


# ------------------------------------------------------------------------------------------------------------ stage one


def test_stage_one_is_the_demos_and_its_features_give_its_logits(digits: Stage) -> None:
    data = load("digits")
    part = longtail_data.split(data, 0)
    run = longtail_run.Run(settings("ce", epochs=40), data, Batches(data))
    for _ in range(run.total_steps):
        run.train_step()
    assert torch.equal(digits.labels, run.labels[torch.from_numpy(part.train)])
    torch.testing.assert_close(digits.head(digits.test_features), run.logits(run.test), rtol=0, atol=0)
    torch.testing.assert_close(digits.head(digits.features), run.logits(run.train), rtol=0, atol=0)
    assert not digits.head.weight.requires_grad and digits.num_classes == 10


def test_stage_one_goes_on_from_its_checkpoint(digits: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the middle of an epoch; from the end without a step; from another run not at all."""
    kept, data = tmp_path / "ce.pt", load("digits")
    run = longtail_run.Run(settings("ce", epochs=40), data, Batches(data))
    for _ in range(20):
        run.train_step()
    checkpoint.save(kept, run.config, run.state_dict())
    resumed = stage_one("digits", 0, kept, resume=True)
    assert torch.equal(resumed.features, digits.features) and torch.equal(resumed.head.weight, digits.head.weight)

    monkeypatch.setattr(longtail_run.Run, "train_step", lambda self: pytest.fail("trained again"))
    again = stage_one("digits", 0, kept, resume=True)
    assert torch.equal(again.features, digits.features) and torch.equal(again.head.bias, digits.head.bias)
    with pytest.raises(workers.UserError, match="written with seed 0; this call has seed 1"):
        stage_one("digits", 1, kept, resume=True)


def test_a_validation_stage_knows_nothing_of_the_test_part(tmp_path: Path) -> None:
    whole = longtail_data.split(load("digits"), 0)
    stage = stage_one("digits", 0, tmp_path / "ce.pt", validate=True)
    held_out, used = stage.run.test.numpy(), stage.run.train.numpy()
    assert set(held_out) | set(used) == set(whole.train) and not set(held_out) & set(used)
    assert len(stage.features) == len(used) and len(stage.test_features) == len(held_out)


# ------------------------------------------------------------------------------------------------------------ stage two


def test_batches_have_every_class_equally_often(digits: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch is the published one, C n_max samples, or 11 times the data where that would be longer."""
    batches = crt.balanced_batches(digits, digits.features, seed=0)
    assert len(batches.sampler) == 10 * 124 and batches.batch_size == 512
    _, labels = batches()
    in_turn = labels.view(-1, 4)
    assert (in_turn == in_turn[:, :1]).all()  # four of a class at a time
    assert set(labels.bincount(minlength=10).tolist()) <= {48, 52}  # 128 groups of 10 classes

    monkeypatch.setattr(digits.run, "class_counts", torch.full((10,), 10_000))
    assert len(crt.balanced_batches(digits, digits.features, 0).sampler) == 11 * len(digits.labels)
    monkeypatch.setattr(digits.run, "class_counts", torch.full((10,), 12))
    assert crt.balanced_batches(digits, digits.features, 0).batch_size == 120  # no epoch is less than a batch


def _plainly(stage: Stage, rows: torch.Tensor, learnt: list[torch.Tensor], loss_of: Any, epochs: int) -> None:
    """The same training in float64 and in plain PyTorch, on the same samples."""
    optimizer = torch.optim.SGD(learnt, 0.2, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    batches = crt.balanced_batches(stage, torch.arange(len(rows)), seed=3)
    for _ in range(epochs):
        for indices, labels in batches:
            optimizer.zero_grad()
            loss_of(rows[indices], labels).backward()
            optimizer.step()
        schedule.step()


def test_crt_is_plain_training_on_balanced_batches(digits: Stage) -> None:
    torch.manual_seed(3)
    head = torch.nn.Linear(64, 10)
    head.double()
    _plainly(digits, digits.features.double(), list(head.parameters()), lambda x, y: F.cross_entropy(head(x), y), 10)
    found = crt.crt(digits, 10, seed=3)
    expected = head(digits.test_features.double()).float()
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    assert found.notes["samples"] == 10 * 2 * 512
    assert found.notes["samples_per_second"] == pytest.approx(10_240 / found.notes["seconds"])


@pytest.mark.parametrize("most", [crt.MOST_LOGITS, 0])
def test_lws_learns_scales_alone(most: int, digits: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all logits kept and, ``most`` 0, computed batch by batch."""
    monkeypatch.setattr(crt, "MOST_LOGITS", most)
    before = digits.head.weight.clone()
    fixed = digits.head(digits.features).double()
    scale = torch.ones(10, dtype=torch.float64, requires_grad=True)
    _plainly(digits, fixed, [scale], lambda z, y: F.cross_entropy(z * scale, y), 5)
    found = crt.lws(digits, 5, seed=3).logits
    expected = (digits.head(digits.test_features) * scale.detach()).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(digits.head.weight, before) and float((scale.detach() - 1).abs().max()) > 0.05


def test_a_loss_that_diverges_is_told(digits: Stage) -> None:
    broken = Stage(digits.features * torch.inf, digits.labels, digits.test_features, digits.head, digits.run)
    with pytest.raises(workers.UserError, match="stage two: the loss is nan in the last of 1 epochs"):
        crt.crt(broken, 1, seed=0)


def test_tau_is_the_best_and_smallest(digits: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = digits.head.weight
    for tau in (0.0, 0.7, 2.0):
        expected = digits.test_features @ (weight / weight.norm(dim=1, keepdim=True) ** tau).T  # without bias
        torch.testing.assert_close(crt.tau_normalised(digits, tau).logits, expected)
    balanced = [digits.figures(crt.tau_normalised(digits, tau).logits)["balanced"] for tau in crt.TAUS]
    assert len(crt.TAUS) == 21 and crt.TAUS[0] == 0.0 and crt.TAUS[-1] == 2.0
    assert crt.best_tau(digits) == crt.TAUS[int(np.argmax(balanced))]  # argmax takes the first of equal ones
    seen = iter([0.1, 0.5, 0.5, *[0.2] * 18])
    monkeypatch.setattr(Stage, "figures", lambda self, logits: {"balanced": next(seen)})
    assert crt.best_tau(digits) == 0.1


@pytest.mark.parametrize("samples", [1, 7, 1000])  # fewer than classes, so that some are empty; a class of 1; many
def test_class_means(samples: int) -> None:
    labels = torch.randint(5, (samples,))
    features = torch.randn(samples, 33) + 10
    found = crt.class_means(features, labels, 6)
    for c in range(6):
        of_class = features[labels == c].double()
        expected = of_class.mean(0).float() if len(of_class) else torch.zeros(33)
        torch.testing.assert_close(found[c], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_class_means_as_published(kind: str, digits: Stage) -> None:
    """Class by class in NumPy and in float64: centroids of transformed features, squared distances to them."""
    train, test = digits.features.double().numpy(), digits.test_features.double().numpy()
    if kind == "cl2n":
        train, test = train - train.mean(0), test - train.mean(0)
    if kind != "un":
        train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    centroids = np.stack([train[digits.labels.numpy() == c].mean(0) for c in range(10)])
    distance = np.square(test[:, None] - centroids).sum(2)
    found = crt.nearest_class_mean(digits, kind).logits
    up_to_the_row = found.double().numpy() - np.square(test).sum(1, keepdims=True)
    np.testing.assert_allclose(up_to_the_row, -distance, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- the program


@pytest.mark.parametrize("name", ["crt", "lws", "tau", *(f"ncm {kind}" for kind in KINDS)])
def test_every_method_helps_few_shot_classes(name: str, airports: dict[str, Any]) -> None:
    """By one point at least of stage one's 7 to 8 %; that costs less than they gain in balanced accuracy."""
    means = {
        method: {metric: value["mean"] for metric, value in found["accuracy"].items()}
        for method, found in airports["methods"].items()
    }
    assert means[name]["few"] > means["stage one"]["few"] + 0.01
    assert means[name]["balanced"] > means["stage one"]["balanced"]
    assert means[name]["prior_weighted"] < means["stage one"]["prior_weighted"]


def test_the_notes_of_the_methods(airports: dict[str, Any]) -> None:
    [of_crt], [of_tau] = (airports["methods"][name]["notes"] for name in ("crt", "tau"))
    assert of_crt["samples"] == 11 * 25_768 // 512 * 512 and of_crt["samples_per_second"] > 0
    assert of_tau["tau"] in crt.TAUS


def _figures(out: Path) -> dict[str, Any]:
    methods = json.loads((out / "results.json").read_text())["methods"]
    return {name: found["accuracy"] for name, found in methods.items()}


def test_the_program_from_another_folder(tmp_path: Path) -> None:
    """Prints the table and writes what it printed; a second call ends with the same bits, also on old features."""
    command = [sys.executable, str(PROGRAM / "recipes" / "crt.py"), "--data", "digits", "--seeds", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    out = tmp_path / "runs" / "crt" / "digits"
    figures = _figures(out)
    assert list(figures) == ["stage one", "crt", "lws", "tau", *(f"ncm {kind}" for kind in KINDS)]
    for name, accuracy in figures.items():
        [line] = [line for line in done.stdout.splitlines() if line.startswith(f" {crt.TITLES[name]}  ")]
        few = accuracy["few"]
        assert f"{100 * few['mean']:.1f}±{100 * few['sd']:.1f}" in line
    assert f"seed 1: {crt.TITLES['crt']} saw 10,240 samples" in done.stdout
    again = tmp_path / "again"
    assert crt.main(["--data", "digits", "--out", str(again)]) == 0
    assert _figures(again) == figures
    assert crt.main(["--data", "digits", "--out", str(out), "--resume"]) == 0
    assert _figures(out) == figures


def test_some_methods_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["--data", "digits", "--seeds", "1", "--method", "lws", "crt", "--epochs", "2", "--out", str(tmp_path)]
    assert crt.main(call) == 0
    assert list(_figures(tmp_path)) == ["stage one", "crt", "lws"]
    assert "one seed, so no spread" in capsys.readouterr().out
    assert not (tmp_path / "ce-seed0-validation.pt").exists()  # that is tau's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "bbn"], "argument --method: invalid choice: 'bbn'"),
        (["--epochs", "0"], "argument --epochs: expected a whole number >= 1, found '0'"),
        (["--seeds", "two"], "argument --seeds: expected a whole number >= 1, found 'two'"),
        (["--data", "imagenet"], "argument --data: invalid choice: 'imagenet'"),
        (["--out", __file__], "argument --out: expected a folder, found the file"),
    ],
)
def test_wrong_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        crt.main(options)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_failures_are_sentences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ce-seed0.pt").write_bytes(b"not a checkpoint")
    call = ["--data", "digits", "--seeds", "1", "--out", str(tmp_path)]
    assert crt.main([*call, "--resume"]) == 1
    assert "ce-seed0.pt is not a readable checkpoint" in capsys.readouterr().err
    monkeypatch.setattr(crt, "stage_one", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    assert crt.main(call) == 130
    monkeypatch.setattr(longtail_features.longtail_run, "load_data", _no_package)
    monkeypatch.setattr(crt, "stage_one", stage_one)
    assert crt.main(call) == 1
    assert capsys.readouterr().err == "crt.py: this data comes inside the package nowhere\n"


def _no_package(name: str) -> Any:
    raise longtail_data.MissingPackageError("this data comes inside the package nowhere")


def test_the_figures_are_of_ltkernels_ops(digits: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that quietly used PyTorch's own loss would show nothing."""
    called = []
    original = ltk.functional.cross_entropy

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        called.append(options.keys())
        return original(*args, **options)

    monkeypatch.setattr(ltk.functional, "cross_entropy", counted)
    crt.crt(digits, 1, seed=0)
    crt.lws(digits, 1, seed=0)
    assert len(called) == 4 and {"class_scale"} <= set(called[-1])

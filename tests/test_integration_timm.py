"""The real timm (but for torchvision, see without_torchvision.py): its mixup, its losses and its training task."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from without_torchvision import import_timm

import ltkernels as ltk
from ltkernels.integrations.timm import mixup_pairs

if find_spec("timm") is None:
    pytest.skip("needs timm", allow_module_level=True)
import_timm()

import timm  # noqa: E402
import timm.loss  # noqa: E402
from timm.data import Mixup  # noqa: E402
from timm.task import ClassificationTask  # noqa: E402

C, N = 7, 32
COUNTS = [400, 200, 100, 50, 20, 10, 5]
MODES = [
    {"mixup_alpha": 0.4, "mode": "batch"},
    {"mixup_alpha": 0.4, "mode": "elem"},
    {"mixup_alpha": 0.4, "mode": "pair"},
    {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "mode": "elem"},  # either, by element
    {"mixup_alpha": 0.0, "cutmix_alpha": 1.0, "mode": "batch"},
    {"mixup_alpha": 0.4, "prob": 0.5, "mode": "elem"},  # half of the rows as they were
]


@pytest.fixture(autouse=True)
def _numpy_seed() -> Iterator[None]:
    """timm draws with NumPy's global state."""
    state = np.random.get_state()
    np.random.seed(0)
    yield
    np.random.set_state(state)


def mixed(labels: torch.Tensor, smoothing: float = 0.0, **mode: Any) -> torch.Tensor:
    images = torch.rand(len(labels), 3, 8, 8)
    return Mixup(num_classes=C, label_smoothing=smoothing, **mode)(images, labels)[1]


def value_and_gradient(loss: Any, logits: torch.Tensor, target: Any) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits, target)
    return value.detach(), torch.autograd.grad(value * 1.7, logits)[0]


@pytest.mark.parametrize("mode", MODES)
def test_one_loss_takes_mixup_and_labels(mode: dict[str, Any]) -> None:
    """The probabilities of mixup as timm's SoftTargetCrossEntropy, and labels as its LabelSmoothingCrossEntropy."""
    labels, logits = torch.randint(C, (N,)), 3 * torch.randn(N, C)
    loss = ltk.losses.CrossEntropyLoss()
    target = mixed(labels, smoothing=0.1, **mode)
    torch.testing.assert_close(
        value_and_gradient(loss, logits, target),
        value_and_gradient(timm.loss.SoftTargetCrossEntropy(), logits, target),
    )
    torch.testing.assert_close(
        value_and_gradient(ltk.losses.CrossEntropyLoss(label_smoothing=0.1), logits, labels),
        value_and_gradient(timm.loss.LabelSmoothingCrossEntropy(0.1), logits, labels),
    )


@pytest.mark.parametrize("mode", MODES)
def test_pairs_are_what_was_mixed(mode: dict[str, Any]) -> None:
    labels, logits = torch.randint(C, (N,)), 3 * torch.randn(N, C)
    target = mixed(labels, **mode)
    first, second, lam = mixup_pairs(labels, target)
    again = lam[:, None] * F.one_hot(first, C) + (1 - lam[:, None]) * F.one_hot(second, C)
    torch.testing.assert_close(again, target)
    assert 0 < lam.min() < 1
    loss = ltk.losses.LogitAdjustedLoss(COUNTS)
    torch.testing.assert_close(
        value_and_gradient(loss, logits, (first, second, lam)), value_and_gradient(loss, logits, target)
    )


def test_margins_under_mixup() -> None:
    """Of each label its own margin, as mixup defines the loss; probabilities are refused."""
    labels, cosines = torch.randint(C, (N,)), torch.rand(N, C) * 2 - 1
    target = mixed(labels, mixup_alpha=0.4, mode="elem")
    loss, rows = ltk.losses.LDAMLoss(COUNTS), ltk.losses.LDAMLoss(COUNTS, reduction="none")
    first, second, lam = mixup_pairs(labels, target)
    expected = (lam * rows(cosines, first) + (1 - lam) * rows(cosines, second)).mean()
    torch.testing.assert_close(loss(cosines, (first, second, lam)), expected)
    with pytest.raises(ValueError, match="class_margin: expected None with probability targets"):
        loss(cosines, target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_targets_of_half_precision(dtype: torch.dtype) -> None:
    labels = torch.randint(C, (N,), dtype=torch.int32)
    target = mixed(labels, mixup_alpha=0.4, mode="elem").to(dtype)
    first, second, lam = mixup_pairs(labels, target)
    assert (first.dtype, second.dtype, lam.dtype) == (torch.int32, torch.int32, dtype)
    assert ltk.losses.LDAMLoss(COUNTS)(torch.rand(N, C), (first, second, lam)).isfinite()


def test_wrong_targets() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    smoothed = mixed(labels, smoothing=0.1, mixup_alpha=0.4)
    with pytest.raises(ValueError, match=r"mixed: expected all of row 0 on its labels 0 and 3, found 0\.9"):
        mixup_pairs(labels, smoothed)
    for given, kind, message in (
        ((labels.double(), smoothed), TypeError, "labels: expected an integer type, found torch.float64"),
        ((labels, labels), TypeError, "mixed: expected floating probabilities, found torch.int64"),
        ((labels[:3], smoothed), ValueError, r"expected shapes \(N,\) and \(N, C\), found \(3,\) and \(4, 7\)"),
        ((labels.to("meta"), smoothed), ValueError, "mixed: expected device meta as labels', found cpu"),
    ):
        with pytest.raises(kind, match=message):
            mixup_pairs(*given)


def test_the_loss_slot_of_the_training_task() -> None:
    """It moves the criterion, calls it with what its loader gives, and has its state in its own."""
    model = timm.create_model("test_vit", img_size=32, num_classes=C)
    loss = ltk.losses.LogitAdjustedLoss(COUNTS)
    task = ClassificationTask(model, criterion=loss, device=torch.device("cpu"), verbose=False)
    assert task.criterion is loss
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 6, 3, 3])
    for target in (labels, mixed(labels, mixup_alpha=0.4)):
        result = task(images, target)
        torch.testing.assert_close(result["loss"], loss(result["output"], target))
        result["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_program() -> None:
    import timm_mixup

    figures = timm_mixup.main(["--loss", "ce", "la"])
    assert figures["la"]["balanced"] > figures["ce"]["balanced"] > 0.5
    assert "balanced" in timm_mixup.main(["--loss", "ldam", "--epochs", "2", "--sampler", "class_balanced"])["ldam"]

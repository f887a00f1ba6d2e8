"""The sigmoid loss modules against the published code, written out as it is there: one-hot targets and full weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ltkernels.losses import (
    ACSLLoss,
    AsymmetricLoss,
    ClassBalancedSigmoidLoss,
    DropLoss,
    EqualizationLoss,
    EqualizationLossV2,
    FederatedLoss,
    SigmoidFocalLoss,
    detection,
    sigmoid,
)

bce_with_logits = torch.nn.functional.binary_cross_entropy_with_logits
COUNTS = [5000, 900, 90, 8, 2]  # two rare classes of six thousand images


def a_batch(rows: int = 40, background: bool = True, columns: int = 5) -> tuple[Tensor, Tensor]:
    y = torch.randint(5, (rows,))
    if background:
        y[::3] = 5
    return torch.randn(rows, columns, dtype=torch.float64) * 2.0, y


def one_hot(y: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.one_hot(y, 6)[:, :columns].double()


def test_class_balanced_sigmoid() -> None:
    x, y = a_batch(background=False)
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    w = (1 - 0.999) / (1 - 0.999**counts)
    w = w / w.sum() * 5
    t = one_hot(y, 5)
    for gamma in (0.0, 1.0):
        # The published modulator, with softplus(-z) where the code has log1p(exp(-z)).
        modulator = torch.exp(-gamma * t * x - gamma * torch.nn.functional.softplus(-x))
        expected = (w[y][:, None] * modulator * bce_with_logits(x, t, reduction="none")).sum() / t.sum()
        found = ClassBalancedSigmoidLoss(COUNTS, beta=0.999, gamma=gamma)(x, y)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # the weights are float32


def test_sigmoid_focal() -> None:
    x, y = a_batch(background=False)
    t = one_hot(y, 5)
    p = x.sigmoid()
    other = (1 - p) * t + p * (1 - t)
    expected = (bce_with_logits(x, t, reduction="none") * (0.25 * t + 0.75 * (1 - t)) * other.pow(2)).mean()
    torch.testing.assert_close(SigmoidFocalLoss()(x, y), expected)
    torch.testing.assert_close(SigmoidFocalLoss()(x, t.bool()), expected)
    torch.testing.assert_close(SigmoidFocalLoss(denominator=7.0)(x, y), expected * x.numel() / 7.0)


def test_asymmetric() -> None:
    x, _ = a_batch()
    t = (torch.rand(40, 5) < 0.3).double()
    for gamma_pos, gamma_neg, clip in ((0.0, 4.0, 0.05), (1.0, 4.0, 0.05), (1.0, 2.0, 0.0)):
        p = x.sigmoid()
        pt = (1 - p + clip).clamp(max=1) * (1 - t) + p * t
        expected = (-torch.log(pt.clamp(min=1e-8)) * (1 - pt).pow(gamma_pos * t + gamma_neg * (1 - t))).mean()
        torch.testing.assert_close(AsymmetricLoss(gamma_pos, gamma_neg, clip)(x, t), expected)


def test_equalization() -> None:
    x, y = a_batch()
    t = one_hot(y, 5)
    rare = torch.tensor(COUNTS) / 6000 < 1.77e-3
    assert rare.tolist() == [False, False, False, True, True]
    foreground = (y < 5).double()[:, None]
    weight = 1 - foreground * rare * (1 - t)
    expected = (bce_with_logits(x, t, reduction="none") * weight).sum() / len(y)
    torch.testing.assert_close(EqualizationLoss(COUNTS)(x, y), expected)
    assert EqualizationLoss(COUNTS, num_images=10**6).foreground_keep.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def published_v2(x: Tensor, y: Tensor, state: dict[str, Tensor], columns: int, background: bool) -> Tensor:
    t = one_hot(y, columns)
    classes = columns - background
    if "pos" in state:
        ratio = state["pos"] / (state["neg"] + 1e-10)
        neg = torch.sigmoid(12.0 * (ratio - 0.8))
        pos = 1 + 4.0 * (1 - neg)
    else:
        neg = pos = torch.ones(classes, dtype=torch.float64)
    if background:
        one = torch.ones(1, dtype=torch.float64)
        pos, neg = torch.cat([pos, one]), torch.cat([neg, one])
    weight = pos * t + neg * (1 - t)
    loss = (bce_with_logits(x, t, reduction="none") * weight).sum() / len(y)
    gradient = (x.detach().sigmoid() - t).abs() * weight
    for name, part in (("pos", t), ("neg", 1 - t)):
        state[name] = state.get(name, torch.zeros(classes)).double() + (gradient * part).sum(0)[:classes]
    return loss


@pytest.mark.parametrize("background", [False, True])
def test_equalization_v2(background: bool) -> None:
    columns = 5 + background
    criterion, state = EqualizationLossV2(5, background=background), {}
    for _ in range(4):
        x, y = a_batch(background=background, columns=columns)
        x.requires_grad_()
        expected = published_v2(x, y, state, columns, background)
        found = criterion(x, y)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(found, x)[0], torch.autograd.grad(expected, x)[0], rtol=1e-5, atol=1e-9
        )
        torch.testing.assert_close(criterion.pos_grad, state["pos"], rtol=1e-6, atol=0)
        torch.testing.assert_close(criterion.neg_grad, state["neg"], rtol=1e-6, atol=0)


def test_equalization_v2_in_eval_and_resumed() -> None:
    criterion = EqualizationLossV2(5)
    x, y = a_batch(background=False)
    criterion(x, y)
    before = copy.deepcopy(criterion.state_dict())
    criterion.eval()
    criterion(x, y)
    assert all(torch.equal(before[key], value) for key, value in criterion.state_dict().items())
    resumed = EqualizationLossV2(5)
    resumed.load_state_dict(before)
    assert torch.equal(resumed(x, y), criterion.train()(x, y))
    assert "pos_grad" in before and criterion.half().pos_grad.dtype == torch.float64


def _worker(rank: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    x, y = a_batch(background=False)
    criterion = EqualizationLossV2(5, process_group=torch.distributed.group.WORLD)
    criterion(x[20 * rank : 20 * rank + 20], y[20 * rank : 20 * rank + 20])
    whole = EqualizationLossV2(5)
    whole(x, y)
    torch.testing.assert_close(criterion.pos_grad, whole.pos_grad)
    torch.testing.assert_close(criterion.neg_grad, whole.neg_grad)
    torch.distributed.destroy_process_group()


def test_equalization_v2_adds_up_over_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path / "store"),), nprocs=2)


def test_drop() -> None:
    """The expected loss: rare negatives of background count as often as the share of rare labels says."""
    x, y = a_batch(400)
    y[1:200:3] = 3  # more of a rare class
    t = one_hot(y, 5)
    rare = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
    foreground = (y < 5).double()
    share = ((y == 3) | (y == 4)).sum() / foreground.sum()
    weight = 1 - foreground[:, None] * rare * (1 - t) - (1 - foreground[:, None]) * rare * (1 - share)
    expected = (bce_with_logits(x, t, reduction="none") * weight).sum() / len(y)
    criterion = DropLoss(COUNTS)
    found = torch.stack([criterion(x, y) for _ in range(100)])
    assert len(found.unique()) > 90
    assert abs(found.mean() - expected) < 4 * found.std() / 10
    assert criterion.step == 100
    none = torch.zeros_like(y)  # no rare label among them: nothing rare is pushed down by background
    none[::2] = 5
    t = one_hot(none, 5)
    expected = (bce_with_logits(x, t, reduction="none") * (1 - rare)).sum() / len(y)
    torch.testing.assert_close(criterion(x, none), expected)
    assert torch.equal(criterion.eval()(x, y), criterion(x, y))


def test_adaptive_class_suppression() -> None:
    x, y = a_batch(300, columns=6)
    t = one_hot(y, 6)
    criterion = ACSLLoss(COUNTS, seed=3)
    foreground = y < 5
    terms = bce_with_logits(x, t, reduction="none")
    weight = ((x.sigmoid() >= 0.7) | (t > 0)).double()
    # Rows with an object are certain; with background only frequent classes are, and the background itself.
    rows = foreground.nonzero()[:, 0]
    torch.testing.assert_close(criterion(x[rows], y[rows]), (terms * weight)[rows].sum() / len(rows))
    keep = torch.where(torch.tensor([0, 0, 1, 2, 2, 0]) == 0, 1.0, torch.tensor([0, 0, 0.1, 0.01, 0.01, 0]))
    expected = (terms * torch.where(foreground[:, None], weight, torch.maximum(weight, keep))).sum() / len(y)
    found = torch.stack([criterion(x, y) for _ in range(200)])
    assert abs(found.mean() - expected) < 4 * found.std() / 200**0.5
    assert len(found.unique()) > 100


def test_federated() -> None:
    x, y = a_batch(6)
    y[:] = torch.tensor([0, 0, 3, 5, 3, -100])
    criterion = FederatedLoss(COUNTS, num_sample_classes=3)
    seen = torch.zeros(5)
    for _ in range(300):
        subset = criterion.class_subset(y)
        assert subset.sum() == 3 and subset[0] == subset[3] == 1
        seen += subset
    others = torch.tensor([900.0, 90.0, 2.0]).sqrt()
    share = 300 * others / others.sum()
    assert torch.allclose(seen[[1, 2, 4]], share, atol=30)  # 3.5 standard deviations
    torch.manual_seed(5)
    subset = criterion.class_subset(y).double()
    torch.manual_seed(5)
    expected = (bce_with_logits(x[:5], one_hot(y[:5], 5), reduction="none") * subset).sum() / 5
    torch.testing.assert_close(criterion(x, y), expected)
    assert FederatedLoss(COUNTS, num_sample_classes=1).class_subset(y).tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert FederatedLoss([10, 0, 5]).class_subset(torch.tensor([0])).tolist() == [1.0, 0.0, 1.0]


MAKERS: dict[str, Callable[..., Any]] = {
    "ACSLLoss": lambda **o: ACSLLoss(COUNTS, **o),
    "AsymmetricLoss": AsymmetricLoss,
    "ClassBalancedSigmoidLoss": lambda **o: ClassBalancedSigmoidLoss(COUNTS, **o),
    "DropLoss": lambda **o: DropLoss(COUNTS, **o),
    "EqualizationLoss": lambda **o: EqualizationLoss(COUNTS, **o),
    "EqualizationLossV2": lambda **o: EqualizationLossV2(5, **o),
    "FederatedLoss": lambda **o: FederatedLoss(COUNTS, **o),
    "SigmoidFocalLoss": SigmoidFocalLoss,
}
each_module = pytest.mark.parametrize("name", [*sigmoid.__all__, *detection.__all__])


@each_module
def test_every_module_has_the_common_options(name: str) -> None:
    columns = 6 if name == "ACSLLoss" else 5
    x, y = a_batch(9, background=False, columns=columns)
    y[2] = -1
    rows = MAKERS[name](reduction="none", ignore_index=-1)(x, y)
    assert rows.shape == (9,) and rows[2] == 0
    weighted = MAKERS[name](reduction="sum", ignore_index=-1)(x, y, torch.zeros(9))
    assert weighted == 0
    assert MAKERS[name](ignore_index=-1, empty="zero")(x[2:3], y[2:3]) == 0
    assert repr(MAKERS[name](reduction="sum")).endswith("reduction='sum')")
    with pytest.raises(ValueError, match="reduction: expected"):
        MAKERS[name](reduction="avg")
    with pytest.raises(TypeError, match="unexpected argument 'label_smoothing'"):
        MAKERS[name](label_smoothing=0.1)
    criterion = MAKERS[name](ignore_index=-1)
    criterion.reduction = "none"  # as libraries do
    assert criterion(x, y).shape == (9,)


@each_module
def test_tables_and_states_are_made_on_the_cpu(name: str) -> None:
    with torch.device("meta"):  # lazy initialisation of large models
        assert not any(buffer.is_meta for buffer in MAKERS[name]().buffers())
    assert all(buffer.is_meta for buffer in MAKERS[name]().to("meta").buffers())


@each_module
def test_every_module_compiles_in_one_graph(name: str) -> None:
    columns = 6 if name == "ACSLLoss" else 5
    x, y = a_batch(9, background=False, columns=columns)
    x = x.float()
    eager, compiled = MAKERS[name](), MAKERS[name]()
    torch._dynamo.reset()
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.manual_seed(1)
        expected = eager(x, y)
        torch.manual_seed(1)
        torch.testing.assert_close(step(x, y), expected)
    assert all(torch.equal(a, b) for a, b in zip(eager.buffers(), compiled.buffers(), strict=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ClassBalancedSigmoidLoss(COUNTS, beta=1.0), ValueError, "beta: expected a number below 1"),
        (lambda: ClassBalancedSigmoidLoss([1, -1]), ValueError, "class_counts: expected all counts >= 0"),
        (lambda: SigmoidFocalLoss(alpha=2.0), ValueError, "focal_alpha: expected"),
        (lambda: AsymmetricLoss(clip=1.5), ValueError, "clip: expected"),
        (lambda: EqualizationLoss(COUNTS, num_images=0), ValueError, "num_images: expected a finite number > 0"),
        (lambda: EqualizationLoss(COUNTS, threshold=-1.0), ValueError, "threshold: expected"),
        (lambda: EqualizationLossV2(0), ValueError, "num_classes: expected >= 1, found 0"),
        (lambda: EqualizationLossV2(5, alpha=-1.0), ValueError, "alpha: expected"),
        (lambda: DropLoss(COUNTS, seed=0.5), TypeError, "seed: expected an integer"),
        (lambda: ACSLLoss(COUNTS, threshold=1.0), ValueError, "score_threshold: expected a number below 1"),
        (lambda: ACSLLoss(COUNTS, keep=(2.0, 0.1)), ValueError, "background_keep: expected probabilities"),
        (lambda: EqualizationLossV2(5, gamma=float("nan")), ValueError, "gamma: expected a finite number"),
        (lambda: EqualizationLossV2(5, background="no"), TypeError, "background: expected a bool, found 'no'"),
        (lambda: ACSLLoss(COUNTS, groups=(100, 10)), ValueError, "groups: expected the number of rare classes first"),
        (lambda: ACSLLoss(COUNTS, groups=(10,)), TypeError, "groups: expected two numbers of images"),
        (lambda: FederatedLoss(COUNTS, num_sample_classes=0), ValueError, "num_sample_classes: expected >= 1"),
        (lambda: FederatedLoss(COUNTS, power=-1.0), ValueError, "power: expected"),
    ],
)
def test_wrong_settings(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()

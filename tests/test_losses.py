"""Values of ltkernels.losses: the papers' formulas in float64, published implementations' answers, and torch's loss.

The losses only choose parameters of ``functional.cross_entropy`` (whose values and kernels have their own tests), so
shapes here are small; 100 classes with CIFAR-100-LT's counts where the counts matter.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from loss_cases import COUNTS, WEIGHT, C, N, assert_same, batch, value_and_gradient
from torch import Tensor, nn
from torch.nn import functional as F

from ltkernels import losses

DATA = Path(__file__).parent / "data"

# ---------------------------------------------------------------------------------------------- the papers' formulas

n_j = torch.tensor(COUNTS, dtype=torch.float64)
PRIOR = n_j / n_j.sum()


def nll(u: Tensor, y: Tensor) -> Tensor:
    return -u.log_softmax(1).gather(1, y[:, None])[:, 0]


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_logit_adjusted(tau: float) -> None:
    x, y = batch()
    assert_same(losses.LogitAdjustedLoss(COUNTS, tau)(x, y), nll(x + tau * PRIOR.log(), y).mean(), x)


def test_balanced_softmax_is_logit_adjustment_at_tau_1() -> None:
    x, y = batch(torch.float32)
    actual = value_and_gradient(losses.BalancedSoftmaxLoss(COUNTS)(x, y), x)
    expected = value_and_gradient(losses.LogitAdjustedLoss(COUNTS, tau=1.0)(x, y), x)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_balanced_softmax() -> None:
    x, y = batch()
    weighted = n_j * x.exp()
    assert_same(losses.BalancedSoftmaxLoss(COUNTS)(x, y), -(weighted[range(N), y] / weighted.sum(1)).log().mean(), x)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tau", [0.0, 1.2])
def test_vs(gamma: float, tau: float) -> None:
    x, y = batch()
    u = x / (n_j.max() / n_j) ** gamma + tau * PRIOR.log()
    assert_same(losses.VSLoss(COUNTS, gamma, tau)(x, y), nll(u, y).mean(), x)


def test_vs_without_scales_is_logit_adjustment_and_without_both_is_cross_entropy() -> None:
    x, y = batch()
    assert_same(losses.VSLoss(COUNTS, gamma=0, tau=1.3)(x, y), losses.LogitAdjustedLoss(COUNTS, tau=1.3)(x, y), x)
    assert_same(losses.VSLoss(COUNTS, gamma=0, tau=0)(x, y), F.cross_entropy(x, y), x)


@pytest.mark.parametrize(("max_m", "s"), [(0.5, 30.0), (0.3, 16.0), (0.0, 1.0)])
def test_ldam(max_m: float, s: float) -> None:
    x, y = batch()
    margin = max_m * (n_j.min() / n_j) ** 0.25
    u = s * (x - margin * F.one_hot(y, C))
    assert_same(losses.LDAMLoss(COUNTS, max_m, s)(x, y), nll(u, y).mean(), x)


def test_ldam_of_scaled_logits() -> None:
    cosines, y = batch()
    scaled = 30 * cosines
    assert_same(losses.LDAMLoss(COUNTS, logits_scaled=True)(scaled, y), losses.LDAMLoss(COUNTS)(cosines, y), cosines)


def test_ldam_of_equal_counts_is_cosface() -> None:
    x, y = batch()
    assert_same(losses.LDAMLoss([5] * C, max_m=0.35, s=64.0)(x, y), losses.CosFaceLoss(margin=0.35)(x, y), x)


def test_cosface() -> None:
    x, y = batch()
    assert_same(losses.CosFaceLoss()(x, y), nll(64 * (x - 0.4 * F.one_hot(y, C)), y).mean(), x)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_as_in_the_paper(gamma: float) -> None:
    x, y = batch()
    p = x.softmax(1)[range(N), y]
    assert_same(losses.FocalLoss(gamma)(x, y), ((1 - p) ** gamma * -p.log()).mean(), x)


def test_focal_as_ldam_drw_has_it() -> None:
    """p is exp(-weighted cross entropy), and the mean is over rows."""
    x, y = batch()
    ce = F.cross_entropy(x, y, WEIGHT, reduction="none")
    loss = losses.FocalLoss(1.0, WEIGHT, focal_pt="weighted", denominator="count")
    assert_same(loss(x, y), ((1 - (-ce).exp()) * ce).mean(), x)


def test_focal_as_lade_and_tde_have_it() -> None:
    x, y = batch()
    ce = F.cross_entropy(x, y, reduction="none")
    factor = (1 - x.softmax(1)[range(N), y]).detach() ** 2
    assert_same(losses.FocalLoss(2.0, focal_grad="detached")(x, y), (factor * ce).mean(), x)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_with_gamma_0_is_cross_entropy(smoothing: float) -> None:
    x, y = batch()
    expected = F.cross_entropy(x, y, WEIGHT, label_smoothing=smoothing)
    assert_same(losses.FocalLoss(0.0, WEIGHT, label_smoothing=smoothing)(x, y), expected, x)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_class_balanced(beta: float) -> None:
    x, y = batch()
    weight = (1 - beta) / (1 - beta**n_j)
    weight = weight / weight.sum() * C
    ce = nll(x, y)
    p = (-ce).exp()
    assert_same(losses.ClassBalancedLoss(COUNTS, beta)(x, y), (weight[y] * ce).sum() / N, x)
    by_weight = losses.ClassBalancedLoss(COUNTS, beta, denominator="weight")
    assert_same(by_weight(x, y), F.cross_entropy(x, y, weight), x)
    focal = losses.ClassBalancedLoss(COUNTS, beta, gamma=0.5)
    assert_same(focal(x, y), (weight[y] * (1 - p) ** 0.5 * ce).sum() / N, x)


# ---------------------------------------------------------------------------------------------- published answers


@pytest.mark.parametrize("name", ["ldam", "balanced_softmax"])
def test_golden(name: str) -> None:
    with np.load(DATA / f"{name}.npz") as file:
        golden = {key: torch.from_numpy(value) for key, value in file.items()}
    x, y = golden["logits"].requires_grad_(), golden["target"]
    make = losses.LDAMLoss if name == "ldam" else losses.BalancedSoftmaxLoss
    value, gradient = value_and_gradient(make(golden["counts"])(x, y), x)
    torch.testing.assert_close(value, golden["loss"], rtol=2e-6, atol=0)
    assert (gradient - golden["grad"]).norm() <= 2e-6 * golden["grad"].norm()


def test_ldam_drw_over_the_published_epochs() -> None:
    """Before epoch 160 the plain margin loss; from then on torch's weighted mean with effective-number weights."""
    x, y = batch()
    u = 30 * (x - 0.5 * (n_j.min() / n_j) ** 0.25 * F.one_hot(y, C))
    late = 0.0001 / (1 - 0.9999**n_j)
    loss = losses.LDAMLoss(COUNTS, reweight_epoch=160)
    for epoch, weight in ((0, None), (159, None), (160, late), (199, late), (159, None)):
        loss.set_epoch(epoch)
        assert_same(loss(x, y), F.cross_entropy(u, y, weight), x)


# ---------------------------------------------------------------------------------------------- torch's loss

SHAPES = [((7,), ()), ((6, 7), (6,)), ((4, 7, 3), (4, 3)), ((2, 7, 3, 2), (2, 3, 2))]


@pytest.mark.parametrize(("shape", "labels_shape"), SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_cross_entropy_is_torchs_in_every_argument(shape, labels_shape, kind: str) -> None:
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    class_dim = 0 if len(shape) == 1 else 1
    target = torch.randint(7, labels_shape) if kind == "labels" else torch.randn(shape).double().softmax(class_dim)
    weights = (None, torch.linspace(0.1, 2, 7, dtype=torch.float64))
    ignored = (-100, int(target.flatten()[-1])) if kind == "labels" and labels_shape else (-100,)
    options = itertools.product(weights, ignored, ("mean", "sum", "none"), (0.0, 0.1, 1.0))
    for weight, ignore_index, reduction, smoothing in options:
        arguments = {
            "weight": weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": smoothing,
        }
        expected = nn.CrossEntropyLoss(**arguments)(logits, target)
        actual = losses.CrossEntropyLoss(**arguments)(logits, target)
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
        upstream = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, logits, upstream),
            torch.autograd.grad(expected, logits, upstream),
            rtol=1e-11,
            atol=1e-14,
        )


def test_cross_entropy_takes_torchs_positional_arguments_and_checkpoint() -> None:
    theirs = nn.CrossEntropyLoss(torch.rand(5))
    ours = losses.CrossEntropyLoss(torch.ones(5))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    default = losses.CrossEntropyLoss()
    assert default.state_dict() == {}
    nn.CrossEntropyLoss().load_state_dict(default.state_dict())
    default.load_state_dict(nn.CrossEntropyLoss().state_dict())
    default.weight = torch.ones(5)
    default.load_state_dict(theirs.state_dict())
    assert torch.equal(default.weight, theirs.weight)


def test_cross_entropy_with_every_parameter() -> None:
    x, y = batch(num_classes=5)
    a, b, m = torch.rand(5).double() + 0.5, torch.randn(5).double(), torch.rand(5).double()
    loss = losses.CrossEntropyLoss(WEIGHT[:5], scale=3.0, class_scale=a, class_bias=b, class_margin=m, z_loss=0.01)
    u = 3 * (a * x + b - m * F.one_hot(y, 5))
    z = 0.01 * u.logsumexp(1).square().sum() / WEIGHT[y].sum()
    assert_same(loss(x, y), F.cross_entropy(u, y, WEIGHT[:5]) + z, x, rtol=1e-12)


def test_learnable_scales_and_biases() -> None:
    """Learnable weight scaling and offsets: parameters of the loss, which train with it."""
    x, y = batch(torch.float32, 5)
    loss = losses.CrossEntropyLoss(class_scale=nn.Parameter(torch.ones(5)), class_bias=nn.Parameter(torch.zeros(5)))
    assert [name for name, _ in loss.named_parameters()] == ["class_scale", "class_bias"]
    loss(x.detach(), y).backward()
    p_q = (x.softmax(1) - F.one_hot(y, 5)).detach() / N
    torch.testing.assert_close(loss.class_bias.grad, p_q.sum(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.class_scale.grad, (p_q * x).sum(0).detach(), rtol=1e-5, atol=1e-6)

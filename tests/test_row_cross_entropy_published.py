"""The losses whose adjustments depend on the row against the formulas as published, which are written out here.

In float64, values and gradients. The papers are named in the docstrings of `functional`.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as torch_functional
from cross_entropy_cases import Form, each_form, relative_error, seed
from row_cross_entropy_cases import F, device_of_form, on_its_device  # noqa: F401
from torch import Tensor

from ltkernels.ops.options import PairTerm, RowCrossEntropyOptions
from ltkernels.reference.row_cross_entropy import class_drops

DATA = Path(__file__).parent / "data"


def agrees(actual: Tensor, expected: Tensor, *variables: Tensor, limit: float = 1e-11) -> None:
    """Values, and gradients with respect to all variables, in float64."""
    assert relative_error(actual.detach(), expected.detach(), 1e-3) <= limit
    above = torch.randn(actual.shape, dtype=actual.dtype)
    mine = torch.autograd.grad(actual, variables, above, retain_graph=True)
    theirs = torch.autograd.grad(expected, variables, above, retain_graph=True)
    for gradient, wanted in zip(mine, theirs, strict=True):
        assert wanted.norm() > 0
        assert relative_error(gradient, wanted, 1e-6) <= limit


def batch(classes: int = 9, rows: int = 14, size: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    seed(classes + rows)
    x = (torch.randn(rows, classes, dtype=torch.float64) * size).requires_grad_()
    return x, torch.randint(classes, (rows,)), torch.randint(classes, (rows,))


def cosines(classes: int = 9, rows: int = 14) -> tuple[Tensor, Tensor]:
    seed(classes)
    x = (torch.rand(rows, classes, dtype=torch.float64) * 1.98 - 0.99).requires_grad_()
    return x, torch.randint(classes, (rows,))


def vector(classes: int, low: float = 0.3, high: float = 1.5) -> Tensor:
    return low + (high - low) * torch.rand(classes, dtype=torch.float64)


@on_its_device
@each_form
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_two_labels_are_two_calls_of_the_criterion(smoothing: float, form: Form) -> None:
    """Mixup of MiSLAS and BBN: each label has its own denominator, and rows ignored for one count for the other."""
    x, y, z = batch()
    y[3] = z[5] = -100
    weight = vector(9)
    with form.use():
        actual = F.cross_entropy(x, (y, z, 0.3), weight, label_smoothing=smoothing)
    first, second = (torch_functional.cross_entropy(x, t, weight, label_smoothing=smoothing) for t in (y, z))
    agrees(actual, 0.3 * first + 0.7 * second, x)


@on_its_device
@each_form
def test_a_share_by_row(form: Form) -> None:
    x, y, z = batch()
    share = torch.rand(14, dtype=torch.float64)
    with form.use():
        actual = F.cross_entropy(x, (y, z, share))
    first, second = (torch_functional.cross_entropy(x, t, reduction="none") for t in (y, z))
    agrees(actual, (share * first + (1 - share) * second).mean(), x)


@on_its_device
@each_form
@pytest.mark.parametrize("margin", (0.0, 0.5, 1.5, 2.5, "by class"))
def test_arc_as_mmpretrain_has_it(margin: float | str, form: Form) -> None:
    """By the angle, with the fallback where angle and margin pass pi."""
    x, y = cosines()
    m = vector(9, 0.05, 1.5) if margin == "by class" else margin
    with form.use():
        actual = F.cross_entropy(x, y, class_margin=m, margin_type="arc", scale=64.0)
    m_y = m[y] if isinstance(m, Tensor) else torch.tensor(m, dtype=torch.float64).expand(14)
    c = x[range(14), y]
    moved = torch.where(c > -m_y.cos(), (c.acos() + m_y).cos(), c - m_y * m_y.sin())
    u = 64 * x.scatter(1, y[:, None], moved[:, None])
    # Where the angle is near 0 or pi its cosine has no digits to give: the limit is for a row of sine 0.14.
    agrees(actual, torch_functional.cross_entropy(u, y), x, limit=1e-10)
    if margin == 1.5:
        assert (c <= -m_y.cos()).any()  # the fallback is taken
        assert (c > -m_y.cos()).any()


@on_its_device
@each_form
def test_arc_as_insightface_has_it(form: Form) -> None:
    """The angle moved without gradient: that of the cosines is s (p - onehot) / N."""
    x, y = cosines()
    with form.use():
        loss = F.cross_entropy(x, y, class_margin=0.5, margin_type="arc_straight_through", scale=64.0)
        (gradient,) = torch.autograd.grad(loss, x)
    with torch.no_grad():
        u = x.clone()
        u[range(14), y] = (u[range(14), y].acos() + 0.5).cos()
        u *= 64
        expected = torch_functional.cross_entropy(u, y)
        wanted = 64 * (u.softmax(1) - torch_functional.one_hot(y, 9)) / 14
    assert relative_error(loss.detach(), expected) <= 1e-11
    assert relative_error(gradient, wanted) <= 1e-11


def published_seesaw(x: Tensor, y: Tensor, counts: Tensor, p: float, q: float, eps: float) -> Tensor:
    """With the matrix of ratios of all pairs of classes, and with factors, not logarithms."""
    n = counts.double().clamp_min(1)
    factor = torch.where(n[None, :] < n[:, None], n[None, :] / n[:, None], 1.0)[y] ** p
    scores = x.detach().softmax(1)
    ratio = scores / scores.gather(1, y[:, None]).clamp_min(eps)
    factor = factor * torch.where(ratio > 1, ratio, 1.0) ** q
    onehot = torch_functional.one_hot(y, x.shape[1])
    return torch_functional.cross_entropy(x + factor.log() * (1 - onehot), y)


@on_its_device
@each_form
@pytest.mark.parametrize(("p", "q", "eps"), ((0.8, 2.0, 1e-2), (0.0, 2.0, 1e-2), (0.8, 0.0, 1e-2), (1.5, 0.5, 0.2)))
def test_seesaw_with_a_matrix_of_pairs(p: float, q: float, eps: float, form: Form) -> None:
    x, y, _ = batch(size=3.0)
    counts = torch.randint(0, 300, (9,))
    with form.use():
        actual = F.seesaw_cross_entropy(x, y, counts, p=p, q=q, eps=eps)
    agrees(actual, published_seesaw(x, y, counts, p, q, eps), x)


@on_its_device
@each_form
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=lambda dtype: str(dtype)[6:])
def test_seesaw_as_mmpretrain_answered(dtype: torch.dtype, form: Form) -> None:
    with np.load(DATA / "seesaw_small.npz") as file:
        golden = {key: torch.tensor(np.array(value)) for key, value in file.items()}
    x, y = golden["logits"].to(dtype).requires_grad_(), golden["target"]
    counts = golden["cum_before"] + y.bincount(minlength=x.shape[1])
    with form.use():
        loss = F.seesaw_cross_entropy(
            x, y, counts, p=float(golden["p"]), q=float(golden["q"]), eps=float(golden["eps"])
        )
        (gradient,) = torch.autograd.grad(loss, x)
    assert relative_error(loss.detach(), golden["loss"]) <= 2e-6
    assert relative_error(gradient, golden["grad"]) <= 2e-6
    assert counts.max() / counts.min() >= 5


@on_its_device
@each_form
def test_influence_balanced_as_published(form: Form) -> None:
    """By the norms of p - onehot and of the features; the gradient flows through p."""
    x, y, _ = batch()
    weight, h = vector(9), 5 * torch.rand(14, dtype=torch.float64)
    with form.use():
        actual = F.cross_entropy(
            x, y, weight, feature_norm=h, influence_alpha=1e4, influence_eps=1e-3, denominator="count"
        )
    influence = (x.softmax(1) - torch_functional.one_hot(y, 9)).abs().sum(1) * h
    ce = torch_functional.cross_entropy(x, y, weight, reduction="none")
    agrees(actual, (ce * 1e4 / (influence + 1e-3)).mean(), x)


@on_its_device
@each_form
def test_influence_balanced_focal_as_published(form: Form) -> None:
    x, y, _ = batch()
    weight, h = vector(9), 5 * torch.rand(14, dtype=torch.float64)
    with form.use():
        actual = F.cross_entropy(
            x, y, weight, feature_norm=h, denominator="count", focal_gamma=1.5, focal_pt="weighted"
        )
    influence = (x.softmax(1) - torch_functional.one_hot(y, 9)).abs().sum(1) * h
    ce = torch_functional.cross_entropy(x, y, weight, reduction="none")
    agrees(actual, ((1 - (-ce).exp()) ** 1.5 * ce * 1e4 / (influence + 1e-3)).mean(), x)


@on_its_device
@each_form
def test_label_aware_smoothing_as_mislas_has_it(form: Form) -> None:
    x, y, _ = batch()
    eps = vector(9, 0.0, 0.5)
    with form.use():
        actual = F.cross_entropy(x, y, label_smoothing=eps)
    log_p = x.log_softmax(1)
    expected = (1 - eps[y]) * -log_p[range(14), y] + eps[y] * -log_p.mean(1)
    agrees(actual, expected.mean(), x)


@on_its_device
@each_form
def test_smoothing_off_the_target(form: Form) -> None:
    x, y, _ = batch()
    weight = vector(9)
    with form.use():
        actual = F.cross_entropy(x, y, weight, label_smoothing=0.2, smoothing_mode="off_target", reduction="none")
    q = torch.full_like(x, 0.2 / 8).scatter(1, y[:, None], 0.8).detach()
    agrees(actual, -(weight * q * x.log_softmax(1)).sum(1) + 0 * x.sum(1), x)


@on_its_device
@each_form
def test_disalign_by_autograd(form: Form) -> None:
    x, y, _ = batch()
    alpha, beta = vector(9).requires_grad_(), (vector(9) - 1).requires_grad_()
    gate = torch.rand(14, dtype=torch.float64, requires_grad=True)
    weight = vector(9)
    with form.use():
        actual = F.cross_entropy(x, y, weight, class_scale=alpha, class_bias=beta, row_gate=gate)
    u = (1 + gate[:, None] * alpha) * x + gate[:, None] * beta
    agrees(actual, torch_functional.cross_entropy(u, y, weight), x, alpha, beta, gate)


@on_its_device
@each_form
def test_pairwise(form: Form) -> None:
    x, y, _ = batch()
    table = torch.randn(9, 9, dtype=torch.float64)
    with form.use():
        actual = F.pairwise_cross_entropy(x, y, table)
    agrees(actual, torch_functional.cross_entropy(x + table[y], y), x)


@on_its_device
@each_form
def test_equalization_leaves_out_what_was_drawn(form: Form) -> None:
    x, y, _ = batch()
    rare = torch.arange(9) % 3 > 0
    options = RowCrossEntropyOptions(pair_term=PairTerm.DROP, pair_p=0.6, seed=5)
    mask = class_drops(14, rare.double(), torch.tensor(2), options).scatter(1, y[:, None], False)
    assert 20 < mask.sum() < 14 * 6
    assert not mask[:, ~rare].any()
    with form.use():
        actual = F.equalization_cross_entropy(x, y, rare, drop_rate=0.6, seed=5, step=2)
    agrees(actual, torch_functional.cross_entropy(x.masked_fill(mask, -1e7), y), x)


@on_its_device
@each_form
def test_drops_are_as_frequent_as_the_rate_and_each_step_has_its_own(form: Form) -> None:
    """With logits 0 a row's loss tells how many classes stayed: 400 rows of 50 rare classes are 2000 draws a step."""
    rows, classes = 400, 51
    x, y, rare = torch.zeros(rows, classes), torch.zeros(rows, dtype=torch.int64), torch.ones(classes, dtype=torch.bool)
    with form.use():
        kept = [
            F.equalization_cross_entropy(x.to(form.device), y.to(form.device), rare.to(form.device), drop_rate=0.3,
                                         step=step, reduction="none").exp().round().cpu()
            for step in (0, 1)
        ]  # fmt: skip
    for count in kept:
        assert abs((count - 1).mean().item() / 50 - 0.7) < 5 * math.sqrt(0.21 / (rows * 50))
    assert (kept[0] != kept[1]).float().mean() > 0.7


@on_its_device
@each_form
def test_what_is_none_of_it(form: Form) -> None:
    """A share of 1, no margin, no seesaw, no drops, a table of 0, equal labels: plain cross-entropy."""
    x, y, z = batch()
    expected = torch_functional.cross_entropy(x, y)
    counts, none = torch.randint(1, 99, (9,)), torch.zeros(9, 9, dtype=torch.float64)
    with form.use():
        for actual in (
            F.cross_entropy(x, (y, z, 1.0)),
            F.cross_entropy(x, (z, y, 0.0)),
            F.cross_entropy(x, (y, y.clone(), 0.4)),
            F.cross_entropy(x, y, label_smoothing=torch.zeros(9)),
            F.cross_entropy(x, y, row_gate=torch.zeros(14), class_bias=torch.randn(9)),
            F.seesaw_cross_entropy(x, y, counts, p=0.0, q=0.0),
            F.seesaw_cross_entropy(x, y, torch.full((9,), 7), p=3.0, q=0.0),
            F.pairwise_cross_entropy(x, y, none),
            F.equalization_cross_entropy(x, y, counts > 50, drop_rate=0.0),
            F.equalization_cross_entropy(x, y, counts < 0, drop_rate=1.0),
        ):
            agrees(actual, expected, x)
        c, y = cosines()
        for margin_type in ("arc", "arc_straight_through"):
            actual = F.cross_entropy(c, y, class_margin=0.0, margin_type=margin_type, scale=30.0)
            agrees(actual, torch_functional.cross_entropy(30 * c, y), c)

"""functional.cross_entropy at the edges: infinities, nothing to average, certain rows, large numbers, huge margins."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import (
    FLOATS,
    GPU_BACKENDS,
    Case,
    Form,
    check,
    each_form,
    evaluate,
    labels,
    positive,
    seed,
    truth,
)
from torch import Tensor

import ltkernels as ltk

inf, nan = torch.inf, torch.nan
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])

# 19 classes everywhere: whole vectors and a rest for 4 lanes, one vector and a rest for 16, so a rule holds in both.
C = 19


def _gradient(form: Form, x: Tensor, y: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    result = evaluate(Case(x, y, arguments), form)
    return result.loss, result.gradients["input"]


# --- Nothing to average ---


@each_form
@each_float
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("shape", [(0, C), (0, C, 3), (4, C, 0)], ids=str)
def test_empty_batch(shape: tuple[int, ...], kind: str, dtype: torch.dtype, form: Form) -> None:
    x = torch.zeros(shape, dtype=dtype)
    y = labels(shape[:1] + shape[2:], C) if kind == "labels" else x
    for denominator in ("weight", "count"):
        loss, gradient = _gradient(form, x, y, denominator=denominator)
        assert loss.isnan() and gradient.shape == shape
        assert _gradient(form, x, y, denominator=denominator, empty="zero")[0] == 0.0
    assert _gradient(form, x, y, reduction="sum")[0] == 0.0
    assert _gradient(form, x, y, denominator=3.0)[0] == 0.0
    assert _gradient(form, x, y, reduction="none")[0].shape == shape[:1] + shape[2:]


@each_form
@each_float
def test_all_rows_ignored(dtype: torch.dtype, form: Form) -> None:
    x, y = torch.randn(5, C).to(dtype), torch.full((5,), -100)
    arguments: list[dict[str, Any]] = [{}, {"denominator": "count"}, {"weight": positive(C)}, {"label_smoothing": 0.1}]
    for options in arguments:
        loss, gradient = _gradient(form, x, y, **options)
        assert loss.isnan() and not gradient.any()  # torch's NaN, and torch's gradient of 0
        loss, gradient = _gradient(form, x, y, empty="zero", **options)
        assert loss == 0.0 and not gradient.any()
    loss, gradient = _gradient(form, x, y, reduction="none")
    assert not loss.any() and not gradient.any()


@each_form
def test_weights_that_are_all_zero(form: Form) -> None:
    x, y, zero = torch.randn(5, C), labels((5,), C), torch.zeros(C)
    assert _gradient(form, x, y, weight=zero)[0].isnan()
    assert _gradient(form, x, y, sample_weight=torch.zeros(5))[0].isnan()
    for options in ({"weight": zero}, {"sample_weight": torch.zeros(5)}):
        loss, gradient = _gradient(form, x, y, empty="zero", **options)
        assert loss == 0.0 and not gradient.any()
        loss, gradient = _gradient(form, x, y, denominator="count", **options)
        assert loss == 0.0 and not gradient.any()


@each_form
@each_float
def test_ignored_rows_may_hold_anything(dtype: torch.dtype, form: Form) -> None:
    """Padding is often not initialised."""
    x = torch.randn(6, C).to(dtype)
    y = torch.tensor([3, -100, 5, -100, -100, 0])
    x[1], x[3], x[4, ::2] = nan, inf, -inf
    bias, scale = torch.randn(C), positive(C)
    for options in (
        {},
        {"label_smoothing": 0.1, "focal_gamma": 2.0},
        {"class_bias": bias, "class_scale": scale, "z_loss": 0.1},
    ):
        kept = y != -100
        expected = _gradient(form, x[kept], y[kept], **options)
        loss, gradient = _gradient(form, x, y, **options)
        torch.testing.assert_close(loss, expected[0])
        torch.testing.assert_close(gradient[kept], expected[1])
        assert not gradient[~kept].any()
    case = Case(x, y, {"class_bias": bias, "class_scale": scale}, learnable=("class_bias", "class_scale"))
    assert all(gradient.isfinite().all() for gradient in evaluate(case, form).gradients.values())


@each_form
def test_an_ignored_label_may_be_a_class(form: Form) -> None:
    y = torch.tensor([2, 0, 2, 18, 1])
    check(Case(torch.randn(5, C), y, {"ignore_index": 2, "weight": positive(C)}), form)
    check(
        Case(
            torch.randn(5, C),
            y,
            {"ignore_index": 2, "class_bias": torch.zeros(C).index_fill(0, torch.tensor([2]), -inf)},
        ),
        form,
    )


# --- Infinite and large logits ---

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"class_bias": torch.linspace(-2, 2, C)},
    "full": {"class_scale": torch.linspace(0.5, 2, C), "class_bias": torch.linspace(-2, 2, C), "scale": 2.0},
    "margin": {"class_margin": 0.5, "scale": 2.0},
    "focal": {"focal_gamma": 2.0, "z_loss": 0.1},
    "weighted focal": {"focal_gamma": 0.5, "focal_pt": "weighted", "weight": torch.linspace(0, 2, C)},
}


@each_form
@each_float
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_masked_classes(options: dict[str, Any], dtype: torch.dtype, form: Form) -> None:
    """-inf logits of other classes: probability and gradient exactly 0."""
    seed(0)
    masked = torch.rand(40, C) < 0.4
    y = labels((40,), C)
    masked[torch.arange(40), y] = False
    x = torch.randn(40, C).masked_fill(masked, -inf).to(dtype)
    learnable = tuple(name for name in ("class_scale", "class_bias") if name in options)
    case = Case(x, y, options, upstream="random", learnable=learnable)
    check(case, form)
    result = evaluate(case, form)
    assert not result.gradients["input"][masked].any()
    # Probabilities that are 0 there
    t = torch.rand(40, C).masked_fill(masked, 0.0)
    check(Case(x, t, {k: v for k, v in options.items() if k != "class_margin"}, learnable=learnable), form)


@each_form
@each_float
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_masked_label_has_an_infinite_loss(options: dict[str, Any], dtype: torch.dtype, form: Form) -> None:
    """That row's loss is inf, its gradient finite, and no other row is touched."""
    x, y = torch.randn(5, C).to(dtype), torch.tensor([1, 2, 3, 4, 5])
    x[2, 3] = -inf
    case = Case(x, y, options | {"reduction": "none"})
    check(case, form)
    loss, gradient = evaluate(case, form).loss, evaluate(case, form).gradients["input"]
    assert loss[2] == inf and loss[[0, 1, 3, 4]].isfinite().all() and gradient.isfinite().all()


@each_form
def test_a_row_without_weight_may_have_an_infinite_loss(form: Form) -> None:
    """0 * inf is 0: by class weight, by sample weight, and in a smoothed class of weight 0."""
    x, y = torch.randn(4, C), torch.tensor([1, 2, 3, 4])
    x[1, 2] = -inf
    weight = torch.ones(C).index_fill(0, torch.tensor([2]), 0.0)
    for options in (
        {"weight": weight},
        {"weight": weight, "label_smoothing": 0.1},
        {"weight": weight, "focal_gamma": 2.0},
        {"weight": weight, "focal_gamma": 0.5, "focal_pt": "weighted"},
        {"sample_weight": torch.tensor([1.0, 0.0, 1.0, 0.5])},
        {"sample_weight": torch.tensor([1.0, 0.0, 1.0, 0.5]), "focal_gamma": 1.0, "label_smoothing": 0.5},
    ):
        for reduction in ("mean", "sum", "none"):
            case = Case(x, y, options | {"reduction": reduction})
            check(case, form)
            assert evaluate(case, form).loss.isfinite().all()


@each_form
def test_smoothing_a_masked_class_is_infinite(form: Form) -> None:
    """Mass on a class of probability 0 costs infinitely much, as in torch; a bias of -inf takes the class out."""
    x, y = torch.randn(3, C), torch.tensor([1, 2, 3])
    x[:, 7] = -inf
    loss, gradient = _gradient(form, x, y, label_smoothing=0.1)
    assert loss == inf == F.cross_entropy(x, y, label_smoothing=0.1)
    assert gradient.isfinite().all()
    out = torch.zeros(C).index_fill(0, torch.tensor([7]), -inf)
    for epsilon in (0.0, 0.1, 1.0):
        loss, gradient = _gradient(form, x.nan_to_num(neginf=0.0), y, label_smoothing=epsilon, class_bias=out)
        others = [j for j in range(C) if j != 7]
        expected = F.cross_entropy(x[:, others], y, label_smoothing=epsilon)  # labels 1, 2, 3 keep their numbers
        torch.testing.assert_close(loss, expected)
        assert not gradient[:, 7].any()


@each_form
@pytest.mark.parametrize("poison", [nan, inf, "row of -inf"], ids=str)
def test_a_row_that_is_not_a_distribution(poison: float | str, form: Form) -> None:
    """NaN as in torch, in that row alone, and the other rows have the bits they have without it."""
    clean, y = torch.randn(5, C), torch.tensor([1, 2, 3, 4, 5])
    x = clean.clone()
    x[2, slice(None) if isinstance(poison, str) else 9] = -inf if isinstance(poison, str) else poison
    for options in ({}, {"focal_gamma": 2.0}, {"class_bias": torch.randn(C), "label_smoothing": 0.1}):
        loss, gradient = _gradient(form, x, y, reduction="none", **options)
        expected, expected_gradient = _gradient(form, clean, y, reduction="none", **options)
        assert loss[2].isnan() and gradient[2].isnan().any()
        rest = [0, 1, 3, 4]
        assert torch.equal(loss[rest], expected[rest]) and torch.equal(gradient[rest], expected_gradient[rest])


@each_form
@each_float
@pytest.mark.parametrize("magnitude", [1e2, 1e4])
def test_large_logits(magnitude: float, dtype: torch.dtype, form: Form) -> None:
    """+-1e4, with ties for the largest and without: no overflow, and the digits of a difference of two."""
    seed(1)
    x = (torch.rand(64, C) * 2 - 1) * magnitude
    x[::2] = torch.where(torch.rand(32, C) < 0.3, magnitude, x[::2])
    x[1::4] = -magnitude
    case = Case(x.to(dtype), labels((64,), C), {"reduction": "none"}, upstream="random")
    if form.backend == "reference" and dtype != torch.float64:
        assert evaluate(case, form).loss.isfinite().all()  # float32 keeps an ulp of 1e4, which only the kernels avoid
    else:
        check(case, form)
    for options in OPTIONS.values():
        result = evaluate(Case(x.to(dtype), case.target, options), form)
        assert result.loss.isfinite() and result.gradients["input"].isfinite().all()


@each_form
def test_small_losses_keep_their_digits(form: Form) -> None:
    """Label ahead by d: loss log(1 + 18 e^-d), at d = 60 below 1e-24, each to 1e-6 and not only the largest."""
    ahead = torch.arange(0.0, 84.0, 2.0)
    x = torch.zeros(len(ahead), C)
    x[:, 5] = ahead
    loss, gradient = _gradient(form, x, torch.full_like(ahead, 5, dtype=torch.int64), reduction="none")
    others = 18 * torch.exp(-ahead.double())
    exact, rest = others.log1p(), others / (1 + others)
    absolute = 1e-6 if form.backend == "reference" else 0.0
    # On a GPU e^-d is exp2 of d log2(e), which is rounded: it is right to 2^-23 d of itself.
    relative = 1e-6 + (2.0**-23 * ahead.double() if form.backend in GPU_BACKENDS else 0.0)
    assert ((loss.double() - exact).abs() <= absolute + relative * exact).all()
    assert ((gradient[:, 5].double() + rest).abs() <= absolute + relative * rest).all()
    assert ((gradient[:, 0].double() - rest / 18).abs() <= absolute + relative * rest / 18).all()


# --- Certain rows and the focal factor ---


@each_form
@each_float
@pytest.mark.parametrize("gradient", ["full", "detached"])
@pytest.mark.parametrize("pt", ["raw", "weighted"])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.999, 1.0, 2.0, 50.0])
def test_focal_at_certainty(gamma: float, pt: str, gradient: str, dtype: torch.dtype, form: Form) -> None:
    """p = 1 exactly, where (1 - p)^(gamma - 1) alone is infinite: loss and gradient are 0. p = 0: the factor is 1."""
    x = torch.zeros(3, C, dtype=dtype)
    x[0, 4], x[1, 4], x[2, 4] = 2000.0, 0.5, -2000.0
    options = {"focal_gamma": gamma, "focal_pt": pt, "focal_grad": gradient}
    loss, d_x = _gradient(form, x, torch.full((3,), 4), reduction="none", **options)
    assert loss[0] == 0.0 and not d_x[0].any()
    torch.testing.assert_close(
        loss[2].double(), torch.tensor(2000.0 + math.log(18), dtype=torch.float64), rtol=1e-6, atol=0
    )
    assert d_x[2, 4] == -1.0
    check(Case(x, torch.full((3,), 4), options | {"reduction": "none"}, upstream="random"), form)
    masked = torch.full((1, C), -inf, dtype=dtype)
    masked[0, 4] = 3.0
    loss, d_x = _gradient(form, masked, torch.tensor([4]), **options)
    assert loss == 0.0 and not d_x.any()


@each_form
@pytest.mark.parametrize(
    "options",
    [
        dict(zip(("focal_gamma", "focal_pt", "focal_grad", "weight", "label_smoothing", "z_loss"), values, strict=True))
        for values in itertools.product(
            (0.0, 0.3, 1.0, 3.0),
            ("raw", "weighted"),
            ("full", "detached"),
            (None, torch.linspace(0, 2, C)),
            (0.0, 0.3, 1.0),
            (0.0, 0.01),
        )
    ],
    ids=lambda o: "-".join("w" if isinstance(v, Tensor) else str(v) for v in o.values()),
)
def test_every_focal_mode(options: dict[str, Any], form: Form) -> None:
    """The whole product: four modes by weights, smoothing and z-loss, where a row's factors meet."""
    seed(2)
    x = torch.randn(8, C) * 2
    x[0, 3] = 6.0
    y = labels((8,), C)
    y[0] = 3
    check(Case(x, y, options, upstream="random"), form)
    check(Case(x, F.one_hot(y, C) * 0.6 + 0.4 / C, options | {"reduction": "none"}, upstream="random"), form)


# --- Margins ---


@each_form
@each_float
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("margin", [0.0, 0.35, 3.0, 10.0, 50.0, -0.5, -3.0, -50.0])
def test_margins_of_every_size(margin: float, scale: float, dtype: torch.dtype, form: Form) -> None:
    """Up to scale * margin = 1500: beyond what exp of a float32 holds; on the largest logit and on others."""
    seed(3)
    x = (torch.randint(-4, 5, (2 * C, C)) / 4).to(dtype)  # quarters: u is exact in float32
    x[torch.arange(C), torch.arange(C)] = 2.0  # the label is the largest in the first half
    y = torch.arange(2 * C) % C
    tensor_margin = torch.full((C,), margin)
    tensor_margin[::3] = 0.0
    for m in (margin, tensor_margin):
        options = {"class_margin": m, "scale": scale, "reduction": "none"}
        if form.backend == "reference" and dtype != torch.float64:  # an ulp of 1500 in float32
            result, exact = evaluate(Case(x, y, options), form), truth(Case(x, y, options))
            torch.testing.assert_close(result.loss.double(), exact.loss, rtol=1e-5, atol=1e-4)
        else:
            check(Case(x, y, options, upstream="random"), form)
            check(Case(x, y, options | {"focal_gamma": 2.0, "label_smoothing": 0.1}), form)


@each_form
@each_float
@pytest.mark.parametrize("lead", [1.5, 2.75, 3.25, 40.0])
def test_a_margin_on_a_label_far_ahead(lead: float, dtype: torch.dtype, form: Form) -> None:
    """Times 30, a lead of up to 1200 taken back by a margin of 1500: the other classes are then what counts.

    Seen from the label's raw logit they underflow, in float32 from 3 (e^-90) and in float64 from 40 on.
    """
    seed(11)
    x = (torch.randint(-4, 1, (C, C)) / 4).to(dtype)
    x.fill_diagonal_(lead)
    for margin in (lead, lead + 1.0, 50.0):
        options: dict[str, Any] = {"class_margin": margin, "scale": 30.0, "reduction": "none"}
        for more in ({}, {"label_smoothing": 0.1, "focal_gamma": 2.0}):
            check(Case(x, torch.arange(C), options | more, upstream="random"), form)


# --- Smoothing, weights, sample weights ---


@each_form
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("absent", [False, True], ids=["", "absent"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.1, 0.5, 1.0])
def test_smoothing(epsilon: float, weighted: bool, absent: bool, kind: str, form: Form) -> None:
    """With weights, and with classes that are out (bias -inf) and get no mass."""
    seed(4)
    options: dict[str, Any] = {"label_smoothing": epsilon} | ({"ignore_index": 3} if kind == "labels" else {})
    options |= {"weight": torch.linspace(0, 2, C)} if weighted else {}
    y = torch.randint(0, 12, (9,))
    if absent:
        options["class_bias"] = torch.linspace(-1, 1, C).index_fill(0, torch.tensor([12, 15, 18]), -inf)
    t = F.one_hot(y, C) * 0.7 + F.one_hot(y.flip(0), C) * 0.3
    case = Case(torch.randn(9, C), y if kind == "labels" else t, options, learnable=("class_bias",) if absent else ())
    check(case, form)
    if absent:
        gradients = evaluate(case, form).gradients
        assert not gradients["input"][:, [12, 15, 18]].any() and not gradients["class_bias"][[12, 15, 18]].any()


@each_form
def test_gradients_of_scale_and_bias_with_masked_logits(form: Form) -> None:
    """A logit of -inf has probability 0 and gives its class's scale a gradient of 0, not 0 * inf."""
    seed(5)
    x, y = torch.randn(40, C), labels((40,), C - 2)
    x[:, -1] = -inf
    x[::2, -2] = -inf
    options = {"class_scale": positive(C), "class_bias": torch.randn(C), "scale": 3.0, "label_smoothing": 0.0}
    case = Case(x, y, options, upstream="random", learnable=("class_scale", "class_bias"))
    check(case, form)
    assert evaluate(case, form).gradients["class_scale"][-1] == 0.0


@each_form
def test_a_class_scale_of_zero_or_less(form: Form) -> None:
    x, y = torch.randn(9, C), labels((9,), C)
    check(Case(x, y, {"class_scale": torch.linspace(-1, 1, C)}, learnable=("class_scale",)), form)


# --- More than 2^31 elements ---


@pytest.mark.slow
@pytest.mark.parametrize("strided", [False, True], ids=["", "class_strided"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_more_than_2_to_the_31_elements(reduction: str, strided: bool) -> None:
    """[65537, 32768] float16: 4.3 GB of logits, 4.3 GB of gradient; the last row and column are beyond 32-bit indices.

    The rows looked at have the bits they have in a batch of their own. With `sum` the forward writes the gradient, with
    `none` the backward computes it.
    """
    x = torch.zeros(65537, 32768, dtype=torch.float16)
    x[-2:].normal_()
    x[:, -2:].normal_()
    x = x.t() if strided else x
    rows, classes = x.shape
    looked_at = [0, 1, rows // 2, rows - 2, rows - 1]
    y = torch.arange(rows) % classes
    y[looked_at] = torch.tensor([0, classes - 1, 17, classes - 2, classes - 1])
    small = evaluate(Case(x[looked_at].clone(), y[looked_at], {"reduction": reduction}), Form("cpu"))
    logits = x.requires_grad_()
    loss = ltk.functional.cross_entropy(logits, y, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones(()).expand(loss.shape))
    assert torch.equal(gradient[looked_at], small.gradients["input"])
    if reduction == "none":
        assert torch.equal(loss[looked_at], small.loss) and loss.isfinite().all()
    else:
        assert abs(loss.item() / rows - math.log(classes)) < 0.5

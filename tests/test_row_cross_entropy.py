"""Losses whose adjustments depend on the row: each way to compute them against the reference in float64, and what is
true of them whatever the formula (test_row_cross_entropy_published.py holds the formulas).

Class counts are on both sides of the vectors of 8 and 16 floats, over 1024 and over 5000, where kernels change how they
hold a row.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as torch_functional
from cross_entropy_cases import FLOATS, INTEGERS, LAYOUTS, UPSTREAMS, Form, each_form, labels, relative_error, seed
from row_cross_entropy_cases import CALLS, Call, F, check, device_of_form, evaluate, on_its_device  # noqa: F401
from torch import Tensor

each_call = pytest.mark.parametrize("name", CALLS)


def made(name: str, rows: int = 9, classes: int = 13, dtype: torch.dtype = torch.float32) -> Call:
    seed(len(name) + 31 * rows + 7 * classes)
    return CALLS[name](rows, classes, dtype)


# --- Against the reference in float64 ---


@each_form
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@each_call
def test_types(name: str, dtype: torch.dtype, form: Form) -> None:
    check(made(name, dtype=dtype), form)


@each_form
@pytest.mark.parametrize("classes", (1, 2, 3, 8, 16, 17, 33, 65))
@each_call
def test_few_classes(name: str, classes: int, form: Form) -> None:
    check(made(name, 5, classes), form)


@each_form
@pytest.mark.parametrize("classes", (1027, 5003))
@each_call
def test_long_rows(name: str, classes: int, form: Form) -> None:
    check(made(name, 3, classes), form)


@each_form
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("contiguous", "expanded")])
@pytest.mark.parametrize(
    "name", ("two labels with all", "arc", "gate", "seesaw", "pairwise", "equalization", "influence")
)
def test_layouts(name: str, layout: str, form: Form) -> None:
    check(made(name, 7, 19), form, layout=layout)


@each_form
@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("name", ("two labels, none", "gate of two labels", "equalization, none", "seesaw"))
def test_upstreams(name: str, upstream: str, form: Form) -> None:
    check(made(name), form, upstream)


@each_form
@pytest.mark.parametrize("rows", (0, 1, 200))
@each_call
def test_rows(name: str, rows: int, form: Form) -> None:
    call = made(name, rows, 11)
    if rows < 2:  # none, or one that is ignored
        call.arguments["empty"] = "zero"
    check(call, form)


@each_form
@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ("two labels", "arc", "seesaw, weighted and scaled", "pairwise"))
def test_types_of_labels(name: str, dtype: torch.dtype, form: Form) -> None:
    call = made(name)
    expected = evaluate(call, form)
    other = replace(call, labels=tuple(v.to(dtype) if isinstance(v, Tensor) else v for v in call.labels))
    actual = evaluate(other, form)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.gradients["input"], expected.gradients["input"])


@on_its_device
@each_form
@pytest.mark.parametrize("shape", ((4, 5, 3), (2, 5, 3, 2)))
def test_inner_dimensions(shape: tuple[int, ...], form: Form) -> None:
    """The same rows as with the classes last."""
    seed(3)
    x, row_shape = torch.randn(shape), (shape[0], *shape[2:])
    y, z = labels(row_shape, 5), labels(row_shape, 5)
    counts, gate, bias, share = torch.randint(1, 99, (5,)), torch.rand(row_shape), torch.randn(5), torch.rand(row_shape)
    flat = x.movedim(1, -1).reshape(-1, 5)
    with form.use():
        for function, more in (
            (lambda x, y, z, g, s: F.cross_entropy(x, (y, z, s), class_bias=bias, row_gate=g, reduction="none"), ()),
            (lambda x, y, z, g, s: F.seesaw_cross_entropy(x, y, counts, sample_weight=g, reduction="none"), ()),
            (
                lambda x, y, z, g, s: F.equalization_cross_entropy(x, y, counts > 50, drop_rate=1.0, reduction="none"),
                (),
            ),
        ):
            expected = function(flat, *(v.reshape(-1) for v in (y, z, gate, share)), *more)
            torch.testing.assert_close(
                function(x, y, z, gate, share, *more).reshape(-1), expected, rtol=2e-6, atol=1e-6
            )


@each_form
@pytest.mark.parametrize("denominator", ("weight", "count", 7.5, torch.tensor(5.5)), ids=str)
@pytest.mark.parametrize("name", ("two labels", "gate", "seesaw, weighted and scaled", "equalization", "influence"))
def test_denominators(name: str, denominator: object, form: Form) -> None:
    call = made(name)
    call.arguments |= {"denominator": denominator, "sample_weight": torch.rand(9) + 0.1}
    check(call, form)


# --- Properties ---


@each_form
@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("equalization")])
def test_classes_in_another_order(name: str, form: Form) -> None:
    """Drops belong to positions; all else goes with its class."""
    call = made(name, dtype=torch.float64)
    order = torch.randperm(13)
    place = order.argsort()
    tables = ("weight", "class_scale", "class_bias", "class_margin", "label_smoothing")
    there = {k: v[order] if k in tables and isinstance(v, Tensor) else v for k, v in call.arguments.items()}
    moved = replace(
        call,
        logits=call.logits[:, order],
        labels=tuple(
            torch.where(v >= 0, place[v.clamp_min(0)], v) if isinstance(v, Tensor) and not v.is_floating_point() else v
            for v in call.labels
        ),
        arguments=there,
        positional=tuple(v[order][:, order] if v.dim() == 2 else v[order] for v in call.positional),
    )
    expected, actual = evaluate(call, form), evaluate(moved, form)
    assert relative_error(actual.loss, expected.loss) <= 1e-12
    assert relative_error(actual.gradients["input"], expected.gradients["input"][:, order]) <= 1e-11


@each_form
@pytest.mark.parametrize(
    "name", ("two labels", "gate", "seesaw, weighted and scaled", "pairwise", "equalization, none", "influence")
)
def test_ignored_rows_hold_anything(name: str, form: Form) -> None:
    call = made(name)
    for label in call.labels:
        if isinstance(label, Tensor):
            label[2] = -100
    expected = evaluate(call, form)
    call.logits[2] = torch.nan
    actual = evaluate(call, form)
    assert torch.equal(actual.loss, expected.loss)
    for key, gradient in actual.gradients.items():
        assert torch.equal(gradient, expected.gradients[key])
    assert (actual.gradients["input"][2] == 0).all()


@each_form
@each_call
def test_nan_in_is_nan_out(name: str, form: Form) -> None:
    call = made(name, 4)
    call.arguments |= {"reduction": "none", "denominator": "weight"}
    call.labels[0].fill_(3)
    call.logits[1, 3] = torch.nan
    result = evaluate(call, form)
    assert result.loss.isnan().tolist() == [False, True, False, False]
    assert result.gradients["input"][1].isnan().any()
    assert result.gradients["input"][2].isfinite().all()


@each_form
@pytest.mark.parametrize(
    "name", ("two labels", "gate", "seesaw, weighted and scaled", "pairwise", "equalization", "off target")
)
def test_masked_logits(name: str, form: Form) -> None:
    """A class at -inf is no class: probability and gradient 0."""
    call = made(name)
    if name == "off target":
        call.arguments |= {"label_smoothing": 0.0}
    for label in call.labels:
        if isinstance(label, Tensor):
            label[label == 4] = 5
    call.logits[:, 4] = -torch.inf
    check(call, form)
    assert (evaluate(call, form).gradients["input"][:, 4] == 0).all()


@each_form
@pytest.mark.parametrize("sign", (-1.0, 1.0))
@pytest.mark.parametrize("name", ("two labels", "smoothing by class", "off target", "pairwise", "seesaw", "influence"))
def test_logits_of_ten_thousand(name: str, sign: float, form: Form) -> None:
    call = made(name)
    label = call.labels[0].clamp_min(0)
    call.logits[torch.arange(9), label] += sign * 1e4
    call.largest += 1e4 * (5 if name == "seesaw" else 1)
    check(call, form)


@on_its_device
@each_form
@pytest.mark.parametrize("cosine", (-1.0, -0.9999, 0.9999, 1.0))
@pytest.mark.parametrize("margin_type", ("arc", "arc_straight_through"))
def test_large_margins_far_from_the_label(margin_type: str, cosine: float, form: Form) -> None:
    """s = 64 and m = 1 with the label's cosine at its ends: finite, and at 1 the sine is held above 0."""
    seed(5)
    x, y = torch.rand(6, 10) - 0.5, torch.arange(6)
    x[range(6), y] = cosine
    x.requires_grad_()
    with form.use():
        loss = F.cross_entropy(x, y, class_margin=1.0, margin_type=margin_type, scale=64.0)
        (gradient,) = torch.autograd.grad(loss, x)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    exact = x.detach().double().requires_grad_()
    fallback = margin_type == "arc" and exact[0, 0] <= -math.cos(1.0)
    moved = exact[range(6), y].detach().clamp(-1, 1)
    moved = moved - math.sin(1.0) if fallback else (moved.acos() + 1.0).cos()
    u = 64 * exact.detach().scatter(1, y[:, None], moved[:, None])
    assert relative_error(loss.detach(), torch_functional.cross_entropy(u, y), 1.0) <= 1e-4


@on_its_device
@each_form
def test_the_mean_over_nothing(form: Form) -> None:
    x, y = torch.randn(3, 5, requires_grad=True), torch.full((3,), -100)
    z = torch.tensor([1, 2, 3])
    with form.use():
        assert F.cross_entropy(x, (y, y, 0.5)).isnan()
        loss = F.cross_entropy(x, (y, y, 0.5), empty="zero")
        assert loss == 0
        assert (torch.autograd.grad(loss, x)[0] == 0).all()
        one = F.cross_entropy(x, (y, z, 0.25), empty="zero")  # nothing for the first label, all for the second
        torch.testing.assert_close(one, 0.75 * torch_functional.cross_entropy(x, z))
        assert F.seesaw_cross_entropy(x, y, torch.ones(5), empty="zero") == 0

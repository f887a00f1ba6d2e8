"""Values and gradients of functional.cross_entropy on every backend and instruction set, against float64 truth.

The criteria stand in cross_entropy_cases.py. What is special about infinities, empty batches and large numbers is in
test_cross_entropy_limits.py, the comparison with torch's own function in test_cross_entropy_torch.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from cross_entropy_cases import (
    FLOATS,
    INTEGERS,
    LAYOUTS,
    UPSTREAMS,
    Case,
    Form,
    check,
    cross_entropy,
    each_form,
    evaluate,
    labels,
    positive,
    probabilities,
    random_case,
    seed,
    truth,
)
from torch import Tensor

import ltkernels as ltk

# --- The truth itself ---


def _formula(case: Case) -> np.ndarray:
    """The row losses as the docstring of cross_entropy defines them, in NumPy, a row at a time."""
    arguments = {k: v.double().numpy() if isinstance(v, Tensor) else v for k, v in case.arguments.items()}
    classes = case.logits.shape[0 if case.logits.dim() == 1 else 1]
    rows = np.moveaxis(np.atleast_2d(case.logits.double().numpy()), 1, -1).reshape(-1, classes)
    soft = case.target.is_floating_point()
    target = case.target.double().numpy() if soft else case.target.long().numpy()
    target = np.moveaxis(np.atleast_2d(target), 1, -1).reshape(-1, classes) if soft else target.reshape(-1)
    a, b, w, m = (arguments.get(name) for name in ("class_scale", "class_bias", "weight", "class_margin"))
    s, eps, gamma = (
        arguments.get("scale", 1.0),
        arguments.get("label_smoothing", 0.0),
        arguments.get("focal_gamma", 0.0),
    )
    r = arguments.get("sample_weight", np.ones(len(rows))).reshape(-1)
    a, b, w = (
        np.ones(classes) if a is None else a,
        np.zeros(classes) if b is None else b,
        np.ones(classes) if w is None else w,
    )
    losses = np.zeros(len(rows))
    for i, (x, y) in enumerate(zip(rows, target, strict=True)):
        if not soft and y == arguments.get("ignore_index", -100):
            continue
        t = y if soft else np.eye(classes)[y]
        margin = np.broadcast_to(0.0 if m is None else m, classes) * (0.0 if soft else t)
        u = s * (a * x + b - margin)
        lse = np.log(np.sum(np.exp(u - u.max()))) + u.max()
        present = np.isfinite(b)
        q = (1 - eps) * t + eps * present / present.sum()
        log_p = np.where(present, u - lse, 0.0)
        nll, ce = -np.sum(t * log_p), -np.sum(w * q * log_p)
        p = np.exp(-(ce if arguments.get("focal_pt") == "weighted" else nll))
        losses[i] = r[i] * (
            (max(1 - p, 0.0) ** gamma if gamma > 0 else 1.0) * ce + arguments.get("z_loss", 0.0) * lse**2
        )
    return losses


@pytest.mark.parametrize("number", range(150))
def test_the_reference_is_the_formula(number: int) -> None:
    """Without this, an error in the reference and in a kernel written after it would be none."""
    case = random_case(number)
    case.arguments = case.arguments | {"reduction": "none"}
    case.arguments.pop("denominator", None)
    np.testing.assert_allclose(truth(case).loss.numpy().reshape(-1), _formula(case), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("number", range(40))
def test_the_reference_has_the_gradient_of_its_values(number: int) -> None:
    """By finite differences, where nothing is detached."""
    case = random_case(1000 + number)
    arguments = {k: v.double() if isinstance(v, Tensor) else v for k, v in case.arguments.items()}
    arguments.pop("focal_grad", None)
    arguments.pop("class_bias", None) if not torch.isfinite(
        arguments.get("class_bias", torch.zeros(()))
    ).all() else None
    target = case.target.double() if case.target.is_floating_point() else case.target
    names = [name for name in ("class_scale", "class_bias") if name in arguments]
    variables = [case.logits[:3].double() if case.logits.dim() > 1 else case.logits.double()]
    if case.logits.dim() > 1:
        target = target[:3]
        if "sample_weight" in arguments:
            arguments["sample_weight"] = arguments["sample_weight"][:3]
    variables += [arguments[name] for name in names]

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        return cross_entropy(x, target, **arguments | dict(zip(names, parameters, strict=True)))

    with ltk.use_backend("reference"):
        assert torch.autograd.gradcheck(loss, [v.clone().requires_grad_() for v in variables], fast_mode=True)


# --- The matrix of class counts ---

# 1, 2, 3: fewer than any vector. 15, 16, 17: around the widest, 64: whole vectors only. 10, 100, 365, 1000, 1203, 8142,
# 21841, 50257: CIFAR-LT, Places-LT, ImageNet-LT, LVIS, iNaturalist, ImageNet-21k, GPT-2's tokens. 1010: an even count
# that no vector width divides.
CLASS_COUNTS = (1, 2, 3, 10, 15, 16, 17, 64, 100, 365, 1000, 1010, 1203, 8142, 21841, 50257)

# One set for each way through a kernel: no parameters; biases (logit adjustment) with weights and smoothing; a margin
# under a scale; scales and biases that learn, without reduction; probabilities.
ARGUMENT_SETS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "plain": lambda n, c: {"ignore_index": 0, "denominator": "count", "empty": "zero"},
    "adjusted": lambda n, c: {
        "class_bias": positive(c).log(),
        "weight": positive(c, zeros=c > 3),
        "label_smoothing": 0.1,
        "empty": "zero",
    },
    "margin": lambda n, c: {
        "scale": 4.0,
        "class_margin": torch.rand(c),
        "sample_weight": torch.rand(n),
        "focal_gamma": 1.5,
        "reduction": "sum",
    },
    "full": lambda n, c: {
        "class_scale": torch.rand(c) + 0.5,
        "class_bias": torch.randn(c),
        "z_loss": 1e-3,
        "reduction": "none",
    },
    "probabilities": lambda n, c: {"weight": positive(c), "label_smoothing": 0.2, "empty": "zero"},
}


def _batches(classes: int, dtype: torch.dtype) -> tuple[int, ...]:
    """0, 1, few and many rows. Rows do not know of each other: with many classes, many rows would only cost time."""
    if classes <= 100:
        return (0, 1, 3, 257)
    if dtype == torch.float32:
        return (257,) if classes < 2000 else (3,)
    return (3,) if classes < 2000 else (1,)


@lru_cache(maxsize=4)  # forms are the innermost loop
def _matrix_case(name: str, rows: int, classes: int, dtype: torch.dtype) -> Case:
    seed(classes)
    arguments = ARGUMENT_SETS[name](rows, classes)
    target = probabilities((rows, classes)) if name == "probabilities" else labels((rows,), classes)
    learnable = ("class_scale", "class_bias") if name == "full" else ()
    return Case((torch.randn(rows, classes) * 2).to(dtype), target, arguments, upstream="random", learnable=learnable)


@each_form
@pytest.mark.parametrize("name", ARGUMENT_SETS)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("classes", CLASS_COUNTS)
def test_every_class_count(classes: int, dtype: torch.dtype, name: str, form: Form) -> None:
    for rows in _batches(classes, dtype):
        check(_matrix_case(name, rows, classes, dtype), form)


@each_form
@pytest.mark.parametrize("number", range(400))
def test_random_combinations(number: int, form: Form) -> None:
    check(_random(number), form)


@cache
def _random(number: int) -> Case:
    return random_case(number)


# --- Targets ---


@each_form
@pytest.mark.parametrize("layout", ["contiguous", "offset", "every_second"])
@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda dtype: str(dtype)[6:])
def test_labels_of_every_integer_type(dtype: torch.dtype, layout: str, form: Form) -> None:
    seed(1)
    classes = 300 if torch.iinfo(dtype).max > 300 else 100
    ignored = torch.iinfo(dtype).max if dtype != torch.uint64 else 2**40  # as far as the type goes
    y = labels((40,), classes, dtype, ignored)
    check(Case(torch.randn(40, classes), y, {"ignore_index": ignored}, target_layout=layout), form)


@each_form
@pytest.mark.parametrize("target_dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_probabilities_of_another_type(dtype: torch.dtype, target_dtype: torch.dtype, form: Form) -> None:
    seed(2)
    t = probabilities((9, 33), target_dtype)
    t[0] *= 1e-4  # subnormal float16
    arguments = {"weight": positive(33), "focal_gamma": 2.0, "label_smoothing": 0.1}
    check(Case(torch.randn(9, 33).to(dtype), t, arguments, target_layout="offset"), form)


# --- Memory ---

# 19 classes: whole vectors and a rest on every instruction set. 21 rows: one tile of 16 strided rows and a part of one.
LAYOUT_SHAPES = ((19,), (21, 19), (5, 19, 7), (2, 19, 2, 3), (2, 19, 2, 1, 3), (4, 19, 0), (0, 19, 3), (21, 1))


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", LAYOUT_SHAPES, ids=str)
def test_every_layout(shape: tuple[int, ...], layout: str, dtype: torch.dtype, form: Form) -> None:
    seed(3)
    logits = torch.randn(shape).to(dtype)
    if layout == "expanded" and len(shape) > 1:
        logits = logits[:1].expand_as(logits).clone()
    row_shape = shape[:1] + shape[2:] if len(shape) > 1 else ()
    bias = {"class_bias": torch.randn(19 if shape[-1] != 1 or len(shape) > 2 else 1)}
    target_layout = layout if layout != "expanded" and row_shape else "contiguous"
    y, t = labels(row_shape, bias["class_bias"].numel()), probabilities(shape)
    for target, reduction in ((y, "sum"), (y, "none"), (t, "sum")):
        case = Case(logits, target, bias | {"reduction": reduction}, layout, upstream="random")
        case.target_layout = target_layout if target.dim() > 0 else "contiguous"
        check(case, form)


@each_form
def test_parameters_in_any_layout(form: Form) -> None:
    """Strided class vectors, and sample weights that are a transposed view."""
    seed(4)
    x, y = torch.randn(6, 19, 5), labels((6, 5), 19)
    arguments = {
        name: LAYOUTS["every_second"](positive(19)) for name in ("weight", "class_scale", "class_bias", "class_margin")
    }
    arguments["weight"] = torch.tensor(0.7).expand(19)
    arguments["sample_weight"] = torch.rand(5, 6).t()
    check(Case(x, y, arguments, learnable=("class_scale", "class_bias")), form)


@each_form
@pytest.mark.parametrize("parameter", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_parameters_of_another_type(dtype: torch.dtype, parameter: torch.dtype, form: Form) -> None:
    """torch refuses float32 weights with half logits; here any floating parameters go with any logits."""
    seed(5)
    arguments: dict[str, Any] = {
        name: positive(17, parameter) for name in ("weight", "class_scale", "class_bias", "class_margin")
    }
    arguments |= {"sample_weight": positive(33, parameter), "denominator": torch.tensor(4.5, dtype=parameter)}
    check(
        Case(torch.randn(33, 17).to(dtype), labels((33,), 17), arguments, learnable=("class_scale", "class_bias")), form
    )


# --- Reductions ---


@each_form
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("sampled", [False, True], ids=["", "sample_weight"])
def test_reductions_and_denominators(kind: str, weighted: bool, sampled: bool, form: Form) -> None:
    """Each reduction from the row losses and a denominator counted here."""
    seed(6)
    x, w, r = torch.randn(12, 7), positive(7, zeros=True) if weighted else None, torch.rand(12) if sampled else None
    y = labels((12,), 7, ignored=3) if kind == "labels" else probabilities((12, 7))
    ignored = 3 if kind == "labels" else -100  # probabilities have no label to ignore
    ones = torch.ones(12)
    used = (y != 3).float() if kind == "labels" else ones
    row_weight = (w[y] if weighted and kind == "labels" else ones) * (ones if r is None else r) * used
    expected = {"weight": row_weight.sum(), "count": used.sum(), 2.5: 2.5, 4: 4.0, torch.tensor(0.125): 0.125}
    with form.use():
        rows = cross_entropy(x, y, w, ignored, "none", sample_weight=r)
        torch.testing.assert_close(cross_entropy(x, y, w, ignored, "sum", sample_weight=r), rows.sum())
        torch.testing.assert_close(cross_entropy(x, y, w, ignored, sample_weight=r), rows.sum() / row_weight.sum())
        for denominator, value in expected.items():
            mean = cross_entropy(x, y, w, ignored, "mean", sample_weight=r, denominator=denominator, empty="zero")
            torch.testing.assert_close(mean, rows.sum() / value)


@each_form
def test_a_denominator_may_need_a_gradient(form: Form) -> None:
    x, y = torch.randn(4, 7), labels((4,), 7)
    denominator = torch.tensor(3.0, requires_grad=True)
    with form.use():
        total = cross_entropy(x, y, reduction="sum")
        cross_entropy(x, y, denominator=denominator).backward()
    torch.testing.assert_close(denominator.grad, -total / 9)


# --- Upstream gradients ---


@each_form
@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_every_upstream_gradient(dtype: torch.dtype, reduction: str, upstream: str, form: Form) -> None:
    seed(8)
    for shape in ((9, 35), (3, 35, 4)):
        row_shape = shape[:1] + shape[2:]
        arguments = {"reduction": reduction, "class_bias": torch.randn(35)}
        for learnable in ((), ("class_bias",)):
            check(
                Case(
                    torch.randn(shape).to(dtype),
                    labels(row_shape, 35),
                    arguments,
                    "contiguous",
                    "contiguous",
                    upstream,
                    learnable,
                ),
                form,
            )


@each_form
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_a_second_backward_gives_the_same_bits(dtype: torch.dtype, form: Form) -> None:
    """The first may hand out a gradient that the forward wrote; the second computes it anew."""
    seed(9)
    x = torch.randn(9, 35).to(dtype).requires_grad_()
    with form.use():
        for arguments in ({}, {"class_scale": positive(35)}, {"label_smoothing": 0.1, "class_bias": torch.randn(35)}):
            for target in (labels((9,), 35), probabilities((9, 35))):
                for upstream in (1.0, -2.5, 0.0, 0.3):
                    loss = cross_entropy(x, target, **arguments)
                    above = torch.full_like(loss, upstream)
                    first, second, third = (torch.autograd.grad(loss, x, above, retain_graph=True)[0] for _ in range(3))
                    assert torch.equal(first, second) and torch.equal(second, third)


@each_form
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_inplace_has_the_same_gradient(dtype: torch.dtype, layout: str, form: Form) -> None:
    seed(10)
    weight = torch.randn(21, 35).to(dtype).requires_grad_()
    y = labels((21,), 35, ignored=4)
    grads = []
    with form.use():
        for inplace in (False, True):
            logits = LAYOUTS[layout](weight * 1)
            loss = cross_entropy(logits, y, ignore_index=4, reduction="sum", inplace=inplace)
            grads.append(torch.autograd.grad(loss, weight)[0])
    assert torch.equal(*grads)
    case = Case(weight.detach(), y, {"ignore_index": 4, "reduction": "sum"})
    if form.backend == "cuda":  # which sums a row in an order that depends on where its memory is aligned
        case.layout = layout
    assert torch.equal(grads[1], evaluate(case, form).gradients["input"])


@each_form
def test_no_gradient_where_none_is_wanted(form: Form) -> None:
    """The same loss without a graph, and a gradient of a parameter alone."""
    seed(11)
    x, y, b = torch.randn(9, 35), labels((9,), 35), torch.randn(35)
    case = Case(x, y, {"class_bias": b}, learnable=("class_bias",))
    expected = evaluate(case, form)
    with form.use():
        for loss in (cross_entropy(x, y, class_bias=b), cross_entropy(x, y, class_bias=b.clone().requires_grad_())):
            assert torch.equal(loss.detach(), expected.loss)
        with torch.no_grad():
            assert not cross_entropy(x.clone().requires_grad_(), y, class_bias=b).requires_grad
        alone = b.clone().requires_grad_()
        cross_entropy(x, y, class_bias=alone).backward()
    assert torch.equal(alone.grad, expected.gradients["class_bias"])

"""Values with a rule of their own: labels that only the reference sees, denominators in tensors, masked logits."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cross_entropy_cases import Form, cross_entropy, each_form, relative_error
from torch import Tensor

import ltkernels as ltk

# Said once a process where the reference serves a call on the CPU: test_backends.py.
pytestmark = pytest.mark.filterwarnings("ignore:ltkernels. cross_entropy does not use the cpu backend")
nan, inf = torch.nan, torch.inf
FAR = 10**9  # times a row of floats, this is memory that no process has

# --- Labels out of range where the reference serves ---


BAD_LABELS = (7, -1, FAR, -FAR)


@pytest.mark.parametrize("label", BAD_LABELS)
@pytest.mark.parametrize("learnt", ("sample_weight", "weight", "class_margin", "input"))
def test_labels_out_of_range_inside_transforms(learnt: str, label: int) -> None:
    """The reference clamps labels before it gathers; a wrong one would pass silently if nobody looked before."""
    values = {
        "input": torch.randn(3, 7),
        "sample_weight": torch.ones(3),
        "weight": torch.ones(7),
        "class_margin": torch.zeros(7),
    }
    target = torch.tensor([0, label, 6])

    def loss(value: Tensor) -> Tensor:
        return cross_entropy(target=target, **{**values, learnt: value})

    def penalty(value: Tensor) -> Tensor:
        return torch.func.grad(loss)(value).square().sum()

    for function in (torch.func.grad(loss), torch.func.grad(penalty), lambda v: torch.func.vjp(loss, v)):
        with pytest.raises(IndexError, match=rf"target: expected labels in \[0, 7\) .*, found {label} at row 1"):
            function(values[learnt])


def test_labels_out_of_range_in_a_graph_that_cannot_look() -> None:
    """A learnt sample_weight brings the reference into the graph: NaN, as from a GPU, in the loss and in what learns.

    A finite gradient beside a loss of NaN would move the parameters before anyone sees the loss.
    """
    torch._dynamo.reset()
    smooth = {"label_smoothing": 0.1, "focal_gamma": 2.0}

    def rows(x: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        plain = cross_entropy(x, y, sample_weight=r, reduction="none")
        return plain, cross_entropy(x, y, sample_weight=r, reduction="none", **smooth)

    def mean(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return cross_entropy(x, y, sample_weight=r)

    rows, mean = (torch.compile(f, backend="aot_eager", fullgraph=True) for f in (rows, mean))
    x, r = torch.randn(3, 7, requires_grad=True), torch.ones(3, requires_grad=True)
    bad = torch.tensor([False, True, False])
    for label in BAD_LABELS:
        y = torch.tensor([0, label, 6])
        for losses in rows(x, y, r):
            d_x, d_r = torch.autograd.grad(losses.sum(), (x, r), retain_graph=True)
            assert torch.equal(losses.isnan(), bad) and torch.equal(d_x.isnan(), bad[:, None].expand(3, 7))
            assert torch.equal(d_r.isnan(), bad)
            assert losses[~bad].isfinite().all() and d_x[~bad].any()
        loss = mean(x, y, r)
        assert loss.isnan() and torch.autograd.grad(loss, x)[0][1].isnan().all()


# --- A denominator in a tensor ---


def _mean(denominator: object, **arguments: Any) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
    loss = cross_entropy(x, torch.tensor([0, 1, 3]), denominator=denominator, **arguments)
    return loss, torch.autograd.grad(loss, x)[0]


@each_form
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.int64), ids=str)
def test_a_denominator_in_a_tensor(dtype: torch.dtype, form: Form) -> None:
    """It counts samples over processes, say: the same as the number, whatever its type."""
    with form.use():
        actual, expected = _mean(torch.tensor(5, dtype=dtype)), _mean(5.0)
    for mine, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)


@each_form
def test_a_denominator_of_0_is_a_mean_over_nothing(form: Form) -> None:
    """All processes had only ignored rows: with empty="zero" a loss and gradients of 0, not of 0 * inf."""
    with form.use():
        loss, gradient = _mean(torch.tensor(0.0), empty="zero")
        assert loss == 0 and not gradient.any()
        ignored = torch.full((3,), -100)
        x = torch.randn(3, 4, requires_grad=True)
        loss = cross_entropy(x, ignored, denominator=torch.tensor(0), empty="zero")
        assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()
        assert cross_entropy(x, ignored, denominator=torch.tensor(0.0)).isnan()
        # A denominator that is not 0 is not touched by the option.
        assert torch.equal(_mean(torch.tensor(5.0), empty="zero")[1], _mean(torch.tensor(5.0))[1])


@each_form
@pytest.mark.parametrize("value", (-3.0, nan, inf, -inf), ids=str)
def test_a_bad_denominator_in_a_tensor(value: float, form: Form) -> None:
    """A negative one would turn descent into ascent, without a word."""
    for dtype in (torch.float32, torch.float64):
        with form.use(), pytest.raises(ValueError, match=rf"^denominator: expected .*, found .*{value:g}"):
            _mean(torch.tensor(value, dtype=dtype), empty="zero")


@each_form
@pytest.mark.parametrize("dtype", (torch.bool, torch.complex64), ids=str)
def test_a_denominator_of_a_wrong_type(dtype: torch.dtype, form: Form) -> None:
    """True is no number of samples, and a complex denominator made the loss a complex number."""
    with form.use(), pytest.raises(TypeError, match=rf"^denominator: expected .*, found .*{dtype}"):
        _mean(torch.tensor(1, dtype=dtype))


def test_a_denominator_in_a_compiled_graph() -> None:
    """Looking at its value would break the graph, so there it is taken as it is."""
    torch._dynamo.reset()

    def step(x: Tensor, denominator: Tensor) -> Tensor:
        return cross_entropy(x, torch.tensor([0, 1, 3]), denominator=denominator, empty="zero")

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, requires_grad=True)
    for value in (5.0, 0.0, -3.0):
        loss = compiled(x, torch.tensor(value))
        (gradient,) = torch.autograd.grad(loss, x)
        plain = cross_entropy(x, torch.tensor([0, 1, 3]), reduction="sum")
        factor = 1 / value if value else 0.0
        torch.testing.assert_close(loss, plain * factor)
        torch.testing.assert_close(gradient, torch.autograd.grad(plain, x)[0] * factor)


def test_a_learnt_denominator_has_a_gradient() -> None:
    """The quotient's derivative is -loss / denominator, and at 0 with empty="zero" the loss does not depend on it."""
    x = torch.randn(3, 4, requires_grad=True)
    for value in (5.0, 0.0):
        d = torch.tensor(value, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns where a value that learns is read as a number
            loss = cross_entropy(x, torch.tensor([0, 1, 3]), denominator=d, empty="zero")
        expected = -loss.detach() / 5.0
        torch.testing.assert_close(torch.autograd.grad(loss, d)[0], expected)


# --- ignore_index with probabilities ---


@each_form
def test_ignore_index_with_probabilities(form: Form) -> None:
    """Nothing is a label there: a caller who sets one expects rows to be left out. torch refuses it as well."""
    x, t = torch.randn(3, 4), torch.full((3, 4), 0.25)
    with form.use():
        expected = cross_entropy(x, t)
        for accepted in (-100, -1, -(2**63)):
            assert torch.equal(cross_entropy(x, t, ignore_index=accepted), expected)
        for refused in (0, 3, 255):
            with pytest.raises(ValueError, match=rf"^ignore_index: expected .* probability targets, found {refused}"):
                cross_entropy(x, t, ignore_index=refused)
            with pytest.raises(RuntimeError, match="ignore_index is not supported for floating point target"):
                torch.nn.functional.cross_entropy(x, t, ignore_index=refused)


# --- Masked logits and the gradient of class_scale ---


@each_form
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "class_bias": torch.linspace(-1, 1, 7)},
        {"focal_gamma": 2.0},  # with smoothing the loss is inf and so is the factor's derivative times it
        {"label_smoothing": 0.1, "focal_gamma": 0.5, "focal_pt": "weighted", "focal_grad": "detached"},
        {"label_smoothing": 1.0, "weight": torch.linspace(0, 2, 7)},
        {"z_loss": 0.1, "scale": 2.0, "class_margin": 0.3},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_class_scale_beside_masked_logits(
    options: dict[str, Any], reduction: str, dtype: torch.dtype, form: Form
) -> None:
    """-inf times a scale is -inf whatever the scale is, so its gradient is 0 and not the smoothing's eps times -inf.

    Rows: nothing masked, two classes masked, all classes but the label masked, and the label itself masked.
    """
    x = torch.randn(4, 7, dtype=dtype)
    x[1, :2] = -inf
    x[2, [0, 1, 2, 3, 4, 6]] = -inf
    x[3, 4] = -inf
    y = torch.tensor([3, 6, 5, 2])

    def gradients(x: Tensor) -> list[Tensor]:
        arguments = {k: v.to(x) if isinstance(v, Tensor) else v for k, v in options.items()}
        variables = (x.clone().requires_grad_(), torch.linspace(0.5, 1.5, 7, dtype=x.dtype).requires_grad_())
        loss = cross_entropy(variables[0], y, class_scale=variables[1], reduction=reduction, **arguments)
        return [g.detach() for g in torch.autograd.grad(loss.sum(), variables)]

    with ltk.use_backend("reference"):
        expected = gradients(x.double())
    with form.use():
        actual = gradients(x)
    for mine, other in zip(actual, expected, strict=True):
        assert mine.isfinite().all() and other.isfinite().all() and other.any()
        assert relative_error(mine, other) <= (1e-12 if dtype == torch.float64 else 1e-5)


# --- What no backend takes ---


def _layouts() -> Iterator[Any]:
    correct = {
        "input": torch.randn(3, 4),
        "target": torch.tensor([0, 1, 3]),
        "weight": torch.ones(4),
        "class_scale": torch.ones(4),
        "class_bias": torch.ones(4),
        "class_margin": torch.ones(4),
        "sample_weight": torch.ones(3),
    }
    for name in correct:
        yield pytest.param(correct, name, lambda v: v.to_sparse(), id=f"{name}-coo")
    soft = {"input": correct["input"], "target": torch.full((3, 4), 0.25)}
    for name in soft:
        yield pytest.param(soft, name, lambda v: v.to_sparse_csr(), id=f"{name}-csr")
        yield pytest.param(soft, name, lambda v: v.to_sparse_csc(), id=f"{name}-csc")
    yield pytest.param(soft, "target", lambda v: v.to_sparse(), id="probabilities-coo")


@each_form
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(("correct", "name", "convert"), list(_layouts()))
def test_tensors_without_strides(
    correct: dict[str, Tensor], name: str, convert: Callable[[Tensor], Tensor], form: Form
) -> None:
    """They have no memory to point a kernel at; the error has to say which argument it is."""
    with form.use(), pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .*, found .*"):
        cross_entropy(**{**correct, name: convert(correct[name])})


BEYOND = [("scale", 1e39), ("scale", 1e-46), ("focal_gamma", 1e39), ("z_loss", 1e39)]


@each_form
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("name", "value"), BEYOND)
def test_numbers_beyond_float32(name: str, value: float, dtype: torch.dtype, form: Form) -> None:
    """As float32 they are inf, or a scale of 0: every loss NaN or log C, and nothing said."""
    x, y = torch.randn(3, 4, dtype=dtype), torch.tensor([0, 1, 3])
    with form.use(), pytest.raises(ValueError, match=rf"^{name}: expected .*, found {re.escape(repr(value))}"):
        cross_entropy(x, y, **{name: value})


@each_form
@pytest.mark.parametrize("name", ("focal_gamma", "z_loss"))
def test_numbers_too_small_for_float32_are_0(name: str, form: Form) -> None:
    """Where 0 is allowed, what rounds to 0 is too: a schedule that decays to nothing is no error on its last step."""
    with form.use():
        losses = [_mean("weight", **{name: value}) for value in (1e-46, 0.0)]
    for mine, other in zip(*losses, strict=True):
        torch.testing.assert_close(mine, other)


@each_form
@pytest.mark.parametrize("name", ("scale", "focal_gamma", "z_loss"))
def test_small_and_large_numbers_of_float32_are_numbers(name: str, form: Form) -> None:
    """What float32 holds is accepted: the refusal has no margin for what somebody finds unlikely."""
    with form.use():
        for value in (1e-37, 1e30):
            assert not cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, 3]), **{name: value}).isnan()

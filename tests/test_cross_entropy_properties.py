"""What holds between calls of functional.cross_entropy: identities, and bits that do not change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import (
    FLOATS,
    FORMS,
    Case,
    Form,
    cross_entropy,
    each_checking_form,
    evaluate,
    labels,
    positive,
    probabilities,
    seed,
)
from hypothesis import given
from torch import Tensor

# Identities hold in exact arithmetic, so they are tested in float64: a float32 tolerance would hide a wrong small term.
# The backends are drawn with the numbers: every form sees a share of every property.
CLASSES = st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 33, 65, 130])
forms = st.sampled_from([form for form in FORMS if form.device == "cpu"])


class Batch(NamedTuple):
    x: Tensor
    y: Tensor
    form: Form

    @property
    def classes(self) -> int:
        return self.x.shape[1]


@st.composite
def batches(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Batch:
    classes, rows = draw(CLASSES), draw(st.integers(1, 20))
    seed(draw(st.integers(0, 2**31)))
    x = (torch.randn(rows, classes, dtype=torch.float64) * draw(st.sampled_from([0.01, 1.0, 5.0, 30.0]))).to(dtype)
    return Batch(x, torch.randint(classes, (rows,)), draw(forms))


def _run(
    batch: Batch, x: Tensor | None = None, target: Tensor | None = None, **arguments: Any
) -> tuple[Tensor, Tensor]:
    target = batch.y if target is None else target
    result = evaluate(Case(batch.x if x is None else x, target, arguments), batch.form)
    return result.loss, result.gradients["input"]


def _assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], rtol: float = 1e-11) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-13)


# --- Identities ---


@given(batches(), st.floats(-100, 100))
def test_shift_invariance(batch: Batch, shift: float) -> None:
    """Adding a number to a row changes nothing (z-loss, which pins the row's level, apart)."""
    shifts = shift * torch.linspace(-1, 1, len(batch.x), dtype=torch.float64)[:, None]
    _assert_same(_run(batch, batch.x + shifts, label_smoothing=0.1), _run(batch, label_smoothing=0.1), rtol=1e-9)


@given(batches(), st.data())
def test_permutation_equivariance(batch: Batch, data: st.DataObject) -> None:
    """Renaming the classes renames the gradient's columns."""
    order = torch.tensor(data.draw(st.permutations(range(batch.classes))))
    tables = {
        name: positive(batch.classes, torch.float64) for name in ("weight", "class_scale", "class_bias", "class_margin")
    }
    loss, gradient = _run(batch, label_smoothing=0.2, focal_gamma=1.5, **tables)
    renamed = {name: table[order] for name, table in tables.items()}
    permuted = _run(batch, batch.x[:, order], order.argsort()[batch.y], label_smoothing=0.2, focal_gamma=1.5, **renamed)
    _assert_same(permuted, (loss, gradient[:, order]))


@given(batches(), st.floats(-20, 20))
def test_a_constant_bias_is_no_bias(batch: Batch, bias: float) -> None:
    constant = torch.full((batch.classes,), bias, dtype=torch.float64)
    _assert_same(_run(batch, class_bias=constant), _run(batch), rtol=1e-10)


@given(batches())
def test_neutral_parameters_are_plain_cross_entropy(batch: Batch) -> None:
    """Each way through the kernels, with the parameters that do nothing."""
    expected = _run(batch)
    one, zero = torch.ones(batch.classes, dtype=torch.float64), torch.zeros(batch.classes, dtype=torch.float64)
    for arguments in (
        {"class_margin": 0.0},
        {"class_margin": zero},
        {"class_scale": one},
        {"class_scale": one, "class_bias": zero},
        {"weight": one, "sample_weight": torch.ones(len(batch.y), dtype=torch.float64)},
        {"denominator": "count"},
        {"denominator": float(len(batch.y))},
        {"z_loss": 0.0, "label_smoothing": 0.0, "focal_gamma": 0.0, "scale": 1},
    ):
        _assert_same(_run(batch, **arguments), expected)


@given(batches())
def test_vs_without_scales_is_logit_adjustment(batch: Batch) -> None:
    """The VS loss has multiplicative factors (n / n_max)^gamma; with gamma 0 logit adjustment is left."""
    prior = F.softmax(torch.randn(batch.classes, dtype=torch.float64), 0)
    scale = (prior / prior.max()) ** 0.0
    _assert_same(_run(batch, class_scale=scale, class_bias=prior.log()), _run(batch, class_bias=prior.log()))


@given(batches(), st.floats(0.01, 40))
def test_scale_is_an_inverse_temperature(batch: Batch, scale: float) -> None:
    loss, gradient = _run(batch, batch.x * scale, label_smoothing=0.1)
    _assert_same(_run(batch, scale=scale, label_smoothing=0.1), (loss, gradient * scale), rtol=1e-9)


@given(batches())
def test_a_margin_is_a_smaller_logit_of_the_label(batch: Batch) -> None:
    margin = torch.rand(batch.classes, dtype=torch.float64)
    moved = batch.x.clone()
    moved[torch.arange(len(batch.y)), batch.y] -= margin[batch.y]
    _assert_same(_run(batch, class_margin=margin), _run(batch, moved), rtol=1e-10)


@given(batches(), st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([0.0, 0.5, 2.0]))
def test_one_hot_probabilities_are_labels(batch: Batch, smoothing: float, gamma: float) -> None:
    """Also with weights, where only the mean's denominator differs (torch divides probabilities by N)."""
    one_hot = F.one_hot(batch.y, batch.classes).double()
    weight = positive(batch.classes, torch.float64)
    for denominator in (None, "sum", "count"):
        arguments: dict[str, Any] = {
            "weight": weight,
            "label_smoothing": smoothing,
            "focal_gamma": gamma,
            "z_loss": 0.01,
        }
        arguments |= {"reduction": "sum"} if denominator == "sum" else {"denominator": denominator or 3.0}
        # (1 - p)^gamma of probabilities comes from 1 - e^-nll, of labels from the other classes' sum: 1e-16 against
        # 1e-13
        soft, hard = _run(batch, target=one_hot, **arguments), _run(batch, **arguments)
        for a, b in zip(soft, hard, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6 if gamma else 1e-11, atol=1e-6 if gamma else 1e-13)


@given(batches())
def test_sum_is_mean_times_denominator(batch: Batch) -> None:
    weight = positive(batch.classes, torch.float64)
    total, total_gradient = _run(batch, weight=weight, reduction="sum")
    for denominator, value in (("weight", weight[batch.y].sum()), ("count", len(batch.y)), (0.25, 0.25)):
        mean, gradient = _run(batch, weight=weight, denominator=denominator)
        _assert_same((mean * value, gradient * value), (total, total_gradient))


@given(batches())
def test_gradient_rows_of_plain_cross_entropy_sum_to_zero(batch: Batch) -> None:
    options = {
        "weight": positive(batch.classes, torch.float64),
        "class_bias": torch.randn(batch.classes, dtype=torch.float64),
    }
    for target in (batch.y, F.softmax(torch.randn_like(batch.x), 1)):
        for arguments in (
            {},
            {"class_bias": options["class_bias"]},
            options,
            options | {"focal_gamma": 2.0, "label_smoothing": 0.3},
        ):
            _, gradient = _run(batch, target=target, reduction="sum", **arguments)
            assert gradient.sum(1).abs().max() <= 1e-12 * max(1.0, gradient.abs().max().item())
            assert batch.classes == 1 or gradient.abs().max() > 0


@given(batches(), st.sampled_from([0.0, 0.5, 3.0]), st.floats(0, 1))
def test_losses_are_not_negative(batch: Batch, gamma: float, smoothing: float) -> None:
    arguments = {"focal_gamma": gamma, "label_smoothing": smoothing, "z_loss": 1e-3, "reduction": "none"}
    for target in (batch.y, F.softmax(torch.randn_like(batch.x), 1)):
        loss, _ = _run(batch, target=target, class_bias=torch.randn(batch.classes, dtype=torch.float64), **arguments)
        assert (loss >= -1e-14).all()


@given(batches())
def test_focal_gamma_to_zero_is_cross_entropy(batch: Batch) -> None:
    """Linearly: halving gamma halves the distance, except where 1 - p is 0 and the factor 0 for every gamma > 0."""
    batch = batch._replace(x=batch.x.clamp(-3, 3))
    plain, plain_gradient = _run(batch, reduction="sum")
    for gamma in (1e-4, 1e-8):
        loss, gradient = _run(batch, reduction="sum", focal_gamma=gamma)
        assert (loss - plain).abs() <= 12 * gamma * plain.abs() + 1e-12
        assert (gradient - plain_gradient).norm() <= 60 * gamma * plain_gradient.norm() + 1e-12


@given(batches(), st.integers(0, 20))
def test_a_batch_in_two_parts(batch: Batch, cut: int) -> None:
    weight = positive(batch.classes, torch.float64)
    whole, gradient = _run(batch, weight=weight, reduction="sum")
    parts = [
        _run(batch, batch.x[part], batch.y[part], weight=weight, reduction="sum")
        for part in (slice(cut), slice(cut, None))
    ]
    _assert_same(
        (sum((p[0] for p in parts), torch.tensor(0.0).double()), torch.cat([p[1] for p in parts])), (whole, gradient)
    )


@given(batches(), st.floats(0.1, 10))
def test_weights_are_linear(batch: Batch, factor: float) -> None:
    """Of the sum in class and sample weights; of the mean not at all."""
    weight, row = positive(batch.classes, torch.float64), torch.rand(len(batch.y), dtype=torch.float64) + 0.1
    once = _run(batch, weight=weight, sample_weight=row, reduction="sum")
    for weights in (
        {"weight": weight * factor, "sample_weight": row},
        {"weight": weight, "sample_weight": row * factor},
    ):
        loss, gradient = _run(batch, reduction="sum", **weights)
        _assert_same((loss, gradient), (once[0] * factor, once[1] * factor))
        _assert_same(_run(batch, **weights), _run(batch, weight=weight, sample_weight=row))


# --- Bits ---

# Calls through every kernel: labels and probabilities, each affine form, half and strided rows (which pass through
# scratch memory).
BIT_ARGUMENTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "plain": lambda c: {},
    "bias": lambda c: {"class_bias": torch.randn(c), "label_smoothing": 0.1, "weight": positive(c)},
    "full": lambda c: {
        "class_scale": positive(c),
        "class_bias": torch.randn(c),
        "focal_gamma": 1.5,
        "class_margin": 0.3,
    },
    "probabilities": lambda c: {"weight": positive(c), "z_loss": 0.01},
}
# PyTorch's own reductions, of which the reference is made, promise none of this.
each_kernel = pytest.mark.parametrize("form", [form for form in FORMS if form.backend == "cpu"], ids=str)
each_argument = pytest.mark.parametrize("name", BIT_ARGUMENTS)
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])


def _bit_case(name: str, rows: int, classes: int, dtype: torch.dtype, layout: str = "contiguous") -> Case:
    seed(rows + classes)
    x = (torch.randn(rows, classes) * 3).to(dtype)
    target = probabilities((rows, classes)) if name == "probabilities" else labels((rows,), classes, ignored=2)
    ignored = {} if target.is_floating_point() else {"ignore_index": 2}
    return Case(x, target, BIT_ARGUMENTS[name](classes) | ignored, layout)


@each_kernel
@each_float
@each_argument
@pytest.mark.parametrize("layout", ["contiguous", "class_strided", "offset"])
def test_a_row_does_not_depend_on_its_neighbours(
    layout: str, name: str, dtype: torch.dtype, form: Form, threads: Callable[[int], AbstractContextManager[None]]
) -> None:
    """A part of a batch has the bits of the whole, wherever it begins: tiles hold 16 strided rows, threads take 32."""
    case = _bit_case(name, 40, 1003, dtype, layout)
    case.arguments["reduction"] = "none"
    case.upstream = "one"
    with threads(2):
        whole = evaluate(case, form)
    for part in (slice(0, 1), slice(1, 40), slice(13, 14), slice(5, 27), slice(39, 40)):
        small = evaluate(Case(case.logits[part], case.target[part], case.arguments, layout), form)
        assert torch.equal(small.loss, whole.loss[part])
        assert torch.equal(small.gradients["input"], whole.gradients["input"][part])


@each_kernel
@each_float
@each_argument
def test_the_same_bits_for_any_number_of_threads(
    name: str, dtype: torch.dtype, form: Form, threads: Callable[[int], AbstractContextManager[None]]
) -> None:
    """Also of sums over rows: the loss, the gradients of class_scale and class_bias. 257 divides by no thread count."""
    case = _bit_case(name, 257, 1003, dtype)
    case.learnable = tuple(learn for learn in ("class_scale", "class_bias") if learn in case.arguments)
    results = []
    for count in (1, 2, 3, 4):
        with threads(count):
            results.append(evaluate(case, form))
    for other in results[1:]:
        assert torch.equal(other.loss, results[0].loss)
        for learn, gradient in results[0].gradients.items():
            assert torch.equal(other.gradients[learn], gradient), learn


@each_kernel
@each_argument
def test_the_same_bits_in_20_runs(
    name: str, form: Form, threads: Callable[[int], AbstractContextManager[None]]
) -> None:
    case = _bit_case(name, 40, 1003, torch.float32)
    case.learnable = tuple(learn for learn in ("class_scale", "class_bias") if learn in case.arguments)
    first = evaluate(case, form)
    memory = []
    for run in range(20):
        memory.append(torch.full((1000 + 37 * run,), torch.nan))  # the next call's memory lies elsewhere, and was NaN
        with threads(2 if run % 4 == 0 else 1):
            again = evaluate(case, form)
        assert torch.equal(again.loss, first.loss)
        assert all(torch.equal(again.gradients[learn], gradient) for learn, gradient in first.gradients.items())


@each_kernel
@each_float
@each_argument
def test_reductions_have_the_same_row_gradients(name: str, dtype: torch.dtype, form: Form) -> None:
    """The gradient that a summed loss keeps from its forward is the one that `none` computes in its backward."""
    case = _bit_case(name, 33, 1003, dtype)
    case.arguments["reduction"] = "sum"
    total = evaluate(case, form)
    case.arguments["reduction"] = "none"
    rows = evaluate(case, form)
    assert torch.equal(total.gradients["input"], rows.gradients["input"])
    # The sum is taken in double, row by row, and rounded once.
    assert total.loss == torch.tensor(sum(rows.loss.double().tolist()), dtype=total.loss.dtype)


@each_checking_form
def test_no_call_changes_the_floating_point_environment(form: Form) -> None:
    """The kernels flush subnormal numbers while they run; the caller's arithmetic must not."""
    smallest = torch.tensor([1e-40])
    case = _bit_case("bias", 9, 33, torch.float32)
    evaluate(case, form)
    with form.use(), pytest.raises(IndexError):
        cross_entropy(torch.randn(2, 3), torch.tensor([0, 3]))
    with form.use(), pytest.raises(ValueError):
        cross_entropy(torch.randn(2, 3), torch.tensor([[0.5, 0.5, 0.0], [0.5, torch.nan, 0.5]]))
    assert (smallest * 0.5).item() > 0.0

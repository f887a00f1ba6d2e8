"""With torch's arguments, functional.cross_entropy is torch's: values, gradients, shapes, NaN."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import Form, cross_entropy, each_form, labels, positive, probabilities, relative_error, seed
from torch import Tensor

CALLS = 300


def _torch_call(number: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A call drawn over all that torch accepts; labels are int64: its uint8 ones have no gradient under smoothing."""
    rng = random.Random(number)
    seed(number)
    classes = rng.choice((1, 2, 3, 5, 16, 17, 40, 101))
    inner = rng.choice(((), (), (), (3,), (0,), (2, 3), (2, 2, 3)))
    rows = rng.choice((0, 1, 2, 4, 19))
    shape = (classes,) if rng.random() < 0.15 else (rows, classes, *inner)
    row_shape = () if len(shape) == 1 else (rows, *inner)
    dtype = rng.choice((torch.float64, torch.float64, torch.float32))
    logits = torch.randn(shape, dtype=dtype) * rng.choice((0.1, 1.0, 5.0))
    arguments: dict[str, Any] = {"reduction": rng.choice(("none", "mean", "sum"))}
    if rng.random() < 0.5:
        arguments["weight"] = positive(classes, dtype, zeros=rng.random() < 0.3)
    if rng.random() < 0.5:
        arguments["label_smoothing"] = rng.choice((0.0, 0.05, 0.3, 1.0))
    if rng.random() < 0.3:
        return logits, probabilities(shape, dtype), arguments
    ignored = rng.choice((None, None, -100, -1, 0, classes - 1))
    if ignored is not None:
        arguments["ignore_index"] = ignored
    target = labels(row_shape, classes, torch.int64, ignored)
    if ignored is not None and rng.random() < 0.15:
        target = torch.full(row_shape, ignored)
    return logits, target, arguments


def _value_and_gradient(
    function: Any, logits: Tensor, target: Tensor, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    loss = function(logits, target, **arguments)
    seed(0)
    (gradient,) = torch.autograd.grad(loss, logits, torch.randn_like(loss))
    return loss.detach(), gradient


def _assert_torchs(actual: Tensor, expected: Tensor, limit: float, least: float = 0.0) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())  # torch's mean over nothing
    assert relative_error(actual.nan_to_num(0.0), expected.nan_to_num(0.0), least) <= limit


@each_form
@pytest.mark.parametrize("number", range(CALLS))
def test_random_calls(number: int, form: Form) -> None:
    logits, target, arguments = _torch_call(number)
    loss, gradient = _value_and_gradient(F.cross_entropy, logits, target, arguments)
    # The float32 limit covers torch's own rounding; confident rows (logits times 5) have small losses, of which torch
    # keeps an ulp of the largest logit.
    limit = 1e-11 if logits.dtype == torch.float64 else 3e-6
    with form.use():
        actual_loss, actual_gradient = _value_and_gradient(cross_entropy, logits, target, arguments)
    _assert_torchs(actual_loss, loss, limit, least=0.1)
    mean_of_unweighted = loss.isnan().any() and not bool((target == arguments.get("ignore_index", -100)).all())
    if not mean_of_unweighted:  # 0 / 0 with rows that take part: torch's gradients are NaN or 0 by the code path
        _assert_torchs(actual_gradient, gradient, limit, least=0.1)


def test_the_random_calls_reach_every_corner() -> None:
    """What the 300 calls above contain, so that a change of the generator cannot quietly lose it."""
    calls = [_torch_call(number) for number in range(CALLS)]
    assert {x.dim() for x, _, _ in calls} == {1, 2, 3, 4, 5}
    assert sum(x.numel() == 0 for x, _, _ in calls) >= 10
    assert sum(t.is_floating_point() for _, t, _ in calls) >= 60
    assert sum("weight" in a and a.get("label_smoothing", 0) > 0 for _, _, a in calls) >= 40
    assert sum(bool((t == a["ignore_index"]).any()) for _, t, a in calls if "ignore_index" in a) >= 30
    assert sum(bool(F.cross_entropy(x, t, **a).isnan().any()) for x, t, a in calls) >= 10


@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_logits_are_torchs_in_float32(dtype: torch.dtype, form: Form) -> None:
    """torch's loss of half logits is half; ours is what torch says of the same logits in float32, the gradient half."""
    seed(0)
    x, y = torch.randn(33, 100).to(dtype), labels((33,), 100)
    loss, gradient = _value_and_gradient(F.cross_entropy, x.float(), y, {"label_smoothing": 0.1})
    with form.use():
        actual_loss, actual_gradient = _value_and_gradient(cross_entropy, x, y, {"label_smoothing": 0.1})
    assert actual_loss.dtype == torch.float32 and actual_gradient.dtype == dtype
    assert relative_error(actual_loss, loss) <= 1e-6
    assert relative_error(actual_gradient, gradient) <= 1.1 * relative_error(gradient.to(dtype), gradient)


@each_form
def test_as_positional_arguments(form: Form) -> None:
    x, y, w = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 2]), positive(5)
    with form.use():
        torch.testing.assert_close(
            cross_entropy(x, y, w, 2, "sum", 0.2),
            F.cross_entropy(x, y, w, ignore_index=2, reduction="sum", label_smoothing=0.2),
        )

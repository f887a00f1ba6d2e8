"""What rebalances a trained classifier: changes of prior, calibration by counts, normalised class vectors."""

from __future__ import annotations

import math

import pytest
import torch

from ltkernels import rebalance as rb

COUNTS = [900, 90, 10]


def test_a_change_of_prior_is_bayes_rule() -> None:
    """From p(x | y) and one prior to the posterior of another."""
    likelihood = torch.rand(50, 3, dtype=torch.float64) + 0.05
    source, target = torch.tensor(COUNTS).double() / 1000, torch.tensor([0.2, 0.3, 0.5]).double()
    logits = (likelihood * source).log() + torch.randn(50, 1)  # any constant of the row
    expected = likelihood * target / (likelihood * target).sum(1, keepdim=True)
    for given in (target, target * 40, (target * 10).tolist()):
        actual = rb.adjust_logits(logits, COUNTS, target_prior=given).softmax(1)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_a_prior_without_source_and_back() -> None:
    logits = torch.randn(4, 3, 2, dtype=torch.float64)
    prior = torch.tensor(COUNTS).double().log().view(3, 1)
    added = rb.adjust_logits(logits, COUNTS, tau=0.0, target_prior=COUNTS)
    torch.testing.assert_close(added.softmax(1), (logits + prior).softmax(1))
    back = rb.adjust_logits(logits, COUNTS, target_prior=COUNTS)
    torch.testing.assert_close(back, logits)
    equal = rb.adjust_logits(logits, COUNTS, target_prior=[1, 1, 1])
    torch.testing.assert_close(equal.softmax(1), rb.adjust_logits(logits, COUNTS).softmax(1))


def test_absent_classes_of_either_prior_are_never_predicted() -> None:
    logits = torch.full((2, 3), 5.0)
    for counts, target in (([9, 0, 4], [1, 1, 1]), ([9, 2, 4], [1, 0, 1]), ([9, 0, 4], [1, 0, 1]), ([9, 0, 4], None)):
        moved = rb.adjust_logits(logits, counts, target_prior=target)
        assert moved[:, 1].isneginf().all()
        assert moved[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ([1, 2], ValueError, "target_prior: expected shape (3,) as class_counts, found (2,)"),
        ([1, -2, 3], ValueError, "target_prior: expected all counts >= 0, found -2 at class 1"),
        (["a", "b", "c"], TypeError, "target_prior: expected integers or floats, found list of <U1"),
    ],
)
def test_wrong_priors(target: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        rb.adjust_logits(torch.zeros(1, 3), COUNTS, target_prior=target)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize("gamma", (0.0, 0.6, 1.0))
@pytest.mark.parametrize("background", (None, -1, 0, 2))
def test_norcal(gamma: float, background: int | None) -> None:
    columns = 3 if background is None else 4
    p = torch.rand(5, columns, dtype=torch.float64).softmax(1)
    factor = torch.tensor(COUNTS).double() ** -gamma
    if background is not None:
        at = background % 4
        factor = torch.cat((factor[:at], torch.ones(1, dtype=torch.float64), factor[at:]))
    expected = p * factor / (p * factor).sum(1, keepdim=True)
    torch.testing.assert_close(rb.norcal(p.log(), COUNTS, gamma, background=background), expected)
    torch.testing.assert_close(rb.norcal(p.log()[0] + 7.0, COUNTS, gamma, background=background), expected[0])
    boxes = p.log().T.reshape(1, columns, 5)
    torch.testing.assert_close(rb.norcal(boxes, COUNTS, gamma, background=background)[0].T, expected)
    if background is None:
        torch.testing.assert_close(rb.adjust_logits(p.log(), COUNTS, gamma).softmax(1), expected)


def test_norcal_of_classes_without_samples_and_of_half() -> None:
    p = rb.norcal(torch.zeros(2, 4, dtype=torch.float16), [3, 0, 1], 0.5, background=3)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p[0], torch.tensor([3**-0.5, 0, 1, 1]) / (2 + 3**-0.5))
    assert (rb.norcal(torch.zeros(2, 2), [3, 0], 0.0)[:, 1] == 0).all()  # whatever gamma, as in adjust_logits


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gamma": -1.0}, ValueError, "gamma: expected a finite number >= 0, found -1.0"),
        ({"background": 4}, ValueError, "background: expected a column in [-4, 4), found 4"),
        ({"background": 1.0}, TypeError, "background: expected an integer, found 1.0"),
        ({"background": -1}, ValueError,
         "logits: expected shape (C,), (N, C) or (N, C, d1, ...) with C = 4 (the length of class_counts and the"
         " background), found (1, 3)"),
        ({"class_counts": [1, 2]}, ValueError,
         "logits: expected shape (C,), (N, C) or (N, C, d1, ...) with C = 2 (the length of class_counts),"
         " found (1, 3)"),
        ({"logits": torch.zeros(1, 3, dtype=torch.int64)}, TypeError,
         "logits: expected a floating tensor, found torch.int64"),
    ],
)  # fmt: skip
def test_wrong_norcal(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        rb.norcal(**{"logits": torch.zeros(1, 3), "class_counts": COUNTS, **arguments})  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize("tau", (0.0, 0.7, 1.0, 2.0))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16))
def test_tau_normalize(tau: float, dtype: torch.dtype) -> None:
    weight = (torch.randn(6, 40) * torch.logspace(-1, 1, 6)[:, None]).to(dtype)
    weight[3] = 0
    actual = rb.tau_normalize(weight, tau)
    assert actual.dtype == dtype
    exact = weight.double()
    expected = torch.stack([w / max(math.sqrt(float((w * w).sum())), 1e-30) ** tau for w in exact])
    torch.testing.assert_close(actual.double(), expected, rtol={8: 1e-13, 4: 2e-6, 2: 1e-3}[dtype.itemsize], atol=1e-7)
    assert (actual[3] == 0).all()
    if tau == 0:
        assert torch.equal(actual, weight)


def test_half_vectors_whose_squares_half_does_not_hold() -> None:
    weight = torch.full((2, 4), 3000.0, dtype=torch.float16)
    torch.testing.assert_close(rb.tau_normalize(weight), torch.full((2, 4), 0.5, dtype=torch.float16))


def test_wrong_vectors() -> None:
    with pytest.raises(ValueError, match=r"^weight: expected shape \(C, D\), found \(3,\)"):
        rb.tau_normalize(torch.ones(3))
    with pytest.raises(TypeError, match="^weight: expected a floating tensor, found torch.int64"):
        rb.tau_normalize(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="^tau: expected a finite number >= 0, found -1"):
        rb.tau_normalize(torch.ones(3, 2), -1.0)

"""Properties of expert_cross_entropy and aggregate_experts."""

from __future__ import annotations

import torch
from cross_entropy_cases import Form, seed
from expert_cases import aggregate_experts, assert_near, evaluate, logits, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=25)
@given(experts=st.integers(1, 5), rows=st.integers(1, 6), classes=st.integers(1, 40), number=st.integers(0, 2**31 - 1))
def test_a_number_added_to_an_expert_changes_nothing(experts: int, rows: int, classes: int, number: int) -> None:
    seed(number)
    z, y = logits(experts, rows, classes), torch.randint(0, classes, (rows,))
    moved = z + logits(experts, rows, 1, spread=10.0)
    for options in ({}, {"diversity_factor": -0.2}):
        first, second = (evaluate(Form("cpu"), x, y, **options) for x in (z, moved))
        assert_near(second, first, z.dtype) if classes > 1 else None
        torch.testing.assert_close(first[0], second[0], rtol=1e-9, atol=1e-9)


@settings(max_examples=25)
@given(experts=st.integers(1, 5), rows=st.integers(1, 6), classes=st.integers(1, 40), number=st.integers(0, 2**31 - 1))
def test_a_mean_lies_between_the_experts(experts: int, rows: int, classes: int, number: int) -> None:
    seed(number)
    z = logits(experts, rows, classes, dtype=torch.float32)
    for mode, value in (("logits", z), ("probs", z.softmax(2)), ("log_probs", z.log_softmax(2))):
        for weight in weights_of(experts, rows, classes).values():
            mean = aggregate_experts(z, None if weight is None else weight.float(), mode)
            slack = 1e-5 * (1 + float(value.abs().max()))
            assert bool((mean >= value.amin(0) - slack).all() and (mean <= value.amax(0) + slack).all())

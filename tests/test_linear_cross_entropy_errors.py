"""Wrong calls of linear_cross_entropy: what is said is the argument, what was expected and what was found."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_cross_entropy_cases import chunks_of, linear_cross_entropy

import ltkernels as ltk

X, W, Y = torch.zeros(4, 3), torch.zeros(5, 3), torch.tensor([0, 1, 2, 4])
B = torch.zeros(5)
T = torch.full((4, 5), 0.2)
BELOW = T - (Y == 4)[:, None] * 1.2
NEGATIVE, ABSENT = torch.tensor([1.0, 1, -1, 1, 1]), torch.tensor([0.0, 0, 0, 0, -math.inf])
ERRORS: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "input: expected a torch.Tensor, found list", ([1.0], W, Y), {}),
    (TypeError, "input: expected float64, .* found torch.int64", (X.long(), W, Y), {}),
    (TypeError, "linear_weight: expected a torch.Tensor, found NoneType", (X, None, Y), {}),
    (ValueError, r"linear_weight: expected shape \(C, D\) or .* found \(3,\)", (X, torch.zeros(3), Y), {}),
    (ValueError, r"linear_weight: expected shape .* with C >= 1, found \(0, 3\)", (X, torch.zeros(0, 3), Y), {}),
    (ValueError, r"input: expected shape \(..., 3\) .* \(5, 3\), found \(4, 2\)", (torch.zeros(4, 2), W, Y), {}),
    (ValueError, r"input: expected shape \(..., 3\) .* found \(\)", (torch.zeros(()), W, Y), {}),
    (ValueError, r"input: expected shape \(N, 3\) .* found \(3,\)", (X[0], torch.zeros(5, 2, 3), Y), {}),
    (TypeError, "linear_weight: expected torch.float32 as input's, found torch.float64", (X, W.double(), Y), {}),
    (ValueError, "linear_weight: expected device cpu as input's, found meta", (X, W.to("meta"), Y), {}),
    (ValueError, r"linear_bias: expected shape \(5,\), found \(4,\)", (X, W, Y), {"linear_bias": torch.zeros(4)}),
    (TypeError, "linear_bias: expected torch.float32 .* found torch.float16", (X, W, Y), {"linear_bias": B.half()}),
    (TypeError, "target: expected a torch.Tensor, found list", (X, W, [0, 1]), {}),
    (TypeError, "target: expected labels of an integer type or .* found torch.bool", (X, W, Y.bool()), {}),
    (ValueError, r"target: expected labels of shape \(4,\), found \(3,\)", (X, W, Y[:3]), {}),
    (ValueError, r"target: expected probabilities of shape \(4, 5\), found \(4,\)", (X, W, Y.float()), {}),
    (ValueError, "target: expected device cpu as input's, found meta", (X, W, Y.to("meta")), {}),
    (ValueError, "target: expected labels or .* a tuple of 2", (X, W, (Y, Y)), {}),
    (TypeError, r"target\[1\]: expected labels of an integer type, found torch.float32", (X, W, (Y, T, 0.5)), {}),
    (ValueError, "lam: expected a finite number >= 0 and <= 1, found 2.0", (X, W, (Y, Y, 2.0)), {}),
    (ValueError, r"lam: expected shape \(4,\), one number or .* found \(2,\)", (X, W, (Y, Y, torch.rand(2))), {}),
    (IndexError, r"target: expected labels in \[0, 5\) .* found 5 at row 3", (X, W, torch.tensor([0, 1, 2, 5])), {}),
    (IndexError, "target: .* found 7 at row 3", (X, W, (Y, torch.tensor([0, 1, 2, 7]), 0.5)), {}),
    (ValueError, "target: expected finite probabilities >= 0, found -1 at row 3", (X, W, BELOW), {}),
    (ValueError, "ignore_index: expected None with probability targets, found -100", (X, W, T), {"ignore_index": -100}),
    (TypeError, "ignore_index: expected an integer, found 1.5", (X, W, Y), {"ignore_index": 1.5}),
    (ValueError, r"weight: expected shape \(5,\)", (X, W, Y), {"weight": torch.ones(4)}),
    (ValueError, "weight: expected finite values >= 0, found -1 at index 2", (X, W, Y), {"weight": NEGATIVE}),
    (ValueError, "class_bias: expected finite values or -inf, found nan", (X, W, Y), {"class_bias": B + math.nan}),
    (ValueError, "target: .* found class 4 with class_bias -inf", (X, W, Y), {"class_bias": ABSENT}),
    (ValueError, "class_margin: expected None with probability", (X, W, T), {"class_margin": 0.1}),
    (ValueError, r"sample_weight: expected shape \(4,\), one value a row", (X, W, Y), {"sample_weight": B}),
    (TypeError, "sample_weight: expected a floating type", (X, W, Y), {"sample_weight": Y}),
    (ValueError, "sample_weight: .* found -1 at index 3", (X, W, Y), {"sample_weight": torch.tensor([1.0, 1, 1, -1])}),
    (ValueError, r"row_gate: expected shape \(4,\)", (X, W, Y), {"row_gate": B}),
    (ValueError, "class_margin: expected a margin with margin_type='arc'", (X, W, Y), {"margin_type": "arc"}),
    (ValueError, "margin_type: expected 'additive' or", (X, W, Y), {"margin_type": "angle"}),
    (ValueError, "label_smoothing: expected .* found 2", (X, W, Y), {"label_smoothing": 2.0}),
    (ValueError, "scale: expected a finite number > 0, found 0.0", (X, W, Y), {"scale": 0.0}),
    (ValueError, "reduction: expected 'none' or 'mean' or 'sum'", (X, W, Y), {"reduction": "max"}),
    (ValueError, "denominator: expected the default", (X, W, Y), {"reduction": "sum", "denominator": "count"}),
    (TypeError, "normalize: expected a bool, found int", (X, W, Y), {"normalize": 1}),
    (TypeError, "options: expected a torch.nn.LinearCrossEntropyOptions, found dict", (X, W, Y), {"options": {}}),
    (
        ValueError,
        "options: expected batch_chunk_size or chunking_method, found both, which ask for 3 and 2 rows",
        (X, W, Y),
        {"options": torch.nn.LinearCrossEntropyOptions(batch_chunk_size=3, chunking_method="aspect_ratio")},
    ),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"), ERRORS, ids=[f"{i}-{e[1][:24]}" for i, e in enumerate(ERRORS)]
)
def test_wrong_calls(
    error: type[Exception],
    message: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The wrong row is in the second chunk: what is said is its place in the call."""
    chunks_of(3, monkeypatch)
    with ltk.use_backend(backend), pytest.raises(error, match=message):
        linear_cross_entropy(*arguments, **options)


def test_a_wrong_value_found_where_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(3, monkeypatch)
    x = X.clone().requires_grad_()
    with pytest.raises(IndexError, match="found 5 at row 3"):
        linear_cross_entropy(x, W, torch.tensor([0, 1, 2, 5]))
    loss = linear_cross_entropy(x, W, (y := Y.clone()), reduction="none")
    y[3] = 9  # the backward reads it again
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()

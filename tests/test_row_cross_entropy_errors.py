"""Wrong calls of the losses whose adjustments depend on the row: type and words of what is raised, on every backend
that looks at values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cross_entropy_cases import Form, each_checking_form
from torch import Tensor

import ltkernels as ltk

F = ltk.functional
X, Y, Z = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 1, 0])


def ce(**arguments: Any) -> Callable[[], Tensor]:
    target = arguments.pop("target", Y)
    return lambda: F.cross_entropy(X, target, **arguments)


def seesaw(counts: Any = None, **arguments: Any) -> Callable[[], Tensor]:
    return lambda: F.seesaw_cross_entropy(X, Y, torch.ones(3) if counts is None else counts, **arguments)


def pairwise(table: Any) -> Callable[[], Tensor]:
    return lambda: F.pairwise_cross_entropy(X, Y, table)


def equalization(rare: Any = None, **arguments: Any) -> Callable[[], Tensor]:
    rare = torch.tensor([True, False, True]) if rare is None else rare
    return lambda: F.equalization_cross_entropy(X, Y, rare, **arguments)


ARC: dict[str, Any] = {"margin_type": "arc", "class_margin": 0.5}
WRONG: list[tuple[Callable[[], Tensor], type[Exception], str]] = [
    # two labels
    (ce(target=(Y, Z)), ValueError, "target: expected labels or (labels, other labels, lam), found a tuple of 2"),
    (ce(target=(Y, Z[:3], 0.5)), ValueError,
     "target[1]: expected labels of shape (4,) for input of shape (4, 3), found (3,)"),
    (ce(target=(Y, Z.float(), 0.5)), TypeError,
     "target[1]: expected labels of an integer type for this loss, found torch.float32"),
    (ce(target=(X.softmax(1), Z, 0.5)), TypeError,
     "target[0]: expected labels of an integer type for this loss, found torch.float32"),
    (ce(target=(Y, [1, 2, 3, 0], 0.5)), TypeError, "target[1]: expected a torch.Tensor, found list"),
    (ce(target=(Y, Z, 1.5)), ValueError, "lam: expected a finite number >= 0 and <= 1, found 1.5"),
    (ce(target=(Y, Z, math.nan)), ValueError, "lam: expected a finite number >= 0 and <= 1, found nan"),
    (ce(target=(Y, Z, "0.5")), TypeError, "lam: expected a number, found str"),
    (ce(target=(Y, Z, torch.ones(3))), ValueError,
     "lam: expected one number, or the labels' shape (4,), found shape (3,)"),
    (ce(target=(Y, Z, torch.ones(4, dtype=torch.int64))), TypeError,
     "lam: expected a floating type, found torch.int64"),
    (ce(target=(Y, Z, torch.tensor([0.5, 0.5, -0.1, 0.0]))), ValueError,
     "lam: expected values in [0, 1], found -0.1 at index 2"),
    (ce(target=(Y, torch.tensor([0, 3, 1, 1]), 0.5)), IndexError, "expected labels in [0, 3)"),
    (ce(target=(torch.tensor([0, -1, 1, 1]), Y, 0.5)), IndexError, "expected labels in [0, 3)"),
    # smoothing
    (ce(label_smoothing=torch.ones(2)), ValueError,
     "label_smoothing: expected shape (3,), one value a class, found (2,)"),
    (ce(label_smoothing=torch.tensor([0, 1, 0])), TypeError,
     "label_smoothing: expected a floating type, found torch.int64"),
    (ce(label_smoothing=torch.tensor([0.0, 1.5, 0.0])), ValueError,
     "label_smoothing: expected values in [0, 1], found 1.5 at index 1"),
    (ce(label_smoothing=torch.zeros(3), target=X.softmax(1)), TypeError,
     "target: expected labels of an integer type for this loss, found torch.float32"),
    (ce(smoothing_mode="others"), ValueError, "smoothing_mode: expected 'all' or 'off_target', found 'others'"),
    (ce(smoothing_mode="off_target", label_smoothing=1.5), ValueError,
     "label_smoothing: expected a finite number >= 0 and <= 1, found 1.5"),
    # margins on the angle
    (ce(margin_type="angle"), ValueError,
     "margin_type: expected 'additive' or 'arc' or 'arc_straight_through', found 'angle'"),
    (ce(margin_type="arc"), ValueError, "class_margin: expected a margin with margin_type='arc', found None"),
    (ce(margin_type="arc", class_margin=4.0), ValueError,
     "class_margin: expected a finite number >= 0 and <= 3.14159, found 4.0"),
    (ce(margin_type="arc", class_margin=torch.tensor([0.5, -0.5, 0.5])), ValueError,
     "class_margin: expected angles in [0, pi], found -0.5 at index 1"),
    (ce(**ARC, row_gate=torch.ones(4)), ValueError, "row_gate: expected None with margin_type='arc', found a tensor"),
    # gate
    (ce(row_gate=torch.ones(3)), ValueError, "row_gate: expected shape (4,), one value a row, found (3,)"),
    (ce(row_gate=0.5), TypeError, "row_gate: expected a torch.Tensor, found float"),
    (ce(row_gate=torch.ones(4, dtype=torch.int32)), TypeError, "row_gate: expected a floating type, found torch.int32"),
    (ce(row_gate=torch.tensor([0.0, math.inf, 0.0, 0.0])), ValueError,
     "row_gate: expected finite values, found inf at index 1"),
    (ce(target=Y % 2, row_gate=torch.ones(4), class_bias=torch.tensor([0.0, 0.0, -math.inf])), ValueError,
     "class_bias: expected finite values with a row_gate, found -inf at index 2"),
    # influence
    (ce(feature_norm=torch.ones(4, 1)), ValueError,
     "feature_norm: expected shape (4,), one value a row, found (4, 1)"),
    (ce(feature_norm=torch.tensor([1.0, -1.0, 1.0, 1.0])), ValueError,
     "feature_norm: expected finite values >= 0, found -1 at index 1"),
    (ce(feature_norm=torch.ones(4), influence_alpha=0.0), ValueError,
     "influence_alpha: expected a finite number > 0, found 0.0"),
    (ce(feature_norm=torch.ones(4), influence_eps=0.0), ValueError,
     "influence_eps: expected a finite number > 0, found 0.0"),
    # seesaw
    (seesaw(torch.ones(2)), ValueError, "class_counts: expected shape (3,), found (2,)"),
    (seesaw([1, 2, 3]), TypeError, "class_counts: expected a torch.Tensor, found list"),
    (seesaw(torch.ones(3, dtype=torch.bool)), TypeError,
     "class_counts: expected an integer or floating type, found torch.bool"),
    (seesaw(torch.tensor([1, -2, 3])), ValueError, "class_counts: expected finite values >= 0, found -2 at index 1"),
    (seesaw(torch.tensor([1, 2, math.nan])), ValueError,
     "class_counts: expected finite values >= 0, found nan at index 2"),
    (seesaw(p=-1.0), ValueError, "p: expected a finite number >= 0, found -1.0"),
    (seesaw(q=math.inf), ValueError, "q: expected a finite number >= 0, found inf"),
    (seesaw(eps=0.0), ValueError, "eps: expected a finite number > 0 and <= 1, found 0.0"),
    (seesaw(scale=0.0), ValueError, "scale: expected a finite number > 0, found 0.0"),
    (seesaw(reduction="max"), ValueError, "reduction: expected "),
    (lambda: F.seesaw_cross_entropy(X, X.softmax(1), torch.ones(3)), TypeError,
     "target: expected labels of an integer type for this loss, found torch.float32"),
    # a table of pairs
    (pairwise(torch.zeros(3)), ValueError, "pair_bias: expected shape (3, 3), found (3,)"),
    (pairwise(torch.zeros(3, 3, dtype=torch.int64)), TypeError,
     "pair_bias: expected a floating type, found torch.int64"),
    (pairwise(torch.full((3, 3), math.inf)), ValueError, "pair_bias: expected finite values or -inf, found inf"),
    (pairwise(torch.full((3, 3), -math.inf)), ValueError,
     "pair_bias: expected finite values on the diagonal, found -inf"),
    # drops
    (equalization(torch.ones(3)), TypeError, "rare: expected torch.bool, found torch.float32"),
    (equalization(torch.ones(2, dtype=torch.bool)), ValueError, "rare: expected shape (3,) on cpu, found (2,) on cpu"),
    (equalization(drop_rate=1.5), ValueError, "drop_rate: expected a finite number >= 0 and <= 1, found 1.5"),
    (equalization(seed=0.5), TypeError, "seed: expected an integer, found 0.5"),
    (equalization(step=-1), ValueError, "step: expected >= 0 and below 4294967296, found -1"),
    (equalization(step=torch.zeros(1, dtype=torch.int64)), ValueError,
     "step: expected an integer or a 0-d int64 tensor on cpu, found torch.int64 of shape (1,) on cpu"),
]  # fmt: skip


@each_checking_form
@pytest.mark.parametrize(
    ("call", "error", "message"), WRONG, ids=[f"{n}-{m[:40]}" for n, (_, _, m) in enumerate(WRONG)]
)
def test_wrong_calls(call: Callable[[], Tensor], error: type[Exception], message: str, form: Form) -> None:
    with form.use(), pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert type(caught.value) is error


@each_checking_form
def test_a_wrong_label_is_named(form: Form) -> None:
    with form.use(), pytest.raises(IndexError, match=r"found 7 at .*1"):
        F.cross_entropy(X, (Y, torch.tensor([0, 7, 1, 1]), 0.5))

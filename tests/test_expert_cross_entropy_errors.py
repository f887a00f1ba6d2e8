"""expert_cross_entropy: wrong calls and their messages; on a GPU what is found behind the call's back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cross_entropy_cases import Form, each_checking_form, each_gpu_form
from expert_cases import expert_cross_entropy, logits

import ltkernels as ltk
from ltkernels.ops import expert_cross_entropy as op
from ltkernels.ops.options import ExpertCrossEntropyOptions, Reduction

Z, Y, BEFORE = torch.zeros(2, 3, 4), torch.tensor([0, 3, 1]), torch.tensor([0, -1, 1])
ERRORS: list[tuple[type[Exception], str, Any, Any, dict[str, Any]]] = [
    (ValueError, "input: expected at least one expert, found none", [], Y, {}),
    (ValueError, r"input: expected shape \(E, N, C\) with E >= 1", torch.zeros(0, 3, 4), Y, {}),
    (ValueError, r"input: expected shape \(E, N, C\)", torch.zeros(3, 4), Y, {}),
    (ValueError, "input: expected shape .* C >= 1, found", torch.zeros(2, 3, 0), Y, {}),
    (ValueError, "input: expected experts of one shape", [torch.zeros(3, 4), torch.zeros(3, 5)], Y, {}),
    (TypeError, r"input\[1\]: expected a torch.Tensor, found NoneType", [torch.zeros(3, 4), None], Y, {}),
    (ValueError, "input: expected experts of one .*dtype", [torch.zeros(3, 4), torch.zeros(3, 4).half()], Y, {}),
    (TypeError, "input: expected float64, .* found torch.int64", Z.long(), Y, {}),
    (TypeError, "target: expected labels of an integer type", Z, torch.zeros(3), {}),
    (TypeError, "target: expected labels of an integer type", Z, torch.tensor([True, False, True]), {}),
    (ValueError, r"target: expected labels of shape \(3,\)", Z, torch.tensor([0, 1]), {}),
    (ValueError, r"target: expected labels of shape \(3,\)", Z, Y.expand(2, 3), {}),
    (ValueError, r"target: expected labels of shape \(3,\) on cpu, found .* on meta", Z, Y.to("meta"), {}),
    (
        IndexError,
        r"target: expected labels in \[0, 4\) or ignore_index -100, found -1",
        Z,
        torch.tensor([0, -1, 1]),
        {},
    ),
    (IndexError, r"target: expected labels in \[0, 4\)", Z, torch.tensor([0, 1, 4]), {}),
    (IndexError, r"target: expected labels in \[0, 4\)", Z, torch.tensor([0, 1, -100]).view(torch.uint64), {}),
    (ValueError, r"weight: expected shape \(2, 4\) or \(4,\), found \(3, 4\)", Z, Y, {"weight": torch.ones(3, 4)}),
    (ValueError, "weight: expected finite values >= 0", Z, Y, {"weight": torch.tensor([1.0, -1.0, 1.0, 1.0])}),
    (ValueError, "weight: expected device cpu", Z, Y, {"weight": torch.ones(4, device="meta")}),
    (ValueError, r"class_scale: expected shape \(2, 4\)", Z, Y, {"class_scale": torch.ones(2, 1)}),
    (ValueError, r"class_bias: expected shape \(2, 4\)", Z, Y, {"class_bias": torch.ones(5)}),
    (ValueError, r"class_margin: expected shape \(2, 4\)", Z, Y, {"class_margin": torch.ones(())}),
    (TypeError, "weight: expected a torch.Tensor, found list", Z, Y, {"weight": [1.0] * 4}),
    (TypeError, "class_bias: expected a floating type", Z, Y, {"class_bias": torch.ones(4).long()}),
    (ValueError, "class_bias: expected finite values or -inf", Z, Y, {"class_bias": torch.full((4,), math.inf)}),
    (
        ValueError,
        "target: expected labels of classes with a finite class_bias or weight 0, found class 3 .* for expert 1",
        Z,
        Y,
        {"class_bias": torch.tensor([[0.0] * 4, [0.0, 0.0, 0.0, -math.inf]])},
    ),
    (ValueError, "class_margin: expected a finite number", Z, Y, {"class_margin": math.nan}),
    (ValueError, "class_scale: expected finite values", Z, Y, {"class_scale": torch.full((4,), math.inf)}),
    (ValueError, r"sample_weight: expected shape \(3,\)", Z, Y, {"sample_weight": torch.ones(4)}),
    (ValueError, "sample_weight: expected finite values >= 0", Z, Y, {"sample_weight": -torch.ones(3)}),
    (ValueError, "diversity_factor: expected a finite number", Z, Y, {"diversity_factor": math.inf}),
    (ValueError, "diversity_temperature: expected a finite number > 0", Z, Y, {"diversity_temperature": 0.0}),
    (
        ValueError,
        "diversity_temperature: expected .* > 0",
        Z,
        Y,
        {"diversity_factor": 1.0, "diversity_temperature": torch.tensor([1.0, 1.0, -1.0, 1.0])},
    ),
    (
        ValueError,
        r"diversity_temperature: expected shape \(4,\)",
        Z,
        Y,
        {"diversity_factor": 1.0, "diversity_temperature": torch.ones(2, 4)},
    ),
    (ValueError, r"teacher: expected shape \(3, 4\)", Z, Y, {"teacher": torch.zeros(3, 5)}),
    (TypeError, "teacher: expected float64", Z, Y, {"teacher": torch.zeros(3, 4).long()}),
    (ValueError, "distillation_factor: expected a finite number >= 0", Z, Y, {"distillation_factor": -1.0}),
    (ValueError, "distillation_temperature: expected a finite number > 0", Z, Y, {"distillation_temperature": 0.0}),
    (TypeError, "distillation_factor: expected a number, found str", Z, Y, {"distillation_factor": "1"}),
    (ValueError, "scale: expected a finite number > 0", Z, Y, {"scale": 0.0}),
    (TypeError, "ignore_index: expected an integer", Z, Y, {"ignore_index": 0.5}),
    (ValueError, "denominator: expected 'weight' or 'count' or a number", Z, Y, {"denominator": "rows"}),
    (ValueError, "denominator: expected a finite number > 0", Z, Y, {"denominator": 0.0}),
    (ValueError, "denominator: expected the default", Z, Y, {"denominator": "count", "reduction": "sum"}),
    (ValueError, "reduction: expected 'none' or 'mean' or 'sum'", Z, Y, {"reduction": "batchmean"}),
    (ValueError, "empty: expected 'nan' or 'zero'", Z, Y, {"empty": "one"}),
    (TypeError, "aggregate: expected a bool, found 1", Z, Y, {"aggregate": 1}),
]


@each_checking_form
@pytest.mark.parametrize(
    ("error", "message", "z", "y", "options"), ERRORS, ids=[f"{i}-{error[1][:24]}" for i, error in enumerate(ERRORS)]
)
def test_wrong_calls(form: Form, error: type[Exception], message: str, z: Any, y: Any, options: dict[str, Any]) -> None:
    with form.use(), pytest.raises(error, match=message):
        expert_cross_entropy(z, y, **options)


def test_a_bad_label_is_nan_where_nobody_looks() -> None:
    """The definition alone, as under a transform or on a GPU."""
    y = torch.tensor([0, 4, -100])
    rows = op.OP.reference(logits(2, 3, 4), y, *(None,) * 7, ExpertCrossEntropyOptions(reduction=Reduction.NONE))
    assert rows.isnan().tolist() == [False, True, False]


@each_gpu_form
@pytest.mark.parametrize(("bad", "error"), [(9, IndexError), (-1, IndexError), (4, ValueError)])
def test_a_bad_label_is_nan_and_reported(form: Form, bad: int, error: type[Exception]) -> None:
    """Out of range, or of a class that one of the experts does not know, as 4 is here: its row alone is NaN."""
    with torch.device(form.device):
        z, bias, y = torch.randn(2, 4, 9, requires_grad=True), torch.zeros(2, 9), torch.tensor([0, -100, bad, 3])
        bias[1, 4] = -math.inf
        with form.use():
            rows = expert_cross_entropy(z, y, class_bias=bias, diversity_factor=-0.2, reduction="none")
            rows.sum().backward()
    assert rows.isnan().tolist() == [False, False, True, False]
    assert z.grad.isnan().any(2).any(0).tolist() == [False, False, True, False]
    if form.device != "cpu":
        torch.cuda.synchronize()
    with pytest.raises(error, match="target: expected labels"):
        ltk.check()
    ltk.check()


@each_gpu_form
@pytest.mark.parametrize("aggregate", [False, True])
def test_the_state_of_another_backend_is_refused(form: Form, aggregate: bool) -> None:
    options = ExpertCrossEntropyOptions(aggregate=aggregate)
    z, y = logits(2, 4, 5, dtype=torch.float32).to(form.device), torch.arange(4, device=form.device)
    tensors = (z, y, *(None,) * 7)
    state = op.new_state(tensors, options).fill_(-1.0)
    implementation = next(row for row in op.OP.table.rows if row.backend == form.backend)
    (gradient,) = implementation.backward(torch.ones((), device=form.device), state, *tensors, *options, True, False)
    assert gradient.isnan().all()
    if form.device != "cpu":
        torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="expected the state of a forward on the same backend"):
        ltk.check()

"""DistillationLoss: what the module hands to the functional (test_distillation.py), its tables and its constructor."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import ltkernels as ltk
from ltkernels.losses import DistillationLoss

C = 5
COUNTS = torch.tensor([900.0, 90.0, 9.0, 5.0, 1.0], dtype=torch.float64)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels; one row has none."""
    z, t = ((3.0 * torch.randn(6, C, dtype=torch.float64)).to(dtype) for _ in range(2))
    y = torch.randint(C, (6,))
    y[1] = -100
    return z.requires_grad_(), t, y


def test_it_is_the_functional_with_the_methods_names() -> None:
    z, t, y = batch()
    weight, mask = torch.rand(C, dtype=torch.float64) + 0.1, torch.arange(C) != 3
    criterion = DistillationLoss(
        3.0, 0.4, 0.6, class_weight=weight, power=0.5, class_mask=mask, temperature_scale=False
    )
    q = F.softmax(t / 3.0, 1).sqrt()[:, mask] * weight[mask]
    q = q / q.sum(1, keepdim=True)
    kl = F.kl_div(F.log_softmax(z[:, mask] / 3.0, 1), q, reduction="batchmean")
    torch.testing.assert_close(criterion(z, t, y), 0.4 * kl + 0.6 * F.cross_entropy(z, y), rtol=1e-6, atol=1e-6)
    r = torch.rand(6, dtype=torch.float64)
    plain, rows = DistillationLoss(reduction="none"), ltk.functional.distillation_loss(z, t, 2.0, reduction="none")
    torch.testing.assert_close(plain(z, t, sample_weight=r), r * rows)


def test_dive_with_balanced_softmax() -> None:
    """The class bias is the cross-entropy's alone: neither distribution of the divergence has it."""
    z, t, y = batch()
    criterion = DistillationLoss(3.0, 0.3, 0.7, power=0.5, class_bias=COUNTS.log())
    q = F.softmax(t / 3.0, 1).sqrt()
    q = q / q.sum(1, keepdim=True)
    kl = 9.0 * F.kl_div(F.log_softmax(z / 3.0, 1), q, reduction="batchmean")
    expected = 0.3 * kl + 0.7 * F.cross_entropy(z + COUNTS.log(), y)
    found = criterion(z, t, y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, z)[0], torch.autograd.grad(expected, z)[0])
    torch.testing.assert_close(criterion(z, t), 0.3 * kl)  # no labels, no cross-entropy, no bias


def test_tables_follow_it() -> None:
    criterion = DistillationLoss(class_weight=torch.tensor([0.2, 0.8, 0.0]), class_bias=torch.zeros(3))
    assert set(criterion.state_dict()) == {"class_bias", "teacher_bias"}
    assert str(criterion) == (
        "DistillationLoss(T=2.0, alpha=1.0, ce_weight=1.0, power=1.0, class_weight=(3,), class_bias=(3,))"
    )
    assert all(buffer.is_meta for buffer in criterion.to("meta").buffers())
    with torch.device("meta"):  # lazy initialisation of large models
        assert DistillationLoss()(torch.zeros(1, 3, device="cpu"), torch.zeros(1, 3, device="cpu")) == 0


def test_half_leaves_tables_alone() -> None:
    z, t, y = batch(torch.float32)
    criterion = DistillationLoss(class_weight=COUNTS.reciprocal(), class_bias=COUNTS.log().float())
    expected = criterion(z, t, y)
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "loss": criterion}).half()
    assert model["head"].weight.dtype == torch.float16
    assert torch.equal(criterion(z, t, y), expected)


def test_copies_and_checkpoints() -> None:
    z, t, y = batch(torch.float32)
    criterion = DistillationLoss(class_mask=torch.arange(C) != 3, class_bias=COUNTS.log().float())
    other = DistillationLoss(class_mask=torch.ones(C, dtype=torch.bool), class_bias=torch.zeros(C))
    assert other(z, t, y) != criterion(z, t, y)
    other.load_state_dict(criterion.state_dict())
    for same in (other, copy.deepcopy(criterion)):
        assert torch.equal(same(z, t, y), criterion(z, t, y))
    criterion.set_epoch(3)  # as in every loss, though none of the tables has a schedule
    assert torch.equal(criterion(z, t, y), other(z, t, y))


def test_compiles_in_one_graph() -> None:
    z, t, y = batch(torch.float32)
    criterion = DistillationLoss(class_weight=COUNTS.reciprocal(), class_bias=COUNTS.log().float())
    torch.compiler.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    found, expected = compiled(z, t, y), criterion(z, t, y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, z)[0], torch.autograd.grad(expected, z)[0])
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "T: expected a finite number > 0, found 0", {"T": 0.0}),
        (ValueError, "power: expected a finite number > 0", {"power": 0.0}),
        (ValueError, "alpha: expected a finite number >= 0", {"alpha": -1.0}),
        (ValueError, "ce_weight: expected a finite number >= 0", {"ce_weight": math.inf}),
        (ValueError, "class_weight: expected .* >= 0", {"class_weight": torch.tensor([1.0, -1.0])}),
        (TypeError, "class_weight: expected a floating type", {"class_weight": torch.tensor([1, 1])}),
        (TypeError, "class_mask: expected torch.bool", {"class_mask": torch.ones(3)}),
        (TypeError, "class_mask: expected a torch.Tensor, found list", {"class_mask": [True, False]}),
        (TypeError, "class_bias: expected a torch.Tensor, found list", {"class_bias": [0.0, 1.0]}),
        (TypeError, "class_bias: expected a floating type", {"class_bias": torch.tensor([900, 90])}),
        (ValueError, "class_bias: expected finite values or -inf", {"class_bias": torch.tensor([0.0, math.nan])}),
        (
            ValueError,
            r"class_bias: expected shape \(3,\), one value a class, found \(2,\)",
            {"class_bias": torch.zeros(2), "class_mask": torch.ones(3, dtype=torch.bool)},
        ),
        (ValueError, "reduction: expected 'none' or 'mean' or 'sum'", {"reduction": "batchmean"}),
    ],
)
def test_constructor_refuses(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        DistillationLoss(**arguments)


def test_two_calls_are_refused_as_the_functional_refuses_them() -> None:
    z, t, _ = batch(torch.float32)
    absent = DistillationLoss(class_bias=torch.tensor([0.0, -math.inf, 0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="target: .* class 1"):
        absent(z, t, torch.ones(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"class_bias: expected shape \(5,\)"):
        DistillationLoss(class_bias=torch.zeros(3))(z, t, torch.zeros(6, dtype=torch.int64))

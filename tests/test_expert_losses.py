"""RIDELoss and SADELoss: published answers and formulas, the second stage, what the constructor refuses.

The losses choose parameters of ``functional.expert_cross_entropy``, whose kernels are tested in
test_expert_cross_entropy.py, so shapes are small where the counts do not matter.
"""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from loss_cases import COUNTS, C, assert_same
from test_cross_entropy_golden import TIES_THE_OTHER_WAY
from torch import Tensor, nn

import ltkernels as ltk
from ltkernels.losses import LDAMLoss, RIDELoss, SADELoss

DATA = Path(__file__).parent / "data"
E, N = 3, 24
n_j = torch.tensor(COUNTS, dtype=torch.float64)
PRIOR = n_j / n_j.sum()
MARGIN = 30 * 0.5 * (n_j.min() / n_j) ** 0.25
EFFECTIVE = (1 - 0.9999) / (1 - 0.9999**n_j)
EFFECTIVE = EFFECTIVE * C / EFFECTIVE.sum()


def batch(experts: int = E) -> tuple[Tensor, Tensor]:
    """Logits of experts that are cosines times 30, and labels."""
    z = 30 * (torch.rand(experts, N, C, dtype=torch.float64) * 2 - 1)
    return z.requires_grad_(), torch.randint(C, (N,))


def divergence(q_logits: Tensor, logits: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, 1), F.softmax(q_logits, 1).detach(), reduction="batchmean")


def ride(z: Tensor, y: Tensor, late: bool, factor: float = -0.2, f: float = 0.05, base: float = 1.0) -> Tensor:
    """The published loop over the experts."""
    k = C * PRIOR * f + 1 - f
    temperature = base * (k / k.max() if late else torch.ones(C, dtype=torch.float64))
    loss = torch.zeros((), dtype=torch.float64)
    for expert in z:
        logits = z.mean(0) if factor == 0 else expert
        moved = logits - MARGIN * F.one_hot(y, C)
        kl = divergence(z.mean(0) / temperature, expert / temperature)
        loss = loss + F.cross_entropy(moved, y, EFFECTIVE if late else None) + factor * temperature.mean() ** 2 * kl
    return loss


def golden(name: str) -> dict[str, Tensor]:
    with np.load(DATA / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.array(value)) for key, value in file.items()}


def assert_golden(criterion: nn.Module, case: dict[str, Tensor]) -> None:
    """The published code computes in float32 like ours."""
    z = case["logits"].requires_grad_()
    loss, mean = criterion(z, case["target"], aggregate=True)
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss, case["loss"], rtol=2e-6, atol=0)
    assert float((gradient - case["grad"]).norm() / case["grad"].norm()) <= 2e-6
    torch.testing.assert_close(mean, z.mean(0))


# --- Published answers ---


def test_golden_ride() -> None:
    case = golden("ride_before_drw")
    criterion = RIDELoss(
        case["counts"],
        float(case["max_margin"]),
        float(case["scale"]),
        float(case["diversity_factor"]),
        reweight_factor=float(case["reweight_factor"]),
        reweight_epoch=160,
    )
    criterion.set_epoch(159)
    assert_golden(criterion, case)
    criterion.set_epoch(160)
    with pytest.raises(AssertionError):
        assert_golden(criterion, case)


def test_golden_sade() -> None:
    """But for classes of equal counts that its sort, which is not stable, had the other way round."""
    case = golden("sade")
    criterion = SADELoss(case["counts"], tau=float(case["tau"]))
    first, second = torch.tensor(TIES_THE_OTHER_WAY).T
    third = criterion.class_bias[2]
    third[first], third[second] = third[second], third[first]
    assert_golden(criterion, case)


# --- The published formulas ---


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("factor", "f", "base"), [(-0.2, 0.05, 1.0), (-0.45, 0.5, 2.0), (0.0, 0.05, 1.0)])
def test_ride(late: bool, factor: float, f: float, base: float) -> None:
    z, y = batch()
    criterion = RIDELoss(
        COUNTS, diversity_factor=factor, diversity_temperature=base, reweight_factor=f, reweight_epoch=2
    )
    criterion.set_epoch(2 if late else 1)
    assert_same(criterion(z, y), ride(z, y, late, factor, f, base), z)


def test_ride_without_counts() -> None:
    z, y = batch()
    expected = sum(F.cross_entropy(one, y) - 0.2 * divergence(z.mean(0), one) for one in z)
    assert_same(RIDELoss()(z, y), expected, z)
    assert_same(RIDELoss(diversity_factor=0.0)(z, y), E * F.cross_entropy(z.mean(0), y), z)


@pytest.mark.parametrize("factor", [-0.2, 0.0])
def test_ride_with_a_teacher(factor: float) -> None:
    z, y = batch()
    teacher = 10 * torch.randn(N, C, dtype=torch.float64)
    once = ride(z, y, False, factor) + 0.7 * 1.5**2 * divergence(teacher / 1.5, z.mean(0) / 1.5)
    for distillation, times in (("published", E), ("once", 1)):
        criterion = RIDELoss(COUNTS, diversity_factor=factor, distillation_factor=0.7, distillation=distillation)
        assert_same(criterion(z, y, teacher=teacher), times * once, z)
        assert_same(criterion(z, y), ride(z, y, False, factor), z)  # without a teacher nothing counts E times


def test_one_expert_is_ldam() -> None:
    z, y = batch(1)
    ours, single = RIDELoss(COUNTS, reweight_epoch=1), LDAMLoss(COUNTS, logits_scaled=True, reweight_epoch=1)
    for epoch in range(2):
        ours.set_epoch(epoch), single.set_epoch(epoch)
        assert_same(ours(z, y), single(z[0], y), z)


def test_rare_classes_have_lower_temperatures() -> None:
    criterion = RIDELoss([900, 90, 10, 0], reweight_epoch=1, reweight_factor=0.5)
    assert criterion.temperature.tolist() == [1.0] * 4
    criterion.set_epoch(1)
    k = torch.tensor([0.5 * 4 * 0.9 + 0.5, 0.5 * 4 * 0.09 + 0.5, 0.5 * 4 * 0.01 + 0.5, 0.5])
    torch.testing.assert_close(criterion.temperature, k / k[0])
    assert criterion.weight()[3] == 0.0  # a class without samples: no weight, no margin
    assert criterion.class_margin[3] == 0.0


@pytest.mark.parametrize("tau", [0.0, 1.0, 2.0])
def test_sade(tau: float) -> None:
    z, y = batch()
    rank = sorted(range(C), key=lambda c: PRIOR[c])  # Python's sort is stable
    reverse = PRIOR.new_empty(C)
    for place, c in enumerate(rank):
        reverse[c] = PRIOR[rank[C - 1 - place]]
    prior, against = (PRIOR + 1e-9).log(), (PRIOR + 1e-9).log() - tau * (reverse + 1e-9).log()
    expected = F.cross_entropy(z[0], y) + F.cross_entropy(z[1] + prior, y) + F.cross_entropy(z[2] + against, y)
    assert_same(SADELoss(COUNTS, tau)(z, y), expected, z)


def test_sade_keeps_a_class_without_samples() -> None:
    criterion = SADELoss([90, 0, 10])
    assert criterion.class_bias.isfinite().all()
    loss, mean = criterion([torch.zeros(2, 3)] * 3, torch.tensor([1, 2]), aggregate=True)
    assert loss.isfinite() and mean.shape == (2, 3)


@pytest.mark.parametrize("make", [RIDELoss, SADELoss], ids=["ride", "sade"])
def test_options(make: Any) -> None:
    """Ignored samples, weights of samples, half logits, a list of experts."""
    z, y = batch()
    rows, mean = make(COUNTS, reduction="none")(z, y), make(COUNTS)(z, y)
    r = torch.rand(N, dtype=torch.float64)
    assert_same(make(COUNTS, reduction="sum")(z, y, r), (r * rows).sum(), z)
    assert_same(mean, rows.mean(), z)
    some = torch.where(torch.arange(N) % 2 == 0, y, 255)
    assert_same(make(COUNTS, ignore_index=255)(z, some), rows[::2].mean(), z)
    assert_same(make(COUNTS)(list(z), y), mean, z)
    loss, both = make(COUNTS)(z.half(), y, aggregate=True)
    assert loss.dtype == both.dtype == torch.float32


# --- The second stage ---


def test_the_second_stage_survives_a_checkpoint() -> None:
    z, y = batch()
    criterion, other = (RIDELoss(COUNTS, reweight_epoch=3) for _ in range(2))
    criterion.set_epoch(3)
    assert not torch.equal(criterion(z, y), other(z, y))
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for same in (other, copy.deepcopy(criterion)):
        assert torch.equal(same(z, y), criterion(z, y))
    criterion.set_epoch(2)
    assert_same(criterion(z, y), ride(z, y, late=False), z)


def test_the_stage_changes_in_place() -> None:
    """So that a compiled or captured step follows it."""
    criterion = RIDELoss(COUNTS, reweight_epoch=1)
    places = [table.data_ptr() for table in criterion.buffers()]
    criterion.set_epoch(1)
    assert [table.data_ptr() for table in criterion.buffers()] == places
    z, y = torch.randn(E, N, C), torch.randint(C, (N,))
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for epoch in (0, 1):
        criterion.set_epoch(epoch)
        torch.testing.assert_close(compiled(z, y), criterion(z, y))
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [RIDELoss, SADELoss], ids=["ride", "sade"])
def test_half_leaves_tables_alone(make: Any) -> None:
    z, y = torch.randn(E, N, C), torch.randint(C, (N,))
    criterion = make(COUNTS)
    expected = criterion(z, y)
    nn.ModuleDict({"loss": criterion}).half()
    assert torch.equal(criterion(z, y), expected)
    assert all(buffer.is_meta for buffer in criterion.to("meta").buffers())
    assert criterion(z.to("meta"), y.to("meta")).is_meta  # no value is looked at: on a GPU nothing waits


def test_repr() -> None:
    assert str(RIDELoss()) == ("RIDELoss(max_margin=0.5, scale=30.0, diversity_factor=-0.2, diversity_temperature=1.0)")
    assert "reweight_factor=0.05, num_classes=100" in str(RIDELoss(COUNTS, reweight_epoch=160))
    assert str(SADELoss([9, 1])) == "SADELoss(tau=2.0, prior_eps=1e-09, num_classes=2, class_counts=1..9)"


# --- Wrong calls ---


@pytest.mark.parametrize(
    ("error", "message", "make", "options"),
    [
        (ValueError, "max_margin: expected a finite number >= 0", RIDELoss, {"max_margin": -1.0}),
        (ValueError, "scale: expected a finite number > 0", RIDELoss, {"scale": 0.0}),
        (ValueError, "diversity_factor: expected a finite number", RIDELoss, {"diversity_factor": math.inf}),
        (ValueError, "diversity_temperature: expected .* > 0", RIDELoss, {"diversity_temperature": 0.0}),
        (ValueError, "reweight_factor: expected a number below 1", RIDELoss, {"reweight_factor": 1.0}),
        (ValueError, "reweight_factor: expected .* <= 1", RIDELoss, {"reweight_factor": 2.0}),
        (ValueError, "reweight_epoch: expected an epoch >= 0", RIDELoss, {"reweight_epoch": -1}),
        (TypeError, "reweight_epoch: expected an integer", RIDELoss, {"reweight_epoch": 1.5}),
        (ValueError, "beta: expected a number below 1", RIDELoss, {"beta": 1.0, "reweight_epoch": 1}),
        (ValueError, "distillation: expected 'published' or 'once'", RIDELoss, {"distillation": "twice"}),
        (ValueError, "distillation_factor: expected .* >= 0", RIDELoss, {"distillation_factor": -1.0}),
        (ValueError, "distillation_temperature: expected .* > 0", RIDELoss, {"distillation_temperature": 0.0}),
        (ValueError, "reduction: expected 'none' or 'mean' or 'sum'", RIDELoss, {"reduction": "batchmean"}),
        (ValueError, "class_counts: expected all counts >= 0", RIDELoss, {"class_counts": [1, -1]}),
        (ValueError, "tau: expected a finite number >= 0", SADELoss, {"tau": -1.0}),
        (ValueError, "prior_eps: expected a finite number > 0", SADELoss, {"prior_eps": 0.0}),
        (ValueError, "class_counts: expected at least one count > 0", SADELoss, {"class_counts": [0, 0]}),
        (ValueError, "reduction: expected 'none' or 'mean' or 'sum'", SADELoss, {"reduction": "batchmean"}),
    ],
)
def test_constructor_refuses(error: type[Exception], message: str, make: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        make(**{"class_counts": COUNTS, **options})


def test_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="reweight_epoch: expected None without class_counts"):
        RIDELoss(reweight_epoch=160)
    with pytest.raises(ValueError, match="temperature_at: expected a loss with reweight_epoch"):
        RIDELoss(COUNTS).temperature_at(3)
    with pytest.raises(ValueError, match="input: expected the logits of three experts, found 2"):
        SADELoss([9, 1])(torch.zeros(2, 4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"class_margin: expected shape \(3, 5\) or \(5,\), found \(2,\)"):
        RIDELoss([9, 1])(torch.zeros(3, 4, 5), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(IndexError, match=r"target: expected labels in \[0, 2\)"):
        SADELoss([9, 1])(torch.zeros(3, 1, 2), torch.tensor([2]))
    with pytest.raises(ValueError, match="epoch: expected an epoch >= 0"):
        RIDELoss(COUNTS, reweight_epoch=1).set_epoch(-1)
    assert ltk.losses.RIDELoss is RIDELoss and ltk.losses.SADELoss is SADELoss

"""The loss modules whose adjustments depend on the row: what they hand to the functionals, and the state they keep.

The functionals have tests of their own (test_row_cross_entropy.py); here formulas are those of the modules' settings.
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from loss_cases import COUNTS, C, N, assert_same, batch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

import ltkernels as ltk
from ltkernels import functional, losses, rebalance

DATA = Path(__file__).parent / "data"
n_j = torch.tensor(COUNTS, dtype=torch.float64)

STATEFUL: dict[str, Callable[..., nn.Module]] = {
    "SeesawLoss": lambda **k: losses.SeesawLoss(C, **k),
    "SeesawLoss(after)": lambda **k: losses.SeesawLoss(C, update="after", **k),
    "SoftmaxEqualizationLoss": lambda **k: losses.SoftmaxEqualizationLoss(COUNTS, rare_threshold=5e-3, **k),
}
each_stateful = pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL.keys())


def two_labels() -> tuple[Tensor, Tensor, Tensor]:
    x, y = batch()
    return x, y, torch.randint(C, (N,))


# ------------------------------------------------------------------------------------------ two labels and smoothing


@pytest.mark.parametrize(
    "make",
    [
        lambda: losses.CrossEntropyLoss(torch.rand(C).double() + 0.5),
        lambda: losses.LogitAdjustedLoss(COUNTS),
        lambda: losses.LDAMLoss(COUNTS, reweight_epoch=0),
        lambda: losses.ClassBalancedLoss(COUNTS),
        lambda: losses.FocalLoss(2.0),
        lambda: losses.ArcFaceLoss(0.3),
        lambda: losses.LabelAwareSmoothingLoss(COUNTS),
    ],
)
def test_two_labels_in_every_loss(make: Callable[[], nn.Module]) -> None:
    x, y, z = two_labels()
    loss = make()
    assert_same(loss(x, (y, z, 0.3)), 0.3 * loss(x, y) + 0.7 * loss(x, z), x)


@pytest.mark.parametrize("at", (0, 1))
def test_neither_of_two_labels_may_be_of_an_absent_class(at: int) -> None:
    pair = [torch.tensor([0]), torch.tensor([0])]
    pair[at] = torch.tensor([1])
    with pytest.raises(
        ValueError, match="expected labels of classes with training samples, found class 1 with count 0"
    ):
        losses.LDAMLoss([3, 0])(torch.zeros(1, 2), (*pair, 0.5))


def test_smoothing_off_the_target_in_a_loss() -> None:
    x, y = batch()
    loss = losses.LogitAdjustedLoss(COUNTS, label_smoothing=0.2, smoothing_mode="off_target")
    q = torch.full((N, C), 0.2 / (C - 1), dtype=torch.float64).scatter(1, y[:, None], 0.8)
    assert_same(loss(x, y), -(q * (x + (n_j / n_j.sum()).log()).log_softmax(1)).sum(1).mean(), x)
    assert "smoothing_mode='off_target'" in repr(loss)
    with pytest.raises(ValueError, match="^smoothing_mode: expected 'all' or 'off_target', found 'none'"):
        losses.LogitAdjustedLoss(COUNTS, smoothing_mode="none")


@pytest.mark.parametrize("shape", ("concave", "linear", "convex", "exp"))
def test_label_aware_smoothing(shape: str) -> None:
    """As MiSLAS's code writes it."""
    x, y = batch()
    power = 3.0 if shape == "exp" else None
    head, tail = 0.4, 0.1
    t = (n_j - n_j.min()) / (n_j.max() - n_j.min())
    eps = {
        "concave": tail + (head - tail) * (t * math.pi / 2).sin(),
        "linear": tail + (head - tail) * t,
        "convex": head + (head - tail) * (1.5 * math.pi + t * math.pi / 2).sin(),
        "exp": tail + (head - tail) * t**3,
    }[shape]
    actual = rebalance.label_aware_smoothing(COUNTS, head, tail, shape, power, dtype=torch.float64)
    torch.testing.assert_close(actual, eps, rtol=1e-12, atol=1e-14)
    log_p = x.log_softmax(1)
    expected = (1 - eps[y]) * -log_p[range(N), y] + eps[y] * -log_p.mean(1)
    assert_same(losses.LabelAwareSmoothingLoss(COUNTS, head, tail, shape, power)(x, y), expected.mean(), x)


def test_label_aware_smoothing_is_a_buffer() -> None:
    x, y = batch(torch.float32)
    loss = losses.LabelAwareSmoothingLoss(COUNTS)
    assert set(loss.state_dict()) == {"class_counts", "label_smoothing"}
    expected = loss(x, y)
    assert torch.equal(loss.half()(x, y), expected)
    other = losses.LabelAwareSmoothingLoss([1 + c for c in range(C)])
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(x, y), expected)
    assert repr(loss) == (
        "LabelAwareSmoothingLoss(smooth_head=0.3, smooth_tail=0.0, shape='concave', num_classes=100,"
        f" class_counts={min(COUNTS)}..{max(COUNTS)})"
    )
    with pytest.raises(AttributeError, match="^smooth_head: "):
        loss.smooth_head = 0.1
    with pytest.raises(TypeError, match="^label_smoothing: expected none"):
        losses.LabelAwareSmoothingLoss(COUNTS, label_smoothing=0.1)


def test_label_aware_smoothing_of_equal_and_absent_classes() -> None:
    assert rebalance.label_aware_smoothing([7, 7]).tolist() == pytest.approx([0.3, 0.3])
    assert rebalance.label_aware_smoothing([9, 0, 1], shape="linear").tolist() == pytest.approx([0.3, 0.0, 0.0])
    for arguments, message in (
        ({"shape": "round"}, "shape: expected 'concave' or 'linear' or 'convex' or 'exp', found 'round'"),
        ({"shape": "exp"}, "power: expected a number with shape='exp' and None otherwise, found None with 'exp'"),
        ({"power": 2.0}, "power: expected a number with shape='exp' and None otherwise, found 2.0 with 'concave'"),
        ({"smooth_head": 1.5}, "smooth_head: expected a finite number >= 0 and <= 1, found 1.5"),
    ):
        with pytest.raises(ValueError) as caught:
            rebalance.label_aware_smoothing([3, 1], **arguments)
        assert str(caught.value) == message


# ------------------------------------------------------------------------------------------ margins on the angle


@pytest.mark.parametrize("gradient", ("exact", "straight_through"))
def test_arcface(gradient: str) -> None:
    x, y = batch()
    with torch.no_grad():
        x.mul_(0.95)
    c = x.gather(1, y[:, None])
    moved = (c.acos() + 0.5).cos()
    if gradient == "exact":
        moved = torch.where(c > -math.cos(0.5), moved, c - 0.5 * math.sin(0.5))
    else:
        moved = c + (moved - c).detach()
    expected = F.cross_entropy(64 * x.scatter(1, y[:, None], moved), y)
    assert_same(losses.ArcFaceLoss(gradient=gradient)(x, y), expected, x)


def test_arcface_margins_by_count() -> None:
    """mmpretrain's adaptive margins: n^-1/4 brought to [m_min, m_max]."""
    v = n_j**-0.25
    expected = 0.05 + (v - v.min()) / (v.max() - v.min()) * 0.45
    actual = rebalance.arcface_margin(COUNTS, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert rebalance.arcface_margin([4, 4, 4]).tolist() == pytest.approx([0.5] * 3)
    assert rebalance.arcface_margin([16, 0, 1]).tolist() == pytest.approx([0.05, 0.0, 0.5])
    with pytest.raises(ValueError, match=r"^m_max: expected a finite number >= 0.6 and <= 3.14159, found 0.5"):
        rebalance.arcface_margin([2, 1], m_min=0.6)


def test_an_arcface_margin_may_be_assigned() -> None:
    x, y = batch()
    loss = losses.ArcFaceLoss(0.5)
    loss.margin = 0.2
    assert loss(x, y) == losses.ArcFaceLoss(0.2)(x, y)
    loss.margin = rebalance.arcface_margin(COUNTS)
    assert loss(x, y) == losses.ArcFaceLoss(rebalance.arcface_margin(COUNTS))(x, y)
    assert repr(loss) == "ArcFaceLoss(margin=(100,), scale=64.0, gradient='exact')"
    assert set(loss.state_dict()) == {"class_margin"}
    for wrong, error in ((4.0, ValueError), (-0.1, ValueError), ("0.5", TypeError)):
        with pytest.raises(error, match="^margin: expected"):
            loss.margin = wrong
        with pytest.raises(error, match="^margin: expected"):
            losses.ArcFaceLoss(wrong)
    with pytest.raises(ValueError, match="^gradient: expected 'exact' or 'straight_through', found 'none'"):
        losses.ArcFaceLoss(gradient="none")
    with pytest.raises(ValueError, match=r"^class_margin: expected angles in \[0, pi\], found -1 at index 1"):
        losses.ArcFaceLoss(torch.tensor([0.5, -1.0]))


# ------------------------------------------------------------------------------------------ influence


@pytest.mark.parametrize("gamma", (0.0, 1.5))
def test_influence_balanced(gamma: float) -> None:
    x, y = batch()
    features = torch.randn(N, 7, dtype=torch.float64, requires_grad=True)
    weight = n_j.reciprocal() / n_j.reciprocal().sum() * C
    influence = (x.softmax(1) - F.one_hot(y, C)).abs().sum(1) * features.detach().abs().sum(1)
    ce = F.cross_entropy(x, y, weight, reduction="none")
    rows = (1 - (-ce).exp()) ** gamma * ce * 1e3 / (influence + 0.01)
    loss = losses.InfluenceBalancedLoss(1e3, 0.01, weight, gamma)
    assert_same(loss(x, y, features), rows.mean(), x)
    factor = torch.rand(N, dtype=torch.float64)
    assert_same(loss(x, y, features, factor), (factor * rows).mean(), x)
    loss(x, y, features).backward()
    assert features.grad is None


def test_influence_of_inner_dimensions_and_of_half_features() -> None:
    x, y, h = torch.randn(2, 5, 3), torch.randint(5, (2, 3)), torch.randn(2, 900, 3).half() * 100
    loss = losses.InfluenceBalancedLoss(reduction="none")
    flat = loss(x.movedim(1, 2).reshape(6, 5), y.reshape(6), h.movedim(1, 2).reshape(6, 900))
    assert flat.isfinite().all()  # a sum of 900 numbers of 100 is infinite in float16
    torch.testing.assert_close(loss(x, y, h).reshape(6), flat)
    torch.testing.assert_close(loss(x[0, :, 0], y[0, 0], h[0, :, 0]), flat[0])
    for features, error, message in (
        (torch.ones(2, 3), ValueError, r"features: expected shape \(2, D, 3\), found \(2, 3\)"),
        (torch.ones(2, 4, 2), ValueError, r"features: expected shape \(2, D, 3\), found \(2, 4, 2\)"),
        (torch.ones(2, 4, 3, dtype=torch.int64), TypeError, "features: expected a floating type, found torch.int64"),
        ([1.0], TypeError, "features: expected a torch.Tensor, found list"),
    ):
        with pytest.raises(error, match=message):
            loss(x, y, features)
    with pytest.raises(ValueError, match="^alpha: expected a finite number > 0"):
        losses.InfluenceBalancedLoss(alpha=0.0)


# ------------------------------------------------------------------------------------------ losses with a state


def test_seesaw_as_mmpretrain_answered() -> None:
    with np.load(DATA / "seesaw_small.npz") as file:
        golden = {key: torch.from_numpy(np.array(value)) for key, value in file.items()}
    x, y = golden["logits"].requires_grad_(), golden["target"]
    loss = losses.SeesawLoss(8, float(golden["p"]), float(golden["q"]), float(golden["eps"]))
    loss.class_counts.copy_(golden["cum_before"])
    value = loss(x, y)
    (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(value.detach(), golden["loss"].float(), rtol=2e-6, atol=0)
    assert (gradient - golden["grad"]).norm() <= 2e-6 * golden["grad"].norm()
    assert torch.equal(loss.class_counts, golden["cum_before"].long() + y.bincount(minlength=8))


@pytest.mark.parametrize("dtype", (torch.int64, torch.uint8, torch.int16, torch.uint64))
def test_seesaw_counts_labels_that_count(dtype: torch.dtype) -> None:
    loss = losses.SeesawLoss(4, ignore_index=9)
    y = torch.tensor([0, 3, 9, 3, 1]).to(dtype)
    loss(torch.randn(5, 4), y)
    loss(torch.randn(1, 4, 5), y.view(1, 5))
    assert loss.class_counts.tolist() == [2, 2, 0, 4]
    loss.eval()(torch.randn(5, 4), y)
    assert loss.class_counts.tolist() == [2, 2, 0, 4]
    loss.train()
    with pytest.raises(IndexError):
        loss(torch.randn(5, 4), torch.tensor([0, 1, 4, 2, 3]))
    with pytest.raises(
        TypeError, match="target: expected labels of an integer type for this loss, found torch.float32"
    ):
        loss(torch.randn(2, 4), torch.rand(2, 4))
    with pytest.raises(TypeError, match="target: expected labels of an integer type for this loss, found tuple"):
        loss(torch.randn(2, 4), (y[:2], y[:2], 0.5))
    assert loss.class_counts.tolist() == [2, 2, 0, 4]  # a call that is refused counts nothing


@pytest.mark.parametrize("ignored", (-100, 2, 77))
def test_seesaw_does_not_count_ignored_labels(ignored: int) -> None:
    loss = losses.SeesawLoss(4, ignore_index=ignored)
    loss(torch.randn(5, 4), torch.tensor([0, ignored, 3, ignored, 3]))
    assert loss.class_counts.tolist() == [1, 0, 0, 2]


def test_seesaw_before_and_after() -> None:
    x, y = batch()
    before, after = losses.SeesawLoss(C), losses.SeesawLoss(C, update="after")
    counts = torch.zeros(C, dtype=torch.int64)
    for _ in range(2):
        old, counts = counts, counts + y.bincount(minlength=C)
        assert_same(before(x, y), functional.seesaw_cross_entropy(x, y, counts), x)
        assert_same(after(x, y), functional.seesaw_cross_entropy(x, y, old), x)
        assert torch.equal(before.class_counts, counts)
        assert torch.equal(after.class_counts, counts)


def test_seesaw_counts_beyond_what_float32_holds() -> None:
    loss = losses.SeesawLoss(2)
    loss.class_counts.fill_(2**24)
    loss(torch.zeros(1, 2), torch.tensor([0]))
    assert loss.class_counts.tolist() == [2**24 + 1, 2**24]


def test_seesaw_adds_the_counts_of_a_process_group() -> None:
    """One process is a group, whose sum is its own; that it is asked for at all shows where there is none."""
    loss = losses.SeesawLoss(3, process_group=True)
    x, y = torch.randn(4, 3), torch.tensor([0, 0, 2, 1])
    if not distributed.is_initialized():
        with pytest.raises(ValueError, match="process group"):
            loss(x, y)
        assert loss.class_counts.tolist() == [0, 0, 0]
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        loss(x, y)
        other = losses.SeesawLoss(3, process_group=distributed.group.WORLD)
        other(x, y)
    finally:
        distributed.destroy_process_group()
    assert loss.class_counts.tolist() == other.class_counts.tolist() == [2, 1, 1]


def _count_in_two(rank: int, folder: str) -> None:
    store = distributed.FileStore(os.path.join(folder, "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    loss = losses.SeesawLoss(3, process_group=True)
    loss(torch.zeros(2, 3), torch.tensor([0, 2]) if rank == 0 else torch.tensor([2, 1]))
    torch.save(loss.class_counts, os.path.join(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


def test_seesaw_in_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_count_in_two, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt").tolist() == [1, 1, 2]


def test_equalization_draws_anew_in_training_only() -> None:
    x, y = batch()
    loss = losses.SoftmaxEqualizationLoss(COUNTS, gamma=0.5, rare_threshold=5e-3, seed=3)
    rare = n_j / n_j.sum() <= 5e-3
    assert 10 < rare.sum() < 90
    for step in range(3):
        expected = functional.equalization_cross_entropy(x, y, rare, drop_rate=0.5, seed=3, step=step)
        assert loss.eval()(x, y) == expected
        assert_same(loss.train()(x, y), expected, x)
    assert loss.step == 3
    assert loss(x, y) != loss(x, y)


def test_a_share_at_the_threshold_is_rare() -> None:
    assert losses.SoftmaxEqualizationLoss([6, 2, 0, 0, 0], rare_threshold=0.25).rare.tolist() == [False] + [True] * 4


def test_the_backward_after_the_next_forward_has_its_own_draws() -> None:
    x, y = batch()
    loss = losses.SoftmaxEqualizationLoss(COUNTS, rare_threshold=5e-3)
    first, _ = loss(x, y), loss(x, y)
    expected = functional.equalization_cross_entropy(x, y, loss.rare, drop_rate=0.9, step=0)
    assert_same(first, expected, x)
    second = []
    for value in (first, expected):  # the second derivative draws again, from the step that was kept
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    torch.testing.assert_close(*second)


@each_stateful
def test_a_resumed_run_goes_on(make: Callable[..., nn.Module]) -> None:
    x, y = batch(torch.float32)
    loss = make()
    for _ in range(3):
        loss(x, y)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copies = [resumed, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    for _ in range(2):
        expected = loss(x, y)
        assert all(torch.equal(other(x, y), expected) for other in copies)


@each_stateful
def test_options_of_losses_with_a_state(make: Callable[..., nn.Module]) -> None:
    x, y = batch()
    y[::5] = 3
    weight = torch.rand(C, dtype=torch.float64) + 0.5
    rows = make(ignore_index=3, weight=weight, reduction="none")(x, y)
    kept = y != 3
    assert torch.equal(rows == 0, ~kept)
    torch.testing.assert_close(make(ignore_index=3, weight=weight, denominator="count")(x, y), rows.sum() / kept.sum())
    torch.testing.assert_close(make(ignore_index=3, weight=weight, denominator=10.0)(x, y), rows.sum() / 10)
    torch.testing.assert_close(
        make(ignore_index=3, weight=weight, denominator="weight")(x, y), rows.sum() / weight[y][kept].sum()
    )
    torch.testing.assert_close(make(ignore_index=3, weight=weight, reduction="sum")(x, y), rows.sum())
    factor = torch.rand(N, dtype=torch.float64)
    torch.testing.assert_close(make(ignore_index=3, weight=weight, reduction="none")(x, y, factor), rows * factor)
    late = rebalance.DeferredReweighting(COUNTS, 1)
    loss = make(weight=late, reduction="none")
    state = copy.deepcopy(loss.state_dict())
    early = loss(x, y)
    loss.load_state_dict(state)
    loss.set_epoch(1)
    torch.testing.assert_close(loss(x, y), early * late()[y])
    assert make(empty="zero")(x[:0], y[:0]) == 0
    assert make(scale=2.0, reduction="sum")(x, y) != make(reduction="sum")(x, y)
    for wrong, error in (
        ({"weight": torch.ones(3)}, ValueError),
        ({"scale": 0.0}, ValueError),
        ({"seed": 0.5}, TypeError),
    ):
        with pytest.raises(error):
            make(**wrong)


@each_stateful
def test_weights_of_losses_with_a_state_may_be_assigned(make: Callable[..., nn.Module]) -> None:
    """Whatever they were, the new ones are a buffer, a parameter or a schedule, and None takes them away."""
    x, y = batch(torch.float32)
    loss, weight, late = make().eval(), torch.rand(C) + 0.5, rebalance.DeferredReweighting(COUNTS, 3)
    without = loss(x, y)
    for kind, key in (
        (weight, "weight"),
        (late, "weight.weight"),
        (nn.Parameter(weight, requires_grad=False), "weight"),
        (late, "weight.weight"),
        (weight, "weight"),
    ):
        loss.weight = kind
        for epoch in (3, 0):  # with and without a schedule's weights
            loss.set_epoch(epoch)
            expected = late() if kind is late else weight
            assert torch.equal(loss.state_dict()[key], expected)
            assert loss(x, y) == make(weight=expected.clone()).eval()(x, y)
        assert len(list(loss.parameters())) == isinstance(kind, nn.Parameter)
        assert ("weight" in loss.state_dict()) == (kind is not late)
    assert loss(x, y) != without
    loss.weight = None
    assert not [name for name in loss.state_dict() if name.startswith("weight")]
    assert loss(x, y) == without
    loss.weight = [1.0] * C
    with pytest.raises(TypeError, match=r"weight: expected a torch.Tensor, found list"):
        loss(x, y)
    with pytest.raises(TypeError, match=r"weight: expected a torch.Tensor, found list"):
        make(weight=[1.0] * C)


@each_stateful
def test_half_leaves_a_state_alone(make: Callable[..., nn.Module]) -> None:
    loss = make(weight=torch.rand(C)).half()
    assert loss.weight.dtype == torch.float32
    assert not any(b.dtype in (torch.float16, torch.bfloat16) for b in loss.buffers())
    assert all(b.is_meta for b in make().to("meta").buffers())
    with torch.device("meta"):
        assert not any(b.is_meta for b in make().buffers())


@each_stateful
def test_a_state_moves_on_in_a_compiled_step(make: Callable[..., nn.Module]) -> None:
    x, y = batch(torch.float32)
    torch.compiler.reset()
    loss, other = make(), make()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert_same(compiled(x, y), other(x, y), x)
    torch.compiler.reset()
    for name, buffer in other.state_dict().items():
        assert torch.equal(buffer, loss.state_dict()[name])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: losses.SeesawLoss(0), ValueError, "num_classes: expected at least 1, found 0"),
        (lambda: losses.SeesawLoss(3.0), TypeError, "num_classes: expected an integer, found 3.0"),
        (lambda: losses.SeesawLoss(3, p=-1.0), ValueError, "p: expected a finite number >= 0, found -1.0"),
        (lambda: losses.SeesawLoss(3, update="now"), ValueError, "update: expected 'before' or 'after', found 'now'"),
        (lambda: losses.SoftmaxEqualizationLoss([3, 1], gamma=2.0), ValueError,
         "drop_rate: expected a finite number >= 0 and <= 1, found 2.0"),
        (lambda: losses.SoftmaxEqualizationLoss([3, 1], rare_threshold=-1.0), ValueError,
         "rare_threshold: expected a finite number >= 0, found -1.0"),
        (lambda: losses.SoftmaxEqualizationLoss([3, -1]), ValueError, "class_counts: expected all counts >= 0"),
    ],
)  # fmt: skip
def test_wrong_settings(make: Callable[[], nn.Module], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).startswith(message)


# ------------------------------------------------------------------------------------------ second stages


def test_disalign() -> None:
    """Loss and evaluation are one formula; alpha, beta and the confidence learn, as by autograd."""
    torch.manual_seed(0)
    x, y = batch()
    features = torch.randn(N, 6, dtype=torch.float64)
    module = ltk.DisAlignCalibration(6, C)
    assert (module.class_scale == 1).all()
    assert (module.class_bias == 0).all()
    assert torch.equal(module.confidence.weight, torch.full((1, 6), 0.1))
    module = module.double()
    with torch.no_grad():
        module.class_bias.normal_()
        module.class_scale.uniform_(0.5, 1.5)
    weight = n_j**-1.2
    weight = weight / weight.sum() * C
    torch.testing.assert_close(weight, rebalance.inverse_frequency_weight(COUNTS, 1.2, dtype=torch.float64))
    gate = (features @ module.confidence.weight[0] + module.confidence.bias).sigmoid()[:, None]
    u = x + gate * (module.class_scale * x + module.class_bias)
    torch.testing.assert_close(module(x, features), u)
    variables = (x, *module.parameters())
    assert len(variables) == 5
    expected = torch.autograd.grad(F.cross_entropy(u, y, weight), variables)
    actual = torch.autograd.grad(module.loss(x, features, y, weight=weight), variables)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert other.norm() > 0


def test_learnable_weight_scaling() -> None:
    x, y = batch()
    module = ltk.LearnableWeightScaling(C).double()
    with torch.no_grad():
        module.class_scale.uniform_(0.5, 1.5)
    (expected,) = torch.autograd.grad(F.cross_entropy(x * module.class_scale, y), module.class_scale)
    loss = module.loss(x, y)
    torch.testing.assert_close(loss, F.cross_entropy(module(x), y))
    loss.backward()
    torch.testing.assert_close(module.class_scale.grad, expected)
    assert x.grad is None
    for make in (lambda n: ltk.LearnableWeightScaling(n), lambda n: ltk.DisAlignCalibration(4, n)):
        with pytest.raises(ValueError, match="^num_classes: expected at least 1, found 0"):
            make(0)
        with pytest.raises(TypeError, match=r"^num_classes: expected an integer, found 2.0"):
            make(2.0)
    with pytest.raises(ValueError, match="^in_features: expected at least 1, found 0"):
        ltk.DisAlignCalibration(0, 3)

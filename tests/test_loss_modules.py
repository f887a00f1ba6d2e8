"""ltkernels.losses as modules: options, absent classes, checkpoints, precision, compilation, schedules, errors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from loss_cases import COUNTS, EVERY, WEIGHT, C, N, assert_same, batch, every_counted, every_loss, value_and_gradient
from torch import nn
from torch.nn import functional as F

from ltkernels import losses, rebalance
from ltkernels.rebalance import DeferredReweighting


@pytest.fixture
def compiler() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Compiles, without generating code. All losses share one ``forward``: earlier tests count as recompilations."""
    torch.compiler.reset()
    yield lambda loss: torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()


# ---------------------------------------------------------------------------------------------- common options


@every_loss
def test_options_mean_the_same_in_every_loss(make) -> None:
    x, y = batch(torch.float32)
    y[::5] = 3
    rows = make(COUNTS, ignore_index=3, reduction="none")(x, y)
    assert rows.shape == (N,)
    assert torch.equal(rows == 0, y == 3)
    torch.testing.assert_close(make(COUNTS, ignore_index=3, reduction="sum")(x, y), rows.sum())
    mean_over_rows = make(COUNTS, ignore_index=3, denominator="count")(x, y)
    torch.testing.assert_close(mean_over_rows, rows.sum() / (y != 3).sum())
    torch.testing.assert_close(make(COUNTS, ignore_index=3, denominator=10.0)(x, y), rows.sum() / 10)
    torch.testing.assert_close(make(COUNTS, ignore_index=3, denominator=torch.tensor(8.0))(x, y), rows.sum() / 8)

    factor = torch.rand(N)
    torch.testing.assert_close(make(COUNTS, ignore_index=3, reduction="none")(x, y, factor), rows * factor)
    torch.testing.assert_close(
        make(COUNTS, ignore_index=3, reduction="none")(x, y, sample_weight=factor), rows * factor
    )

    smooth = make(COUNTS, ignore_index=3, label_smoothing=0.2, reduction="none")(x, y)
    assert ((smooth != rows) == (y != 3)).all()
    assert make(COUNTS)(x[:0], y[:0]).isnan()
    assert make(COUNTS, empty="zero")(x[:0], y[:0]) == 0
    assert (make(COUNTS, z_loss=0.1)(x, y) > make(COUNTS)(x, y)).all()


@every_loss
def test_reduction_may_be_changed_on_the_module(make) -> None:
    """fastai and calibration code set ``reduction`` of a loss they were given."""
    x, y = batch(torch.float32)
    loss = make(COUNTS, denominator="count")
    mean = loss(x, y)
    loss.reduction = "none"
    rows = loss(x, y)
    torch.testing.assert_close(rows.mean(), mean)


@every_loss
def test_train_and_eval_are_the_same(make) -> None:
    x, y = batch(torch.float32)
    loss = make(COUNTS)
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    trained = loss(x, y)
    assert torch.equal(loss.eval()(x, y), trained)
    assert all(torch.equal(value, state[name]) for name, value in loss.state_dict().items())


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_give_a_float32_loss(make, dtype: torch.dtype) -> None:
    x, y = batch(torch.float32)
    x = x.detach().to(dtype)
    loss = make(COUNTS)(x, y.to(torch.uint8))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, make(COUNTS)(x.float(), y), rtol=1e-6, atol=0)


def test_probability_targets() -> None:
    """What mixup makes: one module takes labels and probabilities."""
    x, y = batch()
    target = 0.7 * F.one_hot(y, C) + 0.3 * F.one_hot(y.flip(0), C)
    loss = losses.LogitAdjustedLoss(COUNTS)
    assert_same(loss(x, target.double()), 0.7 * loss(x, y) + 0.3 * loss(x, y.flip(0)), x)
    with pytest.raises(ValueError, match="class_margin: expected None with probability targets"):
        losses.LDAMLoss(COUNTS)(x, target.double())


@pytest.mark.parametrize("name", ["LogitAdjustedLoss", "BalancedSoftmaxLoss", "VSLoss", "LDAMLoss"])
def test_class_weights_beside_the_method(name: str) -> None:
    x, y = batch()
    rows = getattr(losses, name)(COUNTS, reduction="none")(x, y)
    actual = getattr(losses, name)(COUNTS, weight=WEIGHT)(x, y)
    torch.testing.assert_close(actual, (WEIGHT[y] * rows).sum() / WEIGHT[y].sum(), rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------- settings and tables

LIVE = [  # loss, the method's name of the setting, another value, the loss made with that value
    (lambda: losses.FocalLoss(2.0), "gamma", 0.0, lambda: losses.FocalLoss(0.0)),
    (lambda: losses.CosFaceLoss(0.4), "margin", 0.1, lambda: losses.CosFaceLoss(0.1)),
    (lambda: losses.LDAMLoss(COUNTS, s=30.0), "s", 8.0, lambda: losses.LDAMLoss(COUNTS, s=8.0)),
    (
        lambda: losses.ClassBalancedLoss(COUNTS, gamma=1.0),
        "gamma",
        0.5,
        lambda: losses.ClassBalancedLoss(COUNTS, gamma=0.5),
    ),
]
every_live = pytest.mark.parametrize(
    ("make", "name", "value", "remake"), LIVE, ids=["focal-gamma", "cosface-margin", "ldam-s", "class-balanced-gamma"]
)


@every_live
def test_a_setting_may_be_scheduled(make, name: str, value: float, remake) -> None:
    """What the repr shows is what the call uses, also in a copy and in a compiled step."""
    x, y = batch(torch.float32)
    loss, expected = make(), remake()
    before = loss(x, y)
    setattr(loss, name, value)
    assert loss(x, y) == expected(x, y) != before
    for same in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert getattr(same, name) == value
        assert repr(same) == repr(expected)
        setattr(same, name, getattr(make(), name))
        assert same(x, y) == before
    with pytest.raises(ValueError, match=f"^{name}: expected a finite number .*found -1.0"):
        setattr(loss, name, -1)
    with pytest.raises(TypeError, match=f"^{name}: expected a number, found Tensor"):
        setattr(loss, name, torch.tensor(1.0))


@every_live
def test_a_scheduled_setting_reaches_a_compiled_step(make, name: str, value: float, remake, compiler) -> None:
    x, y = batch(torch.float32)
    loss = make()
    compiled = compiler(loss)
    assert_same(compiled(x, y), make()(x, y), x)
    setattr(loss, name, value)
    assert_same(compiled(x, y), remake()(x, y), x)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (losses.LogitAdjustedLoss, ["tau"]),
        (losses.VSLoss, ["gamma", "tau"]),
        (losses.LDAMLoss, ["max_m", "logits_scaled"]),
        (lambda n: losses.LDAMLoss(n, logits_scaled=True), ["max_m", "s", "logits_scaled"]),
        (losses.ClassBalancedLoss, ["beta"]),
    ],
)
def test_a_setting_inside_a_table_is_read_only(make, names: list[str]) -> None:
    loss = make(COUNTS)
    for same in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        for name in names:
            with pytest.raises(AttributeError, match=f"^{name}: .* to change it make a new {type(loss).__name__}$"):
                setattr(same, name, 1.0)
        assert repr(same) == repr(make(COUNTS))


WEIGHTED = ["CrossEntropyLoss", "LogitAdjustedLoss", "VSLoss", "FocalLoss", "CosFaceLoss", "LDAMLoss"]


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_may_be_assigned(name: str) -> None:
    """Whatever they were, the new ones are a buffer, a parameter or a schedule, and None takes them away."""
    x, y = batch(torch.float32)
    make, weight = EVERY[name], WEIGHT.float()
    loss, late = make(COUNTS), DeferredReweighting(COUNTS, 0)
    for kind, expected, key in (
        (weight, weight, "weight"),
        (nn.Parameter(weight, requires_grad=False), weight, "weight"),
        (late, late(), "weight.weight"),
        (weight, weight, "weight"),
    ):
        loss.weight = kind
        assert loss(x, y) == make(COUNTS, weight=expected)(x, y)
        assert torch.equal(loss.state_dict()[key], expected)
        assert len(list(loss.parameters())) == isinstance(kind, nn.Parameter)
    assert loss.double().weight.dtype == torch.float64
    loss.weight = None
    assert not [key for key in loss.state_dict() if key.startswith("weight")]
    assert loss.float()(x, y) == make(COUNTS)(x, y)


def test_the_other_tables_may_be_assigned() -> None:
    x, y = batch(num_classes=4)
    loss = losses.CrossEntropyLoss(class_margin=0.3)
    m, a, b = torch.rand(4).double(), torch.rand(4).double() + 0.5, torch.randn(4).double()
    loss.class_margin, loss.class_scale, loss.class_bias = m, a, nn.Parameter(b)
    assert set(loss.state_dict()) == {"class_margin", "class_scale", "class_bias"}
    assert_same(loss(x, y), F.cross_entropy(a * x + b - m * F.one_hot(y, 4), y), x, rtol=1e-12)
    loss.class_margin, loss.class_scale, loss.class_bias = 0.5, None, None
    assert_same(loss(x, y), F.cross_entropy(x - 0.5 * F.one_hot(y, 4), y), x, rtol=1e-12)
    loss.weight = [1.0] * 4
    with pytest.raises(TypeError, match=r"weight: expected a torch.Tensor, found list"):
        loss(x, y)


def test_a_table_may_have_a_parametrization() -> None:
    """Scales that are learnt and stay positive."""

    class Exp(nn.Module):
        def forward(self, x):
            return x.exp()

        def right_inverse(self, x):
            return x.log()

    x, y = batch(num_classes=4)
    loss = losses.CrossEntropyLoss(class_scale=nn.Parameter(torch.ones(4, dtype=torch.float64)))
    nn.utils.parametrize.register_parametrization(loss, "class_scale", Exp())
    loss.class_scale = torch.full((4,), 2.0, dtype=torch.float64)
    assert_same(loss(x, y), F.cross_entropy(2 * x, y), x, rtol=1e-12)
    loss(x, y).backward()
    assert loss.parametrizations.class_scale.original.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------- classes without samples


@every_counted
def test_a_class_without_samples(make) -> None:
    counts = [9, 0, 4, 2, 0]
    x, y = batch(torch.float32, len(counts))
    y = torch.tensor([0, 2, 3])[y % 3]
    for smoothing in (0.0, 0.1):
        loss = make(counts, label_smoothing=smoothing)
        value, gradient = value_and_gradient(loss(x, y), x)
        assert value.isfinite() and value > 0
        assert gradient.isfinite().all()
    for labels, found in (([0, 4, 1], 4), ([1], 1)):
        with pytest.raises(ValueError, match=rf"^target: expected labels of classes with .*found class {found} "):
            loss(x[: len(labels)], torch.tensor(labels))
    assert make(counts, ignore_index=4)(x[:2], torch.tensor([0, 4])).isfinite()
    with pytest.raises(IndexError, match=r"target: expected labels in \[0, 5\)"):
        loss(x[:1], torch.tensor([5]))


@pytest.mark.parametrize("make", [losses.LogitAdjustedLoss, losses.BalancedSoftmaxLoss, losses.VSLoss])
def test_a_biased_loss_leaves_the_absent_class_out(make) -> None:
    x, y = batch(num_classes=3)
    y = y % 2 * 2
    _, gradient = value_and_gradient(make([9, 0, 4])(x, y), x)
    assert (gradient[:, 1] == 0).all()
    without = x.detach()[:, [0, 2]].requires_grad_()
    _, expected = value_and_gradient(make([9, 4])(without, y // 2), without)
    torch.testing.assert_close(gradient[:, [0, 2]], expected, rtol=1e-12, atol=0)


@every_counted
def test_a_class_without_samples_under_vmap(make) -> None:
    """An ensemble's logits, one loss; labels can not be looked at, so they are not refused."""
    x = torch.rand(3, 4, 5) * 2 - 1
    y = torch.tensor([[0, 2, 3, 0], [2, 2, 0, 3], [3, 0, 0, 2]])
    loss = make([9, 0, 4, 2, 0])
    expected = torch.stack([loss(*each) for each in zip(x, y, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(x, y), expected)
    gradients = torch.stack([torch.func.grad(loss)(*each) for each in zip(x, y, strict=True)])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x, y), gradients)


def test_counts_from_a_checkpoint_decide_which_class_is_absent() -> None:
    x, y = torch.zeros(1, 2), torch.tensor([1])
    full, gap = losses.LDAMLoss([3, 1]), losses.LDAMLoss([3, 0])
    full_state = copy.deepcopy(full.state_dict())
    full.load_state_dict(gap.state_dict())
    gap.load_state_dict(full_state)
    assert gap(x, y).isfinite()
    with pytest.raises(ValueError, match="found class 1 with count 0"):
        full(x, y)


# ---------------------------------------------------------------------------------------------- modules


@every_loss
def test_copies_and_checkpoints(make) -> None:
    x, y = batch(torch.float32)
    weighted = make is EVERY["CrossEntropyLoss"]  # the one loss here without tables of its own
    loss = make(COUNTS, weight=torch.rand(C)) if weighted else make(COUNTS)
    expected = loss(x, y)
    assert torch.equal(copy.deepcopy(loss)(x, y), expected)
    assert torch.equal(pickle.loads(pickle.dumps(loss))(x, y), expected)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = make([1 + c % 9 for c in range(C)], **({"weight": torch.ones(C)} if weighted else {}))
    other.load_state_dict(state)
    assert torch.equal(other(x, y), expected)
    assert repr(other) == repr(loss)


def test_a_checkpoint_of_other_classes_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for class_bias"):
        losses.LogitAdjustedLoss([1, 2, 3]).load_state_dict(losses.LogitAdjustedLoss([1, 2]).state_dict())


@every_counted
def test_half_does_not_touch_the_tables(make) -> None:
    x, y = batch(torch.float32)
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "loss": make(COUNTS)})
    expected = model["loss"](x, y)
    for convert in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to("cpu", torch.float16)):
        convert(model)
        assert model["head"].weight.dtype.itemsize == 2
        assert torch.equal(model["loss"](x, y), expected)
    model.double()
    torch.testing.assert_close(model["loss"](x.double(), y), expected.double(), rtol=1e-6, atol=0)
    tables = [b for b in model["loss"].buffers() if b.is_floating_point()]
    assert tables and all(table.dtype == torch.float64 for table in tables)


@every_counted
def test_tables_follow_the_device(make) -> None:
    loss = make(COUNTS).to("meta")
    assert all(buffer.is_meta for buffer in loss.buffers())
    with torch.device("meta"):  # lazy initialisation of large models: tables have no initialisation to be lazy about
        loss = make(COUNTS)
    x, y = batch(torch.float32)
    assert torch.equal(loss(x, y), make(COUNTS)(x, y))


@every_loss
def test_compiles_in_one_graph(make, compiler) -> None:
    x, y = batch(torch.float32)
    loss = make(COUNTS)
    assert_same(compiler(loss)(x, y), loss(x, y), x)


def test_settings_that_differ_still_compile_in_one_graph(compiler) -> None:
    """The second value of a float makes the compiler treat it as a symbol."""
    x, y = batch(torch.float32)
    for loss in (losses.LDAMLoss(COUNTS, s=16.0), losses.CosFaceLoss(scale=64.0), losses.FocalLoss(0.5)):
        assert_same(compiler(loss)(x, y), loss(x, y), x)


def test_set_epoch_reaches_a_compiled_step_without_recompiling(compiler) -> None:
    x, y = batch(torch.float32)
    loss = losses.LDAMLoss(COUNTS, reweight_epoch=2)
    compiled = compiler(loss)
    early = compiled(x, y)
    with torch.compiler.set_stance("fail_on_recompile"):
        loss.set_epoch(2)
        late = compiled(x, y)
    assert late != early
    torch.testing.assert_close(late, loss(x, y))


# ---------------------------------------------------------------------------------------------- schedules


@every_loss
def test_set_epoch_without_a_schedule_changes_nothing(make) -> None:
    x, y = batch(torch.float32)
    loss = make(COUNTS)
    before = loss(x, y)
    loss.set_epoch(1000)
    assert torch.equal(loss(x, y), before)


@pytest.mark.parametrize("name", WEIGHTED)
def test_every_loss_takes_a_schedule_as_weight(name: str) -> None:
    x, y = batch(torch.float32)
    make = EVERY[name]
    loss = make(COUNTS, weight=DeferredReweighting(COUNTS, 3, beta=0.99))
    assert_same(loss(x, y), make(COUNTS)(x, y), x)
    loss.set_epoch(3)
    assert_same(loss(x, y), make(COUNTS, weight=rebalance.effective_number_weight(COUNTS, 0.99))(x, y), x)


@pytest.mark.parametrize("saved_at", [1, 2, 5])
def test_drw_resumes(saved_at: int) -> None:
    """A run that stops after ``set_epoch`` goes on with the same weights, before and after the next ``set_epoch``."""
    x, y = batch(torch.float32)
    running, resumed = (losses.LDAMLoss(COUNTS, reweight_epoch=2) for _ in range(2))
    running.set_epoch(saved_at)
    resumed.load_state_dict(copy.deepcopy(running.state_dict()))
    for epoch in (saved_at, saved_at + 1):
        assert torch.equal(resumed(x, y), running(x, y))
        assert resumed.state_dict()["weight.epoch"] == epoch
        running.set_epoch(epoch + 1)
        resumed.set_epoch(epoch + 1)


# ---------------------------------------------------------------------------------------------- repr and bad input


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (losses.CrossEntropyLoss(), "CrossEntropyLoss()"),
        (
            losses.CrossEntropyLoss(torch.ones(3), -1, "sum", 0.1, class_margin=0.3, focal_gamma=2.0),
            "CrossEntropyLoss(weight=(3,), ignore_index=-1, reduction='sum', label_smoothing=0.1, class_margin=0.3, "
            "focal_gamma=2.0)",
        ),
        (
            losses.LogitAdjustedLoss([900, 90, 10], denominator=torch.tensor(4.0)),
            "LogitAdjustedLoss(tau=1.0, num_classes=3, class_counts=10..900, denominator=tensor(4.))",
        ),
        (losses.BalancedSoftmaxLoss([3, 0]), "BalancedSoftmaxLoss(num_classes=2, class_counts=0..3)"),
        (losses.VSLoss([0.9, 0.1]), "VSLoss(gamma=0.3, tau=1.0, num_classes=2, class_counts=0.1..0.9)"),
        (losses.CosFaceLoss(), "CosFaceLoss(margin=0.4, scale=64.0)"),
        (losses.FocalLoss(1, torch.ones(2)), "FocalLoss(gamma=1.0, weight=(2,))"),
        (
            losses.ClassBalancedLoss([3, 1]),
            "ClassBalancedLoss(beta=0.9999, gamma=0.0, num_classes=2, class_counts=1..3)",
        ),
        (
            losses.LDAMLoss([9, 1], reweight_epoch=160),
            "LDAMLoss(\n  max_m=0.5, s=30.0, logits_scaled=False, num_classes=2, class_counts=1..9\n"
            "  (weight): DeferredReweighting(reweight_epoch=160, beta=0.9999, num_classes=2, class_counts=1..9)\n)",
        ),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_repr(loss: nn.Module, expected: str) -> None:
    assert repr(loss) == expected


BAD = [  # all in the constructor
    (lambda: losses.LDAMLoss([3, 1], logits_scaled="no"), TypeError, "logits_scaled: expected a bool, found 'no'"),
    (
        lambda: losses.LogitAdjustedLoss([3, -1]),
        ValueError,
        "class_counts: expected all counts >= 0, found -1 at class 1",
    ),
    (lambda: losses.BalancedSoftmaxLoss([0, 0]), ValueError, "class_counts: expected at least one count > 0"),
    (lambda: losses.LDAMLoss(torch.ones(2, 2)), ValueError, "class_counts: expected one count per class"),
    (lambda: losses.LogitAdjustedLoss([3, 1], tau=-1), ValueError, "tau: expected a finite number >= 0"),
    (lambda: losses.VSLoss([3, 1], gamma=None), TypeError, "gamma: expected a number, found NoneType"),
    (lambda: losses.LDAMLoss([3, 1], max_m=-0.5), ValueError, "max_m: expected a finite number >= 0"),
    (lambda: losses.LDAMLoss([3, 1], s=0), ValueError, "s: expected a finite number > 0"),
    (lambda: losses.LDAMLoss([3, 1], reweight_epoch=1.0), TypeError, "reweight_epoch: expected an integer, found 1.0"),
    (
        lambda: losses.LDAMLoss([3, 1], reweight_epoch=1, weight=torch.ones(2)),
        ValueError,
        "weight: expected None with reweight_epoch, which makes the weights, found a weight",
    ),
    (lambda: losses.CosFaceLoss(margin="0.4"), TypeError, "margin: expected a number, found str"),
    (lambda: losses.CosFaceLoss(scale=0.0), ValueError, "scale: expected a finite number > 0"),
    (lambda: losses.FocalLoss(-2), ValueError, "gamma: expected a finite number >= 0"),
    (lambda: losses.FocalLoss(focal_pt="p"), ValueError, "focal_pt: expected 'raw' or 'weighted', found 'p'"),
    (lambda: losses.FocalLoss(focal_grad="no"), ValueError, "focal_grad: expected 'full' or 'detached', found 'no'"),
    (lambda: losses.ClassBalancedLoss([3, 1], beta=1.0), ValueError, "beta: expected a number below 1"),
    (lambda: losses.ClassBalancedLoss([0.3, 0.7]), ValueError, "class_counts: expected numbers of samples, found 0.3"),
    (
        lambda: losses.LogitAdjustedLoss([3, 1], weight=torch.ones(3)),
        ValueError,
        "weight: expected shape (2,), one value a class, found (3,)",
    ),
    (lambda: losses.CrossEntropyLoss([1.0, 2.0]), TypeError, "weight: expected a torch.Tensor, found list"),
    (lambda: losses.CrossEntropyLoss(torch.tensor([1, 2])), TypeError, "weight: expected a floating type"),
    (
        lambda: losses.CrossEntropyLoss(torch.tensor([1.0, -1.0])),
        ValueError,
        "weight: expected finite values >= 0, found -1 at index 1",
    ),
    (
        lambda: losses.CrossEntropyLoss(class_bias=torch.tensor([0.0, torch.nan])),
        ValueError,
        "class_bias: expected finite values or -inf, found nan at index 1",
    ),
    (lambda: losses.CrossEntropyLoss(reduction="avg"), ValueError, "reduction: expected 'none' or 'mean' or 'sum'"),
    (lambda: losses.CrossEntropyLoss(label_smoothing=1.5), ValueError, "label_smoothing: expected a finite number"),
    (lambda: losses.CrossEntropyLoss(ignore_index=0.5), TypeError, "ignore_index: expected an integer, found 0.5"),
    (lambda: losses.CrossEntropyLoss(denominator="rows"), ValueError, "denominator: expected 'weight' or 'count' or"),
    (lambda: losses.CrossEntropyLoss(denominator=0.0), ValueError, "denominator: expected a finite number > 0"),
    (lambda: losses.CrossEntropyLoss(empty="0"), ValueError, "empty: expected 'nan' or 'zero', found '0'"),
    (lambda: losses.CrossEntropyLoss(z_loss=-1), ValueError, "z_loss: expected a finite number >= 0"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_arguments_are_refused_by_the_constructor(call, error, message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="cls_num_list"):
        losses.LDAMLoss([1, 2], cls_num_list=[1, 2])
    with pytest.raises(TypeError, match="weight"):
        losses.ClassBalancedLoss([1, 2], weight=torch.ones(2))

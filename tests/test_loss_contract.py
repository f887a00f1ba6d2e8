"""What every loss of ltkernels.losses promises, whatever it computes: users change one for another."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from loss_cases import PUBLIC, arguments_of, every_public_loss
from torch import Tensor, nn

from ltkernels import losses

COUNTS = [900, 300, 90, 9, 1]
N, C = 12, len(COUNTS)
MEAN_ONLY = {"LADELoss"}  # its regulariser is of the whole batch
ANY_NUMBER_OF_CLASSES = {  # no table of the constructor has a length
    "AsymmetricLoss", "CosFaceLoss", "CrossEntropyLoss", "FocalLoss", "InfluenceBalancedLoss", "SigmoidFocalLoss",
}  # fmt: skip
TAKES_LABELS_OF_ABSENT_CLASSES = {  # counts of nothing, of images with an object, or with 1e-9 added, as published
    *ANY_NUMBER_OF_CLASSES, "ACSLLoss", "ArcFaceLoss", "DistillationLoss", "DropLoss", "EqualizationLoss",
    "EqualizationLossV2", "FederatedLoss", "LADELoss", "LinearCrossEntropyLoss", "SADELoss", "SeesawLoss",
}  # fmt: skip


def batch(rows: int = N, classes: int = C) -> tuple[Tensor, Tensor]:
    """Cosine-like logits, and labels of every class."""
    return torch.rand(rows, classes) * 2 - 1, torch.arange(rows) % classes


def of(loss: nn.Module, x: Tensor, y: Any, **more: Any) -> Tensor:
    torch.manual_seed(7)  # of the classes that FederatedLoss draws
    value: Tensor = loss(*arguments_of(loss, x, y), **more)
    return value


def value_and_gradient(loss: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    value = of(loss, x, y)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def state(loss: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(loss.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_the_table_has_every_loss() -> None:
    assert set(PUBLIC) == set(losses.__all__)


# ---------------------------------------------------------------------------------------------- batches


@every_public_loss
@pytest.mark.parametrize("rows", [0, N], ids=["empty", "all ignored"])
def test_nothing_to_average(name: str, rows: int) -> None:
    """As torch: the mean is nan, the sum 0, and nothing gets a gradient."""
    x, y = batch()[0][:rows], torch.full((rows,), -100)
    expected = {"mean": torch.tensor(torch.nan), "sum": torch.tensor(0.0), "none": torch.zeros(rows)}
    for reduction in ("mean",) if name in MEAN_ONLY else expected:
        loss = PUBLIC[name](COUNTS, **({} if name in MEAN_ONLY else {"reduction": reduction}))
        value, gradient = value_and_gradient(loss, x, y)
        if name == "DistillationLoss" and rows:  # rows without a label are distilled all the same
            assert value.isnan() if reduction == "mean" else value.isfinite().all()
            continue
        assert torch.equal(value, expected[reduction]) or (reduction == "mean" and value.isnan() and not value.shape)
        assert gradient.shape == x.shape and not gradient.any()


@every_public_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [40.0, 1e4, -40.0, -1e4])  # 40: the label's probability is 1 in float32
def test_logits_of_every_size(name: str, dtype: torch.dtype, lead: float) -> None:
    loss = PUBLIC[name](COUNTS).to(dtype if name == "LinearCrossEntropyLoss" else torch.float32)
    value, gradient = value_and_gradient(loss, (lead * torch.eye(C)).to(dtype), torch.arange(C))
    assert value.isfinite() and gradient.isfinite().all()


@every_public_loss
def test_one_class(name: str) -> None:
    value, gradient = value_and_gradient(PUBLIC[name]([7]), torch.rand(3, 1), torch.zeros(3, dtype=torch.int64))
    assert value.isfinite() and gradient.isfinite().all()


@every_public_loss
def test_a_class_without_samples(name: str) -> None:
    counts, (x, y) = [9, 0, 4, 2, 0], batch()
    loss = PUBLIC[name](counts)
    value, gradient = value_and_gradient(loss, x, torch.tensor([0, 2, 3])[y % 3])
    assert value.isfinite() and gradient.isfinite().all() and gradient.any()
    before = state(loss)
    if name in TAKES_LABELS_OF_ABSENT_CLASSES:
        assert of(loss, x, y).isfinite()
    else:
        with pytest.raises(ValueError, match=r"^target: expected labels of classes with .*found class 1 "):
            of(loss, x, y)
        assert same(state(loss), before)


# ---------------------------------------------------------------------------------------------- wrong calls


@every_public_loss
@pytest.mark.parametrize("classes", [C - 1, C + 1])
def test_logits_of_another_number_of_classes(name: str, classes: int) -> None:
    x, y = batch(classes=classes)
    loss = PUBLIC[name](COUNTS)
    before = state(loss)
    if name in ANY_NUMBER_OF_CLASSES:
        assert of(loss, x, y % 4).isfinite()
        return
    with pytest.raises(ValueError, match=r"^\w+: expected .*found"):
        of(loss, x, y % 4)
    assert same(state(loss), before)


@every_public_loss
@pytest.mark.parametrize("label", [-1, C + 1])  # C is the background of detection
def test_labels_out_of_range(name: str, label: int) -> None:
    x, y = batch()
    y[3] = label
    loss = PUBLIC[name](COUNTS)
    before = state(loss)
    with pytest.raises(IndexError, match=rf"^target: expected labels .*found {label} "):
        of(loss, x, y)
    assert same(state(loss), before)


@every_public_loss
def test_labels_of_a_wrong_kind(name: str) -> None:
    x, y = batch()
    loss = PUBLIC[name](COUNTS)
    before = state(loss)
    for wrong in (y.tolist(), y.numpy(), "cat", y[:, None], y[:5], y.float(), y > 2):
        with pytest.raises((TypeError, ValueError), match="^target: expected"):
            of(loss, x, wrong)
    assert same(state(loss), before)


@every_public_loss
def test_logits_of_a_wrong_kind(name: str) -> None:
    x, y = batch()
    loss = PUBLIC[name](COUNTS)
    before = state(loss)
    more = arguments_of(loss, x, y)[1:]
    for wrong in (x.tolist(), x.numpy(), x.long(), x[:, :0], x.to(torch.complex64), None):
        with pytest.raises((TypeError, ValueError), match=r"^(input|student)(\[0\])?: expected"):
            loss(wrong, *more)
    assert same(state(loss), before)


@pytest.mark.parametrize("name", ["ACSLLoss", "DropLoss", "FederatedLoss"])
def test_losses_that_look_at_labels_refuse_multi_hot_targets(name: str) -> None:
    """Which would pass for labels 0 and 1."""
    x, y = batch()
    loss = PUBLIC[name](COUNTS)
    multi_hot = nn.functional.one_hot(y, C + (name == "ACSLLoss"))
    for wrong, error in ((multi_hot, ValueError), (multi_hot.bool(), TypeError), (multi_hot.float(), TypeError)):
        with pytest.raises(error, match="^target: expected labels of"):
            of(loss, x, wrong)


@every_public_loss
def test_misspelt_arguments(name: str) -> None:
    with pytest.raises(TypeError, match="reductoin"):
        PUBLIC[name](COUNTS, reductoin="mean")
    with pytest.raises(TypeError, match="size_average"):
        PUBLIC[name](COUNTS, size_average=True)
    with pytest.raises(TypeError, match="ignore_index: expected an integer"):
        PUBLIC[name](COUNTS, ignore_index=0.5)
    if name in MEAN_ONLY:
        return
    with pytest.raises(ValueError, match="reduction: expected 'none' or 'mean' or 'sum', found 'avg'"):
        PUBLIC[name](COUNTS, reduction="avg")
    loss = PUBLIC[name](COUNTS)
    loss.reduction = "avg"  # libraries assign it
    with pytest.raises(ValueError, match="reduction: expected 'none' or 'mean' or 'sum', found 'avg'"):
        of(loss, *batch())


@pytest.mark.parametrize("name", ["LogitAdjustedLoss", "BalancedSoftmaxLoss", "VSLoss", "FocalLoss", "LDAMLoss"])
def test_a_method_takes_no_parameter_of_another(name: str) -> None:
    """``scale=30`` of a cosine head would scale the log prior too, and no repr would say so."""
    for option in ({"scale": 30.0}, {"class_margin": 0.3}, {"class_bias": torch.zeros(C)}, {"margin_type": "arc"}):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(option))}'"):
            PUBLIC[name](COUNTS, **option)


# ---------------------------------------------------------------------------------------------- types and modes


@every_public_loss
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint64])
def test_labels_of_every_integer_type(name: str, dtype: torch.dtype) -> None:
    x, y = batch()
    assert torch.equal(of(PUBLIC[name](COUNTS), x, y.to(dtype)), of(PUBLIC[name](COUNTS), x, y))


@every_public_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_with_float32_tables(name: str, dtype: torch.dtype) -> None:
    x, y = batch()
    x = x.to(dtype)
    layer = dtype if name == "LinearCrossEntropyLoss" else torch.float32  # its classifier has the features' type
    value = of(PUBLIC[name](COUNTS).to(layer), x, y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, of(PUBLIC[name](COUNTS), x.float(), y), rtol=1e-6, atol=0)
    if name != "LinearCrossEntropyLoss":  # whose product autocast computes in half precision, as of nn.Linear
        with torch.autocast("cpu", dtype):
            assert torch.equal(of(PUBLIC[name](COUNTS), x, y), value)


@every_public_loss
def test_train_and_eval(name: str) -> None:
    """One loss in both modes; a state moves in training alone. Seesaw counts a batch before its own loss."""
    x, y = batch()
    loss = PUBLIC[name](COUNTS)
    before, moves = state(loss), isinstance(loss, (losses.SeesawLoss, losses.SoftmaxEqualizationLoss))
    moves |= isinstance(loss, (losses.EqualizationLossV2, losses.DropLoss, losses.ACSLLoss))
    value = of(loss.eval(), x, y)
    assert torch.equal(of(loss, x, y), value)
    assert same(state(loss), before)
    trained = of(loss.train(), x, y)
    assert torch.equal(trained, value) == (name != "SeesawLoss")
    assert same(state(loss), before) != moves


@every_public_loss
def test_nothing_is_written_and_no_graph_without_gradients(name: str) -> None:
    x, y = batch()
    loss, logits, labels = PUBLIC[name](COUNTS), x.clone().requires_grad_(), y.clone()
    of(loss, logits, labels).backward()
    assert torch.equal(logits.detach(), x) and torch.equal(labels, y)
    with torch.no_grad():
        assert not of(loss, logits, y).requires_grad
    with torch.inference_mode():
        of(loss, x, y)
    of(loss, logits, y).backward()  # nothing in the state is an inference tensor now


# ---------------------------------------------------------------------------------------------- modules


@every_public_loss
def test_copies_and_checkpoints_of_other_counts(name: str) -> None:
    x, y = batch()
    loss, other = PUBLIC[name](COUNTS), PUBLIC[name]([1, 2, 3, 4, 50])
    of(loss, x, y)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    copies = (other, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)))
    assert len({repr(one) for one in (loss, *copies)}) == 1
    for _ in range(2):
        value = of(loss, x, y)
        assert all(torch.equal(of(one, x, y), value) for one in copies)


@pytest.mark.parametrize("name", ["LDAMLoss", "RIDELoss", "VSLoss", "SoftmaxEqualizationLoss"])
def test_a_checkpoint_of_frequencies(name: str) -> None:
    """Counts are integers and frequencies are not: loaded as integers all of these would be 0, absent classes."""
    x, y = batch()
    trained, resumed = PUBLIC[name]([8.5, 4.5, 2.5, 1.5, 1.25]), PUBLIC[name](COUNTS)
    resumed.load_state_dict(trained.state_dict())
    assert torch.equal(resumed.class_counts, trained.class_counts)
    resumed.set_epoch(3)
    trained.set_epoch(3)
    assert torch.equal(of(resumed, x, y), of(trained, x, y))
    again = PUBLIC[name]([8.5, 4.5, 2.5, 1.5, 1.25])
    again.load_state_dict(PUBLIC[name](COUNTS).state_dict())
    assert again.class_counts.tolist() == COUNTS


@every_public_loss
def test_precision_and_device_of_tables(name: str) -> None:
    x, y = batch()
    value = of(PUBLIC[name](COUNTS), x, y)
    half = PUBLIC[name](COUNTS).half()
    assert not any(table.dtype in (torch.float16, torch.bfloat16) for table in half.buffers())
    if name != "LinearCrossEntropyLoss":
        assert torch.equal(of(half, x, y), value)
    double = PUBLIC[name](COUNTS).double()
    assert all(table.dtype == torch.float64 for table in double.buffers() if table.is_floating_point())
    torch.testing.assert_close(of(double, x.double(), y), value.double(), rtol=1e-5, atol=0)
    assert all(table.is_meta for table in PUBLIC[name](COUNTS).to("meta").buffers())
    with torch.device("meta"):  # lazy initialisation of a large model: tables have nothing to be lazy about
        lazy = PUBLIC[name](COUNTS)
    assert not any(table.is_meta for table in lazy.buffers())


@every_public_loss
def test_repr_has_the_options_that_differ(name: str) -> None:
    assert "ignore_index" not in repr(PUBLIC[name](COUNTS))
    loss = PUBLIC[name](COUNTS, ignore_index=-1, **({} if name in MEAN_ONLY else {"reduction": "sum"}))
    assert repr(loss).startswith(f"{name}(") and "ignore_index=-1" in repr(loss) and "tensor(" not in repr(loss)
    assert ("reduction='sum'" in repr(loss)) == (name not in MEAN_ONLY)


@every_public_loss
def test_every_loss_may_be_told_of_epochs(name: str) -> None:
    """A training loop that changes its loss need not know which of them have a schedule."""
    loss, (x, y) = PUBLIC[name](COUNTS), batch()
    before = of(loss.eval(), x, y)
    loss.set_epoch(1000)  # the schedules here are past their start
    assert torch.equal(of(loss, x, y), before)


@every_public_loss
def test_export(name: str) -> None:
    loss = PUBLIC[name](COUNTS).eval()
    arguments = arguments_of(loss, *batch())
    exported = torch.export.export(loss, arguments).module()
    values = []
    for module in (exported, loss):
        torch.manual_seed(7)
        values.append(module(*arguments))
    torch.testing.assert_close(*values)

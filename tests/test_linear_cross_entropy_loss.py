"""LinearCrossEntropyLoss: PyTorch's module, and every loss of class tables with the classifier in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from loss_cases import COUNTS, EVERY, C
from torch import Tensor

import ltkernels as ltk
from ltkernels import losses

D, N = 6, 31
Loss = losses.LinearCrossEntropyLoss


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bias", [False, True])
def test_every_loss_of_class_tables(name: str, bias: bool) -> None:
    """The same as the loss of the logits that the module gives for evaluation."""
    criterion = EVERY[name](COUNTS)
    module = Loss(D, C, criterion=criterion, normalize=True, bias=bias, dtype=torch.float64)
    x, y = torch.randn(N, D, dtype=torch.float64, requires_grad=True), torch.randint(C, (N,))
    variables = (x, *module.linear.parameters())
    found, expected = module(x, y), EVERY[name](COUNTS)(module.logits(x), y)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    for mine, other in zip(
        torch.autograd.grad(found, variables), torch.autograd.grad(expected, variables), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("out", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_in_place_of_pytorchs_module(out: tuple[int, ...], bias: bool, soft: bool) -> None:
    arguments: dict[str, Any] = {
        "out_features": out, "bias": bias, "weight": torch.linspace(0.5, 2, 7), "label_smoothing": 0.1,
        "options": None if out or soft else torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4),
    }  # fmt: skip
    theirs = torch.nn.LinearCrossEntropyLoss(D, 7, **(arguments | {"options": None}))
    ours = Loss(D, 7, **arguments)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(N, D, requires_grad=True)
    target = torch.rand(N, 7, *out).softmax(1) if soft else torch.randint(7, (N, *out))
    for mine, other in ((ours(x, target), theirs(x, target)),):
        torch.testing.assert_close(mine, other)
        found = torch.autograd.grad(mine, (x, *ours.parameters()))
        expected = torch.autograd.grad(other, (x, *theirs.parameters()))
        torch.testing.assert_close(found, expected)
    logits = ours.logits(x)
    torch.testing.assert_close(torch.nn.CrossEntropyLoss(ours.weight, label_smoothing=0.1)(logits, target), mine)


def test_it_learns_and_follows_a_schedule() -> None:
    """Weights that start at epoch 1 change the loss then, whether they are the module's or its criterion's."""
    x, y = torch.randn(N, D), torch.arange(N) % 3
    counts = [900, 90, 10]
    for module in (
        Loss(D, 3, weight=ltk.rebalance.DeferredReweighting(counts, reweight_epoch=1, beta=0.999)),
        Loss(D, 3, criterion=losses.LDAMLoss(counts, reweight_epoch=1), normalize=True),
    ):
        before = module(x, y).item()
        module.set_epoch(1)
        assert abs(module(x, y).item() - before) > 1e-4
        copied = copy.deepcopy(module)
        copied.load_state_dict(module.state_dict())
        assert copied(x, y).item() == module(x, y).item()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(30):
            optimizer.zero_grad()
            module(x, y).backward()
            optimizer.step()
        assert module(x, y) < before


def test_options_that_are_set_later_are_the_criterions() -> None:
    """As accelerate and others do with `loss.reduction = "none"` on a loss that they were given."""
    module = Loss(D, C, criterion=losses.BalancedSoftmaxLoss(COUNTS, ignore_index=1))
    x, y = torch.randn(6, D), torch.arange(6) % C
    assert module.ignore_index == 1 and module.reduction == "mean"
    module.reduction, module.ignore_index = "none", 2
    expected = losses.BalancedSoftmaxLoss(COUNTS, reduction="none", ignore_index=2)(module.logits(x), y)
    torch.testing.assert_close(module(x, y), expected)
    assert module.reduction == "none" and expected[2] == 0
    for name in ("weight", "label_smoothing"):
        with pytest.raises(AttributeError, match=f"{name}: expected no assignment beside a criterion"):
            setattr(module, name, torch.ones(C))


def test_half_precision_keeps_the_tables() -> None:
    module = Loss(D, C, criterion=losses.BalancedSoftmaxLoss(COUNTS)).bfloat16()
    assert module.linear.weight.dtype == torch.bfloat16
    assert (
        isinstance(module.criterion, losses.BalancedSoftmaxLoss) and module.criterion.class_bias.dtype == torch.float32
    )
    x, y = torch.randn(2, 5, D).bfloat16(), torch.randint(C, (2, 5))
    assert module(x, y).dtype == torch.float32


def test_repr() -> None:
    assert repr(Loss(4, 3)).splitlines()[0] == "LinearCrossEntropyLoss("
    assert "in_features=4, num_classes=3, bias=False" in repr(Loss(4, 3))
    text = repr(Loss(4, 3, bias=True, out_features=(2,), reduction="sum", normalize=True))
    assert "bias=True, out_features=(2,), reduction='sum', normalize=True" in text
    assert "(criterion): FocalLoss(gamma=1.0)" in repr(Loss(4, 3, criterion=losses.FocalLoss(1.0)))


ERRORS: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "in_features: expected an integer", (4.0, 3), {}),
    (ValueError, "num_classes: expected at least 1, found 0", (4, 0), {}),
    (ValueError, "out_features: expected at least 1, found 0", (4, 3), {"out_features": (0,)}),
    (ValueError, r"weight: expected shape \(3,\)", (4, 3), {"weight": torch.ones(4)}),
    (ValueError, "label_smoothing: ", (4, 3), {"label_smoothing": 2.0}),
    (ValueError, "reduction: ", (4, 3), {"reduction": "max"}),
    (TypeError, "options: expected a torch.nn.LinearCrossEntropyOptions", (4, 3), {"options": 5}),
    (TypeError, "criterion: .* found CrossEntropyLoss", (4, 3), {"criterion": torch.nn.CrossEntropyLoss()}),
    (TypeError, "criterion: expected a loss .* found SeesawLoss", (4, 3), {"criterion": losses.SeesawLoss(3)}),
    (ValueError, r"class_bias: expected shape \(4,\)", (4, 4), {"criterion": losses.BalancedSoftmaxLoss([3, 2, 1])}),
    (ValueError, "reduction: expected none", (4, 3), {"criterion": losses.FocalLoss(), "reduction": "sum"}),
    (ValueError, "normalize: expected True with a ArcFaceLoss", (4, 3), {"criterion": losses.ArcFaceLoss()}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "sizes", "arguments"), ERRORS, ids=[e[1][:30] for e in ERRORS])
def test_wrong_modules(error: type[Exception], message: str, sizes: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        Loss(*sizes, **arguments)


def test_a_label_without_samples_is_refused() -> None:
    module = Loss(D, 3, criterion=losses.LDAMLoss([5, 0, 1]), normalize=True)
    with pytest.raises(ValueError, match="found class 1 with count 0"):
        module(torch.randn(2, D), torch.tensor([0, 1]))


def test_compiles(tmp_path: Any) -> None:
    torch._dynamo.reset()
    module = Loss(D, 3, criterion=losses.LogitAdjustedLoss([5, 3, 1]))
    x, y = torch.randn(4, D), torch.tensor([0, 1, 2, 0])

    def gradient(function: Any) -> Tensor:
        return torch.autograd.grad(function(x, y), module.linear.weight)[0]

    assert torch.equal(gradient(torch.compile(module, fullgraph=True, backend="aot_eager")), gradient(module))
    torch.save(module.state_dict(), tmp_path / "state.pt")
    module.load_state_dict(torch.load(tmp_path / "state.pt"))
    torch._dynamo.reset()

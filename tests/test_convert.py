"""ltk.convert: what it replaces gives the same values and gradients, and it says what it leaves."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from without_torchvision import import_timm

import ltkernels as ltk

C, N = 6, 40
COUNTS = torch.tensor([500, 200, 80, 30, 12, 4])
WEIGHT = torch.tensor([0.2, 0.5, 1.0, 1.0, 2.0, 5.0])


def answer(loss: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x = logits.clone().requires_grad_()
    value = loss(x, target)
    upstream = torch.rand(value.shape, generator=torch.Generator().manual_seed(1))
    return value.detach(), torch.autograd.grad(value, x, upstream)[0]


def assert_same(loss: nn.Module, found: nn.Module, *targets: Tensor) -> None:
    assert type(found).__module__.startswith("ltkernels.losses")
    logits = 3 * torch.randn(N, C)
    for target in targets or (torch.randint(C, (N,)),):
        torch.testing.assert_close(answer(found, logits, target), answer(loss, logits, target), rtol=1e-5, atol=1e-6)


def converted(loss: nn.Module) -> nn.Module:
    found, report = ltk.convert(loss)
    assert len(report.changed) == 1 and not report.left, str(report)
    return found


def reason(loss: nn.Module) -> str:
    found, report = ltk.convert(nn.ModuleDict({"loss": loss}))
    assert type(found["loss"]) is type(loss) and not report.changed
    (entry,) = report.left
    assert entry.name == "loss"
    return entry.result


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"weight": WEIGHT}, {"label_smoothing": 0.1, "weight": WEIGHT}, {"ignore_index": 3}]
)
def test_torch(options: dict[str, Any], reduction: str) -> None:
    loss = nn.CrossEntropyLoss(reduction=reduction, **options)
    found = converted(loss)
    probabilities = [torch.rand(N, C).softmax(1)] if "ignore_index" not in options else []  # torch refuses both
    assert_same(loss, found, torch.randint(C, (N,)), *probabilities)
    assert found.state_dict().keys() == loss.state_dict().keys()
    found.load_state_dict(loss.state_dict())


def timm_loss(name: str, *arguments: Any) -> nn.Module:
    if find_spec("timm") is None:
        pytest.skip("needs timm")
    import_timm()
    import timm.loss

    return getattr(timm.loss, name)(*arguments)


def test_timm() -> None:
    loss = timm_loss("LabelSmoothingCrossEntropy", 0.2)
    assert_same(loss, converted(loss))
    loss = timm_loss("SoftTargetCrossEntropy")
    assert_same(loss, converted(loss), torch.rand(N, C).softmax(1), torch.rand(N, C))  # rows of any sum
    assert reason(timm_loss("BinaryCrossEntropy")).startswith("a sigmoid loss")
    assert reason(timm_loss("PolyCrossEntropy")) == "it has no exact counterpart"
    assert "label_smoothing: expected" in reason(timm_loss("LabelSmoothingCrossEntropy", -0.1))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"alpha": WEIGHT}, {"label_smoothing": 0.1}, {"gamma": 0.0, "alpha": WEIGHT}])
def test_imbalanced_losses(options: dict[str, Any], reduction: str) -> None:
    peer = pytest.importorskip("imbalanced_losses").SoftmaxFocalLoss
    loss = peer(reduction=reduction, ignore_index=2, **options)
    assert_same(loss, converted(loss), torch.randint(C, (N,)), torch.full((N,), 2))
    assert "mean_positive" in reason(peer(reduction="mean_positive"))
    assert "alpha and label_smoothing together" in reason(peer(WEIGHT, label_smoothing=0.1))
    assert "gathers the logits" in reason(peer(gather_distributed=True))


# Forms of published code, written anew from the papers' formulas: their names and attributes are the published ones.


class LDAMLoss(nn.Module):
    def __init__(self, scale_in_loss: bool = True, weight: Tensor | None = None, power: int = 1) -> None:
        super().__init__()
        self.m_list, self.s, self.weight = ltk.rebalance.ldam_margin(COUNTS), 30, weight
        self.scale_in_loss, self.power = scale_in_loss, power

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        margin = F.one_hot(target, C) * self.m_list[target, None] ** self.power
        scaled = self.s * (x - margin) if self.scale_in_loss else x - self.s * margin
        return F.cross_entropy(scaled, target, weight=self.weight)


class FocalLoss(nn.Module):
    def __init__(self, gamma: float, weight: Tensor | None, raw: bool = False) -> None:
        super().__init__()
        self.gamma, self.weight, self.raw = gamma, weight, raw

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        rows = F.cross_entropy(x, target, reduction="none", weight=self.weight)
        p = (-F.cross_entropy(x, target, reduction="none") if self.raw else -rows).exp()
        return ((1 - p) ** self.gamma * rows).mean()


class BalancedSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sample_per_class = COUNTS

    def forward(self, x: Tensor, label: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(x + self.sample_per_class.log(), label, reduction=reduction)


@pytest.mark.parametrize(
    "loss",
    [
        LDAMLoss(),
        LDAMLoss(scale_in_loss=False),
        LDAMLoss(weight=WEIGHT),
        FocalLoss(1.0, WEIGHT),
        FocalLoss(2.0, WEIGHT, raw=True),
        FocalLoss(2.0, None),
        BalancedSoftmax(),
    ],
)
def test_published_code(loss: nn.Module) -> None:
    assert_same(loss, converted(loss))


def test_published_code_that_was_changed() -> None:
    """It has the name and the attributes, and computes something else."""
    assert "computes something else" in reason(LDAMLoss(power=2))
    nameless = LDAMLoss()
    del nameless.m_list
    assert reason(nameless) == "it has no tensor 'm_list', as the published class of this name"
    del nameless.s
    nameless.m_list = COUNTS
    assert reason(nameless).startswith("it is not the published class of this name ('LDAMLoss' object has no")
    assert "class_margin: expected shape (7,)" in reason(LDAMLoss(weight=torch.ones(C + 1)))
    broken = FocalLoss(1.0, None)
    broken.forward = lambda *given: 1 / 0
    assert "could not be tried on random logits (ZeroDivisionError" in reason(broken)


def test_a_copy_shares_nothing() -> None:
    loss = nn.CrossEntropyLoss(WEIGHT.clone())
    found = converted(loss)
    loss.weight.zero_()
    assert torch.equal(found.weight, WEIGHT)


def test_what_is_left() -> None:
    class Own(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return 2 * super().forward(input, target)

    hooked = nn.CrossEntropyLoss()
    hooked.register_forward_hook(lambda module, given, result: None)
    assert "subclass" in reason(Own())
    assert reason(hooked) == "it has hooks, which would be lost"
    assert "log-probabilities" in reason(nn.NLLLoss())
    assert "sigmoid" in reason(nn.BCEWithLogitsLoss())
    assert reason(nn.MSELoss()) == "it has no exact counterpart"
    assert "weight: expected" in reason(nn.CrossEntropyLoss(-WEIGHT))


class Model(nn.Module):
    """Losses in every place: shared, nested, in a list that torch does not see, as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, C)
        self.loss = nn.CrossEntropyLoss(WEIGHT)
        self.same = self.loss
        self.parts = nn.ModuleList([nn.Sequential(nn.CrossEntropyLoss()), nn.L1Loss()])
        self.ours = ltk.losses.LogitAdjustedLoss(COUNTS)
        self.hidden = [nn.CrossEntropyLoss()]
        self.function = F.cross_entropy


@pytest.mark.parametrize("inplace", [False, True])
def test_in_a_model(inplace: bool) -> None:
    model = Model().eval()
    state, before = copy.deepcopy(model.state_dict()), model.loss
    found, report = ltk.convert(model, inplace=inplace)
    assert (found is model) == inplace
    assert (model.loss is before) != inplace
    assert isinstance(found.loss, ltk.losses.CrossEntropyLoss) and found.same is found.loss
    assert not found.loss.training
    assert isinstance(found.parts[0][0], ltk.losses.CrossEntropyLoss)
    assert [entry.name for entry in report.changed] == ["loss", "parts.0.0"]
    assert {entry.name for entry in report.left} == {"parts.1", "hidden", "function"}
    assert found.state_dict().keys() == state.keys()
    found.load_state_dict(state)
    assert_same(before, found.loss)
    again, second = ltk.convert(found, inplace=True)
    assert again is found and not second.changed


def test_report_is_readable() -> None:
    report = ltk.convert(Model())[1]
    assert str(report) == (
        "changed 2, left 3\n"
        "  loss: CrossEntropyLoss(weight=(6,)) -> ltkernels.losses.CrossEntropyLoss(weight=(6,))\n"
        "  parts.0.0: CrossEntropyLoss() -> ltkernels.losses.CrossEntropyLoss()\n"
        "  hidden: CrossEntropyLoss() stays: it is in a plain container; nn.ModuleList makes it part of the module\n"
        "  function: torch.nn.functional.cross_entropy stays: a function; ltkernels.functional has its twin\n"
        "  parts.1: L1Loss() stays: it has no exact counterpart"
    )
    assert "as a function is not seen" in str(ltk.convert(nn.Linear(2, 2))[1])
    assert str(ltk.convert(nn.CrossEntropyLoss())[1]).splitlines()[1].startswith("  the loss: CrossEntropyLoss() ->")


def test_wrong_calls() -> None:
    with pytest.raises(TypeError, match="module: expected a torch.nn.Module, found function"):
        ltk.convert(F.cross_entropy)
    with pytest.raises(ValueError, match="inplace: expected False for a loss"):
        ltk.convert(nn.CrossEntropyLoss(), inplace=True)

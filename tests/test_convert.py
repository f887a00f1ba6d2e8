"""ltk.convert: what it replaces gives the same values and gradients, and it says what it leaves."""

from __future__ import annotations

import collections
import copy
import functools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from without_torchvision import import_timm

import ltkernels as ltk

C, N = 6, 40
COUNTS = torch.tensor([500, 200, 80, 30, 12, 4])
WEIGHT = torch.tensor([0.2, 0.5, 1.0, 1.0, 2.0, 5.0])


def answer(loss: Any, logits: Tensor, target: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    x = logits.clone().requires_grad_()
    value = loss(x, target, **more)
    upstream = torch.rand(value.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
    return value.detach(), torch.autograd.grad(value, x, upstream)[0]


def assert_same(loss: nn.Module, found: nn.Module, *targets: Tensor, **more: Any) -> None:
    assert type(found).__module__.startswith("ltkernels.losses")
    logits = 3 * torch.randn(N, C)
    for target in targets or (torch.randint(C, (N,)),):
        torch.testing.assert_close(
            answer(found, logits, target, **more), answer(loss, logits, target, **more), rtol=1e-5, atol=1e-6
        )


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


@pytest.mark.parametrize("shape", [(C,), (4, C, 3), (2, C, 3, 2), (2, C, 2, 2, 2), (0, C)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_with_any_dimensions_in_float64(shape: tuple[int, ...], reduction: str) -> None:
    """Labels and probabilities, some of the labels ignored, and all of them."""
    logits = 3 * torch.randn(shape, dtype=torch.float64)
    places = shape[:1] + shape[2:] if len(shape) > 1 else ()
    labels = torch.randint(C, places)
    ignored = torch.where(torch.rand(places) < 0.3, -1, labels)
    loss = nn.CrossEntropyLoss(WEIGHT.double(), ignore_index=-1, reduction=reduction, label_smoothing=0.1)
    found = converted(loss)
    for target in (labels, ignored, torch.full(places, -1), torch.rand(shape, dtype=torch.float64)):
        torch.testing.assert_close(
            answer(found, logits, target), answer(loss, logits, target), rtol=1e-10, atol=1e-12, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_under_autocast(dtype: torch.dtype) -> None:
    """There torch's loss of half logits is float32, too."""
    loss = nn.CrossEntropyLoss(WEIGHT)
    logits, labels = (3 * torch.randn(N, C)).to(dtype), torch.randint(C, (N,))
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(answer(converted(loss), logits, labels), answer(loss, logits, labels))


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
    assert reason(timm_loss("AsymmetricLossMultiLabel")).startswith("it cuts probabilities off at eps")
    assert reason(timm_loss("AsymmetricLossSingleLabel")) == "it has no exact counterpart"
    scheduled = timm_loss("LabelSmoothingCrossEntropy", 0.2)
    scheduled.smoothing = 0.1
    assert reason(scheduled) == "its confidence is 0.8, and not 1 - smoothing"


def test_a_loss_in_a_loss() -> None:
    """timm's JSD adds to its cross-entropy in place."""
    loss = timm_loss("JsdCrossEntropy")
    found, report = ltk.convert(loss)
    assert isinstance(found.cross_entropy_loss, ltk.losses.CrossEntropyLoss)
    assert [entry.name for entry in report.changed] == ["cross_entropy_loss"]
    assert [entry.result for entry in report.left] == [
        "it has no exact counterpart; the losses in it are looked at one by one"
    ]
    logits, labels = torch.randn(9, C), torch.randint(C, (9,))
    torch.testing.assert_close(answer(found, logits, labels), answer(loss, logits, labels))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"alpha": WEIGHT}, {"label_smoothing": 0.1}, {"gamma": 0.0, "alpha": WEIGHT}])
def test_imbalanced_losses(options: dict[str, Any], reduction: str) -> None:
    peer = pytest.importorskip("imbalanced_losses").SoftmaxFocalLoss
    loss = peer(reduction=reduction, ignore_index=2, **options)
    found = converted(loss)
    assert_same(loss, found, torch.randint(C, (N,)), torch.full((N,), 2))
    if "alpha" not in options or reduction != "mean":
        assert_same(loss, found, sample_weight=torch.rand(N))
    assert "mean_positive" in reason(peer(reduction="mean_positive"))
    assert "alpha and label_smoothing together" in reason(peer(WEIGHT, label_smoothing=0.1))
    assert "gathers the logits" in reason(peer(gather_distributed=True))


def test_imbalanced_losses_alpha_is_a_weight_now() -> None:
    """What differs is said: a key of the state_dict, and the mean of weighted samples."""
    loss = pytest.importorskip("imbalanced_losses").SoftmaxFocalLoss(WEIGHT)
    found, report = ltk.convert(loss)
    assert report.changed[0].result.endswith(
        "; with sample_weight, its mean divides by the rows and not their weights; without 'alpha' in its state_dict"
    )
    assert not found.state_dict() and loss.state_dict().keys() == {"alpha"}


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
    learnt = FocalLoss(1.0, None)
    learnt.gamma = nn.Parameter(torch.tensor(1.0))
    assert reason(learnt) == "it has parameters of its own: gamma"
    several = FocalLoss(1.0, None)
    several.gamma = torch.ones(C)
    assert "converted to Python scalars" in reason(several)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_published_code_is_tried_with_gradients(mode: Callable[[], Any]) -> None:
    with mode():
        converted(FocalLoss(1.0, None))


def test_published_code_is_tried_on_its_own_device_and_type() -> None:
    """Whatever is torch's default for new tensors."""
    with torch.device("meta"):
        converted(FocalLoss(1.0, None))
    torch.set_default_dtype(torch.float64)
    try:
        converted(FocalLoss(1.0, WEIGHT))
    finally:
        torch.set_default_dtype(torch.float32)
    converted(FocalLoss(1.0, WEIGHT.double()))


@pytest.mark.parametrize("counts_ignored", [False, True])
def test_published_code_that_ignores_labels(counts_ignored: bool) -> None:
    class FocalLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma, self.ignore_index = 2.0, 255

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            rows = F.cross_entropy(x, target, reduction="none", ignore_index=255)
            rows = (1 - (-rows).exp()) ** 2 * rows
            return rows.mean() if counts_ignored else rows.sum() / (target != 255).sum()

    if counts_ignored:
        assert "computes something else" in reason(FocalLoss())
    else:
        loss = FocalLoss()
        assert_same(loss, converted(loss), torch.where(torch.arange(N) % 3 == 0, 255, torch.randint(C, (N,))))


def test_published_code_has_the_same_state() -> None:
    """Without tables in the state_dict, a checkpoint has none; with them, the report says that they are missing."""
    loss = LDAMLoss(weight=WEIGHT)
    found = converted(loss)
    assert not found.state_dict() and not loss.state_dict()
    assert_same(loss, pickle.loads(pickle.dumps(found.to(torch.bfloat16))))
    del loss.m_list
    loss.register_buffer("m_list", ltk.rebalance.ldam_margin(COUNTS))
    report = ltk.convert(loss)[1]
    assert report.changed[0].result.endswith("; without 'm_list' in its state_dict")


def test_published_code_with_a_loss_in_it_is_replaced_whole() -> None:
    loss = FocalLoss(1.0, None)
    loss.ce = nn.CrossEntropyLoss(reduction="none")
    report = ltk.convert(nn.ModuleDict({"loss": loss}))[1]
    assert [entry.name for entry in report.changed] == ["loss"] and not report.left


def test_a_copy_shares_nothing() -> None:
    loss = nn.CrossEntropyLoss(WEIGHT.clone())
    found = converted(loss)
    loss.weight.zero_()
    assert torch.equal(found.weight, WEIGHT)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_what_is_left() -> None:
    class Own(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return 2 * super().forward(input, target)

    assert "subclass" in reason(Own())
    assert "log-probabilities" in reason(nn.NLLLoss())
    assert "sigmoid" in reason(nn.BCEWithLogitsLoss())
    assert reason(nn.MSELoss()) == "it has no exact counterpart"
    assert "weight: expected" in reason(nn.CrossEntropyLoss(-WEIGHT))
    with torch.device("meta"):
        assert "on the meta device" in reason(nn.CrossEntropyLoss(torch.ones(C)))
    assert "scripted" in reason(torch.jit.script(nn.CrossEntropyLoss()))


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_state_dict_pre_hook",
        "register_load_state_dict_post_hook",
    ],
)
def test_hooks_are_not_lost(register: str) -> None:
    loss = nn.CrossEntropyLoss()
    getattr(loss, register)(lambda *given: None)
    assert reason(loss) == "it has hooks, which would be lost"


def test_what_a_user_added_is_not_lost() -> None:
    patched, larger, clash, named = (nn.CrossEntropyLoss() for _ in range(4))
    patched.forward = lambda x, target: x.sum()
    assert reason(patched) == "its forward was replaced"
    larger.register_buffer("seen", torch.zeros(()))
    larger.head = nn.Linear(2, 2)
    assert reason(larger) == "it has parts of its own: seen, head"
    clash.scale = 3.0
    assert reason(clash) == "it has an attribute 'scale' of its own, which means something else here"
    named.title = "main"
    assert converted(named).title == "main"


def test_weight_stays_a_buffer_or_a_parameter() -> None:
    """torch makes a buffer of a parameter that it is given, which no optimizer sees."""
    given = nn.CrossEntropyLoss(nn.Parameter(WEIGHT.clone()))
    assert not list(converted(given).parameters())
    assert converted(given).state_dict().keys() == {"weight"}
    assigned = nn.CrossEntropyLoss()
    del assigned.weight
    assigned.weight = nn.Parameter(WEIGHT.clone())
    assert [name for name, _ in converted(assigned).named_parameters()] == ["weight"]
    transient = nn.CrossEntropyLoss()
    transient.register_buffer("weight", WEIGHT, persistent=False)
    assert not converted(transient).state_dict()
    assert_same(transient, converted(transient))


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
    assert [entry.name for entry in report.changed] == ["loss, same", "parts.0.0"]
    assert {entry.name for entry in report.left} == {"parts.1", "hidden[0]", "function"}
    assert found.state_dict().keys() == state.keys()
    found.load_state_dict(state)
    assert_same(before, found.loss)
    again, second = ltk.convert(found, inplace=True)
    assert again is found and not second.changed


class ModelWithLoss(nn.Module):
    """Called like a loss, and none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.loss = nn.Linear(3, C), nn.CrossEntropyLoss()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.linear(x), target)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_is_called_like_a_loss(inplace: bool) -> None:
    found, report = ltk.convert(ModelWithLoss(), inplace=inplace)
    assert isinstance(found.loss, ltk.losses.CrossEntropyLoss)
    assert [entry.name for entry in report.changed] == ["loss"]
    assert str(report).endswith(
        "the loss: ModelWithLoss() stays: it has no exact counterpart; the losses in it are looked at one by one"
    )


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled(inplace: bool) -> None:
    """A compiled model runs the loss that it has; a loss compiled by itself would go on to run the old one."""
    model = torch.compile(ModelWithLoss(), backend="eager")
    features = torch.randn(5, 3)
    model(features, torch.arange(5))  # compiled with torch's loss, which refuses labels of other types
    found, report = ltk.convert(model, inplace=inplace)
    assert [entry.name for entry in report.changed] == ["_orig_mod.loss"]
    labels = torch.arange(5)
    torch.testing.assert_close(found(features, labels.short()), found(features, labels))

    assert "it is compiled" in reason_of_child(torch.compile(nn.CrossEntropyLoss(), backend="eager"), "_orig_mod")
    loss = nn.CrossEntropyLoss()
    loss.compile(backend="eager")
    if inplace:  # a copy is not compiled
        assert "it is compiled" in reason_of_child(nn.ModuleDict({"loss": loss}), "loss")


def reason_of_child(module: nn.Module, name: str) -> str:
    (entry,) = ltk.convert(module, inplace=True)[1].left
    assert entry.name == name
    return entry.result


def test_losses_that_torch_does_not_see_are_named() -> None:
    @dataclass
    class Parts:
        loss: nn.Module

    model = nn.Module()
    model.known = nn.CrossEntropyLoss()
    loss = nn.CrossEntropyLoss()
    model.nested = [[loss], (1, loss)]
    model._private = collections.OrderedDict(a=nn.Sequential(nn.Identity(), loss))
    model.parts = Parts(loss)
    model.one_of = {loss}
    model.partial = functools.partial(F.cross_entropy, label_smoothing=0.1)
    model.__dict__["direct"] = loss
    model.old = [model.known]  # replaced where it is registered, and not here
    model.itself = [model]
    model.kinds = [nn.CrossEntropyLoss, Parts]
    model.nested.append(model.nested)
    found, report = ltk.convert(model)
    assert isinstance(found.known, ltk.losses.CrossEntropyLoss)
    assert [entry.name for entry in report.left] == [
        "nested[0][0]",
        "_private['a'].1",
        "parts.loss",
        "one_of",
        "partial.func",
        "direct",
        "old[0]",
    ]


def test_report_is_readable() -> None:
    report = ltk.convert(Model())[1]
    assert str(report) == (
        "changed 2, left 3\n"
        "  loss, same: CrossEntropyLoss(weight=(6,)) -> ltkernels.losses.CrossEntropyLoss(weight=(6,))\n"
        "  parts.0.0: CrossEntropyLoss() -> ltkernels.losses.CrossEntropyLoss()\n"
        "  parts.1: L1Loss() stays: it has no exact counterpart\n"
        "  hidden[0]: CrossEntropyLoss() stays: torch does not see it there; as an attribute or in nn.ModuleList it is"
        " part of the module\n"
        "  function: torch.nn.functional.cross_entropy stays: a function; ltkernels.functional has its twin"
    )
    assert repr(report) == str(report)  # what a prompt shows
    shown = FocalLoss(1.0, None)
    shown.alpha = np.ones(2)  # no yes or no, when compared
    assert "FocalLoss(alpha=ndarray, gamma=1.0) ->" in str(ltk.convert(shown)[1])
    assert "as a function is not seen" in str(ltk.convert(nn.Linear(2, 2))[1])
    assert str(ltk.convert(nn.CrossEntropyLoss())[1]).splitlines()[1].startswith("  the loss: CrossEntropyLoss() ->")


def test_wrong_calls() -> None:
    with pytest.raises(TypeError, match="module: expected a torch.nn.Module, found function"):
        ltk.convert(F.cross_entropy)
    with pytest.raises(TypeError, match="found the class CrossEntropyLoss"):
        ltk.convert(nn.CrossEntropyLoss)
    with pytest.raises(ValueError, match="inplace: expected False for a loss"):
        ltk.convert(nn.CrossEntropyLoss(), inplace=True)
    model = Model()
    model.cached = 2 * model.linear.weight
    with pytest.raises(ValueError, match=r"module: it can not be copied \(RuntimeError: Only Tensors created"):
        ltk.convert(model)
    assert ltk.convert(model, inplace=True)[0] is model

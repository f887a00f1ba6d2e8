"""linear_cross_entropy(sample=) and LinearCrossEntropyLoss with sampled classes: against gathering by hand, and as an
estimate of the loss of all classes.

120 classes, 100 of them in a sample: more than the 23 rows can have, also where a row has several labels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_cases import CALLS, ROWS, Call, evaluate, linear_cross_entropy, made, off
from loss_cases import COUNTS, EVERY
from loss_cases import C as MANY
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import ltkernels as ltk
from ltkernels import losses
from ltkernels.bench.device import Cpu
from ltkernels.functional import ClassSample, sample_classes

CLASSES, SAMPLED = 120, 100
Loss = losses.LinearCrossEntropyLoss
PROBS = torch.arange(1, CLASSES + 1).double()
TABLES = ("weight", "class_scale", "class_bias", "class_margin", "label_smoothing")


def _cases() -> Iterator[Any]:
    """Calls with labels, with either gradient and correction, but for what is refused."""
    for name in CALLS:
        call = made(name)
        if isinstance(call.target, Tensor) and call.target.is_floating_point():
            continue
        for sparse in (False, True)[: 1 if call.weight.dim() > 2 else 2]:
            for correction in (False, True)[: 1 if "row_gate" in call.arguments else 2]:
                words = f"{name}-{'sparse' if sparse else 'dense'}-{'corrected' if correction else 'as it is'}"
                yield pytest.param(name, sparse, correction, id=words)


def sample_of(call: Call, step: int = 0, probs: Tensor | None = None) -> ClassSample:
    ignored = call.arguments.get("ignore_index", -100)
    return sample_classes(call.target, CLASSES, SAMPLED, seed=0, step=step, class_probs=probs, ignore_index=ignored)


def by_hand(call: Call, sample: ClassSample, correction: bool, *variables: Tensor) -> Tensor:
    """The loss of a classifier that has the sample's classes alone."""
    given = dict(zip(call.names, variables, strict=True))
    arguments = {**call.arguments, **{name: value for name, value in given.items() if name in call.learnable}}
    at = {int(c): place for place, c in enumerate(sample.classes)}
    ignored = arguments.pop("ignore_index", -100)
    at[ignored] = -100

    def placed(labels: Tensor) -> Tensor:
        return torch.tensor([at[int(label)] for label in labels.flatten()], dtype=torch.int64).view(labels.shape)

    for name in TABLES:
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dim():
            arguments[name] = value[sample.classes]
    if correction:
        offset = sample.log_expected / arguments.get("scale", 1.0)
        arguments["class_bias"] = arguments.get("class_bias", torch.zeros(len(sample.classes))) - offset
    target = (*map(placed, call.target[:2]), call.target[2]) if isinstance(call.target, tuple) else placed(call.target)
    gathered = [value[sample.classes] if name in ("weight", "bias") else value for name, value in given.items()]
    small = copy.copy(call)
    small.target, small.arguments = target, arguments
    names = ("features", "weight", "bias") if "bias" in given else ("features", "weight")
    head = dict(zip(call.names, gathered, strict=True))
    return small.composed(*(head[name] for name in names), *(arguments[name] for name in call.learnable))


@pytest.mark.parametrize(("name", "sparse", "correction"), list(_cases()))
def test_every_option_against_gathering_by_hand(name: str, sparse: bool, correction: bool) -> None:
    """In float64, with all gradients, which are zero for classes that are not in the sample."""
    call = made(name, classes=CLASSES, bias=True)
    sample = sample_of(call, probs=PROBS)
    size = len(sample.classes)
    assert size == SAMPLED
    with ltk.use_backend("reference"):
        exact = evaluate(call, lambda *variables: by_hand(call, sample, correction, *variables))
    call.arguments |= {"sample": sample, "correction": correction, "sparse_grad": sparse}
    found = evaluate(call)
    for key, value in exact.items():
        is_sparse = sparse and key in ("weight", "bias")
        assert found[key].layout == (torch.sparse_coo if is_sparse else torch.strided)
        mine = found[key].to_dense()
        assert off(mine, value) <= 1e-11, key
        if key in ("weight", "bias"):
            absent = torch.ones(CLASSES, dtype=torch.bool)
            absent[sample.classes] = False
            assert not mine[absent].any()
            assert not is_sparse or found[key]._nnz() == size


@pytest.mark.parametrize("probs", [None, 1 / PROBS], ids=["uniform", "prior"])
def test_an_estimate_of_the_loss_of_all_classes(probs: Tensor | None) -> None:
    """Corrected, the sum in the loss's logarithm is on average that of all classes; as it is, it is less.

    12 of 120 classes, 3000 steps: within 4 standard errors.
    """
    torch.manual_seed(1)
    x, w, bias = torch.randn(3, 4).double(), torch.randn(CLASSES, 4).double(), torch.randn(CLASSES).double()
    y, scale = torch.tensor([3, 119, 20]), 1.7
    u = scale * (F.linear(x, w) + bias)
    table = None if probs is None else ltk.samplers.AliasTable(probs)
    sums: dict[bool, list[Tensor]] = {True: [], False: []}
    for step in range(3000):
        sample = sample_classes(y, CLASSES, 12, seed=1, step=step, class_probs=table)
        for correction, found in sums.items():
            loss = linear_cross_entropy(
                x, w, y, class_bias=bias, scale=scale, sample=sample, correction=correction, reduction="none"
            )
            found.append(torch.exp(loss + u[torch.arange(3), y]) / u.exp().sum(1))
    for correction, found in sums.items():
        ratio = torch.stack(found)
        distance = (ratio.mean(0) - 1) / (ratio.std(0) / math.sqrt(len(ratio)))
        assert bool((distance.abs() < 4).all()) if correction else bool((distance < -50).all())


def test_half_types() -> None:
    """Gradients in the parameters' types, no further from float64 than twice what gathering by hand is."""
    call = made("affine", classes=CLASSES, dtype=torch.bfloat16)
    call.arguments = {k: v.float() if isinstance(v, Tensor) else v for k, v in call.arguments.items()}
    sample = sample_of(call)
    exact_call = call.converted(lambda value: value.double() if value.is_floating_point() else value)
    exact = evaluate(exact_call, lambda *variables: by_hand(exact_call, sample, True, *variables))
    parts = evaluate(call, lambda *variables: by_hand(call, sample, True, *variables))
    call.arguments["sample"] = sample
    found = evaluate(call)
    for key, value in exact.items():
        assert found[key].dtype == parts[key].dtype
        assert off(found[key], value) <= 2 * off(parts[key], value) + 2 * torch.finfo(torch.bfloat16).eps, key


def test_autocast() -> None:
    x, w, y = torch.randn(ROWS, 8), torch.randn(CLASSES, 8, requires_grad=True), torch.randint(CLASSES, (ROWS,))
    sample = sample_classes(y, CLASSES, SAMPLED, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, w, y, sample=sample, sparse_grad=True)
    loss.backward()
    assert w.grad is not None and w.grad.dtype == torch.float32 and w.grad.is_sparse
    exact = linear_cross_entropy(x.double(), w.detach().double(), y, sample=sample)
    assert abs(float(loss.detach() - exact)) < 2**-7 * float(exact)


# --- Gradients of the sample's rows alone ---


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad], ids=lambda o: o.__name__)
def test_optimizers_take_the_sparse_gradient(make: Any) -> None:
    """Three steps with either gradient end at the same classifier."""
    x, y = torch.randn(ROWS, 5), torch.randint(CLASSES, (ROWS,))
    start, ends = torch.randn(CLASSES, 5), []
    for sparse in (False, True):
        w, b = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.zeros(CLASSES))
        optimizer = make([w, b], lr=0.1)
        for step in range(3):
            sample = sample_classes(y, CLASSES, SAMPLED, seed=0, step=step)
            optimizer.zero_grad()
            linear_cross_entropy(x, w, y, linear_bias=b, sample=sample, sparse_grad=sparse).backward()
            optimizer.step()
        ends.append((w.detach(), b.detach()))
    torch.testing.assert_close(*ends)


def test_sparse_adam() -> None:
    """Moves the rows of the sample, and no other."""
    x, y = torch.randn(ROWS, 5), torch.randint(CLASSES, (ROWS,))
    w = torch.nn.Parameter(torch.randn(CLASSES, 5))
    before = w.detach().clone()
    sample = sample_classes(y, CLASSES, SAMPLED, seed=0)
    linear_cross_entropy(x, w, y, sample=sample, sparse_grad=True).backward()
    torch.optim.SparseAdam([w], lr=0.1).step()
    moved = (w.detach() != before).any(1)
    assert moved.sum() == SAMPLED and bool(moved[sample.classes].all())


def test_memory_of_a_million_classes() -> None:
    """1000 of 1,000,000 classes: four times the sample's rows and logits, where the classifier is 256 MB."""
    classes, features, size, rows = 1_000_000, 64, 1000, 64
    x, w = torch.randn(rows, features), torch.zeros(classes, features, requires_grad=True)
    y = torch.randint(classes, (rows,))

    def step() -> Tensor:
        w.grad = None
        sample = sample_classes(y, classes, size, seed=0)
        linear_cross_entropy(x, w, y, sample=sample, sparse_grad=True).backward()
        assert w.grad is not None
        return w.grad

    step()
    assert Cpu().peak_bytes(step) <= 4 * 4 * size * (features + rows)


# --- Compiled ---


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_compiled(sparse: bool) -> None:
    """Sample and loss in one graph, which another step does not compile anew."""
    counter = CompileCounter()
    torch._dynamo.reset()
    w = torch.randn(CLASSES, 5, requires_grad=True)

    def loss(x: Tensor, w: Tensor, y: Tensor, step: Tensor) -> Tensor:
        sample = sample_classes(y, CLASSES, SAMPLED, seed=0, step=step)
        return linear_cross_entropy(x, w, y, sample=sample, sparse_grad=sparse, normalize=True, scale=8.0)

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for step in range(3):
        x, y, at = torch.randn(ROWS, 5), torch.randint(CLASSES, (ROWS,)), torch.tensor(step)
        found, expected = compiled(x, w, y, at), loss(x, w, y, at)
        torch.testing.assert_close(found, expected)
        mine, theirs = (torch.autograd.grad(value, w)[0] for value in (found, expected))
        assert mine.layout == theirs.layout
        torch.testing.assert_close(mine.to_dense(), theirs.to_dense())
    assert counter.frame_count == 1
    torch._dynamo.reset()


# --- The module ---


@pytest.mark.parametrize("name", EVERY)
def test_every_loss_of_class_tables(name: str) -> None:
    """In training that of step 0, 1, ...; in evaluation that of all classes."""
    criterion = EVERY[name](COUNTS)
    module = Loss(6, MANY, criterion=criterion, normalize=True, bias=True, sample_rate=0.5, seed=4, sparse_grad=True)
    whole = Loss(6, MANY, criterion=criterion, normalize=True, bias=True)
    whole.linear = module.linear
    x, y = torch.randn(31, 6), torch.randint(MANY, (31,))
    arguments = criterion._arguments()
    arguments.pop("inplace")
    for step in range(3):
        sample = sample_classes(y, MANY, MANY // 2, seed=4, step=step)
        expected = linear_cross_entropy(
            x, module.linear.weight, y, linear_bias=module.linear.bias, normalize=True, sample=sample, **arguments
        )
        torch.testing.assert_close(module(x, y), expected, rtol=0, atol=0)
    module.eval()
    torch.testing.assert_close(module(x, y), whole(x, y), rtol=0, atol=0)
    assert int(module.sample_step) == 3


def test_a_resumed_run_goes_on() -> None:
    """The counter is in the state; without sampling the state is as it was."""
    assert "sample_step" not in Loss(6, 50).state_dict()
    made_of = {"sampled_classes": 20, "class_probs": torch.arange(1.0, 51.0), "seed": 3}
    module = Loss(6, 50, **made_of)
    x, y = torch.randn(8, 6), torch.randint(50, (8,))
    for _ in range(5):
        module(x, y)
    state = copy.deepcopy(module.state_dict())
    assert int(state["sample_step"]) == 5
    expected = [module(x, y) for _ in range(3)]
    assert len({float(loss.detach()) for loss in expected}) == 3
    resumed = Loss(6, 50, **made_of)
    resumed.load_state_dict(state)
    copied = copy.deepcopy(resumed)
    for other in (resumed, copied):
        assert [float(other(x, y).detach()) for _ in range(3)] == [float(loss.detach()) for loss in expected]
    assert resumed.half().sample_step.dtype == torch.int64


def test_two_labels_and_ignored_rows() -> None:
    x, y, other = torch.randn(8, 6), torch.arange(8), torch.arange(8).flip(0)
    y[3] = 7
    module = Loss(6, 50, sampled_classes=20, ignore_index=7)
    loss = module(x, (y, other, 0.25))
    sample = sample_classes((y, other, 0.25), 50, 20, seed=0, ignore_index=7)
    expected = linear_cross_entropy(x, module.linear.weight, (y, other, 0.25), ignore_index=7, sample=sample)
    torch.testing.assert_close(loss, expected)
    assert bool(loss.isfinite())


def test_logits_of_several_dimensions() -> None:
    module = Loss(6, 50, out_features=(2, 3), bias=True, sample_rate=0.5, dtype=torch.float64)
    x, y = torch.randn(4, 6).double(), torch.randint(50, (4, 2, 3))
    loss = module(x, y)
    sample = sample_classes(y, 50, 25, seed=0)
    logits = module.logits(x)[:, sample.classes] - sample.log_expected[:, None, None]
    torch.testing.assert_close(loss, F.cross_entropy(logits, sample.places(y)))
    loss.backward()
    assert module.linear.weight.grad is not None and module.linear.weight.grad.layout == torch.strided


def test_it_learns() -> None:
    """400 classes by 40 a step: the loss of all classes falls to what training by all reaches, and half again."""
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(400, 32), dim=1)
    x, y = F.normalize(centres.repeat(2, 1) + 0.05 * torch.randn(800, 32), dim=1), torch.arange(400).repeat(2)
    ends = []
    for options in ({}, {"sampled_classes": 40, "sparse_grad": True}):
        torch.manual_seed(1)
        module = Loss(32, 400, criterion=losses.CosFaceLoss(margin=0.1, scale=16.0), normalize=True, **options)
        optimizer = torch.optim.Adagrad(module.parameters(), lr=0.1)
        for _ in range(200):
            rows = torch.randperm(800)[:16]
            optimizer.zero_grad()
            module(x[rows], y[rows]).backward()
            optimizer.step()
        module.eval()
        with torch.no_grad():
            ends.append(float(module(x, y)))
    assert ends[1] < 1.5 * ends[0]


def test_the_module_compiled() -> None:
    """In one graph that counts on: the losses of the module as it is."""
    torch._dynamo.reset()
    module = Loss(6, 50, sampled_classes=20, class_probs=torch.arange(1.0, 51.0))
    other = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x, y = torch.randn(8, 6), torch.randint(50, (8,))
        torch.testing.assert_close(compiled(x, y), other(x, y))
    assert int(module.sample_step) == 3
    torch._dynamo.reset()


# --- Wrong calls ---

X, W, Y = torch.zeros(3, 4), torch.zeros(10, 4), torch.tensor([1, 2, 3])
SAMPLE = sample_classes(Y, 10, 5, seed=0)
ABSENT = next(c for c in range(10) if c not in SAMPLE.classes)
ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "sample: expected a ClassSample, found Tensor", {"sample": SAMPLE.classes}),
    (TypeError, "correction: expected a bool, found int", {"correction": 1}),
    (TypeError, "sparse_grad: expected a bool, found str", {"sparse_grad": "yes"}),
    (ValueError, "sparse_grad: expected False without sample, found True", {"sample": None, "sparse_grad": True}),
    (ValueError, r"linear_weight: expected 10 classes as sample has, found shape \(9, 4\)", {"linear_weight": W[:9]}),
    (TypeError, "linear_weight: expected a torch.Tensor, found NoneType", {"linear_weight": None}),
    (ValueError, "sample: expected device meta as linear_weight's, found cpu", {"linear_weight": W.to("meta")}),
    (ValueError, "sparse_grad: expected False with .* more than two dimensions, found True with shape",
     {"linear_weight": W.view(10, 2, 2), "sparse_grad": True}),
    (ValueError, r"linear_bias: expected shape \(10,\), .* found \(5,\)", {"linear_bias": torch.zeros(5)}),
    (ValueError, r"weight: expected shape \(10,\), .* found \(5,\)", {"weight": torch.ones(5)}),
    (TypeError, "class_bias: expected a floating type, found torch.int64", {"class_bias": torch.ones(10).long()}),
    (ValueError, "class_margin: expected device cpu .* found meta", {"class_margin": torch.ones(10).to("meta")}),
    (ValueError, "scale: expected a finite number > 0, found 0.0", {"scale": 0.0}),
    (ValueError, "correction: expected False with row_gate", {"row_gate": torch.ones(3)}),
    (ValueError, f"target: .* classes in sample, found class {ABSENT} at row 0", {"target": Y * 0 + ABSENT}),
    (IndexError, r"target: expected labels in \[0, 10\) or ignore_index -100, found 10", {"target": Y * 10}),
    (ValueError, "sample: expected None with probability targets", {"target": torch.rand(3, 10)}),
    (ValueError, r"target: expected labels of shape \(3,\), found \(2,\)", {"target": Y[:2]}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "given"), ERRORS, ids=[f"{i}-{e[1][:24]}" for i, e in enumerate(ERRORS)])
def test_wrong_calls(error: type[Exception], message: str, given: dict[str, Any]) -> None:
    arguments = {"linear_weight": W, "target": Y, "sample": SAMPLE, **given}
    with pytest.raises(error, match=message):
        linear_cross_entropy(X, arguments.pop("linear_weight"), arguments.pop("target"), **arguments)


MODULE_ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "sampled_classes: .* or sample_rate, found both", {"sampled_classes": 3, "sample_rate": 0.5}),
    (ValueError, "sampled_classes: expected at most num_classes, 10, found 11", {"sampled_classes": 11}),
    (TypeError, "sampled_classes: expected an integer", {"sampled_classes": 2.5}),
    (ValueError, "sample_rate: expected a finite number > 0 and <= 1, found 2", {"sample_rate": 2.0}),
    (ValueError, "sparse_grad: expected none without .*, found True", {"sparse_grad": True}),
    (ValueError, "class_probs: expected none without", {"class_probs": torch.ones(10)}),
    (ValueError, "class_probs: expected 10 classes, found 9", {"sampled_classes": 3, "class_probs": torch.ones(9)}),
    (ValueError, "class_probs: .* more than 3", {"sampled_classes": 3, "class_probs": torch.arange(10) // 7}),
    (TypeError, "correction: expected a bool", {"sampled_classes": 3, "correction": "yes"}),
    (TypeError, "seed: expected an integer", {"sampled_classes": 3, "seed": None}),
    (ValueError, r"sparse_grad: expected False with out_features \(2,\)",
     {"sampled_classes": 3, "sparse_grad": True, "out_features": (2,)}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "given"), MODULE_ERRORS, ids=[f"{i}-{e[1][:24]}" for i, e in enumerate(MODULE_ERRORS)]
)
def test_wrong_modules(error: type[Exception], message: str, given: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        Loss(4, 10, **given)


def test_repr() -> None:
    text = repr(Loss(4, 10, sample_rate=0.3, correction=False, sparse_grad=True, seed=2))
    assert "sampled_classes=3, correction=False, sparse_grad=True, seed=2" in text
    assert "correction" not in repr(Loss(4, 10))

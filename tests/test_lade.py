"""functional.lade_cross_entropy: the formula, every form against the reference in float64, derivatives, wrong calls.

The truth of a call is the reference in float64 on the very numbers of the call; the reference itself is held against
the published formula, written out below sum by sum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from autograd_cases import through_dispatcher, through_func, through_reference
from cross_entropy_cases import (
    FLOATS,
    FORMS,
    INTEGERS,
    LAYOUTS,
    Form,
    each_checking_form,
    each_form,
    each_gpu_form,
    labels,
    relative_error,
    seed,
)
from torch import Tensor

import ltkernels as ltk
from ltkernels.ops import gpu
from ltkernels.ops import lade as op
from ltkernels.ops.options import LadeOptions
from ltkernels.reference.lade import offsets

lade_cross_entropy = ltk.functional.lade_cross_entropy
pytestmark = pytest.mark.filterwarnings("ignore:ltkernels. lade does not use the cpu backend")

TABLES = ("class_bias", "class_offset", "row_offset")


def is_interpreted(form: Form) -> bool:
    return form.backend == "triton" and form.device == "cpu"


def class_prior(classes: int) -> Tensor:
    """Long-tailed: a thousand times as many of the first class as of the last."""
    prior = torch.logspace(0, -3, classes, dtype=torch.float64)
    return prior / prior.sum()


def arguments(kind: str, classes: int) -> dict[str, Any]:
    prior = class_prior(classes)
    ratio = offsets(prior, "class")
    kinds: dict[str, dict[str, Any]] = {
        "class": {"class_bias": prior.log(), "class_offset": ratio},
        "sample": {"class_bias": prior.log(), "row_offset": ratio, "weight": 0.7, "remine_lambda": 0.3},
        "plain": {"weight": 1.0, "remine_lambda": 0.0},
        "regularizer": {"regularizer_only": True, "class_offset": ratio, "row_offset": -ratio},
        "cross-entropy": {"class_bias": prior.log(), "weight": 0.0},
    }
    return {"class_prior": prior} | kinds[kind]


KINDS = ("class", "sample", "plain", "regularizer", "cross-entropy")


def evaluate(logits: Tensor, target: Tensor, given: dict[str, Any], form: Form) -> tuple[Tensor, Tensor]:
    """Loss, and gradient for an upstream gradient that is not 1; the logits must stay as they were."""
    x, before = logits.detach().requires_grad_(), logits.clone()
    moved = {name: value.to(form.device) if isinstance(value, Tensor) else value for name, value in given.items()}
    with form.use():
        loss = lade_cross_entropy(x, target, **moved)
        gradient = torch.autograd.grad(loss, x, torch.full_like(loss, -1.3))[0]
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0)), "the logits were written to"
    return loss.detach(), gradient


def check(logits: Tensor, target: Tensor, given: dict[str, Any], form: Form, layout: str = "contiguous") -> None:
    """Against the reference in float64.

    A float32 exponent, a logit with an offset, is off by an ulp of it, and e^ of it by as much of itself. The loss is a
    difference of terms around 1. Half gradients may be off by 1.1 times what rounding the truth costs.
    """
    exact_loss, exact = evaluate(logits.double(), target, given, Form("reference"))
    x, y = LAYOUTS[layout](logits.to(form.device)), target.to(form.device)
    loss, gradient = evaluate(x, y, given, form)
    computed = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert (loss.dtype, gradient.dtype, loss.shape) == (computed, logits.dtype, ())
    largest = logits[torch.isfinite(logits)].double().abs().max().item()
    largest += max((given[name].abs().max().item() for name in TABLES if name in given), default=0.0)
    limit = 1e-12 if computed == torch.float64 else (1e-5 if form.backend == "reference" else 1e-6)
    limit = max(limit, (2.0**-52 if computed == torch.float64 else 2.0**-23) * largest)
    assert (error := relative_error(loss.cpu(), exact_loss, 1.0)) <= limit, f"loss: {error:.3g}, limit {limit:.3g}"
    rounding = relative_error(exact.to(logits.dtype), exact)
    least = given.get("weight", 0.1) / target.numel()  # what a label's own two terms are, which cancel for one row
    error = relative_error(gradient.cpu(), exact, least)
    assert error <= max(limit, 1.1 * rounding), f"gradient: {error:.3g}, limit {limit:.3g}, rounding {rounding:.3g}"


# --- The formula ---


def published(z: Tensor, y: Tensor, prior: Tensor, axis: str, weight: float, remine_lambda: float) -> float:
    """Hong et al. (2021), equations 8 to 10, a sum at a time in Python's floats."""
    rows, classes = z.shape
    pi, logits, label = prior.tolist(), z.tolist(), y.tolist()
    balanced = math.log(1 / classes + 1e-9)
    ratio = [balanced - math.log(share + 1e-9) for share in pi]
    loss = 0.0
    for i in range(rows):
        u = [logits[i][c] + math.log(pi[c]) for c in range(classes)]
        loss += (math.log(sum(math.exp(v) for v in u)) - u[label[i]]) / rows
    for c in range(classes):
        mine = [logits[i][c] for i in range(rows) if label[i] == c]
        joint = sum(mine) / (len(mine) + 1e-8)
        over = [ratio[c] if axis == "class" else ratio[label[i]] for i in range(rows)]
        marginal = math.log(sum(math.exp(logits[i][c] + over[i]) for i in range(rows))) - math.log(rows)
        loss -= weight * pi[c] * (joint - marginal - remine_lambda * marginal**2)
    return loss


@each_form
@pytest.mark.parametrize("axis", ("class", "sample"))
def test_the_published_formula(axis: str, form: Form) -> None:
    """Class 6 has no sample, class 0 most of them."""
    z, prior = torch.randn(11, 7, dtype=torch.float64) * 2, class_prior(7)
    y = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 5])
    given = {"class_bias": prior.log(), f"{'class' if axis == 'class' else 'row'}_offset": offsets(prior, axis)}
    given = {name: value.to(form.device) for name, value in given.items()}
    with form.use():
        loss = lade_cross_entropy(
            z.to(form.device), y.to(form.device), prior.to(form.device), weight=0.4, remine_lambda=0.2, **given
        )
    assert loss.item() == pytest.approx(published(z, y, prior, axis, 0.4, 0.2), rel=1e-12)


@each_form
def test_the_example_by_hand(form: Form) -> None:
    """One class: the cross-entropy is 0. The log-sum-exp of 1 and 3 over two rows is theirs without log 2."""
    z, y = torch.tensor([[1.0], [3.0]], device=form.device), torch.tensor([0, 0], device=form.device)
    with form.use():
        loss = lade_cross_entropy(z, y, torch.ones(1, device=form.device), weight=1.0, remine_lambda=0.5)
    bound = math.log((math.exp(1) + math.exp(3)) / 2)
    assert loss.item() == pytest.approx(-(2 - bound - 0.5 * bound**2), rel=1e-6)


# --- Every form against the reference in float64 ---


# Vectors of 4, 8 and 16 elements, with and without a rest; more rows than a split or a tile takes; rows on both sides
# of 1024 (a warp or a block for each on a GPU) and beyond what a tile holds.
SHAPES = ((1, 1), (1, 9), (9, 1), (33, 8), (70, 33), (200, 5), (17, 128), (5, 1003), (7, 1032), (3, 5001), (2, 5008))


@each_form
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, int], dtype: torch.dtype, form: Form) -> None:
    for number, kind in enumerate(KINDS):
        if is_interpreted(form) and shape[1] > 1000 and kind not in ("class", "sample"):
            continue
        seed(number)
        logits, target = (torch.randn(shape) * 2).to(dtype), labels(shape[:1], shape[1], ignored=-100)
        target[0] = shape[1] - 1
        check(logits, target, arguments(kind, shape[1]), form)


@each_form
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
@pytest.mark.parametrize("shape", [(6, 21), (6, 16), (2, 19, 37), (3, 8, 2, 4)], ids=str)
def test_layouts(shape: tuple[int, ...], layout: str, form: Form) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rows = (shape[0], *shape[2:])
        target = labels(rows, shape[1], ignored=-100)
        target.view(-1)[0] = 0
        check(torch.randn(shape).to(dtype), target, arguments("sample", shape[1]), form, layout)


@each_form
def test_rows_at_stride_0(form: Form) -> None:
    row, target = torch.randn(1, 24), labels((5,), 24)
    logits = row.expand(5, 24)
    check(logits, target, arguments("class", 24), form, "expanded")


@each_form
@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda dtype: str(dtype)[6:])
def test_label_types(dtype: torch.dtype, form: Form) -> None:
    """Class 3 is ignored: also an index that unsigned types have. Every second of a longer tensor of labels."""
    target = labels((24,), 10).to(dtype)
    check(torch.randn(12, 10), target[::2], arguments("class", 10) | {"ignore_index": 3}, form)


@each_form
def test_one_row_without_a_batch(form: Form) -> None:
    check(torch.randn(12), torch.tensor(3), arguments("sample", 12), form)


@each_form
def test_parameters_in_other_types(form: Form) -> None:
    """Tables of float64, float16 and with strides are those of the logits' computation."""
    given = arguments("class", 6)
    given["class_bias"] = given["class_bias"].float().repeat_interleave(2)[::2]
    given["class_offset"] = given["class_offset"].half()
    check(torch.randn(8, 6), labels((8,), 6), given, form)


# --- Limits ---


@each_form
@pytest.mark.parametrize("rows", (0, 3))
def test_no_row_takes_part(rows: int, form: Form) -> None:
    for kind in ("class", "cross-entropy"):
        x = torch.randn(rows, 4, device=form.device, requires_grad=True)
        given = {k: v.to(form.device) if isinstance(v, Tensor) else v for k, v in arguments(kind, 4).items()}
        with form.use():
            loss = lade_cross_entropy(x, torch.full((rows,), -100, device=form.device), **given)
            loss.backward()
        assert loss.isnan() and x.grad.shape == (rows, 4)
        assert form.backend == "reference" or (x.grad == 0).all()


@each_form
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_ignored_rows_hold_anything(value: float, form: Form) -> None:
    logits, target = torch.randn(7, 12), labels((7,), 12)
    target[2] = target[5] = -100
    expected = evaluate(logits[target >= 0].double(), target[target >= 0], arguments("sample", 12), Form("reference"))
    logits[2] = logits[5, 3] = value
    loss, gradient = evaluate(logits.to(form.device), target.to(form.device), arguments("sample", 12), form)
    assert relative_error(loss.cpu(), expected[0]) <= 1e-5
    assert (gradient[[2, 5]] == 0).all()
    assert relative_error(gradient[target >= 0].cpu(), expected[1]) <= 1e-5


@each_form
def test_masked_logits(form: Form) -> None:
    """-inf is no part of its row's sum nor of its column's; where a label has it, the loss is infinite."""
    logits, target = torch.randn(6, 11), torch.tensor([0, 1, 2, 3, 4, 0])
    logits[0, 5:] = -math.inf
    logits[3, 2] = logits[5, 1] = -math.inf
    check(logits, target, arguments("class", 11), form)
    logits[1, 1] = -math.inf
    loss, _ = evaluate(logits.to(form.device), target.to(form.device), arguments("class", 11), form)
    assert loss == math.inf


@each_form
def test_nan_in_nan_out(form: Form) -> None:
    """A NaN spoils its row, by the softmax, and its column, by the log-sum-exp; no other gradient."""
    for classes in (13, 16):
        logits, target = torch.randn(9, classes), torch.arange(9)
        logits[4, 7] = math.nan
        loss, gradient = evaluate(logits.to(form.device), target.to(form.device), arguments("class", classes), form)
        assert loss.isnan()
        spoilt = torch.zeros(9, classes, dtype=torch.bool)
        spoilt[4], spoilt[:, 7] = True, True
        assert torch.equal(gradient.isnan().cpu(), spoilt)


@each_form
def test_large_logits(form: Form) -> None:
    """e^1e4 is infinite, so maxima have to come out, of rows and of columns, whatever order rows come in."""
    for scale in (1e4, -1e4):
        logits = torch.linspace(-1, 1, 40 * 12).view(40, 12) * scale
        target = labels((40,), 12)
        exact = evaluate(logits.double(), target, arguments("class", 12), Form("reference"))
        loss, gradient = evaluate(logits.to(form.device), target.to(form.device), arguments("class", 12), form)
        assert relative_error(loss.cpu(), exact[0]) <= 1e-6
        assert relative_error(gradient.cpu(), exact[1]) <= 2.0**-23 * 1e4


@each_form
def test_the_same_bits_again(form: Form, threads: Callable[[int], AbstractContextManager[None]]) -> None:
    logits, target = torch.randn(150, 70), labels((150,), 70, ignored=-100)
    first = evaluate(logits.to(form.device), target.to(form.device), arguments("class", 70), form)
    for count in (1, 2, 3):
        with threads(count):
            again = evaluate(logits.to(form.device), target.to(form.device), arguments("class", 70), form)
        if form.backend != "reference":
            assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])
    if form.backend in ("cuda", "triton"):
        assert not gpu.tickets(torch.device(form.device), 1).any(), "tickets were not put back"


# --- Derivatives and compilers ---

ENTRIES = {
    "lean": lambda loss: loss,
    "func": through_func,
    "dispatcher": through_dispatcher,
    "reference": through_reference,
}


def small(kind: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    target = torch.tensor([0, 3, -100, 1])
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    return x, lambda logits: lade_cross_entropy(logits, target, **arguments(kind, 5))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, entry: str) -> None:
    x, loss = small(kind)
    assert torch.autograd.gradcheck(ENTRIES[entry](loss), x)
    assert torch.autograd.gradgradcheck(ENTRIES[entry](loss), x, fast_mode=True)


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_a_gradient_by_the_reference(name: str) -> None:
    x, _ = small("class")
    table = torch.randn(5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, -100, 1])

    def loss(table: Tensor, prior: Tensor) -> Tensor:
        return lade_cross_entropy(x, target, prior, **{name: table})

    assert torch.autograd.gradcheck(loss, (table, class_prior(5).requires_grad_()))


def test_torch_func() -> None:
    x, loss = small("sample")
    expected = torch.autograd.grad(loss(x), x)[0]
    assert torch.equal(torch.func.grad(loss)(x), expected)
    many = torch.stack([x, x + 1, x * 2]).detach()
    each = torch.stack([torch.func.grad(loss)(one) for one in many])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(many), each)


def operands(kind: str, dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor | None, ...], LadeOptions]:
    """A call as the op takes it."""
    given, compute = arguments(kind, 5), torch.float64 if dtype == torch.float64 else torch.float32
    tables = [given[name].to(compute) if name in given else None for name in ("class_prior", *TABLES)]
    x, y = torch.randn(4, 5).to(dtype).requires_grad_(), torch.tensor([0, 3, -100, 1])
    options = LadeOptions(
        remine_lambda=given.get("remine_lambda", 0.1),
        weight=given.get("weight", 0.1),
        with_ce=not given.get("regularizer_only", False),
    )
    return (x, y, *tables), options


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    tensors, options = operands(kind)
    torch.library.opcheck(op.OP.forward.default, (*tensors, *options))
    loss, state = op.OP.forward(*tensors, *options)
    held = tuple(None if t is None else t.detach() for t in tensors)
    torch.library.opcheck(op.OP.backward.default, (torch.ones_like(loss), state.detach(), *held, *options, True))


def test_compile_has_the_bits_of_eager() -> None:
    torch._dynamo.reset()
    x, target = torch.randn(6, 37, requires_grad=True), labels((6,), 37)

    def losses(x: Tensor) -> Tensor:
        return sum((lade_cross_entropy(x, target, **arguments(kind, 37)) for kind in KINDS), torch.zeros(()))

    eager = torch.autograd.grad(losses(x), x)[0]
    compiled = torch.autograd.grad(torch.compile(losses, backend="aot_eager", fullgraph=True)(x), x)[0]
    assert torch.equal(compiled, eager)


# --- Wrong calls ---

INF = math.inf
WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "probabilities": (
        TypeError, "target: expected labels of an integer type for this loss, found torch.float32",
        {"target": torch.rand(3, 4)},
    ),
    "shape": (ValueError, "target: expected labels of shape (3,)", {"target": torch.tensor([0, 1])}),
    "label": (IndexError, "target: expected labels in [0, 4) or ignore_index -100, found 4", {"target": [0, 4, 1]}),
    "negative label": (IndexError, "target: expected labels in [0, 4)", {"target": [0, -1, 1]}),
    "prior": (ValueError, "class_prior: expected shape (4,)", {"class_prior": torch.ones(3)}),
    "negative prior": (
        ValueError, "class_prior: expected finite values >= 0, found -1", {"class_prior": [1.0, 0.0, -1.0, 0.0]}
    ),
    "infinite prior": (ValueError, "class_prior: expected finite values >= 0", {"class_prior": [INF, 0.0, 1.0, 0.0]}),
    "absent class": (ValueError, "target: expected labels of classes with", {"class_bias": [-INF, 0.0, 0.0, 0.0]}),
    "bias": (ValueError, "class_bias: expected", {"class_bias": [math.nan, 0.0, 0.0, 0.0]}),
    "class offset": (ValueError, "class_offset: expected finite values", {"class_offset": [0.0, INF, 0.0, 0.0]}),
    "row offset": (ValueError, "row_offset: expected finite values", {"row_offset": [0.0, 0.0, -INF, 0.0]}),
    "offset type": (TypeError, "row_offset: expected", {"row_offset": torch.arange(4)}),
    "weight": (ValueError, "weight: expected", {"weight": -0.1}),
    "lambda": (ValueError, "remine_lambda: expected", {"remine_lambda": -1.0}),
    "lambda type": (TypeError, "remine_lambda: expected", {"remine_lambda": "0.1"}),
    "flag": (TypeError, "regularizer_only: expected a bool, found 1", {"regularizer_only": 1}),
    "index": (TypeError, "ignore_index: expected", {"ignore_index": 0.5}),
}  # fmt: skip


@each_checking_form
@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str, form: Form) -> None:
    exception, message, changes = WRONG[name]
    given: dict[str, Any] = {"target": torch.tensor([0, 1, 3]), "class_prior": class_prior(4)} | {
        name: torch.tensor(value) if isinstance(value, list) else value for name, value in changes.items()
    }
    x = torch.randn(3, 4, requires_grad=True)
    with form.use(), pytest.raises(exception, match=re.escape(message)):
        lade_cross_entropy(x, **given)


@each_gpu_form
@pytest.mark.parametrize("kind", ("class", "regularizer", "cross-entropy"))
def test_a_bad_label_is_nan_and_reported(kind: str, form: Form) -> None:
    """Its row's gradient is NaN too; with no class_bias of -inf, that label is all that can be wrong."""
    for bad in (9, -1):
        x = torch.randn(4, 9, device=form.device, requires_grad=True)
        given = {k: v.to(form.device) if isinstance(v, Tensor) else v for k, v in arguments(kind, 9).items()}
        with form.use():
            loss = lade_cross_entropy(x, torch.tensor([0, 1, bad, 3], device=form.device), **given)
            loss.backward()
        assert loss.isnan() and x.grad.isnan().all(1).tolist() == [False, False, True, False]
        if form.device != "cpu":
            torch.cuda.synchronize()
        with pytest.raises(IndexError, match=r"target: expected labels in \[0, C\)"):
            ltk.check()
        ltk.check()


@each_gpu_form
def test_the_state_of_another_backend_is_refused(form: Form) -> None:
    tensors, options = operands("sample")
    moved = tuple(None if t is None else t.detach().to(form.device) for t in tensors)
    state = op.new_state(moved, options).fill_(-1.0)
    implementation = next(row for row in op.OP.table.rows if row.backend == form.backend)
    (gradient,) = implementation.backward(torch.ones((), device=form.device), state, *moved, *options, True, False)
    used = moved[1] != -100
    assert gradient[used].isnan().all()
    if form.device != "cpu":
        torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="expected the state of a forward on the same backend"):
        ltk.check()


def test_backends_are_the_usual_ones() -> None:
    """Every form that cross_entropy has, this loss has: none is refused."""
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for form in FORMS:
        with form.use():
            assert lade_cross_entropy(x.to(form.device), y.to(form.device), class_prior(4).to(form.device)).isfinite()

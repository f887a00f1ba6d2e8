"""Derivatives of linear_cross_entropy and the ways into its ops: autograd once and twice, opcheck, torch.func, compile.

4 rows in chunks of 3, so that each derivative crosses a chunk; 5 classes, an odd number.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from autograd_cases import Subclass
from cross_entropy_cases import Form, each_form
from linear_cross_entropy_cases import (
    CALLS,
    NOT_THE_DERIVATIVE,
    Call,
    chunks_of,
    each_call,
    evaluate,
    linear_cross_entropy,
    made,
    on,
    upstream_of,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import ltkernels as ltk
from ltkernels.ops import linear_cross_entropy as op
from ltkernels.ops.chunked_linear import Classifier

ROWS, CLASSES = 4, 5
each_derivative = pytest.mark.parametrize("name", [name for name in CALLS if name not in NOT_THE_DERIVATIVE])
SOME = ("plain", "none", "cosines, all", "probabilities with all", "two labels with all", "arc", "gate", "inner")
each_of_some = pytest.mark.parametrize("name", SOME)


@pytest.fixture(autouse=True)
def _chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(3, monkeypatch)


def small(name: str, dtype: torch.dtype = torch.float64) -> Call:
    return made(name, ROWS, CLASSES, dtype)


def weighted(loss: Tensor) -> Tensor:
    """Row losses with weights of their own, so that no two rows may be exchanged."""
    return (loss * upstream_of(loss)).sum()


@each_form
@each_derivative
def test_gradcheck(name: str, form: Form) -> None:
    call = on(small(name), form)
    with form.use():
        assert torch.autograd.gradcheck(call.loss, call.variables, fast_mode=True)


@each_derivative
def test_gradgradcheck(name: str) -> None:
    call = small(name)
    assert torch.autograd.gradgradcheck(call.loss, call.variables, fast_mode=True)


@each_of_some
def test_a_second_derivative_is_that_of_the_parts(name: str) -> None:
    """In numbers, which differences in fast mode are not: a cubed gradient norm, differentiated."""
    call = small(name)

    def second(function: Any) -> tuple[Tensor, ...]:
        variables = call.variables
        grads = torch.autograd.grad(weighted(function(*variables)), variables, create_graph=True)
        return torch.autograd.grad(sum(grad.pow(3).sum() for grad in grads), variables)

    actual = second(call.loss)
    with ltk.use_backend("reference"):
        expected = second(call.composed)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        assert other.norm() > 0


@each_call
def test_every_way_in_gives_the_same_bits(name: str) -> None:
    """Kept from the forward, computed again, by the dispatcher's op, inside a transform."""
    call = small(name)
    plain = evaluate(call)
    again = call.variables
    loss = call.loss(*again)
    above = upstream_of(loss) if loss.dim() else torch.full_like(loss, 0.7)
    torch.autograd.grad(loss, again, torch.rand_like(loss), retain_graph=True)  # hands out what was kept
    second = torch.autograd.grad(loss, again, above)

    def dispatched(features: Tensor, *rest: Tensor) -> Tensor:
        return call.loss(features.as_subclass(Subclass), *rest).as_subclass(Tensor)

    ways = {
        "again": {"loss": loss.detach(), **dict(zip(call.names, second, strict=True))},
        "dispatcher": evaluate(call, dispatched),
        "func": evaluate(call, lambda *variables: torch.func.vjp(call.loss, *variables)[0]),
    }
    with torch.autograd.graph.saved_tensors_hooks(lambda value: value, lambda value: value):
        ways["hooks"] = evaluate(call)
    for way, found in ways.items():
        for key, value in plain.items():
            assert torch.equal(found[key], value), (way, key)


@each_of_some
def test_torch_func_grad_and_vmap(name: str) -> None:
    call = small(name)
    variables = call.variables
    expected = torch.autograd.grad(weighted(call.loss(*variables)), variables)
    values = tuple(variable.detach() for variable in variables)
    places = tuple(range(len(values)))
    actual = torch.func.grad(lambda *v: weighted(call.loss(*v)), places)(*values)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    batch = torch.stack([values[0], 2 * values[0]])
    many = torch.func.vmap(lambda x: torch.func.grad(lambda w: weighted(call.loss(x, w, *values[2:])))(values[1]))(
        batch
    )
    alone = torch.func.grad(lambda w: weighted(call.loss(batch[1], w, *values[2:])))(values[1])
    torch.testing.assert_close(many[1], alone, rtol=1e-12, atol=1e-14)


def test_a_batch_of_upstream_gradients() -> None:
    call = small("none")
    variables = call.variables
    loss = call.loss(*variables)
    jacobian = torch.autograd.grad(loss, variables, torch.eye(ROWS, dtype=loss.dtype), is_grads_batched=True)
    for row in range(ROWS):
        one = torch.autograd.grad(call.loss(*variables)[row], variables)
        for rows, alone in zip(jacobian, one, strict=True):
            torch.testing.assert_close(rows[row], alone)


# --- What is computed, and when ---


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, ...]]:
    """Which of features, classifier and bias each chunk's gradient was multiplied into."""
    calls: list[tuple[bool, ...]] = []
    original = Classifier.add

    def add(self: Classifier, *arguments: Any) -> None:
        calls.append(tuple(value is not None for value in (self.d_input, self.d_weight, self.d_bias)))
        original(self, *arguments)

    monkeypatch.setattr(Classifier, "add", add)
    return calls


def test_nothing_is_computed_that_is_not_needed(added: list[tuple[bool, ...]]) -> None:
    call = small("bias")
    x, w, b = call.variables[:3]
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (True, True, False)):
        added.clear()
        leaves = [v.detach().requires_grad_(need) for v, need in zip((x, w, b), wanted, strict=True)]
        call.composed(*leaves, *call.variables[3:]).backward()
        expected = [leaf.grad for leaf in leaves]
        leaves = [v.detach().requires_grad_(need) for v, need in zip((x, w, b), wanted, strict=True)]
        loss = linear_cross_entropy(*leaves[:2], call.target, linear_bias=leaves[2], **call.arguments)
        loss.backward()
        assert added == [wanted, wanted]  # two chunks
        for leaf, grad in zip(leaves, expected, strict=True):
            assert (leaf.grad is None) == (grad is None)
            if grad is not None:
                torch.testing.assert_close(leaf.grad, grad)
    added.clear()
    bias = call.arguments["class_bias"].clone().requires_grad_()
    linear_cross_entropy(x.detach(), w.detach(), call.target, class_bias=bias).backward()
    assert not added and bias.grad is not None


def test_the_forward_computes_gradients_only_where_a_backward_takes_them(added: list[tuple[bool, ...]]) -> None:
    call = small("plain")
    variables = call.variables
    with torch.no_grad():
        call.loss(*variables)
    assert not added
    loss = call.loss(*variables)
    assert len(added) == 2
    torch.autograd.grad(loss, variables, retain_graph=True)
    assert len(added) == 2
    torch.autograd.grad(loss, variables)
    assert len(added) == 4, "what was kept is handed out once"
    none = small("none")
    variables = none.variables
    loss = none.loss(*variables)
    assert len(added) == 4
    loss.sum().backward()
    assert len(added) == 6


def test_what_is_kept_lives_as_long_as_the_loss() -> None:
    call = small("plain")
    kept: list[weakref.ref[Any]] = []
    original = op._Gradients.__init__

    def init(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        kept.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op._Gradients, "__init__", init)
        loss = call.loss(*call.variables)
    assert kept[0]() is not None
    del loss
    assert kept[0]() is None


# --- The dispatcher's ops and graphs ---


def op_arguments(call: Call) -> tuple[Any, tuple[Any, ...]]:
    """The op and how it is called, by recording what functional passes."""
    recorded: list[tuple[Any, tuple[Any, ...]]] = []

    def record(of: Any, tensors: Any, options: Any, *_: Any) -> Tensor:
        recorded.append((of, (*tensors, *options)))
        return original(of, tensors, options)

    original = op.entries.call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op.entries, "call", record)
        call.loss(*call.variables)
    return recorded[0]


@each_call
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(name: str, backend: str) -> None:
    found, arguments = op_arguments(small(name))
    for grad in (True, False):
        mine = [value.detach().clone() if isinstance(value, Tensor) else value for value in arguments]
        for at in found.gradients:
            if grad and mine[at] is not None:
                mine[at].requires_grad_()
        with ltk.use_backend(backend):
            torch.library.opcheck(found.forward.default, tuple(mine))


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("part", range(4))
def test_every_call_compiles_to_one_graph_with_the_bits_of_eager(part: int) -> None:
    calls = [small(name, torch.float32) for name in list(CALLS)[part::4]]

    def losses(*variables: Tensor) -> list[Tensor]:
        rest = iter(variables)
        return [call.loss(*(next(rest) for _ in call.names)) for call in calls]

    variables = tuple(variable for call in calls for variable in call.variables)
    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)(*variables)
    eager = losses(*variables)
    above = [torch.full_like(value, 0.37) for value in eager]
    found, expected = torch.autograd.grad(compiled, variables, above), torch.autograd.grad(eager, variables, above)
    for mine, other in zip((*compiled, *found), (*eager, *expected), strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("arguments", [{}, {"normalize": True, "reduction": "none"}, {"smoothing_mode": "off_target"}])
def test_no_recompilation_when_the_number_of_rows_changes(arguments: dict[str, Any]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    w, b = torch.randn(CLASSES, 3, requires_grad=True), torch.randn(CLASSES, requires_grad=True)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, y, linear_bias=b, label_smoothing=0.1, **arguments)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for rows in (4, 9, 2, 33):
        x, y = torch.randn(rows, 3, requires_grad=True), torch.randint(CLASSES, (rows,))
        found, expected = compiled(x, y), step(x, y)
        assert torch.equal(found, expected)
        grads = [torch.autograd.grad(value.sum(), (x, w, b)) for value in (found, expected)]
        assert all(torch.equal(mine, other) for mine, other in zip(*grads, strict=True))
        counts.append(counter.frame_count)
    assert counts[-1] == counts[0]


@pytest.mark.usefixtures("_fresh_compiler")
def test_code_generation_and_autocast_in_a_graph() -> None:
    """Inductor, with a layer before the op and arithmetic behind it."""
    layer = torch.nn.Linear(8, 8)
    weight, labels, inputs = torch.randn(37, 8, requires_grad=True), torch.randint(37, (6,)), torch.randn(6, 8)
    variables = (*layer.parameters(), weight)

    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            features = torch.tanh(layer(x))
            return linear_cross_entropy(features, weight, y, normalize=True, scale=8.0) * 2

    found, expected = torch.compile(step, fullgraph=True)(inputs, labels), step(inputs, labels)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    for mine, other in zip(
        torch.autograd.grad(found, variables), torch.autograd.grad(expected, variables), strict=True
    ):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other, rtol=5e-2, atol=5e-3)

"""Derivatives of the losses whose adjustments depend on the row, and the ways into their op: autograd once and twice,
opcheck, torch.func, torch.compile.

3 rows and 5 classes: 5 is odd, so that every instruction set runs its tail.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from cross_entropy_cases import FORMS, Form, each_form, seed
from row_cross_entropy_cases import CALLS, NOT_THE_DERIVATIVE, Call
from torch import Tensor

import ltkernels as ltk
from ltkernels.ops import row_cross_entropy as op
from ltkernels.ops.options import RowCrossEntropyOptions

each_call = pytest.mark.parametrize("name", CALLS)
each_derivative = pytest.mark.parametrize("name", [name for name in CALLS if name not in NOT_THE_DERIVATIVE])


def made(name: str, rows: int = 3, classes: int = 5, dtype: torch.dtype = torch.float64) -> Call:
    seed(len(name))
    call = CALLS[name](rows, classes, dtype)
    for label in call.labels:  # the first row has a label: a mean over nothing has no derivative
        if isinstance(label, Tensor) and not label.is_floating_point():
            label[0] = 0
    return call


def scalar(call: Call, *variables: Tensor) -> Tensor:
    """Row losses with weights of their own, so that no two rows may be exchanged."""
    loss = call.loss(*variables)
    return (loss * torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view_as(loss)).sum()


@each_form
@each_derivative
def test_gradcheck(name: str, form: Form) -> None:
    call = made(name).converted(lambda v: v.to(form.device))
    with form.use():
        assert torch.autograd.gradcheck(call.loss, call.variables)


@each_derivative
def test_gradgradcheck(name: str) -> None:
    call = made(name)
    assert torch.autograd.gradgradcheck(call.loss, call.variables)


@pytest.mark.parametrize("name", NOT_THE_DERIVATIVE)
def test_a_constant_is_one_in_the_second_derivative_too(name: str) -> None:
    """What carries no gradient: the second derivative is that of the reference."""
    call = made(name)

    def second() -> tuple[Tensor, ...]:
        variables = call.variables
        grads = torch.autograd.grad(call.loss(*variables), variables, create_graph=True)
        return torch.autograd.grad(sum(grad.pow(3).sum() for grad in grads), variables)

    actual = second()
    with ltk.use_backend("reference"):
        expected = second()
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
        assert other.norm() > 0


@each_call
def test_torch_func(name: str) -> None:
    call = made(name)
    variables = call.variables
    expected = torch.autograd.grad(scalar(call, *variables), variables)
    values = tuple(variable.detach() for variable in variables)
    actual = torch.func.grad(lambda *v: scalar(call, *v), tuple(range(len(values))))(*values)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def op_arguments(call: Call) -> tuple[Any, ...]:
    """The call as the op takes it, by recording what functional passes."""
    recorded: list[tuple[Any, ...]] = []
    original = op.row_cross_entropy

    def record(tensors: tuple[Tensor | None, ...], options: RowCrossEntropyOptions, inplace: bool) -> Tensor:
        recorded.append((*tensors, *options))
        return original(tensors, options, inplace)

    op.row_cross_entropy = record
    try:
        call.loss(*call.variables)
    finally:
        op.row_cross_entropy = original
    return recorded[0]


@each_call
def test_opcheck(name: str) -> None:
    for grad in (True, False):
        arguments = op_arguments(made(name))
        arguments = tuple(v.detach().clone() if isinstance(v, Tensor) else v for v in arguments)
        for at in (op.INPUT, op.CLASS_SCALE, op.CLASS_BIAS, op.ROW_GATE):
            if grad and arguments[at] is not None:
                arguments[at].requires_grad_()
        torch.library.opcheck(torch.ops.ltkernels.row_cross_entropy.default, arguments)


@pytest.fixture(autouse=True, scope="module")
def _fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@each_call
def test_compiled_without_a_break(name: str) -> None:
    call = made(name, 4, 7, torch.float32)

    def step(*variables: Tensor) -> tuple[Tensor, ...]:
        return call.loss(*variables)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()
    results = []
    for function in (compiled, step):
        variables = call.variables
        loss = function(*variables)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), variables)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "form", [form for form in FORMS if form.device == "cpu" and form.backend != "reference"], ids=str
)
@each_call
def test_any_number_of_threads_gives_the_same_bits(
    name: str, form: Form, threads: Callable[[int], AbstractContextManager[None]]
) -> None:
    call = made(name, 300, 70, torch.float32)
    results = []
    for number in (1, 2, 3):
        with threads(number), form.use():
            variables = call.variables
            loss = call.loss(*variables)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), variables)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ("two labels", "gate", "seesaw, weighted and scaled"))
def test_inplace_where_it_is_offered(name: str) -> None:
    """The gradient over the logits' memory: the same numbers."""
    if name.startswith("seesaw"):
        with pytest.raises(TypeError, match="inplace"):
            made(name).function(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.ones(2), inplace=True)
        return
    call = made(name, 6, 9, torch.float32)
    variables = call.variables
    expected = torch.autograd.grad(call.loss(*variables), variables)
    call.arguments["inplace"] = True
    leaf, *rest = call.variables
    actual = torch.autograd.grad(call.loss(leaf * 1.0, *rest), (leaf, *rest))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)

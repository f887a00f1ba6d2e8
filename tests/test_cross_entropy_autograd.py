"""Derivatives of cross_entropy: every way into the op against finite differences, and against each other bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from autograd_cases import (
    CALLS,
    DETACHED,
    ENTRIES,
    LEARNABLE,
    Call,
    Loss,
    cross_entropy,
    op_arguments,
    problem,
    through_dispatcher,
    through_func,
)
from torch import Tensor
from torch.autograd import forward_ad

import ltkernels as ltk

# Said once a process where the reference serves a call on the CPU: test_backends.py.
pytestmark = pytest.mark.filterwarnings("ignore:ltkernels. cross_entropy does not use the cpu backend")

each_call = pytest.mark.parametrize("name", CALLS)
each_entry = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())

# --- Finite differences ---


@each_entry
@each_call
def test_gradcheck(name: str, entry: Callable[[Loss], Loss]) -> None:
    p = problem(CALLS[name])
    assert torch.autograd.gradcheck(entry(p.loss), p.variables)


@each_entry
@each_call
def test_gradgradcheck(name: str, entry: Callable[[Loss], Loss]) -> None:
    """Fast mode compares random projections of the second derivative instead of each of its columns."""
    p = problem(CALLS[name])
    assert torch.autograd.gradgradcheck(entry(p.loss), p.variables, fast_mode=True)


@pytest.mark.parametrize("name", ("plain", "affine", "probabilities with all"))
def test_gradgradcheck_of_every_column(name: str) -> None:
    p = problem(CALLS[name], rows=2, classes=3)
    assert torch.autograd.gradgradcheck(p.loss, p.variables)


@pytest.mark.parametrize("name", ("plain", "all"))
def test_third_derivative(name: str) -> None:
    p = problem(CALLS[name], rows=2, classes=3)

    def penalty(*variables: Tensor) -> Tensor:
        grads = torch.autograd.grad(p.loss(*variables), variables, create_graph=True)
        return sum((grad.square().sum() for grad in grads), torch.zeros(()))

    assert torch.autograd.gradgradcheck(penalty, p.variables, fast_mode=True)


@pytest.mark.parametrize("order", (1, 2))
@each_entry
@pytest.mark.parametrize("name", DETACHED)
def test_a_detached_focal_factor_is_a_constant_in_every_derivative(
    name: str, entry: Callable[[Loss], Loss], order: int
) -> None:
    """The same call with the factor as a given number: sample_weight."""
    p = problem(DETACHED[name])
    plain = {k: v for k, v in p.arguments.items() if not k.startswith("focal")}
    with torch.no_grad():
        nll = cross_entropy(p.logits, p.target, **plain, reduction="none")
        factor = -torch.expm1(-nll)
        factor = factor.pow(p.arguments["focal_gamma"])

    def by_weight(logits: Tensor, *bias: Tensor) -> Tensor:
        arguments = {**plain, **({"class_bias": bias[0]} if bias else {})}
        return cross_entropy(logits, p.target, **arguments, sample_weight=factor, denominator="count")

    def derivative(loss: Loss) -> tuple[Tensor, ...]:
        variables = p.variables
        grads = torch.autograd.grad(loss(*variables), variables, create_graph=order == 2)
        if order == 1:
            return grads
        direction = [torch.linspace(-1, 1, grad.numel(), dtype=grad.dtype).view_as(grad) for grad in grads]
        return torch.autograd.grad(grads, variables, direction)

    for actual, expected in zip(derivative(entry(p.loss)), derivative(by_weight), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


# --- torch.func, batches of gradients, forward mode ---


@each_call
def test_func_transforms_agree_with_autograd(name: str) -> None:
    p = problem(CALLS[name])
    argnums = tuple(range(1 + len(p.learnable)))

    def scalar(*variables: Tensor) -> Tensor:
        loss = p.loss(*variables)
        return (loss * torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view_as(loss)).sum()

    def penalty(*variables: Tensor) -> Tensor:
        return sum((grad.square().sum() for grad in torch.func.grad(scalar, argnums)(*variables)), torch.zeros(()))

    values = tuple(variable.detach() for variable in p.variables)
    variables = p.variables
    expected = torch.autograd.grad(scalar(*variables), variables, create_graph=True)
    for actual, wanted in zip(torch.func.grad(scalar, argnums)(*values), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in expected), variables)
    for actual, wanted in zip(torch.func.grad(penalty, argnums)(*values), second, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ("none", "inner none", "plain", "probabilities with all"))
def test_jacobians(name: str) -> None:
    """By reverse mode, which batches the backward; by forward mode; by autograd's own batches; row by row."""
    p = problem(CALLS[name])

    def loss(logits: Tensor) -> Tensor:
        return p.loss(logits)

    rows = torch.autograd.functional.jacobian(loss, p.logits)
    for jacobian in (
        torch.func.jacrev(loss)(p.logits),
        torch.func.jacfwd(loss)(p.logits),
        torch.autograd.functional.jacobian(loss, p.logits, vectorize=True),
        torch.autograd.functional.jacobian(loss, p.logits, vectorize=True, strategy="forward-mode"),
    ):
        torch.testing.assert_close(jacobian, rows, rtol=1e-12, atol=1e-14)


def test_hessian() -> None:
    p = problem(CALLS["affine"])
    variables = tuple(variable.detach() for variable in p.variables)
    expected = torch.autograd.functional.hessian(p.loss, variables)
    actual = torch.func.hessian(p.loss, tuple(range(len(variables))))(*variables)
    for row, wanted_row in zip(actual, expected, strict=True):
        for block, wanted in zip(row, wanted_row, strict=True):
            torch.testing.assert_close(block, wanted, rtol=1e-10, atol=1e-12)


def test_gradient_a_sample_by_vmap() -> None:
    """As differential privacy and influence functions take it: over rows, and over rows of one row's parameters."""
    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    bias = torch.randn(5)

    def loss(row: Tensor, label: Tensor, b: Tensor) -> Tensor:
        return cross_entropy(row, label, class_bias=b, label_smoothing=0.1)

    one = torch.func.vmap(torch.func.grad(loss, (0, 2)), in_dims=(0, 0, None))(logits, labels, bias)
    variables = logits.clone().requires_grad_(), bias.clone().requires_grad_()
    rows = cross_entropy(variables[0], labels, class_bias=variables[1], label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(one[0], torch.autograd.grad(rows.sum(), variables[0], retain_graph=True)[0])
    each = [torch.autograd.grad(row, variables[1], retain_graph=True)[0] for row in rows]
    torch.testing.assert_close(one[1], torch.stack(each))
    torch.testing.assert_close(torch.func.vmap(loss, (0, 0, None))(logits, labels, bias), rows.detach())
    columns = torch.func.vmap(lambda row: loss(row, torch.tensor(2), bias), in_dims=1)(logits.t())
    torch.testing.assert_close(columns, cross_entropy(logits, torch.full((6,), 2), class_bias=bias,
                                                      label_smoothing=0.1, reduction="none"))  # fmt: skip


def test_batches_of_upstream_gradients() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    for reduction in ("mean", "none"):
        loss = cross_entropy(logits, torch.tensor([0, 1, 2, 4]), reduction=reduction)
        upstream = torch.randn(3, *loss.shape)
        (batch,) = torch.autograd.grad(loss, logits, upstream, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(loss, logits, one, retain_graph=True)[0] for one in upstream]
        assert torch.equal(batch, torch.stack(each))


@pytest.mark.parametrize("requires_grad", (False, True))
@each_call
def test_forward_mode_is_right_and_never_zero(name: str, requires_grad: bool) -> None:
    p = problem(CALLS[name])
    tangent = torch.randn_like(p.logits)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(p.logits.clone().requires_grad_(requires_grad), tangent)
        actual = forward_ad.unpack_dual(p.loss(dual)).tangent
    expected = torch.autograd.functional.jvp(p.loss, p.variables, (tangent, *map(torch.zeros_like, p.variables[1:])))[1]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


# --- The same bits whatever the way ---

UPSTREAMS = (1.0, 0.37, -2.0, 65536.0, 0.0)


def _flushed(x: Tensor) -> Tensor:
    """Kernels flush what is below the smallest normal number; a multiplication after them, by PyTorch, does not."""
    return x.where(x.abs() >= torch.finfo(x.dtype).smallest_normal, 0.0)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", CALLS | DETACHED)
def test_gradients_have_the_same_bits_whatever_the_way(name: str, dtype: torch.dtype) -> None:
    """37 classes: full vectors and a tail for every instruction set.

    Logits up to 60 reach probabilities that underflow.
    """
    p = problem((CALLS | DETACHED)[name], rows=6, classes=37, dtype=dtype)
    p = p._replace(logits=p.logits * 6)
    for factor in UPSTREAMS:
        _check_bits(p.loss, p.variables, factor)


def _check_bits(loss: Loss, variables: tuple[Tensor, ...], factor: float) -> None:
    def gradients(value: Tensor, leaves: tuple[Tensor, ...], **how: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, leaves, torch.full_like(value, factor), **how)

    lean = loss(*variables)
    found = {"lean": gradients(lean, variables, retain_graph=True)}
    found["lean, second backward"] = gradients(lean, variables, retain_graph=True)
    found["lean, create_graph"] = gradients(lean, variables, create_graph=True)
    found["setup_context"] = gradients(through_func(loss)(*variables), variables)
    value, pull = torch.func.vjp(loss, *(variable.detach() for variable in variables))
    found["torch.func"] = pull(torch.full_like(value, factor))
    found["dispatcher"] = gradients(through_dispatcher(loss)(*variables), variables)
    logits, *learnable = variables
    inplace = loss(logits * 1, *learnable, inplace=True)
    found["in place"] = gradients(inplace, variables)
    for way, grads in found.items():
        for mine, other in zip(grads, found["lean"], strict=False):
            assert torch.equal(_flushed(mine.detach()), _flushed(other)), f"{way} and lean differ at upstream {factor}"
    # Without gradients of class_scale and class_bias the kernel takes another order, with other last bits.
    (alone,) = gradients(loss(logits, *(v.detach() for v in learnable)), (logits,))
    torch.testing.assert_close(
        alone, found["lean"][0], rtol=1e-2 if logits.dtype == torch.bfloat16 else 1e-3, atol=1e-6
    )
    assert factor == 0 or all(grad.abs().sum() > 0 for grad in found["lean"])


# --- The op as the dispatcher sees it ---


@pytest.mark.parametrize("requires_grad", ("nothing", "logits", "all"))
@pytest.mark.parametrize("layout", ("contiguous", "class_strided"))
@pytest.mark.parametrize("name", ("plain", "none", "inner", "probabilities", "probabilities with all", "all"))
def test_opcheck(name: str, layout: str, requires_grad: str) -> None:
    """Absent and present optional arguments, labels and probabilities, 2-D and 3-D, dense and strided."""
    p = problem(CALLS[name])
    logits = p.logits if layout == "contiguous" else p.logits.transpose(0, 1).contiguous().transpose(0, 1)
    arguments = list(op_arguments(p, logits))
    if requires_grad != "nothing":
        arguments[0] = arguments[0].clone().requires_grad_()
    if requires_grad == "all":
        for place in (3, 4):
            if arguments[place] is not None:
                arguments[place] = arguments[place].clone().requires_grad_()
    torch.library.opcheck(torch.ops.ltkernels.cross_entropy.default, tuple(arguments))


@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("layout", ("contiguous", "class_strided"))
@pytest.mark.parametrize("name", ("plain", "none", "inner", "probabilities with all", "all"))
def test_opcheck_backward(name: str, layout: str, requires_grad: bool) -> None:
    p = problem(CALLS[name])
    logits = p.logits if layout == "contiguous" else p.logits.transpose(0, 1).contiguous().transpose(0, 1)
    arguments = op_arguments(p, logits)
    loss, state = torch.ops.ltkernels.cross_entropy(*arguments)
    upstream = torch.rand_like(loss).requires_grad_(requires_grad)
    first = (arguments[0].clone().requires_grad_(requires_grad), *arguments[1:])
    need = (True, arguments[3] is not None, arguments[4] is not None)
    torch.library.opcheck(torch.ops.ltkernels.cross_entropy_backward.default, (upstream, state, *first, *need))


@pytest.mark.parametrize("place", (1, 2, 5, 6), ids=("target", "weight", "class_margin", "sample_weight"))
def test_the_op_refuses_gradients_that_it_does_not_have(place: int) -> None:
    arguments = list(op_arguments(problem(CALLS["probabilities" if place == 1 else "all"])))
    arguments[0] = arguments[0].clone().requires_grad_()
    arguments[place] = arguments[place].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient for"):
        torch.ops.ltkernels.cross_entropy(*arguments)[0].backward()


# --- What only the reference differentiates ---


def _softmax_loss(logits: Tensor, target: Tensor, **given: Tensor) -> Tensor:
    """weight, class_margin, sample_weight and probabilities in PyTorch's words."""
    if "class_margin" in given:
        logits = logits - given["class_margin"] * torch.nn.functional.one_hot(target, logits.shape[1])
    r = given.get("sample_weight", torch.ones(len(logits), dtype=logits.dtype))
    w = given.get("weight", torch.ones_like(logits[0]))
    if target.is_floating_point():
        return -(r[:, None] * w * target * logits.log_softmax(1)).sum() / r.sum()
    rows = -logits.log_softmax(1).gather(1, target[:, None])[:, 0] * w[target]
    return (rows * r).sum() / (r * w[target]).sum()


@pytest.mark.parametrize("frozen_logits", (False, True))
@pytest.mark.parametrize("learnt", ("weight", "class_margin", "sample_weight", "target"))
def test_learnt_parameters_that_the_kernels_have_no_gradient_for(learnt: str, frozen_logits: bool) -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=not frozen_logits)
    target = torch.tensor([0, 2, 2, 4])
    given = {
        "weight": torch.rand(5, dtype=torch.float64) + 0.5,
        "sample_weight": torch.rand(4, dtype=torch.float64) + 0.5,
        "class_margin": torch.rand(5, dtype=torch.float64),
    }
    if learnt == "target":
        del given["class_margin"]
        target = torch.softmax(torch.randn(4, 5, dtype=torch.float64), 1)
    leaf = (target if learnt == "target" else given[learnt]).requires_grad_()
    wanted = [leaf] if frozen_logits else [leaf, logits]
    actual = torch.autograd.grad(cross_entropy(logits, target, **given), wanted)
    expected = torch.autograd.grad(_softmax_loss(logits, target, **given), wanted)
    for mine, theirs in zip(actual, expected, strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(mine, theirs)
    assert "reference  serves this call" in ltk.explain(cross_entropy, logits, target, **given)
    with ltk.use_backend("cpu"), pytest.raises(RuntimeError, match="requires a gradient, which only the reference"):
        cross_entropy(logits, target, **given)
    with torch.no_grad(), ltk.use_backend("cpu"):  # nothing to differentiate: the kernels serve it
        torch.testing.assert_close(cross_entropy(logits, target, **given), _softmax_loss(logits, target, **given))


@pytest.mark.parametrize("name", LEARNABLE)
def test_frozen_logits_with_a_learnable_adjustment(name: str) -> None:
    logits, target = torch.randn(64, 7, dtype=torch.float64), torch.randint(7, (64,))
    adjustment = torch.rand(7, dtype=torch.float64, requires_grad=True)
    loss = cross_entropy(logits, target, **{name: adjustment}, scale=2.0)
    adjusted = 2.0 * (logits * adjustment if name == "class_scale" else logits + adjustment)
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(adjusted, target), adjustment)
    (actual,) = torch.autograd.grad(loss, adjustment)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert logits.grad is None


def test_call_names_are_complete() -> None:
    """A new argument of cross_entropy that may be differentiated through belongs into CALLS."""
    import inspect

    used = {key for call in (CALLS | DETACHED).values() for key in call.arguments}
    parameters = set(inspect.signature(cross_entropy).parameters)
    not_about_derivatives = {"input", "target", "margin_type", "smoothing_mode", "empty", "inplace"}
    # These go to another op: tests/test_row_cross_entropy_autograd.py.
    of_rows = {"row_gate", "feature_norm", "influence_alpha", "influence_eps"}
    assert used == parameters - not_about_derivatives - of_rows
    assert any(call.probabilities for call in CALLS.values()) and isinstance(CALLS["plain"], Call)

"""Transforms inside transforms: an outer one may follow a tensor that the inner one holds fixed.

At the inner level such a tensor does not require a gradient, so an entry that looks no further than its own level picks
the kernels and tells the outer level nothing: a zero gradient and no error. Hence every ordered pair of arguments that
can learn. The truth is the reference backend under PyTorch's own autograd, without torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from cross_entropy_cases import cross_entropy, relative_error
from torch import Tensor

import ltkernels as ltk

# Said once a process where the reference serves a call on the CPU: test_backends.py.
pytestmark = pytest.mark.filterwarnings("ignore:ltkernels. cross_entropy does not use the cpu backend")

NAMES = ("input", "class_scale", "class_bias", "sample_weight", "weight", "class_margin")
LIMITS = {torch.float64: 1e-11, torch.float32: 2e-5}  # relative, of derivatives that the reference computes in dtype
Values = dict[str, Tensor]
Derive = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


@cache
def _values(dtype: torch.dtype, rows: int = 3) -> Values:
    """Logits in `dtype`, parameters in float64: with float32 logits each is converted, which must not lose its level.

    Few rows of few classes: a Jacobian of a Jacobian is a call for each pair of elements.
    """
    classes = rows + 1
    generator = torch.Generator().manual_seed(3)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    return {
        "input": between(-2, 2, rows, classes).to(dtype),
        "class_scale": between(0.5, 1.5, classes),
        "class_bias": between(-1, 1, classes),
        "sample_weight": between(0.5, 1.5, rows),
        "weight": between(0.5, 2, classes),
        "class_margin": between(0.1, 0.7, classes),
    }


def _loss(values: Values) -> Tensor:
    """Every term of the loss, and the mean over weights, so that no mixed derivative of a pair is 0."""
    target = torch.tensor([2, 0, 3])[: values["input"].shape[0]]
    arguments: dict[str, Any] = {name: value for name, value in values.items() if name != "input"}
    return cross_entropy(
        values["input"], target, **arguments, scale=1.5, label_smoothing=0.1, focal_gamma=2.0, z_loss=0.05
    )


def _direction(like: Tensor) -> Tensor:
    return torch.linspace(-1.0, 1.5, like.numel(), dtype=like.dtype).view(like.shape)


def by_func(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return torch.func.grad(function)(at)


def by_vjp(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    value, pull = torch.func.vjp(function, at)
    return pull(torch.ones_like(value))[0]


def by_autograd(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """A leaf of PyTorch's autograd; what surrounds it may differentiate the gradient again."""
    at = at.clone() if at.requires_grad else at.detach().requires_grad_()
    return torch.autograd.grad(function(at), at, create_graph=True)[0]


def derivative(names: Sequence[str], ways: Sequence[Derive], values: Values) -> Tensor:
    """Differentiates by each name in turn, innermost first; between two derivatives stands a projection to a number."""

    def function(values: Values, order: int) -> Tensor:
        if order == 0:
            return _loss(values)
        name = names[order - 1]
        gradient = ways[order - 1](lambda x: function({**values, name: x}, order - 1), values[name])
        return gradient if order == len(names) else (gradient * _direction(gradient)).sum()

    return function(values, len(names))


@cache
def _truth(names: tuple[str, ...], dtype: torch.dtype) -> Tensor:
    """In float64 on the numbers of `dtype`, by the reference and autograd alone."""
    values = {name: value.double() for name, value in _values(dtype).items()}
    with ltk.use_backend("reference"):
        expected = derivative(names, (by_autograd,) * len(names), values).detach()
    assert expected.norm() > 1e-4, "the test could not tell a gradient that got lost"
    return expected


each_pair = pytest.mark.parametrize(("inner", "outer"), list(product(NAMES, NAMES)))
each_dtype = pytest.mark.parametrize("dtype", LIMITS, ids=str)
WAYS = {
    "grad in grad": (by_func, by_func),
    "grad in autograd": (by_func, by_autograd),
    "vjp in vjp": (by_vjp, by_vjp),
    "autograd in autograd": (by_autograd, by_autograd),
}


@each_dtype
@each_pair
@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS.keys())
def test_second_derivatives(inner: str, outer: str, ways: tuple[Derive, Derive], dtype: torch.dtype) -> None:
    actual = derivative((inner, outer), ways, _values(dtype))
    assert actual.dtype == _values(dtype)[outer].dtype
    assert relative_error(actual.detach(), _truth((inner, outer), dtype)) <= LIMITS[dtype]


@pytest.mark.parametrize(
    "jacobians",
    [
        (torch.func.jacrev, torch.func.jacrev),
        (torch.func.jacrev, torch.func.jacfwd),
        (torch.func.jacfwd, torch.func.jacrev),
    ],
    ids=["jacrev in jacrev", "jacrev in jacfwd", "jacfwd in jacrev"],
)
@each_pair
def test_jacobian_of_a_jacobian(inner: str, outer: str, jacobians: tuple[Any, Any]) -> None:
    """jacrev is vmap over a vjp, jacfwd over a jvp: a batch in a batch, each level with its own rule for the op."""
    values = _values(torch.float64, 2)

    def at(y: Tensor) -> Tensor:
        fixed = {**values, outer: y}
        return jacobians[0](lambda x: _loss({**fixed, inner: x}))(fixed[inner])

    def mixed() -> Tensor:
        return jacobians[1](at)(values[outer])

    actual = mixed()
    with ltk.use_backend("reference"):
        expected = mixed()
    assert expected.norm() > 1e-3
    assert relative_error(actual, expected) <= LIMITS[torch.float64]


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("input", "input"),
        ("input", "sample_weight"),
        ("sample_weight", "input"),
        ("class_bias", "weight"),
        ("weight", "class_margin"),
        ("class_margin", "class_scale"),
    ],
)
@pytest.mark.parametrize("batched", ("outer", "neither"))
def test_a_batch_of_second_derivatives(inner: str, outer: str, batched: str) -> None:
    """vmap(grad(grad)) over the variable itself, and over logits or a bias that both transforms hold fixed."""
    values = _values(torch.float64)
    over = outer if batched == "outer" else next(n for n in ("input", "class_bias") if n not in (inner, outer))
    batch = torch.stack([values[over], values[over] * 0.5 + 0.1])

    def second(element: Tensor, ways: tuple[Derive, Derive] = (by_func, by_func)) -> Tensor:
        return derivative((inner, outer), ways, {**values, over: element})

    actual = torch.func.vmap(second)(batch)
    with ltk.use_backend("reference"):
        expected = torch.stack([second(element, (by_autograd, by_autograd)).detach() for element in batch])
    assert all(row.norm() > 1e-4 for row in expected)
    assert relative_error(actual, expected) <= LIMITS[torch.float64]


TRIPLES = [
    ("input", "input", "input"),
    ("input", "input", "sample_weight"),
    ("input", "sample_weight", "class_bias"),
    ("sample_weight", "input", "weight"),
    ("class_bias", "class_margin", "input"),
    ("class_scale", "class_bias", "class_margin"),
    ("weight", "class_scale", "sample_weight"),
]


@pytest.mark.parametrize("names", TRIPLES, ids=" ".join)
@pytest.mark.parametrize("outermost", (by_func, by_autograd))
def test_third_derivatives(names: tuple[str, str, str], outermost: Derive) -> None:
    """The middle level differentiates the backward: what the outermost follows has to pass through that as well."""
    actual = derivative(names, (by_func, by_func, outermost), _values(torch.float64))
    assert relative_error(actual.detach(), _truth(names, torch.float64)) <= LIMITS[torch.float64]


ALONE = ("sample_weight", "weight", "class_margin", "target")


@pytest.mark.parametrize("order", ("logits first", "logits last"))
@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
def test_a_single_parameter(name: str, order: str, reduction: str) -> None:
    """Without other parameters the kernels take shorter ways, which have to see the outer level as well.

    Probabilities are a parameter too (distillation, learnt soft labels), one that excludes margins and so is only here.
    """
    values = {**_values(torch.float64), "target": torch.tensor([2, 0, 3])}
    if name == "target":
        values["target"] = torch.softmax(torch.randn(3, 4, dtype=torch.float64), 1)
    values = {key: values[key] for key in {"input", "target", name}}
    inner, outer = ("input", name) if order == "logits first" else (name, "input")

    def loss(values: Values) -> Tensor:
        rows = cross_entropy(**values, reduction=reduction)
        return (rows * _direction(rows)).sum() if reduction == "none" else rows

    def mixed(ways: tuple[Derive, Derive]) -> Tensor:
        def gradient(y: Tensor) -> Tensor:
            g = ways[0](lambda x: loss({**values, outer: y, inner: x}), values[inner])
            return (g * _direction(g)).sum()

        return ways[1](gradient, values[outer]).detach()

    with ltk.use_backend("reference"):
        expected = mixed((by_autograd, by_autograd))
    assert expected.norm() > 1e-3
    for ways in WAYS.values():
        assert relative_error(mixed(ways), expected) <= LIMITS[torch.float64]


# --- What people nest transforms for ---


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_learning_to_reweight(ways: tuple[Derive, Derive], dtype: torch.dtype) -> None:
    """Ren et al. 2018, algorithm 1: the weights of samples from one SGD step with weights eps = 0.

    With sum(eps_i l_i) as the training loss the derivative of the validation loss with respect to eps_i is
    -rate * <gradient of validation loss, gradient of l_i>, which plain PyTorch gives row by row.
    """
    rate = 0.1
    features, held_out = torch.randn(6, 5, dtype=dtype), torch.randn(4, 5, dtype=dtype)
    labels, held_out_labels = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 2, 2])
    model = torch.randn(5, 3, dtype=dtype)

    def after_a_step(eps: Tensor) -> Tensor:
        def training(model: Tensor) -> Tensor:
            return cross_entropy(features @ model, labels, reduction="sum", sample_weight=eps)

        return cross_entropy(held_out @ (model - rate * ways[0](training, model)), held_out_labels)

    actual = ways[1](after_a_step, torch.zeros(6, dtype=dtype)).detach()

    def gradient(features: Tensor, labels: Tensor) -> Tensor:
        leaf = model.clone().requires_grad_()
        return torch.autograd.grad(torch.nn.functional.cross_entropy(features @ leaf, labels), leaf)[0]

    validation = gradient(held_out, held_out_labels)
    expected = torch.stack(
        [-rate * (validation * gradient(features[i : i + 1], labels[i : i + 1])).sum() for i in range(6)]
    )
    assert relative_error(actual, expected) <= LIMITS[dtype]
    assert bool((expected != 0).all())

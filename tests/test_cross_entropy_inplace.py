"""``inplace=True``: the gradient takes the logits' memory where that is allowed, and nowhere else.

That the bits are those of the plain call is tested with all other ways in test_cross_entropy_autograd.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from autograd_cases import Subclass, cross_entropy
from torch import Tensor

import ltkernels as ltk
from ltkernels.bench import device

N, C = 6, 37  # full vectors and a tail for every instruction set


def labels() -> Tensor:
    return torch.arange(N) * 5 % C


def gradient(logits: Tensor, target: Tensor, **arguments: Any) -> Tensor:
    loss = cross_entropy(logits, target, **arguments)
    return torch.autograd.grad(loss, logits, torch.full_like(loss, 0.5))[0]


# Logits that are not leaves, from a leaf with the same elements or more.
MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda leaf: leaf * 1,
    "view of a result": lambda leaf: (leaf * 1).view(-1).view(N, C),
    "rows apart": lambda leaf: (torch.cat([leaf, leaf], 1) * 1)[:, :C],
    "classes apart": lambda leaf: (torch.stack([leaf, leaf], 2) * 1)[:, :, 0],
    "transposed": lambda leaf: (leaf.t() * 1).t(),
}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("made", MADE)
def test_gradient_is_in_the_memory_of_the_logits(made: str, dtype: torch.dtype) -> None:
    leaf = torch.randn(N, C).to(dtype).requires_grad_()
    for arguments in (
        {}, {"reduction": "none"}, {"label_smoothing": 0.1, "ignore_index": 0}, {"class_bias": torch.randn(C)},
        {"class_bias": torch.randn(C, requires_grad=True), "class_scale": torch.rand(C, requires_grad=True)},
    ):  # fmt: skip
        logits = MADE[made](leaf)
        values = logits.detach().clone()
        expected = gradient(values.requires_grad_(), labels(), **arguments)
        actual = gradient(logits, labels(), **arguments, inplace=True)
        assert actual.data_ptr() == logits.data_ptr() and actual.stride() == logits.stride()
        assert torch.equal(actual, expected)
        assert not actual.requires_grad and actual is not logits


@pytest.mark.parametrize("shape", ((C,), (N, C, 3), (N, C, 2, 2)), ids=str)
def test_other_shapes(shape: tuple[int, ...]) -> None:
    leaf = torch.randn(shape, requires_grad=True)
    target = torch.randint(C, (*shape[:-1][:1], *shape[2:]) if len(shape) > 1 else ())
    logits = leaf * 1
    values = logits.detach().clone().requires_grad_()
    expected = torch.autograd.grad(cross_entropy(values, target), values)[0]
    cross_entropy(logits, target, inplace=True).backward()
    assert torch.equal(leaf.grad, expected)
    assert torch.equal(logits.detach(), expected), "the gradient is not where the logits were"


def test_probabilities_and_learnable_adjustments_in_place() -> None:
    leaf, target = torch.randn(N, C, requires_grad=True), torch.softmax(torch.randn(N, C), 1)
    scale = torch.rand(C, requires_grad=True)
    expected = torch.autograd.grad(cross_entropy(leaf, target, class_scale=scale), (leaf, scale))
    actual = torch.autograd.grad(cross_entropy(leaf * 1, target, class_scale=scale, inplace=True), (leaf, scale))
    assert all(torch.equal(mine, other) for mine, other in zip(actual, expected, strict=True))


# --- Where it is not allowed ---

FORBIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "leaf": lambda leaf: leaf,
    "view of a leaf": lambda leaf: leaf.view(-1).view(N, C),
    "transposed leaf": lambda leaf: leaf.view(C, N).t(),
    "part of a leaf": lambda leaf: leaf[:, : C - 1],
    "rows that are one": lambda leaf: (leaf * 1)[:1].expand(N, C),
    "classes that are one": lambda leaf: (leaf * 1)[:, :1].expand(N, C),
    "windows": lambda leaf: (leaf * 1).view(-1).unfold(0, C, 3)[:N],
}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("made", FORBIDDEN)
def test_leaves_and_shared_elements_stay_as_they_are(made: str, dtype: torch.dtype) -> None:
    leaf = torch.randn(N, C).to(dtype).requires_grad_()
    before = leaf.detach().clone()
    logits = FORBIDDEN[made](leaf)
    values = logits.detach().clone()
    (expected,) = torch.autograd.grad(cross_entropy(FORBIDDEN[made](leaf), labels() % 7), leaf)
    cross_entropy(logits, labels() % 7, inplace=True).backward()
    assert torch.equal(leaf.detach(), before) and torch.equal(logits.detach(), values)
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("shape", ((C,), (N, C, 2, 2)), ids=str)
def test_a_leaf_that_the_function_itself_views_stays_as_it_is(shape: tuple[int, ...]) -> None:
    """(C,) and more than three dimensions are views of what the caller passes."""
    leaf = torch.randn(shape, requires_grad=True)
    before = leaf.detach().clone()
    target = torch.randint(C, (*shape[:-1][:1], *shape[2:]) if len(shape) > 1 else ())
    cross_entropy(leaf, target, inplace=True).backward()
    assert torch.equal(leaf.detach(), before) and leaf.grad.data_ptr() != leaf.data_ptr()


def test_permission_is_not_used_where_the_logits_are_still_needed() -> None:
    """no_grad, double backward, torch.func, the dispatcher's op and the reference leave them."""
    leaf = torch.randn(N, C, requires_grad=True)
    logits = leaf * 1
    values = logits.detach().clone()
    with torch.no_grad():
        cross_entropy(logits, labels(), inplace=True)
    (grad,) = torch.autograd.grad(cross_entropy(logits, labels(), inplace=True), logits, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), leaf, retain_graph=True)
    (plain,) = torch.autograd.grad(cross_entropy(logits, labels()), logits, create_graph=True)
    assert torch.equal(second, torch.autograd.grad(plain.square().sum(), leaf)[0]) and second.any()
    torch.func.grad(lambda x: cross_entropy(x, labels(), inplace=True))(logits)
    torch.autograd.grad(cross_entropy(logits.as_subclass(Subclass), labels(), inplace=True), logits)
    with ltk.use_backend("reference"):
        torch.autograd.grad(cross_entropy(logits, labels(), inplace=True), logits)
    assert torch.equal(logits.detach(), values)


# --- What others see of it ---


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_second_backward_raises(reduction: str) -> None:
    logits = torch.randn(N, C, requires_grad=True) * 1
    loss = cross_entropy(logits, labels(), reduction=reduction, inplace=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_other_users_of_the_logits_notice() -> None:
    """Autograd runs the newest node first: a user made before the loss finds changed logits, one made after it has
    gone.
    """
    leaf = torch.randn(N, C, requires_grad=True)

    def backward(order: str) -> Tensor:
        logits = leaf * 1
        parts = {"loss": lambda: cross_entropy(logits, labels(), inplace=True), "square": lambda: (logits**2).sum()}
        return torch.autograd.grad(sum(parts[name]() for name in order.split()), leaf)[0]

    torch.testing.assert_close(
        backward("loss square"), torch.autograd.grad(cross_entropy(leaf, labels()), leaf)[0] + 2 * leaf.detach()
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward("square loss")


def test_a_producer_that_needs_its_result_notices() -> None:
    """The backward of exp reads its result, which the gradient has replaced."""
    logits = torch.randn(N, C, requires_grad=True).exp()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(logits, labels(), inplace=True).backward()


def test_version_counter_moves_once_a_backward() -> None:
    logits = torch.randn(N, C, requires_grad=True) * 1
    view = logits[0]
    loss = cross_entropy(logits, labels(), inplace=True)
    assert logits._version == 0
    loss.backward()
    assert logits._version == view._version == 1


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_it_saves_the_memory_of_a_gradient(dtype: torch.dtype) -> None:
    constant, shift = torch.randn(256, 512).to(dtype), torch.zeros(512, dtype=dtype, requires_grad=True)
    y = torch.randint(512, (256,))

    def peak(inplace: bool) -> int:
        def step() -> None:
            cross_entropy(constant + shift, y, inplace=inplace).backward()

        step()  # the gradient of the shift exists from here on
        return device.Cpu().peak_bytes(step)

    assert peak(inplace=False) - peak(inplace=True) > 0.9 * constant.nbytes
    assert peak(inplace=True) < 1.2 * constant.nbytes

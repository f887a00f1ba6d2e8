"""cross_entropy in an autograd graph: what users do around a loss between its forward and its backward.

Where the numbers are not the subject they are compared bit by bit with the plain call, whose numbers
test_cross_entropy_autograd.py holds against finite differences. Each path of the backward is taken: the gradient that
the forward kept (a reduced loss), and the recomputation (a second backward, reduction "none", half-precision logits
with an upstream gradient other than 1).
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from autograd_cases import CALLS, cross_entropy, op_arguments, problem
from cross_entropy_cases import UPSTREAMS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ltkernels as ltk
from ltkernels.bench import device

N, C = 6, 37  # full vectors and a tail for every instruction set

halves = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
each_reduction = pytest.mark.parametrize("reduction", ("mean", "none"))


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(N, C).to(dtype).requires_grad_(), torch.randint(C, (N,))


def plain(logits: Tensor, labels: Tensor, upstream: Tensor | None = None, **arguments: Any) -> Tensor:
    """The gradient of a fresh call with nothing around it."""
    logits = logits.detach().clone().requires_grad_()
    loss = cross_entropy(logits, labels, **arguments)
    return torch.autograd.grad(loss, logits, torch.ones_like(loss) if upstream is None else upstream)[0]


class Calls(TorchDispatchMode):
    """Records the calls of the C++ library's ops: name, arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "ltkernels_cpu":
            self.seen.append((func._opname, args, result))
        return result

    @property
    def names(self) -> list[str]:
        return [name.removeprefix("cross_entropy_") for name, _, _ in self.seen]


# --- Upstream gradients, and backward more than once ---


@halves
@pytest.mark.parametrize("first, second", list(itertools.product((1.0, 0.5, 0.0), (1.0, -3.0))))
def test_two_backwards_by_retain_graph(first: float, second: float, dtype: torch.dtype) -> None:
    x, y = batch(dtype)
    loss = cross_entropy(x, y)
    one = torch.autograd.grad(loss, x, loss.new_tensor(first), retain_graph=True)[0]
    copied = one.clone()
    two = torch.autograd.grad(loss, x, loss.new_tensor(second), retain_graph=True)[0]
    three = torch.autograd.grad(loss, x, loss.new_tensor(second))[0]
    assert torch.equal(one, copied), "a later backward wrote into a gradient that was handed out"
    assert torch.equal(one, plain(x, y, loss.new_tensor(first)))
    assert torch.equal(two, plain(x, y, loss.new_tensor(second))) and torch.equal(two, three)


def test_a_gradient_that_was_handed_out_may_be_written_to() -> None:
    x, y = batch()
    loss = cross_entropy(x, y)
    torch.autograd.grad(loss, x, retain_graph=True)[0].zero_()
    assert torch.equal(torch.autograd.grad(loss, x)[0], plain(x, y))


@each_reduction
def test_backward_twice_without_retain_graph_raises(reduction: str) -> None:
    x, y = batch()
    loss = cross_entropy(x, y, reduction=reduction)
    loss.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.sum().backward()


@pytest.mark.parametrize("name", UPSTREAMS)
@pytest.mark.parametrize("inner", ((), (3,), (2, 2)))
def test_upstream_gradients_of_rows(name: str, inner: tuple[int, ...]) -> None:
    """The gradient is linear in the upstream gradient of each row, whatever its strides."""
    x, y = torch.randn(N, C, *inner, requires_grad=True), torch.randint(C, (N, *inner))
    loss = cross_entropy(x, y, reduction="none")
    upstream = UPSTREAMS[name](loss.detach())
    (actual,) = torch.autograd.grad(loss, x, upstream)
    torch.testing.assert_close(actual, plain(x, y, reduction="none") * upstream.unsqueeze(1), rtol=1e-6, atol=0)
    assert name != "zero" or not actual.any()


def test_upstream_gradients_transposed() -> None:
    x, y = torch.randn(N, C, 3, requires_grad=True), torch.randint(C, (N, 3))
    upstream = torch.randn(3, N).t()
    (actual,) = torch.autograd.grad(cross_entropy(x, y, reduction="none"), x, upstream)
    assert torch.equal(actual, plain(x, y, upstream.contiguous(), reduction="none"))


# --- Only what is needed ---


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_nothing_is_made_for_a_backward_that_cannot_be(mode: Callable[[], Any]) -> None:
    x, y = torch.randn(256, 128, requires_grad=True), torch.randint(128, (256,))
    with mode(), Calls() as calls:
        loss = cross_entropy(x, y)
    assert not loss.requires_grad
    (forward,) = calls.seen
    assert forward[2][2] is None, "a gradient was written"
    with mode():
        peak = device.Cpu().peak_bytes(lambda: cross_entropy(x, y))
    assert peak < x.nbytes // 8
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, y))


@each_reduction
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)))
def test_no_gradient_is_computed_that_is_not_needed(needs: tuple[bool, bool, bool], reduction: str) -> None:
    x, y = batch()
    values = x.detach(), torch.rand(C) + 0.5, torch.randn(C)
    logits, scale, bias = (v.clone().requires_grad_(n) for v, n in zip(values, needs, strict=True))
    with Calls() as calls:
        loss = cross_entropy(logits, y, class_scale=scale, class_bias=bias, reduction=reduction)
        assert loss.requires_grad == any(needs)
        if any(needs):
            loss.sum().backward()
    all_of_them = [v.clone().requires_grad_() for v in values]
    every = cross_entropy(all_of_them[0], y, class_scale=all_of_them[1], class_bias=all_of_them[2], reduction=reduction)
    every.sum().backward()
    for mine, full, needed in zip((logits, scale, bias), all_of_them, needs, strict=True):
        assert (mine.grad is not None) == needed
        if needed:
            torch.testing.assert_close(mine.grad, full.grad, rtol=1e-6, atol=0)
    kept = needs == (True, False, False) and reduction == "mean"
    assert calls.names == ["forward", "backward"][: 1 if kept or not any(needs) else 2]
    assert (calls.seen[0][2][2] is not None) == kept
    if len(calls.seen) == 2:
        _, arguments, results = calls.seen[1]
        assert arguments[-4:-1] == needs
        assert [result.numel() > 0 for result in results] == list(needs)


# --- Memory that changes under the graph ---


@pytest.mark.parametrize("changed", ("logits", "labels", "weight", "class_bias", "sample_weight"))
@each_reduction
def test_modification_between_forward_and_backward(changed: str, reduction: str) -> None:
    """The kept gradient is that of the forward's values. A recomputation would not be, and autograd says so."""
    x, y = batch()
    tensors = {
        "logits": x * 1, "labels": y.clone(), "weight": torch.rand(C) + 0.5, "class_bias": torch.randn(C),
        "sample_weight": torch.rand(N) + 0.5,
    }  # fmt: skip
    arguments = {k: v for k, v in tensors.items() if k not in ("logits", "labels")}
    expected = plain(x, y, **{k: v.clone() for k, v in arguments.items()}, reduction=reduction)
    loss = cross_entropy(tensors["logits"], tensors["labels"], **arguments, reduction=reduction).sum()
    with torch.no_grad():
        tensors[changed].zero_()
    if reduction == "mean":
        (actual,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(actual, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x)


# --- Leaves, hooks, copies ---


@halves
@each_reduction
def test_leaf_gradients_accumulate(reduction: str, dtype: torch.dtype) -> None:
    x, y = batch(dtype)
    once = plain(x, y, reduction=reduction)
    cross_entropy(x, y, reduction=reduction).sum().backward()
    assert torch.equal(x.grad, once)
    cross_entropy(x, y, reduction=reduction).sum().backward()
    assert torch.equal(x.grad, once * 2)


def test_one_use_of_the_logits_beside_others() -> None:
    """Gradients of several consumers are added up, by PyTorch, in memory that must not be ours any more."""
    x, y = batch()
    logits = x * 1
    first, second = cross_entropy(logits, y), cross_entropy(logits, y, label_smoothing=0.5)
    total = first + 2 * second + logits.square().mean()
    expected = plain(x, y) + 2 * plain(x, y, label_smoothing=0.5) + 2 * x.detach() / x.numel()
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(total, x, retain_graph=True)[0], expected)


def test_hooks_see_and_change_gradients() -> None:
    x, y = batch()
    logits = x * 1
    seen: list[Tensor] = []
    logits.register_hook(lambda grad: seen.append(grad.clone()) or grad * 3)
    loss = cross_entropy(logits, y)
    loss.register_hook(lambda upstream: upstream * 0.5)
    x.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.clone()))
    logits.retain_grad()
    loss.backward()
    half = plain(x, y, torch.tensor(0.5))
    assert torch.equal(seen[0], half)
    assert torch.equal(logits.grad, half * 3) and torch.equal(seen[1], half * 3)


def test_full_backward_hooks_of_modules() -> None:
    criterion = ltk.losses.LogitAdjustedLoss([5, 3, 2])
    seen: list[Tensor] = []
    criterion.register_full_backward_hook(lambda module, grads, upstream: seen.append(grads[0].clone()))
    x, y = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    criterion(x, y).backward()
    assert torch.equal(seen[0], x.grad)


def test_deepcopied_models_learn_on_their_own() -> None:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, C), torch.nn.Tanh())
    criterion = ltk.losses.CrossEntropyLoss(class_bias=torch.nn.Parameter(torch.randn(C)))
    features, y = torch.randn(N, 4), torch.randint(C, (N,))
    loss = criterion(model(features), y)
    twins = copy.deepcopy((model, criterion))  # while a graph of the originals is alive
    twins[1](twins[0](features), y).backward()
    assert all(p.grad is None for p in (*model.parameters(), *criterion.parameters()))
    loss.backward()
    originals, copies = (list(m.parameters()) + list(c.parameters()) for m, c in ((model, criterion), twins))
    for mine, copied in zip(originals, copies, strict=True):
        assert torch.equal(mine.grad, copied.grad) and mine.grad.data_ptr() != copied.grad.data_ptr()
    leaf = torch.randn(2, C, requires_grad=True)
    cross_entropy(leaf, y[:2]).backward()
    assert torch.equal(copy.deepcopy(leaf).grad, leaf.grad)


# --- Memory saving: hooks on saved tensors, checkpoints ---


@contextmanager
def packed() -> Iterator[list[int]]:
    """Saved tensors leave as copies and come back as other copies."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda copy: copy.clone()):
        yield sizes


@halves
@each_reduction
def test_saved_tensor_hooks(reduction: str, dtype: torch.dtype) -> None:
    x, y = batch(dtype)
    logits = x * 1
    with packed() as sizes, Calls() as calls:
        loss = cross_entropy(logits, y, reduction=reduction, sample_weight=torch.ones(N))
    assert logits.nbytes in sizes and y.nbytes in sizes
    assert calls.seen[0][2][2] is None, "a gradient that the hooks do not see was kept"
    assert torch.equal(torch.autograd.grad(loss.sum(), x)[0], plain(x, y, reduction=reduction))
    with torch.autograd.graph.save_on_cpu():
        loss = cross_entropy(x * 1, y, reduction=reduction)
    assert torch.equal(torch.autograd.grad(loss.sum(), x)[0], plain(x, y, reduction=reduction))


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpointing(use_reentrant: bool) -> None:
    features, weight, y = torch.randn(N, 4, requires_grad=True), torch.randn(C, 4, requires_grad=True), batch()[1]

    def head(f: Tensor, w: Tensor) -> Tensor:
        return cross_entropy(f @ w.t(), y, label_smoothing=0.1)

    expected = torch.autograd.grad(head(features, weight), (features, weight))
    actual = torch.autograd.grad(checkpoint(head, features, weight, use_reentrant=False), (features, weight))
    if use_reentrant:  # supports backward() only
        checkpoint(head, features, weight, use_reentrant=True).backward()
        actual = features.grad, weight.grad
    for mine, plain_one in zip(actual, expected, strict=True):
        assert torch.equal(mine, plain_one)


def test_checkpointing_keeps_no_logits_and_no_gradient() -> None:
    """A batch in pieces, head and loss of each checkpointed, is how large numbers of classes are trained in little
    memory.
    """
    features, weight = torch.randn(256, 4), torch.randn(512, 4, requires_grad=True)
    y = torch.randint(512, (256,))

    def head(f: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(f @ weight.t(), labels, reduction="sum")

    def train() -> None:
        pieces = zip(features.chunk(8), y.chunk(8), strict=True)
        losses = [checkpoint(head, f, labels, use_reentrant=False) for f, labels in pieces]
        torch.autograd.grad(torch.stack(losses).sum(), weight)

    train()  # what is allocated once
    piece = 256 // 8 * 512 * 4
    assert device.Cpu().peak_bytes(train) < 4 * piece  # logits, gradient and what the matrix product takes


# --- Threads ---


def test_threads_that_share_parameters_and_graphs() -> None:
    x, y = batch()
    bias = torch.randn(C)
    expected = plain(x, y, class_bias=bias)
    shared = cross_entropy(x, y, class_bias=bias)
    results: list[Tensor] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                results.append(plain(x, y, class_bias=bias))
                results.append(torch.autograd.grad(shared, x, retain_graph=True)[0])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(results) == 160
    assert all(torch.equal(result, expected) for result in results)


# --- Double backward is never silently zero ---


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@each_reduction
def test_gradient_penalty(reduction: str, dtype: torch.dtype) -> None:
    """The squared norm of the gradient as a loss, against PyTorch's own cross-entropy."""
    x, y = batch(torch.float64)

    def penalty(function: Callable[..., Tensor], logits: Tensor) -> Tensor:
        loss = function(logits, y, reduction=reduction, label_smoothing=0.1).sum()
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        return torch.autograd.grad(loss + grad.square().sum() * 10, logits)[0]

    mine = x.detach().to(dtype).requires_grad_()
    expected = penalty(torch.nn.functional.cross_entropy, mine.detach().double().requires_grad_())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    actual = penalty(cross_entropy, mine).double()
    assert (actual - expected).norm() < tolerance * expected.norm()


def test_first_backward_with_create_graph_leaves_the_later_ones_right() -> None:
    x, y = batch()
    loss = cross_entropy(x, y)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    assert grad.requires_grad and torch.equal(grad.detach(), plain(x, y))
    (second,) = torch.autograd.grad(grad.square().sum(), x, retain_graph=True)
    assert second.abs().sum() > 0
    assert torch.equal(torch.autograd.grad(loss, x)[0], plain(x, y))


def test_recording_a_call_for_the_op_tests_passes_it_on() -> None:
    """`op_arguments`, on which the op's own tests stand, records exactly what the public call computes."""
    p = problem(CALLS["all"])
    loss, _ = torch.ops.ltkernels.cross_entropy(*op_arguments(p))
    assert torch.equal(loss, p.loss(p.logits))

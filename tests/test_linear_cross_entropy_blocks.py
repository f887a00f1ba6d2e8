"""linear_cross_entropy by blocks of classes, which few rows of very many classes take; here forced upon few classes.

What takes them and what does not are tested to be equal to PyTorch in float64, whatever the call.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_cross_entropy_cases import Call, each_call, made, upstream_of

import ltkernels as ltk
from ltkernels.functional import class_parallel

BLOCK, CLASSES = 4, 11  # the last block is smaller
linear_cross_entropy = ltk.functional.linear_cross_entropy


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Forces blocks of ``BLOCK`` classes upon all calls that can take any; receives one for each that does."""
    served: list[int] = []
    by_blocks = class_parallel.by_blocks

    def counted(*arguments: Any) -> torch.Tensor:
        served.append(arguments[-1])
        return by_blocks(*arguments)

    monkeypatch.setattr(class_parallel, "FEW_CLASSES", 0)
    monkeypatch.setattr(class_parallel, "class_block", lambda *shape: BLOCK)
    monkeypatch.setattr(class_parallel, "by_blocks", counted)
    return served


def can(call: Call) -> bool:
    soft = not isinstance(call.target, tuple) and call.target.is_floating_point()
    gated = call.arguments.get("row_gate") is not None
    return call.weight.dim() == 2 and not (soft or gated)


@each_call
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_call(name: str, reduction: str, blocks: list[int]) -> None:
    call = made(name, 9, CLASSES)
    call.arguments["reduction"] = reduction
    if reduction != "mean":
        call.arguments.pop("denominator", None)
    variables = call.variables
    loss = call.loss(*variables)
    upstream = upstream_of(loss)
    found = torch.autograd.grad(loss, variables, upstream, retain_graph=True)
    again = torch.autograd.grad(loss, variables, upstream)
    assert blocks == ([BLOCK] if can(call) else [])
    exact = call.composed(*variables)
    torch.testing.assert_close(loss, exact, rtol=1e-10, atol=1e-12)
    for value, second, wanted in zip(found, again, torch.autograd.grad(exact, variables, upstream), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-11)
        assert torch.equal(value, second), "the logits are made again"


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("two", [False, True])
def test_what_else_learns(reduction: str, two: bool, blocks: list[int]) -> None:
    """Weights, margins, smoothing by class and weights of rows, whose gradients are kernels' here."""
    torch.manual_seed(0)
    names = ("x", "w", "weight", "class_margin", "label_smoothing", "class_bias", "sample_weight")
    sizes = ((9, 6), (CLASSES, 6), *[(CLASSES,)] * 4, (9,))
    values = [torch.rand(*size, dtype=torch.float64).requires_grad_() for size in sizes]
    y = torch.randint(CLASSES, (9,))
    target = (y, y.flip(0), 0.3) if two else y
    x, w = values[:2]
    tables = dict(zip(names[2:], values[2:], strict=True)) | {"reduction": reduction, "focal_gamma": 1.5}
    losses = [
        linear_cross_entropy(x, w, target, **tables),
        ltk.functional.cross_entropy(torch.nn.functional.linear(x, w), target, **tables),  # type: ignore[arg-type]
    ]
    assert blocks == [BLOCK]
    torch.testing.assert_close(*losses, rtol=1e-11, atol=1e-12)
    upstream = torch.rand_like(losses[0])
    gradients = [torch.autograd.grad(loss, values, upstream) for loss in losses]
    for name, found, expected in zip(names, *gradients, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["affine", "cosines, all"])
def test_other_types(name: str, dtype: torch.dtype, blocks: list[int]) -> None:
    call = made(name, 9, CLASSES).converted(lambda value: value.to(dtype) if value.is_floating_point() else value)
    exact = call.converted(lambda value: value.double() if value.is_floating_point() else value)
    variables, of_exact = call.variables, exact.variables
    loss, truth = call.loss(*variables), exact.composed(*of_exact)
    assert blocks == [BLOCK] and loss.dtype == torch.float32
    eps = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), truth, rtol=eps, atol=eps)
    found = torch.autograd.grad(loss, variables, torch.full_like(loss, 0.7))
    for value, wanted in zip(found, torch.autograd.grad(truth, of_exact, torch.full_like(truth, 0.7)), strict=True):
        assert value.dtype == dtype
        assert (value.double() - wanted).norm() <= eps * wanted.norm()


def test_derivatives_of_derivatives(blocks: list[int]) -> None:
    call = made("affine", 3, CLASSES)
    assert torch.autograd.gradgradcheck(call.loss, call.variables)
    assert blocks


def test_what_cannot_take_blocks_is_as_before(blocks: list[int]) -> None:
    call = made("plain", 9, CLASSES)
    x, w, b = call.variables
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    linear_cross_entropy(x, w, call.target, linear_bias=b, options=options).backward()
    gradient = torch.func.grad(lambda w: linear_cross_entropy(x.detach(), w, call.target, linear_bias=b.detach()))
    torch.testing.assert_close(gradient(w.detach()), w.grad)
    torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")(x, w, call.target)
    assert not blocks


def test_wrong_labels_are_refused(blocks: list[int]) -> None:
    x, w = torch.randn(3, 2), torch.randn(CLASSES, 2)
    with pytest.raises(IndexError, match=r"expected labels in \[0, 11\) or ignore_index -100, found 11 at row 1"):
        linear_cross_entropy(x, w, torch.tensor([0, 11, 2]))
    with pytest.raises(ValueError, match="class_bias: expected shape"):
        linear_cross_entropy(x, w, torch.tensor([0, 1, 2]), class_bias=torch.zeros(3))

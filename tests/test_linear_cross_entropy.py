"""linear_cross_entropy: every option on every backend against float64, PyTorch's own function, types, memory, chunks.

23 rows in chunks of 6, whose last has 5; 11 classes, an odd number.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import Form, each_form
from linear_cross_entropy_cases import (
    CLASSES,
    FEATURES,
    ROWS,
    chunked,
    chunks_of,
    each_call,
    evaluate,
    linear_cross_entropy,
    made,
    off,
    on,
    truth,
)
from torch import Tensor

import ltkernels as ltk
from ltkernels.bench.device import Cpu
from ltkernels.functional.unit import unit
from ltkernels.ops import chunked_linear

__all__ = ["chunked"]


@each_form
@each_call
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_every_option_against_float64(name: str, bias: bool, chunked: int, form: Form) -> None:
    call = made(name, bias=bias)
    with form.use():
        found = evaluate(on(call, form))
    for key, exact in truth(call).items():
        assert off(found[key].cpu(), exact) <= 1e-11, key


@each_form
@each_call
def test_single_precision(name: str, form: Form) -> None:
    """No further from float64 than twice what the layer and the loss in float32 are, and two roundings."""
    call = made(name, dtype=torch.float32)
    exact = truth(call)
    with form.use():
        found = evaluate(on(call, form))
    parts = evaluate(call, call.composed)
    for key, value in exact.items():
        assert off(found[key].cpu(), value) <= 2 * off(parts[key], value) + 2.0**-22, key


@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "none", "all", "cosines, bias", "two labels, count", "gate"])
def test_half_types(name: str, dtype: torch.dtype, chunked: int, form: Form) -> None:
    """No further from float64 than twice what the layer and the loss are, and two roundings."""
    call = made(name, dtype=dtype)
    call.arguments = {
        key: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in call.arguments.items()
    }
    exact = truth(call)
    with form.use():
        found = evaluate(on(call, form))
    parts = evaluate(call, call.composed)
    assert found["loss"].dtype == torch.float32
    for key, value in exact.items():
        if key in ("features", "weight", "bias"):
            assert found[key].dtype == dtype
        assert off(found[key].cpu(), value) <= 2 * off(parts[key], value) + 2 * torch.finfo(dtype).eps, key


def test_a_mean_over_many_rows_does_not_vanish_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 / 4096 of a small probability is below the smallest float16; its sum over rows is not."""
    chunks_of(1024, monkeypatch)
    x, w = torch.randn(4096, 8).half(), (torch.randn(300, 8) * 0.1).half().requires_grad_()
    y = torch.zeros(4096, dtype=torch.int64)
    linear_cross_entropy(x, w, y).backward()
    exact = w.detach().double().requires_grad_()
    F.cross_entropy(F.linear(x.double(), exact), y).backward()
    assert off(w.grad, exact.grad) < 2e-3


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(features: torch.dtype, normalize: bool, chunked: int) -> None:
    """The products are of autocast's type, the gradients of float32 parameters float32; float64 is left alone."""
    x, w, b = torch.randn(ROWS, FEATURES), torch.randn(CLASSES, FEATURES), torch.randn(CLASSES)
    y = torch.randint(CLASSES, (ROWS,))
    x = x.to(features)

    def run(function: Callable[..., Tensor], *values: Tensor) -> list[Tensor]:
        leaves = [value.detach().clone().requires_grad_() for value in values]
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, y, linear_bias=b, normalize=normalize, scale=2.0)

    def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if normalize:
            x, w = F.normalize(x, dim=1), F.normalize(w, dim=1)
        return F.cross_entropy(2.0 * F.linear(x, w, b), y)

    found, parts = run(ours, x, w, b), run(layer, x, w, b)
    exact = run(layer, x.double(), w.double(), b.double())
    assert [value.dtype for value in found] == [torch.float32, features, torch.float32, torch.float32]
    for mine, theirs, true in zip(found, parts, exact, strict=True):
        assert off(mine, true) <= 2 * off(theirs, true) + 2**-8
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x.double(), w.double(), b.double()), exact[0])


# --- In place of PyTorch's ---

CHUNKS = torch.nn.LinearCrossEntropyOptions
OPTIONS = {
    "none": None,
    "default": CHUNKS(),
    "5 rows": CHUNKS(batch_chunk_size=5),
    "all rows": CHUNKS(chunking_method=None),
    "aspect ratio": CHUNKS(chunking_method="aspect_ratio:2"),
    "whole": CHUNKS(allow_retain_graph=True, acc_policy="accurate", acc_dtype=torch.float32, batch_chunk_size=7),
}
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "no rows": ((FEATURES,), ()),
    "rows": ((ROWS, FEATURES), ()),
    "more dimensions": ((ROWS, FEATURES), (2, 3)),
    "none of no": ((0, FEATURES), ()),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_argument_of_pytorchs_function(shape: str, reduction: str, soft: bool, options: Any) -> None:
    lead, inner = SHAPES[shape]
    x = torch.randn(lead, dtype=torch.float64)
    w, b = torch.randn(CLASSES, *inner, FEATURES).double(), torch.randn(CLASSES, *inner).double()
    rows = (*lead[:-1], *inner)
    if soft:
        target = torch.randn(*lead[:-1], CLASSES, *inner).double().softmax(len(lead) - 1)
    else:
        target = torch.randint(CLASSES, rows)
        if len(lead) > 1 and lead[0]:
            target.view(-1)[::4] = 2
    for smoothing, ignored in ((0.0, None), (0.1, None if soft else 2)):
        results = []
        for function, chunks in ((linear_cross_entropy, options), (F.linear_cross_entropy, None)):
            leaves = [value.clone().requires_grad_() for value in (x, w, b)]
            loss = function(
                leaves[0], leaves[1], target, linear_bias=leaves[2], weight=torch.linspace(0.5, 2, CLASSES).double(),
                reduction=reduction, ignore_index=ignored, label_smoothing=smoothing, options=chunks,
            )  # fmt: skip
            results.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_pytorchs_options_choose_the_rows_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = chunked_linear.Classifier.chunks
    monkeypatch.setattr(
        chunked_linear.Classifier, "chunks", lambda self, most=0: asked.append(most) or original(self, most)
    )
    x, w, y = torch.randn(64, 4), torch.randn(30, 4), torch.randint(30, (64,))
    for options in OPTIONS.values():
        linear_cross_entropy(x, w, y, options=options)
    # 64 rows of 30 / 4, rounded up 8, times as many logits as features: 8 rows; half of them
    assert asked == [0, 0, 5, 2**31, 4, 7]


def test_features_of_many_dimensions() -> None:
    """A sequence model's: labels, weights of rows and probabilities of the same leading dimensions."""
    x, w = torch.randn(2, 3, 4, FEATURES), torch.randn(CLASSES, FEATURES)
    y, r = torch.randint(CLASSES, (2, 3, 4)), torch.rand(2, 3, 4)
    flat = {"sample_weight": r.flatten(), "reduction": "none"}
    rows = linear_cross_entropy(x, w, y, sample_weight=r, reduction="none")
    assert torch.equal(rows, linear_cross_entropy(x.flatten(0, 2), w, y.flatten(), **flat).view(2, 3, 4))
    pair = linear_cross_entropy(x, w, (y, y.flip(0), r), sample_weight=r, reduction="none")
    other = linear_cross_entropy(x.flatten(0, 2), w, (y.flatten(), y.flip(0).flatten(), r.flatten()), **flat)
    assert torch.equal(pair, other.view(2, 3, 4))
    t = torch.rand(2, 3, 4, CLASSES).softmax(-1)
    soft = linear_cross_entropy(x, w, t, reduction="none")
    assert torch.equal(soft, linear_cross_entropy(x.flatten(0, 2), w, t.flatten(0, 2), reduction="none").view(2, 3, 4))


def test_strided_and_expanded_arguments() -> None:
    x, w, y = (
        torch.randn(FEATURES, ROWS).t(),
        torch.randn(FEATURES, 2 * CLASSES).t()[::2],
        torch.randint(CLASSES, (ROWS, 2))[:, 0],
    )
    leaves = [x.requires_grad_(), w.requires_grad_()]
    found = torch.autograd.grad(linear_cross_entropy(*leaves, y), leaves)
    expected = torch.autograd.grad(F.cross_entropy(F.linear(*leaves), y), leaves)
    torch.testing.assert_close(found, expected)
    one = torch.randn(1, FEATURES).expand(ROWS, FEATURES)
    torch.testing.assert_close(linear_cross_entropy(one, w, y), F.cross_entropy(F.linear(one, w), y))
    rows = linear_cross_entropy(*leaves, y, reduction="none")
    for upstream in (torch.rand(1).expand(ROWS), torch.rand(ROWS, 2)[:, 0], torch.zeros(ROWS)):
        found = torch.autograd.grad(rows, leaves, upstream, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(rows, leaves, upstream.clone(), retain_graph=True))


def test_a_vector_of_zeros_has_cosine_0(chunked: int) -> None:
    """And, as with CosineLinear, a gradient without the direction that it does not have."""
    x, w, y = torch.randn(ROWS, FEATURES), torch.randn(CLASSES, FEATURES), torch.randint(CLASSES, (ROWS,))
    x[1], w[2] = 0.0, 0.0
    leaves = [x.requires_grad_(), w.requires_grad_()]
    found = torch.autograd.grad(linear_cross_entropy(*leaves, y, normalize=True), leaves)
    expected = torch.autograd.grad(F.cross_entropy(F.linear(*map(unit, leaves)), y), leaves)
    for mine, theirs in zip(found, expected, strict=True):
        assert off(mine, theirs.double()) < 1e-5


def test_nan_goes_where_it_goes_in_the_parts(chunked: int) -> None:
    """A diverged classifier gives a NaN loss and no error; a masked class, by a bias of -inf, has probability 0."""
    x, w, y = torch.randn(ROWS, FEATURES), torch.randn(CLASSES, FEATURES), torch.zeros(ROWS, dtype=torch.int64)
    w[3, 1] = torch.nan
    for normalize in (False, True):
        assert linear_cross_entropy(x, w, y, normalize=normalize).isnan()
    w[3, 1] = 0.0
    bias = torch.randn(CLASSES)
    bias[5] = -torch.inf
    leaves = [x.requires_grad_(), w.requires_grad_(), bias.requires_grad_()]
    found = linear_cross_entropy(*leaves[:2], y, linear_bias=leaves[2])
    expected = F.cross_entropy(F.linear(*leaves), y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("empty", ["nan", "zero"])
@pytest.mark.parametrize("pair", [False, True])
def test_the_mean_over_nothing(pair: bool, empty: str, chunked: int) -> None:
    x = torch.randn(ROWS, FEATURES, requires_grad=True)
    w = torch.randn(CLASSES, FEATURES, requires_grad=True)
    y: Any = torch.full((ROWS,), -100)
    if pair:
        y = (y, torch.zeros(ROWS, dtype=torch.int64), 0.3)
    loss = linear_cross_entropy(x, w, y, empty=empty)
    assert bool(loss.isnan()) == (empty == "nan")
    for grad in torch.autograd.grad(loss, (x, w)):
        assert bool(grad.isfinite().all())
    if not pair:
        assert loss.nan_to_num() == 0


# --- Memory ---


@pytest.mark.parametrize(
    "arguments",
    [{}, {"normalize": True}, {"reduction": "none"}, {"smoothing_mode": "off_target", "label_smoothing": 0.1}],
    ids=str,
)
@pytest.mark.parametrize(("rows", "classes"), [(3000, 5000), (200, 60_000)])
def test_peak_memory(rows: int, classes: int, arguments: dict[str, Any]) -> None:
    """Beyond inputs and gradients the larger of 32 MiB and a twentieth of the logits, which are 57 and 46 MiB here."""
    x, w = torch.randn(rows, 16, requires_grad=True), torch.randn(classes, 16, requires_grad=True)
    y, above = torch.randint(classes, (rows,)), torch.rand(rows)

    def step() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(x, w, y, **arguments)
        return torch.autograd.grad(loss, (x, w), above if loss.dim() else None)

    step()
    beyond = Cpu().peak_bytes(step) - x.nbytes - w.nbytes
    assert beyond <= max(32 << 20, 4 * rows * classes // 20)


def test_more_logits_than_32_bits_count() -> None:
    """2200 rows of a million classes: 2.2e9 logits, of which PyTorch makes those of three rows."""
    rows, classes = 2200, 1_000_000
    x, w, y = torch.randn(rows, 2), torch.randn(classes, 2), torch.randint(classes, (rows,))
    y[-1] = classes - 1
    x.requires_grad_()
    loss = linear_cross_entropy(x, w, y, reduction="none")
    (gradient,) = torch.autograd.grad(loss, x, torch.ones(rows))
    some = torch.tensor([0, rows // 2, rows - 1])
    few = x.detach()[some].double().requires_grad_()
    exact = F.cross_entropy(F.linear(few, w.double()), y[some], reduction="none")
    torch.testing.assert_close(loss.detach()[some], exact.float())
    # PyTorch's product of a million classes and two features is 1e-3 off by itself.
    assert off(gradient[some], torch.autograd.grad(exact.sum(), few)[0]) <= 5e-3


def test_the_rule_of_chunks() -> None:
    rule = chunked_linear.chunk_rows
    assert rule(64, 1000, 4, True) == 64
    assert rule(100_000, 1000, 4, True) == chunked_linear.CPU_CACHE_BYTES // 4000
    assert rule(100_000, 50_000, 4, True) == chunked_linear.LEAST_ROWS
    assert rule(2000, 100_000, 4, True) == 100, "a twentieth of the logits"
    assert rule(100, 1_000_000, 4, True) == chunked_linear.LOGITS_BYTES // 4_000_000
    assert rule(100, 10**9, 4, True) == 5
    assert rule(10, 10**9, 4, True) == 1
    assert rule(100_000, 1000, 2, False) == chunked_linear.LOGITS_BYTES // 2000
    assert rule(100_000, 100_000, 2, False) == chunked_linear.GPU_LEAST_ROWS


def test_the_rule_of_blocks() -> None:
    rule = chunked_linear.class_block
    assert rule(16, 1_000_000, 128, 4, True) == 29_127 // 256 * 256
    assert rule(16, 1_000_000, 128, 2, False) > rule(16, 1_000_000, 128, 4, True)
    assert rule(7, 1_000_000, 128, 4, True) == 0, "30 MiB hold the rows"
    assert rule(640, 1_000_000, 128, 4, True) == 0, "a twentieth of the logits is 32 rows"
    assert rule(4096, 50_000, 512, 4, True) == 0
    assert rule(600, 10**8, 1 << 16, 4, True) == chunked_linear.LEAST_CLASSES


# --- Backends, threads ---


def test_backends_and_explain() -> None:
    call = made("plain")
    by_cpu = evaluate(call)
    with ltk.use_backend("reference"):
        for key, value in evaluate(call).items():
            torch.testing.assert_close(value, by_cpu[key])
    why = ltk.explain(linear_cross_entropy, call.features, call.weight, call.target)
    assert "linear_cross_entropy on cpu" in why and "kernels_cross_entropy.cpp" in why
    why = ltk.explain(linear_cross_entropy, call.features, call.weight, (call.target, call.target, 0.5))
    assert "linear_row_cross_entropy on cpu" in why and "kernels_row_cross_entropy.cpp" in why


def test_the_same_bits_every_time(chunked: int, threads: Callable[[int], AbstractContextManager[None]]) -> None:
    for name in ("plain", "affine", "two labels with all"):
        call = made(name, 300, 70, torch.float32)
        for number in (1, 2):
            with threads(number):
                first = evaluate(call)
                for _ in range(10):
                    assert all(torch.equal(value, first[key]) for key, value in evaluate(call).items())

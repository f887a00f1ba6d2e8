"""Where the GPU kernels change their path, and what only they do: reports instead of errors, tickets, fixed orders.

The whole matrix of values is in the test_cross_entropy_*.py files, which run on every backend there is. Without a GPU
the forms of this file exist in processes that emulate them: tests/test_cuda.py and tests/test_triton.py start those.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cross_entropy_cases import (
    GPU_BACKENDS,
    INTEGERS,
    Case,
    Form,
    check,
    cross_entropy,
    each_gpu_form,
    evaluate,
    labels,
    positive,
    seed,
)

import ltkernels as ltk
from ltkernels.ops import gpu

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.fixture(autouse=True)
def _nothing_left_to_report() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    ltk.check()


def finish(form: Form) -> None:
    if form.device != "cpu":
        torch.cuda.synchronize()


# --- Every path of the kernels ---

# Vectors of 16 bytes: a row of C half logits has C / 8 (one more where it starts or ends within one). A warp holds 32,
# 64 or 128 of them, a block 4 or 8 for each of up to 512 threads, and a cluster 2, 4 or 8 times that: the class counts
# lie on both sides of these limits. Beyond the last, rows are read twice.
HALF = (255, 256, 257, 511, 513, 1017, 1024, 1025, 16377, 16385, 32768, 32769, 65537, 131073, 262145)
SINGLE = (127, 128, 129, 255, 257, 509, 512, 513, 8189, 8193, 16384, 16385, 32769, 65537, 131073)


def rows(classes: int) -> int:
    """More than a block takes at a time where rows are short; two, where a test would take seconds."""
    return 13 if classes < 2000 else 3 if classes < 20000 else 2


def arguments(kind: str, classes: int) -> dict[str, object]:
    return {
        "plain": {},
        "smoothing": {"label_smoothing": 0.1},
        "margin": {"class_margin": torch.rand(classes), "scale": 4.0, "focal_gamma": 2.0},
        "bias": {"class_bias": torch.randn(classes), "weight": positive(classes)},
        "all": {
            "class_bias": torch.randn(classes).index_fill(0, torch.tensor([0]), -torch.inf),
            "class_scale": torch.rand(classes) + 0.5,
            "weight": positive(classes, zeros=True),
            "label_smoothing": 0.2,
            "z_loss": 1e-3,
        },
    }[kind]


@each_gpu_form
@pytest.mark.parametrize("layout", ["contiguous", "offset", "padded"])
@pytest.mark.parametrize("kind", ["plain", "smoothing", "margin", "bias", "all"])
@pytest.mark.parametrize(
    ("dtype", "classes"), [(torch.bfloat16, c) for c in HALF] + [(torch.float32, c) for c in SINGLE], ids=str
)
def test_both_sides_of_every_limit(dtype: torch.dtype, classes: int, kind: str, layout: str, form: Form) -> None:
    if form.device == "cpu" and (form.backend == "triton" or (classes > 5000 and layout == "padded")):
        pytest.skip("takes too long where kernels are emulated")
    seed(classes)
    n = rows(classes)
    x, y = (torch.randn(n, classes) * 2).to(dtype), labels((n,), classes, ignored=1)
    y[0] = classes - 1
    y[y == 0] = classes - 1  # class 0 is absent in `all`
    check(
        Case(x, y, {"ignore_index": 1, "reduction": "sum"} | arguments(kind, classes), layout, upstream="random"), form
    )


@each_gpu_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [1, 5, 127, 128, 129, 1000])
def test_sums_over_rows(classes: int, dtype: torch.dtype, form: Form) -> None:
    """More rows than one split takes, tables on both sides of a tile of columns."""
    if form.device == "cpu" and form.backend == "triton" and classes > 129:
        pytest.skip("takes too long where kernels are emulated")
    seed(classes)
    x, y = torch.randn(77, classes).to(dtype), labels((77,), classes)
    tables = {"class_bias": torch.randn(classes), "class_scale": torch.rand(classes) + 0.5, "label_smoothing": 0.1}
    for learnable in (("class_bias",), ("class_scale",), ("class_bias", "class_scale")):
        check(Case(x, y, tables | {"reduction": "none"}, upstream="sliced", learnable=learnable), form)


@each_gpu_form
def test_gradients_of_tables_alone(form: Form) -> None:
    """Frozen logits: nothing of their size is written."""
    x, y, bias = torch.randn(9, 35), labels((9,), 35), torch.randn(35)
    expected = evaluate(Case(x, y, {"class_bias": bias}, learnable=("class_bias",)), form)
    alone = bias.to(form.device).requires_grad_()
    with form.use():
        cross_entropy(x.to(form.device), y.to(form.device), class_bias=alone).backward()
    assert torch.equal(alone.grad, expected.gradients["class_bias"])


# --- Labels that are wrong ---


@each_gpu_form
@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda dtype: str(dtype)[6:])
def test_a_label_out_of_range_is_nan_and_reported_once(dtype: torch.dtype, form: Form) -> None:
    limits = torch.iinfo(dtype)
    largest = 2**64 - 1 if dtype == torch.uint64 else limits.max
    for label in (4, largest, *((-1, limits.min) if limits.min < 0 else ())):
        x = torch.randn(3, 4, device=form.device, requires_grad=True)
        y = torch.tensor([0, 1, label], dtype=dtype, device=form.device)
        with form.use():
            loss = cross_entropy(x, y, reduction="none")
            loss.sum().backward()
        assert loss.isnan().tolist() == [False, False, True]
        assert x.grad.isnan().all(1).tolist() == [False, False, True]
        finish(form)
        with pytest.raises(IndexError, match=r"target: expected labels in \[0, C\) or ignore_index, found another"):
            ltk.check()
        ltk.check()


@each_gpu_form
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_label_of_an_absent_class_is_nan_and_reported(reduction: str, form: Form) -> None:
    bias = torch.tensor([0.0, -torch.inf, 0.0], device=form.device)
    with form.use():
        loss = cross_entropy(
            torch.randn(4, 3, device=form.device),
            torch.tensor([0, 2, 1, 0], device=form.device),
            class_bias=bias,
            reduction=reduction,
        )
    assert loss.isnan()
    finish(form)
    with pytest.raises(ValueError, match="found a class with class_bias -inf"):
        ltk.check()


@each_gpu_form
def test_the_state_of_another_backend_is_refused(form: Form) -> None:
    x, y = torch.randn(3, 4, device=form.device, requires_grad=True), torch.tensor([0, 1, 2], device=form.device)
    step = torch.ops.ltkernels
    options = (-100, 2, 0.0, 1.0, 0.0, False, False, 0.0, False)
    with ltk.use_backend("reference"):
        loss, state = step.cross_entropy(x, y, None, None, None, None, None, *options)
    none = (None,) * 5
    if form.device == "cpu":  # there the op looks, and lets the reference go on
        implementation = next(row for row in _table().rows if row.backend == form.backend)
        grads = implementation.backward(
            torch.ones(()), state.detach(), x.detach(), y, *none, *options, True, False, False, False
        )
    else:
        with form.use():
            grads = step.cross_entropy_backward(
                torch.ones((), device=form.device), state.detach(), x.detach(), y, *none, *options, True, False, False
            )
    assert grads[0].isnan().all()
    finish(form)
    with pytest.raises(RuntimeError, match="expected the state of a forward on the same backend"):
        ltk.check()
    assert loss.isfinite()


def _table() -> ltk.backends.Table:
    from ltkernels.ops import cross_entropy as op

    return op.TABLE


# --- Order ---


@each_gpu_form
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_same_bits_twenty_times_and_tickets_given_back(reduction: str, form: Form) -> None:
    seed(3)
    case = Case(
        torch.randn(61, 203).bfloat16(),
        labels((61,), 203, ignored=7),
        {"class_bias": torch.randn(203), "weight": positive(203), "ignore_index": 7, "reduction": reduction},
        upstream="random",
        learnable=("class_bias",),
    )
    first = evaluate(case, form)
    for _ in range(20 if form.backend == "cuda" or form.device != "cpu" else 2):
        again = evaluate(case, form)
        assert torch.equal(again.loss, first.loss)
        assert all(torch.equal(again.gradients[name], value) for name, value in first.gradients.items())
    assert not gpu.tickets(torch.device(form.device), 1).any()


@each_gpu_form
@pytest.mark.parametrize("classes", [1000, 1203])
def test_a_row_does_not_depend_on_its_neighbours(classes: int, form: Form) -> None:
    """The same bits among other rows. (At another place in memory the cuda backend may sum in another order.)"""
    if form.backend == "triton" and form.device == "cpu":
        classes //= 10
    seed(4)
    x, y = torch.randn(6, classes), labels((6,), classes)
    other = torch.randn(6, classes) * 3
    other[2] = x[2]
    each = [
        evaluate(Case(values, y, {"reduction": "none", "label_smoothing": 0.1}, upstream="expanded"), form)
        for values in (x, other)
    ]
    assert torch.equal(each[0].loss[2], each[1].loss[2])
    assert torch.equal(each[0].gradients["input"][2], each[1].gradients["input"][2])


def test_the_backends_are_named() -> None:
    assert set(GPU_BACKENDS) < set(ltk.backends.BACKENDS)

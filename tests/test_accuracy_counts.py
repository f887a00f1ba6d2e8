"""accuracy_counts: every backend against what sorting by PyTorch finds, ties and NaN, wrong calls, compilation.

Sizes: 1 and 2 classes, 8, 9, 16 and 17, at both sides of the classes that one vector holds; odd numbers, in which every
instruction set runs its tail; 64, 65 and 255 to 513, at both sides of the blocks of columns after which the CPU kernel
leaves a row; over 1024, where a block of a GPU shares a row.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cross_entropy_cases import (
    FLOATS,
    INTEGERS,
    LAYOUTS,
    Form,
    each_checking_form,
    each_form,
    each_gpu_form,
    each_kernel_form,
    seed,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor

import ltkernels as ltk
from ltkernels import backends
from ltkernels.ops import accuracy_counts as op

accuracy_counts = ltk.functional.accuracy_counts


def expected(x: Tensor, y: Tensor, top_k: int, classes: int, ignored: int = -100) -> tuple[Tensor, Tensor]:
    """By a stable sort, which puts NaN first and of equal logits the first class first."""
    y = y.long()
    if x.is_floating_point():
        best = x.double().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        right = (best == y.unsqueeze(1)).any(1)
    else:
        right = x.long() == y
    counted = y != ignored
    return torch.bincount(y[counted & right], minlength=classes), torch.bincount(y[counted], minlength=classes)


def check(form: Form, x: Tensor, y: Tensor, top_k: int = 1, classes: int | None = None, ignored: int = -100) -> None:
    """New counts, and counts that are added to, by a backend."""
    wanted = expected(x, y, top_k, classes or x.shape[1], ignored)
    options: dict[str, Any] = {"top_k": top_k, "ignore_index": ignored, "num_classes": classes}
    x, y = x.to(form.device), y.to(form.device)
    with form.use():
        found = accuracy_counts(x, y, **options)
        again = accuracy_counts(x, y, *found, **options)
    assert all(mine is given for mine, given in zip(again, found, strict=True))
    for mine, truth in zip(found, wanted, strict=True):
        assert mine.dtype == torch.int64
        assert torch.equal(mine.cpu(), 2 * truth)


def logits(kind: str, rows: int, classes: int) -> Tensor:
    x = torch.randn(rows, classes)
    if kind == "ties":
        return (2 * x).round()
    if kind == "infinite":
        x = torch.where(torch.rand_like(x) < 0.4, -torch.inf, x)
        return torch.where(torch.rand_like(x) < 0.05, torch.inf, x)
    if kind == "nan":
        return torch.where(torch.rand_like(x) < 0.1, torch.nan, x)
    return x


def half_right(x: Tensor, ignored: int = -100) -> Tensor:
    """Labels of which half are what the logits predict, and one is ignored: both answers come often."""
    y = torch.where(torch.arange(len(x)) % 2 == 0, x.nan_to_num().argmax(1), torch.randint(x.shape[1], (len(x),)))
    y[len(x) // 2] = ignored
    return y


# --- Values ---


@each_form
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", [1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 255, 257, 513, 1029])
def test_values(form: Form, dtype: torch.dtype, classes: int) -> None:
    seed(classes)
    for top_k in {1, min(5, classes), classes}:
        x = logits("plain", 37, classes).to(dtype)
        check(form, x, half_right(x), top_k)


@each_form
@pytest.mark.parametrize("kind", ["ties", "infinite", "nan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ties_and_what_is_no_number(form: Form, dtype: torch.dtype, kind: str) -> None:
    seed(1)
    for classes in (3, 65, 300):
        for top_k in (1, 2):
            x = logits(kind, 61, classes).to(dtype)
            check(form, x, half_right(x), top_k)
    for value in (0.0, -0.0, torch.inf, -torch.inf, torch.nan):  # all equal: the first classes
        check(form, torch.full((6, 5), value, dtype=dtype), torch.tensor([0, 1, 2, 3, 4, 0]), 2)


@each_form
def test_the_first_of_the_best_is_what_argmax_finds(form: Form) -> None:
    seed(2)
    for kind in ("ties", "infinite", "nan"):
        x = logits(kind, 200, 6)
        y = torch.randint(6, (200,))
        with form.use():
            correct, _ = accuracy_counts(x.to(form.device), y.to(form.device))
        assert torch.equal(correct.cpu(), torch.bincount(y[x.argmax(1) == y], minlength=6))


@each_form
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(form: Form, layout: str) -> None:
    seed(3)
    x = logits("ties", 19, 67)
    check(form, LAYOUTS[layout](x), half_right(x), 2)


@each_form
@pytest.mark.parametrize("order", ["classes apart", "channels last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inner_dimensions(form: Form, dtype: torch.dtype, order: str) -> None:
    """Pixels: rows side by side in tiles of 64 on the CPU, and classes side by side."""
    seed(4)
    x = logits("ties", 3 * 5 * 14, 9).to(dtype).view(3, 5, 14, 9)
    rows = x.reshape(-1, 9)
    x = x.movedim(-1, 1)
    if order == "classes apart":
        x = x.contiguous()
    elif order == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    y = half_right(rows)
    wanted = expected(rows, y, 2, 9)
    with form.use():
        found = accuracy_counts(x.to(form.device), y.view(3, 5, 14).to(form.device), top_k=2)
    assert all(torch.equal(mine.cpu(), truth) for mine, truth in zip(found, wanted, strict=True))


@each_form
@pytest.mark.parametrize("kind", ["plain", "ties", "infinite", "nan"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_side_by_side(form: Form, dtype: torch.dtype, kind: str) -> None:
    """Classes apart: on the CPU 64 rows or fewer a lane each, as many as four vectors hold, and groups with a rest."""
    seed(9)
    for rows in (1, 15, 16, 64, 65, 150):
        x = logits(kind, rows, 11).to(dtype)
        check(form, x.t().contiguous().t(), half_right(x), 2)
    x = logits(kind, 2 * 70, 11).to(dtype)  # two groups of 70 pixels: a tile of 64 labels has rows of both
    y = half_right(x)
    wanted = expected(x, y, 1, 11)
    with form.use():
        pixels = x.view(2, 70, 11).transpose(1, 2).contiguous().to(form.device)
        found = accuracy_counts(pixels, y.view(2, 70).to(form.device))
        sparse = accuracy_counts(pixels.repeat_interleave(2, 2)[..., ::2], y.view(2, 70).to(form.device))
    for counts in (found, sparse):
        assert all(torch.equal(mine.cpu(), truth) for mine, truth in zip(counts, wanted, strict=True))


@each_form
def test_labels_of_any_strides(form: Form) -> None:
    """As (N, D) with rows that follow one another and not, of which the CPU kernel reads tiles."""
    seed(10)
    x = logits("plain", 3 * 70, 7)
    y = half_right(x)
    wanted = expected(x, y, 1, 7)
    x, y = x.view(3, 70, 7).transpose(1, 2).to(form.device), y.view(3, 70).to(form.device)
    for labels in (y, y.t().contiguous().t(), y.repeat_interleave(3, 1)[:, ::3], y.repeat_interleave(2, 0)[::2]):
        with form.use():
            found = accuracy_counts(x, labels)
        assert all(torch.equal(mine.cpu(), truth) for mine, truth in zip(found, wanted, strict=True))


@each_form
def test_many_rows_of_few_classes(form: Form) -> None:
    """Where a block of a GPU counts in shared memory: more rows for each block than classes."""
    seed(5)
    rows = 3000 if backends.emulated("triton") else 20_000
    x = logits("plain", rows, 4)
    y = half_right(x)
    check(form, x, y)
    check(form, x.t().contiguous().t(), y)
    check(form, x.argmax(1), y, classes=4)


@each_form
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_types(form: Form, dtype: torch.dtype) -> None:
    """Of labels and of predicted labels, with an ignored class."""
    seed(6)
    x = logits("plain", 300, 5)
    y = half_right(x, ignored=2)
    check(form, x, y.to(dtype), ignored=2)
    check(form, x.argmax(1).to(dtype), y.to(dtype), classes=5, ignored=2)
    check(form, x.argmax(1).to(dtype)[::2], y.to(dtype)[::2], classes=5, ignored=2)


@each_form
def test_nothing_to_count(form: Form) -> None:
    empty = torch.empty(0, dtype=torch.int64)
    check(form, torch.empty(0, 3), empty)
    check(form, empty, empty, classes=3)
    check(form, torch.randn(4, 3), torch.full((4,), -100))


@each_form
def test_one_row(form: Form) -> None:
    with form.use():
        counts = accuracy_counts(torch.tensor([0.0, 2.0], device=form.device), torch.tensor(1, device=form.device))
    assert [c.tolist() for c in counts] == [[0, 1], [0, 1]]


def test_threads_count_alike() -> None:
    seed(7)
    x = logits("plain", 3000, 100)
    y = half_right(x)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(torch.stack(accuracy_counts(x, y)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31 - 1), st.sampled_from(["plain", "ties", "nan"]))
def test_properties(rows: int, classes: int, number: int, kind: str) -> None:
    """More guesses are never worse, C guesses are always right, and batches add up."""
    seed(number)
    x, y = logits(kind, rows, classes), torch.randint(classes, (rows,))
    counts = [accuracy_counts(x, y, top_k=k) for k in sorted({1, (classes + 1) // 2, classes})]
    assert all((a.correct <= b.correct).all() for a, b in zip(counts, counts[1:], strict=False))
    assert torch.equal(counts[-1].correct, counts[-1].total) and int(counts[0].total.sum()) == rows
    half = rows // 2
    parts = accuracy_counts(x[half:], y[half:], *accuracy_counts(x[:half], y[:half]))
    assert torch.equal(torch.stack(parts), torch.stack(counts[0]))


def test_top_k_as_scikit_learn() -> None:
    seed(8)
    x = logits("plain", 400, 12)  # without ties, which scikit-learn breaks the other way
    y = torch.randint(12, (400,))
    for top_k in (1, 3, 5):
        counts = accuracy_counts(x, y, top_k=top_k)
        score = top_k_accuracy_score(y, x.numpy(), k=top_k, labels=range(12))
        assert counts.correct.sum() / counts.total.sum() == pytest.approx(score)


# --- Wrong calls ---


@each_checking_form
@pytest.mark.parametrize("label", [3, -1, -101])
def test_a_label_out_of_range_adds_nothing(form: Form, label: int) -> None:
    counts = torch.ones(2, 3, dtype=torch.int64).unbind()
    wrong = torch.tensor([0, 1, label])
    with form.use():
        with pytest.raises(
            IndexError, match=rf"target: expected labels in \[0, 3\) or ignore_index -100, found {label} at"
        ):
            accuracy_counts(torch.randn(3, 3), wrong, *counts)
        with pytest.raises(IndexError, match=rf"input: expected predicted labels in \[0, 3\), found {label} at row 2"):
            accuracy_counts(wrong, torch.tensor([0, 1, 2]), *counts)
        with pytest.raises(IndexError, match=f"found {2**64 - 100} at row 0"):  # not the -100 that it is in int64
            accuracy_counts(torch.randn(1, 3), torch.tensor([-100]).view(torch.uint64), *counts)
        accuracy_counts(wrong, torch.tensor([0, 1, -100]), *counts)  # what is ignored may be predicted as anything
    assert counts[0].tolist() == counts[1].tolist() == [2, 2, 1]


@each_gpu_form
def test_on_a_gpu_a_label_out_of_range_is_left_out_and_reported(form: Form) -> None:
    def counted(*tensors: Tensor) -> tuple[list[int], list[int]]:
        with form.use():
            correct, total = accuracy_counts(*(t.to(form.device) for t in tensors), num_classes=3)
            if form.device != "cpu":
                torch.cuda.synchronize()
        return correct.tolist(), total.tolist()

    ltk.check()
    x = torch.eye(3)
    for wrong in (3, -1):
        assert counted(x, torch.tensor([0, 1, wrong])) == ([1, 1, 0], [1, 1, 0])
        with pytest.raises(IndexError, match="target: expected labels in .* its row is not counted"):
            ltk.check()
        assert counted(torch.tensor([0, 1, 2]), torch.tensor([wrong, 1, 1])) == ([0, 1, 0], [0, 2, 0])
        with pytest.raises(IndexError, match="target: expected labels in .* its row is not counted"):
            ltk.check()
        assert counted(torch.tensor([0, wrong, 2]), torch.tensor([0, 1, 1])) == ([1, 0, 0], [1, 1, 0])
        with pytest.raises(IndexError, match="input: expected predicted labels in .* its row is not counted"):
            ltk.check()
    ltk.check()


X, Y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
ZEROS = torch.zeros(3, dtype=torch.int64)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "list": (([[1.0]], Y), {}, TypeError, "input: expected a torch.Tensor, found list"),
    "bool": ((X > 0, Y), {}, TypeError, "input: expected float64, float32, bfloat16 or float16, found torch.bool"),
    "probabilities": ((X, X), {}, TypeError, "target: expected labels of an integer type, found torch.float32"),
    "shape": ((X, Y[:2]), {}, ValueError, r"target: expected labels of shape \(4,\)"),
    "labels' shape": ((Y, Y[:2]), {"num_classes": 3}, ValueError, r"target: expected shape \(4,\)"),
    "labels' target": ((Y, Y.float()), {"num_classes": 3}, TypeError, "target: expected labels of an integer type"),
    "top_k 0": ((X, Y), {"top_k": 0}, ValueError, r"top_k: expected a number of classes in \[1, 3\], found 0"),
    "top_k 4": ((X, Y), {"top_k": 4}, ValueError, r"top_k: expected a number of classes in \[1, 3\], found 4"),
    "top_k of labels": ((Y, Y), {"top_k": 2, "num_classes": 3}, ValueError, "found 2 with predicted labels"),
    "top_k True": ((X, Y), {"top_k": True}, TypeError, "top_k: expected an integer, found True"),
    "no classes": ((Y, Y), {}, ValueError, "num_classes: expected the number of classes with predicted labels"),
    "num_classes": ((X, Y), {"num_classes": 5}, ValueError, "num_classes: expected 3 as input has, found 5"),
    "one count": ((X, Y, ZEROS), {}, ValueError, "total: expected both correct and total or neither"),
    "float counts": ((X, Y, ZEROS.float(), ZEROS), {}, TypeError, "correct: expected torch.int64, found torch.float32"),
    "short counts": ((X, Y, ZEROS, ZEROS[:2]), {}, ValueError, r"total: expected contiguous counts of shape \(3,\)"),
    "strided": ((X, Y, torch.zeros(6).long()[::2], ZEROS), {}, ValueError, "correct: expected contiguous counts"),
    "the same": ((X, Y, ZEROS, ZEROS), {}, ValueError, "total: expected other memory than correct's, found the same"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case: str) -> None:
    arguments, options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        accuracy_counts(*arguments, **options)


@each_kernel_form
def test_a_direct_call_is_checked(form: Form) -> None:
    counts = torch.zeros(3, dtype=torch.int64)
    implementation = next(row for row in op.TABLE.rows if row.backend == form.backend)
    good = (X, Y, counts, counts.clone(), 1, -100)
    for place, value in (
        (0, X[0]),
        (0, X[:, :0]),
        (1, Y[:3]),
        (1, X[:, 0]),
        (2, counts.int()),
        (3, counts[:2]),
        (4, 4),
    ):
        call = [value if at == place else given for at, given in enumerate(good)]
        with form.use(), pytest.raises(RuntimeError, match="accuracy_counts: expected"):
            implementation.forward(*(v.to(form.device) if isinstance(v, Tensor) else v for v in call))
    assert not counts.any()


# --- Graphs and transforms ---


def test_opcheck() -> None:
    call = (X, Y, ZEROS.clone(), ZEROS.clone(), 2, -100)
    torch.library.opcheck(torch.ops.ltkernels.accuracy_counts.default, call)


def test_compiles_without_a_break() -> None:
    """Counts that are added to, of batches of any size, in a graph that goes on differentiating the logits."""
    correct, total = ZEROS.clone(), ZEROS.clone()

    def step(x: Tensor, y: Tensor) -> Tensor:
        accuracy_counts(x, y, correct, total)
        return torch.nn.functional.cross_entropy(x, y)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 7):
        x = torch.randn(rows, 3, requires_grad=True)
        y = torch.randint(3, (rows,))
        before = torch.stack([correct, total])
        compiled(x, y).backward()
        assert torch.equal(torch.stack([correct, total]) - before, torch.stack(accuracy_counts(x, y)))
        assert x.grad is not None


def test_inside_a_transform() -> None:
    """Beside a loss that torch.func.grad differentiates; a batch of vmap has no rows of its own to count."""

    def loss(x: Tensor) -> tuple[Tensor, Any]:
        return torch.nn.functional.cross_entropy(x, Y), accuracy_counts(x, Y)

    _, counts = torch.func.grad(loss, has_aux=True)(X)
    assert torch.equal(torch.stack(counts), torch.stack(accuracy_counts(X, Y)))
    with pytest.raises(TypeError, match=r"input: expected a tensor outside of torch.func.vmap"):
        torch.func.vmap(lambda x: accuracy_counts(x, Y).correct)(X.expand(2, 4, 3))


def test_it_says_which_backend_counts() -> None:
    with ltk.use_backend("reference"):
        assert "accuracy_counts" in ltk.explain(accuracy_counts, X, Y)

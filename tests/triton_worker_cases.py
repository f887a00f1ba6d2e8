"""Tests of the Triton kernels themselves, for the interpreter: test_triton.py runs them in a process of its own.

Where a kernel changes its path depends on the size of a tile. Tiles are made small here (``_LOGITS``), so that a few
hundred classes are a long row and a dozen rows several tiles: the interpreter takes milliseconds a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cross_entropy_cases import (
    FLOATS,
    Case,
    Form,
    assert_right,
    check,
    evaluate,
    labels,
    probabilities,
    random_case,
    seed,
    truth,
)
from test_cross_entropy_values import ARGUMENT_SETS

import ltkernels as ltk
from ltkernels.ops import gpu
from ltkernels.triton import cross_entropy as triton_cross_entropy
from ltkernels.triton import cross_entropy_kernels, lade_kernels, row_cross_entropy_labels, sums, tiles
from ltkernels.triton import distillation as triton_distillation
from ltkernels.triton import lade as triton_lade
from ltkernels.triton import row_cross_entropy as triton_row_cross_entropy

FORM = Form("triton")
_LOGITS = 512
CPU = torch.device("cpu")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "LOGITS", _LOGITS)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The plans of the launches of a test."""
    plans: list[Any] = []
    launch = triton_cross_entropy._launch

    def recording(kernel: Any, plan: Any, *arguments: Any) -> None:
        plans.append(plan)
        launch(kernel, plan, *arguments)

    monkeypatch.setattr(triton_cross_entropy, "_launch", recording)
    yield plans
    assert int(gpu.tickets(CPU).abs().sum()) == 0, "a kernel did not put its tickets back"


# Of a tile of 512 logits (256 where more is kept of each): 256 and 257 classes are one tile and the first row for which
# it takes a larger one, 512 and 513 the next step, 1025 three to five chunks in a loop. 40 are whole accesses.
@pytest.mark.parametrize("name", ARGUMENT_SETS)
@pytest.mark.parametrize("classes", (40, 256, 257, 512, 513, 1025))
@pytest.mark.usefixtures("small_tiles")
def test_around_the_size_of_a_tile(classes: int, name: str, launches: list[Any]) -> None:
    seed(classes)
    rows = 5
    target = probabilities((rows, classes)) if name == "probabilities" else labels((rows,), classes, ignored=0)
    arguments = {**ARGUMENT_SETS[name](rows, classes), "ignore_index": -100 if name == "probabilities" else 0}
    learnable = ("class_scale", "class_bias") if name == "full" and classes % 2 == 1 else ()
    dtype = torch.bfloat16 if classes % 4 == 1 else torch.float32
    logits = (torch.randn(rows, classes) * 3).to(dtype)
    check(Case(logits, target, arguments, upstream="random", learnable=learnable), FORM)
    heavy = name in ("adjusted", "full", "probabilities")
    assert launches[0].constants[-1] == (classes <= (_LOGITS if heavy else 2 * _LOGITS)), "another path than meant"


@pytest.mark.parametrize("number", range(2000, 2050))
def test_random_combinations(number: int) -> None:
    """Others than test_cross_entropy_values.py draws."""
    check(random_case(number), FORM)


# Layouts of (N, C, D): neighbouring classes, neighbouring rows in groups, both strided. 64 rows are whole accesses.
@pytest.mark.parametrize("inner", (7, 64))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "every_second", "offset"))
@pytest.mark.usefixtures("small_tiles")
def test_inner_dimensions(layout: str, inner: int, launches: list[Any]) -> None:
    seed(inner)
    classes = 37
    logits, bias = torch.randn(2, classes, inner), torch.randn(classes)
    y, t = labels((2, inner), classes, ignored=1), probabilities((2, classes, inner))
    common: dict[str, Any] = {"class_bias": bias, "label_smoothing": 0.1}
    for target, more in ((y, {"ignore_index": 1, "reduction": "none"}), (t, {})):
        check(Case(logits, target, common | more, layout, upstream="random", learnable=("class_bias",)), FORM)
    unit, vector = launches[0].constants[:2]
    if layout == "contiguous":
        assert (unit, vector) == (tiles.ROWS, {7: 1, 64: 4}[inner])
    elif layout == "channels_last":
        assert unit == tiles.CLASSES


@pytest.mark.usefixtures("small_tiles")
def test_long_rows_that_hold_infinities() -> None:
    """In a running maximum -inf - -inf appears: lanes, chunks, rows of nothing else, and the label's own."""
    seed(1)
    logits = torch.randn(6, 1100) * 50
    logits[0, :1050] = -torch.inf  # all but the last chunk
    logits[1, 7:] = -torch.inf
    logits[2, ::2] = -torch.inf
    logits[3, :] = torch.finfo(torch.float32).min
    logits[3, 900] = 1.0
    logits[4, 0] = 1e4
    logits[5] = -torch.inf
    y = torch.tensor([1060, 3, 5, 900, 0, 1])
    for arguments in ({}, {"scale": 0.25, "z_loss": 1e-3}, {"focal_gamma": 0.5}, {"label_smoothing": 0.1}):
        with FORM.use():
            loss = ltk.functional.cross_entropy(logits, y, reduction="none", **arguments)
        with ltk.use_backend("reference"):
            expected = ltk.functional.cross_entropy(logits.double(), y, reduction="none", **arguments)
        assert loss[5].isnan() and expected[5].isnan()
        rows = [0, 1, 2, 4] if "label_smoothing" in arguments else [0, 1, 2, 3, 4]  # 1099 * 3e38 is too much for a sum
        torch.testing.assert_close(loss[rows].double(), expected[rows], rtol=1e-6, atol=1e-6)


@pytest.fixture(params=(0, 1))
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The order of a tile's dimensions: what Triton before 3.7 gets, and since."""
    import triton.language as tl

    for module in (tiles, sums, lade_kernels):
        monkeypatch.setattr(module, "ROW_AXIS", tl.constexpr(request.param))
    return int(request.param)


@pytest.mark.usefixtures("order")
def test_either_order_of_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "LOGITS", _LOGITS)
    for name in ARGUMENT_SETS:
        seed(3)
        for classes in (40, 1100):
            target = probabilities((4, classes)) if name == "probabilities" else labels((4,), classes)
            learnable = ("class_scale", "class_bias") if name == "full" else ()
            arguments = ARGUMENT_SETS[name](4, classes)
            check(Case(torch.randn(4, classes), target, arguments, learnable=learnable), FORM)


@pytest.mark.usefixtures("small_tiles")
def test_lade_in_many_tiles(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several chunks, chunks of several splits, more splits than are joined at a time; either order."""
    import test_lade
    import triton.language as tl

    monkeypatch.setattr(sums, "_NUMBERS", tl.constexpr(2))
    monkeypatch.setattr(lade_kernels, "FINISHED", tl.constexpr(4))
    monkeypatch.setattr(triton_lade, "multiprocessors", lambda device: 4)
    for shape in ((75, 13), (6, 600), (3, 19, 33)):
        seed(order)
        for kind in ("class", "sample"):
            y = labels((shape[0], *shape[2:]), shape[1], ignored=-100)
            y.view(-1)[0] = 0
            test_lade.check(torch.randn(shape), y, test_lade.arguments(kind, shape[1]), FORM)
    assert int(gpu.tickets(CPU).abs().sum()) == 0, "a kernel did not put its tickets back"


@pytest.mark.usefixtures("small_tiles")
def test_distillation_in_many_tiles(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several chunks and rows of several programs, of which there are more than are added at a time."""
    import test_distillation
    import triton.language as tl

    monkeypatch.setattr(sums, "_PARTIALS", tl.constexpr(2))
    monkeypatch.setattr(triton_distillation, "_LOGITS", _LOGITS // 2)
    monkeypatch.setattr(triton_distillation, "multiprocessors", lambda device: 4)
    for shape in ((53, 13), (3, 600), (3, 19, 17)):
        seed(order)
        z, t = (test_distillation.logits(*shape, dtype=torch.float32) for _ in range(2))
        for options in test_distillation.options_of(shape[1], (shape[0], *shape[2:]), torch.float32).values():
            actual = test_distillation.evaluate(FORM, z, t, **options)
            test_distillation.assert_near(actual, test_distillation.evaluate(None, z, t, **options), torch.float32)
    assert int(gpu.tickets(CPU).abs().sum()) == 0, "a kernel did not put its tickets back"


@pytest.mark.usefixtures("small_tiles")
def test_row_cross_entropy_in_many_tiles(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, with programs that finish their rows in several steps."""
    import row_cross_entropy_cases
    import triton.language as tl

    monkeypatch.setattr(sums, "_PARTIALS", tl.constexpr(2))
    monkeypatch.setattr(row_cross_entropy_labels, "FINISHED", tl.constexpr(4))
    monkeypatch.setattr(triton_row_cross_entropy, "_LOGITS", _LOGITS // 4)
    monkeypatch.setattr(triton_row_cross_entropy, "multiprocessors", lambda device: 1)
    for name in ("two labels with all", "gate of two labels", "seesaw", "off target, absent class", "equalization"):
        for rows, classes in ((23, 13), (3, 300)):
            seed(order)
            call = row_cross_entropy_cases.CALLS[name](rows, classes, torch.float32)
            row_cross_entropy_cases.check(call, FORM)
    assert int(gpu.tickets(CPU).abs().sum()) == 0, "a kernel did not put its tickets back"


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_more_programs_than_partial_sums_are_read_at_a_time(
    dtype: torch.dtype, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton.language as tl

    monkeypatch.setattr(sums, "_PARTIALS", tl.constexpr(4))
    monkeypatch.setattr(cross_entropy_kernels, "FINISHED", tl.constexpr(2))
    monkeypatch.setattr(tiles, "LOGITS", 64)
    seed(4)
    arguments: dict[str, Any] = {"class_bias": torch.randn(13), "label_smoothing": 0.2}
    check(Case(torch.randn(23, 13).to(dtype), labels((23,), 13), arguments, learnable=("class_bias",)), FORM)
    assert launches[0].programs > 4


def test_bad_labels_are_nan_and_reported() -> None:
    """Row 1 is out of range, or of a class that is not there; the others are right, and so is the next call."""
    seed(5)
    logits, bias = torch.randn(4, 9), torch.randn(9)
    bias[6] = -torch.inf
    for bad, dtype, error in (
        (9, torch.int64, IndexError),
        (-1, torch.int32, IndexError),
        (2**64 - 100, torch.uint64, IndexError),  # not ignore_index -100
        (6, torch.uint8, ValueError),
    ):
        y = torch.tensor([0, 1, 2, 3], dtype=torch.int64)
        expected = truth(Case(logits, y, {"class_bias": bias, "reduction": "none"}))
        y = torch.tensor([0, bad, 2, 3], dtype=dtype)
        x = logits.clone().requires_grad_()
        with FORM.use():
            loss = triton_cross_entropy.forward(
                x.detach(), y, None, None, bias, None, None, -100, 0, 0.0, 1.0, 0.0, False, False, 0.0, False
            )
            grads = triton_cross_entropy.backward(
                torch.ones(4), loss[1], logits, y, None, None, bias, None, None, -100, 0, 0.0, 1.0, 0.0, False, False,
                0.0, False, True, False, True,
            )  # fmt: skip
        good = [0, 2, 3]
        assert loss[0][1].isnan() and grads[0][1].isnan().all() and grads[2].isnan().all()
        torch.testing.assert_close(loss[0][good].double(), expected.loss[good])
        torch.testing.assert_close(grads[0][good].double(), expected.gradients["input"][good], rtol=1e-5, atol=1e-6)
        with pytest.raises(error):
            ltk.check()
        ltk.check()


def test_a_state_of_the_reference_is_refused() -> None:
    x, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
    state = torch.full((13,), -1.0)
    grads = triton_cross_entropy.backward(
        torch.ones(()), state, x, y, None, None, None, None, None, -100, 2, 0.0, 1.0, 0.0, False, False, 0.0, False,
        True, False, False,
    )  # fmt: skip
    assert grads[0].isnan().all()
    with pytest.raises(RuntimeError, match="state"):
        ltk.check()


@pytest.mark.usefixtures("small_tiles")
def test_the_same_bits_again_and_beside_other_rows() -> None:
    seed(6)
    arguments = {"class_bias": torch.randn(300), "reduction": "none"}
    case = Case(torch.randn(11, 300), labels((11,), 300), arguments, upstream="one", learnable=("class_bias",))
    first, again = evaluate(case, FORM), evaluate(case, FORM)
    assert torch.equal(first.loss, again.loss)
    assert all(torch.equal(first.gradients[name], again.gradients[name]) for name in first.gradients)
    alone = evaluate(Case(case.logits[7:9], case.target[7:9], arguments, upstream="one"), FORM)
    assert torch.equal(alone.loss, first.loss[7:9])
    assert torch.equal(alone.gradients["input"], first.gradients["input"][7:9])
    assert_right(first, truth(case), case, FORM)

"""Wrong calls of functional.cross_entropy: each raises at the call, naming argument, expected and found.

The texts are part of the interface and the same on every backend. After an error the arguments are as they were.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from cross_entropy_cases import INTEGERS, Form, cross_entropy, each_checking_form
from torch import Tensor

nan, inf = float("nan"), float("inf")


def _call(**changes: Any) -> dict[str, Any]:
    """A correct call of 3 rows and 4 classes, changed."""
    logits = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
    return {"input": logits, "target": torch.tensor([0, 1, 3])} | changes


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


ROWS = torch.full((3, 4), 0.25)
META = torch.zeros(4, device="meta")


def _probabilities(row: int, column: int, value: float) -> Tensor:
    return ROWS.clone().index_put((torch.tensor(row), torch.tensor(column)), torch.tensor(value))


class Wrong(NamedTuple):
    """A call that is wrong in one thing, and what is said about it."""

    name: str
    exception: type[Exception]
    argument: str  # that the message names
    message: str
    changes: dict[str, Any]


def wrong(name: str, exception: type[Exception], argument: str, expected: str, found: str, **changes: Any) -> Wrong:
    return Wrong(name, exception, argument, f"{argument}: expected {expected}, found {found}", changes)


# What several messages expect
FLOATING = "float64, float32, bfloat16 or float16"
LOGITS_SHAPE = "shape (C,), (N, C) or (N, C, ...) with C >= 1"
CLASS_SHAPE = "shape (4,), one value a class"
LABELS = "labels in [0, 4) or ignore_index -100"
PRESENT = "labels of classes with a finite class_bias"
PROBABILITIES = "finite probabilities >= 0"
FRACTION = "a finite number >= 0 and <= 1"
ABOVE_0 = "a finite number > 0"
FROM_0 = "a finite number >= 0"
VALUES_FROM_0 = "finite values >= 0"
TENSOR = "a torch.Tensor"
FLOATING_TYPE = "a floating type"
DEVICE = "device cpu as input's"
NO_MARGIN = "None with probability targets, which have no single target class"
DENOMINATOR = "'weight', or with reduction='mean' 'count', a number or a 0-d tensor"
TARGET_TYPE = "labels of an integer type or floating probabilities"
THREE_LABELS = "labels of shape (3,) for input of shape (3, 4)"

WRONG = [
    # input
    wrong("list", TypeError, "input", TENSOR, "list", input=[[1.0, 2.0]]),
    wrong("integers", TypeError, "input", FLOATING, "torch.int64", input=torch.zeros(3, 4, dtype=torch.int64)),
    wrong("complex", TypeError, "input", FLOATING, "torch.complex64", input=torch.zeros(3, 4, dtype=torch.complex64)),
    wrong("bool", TypeError, "input", FLOATING, "torch.bool", input=torch.zeros(3, 4, dtype=torch.bool)),
    wrong("0-d", ValueError, "input", LOGITS_SHAPE, "()", input=torch.tensor(1.0)),
    wrong("no class", ValueError, "input", LOGITS_SHAPE, "(3, 0)", input=torch.zeros(3, 0)),
    # target
    wrong("target list", TypeError, "target", TENSOR, "list", target=[0, 1, 3]),
    wrong("bool labels", TypeError, "target", TARGET_TYPE, "torch.bool", target=torch.ones(3, dtype=torch.bool)),
    wrong("too few labels", ValueError, "target", THREE_LABELS, "(2,)", target=torch.tensor([0, 1])),
    wrong("labels in a column", ValueError, "target", THREE_LABELS, "(3, 1)", target=torch.tensor([[0], [1], [3]])),
    wrong("integer one-hot", ValueError, "target", THREE_LABELS, "(3, 4)", target=torch.zeros(3, 4, dtype=torch.int64)),
    wrong(
        "a label for (C,)",
        ValueError,
        "target",
        "labels of shape () for input of shape (4,)",
        "(1,)",
        input=torch.zeros(4),
        target=torch.tensor([1]),
    ),
    wrong(
        "labels of pixels",
        ValueError,
        "target",
        "labels of shape (2, 5) for input of shape (2, 4, 5)",
        "(2, 4)",
        input=torch.zeros(2, 4, 5),
        target=torch.zeros(2, 4, dtype=torch.int64),
    ),
    wrong(
        "floating labels",
        ValueError,
        "target",
        "probabilities of input's shape (3, 4)",
        "(3,) of torch.float32 (labels need an integer type)",
        target=_vector(0.0, 1.0, 3.0),
    ),
    wrong(
        "target elsewhere",
        ValueError,
        "target",
        DEVICE,
        "meta",
        target=torch.zeros(3, dtype=torch.int64, device="meta"),
    ),
    wrong(
        "input elsewhere", ValueError, "target", "device meta as input's", "cpu", input=torch.zeros(3, 4, device="meta")
    ),
    wrong("label C", IndexError, "target", LABELS, "4 at row 1", target=torch.tensor([0, 4, 1])),
    wrong("label -1", IndexError, "target", LABELS, "-1 at row 2", target=torch.tensor([0, 1, -1])),
    wrong(
        "-100 is a label",
        IndexError,
        "target",
        "labels in [0, 4) or ignore_index 2",
        "-100 at row 0",
        target=torch.tensor([-100, 1, 0]),
        ignore_index=2,
    ),
    wrong(
        "pixel",
        IndexError,
        "target",
        LABELS,
        "9 at row 7",
        input=torch.zeros(2, 4, 2, 3),
        target=torch.tensor([[[0, 0, 0], [0, 0, 0]], [[0, 9, 0], [0, 0, 0]]]),
    ),
    wrong(
        "uint64 above int64",
        IndexError,
        "target",
        LABELS,
        f"{2**63 + 5} at row 2",
        target=torch.tensor([0, 1, 2**63 + 5], dtype=torch.uint64),
    ),
    wrong(
        "uint64 that is -100 as int64",
        IndexError,
        "target",
        LABELS,
        f"{2**64 - 100} at row 1",
        target=torch.tensor([0, 2**64 - 100, 1], dtype=torch.uint64),
    ),
    wrong(
        "label of an absent class",
        ValueError,
        "target",
        PRESENT,
        "class 3 with class_bias -inf (a class without training samples)",
        class_bias=_vector(0, 0, 0, -inf),
    ),
    wrong(
        "probability NaN",
        ValueError,
        "target",
        PROBABILITIES,
        "nan at row 1, class 2",
        target=_probabilities(1, 2, nan),
    ),
    wrong(
        "probability negative",
        ValueError,
        "target",
        PROBABILITIES,
        "-0.5 at row 2, class 0",
        target=_probabilities(2, 0, -0.5),
    ),
    wrong(
        "probability infinite",
        ValueError,
        "target",
        PROBABILITIES,
        "inf at row 0, class 3",
        target=_probabilities(0, 3, inf),
    ),
    wrong(
        "probability of an absent class",
        ValueError,
        "target",
        "probability 0 for a class with class_bias -inf",
        "0.25 at row 0, class 1",
        target=ROWS,
        class_bias=_vector(0, -inf, 0, 0),
    ),
    # class vectors
    wrong("weight list", TypeError, "weight", TENSOR, "list", weight=[1.0, 1.0, 1.0, 1.0]),
    wrong("weight number", TypeError, "weight", TENSOR, "float", weight=2.0),
    wrong(
        "weight integers", TypeError, "weight", FLOATING_TYPE, "torch.int64", weight=torch.ones(4, dtype=torch.int64)
    ),
    wrong("weight too short", ValueError, "weight", CLASS_SHAPE, "(3,)", weight=torch.ones(3)),
    wrong("weight 2-d", ValueError, "weight", CLASS_SHAPE, "(1, 4)", weight=torch.ones(1, 4)),
    wrong("weight 0-d", ValueError, "weight", CLASS_SHAPE, "()", weight=torch.tensor(1.0)),
    wrong("weight elsewhere", ValueError, "weight", DEVICE, "meta", weight=META),
    wrong("weight negative", ValueError, "weight", VALUES_FROM_0, "-0.5 at index 2", weight=_vector(1, 1, -0.5, 1)),
    wrong("weight NaN", ValueError, "weight", VALUES_FROM_0, "nan at index 0", weight=_vector(nan, 1, 1, 1)),
    wrong("weight infinite", ValueError, "weight", VALUES_FROM_0, "inf at index 3", weight=_vector(1, 1, 1, inf)),
    wrong(
        "class_scale integers",
        TypeError,
        "class_scale",
        FLOATING_TYPE,
        "torch.int32",
        class_scale=torch.ones(4, dtype=torch.int32),
    ),
    wrong("class_scale too long", ValueError, "class_scale", CLASS_SHAPE, "(5,)", class_scale=torch.ones(5)),
    wrong(
        "class_scale NaN",
        ValueError,
        "class_scale",
        "finite values",
        "nan at index 1",
        class_scale=_vector(1, nan, 1, 1),
    ),
    wrong(
        "class_scale infinite",
        ValueError,
        "class_scale",
        "finite values",
        "-inf at index 2",
        class_scale=_vector(1, 1, -inf, 1),
    ),
    wrong("class_scale elsewhere", ValueError, "class_scale", DEVICE, "meta", class_scale=META),
    wrong("class_bias number", TypeError, "class_bias", TENSOR, "float", class_bias=0.5),
    wrong("class_bias per row", ValueError, "class_bias", CLASS_SHAPE, "(3, 4)", class_bias=torch.zeros(3, 4)),
    wrong(
        "class_bias +inf",
        ValueError,
        "class_bias",
        "finite values or -inf",
        "inf at index 2",
        class_bias=_vector(0, 0, inf, 0),
    ),
    wrong(
        "class_bias NaN",
        ValueError,
        "class_bias",
        "finite values or -inf",
        "nan at index 3",
        class_bias=_vector(0, 0, 0, nan),
    ),
    wrong("class_bias elsewhere", ValueError, "class_bias", DEVICE, "meta", class_bias=META),
    wrong("class_margin text", TypeError, "class_margin", "a torch.Tensor or a number", "str", class_margin="0.5"),
    wrong("class_margin bool", TypeError, "class_margin", "a torch.Tensor or a number", "bool", class_margin=True),
    wrong("class_margin too long", ValueError, "class_margin", CLASS_SHAPE, "(5,)", class_margin=torch.ones(5)),
    wrong("class_margin (1,)", ValueError, "class_margin", CLASS_SHAPE, "(1,)", class_margin=torch.ones(1)),
    wrong("class_margin NaN", ValueError, "class_margin", "finite values", "nan at index 0", class_margin=nan),
    wrong(
        "class_margin infinite",
        ValueError,
        "class_margin",
        "finite values",
        "inf at index 1",
        class_margin=_vector(0, inf, 0, 0),
    ),
    wrong("class_margin elsewhere", ValueError, "class_margin", DEVICE, "meta", class_margin=META),
    wrong(
        "class_margin with probabilities", ValueError, "class_margin", NO_MARGIN, "float", target=ROWS, class_margin=0.5
    ),
    # sample_weight
    wrong("sample_weight list", TypeError, "sample_weight", TENSOR, "list", sample_weight=[1.0, 1.0, 1.0]),
    wrong(
        "sample_weight integers",
        TypeError,
        "sample_weight",
        FLOATING_TYPE,
        "torch.int64",
        sample_weight=torch.ones(3, dtype=torch.int64),
    ),
    wrong(
        "sample_weight a class",
        ValueError,
        "sample_weight",
        "shape (3,), one value a row",
        "(4,)",
        sample_weight=torch.ones(4),
    ),
    wrong(
        "sample_weight negative",
        ValueError,
        "sample_weight",
        VALUES_FROM_0,
        "-1 at index 1",
        sample_weight=_vector(1, -1, 1),
    ),
    wrong(
        "sample_weight NaN",
        ValueError,
        "sample_weight",
        VALUES_FROM_0,
        "nan at index 2",
        sample_weight=_vector(1, 1, nan),
    ),
    wrong("sample_weight elsewhere", ValueError, "sample_weight", DEVICE, "meta", sample_weight=META[:3]),
    # numbers
    wrong("label_smoothing above 1", ValueError, "label_smoothing", FRACTION, "1.5", label_smoothing=1.5),
    wrong("label_smoothing negative", ValueError, "label_smoothing", FRACTION, "-0.1", label_smoothing=-0.1),
    wrong("label_smoothing NaN", ValueError, "label_smoothing", FRACTION, "nan", label_smoothing=nan),
    wrong("label_smoothing text", TypeError, "label_smoothing", "a number", "str", label_smoothing="0.1"),
    wrong(
        "label_smoothing list", TypeError, "label_smoothing", "a number", "list", label_smoothing=[0.1, 0.1, 0.1, 0.1]
    ),
    wrong("label_smoothing bool", TypeError, "label_smoothing", "a number", "bool", label_smoothing=True),
    wrong("scale zero", ValueError, "scale", ABOVE_0, "0.0", scale=0.0),
    wrong("scale negative", ValueError, "scale", ABOVE_0, "-30.0", scale=-30),
    wrong("scale infinite", ValueError, "scale", ABOVE_0, "inf", scale=inf),
    wrong("scale NaN", ValueError, "scale", ABOVE_0, "nan", scale=nan),
    wrong("scale tensor", TypeError, "scale", "a number", "Tensor", scale=torch.tensor(30.0)),
    wrong("scale None", TypeError, "scale", "a number", "NoneType", scale=None),
    wrong("focal_gamma negative", ValueError, "focal_gamma", FROM_0, "-1.0", focal_gamma=-1.0),
    wrong("focal_gamma infinite", ValueError, "focal_gamma", FROM_0, "inf", focal_gamma=inf),
    wrong("z_loss negative", ValueError, "z_loss", FROM_0, "-0.0001", z_loss=-1e-4),
    wrong("z_loss complex", TypeError, "z_loss", "a number", "complex", z_loss=1j),
    wrong("ignore_index float", TypeError, "ignore_index", "an integer", "1.0", ignore_index=1.0),
    wrong("ignore_index bool", TypeError, "ignore_index", "an integer", "True", ignore_index=True),
    wrong("ignore_index None", TypeError, "ignore_index", "an integer", "None", ignore_index=None),
    wrong(
        "ignore_index beyond int64", ValueError, "ignore_index", "an integer of 64 bits", f"{2**63}", ignore_index=2**63
    ),
    # options
    wrong("reduction", ValueError, "reduction", "'none' or 'mean' or 'sum'", "'average'", reduction="average"),
    wrong("reduction None", ValueError, "reduction", "'none' or 'mean' or 'sum'", "None", reduction=None),
    wrong("focal_pt", ValueError, "focal_pt", "'raw' or 'weighted'", "'soft'", focal_pt="soft"),
    wrong("focal_grad", ValueError, "focal_grad", "'full' or 'detached'", "False", focal_grad=False),
    wrong("empty", ValueError, "empty", "'nan' or 'zero'", "0", empty=0),
    wrong(
        "denominator text", ValueError, "denominator", "'weight' or 'count' or a number", "'batch'", denominator="batch"
    ),
    wrong(
        "denominator 'given'",
        ValueError,
        "denominator",
        "'weight' or 'count' or a number",
        "'given'",
        denominator="given",
    ),
    wrong("denominator zero", ValueError, "denominator", ABOVE_0, "0.0", denominator=0.0),
    wrong("denominator negative", ValueError, "denominator", ABOVE_0, "-3.0", denominator=-3),
    wrong("denominator NaN", ValueError, "denominator", ABOVE_0, "nan", denominator=nan),
    wrong("denominator bool", TypeError, "denominator", "a number", "bool", denominator=True),
    wrong("denominator None", TypeError, "denominator", "a number", "NoneType", denominator=None),
    wrong(
        "denominator 1-d",
        ValueError,
        "denominator",
        DENOMINATOR,
        "a tensor of shape (3,) with reduction='mean'",
        denominator=torch.ones(3),
    ),
    wrong(
        "denominator of a sum",
        ValueError,
        "denominator",
        "the default 'weight' with reduction='sum'",
        "'count'",
        denominator="count",
        reduction="sum",
    ),
    wrong(
        "denominator of rows",
        ValueError,
        "denominator",
        "the default 'weight' with reduction='none'",
        "8.0",
        denominator=8.0,
        reduction="none",
    ),
    wrong(
        "0-d denominator of a sum",
        ValueError,
        "denominator",
        DENOMINATOR,
        "a tensor of shape () with reduction='sum'",
        denominator=torch.tensor(8.0),
        reduction="sum",
    ),
]

TENSORS = ("input", "target", "weight", "class_scale", "class_bias", "class_margin", "sample_weight")


@each_checking_form
@pytest.mark.parametrize("case", WRONG, ids=[case.name for case in WRONG])
def test_a_wrong_call(case: Wrong, form: Form) -> None:
    call = _call(**case.changes)
    before = {name: call[name].clone() for name in TENSORS if isinstance(call.get(name), Tensor)}
    with form.use():
        with pytest.raises(case.exception) as raised:
            cross_entropy(**call)
        assert type(raised.value) is case.exception
        assert str(raised.value) == case.message
        for name, value in before.items():
            if value.device.type != "meta":
                assert torch.equal(call[name].nan_to_num(7.0), value.nan_to_num(7.0)), f"{name} was changed"
        # Nothing is left behind: the next correct call works, and its gradient too.
        good = _call()
        loss = cross_entropy(**good)
        loss.backward()
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(good["input"], good["target"]))
        assert good["input"].grad.isfinite().all()


def test_the_table_is_about_what_it_says() -> None:
    """Many calls, each message naming the argument that was changed; an input elsewhere is found out at the target."""
    assert len(WRONG) >= 95 and len({case.name for case in WRONG}) == len(WRONG)
    for case in WRONG:
        assert case.argument in case.changes or case.name in ("input elsewhere", "label of an absent class"), case.name


@each_checking_form
@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda dtype: str(dtype)[6:])
def test_labels_out_of_range_of_every_integer_type(dtype: torch.dtype, form: Form) -> None:
    """One past the end, the type's largest number and, where it has a sign, -1 and the smallest."""
    limits = torch.iinfo(dtype)
    largest = 2**64 - 1 if dtype == torch.uint64 else limits.max
    for label in (4, largest, *((-1, limits.min) if limits.min < 0 else ())):
        target = torch.tensor([0, 1, label], dtype=dtype)
        message = f"target: expected labels in [0, 4) or ignore_index -100, found {label} at row 2"
        with form.use(), pytest.raises(IndexError, match=re.escape(message)):
            cross_entropy(_call()["input"], target)


@each_checking_form
@pytest.mark.parametrize("rows", [1, 300])
def test_errors_are_found_in_any_row_and_on_any_thread(rows: int, form: Form) -> None:
    """The first bad row is the one that is named."""
    x = torch.zeros(rows, 1000, requires_grad=True)
    y = torch.zeros(rows, dtype=torch.int64)
    y[rows // 2 :] = 1000
    torch.set_num_threads(2)
    with form.use():
        with pytest.raises(IndexError, match=rf"found 1000 at row {rows // 2}$"):
            cross_entropy(x, y)
        t = torch.full((rows, 1000), 1e-3)
        t[rows // 2 :, 999] = nan
        with pytest.raises(ValueError, match=rf"found nan at row {rows // 2}, class 999$"):
            cross_entropy(x, t)


@each_checking_form
def test_numbers_of_every_kind_are_numbers(form: Form) -> None:
    """What is not an error: NumPy's scalars, fractions, integers."""
    from fractions import Fraction

    import numpy as np

    call = _call()
    with form.use():
        expected = cross_entropy(**call, scale=2.0, label_smoothing=0.5, focal_gamma=1.0)
        for two, half, one in ((2, Fraction(1, 2), 1), (np.float32(2), np.float64(0.5), np.int64(1))):
            assert torch.equal(cross_entropy(**call, scale=two, label_smoothing=half, focal_gamma=one), expected)
        assert cross_entropy(**call, ignore_index=np.int64(3)) == cross_entropy(**call, ignore_index=3)

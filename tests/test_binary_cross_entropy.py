"""binary_cross_entropy: the reference against the formula of the docstring, every backend against the reference.

The shapes are those where kernels change their path: one class, an odd number, rows longer than a block of 1024 columns
and than a GPU's block holds (5000).
"""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import pytest
import torch
from cross_entropy_cases import FORMS, GPU_BACKENDS, LAYOUTS, Form, each_checking_form, each_form, relative_error
from torch import Tensor

import ltkernels as ltk
from ltkernels.ops.binary_cross_entropy import OP

bce = ltk.functional.binary_cross_entropy
EMULATED = bool(os.environ.get("LTK_EMULATED_CUDA") or os.environ.get("TRITON_INTERPRET"))


def philox_words(position: int, epoch: int, stream: int, seed: int) -> list[int]:
    """Philox4x32-10, written out again."""
    low = 0xFFFFFFFF
    c = [position & low, position >> 32, epoch, stream]
    k = [seed & low, (seed >> 32) & low]
    for _ in range(10):
        even, odd = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(odd >> 32) ^ c[1] ^ k[0], odd & low, (even >> 32) ^ c[3] ^ k[1], even & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def by_hand(x: Tensor, target: Tensor, **o: Any) -> list[float]:
    """Row losses of float64 logits, element by element in Python numbers."""
    columns = x.shape[1]
    gamma = o.get("focal_gamma", 0.0)
    gamma_pos, gamma_neg = gamma if isinstance(gamma, tuple) else (gamma, gamma)
    alpha, clip, threshold = o.get("focal_alpha"), o.get("clip", 0.0), o.get("score_threshold")
    losses = []
    for i, row in enumerate(x.tolist()):
        if target.dim() == 2:
            t = target[i].double().tolist()
            background, factor = not any(t), 1.0
        else:
            y = int(target[i])
            t = [float(j == y) for j in range(columns)]
            background = y == o.get("background_index")
            factor = float(o["weight"][y]) if "weight" in o and 0 <= y < columns else 1.0
            if y == o.get("ignore_index", -100):
                losses.append(0.0)
                continue
        if "sample_weight" in o:
            factor *= float(o["sample_weight"][i])
        total = 0.0
        for j, z in enumerate(row):
            p = 1.0 / (1.0 + math.exp(-z))
            positive = -math.log(p) * (1.0 - p) ** gamma_pos * (1.0 if alpha is None else alpha)
            q = max(p - clip, 0.0)
            negative = -math.log(1.0 - q) * q**gamma_neg * (1.0 if alpha is None else 1.0 - alpha)
            keep = o.get("background_keep" if background else "foreground_keep")
            if keep is not None and not (threshold is not None and p >= threshold):
                by_row = o.get("draws") == "row"
                position = i if by_row else i * -(-columns // 4) + j // 4
                word = philox_words(position, o.get("step", 0), 5, o.get("seed", 0))[0 if by_row else j % 4]
                negative *= (word >> 8) / 2**24 < float(keep[j])
            positive *= float(o["pos_weight"][j]) if "pos_weight" in o else 1.0
            negative *= float(o["neg_weight"][j]) if "neg_weight" in o else 1.0
            total += factor * (t[j] * positive + (1.0 - t[j]) * negative)
        losses.append(total)
    return losses


def options(classes: int, rows: int, dtype: torch.dtype = torch.float64) -> dict[str, dict[str, Any]]:
    """The forms of the family, by name."""
    generator = torch.Generator().manual_seed(classes + rows)

    def values(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64).to(dtype)

    rare = (values(classes) < 0.5).to(dtype)
    return {
        "plain": {},
        "weights": {"pos_weight": values(classes) + 0.5, "neg_weight": values(classes), "sample_weight": values(rows)},
        "class_balanced": {"weight": values(classes) + 0.1, "focal_gamma": 1.0},
        "focal": {"focal_gamma": 2.0, "focal_alpha": 0.25},
        "focal_fraction": {"focal_gamma": (0.5, 1.7)},
        "asymmetric": {"focal_gamma": (0.0, 4.0), "clip": 0.05},
        "asymmetric_fraction": {"focal_gamma": (1.5, 0.5), "clip": 0.2},
        "clip": {"clip": 0.1},
        "equalization": {"foreground_keep": 1.0 - rare},
        "drop": {
            "foreground_keep": 1.0 - rare, "background_keep": 1.0 - 0.6 * rare, "seed": -5, "step": 3,
            "focal_gamma": (0.0, 1.0),
        },
        "suppression": {
            "foreground_keep": torch.zeros(classes, dtype=dtype), "background_keep": values(classes),
            "score_threshold": 0.7, "draws": "row", "seed": 11,
        },
    }  # fmt: skip


NAMES = tuple(options(3, 3))
KEEPS = ("equalization", "drop", "suppression")


def a_batch(rows: int, classes: int, seed: int = 0, background: bool = True) -> tuple[Tensor, Tensor]:
    """Logits exact in bfloat16; labels with background (C) and an ignored row among them."""
    torch.default_generator.manual_seed(seed)
    x = (torch.randn(rows, classes, dtype=torch.float64) * 3.0).bfloat16().double()
    y = torch.randint(classes, (rows,))
    if background:
        y[1::3] = classes
    if rows > 4:
        y[4] = -100
    return x, y


def arguments(name: str, classes: int, rows: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    chosen = dict(options(classes, rows, dtype)[name])
    return {"background_index": classes, **chosen}


def multi_hot(y: Tensor, classes: int) -> Tensor:
    t = torch.rand(len(y), classes) < 0.3
    t[y == classes] = False
    return t


# --- The definition ---


@pytest.mark.parametrize("hot", [False, True], ids=["labels", "multi_hot"])
@pytest.mark.parametrize("name", NAMES)
def test_the_formula(name: str, hot: bool) -> None:
    x, y = a_batch(9, 7)
    o = arguments(name, 7, 9)
    target: Tensor = y
    if hot:
        o.pop("weight", None)
        target = multi_hot(y, 7)
    with ltk.use_backend("reference"):
        rows = bce(x, target, reduction="none", **o)
        mean = bce(x, target, **o)
        elements = bce(x, target, denominator="elements", **o)
    expected = torch.tensor(by_hand(x, target, **o), dtype=torch.float64)
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)
    count = 9 if hot else 8
    torch.testing.assert_close(mean, expected.sum() / count, rtol=1e-12, atol=0)
    torch.testing.assert_close(elements, expected.sum() / count / 7, rtol=1e-12, atol=0)


def test_torch_itself() -> None:
    x, _ = a_batch(6, 5)
    t, pos = torch.rand(6, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(x, t, pos_weight=pos)
    torch.testing.assert_close(bce(x, t, pos_weight=pos, denominator="elements"), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_the_reference(name: str) -> None:
    x, y = a_batch(6, 5)
    x = x * 0.5 + 0.01  # away from the kinks of a clip and a threshold
    o = arguments(name, 5, 6)
    with ltk.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda x: bce(x, y, **o), x.requires_grad_())
        assert torch.autograd.gradgradcheck(lambda x: bce(x, y, reduction="none", **o), x)


def test_what_is_drawn_is_as_often_as_asked() -> None:
    x, y = torch.zeros(2000, 6), torch.full((2000,), 6)
    keep = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0, 0.25])
    _, sums = bce(x, y, background_index=6, background_keep=keep, column_sums=True)
    assert torch.allclose(sums[1] / 1000.0, keep, atol=0.04)  # sigmoid(0) = 1/2; 3 standard deviations are 0.034
    assert sums[1, 0] == 0 and sums[1, 4] == 1000
    again = [bce(x, y, background_index=6, background_keep=keep, seed=s, step=t) for s, t in ((0, 0), (0, 1), (1, 0))]
    assert again[0] != again[1] and again[0] != again[2]


# --- Every backend ---


def compare(form: Form, x: Tensor, target: Tensor, o: dict[str, Any], dtype: torch.dtype, layout: str = "contiguous",
            reduction: str = "mean") -> None:  # fmt: skip
    """Loss, gradient under a random upstream and column sums against the reference in float64."""
    o = {"reduction": reduction, **o}
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    exact = x.to(dtype).double().requires_grad_()
    narrowed = {k: v.to(computed) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in o.items()}
    widened = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in narrowed.items()}
    exact_target = target.double() if target.is_floating_point() else target
    with ltk.use_backend("reference"):
        loss, sums = bce(exact, exact_target, column_sums=True, **widened)
        upstream = torch.rand_like(loss) + 0.5
        (gradient,) = torch.autograd.grad(loss, exact, upstream)
    moved = {k: v.to(form.device) if isinstance(v, Tensor) else v for k, v in narrowed.items()}
    z = LAYOUTS[layout](x.to(dtype)).to(form.device).detach().requires_grad_()
    to = target.to(form.device)
    with form.use():
        found, found_sums = bce(z, to, column_sums=True, **moved)
        (found_gradient,) = torch.autograd.grad(found, z, upstream.to(found), retain_graph=True)
        alone = bce(z, to, **moved)
        (again,) = torch.autograd.grad(alone, z, upstream.to(found))
        with torch.no_grad():
            assert torch.equal(bce(z, to, **moved), alone.detach())
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 3e-6)
    assert found.dtype == computed and found_gradient.dtype == dtype and found_sums.dtype == computed
    assert torch.equal(alone, found) and torch.equal(again, found_gradient)
    assert relative_error(found.cpu(), loss, 1e-12) <= tolerance
    # Half gradients are rounded once from float32.
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, tolerance)
    assert relative_error(found_gradient.cpu(), gradient, 1e-6 if dtype == torch.float16 else 1e-12) <= rounding
    assert relative_error(found_sums.cpu(), sums, 1e-12) <= tolerance


@pytest.mark.parametrize("hot", [False, True], ids=["labels", "multi_hot"])
@pytest.mark.parametrize("name", NAMES)
@each_form
def test_forms(form: Form, name: str, hot: bool) -> None:
    for (rows, classes), dtype in itertools.product(((7, 1), (5, 19), (9, 130)), (torch.float32, torch.float64)):
        x, y = a_batch(rows, classes, seed=classes)
        o = arguments(name, classes, rows)
        target: Tensor = y
        if hot:
            o.pop("weight", None)
            target = multi_hot(y, classes)
        compare(form, x, target, o, dtype, reduction=("mean", "sum", "none")[classes % 3])


@pytest.mark.parametrize("classes", [1023, 1025, 5003])
@pytest.mark.parametrize("name", ["weights", "focal", "asymmetric", "drop"])
@each_form
def test_long_rows(form: Form, name: str, classes: int) -> None:
    x, y = a_batch(5, classes)
    compare(form, x, y, arguments(name, classes, 5), torch.float32)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@each_form
def test_layouts_and_types(form: Form, dtype: torch.dtype, layout: str) -> None:
    x, y = a_batch(18, 37)
    compare(form, x, y, arguments("focal", 37, 18), dtype, layout)
    compare(form, x, y, arguments("drop", 37, 18), dtype, layout, "none")
    soft = torch.rand(18, 37).bfloat16()  # exact in every type
    compare(form, x, soft, {"pos_weight": torch.rand(37)}, dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@each_form
def test_more_dimensions(form: Form, layout: str) -> None:
    x, y = torch.randn(3, 5, 4).double(), torch.randint(6, (3, 4))
    o: dict[str, Any] = {"background_index": 5, "focal_gamma": 2.0, "background_keep": torch.rand(5)}
    compare(form, x, y, {**o, "sample_weight": torch.rand(3, 4)}, torch.float32, layout, "none")
    compare(form, x, torch.rand(3, 5, 4), {}, torch.float32, layout)
    with form.use():
        four = bce(x.reshape(3, 5, 2, 2).to(form.device), y.reshape(3, 2, 2).to(form.device), reduction="none",
                   background_index=5)  # fmt: skip
        flat = bce(x.to(form.device), y.to(form.device), reduction="none", background_index=5)
        assert torch.equal(four.reshape(3, 4), flat)
        one = bce(x[0, :, 0].to(form.device), y[0, 0].to(form.device), background_index=5)
        torch.testing.assert_close(one, flat[0, 0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.uint64], ids=str)
@each_form
def test_labels_of_any_integer_type(form: Form, dtype: torch.dtype) -> None:
    x, y = a_batch(8, 11)
    y[4] = 100
    o = {"background_index": 11, "ignore_index": 100}
    with form.use():
        expected = bce(x.to(form.device), y.to(form.device), **o)
        assert torch.equal(bce(x.to(form.device), y.to(form.device, dtype), **o), expected)


@each_form
def test_infinite_and_nan_logits(form: Form) -> None:
    z = torch.tensor([[math.inf, -math.inf, 0.5], [-math.inf, math.inf, 0.5], [math.nan, 0.0, 0.0]])
    z = z.to(form.device).requires_grad_()
    y = torch.tensor([0, 0, 1], device=form.device)
    for o in ({}, {"focal_gamma": 2.0}, {"focal_gamma": 0.5}, {"focal_gamma": (0.0, 1.5), "clip": 0.05}):
        with form.use():
            loss = bce(z, y, reduction="none", **o)
            (gradient,) = torch.autograd.grad(loss.sum(), z)
        # A positive at inf and a negative at -inf cost nothing.
        assert torch.isfinite(loss[0]) and loss[1] == math.inf and loss[2].isnan()
        assert gradient[0, :2].tolist() == [0.0, 0.0] and gradient[1, 0] == -1.0
        assert gradient[1, 1] == (0.0 if "clip" in o else 1.0)
        assert gradient[2, 0].isnan() and torch.isfinite(gradient[:2]).all() and torch.isfinite(gradient[2, 1:]).all()
        with form.use():  # without weight there is no infinity
            assert bce(z, y, reduction="none", pos_weight=torch.zeros(3, device=form.device),
                       neg_weight=torch.zeros(3, device=form.device), **o)[1] == 0.0  # fmt: skip


@each_form
def test_large_logits_do_not_overflow(form: Form) -> None:
    """The published class-balanced focal factor does: exp(-g t z - g log1p(exp(-z))) is 0 on a positive at -100."""
    z = torch.tensor([[-100.0, 100.0, -90.0]], device=form.device)
    with form.use():
        loss = bce(z, torch.tensor([0], device=form.device), focal_gamma=1.0)
        torch.testing.assert_close(loss.cpu(), torch.tensor(200.0))


@each_form
def test_small_losses_keep_their_digits(form: Form) -> None:
    z = torch.tensor([[-12.0, -25.0, -40.0]], device=form.device)
    expected = torch.tensor([math.log1p(math.exp(v)) for v in (-12.0, -25.0, -40.0)]).sum()
    with form.use():
        torch.testing.assert_close(
            bce(z, torch.tensor([3], device=form.device), background_index=3).cpu(), expected, rtol=1e-6, atol=0
        )
        small = bce(z[:, 2:], torch.tensor([1], device=form.device), background_index=1)
        torch.testing.assert_close(small.cpu(), torch.tensor(math.exp(-40.0)), rtol=1e-6, atol=0)


@each_form
def test_empty_batches_and_ignored_rows(form: Form) -> None:
    x = torch.full((3, 4), torch.nan, device=form.device, requires_grad=True)
    y = torch.full((3,), -100, device=form.device)
    with form.use():
        assert bce(x, y).isnan() and bce(x[:0], y[:0]).isnan()
        loss, sums = bce(x, y, empty="zero", column_sums=True)
        assert loss == 0 and (sums == 0).all()
        assert (torch.autograd.grad(loss, x)[0] == 0).all()
        assert bce(x, y, reduction="none").tolist() == [0.0] * 3
        loss, sums = bce(x[:0], y[:0], empty="zero", column_sums=True)
        assert loss == 0 and (sums == 0).all() and bce(x[:0], y[:0], reduction="none").shape == (0,)


@each_form
def test_denominators(form: Form) -> None:
    x, y = a_batch(8, 3)
    x, y = x.float().to(form.device), y.to(form.device)
    with form.use():
        total = bce(x, y, reduction="sum", background_index=3)
        for denominator in (4.0, torch.tensor(4.0, device=form.device)):
            found = bce(x, y, denominator=denominator, background_index=3)
            torch.testing.assert_close(found, total / 4)
        zero = torch.tensor(0.0, device=form.device)
        assert bce(x, y, denominator=zero, empty="zero", background_index=3) == 0


@each_form
def test_the_step_may_be_on_the_device(form: Form) -> None:
    x, y = a_batch(8, 9)
    x, y = x.float().to(form.device), torch.full((8,), 9, device=form.device)
    keep = torch.full((9,), 0.5, device=form.device)
    with form.use():
        for step in (0, 7, 2**32 - 1):
            there = torch.tensor(step, device=form.device)
            calls = [bce(x, y, background_index=9, background_keep=keep, step=s) for s in (step, there)]
            assert torch.equal(*calls)


def test_threads_do_not_change_a_bit(threads: Any) -> None:
    x, y = a_batch(400, 300)
    x = x.float().requires_grad_()
    o = {k: v.float() if isinstance(v, Tensor) else v for k, v in arguments("drop", 300, 400).items()}

    def results() -> list[Tensor]:
        loss, sums = bce(x, y, column_sums=True, **o)
        return [loss, sums, *torch.autograd.grad(loss, x)]

    once = results()
    with threads(2):
        assert all(torch.equal(a, b) for a, b in zip(once, results(), strict=True))


# --- The machinery ---

# It is the same for all backends, and emulated kernels take long.
each_form_of_machinery = pytest.mark.parametrize(
    "form",
    [
        pytest.param(f, id=str(f), marks=[] if f.device == "cpu" else [pytest.mark.gpu])
        for f in FORMS
        if not (EMULATED and f.backend in GPU_BACKENDS)
    ],
)


@each_form_of_machinery
def test_double_backward_and_functional_transforms(form: Form) -> None:
    x, y = a_batch(6, 5)
    x = (x * 0.5 + 0.01).to(form.device)
    y = y.to(form.device)
    o = {k: v.to(form.device) if isinstance(v, Tensor) else v for k, v in arguments("focal", 5, 6).items()}
    with form.use():
        assert torch.autograd.gradcheck(lambda x: bce(x, y, **o), x.clone().requires_grad_())
        assert torch.autograd.gradgradcheck(lambda x: bce(x, y, **o), x.clone().requires_grad_())
        z = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(bce(z, y, **o), z)
        torch.testing.assert_close(torch.func.grad(lambda x: bce(x, y, **o))(x), expected)
        gradient, sums = torch.func.grad(lambda x: bce(x, y, column_sums=True, **o), has_aux=True)(x)
        torch.testing.assert_close(gradient, expected)
        torch.testing.assert_close(sums, bce(x, y, column_sums=True, **o)[1])
        pos = torch.rand(5, dtype=torch.float64, device=form.device, requires_grad=True)
        with ltk.use_backend(None):  # weights have a gradient by the reference
            assert torch.autograd.grad(bce(x, y, pos_weight=pos, **o), pos)[0].abs().sum() > 0


@each_form_of_machinery
def test_compiled_in_one_graph(form: Form) -> None:
    x, y = a_batch(6, 5)
    x, y = x.float().to(form.device).requires_grad_(), y.to(form.device)

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        return bce(x, y, background_index=5, focal_gamma=(0.0, 2.0), clip=0.05, column_sums=True)

    with form.use():
        eager = step(x)
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
        for a, b in zip(eager, compiled, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(*(torch.autograd.grad(loss[0], x)[0] for loss in (eager, compiled)))


@pytest.mark.parametrize("sums", [False, True])
def test_the_op_keeps_its_contract(sums: bool) -> None:
    x, y = a_batch(6, 5)
    defaults = OP.options()._replace(column_sums=sums, background_index=5)
    tensors = (x.float().requires_grad_(), y, None, torch.rand(5), None, None, None, None, None)
    torch.library.opcheck(OP.forward, (*tensors, *defaults))


# --- Wrong calls ---

GOOD: dict[str, Any] = {"input": torch.zeros(2, 3), "target": torch.tensor([0, 1])}
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "input: expected float64"),
    ({"input": [1.0]}, TypeError, "input: expected a torch.Tensor, found list"),
    ({"input": torch.zeros(2, 0)}, ValueError, "input: expected shape"),
    ({"target": torch.tensor([0.5, 1.0])}, ValueError, r"target: expected labels of shape \(2,\)"),
    ({"target": torch.zeros(3, 3)}, ValueError, "target: expected labels of shape"),
    ({"target": torch.zeros(2, 3, dtype=torch.complex64)}, TypeError, "target: expected labels of an integer type"),
    ({"target": torch.zeros(2, 3), "weight": torch.ones(3)}, ValueError, "weight: expected None with multi-hot"),
    ({"weight": torch.ones(2)}, ValueError, r"weight: expected shape \(3,\)"),
    ({"pos_weight": torch.ones(3, dtype=torch.int64)}, TypeError, "pos_weight: expected a floating type"),
    ({"sample_weight": torch.ones(3)}, ValueError, r"sample_weight: expected shape \(2,\)"),
    ({"reduction": "avg"}, ValueError, "reduction: expected 'none' or 'mean' or 'sum', found 'avg'"),
    ({"denominator": "weight"}, ValueError, "denominator: expected 'count' or 'elements' or a number"),
    ({"reduction": "sum", "denominator": 2.0}, ValueError, "denominator: expected the default 'count'"),
    ({"denominator": -1.0}, ValueError, "denominator: expected a finite number > 0"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an integer"),
    ({"background_index": -1}, ValueError, "background_index: expected None or >= 0, found -1"),
    ({"focal_gamma": -1.0}, ValueError, "focal_gamma: expected a finite number >= 0"),
    ({"focal_gamma": (0.0, 1.0, 2.0)}, ValueError, "focal_gamma: expected a number or two, found 3"),
    ({"focal_gamma": (0.0, -1.0)}, ValueError, r"focal_gamma\[1\]: expected a finite number >= 0"),
    ({"focal_alpha": 1.5}, ValueError, "focal_alpha: expected a finite number >= 0 and <= 1"),
    ({"clip": 1.0}, ValueError, "clip: expected a number below 1, found 1"),
    ({"score_threshold": 0.5}, ValueError, "score_threshold: expected foreground_keep or background_keep"),
    ({"score_threshold": 0.0, "foreground_keep": torch.ones(3)}, ValueError, "score_threshold: expected a finite"),
    ({"draws": "column"}, ValueError, "draws: expected 'element' or 'row'"),
    ({"step": -1, "foreground_keep": torch.ones(3)}, ValueError, "step: expected >= 0"),
    ({"seed": 0.5}, TypeError, "seed: expected an integer"),
    ({"column_sums": 1}, TypeError, "column_sums: expected a bool"),
    ({"empty": "one"}, ValueError, "empty: expected 'nan' or 'zero'"),
]
WRONG_VALUES: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"target": torch.tensor([0, 3])},
        IndexError,
        r"target: expected labels in \[0, 3\) or ignore_index -100, found 3",
    ),
    ({"target": torch.tensor([0, -1])}, IndexError, "found -1 at row 1"),
    ({"target": torch.tensor([0, 4]), "background_index": 3}, IndexError, r"\[0, 3\), background_index 3 or ignore_"),
    ({"target": torch.tensor([[0.0, 1.5, 0.0]] * 2)}, ValueError, r"target: expected values in \[0, 1\], found 1.5"),
    ({"target": torch.tensor([[0.0, torch.nan, 0.0]] * 2)}, ValueError, r"target: expected values in \[0, 1\], found"),
    (
        {"weight": torch.tensor([1.0, -1.0, 1.0])},
        ValueError,
        "weight: expected finite values >= 0, found -1 at index 1",
    ),
    ({"neg_weight": torch.tensor([1.0, torch.inf, 1.0])}, ValueError, "neg_weight: expected finite values >= 0"),
    ({"sample_weight": torch.tensor([1.0, torch.nan])}, ValueError, "sample_weight: expected finite values >= 0"),
    ({"foreground_keep": torch.tensor([1.0, 1.5, 1.0])}, ValueError, r"foreground_keep: expected probabilities in"),
    ({"background_keep": torch.tensor([1.0, -0.5, 1.0])}, ValueError, r"background_keep: expected probabilities in"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_calls(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bce(**(GOOD | change))


@pytest.mark.parametrize(("change", "error", "message"), WRONG_VALUES)
@each_checking_form
def test_wrong_values(form: Form, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with form.use(), pytest.raises(error, match=message):
        bce(**(GOOD | change))

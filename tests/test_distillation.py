"""distillation_loss: the formulas of the papers, every backend against float64, derivatives, ways in, wrong calls.

Sizes: 1 and 2 classes, an odd number (every instruction set runs its tail), over 1024 (a second block of a sum) and
over 5000 (rows that are tiles of their own).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cross_entropy_cases import (
    FLOATS,
    FORMS,
    GPU_BACKENDS,
    INTEGERS,
    Form,
    each_checking_form,
    each_form,
    each_gpu_form,
)
from torch import Tensor

import ltkernels as ltk
from ltkernels.ops import distillation as op
from ltkernels.ops import gpu
from ltkernels.ops.options import DistillationOptions, Reduction

distillation_loss = ltk.functional.distillation_loss

CLASSES = (1, 2, 5, 100, 1029, 5003)


def logits(*shape: int, dtype: torch.dtype = torch.float64, spread: float = 3.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * spread).to(dtype)


def labels(*shape: int, classes: int) -> Tensor:
    y = torch.randint(0, classes, shape)
    y.view(-1)[1] = -100
    return y


def options_of(classes: int, rows: tuple[int, ...], dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Calls by name: each method of the docstring, and what they do not use."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    mask = torch.arange(classes) % 3 != 1
    return {
        "kd": {"T": 2.0},
        "kd and labels": {"T": 1.5, "target": labels(*rows, classes=classes), "ce_weight": 0.7},
        "balanced": {"T": 2.0, "teacher_bias": torch.rand(classes).add(0.1).log().to(compute), "alpha": 0.5},
        "power": {
            "T": 2.0,
            "teacher_T": 4.0,
            "alpha": 0.5,
            "target": labels(*rows, classes=classes),
            "class_bias": torch.randn(classes, dtype=torch.float64).to(compute),
        },
        "experts": {"T": 2.0, "class_mask": mask, "temperature_scale": False},
        "biases": {
            "student_bias": torch.randn(classes).to(compute),
            "class_mask": mask,
            "target": labels(*rows, classes=classes),
            "sample_weight": torch.rand(rows, dtype=torch.float64).to(compute),
        },
    }


NAMES = list(options_of(3, (4,), torch.float64))


def evaluate(form: Form | None, z: Tensor, t: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient for an upstream that is neither 1 nor the same in all rows; without a form, the truth."""
    if form is None:
        wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
        with ltk.use_backend("reference"):
            return _evaluate(z.double(), t.double(), **wide)
    moved = {k: v.to(form.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    with form.use():
        loss, gradient = _evaluate(z.to(form.device), t.to(form.device), **moved)
    return loss.cpu(), gradient.cpu()


def _evaluate(z: Tensor, t: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    loss = distillation_loss(z, t, **options)
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=torch.float64).reshape(loss.shape).to(loss)
    (gradient,) = torch.autograd.grad(loss, z, upstream)
    return loss.detach(), gradient


def assert_near(actual: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert actual[1].dtype == dtype
    loss = 1e-12 if dtype == torch.float64 else 2e-6
    rounding = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(actual[0].double(), truth[0], rtol=loss, atol=loss)
    scale = float(truth[1].abs().max()) if truth[1].numel() else 0.0
    # Differences of probabilities of about 1, times T^2 / T and sums of those.
    floor = 1e-14 if dtype == torch.float64 else 1e-6
    assert float((actual[1].double() - truth[1]).abs().max()) <= rounding * scale + floor


# --- The published formulas, against the reference ---


def test_hinton_is_torchs_kl_div() -> None:
    z, t = logits(6, 5), logits(6, 5)
    with ltk.use_backend("reference"):
        ours = distillation_loss(z, t, T=1.5)
    theirs = F.kl_div(F.log_softmax(z / 1.5, 1), F.softmax(t / 1.5, 1), reduction="batchmean") * 1.5 * 1.5
    torch.testing.assert_close(ours, theirs)


def test_balanced_distillation_reweights_the_teachers_probabilities() -> None:
    z, t, w, y = logits(6, 5), logits(6, 5), torch.rand(5, dtype=torch.float64) + 0.1, torch.randint(0, 5, (6,))
    with ltk.use_backend("reference"):
        ours = distillation_loss(z, t, T=2.0, teacher_bias=w.log(), target=y)
    q = F.softmax(t / 2.0, 1) * w
    q = q / q.sum(1, keepdim=True)
    theirs = F.cross_entropy(z, y) + F.kl_div(F.log_softmax(z / 2.0, 1), q, reduction="batchmean") * 4.0
    torch.testing.assert_close(ours, theirs)


def test_dive_raises_the_teachers_probabilities_to_a_power() -> None:
    z, t, y = logits(6, 5), logits(6, 5), torch.randint(0, 5, (6,))
    with ltk.use_backend("reference"):
        ours = distillation_loss(z, t, T=3.0, teacher_T=3.0 / 0.5, alpha=0.3, target=y, ce_weight=0.7)
    q = F.softmax(t / 3.0, 1).sqrt()
    q = q / q.sum(1, keepdim=True)
    kl = F.kl_div(F.log_softmax(z / 3.0, 1), q, reduction="batchmean")
    torch.testing.assert_close(ours, 0.3 * 9.0 * kl + 0.7 * F.cross_entropy(z, y))


def test_balanced_softmax_beside_a_teacher() -> None:
    z, t, y = logits(6, 5), logits(6, 5), torch.randint(0, 5, (6,))
    bias = torch.tensor([900.0, 90.0, 9.0, 5.0, 1.0], dtype=torch.float64).log()
    with ltk.use_backend("reference"):
        ours = distillation_loss(z, t, target=y, class_bias=bias)
        alone = ltk.functional.cross_entropy(z, y, class_bias=bias)
    torch.testing.assert_close(ours, distillation_loss(z, t) + alone)


def test_lfme_distils_a_subset_of_the_classes() -> None:
    z, t, mask = logits(6, 5), logits(6, 5), torch.tensor([True, False, True, True, False])
    with ltk.use_backend("reference"):
        ours = distillation_loss(z, t, T=2.0, class_mask=mask, temperature_scale=False)
    # The published code takes the mean over rows and classes, times the number of classes.
    kl = F.kl_div(F.log_softmax(z[:, mask] / 2.0, 1), F.softmax(t[:, mask] / 2.0, 1), reduction="none")
    torch.testing.assert_close(ours, kl.mean() * mask.sum())


# --- Every form against the reference in float64 ---


@each_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", CLASSES)
def test_values(form: Form, dtype: torch.dtype, classes: int) -> None:
    z, t = logits(4, classes, dtype=dtype), logits(4, classes, dtype=dtype)
    for reduction in ("mean", "sum", "none"):
        for options in options_of(classes, (4,), dtype).values():
            assert_near(
                evaluate(form, z, t, reduction=reduction, **options),
                evaluate(None, z, t, reduction=reduction, **options),
                dtype,
            )


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "padded": lambda x: F.pad(x, (0, 3), value=math.nan)[..., :-3],
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
}


@each_form
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inner", [(), (3,), (2, 2)])
def test_strides_and_types_of_the_two_sides(form: Form, layout: str, inner: tuple[int, ...]) -> None:
    rows = (5, *inner)
    for classes in (5, 300):
        z, t = logits(5, classes, *inner, dtype=torch.float32), logits(5, classes, *inner, dtype=torch.float16)
        for options in options_of(classes, rows, torch.float32).values():
            truth = evaluate(None, z, t, reduction="none", **options)
            x, same = z.to(form.device), t.to(form.device, torch.float32)  # with the same bits
            strided = LAYOUTS[layout]
            for pair in (
                (strided(x), t), (x, strided(same.double())), (strided(x), same), (x, strided(same)),
            ):  # fmt: skip
                assert_near(evaluate(form, *pair, reduction="none", **options), truth, torch.float32)


@each_form
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_a_teacher_of_another_type(form: Form, dtype: torch.dtype) -> None:
    z, t = logits(4, 300), logits(4, 300, dtype=dtype)
    for student in FLOATS:
        x = z.to(student)
        assert_near(evaluate(form, x, t, T=2.0), evaluate(None, x, t, T=2.0), student)


@each_form
@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda dtype: str(dtype)[6:])
def test_label_types(form: Form, dtype: torch.dtype) -> None:
    """Class 3 is ignored: also an index that unsigned types have. Every second of a longer tensor of labels."""
    z, t, y = logits(12, 10, dtype=torch.float32), logits(12, 10, dtype=torch.float32), torch.arange(24) % 10
    options = {"ignore_index": 3, "class_bias": torch.randn(10)}
    truth = evaluate(None, z, t, target=y[::2], **options)
    assert_near(evaluate(form, z, t, target=y.to(form.device, dtype)[::2], **options), truth, torch.float32)


@each_form
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_may_replace_the_logits(form: Form, layout: str) -> None:
    implementation = next(row for row in op.OP.table.rows if row.backend == form.backend)
    for classes in (5, 300):
        z, t = (LAYOUTS[layout](logits(4, classes, dtype=torch.float32)).to(form.device) for _ in range(2))
        y, grad = labels(4, classes=classes).to(form.device), torch.rand(4, device=form.device)
        call = (z, t, y, None, None, None, None, *DistillationOptions(reduction=Reduction.NONE))
        with form.use():
            _, state, _ = implementation.forward(*call, False)
            (beside,) = implementation.backward(grad, state, *call, True, False)
            (over,) = implementation.backward(grad, state, *call, True, True)
        assert torch.equal(over, beside)
        assert (over.data_ptr() == z.data_ptr()) == (form.backend != "reference")


@each_form
def test_small_divergences_keep_their_digits(form: Form) -> None:
    t = logits(8, 1029, dtype=torch.float32)
    z = t + 0.1 * torch.randn(8, 1029)
    loss = evaluate(form, z, t, reduction="none")[0].double()
    log_q, log_p = F.log_softmax(t.double(), 1), F.log_softmax(z.double(), 1)
    terms = log_q.exp() * (log_q - log_p)
    # Exponentials of a GPU are off by up to 2 ulp; PyTorch's float32 logarithms by more.
    tolerance = {"cpu": 1e-6, "reference": 1e-5}.get(form.backend, 5e-6)
    assert bool(((loss - terms.sum(1)).abs() <= tolerance * terms.abs().sum(1)).all())
    assert float(evaluate(form, t, t)[0]) == pytest.approx(0.0, abs=1e-7)


@each_form
def test_number_of_threads_changes_no_bit(form: Form, threads: Callable[[int], Any]) -> None:
    z, t = logits(64, 1029, dtype=torch.float32), logits(64, 1029, dtype=torch.float32)
    alone = evaluate(form, z, t, target=torch.arange(64))
    with threads(2):
        together = evaluate(form, z, t, target=torch.arange(64))
    if form.backend != "reference":
        assert torch.equal(alone[0], together[0])
        assert torch.equal(alone[1], together[1])
    if form.backend in GPU_BACKENDS:
        assert not gpu.tickets(torch.device(form.device), 1).any(), "tickets were not put back"


# --- Limits ---


@each_form
def test_what_a_teacher_rules_out_adds_nothing(form: Form) -> None:
    z, t = torch.tensor([[1.0, -math.inf, 0.5, 2.0]]), torch.tensor([[0.5, -math.inf, -math.inf, 1.0]])
    loss, gradient = evaluate(form, z, t)
    q, p = F.softmax(t[0, [0, 3]], 0), F.softmax(z[0, [0, 2, 3]], 0)
    torch.testing.assert_close(loss, (q * (q / p[[0, 2]]).log()).sum())
    torch.testing.assert_close(gradient[0, [0, 2, 3]], (p - torch.tensor([q[0], 0.0, q[1]])) * 0.5)
    assert float(gradient[0, 1]) == 0.0


@each_form
def test_a_class_that_only_the_student_rules_out_is_infinite(form: Form) -> None:
    with form.use():
        z, t = torch.tensor([[1.0, -math.inf]], device=form.device), torch.zeros(1, 2, device=form.device)
        assert float(distillation_loss(z, t)) == math.inf


@each_form
def test_what_has_no_weight_adds_nothing(form: Form) -> None:
    with form.use(), torch.device(form.device):
        infinite, t, y = torch.tensor([[1.0, -math.inf]]), torch.zeros(1, 2), torch.tensor([1])
        for options in ({"alpha": 0.0}, {"sample_weight": torch.zeros(1)}):
            assert float(distillation_loss(infinite, t, **options)) == 0.0
        plain = distillation_loss(torch.zeros(1, 2), t, target=y, ce_weight=0.0)
        assert float(plain) == 0.0
        out = distillation_loss(infinite, infinite, target=y, ce_weight=0.0)  # the label is ruled out, its weight is 0
        assert float(out) == 0.0
        assert float(distillation_loss(infinite, infinite, target=y)) == math.inf


@each_form
def test_an_absent_class_takes_no_part_in_the_cross_entropy(form: Form) -> None:
    z, t, y = logits(6, 5), logits(6, 5), torch.tensor([0, 1, 2, 3, 0, 1])
    bias = torch.tensor([0.5, 0.0, 1.0, 0.0, -math.inf], dtype=torch.float64)
    loss, gradient = evaluate(form, z, t, target=y, class_bias=bias, alpha=0.0)
    torch.testing.assert_close(loss, F.cross_entropy((z + bias)[:, :4], y), rtol=1e-6, atol=1e-6)
    assert torch.equal(gradient[:, 4], torch.zeros(6, dtype=torch.float64))


@each_form
def test_nan_empty_ignored(form: Form) -> None:
    with form.use(), torch.device(form.device):
        for side in range(2):
            pair = [torch.zeros(2, 5), torch.zeros(2, 5)]
            pair[side][1, 2] = math.nan
            rows = distillation_loss(pair[0], pair[1], reduction="none")
            assert float(rows[0]) == 0.0
            assert math.isnan(rows[1])
        empty = torch.zeros(0, 5)
        assert math.isnan(distillation_loss(empty, torch.zeros(0, 5)))
        assert float(distillation_loss(empty, torch.zeros(0, 5), reduction="sum")) == 0.0
        z, t = torch.randn(3, 5), torch.randn(3, 5)
        ignored = torch.full((3,), -100)
        with_labels = distillation_loss(z, t, target=ignored, reduction="none")
        torch.testing.assert_close(with_labels, distillation_loss(z, t, reduction="none"), rtol=0, atol=0)


@each_form
def test_ignored_rows_distil_whatever_e_of_their_logits_is(form: Form) -> None:
    """e^200 is infinite, in the cross-entropy that these rows have not; 0 of it would be NaN."""
    z, t = logits(4, 9, dtype=torch.float32) + 200.0, logits(4, 9, dtype=torch.float32)
    loss, gradient = evaluate(form, z, t, target=torch.full((4,), -100), reduction="sum")
    assert_near((loss, gradient), evaluate(None, z, t, reduction="sum"), torch.float32)


@each_gpu_form
@pytest.mark.parametrize(("bad", "error"), [(9, IndexError), (-1, IndexError), (4, ValueError)])
def test_a_bad_label_is_nan_and_reported(form: Form, bad: int, error: type[Exception]) -> None:
    """Out of range, or of a class without samples, as 4 is here: its row alone is NaN."""
    with torch.device(form.device):
        z, t, bias = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9), torch.zeros(9)
        bias[4] = -math.inf
        with form.use():
            y = torch.tensor([0, -100, bad, 3])
            loss = distillation_loss(z, t, target=y, class_bias=bias, reduction="none")
            loss.sum().backward()
    assert loss.isnan().tolist() == z.grad.isnan().all(1).tolist() == [False, False, True, False]
    if form.device != "cpu":
        torch.cuda.synchronize()
    with pytest.raises(error, match="target: expected labels"):
        ltk.check()
    ltk.check()


@each_gpu_form
def test_the_state_of_another_backend_is_refused(form: Form) -> None:
    options = DistillationOptions()
    z, t = (logits(4, 5, dtype=torch.float32).to(form.device) for _ in range(2))
    call = (z, t, None, None, None, None, None)
    state = op.new_state(call, options).fill_(-1.0)
    implementation = next(row for row in op.OP.table.rows if row.backend == form.backend)
    (gradient,) = implementation.backward(torch.ones((), device=form.device), state, *call, *options, True, False)
    assert gradient.isnan().all()
    if form.device != "cpu":
        torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="expected the state of a forward on the same backend"):
        ltk.check()


def test_backends_are_the_usual_ones() -> None:
    """Every form that cross_entropy has, this loss has: none is refused."""
    for form in FORMS:
        with form.use(), torch.device(form.device):
            assert distillation_loss(torch.randn(3, 4), torch.randn(3, 4)).isfinite()


def test_one_row_without_a_batch() -> None:
    z, t = logits(5), logits(5)
    assert distillation_loss(z, t, reduction="none").shape == ()
    torch.testing.assert_close(distillation_loss(z, t), distillation_loss(z[None], t[None]))


# --- Derivatives and ways in ---


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_twice(name: str) -> None:
    z, t = logits(3, 5, spread=1.0).requires_grad_(), logits(3, 5, spread=1.0)
    options = options_of(5, (3,), torch.float64)[name]
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, t, **options), (z,))
    assert torch.autograd.gradgradcheck(lambda x: distillation_loss(x, t, **options), (z,))


def test_the_teacher_takes_no_gradient() -> None:
    z, t = logits(3, 5).requires_grad_(), logits(3, 5).requires_grad_()
    before = t.detach().clone()
    distillation_loss(z, t).backward()
    assert z.grad is not None
    assert t.grad is None
    assert torch.equal(t.detach(), before)


@pytest.mark.filterwarnings("ignore:ltkernels. distillation does not use the cpu backend")
def test_a_learned_bias_has_a_gradient() -> None:
    z, t, bias = logits(3, 5), logits(3, 5), logits(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: distillation_loss(z, t, student_bias=b), (bias,))


@pytest.mark.parametrize("name", NAMES)
def test_torch_func_and_second_backward(name: str) -> None:
    z, t = logits(4, 5), logits(4, 5)
    options = options_of(5, (4,), torch.float64)[name]
    variable = z.clone().requires_grad_()
    loss = distillation_loss(variable, t, **options)
    first, second = (torch.autograd.grad(loss, variable, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(torch.func.grad(lambda x: distillation_loss(x, t, **options))(z), first)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    z, t = logits(4, 5, dtype=torch.float32).requires_grad_(), logits(4, 5, dtype=torch.float32)
    tensors = (z, t, labels(4, classes=5), None, torch.zeros(5), torch.randn(5), torch.rand(4))
    with ltk.use_backend(backend):
        for reduction in (0, 1, 3):
            torch.library.opcheck(op.OP.forward, (*tensors, *DistillationOptions(reduction=reduction)))


def test_compiles_to_one_graph() -> None:
    t = logits(4, 5, dtype=torch.float32)
    y = labels(4, classes=5)

    def step(z: Tensor) -> Tensor:
        return distillation_loss(z, t, T=2.0, target=y, class_mask=torch.arange(5) != 2)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    z = logits(4, 5, dtype=torch.float32)
    pair = [z.clone().requires_grad_() for _ in range(2)]
    losses = step(pair[0]), compiled(pair[1])
    for loss in losses:
        loss.backward()
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(pair[0].grad, pair[1].grad, rtol=1e-6, atol=1e-8)
    torch._dynamo.reset()


# --- Wrong calls ---

Z = torch.zeros(2, 3)
ERRORS: list[tuple[type[Exception], str, tuple[Any, Any], dict[str, Any]]] = [
    (TypeError, "student: expected a torch.Tensor, found list", ([1.0], Z), {}),
    (TypeError, "teacher: expected float64, .* found torch.int64", (Z, Z.long()), {}),
    (ValueError, r"teacher: expected student's shape \(2, 3\), found \(2, 4\)", (Z, torch.zeros(2, 4)), {}),
    (ValueError, "teacher: expected device cpu", (Z, Z.to("meta")), {}),
    (ValueError, "T: expected a finite number > 0, found 0", (Z, Z), {"T": 0.0}),
    (ValueError, "teacher_T: expected a finite number > 0", (Z, Z), {"teacher_T": -1.0}),
    (TypeError, "T: expected a number, found str", (Z, Z), {"T": "2"}),
    (ValueError, "alpha: expected a finite number >= 0", (Z, Z), {"alpha": -0.1}),
    (ValueError, "ce_weight: expected a finite number >= 0", (Z, Z), {"ce_weight": math.inf}),
    (TypeError, "temperature_scale: expected a bool, found 1", (Z, Z), {"temperature_scale": 1}),
    (ValueError, "reduction: expected 'none' or 'mean' or 'sum'", (Z, Z), {"reduction": "batchmean"}),
    (TypeError, "target: expected labels of an integer type", (Z, Z), {"target": Z}),
    (ValueError, r"target: expected labels of shape \(2,\)", (Z, Z), {"target": torch.zeros(3).long()}),
    (IndexError, r"target: expected labels in \[0, 3\)", (Z, Z), {"target": torch.tensor([0, 3])}),
    (TypeError, "class_mask: expected torch.bool, found torch.float32", (Z, Z), {"class_mask": torch.ones(3)}),
    (ValueError, r"class_mask: expected shape \(3,\)", (Z, Z), {"class_mask": torch.ones(4).bool()}),
    (ValueError, "class_mask: expected a class that takes part", (Z, Z), {"class_mask": torch.zeros(3).bool()}),
    (ValueError, r"teacher_bias: expected shape \(3,\)", (Z, Z), {"teacher_bias": torch.ones(4)}),
    (ValueError, "class_bias: expected a target with it", (Z, Z), {"class_bias": torch.zeros(3)}),
    (
        ValueError,
        r"class_bias: expected shape \(3,\)",
        (Z, Z),
        {"target": torch.zeros(2).long(), "class_bias": torch.zeros(4)},
    ),
    (
        ValueError,
        "target: .* class 1",
        (Z, Z),
        {"target": torch.ones(2).long(), "class_bias": torch.tensor([0.0, -math.inf, 0.0])},
    ),
    (ValueError, "student_bias: expected finite", (Z, Z), {"student_bias": torch.tensor([0.0, math.inf, 0.0])}),
    (ValueError, "sample_weight: expected finite values >= 0", (Z, Z), {"sample_weight": torch.tensor([1.0, -1.0])}),
]


@each_checking_form
@pytest.mark.parametrize(("error", "message", "pair", "options"), ERRORS, ids=[message for _, message, _, _ in ERRORS])
def test_wrong_calls(
    form: Form, error: type[Exception], message: str, pair: tuple[Any, Any], options: dict[str, Any]
) -> None:
    with form.use(), pytest.raises(error, match=message):
        distillation_loss(*pair, **options)

"""expert_cross_entropy: published forms, every backend against float64, derivatives, ways in, wrong calls.

Sizes: 1 and 2 classes, an odd number (every instruction set runs its tail), over 1024 (a second block of a sum).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cross_entropy_cases import Form, each_checking_form, each_form
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ltkernels as ltk
from ltkernels.ops import expert_cross_entropy as op
from ltkernels.ops.options import ExpertCrossEntropyOptions

expert_cross_entropy = ltk.functional.expert_cross_entropy
DATA = Path(__file__).parent / "data"


def logits(*shape: int, dtype: torch.dtype = torch.float64, spread: float = 3.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * spread).to(dtype)


def labels(rows: int, classes: int) -> Tensor:
    y = torch.randint(0, classes, (rows,))
    y[1 % rows] = -100
    return y


def options_of(experts: int, rows: int, classes: int) -> dict[str, dict[str, Any]]:
    """Calls by name: each method, and everything at once."""

    def table(*shape: int, low: float = 0.5) -> Tensor:
        return torch.rand(shape, dtype=torch.float64) + low

    return {
        "plain": {},
        "ride": {"class_margin": 10 * table(classes), "diversity_factor": -0.2},
        "ride late": {
            "class_margin": 10 * table(classes),
            "weight": table(classes),
            "diversity_factor": -0.2,
            "diversity_temperature": table(classes),
        },
        "sade": {"class_bias": logits(experts, classes)},
        "distilled": {"teacher": logits(rows, classes), "distillation_temperature": 1.5},
        "all": {
            "scale": 0.7,
            "weight": table(experts, classes),
            "class_scale": table(experts, classes),
            "class_bias": logits(experts, classes),
            "class_margin": logits(experts, classes),
            "sample_weight": table(rows),
            "diversity_factor": 0.3,
            "diversity_temperature": 2.0,
            "teacher": logits(rows, classes),
            "distillation_factor": 0.5,
        },
    }


NAMES = list(options_of(2, 3, 4))


def converted(options: dict[str, Any], form: Form | None, dtype: torch.dtype) -> dict[str, Any]:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    device = "cpu" if form is None else form.device
    return {
        key: value.to(device, compute if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for key, value in options.items()
    }


def evaluate(form: Form | None, z: Tensor, y: Tensor, aggregate: bool = False, **options: Any) -> tuple[Tensor, ...]:
    """Loss, mean if wanted, and gradient, of upstream gradients that differ everywhere; without a form, the truth."""
    if form is None:
        with ltk.use_backend("reference"):
            return _evaluate(z.detach().cpu().double(), y.cpu(), aggregate, **options)
    with form.use():
        return tuple(value.cpu() for value in _evaluate(z.to(form.device), y.to(form.device), aggregate, **options))


def _evaluate(z: Tensor, y: Tensor, aggregate: bool, **options: Any) -> tuple[Tensor, ...]:
    z = z.detach().requires_grad_()
    outputs = expert_cross_entropy(z, y, aggregate=aggregate, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [
        torch.linspace(0.5, 2.0, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.device, out.dtype)
        for out in outputs
    ]
    (gradient,) = torch.autograd.grad(outputs, z, upstream)
    return (*(out.detach() for out in outputs), gradient)


def assert_near(actual: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    exact = dtype == torch.float64
    for value, true in zip(actual[:-1], truth[:-1], strict=True):
        assert value.dtype == (torch.float64 if exact else torch.float32)
        scale = float(true.abs().max()) if true.numel() else 0.0
        torch.testing.assert_close(value.double(), true, rtol=0, atol=(1e-12 if exact else 3e-6) * (1 + scale))
    rounding = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert actual[-1].dtype == dtype
    scale = float(truth[-1].abs().max()) if truth[-1].numel() else 0.0
    assert float((actual[-1].double() - truth[-1]).abs().max()) <= rounding * scale + (1e-13 if exact else 1e-6)


# --- The published formulas, against the reference ---


def test_ride() -> None:
    z, y, margin, w = logits(3, 6, 5), torch.randint(0, 5, (6,)), torch.rand(5).double(), torch.rand(5).double() + 0.5
    temperature = torch.rand(5).double() + 0.5
    with ltk.use_backend("reference"):
        ours = expert_cross_entropy(
            z, y, w, class_margin=30 * margin, diversity_factor=-0.2, diversity_temperature=temperature
        )
    theirs = torch.zeros(())
    for e in range(3):
        moved = z[e] - 30 * margin[y][:, None] * F.one_hot(y, 5)
        pm = F.softmax(z.mean(0) / temperature, dim=1)
        kl = F.kl_div(F.log_softmax(z[e] / temperature, dim=1), pm, reduction="batchmean")
        theirs = theirs + F.cross_entropy(moved, y, w) - 0.2 * temperature.mean() ** 2 * kl
    torch.testing.assert_close(ours, theirs)


def test_distillation_is_of_the_mean() -> None:
    z, y, teacher = logits(3, 6, 5), torch.randint(0, 5, (6,)), logits(6, 5)
    with ltk.use_backend("reference"):
        ours = expert_cross_entropy(z, y, teacher=teacher, distillation_temperature=1.5)
        plain = expert_cross_entropy(z, y)
    kl = F.kl_div(F.log_softmax(z.mean(0) / 1.5, 1), F.softmax(teacher / 1.5, 1), reduction="batchmean")
    torch.testing.assert_close(ours, plain + 1.5**2 * kl)


@each_form
def test_experts_of_subsets(form: Form) -> None:
    """An expert that does not know a class: bias -inf and weight 0 there, its mean over the samples it knows."""
    z, y = logits(2, 6, 4), torch.tensor([0, 1, 2, 3, 1, 0])
    known = torch.tensor([[True, True, False, False], [True, True, True, True]])
    bias = torch.zeros(2, 4, dtype=torch.float64).masked_fill(~known, -math.inf)
    loss, gradient = evaluate(form, z, y, **converted({"weight": known.double(), "class_bias": bias}, form, z.dtype))
    mine = y < 2
    torch.testing.assert_close(loss, F.cross_entropy(z[0][mine, :2], y[mine]) + F.cross_entropy(z[1], y))
    assert float(gradient[0][~mine].abs().sum()) == float(gradient[0][:, 2:].abs().sum()) == 0.0


@each_form
def test_golden_ride(form: Form) -> None:
    with np.load(DATA / "ride_before_drw.npz") as file:
        golden = {key: torch.from_numpy(np.array(value)) for key, value in file.items()}
    margin = (golden["counts"].min() / golden["counts"].double()) ** 0.25 * golden["max_margin"] * golden["scale"]
    z = golden["logits"].to(form.device).requires_grad_()
    with form.use():
        loss = expert_cross_entropy(
            z,
            golden["target"].to(form.device),
            class_margin=margin.float().to(form.device),
            diversity_factor=float(golden["diversity_factor"]),
        )
        (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss.cpu(), golden["loss"], rtol=2e-6, atol=0)
    assert float((gradient.cpu() - golden["grad"]).norm() / golden["grad"].norm()) <= 2e-6


# --- Every form against the reference in float64 ---


@each_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("experts", "classes"), [(1, 2), (2, 1), (3, 5), (3, 100), (2, 1029), (17, 5)])
def test_values(form: Form, dtype: torch.dtype, experts: int, classes: int) -> None:
    z, y = logits(experts, 4, classes, dtype=dtype), labels(4, classes)
    for reduction in ("mean", "sum", "none"):
        for name, options in options_of(experts, 4, classes).items():
            aggregate = name in ("plain", "ride", "all")
            truth = evaluate(None, z, y, aggregate, reduction=reduction, **options)
            ours = evaluate(form, z, y, aggregate, reduction=reduction, **converted(options, form, dtype))
            assert_near(ours, truth, dtype)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "samples first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "classes first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "padded": lambda x: F.pad(x, (0, 3), value=math.nan)[..., :-3],
    "every second": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
}


@each_form
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [5, 300])
def test_layouts(form: Form, layout: str, classes: int) -> None:
    z, y = logits(3, 20, classes, dtype=torch.float32), labels(20, classes)
    for name in ("ride late", "all"):
        options = options_of(3, 20, classes)[name]
        truth = evaluate(None, z, y, True, reduction="none", **options)
        assert_near(
            evaluate(form, LAYOUTS[layout](z), y, True, reduction="none", **converted(options, form, z.dtype)),
            truth,
            z.dtype,
        )


@each_form
def test_types_of_labels_and_teachers(form: Form) -> None:
    z, teacher = logits(2, 7, 9, dtype=torch.float32), logits(7, 9, dtype=torch.float16)
    truth = evaluate(None, z, torch.arange(7), teacher=teacher.double())
    for kind in (torch.uint8, torch.int16, torch.int32, torch.uint64):
        y = torch.arange(7).repeat_interleave(2)[::2].to(kind)
        assert_near(evaluate(form, z, y, teacher=teacher.t().contiguous().t().to(form.device)), truth, z.dtype)


@each_form
def test_one_expert_is_cross_entropy(form: Form) -> None:
    z, y = logits(1, 8, 37, dtype=torch.float32).to(form.device), labels(8, 37).to(form.device)
    tables = converted({"class_bias": logits(37), "class_margin": logits(37), "weight": torch.rand(37)}, form, z.dtype)
    with form.use():
        for denominator in ("weight", "count", 3.0):
            ours = expert_cross_entropy(z, y, scale=2.0, denominator=denominator, **tables)
            single = ltk.functional.cross_entropy(z[0], y, scale=2.0, denominator=denominator, **tables)
            torch.testing.assert_close(ours, single, rtol=2e-6, atol=1e-6)


@each_form
def test_permuting_experts_permutes_gradients(form: Form) -> None:
    z, y, order = logits(4, 8, 37, dtype=torch.float32), labels(8, 37), torch.tensor([2, 0, 3, 1])
    options = options_of(4, 8, 37)["all"]
    moved = {
        key: value[order] if isinstance(value, Tensor) and value.shape == (4, 37) else value
        for key, value in options.items()
    }
    first = evaluate(form, z, y, True, **converted(options, form, z.dtype))
    second = evaluate(form, z[order], y, True, **converted(moved, form, z.dtype))
    assert_near(second, (first[0].double(), first[1].double(), first[2][order].double()), z.dtype)


@each_form
def test_a_list_of_experts(form: Form) -> None:
    z, y = logits(3, 8, 5).to(form.device), labels(8, 5).to(form.device)
    variables = [one.clone().requires_grad_() for one in z]
    with form.use():
        expert_cross_entropy(variables, y, diversity_factor=-0.2).backward()
        whole = z.clone().requires_grad_()
        expert_cross_entropy(whole, y, diversity_factor=-0.2).backward()
    torch.testing.assert_close(torch.stack([one.grad for one in variables]), whole.grad)


@each_form
def test_number_of_threads_changes_no_bit(form: Form, threads: Callable[[int], Any]) -> None:
    z, y = logits(3, 64, 1029, dtype=torch.float32), labels(64, 1029)
    alone = evaluate(form, z, y, True, diversity_factor=-0.2)
    with threads(2):
        together = evaluate(form, z, y, True, diversity_factor=-0.2)
    if form.backend == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


# --- Limits ---


@each_form
def test_what_ignored_samples_hold_reaches_nothing(form: Form) -> None:
    z, y = logits(3, 4, 5), torch.tensor([1, -100, 2, -100])
    options = converted(options_of(3, 4, 5)["ride"], form, z.dtype)
    poisoned = z.clone()
    poisoned[:, 1], poisoned[:, 3] = math.nan, 300.0
    for actual, expected in zip(
        evaluate(form, poisoned, y, **options), evaluate(form, z[:, ::2], y[::2], **options), strict=True
    ):
        shown = actual[:, ::2] if actual.dim() else actual
        torch.testing.assert_close(shown, expected)
        assert actual.dim() == 0 or float(actual[:, 1::2].abs().sum()) == 0.0


@each_form
def test_nothing_counted(form: Form) -> None:
    y = torch.full((3,), -100, device=form.device)
    with form.use():
        for z in (torch.zeros(2, 3, 5, device=form.device), torch.zeros(2, 0, 5, device=form.device)):
            assert math.isnan(expert_cross_entropy(z, y[: z.shape[1]]))
            assert float(expert_cross_entropy(z, y[: z.shape[1]], empty="zero")) == 0.0
            assert float(expert_cross_entropy(z, y[: z.shape[1]], reduction="sum")) == 0.0


@each_form
def test_an_expert_without_weight_in_the_batch_adds_nothing(form: Form) -> None:
    z, y = logits(2, 6, 4), torch.tensor([0, 1, 0, 1, 0, 0])
    weight = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64, device=form.device)
    loss, gradient = evaluate(form, z, y, weight=weight)
    torch.testing.assert_close(loss, F.cross_entropy(z[1], y))
    assert float(gradient[0].abs().sum()) == 0.0


@each_form
def test_what_has_no_weight_adds_nothing(form: Form) -> None:
    z = torch.tensor([[[0.0, -math.inf, 1.0]], [[1.0, 2.0, 0.5]]], dtype=torch.float64)
    y = torch.tensor([1])
    weight = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64, device=form.device)
    loss, gradient = evaluate(form, z, y, weight=weight)
    torch.testing.assert_close(loss, F.cross_entropy(z[1], y))
    assert float(gradient[0].abs().sum()) == 0.0
    assert float(evaluate(form, z, y)[0]) == math.inf


@each_form
def test_nan_stays_in_its_sample(form: Form) -> None:
    z, y = logits(2, 3, 5, dtype=torch.float32), torch.tensor([0, 1, 2])
    z[1, 1, 2] = math.nan
    rows, gradient = evaluate(form, z, y, reduction="none", diversity_factor=-0.2)
    assert rows.isnan().tolist() == [False, True, False]
    assert not bool(gradient[:, ::2].isnan().any())


@each_form
def test_small_losses_keep_their_digits(form: Form) -> None:
    z = torch.zeros(2, 1, 5)
    z[:, :, 0] = 40.0
    loss, _ = evaluate(form, z, torch.tensor([0]))
    assert float(loss) == pytest.approx(2 * 4 * math.exp(-40), rel=1e-5)


# --- Derivatives and ways in ---


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_twice(name: str) -> None:
    z, y = logits(2, 3, 4, spread=1.0).requires_grad_(), torch.tensor([0, 3, 1])
    options = options_of(2, 3, 4)[name]
    if options.get("diversity_factor"):  # the mean takes no gradient there: what is checked is of the rest
        options["diversity_factor"] = 0.0
    assert torch.autograd.gradcheck(lambda x: expert_cross_entropy(x, y, aggregate=True, **options), (z,))
    assert torch.autograd.gradgradcheck(lambda x: expert_cross_entropy(x, y, aggregate=True, **options), (z,))


def test_second_derivatives_of_the_diversity() -> None:
    """Of the kernel's gradient as of the reference's, whose mean is detached."""
    y, direction = torch.tensor([0, 3, 1]), logits(2, 3, 4)
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(1)
        z = logits(2, 3, 4, spread=1.0).requires_grad_()
        with ltk.use_backend(backend):
            (first,) = torch.autograd.grad(expert_cross_entropy(z, y, diversity_factor=-0.3), z, create_graph=True)
            results.append(torch.autograd.grad(first, z, direction)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", NAMES)
def test_torch_func_and_second_backward(name: str) -> None:
    z, y = logits(3, 4, 5), labels(4, 5)
    options = options_of(3, 4, 5)[name]
    variable = z.clone().requires_grad_()
    loss = expert_cross_entropy(variable, y, **options)
    first, second = (torch.autograd.grad(loss, variable, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(torch.func.grad(lambda x: expert_cross_entropy(x, y, **options))(z), first)
    both = torch.func.grad(lambda x: sum(out.sum() for out in expert_cross_entropy(x, y, aggregate=True, **options)))
    torch.testing.assert_close(both(z), first + 1 / 3)


@pytest.mark.filterwarnings("ignore:ltkernels. expert_cross_entropy does not use the cpu backend")
def test_learned_tables_have_a_gradient() -> None:
    z, y = logits(2, 3, 4), torch.tensor([0, 3, 1])
    bias, margin = logits(2, 4).requires_grad_(), logits(4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda b, m: expert_cross_entropy(z, y, class_bias=b, class_margin=m), (bias, margin)
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    z, table = logits(2, 4, 5, dtype=torch.float32).requires_grad_(), torch.rand(2, 5)
    tensors = (z, labels(4, 5), table, None, table, table, torch.rand(6) + 0.5, torch.rand(4), torch.randn(4, 5))
    with ltk.use_backend(backend):
        for reduction in (0, 1, 2):
            options = ExpertCrossEntropyOptions(reduction=reduction, diversity=0.2, distillation=1.0, aggregate=True)
            torch.library.opcheck(op.OP.forward, (*tensors, *options))


def test_compiles_to_one_graph() -> None:
    y = labels(4, 5)

    def step(z: Tensor) -> Tensor:
        loss, mean = expert_cross_entropy(z, y, class_margin=0.5, diversity_factor=-0.2, aggregate=True)
        return loss + mean.square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    z = logits(3, 4, 5, dtype=torch.float32)
    pair = [z.clone().requires_grad_() for _ in range(2)]
    losses = step(pair[0]), compiled(pair[1])
    for loss in losses:
        loss.backward()
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(pair[0].grad, pair[1].grad, rtol=1e-6, atol=1e-8)
    torch._dynamo.reset()


def test_the_mean_may_not_be_changed_before_the_backward() -> None:
    z = logits(2, 3, 4).requires_grad_()
    loss, mean = expert_cross_entropy(z, torch.tensor([0, 3, 1]), reduction="none", aggregate=True)
    mean.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@settings(max_examples=25, deadline=None)
@given(experts=st.integers(1, 5), rows=st.integers(1, 6), classes=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_a_number_added_to_an_experts_logits_changes_nothing(experts: int, rows: int, classes: int, seed: int) -> None:
    torch.manual_seed(seed % 2**31)
    z, y = logits(experts, rows, classes), torch.randint(0, classes, (rows,))
    moved = z + logits(experts, rows, 1, spread=10.0)
    for options in ({}, {"diversity_factor": -0.2}):
        first, second = (evaluate(Form("cpu"), x, y, **options) for x in (z, moved))
        assert_near(second, first, z.dtype) if classes > 1 else None
        torch.testing.assert_close(first[0], second[0], rtol=1e-9, atol=1e-9)


# --- Wrong calls ---

Z, Y = torch.zeros(2, 3, 4), torch.tensor([0, 3, 1])
ERRORS: list[tuple[type[Exception], str, Any, Any, dict[str, Any]]] = [
    (ValueError, "input: expected at least one expert, found none", [], Y, {}),
    (ValueError, r"input: expected shape \(E, N, C\) with E >= 1", torch.zeros(0, 3, 4), Y, {}),
    (ValueError, r"input: expected shape \(E, N, C\)", torch.zeros(3, 4), Y, {}),
    (ValueError, "input: expected experts of one shape", [torch.zeros(3, 4), torch.zeros(3, 5)], Y, {}),
    (TypeError, r"input\[1\]: expected a torch.Tensor, found NoneType", [torch.zeros(3, 4), None], Y, {}),
    (TypeError, "input: expected float64, .* found torch.int64", Z.long(), Y, {}),
    (TypeError, "target: expected labels of an integer type", Z, torch.zeros(3), {}),
    (ValueError, r"target: expected labels of shape \(3,\)", Z, torch.tensor([0, 1]), {}),
    (IndexError, r"target: expected labels in \[0, 4\)", Z, torch.tensor([0, 1, 4]), {}),
    (ValueError, r"weight: expected shape \(2, 4\) or \(4,\), found \(3, 4\)", Z, Y, {"weight": torch.ones(3, 4)}),
    (ValueError, "weight: expected finite values >= 0", Z, Y, {"weight": torch.tensor([1.0, -1.0, 1.0, 1.0])}),
    (TypeError, "class_bias: expected a floating type", Z, Y, {"class_bias": torch.ones(4).long()}),
    (ValueError, "class_bias: expected finite values or -inf", Z, Y, {"class_bias": torch.full((4,), math.inf)}),
    (
        ValueError,
        "target: expected labels of classes with a finite class_bias or weight 0, found class 3 .* for expert 1",
        Z,
        Y,
        {"class_bias": torch.tensor([[0.0] * 4, [0.0, 0.0, 0.0, -math.inf]])},
    ),
    (ValueError, "class_margin: expected a finite number", Z, Y, {"class_margin": math.nan}),
    (ValueError, "class_scale: expected finite values", Z, Y, {"class_scale": torch.full((4,), math.inf)}),
    (ValueError, r"sample_weight: expected shape \(3,\)", Z, Y, {"sample_weight": torch.ones(4)}),
    (ValueError, "diversity_factor: expected a finite number", Z, Y, {"diversity_factor": math.inf}),
    (ValueError, "diversity_temperature: expected a finite number > 0", Z, Y, {"diversity_temperature": 0.0}),
    (
        ValueError,
        "diversity_temperature: expected .* > 0",
        Z,
        Y,
        {"diversity_factor": 1.0, "diversity_temperature": torch.tensor([1.0, 1.0, -1.0, 1.0])},
    ),
    (ValueError, r"teacher: expected shape \(3, 4\)", Z, Y, {"teacher": torch.zeros(3, 5)}),
    (TypeError, "teacher: expected float64", Z, Y, {"teacher": torch.zeros(3, 4).long()}),
    (ValueError, "distillation_factor: expected a finite number >= 0", Z, Y, {"distillation_factor": -1.0}),
    (ValueError, "distillation_temperature: expected a finite number > 0", Z, Y, {"distillation_temperature": 0.0}),
    (ValueError, "scale: expected a finite number > 0", Z, Y, {"scale": 0.0}),
    (ValueError, "reduction: expected 'none' or 'mean' or 'sum'", Z, Y, {"reduction": "batchmean"}),
    (ValueError, "empty: expected 'nan' or 'zero'", Z, Y, {"empty": "one"}),
    (TypeError, "aggregate: expected a bool, found 1", Z, Y, {"aggregate": 1}),
]


@each_checking_form
@pytest.mark.parametrize(
    ("error", "message", "z", "y", "options"), ERRORS, ids=[f"{i}-{error[1][:24]}" for i, error in enumerate(ERRORS)]
)
def test_wrong_calls(form: Form, error: type[Exception], message: str, z: Any, y: Any, options: dict[str, Any]) -> None:
    with form.use(), pytest.raises(error, match=message):
        expert_cross_entropy(z, y, **options)

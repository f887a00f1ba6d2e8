"""expert_cross_entropy: published forms, every backend against float64, limits.

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
from cross_entropy_cases import (
    FLOATS,
    GPU_BACKENDS,
    INTEGERS,
    UPSTREAMS,
    Form,
    each_form,
)
from expert_cases import (
    LAYOUTS,
    NAMES,
    assert_near,
    converted,
    evaluate,
    expert_cross_entropy,
    labels,
    logits,
    options_of,
)
from test_cross_entropy_golden import TIES_THE_OTHER_WAY
from torch import Tensor

import ltkernels as ltk
from ltkernels.ops import expert_cross_entropy as op
from ltkernels.ops import gpu
from ltkernels.ops.options import ExpertCrossEntropyOptions, Reduction

DATA = Path(__file__).parent / "data"


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


def test_one_temperature_is_that_of_every_class() -> None:
    z, y = logits(3, 6, 5), torch.randint(0, 5, (6,))
    with ltk.use_backend("reference"):
        one, every = (
            expert_cross_entropy(z, y, diversity_factor=-0.2, diversity_temperature=temperature)
            for temperature in (1.7, torch.full((5,), 1.7).double())
        )
    torch.testing.assert_close(one, every)


def test_sade() -> None:
    """Each expert its own distribution; weights, factors and margins that are an expert's own, too."""
    z, y, scale = logits(3, 6, 5), torch.randint(0, 5, (6,)), 0.7
    bias, factor, margin, w = (torch.rand(3, 5).double() + 0.1 for _ in range(4))
    bias[0] = 0.0
    with ltk.use_backend("reference"):
        plain = expert_cross_entropy(z, y, class_bias=bias)
        full = expert_cross_entropy(
            z, y, w, scale=scale, class_scale=factor, class_bias=bias, class_margin=margin, reduction="none"
        )
    torch.testing.assert_close(plain, sum(F.cross_entropy(z[e] + bias[e], y) for e in range(3)))
    rows = torch.zeros(6)
    for e in range(3):
        u = scale * (factor[e] * z[e] + bias[e] - margin[e][y][:, None] * F.one_hot(y, 5))
        rows = rows + F.cross_entropy(u, y, w[e], reduction="none")
    torch.testing.assert_close(full, rows)


def test_what_the_mean_divides_by() -> None:
    """Cross-entropies by each expert's weights, divergences by the number of samples; or all by what is given."""
    z, y, w, r = logits(2, 6, 5), torch.tensor([0, -100, 2, 3, 4, 0]), torch.rand(2, 5).double(), torch.rand(6).double()
    counted = y != -100
    label = y.where(counted, 0)
    nll = torch.stack([-F.log_softmax(one, 1).gather(1, label[:, None])[:, 0] for one in z])
    share = r * w[:, label] * counted
    kl = sum(F.kl_div(F.log_softmax(one, 1), F.softmax(z.mean(0), 1), reduction="none").sum(1) for one in z)
    total, apart = (share * nll).sum(1), 0.3 * (r * kl * counted).sum()
    expected = {
        "weight": (total / share.sum(1)).sum() + apart / 5,
        "count": total.sum() / 5 + apart / 5,
        4.0: (total.sum() + apart) / 4,
    }
    with ltk.use_backend("reference"):
        for denominator, value in expected.items():
            ours = expert_cross_entropy(z, y, w, sample_weight=r, diversity_factor=0.3, denominator=denominator)
            torch.testing.assert_close(ours, value)


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


def published(name: str, golden: dict[str, Tensor]) -> dict[str, Any]:
    """The method in the terms of expert_cross_entropy."""
    counts = golden["counts"].double()
    if name == "ride_before_drw":  # Wang et al. 2021: LDAM's margins; no temperatures and weights yet
        margin = (counts.min() / counts) ** 0.25 * golden["max_margin"] * golden["scale"]
        return {"class_margin": margin, "diversity_factor": float(golden["diversity_factor"])}
    # Zhang et al. 2022: nothing, the prior, and also against the prior of ranks turned round
    prior = counts / counts.sum()
    order = prior.argsort(stable=True)
    inverse = torch.empty_like(prior).scatter(0, order, prior[order.flip(0)])
    first, second = torch.tensor(TIES_THE_OTHER_WAY).T
    inverse[first], inverse[second] = inverse[second], inverse[first]
    log_prior, log_inverse = (prior + 1e-9).log(), (inverse + 1e-9).log()
    return {"class_bias": torch.stack([torch.zeros(100), log_prior, log_prior - golden["tau"] * log_inverse])}


@each_form
@pytest.mark.parametrize("name", ["ride_before_drw", "sade"])
def test_golden(form: Form, name: str) -> None:
    with np.load(DATA / f"{name}.npz") as file:
        golden = {key: torch.from_numpy(np.array(value)) for key, value in file.items()}
    z = golden["logits"].to(form.device).requires_grad_()
    with form.use():
        options = converted(published(name, golden), form, z.dtype)
        loss = expert_cross_entropy(z, golden["target"].to(form.device), **options)
        (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss.cpu(), golden["loss"], rtol=2e-6, atol=0)
    assert float((gradient.cpu() - golden["grad"]).norm() / golden["grad"].norm()) <= 2e-6


# --- Every form against the reference in float64 ---


@each_form
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("experts", "classes"), [(1, 2), (2, 1), (3, 5), (3, 100), (2, 1029), (17, 5)])
def test_values(form: Form, dtype: torch.dtype, experts: int, classes: int) -> None:
    z, y = logits(experts, 4, classes, dtype=dtype), labels(4, classes)
    for reduction in ("mean", "sum", "none"):
        for name, options in options_of(experts, 4, classes).items():
            aggregate = name in ("plain", "ride", "all")
            truth = evaluate(None, z, y, aggregate, reduction=reduction, **options)
            ours = evaluate(form, z, y, aggregate, reduction=reduction, **converted(options, form, dtype))
            assert_near(ours, truth, dtype)


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
def test_experts_and_samples_at_stride_0(form: Form) -> None:
    z, y = logits(3, 4, 21, dtype=torch.float32), labels(4, 21)
    options = options_of(3, 4, 21)["all"]
    for view in (z[:1].expand(3, 4, 21), z[:, :1].expand(3, 4, 21)):
        truth = evaluate(None, view, y, True, **options)
        assert_near(evaluate(form, view, y, True, **converted(options, form, z.dtype)), truth, z.dtype)


@each_form
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_may_replace_the_logits(form: Form, layout: str) -> None:
    implementation = next(row for row in op.OP.table.rows if row.backend == form.backend)
    for classes in (5, 300):
        z, y = LAYOUTS[layout](logits(2, 4, classes, dtype=torch.float32).to(form.device)), labels(4, classes)
        tensors = (z, y.to(form.device), *(None,) * 7)
        call = ExpertCrossEntropyOptions(reduction=Reduction.NONE, diversity=-0.2)
        grad = torch.rand(4, device=form.device)
        with form.use():
            _, state, _ = implementation.forward(*tensors, *call, False)
            (beside,) = implementation.backward(grad, state, *tensors, *call, True, False)
            (over,) = implementation.backward(grad, state, *tensors, *call, True, True)
        assert torch.equal(over, beside)
        assert (over.data_ptr() == z.data_ptr()) == (form.backend != "reference")


@each_form
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_first_backward_has_the_bits_of_the_second(form: Form, dtype: torch.dtype) -> None:
    """The first may hand out what the forward computed, the second recomputes."""
    for name in NAMES:
        z = logits(3, 6, 37, dtype=dtype).to(form.device).requires_grad_()
        options = converted(options_of(3, 6, 37)[name], form, dtype)
        with form.use():
            loss = expert_cross_entropy(z, labels(6, 37).to(form.device), **options)
            first, second = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


@each_form
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_upstream_gradients(form: Form, upstream: str) -> None:
    """The gradient is linear in that of each sample's loss, whatever its strides."""
    z, y = logits(3, 6, 37), labels(6, 37)
    options = options_of(3, 6, 37)["all"]
    _, ones = evaluate(form, z, y, reduction="sum", **converted(options, form, z.dtype))
    grad = UPSTREAMS[upstream](torch.empty(6, dtype=torch.float64)).to(form.device)
    x = z.to(form.device).requires_grad_()
    with form.use():
        rows = expert_cross_entropy(x, y.to(form.device), reduction="none", **converted(options, form, z.dtype))
        (gradient,) = torch.autograd.grad(rows, x, grad)
    torch.testing.assert_close(gradient.cpu(), 2 * ones * grad.cpu()[:, None], rtol=1e-10, atol=1e-12)


@each_form
@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda dtype: str(dtype)[6:])
def test_label_types(form: Form, dtype: torch.dtype) -> None:
    """Class 3 is ignored: also an index that unsigned types have. Every second of a longer tensor of labels."""
    z, y = logits(2, 12, 10, dtype=torch.float32), torch.arange(24) % 10
    options = options_of(2, 12, 10)["all"] | {"ignore_index": 3}
    truth = evaluate(None, z, y[::2], **options)
    assert_near(evaluate(form, z, y.to(dtype)[::2], **converted(options, form, z.dtype)), truth, z.dtype)


@each_form
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_teacher_of_another_type(form: Form, dtype: torch.dtype) -> None:
    teacher = logits(7, 300, dtype=dtype)
    for student in FLOATS:
        z = logits(2, 7, 300, dtype=student)
        truth = evaluate(None, z, torch.arange(7), teacher=teacher)
        strided = teacher.t().contiguous().t().to(form.device)
        assert_near(evaluate(form, z, torch.arange(7), teacher=strided), truth, student)


@each_form
def test_tables_of_all_experts_and_of_other_types(form: Form) -> None:
    """`(C,)` tables are those of each expert; float16, float64 and strided ones those of the computation."""
    z, y = logits(3, 6, 9, dtype=torch.float32), labels(6, 9)
    of_all = {"weight": logits(9).abs(), "class_scale": logits(9), "class_bias": logits(9), "class_margin": logits(9)}
    of_all = {key: table.half().double() for key, table in of_all.items()}
    truth = evaluate(None, z, y, class_margin=0.25, **{k: v for k, v in of_all.items() if k != "class_margin"})
    of_all["class_margin"] = torch.full((9,), 0.25)
    for change in (
        lambda table: table.half(),
        lambda table: table.double().repeat_interleave(2)[::2],
        lambda table: table.float().expand(3, 9),
        lambda table: table.float().repeat(3, 1).t().contiguous().t(),
    ):
        tables = {key: change(table).to(form.device) for key, table in of_all.items()}
        assert_near(evaluate(form, z, y, **tables), truth, z.dtype)


@each_form
def test_denominators(form: Form) -> None:
    z, y = logits(3, 6, 37, dtype=torch.float32), labels(6, 37)
    options = options_of(3, 6, 37)["all"]
    for denominator in ("weight", "count", 2.5, torch.tensor(2.5)):
        truth = evaluate(None, z, y, denominator=denominator, **options)
        given = converted(options | {"denominator": denominator}, form, z.dtype)
        assert_near(evaluate(form, z, y, **given), truth, z.dtype)


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
@pytest.mark.parametrize("name", ["ride", "all"])
def test_number_of_threads_changes_no_bit(form: Form, threads: Callable[[int], Any], name: str) -> None:
    z, y = logits(3, 16, 1029, dtype=torch.float32), labels(16, 1029)
    options = converted(options_of(3, 16, 1029)[name], form, z.dtype)
    alone = evaluate(form, z, y, True, **options)
    with threads(2):
        together = evaluate(form, z, y, True, **options)
    if form.backend != "reference":
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    if form.backend in GPU_BACKENDS:
        assert not gpu.tickets(torch.device(form.device), 1).any(), "tickets were not put back"


# --- Limits ---


@each_form
def test_what_ignored_samples_hold_reaches_nothing(form: Form) -> None:
    z, y, teacher = logits(3, 4, 5), torch.tensor([1, -100, 2, -100]), logits(4, 5)
    options = converted(options_of(3, 4, 5)["ride"], form, z.dtype)
    poisoned, bad_teacher = z.clone(), teacher.clone().to(form.device)
    poisoned[:, 1], poisoned[:, 3] = math.nan, 300.0
    bad_teacher[1], bad_teacher[3] = math.nan, math.inf
    for actual, expected in zip(
        evaluate(form, poisoned, y, teacher=bad_teacher, **options),
        evaluate(form, z[:, ::2], y[::2], teacher=teacher[::2].to(form.device), **options),
        strict=True,
    ):
        shown = actual[:, ::2] if actual.dim() else actual
        torch.testing.assert_close(shown, expected)
        assert actual.dim() == 0 or float(actual[:, 1::2].abs().sum()) == 0.0
    rows, mean, _ = evaluate(form, poisoned, y, True, reduction="none", **options)
    assert rows[1::2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(mean, poisoned.mean(0), equal_nan=True)  # which is no part of the loss


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
def test_no_expert_has_weight(form: Form) -> None:
    """Then the mean is one over nothing; told to be 0 there, it still has the divergences."""
    z, y, weight = logits(2, 6, 4), torch.tensor([0, 1, 0, 1, 0, 0]), torch.zeros(4, device=form.device)
    kl = sum(F.kl_div(F.log_softmax(one, 1), F.softmax(z.mean(0), 1), reduction="batchmean") for one in z)
    assert math.isnan(evaluate(form, z, y, weight=weight, diversity_factor=-0.2)[0])
    loss, _ = evaluate(form, z, y, weight=weight, diversity_factor=-0.2, empty="zero")
    torch.testing.assert_close(loss, -0.2 * kl)


@each_form
def test_what_has_no_weight_adds_nothing(form: Form) -> None:
    z = torch.tensor([[[0.0, -math.inf, 1.0]], [[1.0, 2.0, 0.5]]], dtype=torch.float64)
    y = torch.tensor([1])
    weight = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64, device=form.device)
    loss, gradient = evaluate(form, z, y, weight=weight)
    torch.testing.assert_close(loss, F.cross_entropy(z[1], y))
    assert float(gradient[0].abs().sum()) == 0.0
    assert float(evaluate(form, z, y)[0]) == math.inf
    none = torch.zeros(1, dtype=torch.float64, device=form.device)
    loss, gradient = evaluate(form, z, y, sample_weight=none, diversity_factor=-0.2, reduction="sum")
    assert float(loss) == float(gradient.abs().sum()) == 0.0


@each_form
def test_an_expert_that_knows_no_class(form: Form) -> None:
    """Its softmax is over nothing, 0 / 0, but it has no weight: the call is that with any other biases of this expert.

    300 classes are a long row of the CPU kernels and several vectors for each thread of the GPU's.
    """
    for classes in (5, 300):
        z, y = logits(2, 6, classes, dtype=torch.float32), labels(6, classes)
        bias, weight = torch.zeros(2, classes), torch.ones(2, classes)
        bias[0], weight[0] = -math.inf, 0.0
        for name in ("plain", "ride", "all"):
            options = options_of(2, 6, classes)[name] | {"weight": weight, "class_bias": bias}
            for reduction in ("mean", "sum", "none"):
                others = options | {"class_bias": torch.zeros(2, classes)}
                truth = evaluate(None, z, y, reduction=reduction, **others)
                given = converted(options, form, z.dtype)
                assert_near(evaluate(form, z, y, reduction=reduction, **given), truth, z.dtype)


@each_form
def test_no_class_is_left(form: Form) -> None:
    """By a sample's logits: NaN, as in plain PyTorch, and nothing at all for a sample or an expert without weight."""
    z, y, r = logits(2, 3, 5, dtype=torch.float32), torch.tensor([0, 1, 2]), torch.tensor([1.0, 0.0, 1.0])
    z[0, 1] = -math.inf
    assert evaluate(form, z, y, reduction="none")[0].isnan().tolist() == [False, True, False]
    weight = torch.tensor([[0.0] * 5, [1.0] * 5])
    x = z.clone().to(form.device).requires_grad_()
    for options, counted in (({"sample_weight": r}, r.expand(2, 3)), ({"weight": weight}, weight[:, :3])):
        truth = torch.stack([F.cross_entropy(one, y, reduction="none") for one in z])
        truth = torch.where(counted == 0, 0.0, truth).sum(0)
        with form.use():
            rows = expert_cross_entropy(x, y.to(form.device), reduction="none", **converted(options, form, z.dtype))
            first, again = (torch.autograd.grad(rows.sum(), x, retain_graph=True)[0].cpu() for _ in range(2))
        torch.testing.assert_close(rows.detach().cpu(), truth, rtol=1e-6, atol=1e-6)
        assert torch.equal(first, again) and float(first[counted == 0].abs().sum()) == 0.0
    z[0, 1, 3] = math.nan  # which no weight takes out
    rows, _ = evaluate(form, z, y, reduction="none", **converted({"sample_weight": r}, form, z.dtype))
    assert rows.isnan().tolist() == [False, True, False]


@each_form
@pytest.mark.parametrize("name", NAMES)
def test_masked_logits(form: Form, name: str) -> None:
    """-inf is no part of a softmax: of all experts a class that is not there, of one its own matter."""
    for classes in (6, 300):
        options = options_of(3, 4, classes)[name]
        z, y = logits(3, 4, classes), torch.tensor([0, 1, -100, 2])
        z[:, :, 4] = -math.inf
        if "teacher" in options:
            options["teacher"][:, 4] = -math.inf
        else:  # the mean is -inf then, too: a teacher would call for it
            z[1, 0, 5] = -math.inf
        truth = evaluate(None, z, y, reduction="none", **options)
        assert bool(truth[0].isfinite().all() and truth[1].isfinite().all())
        assert_near(evaluate(form, z, y, reduction="none", **converted(options, form, z.dtype)), truth, z.dtype)


@each_form
def test_the_only_class_that_is_left(form: Form) -> None:
    """By the logits or by the biases: nothing to learn, and no infinity less infinity."""
    z, y = logits(2, 3, 20, dtype=torch.float32), torch.full((3,), 7)
    alone = torch.full((20,), -math.inf).index_fill(0, torch.tensor(7), 0.0)
    loss, gradient = evaluate(form, z + alone, y, diversity_factor=-0.2)
    assert float(loss) == float(gradient.abs().sum()) == 0.0
    loss, gradient = evaluate(form, z, y, class_bias=alone.to(form.device))
    assert float(loss) == float(gradient.abs().sum()) == 0.0


@each_form
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits(form: Form, size: float) -> None:
    """e^1e4 is infinite. float32 has three digits behind the point there."""
    z, y = torch.linspace(-1, 1, 3 * 4 * 37).view(3, 4, 37) * size, labels(4, 37)
    options = options_of(3, 4, 37)["ride"]
    rows, gradient = evaluate(form, z, y, reduction="none", **converted(options, form, z.dtype))
    true_rows, true_gradient = evaluate(None, z, y, reduction="none", **options)
    torch.testing.assert_close(rows.double(), true_rows, rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-2, atol=1e-2)


@each_form
def test_nan_stays_in_its_sample(form: Form) -> None:
    z, y = logits(2, 3, 5, dtype=torch.float32), torch.tensor([0, 1, 2])
    z[1, 1, 2] = math.nan
    rows, gradient = evaluate(form, z, y, reduction="none", diversity_factor=-0.2)
    assert rows.isnan().tolist() == [False, True, False]
    assert not bool(gradient[:, ::2].isnan().any())


@each_form
def test_small_losses_keep_their_digits(form: Form) -> None:
    """Two experts with the label ahead by 40: plain PyTorch, and with it the reference, has 0 there."""
    z = torch.zeros(2, 1, 5)
    z[:, :, 0] = 40.0
    loss, gradient = evaluate(form, z, torch.tensor([0]))  # for an upstream gradient of 1/2
    others, absolute = 4 * math.exp(-40), 1e-6 if form.backend == "reference" else 0.0
    assert float(loss) == pytest.approx(2 * others, rel=1e-5, abs=absolute)
    assert float(gradient[0, 0, 0]) == pytest.approx(-others / 2, rel=1e-5, abs=absolute)
    assert float(gradient[1, 0, 3]) == pytest.approx(others / 8, rel=1e-5, abs=absolute)

"""aggregate_experts: every backend against float64, best classes, wrong calls.

Sizes: 1 and 2 classes, an odd number (every instruction set runs its tail), over 1024 (a second block of a sum).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cross_entropy_cases import FLOATS, GPU_BACKENDS, UPSTREAMS, Form, each_checking_form, each_form, each_gpu_form
from expert_cases import LAYOUTS, MODES, aggregate_experts, logits, weights_of
from torch import Tensor

import ltkernels as ltk
from ltkernels.ops import aggregate_experts as op
from ltkernels.ops import gpu
from ltkernels.ops.options import AggregateExpertsOptions, AggregateMode, ExpertWeights


def evaluate(form: Form | None, z: Tensor, weight: Tensor | None, mode: str) -> tuple[Tensor, ...]:
    """Mean, gradient of the logits and of the weights, of upstream gradients that differ; without a form the truth."""
    if form is None:
        weight = None if weight is None else weight.detach().cpu().double()
        with ltk.use_backend("reference"):
            return _evaluate(z.detach().cpu().double(), weight, mode)
    compute = torch.float64 if z.dtype == torch.float64 else torch.float32
    weight = None if weight is None else weight.to(form.device, compute)
    with form.use():
        return tuple(value.cpu() for value in _evaluate(z.to(form.device), weight, mode))


def _evaluate(z: Tensor, weight: Tensor | None, mode: str) -> tuple[Tensor, ...]:
    variables = [z.detach().requires_grad_()]
    variables += [] if weight is None else [weight.detach().clone().requires_grad_()]
    mean = aggregate_experts(*variables, mode=mode)
    upstream = torch.linspace(-1.0, 2.0, mean.numel(), dtype=torch.float64).reshape(mean.shape).to(mean.device)
    return mean.detach(), *torch.autograd.grad(mean, variables, upstream.to(mean.dtype))


def assert_near(actual: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    rounding = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert actual[0].dtype == actual[1].dtype == dtype
    for value, true in zip(actual, truth, strict=True):
        scale = float(true.abs().max()) if true.numel() else 0.0
        torch.testing.assert_close(value.double(), true, rtol=0, atol=rounding * (scale + 0.3))


# --- Values ---


@each_form
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("experts", "classes"), [(1, 2), (2, 1), (3, 5), (3, 100), (2, 1029), (17, 6)])
def test_values(form: Form, dtype: torch.dtype, experts: int, classes: int) -> None:
    z = logits(experts, 7, classes, dtype=dtype)
    for mode in MODES:
        for weight in weights_of(experts, 7, classes).values():
            assert_near(evaluate(form, z, weight, mode), evaluate(None, z, weight, mode), dtype)


@each_form
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [5, 300])
def test_layouts(form: Form, layout: str, classes: int) -> None:
    z = logits(3, 20, classes, dtype=torch.float32)
    for mode in MODES:
        for weight in weights_of(3, 20, classes).values():
            assert_near(evaluate(form, LAYOUTS[layout](z), weight, mode), evaluate(None, z, weight, mode), z.dtype)


def test_the_formulas() -> None:
    z = logits(3, 6, 5)
    w_e, w_i, w_c = (torch.rand(shape, dtype=torch.float64) for shape in ((3,), (6, 3), (3, 5)))
    shares = ((w_e, w_e[:, None, None]), (w_i, w_i.t()[:, :, None]), (w_c, w_c[:, None, :]))
    values = {"logits": z, "probs": z.softmax(2), "log_probs": z.log_softmax(2)}
    with ltk.use_backend("reference"):
        for mode, f in values.items():
            torch.testing.assert_close(aggregate_experts(z, mode=mode), f.mean(0))
            for weight, w in shares:
                torch.testing.assert_close(aggregate_experts(z, weight, mode), (w * f).sum(0) / w.sum(0))


@each_form
def test_where_sizes_do_not_tell_weights_are_by_sample(form: Form) -> None:
    z, weight = logits(3, 3, 3).to(form.device), torch.rand(3, 3, dtype=torch.float64, device=form.device)
    with form.use():
        mean = aggregate_experts(z, weight)
    torch.testing.assert_close(mean, torch.einsum("ie,eic->ic", weight / weight.sum(1, keepdim=True), z))


@each_form
def test_one_expert_is_its_softmax(form: Form) -> None:
    z = logits(1, 6, 37, dtype=torch.float32).to(form.device)
    with form.use():
        for weight in (None, torch.tensor([0.3], device=form.device)):
            assert torch.equal(aggregate_experts(z), z[0])
            torch.testing.assert_close(aggregate_experts(z, weight, "probs"), z[0].softmax(1))
            torch.testing.assert_close(aggregate_experts(z, weight, "log_probs"), z[0].log_softmax(1))


@each_form
@pytest.mark.parametrize("mode", MODES)
def test_permuting_experts_permutes_gradients(form: Form, mode: str) -> None:
    z, order = logits(4, 6, 37, dtype=torch.float32), torch.tensor([2, 0, 3, 1])
    for kind, weight in weights_of(4, 6, 37).items():
        axis = 1 if kind == "sample" else 0
        moved = None if weight is None else weight.index_select(axis, order)
        first, second = evaluate(form, z, weight, mode), evaluate(form, z[order], moved, mode)
        expected = (first[0], first[1][order], *(g.index_select(axis, order) for g in first[2:]))
        assert_near(second, tuple(value.double() for value in expected), z.dtype)


@each_form
def test_large_logits(form: Form) -> None:
    """e^1e4 is infinite."""
    for size in (1e4, -1e4):
        z = torch.linspace(-1, 1, 2 * 3 * 37).view(2, 3, 37) * size
        for mode in MODES:
            weight = torch.rand(2, dtype=torch.float64)
            # Of the weights, a gradient is a difference of sums as large as the logits.
            assert_near(evaluate(form, z, weight, mode)[:2], evaluate(None, z, weight, mode)[:2], z.dtype)


@each_form
def test_an_expert_without_weight_counts_for_nothing(form: Form) -> None:
    z = logits(2, 4, 5, dtype=torch.float32)
    for nothing in (-math.inf, math.nan):
        z[0] = nothing
        for mode in MODES:
            plain = {"logits": z[1], "probs": z[1].softmax(1), "log_probs": z[1].log_softmax(1)}[mode]
            for shape in ((2,), (4, 2), (2, 5)):
                weight = torch.ones(shape, device=form.device)
                weight[(slice(None), 0) if shape == (4, 2) else 0] = 0.0
                mean, d_z, d_weight = evaluate(form, z, weight, mode)
                torch.testing.assert_close(mean, plain)
                assert bool(d_weight.isfinite().all())
                if shape != (2, 5):  # there the softmax of classes with and without weight is one
                    assert float(d_z[0].abs().sum()) == 0.0


@each_form
def test_an_absent_class_stays_absent(form: Form) -> None:
    z = logits(2, 4, 5, dtype=torch.float32)
    z[:, :, 3] = -math.inf
    with form.use():
        for mode, value in (("logits", -math.inf), ("probs", 0.0), ("log_probs", -math.inf)):
            mean = aggregate_experts(z.to(form.device), mode=mode)
            assert mean[:, 3].tolist() == [value] * 4
            assert bool(torch.isfinite(mean[:, [0, 1, 2, 4]]).all())


@each_form
def test_no_samples(form: Form) -> None:
    z = torch.zeros(2, 0, 5, device=form.device, requires_grad=True)
    with form.use():
        for mode in MODES:
            mean = aggregate_experts(z, mode=mode)
            assert mean.shape == (0, 5)
            mean.sum().backward()
            assert aggregate_experts(z, mode=mode, topk=2).classes.shape == (0, 2)


@each_form
def test_a_list_of_experts(form: Form) -> None:
    z = logits(3, 4, 5).to(form.device)
    variables = [one.clone().requires_grad_() for one in z]
    whole = z.clone().requires_grad_()
    with form.use():
        mean = aggregate_experts(variables, mode="probs")
        mean.square().sum().backward()
        aggregate_experts(whole, mode="probs").square().sum().backward()
    torch.testing.assert_close(mean, z.softmax(2).mean(0))
    torch.testing.assert_close(torch.stack([one.grad for one in variables]), whole.grad)


@each_form
def test_experts_and_samples_at_stride_0(form: Form) -> None:
    z = logits(3, 4, 21, dtype=torch.float32)
    for view in (z[:1].expand(3, 4, 21), z[:, :1].expand(3, 4, 21)):
        for weight in weights_of(3, 4, 21).values():
            assert_near(evaluate(form, view, weight, "probs"), evaluate(None, view, weight, "probs"), z.dtype)


@each_form
def test_weights_of_any_type_and_strides(form: Form) -> None:
    z = logits(3, 4, 21, dtype=torch.float32).to(form.device)
    for weight in list(weights_of(3, 4, 21).values())[1:]:
        weight = weight.half().double()
        truth = evaluate(None, z, weight, "probs")
        for given in (
            weight.half(),
            weight,
            weight.float().t().contiguous().t(),
            torch.stack([weight] * 2, -1)[..., 1],
        ):
            w = given.to(form.device).requires_grad_()
            with form.use():
                mean = aggregate_experts(z, w, "probs")
                upstream = torch.linspace(-1.0, 2.0, mean.numel(), device=form.device).view(mean.shape)
                (gradient,) = torch.autograd.grad(mean, w, upstream)
            assert gradient.dtype == given.dtype
            torch.testing.assert_close(mean.cpu().double(), truth[0], rtol=1e-5, atol=1e-6)
            slack = 1e-3 if given.dtype == torch.half else 1e-5
            torch.testing.assert_close(gradient.cpu().double(), truth[2], rtol=slack, atol=slack)


@each_form
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_may_replace_the_logits(form: Form, layout: str) -> None:
    implementation = next(row for row in op.OP.table.rows if row.backend == form.backend)
    for classes, kind in ((5, "class"), (300, "expert"), (300, "class")):
        for mode in range(3):
            z = LAYOUTS[layout](logits(2, 4, classes, dtype=torch.float32).to(form.device))
            weight = weights_of(2, 4, classes)[kind].float().to(form.device)
            grad = torch.randn(4, classes, device=form.device)
            call = (z, weight, *AggregateExpertsOptions(mode, ExpertWeights[kind.upper()]))
            with form.use():
                _, state, _ = implementation.forward(*call, False)
                beside = implementation.backward(grad, state, *call, True, True, False)
                over = implementation.backward(grad, state, *call, True, True, True)
            assert all(torch.equal(x, y) for x, y in zip(over, beside, strict=True))
            assert (over[0].data_ptr() == z.data_ptr()) == (form.backend != "reference")


@each_form
def test_only_the_gradients_that_are_needed(form: Form) -> None:
    z = logits(3, 4, 21, dtype=torch.float32).to(form.device)
    for weight in list(weights_of(3, 4, 21).values())[1:]:
        weight = weight.float().to(form.device)
        for mode in MODES:
            with form.use():
                x, w = z.clone().requires_grad_(), weight.clone().requires_grad_()
                expected = torch.autograd.grad(aggregate_experts(x, w, mode).square().sum(), (x, w))
                of_logits = torch.autograd.grad(aggregate_experts(x, weight, mode).square().sum(), x)[0]
                of_weights = torch.autograd.grad(aggregate_experts(z, w, mode).square().sum(), w)[0]
            assert torch.equal(of_logits, expected[0])
            assert torch.equal(of_weights, expected[1])


@each_form
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_upstream_gradients(form: Form, upstream: str) -> None:
    z = logits(3, 8, 37).to(form.device)
    g = UPSTREAMS[upstream](torch.empty(8, 37, dtype=torch.float64)).to(form.device)
    for weight in list(weights_of(3, 8, 37).values())[1:]:
        for mode in MODES:
            results = []
            for strided in (g, g.t().contiguous().t(), g.clone().contiguous()):
                x, w = z.clone().requires_grad_(), weight.to(form.device).requires_grad_()
                with form.use():
                    results.append(torch.autograd.grad(aggregate_experts(x, w, mode), (x, w), strided))
            with ltk.use_backend("reference"):
                x, w = z.clone().requires_grad_(), weight.to(form.device).requires_grad_()
                truth = torch.autograd.grad(aggregate_experts(x, w, mode), (x, w), g)
            for result in results:
                torch.testing.assert_close(result, truth, rtol=1e-10, atol=1e-12)


@each_form
def test_number_of_threads_changes_no_bit(form: Form, threads: Callable[[int], Any]) -> None:
    z = logits(3, 16, 1029, dtype=torch.float32)
    for weight in weights_of(3, 16, 1029).values():
        alone = evaluate(form, z, weight, "probs")
        with threads(2):
            together = evaluate(form, z, weight, "probs")
        if form.backend != "reference":
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    if form.backend in GPU_BACKENDS:
        assert not gpu.tickets(torch.device(form.device), 1).any(), "tickets were not put back"


# --- The best classes ---


@each_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [3, 100, 1029])
def test_best_classes(form: Form, dtype: torch.dtype, classes: int) -> None:
    z = logits(3, 6, classes, dtype=dtype)
    for mode in MODES:
        for k in {1, 3, min(classes, 7)}:
            with form.use():
                best = aggregate_experts(z.to(form.device), mode=mode, topk=k)
            with ltk.use_backend("reference"):
                truth = aggregate_experts(z.double(), mode=mode)
            value, place = truth.topk(k)
            assert best.classes.dtype == torch.int64
            assert torch.equal(best.classes.cpu(), place)
            expected = value if mode == "probs" else truth.softmax(1).gather(1, place)
            torch.testing.assert_close(best.confidence.cpu().double(), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(best.output.cpu().double(), truth, rtol=2e-2, atol=2e-2)


@each_form
def test_of_equal_classes_the_first_is_better(form: Form) -> None:
    z = torch.tensor([[[1.0, 2.0, 2.0, 1.0, 2.0], [-math.inf] * 5]], device=form.device)
    with form.use():
        assert aggregate_experts(z, topk=5).classes.tolist() == [[1, 2, 4, 0, 3], [0, 1, 2, 3, 4]]
        many = (torch.arange(2000, device=form.device) % 7).float().expand(1, 1, 2000)
        assert aggregate_experts(many, topk=4).classes.tolist() == [[6, 13, 20, 27]]


@each_form
@pytest.mark.parametrize("mode", MODES)
def test_best_classes_of_a_weighted_mean(form: Form, mode: str) -> None:
    z = logits(3, 6, 37, dtype=torch.float32)
    for weight in list(weights_of(3, 6, 37).values())[1:]:
        with form.use():
            best = aggregate_experts(z.to(form.device), weight.float().to(form.device), mode, topk=4)
        with ltk.use_backend("reference"):
            truth = aggregate_experts(z.double(), weight, mode)
        value, place = truth.topk(4)
        assert torch.equal(best.classes.cpu(), place)
        expected = value if mode == "probs" else truth.softmax(1).gather(1, place)
        torch.testing.assert_close(best.confidence.cpu().double(), expected, rtol=1e-5, atol=1e-6)


@each_form
def test_nan_is_best(form: Form) -> None:
    """As torch sorts it: a sample that went wrong shows."""
    z = torch.tensor([[[1.0, math.nan, 3.0, math.nan, math.inf]]], device=form.device)
    with form.use():
        assert aggregate_experts(z, topk=4).classes.tolist() == [[1, 3, 4, 2]]


@each_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_returned_is_the_callers(form: Form, dtype: torch.dtype) -> None:
    """Writing to it changes no gradient; confidences have none."""
    z = logits(2, 3, 5, dtype=dtype).to(form.device).requires_grad_()
    with form.use():
        gradients = []
        for write in (False, True):
            best = aggregate_experts(z, mode="probs", topk=2)
            assert best.output.requires_grad and not best.confidence.requires_grad
            loss = (best.output * torch.arange(5, device=form.device)).sum()
            if write:
                for part in best:
                    part.add_(1)
            gradients.append(torch.autograd.grad(loss, z)[0])
    assert torch.equal(*gradients)


# --- Wrong calls ---

Z = torch.zeros(2, 3, 4)
ERRORS: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
    (ValueError, "input: expected at least one expert, found none", [], {}),
    (ValueError, r"input: expected shape \(E, N, C\) with E >= 1", torch.zeros(0, 3, 4), {}),
    (ValueError, r"input: expected shape \(E, N, C\) with E >= 1 and C >= 1", torch.zeros(2, 3, 0), {}),
    (ValueError, "input: expected experts of one shape", [torch.zeros(3, 4), torch.zeros(2, 4)], {}),
    (TypeError, "input: expected float64, .* found torch.int64", Z.long(), {}),
    (ValueError, "mode: expected 'logits' or 'probs' or 'log_probs', found 'mean'", Z, {"mode": "mean"}),
    (TypeError, r"input\[0\]: expected a torch.Tensor, found list", [[0.0]], {}),
    (ValueError, r"input: expected shape \(E, N, C\)", [torch.zeros(4)], {}),
    (ValueError, r"topk: expected a number of classes in \[0, 4\], found 5", Z, {"topk": 5}),
    (ValueError, r"topk: expected a number of classes in \[0, 4\], found -1", Z, {"topk": -1}),
    (TypeError, "topk: expected an integer, found 1.0", Z, {"topk": 1.0}),
    (
        ValueError,
        r"expert_weight: expected shape \(2,\), \(3, 2\) by sample or \(2, 4\) by class, found \(3,\)",
        Z,
        {"expert_weight": torch.ones(3)},
    ),
    (ValueError, "expert_weight: expected device cpu", Z, {"expert_weight": torch.ones(2, device="meta")}),
    (TypeError, "expert_weight: expected a torch.Tensor, found list", Z, {"expert_weight": [1.0, 1.0]}),
    (ValueError, "expert_weight: expected finite values >= 0", Z, {"expert_weight": torch.tensor([1.0, math.inf])}),
    (TypeError, "expert_weight: expected a floating type", Z, {"expert_weight": torch.ones(2).long()}),
    (ValueError, "expert_weight: expected finite values >= 0", Z, {"expert_weight": torch.tensor([1.0, -1.0])}),
    (ValueError, "expert_weight: expected an expert with weight > 0, found none", Z, {"expert_weight": torch.zeros(2)}),
    (
        ValueError,
        "expert_weight: expected an expert with weight > 0 for every class, found none at index 2",
        Z,
        {"expert_weight": torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]])},
    ),
    (
        ValueError,
        "expert_weight: expected an expert with weight > 0 for every sample, found none at index 1",
        Z,
        {"expert_weight": torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])},
    ),
]


@each_checking_form
@pytest.mark.parametrize(
    ("error", "message", "z", "options"), ERRORS, ids=[f"{i}-{error[1][:24]}" for i, error in enumerate(ERRORS)]
)
def test_wrong_calls(form: Form, error: type[Exception], message: str, z: Any, options: dict[str, Any]) -> None:
    with form.use(), pytest.raises(error, match=message):
        aggregate_experts(z, **options)


@each_gpu_form
@pytest.mark.parametrize("mode", [AggregateMode.PROBS, AggregateMode.LOG_PROBS])
def test_the_state_of_another_backend_is_refused(form: Form, mode: AggregateMode) -> None:
    z, options = logits(2, 4, 5, dtype=torch.float32).to(form.device), AggregateExpertsOptions(int(mode))
    state = op.new_state((z, None), options).fill_(-1.0)
    implementation = next(row for row in op.OP.table.rows if row.backend == form.backend)
    grad = torch.ones(4, 5, device=form.device)
    gradient = implementation.backward(grad, state, z, None, *options, True, False, False)[0]
    assert gradient.isnan().all()
    if form.device != "cpu":
        torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="expected the state of a forward on the same backend"):
        ltk.check()

"""aggregate_experts: every backend against float64, derivatives, best classes, ways in, wrong calls.

Sizes: 1 and 2 classes, an odd number (every instruction set runs its tail), over 1024 (a second block of a sum).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cross_entropy_cases import Form, each_checking_form, each_form
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ltkernels as ltk
from ltkernels.ops import aggregate_experts as op
from ltkernels.ops.options import AggregateExpertsOptions

aggregate_experts = ltk.functional.aggregate_experts
MODES = ("logits", "probs", "log_probs")


def logits(*shape: int, dtype: torch.dtype = torch.float64, spread: float = 3.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * spread).to(dtype)


def weights_of(experts: int, rows: int, classes: int) -> dict[str, Tensor | None]:
    """By what they depend on; one of the experts has none in places."""

    def table(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64) + 0.1

    by_class = table(experts, classes)
    by_class[0, ::2] = 0.0 if experts > 1 else 1.0
    by_sample = table(rows, experts)
    by_sample[::2, -1] = 0.0 if experts > 1 else 1.0
    return {"equal": None, "expert": table(experts), "sample": by_sample, "class": by_class}


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
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("experts", "classes"), [(1, 2), (2, 1), (3, 5), (3, 100), (2, 1029), (17, 6)])
def test_values(form: Form, dtype: torch.dtype, experts: int, classes: int) -> None:
    z = logits(experts, 7, classes, dtype=dtype)
    for mode in MODES:
        for weight in weights_of(experts, 7, classes).values():
            assert_near(evaluate(form, z, weight, mode), evaluate(None, z, weight, mode), dtype)


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
    z = logits(3, 20, classes, dtype=torch.float32)
    for mode in MODES:
        for weight in weights_of(3, 20, classes).values():
            assert_near(evaluate(form, LAYOUTS[layout](z), weight, mode), evaluate(None, z, weight, mode), z.dtype)


def test_the_formulas() -> None:
    z, w = logits(3, 6, 5), torch.rand(3, dtype=torch.float64)
    share = (w / w.sum())[:, None, None]
    with ltk.use_backend("reference"):
        torch.testing.assert_close(aggregate_experts(z, w), (share * z).sum(0))
        torch.testing.assert_close(aggregate_experts(z, w, "probs"), (share * z.softmax(2)).sum(0))
        torch.testing.assert_close(aggregate_experts(z, w, "log_probs"), (share * z.log_softmax(2)).sum(0))


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
                with form.use():
                    mean = aggregate_experts(z.to(form.device), weight, mode)
                torch.testing.assert_close(mean.cpu(), plain)


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
    with form.use():
        torch.testing.assert_close(aggregate_experts(list(z), mode="probs"), z.softmax(2).mean(0))


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


# --- Derivatives and ways in ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["equal", "expert", "sample", "class"])
def test_gradcheck_twice(mode: str, kind: str) -> None:
    z, weight = logits(2, 3, 4, spread=1.0).requires_grad_(), weights_of(2, 3, 4)[kind]
    variables = (z,) if weight is None else (z, (weight + 0.1).requires_grad_())
    assert torch.autograd.gradcheck(lambda *v: aggregate_experts(*v, mode=mode), variables)
    assert torch.autograd.gradgradcheck(lambda *v: aggregate_experts(*v, mode=mode), variables)


@pytest.mark.parametrize("mode", MODES)
def test_torch_func_and_second_backward(mode: str) -> None:
    z, weight = logits(3, 4, 5), torch.rand(3, dtype=torch.float64)
    variable = z.clone().requires_grad_()
    total = aggregate_experts(variable, weight, mode).square().sum()
    first, second = (torch.autograd.grad(total, variable, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    of = torch.func.grad(lambda x, w: aggregate_experts(x, w, mode).square().sum(), argnums=(0, 1))(z, weight)
    torch.testing.assert_close(of[0], first)
    weight.requires_grad_()
    aggregate_experts(z, weight, mode).square().sum().backward()
    torch.testing.assert_close(of[1], weight.grad)


@each_form
def test_any_upstream_gradient(form: Form) -> None:
    z, weight = logits(3, 8, 37, dtype=torch.float32).to(form.device), torch.rand(3, device=form.device)
    upstream = torch.randn(37, 8, device=form.device).t()
    with form.use():
        for mode in MODES:
            for g in (upstream, upstream[:1].expand(8, 37), torch.zeros(8, 37, device=form.device)):
                results = []
                for contiguous in (False, True):
                    x, w = z.clone().requires_grad_(), weight.clone().requires_grad_()
                    out = aggregate_experts(x, w, mode)
                    results.append(torch.autograd.grad(out, (x, w), g.contiguous() if contiguous else g))
                torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@each_form
def test_number_of_threads_changes_no_bit(form: Form, threads: Callable[[int], Any]) -> None:
    z = logits(3, 64, 1029, dtype=torch.float32)
    for weight in weights_of(3, 64, 1029).values():
        alone = evaluate(form, z, weight, "probs")
        with threads(2):
            together = evaluate(form, z, weight, "probs")
        if form.backend == "cpu":
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    z = logits(2, 4, 5, dtype=torch.float32).requires_grad_()
    with ltk.use_backend(backend):
        for kind, weight in enumerate(weights_of(2, 4, 5).values()):
            weight = None if weight is None else weight.float().requires_grad_()
            for mode in range(3):
                options = AggregateExpertsOptions(mode, kind, 2 if mode == 1 else 0)
                torch.library.opcheck(op.OP.forward, (z, weight, *options))


def test_compiles_to_one_graph() -> None:
    def step(z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        best = aggregate_experts(z, w, "probs", topk=2)
        return best.output.square().sum(), best.classes

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    z, w = logits(3, 4, 5, dtype=torch.float32), torch.rand(3)
    pairs = [(z.clone().requires_grad_(), w.clone().requires_grad_()) for _ in range(2)]
    results = step(*pairs[0]), compiled(*pairs[1])
    for total, _ in results:
        total.backward()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-8)
    torch._dynamo.reset()


@settings(max_examples=25, deadline=None)
@given(experts=st.integers(1, 5), rows=st.integers(1, 6), classes=st.integers(1, 40), seed=st.integers(0, 2**31 - 1))
def test_a_mean_lies_between_the_experts(experts: int, rows: int, classes: int, seed: int) -> None:
    torch.manual_seed(seed)
    z = logits(experts, rows, classes, dtype=torch.float32)
    for mode, value in (("logits", z), ("probs", z.softmax(2)), ("log_probs", z.log_softmax(2))):
        for weight in weights_of(experts, rows, classes).values():
            mean = aggregate_experts(z, None if weight is None else weight.float(), mode)
            slack = 1e-5 * (1 + float(value.abs().max()))
            assert bool((mean >= value.amin(0) - slack).all() and (mean <= value.amax(0) + slack).all())


# --- Wrong calls ---

Z = torch.zeros(2, 3, 4)
ERRORS: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
    (ValueError, "input: expected at least one expert, found none", [], {}),
    (ValueError, r"input: expected shape \(E, N, C\) with E >= 1", torch.zeros(0, 3, 4), {}),
    (ValueError, r"input: expected shape \(E, N, C\) with E >= 1 and C >= 1", torch.zeros(2, 3, 0), {}),
    (ValueError, "input: expected experts of one shape", [torch.zeros(3, 4), torch.zeros(2, 4)], {}),
    (TypeError, "input: expected float64, .* found torch.int64", Z.long(), {}),
    (ValueError, "mode: expected 'logits' or 'probs' or 'log_probs', found 'mean'", Z, {"mode": "mean"}),
    (ValueError, r"topk: expected a number of classes in \[0, 4\], found 5", Z, {"topk": 5}),
    (TypeError, "topk: expected an integer, found 1.0", Z, {"topk": 1.0}),
    (
        ValueError,
        r"expert_weight: expected shape \(2,\), \(3, 2\) by sample or \(2, 4\) by class, found \(3,\)",
        Z,
        {"expert_weight": torch.ones(3)},
    ),
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

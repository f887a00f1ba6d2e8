"""cross_entropy under torch.compile and torch.export, with autocast, fake and meta tensors.

Compiling takes seconds a graph, so a graph holds many losses: every option group is one loss in the same graph. The
backend is ``aot_eager`` (all of Dynamo and AOTAutograd, no code generation) except where code generation is the
subject.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from autograd_cases import CALLS, DETACHED, Problem, cross_entropy, problem
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import ltkernels as ltk

pytestmark = pytest.mark.filterwarnings("ignore:ltkernels. cross_entropy does not use the cpu backend")

Step = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(loss: Tensor, variables: tuple[Tensor, ...], upstream: float = 1.0) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, variables, torch.full_like(loss, upstream))


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(expected)
    for mine, other in zip(actual, expected, strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)


# --- One graph, the bits of eager ---


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_every_option_group_in_one_graph(dtype: torch.dtype) -> None:
    """Losses and gradients, of logits, class_scale and class_bias, at upstream 1 and another."""
    problems = [problem(call, rows=6, classes=37, dtype=dtype) for call in (CALLS | DETACHED).values()]

    def losses(*variables: Tensor) -> list[Tensor]:
        rest = iter(variables)
        return [p.loss(*(next(rest) for _ in range(1 + len(p.learnable)))) for p in problems]

    variables = tuple(variable for p in problems for variable in p.variables)
    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    for upstream in (1.0, 0.37):
        eager, ours = losses(*variables), compiled(*variables)
        for mine, other in zip(ours, eager, strict=True):
            assert torch.equal(mine, other) and mine.requires_grad and mine.dtype == torch.float32
        expected = torch.autograd.grad(eager, variables, [torch.full_like(v, upstream) for v in eager])
        actual = torch.autograd.grad(ours, variables, [torch.full_like(v, upstream) for v in ours])
        assert_same_bits(actual, expected)


def test_code_generation() -> None:
    """Inductor, with a linear layer before the loss and arithmetic behind it; none of it may be fused into the op."""
    weight = torch.randn(37, 8, requires_grad=True)
    bias = torch.randn(37, requires_grad=True)
    features, labels = torch.randn(6, 8), torch.randint(37, (6,))

    def step(w: Tensor, b: Tensor, f: Tensor, y: Tensor) -> Tensor:
        mean = cross_entropy(f @ w.t(), y, class_bias=b, label_smoothing=0.1)
        rows = cross_entropy((f @ w.t()).half(), y, focal_gamma=2.0, reduction="none")
        return mean * 2 + rows.square().mean()

    compiled = torch.compile(step, fullgraph=True)
    expected = step(weight, bias, features, labels)
    actual = compiled(weight, bias, features, labels)
    torch.testing.assert_close(actual, expected)
    for mine, other in zip(gradients(actual, (weight, bias)), gradients(expected, (weight, bias)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)  # the half logits are rounded elsewhere


# --- Shapes that change ---


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_no_recompilation_when_the_batch_size_changes(reduction: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    bias = torch.randn(7, requires_grad=True)

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def step(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return cross_entropy(x, y, class_bias=bias, sample_weight=r, reduction=reduction)

    compiled_once = None
    for n in (4, 9, 2, 33, 5):
        x, y, r = torch.randn(n, 7, requires_grad=True), torch.randint(7, (n,)), torch.rand(n) + 0.5
        loss = step(x, y, r)
        expected = cross_entropy(x, y, class_bias=bias, sample_weight=r, reduction=reduction)
        assert torch.equal(loss, expected)
        assert_same_bits(gradients(loss, (x, bias)), gradients(expected, (x, bias)))
        compiled_once = compiled_once or counter.frame_count  # Dynamo may start over within the first compilation
    assert counter.frame_count == compiled_once


def test_no_recompilation_by_automatic_dynamic_shapes() -> None:
    """Without dynamic=True the second size compiles once more, and no other does; 3-D probabilities as well."""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(x: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(x, t, label_smoothing=0.1, focal_gamma=1.0)

    for n in (4, 9, 3, 33):
        x, t = torch.randn(n, 7, 2, requires_grad=True), torch.softmax(torch.randn(n, 7, 2), 1)
        loss = step(x, t)
        expected = cross_entropy(x, t, label_smoothing=0.1, focal_gamma=1.0)
        assert_same_bits((loss, *gradients(loss, (x,), 3.0)), (expected, *gradients(expected, (x,), 3.0)))
    assert counter.frame_count == 2


# --- Precision ---


@pytest.mark.parametrize("compiled", (False, True))
def test_autocast_with_a_scaled_loss(compiled: bool) -> None:
    """bfloat16 logits from a linear layer, the loss multiplied as by a GradScaler; the truth is the same in float64."""
    weight, features, labels = torch.randn(37, 8, requires_grad=True), torch.randn(6, 8), torch.randint(37, (6,))
    prior = torch.randn(37)
    logits_seen: list[Tensor] = []

    def step(w: Tensor, f: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = torch.nn.functional.linear(f, w)
            loss = cross_entropy(logits, y, class_bias=prior)
        if not torch.compiler.is_compiling():
            logits_seen.append(logits)
        return loss * 1024.0

    run = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
    loss = run(weight, features, labels)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.float32
    if not compiled:
        assert logits_seen[0].dtype == torch.bfloat16
    w = weight.detach().double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(features.double() @ w.t() + prior, labels)
    torch.testing.assert_close(loss.double() / 1024, exact, rtol=2e-2, atol=0)
    (truth,) = torch.autograd.grad(exact, w)
    assert (gradient.double() / 1024 - truth).norm() < 2e-2 * truth.norm()


def test_grad_scaler_step() -> None:
    """torch.amp.GradScaler on float16 logits: the scaled gradients neither vanish nor overflow, and the step is the
    plain one.
    """
    labels = torch.randint(37, (6,))
    weights = [torch.linspace(-1, 1, 37 * 8).reshape(37, 8).requires_grad_() for _ in range(2)]
    features = torch.randn(6, 8)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizers = [torch.optim.SGD([w], lr=1.0) for w in weights]
    with torch.autocast("cpu", torch.float16):
        loss = cross_entropy(torch.nn.functional.linear(features, weights[0]), labels, label_smoothing=0.1)
    scaler.scale(loss).backward()
    scaler.step(optimizers[0])
    scaler.update()
    torch.nn.functional.cross_entropy(features @ weights[1].t(), labels, label_smoothing=0.1).backward()
    optimizers[1].step()
    assert scaler.get_scale() == 2.0**12
    torch.testing.assert_close(weights[0], weights[1], rtol=5e-3, atol=2e-3)


# --- Derivatives beyond the first, and parameters that the kernels do not differentiate ---


def test_double_backward_of_compiled_code_raises() -> None:
    """AOTAutograd has no second derivatives; zeros instead would be silent and wrong."""
    x, y = torch.randn(4, 7, requires_grad=True), torch.randint(7, (4,))
    compiled = torch.compile(
        lambda a: cross_entropy(a, y, class_bias=torch.ones(7)), backend="aot_eager", fullgraph=True
    )
    (gradient,) = torch.autograd.grad(compiled(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(gradient.square().sum(), x)


def test_compiled_torch_func_transforms() -> None:
    """A gradient penalty as the compiled function itself."""
    x, y = torch.randn(4, 7), torch.randint(7, (4,))

    def penalty(a: Tensor) -> Tensor:
        return torch.func.grad(lambda b: cross_entropy(b, y, scale=2.0))(a).square().sum()

    compiled = torch.compile(penalty, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), penalty(x))
    expected = torch.func.grad(penalty)(x)
    assert expected.any()
    torch.testing.assert_close(torch.compile(torch.func.grad(penalty), backend="aot_eager")(x), expected)


def test_learnt_weights_and_probabilities_under_compile() -> None:
    """The reference, traced into the graph."""
    x, t = torch.randn(4, 7), torch.softmax(torch.randn(4, 7), 1).requires_grad_()
    weight = torch.rand(7, requires_grad=True)

    def step(w: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(x, target, w, label_smoothing=0.1)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for mine, other in zip(
        gradients(compiled(weight, t), (weight, t)), gradients(step(weight, t), (weight, t)), strict=True
    ):
        assert other.any()
        torch.testing.assert_close(mine, other)


# --- The backend of compiled code is chosen when it runs ---


def test_use_backend_around_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any mixture of the forward's and the backward's backend, without compiling again."""
    counter = CompileCounterWithBackend("aot_eager")
    p: Problem = problem(CALLS["all"], rows=6, classes=37, dtype=torch.float32)
    step: Step = torch.compile(p.loss, backend=counter, fullgraph=True)
    variables = p.variables
    expected = gradients(p.loss(*variables), variables)
    for forward in ("cpu", "reference"):
        for backward in ("cpu", "reference"):
            with ltk.use_backend(forward):
                loss = step(*variables)
            with ltk.use_backend(backward):
                actual = gradients(loss, variables)
            for mine, other in zip(actual, expected, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
    assert counter.frame_count == 1
    with ltk.use_backend("reference"):
        monkeypatch.setattr("ltkernels.ops.table.compiled_ops", lambda *names: pytest.fail("the cpu backend was used"))
        gradients(step(*variables), variables)


def test_bad_values_are_refused_by_compiled_code_too() -> None:
    compiled = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 7, requires_grad=True)
    for backend in ("cpu", "reference"):
        with ltk.use_backend(backend), pytest.raises(IndexError, match=r"expected labels in \[0, 7\)"):
            compiled(x, torch.tensor([0, 1, 7, 2]))


# --- Export, modules, tensors without memory ---


def test_export() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(8, 3)
            self.criterion = ltk.losses.LogitAdjustedLoss([90, 9, 1], label_smoothing=0.1)

        def forward(self, features: Tensor, labels: Tensor) -> Tensor:
            return self.criterion(self.head(features), labels)

    model, n = Model(), torch.export.Dim("n", min=2)
    example = torch.randn(5, 8), torch.randint(3, (5,))
    program = torch.export.export(model, example, dynamic_shapes=({0: n}, {0: n}))
    ops = [str(node.target) for node in program.graph.nodes if "ltkernels" in str(node.target)]
    assert ops == ["ltkernels.cross_entropy.default"]
    other = torch.randn(11, 8), torch.randint(3, (11,))
    assert torch.equal(program.module()(*other), model(*other))


def test_modules_with_and_without_schedules_are_one_graph() -> None:
    criteria = torch.nn.ModuleList(
        [
            ltk.losses.CrossEntropyLoss(class_bias=torch.nn.Parameter(torch.randn(5))),
            ltk.losses.LDAMLoss([50, 20, 10, 5, 1], reweight_epoch=1),
            ltk.losses.FocalLoss(),
        ]
    )

    def total(x: Tensor, y: Tensor) -> Tensor:
        return sum((criterion(x, y) for criterion in criteria), torch.zeros(()))

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    x, y = torch.randn(6, 5, requires_grad=True), torch.randint(5, (6,))
    variables = (x, *criteria.parameters())
    assert_same_bits(gradients(compiled(x, y), variables), gradients(total(x, y), variables))


@pytest.mark.parametrize("name", ("plain", "none", "inner none", "probabilities with all"))
def test_fake_and_meta_tensors_have_the_shapes_of_real_ones(name: str) -> None:
    p = problem(CALLS[name], dtype=torch.bfloat16)
    variables = p.variables
    real = p.loss(*variables)
    real_grads = gradients(real, variables)
    values = tuple(v.detach() for v in variables)

    def check(convert: Callable[[Tensor], Tensor]) -> None:
        arguments = {k: convert(v) if isinstance(v, Tensor) else v for k, v in p.arguments.items()}
        twin = Problem(convert(p.logits), convert(p.target), arguments, p.learnable)
        leaves = tuple(convert(v).requires_grad_() for v in values)
        loss = twin.loss(*leaves)
        grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
        for mine, other in zip((loss, *grads), (real, *real_grads), strict=True):
            assert mine.shape == other.shape and mine.dtype == other.dtype
            assert mine.device.type == "meta" or mine.stride() == other.stride()  # on meta the reference computes

    with FakeTensorMode() as mode:
        check(mode.from_tensor)
    check(lambda v: v.to("meta"))

"""expert_linear and ExpertHeads: every mode against float64, derivatives, memory, ways in, wrong calls.

Sizes are odd, so that nothing divides into chunks; ``chunked`` makes chunks of 5 rows or 3 classes
of what would be one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from cross_entropy_cases import Form, each_form
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ltkernels as ltk
from ltkernels.bench.device import Cpu
from ltkernels.ops import averaged_linear
from ltkernels.ops import expert_linear as op
from ltkernels.ops.options import ExpertLinearOptions

expert_linear = ltk.functional.expert_linear
E, N, C, D = 3, 23, 7, 5
MODES = ("logits", "probs", "log_probs")
WEIGHTS = {"equal": None, "expert": (E,), "sample": (N, E), "class": (E, C)}

each_mode = pytest.mark.parametrize("mode", MODES)
each_kind = pytest.mark.parametrize("kind", WEIGHTS)
each_sharing = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])


@pytest.fixture(params=[False, True], ids=["whole", "chunked"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Rows in one piece, whose logits are kept, and in chunks, whose logits are made again."""
    if request.param:
        _make_chunks(monkeypatch)
    yield request.param


def _make_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LEAST_ROWS": 5, "KEPT_BYTES": 0, "CPU_SCRATCH_BYTES": 0}.items():
        monkeypatch.setattr(op, name, value)
    monkeypatch.setattr(averaged_linear, "chunk_classes", lambda input, weight: 3)


def make(
    shared: bool, kind: str = "equal", dtype: torch.dtype = torch.float64, bias: bool = True, rows: int = N
) -> list[Tensor | None]:
    """Features, classifiers, biases and weights; one expert has no weight in places."""
    shape = WEIGHTS[kind]
    weight = None
    if shape is not None:
        shape = (rows, E) if kind == "sample" else shape
        weight = torch.rand(shape, dtype=torch.float64) + 0.1
        weight.view(-1)[1] = 0.0
    values = [
        torch.randn(*(() if shared else (E,)), rows, D, dtype=torch.float64),
        torch.randn(E, C, D, dtype=torch.float64),
        torch.randn(E, C, dtype=torch.float64) if bias else None,
    ]
    return [*(None if value is None else value.to(dtype) for value in values), weight]


def leaves(arguments: list[Tensor | None]) -> list[Tensor | None]:
    return [None if value is None else value.detach().clone().requires_grad_() for value in arguments]


def given(arguments: list[Tensor | None]) -> list[Tensor]:
    return [value for value in arguments if value is not None]


def formula(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    weight: Tensor | None,
    mode: str,
    normalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """One expert after the other, as the definition reads."""
    total = norm = torch.zeros((), dtype=x.dtype)
    for e in range(len(w)):
        features, classifier = x if x.dim() == 2 else x[e], w[e]
        if normalize:
            features = features / features.norm(dim=1, keepdim=True)
            classifier = classifier / classifier.norm(dim=1, keepdim=True)
        z = scale * features @ classifier.t()
        z = z if b is None else z + b[e]
        f = {"logits": z, "probs": z.softmax(1), "log_probs": z.log_softmax(1)}[mode]
        if weight is None:
            factor = torch.ones((), dtype=x.dtype)
        elif weight.shape == (len(x) if x.dim() == 2 else x.shape[1], len(w)):
            factor = weight[:, e].unsqueeze(1)
        else:
            factor = weight[e]
        total, norm = total + factor * f, norm + factor
    return total / norm


def with_gradients(form: Callable[..., Tensor], arguments: list[Tensor | None], *options: Any) -> list[Tensor]:
    variables = leaves(arguments)
    output = form(*variables, *options)
    upstream = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).reshape(output.shape).to(output)
    return [output.detach(), *torch.autograd.grad(output, given(variables), upstream)]


def assert_near(actual: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    assert len(actual) == len(truth)
    for value, true in zip(actual, truth, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=0, atol=tolerance * (0.3 + float(true.abs().max())))


# --- Values and gradients ---


@each_sharing
@each_kind
@each_mode
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_values_and_gradients(chunked: bool, shared: bool, kind: str, mode: str, bias: bool) -> None:
    arguments = make(shared, kind, bias=bias)
    for normalize, scale in ((False, 1.0), (False, 2.5), (True, 16.0)):
        actual = with_gradients(expert_linear, arguments, mode, normalize, scale)
        truth = with_gradients(formula, arguments, mode, normalize, scale)
        assert_near(actual[: 1 + len(given(arguments[:3]))], truth[: 1 + len(given(arguments[:3]))], 1e-12)
        assert_near(actual, truth, 1e-12)


@each_sharing
@each_kind
@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(chunked: bool, shared: bool, kind: str, mode: str, dtype: torch.dtype) -> None:
    arguments = make(shared, kind, dtype)
    actual = with_gradients(expert_linear, arguments, mode)
    exact = [None if value is None else value.double() for value in arguments]
    assert actual[0].dtype == actual[1].dtype == dtype
    # Half types: a rounding of the logits and one of each expert's share in the sum, and as many in the gradient.
    assert_near(actual, with_gradients(formula, exact, mode), 5e-6 if dtype == torch.float32 else 16 * eps(dtype))


@each_form
@each_sharing
@each_kind
def test_every_backend(form: Form, shared: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, so that what is between the products is the backend's kernels, into whose scratch they write."""
    _make_chunks(monkeypatch)
    arguments = make(shared, kind, torch.float32)
    exact = [None if value is None else value.double() for value in arguments]
    for mode in MODES:
        truth = with_gradients(formula, exact, mode)
        with form.use():
            found = with_gradients(
                expert_linear, [None if value is None else value.to(form.device) for value in arguments], mode
            )
        assert_near([value.cpu() for value in found], truth, 1e-5)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


@each_sharing
@pytest.mark.parametrize("normalize", [False, True])
def test_logits_of_each_expert(shared: bool, normalize: bool) -> None:
    x, w, b, _ = make(shared)
    logits = expert_linear(x, w, b, mode="experts", normalize=normalize, scale=3.0)
    assert logits.shape == (E, N, C)
    for e in range(E):
        one = formula(x if shared else x[e], w[e : e + 1], b[e : e + 1], None, "logits", normalize, 3.0)
        torch.testing.assert_close(logits[e], one)
    mean = ltk.functional.aggregate_experts(logits, mode="probs")
    torch.testing.assert_close(mean, expert_linear(x, w, b, None, "probs", normalize, 3.0))


def test_layouts_of_features_and_classifiers(chunked: bool) -> None:
    x, w, b, weight = make(False, "sample")
    samples_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    classes_last = w.mT.contiguous().mT
    for mode in MODES:
        truth = with_gradients(expert_linear, [x, w, b, weight], mode)
        variables = [samples_first.detach().requires_grad_(), classes_last.detach().requires_grad_(), b, weight]
        output = expert_linear(*variables, mode)
        upstream = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).reshape(output.shape)
        assert_near([output, *torch.autograd.grad(output, variables[:2], upstream)], truth[:3], 1e-13)


def test_only_the_gradients_that_are_needed(chunked: bool) -> None:
    arguments = make(False, "class")
    for mode in MODES:
        every = with_gradients(expert_linear, arguments, mode)[1:]
        for place in range(4):
            variables = [v.detach().clone().requires_grad_(i == place) for i, v in enumerate(arguments)]
            output = expert_linear(*variables, mode)
            upstream = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).reshape(output.shape)
            torch.testing.assert_close(torch.autograd.grad(output, variables[place], upstream)[0], every[place])


@each_sharing
def test_no_samples(chunked: bool, shared: bool) -> None:
    for mode in MODES:
        variables = leaves(make(shared, "expert", rows=0))
        output = expert_linear(*variables, mode)
        assert output.shape == (0, C)
        for grad in torch.autograd.grad(output.sum(), variables):
            assert not grad.any()


def test_a_wide_sum_of_half_values_keeps_its_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 chunks: added in bfloat16, a column's gradient would stand still once a part is 1/256 of it."""
    _make_chunks(monkeypatch)
    x, w, b, _ = make(True, dtype=torch.bfloat16, rows=1000)
    variables = leaves([x.abs(), w, b])
    upstream = torch.eye(C, dtype=torch.bfloat16)[0].expand(1000, C)
    actual = torch.autograd.grad(expert_linear(*variables, None, "log_probs"), variables, upstream)
    exact = leaves([value.detach().double() for value in variables])
    truth = torch.autograd.grad(formula(*exact, None, "log_probs"), exact, upstream.double())
    assert_near(list(actual), list(truth), 4 * eps(torch.bfloat16))


@each_sharing
@each_kind
@each_mode
def test_gradcheck_twice(chunked: bool, shared: bool, kind: str, mode: str) -> None:
    """8 rows: two chunks. Weights away from 0, where those of experts stop."""
    variables = leaves(make(shared, kind, rows=8))
    variables[3] = None if variables[3] is None else (variables[3].detach() + 0.1).requires_grad_()

    def form(*values: Tensor) -> Tensor:
        return expert_linear(*values[:3], values[3] if len(values) > 3 else None, mode, True, 2.0)

    assert torch.autograd.gradcheck(form, given(variables), fast_mode=True)
    assert torch.autograd.gradgradcheck(form, given(variables), fast_mode=True)


@each_mode
def test_torch_func_and_second_backward(chunked: bool, mode: str) -> None:
    arguments = make(False, "expert")

    def total(*values: Tensor) -> Tensor:
        return expert_linear(*values, mode).square().sum()

    variables = leaves(arguments)
    loss = total(*variables)
    first, second = (torch.autograd.grad(loss, variables, retain_graph=True) for _ in range(2))
    by_func = torch.func.grad(total, argnums=(0, 1, 2, 3))(*arguments)
    for a, b, c in zip(first, second, by_func, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
    batch = torch.stack([arguments[0], 2 * arguments[0]])
    mapped = torch.vmap(lambda x: expert_linear(x, *arguments[1:], mode))(batch)
    torch.testing.assert_close(mapped[1], expert_linear(batch[1], *arguments[1:], mode))


@each_mode
def test_any_upstream_gradient(chunked: bool, mode: str) -> None:
    arguments = make(True, "sample", torch.float32)
    upstream = torch.randn(C, N).t()
    for g in (upstream, upstream[:1].expand(N, C), torch.zeros(N, C)):
        results = []
        for one in (g, g.contiguous()):
            variables = leaves(arguments)
            results.append(torch.autograd.grad(expert_linear(*variables, mode), variables, one))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


# --- Memory ---


class _Sizes(TorchDispatchMode):
    """The largest tensor that an op made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and not func.is_view:
                self.largest = max(self.largest, value.numel())
        return result


@each_sharing
@each_kind
def test_a_mean_of_logits_never_has_those_of_each_expert(shared: bool, kind: str) -> None:
    """Wide enough that nothing else is as large as ``(E, N, C)``."""
    n, c, d = 150, 200, 8
    weight = {"equal": None, "expert": torch.rand(E), "sample": torch.rand(n, E), "class": torch.rand(E, c)}[kind]
    x = torch.randn(*(() if shared else (E,)), n, d, requires_grad=True)
    w, b = torch.randn(E, c, d, requires_grad=True), torch.randn(E, c, requires_grad=True)
    with _Sizes() as sizes:
        expert_linear(x, w, b, weight).square().sum().backward()
    assert sizes.largest == n * c


@each_sharing
def test_forward_memory_of_a_mean_of_logits(shared: bool) -> None:
    """Of shared features too many for a mean classifier beside the result, which is kept for no backward either."""
    n, c, d = 256, 1000, 256
    x = torch.randn(*(() if shared else (E,)), n, d, requires_grad=True)
    w, b = torch.randn(E, c, d, requires_grad=True), torch.randn(E, c)
    eager = Cpu().peak_bytes(lambda: (torch.matmul(x, w.mT) + b.unsqueeze(1)).mean(0))
    assert Cpu().peak_bytes(lambda: expert_linear(x, w, b)) <= eager / E


@each_sharing
def test_memory_of_a_mean_of_softmaxes_does_not_grow_with_the_rows(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond features, result and their gradients: a chunk's logits and mean, and the gradients of the classifiers."""
    monkeypatch.setattr(op, "KEPT_BYTES", 0)
    monkeypatch.setattr(op, "CPU_SCRATCH_BYTES", 0)
    c, d = 100, 8
    w, b = torch.randn(E, c, d, requires_grad=True), torch.randn(E, c, requires_grad=True)
    peaks = []
    for n in (4 * op.LEAST_ROWS, 8 * op.LEAST_ROWS):
        x, upstream = torch.randn(*(() if shared else (E,)), n, d, requires_grad=True), torch.randn(n, c)
        call = lambda x=x, g=upstream: torch.autograd.grad(expert_linear(x, w, b, None, "probs"), (x, w, b), g)  # noqa: E731
        call()
        peaks.append(Cpu().peak_bytes(call) - 4 * (n * c + x.numel()))
    assert peaks[1] < peaks[0] + 10_000
    assert peaks[1] < 4 * 1.6 * E * op.LEAST_ROWS * c + 2 * 4 * w.numel() + 10_000


def test_the_scratch_is_chosen_by_the_size() -> None:
    x, w = torch.empty(4096, 8, device="meta"), torch.empty(E, 1000, 8, device="meta")
    rows = op.chunk_rows(torch.empty(4096, 8), w)
    assert rows * E * 1000 * 4 <= op.CPU_SCRATCH_BYTES < (rows + 1) * E * 1000 * 4
    assert op.chunk_rows(x, torch.empty(E, 10**7, 8, device="meta")) == op.LEAST_ROWS
    few, features = torch.empty(1, 512, device="meta"), torch.empty(512, 512, device="meta")
    w = torch.empty(E, 8142, 512, device="meta")
    assert averaged_linear.chunk_classes(few, w) == averaged_linear.SCRATCH_BYTES // (512 * 4)
    assert averaged_linear.chunk_classes(features, w) == 8142 // (2 * E)
    assert averaged_linear.chunk_classes(x.expand(4096, 8), torch.empty(E, 10, 8)) == 10
    w = torch.empty(E, 1000, 8, device="meta")
    assert op.may_keep(x[:256], w)
    assert not op.may_keep(torch.empty(10**5, 8, device="meta"), w)
    with torch.no_grad():  # nothing has to be kept, so the cache decides
        assert not op.may_keep(torch.empty(4096, 8), w)


# --- Ways in ---


@each_sharing
@pytest.mark.parametrize("mode", [*MODES, "experts"])
def test_compiles_to_one_graph_for_any_number_of_rows(chunked: bool, shared: bool, mode: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *values: expert_linear(*values, mode, True, 2.0), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for rows in (N, 31):
        arguments = make(shared, "expert", torch.float32, rows=rows)
        arguments[3] = None if mode == "experts" else arguments[3]
        plain = with_gradients(lambda *values: expert_linear(*values, mode, True, 2.0), arguments)
        for value, true in zip(with_gradients(compiled, arguments), plain, strict=True):
            torch.testing.assert_close(value, true, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@each_sharing
@each_kind
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(shared: bool, kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_chunks(monkeypatch)
    arguments = leaves(make(shared, kind, torch.float32))
    arguments[3] = None if arguments[3] is None else arguments[3].detach().float().requires_grad_()
    for mode in (0, 1, 2):
        options = ExpertLinearOptions(mode, list(WEIGHTS).index(kind))
        with ltk.use_backend(backend):
            torch.library.opcheck(op.OP.forward, (*arguments, *options))


@each_sharing
@each_kind
@pytest.mark.parametrize("mode", [*MODES, "experts"])
def test_autocast(chunked: bool, shared: bool, kind: str, mode: str) -> None:
    """No further from float64 than PyTorch's layers under autocast by more than a rounding of the result."""
    x, w, b, weight = make(shared, kind, torch.float32)
    weight = None if mode == "experts" else weight
    variables = leaves([x, w, b])
    with torch.autocast("cpu", torch.bfloat16):
        output = expert_linear(*variables, weight, mode)
        layers = torch.stack([torch.nn.functional.linear(x if shared else x[e], w[e], b[e]).double() for e in range(E)])
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(v.grad.dtype == torch.float32 and bool(torch.isfinite(v.grad).all()) for v in variables)
    exact = torch.matmul(x.double(), w.double().mT) + b.double().unsqueeze(1)
    off = float((layers - exact).abs().max())
    truth = exact if mode == "experts" else formula(x.double(), w.double(), b.double(), weight, mode)
    assert float((output.detach().double() - truth).abs().max()) <= 2 * off + 2 * eps(torch.bfloat16) * float(
        truth.abs().max()
    )


def test_autocast_leaves_float64_alone() -> None:
    arguments = make(False, "expert")
    with torch.autocast("cpu", torch.bfloat16):
        for mode in MODES:
            torch.testing.assert_close(expert_linear(*arguments, mode), formula(*arguments, mode))


def test_backends_and_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    _make_chunks(monkeypatch)
    arguments = make(False, "expert")
    by_cpu = expert_linear(*arguments, "probs")
    with ltk.use_backend("reference"):
        torch.testing.assert_close(expert_linear(*arguments, "probs"), by_cpu)
    assert "expert_linear on cpu" in ltk.explain(expert_linear, *arguments, "probs")


def test_number_of_threads_changes_only_roundings(
    chunked: bool, threads: Callable[[int], AbstractContextManager[None]]
) -> None:
    arguments = make(False, "expert", torch.float32, rows=64)
    for mode in MODES:
        alone = with_gradients(expert_linear, arguments, mode)
        with threads(2):
            together = with_gradients(expert_linear, arguments, mode)
        assert_near(together, [value.double() for value in alone], 1e-6)


# --- Wrong calls ---

X, W, B = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(2, 5)
ERRORS: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "input: expected a torch.Tensor, found list", ([1.0], W), {}),
    (TypeError, "input: expected float64, .* found torch.int64", (X.long(), W), {}),
    (ValueError, r"input: expected shape \(2, N, 4\), or \(N, 4\) .* found \(3, 3, 4\)", (torch.zeros(3, 3, 4), W), {}),
    (ValueError, r"input: expected shape \(2, N, 4\), or \(N, 4\) .* found \(3, 5\)", (torch.zeros(3, 5), W), {}),
    (ValueError, r"input: expected shape .* found \(4,\)", (torch.zeros(4), W), {}),
    (ValueError, r"weight: expected shape \(E, C, D\) with E >= 1", (X, torch.zeros(5, 4)), {}),
    (TypeError, "weight: expected torch.float32 as input's, found torch.float64", (X, W.double()), {}),
    (TypeError, "bias: expected torch.float32 as input's, found torch.float16", (X, W, B.half()), {}),
    (ValueError, r"bias: expected shape \(2, 5\), found \(5,\)", (X, W, torch.zeros(5)), {}),
    (ValueError, "weight: expected device cpu as input's, found meta", (X, W.to("meta")), {}),
    (ValueError, "mode: expected 'logits' or 'probs' or 'log_probs' or 'experts'", (X, W), {"mode": "mean"}),
    (ValueError, "scale: expected a finite number > 0, found 0.0", (X, W), {"scale": 0.0}),
    (TypeError, "scale: expected a number, found str", (X, W), {"scale": "1"}),
    (
        ValueError,
        r"expert_weight: expected shape \(2,\), \(3, 2\) by sample or \(2, 5\) by class, found \(3,\)",
        (X, W, B, torch.ones(3)),
        {},
    ),
    (TypeError, "expert_weight: expected a floating type", (X, W, B, torch.ones(2).long()), {}),
    (ValueError, "expert_weight: expected finite values >= 0", (X, W, B, torch.tensor([1.0, -1.0])), {}),
    (ValueError, "expert_weight: expected finite values >= 0", (X, W, B, torch.tensor([1.0, math.inf])), {}),
    (ValueError, "expert_weight: expected an expert with weight > 0, found none", (X, W, B, torch.zeros(2)), {}),
    (ValueError, "expert_weight: .* found none at index 2", (X, W, B, torch.tensor([[1.0, 1], [1, 0], [0, 0]])), {}),
    (ValueError, "expert_weight: expected None with mode='experts'", (X, W, B, torch.ones(2)), {"mode": "experts"}),
]


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"), ERRORS, ids=[f"{i}-{e[1][:24]}" for i, e in enumerate(ERRORS)]
)
def test_wrong_calls(error: type[Exception], message: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        expert_linear(*arguments, **options)

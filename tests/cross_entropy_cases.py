"""What the cross_entropy tests share: the ways to compute it, the calls, their truth and when a result is right.

A `Case` is one call. Its truth is the reference backend in float64 on the very numbers the case holds, so that rounding
of inputs is nobody's error; `test_cross_entropy_values.py` holds the reference against the formula of the docstring.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import ltkernels as ltk
from ltkernels import backends

cross_entropy = ltk.functional.cross_entropy

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
NEVER_IGNORED = -100  # torch's default ignore_index
# torch.manual_seed also keeps its formatted stack for a GPU that is not there: 1 ms a call.
seed = torch.default_generator.manual_seed


# --- The ways to compute ---


@dataclass(frozen=True)
class Form:
    """A backend on a device, for `cpu` with one of its instruction sets."""

    backend: str
    instruction_set: str | None = None
    device: str = "cpu"

    @contextmanager
    def use(self) -> Iterator[None]:
        if self.instruction_set is not None:
            before = backends.cpu_instruction_set()
            backends.cpu_instruction_set(self.instruction_set)
        try:
            with ltk.use_backend(self.backend):
                yield
        finally:
            if self.instruction_set is not None:
                backends.cpu_instruction_set(before)

    def __str__(self) -> str:
        return "-".join(
            filter(None, (self.backend, self.instruction_set, self.device if self.device != "cpu" else None))
        )


def _instruction_sets() -> Iterator[str]:
    default = backends.cpu_instruction_set()
    for name in backends.CPU_INSTRUCTION_SETS:
        try:
            backends.cpu_instruction_set(name)
        except ValueError:  # not on this processor
            continue
        yield name
    backends.cpu_instruction_set(default)


def _forms(device: str) -> Iterator[Form]:
    for backend in ltk.available_backends(device):
        for instruction_set in _instruction_sets() if backend == "cpu" else (None,):
            yield Form(backend, instruction_set, device)


FORMS = list(_forms("cpu")) + (list(_forms("cuda")) if torch.cuda.is_available() else [])
each_form = pytest.mark.parametrize(
    "form", [pytest.param(f, id=str(f), marks=[] if f.device == "cpu" else [pytest.mark.gpu]) for f in FORMS]
)
each_kernel_form = pytest.mark.parametrize(
    "form",
    [
        pytest.param(f, id=str(f), marks=[] if f.device == "cpu" else [pytest.mark.gpu])
        for f in FORMS
        if f.backend != "reference"
    ],
)
# GPU backends do not look at values, which would stop the device; in tests they may be emulated on the CPU.
GPU_BACKENDS = ("cuda", "triton")
each_checking_form = pytest.mark.parametrize(
    "form", [f for f in FORMS if f.device == "cpu" and f.backend not in GPU_BACKENDS], ids=str
)
each_gpu_form = pytest.mark.parametrize(
    "form",
    [
        pytest.param(f, id=str(f), marks=[] if f.device == "cpu" else [pytest.mark.gpu])
        for f in FORMS
        if f.backend in GPU_BACKENDS
    ],
)


# --- A call ---


def _poison(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """NaN, or a label that is out of range."""
    return torch.full(shape, torch.nan if x.is_floating_point() else 125, dtype=x.dtype, device=x.device)


def _padded(x: Tensor) -> Tensor:
    wide = _poison(x, (*x.shape[:-1], x.shape[-1] + 3))
    wide[..., :-3] = x
    return wide[..., :-3]


def _offset(x: Tensor) -> Tensor:
    memory = _poison(x, (x.numel() + 1,))
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


def _every_second(x: Tensor) -> Tensor:
    return torch.stack([x, _poison(x, x.shape)], dim=-1)[..., 0]


# The same values in memory that kernels find harder; what lies between them is poison, so that reading it shows.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "offset": _offset,  # no row starts where vectors are aligned
    "padded": _padded,  # rows end before the next one begins
    "every_second": _every_second,  # class stride 2
    "class_strided": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 1 else x,
    "expanded": lambda x: x[:1].expand_as(x) if x.dim() > 1 else x,  # rows at stride 0; needs equal rows
}

UPSTREAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": torch.ones_like,
    "random": lambda loss: torch.rand_like(loss) + 0.5,
    "signed": torch.randn_like,
    "expanded": lambda loss: loss.new_tensor(0.75).expand(loss.shape),
    "sliced": lambda loss: torch.randn(*loss.shape, 2, dtype=loss.dtype, device=loss.device)[..., 0],
    "zero": torch.zeros_like,
    "some_zero": lambda loss: torch.randn_like(loss).relu(),
}


@dataclass(eq=False)
class Case:
    """One call: logits, target, keyword arguments, how the two lie in memory and what comes from above."""

    logits: Tensor
    target: Tensor
    arguments: dict[str, Any] = field(default_factory=dict)
    layout: str = "contiguous"
    target_layout: str = "contiguous"
    upstream: str = "one"
    learnable: tuple[str, ...] = ()  # of class_scale and class_bias


class Result(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]  # by argument


def _call(case: Case, logits: Tensor, target: Tensor, convert: Callable[[Tensor], Tensor]) -> Result:
    arguments = {k: convert(v) if isinstance(v, Tensor) else v for k, v in case.arguments.items()}
    for name in case.learnable:
        arguments[name] = arguments[name].detach().requires_grad_()
    logits = logits.detach().requires_grad_()
    loss = cross_entropy(logits, target, **arguments)
    seed(7)  # the same upstream for the truth and for every form, up to its rounding to float32
    upstream = UPSTREAMS[case.upstream](torch.empty(loss.shape)).to(loss)
    if case.upstream == "sliced":
        upstream = _every_second(upstream)
    variables = {"input": logits, **{name: arguments[name] for name in case.learnable}}
    grads = torch.autograd.grad(loss, list(variables.values()), upstream)
    return Result(loss.detach(), dict(zip(variables, grads, strict=True)))


def evaluate(case: Case, form: Form) -> Result:
    """The call as written, by `form`; it must leave its arguments as they were."""
    logits = LAYOUTS[case.layout](case.logits.to(form.device))
    before = logits.clone()
    with form.use():
        target = LAYOUTS[case.target_layout](case.target.to(form.device))
        result = _call(case, logits, target, lambda v: v.to(form.device))
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0)), "the logits were written to"
    return result


@lru_cache(maxsize=16)  # forms are the innermost loop of every test
def truth(case: Case) -> Result:
    """The same call in float64 by the reference backend."""
    target = case.target.double() if case.target.is_floating_point() else case.target
    with ltk.use_backend("reference"):
        return _call(case, case.logits.double().contiguous(), target.contiguous(), lambda v: v.double())


# --- When a result is right ---


def relative_error(actual: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """The L2 distance relative to the L2 norm, or to `least` if that is more.

    What is not finite must be the same infinity, and NaN is never equal.
    """
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    infinite = torch.isinf(expected)
    if not torch.equal(torch.isinf(actual), infinite) or (actual[infinite] != expected[infinite]).any():
        return torch.inf
    difference = (actual - expected)[~infinite].norm().item()
    size = max(least, expected[~infinite].norm().item())
    if difference != difference:
        return torch.inf
    return difference / size if size > 0 else (0.0 if difference == 0 else torch.inf)


def largest_adjusted_logit(case: Case) -> float:
    """A bound on max |u| where it is finite."""
    arguments = case.arguments
    size = 0.0
    for value, factor in ((case.logits, arguments.get("class_scale")), (arguments.get("class_bias"), None)):
        if value is not None and (finite := value[torch.isfinite(value)].double().abs()).numel() > 0:
            size += finite.max().item() * (1.0 if factor is None else factor.double().abs().max().item())
    margin = arguments.get("class_margin", 0.0)
    size += margin.double().abs().max().item() if isinstance(margin, Tensor) else abs(margin)
    return size * float(arguments.get("scale", 1.0))


def tolerance(case: Case, form: Form) -> float:
    """1e-12 in float64; in float32 1e-6, or the last bit of u where u is rounded and large.

    A float32 u is off by half an ulp, 2^-24 |u|, u - logsumexp(u) by twice that, and e^ of it by as much of itself.
    Without parameters the kernels subtract the maximum from the logits, which is exact where it matters. The reference
    in float32 may have some more: it is the definition, not the fast path.
    """
    if case.logits.dtype == torch.float64:
        return 1e-12
    adjusted = case.arguments.keys() & {"scale", "class_scale", "class_bias", "class_margin"}
    return max(
        1e-5 if form.backend == "reference" else 1e-6, 2.0**-23 * largest_adjusted_logit(case) if adjusted else 0.0
    )


def assert_right(actual: Result, expected: Result, case: Case, form: Form) -> None:
    """Relative L2 errors: at most `tolerance`, or for gradients in half 1.1 times the error of rounding the truth."""
    computed = torch.float64 if case.logits.dtype == torch.float64 else torch.float32
    limit = tolerance(case, form)
    # Plain PyTorch's log softmax is off by an ulp of u however small the loss is: so is the truth, in float64, and so
    # is the reference in float32, while the kernels keep the digits of small losses
    # (test_small_losses_keep_their_digits).
    ulp = 1e-15 if form.backend != "reference" or computed == torch.float64 else 1e-7
    least = max(1.0, largest_adjusted_logit(case)) * ulp * math.sqrt(case.target.numel()) / limit
    assert actual.loss.dtype == computed
    assert (error := relative_error(actual.loss, expected.loss, least)) <= limit, (
        f"loss: {error:.3g}, limit {limit:.3g}"
    )
    if case.logits.shape[0 if case.logits.dim() == 1 else 1] == 1:
        least = max(least, 1.0)  # one class: p - t = 0 but for rounding, and a z-loss is small beside it
    for name, gradient in actual.gradients.items():
        exact = expected.gradients[name]
        assert gradient.dtype == (case.logits if name == "input" else case.arguments[name]).dtype
        most = max(
            limit if name == "input" else 2 * limit, 1.1 * relative_error(exact.to(gradient.dtype), exact)
        )  # sums cancel
        assert (error := relative_error(gradient, exact, least)) <= most, (
            f"gradient of {name}: {error:.3g}, limit {most:.3g}"
        )


def check(case: Case, form: Form) -> None:
    assert_right(evaluate(case, form), truth(case), case, form)


# --- Making calls ---


def labels(
    count: tuple[int, ...], classes: int, dtype: torch.dtype = torch.int64, ignored: int | None = None
) -> Tensor:
    """Labels; with `ignored`, about a quarter of them are that."""
    y = torch.randint(min(classes, torch.iinfo(dtype).max), count)
    if ignored is not None:
        y = torch.where(torch.rand(count) < 0.25, ignored, y)
    return y.to(dtype)


def probabilities(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows that sum to about 1, some entries 0."""
    class_dim = 0 if len(shape) == 1 else 1
    t = torch.rand(shape).masked_fill(torch.rand(shape) < 0.3, 0.0)
    return (t / t.sum(class_dim, keepdim=True).clamp_min(0.1)).to(dtype)


def positive(classes: int, dtype: torch.dtype = torch.float32, zeros: bool = False) -> Tensor:
    value = torch.rand(classes) + 0.25
    return (value.masked_fill(torch.rand(classes) < 0.3, 0.0) if zeros else value).to(dtype)


def random_case(number: int) -> Case:
    """A call drawn over everything that can be combined: the product of all choices would have 10^12 members.

    Sizes: class counts on both sides of the vectors of 4, 8 and 16 floats; empty batches; up to three inner dimensions,
    some of them 0.
    """
    rng = random.Random(number)
    seed(number)
    classes = rng.choice((1, 2, 3, 5, 7, 8, 10, 16, 17, 31, 33, 65))
    rows = rng.choice((0, 1, 2, 3, 5, 17))
    inner = rng.choice(((), (), (), (3,), (1,), (2, 3), (2, 1, 2), (0,), (17,)))
    shape = (classes,) if rng.random() < 0.1 else (rows, classes, *inner)
    row_shape = () if len(shape) == 1 else (rows, *inner)
    dtype = rng.choice(FLOATS)
    logits = (torch.randn(shape) * rng.choice((0.5, 2.0, 4.0))).to(dtype)
    layout = rng.choice(list(LAYOUTS))
    if layout == "expanded" and len(shape) > 1:
        logits = logits[:1].expand_as(logits).clone()

    arguments: dict[str, Any] = {}

    def maybe(chance: float, name: str, value: Callable[[], Any]) -> None:
        if rng.random() < chance:
            arguments[name] = value()

    def parameter_type() -> torch.dtype:
        return rng.choice((dtype, *FLOATS))

    maybe(0.4, "class_bias", lambda: torch.randn(classes).to(parameter_type()))
    absent = None
    if "class_bias" in arguments and classes > 2 and rng.random() < 0.4:
        absent = rng.randrange(classes - 1)  # the class behind it takes its samples
        arguments["class_bias"][absent] = -torch.inf
    if rng.random() < 0.7:
        integer_type = rng.choice(INTEGERS)
        ignored = rng.choice((None, 0, classes - 1, 99) + ((-1, NEVER_IGNORED) if integer_type.is_signed else ()))
        if ignored is not None:
            arguments["ignore_index"] = ignored
        target = labels(row_shape, classes, torch.int64, ignored)
        if absent is not None:
            target[target == absent] = absent + 1
        target = target.to(integer_type)
        maybe(
            0.4, "class_margin", lambda: rng.choice((0.5, torch.tensor(0.25), torch.rand(classes).to(parameter_type())))
        )
    else:
        target = probabilities(shape, rng.choice(FLOATS))
        if absent is not None:
            target.select(0 if len(shape) == 1 else 1, absent).zero_()
    maybe(0.4, "weight", lambda: positive(classes, parameter_type(), zeros=rng.random() < 0.4))
    maybe(0.3, "class_scale", lambda: (torch.rand(classes) * 1.5 - 0.25).to(parameter_type()))
    maybe(0.3, "scale", lambda: rng.choice((0.5, 2.0, 8, 1)))
    maybe(0.4, "label_smoothing", lambda: rng.choice((0.1, 0.9, 1.0, 0.0)))
    maybe(0.3, "z_loss", lambda: rng.choice((1e-4, 0.1)))
    if rng.random() < 0.4:
        arguments["focal_gamma"] = rng.choice((0.5, 1.0, 2.0, 5))
        maybe(0.5, "focal_pt", lambda: "weighted")
        maybe(0.5, "focal_grad", lambda: "detached")
    maybe(0.3, "sample_weight", lambda: (torch.rand(row_shape) * (torch.rand(row_shape) < 0.8)).to(parameter_type()))
    arguments["reduction"] = rng.choice(("none", "sum", "mean", "mean"))
    if arguments["reduction"] == "mean":
        arguments["empty"] = "zero"  # NaN is never equal; `empty="nan"` has a test of its own
        maybe(0.7, "denominator", lambda: rng.choice(("weight", "count", 7.5, 3, torch.tensor(5.5))))
    learnable = tuple(name for name in ("class_scale", "class_bias") if name in arguments and rng.random() < 0.5)
    target_layout = "contiguous" if target.dim() == 0 else rng.choice(list(LAYOUTS)[:-1])
    return Case(logits, target, arguments, layout, target_layout, rng.choice(list(UPSTREAMS)), learnable)

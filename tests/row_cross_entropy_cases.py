"""What the tests of row_cross_entropy share: named calls of the losses whose adjustments depend on the row, their truth
and when a result is right.

As in `cross_entropy_cases.py`, the truth of a call is the reference backend in float64 on the very numbers it holds;
`test_row_cross_entropy_published.py` holds that against the formulas as published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from cross_entropy_cases import LAYOUTS, UPSTREAMS, Form, Result, positive, relative_error, seed
from torch import Tensor

import ltkernels as ltk

F = ltk.functional


@dataclass(eq=False)
class Call:
    """One call: function, logits, labels (with the second and lam for two), arguments, what may learn."""

    function: Callable[..., Tensor]
    logits: Tensor
    labels: tuple[Any, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    learnable: tuple[str, ...] = ()
    positional: tuple[Tensor, ...] = ()  # class_counts, pair_bias, rare
    largest: float = 0.0  # a bound on |u|

    @property
    def target(self) -> Any:
        return self.labels[0] if len(self.labels) == 1 else self.labels

    def loss(self, logits: Tensor, *learnable: Tensor) -> Tensor:
        arguments = {**self.arguments, **dict(zip(self.learnable, learnable, strict=True))}
        return self.function(logits, self.target, *self.positional, **arguments)

    @property
    def variables(self) -> tuple[Tensor, ...]:
        """Fresh leaves."""
        values = (self.logits, *(self.arguments[name] for name in self.learnable))
        return tuple(value.detach().clone().requires_grad_() for value in values)

    def converted(self, convert: Callable[[Tensor], Tensor]) -> Call:
        def each(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(convert(v) if isinstance(v, Tensor) else v for v in values)

        return replace(
            self,
            logits=convert(self.logits),
            labels=each(self.labels),
            arguments=dict(zip(self.arguments, each(tuple(self.arguments.values())), strict=True)),
            positional=each(self.positional),
        )


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _run(call: Call, upstream: str) -> Result:
    variables = call.variables
    loss = call.loss(*variables)
    seed(7)  # the same upstream for the truth and for every form
    above = UPSTREAMS[upstream](torch.empty(loss.shape)).to(loss)
    grads = torch.autograd.grad(loss, variables, above)
    return Result(loss.detach(), dict(zip(("input", *call.learnable), grads, strict=True)))


def evaluate(call: Call, form: Form, upstream: str = "random", layout: str = "contiguous") -> Result:
    """By `form`, the logits and labels in memory as `layout` says."""
    there = call.converted(lambda v: v.to(form.device))
    logits = LAYOUTS[layout](there.logits).detach().requires_grad_()
    variables = (logits, *(there.arguments[name].clone().requires_grad_() for name in there.learnable))
    if layout != "expanded":
        there = replace(
            there, labels=tuple(LAYOUTS[layout](v) if isinstance(v, Tensor) and v.dim() else v for v in there.labels)
        )
    with form.use():
        loss = there.loss(*variables)
        seed(7)
        grads = torch.autograd.grad(loss, variables, UPSTREAMS[upstream](torch.empty(loss.shape)).to(loss))
    names = ("input", *there.learnable)
    return Result(loss.detach().cpu(), {name: grad.cpu() for name, grad in zip(names, grads, strict=True)})


def truth(call: Call, upstream: str = "random") -> Result:
    with ltk.use_backend("reference"):
        return _run(call.converted(_double), upstream)


def check(call: Call, form: Form, upstream: str = "random", layout: str = "contiguous") -> None:
    """Relative L2 errors: float64 1e-12; float32 1e-6 (reference 1e-5), or an ulp of the largest |u|; half gradients
    1.1 times the rounding of the truth."""
    actual, expected = evaluate(call, form, upstream, layout), truth(call, upstream)
    computed = torch.float64 if call.logits.dtype == torch.float64 else torch.float32
    limit = (
        1e-11
        if computed == torch.float64
        else max(1e-5 if form.backend == "reference" else 1e-6, 2.0**-23 * call.largest)
    )
    assert actual.loss.dtype == computed
    rows = max(1, call.logits.numel() // call.logits.shape[1])
    least = max(1.0, call.largest) * (1e-15 if computed == torch.float64 else 1e-7) * math.sqrt(rows) / limit
    assert (error := relative_error(actual.loss, expected.loss, least)) <= limit, f"loss: {error:.3g} > {limit:.3g}"
    for name, gradient in actual.gradients.items():
        exact = expected.gradients[name]
        assert gradient.dtype == (call.logits if name == "input" else call.arguments[name]).dtype
        floor = least
        if call.logits.shape[1] == 1:
            floor = max(floor, 1.0)  # one class: p - q = 0 but for rounding
        most = max(
            limit if name == "input" else 4 * limit, 1.1 * relative_error(exact.to(gradient.dtype), exact)
        )  # sums over rows or classes cancel
        assert (error := relative_error(gradient, exact, floor)) <= most, f"{name}: {error:.3g} > {most:.3g}"


# --- The calls ---

Maker = Callable[[int, int, torch.dtype], Call]


def _labels(rows: int, classes: int, number: int = 1, ignored: bool = False) -> list[Tensor]:
    result = [torch.randint(classes, (rows,)) for _ in range(number)]
    if ignored:
        for at, label in enumerate(result):
            label[at::3] = -100
    return result


def _cosines(rows: int, classes: int, dtype: torch.dtype) -> Tensor:
    return (torch.rand(rows, classes) * 1.9 - 0.95).to(dtype)


def _logits(rows: int, classes: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, classes) * 2).to(dtype)


def _ce(
    rows: int, classes: int, dtype: torch.dtype, labels: int = 1, share: Any = 0.3, ignored: bool = False,
    cosine: bool = False, learnable: tuple[str, ...] = (), **arguments: Any,
) -> Call:  # fmt: skip
    """A call of cross_entropy; arguments that are functions are of (rows, classes)."""
    logits = (_cosines if cosine else _logits)(rows, classes, dtype)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    values = {k: v(rows, classes) if callable(v) else v for k, v in arguments.items()}
    values = {k: v.to(parameter) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}
    y = tuple(_labels(rows, classes, labels, ignored))
    if labels == 2:
        y = (*y, share(rows, classes).to(parameter) if callable(share) else share)
    if "class_bias" in values and (gone := values["class_bias"].isneginf()).any():
        for label in y[:2] if labels == 2 else y:
            label[(label >= 0) & gone[label.clamp_min(0)]] = int((~gone).nonzero()[0])
    size = logits.double().abs().max().item() if logits.numel() else 0.0
    for name, value in values.items():
        if isinstance(value, Tensor) and name in ("class_scale", "class_bias", "class_margin"):
            finite = value[value.isfinite()].abs()
            size = size * (1 + finite.max().item()) if name == "class_scale" else size + finite.max().item()
    return Call(F.cross_entropy, logits, y, values, learnable, largest=size * values.get("scale", 1.0))


def _per_class(low: float, high: float) -> Callable[[int, int], Tensor]:
    return lambda rows, classes: low + (high - low) * torch.rand(classes)


def _per_row(low: float, high: float) -> Callable[[int, int], Tensor]:
    return lambda rows, classes: low + (high - low) * torch.rand(rows)


def _with_absent(rows: int, classes: int) -> Tensor:
    bias = torch.randn(classes)
    if classes > 2:
        bias[1] = -torch.inf
    return bias


def _weights(rows: int, classes: int) -> Tensor:
    return positive(classes)


def _made(**more: Any) -> Maker:
    return lambda rows, classes, dtype: _ce(rows, classes, dtype, **more)


def _pair(kind: str, ignored: bool = False, **arguments: Any) -> Maker:
    def make(rows: int, classes: int, dtype: torch.dtype) -> Call:
        base = _ce(rows, classes, dtype, ignored=ignored, **arguments)
        scale = arguments.get("scale", 1.0)
        if kind == "seesaw":
            counts = torch.randint(0, 1000, (classes,))
            largest = base.largest * (1 + 2 * arguments.get("q", 2.0)) + 8.0
            return replace(base, function=F.seesaw_cross_entropy, positional=(counts,), largest=largest)
        if kind == "pairwise":
            table = torch.randn(classes, classes).to(torch.float64 if dtype == torch.float64 else torch.float32)
            if classes > 2:
                table[0, 1] = table[2, 0] = -torch.inf
            largest = base.largest + 5.0 * scale
            return replace(base, function=F.pairwise_cross_entropy, positional=(table,), largest=largest)
        rare = torch.rand(classes) < 0.7
        return replace(base, function=F.equalization_cross_entropy, positional=(rare,))

    return make


CALLS: dict[str, Maker] = {
    "two labels": _made(labels=2),
    "two labels by row": _made(labels=2, share=_per_row(0.0, 1.0), weight=_weights),
    "two labels, none": _made(labels=2, reduction="none", ignored=True),
    "two labels with all": _made(
        labels=2, ignored=True, weight=_weights, sample_weight=_per_row(0.2, 1.5), class_margin=_per_class(0.1, 0.6),
        label_smoothing=0.1, focal_gamma=2.0, z_loss=0.02, scale=1.5, class_scale=_per_class(0.5, 1.2),
        class_bias=_per_class(-1.0, 1.0), learnable=("class_scale", "class_bias"),
    ),
    "two labels, count": _made(labels=2, ignored=True, weight=_weights, denominator="count"),
    "arc": _made(cosine=True, class_margin=_per_class(0.05, 0.5), margin_type="arc", scale=16.0),
    "arc with scales": _made(
        cosine=True, class_margin=0.3, margin_type="arc", scale=8.0, class_scale=_per_class(0.5, 1.2),
        class_bias=_per_class(-1.0, 1.0), weight=_weights, learnable=("class_scale", "class_bias"),
    ),
    "arc, large": _made(cosine=True, class_margin=_per_class(1.0, 3.1), margin_type="arc", scale=4.0, reduction="sum"),
    "arc of two labels": _made(cosine=True, labels=2, class_margin=0.5, margin_type="arc", scale=16.0),
    "arc, straight through": _made(
        cosine=True, class_margin=0.5, margin_type="arc_straight_through", scale=16.0, label_smoothing=0.1
    ),
    "smoothing by class": _made(label_smoothing=_per_class(0.0, 1.0), weight=_weights, ignored=True),
    "smoothing by class, absent class": _made(label_smoothing=_per_class(0.0, 0.4), class_bias=_with_absent),
    "off target": _made(label_smoothing=0.2, smoothing_mode="off_target", weight=_weights),
    "off target, absent class": _made(
        label_smoothing=_per_class(0.0, 0.5), smoothing_mode="off_target", class_bias=_with_absent, reduction="sum"
    ),
    "gate": _made(
        class_scale=_per_class(0.5, 1.5), class_bias=_per_class(-1.0, 1.0), row_gate=_per_row(0.0, 1.0),
        weight=_weights, learnable=("class_scale", "class_bias", "row_gate"),
    ),
    "gate without scale": _made(
        class_bias=_per_class(-1.0, 1.0), row_gate=_per_row(-1.0, 1.0), learnable=("row_gate",)
    ),
    "gate of two labels": _made(
        labels=2, ignored=True, class_scale=_per_class(0.5, 1.5), row_gate=_per_row(0.0, 1.0), scale=1.5,
        learnable=("class_scale", "row_gate"), reduction="none",
    ),
    "influence": _made(feature_norm=_per_row(0.5, 20.0), weight=_weights, denominator="count", influence_alpha=10.0),
    "influence and focal": _made(
        feature_norm=_per_row(0.0, 20.0), focal_gamma=1.5, focal_pt="weighted", influence_eps=0.5, label_smoothing=0.1
    ),
    "seesaw": _pair("seesaw", ignored=True),
    "seesaw, weighted and scaled": _pair(
        "seesaw", q=1.0, p=0.5, weight=_weights, scale=2.0, sample_weight=_per_row(0.2, 1.5)
    ),
    "pairwise": _pair("pairwise", weight=_weights, scale=1.5),
    "equalization": _pair("equalization", ignored=True, drop_rate=0.6, seed=11, step=3),
    "equalization, none": _pair("equalization", drop_rate=0.9, reduction="none", weight=_weights),
}  # fmt: skip
# The gradient is that of other numbers than the value's, so finite differences say something else.
NOT_THE_DERIVATIVE = ("arc, straight through", "seesaw", "seesaw, weighted and scaled")


# --- Tests that make their own tensors ---


@pytest.fixture
def device_of_form(form: Form) -> Iterator[None]:
    """What these tests make, they make where the form computes."""
    with torch.device(form.device):
        yield


on_its_device = pytest.mark.usefixtures("device_of_form")

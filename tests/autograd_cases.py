"""What the tests of derivatives share: named calls over all option groups, and the ways into the op.

A call has 3 rows and 5 classes unless a test asks for another size: 5 is odd, so that every instruction set runs its
tail, and gradcheck evaluates the loss twice a logit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ltkernels as ltk
from ltkernels.ops import cross_entropy as op
from ltkernels.ops.options import CrossEntropyOptions

cross_entropy = ltk.functional.cross_entropy
Loss = Callable[..., Tensor]


class Call(NamedTuple):
    """What to compute: labels or probabilities, the shape behind the classes, arguments by name."""

    arguments: dict[str, Any]
    probabilities: bool = False
    inner: tuple[int, ...] = ()


def _vector(low: float, high: float) -> Callable[[int], Tensor]:
    return lambda classes: torch.linspace(low, high, classes, dtype=torch.float64).roll(2)


WEIGHT, SCALE, BIAS, MARGIN = _vector(0.0, 2.0), _vector(0.4, 1.5), _vector(-1.0, 1.0), _vector(0.1, 0.7)


def ABSENT(classes: int) -> Tensor:  # noqa: N802 (a table as the ones above)
    return BIAS(classes).where(torch.arange(classes) != 1, -torch.inf)


# Functions make what depends on the number of classes. "rows" stands for a value a row.
CALLS: dict[str, Call] = {
    "plain": Call({}),
    "sum": Call({"reduction": "sum"}),
    "none": Call({"reduction": "none"}),
    "ignored": Call({"ignore_index": 1, "denominator": "count"}),
    "weight": Call({"weight": WEIGHT, "denominator": 2.5}),
    "smoothing": Call({"label_smoothing": 0.2, "weight": WEIGHT}),
    "bias": Call({"class_bias": BIAS, "scale": 1.5}),
    "absent class": Call({"class_bias": ABSENT, "label_smoothing": 0.1}),
    "affine": Call({"class_scale": SCALE, "class_bias": BIAS, "class_margin": MARGIN, "scale": 2.0}),
    "scale alone": Call({"class_scale": SCALE, "class_margin": 0.3}),
    "focal": Call({"focal_gamma": 2.0, "weight": WEIGHT}),
    "focal below 1": Call({"focal_gamma": 0.5, "label_smoothing": 0.1}),
    "focal weighted": Call({"focal_gamma": 1.5, "focal_pt": "weighted", "weight": WEIGHT}),
    "z_loss": Call({"z_loss": 0.05, "sample_weight": "rows"}),
    "inner": Call({"weight": WEIGHT, "sample_weight": "rows", "class_bias": BIAS}, inner=(2,)),
    "inner none": Call({"reduction": "none", "class_scale": SCALE}, inner=(2, 2)),
    "probabilities": Call({"weight": WEIGHT}, probabilities=True),
    "probabilities with all": Call(
        {
            "weight": WEIGHT, "class_scale": SCALE, "class_bias": BIAS, "scale": 1.5, "label_smoothing": 0.1,
            "focal_gamma": 2.0, "z_loss": 0.02, "sample_weight": "rows", "reduction": "sum",
        },
        probabilities=True,
    ),
    "all": Call(
        {
            "weight": WEIGHT, "class_scale": SCALE, "class_bias": BIAS, "class_margin": MARGIN, "scale": 1.5,
            "label_smoothing": 0.1, "focal_gamma": 2.0, "z_loss": 0.02, "sample_weight": "rows", "ignore_index": 1,
        }
    ),
}  # fmt: skip
# A constant in the gradient by definition, so finite differences say something else.
DETACHED = {
    "focal detached": Call({"focal_gamma": 2.0, "focal_grad": "detached", "class_bias": BIAS}),
    "focal detached weighted": Call({"focal_gamma": 2.0, "focal_grad": "detached", "focal_pt": "weighted"}),
}
LEARNABLE = ("class_scale", "class_bias")


class Problem(NamedTuple):
    """A call with its numbers: ``loss(logits, *learnable)`` computes it."""

    logits: Tensor
    target: Tensor
    arguments: dict[str, Any]
    learnable: tuple[str, ...]

    @property
    def variables(self) -> tuple[Tensor, ...]:
        """Fresh leaves: the logits and the parameters that may learn."""
        values = (self.logits, *(self.arguments[name] for name in self.learnable))
        return tuple(value.detach().clone().requires_grad_() for value in values)

    def loss(self, logits: Tensor, *learnable: Tensor, **more: Any) -> Tensor:
        values = dict(zip(self.learnable, learnable, strict=False))
        return cross_entropy(logits, self.target, **{**self.arguments, **values, **more})


def problem(call: Call, rows: int = 3, classes: int = 5, dtype: torch.dtype = torch.float64) -> Problem:
    """Logits of a few units; labels that include class 1 only where it is the ignored one."""
    row_shape = (rows, *call.inner)
    logits = torch.randn(rows, classes, *call.inner, dtype=torch.float64) * 2
    if call.probabilities:
        target = torch.softmax(torch.randn_like(logits), dim=1).to(dtype)
    else:
        target = torch.arange(rows * logits[0, 0].numel()).reshape(row_shape) * 3 % classes
        if "ignore_index" in call.arguments:
            target.view(-1)[::2] = call.arguments["ignore_index"]
        else:
            target[target == 1] = 0
    parameter_type = torch.float64 if dtype == torch.float64 else torch.float32
    arguments: dict[str, Any] = {}
    for name, value in call.arguments.items():
        if value == "rows":
            value = torch.rand(row_shape, dtype=parameter_type) + 0.5
        elif callable(value):
            value = value(classes).to(parameter_type)
        arguments[name] = value
    learnable = tuple(name for name in LEARNABLE if name in arguments and bool(torch.isfinite(arguments[name]).all()))
    return Problem(logits.to(dtype), target, arguments, learnable)


# --- The ways in ---


class Subclass(Tensor):
    """Not a plain tensor, so its calls take the dispatcher's op."""


def through_dispatcher(loss: Loss) -> Loss:
    return lambda logits, *rest: loss(logits.as_subclass(Subclass), *rest).as_subclass(Tensor)


def through_reference(loss: Loss) -> Loss:
    def forced(*variables: Tensor) -> Tensor:
        with ltk.use_backend("reference"):
            return loss(*variables)

    return forced


def through_func(loss: Loss) -> Loss:
    """Inside a transform of torch.func that leaves the value as it is."""
    return lambda *variables: torch.func.vjp(loss, *variables)[0]


ENTRIES: dict[str, Callable[[Loss], Loss]] = {
    "lean": lambda loss: loss,
    "func": through_func,
    "dispatcher": through_dispatcher,
    "reference": through_reference,
}


def op_arguments(p: Problem, logits: Tensor | None = None) -> tuple[Any, ...]:
    """The problem as ``torch.ops.ltkernels.cross_entropy`` takes it, by recording the call that functional makes."""
    recorded: list[tuple[Any, ...]] = []
    original = op.cross_entropy

    def record(*args: Any) -> Tensor:
        recorded.append((*args[:7], *args[7]))
        return original(*args)

    op.cross_entropy = record
    try:
        p.loss(p.logits if logits is None else logits)
    finally:
        op.cross_entropy = original
    assert isinstance(recorded[0][7:], tuple) and len(recorded[0][7:]) == len(CrossEntropyOptions._fields)
    return recorded[0]

"""What the tests of linear_cross_entropy share: named calls of every option, the same composed of its parts, the truth.

The calls are those of the tests of `cross_entropy` and `row_cross_entropy`, on features and a classifier in place of
logits. Where the loss is of cosines, so are the logits here. The truth of a call is PyTorch's linear layer and the
reference of the loss, in float64, on the very numbers that the call holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import row_cross_entropy_cases as row_cases
import torch
import torch.nn.functional as F
from autograd_cases import CALLS as TABLE_CALLS
from autograd_cases import DETACHED, problem
from cross_entropy_cases import Form, seed
from torch import Tensor

import ltkernels as ltk
from ltkernels.ops import chunked_linear

linear_cross_entropy = ltk.functional.linear_cross_entropy
ROWS, CLASSES, FEATURES = 23, 11, 5  # nothing divides into chunks of 6 rows


@dataclass(eq=False)
class Call:
    """One call: features, classifier, bias, target, arguments, what of these may learn."""

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    learnable: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the variables."""
        return ("features", "weight", *(() if self.bias is None else ("bias",)), *self.learnable)

    @property
    def variables(self) -> tuple[Tensor, ...]:
        """Fresh leaves."""
        values = [getattr(self, name) if hasattr(self, name) else self.arguments[name] for name in self.names]
        return tuple(value.detach().clone().requires_grad_() for value in values)

    def _split(self, variables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
        given = dict(zip(self.names, variables, strict=True))
        return given.pop("features"), given.pop("weight"), given.pop("bias", None), {**self.arguments, **given}

    def loss(self, *variables: Tensor) -> Tensor:
        x, w, b, arguments = self._split(variables)
        return linear_cross_entropy(x, w, self.target, linear_bias=b, **arguments)

    def composed(self, *variables: Tensor) -> Tensor:
        """The same of a linear layer and cross_entropy."""
        x, w, b, arguments = self._split(variables)
        if arguments.pop("normalize", False):
            x, w = F.normalize(x, dim=-1), F.normalize(w, dim=-1)
        if w.dim() > 2:
            logits = F.linear(x, w.flatten(0, -2), None if b is None else b.flatten()).unflatten(1, w.shape[:-1])
        else:
            logits = F.linear(x, w, b)
        return ltk.functional.cross_entropy(logits, self.target, **arguments)

    def converted(self, convert: Callable[[Tensor], Tensor]) -> Call:
        def each(value: Any) -> Any:
            return convert(value) if isinstance(value, Tensor) else value

        target = tuple(map(each, self.target)) if isinstance(self.target, tuple) else each(self.target)
        return replace(
            self,
            features=convert(self.features),
            weight=convert(self.weight),
            bias=each(self.bias),
            target=target,
            arguments={name: each(value) for name, value in self.arguments.items()},
        )


Maker = Callable[..., Call]


def _head(rows: int, classes: int, inner: tuple[int, ...], bias: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    """Logits of a few units."""
    features = torch.randn(rows, FEATURES, dtype=torch.float64)
    weight = torch.randn(classes, *inner, FEATURES, dtype=torch.float64)
    offset = torch.randn(classes, *inner, dtype=torch.float64) if bias else None
    return tuple(None if value is None else value.to(dtype) for value in (features, weight, offset))


def _of_tables(name: str, **more: Any) -> Maker:
    def make(rows: int = ROWS, classes: int = CLASSES, dtype: torch.dtype = torch.float64, bias: bool = True) -> Call:
        call = (TABLE_CALLS | DETACHED)[name]
        p = problem(call, rows, classes, dtype)
        head = _head(rows, classes, call.inner, bias, dtype)
        return Call(*head, p.target, {**p.arguments, **more}, p.learnable)

    return make


def _of_rows(name: str) -> Maker:
    def make(rows: int = ROWS, classes: int = CLASSES, dtype: torch.dtype = torch.float64, bias: bool = True) -> Call:
        call = row_cases.CALLS[name](rows, classes, dtype)
        cosines = call.arguments.get("margin_type", "additive") != "additive"
        arguments = {**call.arguments, **({"normalize": True} if cosines else {})}
        head = _head(rows, classes, (), bias and not cosines, dtype)  # no angle is left if a bias is added
        return Call(*head, call.target, arguments, call.learnable)

    return make


_OF_ROWS = [name for name in row_cases.CALLS if not name.startswith(("seesaw", "pairwise", "equalization"))]
CALLS: dict[str, Maker] = {
    **{name: _of_tables(name) for name in (*TABLE_CALLS, *DETACHED)},
    **{f"cosines, {name}": _of_tables(name, normalize=True) for name in ("bias", "affine", "inner", "all")},
    **{name: _of_rows(name) for name in _OF_ROWS},
}
NOT_THE_DERIVATIVE = (*DETACHED, "arc, straight through")
each_call = pytest.mark.parametrize("name", CALLS)


def made(name: str, rows: int = ROWS, classes: int = CLASSES, dtype: torch.dtype = torch.float64, **more: Any) -> Call:
    """The named call, whose first row has a label that is not ignored: a mean over nothing has no derivative."""
    seed(len(name))
    call = CALLS[name](rows, classes, dtype, **more)
    labels = call.target[:2] if isinstance(call.target, tuple) else (call.target,)
    for label in labels:
        if not label.is_floating_point():
            label.view(-1)[0] = 0
    return call


def upstream_of(loss: Tensor) -> Tensor:
    """One value a row, or for a reduced loss some number, the same in every type."""
    return torch.linspace(-0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape).to(loss)


def evaluate(call: Call, function: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Loss and gradients by name."""
    variables = call.variables
    loss = (function or call.loss)(*variables)
    above = upstream_of(loss) if loss.dim() else torch.full_like(loss, 0.7)
    return {"loss": loss.detach(), **dict(zip(call.names, torch.autograd.grad(loss, variables, above), strict=True))}


def truth(call: Call) -> dict[str, Tensor]:
    """By the reference of the loss, in float64."""
    exact = call.converted(lambda value: value.double() if value.is_floating_point() else value)
    with ltk.use_backend("reference"):
        return evaluate(exact, exact.composed)


def off(actual: Tensor, exact: Tensor) -> float:
    """Relative L2 error."""
    distance, length = (actual.double() - exact).norm(), exact.norm()
    return float(distance / length) if length else float(distance)


def chunks_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts all calls into chunks of at most so many rows."""
    monkeypatch.setattr(chunked_linear, "chunk_rows", lambda *_: rows)


@pytest.fixture(params=[1000, 6], ids=["one chunk", "chunks"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows of a chunk: all, or 6, of which the last has fewer."""
    chunks_of(request.param, monkeypatch)
    return int(request.param)


def on(call: Call, form: Form) -> Call:
    """The call on the form's device."""
    return call.converted(lambda value: value.to(form.device))

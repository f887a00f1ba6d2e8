"""The ops behind ``functional.linear_cross_entropy``: the loss of a linear classifier, whose logits never exist whole.

Logits are made for a chunk of rows (``chunked_linear.py``), the kernels of ``cross_entropy`` or ``row_cross_entropy``
take their losses and write their gradient over them, and products of matrices make of that the gradients of features
and classifier. A backend of these ops is the backend of the loss between the products, which are PyTorch's.

**When the gradients are computed.** A chunk's logits are gone after it, so a backward by itself would have to make them
again: four products of matrices for three. For a reduced loss the forward therefore computes the gradients, for an
upstream gradient of 1; the backward multiplies them, in place, by the one that comes, which takes no time beside the
products, and nothing where it is 1. The denominator of a mean depends on targets and weights alone and is computed
first. Everything else makes the logits again: ``reduction="none"``, whose upstream gradient is a vector that nobody
knows yet; a second backward; ``torch.compile`` and :mod:`torch.func`; hooks on saved tensors. What is computed is the
same in both cases, to the bit.

**Half types.** The gradient of a chunk's logits is written in their type, where one over thousands of rows would be
among the subnormal numbers. So it is computed for an upstream gradient of (number of rows) / denominator, and one over
the number of rows is multiplied into the results together with the upstream gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ltkernels import backends
from ltkernels.ops import cross_entropy as _cross_entropy
from ltkernels.ops import entries
from ltkernels.ops import row_cross_entropy as _row_cross_entropy
from ltkernels.ops.chunked_linear import Chunk, Classifier, Needed
from ltkernels.ops.denominators import inverse_denominator
from ltkernels.ops.options import (
    LinearCrossEntropyOptions,
    LinearOptions,
    LinearRowCrossEntropyOptions,
    MarginType,
    ProductType,
    Reduction,
)
from ltkernels.ops.table import Op, Tensors
from ltkernels.reference import linear_cross_entropy as reference

HEAD = ("input", "linear_weight", "linear_bias?")
OF_ROWS = frozenset({"target", "second_target", "lam", "sample_weight", "row_gate", "feature_norm"})
"""Tensors of the losses that have a value a row, or, for ``lam``, one for all."""
MEANS = (Reduction.MEAN_WEIGHT, Reduction.MEAN_COUNT)
PRODUCTS = {ProductType.BFLOAT16: torch.bfloat16, ProductType.FLOAT16: torch.float16}


class _Gradients:
    """The gradients of a reduced loss for one upstream gradient, to be multiplied by ``factor`` times another.

    In the types of the sums that they are, which the tensors that they belong to may not have.
    """

    def __init__(self, values: Sequence[Tensor | None], of: Sequence[Tensor | None], factor: float) -> None:
        self.values, self.factor = list(values), factor
        # Without the tensors themselves, which autograd saves in its own way.
        self.of = [(torch.Size(), torch.float32) if tensor is None else (tensor.shape, tensor.dtype) for tensor in of]

    def times(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients for an upstream gradient, in the memory of these; can be had once."""
        values, self.values = self.values, []
        if grad.is_cpu:
            by = grad.item() * self.factor
            scaled = [value if value is None or by == 1.0 else value.mul_(by) for value in values]
        else:  # without waiting for the number; of one dimension, or half types would round it
            more = (grad * self.factor).reshape(1)
            scaled = [None if value is None else value.mul_(more) for value in values]
        return tuple(
            None if value is None else value.to(dtype).view(shape)
            for value, (shape, dtype) in zip(scaled, self.of, strict=True)
        )


class _Loss:
    """A loss of logits, and what it is as a loss of features and classifier."""

    op: Op

    def __init__(self, inner: Op, options: type[Any], definition: Callable[..., Tensor]) -> None:
        self.inner, self.options, self.definition = inner, options, definition
        self.names = tuple(name.rstrip("?") for name in inner.tensors[1:])
        self.count = len(HEAD) + len(self.names)
        self.scalars = len(options._fields) - len(LinearOptions._fields)

    def split(self, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor | None]]:
        """Features, classifier, bias, and the tensors of the loss by name."""
        input, weight, bias, *rest = tensors
        assert input is not None and weight is not None
        return input, weight, bias, dict(zip(self.names, rest, strict=True))

    def logits_like(self, tensors: Tensors) -> Tensor:
        """A tensor of the logits' shape that has no memory."""
        input, weight, _, _ = self.split(tensors)
        return input.new_empty(()).expand(input.shape[0], *weight.shape[:-1])

    def check_values(self, tensors: Tensors, options: Any) -> None:
        inner_options = self.inner.options(*options[: self.scalars])
        self.inner.check_values((self.logits_like(tensors), *tensors[len(HEAD) :]), inner_options)

    def new_output(self, tensors: Tensors, options: Any) -> Tensor:
        logits = self.logits_like(tensors)
        shape = (logits.shape[0], *logits.shape[2:]) if options.reduction == Reduction.NONE else ()
        return logits.new_empty(shape, dtype=_sum_type(logits))

    def new_state(self, tensors: Tensors, options: Any) -> Tensor:
        """One over the denominator of each label; the backward makes the rest again."""
        input, _, _, of = self.split(tensors)
        labels = 2 if of.get("second_target") is not None else 1
        return input.new_empty(labels + 1, dtype=_sum_type(input))

    def forward(self, row: backends.Implementation) -> Callable[..., tuple[Tensor, Tensor, _Gradients | None]]:
        def forward(*args: Any) -> tuple[Tensor, Tensor, _Gradients | None]:
            tensors, options, need = args[: self.count], self.options(*args[self.count : -1]), args[-1]
            with _SaidByValue(self, tensors, options):
                state = self.new_state(tensors, options).fill_(1.0)
                if options.reduction in MEANS:
                    self._fill_inverses(state, tensors, options)
                call = _Call(self, row, tensors, options, state, need or ())
                gradients = None
                if need:
                    gradients = call.gradients(call.upstream)
                else:
                    call.losses()
            if options.reduction == Reduction.NONE:
                return call.loss, state, None
            loss = call.loss.sum(dtype=torch.float64) * call.inverse
            if call.empty is not None:
                loss = torch.where(call.empty, torch.nan, loss)
            return loss.to(call.loss.dtype), state, gradients

        return forward

    def backward(self, row: backends.Implementation) -> Callable[..., tuple[Tensor, ...]]:
        def backward(grad: Tensor, state: Tensor, *args: Any) -> tuple[Tensor, ...]:
            if torch._C._functorch.is_legacy_batchedtensor(grad):  # PyTorch calls an op for each of a batch, not this
                each: tuple[Tensor, ...] = self.op.backward(grad, state, *args[:-1])
                return each
            end = self.count + self.scalars + len(LinearOptions._fields)
            tensors, options, need = args[: self.count], self.options(*args[self.count : end]), args[end:-1]
            call = _Call(self, row, tensors, options, state, need)
            with _SaidByValue(self, tensors, options):
                if options.reduction == Reduction.NONE:
                    found = call.gradients(grad).times(torch.ones((), device=grad.device))
                else:
                    found = call.gradients(call.upstream).times(grad)
            return tuple(state.new_empty(0) if d is None else d for d in found)

        return backward

    def _fill_inverses(self, state: Tensor, tensors: Tensors, options: Any) -> None:
        _, _, _, of = self.split(tensors)
        logits = self.logits_like(tensors)
        for place, name in enumerate(("target", "second_target")):
            if (target := of.get(name)) is not None:
                state[place] = inverse_denominator(logits, target, of["weight"], of["sample_weight"], options)


def _sum_type(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class _SaidByValue:
    """Where a chunk is refused for a value in it, says which value of the whole call that is."""

    def __init__(self, loss: _Loss, tensors: Tensors, options: Any) -> None:
        self.check = lambda: loss.check_values(tensors, options)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, (ValueError, IndexError)) or str(error).startswith("ltkernels: value:"):
            self.check()


class _Call:
    """One call by one backend.

    Attributes:
        upstream: of the row losses in a reduced loss with an upstream gradient of 1, by number of rows for half types.
        inverse: one over the denominator, where the row losses are not divided yet.
        empty: whether a denominator is 0, which has been taken out of the row losses; None if it has not.
        loss: the row losses, once computed.
    """

    def __init__(
        self,
        loss: _Loss,
        row: backends.Implementation,
        tensors: Tensors,
        options: Any,
        state: Tensor,
        need: Sequence[bool],
    ) -> None:
        self.row, self.inner = row, loss.inner
        self.input, self.weight, self.bias, self.of = loss.split(tensors)
        self.tensors = [tensors[place] for place in (0, 1, 2, *(place + 2 for place in loss.inner.gradients[1:]))]
        products = LinearOptions(*options[loss.scalars :])
        self.chunk_rows = products.chunk_rows
        dtype = PRODUCTS.get(ProductType(products.products), self.input.dtype)
        self.options = loss.inner.options(*options[: loss.scalars])._replace(reduction=Reduction.NONE)
        self.inverse = state[0]
        self.empty: Tensor | None = None
        if options.reduction != Reduction.NONE and self.of.get("second_target") is not None:
            self._fold_denominators(state, options)
        self.factor = 1.0
        self.upstream = self.inverse
        half = min(dtype.itemsize, self.input.element_size()) < 4
        if half and options.reduction in MEANS:
            rows = max(1, len(self.input) * self.weight[0, ..., 0].numel())
            self.upstream, self.factor = self.inverse * rows, 1.0 / rows
        self.need, self.sums = Needed(*need[:3]), need[3:]
        unscaled = products.normalize and self._takes_column_factors()
        self.classifier = Classifier(self.input, self.weight, self.bias, dtype, self.need, products.normalize, unscaled)
        self._unscaled = unscaled
        if unscaled:
            scale = self.of["class_scale"]
            factors = self.classifier.inverse_norm
            assert factors is not None
            self.of["class_scale"] = factors if scale is None else scale * factors
        self.loss = self.input.new_empty((len(self.input), *self.weight.shape[1:-1]), dtype=_sum_type(self.input))

    def _takes_column_factors(self) -> bool:
        """Whether factors of the logits' columns may be among those of the loss."""
        return (
            self.bias is None
            and self.weight.dim() == 2
            and self.of.get("row_gate") is None
            and getattr(self.options, "margin_type", MarginType.ADDITIVE) == MarginType.ADDITIVE
        )

    def _fold_denominators(self, state: Tensor, options: Any) -> None:
        """Two labels have a denominator each.

        ``lam L_a / d_a + (1 - lam) L_b / d_b`` is a sum of rows with the weight ``S = lam / d_a + (1 - lam) / d_b`` and
        the share ``lam / d_a / S``.
        """
        lam, weight, target = self.of["lam"], self.of["sample_weight"], self.of["target"]
        assert lam is not None and target is not None
        inverses = state[:2]
        nothing = torch.isinf(inverses)
        self.empty, inverses = nothing.any(), torch.where(nothing, 0.0, inverses)
        share = lam.to(state.device).expand(target.shape) if lam.dim() == 1 and len(lam) == 1 else lam
        first, second = share * inverses[0], (1.0 - share) * inverses[1]
        total = first + second
        self.of["lam"] = torch.where(total > 0, first / torch.where(total > 0, total, 1.0), share).contiguous()
        self.of["sample_weight"] = (total if weight is None else total * weight).contiguous()
        self.inverse = torch.ones_like(self.inverse)

    def _chunk_tensors(self, chunk: Chunk) -> list[Tensor | None]:
        return [
            value[chunk.rows] if value is not None and name in OF_ROWS and len(value) == len(self.input) else value
            for name, value in self.of.items()
        ]

    def losses(self) -> None:
        """Computes the row losses."""
        for chunk in self.classifier.chunks(self.chunk_rows):
            arguments = *self._chunk_tensors(chunk), *self.options
            self.loss[chunk.rows] = self.row.forward(chunk.logits, *arguments, False)[0]

    def gradients(self, upstream: Tensor) -> _Gradients:
        """Computes the row losses and the gradients for ``upstream``, of the row losses: one or one a row."""
        sums = [self._zeros(place) if wanted else None for place, wanted in enumerate(self.sums, len(HEAD))]
        at_once = self.row.backend == "cpu" and self.inner is _cross_entropy.OP and not any(self.sums)
        for chunk in self.classifier.chunks(self.chunk_rows):
            arguments = chunk.logits, *self._chunk_tensors(chunk), *self.options
            of_rows = upstream if upstream.dim() == 0 else upstream[chunk.rows]
            if at_once:
                self.loss[chunk.rows] = torch.ops.ltkernels_cpu.cross_entropy_gradient(of_rows, *arguments)
                self.classifier.add(chunk, chunk.logits)
                continue
            losses, state, _ = self.row.forward(*arguments, False)
            self.loss[chunk.rows] = losses
            gradient, *parts = self.row.backward(of_rows, state, *arguments, any(self.need), *self.sums, True)
            if any(self.need):
                self.classifier.add(chunk, gradient)
            for total, part in zip(sums, parts, strict=True):
                if total is not None:
                    of_chunk = total if len(total) == len(part) and total.dim() == 1 else total[chunk.rows]
                    of_chunk += part
        self.classifier.finish()
        of_scales = sums[0] if sums else None
        if self._unscaled and of_scales is not None and self.classifier.inverse_norm is not None:
            of_scales *= self.classifier.inverse_norm
        head = self.classifier
        return _Gradients([head.d_input, head.d_weight, head.d_bias, *sums], self.tensors, self.factor)

    def _zeros(self, place: int) -> Tensor:
        of = self.tensors[place]
        assert of is not None
        return torch.zeros_like(of)


def _op(name: str, loss: _Loss) -> Op:
    """With the implementations of the inner loss, each between the products."""
    inner = loss.inner
    op = Op(
        name,
        (*HEAD, *inner.tensors[1:]),
        (0, 1, 2, *(place + 2 for place in inner.gradients[1:])),
        loss.options,
        loss.definition,
        loss.check_values,
        loss.new_state,
        inner.table.preferences,
        new_output=loss.new_output,
    )
    kernels = {row.backend: row for row in inner.table.rows}
    op.table.rows = [
        row
        if row.backend == "reference"
        else replace(
            row,
            forward=loss.forward(kernels[row.backend]),
            backward=loss.backward(kernels[row.backend]),
            gradient_in_forward=True,
            all_gradients=True,
        )
        for row in op.table.rows
    ]
    op.table.kernels = inner.name
    loss.op = entries.register(op)
    return op


OP = _op(
    "linear_cross_entropy",
    _Loss(_cross_entropy.OP, LinearCrossEntropyOptions, reference.of_loss(_cross_entropy.OP.reference)),
)
ROW_OP = _op(
    "linear_row_cross_entropy",
    _Loss(_row_cross_entropy.OP, LinearRowCrossEntropyOptions, reference.of_loss(_row_cross_entropy.OP.reference)),
)


def linear_cross_entropy(tensors: Sequence[Tensor | None], options: Any) -> Tensor:
    """The loss of ``(N, D)`` features and a ``(C, D)`` or ``(C, P, D)`` classifier; see the reference."""
    return entries.call(OP, tuple(tensors), options)


def linear_row_cross_entropy(tensors: Sequence[Tensor | None], options: Any) -> Tensor:
    """The same for losses whose adjustments depend on the row."""
    return entries.call(ROW_OP, tuple(tensors), options)

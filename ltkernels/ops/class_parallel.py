"""The op behind ``functional.linear_cross_entropy`` with a group: each process has the class vectors of some classes.

The features and labels of all rows are on every process. A chunk of rows at a time, each multiplies them with its own
classes and finds what ``class_shards.py`` calls the rows' numbers; one all-gather shows every process those of all,
from which it computes the loss of the rows, the same bits everywhere, and the gradient of its own logits. So a chunk
costs one message of three numbers a row and two a label, ``(W - 1) (3 + 2 L) n`` floats to receive, whatever C and D
are.

What the op returns for the features is this process's part of their gradient, ``G W`` over its own classes; the sum
over the processes is the caller's, as are gathering rows and dividing tables (``functional/class_parallel.py``). Here
are only class tables of this process's classes, and numbers of the rows' labels.

As in ``linear_cross_entropy.py`` the forward of a reduced loss computes the gradients at once. The state has the merged
numbers, so that a backward which makes the logits again has no message to exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ltkernels import backends
from ltkernels.ops import cross_entropy as _cross_entropy
from ltkernels.ops import entries
from ltkernels.ops.chunked_linear import Chunk, Classifier, Needed
from ltkernels.ops.class_shards import (
    ABSENT,
    LABELS,
    MARGIN,
    MAX,
    OTHERS,
    SMOOTH,
    Shard,
    _label_logits,
    differentiated,
    finish,
    gradient_,
    merged,
    numbers,
)
from ltkernels.ops.linear_cross_entropy import MEANS, PRODUCTS, _Gradients
from ltkernels.ops.options import ClassParallelOptions, ProductType, Reduction
from ltkernels.ops.table import Op, Tensors
from ltkernels.reference import linear_cross_entropy as reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TENSORS = (
    "input",
    "linear_weight",
    "linear_bias?",
    "class_scale?",
    "class_bias?",
    "smooth?",
    "places",
    "of_labels",
    "smooth_total",
    "feature_norm?",
)


def gathered(found: Tensor, group: ProcessGroup) -> Tensor:
    """``(W, ...)``: what each process of the group has, in order; all in one message, of the same shape everywhere."""
    from torch import distributed as dist

    together = found.new_empty(group.size() * len(found), *found.shape[1:])
    # Its name from torch 2.13 on, in which the old one warns.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(together, found.contiguous(), group=group)
    return together.view(group.size(), *found.shape)


def exchanged(found: Tensor, group: str) -> Tensor:
    """The same for a group's name; without one, of this process alone."""
    return gathered(found, torch._C._distributed_c10d._resolve_process_group(group)) if group else found[None]  # type: ignore[arg-type]


def class_parallel_cross_entropy(tensors: Sequence[Tensor | None], options: ClassParallelOptions) -> Tensor:
    """The loss of this process's part of a classifier.

    Args:
        tensors: by ``TENSORS``: features ``(N, D)``; class vectors ``(c, D)``, biases ``(c,)`` and class tables
            ``(c,)`` of this process, whose c may be 0; and of the rows ``places (L, N)``, ``of_labels (L, PER_LABEL,
            N)``, ``smooth_total`` and ``feature_norm (N,)``, as ``class_shards.py`` has them.
        options: the scalars.

    Returns:
        The sum of the rows' losses, 0-d, or with ``Reduction.NONE`` the losses ``(N,)``.
    """
    return entries.call(OP, tuple(tensors), options)


class _Call:
    """One call by one backend."""

    def __init__(self, row: backends.Implementation, tensors: Tensors, options: Any, need: Sequence[bool]) -> None:
        input, weight, bias, scale, class_bias, smooth, places, of_labels, smooth_total, norm = tensors
        assert input is not None and weight is not None and places is not None
        assert of_labels is not None and smooth_total is not None
        self.row, self.options, self.variables = row, options, tensors[:5]
        self.shard, self.of_labels = Shard(places, scale, class_bias, smooth), of_labels
        self.smooth_total, self.norm = smooth_total.double(), norm
        dtype = PRODUCTS.get(ProductType(options.products), input.dtype)
        # Gradients of a mean of thousands of rows would be subnormal in half types: linear_cross_entropy.py.
        half = min(dtype.itemsize, input.element_size()) < 4 and options.reduction in MEANS
        self.factor = 1.0 / max(1, len(input)) if half else 1.0
        self.need, self.need_tables = Needed(*need[:3]), (need[3], need[4])
        self.head = input, weight, bias, dtype
        self.loss = input.new_empty(len(input), dtype=torch.float64)

    def losses(self, state: Tensor) -> None:
        """Computes the row losses, and the merged numbers into ``state``."""
        if self.options.class_block:
            norm = None if self.norm is None else self.norm.double()
            self._find_by_blocks(state)
            self.loss = finish(state, self.of_labels, self.smooth_total, norm, self.options)
            return
        classifier = self._classifier(slice(None), Needed())
        for chunk in classifier.chunks(self.options.chunk_rows):
            margins = self.of_labels[:, MARGIN, chunk.rows]
            found = numbers(self.row, chunk.logits, self.shard.of_rows(chunk.rows), margins, self.options)
            state[:, chunk.rows] = all_numbers = merged(exchanged(found, self.options.group))
            of = self.of_labels[..., chunk.rows]
            norm = None if self.norm is None else self.norm[chunk.rows].double()
            self.loss[chunk.rows] = finish(all_numbers, of, self.smooth_total, norm, self.options)

    def gradients(self, state: Tensor, upstream: Tensor, known: bool) -> _Gradients:
        """Computes the row losses and the gradients for ``upstream``: one, or one a row.

        The merged numbers are in ``state`` if they are ``known``, else afterwards.
        """
        if self.options.class_block:
            return self._gradients_by_blocks(state, upstream, known)
        classifier = self._classifier(slice(None), self.need)
        tables = self._new_tables(classifier.sums)
        for chunk in classifier.chunks(self.options.chunk_rows):
            of, shard = self.of_labels[..., chunk.rows], self.shard.of_rows(chunk.rows)
            norm = None if self.norm is None else self.norm[chunk.rows].double()
            if not known:
                found = numbers(self.row, chunk.logits, shard, of[:, MARGIN], self.options)
                state[:, chunk.rows] = merged(exchanged(found, self.options.group))
            all_numbers = state[:, chunk.rows]
            of_rows = upstream if upstream.dim() == 0 else upstream[chunk.rows]
            self.loss[chunk.rows], derivative = differentiated(
                all_numbers, of_rows, of, self.smooth_total, norm, self.options
            )
            parts = gradient_(
                self.row, derivative, all_numbers[MAX], chunk.logits, shard, of[:, MARGIN], self.options,
                self.need_tables,
            )  # fmt: skip
            if any(self.need):
                classifier.add(chunk, chunk.logits)
            for total, part in zip(tables, parts, strict=True):
                if total is not None and part is not None:
                    total += part
        classifier.finish()
        of_linear = classifier.d_input, classifier.d_weight, classifier.d_bias
        return _Gradients([*of_linear, *tables], self.variables, self.factor)

    def _classifier(self, classes: slice, need: Needed) -> Classifier:
        """Some of this process's classes."""
        input, weight, bias, dtype = self.head
        bias = None if bias is None else bias[classes]
        return Classifier(input, weight[classes], bias, dtype, need, self.options.normalize)

    def _new_tables(self, dtype: torch.dtype) -> list[Tensor | None]:
        _, weight, *_ = self.head
        return [
            torch.zeros(len(weight), dtype=dtype, device=weight.device) if wanted else None
            for wanted in self.need_tables
        ]

    # --- Few rows of very many classes: all rows, a block of classes at a time, twice ---

    def _blocks(self, need: Needed) -> Iterator[tuple[slice, Classifier, Shard, Chunk]]:
        """This process's classes in blocks, with the logits of all rows."""
        input, weight, *_ = self.head
        shard, count = self.shard, len(weight)
        scratch: Tensor | None = None
        for start in range(0, count, self.options.class_block):
            end = min(start + self.options.class_block, count)
            block = slice(start, end)
            # What is no class is said to be behind the last one.
            inside = (shard.places >= start) & ((shard.places < end) | (shard.places == count) & (end == count))
            tables = (None if table is None else table[block] for table in shard[1:])
            classifier = self._classifier(block, need)
            if scratch is None:  # the first block is the largest
                scratch = classifier.products.new_empty(len(input) * len(classifier.products))
            (chunk,) = classifier.chunks(len(input), scratch)
            yield block, classifier, Shard(torch.where(inside, shard.places - start, -1), *tables), chunk

    def _find_by_blocks(self, state: Tensor) -> None:
        margins = self.of_labels[:, MARGIN]
        found = [
            numbers(self.row, chunk.logits, shard, margins, self.options)
            for _, _, shard, chunk in self._blocks(Needed())
        ]
        if not found:  # a process without classes
            nothing = self.loss.new_empty(len(self.loss), 0, dtype=torch.float32)
            found = [numbers(self.row, nothing, self.shard, margins, self.options)]
        state.copy_(merged(exchanged(merged(torch.stack(found)), self.options.group)))

    def _gradients_by_blocks(self, state: Tensor, upstream: Tensor, known: bool) -> _Gradients:
        if not known:
            self._find_by_blocks(state)
        norm = None if self.norm is None else self.norm.double()
        self.loss, derivative = differentiated(state, upstream, self.of_labels, self.smooth_total, norm, self.options)
        input, weight, bias, dtype = self.head
        sums = torch.promote_types(torch.promote_types(dtype, input.dtype), torch.float32)
        d_input = torch.zeros_like(input, dtype=sums) if self.need.input else None
        d_weight = torch.empty_like(weight, dtype=sums) if self.need.weight else None
        d_bias = torch.empty(len(weight), dtype=sums, device=input.device) if self.need.bias else None
        tables = self._new_tables(sums)
        for block, classifier, shard, chunk in self._blocks(self.need._replace(weight=False)):
            classifier.d_weight = None if d_weight is None else d_weight[block]
            parts = gradient_(
                self.row, derivative, state[MAX], chunk.logits, shard, self.of_labels[:, MARGIN], self.options,
                self.need_tables,
            )  # fmt: skip
            if any(self.need):
                classifier.add(chunk, chunk.logits)
            classifier.finish()
            if d_input is not None:
                assert classifier.d_input is not None
                d_input += classifier.d_input
            for total, part in zip((d_bias, *tables), (classifier.d_bias, *parts), strict=True):
                if total is not None and part is not None:
                    total[block] = part
        return _Gradients([d_input, d_weight, d_bias, *tables], self.variables, self.factor)


def _merged_state(state: Tensor, tensors: Tensors) -> Tensor:
    input, of_labels = tensors[0], tensors[TENSORS.index("of_labels")]
    assert input is not None and of_labels is not None
    return state[:-1].view(LABELS + 2 * len(of_labels), len(input))


def _forward(row: backends.Implementation) -> Callable[..., tuple[Tensor, Tensor, _Gradients | None]]:
    def forward(*args: Any) -> tuple[Tensor, Tensor, _Gradients | None]:
        tensors, options, need = args[: len(TENSORS)], ClassParallelOptions(*args[len(TENSORS) : -1]), args[-1]
        state = _new_state(tensors, options)
        state[-1:] = 1.0
        call = _Call(row, tensors, options, need or (False,) * 5)
        known, gradients = _merged_state(state, tensors), None
        if need:
            upstream = torch.full((), 1.0 / call.factor, dtype=torch.float64, device=state.device)
            gradients = call.gradients(known, upstream, False)
        else:
            call.losses(known)
        loss = call.loss if options.reduction == Reduction.NONE else call.loss.sum()
        return loss.to(_sum_type(tensors)), state, gradients

    return forward


def _backward(row: backends.Implementation) -> Callable[..., tuple[Tensor, ...]]:
    def backward(grad: Tensor, state: Tensor, *args: Any) -> tuple[Tensor, ...]:
        end = len(TENSORS) + len(ClassParallelOptions._fields)
        tensors, options = args[: len(TENSORS)], ClassParallelOptions(*args[len(TENSORS) : end])
        call = _Call(row, tensors, options, args[end:-1])
        if options.reduction == Reduction.NONE:
            upstream, grad = grad.double(), torch.ones((), device=grad.device)
        else:
            upstream = torch.full((), 1.0 / call.factor, dtype=torch.float64, device=grad.device)
        found = call.gradients(_merged_state(state, tensors), upstream, True).times(grad)
        return tuple(state.new_empty(0) if d is None else d for d in found)

    return backward


def _sum_type(tensors: Tensors) -> torch.dtype:
    input = tensors[0]
    assert input is not None
    return torch.promote_types(input.dtype, torch.float32)


def _new_output(tensors: Tensors, options: Any) -> Tensor:
    input = tensors[0]
    assert input is not None
    return input.new_empty(len(input) if options.reduction == Reduction.NONE else (), dtype=_sum_type(tensors))


def _new_state(tensors: Tensors, options: Any) -> Tensor:
    """The merged numbers, and one that says that they are."""
    input, of_labels = tensors[0], tensors[TENSORS.index("of_labels")]
    assert input is not None and of_labels is not None
    return input.new_empty((LABELS + 2 * len(of_labels)) * len(input) + 1, dtype=torch.float64)


# --- The definition ---


class _Last(torch.autograd.Function):
    """A gradient that is not differentiated: a second derivative would need those of the other processes."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[Tensor], Tensor], grad: Tensor) -> Tensor:
        return compute(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise RuntimeError(_TWICE)


_TWICE = "linear_cross_entropy: expected to be differentiated once with a group, found a second time"


def last_gradient(compute: Callable[[Tensor], Tensor], grad: Tensor) -> Tensor:
    """``compute(grad)``, of which a derivative is an error. A graph of torch.compile has none anyway."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return compute(grad)
    return _Last.apply(compute, grad)  # type: ignore[no-any-return]


class _Once(torch.autograd.Function):
    """The identity, for what is differentiated once."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return last_gradient(torch.clone, grad)


def _reference(*arguments: Any) -> Tensor:
    *tensors, options = arguments
    if options.group and torch._C._are_functorch_transforms_active():  # so entries.py differentiates kernels' results
        raise RuntimeError(_TWICE)
    input, weight, bias, scale, class_bias, smooth, places, of_labels, smooth_total, norm = tensors
    logits = reference.linear(input, weight, bias, options.normalize)
    own = _plain_numbers(logits, Shard(places, scale, class_bias, smooth), of_labels[:, MARGIN], options)
    if options.group:
        own = _Once.apply(own)
        together = exchanged(own.detach(), options.group)
        mine = torch._C._distributed_c10d._resolve_process_group(options.group).rank()
        together = torch.stack([own if rank == mine else part for rank, part in enumerate(together)])
    else:
        together = own[None]
    loss = finish(merged(together), of_labels, smooth_total.double(), None if norm is None else norm.double(), options)
    return (loss if options.reduction == Reduction.NONE else loss.sum()).to(_sum_type(tensors))


def _plain_numbers(logits: Tensor, shard: Shard, margins: Tensor, options: Any) -> Tensor:
    """What :func:`ltkernels.ops.class_shards.numbers` finds, in plain PyTorch."""
    rows, count = logits.shape
    nothing = logits.new_full((rows,), -torch.inf)
    found = [nothing] * (LABELS + 2 * len(margins))
    found[MAX], found[OTHERS] = torch.full_like(nothing, ABSENT), torch.zeros_like(nothing)
    if count == 0:
        found[SMOOTH] = logits.sum(dim=1)  # of nothing, but differentiable
        return torch.stack(found)
    u = logits if shard.class_scale is None else logits * shard.class_scale.to(logits.dtype)
    bias = None if shard.class_bias is None else shard.class_bias.to(logits.dtype)
    u = options.scale * (u if bias is None else u + bias)
    found[SMOOTH] = torch.zeros_like(nothing)
    if shard.smooth is not None:
        found[SMOOTH] = (torch.where(shard.smooth == 0, 0.0, u) * shard.smooth).sum(dim=1)
    masked = u
    for k, place in enumerate(shard.places):
        here = (place >= 0) & (place < count)
        at = torch.where(here, place, 0)
        scale = None if shard.class_scale is None else shard.class_scale.to(logits.dtype)[at]
        x = logits.gather(1, at[:, None])[:, 0]
        both = _label_logits(x, scale, None if bias is None else bias[at], margins[k].to(logits.dtype), options)
        for place_of, value in enumerate(both):
            found[LABELS + 2 * k + place_of] = torch.where(here, value, -torch.inf)
        label = torch.zeros_like(masked, dtype=torch.bool).scatter_(1, at[:, None], here[:, None])
        masked = masked.masked_fill(label, -torch.inf)
    found[MAX] = masked.detach().amax(dim=1).clamp_min(ABSENT)
    found[OTHERS] = (masked - found[MAX][:, None]).exp().sum(dim=1)
    return torch.stack(found)


def _op() -> Op:
    op = Op(
        "class_parallel_cross_entropy",
        TENSORS,
        (0, 1, 2, 3, 4),
        ClassParallelOptions,
        _reference,
        lambda tensors, options: None,  # values are the caller's, who knows all classes
        _new_state,
        _cross_entropy.OP.table.preferences,
        new_output=_new_output,
    )
    kernels = {row.backend: row for row in _cross_entropy.OP.table.rows}
    op.table.rows = [
        row
        if row.backend == "reference"
        else replace(
            row,
            forward=_forward(kernels[row.backend]),
            backward=_backward(kernels[row.backend]),
            gradient_in_forward=True,
            all_gradients=True,
        )
        for row in op.table.rows
    ]
    op.table.kernels = _cross_entropy.OP.name
    return entries.register(op)


OP = _op()

"""The op behind ``functional.linear_cross_entropy`` with a group: each process has the class vectors of some classes.

The features and labels of all rows are on every process. A chunk of rows at a time, each multiplies them with its own
classes and finds what ``class_shards.py`` calls the rows' numbers; one all-gather shows every process those of all,
from which it computes the loss of the rows, the same bits everywhere, and the gradient of its own logits. So a chunk
costs one message of three numbers a row and two a label, ``(W - 1) (3 + 2 L) n`` floats to receive, whatever C and D
are.

What the op returns for the features is this process's part of their gradient, ``G W`` over its own classes; the sum
over the processes is the caller's, as are gathering rows and dividing tables (``functional/class_parallel.py``). Here
are only class tables of this process's classes, and numbers of the rows' labels. Everything but the labels' places has
a gradient: of what concerns this process's classes its part, of what all processes know (``ROWS``) the whole.

As in ``linear_cross_entropy.py`` the forward of a reduced loss computes the gradients at once. The state has the merged
numbers, so that a backward which makes the logits again has no message to exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ltkernels import backends
from ltkernels.ops import class_shards, class_shards_plain, entries
from ltkernels.ops import cross_entropy as _cross_entropy
from ltkernels.ops.chunked_linear import Chunk, Classifier, Needed
from ltkernels.ops.class_shards import LABELS, MAX, PartGradients, Shard, differentiated, finish, merged
from ltkernels.ops.linear_cross_entropy import MEANS, PRODUCTS, _Gradients
from ltkernels.ops.options import ClassParallelOptions, ProductType, Reduction
from ltkernels.ops.table import Op, Tensors
from ltkernels.reference import linear_cross_entropy as reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

HEAD = ("input", "linear_weight", "linear_bias")
PART = PartGradients._fields
ROWS = ("of_labels", "smooth_total", "feature_norm")
VARIABLES = (*HEAD, *PART, *ROWS)
_GIVEN = ("input", "linear_weight", "margins", "of_labels", "smooth_total")
TENSORS = (*(name if name in _GIVEN else f"{name}?" for name in VARIABLES), "places")
_OF_CLASSES = ("class_scale", "class_bias", "smooth", "class_weight")


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
        tensors: by ``TENSORS``: features ``(N, D)``; class vectors ``(c, D)``, biases ``(c,)``, class tables ``(c,)``
            and probabilities ``(N, c)`` of this process, whose c may be 0; and of the rows ``margins (L, N)``,
            ``row_gate (N,)``, ``of_labels (L, PER_LABEL, N)``, ``smooth_total``, ``feature_norm (N,)`` and
            ``places (L, N)``, as ``class_shards.py`` has them.
        options: the scalars.

    Returns:
        The sum of the rows' losses, 0-d, or with ``Reduction.NONE`` the losses ``(N,)``.
    """
    return entries.call(OP, tuple(tensors), options)


class _Call:
    """One call by one backend."""

    def __init__(self, row: backends.Implementation, tensors: Tensors, options: Any, need: Sequence[bool]) -> None:
        self.options, self.variables, self.need = options, tensors[: len(VARIABLES)], need
        of = dict(zip((*VARIABLES, "places"), tensors, strict=True))
        input, weight, margins, places = of["input"], of["linear_weight"], of["margins"], of["places"]
        of_labels, smooth_total = of["of_labels"], of["smooth_total"]
        assert input is not None and weight is not None and margins is not None and places is not None
        assert of_labels is not None and smooth_total is not None
        self.shard = Shard(places, **{name: of[name] for name in Shard._fields[1:]})
        self.margins, self.of_labels, self.smooth_total = margins, of_labels, smooth_total.double()
        self.norm = None if of["feature_norm"] is None else of["feature_norm"].double()
        dtype = PRODUCTS.get(ProductType(options.products), input.dtype)
        # Gradients of a mean of thousands of rows would be subnormal in half types: linear_cross_entropy.py.
        half = min(dtype.itemsize, input.element_size()) < 4 and options.reduction in MEANS
        self.factor = 1.0 / max(1, len(input)) if half else 1.0
        self.head = input, weight, of["linear_bias"], dtype
        self.loss = input.new_empty(len(input), dtype=torch.float64)
        if self.shard.plain:
            self.numbers, self.gradient_ = class_shards_plain.numbers, class_shards_plain.gradient_
        else:
            self.numbers, self.gradient_ = partial(class_shards.numbers, row), partial(class_shards.gradient_, row)

    def losses(self, state: Tensor) -> None:
        """Computes the row losses, and the merged numbers into ``state``."""
        if self.options.class_block:
            self._find_by_blocks(state)
        else:
            for chunk in self._classifier(slice(None), Needed()).chunks(self.options.chunk_rows):
                self._find(state, chunk)
        self.loss = finish(state, self.of_labels, self.smooth_total, self.norm, self.options)

    def _find(self, state: Tensor, chunk: Chunk) -> None:
        shard, margins = self.shard.of_rows(chunk.rows), self.margins[:, chunk.rows]
        found = self.numbers(chunk.logits, shard, margins, self.options)
        state[:, chunk.rows] = merged(exchanged(found, self.options.group), self.options.soft_target)

    def gradients(self, state: Tensor, upstream: Tensor, known: bool) -> _Gradients:
        """Computes the row losses and the gradients for ``upstream``: one, or one a row.

        The merged numbers are in ``state`` if they are ``known``, else afterwards.
        """
        if self.options.class_block:
            return self._gradients_by_blocks(state, upstream, known)
        need = Needed(*self.need[: len(HEAD)])
        classifier = self._classifier(slice(None), need)
        found = self._zeros(classifier.sums)
        for chunk in classifier.chunks(self.options.chunk_rows):
            rows = chunk.rows
            if not known:
                self._find(state, chunk)
            of_rows = upstream if upstream.dim() == 0 else upstream[rows]
            norm = None if self.norm is None else self.norm[rows]
            self.loss[rows], of = differentiated(
                state[:, rows], of_rows, self.of_labels[..., rows], self.smooth_total, norm, self.options,
                self.need[-len(ROWS) :],
            )  # fmt: skip
            parts = self.gradient_(
                of.numbers, state[MAX, rows], chunk.logits, self.shard.of_rows(rows), self.margins[:, rows],
                self.options, self._need_of_part,
            )  # fmt: skip
            if any(need):
                classifier.add(chunk, chunk.logits)
            for name, part in (parts._asdict() | of._asdict()).items():
                if (total := found.get(name)) is not None and part is not None:
                    total = total[rows] if name == "probabilities" else total
                    total = total[..., rows] if name in ("margins", "row_gate", "of_labels", "feature_norm") else total
                    total += part
        classifier.finish()
        found |= {"input": classifier.d_input, "linear_weight": classifier.d_weight, "linear_bias": classifier.d_bias}
        return self._all(found)

    @property
    def _need_of_part(self) -> Sequence[bool]:
        return self.need[len(HEAD) : len(HEAD) + len(PART)]

    def _classifier(self, classes: slice, need: Needed) -> Classifier:
        """Some of this process's classes."""
        input, weight, bias, dtype = self.head
        bias = None if bias is None else bias[classes]
        return Classifier(input, weight[classes], bias, dtype, need, self.options.normalize)

    def _zeros(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Where the gradients of ``PART`` and ``ROWS`` are added up."""
        values = zip(VARIABLES, self.variables, self.need, strict=True)
        return {
            name: torch.zeros_like(
                value, dtype=torch.promote_types(dtype, value.dtype), memory_format=torch.contiguous_format
            )
            for name, value, wanted in values
            if wanted and value is not None and name not in HEAD
        }

    def _all(self, found: dict[str, Tensor | None]) -> _Gradients:
        return _Gradients([found.get(name) for name in VARIABLES], self.variables, self.factor)

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
            tables = (None if t is None else t[block] for t in (shard.class_scale, shard.class_bias, shard.smooth))
            classifier = self._classifier(block, need)
            if scratch is None:  # the first block is the largest
                scratch = classifier.products.new_empty(len(input) * len(classifier.products))
            (chunk,) = classifier.chunks(len(input), scratch)
            yield block, classifier, Shard(torch.where(inside, shard.places - start, -1), *tables), chunk

    def _find_by_blocks(self, state: Tensor) -> None:
        found = [
            self.numbers(chunk.logits, shard, self.margins, self.options)
            for _, _, shard, chunk in self._blocks(Needed())
        ]
        if not found:  # a process without classes
            nothing = self.loss.new_empty(len(self.loss), 0, dtype=torch.float32)
            found = [self.numbers(nothing, self.shard, self.margins, self.options)]
        state.copy_(merged(exchanged(merged(torch.stack(found)), self.options.group)))

    def _gradients_by_blocks(self, state: Tensor, upstream: Tensor, known: bool) -> _Gradients:
        if not known:
            self._find_by_blocks(state)
        need = Needed(*self.need[: len(HEAD)])
        self.loss, of = differentiated(
            state, upstream, self.of_labels, self.smooth_total, self.norm, self.options, self.need[-len(ROWS) :]
        )
        input, weight, _, dtype = self.head
        sums = torch.promote_types(torch.promote_types(dtype, input.dtype), torch.float32)
        found = self._zeros(sums) | of._asdict()
        d_input = torch.zeros_like(input, dtype=sums) if need.input else None
        d_weight = torch.empty_like(weight, dtype=sums) if need.weight else None
        d_bias = torch.empty(len(weight), dtype=sums, device=input.device) if need.bias else None
        for block, classifier, shard, chunk in self._blocks(need._replace(weight=False)):
            classifier.d_weight = None if d_weight is None else d_weight[block]
            parts = self.gradient_(
                of.numbers, state[MAX], chunk.logits, shard, self.margins, self.options, self._need_of_part
            )
            if any(need):
                classifier.add(chunk, chunk.logits)
            classifier.finish()
            if d_input is not None:
                assert classifier.d_input is not None
                d_input += classifier.d_input
            for name, part in parts._asdict().items():
                if (total := found.get(name)) is not None and part is not None:
                    total = total[block] if name in _OF_CLASSES else total
                    total += part
            if d_bias is not None:
                assert classifier.d_bias is not None
                d_bias[block] = classifier.d_bias
        return self._all(found | {"input": d_input, "linear_weight": d_weight, "linear_bias": d_bias})


def _count(tensors: Tensors, options: Any) -> int:
    """How many numbers a row has."""
    return LABELS + (4 if options.soft_target else 2 * len(_given(tensors, "of_labels")))


def _given(tensors: Tensors, name: str) -> Tensor:
    found = tensors[VARIABLES.index(name)]
    assert found is not None
    return found


def _merged_state(state: Tensor, tensors: Tensors, options: Any) -> Tensor:
    return state[:-1].view(_count(tensors, options), len(_given(tensors, "input")))


def _forward(row: backends.Implementation) -> Callable[..., tuple[Tensor, Tensor, _Gradients | None]]:
    def forward(*args: Any) -> tuple[Tensor, Tensor, _Gradients | None]:
        tensors, options, need = args[: len(TENSORS)], ClassParallelOptions(*args[len(TENSORS) : -1]), args[-1]
        state = _new_state(tensors, options)
        state[-1:] = 1.0
        call = _Call(row, tensors, options, need or (False,) * len(VARIABLES))
        known, gradients = _merged_state(state, tensors, options), None
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
        found = call.gradients(_merged_state(state, tensors, options), upstream, True).times(grad)
        return tuple(state.new_empty(0) if d is None else d for d in found)

    return backward


def _sum_type(tensors: Tensors) -> torch.dtype:
    return torch.promote_types(_given(tensors, "input").dtype, torch.float32)


def _new_output(tensors: Tensors, options: Any) -> Tensor:
    input = _given(tensors, "input")
    return input.new_empty(len(input) if options.reduction == Reduction.NONE else (), dtype=_sum_type(tensors))


def _new_state(tensors: Tensors, options: Any) -> Tensor:
    """The merged numbers, and one that says that they are."""
    input = _given(tensors, "input")
    return input.new_empty(_count(tensors, options) * len(input) + 1, dtype=torch.float64)


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
    of = dict(zip((*VARIABLES, "places"), tensors, strict=True))
    logits = reference.linear(of["input"], of["linear_weight"], of["linear_bias"], options.normalize)
    shard = Shard(of["places"], **{name: of[name] for name in Shard._fields[1:]})
    own = class_shards_plain.numbers(logits, shard, of["margins"], options)
    if options.group:
        own = _Once.apply(own)
        together = exchanged(own.detach(), options.group)
        mine = torch._C._distributed_c10d._resolve_process_group(options.group).rank()
        together = torch.stack([own if rank == mine else part for rank, part in enumerate(together)])
    else:
        together = own[None]
    norm = None if of["feature_norm"] is None else of["feature_norm"].double()
    all_numbers = merged(together, options.soft_target)
    loss = finish(all_numbers, of["of_labels"], of["smooth_total"].double(), norm, options)
    return (loss if options.reduction == Reduction.NONE else loss.sum()).to(_sum_type(tensors))


def _op() -> Op:
    op = Op(
        "class_parallel_cross_entropy",
        TENSORS,
        tuple(range(len(VARIABLES))),
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

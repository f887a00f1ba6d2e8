"""The op behind ``functional.expert_linear``: logits exist for a chunk of rows at a time, if at all.

A mean of the logits of shared features needs none: ``averaged_linear.py``. Where softmaxes are averaged, a chunk's
logits are one product of matrices into a scratch; ``aggregate_experts`` reads them there while the cache has them. The
backward makes them again chunk by chunk, lets ``aggregate_experts`` write their gradient over them, and multiplies that
into the gradients of features and classifiers. So no tensor of size ``(E, N, C)`` exists, for a third more products.

The products are PyTorch's; a backend of this op is the backend of the ``aggregate_experts`` between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltkernels import backends
from ltkernels.ops import aggregate_experts, averaged_linear, entries
from ltkernels.ops.options import AggregateExpertsOptions, AggregateMode, ExpertLinearOptions, ExpertWeights
from ltkernels.ops.table import Op, Tensors
from ltkernels.reference import expert_linear as reference

CPU_SCRATCH_BYTES = 8 << 20
"""What the logits of a chunk may take: a part of the last cache."""
GPU_SCRATCH_BYTES = 64 << 20
"""The same on a GPU, about its whole cache: what keeps all of it busy."""
LEAST_ROWS = 128
"""Of a chunk, however many classes there are: each chunk reads all classifiers, which fewer rows do not pay for."""
KEPT_BYTES = 64 << 20
"""Up to which logits are better kept than made again: the batches of classification."""


def may_keep(input: Tensor, weight: Tensor) -> bool:
    """Whether ``(E, N, C)`` logits are so few that ``aggregate_experts`` should have them at once."""
    rows = input.shape[-2]
    if torch.is_grad_enabled():
        return _known(rows * weight.shape[0] * weight.shape[1] * input.element_size() <= KEPT_BYTES)
    return _known(rows <= chunk_rows(input, weight))


def _known(answer: bool) -> bool:
    """The answer, or no: of a symbol it is not asked, so that no graph depends on it."""
    if type(answer) is bool and not torch.compiler.is_compiling():
        return answer
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # a third of a second, most of it sympy

    return statically_known_true(answer)


def chunk_rows(input: Tensor, weight: Tensor) -> int:
    """How many rows a chunk has at most: what the scratch holds, but ``LEAST_ROWS`` at least."""
    scratch = CPU_SCRATCH_BYTES if input.is_cpu else GPU_SCRATCH_BYTES
    return max(LEAST_ROWS, scratch // (weight.shape[0] * weight.shape[1] * input.element_size()))


class _Chunk(NamedTuple):
    """Some rows of a call."""

    rows: slice
    input: Tensor
    """``(G, n, D)``."""
    logits: Tensor
    """``(E, n, C)``, in the scratch."""
    expert_weight: Tensor | None


def _grouped(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor | None]:
    """The call as products of G pairs of matrices: features ``(G, N, D)``, weight ``(G, C', D)``, bias ``(G, 1, C')``.

    G = E, a pair an expert; or G = 1 and C' = E C where experts share features: that product's backward adds up what
    the experts want of the features by itself.
    """
    input, weight, bias, _ = tensors
    assert input is not None and weight is not None
    input = input if input.dim() == 3 else input.unsqueeze(0)
    groups = len(input)
    return (
        input,
        weight.reshape(groups, -1, weight.shape[2]),
        None if bias is None else bias.reshape(groups, 1, -1),
    )


def _chunks(tensors: Tensors, options: ExpertLinearOptions) -> Iterator[_Chunk]:
    """All rows, in chunks of about one size; each is computed into the memory of the one before."""
    input, weight, bias = _grouped(tensors)
    assert tensors[1] is not None
    experts, classes, _ = tensors[1].shape
    groups, rows, _ = input.shape
    if rows == 0:
        return
    count = -(-rows // chunk_rows(input, tensors[1]))
    most = -(-rows // count)
    scratch = input.new_empty(experts * most * classes)
    for start in range(0, rows, most):
        part = slice(start, min(start + most, rows))
        size = part.stop - part.start
        product = scratch[: experts * size * classes].view(groups, size, -1)
        if bias is None:
            torch.bmm(input[:, part], weight.mT, out=product)
        else:
            torch.baddbmm(bias, input[:, part], weight.mT, out=product)
        logits = product if groups == experts else product.view(size, experts, classes).transpose(0, 1)
        shares = tensors[3]
        if shares is not None and options.weights == ExpertWeights.SAMPLE:
            shares = shares[part]
        yield _Chunk(part, input[:, part], logits, shares)


def _forward(row: backends.Implementation) -> Callable[..., tuple[Tensor, Tensor, None]]:
    def forward(*args: Any) -> tuple[Tensor, Tensor, None]:
        tensors, options = args[:4], ExpertLinearOptions(*args[4:-1])
        if _averages(tensors, options):
            return averaged_linear.forward(tensors), _new_state(tensors, options).fill_(1.0), None
        output = _new_output(tensors, options)
        for chunk in _chunks(tensors, options):
            call = chunk.logits, chunk.expert_weight, *AggregateExpertsOptions(*options)
            output[chunk.rows] = row.forward(*call, False)[0]
        return output, _new_state(tensors, options).fill_(1.0), None

    return forward


def _backward(row: backends.Implementation) -> Callable[..., tuple[Tensor, ...]]:
    def backward(grad: Tensor, state: Tensor, *args: Any) -> tuple[Tensor, ...]:
        tensors, options, need = args[:4], ExpertLinearOptions(*args[4:6]), args[6:-1]
        if _averages(tensors, options):
            grads = averaged_linear.backward(grad, tensors, need)
            return tuple(state.new_empty(0) if d is None else d for d in grads)
        _, weight, bias = _grouped(tensors)
        d_input = torch.empty_like(tensors[0]) if need[0] else None
        d_weight, d_bias, d_shares = (
            _zeros(of) if wanted else None for of, wanted in zip((weight, bias, tensors[3]), need[1:], strict=True)
        )
        for chunk in _chunks(tensors, options):
            call = chunk.logits, chunk.expert_weight, *AggregateExpertsOptions(*options)
            softmax = row.forward(*call, False)[1]
            d_logits, part = row.backward(grad[chunk.rows], softmax, *call, any(need[:3]), need[3], True)
            if d_shares is not None:
                of_rows = d_shares[chunk.rows] if options.weights == ExpertWeights.SAMPLE else d_shares
                of_rows += part
            if not any(need[:3]):
                continue
            if len(weight) == 1:
                d_logits = d_logits.transpose(0, 1).reshape(1, -1, weight.shape[1])
            if d_input is not None:
                d_features = d_input if d_input.dim() == 3 else d_input.unsqueeze(0)
                torch.bmm(d_logits, weight, out=d_features[:, chunk.rows])
            if d_weight is not None:
                _add_product(d_weight, d_logits.mT, chunk.input)
            if d_bias is not None:
                d_bias += d_logits.sum(dim=1, keepdim=True)
        return tuple(
            state.new_empty(0) if d is None else d.to(of.dtype).view(of.shape)
            for d, of in zip((d_input, d_weight, d_bias, d_shares), tensors, strict=True)
        )

    return backward


def _averages(tensors: Tensors, options: ExpertLinearOptions) -> bool:
    """Whether the mean of the classifiers gives the result: no weight is a sample's own."""
    assert tensors[0] is not None
    return options.mode == AggregateMode.LOGITS and tensors[0].dim() == 2 and options.weights != ExpertWeights.SAMPLE


def _zeros(like: Tensor) -> Tensor:
    """Memory for a sum over chunks: float32 for half types, which would round it at every chunk."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b, out=a.new_empty(total.shape))  # autocast leaves out= alone


def _new_output(tensors: Tensors, options: ExpertLinearOptions) -> Tensor:
    input, weight, *_ = tensors
    assert input is not None and weight is not None
    return input.new_empty(input.shape[-2], weight.shape[1])


def _new_state(tensors: Tensors, options: ExpertLinearOptions) -> Tensor:
    """Nothing: the backward makes the logits again."""
    input = tensors[0]
    assert input is not None
    return input.new_empty(1, dtype=torch.promote_types(input.dtype, torch.float32))


def _check_values(tensors: Tensors, options: ExpertLinearOptions) -> None:
    aggregate_experts.OP.check_values((None, tensors[3]), AggregateExpertsOptions(*options))


def _op() -> Op:
    """With the implementations of ``aggregate_experts``, each wrapped in the chunks."""
    op = Op(
        "expert_linear",
        ("input", "weight", "bias?", "expert_weight?"),
        (0, 1, 2, 3),
        ExpertLinearOptions,
        reference.expert_linear,
        _check_values,
        _new_state,
        aggregate_experts.OP.table.preferences,
        new_output=_new_output,
    )
    *kernels, definition = op.table.rows
    inner = {row.backend: row for row in aggregate_experts.OP.table.rows}
    op.table.rows = [
        *(
            replace(
                row,
                forward=_forward(inner[row.backend]),
                backward=_backward(inner[row.backend]),
                gradient_in_forward=False,
            )
            for row in kernels
        ),
        definition,
    ]
    op.table.kernels = aggregate_experts.OP.name
    return entries.register(op)


OP = _op()


def expert_linear(tensors: Tensors, options: ExpertLinearOptions) -> Tensor:
    """``(N, C)``: the mean over the experts by the backend that serves the call; see the reference."""
    return entries.call(OP, tuple(tensors), options)

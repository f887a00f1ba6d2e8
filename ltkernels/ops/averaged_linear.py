"""The mean of the logits that several classifiers give the same features: those of the mean of the classifiers.

A mean classifier is as large as the classifiers of one expert, which may be more than the result. So it exists for a
few classes at a time, forward and backward: each part is averaged into a scratch and multiplied from there. With
``s_e`` the share of expert e (the weights over their sum t), ``W = sum_e s_e W_e`` and G the upstream gradient,

* the result is ``X W^T + sum_e s_e b_e``, so ``dX = G W`` and ``dW_e = s_e G^T X``;
* a share's gradient is ``g_e = sum_d W_ed (G^T X)_d``, over the classes it is for, and that of the weight itself
  ``(g_e - sum_k s_k g_k) / t``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ltkernels.ops.table import Tensors

SCRATCH_BYTES = 256 << 10
"""What a part of the mean classifier may always take: a part of the second cache."""
LEAST_CLASSES = 32
"""Of a part, however many features there are: thinner products take longer."""


def chunk_classes(input: Tensor, weight: Tensor) -> int:
    """How many classes a part has at most: a scratch of ``SCRATCH_BYTES``, or of 1 / 2E of the result."""
    experts, classes, features = weight.shape
    scratch = max(SCRATCH_BYTES // input.element_size(), len(input) * classes // (2 * experts))
    return min(classes, max(LEAST_CLASSES, scratch // features))


def needs_parts(input: Tensor, weight: Tensor) -> bool:
    """Whether the mean of the classifiers is too large to be had at once."""
    return chunk_classes(input, weight) < weight.shape[1]


def forward(tensors: Tensors) -> Tensor:
    """``(N, C)`` of features ``(N, D)``, classifiers ``(E, C, D)``, biases ``(E, C)``, weights ``(E,)`` or that."""
    input, weight, bias, expert_weight = tensors
    assert input is not None and weight is not None
    share = shares(expert_weight)
    output = input.new_empty(len(input), weight.shape[1])
    constant = None if bias is None else averaged(bias, share)
    for part in _parts(input, weight):
        torch.mm(input, averaged(weight[:, part], _of(share, part)).t(), out=output[:, part])
    return output if constant is None else output.add_(constant)


def backward(grad: Tensor, tensors: Tensors, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of the four tensors where needed; sums over classes and samples of half types in float32."""
    input, weight, bias, expert_weight = tensors
    assert input is not None and weight is not None
    share = shares(expert_weight)
    experts, classes, _ = weight.shape
    wide = torch.promote_types(input.dtype, torch.float32)
    d_input = torch.zeros_like(input, dtype=wide) if need[0] else None
    d_weight = torch.empty_like(weight) if need[1] else None
    d_share = grad.new_empty(experts, classes, dtype=wide) if need[3] else None
    of_bias = grad.sum(dim=0, dtype=wide) if bias is not None and (need[2] or need[3]) else None
    for part in _parts(input, weight):
        upstream = grad[:, part]
        if d_input is not None:
            d_input.addmm_(upstream.to(wide), averaged(weight[:, part], _of(share, part)).to(wide))
        if d_weight is None and d_share is None:
            continue
        product = torch.mm(upstream.t(), input)
        for e in range(experts):
            if d_weight is not None:
                torch.mul(product, _factor(share, e, part, experts), out=d_weight[e, part])
            if d_share is not None:
                torch.sum(product * weight[e, part], dim=1, dtype=wide, out=d_share[e, part])
    d_bias = None
    if of_bias is not None and bias is not None:
        if need[2]:
            d_bias = torch.stack([of_bias * _factor(share, e, slice(None), experts, 0) for e in range(experts)])
            d_bias = d_bias.to(bias.dtype)
        if d_share is not None:
            d_share += of_bias * bias
    return (
        None if d_input is None else d_input.to(input.dtype),
        d_weight,
        d_bias,
        None if d_share is None or expert_weight is None else _of_weights(d_share, expert_weight),
    )


def shares(expert_weight: Tensor | None) -> Tensor | None:
    """The weights over their sum."""
    return None if expert_weight is None else expert_weight / expert_weight.sum(dim=0, keepdim=True)


def averaged(table: Tensor, share: Tensor | None) -> Tensor:
    """``(C, ...)`` of ``(E, C, ...)``, summed in the type of the shares, ``(E,)`` or ``(E, C)``."""
    if share is None:
        return table.mean(dim=0)
    if share.dim() == 2:
        return (table * share.view(*share.shape, *(1,) * (table.dim() - 2))).sum(dim=0).to(table.dtype)
    # A product with a vector takes a third of the time of products and a sum, but autocast would round the shares.
    autocast = torch.is_autocast_enabled(table.device.type)
    with torch.autocast(table.device.type, enabled=False) if autocast else nullcontext():
        mean = share @ table.to(share.dtype).flatten(1)
    return mean.view(table.shape[1:]).to(table.dtype)


def _parts(input: Tensor, weight: Tensor) -> Iterator[slice]:
    classes = weight.shape[1]
    most = chunk_classes(input, weight)
    return (slice(start, min(start + most, classes)) for start in range(0, classes, max(most, 1)))


def _of(share: Tensor | None, part: slice) -> Tensor | None:
    return share[:, part] if share is not None and share.dim() == 2 else share


def _factor(share: Tensor | None, expert: int, part: slice, experts: int, rank: int = 1) -> Tensor | float:
    """What a part's classes of an expert count, to multiply ``(c, D)`` or with ``rank`` 0 ``(c,)`` by."""
    if share is None:
        return 1.0 / experts
    if share.dim() == 1:
        return share[expert]
    return share[expert, part].unsqueeze(1) if rank else share[expert, part]


def _of_weights(d_share: Tensor, expert_weight: Tensor) -> Tensor:
    """From the gradients ``(E, C)`` of shares that every class has for itself."""
    if expert_weight.dim() == 1:
        d_share = d_share.sum(dim=1)
    total = expert_weight.sum(dim=0, keepdim=True)
    mean = (d_share * (expert_weight / total)).sum(dim=0, keepdim=True)
    return ((d_share - mean) / total).to(expert_weight.dtype)

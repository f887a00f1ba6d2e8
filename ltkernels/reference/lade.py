"""Prior cross-entropy with LADE's regulariser, in plain PyTorch: the definition.

For N rows with logits ``z`` and labels ``y``, training prior ``pi`` and biases ``b``::

    ce     = mean_i  -log softmax(z_i + b)_{y_i}
    first_c = sum_{i: y_i = c} z_ic / (n_c + 1e-8)             n_c: rows with label c
    S_c    = logsumexp_i(z_ic + row_offset[y_i]) - log N + class_offset_c
    reg    = -sum_c pi_c (first_c - S_c - remine_lambda S_c^2)
    loss   = ce + weight * reg

The regulariser is Donsker and Varadhan's bound on a divergence, for each class over the rows of the batch: the only
loss here whose sums run down the columns. The importance weights uniform / pi are those of the class whose column it is
(``class_offset``, as the published code has it) or of the row's label (``row_offset``, as the paper has it).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ltkernels.ops.options import LadeOptions
from ltkernels.reference.cross_entropy import _require
from ltkernels.reference.cross_entropy import check_values as check_shared_values

COUNT_EPS = 1e-8


def lade(
    input: Tensor,
    target: Tensor,
    prior: Tensor,
    class_bias: Tensor | None,
    class_offset: Tensor | None,
    row_offset: Tensor | None,
    options: LadeOptions,
) -> Tensor:
    """The loss of ``(N, C)`` or ``(N, C, D)`` logits: 0-d; float64 for float64 logits, else float32.

    Args:
        input: logits, floating.
        target: labels ``(N,)`` or ``(N, D)`` of an integer type.
        prior: ``(C,)``: ``pi``.
        class_bias: ``(C,)``: ``b``.
        class_offset: ``(C,)``, added to ``S``.
        row_offset: ``(C,)``, by the label of the row.
        options: the scalars.
    """
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    num_classes = input.shape[1]
    z = input.movedim(1, -1).reshape(-1, num_classes).to(dtype)
    label = target.reshape(-1).long()
    valid = label != options.ignore_index
    outside = valid & ((label < 0) | (label >= num_classes))
    label = torch.where(valid & ~outside, label, 0)
    z = torch.where(valid[:, None], z, 0.0)
    count = valid.sum().to(dtype)
    prior = prior.to(dtype)
    total = torch.zeros((), dtype=dtype, device=z.device)
    if options.with_ce:
        u = z if class_bias is None else z + class_bias.to(dtype)
        nll = -torch.log_softmax(u, dim=1).gather(1, label[:, None])[:, 0]
        total = torch.where(valid, nll, 0.0).sum() / count
    if options.weight > 0:
        ones = valid.to(dtype)
        own = torch.where(valid, z.gather(1, label[:, None])[:, 0], 0.0)
        counts = torch.zeros_like(prior).index_add(0, label, ones)
        first = torch.zeros_like(prior).index_add(0, label, own) / (counts + COUNT_EPS)
        weighted = z if row_offset is None else z + row_offset.to(dtype)[label][:, None]
        weighted = torch.where(valid[:, None], weighted, -torch.inf)
        bound = torch.logsumexp(weighted, dim=0) - count.log()
        if class_offset is not None:
            bound = bound + class_offset.to(dtype)
        terms = prior * (first - bound - options.remine_lambda * bound.square())
        total = total - options.weight * terms.sum()
    return total + torch.where(outside.any(), torch.nan, 0.0).to(dtype)


def offsets(prior: Tensor, axis: str) -> Tensor:
    """``log(uniform / prior)`` with the published code's 1e-9, ``(C,)`` float64; where it goes ``axis`` says."""
    assert axis in ("class", "sample")
    uniform = math.log(1.0 / prior.shape[0] + 1e-9)
    return uniform - (prior.double() + 1e-9).log()


def check_values(
    target: Tensor,
    prior: Tensor,
    class_bias: Tensor | None,
    class_offset: Tensor | None,
    row_offset: Tensor | None,
    num_classes: int,
    options: LadeOptions,
) -> None:
    """Raise on values no backend may accept; reads the tensors, so it is called for CPU tensors only."""
    check_shared_values(target, None, None, class_bias, None, None, num_classes, options.ignore_index)
    _require("class_prior", prior, torch.isfinite(prior) & (prior >= 0), "finite values >= 0")
    for name, value in (("class_offset", class_offset), ("row_offset", row_offset)):
        if value is not None:
            _require(name, value, torch.isfinite(value), "finite values")

"""``class_shards.py`` in plain PyTorch: its definition, and what serves row gates and probabilities.

A gate makes each row's adjustments its own, and probabilities ask for sums over classes that the kernels take only of a
whole row. Both are rare beside labels, so here they are some tens of passes over the logits of a chunk, which autograd
differentiates; no more than a chunk is ever in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltkernels.ops.class_shards import ABSENT, LABELS, MAX, OTHERS, SMOOTH, PartGradients, Shard, label_logits
from ltkernels.ops.options import MarginType
from ltkernels.ops.table import _autograd_in_a_kernel
from ltkernels.reference.cross_entropy import _masked_product
from ltkernels.reference.row_cross_entropy import _adjusted_logits


def numbers(logits: Tensor, shard: Shard, margins: Tensor, options: Any, top: Tensor | None = None) -> Tensor:
    """What :func:`ltkernels.ops.class_shards.numbers` finds, of any part.

    Args:
        logits, shard, margins, options: its arguments; the logits are not written to.
        top: ``(N,)``, what the numbers are relative to in place of the part's own maximum.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    count = x.shape[1]
    nothing = x.new_full((len(x),), -torch.inf)
    found = [nothing] * (LABELS + 2 * len(margins))
    found[MAX] = torch.full_like(nothing, ABSENT)
    found[OTHERS] = found[SMOOTH] = x.sum(dim=1) if count == 0 else torch.zeros_like(nothing)  # differentiable
    if count == 0:
        return torch.stack(found if shard.probabilities is None else [*found, *[found[OTHERS]] * 4])
    scale, bias = (None if v is None else v.to(x.dtype) for v in (shard.class_scale, shard.class_bias))
    gate = None if shard.row_gate is None else shard.row_gate.to(x.dtype)
    u = _adjusted_logits(x, scale, bias, gate, options.scale)
    if shard.smooth is not None:
        found[SMOOTH] = _masked_product(shard.smooth.to(x.dtype), u).sum(dim=1)
    masked = u
    for k, place in enumerate(shard.places):
        here = (place >= 0) & (place < count)
        at = torch.where(here, place, 0)[:, None]
        margin = margins[k].to(x.dtype)
        if options.margin_type == MarginType.ADDITIVE:
            plain = u.gather(1, at)[:, 0]
            both = plain, plain - options.scale * margin
        else:  # never with a gate
            a, b = (None if table is None else table[at[:, 0]] for table in (scale, bias))
            both = label_logits(x.gather(1, at)[:, 0], a, b, margin, options)
        for place_of, value in enumerate(both):
            found[LABELS + 2 * k + place_of] = torch.where(here, value, -torch.inf)
        label = torch.zeros_like(masked, dtype=torch.bool).scatter_(1, at, here[:, None])
        masked = masked.masked_fill(label, -torch.inf)
    found[MAX] = masked.detach().amax(dim=1).clamp_min(ABSENT) if top is None else top.to(x.dtype)
    below = masked - found[MAX][:, None]
    found[OTHERS] = below.exp().sum(dim=1)
    if shard.probabilities is not None:
        raw = shard.probabilities.to(x.dtype)
        weighted = raw if shard.class_weight is None else raw * shard.class_weight.to(x.dtype)
        for mass in (weighted, raw):
            mass = torch.where((mass == 0) & torch.isinf(below), 0.0, mass)  # of an absent class, which stays it
            found += [_masked_product(mass, below).sum(dim=1), mass.sum(dim=1)]
    return torch.stack(found)


def gradient_(
    derivative: Tensor,
    top: Tensor,
    logits: Tensor,
    shard: Shard,
    margins: Tensor,
    options: Any,
    need: Sequence[bool],
) -> PartGradients:
    """What :func:`ltkernels.ops.class_shards.gradient_` computes, of any part; it writes over the logits too."""
    known = {
        "class_scale": shard.class_scale, "class_bias": shard.class_bias, "smooth": shard.smooth, "margins": margins,
        "row_gate": shard.row_gate, "probabilities": shard.probabilities, "class_weight": shard.class_weight,
    }  # fmt: skip
    with torch.enable_grad(), _autograd_in_a_kernel():
        x = logits.detach().requires_grad_()
        variables = {
            name: value.detach().requires_grad_()
            for (name, value), wanted in zip(known.items(), need, strict=True)
            if wanted and value is not None
        }
        given = {**known, **variables}
        margins = given.pop("margins")  # type: ignore[assignment]
        found = numbers(x, Shard(shard.places, **given), margins, options, top)
        d_logits, *gradients = torch.autograd.grad(
            found, [x, *variables.values()], derivative.to(found.dtype), materialize_grads=True
        )
    logits.copy_(d_logits)
    return PartGradients(**dict(zip(variables, gradients, strict=True)))

"""A linear classifier and a softmax loss of its logits, in plain PyTorch: the definition.

With features ``x``, class vectors ``w`` and biases ``b`` the logits are ``z_ic = x_i . w_c + b_c``, or for cosines
``(x_i / |x_i|) . (w_c / |w_c|) + b_c``; the loss is that of :mod:`~ltkernels.reference.cross_entropy`, or
:mod:`~ltkernels.reference.row_cross_entropy`, of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltkernels.ops.options import LinearOptions

_EPS = 1e-12  # F.normalize's: a zero vector has cosine 0 with everything
_SCALARS = len(LinearOptions._fields)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, normalize: bool) -> Tensor:
    """``(N, C)`` logits of features ``(N, D)``, or ``(N, C, P)`` where the classifier is ``(C, P, D)``.

    They are float64 if features or classifier are, else float32, whatever the product is computed in elsewhere.
    """
    double = torch.float64 in (input.dtype, weight.dtype)
    dtype = torch.float64 if double else torch.float32
    x, w = input.to(dtype), weight.to(dtype)
    if normalize:
        x, w = _unit(x), _unit(w)
    z = x @ w.flatten(0, -2).t()
    if bias is not None:
        z = z + bias.to(dtype).flatten()
    logits: Tensor = z.unflatten(1, weight.shape[:-1])
    return logits


def of_loss(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The reference of a linear loss, ``f(input, linear_weight, linear_bias, *tensors, options)``.

    ``loss(logits, *tensors, options)`` is the reference of the loss of logits, whose options stand before those of
    the products.
    """

    def linear_loss(*arguments: Any) -> Tensor:
        input, weight, bias, *tensors, options = arguments
        logits = linear(input, weight, bias, options.normalize)
        return loss(logits, *tensors, options)

    return linear_loss


def _unit(vectors: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(_EPS)
    return vectors / norm

"""Prior cross-entropy with LADE's regulariser, whose log-sum-exp runs down the columns."""

from __future__ import annotations

import math

from torch import Tensor

from ltkernels import arguments as arg
from ltkernels.ops import lade as _op
from ltkernels.ops.options import LadeOptions


def lade_cross_entropy(
    input: Tensor,
    target: Tensor,
    class_prior: Tensor,
    *,
    class_bias: Tensor | None = None,
    class_offset: Tensor | None = None,
    row_offset: Tensor | None = None,
    remine_lambda: float = 0.1,
    weight: float = 0.1,
    ignore_index: int = -100,
    regularizer_only: bool = False,
) -> Tensor:
    r"""Cross-entropy of :math:`z + b` and ``weight`` times LADE's regulariser, in one visit of the logits each way.

    .. math::
        S_c = \mathrm{logsumexp}_i(z_{ic} + \rho_{y_i}) - \log N + \omega_c, \qquad
        R = -\sum_c \pi_c \Bigl(\frac{\sum_{i: y_i = c} z_{ic}}{n_c + 10^{-8}} - S_c - \lambda S_c^2\Bigr)

    A mean over the batch and no sum of row losses: gradients accumulated over small batches are not those of a large
    one. :class:`ltkernels.losses.LADELoss` makes the tables from class counts.

    Args:
        input: logits :math:`z`, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``; any floating type and strides.
        target: labels of any integer type.
        class_prior: :math:`\pi`, ``(C,)``, finite and >= 0.
        class_bias: :math:`b`, ``(C,)``, of the cross-entropy alone.
        class_offset: :math:`\omega`, ``(C,)``.
        row_offset: :math:`\rho`, ``(C,)``, by the row's label.
        remine_lambda: :math:`\lambda` >= 0.
        weight: of the regulariser, >= 0.
        ignore_index: label of rows that take no part.
        regularizer_only: leave out the cross-entropy.

    Returns:
        0-d loss; float64 for float64 logits, else float32. NaN for an empty batch.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, option or value.
        IndexError: a label outside ``[0, C)`` that is not ``ignore_index`` (CPU).

    Example:
        >>> import torch, ltkernels as ltk
        >>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]])
        >>> prior = torch.tensor([0.90, 0.09, 0.01])
        >>> ltk.functional.lade_cross_entropy(logits, torch.tensor([0, 2]), prior, class_bias=prior.log())
        tensor(2.1916)

    Source:
        Hong et al., "Disentangling Label Distribution for Long-tailed Visual Recognition", CVPR 2021, equations 8 to
        10; the bound is regularised as in Choi and Lee, "Regularized Mutual Information Neural Estimation", 2020.
    """
    arg.check_logits("input", input)
    if arg.tensor("target", target).is_floating_point():
        raise TypeError(f"target: expected labels of an integer type for this loss, found {target.dtype}")
    arg.check_target(input, target)
    if not isinstance(regularizer_only, bool):
        raise TypeError(f"regularizer_only: expected a bool, found {regularizer_only!r}")
    dim = input.dim()
    x = input.unsqueeze(0) if dim == 1 else input.flatten(2) if dim > 3 else input
    y = target.unsqueeze(0) if dim == 1 else target.flatten(1) if dim > 3 else target

    def table(name: str, value: Tensor | None) -> Tensor | None:
        return None if value is None else arg.class_vector(name, value, x)

    options = LadeOptions(
        ignore_index=arg.integer("ignore_index", ignore_index),
        remine_lambda=arg.number("remine_lambda", remine_lambda, 0.0, math.inf),
        weight=arg.number("weight", weight, 0.0, math.inf),
        with_ce=not regularizer_only,
    )
    tensors = (
        x, y, arg.class_vector("class_prior", class_prior, x), table("class_bias", class_bias),
        table("class_offset", class_offset), table("row_offset", row_offset),
    )  # fmt: skip
    return _op.lade(tensors, options)

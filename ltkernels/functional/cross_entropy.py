"""Softmax cross-entropy of adjusted logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels.functional.reductions import divided, given_denominator, reduction_of
from ltkernels.functional.row_cross_entropy import Target, rows
from ltkernels.ops import cross_entropy as _op
from ltkernels.ops.options import CrossEntropyOptions, RowCrossEntropyOptions


def cross_entropy(
    input: Tensor,
    target: Target,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
    *,
    scale: float = 1.0,
    class_scale: Tensor | None = None,
    class_bias: Tensor | None = None,
    class_margin: Tensor | float | None = None,
    margin_type: str = "additive",
    focal_gamma: float = 0.0,
    focal_pt: str = "raw",
    focal_grad: str = "full",
    sample_weight: Tensor | None = None,
    smoothing_mode: str = "all",
    z_loss: float = 0.0,
    row_gate: Tensor | None = None,
    feature_norm: Tensor | None = None,
    influence_alpha: float = 1e4,
    influence_eps: float = 1e-3,
    denominator: str | float | Tensor = "weight",
    empty: str = "nan",
    inplace: bool = False,
) -> Tensor:
    r"""Softmax cross-entropy of affinely adjusted logits, fused: forward and backward each visit a row once.

    With only the arguments of :func:`torch.nn.functional.cross_entropy` the values are torch's. In general, for row
    :math:`i` with logits :math:`x_{ij}` and label :math:`y`,

    .. math::
        u_{ij} = s\,(a_j x_{ij} + b_j - m_y [j = y]), \qquad
        \ell_i = r_i \Bigl(F_i \sum_j -w_j q_{ij} \log\mathrm{softmax}(u_i)_j + z\,\mathrm{logsumexp}(u_i)^2\Bigr)

    where :math:`q_{ij} = (1 - \varepsilon)\,t_{ij} + \varepsilon / K` is the smoothed target (:math:`t` is one-hot
    for labels, the given row for probabilities; the mass :math:`\varepsilon` goes to the K classes with a finite
    bias) and :math:`F_i = (1 - p_i)^\gamma` the focal factor.

    How the arguments combine:

    * **weight × smoothing**: as in torch, the label's term is weighted by :math:`w_y`, the smoothing terms by
      :math:`w_j`.
    * **focal**: :math:`p_i = \exp(-\mathrm{nll}_i)` where, for ``focal_pt="raw"``, nll is the unweighted, unsmoothed
      negative log-likelihood :math:`-\sum_j t_{ij} \log\mathrm{softmax}(u_i)_j` (so :math:`p_i` is the label's
      probability under the adjusted logits), and, for ``"weighted"``, the row's weighted and smoothed cross-entropy
      itself, as the LDAM-DRW code does. The factor multiplies the whole smoothed, weighted row.
      ``focal_grad="detached"`` treats it as a constant.
    * **z_loss** is not multiplied by class weights or the focal factor, only by the row's ``sample_weight``.
    * **two labels**, ``target=(y_a, y_b, lam)`` (mixup, CutMix, Remix, BBN): ``lam`` of the loss with labels ``y_a``
      and ``1 - lam`` of the loss with ``y_b``, as if this function were called twice: each label has its own margin,
      weight and, for the mean, denominator. One visit of the logits.
    * **margin_type**: ``"additive"`` as above. For logits that are cosines, ``"arc"`` moves the label's angle: its
      cosine :math:`x = \cos\theta` becomes :math:`\cos(\theta + m)`, or, where :math:`\theta + m > \pi`,
      :math:`x - m \sin m`, which goes on falling; ``"arc_straight_through"`` has no such fallback and takes the
      gradient of the cosine as if nothing had been moved, as insightface's ArcFace does.
    * **smoothing_mode**: ``"all"`` as above; ``"off_target"`` gives the label :math:`1 - \varepsilon` and the other
      :math:`K - 1` classes :math:`\varepsilon / (K - 1)`. A tensor as ``label_smoothing`` has an
      :math:`\varepsilon` for each class of the label (label-aware smoothing).
    * **row_gate** :math:`g_i`: the adjusted logit is :math:`s\,((1 + g_i a_j) x_{ij} + g_i b_j)` (DisAlign); a
      ``class_scale`` that is not given is 0 then.
    * **feature_norm** :math:`h_i`: the row's loss is multiplied by :math:`\alpha / (h_i \lVert p_i - y_i \rVert_1 +
      \epsilon)` (influence-balanced loss), beside the focal factor. ``focal_grad="detached"`` holds for both.
    * **denominator** (for ``reduction="mean"``): ``"weight"`` divides by :math:`\sum_i r_i w_{y_i}` over rows that
      are not ignored (torch's mean) and, for probabilities, by :math:`\sum_i r_i` (torch's N); ``"count"`` divides by
      the number of rows that are not ignored, as most long-tail papers do; a float or 0-d tensor divides by that.
    * **ignored rows** have loss 0 and gradient 0, whatever their logits are.
    * a class with **class_bias −inf** (no training samples) has probability 0; as a target it is an error.

    Args:
        input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``; float64, float32, bfloat16 or float16; any strides.
            Half-precision logits are computed in float32 and give a float32 loss.
        target: labels of any integer type, ``()``, ``(N,)`` or ``(N, d1, ...)``; or probabilities of ``input``'s
            shape; or ``(labels, labels, lam)`` with ``lam`` in [0, 1] one number, a 0-d tensor or of the labels' shape.
        weight: class weights :math:`w`, ``(C,)``, any floating type, finite and >= 0.
        ignore_index: label of rows that take no part.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: :math:`\varepsilon` in [0, 1], one number, or ``(C,)`` with labels.
        scale: :math:`s` > 0, an inverse temperature.
        class_scale: :math:`a`, ``(C,)``, finite; receives a gradient if it requires one.
        class_bias: :math:`b`, ``(C,)``, finite or −inf; receives a gradient if it requires one.
        class_margin: :math:`m`, ``(C,)`` or one number for all classes, finite; labels only.
        margin_type: ``"additive"``, ``"arc"`` or ``"arc_straight_through"``; margins on angles are in radians, in
            [0, pi].
        focal_gamma: :math:`\gamma` >= 0.
        focal_pt: ``"raw"`` or ``"weighted"``.
        focal_grad: ``"full"`` or ``"detached"``.
        sample_weight: :math:`r`, of the labels' shape, finite and >= 0.
        smoothing_mode: ``"all"``, or with labels ``"off_target"``.
        z_loss: :math:`z` >= 0.
        row_gate: :math:`g`, of the labels' shape, finite; receives a gradient if it requires one. Labels only.
        feature_norm: :math:`h`, of the labels' shape, finite and >= 0: the L1 norm of what the classifier sees. Labels
            only.
        influence_alpha: :math:`\alpha` > 0, with ``feature_norm``.
        influence_eps: :math:`\epsilon` > 0, with ``feature_norm``.
        denominator: ``"weight"``, ``"count"``, a float or a 0-d tensor.
        empty: what the mean over nothing is (the denominator is 0): ``"nan"`` as in torch, or ``"zero"``.
        inplace: allow the backward to write the gradient over ``input``'s memory, which saves one ``(N, C)`` buffer:
            the logits are gone after the backward, which can then run only once and not for double backward. Where
            the memory cannot be reused (a leaf, shared elements, torch.compile, torch.func, the reference backend)
            the permission is not used.

    Returns:
        The loss: 0-d, or of the labels' shape for ``reduction="none"``; float64 for float64 logits, else float32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, option or value.
        IndexError: a label outside ``[0, C)`` that is not ``ignore_index`` (CPU).

    Example:
        >>> import torch, ltkernels as ltk
        >>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]], requires_grad=True)
        >>> prior = torch.tensor([0.90, 0.09, 0.01])
        >>> loss = ltk.functional.cross_entropy(logits, torch.tensor([0, 2]), class_bias=prior.log())
        >>> loss.backward()
        >>> [round(v, 4) for v in logits.grad[1].tolist()]
        [0.4448, 0.0492, -0.494]

    Source:
        Logit adjustment: Menon et al. 2021, eq. 10. LDAM: Cao et al. 2019. VS: Kini et al. 2021. Focal loss: Lin et
        al. 2017, eq. 4. z-loss: Chowdhery et al. 2022 (PaLM). ArcFace: Deng et al. 2019, eq. 3. DisAlign: Zhang et al.
        2021, eq. 9. Influence-balanced loss: Park et al. 2021, eq. 10. Label-aware smoothing: Zhong et al. 2021
        (MiSLAS), eq. 6.
    """
    if (
        isinstance(target, tuple)
        or margin_type != "additive"
        or smoothing_mode != "all"
        or row_gate is not None
        or feature_norm is not None
        or isinstance(label_smoothing, Tensor)
    ):
        return _of_rows(
            input,
            target,
            weight,
            ignore_index,
            reduction,
            label_smoothing,
            scale,
            class_scale,
            class_bias,
            class_margin,
            margin_type,
            focal_gamma,
            focal_pt,
            focal_grad,
            sample_weight,
            smoothing_mode,
            z_loss,
            row_gate,
            feature_norm,
            influence_alpha,
            influence_eps,
            denominator,
            empty,
            inplace,
        )
    arg.check_logits("input", input)
    arg.check_target(input, target)
    dim = input.dim()
    x, y = input, target
    if sample_weight is not None:
        sample_weight = arg.row_weight("sample_weight", sample_weight, input)
    if dim == 1:
        x, y = input.unsqueeze(0), target.unsqueeze(0)
        sample_weight = None if sample_weight is None else sample_weight.unsqueeze(0)
    elif dim > 3:
        x, y = input.flatten(2), target.flatten(2 if target.is_floating_point() else 1)
        sample_weight = None if sample_weight is None else sample_weight.flatten(1)

    if weight is not None:
        weight = arg.class_vector("weight", weight, x)
    if class_scale is not None:
        class_scale = arg.class_vector("class_scale", class_scale, x)
    if class_bias is not None:
        class_bias = arg.class_vector("class_bias", class_bias, x)
    if class_margin is not None:
        if y.is_floating_point():
            raise ValueError(
                "class_margin: expected None with probability targets, which have no single target class,"
                f" found {type(class_margin).__name__}"
            )
        class_margin = arg.class_vector("class_margin", class_margin, x, scalar=True)
    given: Tensor | None = None
    if isinstance(denominator, Tensor):
        given, denominator = given_denominator(denominator, reduction), 1.0
    scalars = (
        ignore_index, reduction, label_smoothing, scale, focal_gamma, focal_pt, focal_grad, z_loss, denominator, empty,
    )  # fmt: skip
    options, divisor = _cached_options(*scalars)
    if options.ignore_index >= 0 and y.is_floating_point():
        raise ValueError(f"ignore_index: expected a negative number with probability targets, found {ignore_index}")

    loss = _op.cross_entropy(x, y, weight, class_scale, class_bias, class_margin, sample_weight, options, inplace)
    if given is not None or divisor != 1.0:
        loss = divided(loss, given, divisor, options.empty_zero)
    if reduction == "none" and (dim == 1 or dim > 3):
        loss = loss.reshape((input.shape[0], *input.shape[2:]) if dim > 1 else ())
    return loss


@lru_cache(maxsize=256, typed=True)  # a training loop passes the same scalars at every step
def _options(
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    scale: float,
    focal_gamma: float,
    focal_pt: str,
    focal_grad: str,
    z_loss: float,
    denominator: str | float,
    empty: str,
) -> tuple[CrossEntropyOptions, float]:
    """The checked scalars as the op takes them, and what its result is still to be divided by."""
    kind, divisor = reduction_of(reduction, denominator)
    options = CrossEntropyOptions(
        arg.integer("ignore_index", ignore_index),
        kind,
        arg.number("label_smoothing", label_smoothing, 0.0, 1.0),
        arg.number("scale", scale, 0.0, math.inf, open_low=True),
        arg.number("focal_gamma", focal_gamma, 0.0, math.inf),
        arg.choice("focal_pt", focal_pt, ("raw", "weighted")) == "weighted",
        arg.choice("focal_grad", focal_grad, ("full", "detached")) == "detached",
        arg.number("z_loss", z_loss, 0.0, math.inf),
        arg.choice("empty", empty, ("nan", "zero")) == "zero",
    )
    return options, divisor


def _cached_options(*scalars: Any) -> tuple[CrossEntropyOptions, float]:
    if torch.compiler.is_compiling():
        return _options.__wrapped__(*scalars)
    try:
        return _options(*scalars)
    except TypeError:  # a value of the wrong type, or one that the cache cannot hold, of which this says more
        return _options.__wrapped__(*scalars)


_MARGIN_TYPES = {"additive": 0, "arc": 1, "arc_straight_through": 2}


@lru_cache(maxsize=256, typed=True)
def _row_options(
    margin_type: str, smoothing_mode: str, influence_alpha: float, influence_eps: float, *scalars: Any
) -> tuple[RowCrossEntropyOptions, float]:
    """As :func:`_options`, whose arguments are the ``scalars``."""
    shared, divisor = _options.__wrapped__(*scalars)
    options = RowCrossEntropyOptions(
        shared.ignore_index,
        shared.reduction,
        shared.label_smoothing,
        smoothing_mode == "off_target",
        shared.scale,
        _MARGIN_TYPES[margin_type],
        shared.focal_gamma,
        shared.focal_weighted,
        shared.focal_detached,
        arg.number("influence_alpha", influence_alpha, 0.0, math.inf, open_low=True),
        arg.number("influence_eps", influence_eps, 0.0, math.inf, open_low=True),
        shared.z_loss,
        shared.empty_zero,
    )
    return options, divisor


def _cached_row_options(*scalars: Any) -> tuple[RowCrossEntropyOptions, float]:
    if torch.compiler.is_compiling():
        return _row_options.__wrapped__(*scalars)
    try:
        return _row_options(*scalars)
    except TypeError:
        return _row_options.__wrapped__(*scalars)


def _of_rows(
    input: Tensor,
    target: Target,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float | Tensor,
    scale: float,
    class_scale: Tensor | None,
    class_bias: Tensor | None,
    class_margin: Tensor | float | None,
    margin_type: str,
    focal_gamma: float,
    focal_pt: str,
    focal_grad: str,
    sample_weight: Tensor | None,
    smoothing_mode: str,
    z_loss: float,
    row_gate: Tensor | None,
    feature_norm: Tensor | None,
    influence_alpha: float,
    influence_eps: float,
    denominator: str | float | Tensor,
    empty: str,
    inplace: bool,
    op: Callable[[tuple[Tensor | None, ...], RowCrossEntropyOptions, bool], Tensor] | None = None,
) -> Tensor:
    """The calls of :func:`cross_entropy` whose adjustments depend on the row; ``op`` as of ``rows``."""
    arg.choice("margin_type", margin_type, tuple(_MARGIN_TYPES))
    arg.choice("smoothing_mode", smoothing_mode, ("all", "off_target"))
    if margin_type != "additive":
        if class_margin is None:
            raise ValueError(f"class_margin: expected a margin with margin_type={margin_type!r}, found None")
        if isinstance(class_margin, (int, float)) and not torch.compiler.is_compiling():
            class_margin = arg.number("class_margin", class_margin, 0.0, math.pi)
        if row_gate is not None:
            raise ValueError(f"row_gate: expected None with margin_type={margin_type!r}, found a tensor")
    class_smoothing = label_smoothing if isinstance(label_smoothing, Tensor) else None
    eps = 0.0 if isinstance(label_smoothing, Tensor) else label_smoothing
    given: Tensor | None = None
    if isinstance(denominator, Tensor):
        given, denominator = given_denominator(denominator, reduction), 1.0
    options, divisor = _cached_row_options(
        margin_type, smoothing_mode, influence_alpha, influence_eps,
        ignore_index, reduction, eps, scale, focal_gamma, focal_pt, focal_grad, z_loss, denominator, empty,
    )  # fmt: skip
    loss = rows(
        input, target, options, weight=weight, class_scale=class_scale, class_bias=class_bias,
        class_margin=class_margin, class_smoothing=class_smoothing,
        sample_weight=sample_weight, row_gate=row_gate, feature_norm=feature_norm, inplace=inplace,
        op=op,
    )  # fmt: skip
    return divided(loss, given, divisor, options.empty_zero)

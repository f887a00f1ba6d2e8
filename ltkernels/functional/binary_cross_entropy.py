"""Sigmoid cross-entropy for long-tailed data: one independent decision a class."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels.functional.reductions import divided, given_denominator
from ltkernels.ops import binary_cross_entropy as _op
from ltkernels.ops.options import BinaryCrossEntropyOptions, Reduction


@overload
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    pos_weight: Tensor | None = None,
    neg_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    background_index: int | None = None,
    focal_gamma: float | tuple[float, float] = 0.0,
    focal_alpha: float | None = None,
    clip: float = 0.0,
    foreground_keep: Tensor | None = None,
    background_keep: Tensor | None = None,
    score_threshold: float | None = None,
    draws: str = "element",
    seed: int = 0,
    step: int | Tensor = 0,
    column_sums: Literal[False] = False,
    denominator: str | float | Tensor = "count",
    empty: str = "nan",
) -> Tensor: ...


@overload
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    pos_weight: Tensor | None = None,
    neg_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    background_index: int | None = None,
    focal_gamma: float | tuple[float, float] = 0.0,
    focal_alpha: float | None = None,
    clip: float = 0.0,
    foreground_keep: Tensor | None = None,
    background_keep: Tensor | None = None,
    score_threshold: float | None = None,
    draws: str = "element",
    seed: int = 0,
    step: int | Tensor = 0,
    column_sums: Literal[True],
    denominator: str | float | Tensor = "count",
    empty: str = "nan",
) -> tuple[Tensor, Tensor]: ...


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    pos_weight: Tensor | None = None,
    neg_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    background_index: int | None = None,
    focal_gamma: float | tuple[float, float] = 0.0,
    focal_alpha: float | None = None,
    clip: float = 0.0,
    foreground_keep: Tensor | None = None,
    background_keep: Tensor | None = None,
    score_threshold: float | None = None,
    draws: str = "element",
    seed: int = 0,
    step: int | Tensor = 0,
    column_sums: bool = False,
    denominator: str | float | Tensor = "count",
    empty: str = "nan",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Sigmoid cross-entropy with weights, focal factors and masks of negatives, fused: a visit of a row each way.

    For row :math:`i` with logits :math:`z_{ij}`, :math:`p = \sigma(z)` and targets :math:`t_{ij}` in [0, 1] (for a
    label :math:`y` 1 at :math:`j = y` and 0 elsewhere, which is never written out),

    .. math::
        \ell_i = r_i \sum_j A^+ w^+_j t_{ij} (1 - p_{ij})^{\gamma^+} (-\log p_{ij})
               + A^- w^-_j k_{ij} (1 - t_{ij})\, q_{ij}^{\gamma^-} (-\log(1 - q_{ij})),
        \qquad q = \max(p - m, 0)

    where :math:`r_i` is the row's ``sample_weight`` times the ``weight`` of its label, :math:`m` is ``clip`` and
    :math:`k_{ij}` is 1 where the negative is kept. The published losses of the family are choices of these:

    * **class-balanced sigmoid** and **focal**: ``weight``; with a factor also ``focal_gamma``.
    * **sigmoid focal**: ``focal_gamma`` for both kinds, :math:`A^+ = \alpha`, :math:`A^- = 1 - \alpha`.
    * **asymmetric**: ``focal_gamma=(0, 4), clip=0.05``.
    * **equalization**: ``foreground_keep`` 0 for rare classes and 1 for others: rows of foreground do not push rare
      classes down. **Drop**: ``background_keep`` below 1 for rare classes. **Adaptive class suppression**:
      ``foreground_keep`` 0 with a ``score_threshold``, ``background_keep`` by class, ``draws="row"``.
    * **equalization v2**: ``pos_weight`` and ``neg_weight`` made of earlier ``column_sums``.
    * **federated**: ``neg_weight`` 1 for the classes of the batch's subset and 0 for others.

    Ignored rows have loss 0 and gradient 0, whatever their logits are. The same (seed, step) drops the same
    negatives in the backward and on every device.

    Args:
        input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``; float64, float32, bfloat16 or float16; any strides.
            Half-precision logits are computed in float32 and give a float32 loss.
        target: labels of any integer type, ``()``, ``(N,)`` or ``(N, d1, ...)``; or, of ``input``'s shape, multi-hot
            targets: floating in [0, 1], bool or integers 0 and 1.
        weight: ``(C,)``, a factor on all columns of the rows with that label, finite and >= 0; labels only. Rows
            whose label is not below C have 1.
        ignore_index: label of rows that take no part.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, which gives a value a row.
        pos_weight: :math:`w^+`, ``(C,)``, finite and >= 0.
        neg_weight: :math:`w^-`, ``(C,)``, finite and >= 0.
        sample_weight: a factor of each row, of the labels' shape, finite and >= 0.
        background_index: the label of rows of background, >= 0: C for rows without a positive column, or a class
            below C that stands for background. All others are foreground. Among multi-hot targets rows without a
            positive are background.
        focal_gamma: :math:`\gamma` >= 0, one number or :math:`(\gamma^+, \gamma^-)`. The gradient flows through the
            factor.
        focal_alpha: :math:`\alpha` in [0, 1]: :math:`A^+ = \alpha` and :math:`A^- = 1 - \alpha`; without it both
            are 1.
        clip: :math:`m` in [0, 1): the probability by which negatives are shifted down; below it they are lost.
        foreground_keep: ``(C,)``, in [0, 1]: with which probability a negative of that class is kept in rows of
            foreground; 0 and 1 are certain.
        background_keep: the same in rows of background.
        score_threshold: in (0, 1): negatives with :math:`p` at least this are kept whatever was drawn.
        draws: ``"element"``, or ``"row"``: a row draws once for all its columns.
        seed: an integer of 64 bits.
        step: which of the seed's drawings: an int in [0, 2^32), or a 0-d int64 tensor on the device, read when the
            kernel runs.
        column_sums: also return the sums over rows, ``(2, C)``, of the sizes of :math:`d\ell_i/dz_{ij}` of positive
            terms (row 0) and of negative terms (row 1), not divided by a denominator: without focal factors
            :math:`\sum_i r_i w^+_j t (1 - p)` and :math:`\sum_i r_i w^-_j k (1 - t) p`.
        denominator: of the mean: ``"count"``, the number of rows that are not ignored, as most papers of the family
            have it; ``"elements"``, that times C, which is torch's mean and that of the published focal and
            asymmetric losses; a float or a 0-d tensor.
        empty: what the mean over nothing is: ``"nan"`` or ``"zero"``.

    Returns:
        The loss: 0-d, or of the labels' shape for ``reduction="none"``; float64 for float64 logits, else float32.
        With ``column_sums`` a pair, whose second takes no gradient.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, option or value.
        IndexError: a label that is no class, ``background_index`` or ``ignore_index`` (CPU).

    Example:
        >>> import torch, ltkernels as ltk
        >>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]])
        >>> ltk.functional.binary_cross_entropy(logits, torch.tensor([0, 2]), focal_gamma=2.0, focal_alpha=0.25)
        tensor(0.3302)

    Source:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 5 (focal). Ridnik et al.,
        "Asymmetric Loss For Multi-Label Classification", ICCV 2021, equation 7. Tan et al., "Equalization Loss for
        Long-Tailed Object Recognition", CVPR 2020, equation 3; "Equalization Loss v2", CVPR 2021.
    """
    dim = arg.tensor("input", input).dim()
    arg.check_logits("input", input)
    multi_hot = _check_target(input, target)
    if multi_hot and weight is not None:
        raise ValueError("weight: expected None with multi-hot targets (pos_weight and neg_weight are by column)")
    x = input.unsqueeze(0) if dim == 1 else input.flatten(2) if dim > 3 else input

    def of_rows(value: Tensor) -> Tensor:
        return value.unsqueeze(0) if dim == 1 else value.flatten(1) if dim > 3 else value

    if multi_hot:
        t = target.unsqueeze(0) if dim == 1 else target.flatten(2) if dim > 3 else target
        t = t if t.is_floating_point() else t.to(input.dtype)
    else:
        t = of_rows(target)

    def table(name: str, value: Tensor | None) -> Tensor | None:
        return None if value is None else arg.class_vector(name, value, x)

    reduced, divisor, given = _reduction(reduction, denominator, x.shape[1])
    gamma_pos, gamma_neg = _gammas(focal_gamma)
    alpha = None if focal_alpha is None else arg.number("focal_alpha", focal_alpha, 0.0, 1.0)
    keeps = foreground_keep is not None or background_keep is not None
    draw_step: Tensor | None = None
    if keeps:
        value, draw_step = arg.position("step", step, input.device, 2**32)
        if draw_step is None and value != 0:
            draw_step = torch.full((), value, dtype=torch.int64, device=input.device)
    if score_threshold is not None:
        score_threshold = _open("score_threshold", score_threshold, 0.0)
        if not keeps:
            raise ValueError("score_threshold: expected foreground_keep or background_keep beside it, found neither")
    options = BinaryCrossEntropyOptions(
        ignore_index=arg.integer("ignore_index", ignore_index),
        reduction=reduced,
        background_index=_background(background_index),
        alpha_pos=1.0 if alpha is None else alpha,
        alpha_neg=1.0 if alpha is None else 1.0 - alpha,
        gamma_pos=gamma_pos,
        gamma_neg=gamma_neg,
        clip=_open("clip", clip, None),
        scored=score_threshold is not None,
        score_logit=0.0 if score_threshold is None else math.log(score_threshold) - math.log1p(-score_threshold),
        row_draws=arg.choice("draws", draws, ("element", "row")) == "row",
        column_sums=_flag("column_sums", column_sums),
        empty_zero=arg.choice("empty", empty, ("nan", "zero")) == "zero",
        seed=arg.integer("seed", seed),
    )
    loss, sums = _op.binary_cross_entropy(
        (
            x, t, table("weight", weight), table("pos_weight", pos_weight), table("neg_weight", neg_weight),
            table("foreground_keep", foreground_keep), table("background_keep", background_keep),
            None if sample_weight is None else of_rows(arg.row_weight("sample_weight", sample_weight, input)),
            draw_step,
        ),
        options,
    )  # fmt: skip
    loss = divided(loss, given, divisor, options.empty_zero)
    if options.reduction == Reduction.NONE and (dim == 1 or dim > 3):
        loss = loss.reshape(arg.label_shape(input))
    return loss if sums is None else (loss, sums)


def _check_target(input: Tensor, target: Tensor) -> bool:
    """Whether the target is multi-hot."""
    dtype = arg.tensor("target", target).dtype
    if target.device != input.device:
        raise ValueError(f"target: expected device {input.device} as input's, found {target.device}")
    if dtype not in arg.INTEGER_TYPES and dtype not in arg.LOGITS_TYPES and dtype is not torch.bool:
        raise TypeError(f"target: expected labels of an integer type or multi-hot targets, found {dtype}")
    labels = arg.label_shape(input)
    if target.shape == labels and dtype in arg.INTEGER_TYPES:
        return False
    if target.shape != input.shape:
        raise ValueError(
            f"target: expected labels of shape {labels} and an integer type or targets of shape {tuple(input.shape)},"
            f" found {tuple(target.shape)} of {dtype}"
        )
    return True


def _reduction(reduction: str, denominator: str | float | Tensor, classes: int) -> tuple[int, float, Tensor | None]:
    """The op's reduction, and what its result is still to be divided by."""
    arg.choice("reduction", reduction, ("none", "mean", "sum"))
    if reduction != "mean":
        if isinstance(denominator, Tensor) or denominator != "count":
            raise ValueError(
                f"denominator: expected the default 'count' with reduction={reduction!r}, found {denominator!r}"
            )
        return (Reduction.NONE if reduction == "none" else Reduction.SUM), 1.0, None
    if isinstance(denominator, Tensor):
        return Reduction.SUM, 1.0, given_denominator(denominator, reduction)
    if isinstance(denominator, str):
        arg.choice("denominator", denominator, ("count", "elements"), " or a number")
        return Reduction.MEAN_COUNT, 1.0 if denominator == "count" else float(classes), None
    return Reduction.SUM, arg.number("denominator", denominator, 0.0, math.inf, open_low=True), None


def _gammas(gamma: float | tuple[float, float]) -> tuple[float, float]:
    if isinstance(gamma, tuple):
        if len(gamma) != 2:
            raise ValueError(f"focal_gamma: expected a number or two, found {len(gamma)}")
        return arg.number("focal_gamma[0]", gamma[0], 0.0, math.inf), arg.number(
            "focal_gamma[1]", gamma[1], 0.0, math.inf
        )
    gamma = arg.number("focal_gamma", gamma, 0.0, math.inf)
    return gamma, gamma


def _open(name: str, value: float, above: float | None) -> float:
    """A number below 1; above ``above``, or at least 0."""
    value = arg.number(name, value, 0.0, 1.0, open_low=above is not None)
    if value == 1.0:
        raise ValueError(f"{name}: expected a number below 1, found {value:g}")
    return value


def _background(index: int | None) -> int:
    if index is None:
        return -1
    if arg.integer("background_index", index) < 0:
        raise ValueError(f"background_index: expected None or >= 0, found {index}")
    return int(index)


def _flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, found {value!r}")
    return value

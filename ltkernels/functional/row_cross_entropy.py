"""Losses whose adjustments depend on the row: seesaw, a table of pairs, classes dropped at random.

Two labels, margins on the angle, smoothing by class, gates and influence are arguments of ``cross_entropy``, which
comes here for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels.functional.reductions import divided, given_denominator, reduction_of
from ltkernels.ops import row_cross_entropy as _op
from ltkernels.ops.options import PairTerm, RowCrossEntropyOptions

Target = Tensor | tuple[Tensor, Tensor, Tensor | float]


def rows(
    input: Tensor,
    target: Target,
    options: RowCrossEntropyOptions,
    *,
    weight: Tensor | None = None,
    class_scale: Tensor | None = None,
    class_bias: Tensor | None = None,
    class_margin: Tensor | float | None = None,
    class_smoothing: Tensor | None = None,
    sample_weight: Tensor | None = None,
    row_gate: Tensor | None = None,
    feature_norm: Tensor | None = None,
    pair: Callable[[Tensor], Tensor] | None = None,
    pair_step: Tensor | None = None,
    inplace: bool = False,
    op: Callable[[tuple[Tensor | None, ...], RowCrossEntropyOptions, bool], Tensor] | None = None,
) -> Tensor:
    """Checks what all these losses share and calls the op; ``pair(logits)`` gives the pair term's table.

    ``op`` takes the place of the op of logits, where ``input`` is a tensor of their shape without memory.
    """
    arg.check_logits("input", input)
    labels, lam = _labels(input, target)
    dim = input.dim()

    def shaped(value: Tensor) -> Tensor:
        """A value a row, for logits of two or three dimensions."""
        return value.unsqueeze(0) if dim == 1 else value.flatten(1) if dim > 3 else value

    def of_rows(name: str, value: Tensor | None) -> Tensor | None:
        return None if value is None else shaped(arg.row_weight(name, value, input))

    x = input.unsqueeze(0) if dim == 1 else input.flatten(2) if dim > 3 else input

    def table(name: str, value: Tensor | float | None, scalar: bool = False) -> Tensor | None:
        return None if value is None else arg.class_vector(name, value, x, scalar)

    if lam is not None and lam.shape != (1,):
        lam = shaped(lam) if lam.dim() else lam.reshape(1)
    loss = (op or _op.row_cross_entropy)(
        (
            x, shaped(labels[0]), shaped(labels[1]) if len(labels) > 1 else None, lam, table("weight", weight),
            table("class_scale", class_scale), table("class_bias", class_bias),
            table("class_margin", class_margin, True), table("label_smoothing", class_smoothing),
            of_rows("sample_weight", sample_weight), of_rows("row_gate", row_gate),
            of_rows("feature_norm", feature_norm), None if pair is None else pair(x), pair_step,
        ),
        options,
        inplace,
    )  # fmt: skip
    if options.reduction == 0 and (dim == 1 or dim > 3):
        loss = loss.reshape(arg.label_shape(input))
    return loss


def _labels(input: Tensor, target: Target) -> tuple[list[Tensor], Tensor | None]:
    """Labels of one kind or two, and the share of the first: one number, or a tensor of the labels' shape."""
    if not isinstance(target, tuple):
        _check_labels("target", input, target)
        return [target], None
    if len(target) != 3:
        raise ValueError(f"target: expected labels or (labels, other labels, lam), found a tuple of {len(target)}")
    first, second, lam = target
    _check_labels("target[0]", input, first)
    _check_labels("target[1]", input, second)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if isinstance(lam, Tensor):
        if not lam.is_floating_point():
            raise TypeError(f"lam: expected a floating type, found {lam.dtype}")
        if lam.dim() and lam.shape != first.shape:
            raise ValueError(
                f"lam: expected one number, or the labels' shape {tuple(first.shape)}, found shape {tuple(lam.shape)}"
            )
        if lam.device != input.device and (lam.dim() or not lam.is_cpu):
            raise ValueError(f"lam: expected device {input.device} as input's, found {lam.device}")
        lam = lam.detach().to(dtype)
        if lam.dim() == 0 and not lam.is_cpu:
            lam = lam.expand(first.shape)  # kernels read one number on the CPU
        lam = lam.contiguous()
    elif torch.compiler.is_compiling():
        lam = torch.full(() if input.is_cpu else tuple(first.shape), float(lam), dtype=dtype, device=input.device)
    else:
        lam = torch.full((1,), arg.number("lam", lam, 0.0, 1.0), dtype=dtype, device="cpu")
    return [first, second if second.dtype is first.dtype else second.to(first.dtype)], lam


def _check_labels(name: str, input: Tensor, target: Tensor) -> None:
    if arg.tensor(name, target).is_floating_point():
        raise TypeError(f"{name}: expected labels of an integer type for this loss, found {target.dtype}")
    arg.check_target(input, target, name)


def pair_options(
    reduction: str, denominator: str | float | Tensor, empty: str, ignore_index: int, scale: float, **more: Any
) -> tuple[RowCrossEntropyOptions, Callable[[Tensor], Tensor]]:
    """The scalars of the losses in this file, and what divides the op's result."""
    given = None
    if isinstance(denominator, Tensor):
        given, denominator = given_denominator(denominator, reduction), 1.0
    kind, divisor = reduction_of(reduction, denominator)
    options = RowCrossEntropyOptions(
        ignore_index=arg.integer("ignore_index", ignore_index),
        reduction=kind,
        scale=arg.number("scale", scale, 0.0, math.inf, open_low=True),
        empty_zero=arg.choice("empty", empty, ("nan", "zero")) == "zero",
        **more,
    )
    return options, lambda loss: divided(loss, given, divisor, options.empty_zero)


def seesaw_cross_entropy(
    input: Tensor,
    target: Tensor,
    class_counts: Tensor,
    *,
    p: float = 0.8,
    q: float = 2.0,
    eps: float = 1e-2,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    denominator: str | float | Tensor = "count",
    empty: str = "nan",
) -> Tensor:
    r"""Seesaw loss: the gradient that a sample of class y gives to class j is lessened where j is rarer than y.

    .. math::
        u_j = s x_j + p \min(0, \log n_j - \log n_y) + q \max(0, \log \sigma_j - \log\max(\sigma_y, \epsilon)),
        \qquad \ell = -\log\mathrm{softmax}(u)_y

    with :math:`\sigma` the softmax of :math:`s x`, which takes no gradient, and the counts at least 1. In the log
    domain and row by row: there is no C x C matrix.

    Args:
        input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``; any floating type and strides.
        target: labels of any integer type.
        class_counts: :math:`n`, ``(C,)``: samples of each class, of an integer or floating type, finite and >= 0.
        p: mitigation, >= 0.
        q: compensation, >= 0.
        eps: least probability of the label that compensation reckons with, in (0, 1].
        weight: class weights, ``(C,)``.
        sample_weight: weights of the rows, of the labels' shape.
        ignore_index: label of rows that take no part.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        scale: :math:`s` > 0, of a cosine head.
        denominator: of the mean; by default the number of rows, as published, also with weights.
        empty: ``"nan"`` or ``"zero"``: the mean over nothing.

    Returns:
        The loss: 0-d, or of the labels' shape for ``reduction="none"``; float64 for float64 logits, else float32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, option or value.
        IndexError: a label outside ``[0, C)`` that is not ``ignore_index`` (CPU).

    Example:
        >>> import torch, ltkernels as ltk
        >>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]])
        >>> ltk.functional.seesaw_cross_entropy(logits, torch.tensor([0, 2]), torch.tensor([90, 9, 1]))
        tensor(0.5190)

    Source:
        Wang et al., "Seesaw Loss for Long-Tailed Instance Segmentation", CVPR 2021, equations 3 to 6.
    """
    arg.check_logits("input", input)
    counts = arg.tensor("class_counts", class_counts)
    if counts.dtype not in arg.INTEGER_TYPES and not counts.is_floating_point():
        raise TypeError(f"class_counts: expected an integer or floating type, found {counts.dtype}")
    classes = input.shape[0 if input.dim() == 1 else 1]
    if counts.shape != (classes,):
        raise ValueError(f"class_counts: expected shape ({classes},), found {tuple(counts.shape)}")
    if counts.device != input.device:
        raise ValueError(f"class_counts: expected device {input.device} as input's, found {counts.device}")
    if counts.is_cpu and arg.may_look(counts):
        good = (counts >= 0) & (counts < math.inf) if counts.is_floating_point() else counts >= 0
        if not bool(good.all()):
            at = int((~good).nonzero()[0])
            raise ValueError(f"class_counts: expected finite values >= 0, found {counts[at].item():g} at index {at}")
    return seesaw_of_log_counts(
        input, target, log_counts(counts, input), p=p, q=q, eps=eps, weight=weight, sample_weight=sample_weight,
        ignore_index=ignore_index, reduction=reduction, scale=scale, denominator=denominator, empty=empty,
    )  # fmt: skip


def log_counts(class_counts: Tensor, input: Tensor) -> Tensor:
    """``log max(n, 1)`` in the type of the computation.

    In float32 the rounding of a count over 2^24 moves its logarithm by less than the logarithm itself is rounded.
    """
    return class_counts.detach().to(arg.compute_type(input)).clamp_min(1.0).log()


def seesaw_of_log_counts(
    input: Tensor, target: Tensor, table: Tensor, *, p: float, q: float, eps: float, ignore_index: int, reduction: str,
    scale: float, denominator: str | float | Tensor, empty: str, weight: Tensor | None, sample_weight: Tensor | None,
) -> Tensor:  # fmt: skip
    """:func:`seesaw_cross_entropy` for counts that need no look, by their logarithms."""
    options, finish = pair_options(
        reduction,
        denominator if reduction == "mean" or denominator != "count" else "weight",
        empty,
        ignore_index,
        scale,
        pair_term=PairTerm.SEESAW,
        pair_p=arg.number("p", p, 0.0, math.inf),
        pair_q=arg.number("q", q, 0.0, math.inf),
        pair_eps=arg.number("eps", eps, 0.0, 1.0, open_low=True),
    )
    return finish(rows(input, target, options, weight=weight, sample_weight=sample_weight, pair=lambda x: table))


def pairwise_cross_entropy(
    input: Tensor,
    target: Tensor,
    pair_bias: Tensor,
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    denominator: str | float | Tensor = "weight",
    empty: str = "nan",
) -> Tensor:
    r"""Cross-entropy of :math:`u_j = s x_j + T_{yj}`: a bias for each pair of label and class.

    For methods whose margins depend on both, such as those of implicit semantic augmentation (a quadratic form of the
    classifier's rows). The table takes no gradient.

    Args:
        input: logits, as of :func:`cross_entropy`.
        target: labels of any integer type.
        pair_bias: :math:`T`, ``(C, C)``, finite or -inf, finite on the diagonal: row y is for samples of
            class y.
        weight: class weights, ``(C,)``.
        sample_weight: weights of the rows.
        ignore_index: label of rows that take no part.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        scale: :math:`s` > 0.
        denominator: of the mean, as of :func:`cross_entropy`.
        empty: ``"nan"`` or ``"zero"``.

    Returns:
        The loss, as of :func:`cross_entropy`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, option or value.
        IndexError: a label outside ``[0, C)`` that is not ``ignore_index`` (CPU).

    Example:
        >>> import torch, ltkernels as ltk
        >>> table = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> ltk.functional.pairwise_cross_entropy(torch.zeros(2, 2), torch.tensor([0, 1]), table)
        tensor(0.8133)

    Source:
        Li et al., "MetaSAug", CVPR 2021, equation 5, is of this form (from memory of the paper).
    """
    options, finish = pair_options(reduction, denominator, empty, ignore_index, scale, pair_term=PairTerm.TABLE)

    def table(logits: Tensor) -> Tensor:
        classes = logits.shape[1]
        if not arg.tensor("pair_bias", pair_bias).is_floating_point():
            raise TypeError(f"pair_bias: expected a floating type, found {pair_bias.dtype}")
        if pair_bias.shape != (classes, classes):
            raise ValueError(f"pair_bias: expected shape ({classes}, {classes}), found {tuple(pair_bias.shape)}")
        if pair_bias.device != logits.device:
            raise ValueError(f"pair_bias: expected device {logits.device} as input's, found {pair_bias.device}")
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return pair_bias.detach().to(dtype).contiguous()

    return finish(rows(input, target, options, weight=weight, sample_weight=sample_weight, pair=table))


def equalization_cross_entropy(
    input: Tensor,
    target: Tensor,
    rare: Tensor,
    *,
    drop_rate: float = 0.9,
    seed: int = 0,
    step: int | Tensor = 0,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    denominator: str | float | Tensor = "weight",
    empty: str = "nan",
) -> Tensor:
    r"""Softmax equalization: rare classes other than the label leave the softmax at random.

    Which class leaves which row is a pure function of (seed, step, row, class): the same in the backward, on every
    device and backend.

    Args:
        input: logits, as of :func:`cross_entropy`.
        target: labels of any integer type.
        rare: ``(C,)`` bool: the classes that may leave.
        drop_rate: with which probability they do, in [0, 1].
        seed: an integer of 64 bits.
        step: which of the seed's drawings: an int in [0, 2^32), or a 0-d int64 tensor on the device, read when the
            kernel runs.
        weight: class weights, ``(C,)``.
        sample_weight: weights of the rows.
        ignore_index: label of rows that take no part.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        scale: of the logits, > 0.
        denominator: of the mean, as of :func:`cross_entropy`.
        empty: ``"nan"`` or ``"zero"``.

    Returns:
        The loss, as of :func:`cross_entropy`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, option or value.
        IndexError: a label outside ``[0, C)`` that is not ``ignore_index`` (CPU).

    Example:
        >>> import torch, ltkernels as ltk
        >>> rare = torch.tensor([False, False, True])
        >>> ltk.functional.equalization_cross_entropy(torch.zeros(1, 3), torch.tensor([0]), rare, drop_rate=1.0)
        tensor(0.6931)

    Source:
        Tan et al., "Equalization Loss for Long-Tailed Object Recognition", CVPR 2020, section 3.3.
    """
    drop_rate = arg.number("drop_rate", drop_rate, 0.0, 1.0)
    options, finish = pair_options(
        reduction, denominator, empty, ignore_index, scale, pair_term=PairTerm.DROP, pair_p=drop_rate,
        seed=arg.integer("seed", seed),
    )  # fmt: skip

    def table(logits: Tensor) -> Tensor:
        if arg.tensor("rare", rare).dtype is not torch.bool:
            raise TypeError(f"rare: expected torch.bool, found {rare.dtype}")
        if rare.shape != logits.shape[1:2] or rare.device != logits.device:
            raise ValueError(
                f"rare: expected shape ({logits.shape[1]},) on {logits.device}, found {tuple(rare.shape)} on"
                f" {rare.device}"
            )
        return rare.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)

    arg.check_logits("input", input)
    value, at = arg.position("step", step, input.device, 2**32)
    if at is None:
        at = torch.full((), value, dtype=torch.int64, device=input.device)
    return finish(rows(input, target, options, weight=weight, sample_weight=sample_weight, pair=table, pair_step=at))

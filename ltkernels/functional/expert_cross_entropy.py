"""Losses of several experts on one batch, in one visit of each sample's logits."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels.functional.experts import Experts, expert_table, stacked
from ltkernels.functional.reductions import divided, given_denominator, reduction_of
from ltkernels.ops import expert_cross_entropy as _op
from ltkernels.ops.options import ExpertCrossEntropyOptions


@overload
def expert_cross_entropy(
    input: Experts, target: Tensor, weight: Tensor | None = ..., ignore_index: int = ..., reduction: str = ..., *,
    scale: float = ..., class_scale: Tensor | None = ..., class_bias: Tensor | None = ...,
    class_margin: Tensor | float | None = ..., sample_weight: Tensor | None = ..., diversity_factor: float = ...,
    diversity_temperature: Tensor | float = ..., teacher: Tensor | None = ..., distillation_factor: float = ...,
    distillation_temperature: float = ..., denominator: str | float | Tensor = ..., empty: str = ...,
    aggregate: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def expert_cross_entropy(
    input: Experts, target: Tensor, weight: Tensor | None = ..., ignore_index: int = ..., reduction: str = ..., *,
    scale: float = ..., class_scale: Tensor | None = ..., class_bias: Tensor | None = ...,
    class_margin: Tensor | float | None = ..., sample_weight: Tensor | None = ..., diversity_factor: float = ...,
    diversity_temperature: Tensor | float = ..., teacher: Tensor | None = ..., distillation_factor: float = ...,
    distillation_temperature: float = ..., denominator: str | float | Tensor = ..., empty: str = ...,
    aggregate: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def expert_cross_entropy(
    input: Experts,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    scale: float = 1.0,
    class_scale: Tensor | None = None,
    class_bias: Tensor | None = None,
    class_margin: Tensor | float | None = None,
    sample_weight: Tensor | None = None,
    diversity_factor: float = 0.0,
    diversity_temperature: Tensor | float = 1.0,
    teacher: Tensor | None = None,
    distillation_factor: float = 1.0,
    distillation_temperature: float = 1.0,
    denominator: str | float | Tensor = "weight",
    empty: str = "nan",
    aggregate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The cross-entropies of E experts added up, with their divergence from each other and from a teacher.

    For sample i with label y, expert e's logits :math:`z_e` and :math:`\bar z = \frac1E \sum_e z_e`,

    .. math::
        \ell_i = r_i \Bigl(\sum_e w_{ey} (-\log\sigma(u_e)_y)
            + \lambda \bar T^2 \sum_e \mathrm{KL}\bigl(\sigma(\bar z / T) \,\|\, \sigma(z_e / T)\bigr)
            + \kappa \tau^2 \mathrm{KL}\bigl(\sigma(t / \tau) \,\|\, \sigma(\bar z / \tau)\bigr)\Bigr)

    with :math:`\sigma` the softmax and
    :math:`u_{ej} = s (a_{ej} z_{ej} + b_{ej} - m_{ey} [j = y])`. In the divergence of the experts the mean takes no
    gradient, in that from the teacher t it does. :math:`\bar T` is the mean of the classes' temperatures.

    The mean over the batch divides each expert's cross-entropies by its own weights :math:`\sum_i r_i w_{ey}` and the
    divergences by the number of samples that are not ignored; an expert that no sample has weight for adds nothing.
    Tables of shape ``(C,)`` are those of every expert. With E = 1 and no divergence this is :func:`cross_entropy`.

    Args:
        input: the experts' logits, ``(E, N, C)`` of any strides, or a list of E tensors ``(N, C)``, which is copied
            into one; float64, float32, bfloat16 or float16.
        target: labels ``(N,)`` of any integer type.
        weight: :math:`w`, ``(C,)`` or ``(E, C)``, finite and >= 0. Experts of subsets of the classes have 0 elsewhere.
        ignore_index: label of samples that take no part.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``, over the batch; the experts are added up.
        scale: :math:`s` > 0, of the cross-entropies alone.
        class_scale: :math:`a`, ``(C,)`` or ``(E, C)``, finite.
        class_bias: :math:`b`, ``(C,)`` or ``(E, C)``, finite or -inf, which takes a class out of an expert's softmax:
            its labels then need weight 0.
        class_margin: :math:`m`, a number, ``(C,)`` or ``(E, C)``, finite. Logits that are scaled already need margins
            that are, too.
        sample_weight: :math:`r`, ``(N,)``, finite and >= 0.
        diversity_factor: :math:`\lambda`; negative drives the experts apart.
        diversity_temperature: :math:`T` > 0, a number or ``(C,)``.
        teacher: :math:`t`, ``(N, C)`` logits of any floating type; takes no gradient.
        distillation_factor: :math:`\kappa` >= 0, with ``teacher``.
        distillation_temperature: :math:`\tau` > 0.
        denominator: of the mean: ``"weight"``; ``"count"``, the number of samples that are not ignored, for every
            expert; a float or a 0-d tensor, by which everything is divided.
        empty: what the mean over nothing is: ``"nan"`` or ``"zero"``.
        aggregate: also return the mean of the experts' logits, which comes with the same visit.

    Returns:
        The loss: 0-d, or ``(N,)`` for ``reduction="none"``; float64 for float64 logits, else float32. With
        ``aggregate`` a pair, whose second is :math:`\bar z`, ``(N, C)`` of the loss's type; gradients flow through
        both.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, option or value; experts that do not match; no expert.
        IndexError: a label outside ``[0, C)`` that is not ``ignore_index`` (CPU).

    Example:
        >>> import torch, ltkernels as ltk
        >>> logits = torch.tensor([[[2.0, 0.5, -1.0]], [[1.0, 1.0, 0.0]]])  # two experts, one sample
        >>> ltk.functional.expert_cross_entropy(logits, torch.tensor([0]), diversity_factor=-0.2)
        tensor(1.0726)

    Source:
        Wang et al., "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts" (RIDE), ICLR 2021: margins,
        a negative ``diversity_factor``, temperatures by class. Its paper has pairwise divergences; its published code
        and this have those from the mean. Zhang et al., "Self-Supervised Aggregation of Diverse Experts for
        Test-Agnostic Long-Tailed Recognition" (SADE), NeurIPS 2022: ``class_bias`` by expert.
    """
    z = stacked("input", input, "E, N, C")
    _, rows, classes = z.shape
    if arg.tensor("target", target).dtype not in arg.INTEGER_TYPES:
        raise TypeError(f"target: expected labels of an integer type for this loss, found {target.dtype}")
    if target.shape != (rows,) or target.device != z.device:
        raise ValueError(
            f"target: expected labels of shape ({rows},) on {z.device}, found {tuple(target.shape)} on {target.device}"
        )
    if teacher is not None:
        if arg.tensor("teacher", teacher).dtype not in arg.LOGITS_TYPES:
            raise TypeError(f"teacher: expected float64, float32, bfloat16 or float16, found {teacher.dtype}")
        if teacher.shape != (rows, classes) or teacher.device != z.device:
            raise ValueError(
                f"teacher: expected shape ({rows}, {classes}) on {z.device}, found {tuple(teacher.shape)} on"
                f" {teacher.device}"
            )
        teacher = teacher.detach()
    if not isinstance(aggregate, bool):
        raise TypeError(f"aggregate: expected a bool, found {aggregate!r}")
    diversity = arg.number("diversity_factor", diversity_factor, -math.inf, math.inf)
    temperature, factor = _temperature(diversity_temperature, z)
    given: Tensor | None = None
    if isinstance(denominator, Tensor):
        given, kind, divisor = given_denominator(denominator, reduction), 1, 1.0
    else:
        kind, divisor = reduction_of(reduction, denominator)
    distillation_temperature = arg.number(
        "distillation_temperature", distillation_temperature, 0.0, math.inf, open_low=True
    )
    options = ExpertCrossEntropyOptions(
        ignore_index=arg.integer("ignore_index", ignore_index),
        reduction=kind,
        scale=arg.number("scale", scale, 0.0, math.inf, open_low=True),
        diversity=diversity * factor,
        distillation=arg.number("distillation_factor", distillation_factor, 0.0, math.inf)
        * (0.0 if teacher is None else distillation_temperature**2),
        distillation_scale=1.0 / distillation_temperature,
        aggregate=aggregate,
        empty_zero=arg.choice("empty", empty, ("nan", "zero")) == "zero",
    )
    loss, mean = _op.expert_cross_entropy(
        (
            z, target, expert_table("weight", weight, z), expert_table("class_scale", class_scale, z),
            expert_table("class_bias", class_bias, z), expert_table("class_margin", class_margin, z, scalar=True),
            temperature if diversity != 0.0 else None,
            None if sample_weight is None else arg.row_weight("sample_weight", sample_weight, z[0]), teacher,
        ),
        options,
    )  # fmt: skip
    loss = divided(loss, given, divisor, options.empty_zero)
    return loss if mean is None else (loss, mean)


def _temperature(temperature: Tensor | float, logits: Tensor) -> tuple[Tensor | None, float]:
    """One over the temperatures and the square of their mean, as the op takes them; and a factor that is known here."""
    dtype = arg.compute_type(logits)
    if not isinstance(temperature, Tensor):
        number = arg.number("diversity_temperature", temperature, 0.0, math.inf, open_low=True)
        if number == 1.0:
            return None, 1.0
        table = torch.full((logits.shape[2] + 1,), 1.0 / number, dtype=dtype, device=logits.device)
        table[-1] = 1.0
        return table, number * number
    temperatures = arg.class_vector("diversity_temperature", temperature.detach(), logits[0])
    return torch.cat([temperatures.reciprocal(), temperatures.mean().square().reshape(1)]), 1.0

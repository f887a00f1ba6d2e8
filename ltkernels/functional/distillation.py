"""Distillation: how far a student's distribution is from a teacher's, with temperatures and class biases of each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels.functional.reductions import reduction_of
from ltkernels.ops import distillation as _op
from ltkernels.ops.options import DistillationOptions, Reduction


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    T: float = 1.0,  # noqa: N803 (the temperature's name everywhere)
    *,
    teacher_T: float | None = None,  # noqa: N803
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    class_mask: Tensor | None = None,
    target: Tensor | None = None,
    class_bias: Tensor | None = None,
    alpha: float = 1.0,
    ce_weight: float = 1.0,
    temperature_scale: bool = True,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Kullback-Leibler divergence of the student from the teacher, and the label's cross-entropy in the same visit.

    .. math::
        q = \mathrm{softmax}(t / T_t + b^t), \quad p = \mathrm{softmax}(z / T + b^z), \qquad
        \ell_i = r_i \Bigl(\alpha T^2 \sum_j q_j \log\frac{q_j}{p_j} - \kappa \log\mathrm{softmax}(z + b)_y\Bigr)

    One loss, many methods:

    * **KD** (Hinton et al. 2015): ``T``; RIDE's distillation has T = 1.5.
    * **Balanced KD**: ``teacher_bias = log w``, which is the teacher's distribution weighted by class weights w and
      normalised again; T = 2, the cross-entropy unweighted.
    * **DiVE**: the teacher's distribution to the power s is ``teacher_T = T / s``; ``alpha`` beside ``ce_weight = 1 -
      alpha``; ``class_bias = log(class_counts)`` makes its cross-entropy balanced softmax.
    * **LFME**: a ``class_mask`` for each expert's classes, ``temperature_scale=False``, T = 2.

    Args:
        student: logits :math:`z`, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``; any floating type and strides.
        teacher: logits :math:`t` of the same shape and device, of any floating type; takes no gradient.
        T: temperature of the student and, without ``teacher_T``, of the teacher, > 0.
        teacher_T: the teacher's own temperature, > 0.
        student_bias: :math:`b^z`, ``(C,)``, finite or -inf.
        teacher_bias: :math:`b^t`, ``(C,)``, finite or -inf.
        class_mask: ``(C,)`` bool: the classes that both distributions are over; None: all.
        target: labels of any integer type, for the cross-entropy of the student at temperature 1; None: without it.
        class_bias: :math:`b`, ``(C,)``, finite or -inf, of the cross-entropy; with ``target``.
        alpha: :math:`\alpha` >= 0.
        ce_weight: :math:`\kappa` >= 0, with ``target``.
        temperature_scale: whether the divergence is multiplied by :math:`T^2`, which keeps its gradient's size.
        sample_weight: :math:`r`, of the labels' shape, finite and >= 0.
        ignore_index: label of rows that have no cross-entropy; they distil all the same.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``: the divergence over the number of rows (torch's ``batchmean``),
            the cross-entropy over the number of rows that are not ignored.

    Returns:
        The loss: 0-d, or of the labels' shape for ``reduction="none"``; float64 for float64 logits, else float32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, option or value.
        IndexError: a label outside ``[0, C)`` that is not ``ignore_index`` (CPU).

    Example:
        >>> import torch, ltkernels as ltk
        >>> student, teacher = torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([[1.0, 1.0, 0.0]])
        >>> ltk.functional.distillation_loss(student, teacher, T=2.0)
        tensor(0.3616)

    Source:
        Hinton et al. 2015; Zhang et al., "Balanced Knowledge Distillation for Long-tailed Learning", 2021; He et al.,
        "Distilling Virtual Examples for Long-tailed Recognition" (DiVE), ICCV 2021; Xiang et al., "Learning From
        Multiple Experts" (LFME), ECCV 2020. LFME's published code takes the mean over rows and the classes of the mask,
        times their number, which is this.
    """
    arg.check_logits("student", student)
    if arg.tensor("teacher", teacher).dtype not in arg.LOGITS_TYPES:
        raise TypeError(f"teacher: expected float64, float32, bfloat16 or float16, found {teacher.dtype}")
    if teacher.shape != student.shape:
        raise ValueError(f"teacher: expected student's shape {tuple(student.shape)}, found {tuple(teacher.shape)}")
    if teacher.device != student.device:
        raise ValueError(f"teacher: expected device {student.device} as student's, found {teacher.device}")
    if target is not None:
        if arg.tensor("target", target).is_floating_point():
            raise TypeError(f"target: expected labels of an integer type for this loss, found {target.dtype}")
        arg.check_target(student, target)
    elif class_bias is not None:
        raise ValueError("class_bias: expected a target with it, of whose cross-entropy it is, found None")
    if not isinstance(temperature_scale, bool):
        raise TypeError(f"temperature_scale: expected a bool, found {temperature_scale!r}")
    T = arg.number("T", T, 0.0, math.inf, open_low=True)  # noqa: N806
    teacher_T = T if teacher_T is None else arg.number("teacher_T", teacher_T, 0.0, math.inf, open_low=True)  # noqa: N806
    kind, _ = reduction_of(reduction, "count" if reduction == "mean" else "weight")
    options = DistillationOptions(
        arg.integer("ignore_index", ignore_index),
        kind,
        1.0 / T,
        1.0 / teacher_T,
        arg.number("alpha", alpha, 0.0, math.inf) * (T * T if temperature_scale else 1.0),
        arg.number("ce_weight", ce_weight, 0.0, math.inf),
    )
    dim = student.dim()

    def shaped(value: Tensor) -> Tensor:
        return value.unsqueeze(0) if dim == 1 else value.flatten(1) if dim > 3 else value

    z, t = (x.unsqueeze(0) if dim == 1 else x.flatten(2) if dim > 3 else x for x in (student, teacher.detach()))

    def bias(name: str, value: Tensor | None) -> Tensor | None:
        value = None if value is None else arg.class_vector(name, value, z)
        return value if class_mask is None else _masked(value, class_mask, z)

    tensors = (
        z, t, None if target is None else shaped(target), bias("student_bias", student_bias),
        bias("teacher_bias", teacher_bias),
        None if class_bias is None else arg.class_vector("class_bias", class_bias, z),
        None if sample_weight is None else shaped(arg.row_weight("sample_weight", sample_weight, student)),
    )  # fmt: skip
    loss = _op.distillation(tensors, options)
    if options.reduction == Reduction.NONE and (dim == 1 or dim > 3):
        loss = loss.reshape(arg.label_shape(student))
    return loss


def _masked(bias: Tensor | None, class_mask: Tensor, logits: Tensor) -> Tensor:
    """A class that takes no part has the bias -inf."""
    if arg.tensor("class_mask", class_mask).dtype is not torch.bool:
        raise TypeError(f"class_mask: expected torch.bool, found {class_mask.dtype}")
    if class_mask.shape != logits.shape[1:2] or class_mask.device != logits.device:
        raise ValueError(
            f"class_mask: expected shape ({logits.shape[1]},) on {logits.device}, found {tuple(class_mask.shape)} on"
            f" {class_mask.device}"
        )
    if class_mask.is_cpu and arg.may_look(class_mask) and not bool(class_mask.any()):
        raise ValueError("class_mask: expected a class that takes part, found none")
    if bias is None:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        bias = torch.zeros(logits.shape[1], dtype=dtype, device=logits.device)
    return torch.where(class_mask, bias, -torch.inf)

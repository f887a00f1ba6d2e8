"""timm's mixup and CutMix with losses whose margins belong to a label. Imports nothing of timm.

Any loss of :mod:`ltkernels.losses` goes where timm has a loss: ``ClassificationTask(model, criterion=loss)``, or
``train_loss_fn`` of its training script. The softmax losses take what ``timm.data.Mixup`` makes, ``(N, C)``
probabilities, and labels once it is off (``mixup_off_epoch``). Only margins (LDAM, CosFace, ArcFace) are not defined
for probabilities: for them :func:`mixup_pairs` says which two labels were mixed. Checked with timm 1.0.31.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltkernels import arguments as arg

__all__ = ["mixup_pairs"]


def mixup_pairs(labels: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What ``timm.data.Mixup`` has mixed, as a loss with margins takes it: ``(labels, other labels, lam)``.

    timm mixes row i with row N - 1 - i. How much of each is in the row follows from the targets, whatever the mode of
    the mixup ("batch", "pair", "elem") and for CutMix too. The loss is ``lam`` of the one label's and ``1 - lam`` of
    the other's, as in the paper; where margins and class weights are none it is that of the probabilities, and the
    kernel reads three numbers a row in place of C.

    Args:
        labels: ``(N,)`` of any integer type, as they were before mixing.
        mixed: ``(N, C)``, the targets that ``Mixup(label_smoothing=0)`` made of them. Smoothing belongs to the loss.

    Returns:
        ``labels``, those of the rows mixed in, and ``lam`` ``(N,)`` in ``mixed``'s type: a ``target`` of the losses.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: wrong shapes or devices; on the CPU, targets that are not a mixture of the two labels (smoothed, or
            of other labels).

    Example:
        >>> import torch, ltkernels as ltk
        >>> from ltkernels.integrations.timm import mixup_pairs
        >>> labels, mixed = torch.tensor([0, 2]), torch.tensor([[0.75, 0.0, 0.25], [0.25, 0.0, 0.75]])
        >>> mixup_pairs(labels, mixed)
        (tensor([0, 2]), tensor([2, 0]), tensor([0.7500, 0.7500]))
        >>> loss = ltk.losses.LDAMLoss([900, 90, 10])(torch.zeros(2, 3), mixup_pairs(labels, mixed))

    Source:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun et al., "CutMix", ICCV 2019.
    """
    if arg.tensor("labels", labels).dtype not in arg.INTEGER_TYPES:
        raise TypeError(f"labels: expected an integer type, found {labels.dtype}")
    if not arg.tensor("mixed", mixed).is_floating_point():
        raise TypeError(f"mixed: expected floating probabilities, found {mixed.dtype}")
    if labels.dim() != 1 or mixed.dim() != 2 or len(mixed) != len(labels):
        raise ValueError(
            f"labels, mixed: expected shapes (N,) and (N, C), found {tuple(labels.shape)} and {tuple(mixed.shape)}"
        )
    if labels.device != mixed.device:
        raise ValueError(f"mixed: expected device {labels.device} as labels', found {mixed.device}")
    others = labels.flip(0)
    index = torch.stack([labels, others], 1).long()
    share = mixed.gather(1, index)
    if mixed.is_cpu and arg.may_look(mixed):
        whole = torch.where(labels == others, share[:, 0], share.sum(1))
        wrong = (whole.float() - 1).abs() > 0.01
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"mixed: expected all of row {row} on its labels {int(labels[row])} and {int(others[row])}, found"
                f" {float(whole[row]):g} (is Mixup's label_smoothing 0?)"
            )
    return labels, others, share[:, 0]

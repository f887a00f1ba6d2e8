"""Losses, samplers and metrics in the Hugging Face ``Trainer``.

=======================  ==============================================================================================
name                     for
=======================  ==============================================================================================
`hf_loss_func`           ``Trainer(compute_loss_func=...)``: right under gradient accumulation and in several processes
`hf_compute_metrics`     ``Trainer(compute_metrics=...)``: many-, medium- and few-shot accuracy
`LongTailTrainerMixin`   a Trainer that draws with a sampler of this package, and tells sampler and loss of epochs
`EpochCallback`          the latter alone
=======================  ==============================================================================================

The Trainer pops ``labels`` from the inputs, so the model computes no loss of its own, and calls the function with what
the model returned. Checked with transformers 5.24.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, IterableDataset

from ltkernels import functional, metrics, rebalance
from ltkernels.losses.base import LossModule, WeightedLossModule
from ltkernels.losses.sigmoid import SigmoidLoss
from ltkernels.rebalance import ClassCounts, DeferredReweighting
from ltkernels.samplers.sampler import LongTailSampler

try:
    from transformers import TrainerCallback
except ImportError as error:
    message = f"ltkernels.integrations.huggingface needs transformers, run: pip install transformers ({error})"
    raise ImportError(message) from error

__all__ = ["EpochCallback", "LongTailTrainerMixin", "ShotMetrics", "TrainerLoss", "hf_compute_metrics", "hf_loss_func"]

_IGNORED = -100  # what the Trainer does not count


def hf_loss_func(
    loss: nn.Module, class_counts: ClassCounts | None = None, *, shift_labels: bool = False
) -> TrainerLoss:
    """A loss as the Trainer's ``compute_loss_func``.

    With a loss function the Trainer does not divide by the number of accumulation steps; it says how many labels
    (other than -100) the whole step has, over all accumulated batches and all processes, and the function has to return
    its batch's sum over that number. A loss that returns a mean would make the gradient as many times too large as
    batches are accumulated. This returns the sum over what the loss's own mean would divide by:

    * ``denominator="count"``, or no class weights: the number of labels.
    * ``denominator="weight"`` (torch's mean) with class weights: that number times the mean weight of a training
      sample, since the weights of the step's other batches are not known here. Over a run it is the same.
    * ``denominator="elements"`` of the sigmoid losses: the number of labels times C.

    Class weights that a schedule changes are those of the current epoch: give the function to
    :class:`LongTailTrainerMixin`, or to :class:`EpochCallback`. A loss with parameters, or with a state that has to be
    saved (``SeesawLoss``), should also be an attribute of the model, which the Trainer optimises, moves and saves.
    ``TrainingArguments(label_smoothing_factor=...)`` has no effect beside a loss function; losses have an argument.

    Args:
        loss: one of :mod:`ltkernels.losses`, or ``torch.nn.CrossEntropyLoss``, with ``reduction="mean"`` and
            ``ignore_index=-100``. It is moved to the device of the logits.
        class_counts: training samples of each class, ``(C,)``; only for a mean over class weights, and only if the
            loss does not know them.
        shift_labels: the labels of causal language models: position t is scored against label t + 1.

    Returns:
        A callable ``(outputs, labels, num_items_in_batch=None)``. ``outputs`` is what the model returned: a mapping
        with ``"logits"``, or a tuple that begins with them. Logits have their classes last, as all models there:
        ``(N, C)`` or ``(N, T, C)``, with labels ``(N,)`` or ``(N, T)``; or targets of the logits' shape. Without
        ``num_items_in_batch`` it is the loss's mean.

    Raises:
        TypeError: ``loss`` is none of those.
        ValueError: a loss with another reduction or ignored label, or with a number as its denominator; class weights
            whose mean is not known.

    Example:
        >>> import torch, ltkernels as ltk
        >>> from ltkernels.integrations.huggingface import hf_loss_func
        >>> compute_loss = hf_loss_func(ltk.losses.LogitAdjustedLoss([900, 90, 10]))
        >>> compute_loss({"logits": torch.zeros(2, 3)}, torch.tensor([0, 2]), num_items_in_batch=torch.tensor(8))
        tensor(0.5888)
    """
    return TrainerLoss(loss, class_counts, shift_labels)


class TrainerLoss:
    """What :func:`hf_loss_func` returns; ``loss`` is the loss it was made of."""

    def __init__(self, loss: nn.Module, class_counts: ClassCounts | None, shift_labels: bool) -> None:
        if not isinstance(loss, (LossModule, nn.CrossEntropyLoss)) or not hasattr(loss, "reduction"):
            raise TypeError(
                "loss: expected a loss of ltkernels whose rows can be summed, or torch.nn.CrossEntropyLoss, found"
                f" {type(loss).__name__}"
            )
        for name, expected in (("reduction", "mean"), ("ignore_index", _IGNORED)):
            if getattr(loss, name) != expected:
                raise ValueError(f"loss: expected {name}={expected!r} for the Trainer, found {getattr(loss, name)!r}")
        denominator = getattr(loss, "denominator", "weight")
        if not isinstance(denominator, str):
            raise ValueError(
                f"loss: expected denominator='weight' or 'count', because the Trainer gives a number, found"
                f" {denominator!r}"
            )
        self.loss, self.shift_labels = loss, shift_labels
        self._frequency: Tensor | None = None
        weight = _class_weight(loss)
        if weight is not None and denominator == "weight":
            if isinstance(loss, LossModule) and not isinstance(loss, WeightedLossModule):  # RIDE: its terms differ
                raise ValueError(
                    f"loss: expected one without reweighting, found {type(loss).__name__}, whose mean has two divisors"
                )
            counts = _known_counts(loss) if class_counts is None else class_counts
            if counts is None:
                raise ValueError(
                    "class_counts: expected the training samples of each class, by which the mean class weight is"
                    " known (or a loss with denominator='count'), found None"
                )
            frequency = rebalance.as_class_counts(counts)
            if len(frequency) != len(weight):
                raise ValueError(f"class_counts: expected shape ({len(weight)},), found ({len(frequency)},)")
            self._frequency = (frequency / frequency.sum()).float()

    def set_epoch(self, epoch: int) -> None:
        """As the loss's."""
        if isinstance(self.loss, LossModule):
            self.loss.set_epoch(epoch)

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The batch's share in the loss of the whole step; see :func:`hf_loss_func`."""
        if labels is None:
            raise ValueError("labels: expected a tensor, found None: the Trainer takes them from inputs['labels']")
        logits: Tensor = outputs["logits"] if hasattr(outputs, "keys") else outputs[0]
        if self.shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        dense = labels.shape == logits.shape
        if logits.dim() > 2 and (dense or labels.shape == logits.shape[:-1]):
            logits, labels = logits.flatten(0, -2), labels.flatten(0, -2) if dense else labels.flatten()
        self._follow(logits.device)
        if num_items_in_batch is None:
            mean: Tensor = self.loss(logits, labels)
            return mean
        before = self.loss.reduction
        self.loss.reduction = "sum"
        try:
            total: Tensor = self.loss(logits, labels)
        finally:
            self.loss.reduction = before
        return total / self._divisor(num_items_in_batch, logits, dense)

    def _divisor(self, num_items: Tensor | int, logits: Tensor, dense: bool) -> Tensor | float:
        """What the mean over the whole step divides by."""
        parts = 1
        if isinstance(num_items, Tensor) and num_items.dim():
            # Under nn.DataParallel the number comes once for each GPU, and the loss is then multiplied by how many.
            parts, num_items = num_items.numel(), num_items.flatten()[0]
        classes = logits.shape[-1]
        rows = num_items / classes if dense else num_items  # it counted every entry of the targets
        denominator = getattr(self.loss, "denominator", "weight")
        if denominator == "elements":
            rows = rows * classes
        weight = _class_weight(self.loss)
        if weight is not None and denominator == "weight" and not dense:  # over probabilities it divides by rows
            if self._frequency is None:
                raise ValueError("loss: expected no class weights, as when it was given to hf_loss_func, found some")
            rows = rows * (weight.float() * self._frequency).sum()
        return rows * parts

    def _follow(self, device: torch.device) -> None:
        """Moves the loss to where the logits are: the Trainer moves the model alone."""
        for table in chain(self.loss.buffers(), self.loss.parameters()):
            if table.device != device:
                self.loss.to(device)
            break
        if self._frequency is not None and self._frequency.device != device:
            self._frequency = self._frequency.to(device)


def _class_weight(loss: nn.Module) -> Tensor | None:
    """The class weights that the loss's mean divides by, if there are any."""
    if isinstance(loss, WeightedLossModule):
        return loss._class_weight()
    if isinstance(loss, SigmoidLoss):
        return None  # divides by rows or elements
    weight = getattr(loss, "weight", None)
    return weight() if isinstance(weight, DeferredReweighting) else weight


def _known_counts(loss: nn.Module) -> Tensor | None:
    for owner in (loss, getattr(loss, "weight", None)):
        counts = getattr(owner, "class_counts", None)
        if isinstance(counts, Tensor) and bool(counts.any()):  # those of SeesawLoss are zero before training
            return counts
    return None


def hf_compute_metrics(
    class_counts: ClassCounts, many_shot_thr: float = 100, low_shot_thr: float = 20, top_k: int = 1
) -> ShotMetrics:
    """The figures of :func:`ltkernels.metrics.shot_accuracy` as the Trainer's ``compute_metrics``.

    It works with ``TrainingArguments(batch_eval_metrics=True)`` too, where logits are counted batch by batch and not
    kept. The Trainer has gathered the predictions of all processes before it asks.

    Args:
        class_counts: training samples of each class, ``(C,)``.
        many_shot_thr: a class of more training samples is many-shot.
        low_shot_thr: a class of fewer is few-shot.
        top_k: a prediction is right if the label is among the k classes of the largest logits.

    Returns:
        A callable that takes an ``EvalPrediction`` and returns a dict of floats. Logits are ``(N, C)`` or
        ``(N, T, C)``, or the first of a tuple; labels of -100 are left out.

    Raises:
        TypeError, ValueError: bad class counts or thresholds.

    Example:
        >>> import numpy as np
        >>> from transformers import EvalPrediction
        >>> from ltkernels.integrations.huggingface import hf_compute_metrics
        >>> logits, labels = np.eye(3, dtype=np.float32)[[0, 0, 2, 2]], np.array([0, 0, 1, 2])
        >>> figures = hf_compute_metrics([500, 50, 5])(EvalPrediction(logits, labels))
        >>> figures["overall"], figures["many"], figures["medium"], figures["few"]
        (0.75, 1.0, 0.0, 1.0)
    """
    return ShotMetrics(class_counts, many_shot_thr, low_shot_thr, top_k)


class ShotMetrics:
    """What :func:`hf_compute_metrics` returns."""

    def __init__(self, class_counts: ClassCounts, many_shot_thr: float, low_shot_thr: float, top_k: int) -> None:
        self.class_counts, self.top_k = rebalance.as_class_counts(class_counts), top_k
        self.many_shot_thr, self.low_shot_thr = many_shot_thr, low_shot_thr
        self._reset()
        self._figures()  # what is wrong with the thresholds

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        """Counts; with ``compute_result`` returns the figures and begins anew."""
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        logits, labels = torch.as_tensor(logits).cpu(), torch.as_tensor(prediction.label_ids).cpu()
        functional.accuracy_counts(logits.flatten(0, -2), labels.flatten(), self.correct, self.total, top_k=self.top_k)
        if not compute_result:
            return {}
        figures = self._figures()
        self._reset()
        return figures

    def _figures(self) -> dict[str, float]:
        return metrics.shot_accuracy(self.correct, self.total, self.class_counts, self.many_shot_thr, self.low_shot_thr)

    def _reset(self) -> None:
        self.correct, self.total = torch.zeros(2, len(self.class_counts), dtype=torch.int64)


class EpochCallback(TrainerCallback):  # type: ignore[misc]
    """Tells losses and samplers which epoch begins, also where a run is resumed in the middle of one.

    The Trainer itself tells samplers, but not when it resumes in several processes, and it knows nothing of losses.

    Args:
        *parts: whatever has ``set_epoch``.

    Raises:
        TypeError: something without ``set_epoch``.

    Example:
        >>> import ltkernels as ltk
        >>> from ltkernels.integrations.huggingface import EpochCallback, hf_loss_func
        >>> loss = hf_loss_func(ltk.losses.LDAMLoss([900, 90, 10], reweight_epoch=3))
        >>> callback = EpochCallback(loss)  # for Trainer(callbacks=[callback], compute_loss_func=loss)
    """

    def __init__(self, *parts: Any) -> None:
        for part in parts:
            if not callable(getattr(part, "set_epoch", None)):
                raise TypeError(f"parts: expected objects with set_epoch, found {type(part).__name__}")
        self.parts = parts
        self._epoch = 0  # the one that begins next

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epoch = int(state.epoch or 0)  # of a run that is resumed within epoch 3: 3.25

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts by itself: behind an epoch that ended early, ``state.epoch`` is still in that one."""
        for part in self.parts:
            part.set_epoch(self._epoch)
        self._epoch += 1


class LongTailTrainerMixin:
    """Put before ``Trainer``, makes it draw with a sampler and drive the epochs of sampler and loss.

    In several processes Accelerate, which is below the Trainer, gives each its batches of the one stream that all draw.
    A run that is resumed, also in the middle of an epoch, goes on with the samples that were next.

    Args:
        *args, **kwargs: of ``Trainer``.
        train_sampler: a :class:`ltkernels.samplers.LongTailSampler` of the training data, or None for the Trainer's
            own. Not one for several processes: Accelerate would share out what is shared out already.

    Raises:
        TypeError: another sampler.
        ValueError: at the start of training: a sampler of another data set, or beside an ``IterableDataset``.

    Example:
        >>> import ltkernels as ltk
        >>> from transformers import Trainer
        >>> from ltkernels.integrations.huggingface import LongTailTrainerMixin
        >>> class LongTailTrainer(LongTailTrainerMixin, Trainer):
        ...     pass
        >>> sampler = ltk.samplers.LongTailSampler([0, 0, 0, 1])  # for LongTailTrainer(model, train_sampler=sampler)
    """

    def __init__(self, *args: Any, train_sampler: LongTailSampler | None = None, **kwargs: Any) -> None:
        if train_sampler is not None and (
            not isinstance(train_sampler, LongTailSampler) or isinstance(train_sampler, DistributedSampler)
        ):
            raise TypeError(
                "train_sampler: expected a LongTailSampler, whose stream Accelerate shares out among the processes,"
                f" found {type(train_sampler).__name__}"
            )
        self.train_sampler = train_sampler
        super().__init__(*args, **kwargs)
        loss = getattr(self, "compute_loss_func", None)
        parts = [part for part in (loss, train_sampler) if hasattr(part, "set_epoch")]
        self.add_callback(EpochCallback(*parts))  # type: ignore[attr-defined]

    def get_train_dataloader(self) -> Any:
        dataset = self.train_dataset  # type: ignore[attr-defined]
        if self.train_sampler is not None and isinstance(dataset, IterableDataset):
            raise ValueError(
                "train_sampler: expected None beside an IterableDataset, whose samples have no positions, found"
                f" {self.train_sampler!r}"
            )
        return super().get_train_dataloader()  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = self.train_sampler
        if sampler is None:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        dataset = self.train_dataset if train_dataset is None else train_dataset  # type: ignore[attr-defined]
        expected = sampler.class_index.data_size
        if expected is not None and len(dataset) != expected:
            raise ValueError(
                f"train_sampler: expected a sampler of the {len(dataset)} training samples, found one of {expected}"
            )
        return sampler

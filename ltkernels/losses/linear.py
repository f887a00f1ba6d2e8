"""A loss that owns its classifier, so that logits are never in memory as a whole.

:mod:`ltkernels.losses` has the classes by name, and says what holds for all losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ltkernels import arguments as arg
from ltkernels import functional
from ltkernels.class_draws import AliasTable
from ltkernels.class_parallel_linear import BATCHES, ClassParallelLinear
from ltkernels.functional import class_samples
from ltkernels.functional.ranks import Ranks
from ltkernels.functional.row_cross_entropy import Target
from ltkernels.functional.unit import unit
from ltkernels.losses.base import AdjustedCrossEntropy
from ltkernels.rebalance import DeferredReweighting

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn import LinearCrossEntropyOptions

__all__ = ["LinearCrossEntropyLoss"]


class _CriterionsOption:
    """An option that is the criterion's where there is one, to read and to write."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, module: LinearCrossEntropyLoss | None, owner: type) -> Any:
        if module is None:
            return self
        criterion = module._modules.get("criterion")
        return vars(module)[self._name] if criterion is None else getattr(criterion, self._name)

    def __set__(self, module: LinearCrossEntropyLoss, value: object) -> None:
        criterion = module._modules.get("criterion")
        if criterion is None:
            vars(module)[self._name] = value
        else:
            setattr(criterion, self._name, value)


class LinearCrossEntropyLoss(AdjustedCrossEntropy):
    """A linear classifier and a softmax loss of its logits, which never exist whole: features in, loss out.

    ``torch.nn.LinearCrossEntropyLoss`` with the same arguments, values and ``state_dict``; and, by ``criterion``, the
    same for every loss that is made of class tables: :class:`LogitAdjustedLoss`, :class:`BalancedSoftmaxLoss`,
    :class:`VSLoss`, :class:`LDAMLoss`, :class:`CosFaceLoss`, :class:`ArcFaceLoss`, :class:`FocalLoss`,
    :class:`ClassBalancedLoss`, :class:`LabelAwareSmoothingLoss`. See
    :func:`ltkernels.functional.linear_cross_entropy`.

    The layer is the attribute ``linear``: at evaluation predict from ``loss.logits(features)``.

    With ``sampled_classes`` or ``sample_rate`` a training step is of a sample of the classes alone, of
    :func:`ltkernels.functional.sample_classes`: Partial FC. Every forward in training mode takes the next sample, which
    a counter in ``state_dict`` numbers: a run that is resumed goes on with the samples it would have had. In ``eval()``
    mode the loss is of all classes.

    With ``group`` the layer is a :class:`ltkernels.ClassParallelLinear`, whose classes are divided among the processes;
    the loss is the same on all of them. A ``state_dict`` of whole tensors loads into either kind of layer.

    Args:
        in_features: D, size of a feature vector.
        num_classes: C.
        out_features: ``(d1, ..., dK)`` for logits ``(N, C, d1, ..., dK)``.
        bias: whether the layer has one.
        device: of the layer.
        dtype: of the layer.
        weight: class weights ``(C,)``, or a :class:`ltkernels.rebalance.DeferredReweighting`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: label of rows that take no part; None is -100.
        label_smoothing: in ``[0, 1]``, or ``(C,)``, by the row's label.
        options: a :class:`torch.nn.LinearCrossEntropyOptions`; None chooses the rows of a chunk by size.
        criterion: another loss, in place of the four arguments above ``options``.
        normalize: whether logits are cosines, as the losses with margins expect them; their scale is the
            criterion's.
        sampled_classes: classes of a step, those of its labels included, 1 to C; with ``group`` of all processes
            together, of which each takes its share, rounded up.
        sample_rate: instead: their share of C, in (0, 1].
        class_probs: how probable the classes are relative to one another as negatives, ``(C,)``, or an
            :class:`~ltkernels.samplers.AliasTable`; None: all alike.
        correction: whether the loss of a sample is corrected for the classes it leaves out, so that it estimates the
            loss of all; Partial FC does not.
        sparse_grad: whether the gradients of the layer are sparse, for :class:`torch.optim.SparseAdam`, Adagrad or SGD;
            not with ``group``.
        seed: of the samples.
        group: the processes that share the classes: a process group, ``dist.group.WORLD`` for all (which is None before
            ``torch.distributed`` is initialised), or a ``DeviceMesh`` of one dimension. None: this process has
            all classes.
        batch: with ``group``: whether all processes have the same rows, ``"replicated"``, or each has rows of its own,
            ``"gathered"``, as in ``DistributedDataParallel``; the loss is of all rows then, and the gradient of the
            features is made for being averaged over the processes, as DDP and FSDP do.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> margins = ltk.losses.LDAMLoss([900, 90, 10])
        >>> loss = ltk.losses.LinearCrossEntropyLoss(16, 3, criterion=margins, normalize=True)
        >>> loss(torch.randn(8, 16), torch.randint(3, (8,))).backward()
        >>> loss.linear.weight.grad.shape, loss.logits(torch.randn(2, 16)).shape
        (torch.Size([3, 16]), torch.Size([2, 3]))
        >>> partial_fc = ltk.losses.LinearCrossEntropyLoss(
        ...     16, 100_000, criterion=ltk.losses.CosFaceLoss(), normalize=True, sample_rate=0.1, correction=False,
        ...     sparse_grad=True,
        ... )
        >>> partial_fc(torch.randn(8, 16), torch.randint(100_000, (8,))).backward()
        >>> partial_fc.linear.weight.grad._nnz()
        10000
    """

    _defaults: ClassVar[Mapping[str, object]] = {
        "weight": None,
        "ignore_index": -100,
        "reduction": "mean",
        "label_smoothing": 0.0,
        "options": None,
        "normalize": False,
        "sampled_classes": None,
        "correction": True,
        "sparse_grad": False,
        "seed": 0,
        "batch": "replicated",
    }
    _made = False
    reduction = _CriterionsOption()  # libraries set it to "none" on a loss that they were given
    ignore_index = _CriterionsOption()
    linear: nn.Linear | ClassParallelLinear
    sample_step: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | DeferredReweighting | None = None,
        ignore_index: int | None = None,
        label_smoothing: float | Tensor = 0.0,
        options: LinearCrossEntropyOptions | None = None,
        criterion: AdjustedCrossEntropy | None = None,
        normalize: bool = False,
        sampled_classes: int | None = None,
        sample_rate: float | None = None,
        class_probs: Tensor | AliasTable | None = None,
        correction: bool = True,
        sparse_grad: bool = False,
        seed: int = 0,
        group: ProcessGroup | DeviceMesh | None = None,
        batch: str = "replicated",
    ) -> None:
        super().__init__(
            weight=weight,
            ignore_index=-100 if ignore_index is None else ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        self.in_features = arg.size("in_features", in_features)
        self.num_classes = arg.size("num_classes", num_classes)
        self.out_features = tuple(arg.size("out_features", size) for size in out_features)
        self.options = options
        self.normalize = normalize
        self.correction, self.sparse_grad, self.seed = correction, sparse_grad, arg.integer("seed", seed)
        if criterion is not None:
            self._check_criterion(criterion)
        self.criterion = criterion
        self.batch = arg.choice("batch", batch, BATCHES)
        if group is None:
            columns = math.prod(self.out_features, start=self.num_classes)
            self.linear = nn.Linear(self.in_features, columns, bias=bias, device=device, dtype=dtype)
        else:
            self._refuse_with_group()
            self.linear = ClassParallelLinear(
                self.in_features, self.num_classes, bias=bias, group=group, device=device, dtype=dtype
            )
            self.linear.normalize = normalize  # only now: its start is nn.Linear's, as without a group
        self._set_sampled(sampled_classes, sample_rate, class_probs)
        self._made = True
        self._check()

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses to set a table that the criterion has in its place."""
        if name in ("weight", "label_smoothing") and vars(self).get("_modules", {}).get("criterion") is not None:
            raise AttributeError(
                f"{name}: expected no assignment beside a criterion, which has its own: criterion.{name}"
            )
        super().__setattr__(name, value)

    def forward(self, input: Tensor, target: Target, sample_weight: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            input: features, ``(D,)``, ``(N, D)`` or ``(..., D)``.
            target: labels, probabilities or ``(labels, other labels, lam)``, as of
                :func:`ltkernels.functional.linear_cross_entropy`; with ``group`` labels are those of all classes.
            sample_weight: a factor on the loss of each row, of the labels' shape.

        Returns:
            A 0-d tensor, or one value a row with ``reduction="none"``; float64 for float64 features, else float32.
        """
        shape = (self.num_classes, *self.out_features)
        weight: Tensor = self.linear.weight
        bias: Tensor | None = self.linear.bias
        if self.out_features:
            weight, bias = weight.view(*shape, self.in_features), None if bias is None else bias.view(shape)
        sample = self._next_sample(target) if self.training and self.sampled_classes is not None else None
        return self._of(input, weight, bias, target, sample_weight, sample)

    def logits(self, input: Tensor) -> Tensor:
        """Logits for evaluation, without the loss's tables: ``(..., C)``, or ``(N, C, d1, ..., dK)``."""
        weight = self.linear.weight
        if isinstance(self.linear, ClassParallelLinear):
            whole: Tensor = self.linear(input, self.batch)
            return whole
        z: Tensor = nn.functional.linear(
            unit(input) if self.normalize else input, unit(weight) if self.normalize else weight, self.linear.bias
        )
        return z.unflatten(-1, (self.num_classes, *self.out_features)) if self.out_features else z

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if self.criterion is not None:
            self.criterion.set_epoch(epoch)

    def extra_repr(self) -> str:
        head = f"in_features={self.in_features}, num_classes={self.num_classes}, bias={self.linear.bias is not None}"
        if self.out_features:
            head += f", out_features={self.out_features}"
        return ", ".join(part for part in (head, super().extra_repr()) if part)

    def _refuse_with_group(self) -> None:
        if self.out_features:
            raise ValueError(f"out_features: expected () with group, found {self.out_features}")
        if self.sparse_grad:
            raise ValueError("sparse_grad: expected False with group, whose layer is a DTensor, found True")

    def _set_sampled(self, count: int | None, rate: float | None, class_probs: Tensor | AliasTable | None) -> None:
        self.sampled_classes: int | None = None
        self._class_probs: AliasTable | None = None
        if count is None and rate is None:
            for name, value in (("class_probs", class_probs), ("sparse_grad", self.sparse_grad or None)):
                if value is not None:
                    raise ValueError(f"{name}: expected none without sampled_classes or sample_rate, found {value!r}")
            return
        if count is not None and rate is not None:
            raise ValueError(
                f"sampled_classes: expected sampled_classes or sample_rate, found both, {count!r} and {rate!r}"
            )
        if count is not None and arg.size("sampled_classes", count) > self.num_classes:
            raise ValueError(f"sampled_classes: expected at most num_classes, {self.num_classes}, found {count}")
        for name in ("correction", "sparse_grad"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, found {type(value).__name__}")
        if self.sparse_grad and self.out_features:
            raise ValueError(f"sparse_grad: expected False with out_features {self.out_features}, found True")
        self.sampled_classes = class_samples.sampled_size(self.num_classes, count, rate)
        if class_probs is not None:
            table = class_samples.prepared(class_probs, self.num_classes)
            first, end = self._class_range
            if end - first < self.num_classes:  # what was given, and not what the table has rounded
                given = class_probs if isinstance(class_probs, Tensor) else table.class_probs
                self._class_probs = AliasTable(given[first:end]) if end > first else None
            else:
                self._class_probs = table
            if self._class_probs is not None and self._own_sampled < end - first:
                class_samples.number_of_draws(self._class_probs, self._own_sampled)  # refuses what no step could use
        self.register_buffer("sample_step", torch.zeros((), dtype=torch.int64, device=self.linear.weight.device))

    @property
    def _class_range(self) -> tuple[int, int]:
        """This process's classes."""
        return self.linear.class_range if isinstance(self.linear, ClassParallelLinear) else (0, self.num_classes)

    @property
    def _own_sampled(self) -> int:
        """This process's share of the classes of a step, rounded up."""
        first, end = self._class_range
        return -(-(self.sampled_classes or 0) * (end - first) // self.num_classes)

    def _next_sample(self, target: Target) -> functional.ClassSample:
        of = self if self.criterion is None else self.criterion
        step = self.sample_step
        if self._class_probs is not None and self._class_probs.device != step.device:
            self._class_probs = self._class_probs.to(step.device)
        if isinstance(self.linear, ClassParallelLinear) and self.linear.mesh is not None and self.batch == "gathered":
            target = class_samples.labels_of_all(target, Ranks.of(None, self.linear.weight), step.device)
        sample = functional.sample_classes(
            target, self.num_classes, self._own_sampled, seed=self.seed, step=step, class_probs=self._class_probs,
            ignore_index=of.ignore_index, class_range=self._class_range,
        )  # fmt: skip
        step += 1
        return sample

    def _of(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Target,
        sample_weight: Tensor | None,
        sample: functional.ClassSample | None = None,
    ) -> Tensor:
        of = self if self.criterion is None else self.criterion
        arguments = of._arguments()
        del arguments["inplace"]  # there are no logits that the caller could want
        if isinstance(self.linear, ClassParallelLinear) and weight is self.linear.weight:
            arguments["batch"] = self.batch
        if isinstance(target, Tensor) and target.is_floating_point() and arguments["ignore_index"] == -100:
            arguments["ignore_index"] = None
        loss = functional.linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            sample_weight=sample_weight,
            options=self.options,
            normalize=self.normalize,
            sample=sample,
            correction=self.correction,
            sparse_grad=self.sparse_grad and sample is not None,
            **arguments,
        )
        if of._has_absent_classes:
            of._refuse_absent_classes(target)
        return loss

    def _check_criterion(self, criterion: AdjustedCrossEntropy) -> None:
        if (
            not isinstance(criterion, AdjustedCrossEntropy)
            or type(criterion).forward is not AdjustedCrossEntropy.forward
        ):
            raise TypeError(
                "criterion: expected a loss of ltkernels.losses that is made of class tables, found"
                f" {type(criterion).__name__}"
            )
        for name in ("weight", "ignore_index", "reduction", "label_smoothing"):
            value = getattr(self, name)
            if isinstance(value, (Tensor, nn.Module)) or value != self._defaults[name]:
                raise ValueError(f"{name}: expected none beside a criterion, which has its own, found {value!r}")
        if criterion.margin_type != "additive" and not self.normalize:
            raise ValueError(
                f"normalize: expected True with a {type(criterion).__name__}, whose margin is on the angle, found False"
            )

    def _check(self) -> None:
        """As of the other losses; not before there is a classifier that the tables have to fit."""
        if not self._made:
            return
        of = self if self.criterion is None else self.criterion
        moved = {name: value for name, value in of._arguments().items() if isinstance(value, Tensor)}
        device = next((value.device for value in moved.values() if value.dim()), torch.device("cpu"))
        one = torch.empty((), device=device)
        weight = one.expand(self.num_classes, *self.out_features, self.in_features)
        labels = torch.empty(0, *self.out_features, dtype=torch.int64, device=device)
        with torch.no_grad():
            self._of(one.expand(0, self.in_features), weight, None, labels, None)

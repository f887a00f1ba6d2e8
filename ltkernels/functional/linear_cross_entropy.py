"""Softmax cross-entropy of a linear classifier, without its logits in memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ltkernels import arguments as arg
from ltkernels.functional import class_parallel
from ltkernels.functional.class_samples import ClassSample, Sampled, at_sample
from ltkernels.functional.cross_entropy import _cached_options, _of_rows
from ltkernels.functional.reductions import divided, given_denominator
from ltkernels.functional.row_cross_entropy import Target
from ltkernels.ops import linear_cross_entropy as _op
from ltkernels.ops.options import (
    LinearCrossEntropyOptions,
    LinearOptions,
    LinearRowCrossEntropyOptions,
    ProductType,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn import LinearCrossEntropyOptions as ChunkOptions


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Target,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float | Tensor = 0.0,
    options: ChunkOptions | None = None,
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
    normalize: bool = False,
    group: ProcessGroup | DeviceMesh | None = None,
    batch: str = "replicated",
    sample: ClassSample | None = None,
    correction: bool = True,
    sparse_grad: bool = False,
) -> Tensor:
    r"""The loss of a linear classifier's logits, which are never in memory as a whole.

    The same as :func:`cross_entropy` of ``F.linear(input, linear_weight, linear_bias)``, of which at most the larger of
    32 MiB and a twentieth exists at a time: a chunk of rows is multiplied out, the kernels of :func:`cross_entropy`
    write its gradient over its logits, and that is multiplied into the gradients of features and classifier. (Of few
    rows of very many classes it is a block of classes, twice.) With the arguments of
    :func:`torch.nn.functional.linear_cross_entropy` it takes that function's place, with its values.

    * **Gradients** of ``input``, ``linear_weight``, ``linear_bias``, ``class_scale``, ``class_bias`` and ``row_gate``,
      those that are required: a frozen backbone or classifier saves its product. They are computed in the forward
      where the loss is reduced, and in the backward, for which the logits are made again, with
      ``reduction="none"``, in a second backward and in ``torch.compile``. Double backward and :mod:`torch.func` work.
      The gradients that remain (of ``weight``, margins, probabilities) and second derivatives go through the reference,
      whose logits are whole.
    * **normalize**: logits are the cosines of features and class vectors, as of :class:`ltkernels.CosineLinear` with
      ``scale=1``, plus ``linear_bias``. No normalised copy of the classifier is made.
    * **Autocast**: the products are of autocast's type, as in ``F.linear``, but float32 parameters get float32
      gradients that were never rounded to it on a GPU. Without autocast, features and classifier are of one type.
    * **Half types**: the gradients of classifier and bias are added up over chunks in float32.
    * **Determinism**: the bits are the same from run to run, as far as PyTorch's products of matrices on the same
      number of threads are.
    * **Sampled classes**: with ``sample``, of :func:`sample_classes`, the softmax is over its S classes alone, in the
      time and memory of a classifier of so many. Tables and class vectors are given whole all the same.
      ``correction`` subtracts from each adjusted logit :math:`u_j` the log of the probability with which class j is in
      the sample, so that :math:`\sum_j e^{u_j}` is on average the one of all classes; False is the loss of Partial FC.
      Smoothing goes to the classes of the sample.
    * **options**: ``batch_chunk_size`` and ``chunking_method`` set the rows of a chunk, which is otherwise chosen by
      size. The rest says nothing here: sums are in float32 or more always, and a backward can be repeated.

    Args:
        input: features, ``(D,)``, ``(N, D)`` or ``(..., D)``; float64, float32, bfloat16 or float16.
        linear_weight: class vectors ``(C, D)``; or ``(C, d1, ..., dK, D)``, with features ``(N, D)``, for logits
            ``(N, C, d1, ..., dK)``.
        target: labels of any integer type, one a row: ``()``, ``(N,)``, ``(...)`` or ``(N, d1, ..., dK)``; or
            probabilities ``(C,)``, ``(..., C)`` or ``(N, C, d1, ..., dK)``; or ``(labels, labels, lam)``.
        linear_bias: ``(C,)`` or ``(C, d1, ..., dK)``.
        weight: class weights, ``(C,)``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: label of rows that take no part; None is -100. Not with probabilities.
        label_smoothing: in [0, 1], one number, or ``(C,)`` with labels.
        options: a :class:`torch.nn.LinearCrossEntropyOptions`.
        scale: as of :func:`cross_entropy`, like all that follow.
        class_scale: ``(C,)``.
        class_bias: ``(C,)``.
        class_margin: ``(C,)`` or one number.
        margin_type: ``"additive"``, ``"arc"`` or ``"arc_straight_through"``.
        focal_gamma: >= 0.
        focal_pt: ``"raw"`` or ``"weighted"``.
        focal_grad: ``"full"`` or ``"detached"``.
        sample_weight: one a row.
        smoothing_mode: ``"all"`` or ``"off_target"``.
        z_loss: >= 0.
        row_gate: one a row.
        feature_norm: one a row; without a gradient.
        influence_alpha: > 0.
        influence_eps: > 0.
        denominator: ``"weight"``, ``"count"``, a float or a 0-d tensor.
        empty: ``"nan"`` or ``"zero"``.
        normalize: whether logits are cosines.
        group: processes among which the classes are divided, a :class:`torch.distributed.ProcessGroup` or a
            :class:`~torch.distributed.device_mesh.DeviceMesh` of one dimension. ``linear_weight`` ``(c, D)`` and
            ``linear_bias`` ``(c,)`` are then this process's rows of the classifier, in the order of ranks; c may differ
            and be 0. All else is what one process would be given: labels in ``[0, C)``, class tables ``(C,)``,
            probabilities of all classes. None is this process alone, or the mesh of a ``linear_weight`` that is a
            DTensor with ``Shard(0)``. With ``row_gate`` or probabilities a chunk's logits go through PyTorch's own
            functions and not through kernels.
        batch: with a group, ``"replicated"``: all processes give the same rows; or ``"gathered"``: each gives its own,
            of any number, and the loss is the one of all. The gradients of ``input`` and of other values of rows are
            then the loss's times the number of processes, because DDP and FSDP divide by it; those of the classifier
            and of class tables are whole and not to be averaged. On a GPU
            each such call waits for the device, to learn how many rows there are; in a compiled graph they are fixed.
        sample: the classes that count; labels only, all of them in the sample.
        correction: whether a sample is corrected for what it leaves out; not with ``row_gate``.
        sparse_grad: whether the gradients of ``linear_weight`` and ``linear_bias`` are sparse tensors of the sample's
            rows, for :class:`torch.optim.SparseAdam`, Adagrad and SGD; otherwise they are whole, with zeros. Only with
            a sample.

    Returns:
        The loss: 0-d, or with ``reduction="none"`` one a row; float64 for float64 features, else float32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, option or value; a label that is not in the sample (CPU).
        IndexError: a label outside ``[0, C)`` that is not ``ignore_index`` (CPU).
        RuntimeError: with a group: torch.distributed is not initialised; another process refused its arguments; one
            died or did not come within the group's ``timeout`` (of ``init_process_group`` or ``new_group``); a second
            derivative or a transform of :mod:`torch.func`.

    Example:
        >>> import torch, ltkernels as ltk
        >>> features, head = torch.randn(8, 16), torch.nn.Linear(16, 1000)
        >>> prior = torch.full((1000,), 1e-3)
        >>> loss = ltk.functional.linear_cross_entropy(
        ...     features, head.weight, torch.arange(8), linear_bias=head.bias, class_bias=prior.log()
        ... )
        >>> loss.backward()
        >>> head.weight.grad.shape
        torch.Size([1000, 16])

    Source:
        Chunks with the gradient over the logits: Hsu et al., "Liger Kernel", 2024, section 3.2. The losses:
        :func:`cross_entropy`.
    """

    def others() -> dict[str, Any]:
        return {
            "weight": weight, "ignore_index": ignore_index,
            "reduction": reduction, "label_smoothing": label_smoothing, "scale": scale,
            "class_scale": class_scale, "class_bias": class_bias, "class_margin": class_margin,
            "margin_type": margin_type, "focal_gamma": focal_gamma, "focal_pt": focal_pt,
            "focal_grad": focal_grad, "sample_weight": sample_weight, "smoothing_mode": smoothing_mode,
            "z_loss": z_loss, "row_gate": row_gate, "feature_norm": feature_norm,
            "influence_alpha": influence_alpha, "influence_eps": influence_eps, "denominator": denominator,
            "empty": empty,
        }  # fmt: skip

    if group is not None or class_parallel.is_sharded(linear_weight):
        return class_parallel.linear_cross_entropy(
            _Head.checked, lambda head: head.products(normalize, options), input, linear_weight, linear_bias, target,
            group, batch, sample, correction, sparse_grad, others(),
        )  # fmt: skip
    if batch != "replicated":
        raise ValueError(f'batch: expected "replicated" without a group, found {batch!r}')
    if sample is not None:
        all_classes = Sampled(
            linear_weight, linear_bias, target, weight, class_scale, class_bias, class_margin, label_smoothing
        )
        (
            linear_weight, linear_bias, target, weight, class_scale, class_bias, class_margin, label_smoothing
        ) = at_sample(
            sample, all_classes, ignore_index, scale, row_gate is not None, correction, sparse_grad
        )  # fmt: skip
        ignore_index = None
    elif sparse_grad:
        raise ValueError(f"sparse_grad: expected False without sample, found {sparse_grad!r}")
    head = _Head.checked(input, linear_weight, linear_bias)
    target, labels = head.target(target)
    if ignore_index is None:
        ignore_index = -100
    elif not labels:
        raise ValueError(f"ignore_index: expected None with probability targets, found {ignore_index!r}")
    products = head.products(normalize, options)
    sample_weight = head.of_rows("sample_weight", sample_weight)
    if labels and linear_weight.shape[0] > class_parallel.FEW_CLASSES and row_gate is None:
        feature_norm = head.of_rows("feature_norm", feature_norm)
        rows = others()
        if size := class_parallel.block_size(head, products):
            return class_parallel.by_blocks(head, target, products, rows, size)
    if (
        isinstance(target, tuple)
        or margin_type != "additive"
        or smoothing_mode != "all"
        or row_gate is not None
        or feature_norm is not None
        or isinstance(label_smoothing, Tensor)
    ):
        loss = _of_rows(
            head.logits, target, weight, ignore_index, reduction, label_smoothing, scale, class_scale, class_bias,
            class_margin, margin_type, focal_gamma, focal_pt, focal_grad, sample_weight, smoothing_mode, z_loss,
            head.of_rows("row_gate", row_gate), head.of_rows("feature_norm", feature_norm), influence_alpha,
            influence_eps, denominator, empty, False,
            lambda tensors, given, _: _op.linear_row_cross_entropy(
                (head.input, head.weight, head.bias, *tensors[1:]), LinearRowCrossEntropyOptions(*given, *products)
            ),
        )  # fmt: skip
        return head.shaped(loss)

    def table(name: str, value: Tensor | float | None, scalar: bool = False) -> Tensor | None:
        return None if value is None else arg.class_vector(name, value, head.logits, scalar)

    if class_margin is not None and not labels:
        raise ValueError(
            "class_margin: expected None with probability targets, which have no single target class,"
            f" found {type(class_margin).__name__}"
        )
    tables = (
        table("weight", weight), table("class_scale", class_scale), table("class_bias", class_bias),
        table("class_margin", class_margin, True),
    )  # fmt: skip
    if sample_weight is not None:
        sample_weight = arg.row_weight("sample_weight", sample_weight, head.logits)
    given: Tensor | None = None
    if isinstance(denominator, Tensor):
        given, denominator = given_denominator(denominator, reduction), 1.0
    scalars, divisor = _cached_options(
        ignore_index, reduction, label_smoothing, scale, focal_gamma, focal_pt, focal_grad, z_loss, denominator, empty
    )
    loss = _op.linear_cross_entropy(
        (head.input, head.weight, head.bias, target, *tables, sample_weight),
        LinearCrossEntropyOptions(*scalars, *products),
    )
    return head.shaped(divided(loss, given, divisor, scalars.empty_zero))


class _Head(NamedTuple):
    """Features and classifier of matching shapes."""

    input: Tensor
    """``(N, D)``."""
    weight: Tensor
    """``(C, D)`` or ``(C, P, D)``."""
    bias: Tensor | None
    """``(C,)`` or ``(C, P)``."""
    logits: Tensor
    """A tensor of the logits' shape, ``(N, C)`` or ``(N, C, P)``, without memory."""
    rows: tuple[int, ...]
    """The shape of what has one value a row."""
    soft: tuple[int, ...]
    """The shape of probabilities."""

    @classmethod
    def checked(cls, input: Tensor, weight: Tensor, bias: Tensor | None) -> _Head:
        x, w = arg.tensor("input", input), arg.tensor("linear_weight", weight)
        if x.dtype not in arg.LOGITS_TYPES:
            raise TypeError(f"input: expected float64, float32, bfloat16 or float16, found {x.dtype}")
        if w.dim() < 2 or w.shape[0] == 0:
            raise ValueError(
                f"linear_weight: expected shape (C, D) or (C, d1, ..., dK, D) with C >= 1, found {tuple(w.shape)}"
            )
        classes, inner, features = w.shape[0], tuple(w.shape[1:-1]), w.shape[-1]
        if x.dim() == 0 or x.shape[-1] != features or (inner and x.dim() != 2):
            expected = f"(N, {features})" if inner else f"(..., {features})"
            raise ValueError(
                f"input: expected shape {expected} for linear_weight of shape {tuple(w.shape)}, found {tuple(x.shape)}"
            )
        if bias is not None and arg.tensor("linear_bias", bias).shape != (classes, *inner):
            raise ValueError(f"linear_bias: expected shape {(classes, *inner)}, found {tuple(bias.shape)}")
        for name, value in (("linear_weight", w), ("linear_bias", bias)):
            if value is None:
                continue
            if value.device != x.device:
                raise ValueError(f"{name}: expected device {x.device} as input's, found {value.device}")
            mixed = value.dtype != x.dtype
            if mixed and (not _autocast(x) or not {x.dtype, value.dtype} <= _AUTOCAST_TYPES):
                raise TypeError(f"{name}: expected {x.dtype} as input's, found {value.dtype}")
        lead = tuple(x.shape[:-1])
        if len(lead) != 1:
            x = x.reshape(-1, features)
        if inner:
            w = w.reshape(classes, -1, features)
            bias = None if bias is None else bias.reshape(classes, -1)
        logits = x.detach().new_empty(()).expand(x.shape[0], *w.shape[:-1])
        soft = (x.shape[0], classes, *inner) if inner else (*lead, classes)
        return cls(x, w, bias, logits, (*lead, *inner), soft)

    def target(self, target: Target) -> tuple[Target, bool]:
        """The target as of these logits, and whether it is labels."""
        if isinstance(target, tuple):
            if len(target) != 3:
                raise ValueError(
                    f"target: expected labels or (labels, other labels, lam), found a tuple of {len(target)}"
                )
            first, second, lam = target
            if isinstance(lam, Tensor) and lam.dim():
                lam = self._flat("lam", lam, self.rows, "one number or the labels' shape")
            return (self._labels("target[0]", first), self._labels("target[1]", second), lam), True
        if arg.tensor("target", target).dtype in arg.LOGITS_TYPES:
            if target.shape != self.soft:
                raise ValueError(
                    f"target: expected probabilities of shape {self.soft}, found {tuple(target.shape)} of"
                    f" {target.dtype} (labels need an integer type)"
                )
            _check_device("target", target, self.logits)
            return target.reshape(self.logits.shape), False
        return self._labels("target", target), True

    def _labels(self, name: str, target: Tensor) -> Tensor:
        if arg.tensor(name, target).dtype not in arg.INTEGER_TYPES:
            soft = " or floating probabilities" if name == "target" else ""
            raise TypeError(f"{name}: expected labels of an integer type{soft}, found {target.dtype}")
        if target.shape != self.rows:
            raise ValueError(f"{name}: expected labels of shape {self.rows}, found {tuple(target.shape)}")
        _check_device(name, target, self.logits)
        return target.reshape(arg.label_shape(self.logits))

    def of_rows(self, name: str, value: Tensor | None) -> Tensor | None:
        """A value a row; types and devices are checked where it is used."""
        return None if value is None else self._flat(name, value, self.rows, "one value a row")

    def _flat(self, name: str, value: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
        if arg.tensor(name, value).shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, {what}, found {tuple(value.shape)}")
        return value.reshape(arg.label_shape(self.logits))

    def products(self, normalize: bool, options: ChunkOptions | None) -> LinearOptions:
        """What the op is told of the products."""
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize: expected a bool, found {type(normalize).__name__}")
        rows = 0 if options is None else _rows_of_options(options, self.logits.shape[0], self.weight)
        kind = ProductType.INPUT
        if self.input.dtype in _AUTOCAST_TYPES and _autocast(self.input):
            dtype = torch.get_autocast_dtype(self.input.device.type)
            kind = {torch.bfloat16: ProductType.BFLOAT16, torch.float16: ProductType.FLOAT16}.get(dtype, kind)
        return LinearOptions(normalize, int(kind), rows)

    def shaped(self, loss: Tensor) -> Tensor:
        """The op's result in the shape that the caller knows."""
        return loss if loss.dim() == 0 or loss.shape == self.rows else loss.reshape(self.rows)


_AUTOCAST_TYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _check_device(name: str, value: Tensor, logits: Tensor) -> None:
    if value.device != logits.device:
        raise ValueError(f"{name}: expected device {logits.device} as input's, found {value.device}")


_ALL_ROWS = 2**31


def _rows_of_options(options: Any, rows: int, weight: Tensor) -> int:
    """Rows of a chunk as a :class:`torch.nn.LinearCrossEntropyOptions` asks for them; 0 to choose by size.

    ``aspect_ratio:k``: a k-th of the power of two from which a chunk has more logits than the features have elements.
    """
    kind = getattr(nn, "LinearCrossEntropyOptions", None)
    if kind is None or not isinstance(options, kind):
        raise TypeError(f"options: expected a torch.nn.LinearCrossEntropyOptions, found {type(options).__name__}")
    given, method = options.batch_chunk_size, options.chunking_method
    if method is None:
        return _ALL_ROWS if given is None else int(given)
    if method == "auto":
        return 0 if given is None else int(given)
    columns, features = math.prod(weight.shape[:-1]), max(1, weight.shape[-1])
    least = -(-rows // -(-columns // features))
    wanted = max(1, min((1 << max(0, least - 1).bit_length()) // int(method.partition(":")[2] or 1), rows))
    if given is not None and min(int(given), rows) != wanted:
        raise ValueError(
            f"options: expected batch_chunk_size or chunking_method, found both, which ask for {given} and {wanted}"
            " rows"
        )
    return wanted

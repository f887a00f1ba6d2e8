"""``functional.linear_cross_entropy`` with a group: from labels and tables of all classes to those of this process.

The op (``ops/class_parallel.py``) knows the classes of this process and numbers of the rows' targets
(``class_parallel_targets.py``). Here is what else stands between it and the arguments of one process: the header, rows
that are gathered, parts of tables, and the sums of gradients over the processes (``ranks.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ltkernels import arguments as arg
from ltkernels.functional.class_parallel_targets import Part, Smoothing, of_labels, of_soft_target
from ltkernels.functional.class_samples import ClassSample
from ltkernels.functional.cross_entropy import _cached_options, _of_rows
from ltkernels.functional.ranks import (
    Gathered,
    Header,
    OwnClasses,
    OwnRows,
    Ranks,
    Replicated,
    digest,
    digest_of,
)
from ltkernels.functional.reductions import divided, given_denominator
from ltkernels.functional.row_cross_entropy import Target
from ltkernels.ops import class_parallel as _op
from ltkernels.ops import cross_entropy as _plain_op
from ltkernels.ops import row_cross_entropy as _row_op
from ltkernels.ops.chunked_linear import FEW_ROWS, LOGITS_BYTES, chunk_rows, class_block
from ltkernels.ops.linear_cross_entropy import MEANS, PRODUCTS
from ltkernels.ops.options import ClassParallelOptions, LinearOptions, ProductType, Reduction, RowCrossEntropyOptions

BATCHES = ("replicated", "gathered")
_OF_ROWS = ("sample_weight", "feature_norm", "row_gate")


def _followed(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()


def is_sharded(weight: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(weight, "placements") and hasattr(weight, "to_local")


def linear_cross_entropy(
    checked: Callable[[Tensor, Tensor, Tensor | None], Any],
    products: Callable[[Any], LinearOptions],
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Target,
    group: Any,
    batch: str,
    sample: ClassSample | None,
    correction: bool,
    sparse_grad: bool,
    rows: dict[str, Any],
) -> Tensor:
    """The loss of classes that are divided among processes.

    Args:
        checked: makes the head of features and classifier, or refuses them.
        products: of a head.
        input, linear_weight, linear_bias, target, group, batch, sample, correction, sparse_grad: the arguments of
            :func:`ltkernels.functional.linear_cross_entropy`.
        rows: its other arguments, by name.
    """
    if torch._C._are_functorch_transforms_active():  # in which no message can be sent
        raise RuntimeError("linear_cross_entropy: expected no transform of torch.func with a group, found one")
    ranks = Ranks.of(group, linear_weight)
    problem: Exception | None = None
    header = Header(1, 0, 0, 0, 0, 0)
    try:
        if sparse_grad and (sample is None or is_sharded(linear_weight)):
            raise ValueError("sparse_grad: expected False with a DTensor or without sample, found True")
        call = _Call(checked, products, input, linear_weight, linear_bias, target, batch, sample, correction, rows)
        header = call.header()
    except (TypeError, ValueError, IndexError) as error:
        problem = error
        if torch.compiler.is_compiling():
            raise
    try:
        device = input.device if isinstance(input, Tensor) else torch.device("cpu")
        headers = ranks.agree(header, device, batch == "replicated")
    except RuntimeError:
        if problem is not None:
            raise problem from None
        raise
    return call.loss(ranks, headers, sparse_grad)


class _Call:
    """One call on this process, checked as far as that needs no other."""

    def __init__(
        self,
        checked: Callable[[Tensor, Tensor, Tensor | None], Any],
        products: Callable[[Any], LinearOptions],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Target,
        batch: str,
        sample: ClassSample | None,
        correction: bool,
        rows: dict[str, Any],
    ) -> None:
        arg.choice("batch", batch, BATCHES)
        self.batch, self.rows, self.sample, self.correction = batch, dict(rows), sample, correction
        self.classes = len(weight) if is_sharded(weight) else None
        self.weight = weight.to_local() if is_sharded(weight) else arg.tensor("linear_weight", weight)  # type: ignore[attr-defined]
        self.bias = bias.to_local() if bias is not None and is_sharded(bias) else bias  # type: ignore[attr-defined]
        if self.weight.dim() != 2:
            raise ValueError(f"linear_weight: expected shape (C, D) with a group, found {tuple(self.weight.shape)}")
        if self.bias is not None and arg.tensor("linear_bias", self.bias).shape != self.weight.shape[:1]:
            raise ValueError(
                f"linear_bias: expected shape {tuple(self.weight.shape[:1])}, found {tuple(self.bias.shape)}"
            )
        some = self.weight if len(self.weight) else self.weight.new_empty(1, self.weight.shape[1])
        self.head = checked(input, some, None if self.bias is None else self.bias.new_empty(len(some)))
        soft = isinstance(target, Tensor) and target.is_floating_point()
        self.target: Any = self._probabilities(target) if soft else self.head.target(target)[0]  # type: ignore[arg-type]
        self.soft = soft
        if self.rows["ignore_index"] is None:
            self.rows["ignore_index"] = -100
        elif soft:
            raise ValueError(
                f"ignore_index: expected None with probability targets, found {self.rows['ignore_index']!r}"
            )
        if sample is not None:
            self._check_sample(sample)
        for name in _OF_ROWS:
            self.rows[name] = self.head.of_rows(name, self.rows.get(name))
        if isinstance(self.target, tuple) and batch == "gathered":
            first, second, lam = self.target
            if not isinstance(lam, Tensor):
                lam = arg.number("lam", lam, 0.0, 1.0)
            lam = torch.as_tensor(lam, dtype=arg.compute_type(first.new_empty(0, dtype=self.head.input.dtype)))
            self.target = first, second, lam.to(first.device).expand(first.shape)
        self.products = products(self.head)

    def _probabilities(self, target: Tensor) -> Tensor:
        """Of all classes, whose number is to be seen with the other processes, as ``(N, C)``."""
        lead = self.head.rows
        if target.dtype not in arg.LOGITS_TYPES or target.dim() != len(lead) + 1 or target.shape[:-1] != lead:
            raise ValueError(
                f"target: expected probabilities of shape {(*lead, 'C')} or labels of an integer type, found"
                f" {tuple(target.shape)} of {target.dtype}"
            )
        if target.device != self.head.input.device:
            raise ValueError(f"target: expected device {self.head.input.device} as input's, found {target.device}")
        for name in ("class_margin", "row_gate", "feature_norm"):
            if self.rows.get(name) is not None:
                raise ValueError(f"{name}: expected None with probability targets, found one")
        if self.rows["smoothing_mode"] != "all" or isinstance(self.rows["label_smoothing"], Tensor):
            raise ValueError("label_smoothing: expected one number, of all classes, with probability targets")
        return target.reshape(len(self.head.input), target.shape[-1])

    def _check_sample(self, sample: ClassSample) -> None:
        if not isinstance(sample, ClassSample):
            raise TypeError(f"sample: expected a ClassSample, found {type(sample).__name__}")
        if sample.num_classes != len(self.weight):
            raise ValueError(
                f"sample: expected one of this rank's {len(self.weight)} classes, found one of {sample.num_classes}"
            )
        if self.soft:
            raise ValueError("sample: expected None with probability targets, which are of all classes, found one")
        if self.correction and self.rows.get("row_gate") is not None:
            raise ValueError("correction: expected False with row_gate, which would multiply it, found True")

    def header(self) -> Header:
        """What the others have to know."""

        def kind(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            return value.dtype, tuple(value.shape), _followed(value)

        def of_row(value: Tensor | None) -> object:
            return value is not None and (value.dtype, _followed(value))

        replicated = self.batch == "replicated"
        arguments = {name: of_row(value) if name in _OF_ROWS else kind(value) for name, value in self.rows.items()}
        labels, lam = (self.target[:2], self.target[2]) if isinstance(self.target, tuple) else ((self.target,), None)
        same = (
            self.batch, self.head.input.dtype, self.products, self.bias is None, len(labels), of_row(labels[0]),
            labels[0].shape[1:], kind(lam) if replicated else None, self.sample is None, self.correction, self.classes,
            sorted(arguments.items(), key=str), _followed(self.head.input),
        )  # fmt: skip
        found = [digest_of(value) for value in (*labels, lam) if isinstance(value, Tensor)] if replicated else 0
        # As a length they are numbers also in a graph of any sizes, of which the header is a constant.
        rows, features = (len(range(size)) for size in self.head.input.shape)
        classes = len(range(self.weight.shape[0]))
        return Header(0, rows, classes, features, digest(same), digest((rows, found)) if replicated else 0)

    def loss(self, ranks: Ranks, headers: list[Header], sparse_grad: bool) -> Tensor:
        """The loss, now that all processes agree."""
        counts = tuple(header.rows for header in headers)
        classes = [header.classes for header in headers]
        part = Part(sum(classes[: ranks.rank]), classes[ranks.rank], sum(classes), self.sample)
        if self.soft and self.target.shape[1] != part.classes:
            raise ValueError(
                f"target: expected probabilities of all {part.classes} classes, found {self.target.shape[1]}"
            )

        def of_all(value: Tensor | None, summed: bool) -> Any:
            """What has a value a row, for all rows; ``summed`` if this process finds but a part of its gradient."""
            if value is None:
                return None
            if self.batch == "replicated":
                return Replicated.apply(value, ranks) if summed and _followed(value) else value  # type: ignore[no-untyped-call]
            if _followed(value):
                return Gathered.apply(value, ranks, counts, summed)  # type: ignore[no-untyped-call]
            return ranks.gathered(value, counts)

        input, rows = of_all(self.head.input, True), dict(self.rows)
        for name in _OF_ROWS:
            rows[name] = of_all(rows[name], name == "row_gate")
        target = self.target
        if self.batch == "gathered" and isinstance(target, tuple):
            target = tuple(ranks.gathered(value, counts) for value in target)
        elif not isinstance(target, tuple):
            target = of_all(target, False)
        # All processes take the chunks, or the blocks, of the one that has the most classes.
        most, element_bytes, block = max(1, *classes), _element_size(self.products, input), 0
        plain = self.soft or rows["row_gate"] is not None
        if not (self.products.chunk_rows or torch.compiler.is_compiling() or plain):
            block = class_block(len(input), most, input.shape[1], element_bytes, input.is_cpu)
        chunk = self.products.chunk_rows or chunk_rows(len(input), most, element_bytes, input.is_cpu)
        products = self.products._replace(chunk_rows=min(chunk, max(1, len(input))))

        def op(tensors: tuple[Tensor | None, ...], options: RowCrossEntropyOptions, _: bool) -> Tensor:
            vectors, biases, offset = self.weight, self.bias, None
            if self.sample is not None:
                index = self.sample.classes
                vectors = F.embedding(index, vectors, sparse=sparse_grad)
                if biases is not None:
                    biases = torch.gather(biases, 0, index, sparse_grad=sparse_grad)
                if self.correction:
                    offset = (self.sample.log_expected / -options.scale).to(arg.compute_type(input))
            return _by_op((input, vectors, biases), tensors, options, products, part, offset, ranks, block)

        logits = input.detach().new_empty(()).expand(len(input), part.classes)
        if self.soft:
            loss = _of_probabilities(logits, target, op, **rows)
        else:
            loss = _of_rows(logits, target, **rows, inplace=False, op=op)
        if loss.dim() and self.batch == "gathered":
            loss = OwnRows.apply(loss, ranks, counts)  # type: ignore[no-untyped-call]
        return self.head.shaped(loss)  # type: ignore[no-any-return]


def _of_probabilities(
    logits: Tensor,
    target: Tensor,
    op: Callable[[tuple[Tensor | None, ...], RowCrossEntropyOptions, bool], Tensor],
    *,
    denominator: str | float | Tensor,
    reduction: str,
    **rows: Any,
) -> Tensor:
    """What ``_of_rows`` is for labels: checks tables and scalars, and calls ``op`` with what it takes of them."""
    names = ("weight", "class_scale", "class_bias")
    weight, scale, bias = (None if rows[name] is None else arg.class_vector(name, rows[name], logits) for name in names)
    row_weight = rows["sample_weight"]
    if row_weight is not None:
        row_weight = arg.row_weight("sample_weight", row_weight, logits)
    given: Tensor | None = None
    if isinstance(denominator, Tensor):
        given, denominator = given_denominator(denominator, reduction), 1.0
    scalars, divisor = _cached_options(
        rows["ignore_index"], reduction, rows["label_smoothing"], rows["scale"], rows["focal_gamma"], rows["focal_pt"],
        rows["focal_grad"], rows["z_loss"], denominator, rows["empty"],
    )  # fmt: skip
    tensors = (logits, target, None, None, weight, scale, bias, None, None, row_weight, None, None, None, None)
    loss = op(tensors, RowCrossEntropyOptions(**scalars._asdict()), False)
    return divided(loss, given, divisor, scalars.empty_zero)


FEW_CLASSES = LOGITS_BYTES // (8 * FEW_ROWS)
"""Up to so many there are no blocks."""


def block_size(head: Any, products: LinearOptions) -> int:
    """How many classes :func:`by_blocks` should take at a time; 0 where there are none to take, or it cannot serve."""
    if head.weight.dim() != 2 or products.chunk_rows or torch.compiler.is_compiling():
        return 0
    if torch._C._are_functorch_transforms_active():
        return 0
    element_bytes = _element_size(products, head.input)
    count, classes = head.logits.shape
    return class_block(count, classes, head.input.shape[1], element_bytes, head.input.is_cpu)


def by_blocks(head: Any, target: Target, products: LinearOptions, rows: dict[str, Any], size: int) -> Tensor:
    """The loss of all classes in this process, ``size`` of them at a time: for few rows of very many."""
    part = Part(0, len(head.weight), len(head.weight), None)

    def op(tensors: tuple[Tensor | None, ...], options: RowCrossEntropyOptions, _: bool) -> Tensor:
        return _by_op((head.input, head.weight, head.bias), tensors, options, products, part, None, None, size)

    return head.shaped(_of_rows(head.logits, target, **rows, inplace=False, op=op))  # type: ignore[no-any-return]


def _by_op(
    linear: tuple[Tensor, Tensor, Tensor | None],
    tensors: tuple[Tensor | None, ...],
    options: RowCrossEntropyOptions,
    products: LinearOptions,
    part: Part,
    offset: Tensor | None,
    ranks: Ranks | None,
    block: int,
) -> Tensor:
    """The op's loss, from what the op of logits would be given: ``tensors`` and ``options``.

    Args:
        linear: features, class vectors and biases.
        products: their options.
        part: the classes that they are of.
        offset: of the classes' biases.
        ranks: the processes; None for this one alone.
        block: the size of a block of classes, 0 for none.
    """
    logits, target, _, _, weight, scale, bias, _, _, row_weight, gate, norm, *_ = tensors
    assert logits is not None and target is not None
    soft = target.is_floating_point()
    if linear[0].is_cpu and arg.may_look(linear[0]):
        if soft:
            _plain_op.OP.check_values((logits, target, weight, scale, bias, None, row_weight), options)
        else:
            _row_op.OP.check_values(tensors, options)

    def own(table: Tensor | None, index: Any = part.own) -> Tensor | None:
        if table is None or ranks is None or not _followed(table):
            return None if table is None else table[index].contiguous()
        return OwnClasses.apply(table, ranks, index)  # type: ignore[no-untyped-call, no-any-return]

    smoothing = Smoothing.of(tensors, options, part, own, ranks)
    if soft:
        known = of_soft_target(tensors, options, smoothing)
        probabilities = own(target, (slice(None), part.own))
    else:
        known, probabilities = of_labels(tensors, options, part, smoothing), None
    margins = known.margins
    if ranks is not None and _followed(margins):
        margins = Replicated.apply(margins, ranks)  # type: ignore[no-untyped-call]
    class_bias = own(bias)
    if offset is not None:
        class_bias = offset if class_bias is None else class_bias + offset
    reduction = options.reduction if options.reduction in (*MEANS, Reduction.NONE) else Reduction.SUM
    loss = _op.class_parallel_cross_entropy(
        (
            *linear, own(scale), class_bias, smoothing.own, margins, gate, probabilities, own(weight) if soft else None,
            known.of_labels, smoothing.total, norm, known.places,
        ),
        ClassParallelOptions(
            reduction, options.scale, options.margin_type, options.focal_gamma, options.focal_weighted,
            options.focal_detached, options.influence_alpha, options.influence_eps, options.z_loss,
            smoothing.own is not None, soft, *products, block, "" if ranks is None else ranks.name,
        ),
    )  # fmt: skip
    return loss if known.nothing is None else torch.where(known.nothing, torch.nan, loss)


def _element_size(products: LinearOptions, input: Tensor) -> int:
    return PRODUCTS.get(ProductType(products.products), input.dtype).itemsize

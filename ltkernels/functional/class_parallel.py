"""``functional.linear_cross_entropy`` with a group: from labels and tables of all classes to those of this process.

The op (``ops/class_parallel.py``) knows the classes of this process and numbers of the rows' labels. Here is what
stands between it and the arguments of one process: the header, rows that are gathered, denominators, labels as places,
parts of tables, and the sums of gradients over the processes (``ranks.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ltkernels import arguments as arg
from ltkernels.functional.class_samples import ClassSample
from ltkernels.functional.cross_entropy import _of_rows
from ltkernels.functional.ranks import Gathered, Header, OwnClasses, OwnRows, Ranks, Replicated, digest, digest_of
from ltkernels.functional.row_cross_entropy import Target
from ltkernels.ops import class_parallel as _op
from ltkernels.ops import row_cross_entropy as _row_op
from ltkernels.ops.chunked_linear import FEW_ROWS, LOGITS_BYTES, chunk_rows, class_block
from ltkernels.ops.class_shards import COEFFICIENT, HARD, MARGIN, PER_LABEL, SOFT, WEIGHT, local_places
from ltkernels.ops.denominators import inverse_denominator
from ltkernels.ops.linear_cross_entropy import MEANS, PRODUCTS
from ltkernels.ops.options import ClassParallelOptions, LinearOptions, ProductType, Reduction, RowCrossEntropyOptions

BATCHES = ("replicated", "gathered")
_FIXED = ("weight", "class_margin", "label_smoothing", "sample_weight", "feature_norm")


def _followed(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()


def is_sharded(weight: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(weight, "placements") and hasattr(weight, "to_local")


class Part(NamedTuple):
    """This process's classes among all, or a sample of them."""

    first: int
    """The first of this process's classes."""
    here: int
    """The number of this process's classes."""
    classes: int
    """Of all processes together."""
    sample: ClassSample | None

    @property
    def own(self) -> Tensor | slice:
        """The classes whose logits are computed here."""
        if self.sample is None:
            return slice(self.first, self.first + self.here)
        return self.sample.classes + self.first

    def places(self, label: Tensor, ignore_index: int) -> Tensor:
        """As :class:`ltkernels.ops.class_shards.Shard` has them."""
        places = local_places(label, self.first, self.here, self.classes, ignore_index)
        if self.sample is None:
            return places
        of = self.sample.classes
        here = (places >= 0) & (places < self.here)
        at = torch.searchsorted(of, torch.where(here, places, 0)).clamp_max(max(0, len(of) - 1))
        if places.is_cpu and arg.may_look(places) and not bool((of[at[here]] == places[here]).all()):
            row = int((here & (of[at] != places)).nonzero()[0])
            raise ValueError(f"sample: expected all labels of this rank's classes in it, found none of row {row}")
        return torch.where(here, at, torch.where(places == self.here, len(of), places))


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
        call = _Call(checked, products, input, linear_weight, linear_bias, target, batch, sample, rows)
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
    return call.loss(ranks, headers, correction, sparse_grad)


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
        rows: dict[str, Any],
    ) -> None:
        arg.choice("batch", batch, BATCHES)
        self.batch, self.rows, self.sample = batch, dict(rows), sample
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
        for name in _FIXED:
            if _followed(self.rows.get(name)):
                raise ValueError(f"{name}: expected a tensor without gradient with a group, found one that requires it")
        if self.rows.get("row_gate") is not None:
            raise ValueError("row_gate: expected None with a group, found a tensor")
        if sample is not None:
            self._check_sample(sample)
        self.target, labels = self.head.target(target)
        if not labels:
            raise ValueError("target: expected labels with a group, found probabilities")
        for name in ("sample_weight", "feature_norm"):
            self.rows[name] = self.head.of_rows(name, self.rows.get(name))
        if isinstance(self.target, tuple) and batch == "gathered":
            first, second, lam = self.target
            if not isinstance(lam, Tensor):
                lam = arg.number("lam", lam, 0.0, 1.0)
            lam = torch.as_tensor(lam, dtype=arg.compute_type(first.new_empty(0, dtype=self.head.input.dtype)))
            self.target = first, second, lam.to(first.device).expand(first.shape)
        self.products = products(self.head)

    def _check_sample(self, sample: ClassSample) -> None:
        if not isinstance(sample, ClassSample):
            raise TypeError(f"sample: expected a ClassSample, found {type(sample).__name__}")
        if sample.num_classes != len(self.weight):
            raise ValueError(
                f"sample: expected one of this rank's {len(self.weight)} classes, found one of {sample.num_classes}"
            )
        eps = self.rows["label_smoothing"]
        if isinstance(eps, Tensor) or eps != 0:
            raise ValueError(f"label_smoothing: expected 0 with a sample and a group, found {eps!r}")

    def header(self) -> Header:
        """What the others have to know."""

        def kind(value: object) -> object:
            return (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else value

        replicated = self.batch == "replicated"
        by_row = ("sample_weight", "feature_norm")
        arguments = {name: (value is not None) if name in by_row else kind(value) for name, value in self.rows.items()}
        labels, lam = (self.target[:2], self.target[2]) if isinstance(self.target, tuple) else ((self.target,), None)
        same = (
            self.batch, self.head.input.dtype, self.products, self.bias is None, len(labels), labels[0].dtype,
            kind(lam) if replicated else None, self.sample is None, self.classes, sorted(arguments.items(), key=str),
        )  # fmt: skip
        found = [digest_of(value) for value in (*labels, lam) if isinstance(value, Tensor)] if replicated else 0
        # As a length they are numbers also in a graph of any sizes, of which the header is a constant.
        rows, features = (len(range(size)) for size in self.head.input.shape)
        classes = len(range(self.weight.shape[0]))
        return Header(0, rows, classes, features, digest(same), digest((rows, found)) if replicated else 0)

    def loss(self, ranks: Ranks, headers: list[Header], correction: bool, sparse_grad: bool) -> Tensor:
        """The loss, now that all processes agree."""
        counts = tuple(header.rows for header in headers)
        classes = [header.classes for header in headers]
        part = Part(sum(classes[: ranks.rank]), classes[ranks.rank], sum(classes), self.sample)
        input, target, rows = self.head.input, self.target, dict(self.rows)
        if self.batch == "gathered":
            input = Gathered.apply(input, ranks, counts)  # type: ignore[no-untyped-call]
            for name in ("sample_weight", "feature_norm"):
                rows[name] = None if rows[name] is None else ranks.gathered(rows[name], counts)
            target = (
                tuple(ranks.gathered(value, counts) for value in target)
                if isinstance(target, tuple)
                else ranks.gathered(target, counts)
            )
        elif input.requires_grad and torch.is_grad_enabled():
            input = Replicated.apply(input, ranks)  # type: ignore[no-untyped-call]
        # All processes take the chunks, or the blocks, of the one that has the most classes.
        most, element_bytes, block = max(1, *classes), _element_size(self.products, input), 0
        if not (self.products.chunk_rows or torch.compiler.is_compiling()):
            block = class_block(len(input), most, input.shape[1], element_bytes, input.is_cpu)
        chunk = self.products.chunk_rows or chunk_rows(len(input), most, element_bytes, input.is_cpu)
        products = self.products._replace(chunk_rows=min(chunk, max(1, len(input))))

        def op(tensors: tuple[Tensor | None, ...], options: RowCrossEntropyOptions, _: bool) -> Tensor:
            return self._by_op(input, tensors, options, products, block, ranks, part, correction, sparse_grad)

        logits = input.detach().new_empty(()).expand(len(input), part.classes)
        loss = _of_rows(logits, target, **rows, inplace=False, op=op)
        if loss.dim() and self.batch == "gathered":
            loss = OwnRows.apply(loss, ranks, counts)  # type: ignore[no-untyped-call]
        return self.head.shaped(loss)  # type: ignore[no-any-return]

    def _by_op(
        self,
        input: Tensor,
        tensors: tuple[Tensor | None, ...],
        options: RowCrossEntropyOptions,
        products: LinearOptions,
        block: int,
        ranks: Ranks,
        part: Part,
        correction: bool,
        sparse_grad: bool,
    ) -> Tensor:
        def own(table: Tensor | None) -> Tensor | None:
            if table is None or not _followed(table):
                return None if table is None else table[part.own].contiguous()
            return OwnClasses.apply(table, ranks, part.own)  # type: ignore[no-untyped-call, no-any-return]

        vectors, biases, offset = self.weight, self.bias, None
        if self.sample is not None:
            index = self.sample.classes
            vectors = F.embedding(index, vectors, sparse=sparse_grad)
            if biases is not None:
                biases = torch.gather(biases, 0, index, sparse_grad=sparse_grad)
            if correction:
                offset = (self.sample.log_expected / -options.scale).to(arg.compute_type(input))
        return _by_op((input, vectors, biases), tensors, options, products, part, own, offset, ranks.name, block)


FEW_CLASSES = LOGITS_BYTES // (8 * FEW_ROWS)
"""Up to so many there are no blocks."""


def block_size(head: Any, products: LinearOptions, rows: dict[str, Any]) -> int:
    """How many classes :func:`by_blocks` should take at a time; 0 where there are none to take, or it cannot serve."""
    if head.weight.dim() != 2 or products.chunk_rows or torch.compiler.is_compiling():
        return 0
    if torch._C._are_functorch_transforms_active() or any(_followed(rows[name]) for name in _FIXED):
        return 0
    element_bytes = _element_size(products, head.input)
    count, classes = head.logits.shape
    return class_block(count, classes, head.input.shape[1], element_bytes, head.input.is_cpu)


def by_blocks(head: Any, target: Target, products: LinearOptions, rows: dict[str, Any], size: int) -> Tensor:
    """The loss of all classes in this process, ``size`` of them at a time: for few rows of very many."""
    part = Part(0, len(head.weight), len(head.weight), None)

    def op(tensors: tuple[Tensor | None, ...], options: RowCrossEntropyOptions, _: bool) -> Tensor:
        linear = (head.input, head.weight, head.bias)
        return _by_op(linear, tensors, options, products, part, lambda table: table, None, "", size)

    return head.shaped(_of_rows(head.logits, target, **rows, inplace=False, op=op))  # type: ignore[no-any-return]


def _by_op(
    linear: tuple[Tensor, Tensor, Tensor | None],
    tensors: tuple[Tensor | None, ...],
    options: RowCrossEntropyOptions,
    products: LinearOptions,
    part: Part,
    own: Callable[[Tensor | None], Tensor | None],
    offset: Tensor | None,
    group: str,
    block: int,
) -> Tensor:
    """The op's loss, from what the op of logits would be given: ``tensors`` and ``options``.

    Args:
        linear: features, class vectors and biases.
        products: their options.
        part: the classes that they are of.
        own: that part of a class table.
        offset: of the classes' biases.
        group: the name of the group, empty for this process alone.
        block: the size of a block of classes, 0 for none.
    """
    _, _, _, _, _, scale, bias, _, _, _, _, norm, *_ = tensors
    input = linear[0]
    if input.is_cpu and arg.may_look(input):
        _row_op.OP.check_values(tensors, options)
    labels = _Labels(tensors, options, part)
    smooth, total = labels.smoothing(part.own)
    class_bias = own(bias)
    if offset is not None:
        class_bias = offset if class_bias is None else class_bias + offset
    reduction = options.reduction if options.reduction in (*MEANS, Reduction.NONE) else Reduction.SUM
    loss = _op.class_parallel_cross_entropy(
        (*linear, own(scale), class_bias, smooth, labels.places, labels.of, total, norm),
        ClassParallelOptions(
            reduction, options.scale, options.margin_type, options.focal_gamma, options.focal_weighted,
            options.focal_detached, options.influence_alpha, options.influence_eps, options.z_loss,
            smooth is not None, *products, block, group,
        ),
    )  # fmt: skip
    return loss if labels.nothing is None else torch.where(labels.nothing, torch.nan, loss)


class _Labels:
    """What the op knows of the rows' labels, of which all processes know the same.

    Attributes:
        places: ``(L, N)``, of this process.
        of: ``(L, PER_LABEL, N)``.
        nothing: 0-d, whether a mean is of nothing; None where that is 0.
    """

    def __init__(self, tensors: tuple[Tensor | None, ...], options: RowCrossEntropyOptions, part: Part) -> None:
        logits, target, second, lam, weight, _, bias, margin, eps, row_weight, *_ = tensors
        assert logits is not None and target is not None
        self.classes, self.weight, self.options = part.classes, weight, options
        self.table_eps, self.margin, self.logits = eps, margin, logits
        self.smooths = options.label_smoothing > 0 or eps is not None
        self.present = torch.isfinite(bias.detach()) if self.smooths and bias is not None else None
        # How many classes label smoothing gives something to.
        self.reached = self.classes if self.present is None else self.present.sum().double()
        self.nothing: Tensor | None = None
        labels = [target.long()] if second is None else [target.long(), second.long()]
        share = torch.ones((), dtype=torch.float64, device=logits.device)
        shares = [share] if lam is None else [lam.to(logits.device).double(), 1.0 - lam.to(logits.device).double()]
        known = [self._of(label, share, row_weight) for label, share in zip(labels, shares, strict=True)]
        places = [part.places(label, options.ignore_index) for label in labels]
        if len(labels) == 2:  # the same class twice is one label
            same = (labels[0] == labels[1]) & (labels[0] != options.ignore_index)
            known[0][COEFFICIENT] += torch.where(same, known[1][COEFFICIENT], 0.0)
            known[1][COEFFICIENT] = torch.where(same, 0.0, known[1][COEFFICIENT])
            places[1] = torch.where(same, -1, places[1])
        self.of, self.places = torch.stack(known), torch.stack(places)

    def smoothing(self, own: Tensor | slice) -> tuple[Tensor | None, Tensor]:
        """What smoothing gives the classes of this process, and to all classes together."""
        nothing = torch.zeros((), dtype=torch.float64, device=self.logits.device)
        if not self.smooths:
            return None, nothing
        table = self.weight
        if table is None:
            dtype = torch.promote_types(self.logits.dtype, torch.float32)
            table = torch.ones((), dtype=dtype, device=self.logits.device).expand(self.classes)
        if self.present is not None:
            table = torch.where(self.present, table, 0.0)
        return table[own].contiguous(), table.sum(dtype=torch.float64)

    def _of(self, label: Tensor, share: Tensor, row_weight: Tensor | None) -> Tensor:
        options = self.options
        valid = label != options.ignore_index
        outside = valid & ((label < 0) | (label >= self.classes))
        at = torch.where(valid & ~outside, label, 0)
        found = torch.zeros(PER_LABEL, len(label), dtype=torch.float64, device=label.device)
        coefficient = share.expand(label.shape)
        coefficient = coefficient if row_weight is None else coefficient * row_weight
        if options.reduction in MEANS:
            inverse = inverse_denominator(self.logits, label, self.weight, row_weight, options)
            if not options.empty_zero:
                empty = torch.isinf(inverse)
                self.nothing = empty if self.nothing is None else self.nothing | empty
                inverse = torch.where(empty, 0.0, inverse)
            coefficient = coefficient * inverse
        # Out of range is an error on the CPU, and known by now; on a GPU it makes the row's loss NaN.
        found[COEFFICIENT] = torch.where(outside, torch.nan, torch.where(valid, coefficient, 0.0))
        found[WEIGHT] = 1.0 if self.weight is None else self.weight[at].double()
        eps = torch.full_like(found[WEIGHT], options.label_smoothing)
        if self.table_eps is not None:
            eps = self.table_eps[at].double()
        if options.off_target:  # q_y = 1 - eps is (1 - e) + e / K for e = eps K / (K - 1)
            rest = torch.as_tensor(self.reached, device=label.device, dtype=torch.float64) - 1
            eps = torch.where(rest > 0, eps * self.reached / rest.clamp_min(1), 0.0)
        found[HARD] = (1.0 - eps) * found[WEIGHT]
        found[SOFT] = eps / self.reached
        if self.margin is not None:
            found[MARGIN] = self.margin.to(label.device).expand(self.classes)[at].double()
        return found


def _element_size(products: LinearOptions, input: Tensor) -> int:
    return PRODUCTS.get(ProductType(products.products), input.dtype).itemsize

"""A linear classifier whose logits exist for a chunk of rows at a time, and the products that make its gradients.

A loss takes each chunk's logits from :meth:`Classifier.chunks`, writes their gradient over them and gives them back to
:meth:`Classifier.add`, which multiplies them into the gradients of features, classifier and bias. With ``X`` the rows
of a chunk, ``W`` the classifier and ``G`` the gradient of the logits: ``dX = G W`` and ``dW += G^T X``.

**How many rows.** A chunk reads the whole classifier three times and adds to all of its gradient, so it needs rows; its
logits should stay in the last cache, so it should not have many. :func:`chunk_rows` is the rule: as many as fill
``CPU_CACHE_BYTES`` (on a GPU ``LOGITS_BYTES``) with logits and at least ``LEAST_ROWS`` (``GPU_LEAST_ROWS``), but never
more than ``SHARE_OF_LOGITS`` of all the logits or, if that is more, ``LOGITS_BYTES``, which is a promise about memory.

**Few rows of very many classes** fit into that a few at a time: with a million classes of 128 features 30 MB are seven
rows, and every chunk moves 2 GB, the classifier and its gradient. There the logits are made for all rows and a block of
classes at a time, twice: :func:`class_block` says where, ops/class_parallel.py how. The classifier is read three times
in all, whatever the number of rows, for four products instead of three.

**A product of few classes at a time.** On a CPU ``X W^T`` of 150 rows and 50,000 classes in float32 takes PyTorch 1.6
times as long as the same in parts of a thousand classes, which stay in the second cache: benchmarks/NOTES.md. The other
two products, and other types, are as fast in one.

**Cosines.** With ``n`` the lengths of the class vectors, the logits are ``(X / |X|) W^T / n``: the features of a chunk
are normalised, the classifier is not, since a normalised copy would be as large as itself; the ``1 / n`` are factors of
columns. For a gradient ``g`` with respect to a vector's direction the gradient of the vector is ``(g - u (u . g)) /
|v|`` with ``u = v / |v|``: what is along the vector does not change its direction.

**Types.** A half type that the processor cannot multiply is multiplied in float32, for which the classifier is copied:
PyTorch's product of float16 matrices takes 5 to 70 times as long on a CPU without such instructions. Under autocast
the classifier is copied in autocast's type, once a call, as ``F.linear`` does.

**Sums over chunks** are in float32 for half types, which would round them at every chunk. On a GPU a product of half
matrices is added in float32 as it leaves the tensor cores; on the CPU it is rounded to its type once a chunk, as
PyTorch's own backward rounds it, and then added in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-12
"""Least length of a vector that has a direction: functional/unit.py's."""
CPU_CACHE_BYTES = 8 << 20
"""What the logits of a chunk may take: a part of the last cache."""
LEAST_ROWS = 160
"""Of a chunk, however many classes there are, as far as memory allows."""
GPU_LEAST_ROWS = 512
"""The same on a GPU, which thinner products do not keep busy."""
LOGITS_BYTES = 30 << 20
"""What a chunk may take however few the logits are: with what else a call needs, below 32 MiB."""
SHARE_OF_LOGITS = 1 / 20
"""And if that is more, this share of all the logits."""
FEW_ROWS = 32
"""A chunk of fewer moves more memory than it computes."""
LEAST_CLASSES = 256
"""Whose logits are made at a time; fewer keep the processor waiting for calls."""
THIN = 6 << 10
"""Rows times features of a product that gains nothing by being made in parts."""
PART_BYTES = 1 << 20
"""What is worked on at a time where a gradient is worked on in parts; and of logits, where they are made in parts."""


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of the type."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if asked is None:
        return True
    ask = getattr(torch.ops.mkldnn, asked, None)  # not there in a PyTorch without oneDNN
    return ask is not None and bool(ask())


def _allowed_rows(rows: int, columns: int, element_bytes: int) -> int:
    """How many rows of logits the promise about memory allows."""
    return max(LOGITS_BYTES // (columns * element_bytes), int(rows * SHARE_OF_LOGITS))


def chunk_rows(rows: int, columns: int, element_bytes: int, on_cpu: bool) -> int:
    """How many of the rows a chunk has at most; see the module."""
    row = columns * element_bytes
    wanted = max(CPU_CACHE_BYTES // row, LEAST_ROWS) if on_cpu else max(LOGITS_BYTES // row, GPU_LEAST_ROWS)
    return max(1, min(rows, wanted, _allowed_rows(rows, columns, element_bytes)))


def class_block(rows: int, columns: int, features: int, element_bytes: int, on_cpu: bool) -> int:
    """How many classes a block has where few rows have very many; 0 where chunks of rows do. See the module."""
    if rows <= (allowed := _allowed_rows(rows, columns, element_bytes)) or allowed >= FEW_ROWS:
        return 0
    # Of the logits and of the gradient of the block's class vectors.
    size = (2 * CPU_CACHE_BYTES if on_cpu else LOGITS_BYTES) // (rows * element_bytes + 4 * max(1, features))
    return max(LEAST_CLASSES, size // LEAST_CLASSES * LEAST_CLASSES)


class Needed(NamedTuple):
    """Which gradients are wanted."""

    input: bool = False
    weight: bool = False
    bias: bool = False


class Chunk(NamedTuple):
    """Some rows of a call."""

    rows: slice
    features: Tensor
    """``(n, D)``, in the type of the products; of length 1 for cosines."""
    logits: Tensor
    """``(n, C)`` or ``(n, C, P)``, in the scratch."""


class Classifier:
    """Features ``(N, D)`` and a classifier ``(C, D)``, or ``(C, P, D)`` for P logits of a class, ``(N, C, P)``.

    Args:
        input: the features.
        weight: the classifier.
        bias: ``(C,)`` or ``(C, P)``.
        dtype: what is multiplied; the logits are of this type. On a CPU that cannot multiply it, float32.
        need: which gradients are wanted.
        normalize: whether the logits are cosines.
        unscaled: whether logits of cosines are left without the factors ``inverse_norm``, which the caller applies;
            the gradient that :meth:`add` is given is then that of these logits.

    Attributes:
        inverse_norm: the factors ``1 / n`` of the columns, ``(C * P,)`` in the type of the sums; None without cosines.
        d_input: the gradient of the features, of their type.
        d_weight: that of the classifier, ``(C * P, D)``, in the type of the sums.
        d_bias: that of the bias, ``(C * P,)``, in the type of the sums.
    """

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        need: Needed,
        normalize: bool = False,
        unscaled: bool = False,
    ) -> None:
        dtype = torch.float32 if input.is_cpu and not _multiplies(dtype) else dtype
        self.input = input
        self.shape = tuple(weight.shape[:-1])
        self.weight = weight if weight.dim() == 2 else weight.flatten(0, 1)
        self.products = self.weight.to(dtype)
        self.bias = None if bias is None else bias.reshape(-1).to(dtype)
        self.unscaled = unscaled
        self.sums = torch.promote_types(dtype, torch.float32)
        self.inverse_norm: Tensor | None = None
        if normalize:
            norm = torch.linalg.vector_norm(self.weight, dim=1, dtype=self.sums).clamp_min_(EPS)
            # A classifier that has become NaN makes the logits so; a factor that is would be an error in the loss.
            self.inverse_norm = norm.reciprocal_().nan_to_num_(nan=1.0)
        self._add_bias = self.bias is not None and normalize
        columns, features = self.weight.shape
        self.d_input = torch.empty_like(input) if need.input else None
        self.d_weight = input.new_empty(columns, features, dtype=self.sums) if need.weight else None
        self.d_bias = input.new_zeros(columns, dtype=self.sums) if need.bias and bias is not None else None
        self._started = False

    def chunks(self, most: int = 0, scratch: Tensor | None = None) -> Iterator[Chunk]:
        """All rows, in chunks of about one size, at most ``most``; each is computed into the memory of the last.

        That is ``scratch``, if given.
        """
        rows, columns = len(self.input), len(self.weight)
        if rows == 0:
            return
        most = most or chunk_rows(rows, columns, self.products.element_size(), self.input.is_cpu)
        size = -(-rows // -(-rows // most))
        scratch = self.products.new_empty(size * columns) if scratch is None else scratch
        for start in range(0, rows, size):
            part = slice(start, min(start + size, rows))
            count = part.stop - part.start
            features = self._features(part)
            logits = scratch[: count * columns].view(count, columns)
            self._multiply(features, logits)
            yield Chunk(part, features, logits.view(count, *self.shape))

    def _features(self, part: slice) -> Tensor:
        features = self.input[part]
        if self.inverse_norm is None:
            return features.to(self.products.dtype)
        return (features * _inverse_norm(features, self.sums)).to(self.products.dtype)

    def _multiply(self, features: Tensor, logits: Tensor) -> None:
        columns = len(self.products)
        size = self._classes_at_a_time(len(features)) or max(1, columns)
        for start in range(0, columns, size):
            self._multiply_part(features, slice(start, min(start + size, columns)), logits)

    def _classes_at_a_time(self, rows: int) -> int:
        """Of the product that makes logits; 0 for all."""
        features = self.products.shape[1]
        if self.products.dtype != torch.float32 or not self.products.is_cpu or rows * features < THIN:
            return 0
        by_logits, by_vectors = PART_BYTES // (4 * rows), 2 * PART_BYTES // (4 * features)
        return max(LEAST_CLASSES, min(by_logits, by_vectors) // LEAST_CLASSES * LEAST_CLASSES)

    def _multiply_part(self, features: Tensor, part: slice, logits: Tensor) -> None:
        """The logits of some classes."""
        vectors, logits = self.products[part].t(), logits[:, part]
        if self.bias is not None and not self._add_bias:
            torch.addmm(self.bias[part], features, vectors, out=logits)
            return
        torch.mm(features, vectors, out=logits)
        if self.inverse_norm is not None and not self.unscaled:
            logits.mul_(self.inverse_norm[part])
        if self.bias is not None:
            logits.add_(self.bias[part])

    def add(self, chunk: Chunk, gradient: Tensor) -> None:
        """Multiplies the gradient of a chunk's logits into the gradients; it is not the same afterwards."""
        g = gradient.flatten(1)
        if self.d_bias is not None:
            self.d_bias += g.sum(dim=0, dtype=self.sums)
        if self.inverse_norm is not None and not self.unscaled:
            g.mul_(self.inverse_norm)
        if self.d_input is not None:
            self._add_input(chunk, g, self.d_input)
        if self.d_weight is not None:
            self._add_weight(g, chunk.features, self.d_weight)
        self._started = True

    def _add_input(self, chunk: Chunk, g: Tensor, d_input: Tensor) -> None:
        if d_input.dtype == g.dtype:
            d = torch.mm(g, self.products, out=d_input[chunk.rows])
        else:
            d = d_input[chunk.rows].copy_(_product(g, self.products))
        if self.inverse_norm is not None:
            inverse = _inverse_norm(self.input[chunk.rows], self.sums)
            direction = self.input[chunk.rows] * inverse
            along = _dot(direction, d.to(self.sums)) * (inverse < _SHORT)
            d.copy_((d - direction * along) * inverse)

    def _add_weight(self, g: Tensor, features: Tensor, d_weight: Tensor) -> None:
        if d_weight.dtype == g.dtype:
            if self._started:
                d_weight.addmm_(g.t(), features)
            else:
                torch.mm(g.t(), features, out=d_weight)
        elif not g.is_cpu:
            if self._started:
                torch.addmm(d_weight, g.t(), features, out_dtype=d_weight.dtype, out=d_weight)
            else:
                torch.mm(g.t(), features, out_dtype=d_weight.dtype, out=d_weight)
        else:
            for part in self._parts():
                product = _product(g[:, part].t(), features)
                if self._started:
                    d_weight[part] += product
                else:
                    d_weight[part] = product

    def _parts(self) -> Iterator[slice]:
        """All class vectors, some at a time."""
        columns, features = self.weight.shape
        most = max(1, PART_BYTES // (features * 4))
        return (slice(start, min(start + most, columns)) for start in range(0, columns, most))

    def finish(self) -> None:
        """Makes of the gradients what they are once no chunk is to come."""
        if self.d_weight is not None and not self._started:
            self.d_weight.zero_()
        if self.inverse_norm is None or self.d_weight is None:
            return
        for part in self._parts():
            vectors, d = self.weight[part].to(self.sums), self.d_weight[part]
            inverse = self.inverse_norm[part].unsqueeze(1)
            along = _dot(vectors, d) * inverse.square() * (inverse < _SHORT)
            d.addcmul_(vectors, along, value=-1)


_SHORT = 0.99 / EPS  # one over the length of what has no direction to be changed


def _inverse_norm(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True, dtype=dtype)
    return norm.clamp_min_(EPS).reciprocal_()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=1, keepdim=True)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]))  # autocast leaves out= alone

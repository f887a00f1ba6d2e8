"""The op that turns positions of a stream into samples: schema, fake, choice of backend. It has no gradient."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ltkernels import backends
from ltkernels.reference import sampling as reference
from ltkernels.reference.sampling import SamplingOptions

_TENSORS = 7  # the first arguments; the rest are SamplingOptions
# SymInt: what differs from call to call compiles nothing anew.
_library = torch.library.Library("ltkernels", "FRAGMENT")
_library.define(
    "sample_indices(Tensor offsets, Tensor members, Tensor? alias_table, Tensor? slots, Tensor? quotas,"
    " Tensor? start_at, Tensor? epoch_at, SymInt classes, SymInt groups, SymInt draws, bool distinct, SymInt seed,"
    " SymInt epoch, SymInt start, SymInt step, SymInt count) -> Tensor"
)


def sample_indices(*call: Any) -> Tensor:
    """The samples at some positions, by the backend that serves the call.

    Args:
        *call: the tensors of the reference's ``sample_indices``, then SamplingOptions, spread out.
    """
    indices: Tensor
    if torch.compiler.is_compiling():
        indices = torch.ops.ltkernels.sample_indices(*call)
    else:
        indices = TABLE.choose(call[0], call).forward(*call)
    return indices


def _reference(*call: Any) -> Tensor:
    options = SamplingOptions(*call[_TENSORS:])
    return reference.sample_indices(*call[:_TENSORS], options)  # type: ignore[call-arg]


@cache
def _cpu_op() -> Any:
    return torch.ops.ltkernels_cpu.sample_indices.default._op


@cache
def _cuda_op() -> Any:
    return torch.ops.ltkernels_cuda.sample_indices.default._op


def _triton(*call: Any) -> Tensor:
    from ltkernels.triton import sampling as kernels

    indices: Tensor = kernels.sample_indices(*call)
    return indices


TABLE = backends.Table(
    "sample_indices",
    [
        backends.Implementation("cuda", "cuda", lambda *call: _cuda_op()(*call)),
        backends.Implementation("triton", "cuda", _triton),
        backends.Implementation("cpu", "cpu", lambda *call: _cpu_op()(*call)),
        backends.Implementation("reference", None, _reference),
    ],
    kernels="sampling",
)
"""Implementations of sample_indices, fastest first. All give the same bits."""


def _op(*call: Any) -> Tensor:
    indices: Tensor = TABLE.choose(call[0], call).forward(*call)
    return indices


for _key in ("CPU", "CUDA"):
    _library.impl("sample_indices", _op, _key)


@torch.library.register_fake("ltkernels::sample_indices", lib=_library)
def _fake(*call: Any) -> Tensor:
    indices: Tensor = call[0].new_empty(call[-1], dtype=torch.int64)
    return indices

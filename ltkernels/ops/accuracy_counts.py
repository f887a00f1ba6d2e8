"""The op that counts right predictions of each class: schema, fake, choice of backend. It has no gradient.

It adds to tensors of the caller and returns nothing: a metric takes one launch for a batch, and waits for nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ltkernels import backends
from ltkernels.ops import gpu
from ltkernels.reference import accuracy_counts as reference

_library = torch.library.Library("ltkernels", "FRAGMENT")
_library.define(
    "accuracy_counts(Tensor input, Tensor target, Tensor(a!) correct, Tensor(b!) total, SymInt top_k,"
    " SymInt ignore_index) -> ()"
)


def accuracy_counts(
    input: Tensor, target: Tensor, correct: Tensor, total: Tensor, top_k: int, ignore_index: int
) -> None:
    """Adds the counts of a batch by the backend that serves the call; arguments as of the reference.

    Raises:
        IndexError: a label or a predicted label out of range (CPU); nothing is then added.
    """
    call = (input, target, correct, total, top_k, ignore_index)
    if torch.compiler.is_compiling():
        torch.ops.ltkernels.accuracy_counts(*call)
        return
    if not input.is_cpu:
        gpu.check()
    TABLE.choose(input, call).forward(*call)


def _reference(*call: Any) -> None:
    input, target, correct, _, _, ignore_index = call
    if input.is_cpu:
        reference.check_values(input, target, len(correct), ignore_index)
    reference.accuracy_counts(*call)


@cache
def _cpu_op() -> Any:
    return torch.ops.ltkernels_cpu.accuracy_counts.default._op


@cache
def _cuda_op() -> Any:
    return torch.ops.ltkernels_cuda.accuracy_counts.default._op


def _cpu(*call: Any) -> None:
    try:
        _cpu_op()(*call)
    except RuntimeError as error:
        # The C++ core can only raise RuntimeError. If a label is why, this raises what all backends raise for it.
        if str(error).startswith("ltkernels: value:"):
            reference.check_values(call[0], call[1], len(call[2]), call[5])
        raise


def _cuda(*call: Any) -> None:
    _cuda_op()(*call, gpu.error_word(call[0].device))


def _triton(*call: Any) -> None:
    from ltkernels.triton import accuracy_counts as kernels

    kernels.accuracy_counts(*call)


TABLE = backends.Table(
    "accuracy_counts",
    [
        backends.Implementation("cuda", "cuda", _cuda),
        backends.Implementation("triton", "cuda", _triton),
        backends.Implementation("cpu", "cpu", _cpu),
        backends.Implementation("reference", None, _reference),
    ],
)
"""Implementations of accuracy_counts, fastest first. All count alike."""


def _op(*call: Any) -> None:
    TABLE.choose(call[0], call).forward(*call)


for _key in ("CPU", "CUDA"):
    _library.impl("accuracy_counts", _op, _key)


@torch.library.register_fake("ltkernels::accuracy_counts", lib=_library)
def _fake(*call: Any) -> None:
    return None

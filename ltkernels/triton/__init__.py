"""Triton kernels, a file a hot path: portable GPU code that needs nothing but the Triton that PyTorch brings.

Every module here has what ``ltkernels.ops`` calls, ``forward`` and ``backward`` or one function, and ``variants``,
which the machine-code check (``make codecheck``) compiles ahead of time. With ``TRITON_INTERPRET=1`` in the environment
when a module is imported, its kernels are interpreted on CPU tensors: that is how they are tested without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One instantiation of a kernel, and what its machine code is to look like.

    ``triton.compile(ASTSource(kernel, signature, constexprs, attrs), target=..., options={"num_warps": num_warps})``
    makes it. ``wide_loads`` and ``wide_stores`` count 128-bit instructions that access logits, at least; ``logits`` are
    those a program has in registers at a time; a hot path without logits leaves them out.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    num_warps: int
    logits: int | None
    wide_loads: int
    wide_stores: int
    bytes_per_logit: float | None

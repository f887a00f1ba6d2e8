"""A pytest plugin for a process with ``TRITON_INTERPRET=1`` (test_triton.py): mends the interpreter where it is wrong.

Triton's interpreter cuts the digits off when it makes bfloat16 of float32, where the GPU rounds to the nearest; a
gradient would be off by twice the rounding error that the tests allow. It also warns of every infinity minus infinity,
among them in lanes that are masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float


def _rounding(input: Any, input_dtype: Any, output_dtype: Any, rounding_mode: Any) -> Any:
    if input_dtype != tl.float32 or output_dtype != tl.bfloat16:
        return _convert_float(input, input_dtype, output_dtype, rounding_mode)
    bits = np.ascontiguousarray(input).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(bits.view(np.float32)), np.uint16(0x7FC0), rounded)


interpreter._convert_float = _rounding


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield

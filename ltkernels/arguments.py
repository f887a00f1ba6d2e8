"""Argument checks that the public functions share: each names the argument, what was expected and what was found.

Only what costs no look at the data: shapes, types, devices and Python numbers. Values in tensors are checked by the
backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

INTEGER_TYPES = frozenset(
    {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)
FLOAT32 = torch.finfo(torch.float32)
LOGITS_TYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def tensor(name: str, value: object) -> Tensor:
    """``value`` if it is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, found {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, found layout {value.layout}")
    return value


def may_look(value: Tensor) -> bool:
    """Whether the tensor's value can be read now: not while a graph is made of the call."""
    return (
        type(value) is Tensor and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    )


def check_logits(name: str, logits: Tensor) -> None:
    """Floating logits with a class dimension of at least one class: ``(C,)`` or ``(N, C, ...)``."""
    if tensor(name, logits).dtype not in LOGITS_TYPES:
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, found {logits.dtype}")
    shape = logits.shape
    if len(shape) == 0 or shape[0 if len(shape) == 1 else 1] == 0:
        raise ValueError(f"{name}: expected shape (C,), (N, C) or (N, C, ...) with C >= 1, found {tuple(shape)}")


def label_shape(logits: Tensor) -> tuple[int, ...]:
    """The logits' shape without the class dimension."""
    shape = tuple(logits.shape)
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def check_target(logits: Tensor, target: Tensor, name: str = "target") -> None:
    """Labels of the logits' shape without the class dimension, or probabilities of the logits' shape."""
    dtype = tensor(name, target).dtype
    if target.device != logits.device:
        raise ValueError(f"{name}: expected device {logits.device} as input's, found {target.device}")
    if dtype in INTEGER_TYPES:
        expected = label_shape(logits)
        if target.shape != expected:
            raise ValueError(
                f"{name}: expected labels of shape {expected} for input of shape {tuple(logits.shape)},"
                f" found {tuple(target.shape)}"
            )
    elif dtype in LOGITS_TYPES:
        if target.shape != logits.shape:
            raise ValueError(
                f"{name}: expected probabilities of input's shape {tuple(logits.shape)}, found {tuple(target.shape)}"
                f" of {dtype} (labels need an integer type)"
            )
    else:
        raise TypeError(f"{name}: expected labels of an integer type or floating probabilities, found {dtype}")


def compute_type(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


def class_vector(name: str, value: Tensor | float, logits: Tensor, scalar: bool = False) -> Tensor:
    """``(C,)`` parameters in the type the op computes in; with ``scalar`` also one number for all classes, ``(1,)``."""
    dtype = compute_type(logits)
    num_classes = logits.shape[1]
    if (
        type(value) is Tensor
        and value.dtype is dtype
        and value.shape == (num_classes,)
        and value.is_cpu
        and logits.is_cpu  # comparing devices costs more
        and value.is_contiguous()
    ):
        return value
    if scalar and isinstance(value, Real) and not isinstance(value, bool):
        compiling = torch.compiler.is_compiling()  # the number may be a symbol then
        if not compiling and not math.isfinite(value):
            raise ValueError(f"{name}: expected finite values, found {float(value):g} at index 0")
        if compiling and not logits.is_cpu:
            return torch.full((num_classes,), float(value), dtype=dtype, device=logits.device)
        # Kernels on a GPU read it here: no launch for a number.
        return torch.full((1,), float(value), dtype=dtype, device="cpu")
    if scalar and not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or a number, found {type(value).__name__}")
    value = tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating type, found {value.dtype}")
    if scalar and value.dim() == 0:
        value = value.unsqueeze(0) if value.is_cpu else value.expand(num_classes)
    elif value.shape != (num_classes,):
        raise ValueError(f"{name}: expected shape ({num_classes},), one value a class, found {tuple(value.shape)}")
    if value.device != logits.device and not (scalar and value.is_cpu and value.shape == (1,)):
        raise ValueError(f"{name}: expected device {logits.device} as input's, found {value.device}")
    if value.dtype is not dtype:
        value = value.to(dtype)
    return value.contiguous()


def row_weight(name: str, value: Tensor, logits: Tensor) -> Tensor:
    """Weights of the labels' shape in the type the op computes in."""
    value = tensor(name, value)
    expected = label_shape(logits)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating type, found {value.dtype}")
    if value.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, one value a row, found {tuple(value.shape)}")
    if value.device != logits.device:
        raise ValueError(f"{name}: expected device {logits.device} as input's, found {value.device}")
    return value.to(compute_type(logits)).contiguous()


def integer(name: str, value: int) -> int:
    """``value`` as an int; bools and floats are not integers."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        found = repr(value) if isinstance(value, (bool, float, str, type(None))) else type(value).__name__
        raise TypeError(f"{name}: expected an integer, found {found}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an integer of 64 bits, found {value}")
    return int(value)


def size(name: str, value: int) -> int:
    """``value`` as an int above 0."""
    value = integer(name, value)
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, found {value}")
    return value


def number(name: str, value: float, low: float, high: float, open_low: bool = False) -> float:
    """``value`` as a float in ``[low, high]``, or in ``(low, high]`` with ``open_low``; one that float32 can hold."""
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected a number, found {type(value).__name__}")
        value = float(value)
    if not low <= value <= min(high, FLOAT32.max) or (open_low and value < low + FLOAT32.tiny):
        upper = "" if high == float("inf") else f" and <= {high:g}"
        beyond = ", which float32 does not hold" if low < value < high else ""
        least = f"{'>' if open_low else '>='} {low:g}"
        raise ValueError(f"{name}: expected a finite number {least}{upper}, found {value!r}{beyond}")
    return value


def choice(name: str, value: str, allowed: Sequence[str], more: str = "") -> str:
    """``value`` if it is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}{more}, found {value!r}")
    return value


def position(name: str, value: int | Tensor, device: torch.device, end: int) -> tuple[int, Tensor | None]:
    """A number, or 0 and the tensor that has it on the device."""
    if isinstance(value, Tensor):
        if value.dtype is not torch.int64 or value.dim() != 0 or value.device != device:
            raise ValueError(
                f"{name}: expected an integer or a 0-d int64 tensor on {device}, found {value.dtype} of shape"
                f" {tuple(value.shape)} on {value.device}"
            )
        return 0, value
    value = integer(name, value)
    if not 0 <= value < end:
        raise ValueError(f"{name}: expected >= 0 and below {end}, found {value}")
    return value, None

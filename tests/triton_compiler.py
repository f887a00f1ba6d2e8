"""A pytest plugin for a process of test_triton.py: kernels are not run but translated to Triton's IR, for CPU tensors.

That shows what the interpreter, which knows no types, cannot: a variable with one type before a loop and another one
behind it, a branch that leaves another type. Which kernel a call launches and with which arguments is found out by the
call itself; results are whatever was in their memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import ltkernels.triton

for _path in Path(ltkernels.triton.__file__).parent.glob("*.py"):
    import_module(f"ltkernels.triton.{_path.stem}" if _path.stem != "__init__" else "ltkernels.triton")

_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


def pytest_configure() -> None:
    """The kernels are decorated by now, as for a GPU. This lets the backend serve CPU tensors."""
    os.environ["TRITON_INTERPRET"] = "1"


class _TranslatedError(Exception):
    """Stops behind the first stage."""


def _stop(*_: Any) -> NoReturn:
    raise _TranslatedError


@pytest.fixture
def translated(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Any]]:
    """What was translated: kernels, types and constants. A kernel that Triton refuses raises at its launch."""
    found: set[Any] = set()
    add_stages = CUDABackend.add_stages

    def until_ir(self: Any, stages: dict[str, Any], *arguments: Any) -> None:
        add_stages(self, stages, *arguments)
        stages["ttgir"] = _stop

    def translate(kernel: Any, *arguments: Any, num_warps: int, **_: Any) -> None:
        types: dict[str, str] = {}
        constants: dict[str, Any] = {}
        for parameter, value in zip(kernel.params, arguments, strict=True):
            if parameter.is_constexpr or value is None:
                types[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                types[parameter.name] = f"*{_TYPES[value.dtype]}"
            else:
                types[parameter.name] = parameter.annotation_type
        form = (kernel.fn.__module__, kernel.fn.__name__, tuple(types.items()), tuple(constants.items()))
        if form in found:
            return
        found.add(form)
        source = ASTSource(kernel, types, constants)
        with pytest.raises(_TranslatedError):
            triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})

    monkeypatch.setattr(CUDABackend, "add_stages", until_ir)
    monkeypatch.setattr(JITFunction, "run", translate)
    yield found

"""Which implementation serves a call, and why.

Each op has a table of implementations, fastest first. The first one that can serve a call does; :func:`explain` prints
the reasons, :func:`use_backend` (or the environment variable ``LTK_BACKEND``) asks for one by name.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""Backend names, fastest first; ``reference`` runs everywhere and serves every call."""

CPU_INSTRUCTION_SETS = ("avx512", "avx2", "portable")
"""Names of the instruction sets the C++ library is built for, fastest first; ``LTK_CPU_ISA`` forces one."""

_LIBRARY = Path(__file__).parent / "lib" / "libltkernels_cpu.so"
_CUDA_LIBRARY = Path(__file__).parent / "lib" / "libltkernels_cuda.so"
# Without --no-cache-dir, pip would install once more the wheel that it kept of the build that left something out.
_REBUILD = (
    "pip install --no-build-isolation --no-deps -e ."
    if (Path(__file__).parents[1] / "csrc").is_dir()  # a checkout
    else "pip install --no-cache-dir --force-reinstall --no-deps ltkernels"
)


@cache
def status() -> dict[str, str | None]:
    """Every backend's name, with ``None`` where this process can use it and otherwise the reason why it cannot."""
    return {
        "cuda": _load_cuda_library(),
        "triton": _find_triton(),
        "cpu": _load_cpu_library(),
        "reference": None,
    }


def _not_built(library: Path, missing: str, needed: str) -> str:
    if sys.platform != "linux":
        return f"{library.name} was not built: the compiled backends are for Linux only"
    reason = f"{library.name} was not built: ltkernels was installed without {missing}"
    return f"{reason}; with {needed}, `{_REBUILD}` builds it"


def _old_torch() -> str | None:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"torch 2.10 or later needed, found {torch.__version__}; `pip install --upgrade torch` brings one"
    return None


def _load_cpu_library() -> str | None:
    if not _LIBRARY.exists():
        return _not_built(_LIBRARY, "a C++ compiler or without torch", "g++ and torch there")
    if reason := _old_torch():
        return reason
    try:
        torch.ops.load_library(str(_LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"{_LIBRARY.name} could not be loaded: {str(error).splitlines()[0]}"
    if forced := os.environ.get("LTK_CPU_ISA"):
        cpu_instruction_set(forced)
    return None


def emulated(backend: str) -> bool:
    """Whether this process runs a GPU backend's kernels on the CPU, as tests do: for CPU tensors, and only when asked.

    ``TRITON_INTERPRET=1`` lets Triton interpret its kernels; ``LTK_EMULATED_CUDA`` is the path of a library in which
    the CUDA kernels are compiled for the CPU (setup.py: build_emulated).
    """
    if backend == "triton":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return backend == "cuda" and bool(os.environ.get("LTK_EMULATED_CUDA"))


def _no_gpu() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"compute capability 8.0 or later needed, found {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    return None


def _load_cuda_library() -> str | None:
    library = Path(os.environ.get("LTK_EMULATED_CUDA") or _CUDA_LIBRARY)
    if not emulated("cuda") and (reason := _no_gpu()):
        return reason
    if not library.exists():
        return _not_built(library, "nvcc", "nvcc, g++ and torch there")
    if reason := _old_torch():
        return reason
    try:
        torch.ops.load_library(str(library))
        torch.ops.ltkernels_cuda.probe()  # an older driver, or a GPU that it was not built for
    except (OSError, RuntimeError) as error:
        return f"{library.name} cannot be used: {str(error).splitlines()[0]}"
    return None


def _find_triton() -> str | None:
    if not emulated("triton") and (reason := _no_gpu()):
        return reason
    return "triton is not installed" if find_spec("triton") is None else None


def cpu_instruction_set(name: str | None = None) -> str:
    """The instruction set that the ``cpu`` backend uses; with ``name``, the one it uses from now on.

    Args:
        name: one of :data:`CPU_INSTRUCTION_SETS`, or ``None`` to ask only. Their results differ in rounding.

    Raises:
        ValueError: an unknown name, or one that this machine or build does not have.
        RuntimeError: the C++ library is not there.

    Example:
        >>> from ltkernels import backends
        >>> backends.status()["cpu"] is not None or backends.cpu_instruction_set() in backends.CPU_INSTRUCTION_SETS
        True
    """
    if name is not None and name not in CPU_INSTRUCTION_SETS:
        raise ValueError(f"instruction set: expected {' or '.join(map(repr, CPU_INSTRUCTION_SETS))}, found {name!r}")
    if not hasattr(torch.ops.ltkernels_cpu, "select_isa") and (reason := status()["cpu"]):
        raise RuntimeError(f"the cpu backend is not available: {reason}")
    used: int = torch.ops.ltkernels_cpu.select_isa(-1 if name is None else CPU_INSTRUCTION_SETS.index(name))
    if used < 0:
        raise ValueError(f"instruction set: {name!r} is not offered by this processor or was not built")
    return CPU_INSTRUCTION_SETS[used]


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Names of the backends that can serve tensors on ``device``, fastest first.

    Args:
        device: a device or device type, such as ``"cpu"`` or ``"cuda:0"``.

    Returns:
        Names from :data:`BACKENDS`; the last is always ``"reference"``. ``ltkernels info`` says why one is missing.

    Raises:
        ValueError: no device of that name.

    Example:
        >>> import ltkernels as ltk
        >>> ltk.available_backends("cpu")[-1]
        'reference'
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(
            f"device: expected a device or its type, such as 'cpu' or 'cuda:0', found {device!r}"
        ) from error
    serves = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu", "reference": kind}
    return tuple(
        name
        for name in BACKENDS
        if (serves[name] == kind or (kind == "cpu" and emulated(name))) and status()[name] is None
    )


class use_backend:  # noqa: N801 (called like a function, used like torch.no_grad)
    """Ask for one backend, in all threads of the process: from now on, or inside a ``with`` block.

    Args:
        name: one of :data:`BACKENDS`, or ``None`` to go back to the automatic choice.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that this process cannot use, with the reason. A call that the backend cannot serve
            raises when it is made.

    Example:
        >>> import torch, ltkernels as ltk
        >>> with ltk.use_backend("reference"):
        ...     loss = ltk.functional.cross_entropy(torch.zeros(1, 4), torch.tensor([2]))
        >>> round(loss.item(), 4)
        1.3863
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        _check_name(name)
        self._name, self._before = name, _forced
        _forced = name

    def __enter__(self) -> use_backend:
        global _forced
        _forced = self._name  # again, if this is not the object's first block
        return self

    def __exit__(self, *exception: object) -> None:
        global _forced
        _forced = self._before


def _check_name(name: str | None) -> None:
    if name is None:
        return
    if name not in BACKENDS:
        raise ValueError(f"backend: expected {', '.join(map(repr, BACKENDS))} or None, found {name!r}")
    if reason := status()[name]:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")


_forced: str | None = os.environ.get("LTK_BACKEND") or None


def _no_backward(*call: Any) -> Any:
    raise AssertionError("an op without a gradient has no backward")


@dataclass(frozen=True)
class Implementation:
    """One backend's implementation of one op: its callables and the calls it cannot serve."""

    backend: str
    device: str | None
    forward: Callable[..., Any]
    backward: Callable[..., Any] = _no_backward
    refuses: Callable[..., str | None] = lambda *call: None
    gradient_in_forward: bool = False
    all_gradients: bool = False
    """Whether that forward computes the gradients of all tensors that need one, not just that of the first."""

    def reason_against(self, device: torch.device, call: tuple[Any, ...]) -> str | None:
        """``None`` if this implementation can serve ``call``, otherwise why not."""
        if self.device not in (None, device.type) and not (device.type == "cpu" and emulated(self.backend)):
            return f"runs on {self.device}, the tensors are on {device.type}"
        return status()[self.backend] or self.refuses(*call)


@dataclass(frozen=True)
class Preference:
    """Which backend is the fastest for some calls on some GPUs, and how that is known."""

    backend: str
    source: str
    device: str = ""
    """Part of the device's name as ``torch.cuda.get_device_name`` gives it."""
    dtype: torch.dtype | None = None
    classes: tuple[float, float] = (0, math.inf)
    """Least and largest number of classes."""

    def holds(self, name: str, dtype: torch.dtype, classes: int) -> bool:
        """Whether this is about ``classes`` classes of ``dtype`` on the device of that name."""
        low, high = self.classes
        return self.device in name and self.dtype in (None, dtype) and low <= classes <= high


@dataclass
class Table:
    """The implementations of one op, fastest first; on a GPU the first preference that holds decides who that is."""

    op: str
    rows: list[Implementation]
    preferences: tuple[Preference, ...] = ()
    kernels: str = ""
    """Name of the kernels' files, where that is not the op's: an op may be made of another's kernels."""
    _candidates: dict[str, list[Implementation]] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def choose(self, input: Tensor, call: tuple[Any, ...]) -> Implementation:
        """The implementation that serves ``call``: the one asked for, or the first that can."""
        if _explaining and _explaining == get_ident():
            raise _ExplanationError(self._explain(input, call))
        if _forced is not None:
            return self._asked_for(_forced, input.device, call)
        kind = "cpu" if input.is_cpu else input.device.type  # a device object takes longer to make
        candidates = self._candidates.get(kind) or self._find_candidates(input.device)
        if kind == "cuda" and (preferred := self.preferred(input)) is not None:
            candidates = sorted(candidates, key=lambda row: row.backend != preferred.backend)
        for row in candidates:
            reason = row.refuses(*call)
            if reason is None:
                return row
            self._tell(row, reason)
        raise AssertionError("the reference implementation serves every call")

    def preferred(self, input: Tensor) -> Preference | None:
        """The preference for logits like these, or none: then the order of the rows holds."""
        name = _device_name(input.device)
        classes = input.shape[min(1, input.dim() - 1)]
        return next((p for p in self.preferences if p.holds(name, input.dtype, classes)), None)

    def _find_candidates(self, device: torch.device) -> list[Implementation]:
        """What this process can use on the device: found once, since looking at every call costs microseconds."""
        rows = [row for row in self.rows if row.device in (None, device.type)]
        for row in rows:
            if (reason := status()[row.backend]) and row.backend not in _told_missing:
                _told_missing.add(row.backend)
                warnings.warn(f"ltkernels does without its {row.backend} backend: {reason}", stacklevel=6)
        self._candidates[device.type] = [row for row in rows if status()[row.backend] is None]
        return self._candidates[device.type]

    def _tell(self, row: Implementation, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"ltkernels: {self.op} does not use the {row.backend} backend: {reason}", stacklevel=6)

    def _asked_for(self, name: str, device: torch.device, call: tuple[Any, ...]) -> Implementation:
        _check_name(name)
        row = next((row for row in self.rows if row.backend == name), None)
        reason = f"it has no {self.op}" if row is None else row.reason_against(device, call)
        if row is None or reason is not None:
            raise RuntimeError(f"{self.op}: backend {name!r} was asked for but cannot serve this call: {reason}")
        return row

    def _explain(self, input: Tensor, call: tuple[Any, ...]) -> Explanation:
        chosen: Implementation | None = None
        lines = []
        preferred = self.preferred(input) if input.device.type == "cuda" else None
        first = preferred.backend if preferred else ""
        for row in sorted(self.rows, key=lambda row: row.backend != first):
            reason = row.reason_against(input.device, call)
            if reason is None and chosen is None and _forced in (None, row.backend):
                why = "asked for" if _forced else preferred.source if preferred and row.backend == first else ""
                verdict, chosen = "serves this call" + (f" ({why})" if why else ""), row
            else:
                verdict = f"no: {reason}" if reason else "could serve this call"
            lines.append(f"  {row.backend:<10} {verdict}")
        if chosen is None:
            lines.append(f"  backend {_forced!r} was asked for: the call would raise")
        else:
            lines.append(f"what runs: {self._kernels_of(chosen)}")
        tensor = f"{str(input.dtype).removeprefix('torch.')} {tuple(input.shape)}"
        head = f"{self.op} on {input.device}, {tensor}; backends, fastest first:"
        explanation = Explanation("\n".join([head, *lines]))
        explanation.op, explanation.backend = self.op, None if chosen is None else chosen.backend
        return explanation

    def _kernels_of(self, row: Implementation) -> str:
        name = self.kernels or self.op
        if row.backend == "cpu":
            threads = torch.get_num_threads()
            limit = f"up to {threads} threads" if threads > 1 else "1 thread"
            return f"C++ for {cpu_instruction_set()} on {limit}; csrc/cpu/kernels_{name}.cpp"
        if row.backend == "cuda":
            return f"CUDA C++{_emulation(row)}; csrc/cuda/{name}*.cu"
        if row.backend == "triton":
            return f"Triton, compiled at the first call{_emulation(row)}; ltkernels/triton/{name}.py"
        return "PyTorch's own ops and autograd; ltkernels/reference"


def _emulation(row: Implementation) -> str:
    return ", emulated on the CPU" if emulated(row.backend) else ""


_told_missing: set[str] = set()
"""Backends of which a warning has said that this process cannot use them: once, not once an op."""


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


class Explanation(str):
    """What :func:`explain` found: text, which a notebook or a prompt shows as it is, without ``print``.

    Attributes:
        op: the op that was called.
        backend: the backend that serves the call; ``None`` where the call would raise.
    """

    op: str = ""
    backend: str | None = None

    def __repr__(self) -> str:
        return str(self)


class _ExplanationError(Exception):
    """Carries the explanation out of a call that :func:`explain` made."""

    def __init__(self, explanation: Explanation) -> None:
        super().__init__()
        self.explanation = explanation


_explaining = 0
"""The thread that is in :func:`explain`, whose next op raises instead of computing; another thread's computes."""


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would serve ``fn(*args, **kwargs)``, with which kernels, and why not the others.

    The call stops where the backend would compute, so nothing is computed but what ``fn`` does before that. Where
    ``fn`` calls several ops of this library, it is about the first.

    Args:
        fn: a function of :mod:`ltkernels.functional`, a loss module, or anything that calls one.
        *args: its arguments; they are checked as in a call.
        **kwargs: its keyword arguments.

    Returns:
        A string: the op and its first tensor, a line for each backend, fastest first, and what runs. Its attribute
        ``backend`` is the name of the backend that serves the call.

    Raises:
        TypeError: ``fn`` cannot be called.
        ValueError: ``fn`` calls no op of this library. Argument errors are raised as by ``fn``.

    Example:
        >>> import torch, ltkernels as ltk
        >>> with ltk.use_backend("reference"):
        ...     why = ltk.explain(ltk.functional.cross_entropy, torch.zeros(2, 3), torch.tensor([0, 1]))
        >>> why  # doctest: +ELLIPSIS
        cross_entropy on cpu, float32 (2, 3); backends, fastest first:
          cuda       no: runs on cuda, the tensors are on cpu
          triton     no: runs on cuda, the tensors are on cpu
          cpu        ...
          reference  serves this call (asked for)
        what runs: PyTorch's own ops and autograd; ltkernels/reference
        >>> why.backend
        'reference'
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a function or a loss, found {type(fn).__name__}")
    global _explaining
    _explaining = get_ident()
    try:
        fn(*args, **kwargs)
    except _ExplanationError as stopped:
        return stopped.explanation
    finally:
        _explaining = 0
    raise ValueError(
        f"fn: expected a function that calls an op of ltkernels, found {fn!r}, which ran to its end without one"
    )

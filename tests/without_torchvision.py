"""Lets timm be imported where torchvision is not installed.

timm imports torchvision for its own image transforms, data sets and a check for frozen batch norms; its models, mixup
and losses use nothing of it, and its builds belong to one build of torch. Where it is missing, each of its names is
here a class that no object belongs to and that refuses to be made. So what needs torchvision fails, and all else of
timm is the real thing.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

MODES = ("NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")


class _Missing:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError(f"{type(self).__name__} needs torchvision, which is not installed")


class _MissingModule(ModuleType):
    # timm makes tables of them
    InterpolationMode = enum.Enum("InterpolationMode", {mode: mode.lower() for mode in MODES})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (_Missing,), {})
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _MissingModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def forget() -> None:
    """Undoes it: what asks for torchvision from now on does not find it. timm stays imported."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        if isinstance(sys.modules[name], _MissingModule):
            del sys.modules[name]


def import_timm() -> None:
    """Imports timm; without torchvision, if that is not installed."""
    missing = find_spec("torchvision") is None
    if missing:
        sys.meta_path.append(_Finder())
    try:
        import timm  # noqa: F401
        import timm.loss
        import timm.task  # noqa: F401
    finally:
        if missing:
            forget()

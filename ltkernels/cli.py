"""The command ``ltkernels``: ``info`` says what this installation can do, ``bench`` measures it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from . import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; ``None`` takes them from ``sys.argv``.

    Returns:
        Exit status: 0, or 1 if the installation or the environment's ``LTK_*`` variables are at fault.

    Raises:
        SystemExit: with status 2 on arguments that do not exist, after printing the usage.

    Example:
        >>> from ltkernels.cli import main
        >>> main(["info"])  # doctest: +ELLIPSIS
        ltkernels ...
        0
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["bench"]:  # has a command line of its own
        from .bench import main as bench

        return bench(argv[1:])

    parser = argparse.ArgumentParser(prog="ltkernels", description="Fast kernels for deep long-tailed learning.")
    parser.add_argument("--version", action="version", version=f"ltkernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,bench}")
    info = commands.add_parser("info", help="print versions and backends, and why a backend is missing")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    commands.add_parser("bench", help="measure the kernels against their peers; ltkernels bench --help says more")
    arguments = parser.parse_args(argv)
    try:
        found = collect_info()
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"ltkernels: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=2) if arguments.json else format_info(found))
    return 0


def collect_info() -> dict[str, Any]:
    """What ``ltkernels info`` prints, as plain data.

    Returns:
        A dict that json can write:

        * ``ltkernels``, ``python``, ``torch``, ``numpy``, ``triton``: versions; ``None`` if not installed.
        * ``platform``: system and machine; ``threads``: how many torch uses.
        * ``build``: compiler and flags of the C++ host module, a dict; ``None`` if it was not built.
        * ``backends``: name -> ``None`` if this process can use it, else the reason.
        * ``serves``: device type -> names of the backends that serve it, fastest first.
        * ``instruction_set``: what the cpu backend runs on; ``None`` without that backend.
        * ``instruction_sets``: what ``LTK_CPU_ISA`` can force on this machine, fastest first.
        * ``environment``: the ``LTK_*`` variables that are set.

    Raises:
        ImportError: torch is not installed, or cannot be imported.
        ValueError: ``LTK_BACKEND`` or ``LTK_CPU_ISA`` has an unknown value, or ``LTK_CPU_ISA`` one not to be had here.
        RuntimeError: ``LTK_BACKEND`` names a backend that this process cannot use.

    Example:
        >>> from ltkernels.cli import collect_info
        >>> collect_info()["backends"]["reference"] is None
        True
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"torch cannot be imported ({error}); `pip install 'torch>=2.10'` brings one") from error

    from . import backends

    status = backends.status()
    with backends.use_backend(os.environ.get("LTK_BACKEND") or None):
        pass  # a name that would fail at the first call fails here
    used, usable = _instruction_sets() if status["cpu"] is None else (None, [])
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return {
        "ltkernels": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": _installed("numpy"),
        "triton": _installed("triton"),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "build": _build_info(),
        "backends": status,
        "serves": {device: list(backends.available_backends(device)) for device in devices},
        "instruction_set": used,
        "instruction_sets": usable,
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("LTK_")},
    }


def _instruction_sets() -> tuple[str, list[str]]:
    """The instruction set in use, and all that can be forced: those which the library accepts when asked."""
    from .backends import CPU_INSTRUCTION_SETS, cpu_instruction_set

    used, usable = cpu_instruction_set(), []
    for name in CPU_INSTRUCTION_SETS:
        try:
            usable.append(cpu_instruction_set(name))
        except ValueError:
            pass  # not offered by this CPU, or not built: that is the answer
    cpu_instruction_set(used)
    return used, usable


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _build_info() -> dict[str, Any] | None:
    try:
        from . import _host  # type: ignore[attr-defined, unused-ignore]
    except ImportError:
        return None
    return dict(_host.build_info())


def format_info(found: dict[str, Any]) -> str:
    """The answer of :func:`collect_info` as text for a person, without a final newline.

    Args:
        found: what :func:`collect_info` returned.

    Returns:
        Lines of a name and a value; below ``backends`` one line for each, with the reason where it is missing.

    Example:
        >>> from ltkernels.cli import collect_info, format_info
        >>> format_info(collect_info()).startswith("ltkernels ")
        True
    """
    build, used = found["build"], found["instruction_set"]
    rows = [(name, found[name] or "not installed") for name in ("ltkernels", "python", "torch", "numpy", "triton")]
    rows += [("platform", found["platform"]), ("threads", found["threads"])]
    rows += [("compiler", f"{build['compiler']} {build['compiler_version']}" if build else "C++ host module not built")]
    if used is not None:
        rows += [("instructions", f"{used} (LTK_CPU_ISA forces one of {', '.join(found['instruction_sets'])})")]
    rows += [(f"on {device}", f"{', '.join(names)} (fastest first)") for device, names in found["serves"].items()]
    rows += [("environment", f"{name}={value}") for name, value in found["environment"].items()]
    lines = [f"{name:<13} {value}" for name, value in rows]
    lines += ["backends"]
    lines += [f"  {name:<11} {f'no: {why}' if why else 'yes'}" for name, why in found["backends"].items()]
    return "\n".join(lines)

"""Files that survive being killed at any moment: they are there whole or not at all.

A checkpoint is such a file. It is read with ``weights_only=True``, so it holds tensors, numbers and strings, never
code, and it is refused where it belongs to a run with other settings.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from workers import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Lets ``write`` fill a file that then appears under ``path``, also if this process is killed at any moment.

    The content goes into a file beside it, is forced to the disk, and is only then renamed over the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is in the folder, which has to reach the disk too
    finally:
        os.close(folder)


def save(path: Path, config: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes ``state``, and ``config``, the settings that decide the result."""
    import torch  # takes seconds, and the program's parent process does without

    write_atomically(path, lambda file: torch.save({"config": dict(config), "state": dict(state)}, file))


def load(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the state of a run with exactly this ``config``.

    Raises:
        UserError: the file is no checkpoint, or one of a run with other settings; the message names them.
    """
    import torch

    try:
        content = torch.load(path, weights_only=True)
        found: dict[str, Any] = content["config"]
        state: dict[str, Any] = content["state"]
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a readable checkpoint ({reason}); delete it to start this run anew") from error
    different = [key for key in {**config, **found} if config.get(key) != found.get(key)]
    if different:
        there = ", ".join(f"{key} {found.get(key)}" for key in different)
        here = ", ".join(f"{key} {config.get(key)}" for key in different)
        raise UserError(
            f"{path} belongs to another configuration: it was written with {there}; this call has {here}. "
            "Give the same options, another --out, or leave --resume away to start anew"
        )
    return state

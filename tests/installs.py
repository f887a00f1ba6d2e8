"""Makes what a stranger installs from, the sdist and wheels, and the empty environments to install into."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "tests/smoke.py"
LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so", "runs")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a program, which must succeed; its output, errors included."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def make_sdist(folder: Path) -> Path:
    """The sdist of a copy of the tree, in `folder`."""
    shutil.copytree(ROOT, folder / "tree", ignore=LEFT_BEHIND)
    command = "from setuptools import build_meta; build_meta.build_sdist('..')"
    run(sys.executable, "-c", command, cwd=folder / "tree")
    (archive,) = folder.glob("*.tar.gz")
    return archive


def unpack(archive: Path, folder: Path) -> Path:
    """The one folder that an sdist holds, in `folder`."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (unpacked,) = folder.glob("ltkernels-*/")
    return unpacked


def make_wheel(source: Path, folder: Path, python: str | Path = sys.executable, **environment: str) -> tuple[Path, str]:
    """The wheel of an unpacked sdist, made by its build backend as pip would, in `folder`; and what the build said."""
    command = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    said = run(python, "-c", command, folder, cwd=source, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel, said


def fresh_environment(folder: Path) -> Path:
    """The Python of a new virtual environment that has the packages of this one, but no ltkernels.

    They are links, so nothing is downloaded or copied: torch is the one that the tests run with.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin/python"
    (packages,) = folder.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("ltkernels", "__editable__", "__pycache__")):
            (packages / entry.name).symlink_to(entry)
    search = "import importlib.util; print(importlib.util.find_spec('ltkernels'))"
    assert run(python, "-c", search, cwd=folder).strip() == "None"
    return python


def install(python: Path, *arguments: str | Path) -> str:
    """Runs that Python's `pip install --no-deps`; what it said."""
    return run(python, "-m", "pip", "install", "--no-deps", *arguments, cwd=python.parent)

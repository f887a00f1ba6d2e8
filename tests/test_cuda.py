"""The CUDA kernels without a GPU: the same sources, compiled for the CPU (csrc/cuda/emulated.h), under the tests of all
backends.

They run in processes of their own, in which the library of emulated kernels serves CPU tensors when the cuda backend is
asked for. What this cannot show: races, and that the launches suit a real device. With a GPU the same files run on it
(`make gpu`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
VALUES = tuple(
    f"tests/test_cross_entropy_{part}.py"
    for part in ("values", "limits", "golden", "torch", "inplace", "safety", "special")
)
KERNELS = ("tests/test_gpu_kernels.py", "tests/test_sampling_gpu.py")
LADE = ("tests/test_lade.py",)
COUNTS = ("tests/test_accuracy_counts.py",)
ROWS = ("tests/test_row_cross_entropy.py", "tests/test_row_cross_entropy_autograd.py")
BINARY = ("tests/test_binary_cross_entropy.py",)
DISTILLATION = ("tests/test_distillation.py",)
EXPERTS = (
    *(f"tests/test_expert_cross_entropy{part}.py" for part in ("", "_autograd", "_errors")),
    *(f"tests/test_aggregate_experts{part}.py" for part in ("", "_autograd")),
    "tests/test_expert_linear.py",
)
LINEAR = (
    "tests/test_linear_cross_entropy.py",
    "tests/test_linear_cross_entropy_autograd.py",
    "tests/test_class_shards.py",
)


@pytest.fixture(scope="module")
def library() -> Path:
    spec = importlib.util.spec_from_file_location("ltkernels_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    driver = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = driver  # dataclasses look their module up
    spec.loader.exec_module(driver)
    if driver.compiler() is None or driver.torch_directory() is None:
        pytest.skip("no C++ compiler or no torch")
    out = ROOT / "build/emulated/libltkernels_cuda_emulated.so"
    driver.build_emulated(ROOT, out)
    return out


NOTHING = "nothing_at_all"  # in the name of no test


class Selection(NamedTuple):
    """Of the tests of all backends, those that run on the emulated kernels."""

    files: tuple[str, ...]
    least: int
    """So many have to pass."""
    major: int = 9
    """Compute capability 9 has clusters, 8 has none: rows then are held by one block, or read twice."""
    slow: str = NOTHING
    """What `-m slow` runs, and `make test` does not."""


SELECTIONS = {
    "cross_entropy": Selection(VALUES, 1300, slow="every_class_count and (float16 or float64)"),
    "kernels": Selection(KERNELS, 400),
    "kernels without clusters": Selection(KERNELS, 400, major=8),
    "lade": Selection(LADE, 90),
    "accuracy_counts": Selection(COUNTS, 60),
    "binary_cross_entropy": Selection(BINARY, 60),
    "distillation": Selection(DISTILLATION, 55),
    "experts": Selection(EXPERTS, 120, slow="(layouts and 300) or (values and 17-)"),
    "row_cross_entropy": Selection(ROWS, 400),
    "linear_cross_entropy": Selection(LINEAR, 250),
}


def _run(library: Path, of: Selection, extent: str, least: int) -> None:
    environment = os.environ | {"LTK_EMULATED_CUDA": str(library), "LTK_EMULATE_MAJOR": str(of.major)}
    chosen = f"cuda and not number_of_threads and {extent}"  # which are no matter of this backend
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", chosen, "-p", "no:cacheprovider", *of.files]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= least, run.stdout[-500:]


@pytest.mark.parametrize("name", SELECTIONS)
def test_emulated(library: Path, name: str) -> None:
    of = SELECTIONS[name]
    _run(library, of, f"not ({of.slow})", of.least)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, of in SELECTIONS.items() if of.slow != NOTHING])
def test_the_rest_emulated(library: Path, name: str) -> None:
    _run(library, SELECTIONS[name], f"({SELECTIONS[name].slow})", 8)

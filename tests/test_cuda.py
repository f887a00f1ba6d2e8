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


# Compute capability 9 has clusters, 8 has none: rows then are held by one block, or read twice.
@pytest.mark.parametrize(
    ("major", "files", "least"),
    [
        (9, VALUES, 1500),
        (9, KERNELS, 400),
        (8, KERNELS, 400),
        (9, LADE, 90),
        (9, COUNTS, 60),
        (9, BINARY, 60),
        (9, DISTILLATION, 55),
        (9, EXPERTS, 130),
        (9, ROWS, 400),
        (9, LINEAR, 250),
    ],
)
def test_emulated(library: Path, major: int, files: tuple[str, ...], least: int) -> None:
    environment = os.environ | {"LTK_EMULATED_CUDA": str(library), "LTK_EMULATE_MAJOR": str(major)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "cuda", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= least, run.stdout[-500:]

"""linear_cross_entropy: what a process needs at most, as the system counts it, beside inputs and gradients.

The allocator's own count is in test_linear_cross_entropy.py; this one also sees what the products of matrices and the
kernels take from elsewhere. All cases run in one process of their own, whose high-water mark is set back before each.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MIB = 1 << 20
SLACK = 6 * MIB
"""What the system's count may be off: pages that were free before the call, buffers of products of matrices."""

# Rows, classes, features, type, arguments. The logits are 1.1 GB, a twentieth of which is more than 32 MiB; 400 MB; few
# rows of 16 and of 32 MB, which are made for some classes at a time.
CASES: dict[str, tuple[int, int, int, str, dict[str, Any]]] = {
    "many rows": (3000, 90_000, 16, "float32", {}),
    "cosines": (2000, 50_000, 64, "float32", {"normalize": True}),
    "bfloat16": (4000, 50_000, 32, "bfloat16", {}),
    "long rows": (8, 4_000_000, 8, "float32", {}),
    "longer rows": (32, 8_000_000, 16, "float32", {}),
    "rows": (2000, 50_000, 64, "float32", {"reduction": "none"}),
}


def promised(rows: int, classes: int, features: int, dtype: str) -> int:
    """Beyond inputs and gradients; in half types the classifier's gradient is summed in float32 first."""
    size = 2 if dtype == "bfloat16" else 4
    sums = classes * features * 4 if size == 2 else 0
    return max(32 * MIB, rows * classes * size // 20) + sums


def used(rows: int, classes: int, features: int, dtype: str, arguments: dict[str, Any]) -> int:
    """Bytes beyond inputs and gradients at the highest point of a step."""
    import torch

    import ltkernels as ltk

    of = getattr(torch, dtype)
    x = torch.randn(rows, features).to(of).requires_grad_()
    w = torch.randn(classes, features).to(of).requires_grad_()
    y, above = torch.randint(classes, (rows,)), torch.ones(rows)

    def step(x: Any, w: Any, y: Any, above: Any) -> None:
        loss = ltk.functional.linear_cross_entropy(x, w, y, **arguments)
        torch.autograd.grad(loss, (x, w), above if loss.dim() else None)

    # Libraries, threads and their buffers; so many classes that blocks of them are a way to be gone, if that will be.
    few = 1000 if classes < 10**6 else classes // 4
    step(x[:8], w[:few], y[:8] % few, above[:8])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step(x, w, y, above)
    return status("VmHWM") - before - x.nbytes - w.nbytes


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


@pytest.fixture(scope="module")
def found() -> dict[str, int]:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the high-water mark of a process can be set back on Linux alone")
    # Memory that is given back is the system's at once, so that a case is not served from what the last one left.
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=65536"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    answer: dict[str, int] = json.loads(run.stdout)
    return answer


@pytest.mark.parametrize("name", CASES)
def test_what_a_step_needs_beside_inputs_and_gradients(name: str, found: dict[str, int]) -> None:
    rows, classes, features, dtype, _ = CASES[name]
    logits = rows * classes * (2 if dtype == "bfloat16" else 4)
    allowed = promised(rows, classes, features, dtype) + SLACK
    assert allowed < logits / 1.5, "the case would show nothing"
    assert found[name] <= allowed, f"{found[name] / MIB:.1f} of {allowed / MIB:.1f} MiB"


if __name__ == "__main__":
    print(json.dumps({name: used(*case) for name, case in CASES.items()}))

"""A small program over every path of the GPU kernels, and compute-sanitizer around it.

``python -m benchmarks.gpu.sanitize`` runs the program under memcheck and racecheck where the tool is there;
``--program`` is the program alone. Tensors get memory of their own there (PYTORCH_NO_CUDA_MEMORY_CACHING): in blocks
of a caching allocator an access beyond a tensor would stay unseen. Inputs are made on the CPU, so that few kernels
but ours are watched. Results are compared with the reference on the CPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ltkernels as ltk
from ltkernels.samplers import AliasTable, ClassIndex, ClassRounds

TOOLS = ("memcheck", "racecheck")
FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")  # after $PATH and $CUDA_HOME
ERROR_STATUS = 77
# A row in a warp, in a block, in a cluster, and read twice; rows that start anywhere, and end in half a vector.
CLASSES = (5, 257, 1000, 1203, 8142, 16385, 65537, 262145)
ROWS = 5


class Call(NamedTuple):
    name: str
    logits: Tensor
    target: Tensor
    arguments: dict[str, Any]
    learnable: tuple[str, ...] = ()


def calls(classes: Sequence[int] = CLASSES) -> Iterator[Call]:
    """Each path with and without tables, aligned and not, and what only short rows are needed for."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def labels(count: int, c: int) -> Tensor:
        return torch.randint(c, (count,), generator=generator)

    for c in classes:
        tables = {"class_bias": random(c), "class_scale": random(c).abs() + 0.5, "weight": random(c).abs()}
        for dtype in (torch.bfloat16, torch.float32):
            kind = str(dtype).removeprefix("torch.")
            x = random(ROWS, c).to(dtype)
            yield Call(f"{kind} {c}", x, labels(ROWS, c), {})
            yield Call(f"{kind} {c} tables", x, labels(ROWS, c), {**tables, "label_smoothing": 0.1})
        padded = random(ROWS, c + 1).bfloat16()[:, 1:]
        yield Call(f"bfloat16 {c} not aligned", padded, labels(ROWS, c), {"class_margin": 0.3, "scale": 8.0})
    c = classes[min(2, len(classes) - 1)]
    tables = {"class_bias": random(c), "class_scale": random(c).abs() + 0.5}
    yield Call("learnable", random(70, c), labels(70, c), {**tables, "reduction": "none"}, tuple(tables))
    yield Call("probabilities", random(ROWS, c), torch.softmax(random(ROWS, c), 1), {"label_smoothing": 0.1})
    focal = {"focal_gamma": 2.0, "z_loss": 1e-3}
    yield Call("inner dimension", random(3, c, 7).half(), labels(21, c).view(3, 7), focal)
    yield Call("classes strided", random(c, ROWS).t(), labels(ROWS, c), {"ignore_index": 1})
    yield Call("float64", random(ROWS, c).double(), labels(ROWS, c), {})
    yield Call("no rows", random(0, c), labels(0, c), {"empty": "zero"})


def results(call: Call, device: str) -> list[Tensor]:
    """Loss and gradients, on the CPU."""
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.arguments.items()}
    for name in call.learnable:
        arguments[name] = arguments[name].detach().requires_grad_()
    x = call.logits
    memory = x if x._base is None else x._base  # moved whole, so that strides and offset stay
    x = memory.to(device).as_strided(x.size(), x.stride(), x.storage_offset()).detach().requires_grad_()
    loss = ltk.functional.cross_entropy(x, call.target.to(device), **arguments)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape).to(device)
    grads = torch.autograd.grad(loss, [x, *(arguments[name] for name in call.learnable)], upstream)
    return [value.detach().cpu() for value in (loss, *grads)]


def streams() -> Iterator[tuple[str, Callable[[str], list[Tensor]]]]:
    """Each kernel of sampling, with an odd number of positions; its tables end where their memory does."""
    index = ClassIndex([c for c in range(40) for _ in range(1 + c * c)])
    probs = [c + 1.0 for c in range(40)]
    ways: dict[str, tuple[ClassIndex, AliasTable | ClassRounds | None]] = {
        "uniform": (index, None),
        "weighted": (index, AliasTable(probs)),
        "singletons": (ClassIndex.singletons(40), AliasTable(probs)),
        "rounds": (index, None),
        "slots": (index, ClassRounds(40, probs, draws_per_class=3, distinct=True)),
    }
    for name, (of_way, class_probs) in ways.items():

        def run(device: str, name: str = name, index: ClassIndex = of_way, probs: Any = class_probs) -> list[Tensor]:
            there = None if probs is None else probs.to(device)
            replacement = name not in ("rounds", "slots")
            start = torch.tensor(2**32 - 300, device=device)
            found = ltk.functional.sample_indices(
                index.to(device), start, num_samples=777, seed=1, class_probs=there, replacement=replacement
            )
            return [found.cpu()]

        yield f"samples, {name}", run


def runs(classes: Sequence[int]) -> Iterator[tuple[str, Callable[[str], list[Tensor]]]]:
    """Everything there is to run on a device, by name."""
    for call in calls(classes):
        yield call.name, lambda device, call=call: results(call, device)  # type: ignore[misc]
    yield from streams()


def program(dry: bool) -> int:
    """Runs all calls on all GPU backends; 1 when a result is wrong."""
    device = "cpu" if dry else "cuda"
    backends = [name for name in ltk.available_backends(device) if dry or name != "reference"]
    failed = not backends
    for name, run in runs(CLASSES[:3] if dry else CLASSES):
        with ltk.use_backend("reference"):
            expected = run("cpu")
        for backend in backends:
            try:
                with ltk.use_backend(backend):
                    found = run(device)
                for value, exact in zip(found, expected, strict=True):
                    half = value.dtype in (torch.bfloat16, torch.float16)
                    rtol, atol = (2e-2, 1e-4) if half else (1e-4, 1e-6) if value.is_floating_point() else (0, 0)
                    torch.testing.assert_close(value, exact, rtol=rtol, atol=atol)
            except Exception as error:
                failed = True
                print(f"FAILED {backend}, {name}: {type(error).__name__}: {str(error).strip()[:300]}", flush=True)
    print(f"{', '.join(backends) or 'no backend'} on {device}: {'failed' if failed else 'all calls right'}", flush=True)
    return int(failed)


def find_tool() -> str | None:
    home = os.environ.get("CUDA_HOME")
    folders = os.pathsep.join([os.environ.get("PATH", ""), *([f"{home}/bin"] if home else []), *FOLDERS])
    return shutil.which("compute-sanitizer", path=folders)


def summary(output: str) -> tuple[int | None, str]:
    """Number of errors that compute-sanitizer counted, and its line; None if it wrote no summary.

    memcheck ends in ``ERROR SUMMARY: 3 errors``, racecheck in ``RACECHECK SUMMARY: 2 hazards displayed (1 error, 1
    warning)``.
    """
    lines = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
    if not lines:
        return None, "no summary"
    number = re.search(r"SUMMARY: (\d+) (?:error|hazard)", lines[-1])
    return (int(number[1]) if number else None), lines[-1].strip()


def watch(sanitizer: str, tool: str, seconds: float) -> bool:
    """Runs the program under one tool; whether all was well, or could not be looked at here."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(ERROR_STATUS), "--print-limit", "20"]
    command += [sys.executable, "-m", "benchmarks.gpu.sanitize", "--program"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begun = time.monotonic()
    try:
        run = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        print(f"FAILED {tool}: not done in {seconds:.0f} s", flush=True)
        return False
    took = f"{time.monotonic() - begun:.0f} s"
    if "Device not supported" in run.stdout:
        print(f"NOTE: {tool}: compute-sanitizer does not work with this device", flush=True)
        return True
    errors, line = summary(run.stdout)
    if errors == 0 and run.returncode == 0:
        print(f"{tool}: {line} ({took})", flush=True)
        return True
    print(run.stdout[-6000:])
    print(f"FAILED {tool}: {line}, status {run.returncode} ({took})", flush=True)
    return False


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitize", description=__doc__.split("\n")[0])
    parser.add_argument("--program", action="store_true", help="the program alone")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--dry-run", action="store_true", help="the program on the CPU")
    args = parser.parse_args(argv)
    if args.program or args.dry_run:
        return program(args.dry_run)
    sanitizer = find_tool()
    if sanitizer is None:
        print("NOTE: compute-sanitizer is not here: memory and races are not checked", flush=True)
        return program(dry=False)
    begun = time.monotonic()
    if program(dry=False):  # wrong without the tool: nothing to learn from it
        return 1
    left = args.seconds - (time.monotonic() - begun)
    tools = args.tools.split(",")
    return int(not all([watch(sanitizer, tool, max(10.0, left / len(tools))) for tool in tools]))


if __name__ == "__main__":
    sys.exit(main())

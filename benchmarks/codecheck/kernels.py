"""Compiles all GPU kernels of a tree for all architectures and reads their machine code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.codecheck import machine_code
from benchmarks.codecheck.machine_code import Disassembler, Kernel

HERE = Path(__file__).resolve().parent
ARCHS = ("80", "90a", "100")


@dataclass(frozen=True)
class Half:
    """What there is of one backend: its kernels and its compiler's version, or why they were not looked at."""

    kernels: tuple[Kernel, ...] = ()
    compiler: str = ""
    missing: str | None = None


def _jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def _driver() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("ltkernels_setup_for_codecheck", HERE.parents[1] / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def read(
    disassembler: Disassembler,
    binary: Path,
    backend: str,
    source: str,
    cache: Path,
    archs: Sequence[str] = ARCHS,
) -> list[Kernel]:
    """The kernels of a cubin, or of an object's cubins for ``archs``. What was read is kept under a hash of it."""
    digest = hashlib.sha256(binary.read_bytes())
    digest.update(Path(machine_code.__file__).read_bytes())
    digest.update(f"{backend} {source} {disassembler.folder} {archs}".encode())
    kept = cache / f"{digest.hexdigest()[:32]}.json"
    if kept.exists():
        known = json.loads(kept.read_text())
        widths = ("loads", "stores")
        return [Kernel(**k | {w: {int(bits): n for bits, n in k[w].items()} for w in widths}) for k in known]
    with tempfile.TemporaryDirectory() as folder:
        if binary.suffix == ".cubin":
            cubins = [binary]
        else:
            wanted = {f"sm_{arch}" for arch in archs}
            cubins = [c for c in disassembler.extract(binary, Path(folder)) if c.suffixes[-2][1:] in wanted]
        found = [kernel for cubin in cubins for kernel in disassembler.kernels(cubin, backend, source)]
    cache.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps([asdict(kernel) for kernel in found]))
    os.replace(partial, kept)
    return found


def cuda(root: Path, archs: Sequence[str] = ARCHS, looked_at: Sequence[str] | None = None) -> Half:
    """The kernels of csrc/cuda, from the objects of the library where setup.py builds for the same architectures.

    Of these only the code for ``looked_at`` is read, which is all of them by default.

    A kernel called ``*_vectors`` promises wide loads, and wide stores if it writes as many logits as it reads.
    """
    driver = _driver()
    if not any(root.glob("csrc/cuda/*.cu")):
        return Half()
    toolkit, cxx, disassembler = driver.find_cuda(), driver.compiler(), Disassembler.find()
    if toolkit is None or cxx is None:
        return Half(missing="no nvcc, or no C++ compiler for it")
    if disassembler is None:
        return Half(missing="no cuobjdump with its nvdisasm: pip install triton brings both, a full CUDA toolkit too")
    if unknown := [arch for arch in archs if not toolkit.knows(arch)]:
        return Half(missing=f"this nvcc does not know {' '.join(f'sm_{arch}' for arch in unknown)}")
    with_ptx = {arch.removesuffix("+PTX"): arch for arch in driver.CUDA_ARCHS}
    units = driver.cuda_units(root, Path("torch"), toolkit, [with_ptx.get(arch, arch) for arch in archs])

    def kernels(unit: Any) -> list[Kernel]:
        unit.compile(cxx, root)
        kept = root / "build/codecheck/read"
        source = Path(unit.source).name
        found = read(disassembler, root / unit.object, "cuda", source, kept, list(looked_at or archs))
        return [
            replace(kernel, least_wide_loads=1, least_wide_stores=int(kernel.name.startswith("backward")))
            if "_vectors" in kernel.name
            else kernel
            for kernel in found
        ]

    # What is printed while compiling is no part of the report.
    with ThreadPoolExecutor(_jobs()) as pool, redirect_stdout(sys.stderr):
        found = [k for of_unit in pool.map(kernels, [unit for unit in units if unit.nvcc]) for k in of_unit]
    version = driver._output(toolkit.nvcc, "--version").partition("release ")[2].partition(",")[0]
    return Half(tuple(found), f"nvcc {version}")


def triton(root: Path, archs: Sequence[str] = ARCHS) -> Half:
    """The variants of ltkernels/triton, compiled by processes of their own: they may not see TRITON_INTERPRET."""
    modules = [path.stem for path in sorted(root.glob("ltkernels/triton/*.py")) if "def variants(" in path.read_text()]
    if not modules:
        return Half()
    if importlib.util.find_spec("triton") is None:
        return Half(missing="triton is not installed")
    disassembler = Disassembler.find()
    if disassembler is None:
        return Half(missing="no cuobjdump with its nvdisasm in Triton's package nor elsewhere")
    folder = root / "build/codecheck/triton"
    folder.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(folder / "cache")}

    def work(share: int) -> list[dict[str, Any]]:
        command = [sys.executable, str(HERE / "triton_worker.py"), str(folder), f"{share}/{_jobs()}"]
        command += [",".join(archs), *modules]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    def kernel(made: dict[str, Any]) -> Kernel:
        found = read(disassembler, Path(made.pop("cubin")), "triton", made["source"], folder / "read")
        entry = made.pop("entry")
        return replace(next(kernel for kernel in found if kernel.name == entry), **made)

    with ThreadPoolExecutor(_jobs()) as pool:
        made = sorted((one for share in pool.map(work, range(_jobs())) for one in share), key=lambda one: one["order"])
        for one in made:
            del one["order"]
        found = list(pool.map(kernel, made))
    return Half(tuple(found), f"triton {importlib.metadata.version('triton')}")

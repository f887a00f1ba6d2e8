"""Kernels in a cubin, as cuobjdump prints them: registers, spills, shared memory, loads and stores by width."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

WIDE = 128
"""Bits of one thread's access from which on it counts as wide."""

RESERVED_SHARED = 1024
"""Bytes of shared memory that CUDA itself takes of every block; from sm_90 on tools count them as the kernel's."""


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture. The fields from `bytes_per_logit` on are what its author says of it."""

    backend: str  # cuda or triton
    source: str
    name: str
    arch: str
    registers: int
    stack: int
    local_accesses: int  # instructions on local memory: spills, and arrays that found no registers
    shared: int
    threads: int  # of the largest block that it may be launched with
    instructions: int
    loads: dict[int, int] = field(default_factory=dict)  # of global memory: bits -> instructions
    stores: dict[int, int] = field(default_factory=dict)
    float_atomics: int = 0
    bytes_per_logit: float | None = None
    logits: int | None = None  # that a block has in registers at a time
    least_wide_loads: int = 0
    least_wide_stores: int = 0

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.backend, self.source, self.name, self.arch

    @property
    def wide_loads(self) -> int:
        return _wide(self.loads)

    @property
    def wide_stores(self) -> int:
        return _wide(self.stores)


def _wide(accesses: dict[int, int]) -> int:
    """Instructions of 128 bits; one of 256, which sm_100 has, does the work of two."""
    return sum(count * (bits // WIDE) for bits, count in accesses.items())


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor: what decides how many blocks it holds."""

    warps: int
    blocks: int
    shared: int
    registers: int = 65536
    partitions: int = 4  # each with its part of the registers
    register_unit: int = 256  # of a warp
    shared_unit: int = 128


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; units of allocation as in the occupancy
# calculator of Nsight Compute.
LIMITS = {
    "sm_80": Limits(warps=64, blocks=32, shared=164 * 1024),
    "sm_90a": Limits(warps=64, blocks=32, shared=228 * 1024),
    "sm_100": Limits(warps=64, blocks=32, shared=228 * 1024),
}


def resident_warps(kernel: Kernel, threads: int | None = None) -> int:
    """Warps of a kernel that a multiprocessor holds, from its registers, block size and static shared memory."""
    limits = LIMITS[kernel.arch]
    warps = -(-(threads or kernel.threads) // 32)
    of_warp = -(-max(kernel.registers, 1) * 32 // limits.register_unit) * limits.register_unit
    by_registers = limits.registers // limits.partitions // of_warp * limits.partitions // warps
    shared = -(-(kernel.shared + RESERVED_SHARED) // limits.shared_unit) * limits.shared_unit
    return warps * min(by_registers, limits.warps // warps, limits.blocks, limits.shared // shared)


def occupancy(kernel: Kernel) -> float:
    """Resident warps of the most that there can be."""
    return resident_warps(kernel) / LIMITS[kernel.arch].warps


class Disassembler:
    """cuobjdump, which calls the nvdisasm beside it."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def find(cls) -> Disassembler | None:
        """That of Triton, which knows the code of Triton's own ptxas, else that of the CUDA toolkit on $PATH."""
        triton = find_spec("triton")
        if triton is not None and triton.origin is not None:
            folder = Path(triton.origin).parent / "backends/nvidia/bin"
            if all((folder / tool).exists() for tool in ("cuobjdump", "nvdisasm")):
                return cls(folder)
        folders = [Path(found).resolve().parent for tool in ("cuobjdump", "nvcc") if (found := shutil.which(tool))]
        for folder in (*folders, Path("/usr/local/cuda/bin")):
            if all((folder / tool).exists() for tool in ("cuobjdump", "nvdisasm")):
                return cls(folder)
        return None

    def run(self, *arguments: str | Path, cwd: Path | None = None) -> str:
        command = [str(self.folder / "cuobjdump"), *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def version(self) -> str:
        return self.run("--version").split(", V")[-1].split()[0]

    def extract(self, fatbin: Path, folder: Path) -> list[Path]:
        """The cubins in an object file, one an architecture."""
        folder.mkdir(parents=True, exist_ok=True)
        self.run("-xelf", "all", fatbin.resolve(), cwd=folder)
        return sorted(folder.glob("*.cubin"))

    def kernels(self, cubin: Path, backend: str, source: str) -> list[Kernel]:
        """All kernels of a cubin, by their demangled names."""
        code = self.run("-sass", cubin)
        arch = re.search(r"code for (sm_\w+)", code)
        if arch is None:
            raise RuntimeError(f"{cubin}: cuobjdump names no architecture")
        resources = parse_resources(self.run("-res-usage", cubin))
        threads = parse_threads(self.run("-elf", cubin))
        accesses = parse_code(code)
        names = dict(zip(accesses, demangle(list(accesses)), strict=True))
        reserved = RESERVED_SHARED if int(re.sub(r"\D", "", arch[1])) >= 90 else 0
        return [
            Kernel(
                backend=backend,
                source=source,
                name=names[symbol],
                arch=arch[1],
                registers=resources[symbol]["REG"],
                stack=resources[symbol]["STACK"],
                shared=max(resources[symbol]["SHARED"] - reserved, 0),
                threads=threads.get(symbol, 1024),  # no __launch_bounds__: the most there can be
                **counts,
            )
            for symbol, counts in accesses.items()
        ]


def parse_resources(text: str) -> dict[str, dict[str, int]]:
    """Of ``cuobjdump -res-usage``: function -> REG, STACK, SHARED, ..."""
    found = re.findall(r"^\s*Function (\S+):\s*\n\s*(REG:.*)$", text, re.MULTILINE)
    return {name: {k: int(v) for k, v in re.findall(r"([A-Z]+(?:\[\d\])?):(\d+)", line)} for name, line in found}


def parse_threads(text: str) -> dict[str, int]:
    """Of ``cuobjdump -elf``: function -> threads of the largest block, where the kernel says so."""
    found = {}
    for section in re.split(r"^(?=\.nv\.info)", text, flags=re.MULTILINE)[1:]:
        name = re.match(r"\.nv\.info\.(\S+)", section)
        size = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\n\s*Format:.*\n\s*Value:\s*0x(\w+) 0x(\w+) 0x(\w+)", section)
        if name and size:
            x, y, z = (int(part, 16) for part in size.groups())
            found[name[1]] = x * y * z
    return found


_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)", re.MULTILINE)


def parse_code(text: str) -> dict[str, dict[str, Any]]:
    """Of ``cuobjdump -sass``: function -> what of :class:`Kernel` the instructions tell."""
    found = {}
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        loads: Counter[int] = Counter()
        stores: Counter[int] = Counter()
        local = atomics = instructions = 0
        for operation, suffixes in _INSTRUCTION.findall(body):
            instructions += operation != "NOP"
            # LD and ST: the compiler does not know which memory it is. LDGSTS: to shared memory without a register.
            if operation in ("LDG", "LD", "LDGSTS"):
                loads[access_bits(suffixes)] += 1
            elif operation in ("STG", "ST"):
                stores[access_bits(suffixes)] += 1
            elif operation in ("LDL", "STL"):
                local += 1
            elif operation.startswith(("RED", "ATOM")) and re.search(r"\.B?F(16|32|64)", suffixes):
                atomics += 1
        found[name.strip()] = {
            "loads": dict(sorted(loads.items(), reverse=True)),
            "stores": dict(sorted(stores.items(), reverse=True)),
            "local_accesses": local,
            "float_atomics": atomics,
            "instructions": instructions,
        }
    return found


def access_bits(suffixes: str) -> int:
    """Bits that a load or store moves for a thread, by its suffixes: ``.E.128``, ``.E.U16``, none of them for 32."""
    sizes = [int(size) for size in re.findall(r"\.[USB]?(8|16|64|128|256)(?=\.|$)", suffixes)]
    return max(sizes, default=32)


def demangle(symbols: list[str]) -> list[str]:
    """``void ltk::cuda::run<float, (ltk::cuda::Group)1>(ltk::cuda::Call)`` becomes ``run<float, (Group)1>``."""
    if not symbols or shutil.which("c++filt") is None:
        return symbols
    done = subprocess.run(["c++filt", *symbols], check=True, capture_output=True, text=True).stdout.splitlines()
    return [_short(name) for name in done]


def _short(name: str) -> str:
    depth, end = 0, len(name)
    if name.endswith(")"):
        for at in range(len(name) - 1, -1, -1):
            depth += (name[at] == ")") - (name[at] == "(")
            if depth == 0:
                end = at
                break
    return re.sub(r"\bltk::(\w+::)?", "", name[:end].removeprefix("void "))

"""What the memory of a GPU allows, without a GPU: an upper bound, from few numbers that are all on this page.

A kernel cannot be faster than the bytes that it moves, than the bytes that it keeps in flight (Little: bytes in
flight = bandwidth x latency), or than its exponentials. Barriers between the phases of a row, other instructions, the
edges of rows and the uneven end of a launch are not in it, so measurements lie below; a figure that is too low here
will not be reached at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from benchmarks.codecheck.machine_code import WIDE, Kernel, resident_warps


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str
    multiprocessors: int
    peak: float  # bytes a second, vendor's data sheet
    clock: float  # Hz at which the data sheet's dense bf16 rate is reached

    @property
    def copy(self) -> float:
        return COPY_SHARE * self.peak

    @property
    def bytes_to_have_in_flight(self) -> float:
        """Of a multiprocessor, for the whole copy bandwidth."""
        return self.copy * LATENCY / self.multiprocessors

    @property
    def exponentials(self) -> float:
        return EXPONENTIALS_A_CLOCK * self.clock * self.multiprocessors


# NVIDIA's data sheets: A100 80GB SXM 2039 GB/s and 312 Tflop/s on 108 multiprocessors; H100 SXM 3.35 TB/s and
# 989 Tflop/s on 132; HGX B200 8 TB/s and 2.25 Pflop/s on 148 (2048, 4096 and 8192 flop a clock and multiprocessor).
GPUS = (
    Gpu("A100", "sm_80", 108, 2.039e12, 1.41e9),
    Gpu("H100", "sm_90a", 132, 3.35e12, 1.83e9),
    Gpu("B200", "sm_100", 148, 8.0e12, 1.86e9),
)
COPY_SHARE = 0.9  # assumed: what a large copy on the device reaches of the peak
LATENCY = 800e-9  # assumed: of a load from DRAM while the memory is busy; about 500 ns when it is idle
LAUNCH = 2e-6  # assumed: the beginning and the end of a launch, in which the memory is not busy
EXPONENTIALS_A_CLOCK = (
    16  # of a multiprocessor: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"
)

ELEMENT_BYTES = {"BFloat16": 2, "Float16": 2, "float": 4, "double": 8}  # by their names in C++
ELEMENT_BYTES |= {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}  # and in torch
LOGITS = 64_000_000  # of a shape: N = LOGITS / C
CLASSES = (365, 1000, 1203, 4096, 8142, 16384, 32768, 128256)


def passes(kernel: Kernel) -> tuple[int, int] | None:
    """How often a CUDA kernel of cross_entropy reads and writes all logits; None for one that is not known here."""
    if not kernel.source.startswith("cross_entropy"):
        return None
    if kernel.name.startswith("forward"):
        # Without registers or shared memory to hold a row it is read twice; how much of it L2 still has is not known.
        return (2 if re.search(r"forward_any<|forward_vectors<\w+, \S+, 0,", kernel.name) else 1), 0
    return (1, 1) if kernel.name.startswith("backward") else None


def bytes_per_logit(kernel: Kernel) -> float | None:
    """What a kernel moves for each logit: as its module declares, or by its passes."""
    element = re.search(r"<(\w+)", kernel.name)
    visits = passes(kernel)
    if kernel.bytes_per_logit is not None or visits is None or element is None:
        return kernel.bytes_per_logit
    return ELEMENT_BYTES[element[1]] * sum(visits)


def wide_bytes_per_logit(kernel: Kernel) -> float | None:
    """What the wide instructions of a kernel move for each logit, where its module says how many logits it holds.

    Less than what it declares is narrow accesses; more is tables, or instructions of which not all are executed.
    """
    if kernel.logits is None:
        return None
    return (kernel.wide_loads + kernel.wide_stores) * WIDE / 8 * kernel.threads / kernel.logits


def in_flight(kernel: Kernel, gpu: Gpu, threads: int | None = None, fill: float = 1.0) -> float:
    """Bytes that a multiprocessor waits for, of those it needs for the copy bandwidth; 1 is enough.

    The logits that a block holds are taken to be under way together, which Triton's code is made for. Where they are
    not known, all wide loads of a thread are, as in unrolled code; a kernel without any has two narrow ones. A kernel
    of sampling has, for each index that a thread stores, a gather under way, which moves a sector.
    """
    if is_sampling(kernel):
        return resident_warps(kernel) * 32 * held(kernel) * SECTOR / gpu.bytes_to_have_in_flight
    element = re.search(r"<(\w+)", kernel.name)
    if kernel.logits is not None and element is not None and element[1] in ELEMENT_BYTES:
        of_warp = kernel.logits * ELEMENT_BYTES[element[1]] / (kernel.threads / 32)
        return resident_warps(kernel) * of_warp / gpu.bytes_to_have_in_flight
    wide = sum(bits // 8 * count for bits, count in kernel.loads.items() if bits >= WIDE)
    narrow = min((bits for bits in kernel.loads if bits < WIDE), default=0) // 8 * 2
    return resident_warps(kernel, threads) * 32 * (wide or narrow) * fill / gpu.bytes_to_have_in_flight


# --- Sampling ---

SECTOR = 32  # bytes of memory that a gather of one number moves
INDEX = 8  # bytes of an int64


def is_sampling(kernel: Kernel) -> bool:
    return kernel.source.startswith("sampling")


def held(kernel: Kernel) -> int:
    """Indices that a thread has under way at a time: those that its stores write, but for one at the very end."""
    return 2 * kernel.wide_stores or kernel.stores.get(64, 0)


def bytes_a_draw(kernel: Kernel) -> int | None:
    """What a kernel of sampling moves for each index; None for one of another hot path, or none at all.

    The index is written, and of the members, which no cache holds, a sector is read. Tables of classes (16 bytes each,
    as many for a slot of a round) are taken to be in the cache, but where every sample is a class of its own: there the
    alias entry is a sector too, and the kernel of the cuda backend is `draw_any`.
    """
    if not is_sampling(kernel) or held(kernel) == 0:
        return None
    return INDEX + SECTOR * (2 if re.search("singletons|draw_any", kernel.name) else 1)


@dataclass(frozen=True)
class Draws:
    """Upper bounds for a kernel of sampling on one GPU."""

    backend: str
    kernel: str
    gpu: str
    bytes: int  # of a draw
    instructions: float | None  # of a draw, where they are no loops
    rate: float  # draws a second


def draws(kernels: Iterable[Kernel]) -> list[Draws]:
    """What memory, bytes in flight and the issue of instructions (4 warps a clock) allow at most."""
    gpus, found = {gpu.arch: gpu for gpu in GPUS}, []
    for kernel in kernels:
        if (moved := bytes_a_draw(kernel)) is None:
            continue
        gpu = gpus[kernel.arch]
        rate = gpu.copy * min(1.0, in_flight(kernel, gpu)) / moved
        instructions = None if kernel.name.startswith("deal") else kernel.instructions / held(kernel)
        if instructions is not None:
            rate = min(rate, gpu.multiprocessors * 4 * 32 * gpu.clock / instructions)
        found.append(Draws(kernel.backend, kernel.name, gpu.name, moved, instructions, rate))
    return found


# --- Cross-entropy ---


@dataclass(frozen=True)
class Row:
    """A shape and an element type on one GPU."""

    gpu: str
    rows: int
    classes: int
    dtype: str
    bytes: int  # forward and backward
    seconds: float  # at the copy bandwidth
    forward: float | None  # bound on the fraction of the copy bandwidth
    backward: float | None
    forward_kernel: str


def serving(kernels: Iterable[Kernel], direction: str, element: str, classes: int) -> tuple[Kernel, int, float] | None:
    """The CUDA kernel of cross_entropy for rows without tables, as csrc/cuda/cross_entropy_launch.cuh chooses, its
    threads a block and the part of its loads that are inside the row. None where the tree has no such kernels."""
    width = 16 // ELEMENT_BYTES[element]
    vectors = ceil((classes + (width - 1 if classes % width else 0)) / width)
    choices = {}
    for kernel in kernels:
        if found := re.match(rf"{direction}_vectors<{element}, \(Tables\)0, (?:(\d+), )?\(Group\)(\d)>", kernel.name):
            choices[int(found[2]), int(found[1] or 0)] = kernel
    if direction == "backward":
        chosen = choices.get((0 if vectors <= 4 * 32 else 1, 0))
        return (chosen, chosen.threads, min(vectors / 128, 1.0)) if chosen else None
    for (group, held), kernel in sorted(choices.items()):
        if held == 0:
            continue
        blocks = (1,) if group < 2 else (2, 4, 8)
        for size in blocks:
            threads = 128 if group == 0 else ceil(vectors / held / size / 32) * 32
            lanes = 32 if group == 0 else threads * size
            if vectors <= held * lanes and threads <= 512 and (group < 2 or kernel.arch != "sm_80"):
                return kernel, threads, vectors / (held * lanes)
    sweeping = choices.get((1, 0))
    return (sweeping, 512, 1.0) if sweeping else None


def bound(kernel: Kernel, gpu: Gpu, threads: int, fill: float, logits: int, element: str) -> float:
    """The largest fraction of the copy bandwidth that a launch can reach, counted in the bytes it has to move."""
    reads, writes = passes(kernel) or (1, 0)
    needed = logits * ELEMENT_BYTES[element] * (1 + writes)
    moving = (
        logits * ELEMENT_BYTES[element] * (reads + writes) / gpu.copy / min(in_flight(kernel, gpu, threads, fill), 1)
    )
    return needed / gpu.copy / (max(moving, logits / gpu.exponentials) + LAUNCH)


def table(kernels: Iterable[Kernel]) -> list[Row]:
    """The figures for large batches of cross_entropy, and for one that is all launch."""
    of_arch: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        if kernel.backend == "cuda":
            of_arch.setdefault(kernel.arch, []).append(kernel)
    rows = []
    for element, dtype in (("BFloat16", "bf16"), ("float", "f32")):
        for count, classes in ((256, 1000), *((LOGITS // c, c) for c in CLASSES)):
            for gpu in GPUS:
                bounds, names = {}, {}
                for direction in ("forward", "backward"):
                    chosen = serving(of_arch.get(gpu.arch, []), direction, element, classes)
                    if chosen is not None:
                        bounds[direction] = bound(chosen[0], gpu, *chosen[1:], count * classes, element)
                        names[direction] = chosen[0].name
                moved = 3 * count * classes * ELEMENT_BYTES[element]
                rows.append(
                    Row(
                        gpu.name,
                        count,
                        classes,
                        dtype,
                        moved,
                        moved / gpu.copy,
                        bounds.get("forward"),
                        bounds.get("backward"),
                        names.get("forward", ""),
                    )
                )
    return rows

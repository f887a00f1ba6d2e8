"""The machine under measurement: how a call is timed, what memory it takes, and how the machine is named.

A device is the whole difference between CPU and GPU for the runner.
"""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from ltkernels import backends

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Call = Callable[[], object]


class Sample(NamedTuple):
    """One timed call: seconds from its start until its results exist, and the pages the system had to map for it."""

    seconds: float
    page_faults: int


class Device(Protocol):
    """What the runner needs from a machine."""

    name: str

    def time(self, call: Call) -> Sample:
        """Runs and times one call."""

    def peak_bytes(self, call: Call) -> int:
        """Largest memory that one call holds at a time beyond what was allocated before it, its results included."""

    def describe(self) -> dict[str, object]:
        """Fields that every record carries: device, cpu, isa (PyTorch's), kernel_isa (ours), load."""


class Cpu:
    """The host. A call is over when it returns, so the clock is all there is to timing."""

    name = "cpu"

    def time(self, call: Call) -> Sample:
        faults = _page_faults()
        start = time.perf_counter_ns()
        call()
        seconds = (time.perf_counter_ns() - start) * 1e-9
        return Sample(seconds, _page_faults() - faults)

    def peak_bytes(self, call: Call) -> int:
        """Highest running sum of the allocations and frees that the profiler saw during one call.

        This counts everything that comes from PyTorch's CPU allocator, inside ops as well, compiled code and C++
        extensions included. It is exact where the resident set of a process is not. What it cannot see is memory that
        a kernel takes from the C++ heap or its stack.
        """
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            call()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        changes = sorted(
            (event["args"]["Ev Idx"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"
        )
        held = peak = 0
        for _, change in changes:
            held += change
            peak = max(peak, held)
        return peak

    def describe(self) -> dict[str, object]:
        return {
            "device": self.name,
            "cpu": f"{_cpu_model()}, {os.cpu_count()} logical cores",
            "isa": torch.backends.cpu.get_cpu_capability(),
            "kernel_isa": backends.cpu_instruction_set() if "cpu" in backends.available_backends("cpu") else None,
            "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        }


class Cuda:
    """The current GPU. A call is over when the GPU has done what it was given: launches are in the time."""

    name = "cuda"

    def time(self, call: Call) -> Sample:
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        call()
        torch.cuda.synchronize()
        return Sample((time.perf_counter_ns() - start) * 1e-9, 0)

    def peak_bytes(self, call: Call) -> int:
        """As PyTorch's allocator counts, which rounds each tensor up to 512 bytes."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def kernels(self, call: Call) -> list[tuple[str, float]]:
        """What one call runs on the GPU, kernels, copies and fills: names and seconds, from the profiler."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return [
            (event.name, event.time_range.elapsed_us() * 1e-6)
            for event in profile.events() or ()
            if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
        ]

    def describe(self) -> dict[str, object]:
        properties = torch.cuda.get_device_properties()
        return {
            "device": self.name,
            "cpu": f"{_cpu_model()}, {os.cpu_count()} logical cores",
            "isa": torch.backends.cpu.get_cpu_capability(),
            "kernel_isa": f"sm_{properties.major}{properties.minor}",
            "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_mb": round(properties.L2_cache_size / 2**20, 1),
            "gpu_memory_gb": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
        }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _page_faults() -> int:
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()

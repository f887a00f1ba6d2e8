"""How calls are repeated and timed: on a GPU by CUDA graphs and events, in a dry run by loops and the clock.

Kernel time is the time between two events around a replayed graph of many calls, over their number: what the GPU
needs when nothing waits for the host. Host time is the time of one ordinary call until its results exist.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import torch

from benchmarks.gpu.table import Form
from ltkernels.bench import runner
from ltkernels.bench.device import Call, Cpu, Cuda, Device, Sample

MOST_CALLS = 128  # in one graph: each captured call of ltkernels takes counters from a pool (ltkernels/ops/gpu.py)
GRAPH_BYTES = 1_200_000_000  # moved by one replay, 0.4 ms on an H100: the events around it are off by microseconds
BEYOND_CACHE = 2.0  # times the L2 that the copies take together, so that none is found there again


class Rotation(NamedTuple):
    """How often a graph calls, on how many copies of the inputs, and whether no call then finds its data in a cache."""

    calls: int
    copies: int
    cold: bool


class Timer(Protocol):
    """What differs between a GPU and a dry run."""

    device: Device

    def rotation(self, footprint: int) -> Rotation: ...
    def repeat(self, calls: Sequence[Call], form: Form) -> Call: ...
    def time(self, call: Call) -> Sample: ...
    def kernels(self, call: Call) -> list[tuple[str, float]] | None: ...
    def synchronisations(self, call: Call) -> int | None: ...
    def synchronise(self) -> None: ...
    def forget(self) -> None: ...


class GpuTimer:
    """Timing on the current GPU."""

    def __init__(self) -> None:
        self.device = Cuda()
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    @cached_property
    def _l2(self) -> int:
        return int(torch.cuda.get_device_properties().L2_cache_size)

    def rotation(self, footprint: int) -> Rotation:
        wanted = max(2, -(-int(BEYOND_CACHE * self._l2) // footprint))
        calls = max(wanted, GRAPH_BYTES // (footprint * 3 // 2))
        if wanted > MOST_CALLS:  # so small that its data are in the cache in any use
            return Rotation(MOST_CALLS // 4, MOST_CALLS // 4, False)
        return Rotation(min(calls, MOST_CALLS), wanted, True)

    def repeat(self, calls: Sequence[Call], form: Form) -> Call:
        """A graph of the calls, to be replayed. Two run before, as they are, or compilers would run in the capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with form.asking():
            with torch.cuda.stream(stream):
                for call in calls[:2]:
                    call()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                for call in calls:
                    call()
        return graph.replay

    def time(self, call: Call) -> Sample:
        """Device time. The GPU spins first, so that all is queued when the first event passes."""
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000)  # 50 µs
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return Sample(self._start.elapsed_time(self._end) * 1e-3, 0)

    def kernels(self, call: Call) -> list[tuple[str, float]] | None:
        try:
            return self.device.kernels(call) or None
        except RuntimeError as error:  # no right to read the counters, or no profiler in this torch
            print(f"NOTE: the profiler does not run here: {error}", flush=True)
            return None

    def synchronisations(self, call: Call) -> int | None:
        """How often a call waits for the device, as torch's debug mode sees it."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)

    def synchronise(self) -> None:
        torch.cuda.synchronize()

    def forget(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class DryTimer:
    """Runs what the GPU's timer runs, without graphs; its times mean nothing."""

    def __init__(self) -> None:
        self.device = Cpu()

    def rotation(self, footprint: int) -> Rotation:
        return Rotation(4, 2, False)

    def repeat(self, calls: Sequence[Call], form: Form) -> Call:
        def replay() -> None:
            with form.asking():
                for call in calls:
                    call()

        replay()
        return replay

    def time(self, call: Call) -> Sample:
        start = time.perf_counter_ns()
        call()
        return Sample((time.perf_counter_ns() - start) * 1e-9, 0)

    def kernels(self, call: Call) -> list[tuple[str, float]] | None:
        return [("op", 1e-6)] * runner.count_launches(call)

    def synchronisations(self, call: Call) -> int | None:
        call()
        return None

    def synchronise(self) -> None:
        pass

    def forget(self) -> None:
        gc.collect()


class Asked:
    """A call that asks for its form's backend first. ``HostTimer`` leaves that out of the time."""

    def __init__(self, run: Call, form: Form) -> None:
        self.run, self.form = run, form

    def __call__(self) -> None:
        with self.form.asking():
            self.run()


class HostTimer:
    """Times ordinary calls, one by one, until their results exist."""

    def __init__(self, device: Device) -> None:
        self.device, self.name = device, device.name

    def time(self, call: Call) -> Sample:
        assert isinstance(call, Asked)
        with call.form.asking():
            return self.device.time(call.run)

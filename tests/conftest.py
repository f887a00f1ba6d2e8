"""What every test shares: one thread unless a test asks for more, a seed, reproducible hypothesis examples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

collect_ignore = []
if not (torch.cuda.is_available() or os.environ.get("LTK_EMULATED_CUDA") or os.environ.get("TRITON_INTERPRET")):
    # No GPU backend in this process: test_cuda.py and test_triton.py start some that have.
    collect_ignore += ["test_gpu_kernels.py", "test_sampling_gpu.py"]

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a machine with a GPU that nothing can be installed on
    collect_ignore += [
        "test_class_draws.py",
        "test_class_index.py",
        "test_cross_entropy_properties.py",
        "test_expert_properties.py",
        "test_rebalance.py",
        "test_samplers_distributed.py",
        "test_sampling.py",
        "test_sampling_cpu.py",
    ]
else:
    # Derandomised: the examples follow from the test's code alone, so a red run is red again for whoever looks at it.
    # Deadlines are off because shared machines stall. `HYPOTHESIS_PROFILE=explore` draws new and more examples.
    settings.register_profile(
        "ci",
        derandomize=True,
        deadline=None,
        max_examples=50,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


LONG = ("test_cuda.py", "test_triton.py", "test_codecheck.py", "test_cpp_core.py", "test_class_parallel.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the files, those that take minutes begin first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    """Small tensors run fastest on one thread; a test about threads uses the `threads` fixture."""
    torch.set_num_threads(1)
    torch.default_generator.manual_seed(0)  # torch.manual_seed also queues a call for a GPU, up to 2 ms
    yield
    torch.set_num_threads(1)


@pytest.fixture
def threads() -> Callable[[int], AbstractContextManager[None]]:
    """`with threads(2): ...` runs the block on two threads."""

    @contextmanager
    def use(count: int) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return use

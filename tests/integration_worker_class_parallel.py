"""A process of test_integration_class_parallel.py: the program, whose rank 1 is killed in the middle of a step."""

from __future__ import annotations

import os
import signal
from typing import Any

import class_parallel
import torch.distributed as dist


def dies(*args: Any) -> None:
    """In place of the program's clip_grad_norm_: between the messages of a step and those of the next."""
    dies.calls += 1  # type: ignore[attr-defined]
    if dies.calls == 3 and dist.get_rank() == 1:  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    dies.calls = 0  # type: ignore[attr-defined]
    class_parallel.clip_grad_norm_ = dies  # type: ignore[assignment]
    class_parallel.main(["--epochs", "1000"])

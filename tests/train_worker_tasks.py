"""Work for the processes that test_train_runs.py starts: a module of its own, so that they need not import torch."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from workers import Link, Stopped, UserError


def work(task: dict[str, Any], link: Link) -> Any:
    kind = task["kind"]
    if kind == "square":
        link.report(task["value"])
        return task["value"] ** 2
    if kind == "wrong setting":
        raise UserError("no such thing")
    if kind == "bug":
        raise ZeroDivisionError("in the task")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "until stopped":
        while not link.stop_requested():
            link.report(
                "x" * 100_000
            )  # more than a pipe holds: a parent that does not read while it waits would hang here
            time.sleep(0.01)
        Path(task["saved"]).write_text("saved")
        raise Stopped
    raise AssertionError(kind)

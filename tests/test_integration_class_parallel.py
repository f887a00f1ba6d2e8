"""The program with a classifier over ranks: the number of processes, DDP or FSDP change nothing but the places."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import class_parallel
import pytest
from integration_cases import PROGRAMS, ROOT, WIDTH, torchrun

PROGRAM = PROGRAMS / "class_parallel.py"


def difference(printed: str) -> float:
    """What --compare found, of parameters up to about 1 after 52 steps with Adam in float32."""
    (found,) = re.findall(r"one process has the same parameters, up to (\S+)", printed)
    return float(found)


def test_two_processes_with_fsdp_train_as_one() -> None:
    printed = torchrun(2, PROGRAM, "--epochs", "4", "--backbone", "fsdp", "--compare")
    assert "la, instance sampling" in printed and difference(printed) < 1e-4


def test_a_run_goes_on_in_another_number_of_processes(tmp_path: Path) -> None:
    """One process until within the second epoch of 13 steps, then two with DDP; they compare with a run of its own."""
    arguments = ["--epochs", "4", "--out", str(tmp_path)]
    assert class_parallel.main([*arguments, "--stop-after", "20"]) == {}
    assert (tmp_path / "checkpoint/.metadata").exists()
    assert difference(torchrun(2, PROGRAM, *arguments, "--resume", "--compare")) < 1e-4


def test_program(capsys: pytest.CaptureFixture[str]) -> None:
    la, ce = class_parallel.main([]), class_parallel.main(["--loss", "ce"])
    assert la["few"] > ce["few"] + 0.05
    assert la["balanced"] > ce["balanced"] > 0.8
    assert capsys.readouterr().out.count("instance sampling") == 2


def test_when_a_process_is_killed_the_others_end_with_an_error() -> None:
    """Without torchrun, which would end them too: the message that does not come is an error by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = os.pathsep.join((str(PROGRAMS), str(ROOT)))
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/integration_worker_class_parallel.py")],
            env={
                **os.environ, **WIDTH, "PYTHONPATH": places, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        _, message = started[0].communicate(timeout=class_parallel.TIMEOUT.total_seconds())
        started[1].communicate(timeout=60)
    finally:
        for process in started:
            process.kill()
    assert started[1].returncode == -signal.SIGKILL
    assert started[0].returncode == 1 and "Error" in message
